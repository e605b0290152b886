"""tools/gpu_jobs.py: no two jobs on one GPU, side by side where they fit, finished ones not again."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_jobs import Job, run_jobs, slug

RECORD = """
import json, os, pathlib, sys, time
begin = time.time(); time.sleep(0.6)
pathlib.Path(sys.argv[1]).write_text(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"].split(","), begin, time.time()]))
sys.exit(int(sys.argv[2]))
"""


def job(folder: Path, name: str, gpus: int, code: int = 0) -> Job:
    target = folder / f"{name}.json"
    return Job(name, gpus, [sys.executable, "-c", RECORD, str(target), str(code)], folder / name)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("1e-5", "1e-5"), ("no L1", "no-l1"), ("target 24", "target-24"), ("1.5e-5", "1.5e-5"),
        ("TP 2 x PP 2 + SP", "tp-2-x-pp-2-sp"), ("1 GPU, without TE", "1-gpu-without-te"), ("../up.", "up"),
    ],
)  # fmt: skip
def test_folders_of_variants_and_layouts(name: str, folder: str) -> None:
    """Those of studies that are under way must stay what they are."""
    assert slug(name) == folder


def test_disjoint_gpus_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    jobs = [job(tmp_path, "a", 2), job(tmp_path, "b", 4), job(tmp_path, "c", 2), job(tmp_path, "d", 1)]
    ended: list[str] = []
    assert run_jobs(jobs, 4, lambda each: ended.append(each.name)) == []
    assert sorted(ended) == ["a", "b", "c", "d"]
    times = {each.name: json.loads((tmp_path / f"{each.name}.json").read_text()) for each in jobs}
    for each in jobs:
        assert len(times[each.name][0]) == each.gpus
    for one in jobs:
        for other in jobs:
            (left, begin, end), (right, start, stop) = times[one.name], times[other.name]
            if one is not other and begin < stop and start < end:
                assert not set(left) & set(right)
    assert times["a"][1] < times["c"][2]  # a and c did overlap
    assert times["c"][1] < times["a"][2]


def test_failures_are_returned_and_finished_jobs_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(tmp_path, "good", 1), job(tmp_path, "bad", 1, code=3)]
    assert run_jobs(jobs, 2) == [jobs[1]]
    assert "bad: exit code 3" in capsys.readouterr().out
    first = (tmp_path / "good.json").read_text()
    assert run_jobs(jobs, 2) == [jobs[1]]
    assert (tmp_path / "good.json").read_text() == first


def test_too_many_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match=r"a needs 8 GPUs, there are 4$"):
        run_jobs([job(tmp_path, "a", 8)], 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    with pytest.raises(ValueError, match=r"a needs 2 GPUs, there are 1 \(CUDA_VISIBLE_DEVICES=2\)"):
        run_jobs([job(tmp_path, "a", 2)], 4)


def test_a_job_that_follows_another(tmp_path: Path) -> None:
    first, bad, free = job(tmp_path, "first", 1), job(tmp_path, "bad", 1, code=1), job(tmp_path, "free", 1)
    second = replace(job(tmp_path, "second", 1), after=first)
    never = replace(job(tmp_path, "never", 1), after=bad)
    assert run_jobs([first, second, bad, never, free], 3) == [bad, never]
    times = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second", "free")}
    assert times["first"][2] <= times["second"][1]
    assert times["free"][1] < times["first"][2]
    assert not (tmp_path / "never.json").exists()


def test_running_jobs_end_in_good_order_with_the_call(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, sys, time\n"
        "def end(*_): time.sleep(0.5); pathlib.Path(sys.argv[1], 'saved').touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end); pathlib.Path(sys.argv[1], 'ready').touch(); time.sleep(60)\n"
    )
    long = Job("long", 1, [sys.executable, "-c", code, str(tmp_path)], tmp_path / "long")
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path)!r}, 'ready').exists(): time.sleep(0.05)"
    short = Job("short", 1, [sys.executable, "-c", wait], tmp_path / "short")

    def interrupt(_: Job) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([long, short], 2, interrupt)
    assert (tmp_path / "saved").exists()
    assert not long.done
