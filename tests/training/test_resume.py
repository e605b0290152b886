"""A run that was killed, also while it saved, goes on exactly; damaged checkpoints are passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse.config import parse_config
from megasparse.hf.source import open_checkpoint
from megasparse.training.checkpoint_files import examine, find_checkpoints, read_latest
from tests.training.cases import configuration
from tests.training.forked import Helper

SPARSITY: dict[str, Any] = {
    "l1": {"mode": "target", "target_l0": 8, "coeff": 1e-3, "gain": 0.3, "start_step": 2},
    "reinit": {"every": 5, "until_fraction": 1.0},
    "dead_window_steps": 3,
    "route_interval": 3,
    "path": "sparse",
}
STEPS = 12
SIGKILL = -9


def case(folder: Path, data: Path, name: str, parallel: dict[str, Any] | None = None, **checkpoint: Any) -> dict:
    """A run with everything on whose state could be forgotten: dropout, L1 target, dead neurons, sparse path."""
    result = configuration(
        folder / name,
        str(data / "a"),
        sparsity=SPARSITY,
        parallel=parallel or {},
        training={"steps": STEPS, "eval_steps": 1, "eval_interval": 6},
        checkpoint={"interval": 4, "keep_last": 3, **checkpoint},
        data={"blend": [[0.7, str(data / "a")], [0.3, str(data / "b")]], "num_workers": 1},
    )
    result["model"] |= {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    return result


def without_times(steps: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {s: {k: v for k, v in m.items() if not k.startswith("perf/")} for s, m in steps.items()}


def assert_continues(expected: dict[str, Any], actual: dict[str, Any], first: int) -> None:
    """Bitwise: every number of every step from `first` on, the last validation, and the parameters at the end."""
    wanted = {step: values for step, values in without_times(expected["steps"]).items() if int(step) >= first}
    assert without_times(actual["steps"]) == wanted
    assert actual["evaluations"][str(STEPS)] == expected["evaluations"][str(STEPS)]
    assert actual["digest"] == expected["digest"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, data_folder: Path, helper: Helper) -> dict[str, Any]:
    result = helper.run(case(tmp_path_factory.mktemp("straight"), data_folder, "straight"))
    assert result["exit"] == [0], result["output"]
    record = result["records"][0]
    assert record["saved"] == ["step_00000004", "step_00000008", "step_00000012"]
    assert sum(values.get("dead_neurons/layer_0/reinitialised", 0) for values in record["steps"].values()) >= 2
    return dict(record)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_killed_twice_then_goes_on_bitwise(
    tmp_path: Path, data_folder: Path, helper: Helper, uninterrupted: dict, asynchronous: bool
) -> None:
    run = case(tmp_path, data_folder, "killed", async_save=asynchronous)
    root = tmp_path / "killed" / "checkpoints"
    assert helper.run(run, kill_after=6)["exit"] == [SIGKILL]
    # A background save may not have been finished in the two steps since it began.
    assert read_latest(root) in (("step_00000004", None) if asynchronous else ("step_00000004",))
    # Now in the middle of a save; the one before it was finished when this one began.
    result = helper.run(run, kill_in_save_of=8, kill_delay=0.01)
    assert result["exit"] == [SIGKILL]
    assert "resumed from" in result["output"] or asynchronous
    newest = next(find_checkpoints(root))
    assert newest.problem is None
    result = helper.run(run)
    assert result["exit"] == [0], result["output"]
    record = result["records"][0]
    assert record["resumed_from"] == str(newest.path)
    assert_continues(uninterrupted, record, newest.step + 1)
    assert read_latest(root) == "step_00000012"
    assert not list(root.glob(".step_*")), "half-written checkpoints of killed runs are removed"


def test_killed_at_many_moments_of_a_save(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    """Whatever the moment, the newest checkpoint by name is complete and loads."""
    run = case(tmp_path, data_folder, "moments")
    root = tmp_path / "moments" / "checkpoints"
    assert helper.run(run, kill_after=5)["exit"] == [SIGKILL]
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
        helper.run(run, kill_in_save_of=8, kill_delay=delay)
        found = list(find_checkpoints(root))
        assert [item.problem for item in found] == [None] * len(found)
        assert read_latest(root) in {item.path.name for item in found}
        if found[0].step >= 8:
            break
    result = helper.run(run)
    assert result["exit"] == [0], result["output"]


def test_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, data_folder: Path, helper: Helper, uninterrupted: dict
) -> None:
    run = case(tmp_path, data_folder, "damaged")
    root = tmp_path / "damaged" / "checkpoints"
    assert helper.run(run, kill_after=10)["exit"] == [SIGKILL]
    newest = root / "step_00000008"
    shard = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    whole = shard.read_bytes()

    shard.write_bytes(whole[: len(whole) // 2])  # truncated: seen before anything is loaded
    assert examine(newest) is not None
    result = helper.run(run, kill_after=6)
    assert f"{newest}: {shard.name} has {len(whole) // 2} bytes instead of {len(whole)}" in result["output"]
    assert "resumed from " + str(root / "step_00000004") in result["output"]

    middle = len(whole) // 2
    shard.write_bytes(whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 64]) + whole[middle + 64 :])
    assert examine(newest) is None  # same size
    result = helper.run(run)
    assert result["exit"] == [0], result["output"]
    assert f"{newest}: the content of {shard.name} has changed" in result["output"]
    assert_continues(uninterrupted, result["records"][0], 5)
    assert examine(newest) is None, "the damaged one was replaced by a good one"


def killed_with_the_newest_damaged(helper: Helper, run: dict) -> Path:
    """Runs into a kill after step 9; then the checkpoint of step 8 has other content, of the same size. The folder of
    the checkpoints."""
    root = parse_config(run).checkpoint_directory
    assert helper.run(run, kill_after=9)["exit"] == [SIGKILL]
    shard = next((root / "step_00000008").glob("*.distcp"))
    shard.write_bytes(bytes(byte ^ 255 for byte in shard.read_bytes()))
    return root


def test_a_checkpoint_older_than_a_damaged_one_is_kept(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    """What cannot be loaded must not take the place of what was just saved."""
    run = configuration(tmp_path / "run", str(data_folder / "a"), checkpoint={"interval": 4, "keep_last": 1})
    run["checkpoint"]["keep_every"] = 4
    root = killed_with_the_newest_damaged(helper, run)
    assert helper.run(run, stop_file_at=5)["exit"] == [75]
    assert read_latest(root) == "step_00000006"
    result = helper.run(run, kill_after=7)
    assert "resumed from " + str(root / "step_00000006") in result["output"]


def test_a_damaged_checkpoint_is_none_of_those_that_are_kept(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    """Though the sizes of its files are right: `keep_last` good ones must be there for the next start."""
    run = configuration(tmp_path / "run", str(data_folder / "a"), checkpoint={"interval": 4, "keep_last": 2})
    run["training"]["steps"] = 10
    root = killed_with_the_newest_damaged(helper, run)
    run["checkpoint"]["interval"] = 5
    assert helper.run(run)["exit"] == [0]
    assert [found.step for found in find_checkpoints(root)] == [10, 8, 5]


@pytest.mark.parametrize(
    ("asynchronous", "size"), [(False, 1 << 14), (True, 1 << 14), (False, 1 << 12)], ids=["sync", "async", "first file"]
)
def test_full_disk_ends_the_run_with_its_reason(
    tmp_path: Path, data_folder: Path, helper: Helper, asynchronous: bool, size: int
) -> None:
    """The checkpoint before stays as it was. The first file is written by torch, which does not say why it fails."""
    root = tmp_path / "full" / "checkpoints"
    assert helper.run(case(tmp_path, data_folder, "full"), kill_after=7)["exit"] == [SIGKILL]
    run = case(tmp_path, data_folder, "full", async_save=asynchronous)
    result = helper.run(run, no_files_beyond={"step": 6, "bytes": size})
    assert result["exit"] == [1]
    assert f"StorageError: a checkpoint cannot be written to {root} (" in result["output"]
    assert "File too large" in result["output"]
    assert not (tmp_path / "full" / "exit.json").exists(), "the batch script requeues where there is none"
    assert [(found.step, found.problem) for found in find_checkpoints(root)] == [(4, None)]


def test_nothing_left_to_load_is_an_error_that_names_all(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    run = case(tmp_path, data_folder, "lost")
    assert helper.run(run, kill_after=5)["exit"] == [SIGKILL]
    (tmp_path / "lost" / "checkpoints" / "step_00000004" / ".metadata").unlink()
    result = helper.run(run)
    assert result["exit"] == [1]
    assert "no checkpoint can be loaded" in result["output"]
    assert "step_00000004: .metadata is missing" in result["output"]


def test_two_ranks_killed_go_on_bitwise(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    parallel = {"distributed_optimizer": True}
    straight = helper.run(case(tmp_path, data_folder, "dp2-straight", parallel), world=2)
    assert straight["exit"] == [0, 0], straight["output"]
    run = case(tmp_path, data_folder, "dp2-killed", parallel, async_save=True)
    assert helper.run(run, world=2, kill_after=9)["exit"] == [SIGKILL, SIGKILL]
    result = helper.run(run, world=2)
    assert result["exit"] == [0, 0], result["output"]
    for rank in range(2):
        newest = int(result["records"][rank]["resumed_from"][-8:])
        assert newest in (4, 8)  # that of step 8 may or may not have been finished in the background
        assert_continues(straight["records"][rank], result["records"][rank], newest + 1)


def test_weights_are_saved_whole_whose_all_gather_overlaps_the_next_step(
    tmp_path: Path, data_folder: Path, helper: Helper
) -> None:
    """After an update a rank of the distributed optimizer holds the new weights of its own share alone."""
    saved = []
    for overlap in (False, True):
        parallel = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": overlap}
        run = configuration(
            tmp_path / f"overlap-{overlap}", str(data_folder / "a"), parallel=parallel, checkpoint={"interval": 5},
            training={"steps": 6, "precision": "bf16"},
        )  # fmt: skip
        result = helper.run(run, world=2)
        assert result["exit"] == [0, 0], result["output"]
        source = open_checkpoint(tmp_path / f"overlap-{overlap}" / "checkpoints" / "step_00000005")
        saved.append({weight.where: source.reader.read(weight) for weight in source.weights})
    for name, weight in saved[0].items():
        assert torch.equal(saved[1][name], weight), name


RESHARDED: dict[str, tuple[int, dict[str, Any], int, dict[str, Any]]] = {
    "tp2-to-one": (2, {"tensor": 2, "sequence_parallel": True}, 1, {}),
    "one-to-pp2-interleaved": (1, {}, 2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2-distributed-to-tp2-distributed": (2, {"distributed_optimizer": True}, 2,
                                           {"distributed_optimizer": True, "tensor": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, data_folder: Path, helper: Helper) -> dict[str, Any]:
    """An uninterrupted run without dropout, whose random numbers depend on the layout."""
    run = reshardable(case(tmp_path_factory.mktemp("reshard"), data_folder, "straight"))
    return dict(helper.run(run)["records"][0])


def reshardable(run: dict[str, Any]) -> dict[str, Any]:
    run["model"] |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return run


@pytest.mark.parametrize("name", RESHARDED)
def test_goes_on_at_another_layout(
    tmp_path: Path, data_folder: Path, helper: Helper, straight: dict[str, Any], name: str
) -> None:
    """Everything that matters moves along: optimizer, data position, L1 controller, dead-neuron counters."""
    world, before, new_world, after = RESHARDED[name]
    killed = helper.run(reshardable(case(tmp_path, data_folder, "run", before)), world, kill_after=6)
    assert killed["exit"] == [SIGKILL] * world
    result = helper.run(reshardable(case(tmp_path, data_folder, "run", after)), new_world)
    assert result["exit"] == [0] * new_world, result["output"]
    record = result["records"][0]
    assert record["resumed_from"].endswith("step_00000004")
    for step in range(5, STEPS + 1):
        wanted = without_times(straight["steps"])[str(step)]
        assert without_times(record["steps"])[str(step)] == pytest.approx(wanted, rel=1e-5), f"step {step}"


def test_changed_settings_are_named_and_in_force(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    """Those too that an optimizer's saved state brings along, or that were a section or none."""
    run = configuration(tmp_path / "run", str(data_folder / "a"), training={"steps": 6}, checkpoint={"interval": 3})
    run["optimizer"]["weight_decay"] = 0.0
    stopped = helper.run(run, stop_file_at=2)
    assert stopped["exit"] == [75], stopped["output"]
    scaling = {"factor": 2.0, "original_max_position_embeddings": 16}
    changed = {**run, "model": {**run["model"], "rope_scaling": scaling}}
    changed["optimizer"] = {**run["optimizer"], "eps": 1e12, "betas": [0.8, 0.9]}
    result = helper.run(changed)
    assert result["exit"] == [0], result["output"]
    assert "optimizer.betas: [0.9, 0.95] -> [0.8, 0.9]" in result["output"]
    assert "model.rope_scaling: None -> {" in result["output"]
    assert result["records"][0]["digest"] == stopped["records"][0]["digest"], "so large an epsilon leaves no update"


def test_another_model_or_other_data_are_refused(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    run = case(tmp_path, data_folder, "run")
    assert helper.run(run, kill_after=5)["exit"] == [SIGKILL]
    other = {**run, "model": {**run["model"], "ffn_hidden_size": 48}}
    result = helper.run(other)
    assert result["exit"] == [1]
    assert "model.ffn_hidden_size: 32 there, 48 here" in result["output"]
    result = helper.run({**run, "optimizer": {**run["optimizer"], "weight_decay_exclude": ["bias"]}})
    assert "optimizer.weight_decay_exclude: ['norm', 'bias'] there, ['bias'] here" in result["output"]
    blend = {**run, "data": {**run["data"], "blend": [[0.2, str(data_folder / "a")], [0.8, str(data_folder / "b")]]}}
    result = helper.run(blend)
    assert result["exit"] == [1]
    assert "is not what it was: the data or its order has changed" in result["output"]
    accepted = helper.run({**blend, "data": {**blend["data"], "allow_change": True}})
    assert accepted["exit"] == [0], accepted["output"]
    assert "data.allow_change: going on although sample 0" in accepted["output"]
    [record] = accepted["records"]
    last = record["steps"][str(max(map(int, record["steps"])))]
    assert last["progress/tokens/a"] + last["progress/tokens/b"] == last["progress/tokens"]
