"""Lets Megatron-Core run without CUDA (gloo, CPU tensors), for development and tests.

Megatron-Core names the CUDA device in many places: `torch.cuda.current_device()` as the device of what it allocates,
`device="cuda"` in factory calls, CUDA streams and events, the CUDA random state, and checks of `Tensor.type()`
against `torch.cuda.FloatTensor`. `enable_cpu_runtime` gives those names a meaning on the CPU by replacing attributes
of `torch` in this process; Megatron's own code is left as it is. It does nothing at all where CUDA is available.

What the names mean then:

- the CUDA device is the CPU; the CUDA random state is the CPU's, so Megatron's tracker of random states works;
- streams and events do nothing: everything on the CPU is in order already;
- `Tensor.cuda()` returns the tensor; factories given `device="cuda"` allocate on the CPU;
- to Megatron's own modules, and to them alone, a CPU tensor's `type()` says `torch.cuda.…`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "rand", "randint", "randn", "tensor", "zeros")
_originals: list[tuple[Any, str, Any]] = []


class _Stream:
    """A CUDA stream where all work is done in order anyway."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = _CPU

    def synchronize(self) -> None:
        return None

    def wait_event(self, event: Any) -> None:
        return None

    def wait_stream(self, stream: Any) -> None:
        return None

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else _Event()

    def query(self) -> bool:
        return True


class _Event:
    """A CUDA event that has always happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        return None

    def wait(self, stream: Any = None) -> None:
        return None

    def synchronize(self) -> None:
        return None

    def query(self) -> bool:
        return True


class _CpuGenerators:
    """`torch.cuda.default_generators`: the CPU's generator under every index."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The factory with a CUDA device, and the pinning of memory that only CUDA needs, replaced."""

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def _type_for_megatron(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return tensor_type


def _replace(owner: Any, name: str, value: Any) -> None:
    _originals.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    torch.set_rng_state(new_state)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def cpu_runtime_enabled() -> bool:
    """Whether the names of CUDA currently mean the CPU in this process."""
    return bool(_originals)


def enable_cpu_runtime() -> bool:
    """Make Megatron-Core run on the CPU where there is no CUDA; call it before building models.

    Safe to call more than once and after Megatron-Core was imported. `disable_cpu_runtime` undoes it.

    Returns:
        True where the CPU now stands in for CUDA, False where CUDA is available and nothing was changed.
    """
    if torch.cuda.is_available():
        return False
    if _originals:
        return True
    # torch.compile (imported by Megatron-Core) and `with torch.device(...)` (used by transformers to load models) list
    # torch's operators once, when first used: they must not find the replacements below.
    importlib.import_module("torch._dynamo")
    importlib.import_module("torch.utils._device")._device_constructors()
    cuda = torch.cuda
    _replace(cuda, "current_device", lambda: _CPU)
    # `torch.cuda._lazy_call` runs at once where CUDA is initialised and would queue for ever where it is not;
    # Megatron sets the random state through it. Nothing else that runs without CUDA asks.
    _replace(cuda, "is_initialized", lambda: True)
    _replace(cuda, "default_generators", _CpuGenerators())
    for owner in (cuda, cuda.random):
        _replace(owner, "get_rng_state", _get_rng_state)
        _replace(owner, "set_rng_state", _set_rng_state)
        _replace(owner, "manual_seed", _seed)
    for name in ("synchronize", "empty_cache", "set_device"):
        _replace(cuda, name, _nothing)
    _replace(cuda, "Stream", _Stream)
    _replace(cuda, "Event", _Event)
    _replace(cuda, "stream", lambda stream: contextlib.nullcontext())
    for name in ("current_stream", "default_stream"):
        _replace(cuda, name, _Stream)
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "type", _type_for_megatron(torch.Tensor.type))
    for name in _FACTORIES:
        _replace(torch, name, _on_cpu(getattr(torch, name)))
    return True


def disable_cpu_runtime() -> None:
    """Give every replaced attribute of `torch` back; nothing happens where nothing was replaced."""
    while _originals:
        owner, name, value = _originals.pop()
        setattr(owner, name, value)
