"""Checkpoint directories: publishing, finding, checking, thinning out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megasparse.training import checkpoint_files
from megasparse.training.checkpoint_files import (
    CheckpointError,
    DamagedError,
    examine,
    find_checkpoints,
    leftover_bytes,
    list_checkpoints,
    partial_directory,
    prune,
    publish,
    read_latest,
    remove_leftovers,
    resolve,
)


def write(root: Path, step: int, text: str = "weights") -> Path:
    partial = partial_directory(root, step)
    (partial / "shard.distcp").write_text(text)
    (partial / "sub").mkdir()
    (partial / "sub" / "more").write_text("x")
    return publish(partial, step)


def test_publish_then_find(tmp_path: Path) -> None:
    first, second = write(tmp_path, 10), write(tmp_path, 20)
    assert read_latest(tmp_path) == "step_00000020"
    assert [(found.path, found.step, found.problem) for found in find_checkpoints(tmp_path)] == [
        (second, 20, None),
        (first, 10, None),
    ]
    assert not list(tmp_path.glob(".*partial*"))
    again = write(tmp_path, 20, "other weights")  # replaces what is there under the same name
    assert (again / "shard.distcp").read_text() == "other weights"
    assert len(list_checkpoints(tmp_path)) == 2


def test_leftovers_are_counted_as_room_and_removed(tmp_path: Path) -> None:
    assert leftover_bytes(tmp_path / "absent") == 0
    write(tmp_path, 10)
    assert leftover_bytes(tmp_path) == 0
    (partial_directory(tmp_path, 20) / "shard.distcp").write_bytes(bytes(1 << 20))
    assert leftover_bytes(tmp_path) == pytest.approx(1 << 20, rel=0.05)
    remove_leftovers(tmp_path)
    assert leftover_bytes(tmp_path) == 0
    assert len(list_checkpoints(tmp_path)) == 1


def test_examine_names_what_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    shard = path / "shard.distcp"
    assert examine(path, content=True) is None
    shard.write_text("WEIGHTS")
    assert examine(path) is None
    assert "content of shard.distcp has changed" in str(examine(path, content=True))
    assert examine(path, share=lambda index: index != 0, content=True) is None
    shard.write_text("weight")
    assert examine(path) == "shard.distcp has 6 bytes instead of 7"
    shard.unlink()
    assert examine(path) == "shard.distcp is missing"
    more = path / "sub" / "more"
    more.unlink()
    more.symlink_to("/proc/self/mem")  # reading it fails, as on a disk with a bad sector
    (path / "manifest.json").write_text('{"files": {"sub/more": {"bytes": 0, "crc32": 0}}}')
    assert examine(path, content=True) == "sub/more cannot be read (Input/output error)"
    (path / "manifest.json").write_text("{")
    assert "manifest.json cannot be read" in str(examine(path))
    (path / "manifest.json").unlink()
    assert examine(path) == "it has no manifest.json"


def test_what_another_node_wrote_must_be_there(tmp_path: Path) -> None:
    """On storage of each node's own, the first node has a part of the checkpoint only, and must not call it one."""
    partial = partial_directory(tmp_path, 10)
    (partial / "__0_0.distcp").write_text("weights")
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 files .* __1_0\.distcp .* storage that all nodes share"):
        publish(partial, 10, {"__0_0.distcp": 1, "__1_0.distcp": 2})
    assert list_checkpoints(tmp_path) == []


def test_checkpoints_that_stay_for_ever_are_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks wait for it, and at hundreds of ranks each has hundreds of files."""
    for step in range(10, 210, 10):
        write(tmp_path, step)
    looked: list[str] = []

    def spy(path: Path, *arguments: Any, **options: Any) -> str | None:
        looked.append(path.name)
        return examine(path, *arguments, **options)

    monkeypatch.setattr(checkpoint_files, "examine", spy)
    assert prune(tmp_path, 200, keep_last=2, keep_every=10) == []
    assert resolve(tmp_path).name == "step_00000200"
    assert looked == ["step_00000200", "step_00000190", "step_00000200"]


def test_prune_counts_complete_checkpoints_only(tmp_path: Path) -> None:
    for step in range(10, 70, 10):
        write(tmp_path, step)
    for step in (50, 60):  # damaged: what is good must stay, however old
        (tmp_path / f"step_{step:08d}" / "shard.distcp").unlink()
    removed = prune(tmp_path, 60, keep_last=2, keep_every=20)
    assert [path.name for path in removed] == ["step_00000010"]
    assert [found.step for found in find_checkpoints(tmp_path)] == [60, 50, 40, 30, 20]
    prune(tmp_path, 60, keep_last=1, keep_every=None)
    assert [found.step for found in find_checkpoints(tmp_path) if found.problem is None] == [40]


def test_what_cannot_be_removed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody may have made a checkpoint immutable, to keep it."""
    paths = [write(tmp_path, step) for step in (10, 20, 30)]
    remove = checkpoint_files._remove

    def refuse(path: Path) -> None:
        if path == paths[1]:
            raise PermissionError(1, "Operation not permitted", str(path))
        remove(path)

    monkeypatch.setattr(checkpoint_files, "_remove", refuse)
    assert prune(tmp_path, 30, keep_last=1, keep_every=None) == [paths[0]]
    assert f"{paths[1]} cannot be removed (Operation not permitted)" in caplog.text


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = write(tmp_path, 10)
    (partial_directory(tmp_path, 20) / "half").write_text("")
    (tmp_path / ".trash-step_00000005-1234").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "notes.txt", kept.name]


def test_resolve_takes_run_folder_checkpoints_folder_or_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    write(root, 10)
    newest = write(root, 20)
    (newest / "shard.distcp").unlink()
    good = root / "step_00000010"
    assert resolve(tmp_path / "run") == resolve(root) == resolve(good) == good
    with pytest.raises(DamagedError, match=r"shard\.distcp is missing"):
        resolve(newest)
    with pytest.raises(CheckpointError, match="no complete checkpoint there"):
        resolve(tmp_path)
