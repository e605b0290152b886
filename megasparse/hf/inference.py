"""`megasparse.hf.accelerate(model)`: the sparse MLP in a loaded transformers model, for inference."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megasparse.hf.errors import AccelerateError
from megasparse.hf.inference_mlp import InferenceMLP, LayerSparsity
from megasparse.mlp.dispatch import Mode

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, sample: Tensor | None = None, path: Mode = "auto") -> Model:
    """Make the ReLU MLPs of a transformers model compute only what active neurons need, where that is faster.

    Outputs are exact up to rounding, for every input. `generate`, torch.compile, CUDA graphs, `state_dict`,
    `save_pretrained` and `.to()` work as before; `restore` undoes it. On a machine without a Hopper GPU the model
    computes as before, and one notice says why.

    Args:
        model: Llama, Qwen2, Qwen3, Arcee or Apertus with `hidden_act: relu`, changed in place.
        sample: int64 [b, s] tokens, typical of what will be computed: one forward over them chooses each layer's path.
            Without it the first forward of 128 or more tokens chooses, which must not be compiled. Until then
            every layer runs dense.
        path: "auto" follows the measured costs; "dense" and "sparse" force a path ("sparse" runs on CPU too,
            slowly, by the kernels' reference).

    Returns:
        The model.

    Raises:
        AccelerateError: an MLP is not a ReLU one without biases, or its weights are elsewhere; nothing was changed.
    """
    if path not in ("auto", "dense", "sparse"):
        raise ValueError(f"accelerate: path is {path!r}; it must be 'auto', 'dense' or 'sparse'")
    found = {name: module for name, module in model.named_modules() if _is_mlp(module)}
    if not found:
        raise AccelerateError(
            f"{type(model).__name__} has no MLP made of up_proj, down_proj and act_fn; models of type Llama, Qwen2, "
            "Qwen3, Arcee and Apertus have"
        )
    for name, module in found.items():
        _check(name, module)
    for name, module in found.items():
        _replace(model, name, InferenceMLP(module, path))
    if sample is not None:
        calibrate(model, sample)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: the original modules, every weight in memory of its own, bit for bit. Returns the model."""
    for name, module in _accelerated(model).items():
        module.unpack()
        _replace(model, name, module.original)
    return model


def calibrate(model: nn.Module, sample: Tensor) -> list[LayerSparsity]:
    """Choose the paths of an accelerated model by one forward over tokens [b, s]. Returns what the layers did."""
    for module in _accelerated(model).values():
        if module.mode == "auto" and module.w_in is not None:
            module.sparse_from = None
    return _forward(model, sample, choose=True)


def measure_sparsity(model: nn.Module, tokens: Tensor) -> list[LayerSparsity]:
    """L0 and union of every MLP of an accelerated model over tokens [b, s] (the first 16384), in order."""
    return _forward(model, tokens, choose=False)


def _forward(model: nn.Module, tokens: Tensor, choose: bool) -> list[LayerSparsity]:
    observed: list[LayerSparsity] = []

    def observe(module: InferenceMLP, inputs: tuple[Any, ...]) -> None:
        observed.append(module.observe(inputs[0]))
        if choose and module.sparse_from is None:
            module.choose(observed[-1])

    hooks = [module.register_forward_pre_hook(observe) for module in _accelerated(model).values()]
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            model(input_ids=tokens.to(device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return observed


def _accelerated(model: nn.Module) -> dict[str, InferenceMLP]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, InferenceMLP)}
    if not found:
        raise AccelerateError(f"{type(model).__name__} is not accelerated; call megasparse.hf.accelerate(model) first")
    return found


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _is_mlp(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("up_proj", "down_proj", "act_fn"))


def _check(name: str, module: nn.Module) -> None:
    """Raise AccelerateError where the module computes something else than the sparse MLP."""
    if isinstance(module, InferenceMLP):
        raise AccelerateError(f"{name}: is accelerated already; call megasparse.hf.restore(model) first")
    activation = type(module.act_fn).__name__
    if not isinstance(module.act_fn, nn.ReLU):
        raise AccelerateError(
            f"{name}: its activation is {activation}, not ReLU, so nothing of it is zero; train with ReLU "
            "(megasparse convert from-hf takes the weights) and accelerate the export"
        )
    for part in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(module, part, None)
        if linear is None and part == "gate_proj":
            continue
        if type(linear) is not nn.Linear:
            raise AccelerateError(
                f"{name}.{part}: is a {type(linear).__name__}, not a plain Linear; load the model without "
                "quantisation, and merge adapters first"
            )
        if linear.bias is not None:
            raise AccelerateError(f"{name}.{part}: has a bias; the sparse MLP has none (mlp_bias: false)")
        if linear.weight.device.type == "meta" or type(linear.weight.data) is not Tensor:
            raise AccelerateError(
                f"{name}.{part}: its weight is not whole on this process's devices; load the model without offloading "
                "and without tensor parallelism"
            )
