"""Text -> Megatron `.bin`/`.idx`: one sequence a document, each ended by the end-of-document token.

The result does not depend on the number of workers. Everything is written in hidden folders beside its
destination and renamed at the end, the index last: a data set that has an `.idx` is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import escape
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from megasparse.data.documents import DEFAULT_INCLUDE, Record, find_files, read_documents
from megasparse.data.errors import DataError
from megasparse.data.index_file import DatasetWriter
from megasparse.data.tokenizer import TRAINED_FILES, TextTokenizer, load_tokenizer, train_tokenizer

_CHUNK_BYTES = 1 << 20
_CHUNK_DOCUMENTS = 1000


@dataclass(frozen=True)
class PreprocessOptions:
    """What `megasparse preprocess` is asked for; see its `--help`."""

    inputs: Sequence[str]
    output: Path
    tokenizer: str | None = None
    train_vocab_size: int | None = None
    train_megabytes: float = 100.0
    tokenizer_output: Path | None = None
    eod_token: str | None = None
    append_eod: bool = True
    text_key: str = "text"
    per_line: bool = False
    include: Sequence[str] = DEFAULT_INCLUDE
    exclude: Sequence[str] = ()
    shuffle_seed: int | None = None
    workers: int = 1
    skip_damaged: bool = False
    overwrite: bool = False


@dataclass
class PreprocessResult:
    """Counts of a finished run; they are also written to `<output>.json`."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    damaged: list[str] = field(default_factory=list)
    vocab_size: int = 0
    tokenizer: str = ""


Progress = Callable[[str, int, int, PreprocessResult], None]
"""Called with the phase ("tokenizer" | "tokens"), bytes read, bytes in all, counts so far."""


def preprocess(options: PreprocessOptions, progress: Progress = lambda *_: None) -> PreprocessResult:
    """Tokenise into `<output>.bin`, `.idx`, `.json`. Raises DataError; then no output has changed."""
    if (options.tokenizer is None) == (options.train_vocab_size is None):
        raise DataError("give either --tokenizer PATH or --train-tokenizer VOCAB")
    targets = [Path(f"{options.output}{end}") for end in (".bin", ".json", ".idx")]
    existing = [str(path) for path in targets if path.exists()]
    if existing and not options.overwrite:
        raise DataError(f"{', '.join(existing)}: already there; choose another --output or give --overwrite")
    saved = _tokenizer_output(options)
    files = find_files(options.inputs, options.include, options.exclude, options.shuffle_seed)
    _spare_inputs(existing, files)
    total = sum(file.stat().st_size for file in files)
    result = PreprocessResult()
    with _working_folder(options.output) as folder, _tokenizer_folder(saved) as staged:
        tokenizer = _obtain_tokenizer(options, files, total, staged, progress, result)
        result.tokenizer = str(staged.target) if staged else tokenizer.path
        result.vocab_size = tokenizer.vocab_size
        dtype = _write(options, files, total, folder, tokenizer, progress, result)
        if result.tokens == 0:
            raise DataError(f"no text in {', '.join(options.inputs)}")
        _describe(folder / "data.json", options, tokenizer, dtype, result)
        if staged:
            _put_tokenizer(staged)
        targets[2].unlink(missing_ok=True)  # an old index must never stand beside new data
        for target in targets:
            os.replace(folder / f"data{target.suffix}", target)
    return result


def _spare_inputs(existing: Sequence[str], files: Sequence[Path]) -> None:
    """Raises DataError where a file to be replaced is an input: `corpus.json` is, with an output of `corpus`."""
    replaced = {(found.st_dev, found.st_ino) for found in map(os.stat, existing)}
    for file in files if replaced else ():
        found = file.stat()
        if (found.st_dev, found.st_ino) in replaced:
            raise DataError(f"{file}: is an input, and the output would replace it; choose another --output")


@contextmanager
def _working_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside the output, removed at the end; those of killed processes are removed too."""
    if output.name in ("", ".", "..") or output.is_dir():
        raise DataError(f"--output {output}: a folder; give a prefix in it, for example {output / 'data'}")
    if output.suffix in (".bin", ".idx"):
        raise DataError(f"--output {output}: a prefix is without {output.suffix}; give {output.with_suffix('')}")
    try:
        folder = _hidden_folder(output.parent, output.name)
    except OSError as error:
        raise DataError(f"--output {output}: cannot write there ({error.strerror})") from None
    try:
        yield folder
    except OSError as error:  # what reading raises is a DataError already
        raise DataError(_writing_failed("--output", output, error)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tokenizer_output(options: PreprocessOptions) -> Path | None:
    """The folder of a tokenizer to be trained. Raises DataError where there is one, unless it is to be replaced, or
    something else: the tokenizer of a model must stay as its weights know it."""
    if options.train_vocab_size is None:
        return None
    saved = options.tokenizer_output or Path(f"{options.output}-tokenizer")
    where = f"--tokenizer-output {saved}"
    if not os.path.exists(saved):
        return saved
    if not options.overwrite:
        raise DataError(f"{where}: already there; use it with --tokenizer {saved}, or give --overwrite")
    if not saved.is_dir():
        raise DataError(f"{where}: a file, not a folder; choose another --tokenizer-output")
    try:
        names = sorted(os.listdir(saved))
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror}); choose another --tokenizer-output") from None
    hidden = _hidden_prefix(_staging_name(saved))  # a kill leaves it
    foreign = [name for name in names if name not in TRAINED_FILES and not name.startswith(hidden)]
    if foreign:
        raise DataError(
            f"{where}: holds {foreign[0]}, so it is not a tokenizer that was trained here, and --overwrite replaces "
            "nothing else; choose another --tokenizer-output, or remove that folder by hand"
        )
    return saved


@dataclass(frozen=True)
class _Staged:
    """A tokenizer to be trained: the hidden folder that it is written into, and the one that was asked for."""

    folder: Path
    target: Path


@contextmanager
def _tokenizer_folder(saved: Path | None) -> Iterator[_Staged | None]:
    """A hidden folder on the file system of a tokenizer to be trained, removed at the end: in the folder where there is
    one, which may be a disk of its own, else beside it."""
    if saved is None:
        yield None
        return
    place = _real(saved)
    try:
        folder = _hidden_folder(place if place.is_dir() else place.parent, _staging_name(saved))
    except OSError as error:
        raise DataError(
            f"--tokenizer-output {saved}: cannot write there ({error.strerror}); choose another place"
        ) from None
    try:
        yield _Staged(folder, saved)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_tokenizer(staged: _Staged) -> None:
    """Gives a trained tokenizer its name; where its folder is there, each file, so that nothing else in it is lost."""
    place = _real(staged.target)
    try:
        if place.is_dir():
            for name in TRAINED_FILES:
                os.replace(staged.folder / name, place / name)
        else:
            os.replace(staged.folder, place)
    except OSError as error:
        raise DataError(_writing_failed("--tokenizer-output", staged.target, error)) from None


def _real(saved: Path) -> Path:
    return Path(os.path.realpath(saved))  # a link stays, and what it points to may be on another disk


def _staging_name(saved: Path) -> str:
    return f"{_real(saved).name}.tokenizer"


def _writing_failed(option: str, path: Path, error: OSError) -> str:
    return f"{option} {path}: writing failed ({error.strerror or error}); make room or choose another place"


def _hidden_prefix(name: str) -> str:
    return f".{name}.partial-{socket.gethostname()}-"


def _hidden_folder(parent: Path, name: str) -> Path:
    """A fresh hidden folder of this process; those of killed processes are removed. Raises OSError."""
    parent.mkdir(parents=True, exist_ok=True)
    prefix = _hidden_prefix(name)
    for old in parent.glob(f"{escape(prefix)}*"):
        process = old.name.removeprefix(prefix)
        if process.isdigit() and not _alive(int(process)):  # else of a host whose name begins as this one's does
            shutil.rmtree(old, ignore_errors=True)
    folder = parent / f"{prefix}{os.getpid()}"
    folder.mkdir()
    return folder


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _obtain_tokenizer(
    options: PreprocessOptions,
    files: Sequence[Path],
    total: int,
    staged: _Staged | None,
    progress: Progress,
    result: PreprocessResult,
) -> TextTokenizer:
    """The tokenizer that is named, or one that is trained into `staged`."""
    if staged is None:
        assert options.tokenizer is not None
        return load_tokenizer(options.tokenizer, options.eod_token)
    assert options.train_vocab_size is not None
    texts = _sample(options, files, total, progress, result)
    try:
        return train_tokenizer(texts, options.train_vocab_size, staged.folder)
    except OSError as error:
        raise DataError(_writing_failed("--tokenizer-output", staged.target, error)) from None


def _sample(
    options: PreprocessOptions,
    files: Sequence[Path],
    total: int,
    progress: Progress,
    result: PreprocessResult,
) -> Iterator[str]:
    """Documents from the beginning of every file, as evenly over the files as whole documents allow, until
    `train_megabytes` are reached. Where files hold one document each, that is some of the files."""
    share = min(1.0, options.train_megabytes * 1e6 / max(1, total))
    seen = taken = 0
    for file in files:
        size = file.stat().st_size
        for record in read_documents(file, options.text_key, options.per_line):
            if taken >= share * (seen + size):
                break
            taken += record.read_bytes
            progress("tokenizer", min(total, int(taken / share)), total, result)
            try:
                yield record.text(options.text_key)
            except DataError:
                if not options.skip_damaged:
                    raise
        seen += size


@dataclass(frozen=True)
class _Chunk:
    """Tokens of some documents: their lengths, and what could not be read."""

    tokens: np.ndarray
    lengths: list[int]
    read_bytes: int
    empty: int
    damaged: list[str]


def _write(
    options: PreprocessOptions,
    files: Sequence[Path],
    total: int,
    folder: Path,
    tokenizer: TextTokenizer,
    progress: Progress,
    result: PreprocessResult,
) -> str:
    """Write data.bin and data.idx; returns the name of the token type."""
    writer = DatasetWriter(folder / "data", tokenizer.vocab_size)
    records = chain.from_iterable(read_documents(file, options.text_key, options.per_line) for file in files)
    source = tokenizer.path
    settings = (options.text_key, options.append_eod)
    read = 0
    try:
        for chunk in _encode_all(_chunks(records), tokenizer, source, settings, options.workers):
            if chunk.damaged and not options.skip_damaged:
                raise DataError(f"{chunk.damaged[0]}\nMend the file, or pass over such documents with --skip-damaged")
            writer.add(chunk.tokens, chunk.lengths)
            read += chunk.read_bytes
            result.documents += len(chunk.lengths)
            result.tokens += len(chunk.tokens)
            result.empty += chunk.empty
            result.damaged += chunk.damaged
            progress("tokens", read, total, result)
    finally:
        writer.close()
    writer.finish()
    return writer.dtype.name


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += len(record.raw or b"")
        if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_all(
    chunks: Iterator[list[Record]],
    tokenizer: TextTokenizer,
    source: str,
    settings: tuple[str, bool],
    workers: int,
) -> Iterator[_Chunk]:
    """Tokens of all chunks in order; at most four chunks a worker are in flight, so memory stays bounded."""
    if workers <= 1:
        for records in chunks:
            yield _encode(tokenizer, records, *settings)
        return
    context = get_context("spawn")  # a fork would copy the threads of tokenizers and torch in an unknown state
    pool = ProcessPoolExecutor(workers, context, _start_worker, (source, tokenizer.eod_token, *settings))
    waiting: deque[Future[_Chunk]] = deque()
    try:
        for records in chunks:
            waiting.append(pool.submit(_work, records))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process died (out of memory?); try fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_state: Any = None


def _start_worker(source: str, eod_token: str, text_key: str, append_eod: bool) -> None:
    global _worker_state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_state = (load_tokenizer(source, eod_token), text_key, append_eod)


def _work(records: list[Record]) -> _Chunk:
    tokenizer, text_key, append_eod = _worker_state
    return _encode(tokenizer, records, text_key, append_eod)


def _encode(tokenizer: TextTokenizer, records: list[Record], text_key: str, append_eod: bool) -> _Chunk:
    texts, damaged = [], []
    for record in records:
        try:
            texts.append(record.text(text_key))
        except DataError as error:
            damaged.append(str(error))
    ids = [tokens for tokens in tokenizer.encode_batch(texts) if tokens]
    empty = len(texts) - len(ids)
    if append_eod:
        for tokens in ids:
            tokens.append(tokenizer.eod)
    flat = np.fromiter(chain.from_iterable(ids), np.int32)
    read = sum(record.read_bytes for record in records)
    return _Chunk(flat, [len(tokens) for tokens in ids], read, empty, damaged)


def _describe(
    path: Path, options: PreprocessOptions, tokenizer: TextTokenizer, dtype: str, result: PreprocessResult
) -> None:
    description = {
        "documents": result.documents,
        "tokens": result.tokens,
        "empty_documents": result.empty,
        "damaged_documents": len(result.damaged),
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod if options.append_eod else None,
        "eod_token": tokenizer.eod_token,
        "tokenizer": result.tokenizer,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "inputs": list(options.inputs),
    }
    path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
