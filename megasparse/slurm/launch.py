"""`megasparse launch JOB.yaml`: writes a batch script from a launcher of `slurm/` and submits it.

The YAML file (paths are relative to the working directory, as in the configuration):

    job: pretrain                  # a launcher: slurm/<job>.sbatch
    name: paper-2b                 # the job's name; of pretraining also run.name
    arguments: [configs/paper-2b.yaml, data.blend=data/corpus, data.tokenizer=data/tokenizer]
    sbatch: {nodes: 8, partition: gpu, account: me, time: "24:00:00", gpus-per-node: 8}  # false: no such flag
    environment: {MEGASPARSE_VENV: /shared/venv, NCCL_DEBUG: WARN}
    then:                          # each submitted with --dependency=afterok on this one; may have its own
      - {job: convert, arguments: [runs/paper-2b, exported], sbatch: {time: "1:00:00"}}

The written script is the launcher itself with these flags in its `#SBATCH` lines, so it can be read, kept and
submitted again by hand.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import megasparse
from megasparse.config.files import Yaml12

LAUNCHERS = Path(megasparse.__file__).resolve().parent.parent / "slurm"


class LaunchFileError(ValueError):
    """The job file is wrong, or SLURM refused the job; the message says what."""


class Job(BaseModel):
    """One batch job; `then` holds those that depend on it."""

    model_config = ConfigDict(extra="forbid")

    job: str
    name: Annotated[str, Field(pattern=r"^[^/]+$")] | None = None
    arguments: list[str] = Field(default_factory=list)
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str | int] = Field(default_factory=dict)
    then: list[Job] = Field(default_factory=list)


def read_job(path: Path) -> Job:
    """Reads a job file.

    Raises:
        LaunchFileError: no such file, no YAML, a key that is unknown or has the wrong type, or no launchers here.
    """
    try:
        content = yaml.load(path.read_text(), Yaml12)  # YAML 1.1 takes a time of 10:00 for the number 600
        job = Job.model_validate(content)
    except OSError as error:
        raise LaunchFileError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise LaunchFileError(f"{path}: not YAML: {error}") from error
    except ValidationError as error:
        lines = [": ".join(filter(None, [".".join(map(str, item["loc"])), item["msg"]])) for item in error.errors()]
        keys = ", ".join(Job.model_fields)
        raise LaunchFileError(f"{path}: " + "; ".join(lines) + f" (keys: {keys})") from error
    if not LAUNCHERS.is_dir():
        raise LaunchFileError(f"the launchers of {LAUNCHERS} are not there: launch from a checkout (pip install -e .)")
    for each in chain(job):
        if not (LAUNCHERS / f"{each.job}.sbatch").is_file():
            known = ", ".join(sorted(file.stem for file in LAUNCHERS.glob("*.sbatch")))
            raise LaunchFileError(f"{path}: job: {each.job}: there is no such launcher in {LAUNCHERS}; known: {known}")
    return job


def chain(job: Job) -> list[Job]:
    """A job and, in order, all that follow it."""
    return [job, *(later for child in job.then for later in chain(child))]


def render(job: Job) -> str:
    """The batch script: the launcher with this job's flags, environment and arguments written into it."""
    lines = (LAUNCHERS / f"{job.job}.sbatch").read_text().splitlines()
    flags = dict(job.sbatch)
    if job.name is not None:
        flags["job-name"] = job.name
    kept = [line for line in lines if not (line.startswith("#SBATCH") and _flag_of(line) in flags)]
    last = max(index for index, line in enumerate(kept) if line.startswith("#SBATCH") or index == 0)
    environment = {"MEGASPARSE_ROOT": str(LAUNCHERS.parent), **job.environment}
    added = [f"#SBATCH {_directive(name, value)}" for name, value in flags.items() if value is not False]
    added += ["", f"# megasparse launch, from {job.job}.sbatch"]
    added += [f"export {name}={shlex.quote(str(value))}" for name, value in environment.items()]
    added += [f"set -- {shlex.join(job.arguments)}"]
    return "\n".join([*kept[: last + 1], *added, *kept[last + 1 :]]) + "\n"


def _flag_of(line: str) -> str:
    match = re.match(r"#SBATCH --([a-z-]+)", line)
    return match.group(1) if match else ""


def _directive(name: str, value: str | int | bool) -> str:
    text = f"--{name}" if value is True else f"--{name}={value}"
    return shlex.quote(text) if re.search(r"\s", text) else text


def submit(job: Job, directory: Path, after: str | None = None) -> list[tuple[str, Path]]:
    """Writes the scripts of a job and of those that follow it into `directory` and submits them.

    Args:
        after: number of a job that must have succeeded before.

    Returns:
        job number and script of each, in order of submission.

    Raises:
        LaunchFileError: a script cannot be written, sbatch is not there or refuses.
    """
    scripts = _write(job, directory)
    submitted: list[tuple[str, Path]] = []

    def send(one: Job, after: str | None) -> None:
        script = scripts[len(submitted)]
        number = _sbatch(script, after)
        submitted.append((number, script))
        for child in one.then:
            send(child, number)

    try:
        send(job, after)
    except LaunchFileError as error:
        if not submitted:
            raise
        jobs = ", ".join(f"{number} ({script})" for number, script in submitted)
        raise LaunchFileError(f"{error}\nSubmitted before it, and still in the queue: {jobs}") from error
    return submitted


def _write(job: Job, directory: Path) -> list[Path]:
    """The scripts of a chain, in its order. Each has a name of its own, so that each can be submitted again by hand."""
    paths: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for one in chain(job):
            path = directory / f"{one.name or one.job}-{one.job}.sbatch"
            if path in paths:
                path = path.with_stem(f"{path.stem}-{len(paths) + 1}")
            path.write_text(render(one))
            paths.append(path)
    except OSError as error:
        raise LaunchFileError(f"{directory}: scripts cannot be written: {error.strerror}") from error
    return paths


def _sbatch(script: Path, after: str | None) -> str:
    """Submits a script; the job's number."""
    command = ["sbatch", "--parsable"]
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    try:
        done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LaunchFileError(f"sbatch is not installed here; the script is in {script}") from error
    if done.returncode != 0:
        raise LaunchFileError(f"sbatch {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
