#!/usr/bin/env python3
"""Whole training steps of one config, dense and sparse, in one process: speed, memory, energy, where the time goes.

    tools/benchmark_pretrain.py CONFIG [a.b=c ...] --load RUN                 at the sparsity of a checkpoint
    tools/benchmark_pretrain.py CONFIG [a.b=c ...] --train-minutes 5          after training the config on its data
    tools/benchmark_pretrain.py CONFIG ... --train-minutes 4 --train-layers 8 after training it with 8 layers, grown

`dense` and `sparse` are one model with one optimizer: its MLPs are switched between the dense path and the paths that
their routers chose. `--baseline megatron` adds a second model with the same weights and the same function: Megatron-
Core's own GPT layer with its dense MLP, and its fused loss; and the same with SwiGLU in place of the gated ReLU.
Windows of `--steps` steps (data loading, forward, backward, optimizer: the loop of `megasparse pretrain`) alternate,
`--rounds` times, so that all see the same state of the card. All read the same samples from the first on, and the
learning rate is so small that the weights, and with them the sparsity, stay.

`--curve` records the losses of the config's own steps, from the weights that were loaded or trained; they can be
laid beside those of other parallel layouts (tools/compare_layouts.py). All of this runs under torchrun too.

`--train-layers` trains a model with fewer layers, then repeats each of its layers in place (megatron/transfer.py)
and trains the whole for `--settle-minutes`. What sparsity that led to is measured in the model that is timed, and
printed for every layer.

`--try` costs what can be switched in a model that is built, on the same weights, in the same turns:

    --try recompute_granularity=full,recompute_method=uniform,recompute_num_layers=1     full recomputation
    --try checkpoint_core_attention=True        selective: the attention between the projections
    --try recompute_mlp=True                    selective: the MLP (in bf16)
    --try recompute_pre_mlp_layernorm=True      selective: the norm before the MLP (Transformer Engine)
    --try fp8=hybrid,fp8_recipe=delayed         attention projections in 8 bits (Transformer Engine)
    --try fp8=hybrid,fp8_recipe=tensorwise,save_original_input=True     what Megatron builds for other recipes

each alone or, joined by commas, together; behind `dense:` with the MLPs on the dense path. One call takes either
delayed scaling or other recipes. With training.cuda_graphs each has use_graphs=False among them, or is just that.

Writes results.json (after every stage), results.png and tables.txt to `--out`; prints the tables.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pretrain_tables
import torch
import torch.distributed as dist
from pretrain_prepare import (
    Bench,
    changed,
    clean,
    close,
    curve,
    mean,
    measured_sparsity,
    places,
    resident,
    sparse_run,
)
from pretrain_variants import Variant, note_breakdown, note_memory, note_speed, parse_attempt, use, window

from megasparse.config import Config, ConfigError, Problem, load_config
from megasparse.megatron import megatron_layer_spec
from megasparse.megatron.transfer import set_weights, weights_of
from megasparse.monitoring.energy import EnergyMeter
from megasparse.monitoring.sparsity import LayerSparsity
from megasparse.ranks import StorageError
from megasparse.training.checkpoint_files import CheckpointError, resolve
from megasparse.training.distributed import shut_down
from megasparse.training.garbage import GarbageCollection
from megasparse.training.launch_environment import LaunchError
from megasparse.training.loop import Run, run_step, save
from megasparse.training.optimizer import gather_parameters

NEVER = 10**9
STILL = [
    "optimizer.lr=1e-12", "optimizer.min_lr=0", "optimizer.schedule.kind=constant", "optimizer.schedule.warmup_steps=0",
    f"sparsity.route_interval={NEVER}", "sparsity.reinit.every=0",
]  # fmt: skip
"""While measuring, neither weights nor paths change."""


SLACK = 4 << 30
"""Bytes of a GPU left for the CUDA context, libraries, and what the allocator cannot use, beside two models."""


def measure(bench: Bench) -> None:
    arguments, record = bench.arguments, bench.record
    run = sparse_run(bench)
    if arguments.save:
        save(run)
        run.checkpointer.close()
    if arguments.curve:
        record["curve"] = curve(bench, run, arguments.curve)
        bench.write()
    run.loader.close()
    still = changed(bench.cfg, STILL)
    routing = changed(still, ["sparsity.route_interval=1"])
    use(run, routing, bench.loader(routing, run))
    for _ in range(2):
        run_step(run)
    _, layers = measured_sparsity(run)
    paths = [layer.path for layer in layers]
    record["layers"] = [layer._asdict() for layer in layers]
    run.loader.close()
    l0 = mean(layer.l0 for layer in layers)
    bench.say(f"sparsity measured: mean L0 {l0:.1f}, {paths.count('sparse')} of {len(paths)} layers sparse")

    variants = [
        Variant("dense", run, still, bench.loader(still, run), ["dense"] * len(paths)),
        Variant("sparse", run, still, bench.loader(still, run), paths),
    ]
    for name, dense, settings in arguments.attempts:
        chosen = ["dense"] * len(paths) if dense else paths
        variants.append(Variant(name, run, still, bench.loader(still, run), chosen, settings))
    for variant in variants:
        variant.prepare()
        variant.step()
        note_memory(bench, variant, [run], l0)
    bench.write()
    larger(bench, variants[1], layers, l0)
    if not arguments.baseline:
        compare(bench, variants, layers)
        return
    together = room_for_another(record, run)
    if not together:
        bench.say("two models do not fit: the baseline is measured after the others, not in turns with them")
        compare(bench, variants, layers)
    gather_parameters(run.state.model)
    weights = weights_of(run.state.model)
    if not together:
        close(run)
        variants.clear()
        del run
        clean()
    other = baseline(bench, weights)
    del weights
    its_loss = {"own_cross_entropy": False}
    variants.append(Variant(arguments.baseline, other, still, bench.loader(still, other), [], its_loss))
    if bench.cfg.model.gated:
        # What most dense models are: its activation is fused, Megatron's ReLU is not.
        fused = torch.cuda.is_available()
        swiglu = {"activation_func": torch.nn.functional.silu, "bias_activation_fusion": fused, **its_loss}
        name = f"{arguments.baseline}, SwiGLU"
        variants.append(Variant(name, other, still, bench.loader(still, other), [], swiglu))
    for variant in variants:
        if variant.run is other:
            variant.prepare()
            variant.step()
            note_memory(bench, variant, [each.run for each in variants], l0)
    compare(bench, variants, layers)


def room_for_another(record: dict[str, Any], run: Run) -> bool:
    """Whether a second model and optimizer fit beside the first and its activations. The same on every rank."""
    if not torch.cuda.is_available():
        return True
    peak = max(row["memory"]["measured"]["peak"] for row in record["variants"].values() if "memory" in row)
    held = torch.tensor(
        sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in resident(run)}.values())
    )
    need = peak + 1.02 * float(held) + SLACK
    fits = torch.tensor(int(need < torch.cuda.mem_get_info()[1]), device="cuda")
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    return bool(fits.item())


def compare(bench: Bench, variants: list[Variant], layers: list[LayerSparsity]) -> None:
    """Windows in turns, then a profile of each; ends the loaders."""
    energy = EnergyMeter()
    with GarbageCollection():  # as in training
        for turn in range(bench.arguments.rounds):
            for variant in variants if turn % 2 == 0 else reversed(variants):
                window(variant, bench.arguments.steps, energy)
                note_speed(bench, variant, layers)
            bench.say(", ".join(f"{v.name} {v.windows[-1]['tokens_per_second']:,.0f}" for v in variants) + " tokens/s")
            bench.write()
        for variant in variants:
            note_breakdown(bench, variant)
            bench.write()
    for variant in variants:
        variant.loader.close()
        if variant.run.graphs is not None:
            variant.run.graphs.release()


def larger(bench: Bench, sparse: Variant, layers: list[LayerSparsity], l0: float) -> None:
    """The sparse path with a larger micro-batch: does it fit where the dense one has its own?"""
    size = math.ceil(bench.cfg.training.micro_batch_size * bench.arguments.larger)
    if size <= bench.cfg.training.micro_batch_size:
        return
    if dist.get_world_size() > 1:
        bench.say("no larger micro-batch is tried: a rank that ran out of memory would leave the others waiting")
        return
    count = bench.cfg.num_microbatches(1)
    cfg = changed(sparse.cfg, [f"training.micro_batch_size={size}", f"training.global_batch_size={size * count}"])
    variant = Variant(f"sparse, micro-batch {size}", sparse.run, cfg, bench.loader(cfg, sparse.run), sparse.paths)
    try:
        variant.prepare()
        for _ in range(2):  # CUDA graphs are captured before the second
            variant.step()
        note_memory(bench, variant, [variant.run], l0)
        for _ in range(2):
            window(variant, bench.arguments.steps, EnergyMeter())
        note_speed(bench, variant, layers)
    except torch.OutOfMemoryError as error:
        bench.record["variants"].pop(variant.name, None)
        bench.say(f"micro-batch {size} does not fit: {str(error).splitlines()[0]}")
    variant.loader.close()
    if sparse.run.graphs is not None:  # which are those of the old micro-batch again after two steps
        back = dataclasses.replace(sparse, loader=bench.loader(sparse.cfg, sparse.run))
        back.prepare()
        for _ in range(2):
            back.step()
        back.loader.close()
    bench.write()


def baseline(bench: Bench, weights: list[dict[str, torch.Tensor]]) -> Run:
    """Megatron-Core's own layers with these weights."""
    model = bench.cfg.model
    normalization = "RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm"
    layer = megatron_layer_spec(model.implementation, qk_norm=model.qk_norm, normalization=normalization)
    folder = bench.arguments.out / "baseline"
    other = bench.build(changed(bench.cfg, [*bench.batch, "sparsity.l1.mode=off", *places(folder)]), layer)
    other.loader.close()
    set_weights(other.state.model, weights)
    other.state.optimizer.reload_model_params()
    clean()
    bench.say("Megatron's own layers built, with the same weights")
    return other


def attempt(text: str) -> tuple[str, bool, dict[str, Any]]:
    try:
        return parse_attempt(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def mixes_delayed_scaling(cfg: Config, attempts: list[dict[str, Any]]) -> bool:
    """See `Switches`."""
    own = {"fp8": cfg.training.fp8, "fp8_recipe": cfg.training.fp8_recipe} if cfg.training.fp8 != "off" else {}
    variants = [{"fp8": None, "fp8_recipe": "delayed", **own, **settings} for settings in ({}, *attempts)]
    recipes = {variant["fp8_recipe"] for variant in variants if variant["fp8"]}
    return "delayed" in recipes and len(recipes) > 1


def contradicts_graphs(cfg: Config, attempts: list[dict[str, Any]]) -> bool:
    """CUDA graphs do as they were captured, whatever is switched."""
    return cfg.training.cuda_graphs and any(settings.get("use_graphs", True) for settings in attempts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--load", metavar="RUN", help="weights to start from: a run, or one of its checkpoints")
    parser.add_argument("--train-minutes", type=float, default=0.0)
    parser.add_argument("--train-layers", type=int, help="train this many layers, then grow the model to all of them")
    parser.add_argument("--train-batch", type=int, help="global batch size while training (default: the config's)")
    parser.add_argument("--settle-minutes", type=float, default=0.5, help="training after growing")
    parser.add_argument("--save", action="store_true", help="save a checkpoint of what was trained, for --load")
    parser.add_argument("--curve", type=int, default=0, help="then steps whose losses are recorded, before measuring")
    parser.add_argument("--baseline", choices=["megatron"])
    parser.add_argument(
        "--try", dest="attempts", action="append", default=[], type=attempt, metavar="[dense:]KEY=VALUE[,KEY=VALUE...]",
        help="one more variant: sparse (or dense), with these attributes of Megatron's TransformerConfig and of its "
        "modules; see above",
    )  # fmt: skip
    parser.add_argument(
        "--larger", type=float, default=1.5, help="larger micro-batch of the sparse path, on one GPU; 1: none"
    )
    parser.add_argument("--rounds", type=int, default=5, help="windows of each variant")
    parser.add_argument("--steps", type=int, default=2, help="steps of a window")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_pretrain"))
    arguments = parser.parse_intermixed_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    own = [
        f"run.directory={arguments.out / 'run'}", "checkpoint.resume=never", "training.eval_steps=0",
        "logging.wandb.mode=disabled", "checkpoint.async_save=false",
    ]  # fmt: skip
    try:
        cfg = load_config(arguments.config, [*arguments.overrides, *own])
        if arguments.curve > cfg.training.steps:
            raise ConfigError(
                [Problem("training.steps", f"{cfg.training.steps}, fewer than --curve {arguments.curve}")]
            )
        if arguments.load:
            resolve(Path(arguments.load))
        attempts = [settings for _, _, settings in arguments.attempts]
        if contradicts_graphs(cfg, attempts):
            parser.error("--try: with training.cuda_graphs, each needs use_graphs=False: graphs cannot be switched")
        if mixes_delayed_scaling(cfg, attempts):
            parser.error("--try: delayed scaling, once used, slows other fp8 recipes; measure it in a call of its own")
        bench = Bench(cfg, arguments)
        measure(bench)
    except (ConfigError, CheckpointError, LaunchError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if bench.launch.rank == 0:
        pretrain_tables.write(bench.record, arguments.out)
    shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
