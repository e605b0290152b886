"""What pyproject.toml cannot say: the kernels' sources travel with the package, compiled if asked for.

MEGASPARSE_BUILD_CUDA=1 pip install --no-build-isolation .     compile the CUDA kernels now, against the torch installed
pip install .                                                  leave it to their first use

Without isolation, because the library must be built against the torch that will load it.
"""

import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
AHEAD = os.environ.get("MEGASPARSE_BUILD_CUDA") == "1"


def kernel_builder() -> ModuleType:
    """megasparse/mlp/build.py alone: the package around it needs more than is there while building."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise SystemExit(
            "MEGASPARSE_BUILD_CUDA=1 compiles against the installed torch: install torch first, "
            "then run pip with --no-build-isolation"
        ) from None
    spec = importlib.util.spec_from_file_location("megasparse_build", ROOT / "megasparse" / "mlp" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        library = None
        if AHEAD:
            builder = kernel_builder()
            try:
                library = builder.build()
            except builder.BuildError as error:
                raise SystemExit(f"MEGASPARSE_BUILD_CUDA=1: {error}") from None
        if self.editable_mode:
            return  # the sources stay where they are, and the library is in the cache
        package = Path(self.build_lib) / "megasparse" / "mlp"
        shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
        if library is not None:
            shutil.copy2(library, package / library.name)


class MaybeBinary(Distribution):
    def has_ext_modules(self) -> bool:
        return AHEAD


setup(cmdclass={"build_py": BuildWithKernels}, distclass=MaybeBinary)
