"""Saving and loading a whole run with Megatron's dist_checkpointing, at any TP, PP, VPP and DP.

Sharded over the ranks: the model, the optimizer, and for each neuron the steps since it last fired. Saved once:
position in the data, schedule, L1 controller, W&B id, configuration. Saved per rank, and used only where the layout is
the same again: random states, the path and neuron order of each layer's router, and the running sums of its statistics.
"""

from __future__ import annotations

import inspect
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint.api import CheckpointException

from megasparse.config import Config
from megasparse.host import host_name
from megasparse.ranks import StorageError, on_every_rank, on_first_rank
from megasparse.training.callbacks import TrainState
from megasparse.training.checkpoint_content import (
    changed_settings,
    check_same_model,
    get_rank_state,
    layout,
    neuron_shard,
    rank_object,
    set_rank_state,
    unwrapped,
)
from megasparse.training.checkpoint_files import (
    CheckpointError,
    DamagedError,
    checksum,
    examine,
    find_checkpoints,
    partial_directory,
    prune,
    publish,
    remove_leftovers,
    resolve,
    write_problem,
)
from megasparse.training.dead_neurons import share_idle_steps
from megasparse.training.optimizer import apply_adam_settings, gather_parameters
from megasparse.training.save_helper import start_save_helper
from megasparse.training.signals import signals_wait

log = logging.getLogger("megasparse")

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
"""Megatron's sharded state formats: those that load at any layout."""


class Checkpointer:
    """Saves checkpoints of one run and finds the one to resume from. All methods are collective.

    Args:
        cfg: the run.
        on_saved: called on every rank when a checkpoint is complete, with its path.
    """

    def __init__(self, cfg: Config, on_saved: Callable[[Path], None] = lambda path: None) -> None:
        self._cfg = cfg
        self._on_saved = on_saved
        self._root = cfg.checkpoint_directory
        self._queue = AsyncCallsQueue() if cfg.checkpoint.async_save else None
        self._damaged: set[Path] = set()
        """What `resume` could not load."""

    def prepare(self) -> None:
        """Makes the directory and removes what earlier runs left half-written.

        Raises:
            CheckpointError: the directory cannot be written.
            StorageError: the file system fails.
        """
        on_first_rank(self._prepare)

    def _prepare(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            probe = self._root / ".writable"
            probe.touch()
            probe.unlink()
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise CheckpointError(
                f"checkpoint.directory {self._root} cannot be written on {host_name()}: {error}"
            ) from error
        remove_leftovers(self._root)

    def save(self, state: TrainState, extra: dict[str, Any], keep_older: bool = False) -> None:
        """Saves the run after `state.step`; returns before it is on disk where `async_save` is set.

        Args:
            state: the run.
            extra: plain values to save beside it, the same on every rank.
            keep_older: removes none of those before it, however many there are.

        Raises:
            StorageError: it cannot be written, or the one before that was written in the background.
        """
        self.finish()
        gather_parameters(state.model)
        partial_path = on_first_rank(partial(partial_directory, self._root, state.step))
        sharded = self._content(state, loading=False)
        sharded["run"] = self._run_content(state, extra)
        strategy: Any = get_default_save_sharded_strategy("torch_dist")
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if group.size() > 1:
            strategy = FullyParallelSaveStrategyWrapper(strategy, group)
        arguments: dict[str, Any] = {}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
            arguments["async_strategy"] = "mcore"
        complete = partial(self._complete, partial_path, state.step, keep_older)
        with signals_wait(), self._storage_errors():
            on_every_rank(start_save_helper)
            request = dist_checkpointing.save(
                sharded, str(partial_path), strategy, async_sharded_save=self._queue is not None, **arguments
            )
            if self._queue is not None:
                assert request is not None
                request.add_finalize_fn(complete)
                self._queue.schedule_async_request(request)
        if self._queue is None:
            complete()

    def poll(self) -> None:
        """Completes a background save whose writers are done on all ranks. Call it once a step."""
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            with self._storage_errors():
                self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Waits for a background save and completes it."""
        if self._queue is not None:
            with self._storage_errors():
                self._queue.maybe_finalize_async_calls(blocking=True)

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Turns what the writers of Megatron and torch raise into a StorageError."""
        try:
            yield
        except StorageError:
            raise
        except CheckpointException as error:  # rank 0's has the causes of all ranks, the others' have none
            causes = [f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items()]
            raise self._storage_error("; ".join(causes) or "rank 0 says why") from error
        except OSError as error:
            raise self._storage_error(str(error)) from error
        except RuntimeError as error:  # torch.save does not say why it could not write, if it was that
            reason = write_problem(self._root)
            if reason is None:
                raise
            raise self._storage_error(reason) from error

    def _storage_error(self, reason: str) -> StorageError:
        try:
            free = f"{shutil.disk_usage(self._root).free / 2**30:.2f} GiB free"
        except OSError as error:
            free = str(error)
        return StorageError(
            f"a checkpoint cannot be written to {self._root} ({free}): {reason}\nThose before it are "
            "as they were; the same command goes on from the newest."
        )

    def close(self) -> None:
        self.finish()
        if self._queue is not None:
            self._queue.close()

    def _complete(self, partial_path: Path, step: int, keep_older: bool) -> None:
        def own() -> dict[str, int]:
            return {file.name: checksum(file) for file in partial_path.glob(f"__{dist.get_rank()}_*.distcp")}

        # Every rank reads back what it wrote itself, while it is still in the page cache of its node.
        try:
            gathered = on_every_rank(own)
        except StorageError as error:
            raise self._storage_error(str(error)) from error
        checksums = {name: value for part in gathered for name, value in part.items()}
        self._on_saved(on_first_rank(partial(self._publish, partial_path, step, checksums, keep_older)))

    def _publish(self, partial_path: Path, step: int, checksums: dict[str, int], keep_older: bool) -> Path:
        final = publish(partial_path, step, checksums)
        self._damaged.discard(final)
        if not keep_older:
            section = self._cfg.checkpoint
            for path in prune(self._root, step, section.keep_last, section.keep_every, self._damaged):
                log.info("checkpoint: removed %s", path)
        log.info("checkpoint: saved %s", final)
        return final

    def resume(self, state: TrainState) -> dict[str, Any] | None:
        """Loads the newest good checkpoint of the run into `state`; damaged ones are reported and passed over.

        Returns:
            the `extra` it was saved with, or None where there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, but none can be loaded, or they are of another model.
        """
        found = find_checkpoints(self._root)  # rank 0's, which looks at one after the other
        problems = []
        while (item := on_first_rank(lambda: next(found, None))) is not None:
            problem = None if item.problem is None else f"{item.path}: {item.problem}"
            if problem is None:
                try:
                    extra = self.load(item.path, state)
                except DamagedError as error:
                    problem = str(error)
                else:
                    state.resumed_from = item.path
                    return extra
            problems.append(problem)
            self._damaged.add(item.path)
            if dist.get_rank() == 0:
                log.warning("checkpoint: DAMAGED, trying the one before: %s", problem)
        if problems:
            raise CheckpointError(
                "no checkpoint can be loaded:\n  "
                + "\n  ".join(problems)
                + "\nRestore one of them, or start anew with another run.name or checkpoint.directory."
            )
        return None

    def locate(self, path: Path) -> Path:
        """`checkpoint_files.resolve`, by rank 0 for all.

        Raises:
            CheckpointError: there is no complete checkpoint there.
        """
        return on_first_rank(partial(resolve, path))

    def load(self, path: Path, state: TrainState) -> dict[str, Any]:
        """Loads everything from a checkpoint into `state`. Returns the `extra` it was saved with."""
        _check_content(path)
        common = on_first_rank(partial(dist_checkpointing.load_common_state_dict, str(path)))
        if "layout" not in common["run"]:
            raise CheckpointError(
                f"{path} holds weights alone (it was imported), and there is no optimizer or data position to go on "
                f"from: set checkpoint.load: {path} and checkpoint.load_scope: weights"
            )
        check_same_model(self._cfg, common["run"]["config"], path, optimizer=True)
        same_layout = common["run"]["layout"] == layout(self._cfg)
        loaded = self._load(path, self._content(state, loading=True, per_rank=same_layout))
        self._set_model(state.model, loaded)
        state.optimizer.load_state_dict(loaded["optimizer"])
        apply_adam_settings(self._cfg, state.optimizer)
        for mlp in state.mlps:
            mlp.recorder.steps_since_fired.copy_(loaded["neurons"][str(mlp.layer_index)])
        run = common["run"]
        _say_changed(path, changed_settings(self._cfg, run["config"]))
        state.step = run["step"]
        state.consumed_samples = run["consumed_samples"]
        state.consumed_tokens = run["consumed_tokens"]
        state.skipped_steps = run["skipped_steps"]
        state.wandb_run_id = run["wandb_run_id"]
        if self._cfg.sparsity.l1.mode == run["config"]["sparsity"]["l1"]["mode"]:
            state.l1.load_state_dict(run["l1"])
        if same_layout:
            set_rank_state(loaded["rank"], state)
        elif dist.get_rank() == 0:
            log.info(
                "checkpoint: %s was saved at another layout (%s); random states start anew from the seed and layers "
                "choose their path anew",
                path,
                ", ".join(f"{key} {value}" for key, value in run["layout"].items()),
            )
        return dict(run["extra"])

    def load_weights(self, path: Path, model: Sequence[torch.nn.Module], optimizer: Any) -> int:
        """Loads the model alone, and says where it is now another: rotary base, norm epsilon.

        `optimizer` (or None) takes its master weights from it. Returns the saved step.
        """
        _check_content(path)
        common = on_first_rank(partial(dist_checkpointing.load_common_state_dict, str(path)))
        check_same_model(self._cfg, common["run"]["config"], path, optimizer=False)
        _say_changed(path, changed_settings(self._cfg, common["run"]["config"], ("model",)))
        self._set_model(model, self._load(path, self._model_content(model)))
        if optimizer is not None:
            optimizer.reload_model_params()
        return int(common["run"]["step"])

    def _load(self, path: Path, sharded: dict[str, Any]) -> dict[str, Any]:
        strategy: Any = get_default_load_sharded_strategy(str(path))
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if group.size() > 1:
            strategy = FullyParallelLoadStrategyWrapper(strategy, group)
        return dict(dist_checkpointing.load(sharded, str(path), strategy))

    def _content(self, state: TrainState, loading: bool, per_rank: bool = True) -> dict[str, Any]:
        """Sharded part of a checkpoint: where each tensor of this rank lies in the whole."""
        sharded = self._model_content(state.model)
        sharded["optimizer"] = state.optimizer.sharded_state_dict(dict(sharded), is_loading=loading, metadata=_METADATA)
        if not loading:
            share_idle_steps(state.mlps)
        sharded["neurons"] = {str(mlp.layer_index): neuron_shard(mlp) for mlp in state.mlps}
        if per_rank:
            sharded["rank"] = rank_object(None if loading else get_rank_state(state))
        return sharded

    def _model_content(self, model: Sequence[torch.nn.Module]) -> dict[str, Any]:
        names = ["model"] if len(model) == 1 else [f"model{index}" for index in range(len(model))]
        return {
            name: unwrapped(chunk).sharded_state_dict(prefix="", metadata=dict(_METADATA))
            for name, chunk in zip(names, model, strict=True)
        }

    def _set_model(self, model: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
        for index, chunk in enumerate(model):
            unwrapped(chunk).load_state_dict(loaded["model" if len(model) == 1 else f"model{index}"])

    def _run_content(self, state: TrainState, extra: dict[str, Any]) -> dict[str, Any]:
        """What is saved once. All ranks must save the same, and only the writing one talks to W&B."""
        wandb_run_id = [state.wandb_run_id]
        dist.broadcast_object_list(wandb_run_id, src=0)
        return {
            "step": state.step,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "skipped_steps": state.skipped_steps,
            "wandb_run_id": wandb_run_id[0],
            "l1": state.l1.state_dict(),
            "layout": layout(self._cfg),
            "config": self._cfg.model_dump(mode="json"),
            "extra": extra,
        }


def _say_changed(path: Path, changes: Sequence[str]) -> None:
    for change in changes if dist.get_rank() == 0 else ():
        log.info("checkpoint: changed since %s: %s", path.name, change)


def _check_content(path: Path) -> None:
    """Compares all files with their sizes and checksums, each rank its share of them. Collective.

    Raises:
        DamagedError: on every rank.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    problem = examine(path, share=lambda index: index % size == rank, content=True)
    problems: list[str | None] = [None] * size
    dist.all_gather_object(problems, problem)
    for text in problems:
        if text is not None:
            raise DamagedError(f"{path}: {text}")


def config_of(path: Path) -> dict[str, Any]:
    """The configuration that a complete checkpoint was saved with, as a nested dict. Needs no process group."""
    return dict(dist_checkpointing.load_common_state_dict(str(path))["run"]["config"])
