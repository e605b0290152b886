"""Custom operators that eager code calls without PyTorch's dispatcher.

torch.compile needs `torch.library.custom_op`: it sees the operator, not the kernels behind it. Each eager call of one
takes 0.1 to 0.3 ms of the host's time (argument trees, autograd, checks for aliases; torch 2.11), several times as
much as launching the kernels. Where a GPU's share of a layer is small that is what bounds a training step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Implementation = Callable[..., Any]


class Operator:
    """A custom operator. Called in eager code, it is its implementation for the first argument's device.

    It then records nothing for autograd: call it where that is off, such as in `torch.autograd.Function`. Subclasses of
    Tensor, and code under torch.compile, get the operator itself, with the autograd formula given to `custom`.
    """

    def __init__(self, name: str, implementation: Implementation, **options: Any) -> None:
        implementation = _outside_autocast(implementation)
        self.custom = torch.library.custom_op(name, implementation, **options)
        """The operator as PyTorch knows it, to give it a fake and an autograd formula."""
        self._default = implementation
        self._implementations: dict[str, Implementation] = {}

    def register_kernel(self, device_type: str, implementation: Implementation) -> None:
        """Another implementation for a type of device."""
        implementation = _outside_autocast(implementation)
        self.custom.register_kernel(device_type, implementation)
        self._implementations[device_type] = implementation

    def __call__(self, first: Tensor, *rest: Any) -> Any:
        if is_traced(first):
            return self.custom(first, *rest)
        return self._implementations.get(first.device.type, self._default)(first, *rest)


def _outside_autocast(implementation: Implementation) -> Implementation:
    """Under `torch.autocast` an operator's own products would change types that its other steps rely on."""

    @functools.wraps(implementation)
    def run(first: Tensor, *rest: Any) -> Any:
        kind = first.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return implementation(first, *rest)
        with torch.autocast(kind, enabled=False):
            return implementation(first, *rest)

    return run


def is_traced(tensor: Tensor) -> bool:
    """Whether what is done to `tensor` must be visible to PyTorch as operators."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def operator(
    name: str, *, mutates_args: Sequence[str] = (), device_types: str | None = None
) -> Callable[[Implementation], Operator]:
    """Decorator: `torch.library.custom_op`'s arguments."""

    def make(implementation: Implementation) -> Operator:
        return Operator(name, implementation, mutates_args=mutates_args, device_types=device_types)

    return make
