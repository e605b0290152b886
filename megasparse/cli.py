"""The `megasparse` command.

Modules are imported by the command that needs them, so that `--help` and mistakes in a config answer at once.
An exception type that this package defines is a message to the user: it ends as that message and exit code 2, or as
the type's own `exit_code` where trying again may help: launchers do not try a mistake again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import megasparse
from megasparse.arguments import count
from megasparse.hf.commands import add_convert
from megasparse.hf.generate import add_generate
from megasparse.host import host_name
from megasparse.slurm.commands import add_launch, add_status

EXIT_MISTAKE = 2
OVERRIDES = "a.b=c"
FIRST_RANK_SPEAKS = 10.0
"""Seconds in which rank 0 tells what all ranks have found, before another one ends: torchrun and srun end the whole
job as soon as one rank has."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 a check failed (`doctor`, `preflight`, `--dry-run`) or storage or network
    did, 2 a mistake, which it explains.

    `pretrain` has further codes: `megasparse.training.signals`.
    """
    args = _parse(arguments)
    try:
        code = args.run(args)
    except KeyboardInterrupt:
        print("megasparse: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Exception as error:
        if not type(error).__module__.startswith("megasparse."):
            raise
        if os.environ.get("MEGASPARSE_TRACEBACK"):
            traceback.print_exc()
        _print_mistake(error)
        code = getattr(error, "exit_code", EXIT_MISTAKE)
    sys.exit(code)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """As `parse_args`, but overrides may also stand after options (argparse takes them in one piece only)."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        hint = "see megasparse COMMAND --help"
        key = rest[0].partition("=")[0].lstrip("-")
        if hasattr(args, "overrides") and "." in key:
            hint = f"keys of the configuration take no dashes: {key}=VALUE"
        parser.error(f"unrecognized arguments: {' '.join(rest)} ({hint})")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _print_mistake(error: Exception) -> None:
    """Once a job where every rank makes the same mistake; with rank and host where it may be this rank's own."""
    from megasparse.config import ConfigError

    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    if rank == 0:
        print(f"megasparse: {error}", file=sys.stderr)
    elif not isinstance(error, ConfigError) or error.host_specific:
        print(f"megasparse (rank {rank} on {host_name()}): {error}", file=sys.stderr)
    else:
        with suppress(KeyboardInterrupt):
            time.sleep(FIRST_RANK_SPEAKS)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megasparse", description="Pretraining of large language models with activation sparsity."
    )
    parser.add_argument("--version", action="version", version=f"megasparse {megasparse.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_preprocess, _add_pretrain, _add_evaluate, add_convert, _add_report, _add_doctor, _add_preflight):
        add(commands)
    for add in (add_generate, add_launch, add_status):
        add(commands)
    return parser


def _add_preprocess(commands: Any) -> None:
    parser = commands.add_parser(
        "preprocess",
        help="tokenise text, JSON lines or Parquet into a data set",
        description="Writes OUTPUT.bin and OUTPUT.idx (Megatron's format) and OUTPUT.json (counts). Nothing is "
        "written, and nothing replaced, unless all of it succeeds.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help=".txt, .jsonl (packed too: .gz, .bz2, .xz, .zst), .parquet, or a folder",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="PREFIX", help="path without .bin/.idx")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, Hugging Face folder or hub name")
    source.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="VOCAB",
        help="train a byte-level BPE of this many tokens on the inputs",
    )
    parser.add_argument(
        "--tokenizer-output", type=Path, metavar="DIR", help="where a trained one goes (PREFIX-tokenizer)"
    )
    parser.add_argument(
        "--train-megabytes", type=_positive, default=100.0, metavar="MB", help="text to train it on (%(default)s)"
    )
    parser.add_argument(
        "--workers", type=count, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)"
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="JSON key or Parquet column (%(default)s)")
    parser.add_argument("--per-line", action="store_true", help="each line of a text file is a document, not the file")
    parser.add_argument(
        "--include",
        action="append",
        metavar="GLOB",
        help="file names taken from folders (*.txt, *.jsonl, *.ndjson, these packed, *.parquet)",
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="files or folders left out of folders"
    )
    parser.add_argument("--shuffle-files", type=int, metavar="SEED", help="shuffle the order of the files")
    parser.add_argument("--eod", metavar="TOKEN", help="end-of-document token (the tokenizer's own)")
    parser.add_argument("--no-eod", action="store_true", help="do not end documents with it")
    parser.add_argument(
        "--skip-damaged", action="store_true", help="pass over unreadable documents, not whole files, and count them"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing data set, and the files of a tokenizer that was trained before; a folder with "
        "anything else in it is refused",
    )
    parser.set_defaults(run=_preprocess)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar=OVERRIDES, help="override a key, for example training.steps=100"
    )


def _positive(text: str) -> float:
    with suppress(ValueError):
        if (value := float(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def _add_pretrain(commands: Any) -> None:
    parser = commands.add_parser(
        "pretrain",
        help="train a model as a YAML file says",
        description="On several GPUs start it with torchrun or srun: one process a GPU. Exit code 0: all steps are "
        "done; 75: stopped early and saved, the same command goes on; 65: the loss stayed not finite; 2: a mistake in "
        "the configuration. Of --dry-run, 0: it could start here; 1: something is missing, named below the plan, or it "
        "does not fit --gpu-memory; 2: a mistake in the configuration.",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    _add_overrides(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would run, start nothing")
    plan = parser.add_argument_group("with --dry-run")
    plan.add_argument("--world-size", type=int, metavar="N", help="GPUs of the job (the smallest that fits)")
    plan.add_argument("--l0", type=_positive, metavar="L0", help="active neurons per token to assume")
    plan.add_argument("--gpu-memory", type=_positive, metavar="GIB", help="fail where a GPU of this size is too small")
    parser.set_defaults(run=_pretrain)


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="validation loss, perplexity and per-layer L0 of a checkpoint",
        description="On the validation data of the checkpoint's own run, or on data.valid=PREFIX. A Hugging Face "
        "folder knows no data: give it data.valid=PREFIX (training.eval_steps=50 batches of "
        "training.global_batch_size=8 samples of data.sequence_length=2048 tokens).",
    )
    parser.add_argument(
        "checkpoint",
        metavar="RUN_OR_CHECKPOINT",
        help="a run's folder (its newest checkpoint), a checkpoint, or a Hugging Face folder",
    )
    _add_overrides(parser)
    parser.set_defaults(run=_evaluate)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="write a run's HTML report from its metrics.jsonl")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run's folder; more to compare with it")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write it (report.html in the first RUN)")
    parser.set_defaults(run=_report)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this machine and say what each missing thing costs",
        description="Exit code 0: training can work here; 1: something is broken.",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=_doctor)


def _add_preflight(commands: Any) -> None:
    parser = commands.add_parser(
        "preflight",
        help="check that all nodes of an allocation fit together, before a long start",
        description="Start it as the run will be started (srun, torchrun): every rank says what code, config, data, "
        "versions and storage it sees, and measures GPU and network; rank 0 prints one table that names hosts and "
        "ranks. Exit code 0: go; 1: something fails.",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    _add_overrides(parser)
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds once rank 0 is there (%(default)s)"
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks of the run, where fewer check (one a node)")
    parser.add_argument(
        "--min-free", type=float, default=1.0, metavar="GIB", help="free space beyond checkpoints (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the result and the hosts at fault as JSON")
    parser.set_defaults(run=_preflight)


def _preprocess(args: argparse.Namespace) -> int:
    from megasparse.data.documents import DEFAULT_INCLUDE
    from megasparse.data.preprocess import PreprocessOptions, preprocess
    from megasparse.data.progress import show_progress

    # Ending by SIGTERM must remove the half-written files as ending by an exception does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = PreprocessOptions(
        inputs=args.inputs,
        output=args.output,
        tokenizer=args.tokenizer,
        train_vocab_size=args.train_tokenizer,
        train_megabytes=args.train_megabytes,
        tokenizer_output=args.tokenizer_output,
        eod_token=args.eod,
        append_eod=not args.no_eod,
        text_key=args.text_key,
        per_line=args.per_line,
        include=args.include or DEFAULT_INCLUDE,
        exclude=args.exclude,
        shuffle_seed=args.shuffle_files,
        workers=args.workers,
        skip_damaged=args.skip_damaged,
        overwrite=args.overwrite,
    )
    with show_progress() as progress:
        result = preprocess(options, progress)
    print(
        f"{args.output}.bin, .idx: {result.documents:,} documents, {result.tokens:,} tokens of a vocabulary of "
        f"{result.vocab_size:,}"
    )
    if result.empty:
        print(f"{result.empty:,} empty documents left out")
    if result.damaged:
        print(f"{len(result.damaged):,} damaged documents left out; the first: {result.damaged[0]}")
    if args.train_tokenizer and result.vocab_size < args.train_tokenizer:
        print(
            f"{result.tokenizer}: {result.vocab_size:,} tokens, fewer than the {args.train_tokenizer:,} asked for: "
            "there is too little text"
        )
    print(f"In a config: data.blend: {args.output}, data.tokenizer: {result.tokenizer}")
    return 0


def _quiet_megatron() -> None:
    """Megatron warns of absent optional packages, from every rank; `megasparse doctor` says it once, with the cost.
    And torch warns of what Megatron's checkpoints use of it, and on a login node of a compiler without a GPU. Megatron
    0.19's own deprecations (each module logs one warning, and that is it) are for its callers, which users are not."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.checkpoint")
    for name in (
        "torch.utils.cpp_extension",
        "megatron.core.models.gpt.gpt_model",
        "megatron.core.distributed.distributed_data_parallel",
        "megatron.core.dist_checkpointing.strategies.torch",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def _pretrain(args: argparse.Namespace) -> int:
    from megasparse.config import ConfigError, Problem, load_with_origins
    from megasparse.start_checks import start_checks

    for option in ("--world-size", "--l0", "--gpu-memory"):
        if not args.dry_run and getattr(args, option.lstrip("-").replace("-", "_")) is not None:
            raise ConfigError([Problem(option, "is of --dry-run alone", "add --dry-run, or leave it out")])
    loaded = load_with_origins(args.config, args.overrides)
    if args.dry_run:
        from megasparse.plan.text import print_plan

        return int(not print_plan(loaded, args.world_size, args.l0, args.gpu_memory))
    for check in start_checks(loaded.config):
        check()
    _quiet_megatron()
    from megasparse.training.loop import pretrain

    return pretrain(loaded.config)


def _evaluate(args: argparse.Namespace) -> int:
    _quiet_megatron()
    if (Path(args.checkpoint) / "config.json").is_file():
        from megasparse.training.evaluate_hf import evaluate_folder

        evaluate_folder(Path(args.checkpoint), args.overrides)
    else:
        from megasparse.training.evaluate import evaluate

        evaluate(args.checkpoint, args.overrides)
    return 0


def _report(args: argparse.Namespace) -> int:
    from megasparse.monitoring.report import write_report

    print(write_report(*args.runs, output=args.output))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from megasparse.doctor import examine, print_checks

    checks = examine()
    print_checks(checks, as_json=args.json)
    return int(any(check.status == "fail" for check in checks))


def _preflight(args: argparse.Namespace) -> int:
    _quiet_megatron()
    from megasparse.preflight.run import Options, leave_process, preflight

    options = Options(args.timeout, args.world_size, int(args.min_free * 2**30), args.json, args.report)
    code = preflight(args.config, args.overrides, options)
    leave_process(code)
    return code


if __name__ == "__main__":
    main()
