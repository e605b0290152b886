"""`megasparse convert`: its arguments and what it prints. Imports torch only when it runs."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasparse.hf.errors import ConvertError

if TYPE_CHECKING:
    import torch

    from megasparse.hf.conversion import Converted
    from megasparse.hf.verify import Comparison

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_convert(commands: Any) -> None:
    """Add `convert` to the sub-commands of the command line."""
    parser = commands.add_parser(
        "convert",
        help="checkpoint to Hugging Face format and back",
        description="One weight is in memory at a time, on a machine without a GPU. Inputs are only read; the output "
        "appears when it is complete.",
    )
    directions = parser.add_subparsers(title="directions", required=True, metavar="DIRECTION")

    out = directions.add_parser(
        "to-hf",
        help="export a checkpoint as a transformers model",
        description="Writes a folder that AutoModelForCausalLM.from_pretrained loads without remote code. Interrupted, "
        "it goes on where it was when started again.",
    )
    out.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run's folder (its newest)")
    _add_common(out)
    out.add_argument(
        "--shard-size", type=_size, default=5 * 10**9, metavar="SIZE", help="largest file, such as 5GB (5GB)"
    )
    tokenizer = out.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", metavar="PATH", help="tokenizer to put in (the run's data.tokenizer)")
    tokenizer.add_argument("--no-tokenizer", action="store_true", help="put none in")
    out.add_argument("--push", metavar="USER/NAME", help="then upload it to the Hugging Face hub")
    out.add_argument("--private", action="store_true", help="with --push: create a private repository")
    out.set_defaults(run=_to_hf)

    back = directions.add_parser(
        "from-hf",
        help="import a transformers model as a checkpoint",
        description="Llama, Mistral, Qwen2, Qwen3, Arcee, Apertus, and the published sparse checkpoints. The output is "
        "a checkpoint for checkpoint.load at any parallel layout; OUTPUT/model.yaml is a configuration to build on.",
    )
    back.add_argument("model", metavar="MODEL", help="a folder, or a name on the Hugging Face hub")
    _add_common(back)
    back.add_argument("--no-tokenizer", action="store_true", help="leave the model's tokenizer out")
    _add_down_proj(back)
    back.set_defaults(run=_from_hf)

    hashes = directions.add_parser(
        "hashes",
        help="print the SHA-256 of every tensor, of either format",
        description="One line a tensor: SHA-256 of its bytes, its Hugging Face name, type and shape; the last line "
        "stands for the whole model. A checkpoint and a folder with the same list are the same model, bit by bit.",
    )
    hashes.add_argument(
        "model", type=Path, metavar="MODEL", help="a Hugging Face folder, a checkpoint, or a run's folder (its newest)"
    )
    hashes.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="round to this first")
    _add_down_proj(hashes)
    hashes.set_defaults(run=_hashes)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write")
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the weights (auto: as stored)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUTPUT, when the new one is complete; it must be empty, or hold an earlier result of this "
        "command and nothing else",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare all tensors, then run both models in fp32 on the same tokens and compare every block (memory: "
        "twice the model in fp32)",
    )
    parser.add_argument("--verify-tokens", type=int, default=4096, metavar="N", help="tokens of that run (%(default)s)")


def _add_down_proj(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--down-proj",
        choices=("standard", "by-neuron"),
        help="how down_proj is stored (as the files tell; by-neuron is transposed, as some sparse training leaves it)",
    )


def _down_by_neuron(args: argparse.Namespace) -> bool | None:
    return None if args.down_proj is None else bool(args.down_proj == "by-neuron")


def _to_hf(args: argparse.Namespace) -> int:
    if args.private and not args.push:
        raise ConvertError("--private: is of --push alone; add --push USER/NAME, or leave it out")
    from megasparse.hf.to_hf import ToHf, check, convert_to_hf

    options = ToHf(
        checkpoint=args.checkpoint,
        output=args.output,
        dtype=args.dtype,
        shard_bytes=args.shard_size,
        tokenizer=args.tokenizer,
        no_tokenizer=args.no_tokenizer,
        overwrite=args.overwrite,
    )
    repository = None
    if args.push:
        from megasparse.hf.push import prepare_push

        options = check(options)  # a mistake must leave no empty repository
        repository = prepare_push(args.push, args.private)
    with _interruptible("the same command goes on with what is missing"), _bar("exporting") as progress:
        result = convert_to_hf(options, progress)
    _print_result(result)
    print(f"In Python: AutoModelForCausalLM.from_pretrained({str(result.path)!r})")
    if args.verify and not _verify(result.checkpoint, result.path, result.dtype, args.verify_tokens):
        return 1
    if repository is not None:
        from megasparse.hf.push import push

        print(push(result.path, repository))
    return 0


def _from_hf(args: argparse.Namespace) -> int:
    from megasparse.hf.from_hf import MODEL_YAML, FromHf, convert_from_hf, foreign_to_import
    from megasparse.hf.output import check_target
    from megasparse.hub import local_model

    check_target(args.output, args.overwrite, foreign=foreign_to_import)  # before a download
    options = FromHf(
        model=local_model(args.model),
        output=args.output,
        dtype=args.dtype,
        down_by_neuron=_down_by_neuron(args),
        no_tokenizer=args.no_tokenizer,
        overwrite=args.overwrite,
    )
    with _interruptible("start the same command again"), _bar("importing") as progress:
        result = convert_from_hf(options, progress)
    _print_result(result)
    print(f"In a config: base: {result.path / MODEL_YAML}, or checkpoint.load: {result.path}")
    if args.verify:
        same = _verify(result.path, result.checkpoint, result.dtype, args.verify_tokens, options.down_by_neuron)
        return 0 if same else 1
    return 0


def _hashes(args: argparse.Namespace) -> int:
    from megasparse.hf.conversion import DTYPES
    from megasparse.hf.hashes import hash_of_list, hash_tensors

    hashes = []
    for item in hash_tensors(args.model, DTYPES.get(args.dtype), _down_by_neuron(args)):
        print(item, flush=True)
        hashes.append(item)
    print(f"{hash_of_list(hashes)}  all {len(hashes)} tensors")
    return 0


def _verify(
    checkpoint: Path, folder: Path, dtype: torch.dtype, tokens: int, down_by_neuron: bool | None = None
) -> bool:
    from megasparse.hf.verify import compare

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's and torch's about their own use of each other
        comparison = compare(checkpoint, folder, dtype, tokens, down_by_neuron)
    print_comparison(comparison)
    return comparison.passed


def print_comparison(comparison: Comparison) -> None:
    """Whether the tensors are the same, the largest difference of each block and of the logits, and the verdict."""
    if comparison.different:
        print(
            f"{len(comparison.different)} of {comparison.tensors} tensors differ, the first is "
            f"{comparison.different[0]}"
        )
    else:
        print(f"All {comparison.tensors} tensors are equal bit by bit (SHA-256 of their list: {comparison.sha256})")
    print(f"Largest differences between Megatron and transformers in fp32, over {comparison.tokens} random tokens:")
    print(f"  embedding  {comparison.embedding:.3g}")
    for layer, difference in enumerate(comparison.blocks):
        print(f"  block {layer:<4} {difference:.3g}")
    print(f"  logits     {comparison.logits:.3g} (the largest logit is {comparison.largest_logit:.3g})")
    print(f"  same most likely token (top-1) for {comparison.same_top} of {comparison.tokens} tokens")
    print("verified: both compute the same" if comparison.passed else "FAILED: the two models differ")


def _print_result(result: Converted) -> None:
    print(
        f"{result.path}: {result.architecture}, {result.parameters:,} parameters, "
        f"{str(result.dtype).removeprefix('torch.')}, "
        f"{result.nbytes / 2**30:.2f} GiB in {result.files} file{'s' if result.files > 1 else ''}"
    )
    for note in result.notes:
        print(f"note: {note}")


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@contextmanager
def _interruptible(advice: str) -> Iterator[None]:
    """SIGTERM ends the conversion as Ctrl-C does, so that it leaves things in order."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; {advice}", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
