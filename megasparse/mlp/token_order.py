"""The order in which tokens are cut into tiles: sequence after sequence, whatever the order of the rows.

Neighbours in a sequence share more neurons than the same position of several sequences, and the time of the
sparse path follows how many neurons the 128 tokens of a tile use together. Megatron's activations
[s, b, D] come position after position: with S positions of b sequences, token t (0 <= t < M = S b) is row
(t % S) b + t // S of x, y and their gradients. The CUDA kernels read and write those rows in place
(`csrc/token_rows.h`).
"""

from torch import Tensor

from megasparse.mlp.types import TOKEN_TILE


def tiled_sequences(tokens: int, sequences: int) -> int:
    """`sequences` where tiles can follow them; 1 (tokens in the order of the rows) where a tile would span two."""
    return sequences if tokens > 0 and tokens % (sequences * TOKEN_TILE) == 0 else 1


def by_sequence(rows: Tensor, sequences: int) -> Tensor:
    """[S * sequences, ...] position after position -> the same sequence after sequence: token t at index t."""
    if sequences == 1:
        return rows
    return rows.reshape(-1, sequences, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def mask_by_sequence(token_mask: Tensor | None, sequences: int) -> Tensor | None:
    """`by_sequence` of a mask; None, that all tokens count, stays None."""
    return None if token_mask is None else by_sequence(token_mask, sequences)


def by_position(tokens: Tensor, sequences: int) -> Tensor:
    """The inverse of `by_sequence`."""
    return by_sequence(tokens, tokens.shape[0] // sequences) if sequences > 1 else tokens
