"""The ReLU MLP whose zeros are skipped exactly: public function, packed format, dispatch, kernels.

Start at `functional.sparse_mlp`; `steps.py` is its backward for callers that communicate meanwhile. `dense.py` is
the dense path, `sparse.py` the sparse one (PyTorch on CPU, the reference of the CUDA kernels), `twell.py` the packed
format, `token_order.py` how tokens are cut into tiles, `dispatch.py` the choice between paths, `cuda.py` and
`build.py` the kernels' operators and their compilation.
"""

from megasparse.mlp.cuda import device_reason, unsupported_reason
from megasparse.mlp.dispatch import LayerRouter
from megasparse.mlp.functional import Path, sparse_mlp
from megasparse.mlp.types import TOKEN_TILE, MainGrads, MLPOutput, MLPStats

__all__ = [
    "TOKEN_TILE",
    "LayerRouter",
    "MLPOutput",
    "MLPStats",
    "MainGrads",
    "Path",
    "device_reason",
    "sparse_mlp",
    "unsupported_reason",
]
