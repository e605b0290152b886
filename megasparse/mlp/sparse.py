"""The MLP computing only what active neurons need, as torch operators.

Forward: the gate product, packed (`twell.py`); then per 128-token tile the up and down products over the
union of its tokens' active neurons. Backward, in two operators, so that the gradient of the input can be sent
while those of the weights are computed: dh, dg, du and dx the same way; weight gradients per tile of 64 neurons
over the tokens that use any of them. Nothing is dropped and nothing approximated: zeros are
skipped.

Saved for the backward: the pattern, its lists and the packed g and u, in buffers of `capacity` non-zeros.
If there are more non-zeros than that, the backward computes g and u again; `capacity` changes memory and
time, never results.

The implementation here is the PyTorch one, for the CPU: the reference of the CUDA kernels (`cuda.py`),
same format, same operator.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megasparse.mlp import cuda
from megasparse.mlp.dense import fake_outputs, fake_weight_gradients
from megasparse.mlp.dense_elementwise import statistics, sum_dtype
from megasparse.mlp.operator import operator
from megasparse.mlp.token_order import by_position, by_sequence, mask_by_sequence
from megasparse.mlp.twell import (
    POSITION_TILE,
    Pattern,
    Sizes,
    TileLists,
    pack,
    pattern_of,
    tile_lists,
    unpack,
    words_to_bits,
)
from megasparse.mlp.types import TOKEN_TILE


def _split_rows(w_in: Tensor, hidden: int, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """The given neurons' rows of the gate and of the up weight (None where there is no gate)."""
    return w_in[rows], w_in[hidden + rows] if w_in.shape[0] != hidden else None


def _natural(order: Tensor | None, hidden: int) -> Tensor:
    return torch.arange(hidden) if order is None else order.long()


def _tiles(lists: TileLists, order: Tensor, tokens: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each token tile: its rows, its union's positions, and the neurons at those positions."""
    for tile, size in enumerate(lists.tile_info[0, :-1].tolist()):
        positions = lists.union_index[tile, :size].long()
        yield slice(tile * TOKEN_TILE, min(tokens, (tile + 1) * TOKEN_TILE)), positions, order[positions]


def _gate_and_up(x: Tensor, w_in: Tensor, hidden: int, order: Tensor) -> tuple[Pattern, TileLists, Tensor, Tensor]:
    """Pattern and lists, packed g and packed u (empty where there is no gate: then g is h)."""
    gate = torch.relu(x @ w_in[order].t())
    pattern = pattern_of(gate)
    lists = tile_lists(pattern)
    g = pack(gate, pattern)
    if w_in.shape[0] == hidden:
        return pattern, lists, g, g.new_empty(0)
    up = torch.zeros_like(gate)
    for rows, positions, neurons in _tiles(lists, order, x.shape[0]):
        up[rows, positions] = x[rows] @ w_in[hidden + neurons].t()
    return pattern, lists, g, pack(up, pattern)


@operator("megasparse::mlp_sparse_forward", device_types="cpu")
def sparse_forward(
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    sequences: int,
    save: bool,
    capacity: int,
    main_w_in: Tensor | None,
    main_w_down: Tensor | None,
) -> list[Tensor]:
    """x [M, D] -> y [M, D], l1 [], counts int64 [4], fired bool [H], tile_counts int32 [H]; then, if `save`, what the
    backward needs: mask, offset, row_ptr (`Pattern`), union_words, union_index, tile_info (`TileLists`), and the packed
    g and u [capacity] (no u where there is no gate).

    `counts` holds tokens, active, union, tiles as in `MLPStats`. The main gradients are not read: they only travel to
    the backward. Tokens are numbered sequence after sequence (`token_order.py`; `sequences`: `tiled_sequences`) in all
    that is saved, while x, y, token_mask and the gradients keep the caller's rows.
    """
    hidden = w_down.shape[0]
    x, token_mask = by_sequence(x, sequences), mask_by_sequence(token_mask, sequences)
    positions_to_neurons = _natural(order, hidden)
    pattern, lists, g, u = _gate_and_up(x, w_in, hidden, positions_to_neurons)
    h = unpack(g * u if u.numel() else g, pattern, x.shape[0], hidden)
    y = torch.empty_like(x)
    for rows, positions, neurons in _tiles(lists, positions_to_neurons, x.shape[0]):
        y[rows] = h[rows, positions] @ w_down[neurons]
    l1 = h.abs().sum(1, dtype=sum_dtype(x.dtype))
    if token_mask is not None:
        l1 = l1.masked_fill(~token_mask, 0)
    active = words_to_bits(pattern.mask)[: x.shape[0], :hidden]
    counts, *per_position = statistics(active, token_mask, 1)
    per_neuron = [torch.empty_like(values) for values in per_position]
    for values, ordered in zip(per_neuron, per_position, strict=True):
        values[positions_to_neurons] = ordered
    outputs = [by_position(y, sequences), l1.sum(), counts, *per_neuron]
    if not save:
        return outputs
    packed = [_fit(g, capacity)] + ([_fit(u, capacity)] if w_in.shape[0] != hidden else [])
    return [*outputs, *pattern, *lists, *packed]


def _fit(values: Tensor, capacity: int) -> Tensor:
    """The first `capacity` values in a buffer of exactly that size (the backward checks row_ptr, not
    this)."""
    buffer = values.new_zeros(capacity)
    buffer[: values.numel()] = values[:capacity]
    return buffer


@sparse_forward.custom.register_fake
def _(
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    sequences: int,
    save: bool,
    capacity: int,
    main_w_in: Tensor | None,
    main_w_down: Tensor | None,
) -> list[Tensor]:
    outputs = list(fake_outputs(x, w_down))
    if not save:
        return outputs
    hidden = w_down.shape[0]
    tiles, padded_tokens, words, padded_hidden = Sizes.of(x.shape[0], hidden)
    return [
        *outputs,
        x.new_empty(padded_tokens, words, dtype=torch.int64),
        x.new_empty(padded_tokens, words, dtype=torch.int16),
        x.new_empty(padded_tokens + 1, dtype=torch.int64),
        x.new_empty(tiles, words, dtype=torch.int64),
        x.new_empty(tiles, padded_hidden, dtype=torch.int32),
        x.new_empty(3, tiles + 1, dtype=torch.int32),
        *(x.new_empty(capacity) for _ in range(1 if w_in.shape[0] == hidden else 2)),
    ]


def _padded_entries(dy: Tensor, w_down: Tensor) -> int:
    """Values that every entry of [M, H] there could be takes, padded to whole tiles."""
    _, padded_tokens, _, padded_hidden = Sizes.of(dy.shape[0], w_down.shape[0])
    return padded_tokens * padded_hidden


def _overflowed(saved: list[Tensor]) -> bool:
    """Whether there are more non-zeros than the forward saved."""
    return int(Pattern(*saved[:3]).row_ptr[-1]) > saved[6].numel()


@operator("megasparse::mlp_sparse_input_gradient", device_types="cpu")
def sparse_input_gradient(
    dy: Tensor,
    dl1: Tensor | None,
    x: Tensor | None,
    w_in: Tensor,
    w_down: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    sequences: int,
    saved: list[Tensor],
) -> list[Tensor]:
    """dy [M, D] -> dx [M, D], then what the weight gradients need: h, du and, where there is a gate, dg, packed in
    buffers of Mp x Hp values.

    `saved` is what the forward returned to be saved. x is read only where that holds fewer values than there are
    non-zeros. Without x, nothing is computed then (all outputs are undefined): `sparse_input_gradient_again` does it.
    """
    packed = saved[6:]
    if _overflowed(saved):
        if x is None:
            values = dy.new_full((_padded_entries(dy, w_down),), torch.nan)
            gradients = 2 if w_in.shape[0] != w_down.shape[0] else 1
            return [torch.full_like(dy, torch.nan), values, *(values.clone() for _ in range(gradients))]
        packed = _packed_again(x, w_in, w_down, order, sequences)
    return _input_gradient(dy, dl1, w_in, w_down, token_mask, order, sequences, saved, packed)


def _packed_again(x: Tensor, w_in: Tensor, w_down: Tensor, order: Tensor | None, sequences: int) -> list[Tensor]:
    hidden = w_down.shape[0]
    return list(_gate_and_up(by_sequence(x, sequences), w_in, hidden, _natural(order, hidden))[2:])


def _input_gradient(
    dy: Tensor,
    dl1: Tensor | None,
    w_in: Tensor,
    w_down: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    sequences: int,
    saved: list[Tensor],
    packed: list[Tensor],
) -> list[Tensor]:
    hidden, tokens, entries = w_down.shape[0], dy.shape[0], _padded_entries(dy, w_down)
    gated = w_in.shape[0] != hidden
    dy = by_sequence(dy, sequences)
    token_mask = mask_by_sequence(token_mask, sequences)
    natural = _natural(order, hidden)
    pattern, lists = Pattern(*saved[:3]), TileLists(*saved[3:6])
    g = unpack(packed[0], pattern, tokens, hidden)
    u = unpack(packed[1], pattern, tokens, hidden) if gated else None
    h = g if u is None else g * u
    active = words_to_bits(pattern.mask)[:tokens, :hidden]

    dx = torch.empty_like(dy)
    dg, du = torch.zeros_like(g), torch.zeros_like(g)
    wide = sum_dtype(dy.dtype)  # only dg and du are rounded: less than half an ulp of a rounded dh would not add to it
    for rows, positions, neurons in _tiles(lists, natural, tokens):
        dh = dy[rows].to(wide) @ w_down[neurons].t().to(wide)
        if dl1 is not None:
            sign = torch.sign(h[rows, positions])
            if token_mask is not None:
                sign = sign.masked_fill(~token_mask[rows].unsqueeze(1), 0)
            dh += sign.to(wide) * dl1
        dh = dh.masked_fill(~active[rows, positions], 0)
        gate_rows, up_rows = _split_rows(w_in, hidden, neurons)
        if u is None or up_rows is None:
            du[rows, positions] = dh.to(du.dtype)
            dx[rows] = du[rows, positions] @ gate_rows
        else:
            dg[rows, positions] = (dh * u[rows, positions]).to(dg.dtype)
            du[rows, positions] = (dh * g[rows, positions]).to(du.dtype)
            dx[rows] = torch.cat([dg[rows, positions], du[rows, positions]], 1) @ torch.cat([gate_rows, up_rows])
    values = [h, du, dg] if gated else [h, du]
    return [by_position(dx, sequences), *(_fit(pack(value, pattern), entries) for value in values)]


@sparse_input_gradient.custom.register_fake
def _(
    dy: Tensor,
    dl1: Tensor | None,
    x: Tensor | None,
    w_in: Tensor,
    w_down: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    sequences: int,
    saved: list[Tensor],
) -> list[Tensor]:
    values = 3 if w_in.shape[0] != w_down.shape[0] else 2
    return [dy.new_empty(dy.shape), *(dy.new_empty(_padded_entries(dy, w_down)) for _ in range(values))]


@operator("megasparse::mlp_sparse_input_gradient_again", mutates_args=("dx", "h", "du", "dg"), device_types="cpu")
def sparse_input_gradient_again(
    dy: Tensor,
    dl1: Tensor | None,
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    sequences: int,
    saved: list[Tensor],
    dx: Tensor,
    h: Tensor,
    du: Tensor,
    dg: Tensor | None,
) -> None:
    """Where `sparse_input_gradient` was called without x and has computed nothing, computes its outputs; elsewhere
    leaves them as they are."""
    if not _overflowed(saved):
        return
    packed = _packed_again(x, w_in, w_down, order, sequences)
    results = _input_gradient(dy, dl1, w_in, w_down, token_mask, order, sequences, saved, packed)
    for output, result in zip([dx, h, du, *([] if dg is None else [dg])], results, strict=True):
        output.copy_(result)


@operator("megasparse::mlp_sparse_weight_gradients", mutates_args=("main_w_in", "main_w_down"), device_types="cpu")
def sparse_weight_gradients(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    order: Tensor | None,
    sequences: int,
    pattern: list[Tensor],
    values: list[Tensor],
    main_w_in: Tensor | None,
    main_w_down: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dw_in, dw_down; given main gradients, adds to them and returns both empty.

    `pattern` is mask, offset, row_ptr as the forward returned them; `values` is what `sparse_input_gradient` returned
    beside dx.
    """
    hidden, tokens = w_down.shape[0], x.shape[0]
    x, dy = by_sequence(x, sequences), by_sequence(dy, sequences)
    natural, where = _natural(order, hidden), Pattern(*pattern)
    h, *by_product = (unpack(value, where, tokens, hidden) for value in values)
    first_rows = (0,) if len(by_product) == 1 else (hidden, 0)  # of du's weight, of dg's
    dw_in = torch.zeros_like(w_in) if main_w_in is None else main_w_in
    dw_down = torch.zeros_like(w_down) if main_w_down is None else main_w_down
    for tile in range(where.mask.shape[1]):
        users = where.mask[:tokens, tile].nonzero().squeeze(1)
        columns = slice(tile * POSITION_TILE, min(hidden, (tile + 1) * POSITION_TILE))
        neurons = natural[columns]
        for gradient, first_row in zip(by_product, first_rows, strict=True):
            dw_in[first_row + neurons] += (gradient[users, columns].t() @ x[users]).to(dw_in.dtype)
        dw_down[neurons] += (h[users, columns].t() @ dy[users]).to(dw_down.dtype)
    return (
        dw_in if main_w_in is None else x.new_empty(0),
        dw_down if main_w_down is None else x.new_empty(0),
    )


@sparse_weight_gradients.custom.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    order: Tensor | None,
    sequences: int,
    pattern: list[Tensor],
    values: list[Tensor],
    main_w_in: Tensor | None,
    main_w_down: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return fake_weight_gradients(w_in, w_down, main_w_in, main_w_down)


cuda.register(sparse_forward, sparse_input_gradient, sparse_input_gradient_again, sparse_weight_gradients)
