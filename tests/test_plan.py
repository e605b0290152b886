"""The dry run's arithmetic: against models as they are built, hand-made sums, and published sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse.config import Config, ConfigError, load_config, load_with_origins, parse_config
from megasparse.plan import Plan, count_parameters, make_plan, parameters_on_stage
from megasparse.plan.in_flight import in_flight
from megasparse.plan.text import print_plan
from tests.launch import run_distributed
from tests.test_config import CONFIGS

ROOT = Path(__file__).resolve().parents[1]
TINY: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 4, "vocab_size": 1000},
    "data": {"sequence_length": 256},
    "training": {"micro_batch_size": 2, "global_batch_size": 16, "steps": 100, "precision": "bf16"},
}
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "untied": ["model.tie_embeddings=false"],
    "not gated": ["model.gated=false"],
    "grouped, biased": ["model.num_query_groups=2", "model.qkv_bias=true"],
    "wide heads, query norms": ["model.kv_channels=32", "model.qk_norm=true"],
    "layer norm": ["model.normalization=layernorm", "model.qk_norm=true"],
}
LAYOUTS = ["parallel.tensor=2", "parallel.pipeline=2"]


def count_built(overrides: list[str]) -> list[int]:
    """Parameters of this rank's model chunks (run on every rank)."""
    from megatron.core import parallel_state, tensor_parallel

    from megasparse.megatron.model import build_model

    cfg = parse_config({**TINY, "training": {**TINY["training"], "precision": "fp32"}}, overrides)
    parallel_state.initialize_model_parallel(cfg.parallel.tensor, cfg.parallel.pipeline, cfg.parallel.virtual_pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunks: list[torch.nn.Module] = list(build_model(cfg))
    return [parallel_state.get_pipeline_model_parallel_rank(), sum(p.numel() for c in chunks for p in c.parameters())]


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_those_of_the_model_as_built(name: str) -> None:
    cfg = parse_config(TINY, VARIANTS[name])
    ((_, built),) = run_distributed(1, "tests.test_plan:count_built", VARIANTS[name])
    assert count_parameters(cfg).total == built == parameters_on_stage(cfg, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["untied", "grouped, biased", "wide heads, query norms"])
def test_parameters_of_every_rank(name: str, layout: str) -> None:
    cfg = parse_config(TINY, [*VARIANTS[name], layout])
    for stage, built in run_distributed(2, "tests.test_plan:count_built", [*VARIANTS[name], layout]):
        assert parameters_on_stage(cfg, stage) == built


def test_published_sizes() -> None:
    """Llama 2 as published counts 6,738,415,616, 13,015,864,320 and 68,976,648,192; its vocabulary is not padded."""
    by_name = {path.stem: load_config(path) for path in CONFIGS}
    for name, published in (("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192)):
        cfg = by_name[f"llama-{name}"]
        padding = 2 * (cfg.padded_vocab_size() - cfg.vocab_size) * cfg.model.hidden_size
        assert count_parameters(cfg).total - padding == published


def memory(overrides: list[str], world_size: int = 1, l0: float | None = None) -> Plan:
    return make_plan(parse_config(TINY, overrides), world_size, l0)


def test_weights_gradients_and_optimizer() -> None:
    parameters = count_parameters(parse_config(TINY)).total
    stage = memory([]).worst(False)
    assert (stage.weights, stage.gradients, stage.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    stage = memory(["training.precision=fp32"]).worst(False)
    assert (stage.weights, stage.gradients, stage.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    stage = memory(["parallel.distributed_optimizer=true"], world_size=8).worst(False)
    assert (stage.weights, stage.optimizer) == (2 * parameters, -(-12 * parameters // 8))
    stage = memory(["parallel.grad_reduce_in_fp32=false"]).worst(False)
    assert stage.gradients == 2 * parameters


def test_activations_by_hand() -> None:
    tokens, width = 2 * 256, 64
    residual = tokens * width * 2
    attention = tokens * (4 * width * 2 + 4 * 4)  # q, k, v, output in bf16; a log-sum-exp in fp32 for each head
    mlp = tokens * 2 * 192 * 2
    layer = 4 * residual + attention + mlp
    assert memory([]).worst(False).activations_dense == 4 * layer + residual
    full = memory(["training.recompute=full"]).worst(False)
    assert full.activations_dense == 4 * residual + layer + residual
    mlps = memory(["training.recompute=selective", "training.recompute_modules=[mlp]"]).worst(False)
    assert mlps.activations_dense == 4 * (layer - mlp) + residual
    tensor = memory(["parallel.tensor=2"], 2).worst(False)
    assert tensor.activations_dense == 4 * (4 * residual + attention // 2 + mlp // 2) + residual
    sequence = memory(["parallel.tensor=2", "parallel.sequence_parallel=true"], 2).worst(False)
    assert sequence.activations_dense == (4 * layer + residual) // 2
    context = memory(["parallel.context=2"], 2).worst(False)
    assert context.activations_dense == (4 * layer + residual) // 2
    first, second = memory(["parallel.pipeline=2"], 2).stages  # two layers each; two and one micro-batches in flight
    assert first.activations_dense == 2 * 2 * layer + 2 * residual
    assert second.activations_dense == 2 * layer


@pytest.mark.parametrize(
    ("layout", "micro_batches", "expected"),
    [
        ([], 4, [(1, (1,))]),
        (["parallel.pipeline=2"], 4, [(2, (2,)), (1, (1,))]),
        (["parallel.pipeline=4"], 2, [(2, (2,)), (2, (2,)), (2, (2,)), (1, (1,))]),
        # F: forward, B: backward of chunk 0 or 1. First stage: F0 F0 F1 F1 F0 B1 F0 B1 F1 B0 ...; second: F0 F0 F1 B1
        # F1 B1 F0 B0 F0 B0 ...
        (["parallel.pipeline=2", "parallel.virtual_pipeline=2"], 4, [(5, (4, 2)), (3, (3, 1))]),
    ],
)
def test_micro_batches_in_flight_by_hand(
    layout: list[str], micro_batches: int, expected: list[tuple[int, tuple[int, ...]]]
) -> None:
    cfg = parse_config(TINY, layout)
    found = [in_flight(cfg, stage, micro_batches) for stage in range(cfg.parallel.pipeline)]
    assert [(flight.at_once, flight.of_chunk) for flight in found] == expected


def test_a_run_that_starts_sparse_must_fit_its_stage_that_is_fullest_then(capsys: pytest.CaptureFixture[str]) -> None:
    """Not the one that would be the fullest if all layers were dense."""
    overrides = ["parallel.pipeline=2", "sparsity.path=sparse", "model.vocab_size=128256"]
    loaded = load_with_origins(ROOT / "configs/paper-1b.yaml", [*overrides, "training.micro_batch_size=1"])
    first, last = make_plan(loaded.config, 2).stages
    assert first.total(sparse=False) > last.total(sparse=False)
    assert first.total(sparse=True) < last.total(sparse=True)
    between = (first.total(sparse=True) + last.total(sparse=True)) / 2 / (1 << 30)
    print_plan(loaded, 2, gpu_memory=between)
    output = capsys.readouterr().out
    assert "stage 1 (the fullest)" in output
    assert f"Too much for {between:g} GiB" in output


def test_recomputed_norms_by_hand() -> None:
    tokens, width, layers = 2 * 256, 64, 4
    plain = memory([]).worst(False).activations_dense
    recompute = ["training.recompute=selective", "training.recompute_modules=[layernorm]"]
    for overrides, norms in (([], 1), (["model.implementation=local"], 2)):
        kept = memory([*recompute, *overrides]).worst(False).activations_dense
        assert plain - kept == layers * norms * tokens * width * 2


def test_fp8_by_hand() -> None:
    tokens, width, layers = 2 * 256, 64, 4
    plain = memory([]).worst(False)
    for recipe, copies in (("tensorwise", 0), ("delayed", 1)):
        stage = memory(["training.fp8=hybrid", f"training.fp8_recipe={recipe}"]).worst(False)
        # The norm's output before the attention in 8 bits, and maybe a copy of the attention's output in 8 bits.
        assert stage.activations_dense - plain.activations_dense == layers * tokens * width * (copies - 1)
        assert stage.weights - plain.weights == layers * 4 * width * width * 2  # projections, and transposed
        assert (stage.gradients, stage.optimizer) == (plain.gradients, plain.optimizer)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("density", [0.01, 0.1])
def test_mlp_saved_bytes_are_those_of_the_operation(gated: bool, density: float) -> None:
    """What autograd keeps, against the plan's figure, on both paths."""
    from megasparse.mlp import sparse_mlp
    from megasparse.mlp.dispatch import LayerRouter

    cfg = parse_config(TINY, [f"model.gated={str(gated).lower()}"])
    tokens, hidden, width = 512, 64, 192
    l0 = density * width
    plan = make_plan(cfg, 1, l0)
    router = LayerRouter("sparse", width, hidden)
    router.update(l0, 1.0, tokens=tokens)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16().requires_grad_()
    w_in = torch.randn((2 if gated else 1) * width, hidden, generator=generator).bfloat16().requires_grad_()
    w_down = torch.randn(width, hidden, generator=generator).bfloat16().requires_grad_()
    for path, expected in (("dense", plan.mlp_saved_dense), ("sparse", plan.mlp_saved_sparse)):
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            sparse_mlp(x, w_in, w_down, path=path, capacity=router.capacity(tokens))  # type: ignore[arg-type]
        for given in (x, w_in, w_down):
            kept.pop(given.data_ptr(), None)
        assert sum(kept.values()) == expected


def test_one_chunk_a_stage_is_no_interleaving() -> None:
    one = memory(["parallel.pipeline=2", "parallel.virtual_pipeline=1"], world_size=2)
    assert one.stages == memory(["parallel.pipeline=2"], world_size=2).stages


def test_batches_and_layout() -> None:
    plan = memory(["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.tensor=2"], world_size=8)
    assert (plan.data_parallel, plan.micro_batches, plan.layers_per_chunk) == (2, 4, 1)
    assert plan.tokens_per_step == 16 * 256
    assert plan.tokens_total == 16 * 256 * 100
    assert plan.bubble == 1 / 8
    with pytest.raises(ConfigError, match="7 ranks is not a multiple"):
        memory(["parallel.tensor=2"], world_size=7)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_layouts_fit_their_gpus(path: Path) -> None:
    """Eight GPUs of 80 GB a node (64 of them for 70B), and every layer dense as at the start of a run."""
    cfg: Config = load_config(path)
    world_size = {"quickstart": 1, "llama-70b": 64}.get(path.stem, 8)
    assert make_plan(cfg, world_size).worst(sparse=False).total(sparse=False) < 75 << 30


def rows_of(document: str) -> list[list[str]]:
    """Of the layout table in a Markdown file: cells of the rows that begin with a number of GPUs."""
    lines = (ROOT / document).read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if row[0].isdigit()]


def test_the_documented_layouts_are_what_a_dry_run_says() -> None:
    rows = rows_of("docs/cluster.md")
    assert len(rows) > 3
    for gpus, overrides, layout, micro_batches, bubble, dense, sparse in rows:
        keys = [] if overrides == "none" else overrides.strip("`").split()
        cfg = load_config(ROOT / "configs/llama-70b.yaml", [f"parallel.{key}" for key in keys])
        plan, parallel = make_plan(cfg, int(gpus)), cfg.parallel
        assert layout == f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} x {plan.data_parallel}"
        assert int(micro_batches) == plan.micro_batches
        assert bubble == (f"{plan.bubble:.1%}".replace("%", " %") if plan.bubble else "none")
        for text, path in ((dense, False), (sparse, True)):
            assert text == f"{plan.worst(sparse=path).total(sparse=path) / 2**30:.2f}"


MEASURED = json.loads((ROOT / "docs/benchmarks/layouts.json").read_text())
DATA = ("data.blend=", "data.split=", "data.cache_dir=")


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", MEASURED["layouts"])
def test_memory_is_within_a_tenth_of_what_was_measured(name: str, path: str) -> None:
    """On H200s, by tools/compare_layouts.py: the GPU with the highest peak, all that was in use on it."""
    layout = MEASURED["layouts"][name]
    overrides = [item for item in [*MEASURED["set"], *layout["overrides"]] if not item.startswith(DATA)]
    cfg = load_config(ROOT / "configs/paper-0.5b.yaml", overrides)
    l0 = sum(layer["l0"] for layer in layout["layers"]) / len(layout["layers"])
    stage = make_plan(cfg, layout["gpus"], l0).worst(sparse=path == "sparse")
    measured = layout["variants"][path]["memory"]["measured"]
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(stage, part) == pytest.approx(measured[part], rel=0.01)
    total = stage.total(path == "sparse")
    assert total - stage.overhead == pytest.approx(measured["peak"], rel=0.1)
    assert total == pytest.approx(measured["device"], rel=0.1)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["2b-graphs", "7b", "13b"])
def test_memory_of_cuda_graphs_is_within_a_twentieth_of_what_was_measured(name: str, path: str) -> None:
    """On H200s, by tools/benchmark_pretrain.py: activations, what graphs hold included; all layers on the path."""
    record = json.loads((ROOT / f"docs/benchmarks/pretrain-{name}-h200.json").read_text())
    cfg = parse_config(record["config"])
    assert cfg.training.cuda_graphs
    l0 = sum(layer["l0"] for layer in record["layers"]) / len(record["layers"])
    stage = make_plan(cfg, record["environment"]["world_size"], l0).worst(sparse=path == "sparse")
    found = stage.activations_sparse if path == "sparse" else stage.activations_dense
    assert found == pytest.approx(record["variants"][path]["memory"]["measured"]["activations"], rel=0.05)


def test_a_model_that_cannot_be_exported_is_told_before_it_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    for change, told in (([], False), (["model.normalization=layernorm"], True)):
        print_plan(load_with_origins(ROOT / "configs/quickstart.yaml", change))
        assert ("cannot be converted to Hugging Face's format" in capsys.readouterr().out) is told
