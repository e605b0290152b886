"""A run at real sparsity for tools/benchmark_pretrain.py: loaded, trained, or trained with fewer layers and grown."""

import argparse
import gc
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megasparse.config import Config, parse_config
from megasparse.megatron.transfer import set_weights, weights_of
from megasparse.monitoring.environment import describe_environment
from megasparse.monitoring.sparsity import LayerSparsity, SparsityMeter
from megasparse.small_files import write_json
from megasparse.training.data import StepLoader
from megasparse.training.distributed import initialize
from megasparse.training.launch_environment import read_environment
from megasparse.training.loop import Run, run_step, start
from megasparse.training.optimizer import gather_parameters
from megasparse.training.signals import StopWatcher


def places(folder: Path) -> list[str]:
    """Overrides that put everything a run writes into a folder."""
    return [f"run.directory={folder}", f"checkpoint.directory={folder / 'checkpoints'}"]


def changed(cfg: Config, overrides: list[str]) -> Config:
    return parse_config(cfg.model_dump(mode="json"), overrides)


class Bench:
    """One process of the job: the run being built, and what has been found out so far."""

    def __init__(self, cfg: Config, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.launch = read_environment()
        cfg.validate(self.launch.world_size)
        self.cfg = cfg
        self.device = initialize(cfg, self.launch)
        self.stop = StopWatcher()
        self.started = time.perf_counter()
        # Of every model, as the order of the samples depends on how many there are to be.
        self.batch = [f"training.global_batch_size={arguments.train_batch}"] if arguments.train_batch else []
        self.record: dict[str, Any] = {
            "environment": describe_environment(self.launch.world_size),
            "config": cfg.model_dump(mode="json"),
            "variants": {},
        }

    def say(self, text: str) -> None:
        if self.launch.rank == 0:
            print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    def write(self) -> None:
        if self.launch.rank == 0:
            write_json(self.arguments.out / "results.json", self.record)

    def build(self, cfg: Config, layer: Any = None) -> Run:
        return start(cfg, self.launch, self.device, self.stop, [], layer)

    def loader(self, cfg: Config, run: Run) -> StepLoader:
        """The samples from the first on."""
        last = len(run.datasets.train)
        return StepLoader(cfg, run.datasets.train, 0, last, self.launch.world_size, self.device)


def measured_sparsity(run: Run) -> tuple[float, list[LayerSparsity]]:
    """Loss and per-layer sparsity of one more step."""
    cfg = run.cfg
    meter = SparsityMeter(run.state.mlps, cfg.model.num_layers, cfg.model.ffn_hidden_size)
    meter.begin()
    result, _ = run_step(run)
    table = meter.table(window=min(cfg.sparsity.dead_window_steps, run.state.step))
    dist.all_reduce(table)
    return result.loss, meter.read(table.tolist())


def mean(values: Any) -> float:
    known = list(values)
    return sum(known) / len(known)


def train(bench: Bench, run: Run, minutes: float, what: str) -> dict[str, Any]:
    """Trains for so long or until no more of the config's steps are left than the curve takes; says every 20 s where
    it is. Both by rank 0's clock."""
    begun = said = time.perf_counter()
    steps, tokens = 0, run.state.consumed_tokens
    loss, layers = math.nan, []
    while run.state.step < run.cfg.training.steps - bench.arguments.curve:
        now = time.perf_counter()
        clock = torch.tensor([now - begun < 60 * minutes, now - said > 20], dtype=torch.int32, device=bench.device)
        dist.broadcast(clock, src=0)
        go_on, is_time_to_say = clock.tolist()
        if not go_on:
            break
        if is_time_to_say:
            said = now
            loss, layers = measured_sparsity(run)
            bench.say(
                f"{what}: step {run.state.step}, {run.state.consumed_tokens / 1e6:.1f} M tokens, loss {loss:.3f}, "
                f"mean L0 {mean(x.l0 for x in layers):.0f}, mean union {mean(x.union_fraction for x in layers):.3f}"
            )
        else:
            loss = run_step(run)[0].loss
        steps += 1
    seconds, tokens = time.perf_counter() - begun, run.state.consumed_tokens - tokens
    bench.say(f"{what}: {steps} steps, {tokens / 1e6:.1f} M tokens in {seconds:.0f} s, loss {loss:.3f}")
    return {"what": what, "layers": run.cfg.model.num_layers, "steps": steps, "tokens": tokens, "loss": loss}


def curve(bench: Bench, run: Run, steps: int) -> list[dict[str, float]]:
    """Trains so many steps; loss and gradient norm of each."""
    rows = []
    for _ in range(steps):
        result, _ = run_step(run)
        rows.append({"step": run.state.step, "loss": result.loss, "grad_norm": result.grad_norm})
        if not result.updated:
            bench.say(f"curve: step {run.state.step} had no update: loss {result.loss}, norm {result.grad_norm}")
    bench.say(f"curve: {steps} steps, loss {rows[0]['loss']:.3f} to {rows[-1]['loss']:.3f}")
    return rows


def sparse_run(bench: Bench) -> Run:
    """The model at the sparsity that it is measured at."""
    arguments, cfg = bench.arguments, bench.cfg
    history: list[dict[str, Any]] = []
    bench.record["sparsity_from"] = history
    grown = arguments.train_layers and arguments.train_layers < cfg.model.num_layers
    batch = list(bench.batch)
    if arguments.load:
        history.append({"what": f"weights of {arguments.load}"})
        batch.append(f"checkpoint.load={arguments.load}")
    if not grown:
        run = bench.build(changed(cfg, batch))
        if arguments.train_minutes:
            history.append(train(bench, run, arguments.train_minutes, f"training {cfg.model.num_layers} layers"))
        return run
    shallow = bench.build(
        changed(cfg, [*batch, *places(arguments.out / "shallow"), f"model.num_layers={arguments.train_layers}"])
    )
    if arguments.train_minutes:
        history.append(train(bench, shallow, arguments.train_minutes, f"training {arguments.train_layers} layers"))
    gather_parameters(shallow.state.model)
    weights, l1 = weights_of(shallow.state.model), shallow.state.l1.state_dict()
    close(shallow)
    del shallow
    clean()
    batch = [item for item in batch if not item.startswith("checkpoint.load=")]
    run = bench.build(changed(cfg, [*batch, "sparsity.l1.start_step=0"]))
    set_weights(run.state.model, weights)
    run.state.optimizer.reload_model_params()
    layers = cfg.model.num_layers
    grow = [layer * arguments.train_layers // layers for layer in range(layers)]
    run.state.l1.load_state_dict({name: [values[layer] for layer in grow] for name, values in l1.items()})
    bench.say(f"grown to {layers} layers")
    what = f"training the {layers} layers that each of them, repeated in place, makes"
    history.append(train(bench, run, arguments.settle_minutes, what))
    return run


def optimizer_tensors(optimizer: Any) -> list[torch.Tensor]:
    """What this rank's optimizer holds besides the model: main parameters and moments (in fp32 training the former
    are the model's own)."""
    held = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        held += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        held += [x for state in part.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    return held


def resident(run: Run) -> list[torch.Tensor]:
    """Tensors that a run holds between steps."""
    parameters = [parameter for chunk in run.state.model for parameter in chunk.parameters()]
    gradients = [parameter.main_grad for parameter in parameters if hasattr(parameter, "main_grad")]
    return [*parameters, *gradients, *optimizer_tensors(run.state.optimizer)]


def close(run: Run) -> None:
    """Ends a run for good, and gives its memory back."""
    run.loader.close()
    run.checkpointer.close()
    # Megatron's hooks for overlapped reductions hold the model, and it holds them: a ring through C++, which Python's
    # collector does not see. So the memory goes, whoever still refers to it.
    for tensor in resident(run):
        tensor.untyped_storage().resize_(0)


def clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
