"""The output folder under kills and other processes: complete or not there, and what was left behind is dealt with."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from megasparse.hf.errors import ConvertError
from megasparse.hf.from_hf import FromHf, convert_from_hf
from megasparse.hf.output import output_folder
from megasparse.hf.to_hf import ToHf, convert_to_hf
from tests.hf.cases import config_of, contents, write_plain
from tests.hf.test_commands import write_tokenizer
from tests.hf.test_from_hf import make_model

KILLED = """
import os, signal, sys
from pathlib import Path
from megasparse.hf.from_hf import FromHf, convert_from_hf
from megasparse.hf.to_hf import ToHf, convert_to_hf

def progress(done, total):
    if done > total * float(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

source, output = Path(sys.argv[2]), Path(sys.argv[3])
if sys.argv[1] == "from-hf":
    convert_from_hf(FromHf(source, output), progress)
else:
    convert_to_hf(ToHf(source, output, shard_bytes=20_000), progress)
"""


def run_until_killed(direction: str, source: Path, output: Path, share: float) -> None:
    """A conversion that is killed when this share of it is done."""
    command = [sys.executable, "-W", "ignore", "-c", KILLED, direction, str(source), str(output), str(share)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_import_starts_anew_and_says_so(tmp_path: Path) -> None:
    make_model("llama-tied", tmp_path / "in")
    convert_from_hf(FromHf(tmp_path / "in", tmp_path / "straight"))
    before = contents(tmp_path / "in")
    for share in (0.2, 0.8):
        run_until_killed("from-hf", tmp_path / "in", tmp_path / "out", share)
        assert not (tmp_path / "out").exists()
        assert list((tmp_path / ".out.partial").iterdir())
    result = convert_from_hf(FromHf(tmp_path / "in", tmp_path / "out"))
    assert result.notes[-1] == f"replaced {tmp_path}/.out.partial, which an interrupted conversion had left"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "straight"]
    assert contents(tmp_path / "in") == before
    again, straight = contents(tmp_path / "out"), contents(tmp_path / "straight")
    assert again.keys() == straight.keys()
    assert again["__0_0.distcp"][0] == straight["__0_0.distcp"][0]


def test_a_killed_export_goes_on_and_says_so(tmp_path: Path) -> None:
    checkpoint = write_plain(tmp_path / "checkpoint", config_of("llama-tied"))
    run_until_killed("to-hf", checkpoint, tmp_path / "out", 0.6)
    kept = {path.name: path.stat().st_ino for path in (tmp_path / ".out.partial").glob("model-*.safetensors")}
    assert kept
    result = convert_to_hf(ToHf(checkpoint, tmp_path / "out", shard_bytes=20_000))
    assert result.notes[-1] == f"went on with what an interrupted conversion had left in {tmp_path}/.out.partial"
    assert kept.items() <= {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()}.items()
    convert_to_hf(ToHf(checkpoint, tmp_path / "straight", shard_bytes=20_000))
    again, straight = contents(tmp_path / "out"), contents(tmp_path / "straight")
    assert {name: data for name, (data, _) in again.items()} == {name: data for name, (data, _) in straight.items()}


def test_two_conversions_do_not_share_an_output(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", 0, overwrite=False) as place:
        (place.path / "mine").write_text("first")
        second = output_folder(tmp_path / "out", 0, overwrite=False)
        with pytest.raises(ConvertError, match="another conversion is writing it now"), second:
            pass
    assert (tmp_path / "out/mine").read_text() == "first"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    for overwrite in (False, True, True):
        with output_folder(tmp_path / "out", 0, overwrite, foreign=lambda folder: None) as place:
            assert place.path.parent == tmp_path / "disk"
            (place.path / "mine").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert (sorted(os.listdir(tmp_path)), os.listdir(tmp_path / "disk")) == (["disk", "out"], ["out"])
    assert (tmp_path / "disk/out/mine").read_text() == "new"


def test_a_mounted_disk_is_refused_before_anything_is_written() -> None:
    place = output_folder(Path("/proc"), 0, overwrite=True)
    with pytest.raises(ConvertError, match="/proc: a disk is mounted there"), place:
        raise AssertionError("nothing may be written")


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("old")
    rename = Path.rename

    def killed(path: Path, target: Path) -> None:
        if path.name == ".out.partial":
            raise KeyboardInterrupt
        rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    place = output_folder(tmp_path / "out", 0, overwrite=True, foreign=lambda folder: None)
    with pytest.raises(KeyboardInterrupt), place:
        pass
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConvertError, match="exists already"), output_folder(tmp_path / "out", 0, overwrite=False):
        pass
    assert (tmp_path / "out/mine").read_text() == "old"
    with output_folder(tmp_path / "out", 0, overwrite=True, foreign=lambda folder: None) as output:
        (output.path / "mine").write_text("new")
    assert (tmp_path / "out/mine").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_into_the_target_meanwhile_stays(overwrite: bool, tmp_path: Path) -> None:
    def convert() -> None:
        with output_folder(tmp_path / "out", 0, overwrite):
            (tmp_path / "out").mkdir()
            (tmp_path / "out/mine").write_text("of another")

    with pytest.raises(ConvertError, match="holds mine" if overwrite else "exists already"):
        convert()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out/mine").read_text() == "of another"


def test_overwrite_replaces_earlier_results_of_the_same_direction_alone(tmp_path: Path) -> None:
    """Each folder that is refused differs from one that is replaced by a single entry."""
    checkpoint = write_plain(tmp_path / "run/checkpoints/step_00000000", config_of("llama-tied"))
    model = make_model("llama-tied", tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model/additional_chat_templates").mkdir()
    (tmp_path / "model/additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    out, back = ToHf(checkpoint, tmp_path / "out", tokenizer=str(tmp_path / "model")), tmp_path / "back"
    for shards in (10_000, 10**9):
        convert_to_hf(replace(out, overwrite=True, shard_bytes=shards))
        convert_from_hf(FromHf(tmp_path / "model", back, overwrite=True))
    assert not (tmp_path / "out/model.safetensors.index.json").exists()

    def refused(convert: Callable[[], object], folder: Path, entry: str) -> None:
        before = contents(folder)
        with pytest.raises(ConvertError) as caught:
            convert()
        assert f"{folder}: holds {entry}, which is not of an earlier result" in str(caught.value)
        assert "remove that folder by hand" in str(caught.value)
        assert contents(folder) == before

    def export(folder: Path) -> None:
        convert_to_hf(ToHf(checkpoint, folder, overwrite=True))

    def bring_in(folder: Path) -> None:
        convert_from_hf(FromHf(tmp_path / "model", folder, overwrite=True))

    for name in ("README.md", ".gitattributes", "metrics.jsonl", "config.yaml", "model.py", "pytorch_model.bin"):
        for convert, folder in ((export, tmp_path / "out"), (bring_in, back)):
            (folder / name).write_text("somebody's")
            refused(partial(convert, folder), folder, name)
            (folder / name).unlink()
    for name in (".git", "checkpoints", "wandb", "additional_chat_templates", "hf"):
        for convert, folder, entry in ((export, tmp_path / "out", name), (bring_in, back, f"{name}/mine")):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "mine").write_text("somebody's")
            refused(partial(convert, folder), folder, entry)
            (folder / name / "mine").unlink()
            if not any((folder / name).iterdir()):
                (folder / name).rmdir()
    model.save_pretrained(tmp_path / "theirs")
    refused(partial(export, tmp_path / "theirs"), tmp_path / "theirs", "config.json")
    refused(partial(export, back), back, ".metadata")
    refused(partial(bring_in, tmp_path / "out"), tmp_path / "out", "additional_chat_templates")
    shutil.copytree(checkpoint, tmp_path / "saved")
    refused(partial(bring_in, tmp_path / "saved"), tmp_path / "saved", ".metadata")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    export(tmp_path / "out")
    bring_in(back)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "model", "out", "run", "saved", "theirs"]


def test_a_foreign_folder_is_refused_before_the_checkpoint_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_plain(tmp_path / "checkpoint", config_of("llama-tied"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")

    def examine(*_: object, **__: object) -> None:
        raise AssertionError("terabytes would be read")

    monkeypatch.setattr("megasparse.hf.to_hf.examine", examine)
    with pytest.raises(ConvertError, match=r"out: holds thesis\.tex"):
        convert_to_hf(ToHf(checkpoint, tmp_path / "out", overwrite=True))


def test_an_unreadable_input_is_named(tmp_path: Path) -> None:
    place = output_folder(tmp_path / "out", 0, overwrite=False)
    with pytest.raises(ConvertError, match="theirs: Permission denied; nothing was written"), place:
        raise PermissionError(13, "Permission denied", str(tmp_path / "theirs"))
    assert os.listdir(tmp_path) == []
