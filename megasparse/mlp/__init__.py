"""The ReLU MLP whose zeros are skipped exactly: public function, packed format, dispatch, kernels.

Start at `functional.sparse_mlp`; `call.py` checks its arguments, `steps.py` is its forward and backward for whoever
communicates meanwhile. `dense.py` is the dense path, `sparse.py` the sparse one (PyTorch on CPU, the reference of the
CUDA kernels), `operator.py` what both are to PyTorch, `autograd.py` what they are to autograd, `twell.py` the
packed format, `token_order.py` how tokens are cut into tiles, `dispatch.py` the choice between paths, `cuda.py` and
`build.py` the kernels' operators and their compilation.
"""

from megasparse.mlp.call import Path
from megasparse.mlp.cuda import device_reason, unsupported_reason
from megasparse.mlp.dispatch import LayerRouter
from megasparse.mlp.functional import sparse_mlp
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
