"""Opening the data sets of a run with Megatron's builder, sample indices cached once per node.

    python -m megasparse.training.datasets CONFIG [a.b=c ...] [--validation]

builds the sample indices alone, on a machine without GPUs, ahead of a run on very large data (or of a validation of its
own). Exit code 2 where configuration or data are wrong, 1 where storage fails.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megasparse.config import Config, ConfigError, Problem, check_files, dump_config, load_config
from megasparse.config.inputs import describe_data
from megasparse.data.index_file import fingerprint
from megasparse.ranks import StorageError, on_every_rank, on_first_rank, this_rank

log = logging.getLogger("megasparse")

NO_PAD, NO_EOD = -1, -2
"""Token ids that no data holds: padding does not occur, and the end of a document is not looked at."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What GPTDataset asks a tokenizer; the data is already tokenised."""

    vocab_size: int
    eod: int
    pad: int = NO_PAD

    @property
    def unique_identifiers(self) -> dict[str, int]:
        """Goes into the names of the cached indices."""
        return {"vocab_size": self.vocab_size, "eod": self.eod}


class Samples(GPTDataset):
    """GPTDataset that finds the cached indices of these very documents. Megatron looks for those of their path, which
    may be relative, and may have held other documents when they were built."""

    def __init__(self, documents: Any, path: str, *rest: Any) -> None:
        super().__init__(documents, f"{path} {fingerprint(path)}", *rest)  # the path goes into their names alone


class Datasets(NamedTuple):
    """Megatron datasets; `valid` is None where there is nothing to validate on, `train` where it was not asked for."""

    train: Any
    valid: Any


@lru_cache(maxsize=4)
def tokenizer_facts(cfg: Config) -> TokenizerFacts:
    """Vocabulary size and end-of-document id; the id only where masks depend on it.

    The id is the one that `megasparse preprocess` ended documents with, for data of other tools the tokenizer's own.

    Raises:
        ConfigError: the id is needed, and neither the data nor `data.tokenizer` says it.
    """
    data = cfg.data
    if not (data.reset_attention_mask or data.eod_mask_loss):
        return TokenizerFacts(cfg.vocab_size, NO_EOD)
    problem = "reset_attention_mask and eod_mask_loss need to know the end-of-document token"
    written = _written_ends(cfg)
    if len(written) == 1:
        return TokenizerFacts(cfg.vocab_size, written.pop())
    if written:
        problem += f", and the data sets end their documents with different ones ({sorted(written)})"
        fix = "tokenise them again with the same --eod"
        raise ConfigError([Problem("data", problem, fix, ", ".join(data.prefixes))])
    if data.tokenizer is not None:
        from megasparse.data.errors import DataError
        from megasparse.data.tokenizer import load_tokenizer

        try:
            return TokenizerFacts(cfg.vocab_size, load_tokenizer(data.tokenizer).eod)
        except DataError as error:
            problem += f": {error}"
    raise ConfigError(
        [Problem("data.tokenizer", problem, "set it to the tokenizer that the data was written with", data.tokenizer)]
    )


def _written_ends(cfg: Config) -> set[int]:
    """Ids that end the documents of the run's data, as far as it says so. They need not be the tokenizer's own end.

    Raises:
        ConfigError: a data set has none.
    """
    ends = {prefix: found["eod"] for prefix in cfg.data.prefixes if "eod" in (found := describe_data(prefix))}
    for prefix, end in ends.items():
        if end is None:
            rule = "reset_attention_mask and eod_mask_loss need ends of documents, and it was written without them"
            raise ConfigError([Problem("data", rule, "tokenise it again without --no-eod, or leave them out", prefix)])
    return set(ends.values())


def validation_samples(cfg: Config) -> int:
    """Every validation reads the same samples, from the first on, so that its results can be compared."""
    return cfg.training.eval_steps * cfg.training.global_batch_size


def build_datasets(cfg: Config, local_rank: int = 0, train: bool = True) -> Datasets:
    """Opens the data sets, after the sample indices were built where they were missing. Collective.

    Rank 0 builds them. Where the cache directory is local to each node (environment variables in its path are
    expanded on each node), the first rank of every other node builds its own copy.

    Args:
        train: False: for a validation of its own, which reads no training data. Indices of a `data.train` are then not
            built: there may be gigabytes of them. `data.blend` is opened whole, as its indices lie in the run's cache.

    Raises:
        ConfigError: a split holds no documents.
        StorageError: rank 0 cannot write the indices, or a rank cannot read them.
    """
    on_every_rank(partial(check_splits, cfg))
    if dist.get_rank() == 0 and (text := repeated_validation(cfg)) is not None:
        log.warning(text)
    cache = cfg.cache_directory
    if dist.get_world_size() > 1:
        _build_on_nodes_with_own_disk(cfg, cache, local_rank, train)
    return _build(cfg, cache, train)


def _build(cfg: Config, cache: Path, train: bool) -> Datasets:
    """Rank 0 builds what is missing, then the others open it. Collective."""
    opened: list[Datasets] = []

    def open_all() -> None:
        if not opened:
            opened.append(_open(cfg, cache, train))

    on_first_rank(open_all)
    on_every_rank(open_all)
    return opened[0]


def _open(cfg: Config, cache: Path, train: bool) -> Datasets:
    """By this rank for itself, which builds what is missing.

    Raises:
        StorageError: indices or data cannot be read or written.
    """
    config = _dataset_config(cfg, cache, train)
    sizes = [cfg.training.steps * cfg.training.global_batch_size, validation_samples(cfg), 0]
    try:
        with _saved_whole(), _waiting_for_nobody():
            built = BlendedMegatronDatasetBuilder(Samples, sizes, lambda: True, config).build()  # type: ignore[arg-type]
    except OSError as error:
        what = f"reading the data, or writing its sample indices to {cache}, failed"
        raise StorageError(f"{this_rank()}: {what} ({error}); make room, or choose another data.cache_dir") from error
    return Datasets(*built[:2])


@contextmanager
def _waiting_for_nobody() -> Iterator[None]:
    """In here Megatron's builder sees no other ranks.

    It would have them wait in a barrier for each data set, which a rank that fails never enters.
    """
    initialized = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        yield
    finally:
        dist.is_initialized = initialized


@contextmanager
def _saved_whole() -> Iterator[None]:
    """In here a file of `numpy.save` gets its name when it is whole.

    Megatron takes every index file that it finds. One that a kill or a full disk cut short would end this start and all
    that follow, as would one that another run with the same cache directory is still writing.
    """
    save = np.save

    def save_whole(file: str, array: np.ndarray, **options: Any) -> None:
        part = Path(f"{file}.{uuid.uuid4().hex[:8]}.part")
        try:
            with part.open("wb") as stream:
                save(stream, array, **options)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)

    np.save = save_whole  # type: ignore[assignment]
    try:
        yield
    finally:
        np.save = save


def _validates(cfg: Config) -> bool:
    shared = cfg.data.blend is not None and cfg.data.split_weights[1] > 0
    return cfg.training.eval_steps > 0 and (shared or cfg.data.valid is not None)


def _dataset_config(cfg: Config, cache: Path, train: bool) -> GPTDatasetConfig:
    data = cfg.data
    where: dict[str, Any]
    if data.blend:
        where = {"blend": _blend(data.blend), "split": data.split}
    else:
        valid = _blend(data.valid) if data.valid and _validates(cfg) else None
        where = {"blend_per_split": [_blend(data.train or ()) if train or valid is None else None, valid, None]}
    config = GPTDatasetConfig(
        random_seed=cfg.training.seed,
        sequence_length=data.sequence_length,
        path_to_cache=str(cache),
        tokenizer=tokenizer_facts(cfg),  # type: ignore[arg-type]
        reset_position_ids=False,  # rotary embeddings look at distances alone
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=False,  # made on the device from the tokens, rather than copied: s x s a sample
        mid_level_dataset_surplus=_surplus(cfg),
        **where,
    )
    if data.blend and config.split_matrix is not None:
        # Megatron would build the indices of splits that nobody reads, and never ends on one without documents.
        config.split_matrix[2] = None  # type: ignore[call-overload]
        if not _validates(cfg):
            config.split_matrix[1] = None  # type: ignore[call-overload]
    return config


def _surplus(cfg: Config) -> float:
    """How many samples more than its share of a split Megatron indexes of each data set of a blend, as a fraction.

    It rounds all shares up and takes their sum from the blend: of few samples from many data sets, that can be more
    than are indexed of the one with the largest weight, and Megatron gives up. Where its own default suffices, it
    stays: the order of samples can depend on it.
    """
    data, choices = cfg.data, (0.005, 0.05, 0.5, 5.0, 50.0)
    splits = (
        ("train", data.blend or data.train or (), cfg.training.steps * cfg.training.global_batch_size),
        ("valid", data.blend or data.valid or (), validation_samples(cfg) if _validates(cfg) else 0),
    )
    needed = 0
    for split, blend, size in splits:
        if not size or len(blend) < 2 or size > 1000 * len(blend):  # then half a percent is more than rounding adds
            continue
        tokens = [_tokens(prefix, first, last) for name, prefix, first, last in _parts(cfg) if name == split]
        weights = [weight for weight, _ in blend]
        while needed < len(choices) - 1 and not _suffices(choices[needed], weights, tokens, size, data.sequence_length):
            needed += 1
    return choices[needed]


def _suffices(surplus: float, weights: Sequence[float], tokens: Sequence[int], size: int, sequence_length: int) -> bool:
    """Whether no data set of a blend, of so many tokens each, has fewer samples indexed than the blend takes of it."""
    from megatron.core.datasets import helpers

    shares = np.array(weights) / sum(weights)
    wanted = np.ceil(size * shares).astype(int)
    total = int(wanted.sum())
    source, position = np.zeros(total, np.int16), np.zeros(total, np.int64)
    helpers.build_blending_indices(source, position, shares.tolist(), len(shares), total, False)
    taken = np.bincount(source, minlength=len(shares))
    for samples, asked, epoch in zip(taken, wanted, tokens, strict=True):
        epochs = math.ceil((math.ceil(asked * (1 + surplus)) * sequence_length + 1) / epoch)  # whole ones are indexed
        if samples > (epochs * epoch - 1) // sequence_length:
            return False
    return True


def _blend(blend: Sequence[tuple[float, str]]) -> tuple[list[str], list[float] | None]:
    prefixes = [prefix for _, prefix in blend]
    return prefixes, [weight for weight, _ in blend] if len(blend) > 1 else None


def check_splits(cfg: Config) -> None:
    """Every split that is read must hold tokens in every data set of its blend.

    Raises:
        ConfigError: one does not; the message names the data set and the split.
    """
    problems = []
    for name, prefix, first, last in _parts(cfg):
        if _tokens(prefix, first, last) == 0:
            problems.append(
                Problem(
                    "data.split" if cfg.data.blend else f"data.{name}",
                    f"leaves no tokens for {name}: {prefix} has {len(IndexedDataset(prefix))} documents",
                    "give the split a larger share, or more documents",
                    cfg.data.split if cfg.data.blend else prefix,
                )
            )
    if problems:
        raise ConfigError(problems)


def repeated_validation(cfg: Config) -> str | None:
    """Says it where a validation asks for more samples than are held out: Megatron then goes over them again."""
    length, batch, wanted = cfg.data.sequence_length, cfg.training.global_batch_size, validation_samples(cfg)
    parts = [part for part in _parts(cfg) if part[0] == "valid"]
    weights = [weight for weight, _ in cfg.data.blend or cfg.data.valid or ()]
    short, enough = [], wanted
    for (_, prefix, first, last), weight in zip(parts, weights if parts else (), strict=True):
        held_out, share = (_tokens(prefix, first, last) - 1) // length, weight / sum(weights)
        if held_out < int(wanted * share):
            short.append(f"{prefix} has {held_out:,} for {int(wanted * share):,}")
        enough = min(enough, int(held_out / share))
    if not short:
        return None
    steps = enough // batch
    return (
        f"each validation reads {wanted:,} samples of {length:,} tokens (training.eval_steps "
        f"{cfg.training.eval_steps} x training.global_batch_size {batch}), more than are held out, and so goes over "
        f"some of them again: {', '.join(short)}. "
        + (f"training.eval_steps={steps} reads none twice" if steps else "There are less than one batch of them")
        + "; hold out more by data.split or data.valid"
    )


def _tokens(prefix: str, first: float, last: float) -> int:
    """Tokens of a part of a data set, given as shares of its documents."""
    documents = IndexedDataset(prefix)  # kept while its lengths are read: it unmaps the file when it goes
    lengths = documents.sequence_lengths
    return int(lengths[round(first * len(lengths)) : round(last * len(lengths))].sum())


def _parts(cfg: Config) -> list[tuple[str, str, float, float]]:
    """(split, prefix, begin, end) of what is read; begin and end as shares of the documents."""
    data = cfg.data
    if data.blend:
        train, valid, _ = data.split_weights
        parts = [("train", prefix, 0.0, train) for _, prefix in data.blend]
        if _validates(cfg):
            parts += [("valid", prefix, train, train + valid) for _, prefix in data.blend]
        return parts
    parts = [("train", prefix, 0.0, 1.0) for _, prefix in data.train or ()]
    if _validates(cfg):
        parts += [("valid", prefix, 0.0, 1.0) for _, prefix in data.valid or ()]
    return parts


def _build_on_nodes_with_own_disk(cfg: Config, cache: Path, local_rank: int, train: bool) -> None:
    """First ranks of nodes that do not see rank 0's cache directory build the indices in a process of their own.

    Megatron's builder writes on global rank 0 only; a process outside the job is its own rank 0.
    """

    def leave_marker() -> str | None:
        name = f".seen-{uuid.uuid4().hex}"
        try:
            cache.mkdir(parents=True, exist_ok=True)
            (cache / name).touch()
        except OSError:  # it may hold all that is needed; who lacks something says so
            return None
        return name

    name = on_first_rank(leave_marker)
    if name is None:
        return
    marker = cache / name

    def build() -> str | None:
        return _build_in_own_process(cfg, train) if local_rank == 0 and not marker.exists() else None

    failures = on_every_rank(build)
    on_first_rank(partial(marker.unlink, missing_ok=True))
    for rank, text in enumerate(failures):
        if text is not None:
            raise RuntimeError(f"building the sample indices on the node of rank {rank} failed:\n{text}")


def _build_in_own_process(cfg: Config, train: bool) -> str | None:
    """Returns the end of the process's output where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_config(cfg))
        command = [
            sys.executable,
            "-m",
            "megasparse.training.datasets",
            str(path),
            *(() if train else ("--validation",)),
        ]
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        env = {name: value for name, value in os.environ.items() if name not in launcher}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stdout + done.stderr)[-4000:]


def main(arguments: Sequence[str]) -> None:
    """Builds the sample indices of a configuration in this process alone.

    Raises:
        ConfigError, StorageError: as `build_datasets`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megasparse.training.datasets",
        description="Builds the sample indices of a run in its data.cache_dir, ahead of the run.",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="override a key: those of the run")
    parser.add_argument("--validation", action="store_true", help="those alone that `megasparse evaluate` needs")
    args = parser.parse_intermixed_args(arguments)
    cfg = load_config(args.config, args.overrides)
    if not args.validation:  # which reads no training data
        check_files(cfg)
    check_splits(cfg)
    cache = cfg.cache_directory
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        _build(cfg, cache, not args.validation)
    finally:
        dist.destroy_process_group()
    print(f"sample indices: {cache}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, StorageError) as error:
        print(f"megasparse: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
