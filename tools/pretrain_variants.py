"""What tools/benchmark_pretrain.py compares, and how one of them is measured: speed, memory, where the time goes."""

import ast
import dataclasses
import re
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from pretrain_prepare import Bench, clean, mean, optimizer_tensors, resident

from megasparse.config import Config
from megasparse.monitoring.breakdown import profile_step
from megasparse.monitoring.energy import EnergyMeter
from megasparse.monitoring.sparsity import LayerSparsity
from megasparse.monitoring.step_memory import measure_step
from megasparse.monitoring.throughput import Throughput
from megasparse.plan import make_plan
from megasparse.training.data import StepLoader
from megasparse.training.loop import Run, run_step
from megasparse.training.schedule import LearningRate


def use(run: Run, cfg: Config, loader: StepLoader) -> None:
    """Lets the next steps of `run` be steps of another configuration of the same model."""
    run.cfg = run.state.cfg = cfg
    run.loader = loader
    run.state.scheduler = LearningRate(cfg, run.state.optimizer)


class Switches:
    """Attributes that a variant has otherwise: of Megatron's TransformerConfig and of every module that has them. Only
    what is read in each forward can be switched. Two variants must not have Transformer Engine's delayed scaling and
    another recipe: once used, it updates its scales whenever an fp8 context ends, whatever that one's recipe."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def set(self, chunks: list[torch.nn.Module], settings: dict[str, Any]) -> None:
        """Undoes what was set before. Raises ValueError where nothing has such an attribute."""
        for target, key, value in reversed(self._originals):
            setattr(target, key, value)
        self._originals.clear()
        modules = [module for chunk in chunks for module in chunk.modules()]
        for module in modules:
            # The fp8 copies of weights, which Transformer Engine keeps until it needs them again, are no variant's but
            # their own.
            getattr(module, "_fp8_workspaces", {}).clear()
        for key, value in settings.items():
            configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
            targets = [target for target in (*configs.values(), *modules) if hasattr(target, key)]
            if not targets:
                raise ValueError(f"neither Megatron's TransformerConfig nor a module of the model has {key}")
            for target in targets:
                self._originals.append((target, key, getattr(target, key)))
                setattr(target, key, value)


SWITCHES = Switches()


def parse_attempt(text: str) -> tuple[str, bool, dict[str, Any]]:
    """`[dense:]KEY=VALUE[,KEY=VALUE...]` -> name of the variant, whether its MLPs run dense, what `Switches` sets.

    Raises:
        ValueError: it is nothing of the kind.
    """
    path, found, listed = text.partition("dense:")
    dense = bool(found) and not path
    settings = {}
    for setting in re.split(r",(?=\w+=)", listed if dense else text):
        key, separator, value = setting.partition("=")
        if not separator or not key.isidentifier():
            raise ValueError(f"{text}: {setting!r} is not KEY=VALUE")
        settings[key] = literal(value)
    return f"dense, {listed}" if dense else f"sparse, {text}", dense, settings


def literal(text: str) -> Any:
    """A Python literal, or the text itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@dataclasses.dataclass
class Variant:
    """What is measured against the others: a run, its configuration and data while measured, its paths."""

    name: str
    run: Run
    cfg: Config
    loader: StepLoader
    paths: list[str]
    """Of all layers of the model; none: the model has no sparse MLPs."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """See `Switches`."""
    windows: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def prepare(self) -> None:
        use(self.run, self.cfg, self.loader)
        for mlp in self.run.state.mlps:
            mlp.router.path = self.paths[mlp.layer_index]
        SWITCHES.set(self.run.state.model, self.settings)

    def step(self) -> tuple[float, float]:
        """Loss, and seconds in which the host waited for the GPU."""
        result = run_step(self.run)[0]
        return result.loss, result.gpu_wait_seconds


def window(variant: Variant, steps: int, energy: EnergyMeter) -> None:
    """Some steps between two moments at which the GPU has nothing to do."""
    variant.prepare()
    synchronize()
    energy.read()
    begun = time.perf_counter()
    results = [variant.step() for _ in range(steps)]
    synchronize()
    seconds = time.perf_counter() - begun
    joules = energy.read()
    tokens = steps * variant.cfg.training.global_batch_size * variant.cfg.data.sequence_length
    row = {"tokens_per_second": tokens / seconds, "seconds_per_step": seconds / steps, "loss": results[0][0]}
    row["gpu_wait_share"] = sum(waited for _, waited in results) / seconds
    if energy.available:
        row["joules_per_token"] = joules / tokens * dist.get_world_size()
    variant.windows.append(row)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def note_speed(bench: Bench, variant: Variant, layers: list[LayerSparsity]) -> None:
    """Adds a variant's windows, and what follows from them, to the record."""
    entry = bench.record["variants"].setdefault(variant.name, {})
    rows = variant.windows
    entry["windows"] = rows
    entry["micro_batch_size"] = variant.cfg.training.micro_batch_size
    entry["global_batch_size"] = variant.cfg.training.global_batch_size
    for key in rows[0]:
        if key != "loss":
            entry[key] = summary([row[key] for row in rows])
    speed = entry["tokens_per_second"]["median"]
    unions = [
        layer.union_fraction if path == "sparse" else 1.0 for layer, path in zip(layers, variant.paths, strict=False)
    ] or [1.0] * variant.cfg.model.num_layers
    throughput = Throughput(variant.cfg, dist.get_world_size())
    entry["metrics"] = throughput.metrics(int(speed * 1000), 1000.0, unions)


def note_memory(bench: Bench, variant: Variant, others: list[Run], l0: float) -> None:
    """Measures the memory of one step and sets the estimate of `pretrain --dry-run` beside it. Collective.

    `measured` is that of the rank with the highest peak, `estimate` that of the stage with the highest; `ranks` has
    both of each rank.
    """
    variant.prepare()
    if variant.run.graphs is not None and not variant.settings.get("use_graphs", True):
        variant.run.graphs.release()  # others have them captured again
    clean()
    elsewhere = [tensor for run in others if run is not variant.run for tensor in resident(run)]
    state = variant.run.state
    optimizer = optimizer_tensors(state.optimizer)
    measured = measure_step(state.model, optimizer, variant.step, elsewhere, variant.run.graphs)
    mine = {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "measured": dataclasses.asdict(measured),
        "estimate": estimate(variant, l0) if variant.paths else None,
    }
    ranks = everywhere(mine)
    worst = max(ranks, key=lambda rank: (rank["measured"]["peak"], tensors_of(rank["measured"])))
    entry = bench.record["variants"].setdefault(variant.name, {})
    entry["memory"] = {"measured": worst["measured"], "alone": not elsewhere, "ranks": ranks}
    if variant.paths:
        entry["memory"]["estimate"] = max((rank["estimate"] for rank in ranks), key=lambda parts: sum(parts.values()))


def estimate(variant: Variant, l0: float) -> dict[str, int]:
    """Bytes by part on this rank, as `pretrain --dry-run` knows them, at the paths that its layers take."""
    stages = make_plan(variant.cfg, dist.get_world_size(), l0).stages
    stage = stages[parallel_state.get_pipeline_model_parallel_rank()]
    paths = [variant.paths[mlp.layer_index] for mlp in variant.run.state.mlps]
    sparse = paths.count("sparse") / len(paths)
    return {
        "weights": stage.weights,
        "gradients": stage.gradients,
        "optimizer": stage.optimizer,
        "activations": int(sparse * stage.activations_sparse + (1 - sparse) * stage.activations_dense),
        "temporaries": stage.temporaries_sparse if sparse else stage.temporaries_dense,
        "overhead": stage.overhead,
    }


def tensors_of(measured: dict[str, int]) -> int:
    return measured["weights"] + measured["gradients"] + measured["optimizer"]


def everywhere(value: Any) -> list[Any]:
    """Every rank's `value`, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def note_breakdown(bench: Bench, variant: Variant) -> None:
    """Profiles one step. Times are means over the ranks, `ranks` has each one's; the kernels are this rank's."""
    variant.prepare()
    found = profile_step(variant.run.state.model, variant.step)
    kernels = {part: dict(list(rows.items())[:12]) for part, rows in found.kernels.items()}
    mine = {name: getattr(found, name) for name in ("parts", "busy", "idle", "communication", "exposed")}
    ranks = everywhere(mine)
    means = {name: mean(rank[name] for rank in ranks) for name in mine if name != "parts"}
    parts = {name: mean(rank["parts"][name] for rank in ranks) for name in found.parts}
    bench.record["variants"][variant.name]["breakdown"] = {"parts": parts, **means, "ranks": ranks, "kernels": kernels}
