"""A Hugging Face folder as a transformers model, those of the published sparse layout too, without remote code."""

from __future__ import annotations

from typing import Any

import torch

from megasparse.hf.config import to_hf_config
from megasparse.hf.errors import ConvertError, first_line
from megasparse.hf.model_folder import ModelFolder


def load_transformers(folder: ModelFolder, dtype: torch.dtype, activation: str | None = None) -> Any:
    """The model, in evaluation mode, on the CPU.

    Args:
        folder: what to load.
        dtype: of its weights.
        activation: of its MLPs, instead of its own.

    Raises:
        ConvertError: transformers does not load it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    described = folder.described
    if described.published:
        return _built_here(folder, dtype).eval()
    config = AutoConfig.from_pretrained(folder.path, local_files_only=True)
    config.hidden_act = activation or described.activation
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder.path, config=config, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = first_line(error)
        raise ConvertError(f"{folder.path}: transformers does not load it ({reason}); download it again") from None
    return loaded.eval()


def _built_here(folder: ModelFolder, dtype: torch.dtype) -> Any:
    """The stock architecture with the tensors of a layout that transformers does not know."""
    from transformers import AutoConfig, AutoModelForCausalLM

    described = folder.described
    assert described.model.vocab_size is not None
    raw = to_hf_config(described.model, described.model.vocab_size, described.max_position_embeddings, "float32", {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw)).to(dtype)
    for name, parameter in model.named_parameters():
        if name in folder.shapes:
            parameter.data.copy_(folder.tensor(name))
        elif name.endswith(".bias"):  # of the architecture alone; `ModelFolder` has seen that it is zero in the files
            parameter.data.zero_()
        else:
            raise AssertionError(f"{name} is in no file")
    return model
