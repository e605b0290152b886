"""The ReLU MLP whose zeros are skipped exactly: public function, packed format, dispatch, kernels.

Start at `functional.sparse_mlp`. `dense.py` is the reference and the fallback.
"""

from megasparse.mlp.functional import Path, sparse_mlp
from megasparse.mlp.types import TOKEN_TILE, MainGrads, MLPOutput, MLPStats

__all__ = ["TOKEN_TILE", "MLPOutput", "MLPStats", "MainGrads", "Path", "sparse_mlp"]
