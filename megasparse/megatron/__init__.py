"""The Megatron-Core side: specs, the sparse MLP module, attention and norm without Transformer Engine, the CPU runtime.

Importing this lets Megatron-Core run on the CPU where there is no CUDA (`cpu_runtime`).
"""

from megasparse.megatron.cpu_runtime import cpu_runtime_enabled, disable_cpu_runtime, enable_cpu_runtime

enable_cpu_runtime()

from megasparse.megatron.model import build_model, transformer_config  # noqa: E402
from megasparse.megatron.sparse_mlp import SparseMLP, iter_sparse_mlps  # noqa: E402
from megasparse.megatron.spec import hybrid_mlp_layer_spec, layer_spec, megatron_layer_spec, sparse_mlp_spec  # noqa: E402
from megasparse.megatron.stats import LayerStats  # noqa: E402

__all__ = [
    "LayerStats",
    "SparseMLP",
    "build_model",
    "cpu_runtime_enabled",
    "disable_cpu_runtime",
    "enable_cpu_runtime",
    "hybrid_mlp_layer_spec",
    "iter_sparse_mlps",
    "layer_spec",
    "megatron_layer_spec",
    "sparse_mlp_spec",
    "transformer_config",
]
