#!/usr/bin/env python3
"""Train one config under several sparsity settings with several seeds, and compare quality, sparsity and speed.

    tools/study_sparsity.py configs/paper-0.5b.yaml --runs runs/study --output docs/results/study --gpus 4 --seeds 1 2 \
        --variant "no L1" sparsity.l1.mode=off --variant "1e-5" sparsity.l1.coeff=1e-5 \
        --variant "target 64" sparsity.l1.mode=target sparsity.l1.target_l0=64 sparsity.reinit.every=50 \
        --set training.steps=1221 data.train=PREFIX data.valid=HELD_OUT training.eval_steps=2 --mlp

Each run is `megasparse pretrain` on one GPU in RUNS/{variant}-s{seed}, with training.seed=SEED: first every variant
with the first seed, then with the next. A run that ended well is not repeated: to go on, give the same command again.
On SIGTERM or Ctrl-C the running ones save and continue in the next call, so `timeout -s TERM SECONDS` fits a study into
a machine that is lent for short. After every run, OUTPUT.json (all figures and thinned curves), OUTPUT.md (tables) and
OUTPUT.png are written anew. A run that stands finished in OUTPUT.json is not repeated either, so OUTPUT.json is all
that a study needs to go on elsewhere; or collect run.json, metrics.jsonl, exit_code and mlp/results.json of each run
from several machines and call with --table-only.

The first variant is the reference. Where it is to stand for dense training, give it sparsity.path=dense too.

--mlp times forward + backward of every finished run's MLPs against compiled dense on its GPU
(benchmark_mlp.py --capture): M is one micro-batch of its validation data, so it needs the checkpoint and the data.

What the comparison rests on:
- Validation reads training.eval_steps global batches. Which samples depends on training.seed, unless they are all that
  the held-out data have: make these about as long. The table also gives differences at the same seed, where all
  variants read the same.
- training.eval_interval is set to a tenth of the steps; there is always a validation after the last step.
- Sparsity is a mean over the records of the last 5 % of the steps: logging.interval must leave some (10, the default,
  has 6 of 1221 steps).
- A neuron counts as dead after sparsity.dead_window_steps (50) steps of silence: the share depends on that and on the
  tokens a step.
- Each run leaves one checkpoint, the last (14 bytes a parameter).

These settings, and no W&B and no report, are defaults; --set and then the variant's own settings override them.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_jobs import Job, run_jobs, slug
from study_plot import plot
from study_record import COMPARED, read_records, read_run, write_records
from study_tables import tables

from megasparse.config import Config, ConfigError, Problem, check_files, load_config
from megasparse.monitoring.report import ReportError
from megasparse.small_files import read_json
from megasparse.training.checkpoint_files import list_checkpoints

TOOLS = Path(__file__).resolve().parent


Known = dict[tuple[str, int], dict[str, Any]]
"""Records of runs by variant and seed, of an earlier call."""


@dataclass(frozen=True)
class StudyRun:
    """One variant with one seed."""

    variant: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder.name


def planned(arguments: argparse.Namespace) -> list[StudyRun]:
    """All runs, in the order in which they start. Raises ConfigError where two variants share a directory."""
    variants = {name: overrides for name, *overrides in arguments.variant}
    if len({slug(name) for name in variants}) < len(arguments.variant):
        raise ConfigError([Problem("--variant", "two variants have the same name or directory", "rename one")])
    return [
        StudyRun(
            name,
            seed,
            arguments.runs / f"{slug(name)}-s{seed}",
            ("checkpoint.interval=0", "checkpoint.keep_last=1", "logging.report=false", "logging.wandb.mode=disabled",
             *arguments.set, *overrides, f"training.seed={seed}",
             f"run.directory={arguments.runs / f'{slug(name)}-s{seed}'}", f"run.name={slug(name)}-s{seed}"),
        )
        for seed in arguments.seeds
        for name, overrides in variants.items()
    ]  # fmt: skip


def settled(config: str, run: StudyRun) -> tuple[Config, list[str]]:
    """Its checked configuration for one GPU, and the overrides that make it. Raises ConfigError."""
    overrides = list(run.overrides)
    steps = load_config(config, overrides).training.steps
    overrides.insert(0, f"training.eval_interval={max(1, steps // 10)}")
    cfg = load_config(config, overrides)
    cfg.validate(1)
    check_files(cfg)
    if cfg.training.eval_steps == 0 or not (cfg.data.blend or cfg.data.valid):
        raise ConfigError(
            [Problem("data.valid", "no validation, and the study compares validation losses", "set it and eval_steps")]
        )
    return cfg, overrides


def check_unchanged(place: Path, old: dict[str, Any], cfg: Config) -> None:
    """Raises ConfigError where `old`, the configuration that `place` holds ({}: none), has other settings."""
    new = cfg.model_dump(mode="json")
    if old:
        differing = [
            f"{section}.{key} {old[section].get(key)} -> {new[section][key]}"
            for section in COMPARED
            for key in new[section]
            if old[section].get(key) != new[section][key]
        ]
        if differing:
            raise ConfigError(
                [
                    Problem(
                        str(place),
                        f"holds a run with other settings: {'; '.join(differing)}",
                        "use another --runs or --output, rename the variant, or delete what is there",
                    )
                ]
            )


def jobs_of(run: StudyRun, arguments: argparse.Namespace, known: Known) -> list[Job]:
    """Raises ConfigError."""
    cfg, overrides = settled(arguments.config, run)
    check_unchanged(run.folder, read_json(run.folder / "run.json").get("config", {}), cfg)
    record = known.get((run.variant, run.seed), {})
    if not run.folder.exists() and record.get("finished"):
        check_unchanged(json_of(arguments.output), record["config"], cfg)
        return []
    training = Job(
        run.name, 1, [sys.executable, "-m", "megasparse", "pretrain", arguments.config, *overrides], run.folder
    )
    # A record that came from another machine has no checkpoint to look into.
    if not arguments.mlp or (training.done and not list_checkpoints(cfg.checkpoint_directory)):
        return [training]
    tokens = cfg.training.micro_batch_size * cfg.data.sequence_length
    command = [
        sys.executable, str(TOOLS / "benchmark_mlp.py"), "--capture", str(run.folder), "--l0",
        "--shape", f"{tokens},{cfg.model.hidden_size},{cfg.model.ffn_hidden_size}", "--out", str(run.folder / "mlp"),
    ]  # fmt: skip
    return [training, Job(f"{run.name}, MLPs", 1, command, run.folder / "mlp", after=training)]


def json_of(output: Path) -> Path:
    return output.with_name(output.name + ".json")


def write(runs: Sequence[StudyRun], output: Path, known: Known) -> str:
    """Writes the three files from what the runs have logged so far, and what is `known` of the others. Returns the
    tables."""
    variants = list(dict.fromkeys(run.variant for run in runs))
    found = [read_run(run.folder, run.variant, run.seed) or known.get((run.variant, run.seed)) for run in runs]
    records: list[dict[str, Any]] = [record for record in found if record is not None]
    text = tables(records, variants, list(dict.fromkeys(run.seed for run in runs)))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_records(json_of(output), records)
    output.with_name(output.name + ".md").write_text(text)
    plot(records, variants, output.with_name(output.name + ".png"))
    return text


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--runs", type=Path, required=True, help="where the runs go")
    parser.add_argument("--output", type=Path, required=True, help="prefix of the .json, .md and .png written")
    parser.add_argument("--gpus", type=int, default=1, help="of this machine, one run on each (default 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--variant", nargs="+", action="append", required=True, metavar=("NAME", "a.b=c"))
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="overrides for every run")
    parser.add_argument("--mlp", action="store_true", help="time the MLPs of every finished run")
    parser.add_argument("--table-only", action="store_true", help="start nothing, write the output")
    arguments = parser.parse_args(words)
    try:
        runs = planned(arguments)
        known = read_records(json_of(arguments.output))
        failed: list[Job] = []
        if not arguments.table_only:
            jobs = [job for run in runs for job in jobs_of(run, arguments, known)]
            before = {job.name for job in jobs if job.done}

            def ended(job: Job) -> None:
                if job.name not in before:
                    write(runs, arguments.output, known)

            failed = run_jobs(jobs, arguments.gpus, ended)
        print(write(runs, arguments.output, known))
    except (ConfigError, ReportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for job in failed:
        print(f"failed: {job.name}: {job.folder}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
