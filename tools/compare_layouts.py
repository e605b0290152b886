#!/usr/bin/env python3
"""One config under several parallel layouts: losses, speed dense and sparse, communication, memory.

    tools/compare_layouts.py configs/paper-0.5b.yaml --gpus 4 --output docs/benchmarks/layouts --curve 100 \
        --layout "1 GPU" 1 --layout "TP 2" 2 parallel.tensor=2 --layout "PP 2" 2 parallel.pipeline=2 \
        --load RUN --set training.steps=4000 data.blend=...

Each layout is a run of tools/benchmark_pretrain.py of its own, on as many GPUs as it names; layouts run side by side
on different GPUs. All train the same `--curve` steps from the same weights (those of `--load`, else the first ones of
the seed) on the same samples, then measure dense and sparse steps. The first layout is what the losses of the others
are compared with.

After every layout that ended, OUTPUT.json, OUTPUT.md and OUTPUT.png are written with what is known by then. A layout
that fails is named, and the others go on; the same command again repeats what failed alone.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import layout_tables
from gpu_jobs import Job, run_jobs, slug

BENCHMARK = Path(__file__).resolve().parent / "benchmark_pretrain.py"


def job_of(arguments: argparse.Namespace, name: str, gpus: int, overrides: list[str]) -> Job:
    folder = arguments.runs / slug(name)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}",
        str(BENCHMARK), arguments.config, *arguments.set, *overrides, "--out", str(folder), "--larger", "1",
        "--curve", str(arguments.curve), "--rounds", str(arguments.rounds), "--steps", str(arguments.steps),
    ]  # fmt: skip
    if arguments.load:
        command += ["--load", arguments.load]
    return Job(name, gpus, command, folder)


def claim(job: Job) -> None:
    """Ends where the folder holds what another command left."""
    path, text = job.folder / "command", shlex.join(job.command) + "\n"
    if path.exists() and path.read_text() != text:
        raise SystemExit(f"{job.folder} holds {job.name} of another command: remove it, or choose another --runs")
    job.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def collect(arguments: argparse.Namespace, jobs: list[Job]) -> dict[str, Any]:
    """What all layouts have found so far, those that failed or still run included."""
    layouts = {}
    for job, (_, _, *overrides) in zip(jobs, arguments.layout, strict=True):
        results = job.folder / "results.json"
        if results.exists():
            found = layout_tables.pick(json.loads(results.read_text()))
            layouts[job.name] = {"gpus": job.gpus, "overrides": overrides, "finished": job.done, **found}
    return {
        "config": arguments.config, "set": arguments.set, "load": arguments.load, "reference": jobs[0].name,
        "layouts": layouts,
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument(
        "--layout", nargs="+", action="append", required=True, metavar=("NAME GPUS", "a.b=c"),
        help="a layout's name, GPUs and overrides; the first is the reference",
    )  # fmt: skip
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="overrides for every layout")
    parser.add_argument("--gpus", type=int, help="of this machine (default: those of the largest layout)")
    parser.add_argument("--load", metavar="RUN", help="weights to start from: a run, or one of its checkpoints")
    parser.add_argument("--curve", type=int, default=100, help="steps whose losses are compared")
    parser.add_argument("--rounds", type=int, default=3, help="windows of dense and of sparse steps")
    parser.add_argument("--steps", type=int, default=2, help="steps of a window")
    parser.add_argument("--runs", type=Path, default=Path("runs/layouts"), help="where the runs go")
    parser.add_argument("--output", type=Path, required=True, help="prefix of the .json, .md and .png written")
    arguments = parser.parse_args()
    for layout in arguments.layout:
        if len(layout) < 2 or not layout[1].isdigit():
            parser.error(f"--layout takes a name, a number of GPUs and overrides, not: {' '.join(layout)}")
    for key, least in (("curve", 0), ("rounds", 1), ("steps", 1)):
        if getattr(arguments, key) < least:
            parser.error(f"--{key} must be at least {least}")
    return arguments


def main() -> int:
    arguments = parse()
    jobs = [job_of(arguments, name, int(gpus), overrides) for name, gpus, *overrides in arguments.layout]
    if len({job.folder for job in jobs}) < len(jobs):
        raise SystemExit("two layouts have the same name")
    for job in jobs:
        claim(job)

    def report(_: Job | None = None) -> None:
        layout_tables.write(collect(arguments, jobs), arguments.output)

    try:
        failed = run_jobs(jobs, arguments.gpus or max(job.gpus for job in jobs), report)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    report()
    print(Path(f"{arguments.output}.md").read_text())
    for job in failed:
        print(f"failed: {job.name}; see {job.folder / 'console.log'}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
