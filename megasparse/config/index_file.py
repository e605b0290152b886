"""Whether both files of a Megatron data set are whole, from their sizes and a few numbers of the index.

Megatron maps both files and finds out that one is cut short when a sample lies behind the cut: perhaps hours later.
"""

from __future__ import annotations

import struct
from pathlib import Path

_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, type of a token, number of sequences, number of document bounds."""
_MAGIC = b"MMIDIDX\x00\x00"
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}


def damage(prefix: str) -> str | None:
    """What is wrong with `prefix`.bin or `prefix`.idx, which must be there; None: nothing."""
    tokens, index = Path(prefix + ".bin"), Path(prefix + ".idx")
    size = index.stat().st_size
    with index.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            return f"{index} is not the index of a Megatron data set"
        _, _, kind, sequences, bounds = _HEADER.unpack(header)
        lengths = _HEADER.size  # int32 each; then where each sequence begins and the bounds, int64 each
        begins = lengths + 4 * sequences
        whole = begins + 8 * (sequences + bounds)
        if size != whole:
            return f"{index} has {size} bytes instead of {whole}"
        counted = 0
        if sequences:
            file.seek(begins - 4)
            (length,) = struct.unpack("<i", file.read(4))
            file.seek(begins + 8 * (sequences - 1))
            (begin,) = struct.unpack("<q", file.read(8))
            counted = begin + length * _TOKEN_BYTES.get(kind, 0)
    actual = tokens.stat().st_size
    if actual != counted:
        return f"{tokens} has {actual} bytes, and its index counts {counted}"
    return None
