"""Builds and loads the CUDA kernels of `csrc/`.

At first use the sources are compiled by ninja into a cache directory named after everything that decides the
result (sources, flags, torch, compilers); where there is no compiler, what another machine put there is used.
Processes of one node take turns by a lock that the system frees when its holder dies; processes of other nodes
on the same storage may build at the same time: each builds in a directory of its own and renames it into place,
so a cache entry is complete or absent.

A wheel built with MEGASPARSE_BUILD_CUDA=1 carries the compiled library; then nothing is compiled here.

    python -m megasparse.mlp.build            build (or find) the library, print its path
    python -m megasparse.mlp.build --check    compile every kernel, fail on register spills (needs no GPU)

Environment: MEGASPARSE_CACHE_DIR (default ~/.cache/megasparse), CUDA_HOME, CXX, MAX_JOBS.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

LIBRARY = "megasparse_kernels.so"
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--expt-relaxed-constexpr",
    "-lineinfo",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]
CXX_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall"]


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded; the message is one sentence that says why."""


def source_directory() -> Path:
    """`csrc/` of the checkout, or the copy of it that an installed package carries."""
    package = Path(__file__).resolve().parent
    for candidate in (package.parents[1] / "csrc", package / "csrc"):
        if (candidate / "binding.cpp").is_file():
            return candidate
    raise BuildError("the kernels' sources (csrc/) are missing: install megasparse from its repository")


def find_nvcc() -> Path:
    """The CUDA compiler; raises `BuildError` where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = Path(home) / "bin" / "nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(found).is_file():
        raise BuildError(
            "CUDA's compiler nvcc was not found, so the kernels cannot be built "
            "(install the CUDA toolkit 12.8 or newer, or set CUDA_HOME)"
        )
    return Path(found)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def _cuda_home() -> Path:
    """The toolkit's root, which a wrapper script in front of nvcc may hide."""
    listing = subprocess.run(
        [str(find_nvcc()), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
        capture_output=True, text=True, check=False,
    ).stderr  # fmt: skip
    top = re.search(r"^#\$ TOP=(.+)$", listing, re.MULTILINE)
    if top is None:
        raise BuildError(f"{find_nvcc()} does not name its toolkit: {listing.strip()[:200]!r}")
    return Path(top.group(1)).resolve()


def _cxx() -> str:
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise BuildError(f"the C++ compiler {name!r} was not found, so the kernels cannot be built (set CXX)")
    return name


def _sources() -> list[Path]:
    root = source_directory()
    return sorted(path for path in root.rglob("*") if path.suffix in (".cu", ".cpp", ".h", ".cuh"))


def _hash_of_sources() -> str:
    """Of sources, flags and torch."""
    digest = hashlib.sha256()
    root = source_directory()
    for path in _sources():
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update("\0".join([*NVCC_FLAGS, *CXX_FLAGS, torch.__version__]).encode())
    return digest.hexdigest()[:16]


@functools.cache
def cache_entry() -> Path:
    """Where the library is, or will be when it is built. Raises `BuildError` where it can be neither.

    Named after everything that decides the result. A machine without compilers takes what another has built for the
    same sources and torch.
    """
    sources = _hash_of_sources()
    try:
        compilers = _output(str(find_nvcc()), "--version") + _output(_cxx(), "--version")
    except BuildError:
        built = sorted(cache_directory().glob(f"{sources}-*/{LIBRARY}"), key=lambda path: path.stat().st_mtime)
        if not built:
            raise
        return built[-1]
    return cache_directory() / f"{sources}-{hashlib.sha256(compilers.encode()).hexdigest()[:8]}" / LIBRARY


def cache_directory() -> Path:
    root = os.environ.get("MEGASPARSE_CACHE_DIR") or Path.home() / ".cache" / "megasparse"
    return Path(root).expanduser().absolute() / "kernels"


def _escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_file(objects_only: bool) -> str:
    root, cuda = source_directory(), _cuda_home()
    torch_root = Path(torch.__file__).parent
    includes = f"-I{_escape(root / 'include')} -I{_escape(root)}"
    torch_includes = " ".join(
        f"-isystem {_escape(torch_root / 'include' / part)}" for part in ("", "torch/csrc/api/include")
    )
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    cuda_lib = next(cuda / name for name in ("lib64", "lib") if (cuda / name).is_dir())
    lines = [
        f"nvcc_flags = {' '.join(NVCC_FLAGS)} {includes}",
        f"cxx_flags = {' '.join(CXX_FLAGS)} {abi} {includes} {torch_includes} -isystem {_escape(cuda / 'include')}",
        f"ld_flags = -shared -L{_escape(torch_root / 'lib')} -lc10 -ltorch_cpu -ltorch "
        f"-L{_escape(cuda_lib)} -lcudart_static -lpthread -lrt -ldl",
        "rule nvcc",
        f"  command = {_escape(find_nvcc())} $nvcc_flags -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 "
        "|| (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "rule cxx",
        f"  command = {_cxx()} $cxx_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = {_cxx()} $in $ld_flags -o $out",
    ]
    objects = []
    for source in _sources():
        if source.suffix in (".cu", ".cpp"):
            name = str(source.relative_to(root).with_suffix(".o")).replace("/", "_")
            lines.append(f"build {name}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {_escape(source)}")
            objects.append(name)
    if not objects_only:
        lines.append(f"build {LIBRARY}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _run_ninja(directory: Path, objects_only: bool = False) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text(_ninja_file(objects_only))
    command = ["ninja", "-C", str(directory)]
    if shutil.which("ninja") is None:
        command[0] = str(Path(sys.executable).parent / "ninja")
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BuildError("ninja was not found, so the kernels cannot be built (pip install ninja)") from None
    if done.returncode:
        log = directory / "build.log"
        log.write_text(done.stdout + done.stderr)
        raise BuildError(f"compiling the kernels failed: {_first_error(done.stdout + done.stderr)}")


def _first_error(text: str) -> str:
    """The first line that names a place and an error; else any error; else the end of the output."""
    found = re.search(r"^\S+[(:]\d+.*error.*$", text, re.MULTILINE) or re.search(r"^.*error:.*$", text, re.MULTILINE)
    return found.group(0) if found else text.strip()[-400:]


@contextlib.contextmanager
def _node_lock(key: str) -> Iterator[None]:
    """Held by one process of this node and user at a time; the system frees it when the holder ends."""
    path = Path(tempfile.gettempdir()) / f"megasparse-{os.getuid()}-{key}.lock"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build() -> Path:
    """Path of the compiled library, compiling it if the cache has none. Raises `BuildError`."""
    shipped = Path(__file__).resolve().parent / LIBRARY
    if shipped.is_file():
        return shipped
    library = cache_entry()
    key = library.parent.name
    if library.is_file():
        return library
    with _node_lock(key):
        if library.is_file():
            return library
        print("megasparse: compiling the CUDA kernels (once; a minute or two) ...", file=sys.stderr)
        cache_directory().mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=cache_directory()))
        try:
            _run_ninja(scratch)
            with contextlib.suppress(OSError):  # another node was first: its directory is as good
                scratch.rename(library.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if not library.is_file():
        raise BuildError(f"the compiled kernels could not be put at {library}")
    return library


@functools.cache
def load() -> None:
    """Load the library into the process, which registers `torch.ops.megasparse_kernels`. Raises
    `BuildError`."""
    path = build()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(f"the compiled kernels at {path} cannot be loaded ({error})") from error


def check() -> list[str]:
    """Compile every source without linking; return a line per kernel that spills registers to memory."""
    with tempfile.TemporaryDirectory(prefix="megasparse-check-") as scratch:
        _run_ninja(Path(scratch), objects_only=True)
        return [problem for log in sorted(Path(scratch).glob("*.log")) for problem in _report(log.read_text())]


def _report(log: str) -> list[str]:
    """Print registers and shared memory of each kernel in ptxas' report; return those that spill."""
    spills = []
    demangler = shutil.which("c++filt")
    for match in re.finditer(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        log,
        re.DOTALL,
    ):
        name, stack, stores, loads, registers, rest = match.groups()
        if demangler is not None:
            name = _output(demangler, name).strip().replace("(anonymous namespace)::", "")
            name = re.sub(r"\([\w:]+\)(?=\d)", "", name).split("(")[0]  # casts of template arguments, then parameters
        print(f"{name}: {registers} registers, {stack} bytes of stack{rest}")
        if int(stores) or int(loads):
            spills.append(f"{name}: {stores} bytes of spill stores, {loads} bytes of spill loads")
    if "C7508" in log or "setmaxnreg' ignored" in log:
        spills.append("setmaxnreg is ignored by the compiler in one of these kernels (warning C7508)")
    return spills


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compile only, fail on register spills")
    arguments = parser.parse_args()
    try:
        if not arguments.check:
            print(build())
            return 0
        spills = check()
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in spills:
        print(f"error: {line}", file=sys.stderr)
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
