"""Every name of Megatron-Core that the package uses exists in the installed release (0.16.1 to 0.19)."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import megasparse.megatron

ROOT = Path(megasparse.megatron.__file__).parent.parent


def imported() -> list[tuple[str, str]]:
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
                found.update((str(node.module), alias.name) for alias in node.names)
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), imported(), ids=lambda part: str(part))
def test_import(module: str, name: str) -> None:
    owner = importlib.import_module(module)
    if not hasattr(owner, name):
        importlib.import_module(f"{module}.{name}")


METHODS = [
    ("megatron.core.models.common.embeddings.rotary_pos_embedding", "RotaryEmbedding", "_apply_scaling",
     ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer", "_get_main_param_and_optimizer_states",
     ("model_param",)),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer", "_set_main_param_and_optimizer_states",
     ("model_param", "tensors")),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer", "sharded_param_state_fully_reshardable",
     ("model_sharded_state_dict", "is_loading", "metadata")),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer", "load_parameter_state_from_fully_reshardable",
     ("state_dict",)),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer", "__init__",
     ("distributed_optimizer_instance_id",)),
    ("megatron.core.transformer.transformer_layer", "TransformerLayer", "_forward_mlp", ("padding_mask",)),
    ("megatron.core.transformer.transformer_block", "TransformerBlock", "forward", ("padding_mask",)),
    ("megatron.core.models.gpt", "GPTModel", "forward", ("padding_mask", "labels")),
    ("megatron.core.models.gpt", "GPTModel", "compute_language_model_loss", ("labels", "logits")),
    ("megatron.core.dist_checkpointing", "ShardedTensor", "from_rank_offsets", ("prepend_axis_num", "replica_id")),
]  # fmt: skip


@pytest.mark.parametrize(("module", "owner", "method", "parameters"), METHODS, ids=lambda part: str(part))
def test_method_and_its_parameters(module: str, owner: str, method: str, parameters: tuple[str, ...]) -> None:
    function = getattr(getattr(importlib.import_module(module), owner), method)
    assert set(parameters) <= set(inspect.signature(function).parameters)
