"""The subcommands `megasparse launch` and `megasparse status`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any


def add_launch(commands: Any) -> None:
    """Adds `launch`."""
    parser = commands.add_parser(
        "launch",
        help="write a SLURM job from a YAML file and submit it",
        description="The YAML file: see megasparse/slurm/launch.py; an example: slurm/job.example.yaml.",
    )
    parser.add_argument("job", metavar="JOB.yaml", type=Path, help="what to run, with which flags of sbatch")
    parser.add_argument("--print", dest="only_print", action="store_true", help="print the scripts, submit nothing")
    parser.add_argument(
        "--directory", type=Path, default=Path("runs/jobs"), metavar="DIR", help="where scripts go (%(default)s)"
    )
    parser.add_argument("--after", metavar="JOB", help="start when this job has succeeded")
    parser.set_defaults(run=_launch)


def add_status(commands: Any) -> None:
    """Adds `status`."""
    parser = commands.add_parser("status", help="what a run is doing: step, loss, pace, last checkpoint, why it ended")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.set_defaults(run=_status)


def _launch(args: argparse.Namespace) -> int:
    from megasparse.slurm.launch import chain, read_job, render, submit

    job = read_job(args.job)
    if args.only_print:
        print("\n".join(render(each) for each in chain(job)), end="")
        return 0
    for number, script in submit(job, args.directory, args.after):
        print(f"{number} {script}")
    return 0


def _status(args: argparse.Namespace) -> int:
    from megasparse.slurm.status import StatusError, print_status, status_of

    mistakes: list[StatusError] = []
    for run in args.runs:
        try:
            status = status_of(run, time.time())
        except StatusError as error:  # `runs/*` has other folders in it, too
            mistakes.append(error)
            continue
        if args.json:
            print(status.to_json())
        else:
            print_status(status)
    if mistakes:
        raise StatusError("\n".join(map(str, mistakes)))
    return 0
