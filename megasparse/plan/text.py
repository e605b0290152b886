"""What `megasparse pretrain --dry-run` prints: the resolved config with origins, and the plan."""

from __future__ import annotations

import os
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from megasparse.config import Config, ConfigError, LoadedConfig
from megasparse.data.errors import DataError
from megasparse.hf.architectures import architecture_of
from megasparse.hf.errors import ConvertError
from megasparse.plan.memory import StageMemory
from megasparse.plan.plan import Plan, make_plan
from megasparse.start_checks import start_checks

GIB, MIB = 1 << 30, 1 << 20


def print_plan(
    loaded: LoadedConfig, world_size: int | None = None, l0: float | None = None, gpu_memory: float | None = None
) -> bool:
    """Print everything; `world_size` None: the launcher's, else the smallest that holds the model.

    `l0`: active neurons per token to assume. `gpu_memory`: GiB of one GPU, to compare with. Returns whether the run
    could start here and, by the estimate, fits `gpu_memory`. Raises ConfigError where the layout does not fit.
    """
    cfg = loaded.config
    said = world_size is not None
    if world_size is None:
        launched = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS")
        world_size = int(launched) if launched else cfg.parallel.model_size
        said = bool(launched)
    plan = make_plan(cfg, world_size, l0)
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # a file or a log, not the 80 columns that rich assumes
    console.print("[bold]# resolved configuration[/bold] (value, then where it was set)")
    for line in resolved_lines(loaded):
        console.print(line, markup=False, style="dim" if line.endswith("# default") else "")
    console.print()
    console.print(_layout(cfg, plan, said))
    console.print(_parameters(plan))
    if text := not_exportable(cfg):
        console.print(text, style="yellow", markup=False)
    console.print(_memory(cfg, plan, gpu_memory))
    missing = _missing(cfg)
    if missing:
        console.print("[yellow]Before this can run:[/yellow]")
    for text in missing:
        console.print(text, markup=False)
    return not missing and (gpu_memory is None or _needed(cfg, _fullest(cfg, plan)) <= gpu_memory)


def _missing(cfg: Config) -> list[str]:
    """What would end a start on this machine."""
    found = []
    for check in start_checks(cfg):
        try:
            check()
        except (ConfigError, DataError) as error:
            found.append(str(error))
    return found


def not_exportable(cfg: Config) -> str | None:
    """Why `megasparse convert to-hf` will refuse the model; None: it will not."""
    try:
        architecture_of(cfg.model)
    except ConvertError as error:
        return f"This model cannot be converted to Hugging Face's format: {error}"
    return None


def opening_line(cfg: Config, world_size: int, parameters: int, gpu: str | None) -> str:
    """What a run is, in one line, for its start. `gpu`: the model of its GPUs; None: it runs on CPUs."""
    parallel, training = cfg.parallel, cfg.training
    data = parallel.data_parallel_size(world_size)
    layout = f"TP {parallel.tensor} x PP {parallel.pipeline} x CP {parallel.context} x DP {data}"
    where = gpu or "CPUs" + (", where every layer runs dense" if cfg.sparsity.path == "auto" else "")
    return (
        f"{cfg.run.name}: {parameters / 1e6:,.1f} M parameters, {layout} on {where}; {training.steps:,} steps of "
        f"{training.global_batch_size} x {cfg.data.sequence_length} tokens; writes to {cfg.run_directory}"
    )


def resolved_lines(loaded: LoadedConfig) -> list[str]:
    """The resolved configuration as YAML lines, each value with a comment that says which layer set it."""
    lines: list[str] = []

    def walk(data: dict[str, Any], key: str, depth: int) -> None:
        for name, value in data.items():
            dotted = f"{key}.{name}" if key else name
            if isinstance(value, dict) and value:
                lines.append(f"{'  ' * depth}{name}:")
                walk(value, dotted, depth + 1)
            else:
                text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("\n...")
                lines.append(f"{'  ' * depth}{name}: {text}  # {loaded.origins.get(dotted, 'default')}")

    walk(loaded.config.model_dump(mode="json"), "", 0)
    return lines


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    return table


def _layout(cfg: Config, plan: Plan, said: bool) -> Table:
    parallel, training = cfg.parallel, cfg.training
    table = _table("layers and batches")
    smallest = "" if said else "smallest for this layout; choose with --world-size"
    table.add_row("GPUs (ranks)", f"{plan.world_size}", smallest)
    product = f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} x {plan.data_parallel}"
    table.add_row("tensor x pipeline x context x data", product)
    chunks = parallel.chunks
    layers = f"{plan.layers_per_chunk * chunks} layers" + (f" in {chunks} chunks" if chunks > 1 else "")
    table.add_row("a pipeline stage", layers, f"of {cfg.model.num_layers}")
    width = cfg.model.ffn_hidden_size // parallel.tensor
    heads = f"{cfg.model.num_attention_heads // parallel.tensor} heads, {cfg.model.query_groups // parallel.tensor} kv"
    table.add_row("a rank's share of a layer", f"{heads}, {width} neurons")
    table.add_row("vocabulary, padded", f"{cfg.padded_vocab_size():,}", f"of {cfg.vocab_size:,}")
    table.add_row("micro-batch", f"{training.micro_batch_size} x {cfg.data.sequence_length:,} tokens")
    table.add_row("micro-batches a step", f"{plan.micro_batches}", "on each data-parallel rank")
    table.add_row("tokens a step", f"{plan.tokens_per_step:,}", f"{training.global_batch_size} sequences")
    table.add_row("tokens in all", f"{plan.tokens_total:,}", f"{training.steps:,} steps")
    if parallel.pipeline > 1:
        table.add_row("pipeline bubble", f"{plan.bubble:.1%}", "of the time a step computes")
    return table


def _parameters(plan: Plan) -> Table:
    parameters = plan.parameters
    table = _table("parameters")
    layers = f"x {parameters.layers} layers"
    table.add_row("embedding", f"{parameters.embedding:,}")
    table.add_row("attention", f"{parameters.attention_per_layer:,}", layers)
    table.add_row("feed-forward", f"{parameters.mlp_per_layer:,}", layers)
    table.add_row("norms", f"{parameters.norms_per_layer:,}", layers)
    table.add_row("final norm", f"{parameters.final_norm:,}")
    table.add_row("output", f"{parameters.output:,}", "" if parameters.output else "tied to the embedding")
    table.add_row("in all", f"{parameters.total:,}", f"{parameters.total / 1e9:.3f} billion", style="bold")
    return table


def _memory(cfg: Config, plan: Plan, gpu_memory: float | None) -> Table:
    stage = _fullest(cfg, plan)
    table = Table(title="memory per GPU, GiB (estimate)", title_justify="left", title_style="bold")
    table.add_column(f"stage {stage.stage} (the fullest)" if len(plan.stages) > 1 else "")
    table.add_column("all layers dense", justify="right")
    table.add_column(f"all sparse at L0 {plan.assumed_l0:.0f}", justify="right")

    def row(name: str, dense: float, sparse: float, style: str = "") -> None:
        table.add_row(name, f"{dense / GIB:.2f}", f"{sparse / GIB:.2f}", style=style)

    row("weights", stage.weights, stage.weights)
    row("gradients", stage.gradients, stage.gradients)
    row("optimizer", stage.optimizer, stage.optimizer)
    row("activations", stage.activations_dense, stage.activations_sparse)
    row("largest temporaries", stage.temporaries_dense, stage.temporaries_sparse)
    row("CUDA, NCCL, slack", stage.overhead, stage.overhead)
    row("in all", stage.total(False), stage.total(True), "bold")
    kept = (plan.mlp_saved_dense / MIB, plan.mlp_saved_sparse / MIB)
    table.add_row("of which one MLP, one micro-batch, MiB", f"{kept[0]:.1f}", f"{kept[1]:.1f}", style="dim")
    table.caption_justify = "left"
    table.caption = _verdict(cfg, stage, gpu_memory)
    return table


def _fullest(cfg: Config, plan: Plan) -> StageMemory:
    """As the run starts: with sparse layers it may be another than with dense ones."""
    return plan.worst(cfg.sparsity.path == "sparse")


def _needed(cfg: Config, stage: StageMemory) -> float:
    """GiB of a GPU."""
    return stage.total(cfg.sparsity.path == "sparse") / GIB


def _verdict(cfg: Config, stage: StageMemory, gpu_memory: float | None) -> str:
    start = "" if cfg.sparsity.path == "sparse" else "Layers start dense: the left column must fit. "
    if gpu_memory is None:
        return start.strip()
    if _needed(cfg, stage) <= gpu_memory:
        return f"{start}It fits {gpu_memory:g} GiB."
    return (
        f"{start}[red]Too much for {gpu_memory:g} GiB[/red]: lower training.micro_batch_size, set training.recompute, "
        "or raise parallel.tensor / pipeline / context."
    )
