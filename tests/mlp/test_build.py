"""Compiling the kernels: cache, messages, and every kernel through nvcc without register spills."""

import subprocess
import sys
from pathlib import Path

import pytest

from megasparse.mlp import build


def nvcc_or_skip() -> None:
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGASPARSE_CACHE_DIR", str(tmp_path / "cache"))
    build.cache_entry.cache_clear()
    return tmp_path / "cache"


@pytest.mark.timeout(600)
def test_every_kernel_compiles_without_spills() -> None:
    nvcc_or_skip()
    done = subprocess.run(
        [sys.executable, "-m", "megasparse.mlp.build", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gate" in done.stdout
    assert "registers" in done.stdout


def test_missing_nvcc_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"nvcc was not found, so the kernels cannot be built \(install"):
        build.build()


def test_a_machine_without_compilers_takes_what_another_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    nvcc_or_skip()
    built = build.cache_entry()
    built.parent.mkdir(parents=True)
    built.write_bytes(b"")
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    build.cache_entry.cache_clear()
    assert build.build() == built
    monkeypatch.setattr(build, "CXX_FLAGS", [*build.CXX_FLAGS, "-g"])  # another result
    build.cache_entry.cache_clear()
    with pytest.raises(build.BuildError, match="nvcc was not found"):
        build.build()


def test_entry_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc_or_skip()
    before = build.cache_entry()
    (tmp_path / "csrc").mkdir()
    for path in build.source_directory().glob("*.cu"):
        (tmp_path / "csrc" / path.name).write_text(path.read_text() + "\n")
    monkeypatch.setattr(build, "source_directory", lambda: tmp_path / "csrc")
    build.cache_entry.cache_clear()
    assert build.cache_entry() != before


def test_failed_compilation_is_reported_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    nvcc_or_skip()
    source = tmp_path / "csrc"
    source.mkdir()
    (source / "broken.cu").write_text("int broken = missing;\n")
    monkeypatch.setattr(build, "source_directory", lambda: source)
    with pytest.raises(build.BuildError, match=r"compiling the kernels failed: .*broken\.cu"):
        build.build()
    assert list((cache / "kernels").iterdir()) == []


def test_two_processes_build_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    """Two processes at once, a source tree of one function: both get the same complete library."""
    nvcc_or_skip()
    source = tmp_path / "csrc"
    source.mkdir()
    (source / "one.cu").write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }\n')
    program = (
        "import sys, ctypes, pathlib\n"
        "from megasparse.mlp import build\n"
        "build.source_directory = lambda: pathlib.Path(sys.argv[1])\n"
        "path = build.build()\n"
        "print(path, ctypes.CDLL(str(path)).one())\n"
    )
    command = [sys.executable, "-c", program, str(source)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][0].strip().endswith(" 1")
    notices = sum("compiling the CUDA kernels" in error for _, error in outputs)
    assert notices == 1
    assert len(list((cache / "kernels").iterdir())) == 1
