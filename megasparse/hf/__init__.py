"""Hugging Face format in and out, and inference there.

The command `megasparse convert` is `convert_to_hf` and `convert_from_hf`; `accelerate` and `restore` put the sparse MLP
into a loaded transformers model and take it out again. Imported at first use, as they need torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megasparse.hf.inference import accelerate, calibrate, measure_sparsity, restore

__all__ = ["accelerate", "calibrate", "measure_sparsity", "restore"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'megasparse.hf' has no attribute {name!r}")
    from megasparse.hf import inference

    return getattr(inference, name)
