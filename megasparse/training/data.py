"""Token data: Megatron's GPTDataset and blends, the order of samples, and the micro-batches of one step.

The order is a function of (seed, data, step) alone: sample `n` of the run is entry `n` of the blended dataset, and a
global batch takes the next `global_batch_size` entries whatever the layout. The position is therefore one number,
`consumed_samples`, and a run continues exactly at another DP, TP or PP.

Every rank reads its own micro-batches (the files are memory-mapped; ranks of a node share the page cache), the ranks
of one model replica the same ones: middle pipeline stages need the loss mask too, for the L1 term.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import resource
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state

from megasparse.config import Config
from megasparse.training.datasets import tokenizer_facts
from megasparse.training.signals import ignore_signals_in_worker

PROBES = 16
"""Samples of the past whose tokens are compared on resume, to find out that the data has changed."""


class MicroBatch(NamedTuple):
    """What one forward pass of this rank takes: [b, s] each, s the rank's share of the sequence under CP."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    """fp32, 1 where the token counts."""
    position_ids: torch.Tensor
    padding_mask: torch.Tensor | None
    """bool, True where the token counts in no loss; None: all count."""
    eod: int | None
    """The token that ends a document, over which attention does not reach; None: plain causal attention."""

    def attention_mask(self) -> torch.Tensor | None:
        """bool [b, 1, s, s], True where attention is forbidden; None: plain causal.

        Made when it is used: those of all micro-batches of a step are gigabytes, s^2 bytes a sequence.
        """
        return None if self.eod is None else document_mask(self.tokens, self.eod)


class MicroBatchSampler:
    """Indices of this rank's micro-batches, from `consumed_samples` on, for ever.

    A global batch is cut into rows of `micro_batch_size * data_parallel` samples, a row into one micro-batch a rank.

    Yields:
        lists of `micro_batch_size` indices; `num_microbatches` of them make a step.
    """

    def __init__(self, first: int, micro_batch_size: int, rank: int, size: int, last: int) -> None:
        self.first, self.micro_batch_size, self.rank, self.size, self.last = first, micro_batch_size, rank, size, last

    def __iter__(self) -> Iterator[list[int]]:
        row = self.micro_batch_size * self.size
        for start in range(self.first, self.last - row + 1, row):
            mine = start + self.rank * self.micro_batch_size
            yield list(range(mine, mine + self.micro_batch_size))


class StepLoader:
    """Gives the micro-batches of one step after the other, and knows how long it waited for them.

    Args:
        cfg: the run.
        dataset: a Megatron dataset.
        consumed_samples: where to start; samples of the whole job.
        last_sample: where the data ends.
        world_size: ranks of the job.
        device: where the tensors go.
    """

    def __init__(
        self,
        cfg: Config,
        dataset: Any,
        consumed_samples: int,
        last_sample: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self._cfg = cfg
        self._device = device
        self._per_step = cfg.num_microbatches(world_size)
        self.wait_seconds = 0.0
        """Time spent waiting for what the last `next_step` gave: then, or ahead of it, while the GPU worked on."""
        self._ahead: tuple[list[dict[str, torch.Tensor]], float] | None = None
        sampler = MicroBatchSampler(
            consumed_samples,
            cfg.training.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            last_sample,
        )
        workers = cfg.data.num_workers
        if workers:
            _allow_open_files()
        self._loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=ignore_signals_in_worker if workers else None,
            prefetch_factor=max(2, self._per_step // workers + 1) if workers else None,
            # Of its own: a loader that is made draws a seed, and must not move the random state of the training.
            generator=torch.Generator().manual_seed(cfg.training.seed),
        )
        self._batches = iter(self._loader)
        if workers:
            # An error keeps the loader alive to the end of the process, and there multiprocessing would wait for ever:
            # the workers ignore its SIGTERM.
            atexit.register(self.close)

    def next_step(self) -> list[MicroBatch]:
        """The micro-batches of the next step, on the device.

        Raises:
            StopIteration: there are no more samples.
        """
        raw, self.wait_seconds = self._ahead or self._read()
        self._ahead = None
        return [make_micro_batch(self._cfg, sample, self._device) for sample in raw]

    def look_ahead(self) -> None:
        """Reads the next step into the host's memory: call it while the GPU has other work."""
        with contextlib.suppress(StopIteration):  # there may be no next step
            self._ahead = self._ahead or self._read()

    def _read(self) -> tuple[list[dict[str, torch.Tensor]], float]:
        """Samples of a step by micro-batch, and the seconds that they took."""
        start = time.perf_counter()
        raw = [next(self._batches) for _ in range(self._per_step)]
        return raw, time.perf_counter() - start

    def close(self) -> None:
        """Ends the workers."""
        atexit.unregister(self.close)
        shutdown = getattr(self._batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


def _allow_open_files() -> None:
    """Raises the limit of open files, which the workers inherit, to what the system allows.

    Every tensor on its way from a worker holds one open, so a step of 256 micro-batches needs more than the usual 1024.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def make_micro_batch(cfg: Config, sample: dict[str, torch.Tensor], device: torch.device) -> MicroBatch:
    """One collated batch of GPTDataset samples -> this rank's micro-batch on the device."""
    fields = {
        name: sample[name].to(device, non_blocking=True) for name in ("tokens", "labels", "loss_mask", "position_ids")
    }
    fields = _share_of_sequence(fields)
    padding_mask = fields["loss_mask"] == 0 if cfg.data.eod_mask_loss else None
    eod = tokenizer_facts(cfg).eod if cfg.data.reset_attention_mask else None
    return MicroBatch(**fields, padding_mask=padding_mask, eod=eod)


def _share_of_sequence(fields: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This context-parallel rank's tokens: of 2 * cp chunks the i-th and the i-th from the end, so that causal
    attention is the same work for all ranks (the order that Megatron's attention expects)."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1:
        return fields
    share = {}
    for name, value in fields.items():
        chunks = value.chunk(2 * size, dim=1)
        share[name] = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)
    return share


def document_mask(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """Causal mask inside documents: [b, s] tokens -> bool [b, 1, s, s], True where attention is forbidden.

    The end-of-document token belongs to the document that it ends.
    """
    ends = (tokens == eod).long()
    document = ends.cumsum(dim=1) - ends
    later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)
    return ((document[:, :, None] != document[:, None, :]) | later)[:, None]


def data_probes(dataset: Any, consumed_samples: int) -> list[tuple[int, str]]:
    """(position, hash of the tokens) of some samples that the run has already seen.

    Saved with every checkpoint. Other data, another blend, seed or sequence length changes them.
    """
    if consumed_samples <= 0:
        return []
    count = min(PROBES, consumed_samples)
    positions = sorted({(consumed_samples - 1) * i // max(1, count - 1) for i in range(count)})
    return [(position, _hash(dataset, position)) for position in positions]


def check_probes(dataset: Any, probes: list[tuple[int, str]]) -> None:
    """Compares what a checkpoint knows of its data with the data of this run.

    Raises:
        DataChangedError: they differ; going on would repeat some samples and skip others.
    """
    for position, expected in probes:
        if position >= len(dataset) or _hash(dataset, position) != expected:
            raise DataChangedError(
                f"sample {position}, which the run has already seen, is not what it was: the data or its order has "
                "changed since the checkpoint (data files, blend weights, split, sequence_length, training.seed, or "
                "training.steps and global_batch_size where the data is used more than once). Going on would repeat "
                "some samples and never use others. Restore the configuration, start a new run from the weights with "
                "checkpoint.load, or accept that with data.allow_change=true."
            )


class DataChangedError(RuntimeError):
    """The data of a resumed run is not the data of its checkpoint."""


def _hash(dataset: Any, position: int) -> str:
    return hashlib.sha256(dataset[position]["tokens"].numpy().tobytes()).hexdigest()[:16]
