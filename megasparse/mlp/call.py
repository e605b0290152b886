"""One call of the MLP: its arguments checked and settled, its forward operator."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megasparse.mlp.cuda import note_dense, unsupported_reason
from megasparse.mlp.dense import dense_forward
from megasparse.mlp.sparse import sparse_forward
from megasparse.mlp.token_order import tiled_sequences
from megasparse.mlp.types import MainGrads

Path = Literal["dense", "sparse"]


class Call(NamedTuple):
    """Arguments as the operators take them, but for the weights."""

    tokens: Tensor
    """x as [M, D], contiguous."""
    token_mask: Tensor | None
    sequences: int
    path: Path
    """"dense" also where the kernels do not apply."""
    order: Tensor | None
    capacity: int
    main_grads: MainGrads | None


def prepare(
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    token_mask: Tensor | None,
    sequences: int,
    path: Path,
    order: Tensor | None,
    capacity: int | None,
    main_grads: MainGrads | None,
) -> Call:
    """Check the arguments of `sparse_mlp` and settle what they leave open."""
    _check(x, w_in, w_down, token_mask, sequences, path, order, main_grads)
    if capacity is not None and capacity < 0:
        raise ValueError(f"sparse_mlp: capacity is {capacity}; it must be 0 or more")
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    if path == "sparse" and (reason := unsupported_reason(tokens, w_in, w_down)) is not None:
        note_dense(reason)
        path = "dense"
    if tokens.shape[0] == 0:
        path = "dense"
    if capacity is None:
        capacity = -(-tokens.shape[0] * w_down.shape[0] // 16)
    mask = None if token_mask is None else token_mask.reshape(-1).contiguous()
    order = None if order is None else order.contiguous()
    return Call(tokens, mask, tiled_sequences(tokens.shape[0], sequences), path, order, capacity, main_grads)


def run_forward(call: Call, w_in: Tensor, w_down: Tensor, save: bool) -> list[Tensor]:
    """y, l1, counts, fired, tile_counts, then what the path's backward needs (if `save`).

    Autograd sees it only where `is_traced` (`operator.py`).
    """
    main = call.main_grads if call.main_grads is not None else (None, None)
    if call.path == "sparse":
        return sparse_forward(
            call.tokens, w_in, w_down, call.token_mask, call.order, call.sequences, save, call.capacity, *main
        )
    return list(dense_forward(call.tokens, w_in, w_down, call.token_mask, call.sequences, save, *main))


def _check(
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    token_mask: Tensor | None,
    sequences: int,
    path: str,
    order: Tensor | None,
    main_grads: MainGrads | None,
) -> None:
    if path not in ("dense", "sparse"):
        raise ValueError(f"sparse_mlp: path is {path!r}; it must be 'dense' or 'sparse'")
    if x.dim() < 1 or w_in.dim() != 2 or w_down.dim() != 2:
        raise ValueError(
            "sparse_mlp: x must be [..., D] and the weights two-dimensional; got "
            f"x {tuple(x.shape)}, w_in {tuple(w_in.shape)}, w_down {tuple(w_down.shape)}"
        )
    hidden, width = w_down.shape
    if x.shape[-1] != width or w_in.shape[1] != width or w_in.shape[0] not in (hidden, 2 * hidden):
        raise ValueError(
            f"sparse_mlp: w_down [H, D] is {tuple(w_down.shape)}, so x must be [..., {width}] and w_in "
            f"[{2 * hidden}, {width}] (gated) or [{hidden}, {width}]; got x {tuple(x.shape)}, "
            f"w_in {tuple(w_in.shape)}"
        )
    for name, tensor in (("w_in", w_in), ("w_down", w_down)):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"sparse_mlp: x is {x.dtype} on {x.device} but {name} is {tensor.dtype} on {tensor.device}"
            )
    for name, extra in (("token_mask", token_mask), ("order", order)):
        if extra is not None and extra.device != x.device:
            raise ValueError(f"sparse_mlp: x is on {x.device} but {name} is on {extra.device}")
    if token_mask is not None and (token_mask.dtype != torch.bool or token_mask.shape != x.shape[:-1]):
        raise ValueError(
            f"sparse_mlp: token_mask must be bool {tuple(x.shape[:-1])}; got {token_mask.dtype} "
            f"{tuple(token_mask.shape)}"
        )
    tokens = x.shape[:-1].numel()
    if sequences < 1 or tokens % sequences:
        raise ValueError(f"sparse_mlp: sequences is {sequences}; it must divide the number of tokens, {tokens}")
    if order is not None and (order.dtype != torch.int32 or order.shape != (hidden,)):
        raise ValueError(
            f"sparse_mlp: order must be an int32 permutation of {hidden} neurons; got {order.dtype} "
            f"{tuple(order.shape)}"
        )
    if main_grads is not None:
        for name, main, weight in (("w_in", main_grads.w_in, w_in), ("w_down", main_grads.w_down, w_down)):
            wanted = torch.float64 if weight.dtype == torch.float64 else torch.float32
            alike = main.device == weight.device and main.shape == weight.shape
            if main.dtype != wanted or not alike or not main.is_contiguous():
                raise ValueError(
                    f"sparse_mlp: main_grads.{name} must be a contiguous {wanted} tensor of shape "
                    f"{tuple(weight.shape)} on {weight.device}; got {main.dtype} {tuple(main.shape)} on {main.device}, "
                    f"strides {main.stride()}"
                )
