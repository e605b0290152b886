"""The shell scripts themselves: what shellcheck says of them, what they have in common, the containers' flags."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.slurm.runs import ROOT

LAUNCHERS = sorted((ROOT / "slurm").glob("*.sbatch"))


def test_shellcheck_finds_nothing() -> None:
    scripts = [*LAUNCHERS, *ROOT.glob("slurm/*.sh"), *ROOT.glob("tools/*.sh"), ROOT / ".ci" / "run"]
    scripts += [ROOT / "tests" / "slurm" / name for name in ("paced_python", "apptainer")]
    found = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_launcher_finds_the_checkout_in_the_same_way() -> None:
    """SLURM runs a copy of a launcher, which can source nothing before it knows where the checkout is."""
    lookups = [re.search(r"^root=.*?^source .*?$", path.read_text(), re.MULTILINE | re.DOTALL) for path in LAUNCHERS]
    assert len({found and found.group() for found in lookups}) == 1
    assert None not in lookups


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer", "docker"])
def test_containers(runtime: str, tmp_path: Path) -> None:
    script = (
        f"set -euo pipefail; root='{ROOT}'; source \"$root/slurm/common.sh\"; set_up; "
        'printf "%s\\n" "${srun_arguments[@]}" -- "${python[@]}"'
    )
    work = tmp_path / "work place"
    work.mkdir()
    site = tmp_path / "site.sh"
    site.touch()
    environment = {
        "PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "MEGASPARSE_CONTAINER": "/an image.sqsh",
        "MEGASPARSE_CONTAINER_RUNTIME": runtime, "MEGASPARSE_MOUNTS": "/data:/data", "SLURM_CPUS_PER_TASK": "4",
        "MEGASPARSE_SITE": str(site),
    }  # fmt: skip
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if runtime == "docker":
        assert done.returncode == 2
        assert "MEGASPARSE_CONTAINER_RUNTIME=docker: pyxis or apptainer" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    arguments, python = done.stdout.strip().split("\n--\n")
    mounts = f"{ROOT}:{ROOT},{work}:{work},/data:/data"
    common = ["--export=ALL", "--cpu-bind=none", "--cpus-per-task=4"]
    if runtime == "pyxis":
        container = ["--container-image=/an image.sqsh", f"--container-mounts={mounts}", f"--container-workdir={work}"]
        assert arguments.splitlines() == [*container, *common]
        assert python.splitlines() == ["python"]
    else:
        assert arguments.splitlines() == common
        inside = ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(work), "/an image.sqsh", "python"]
        assert python.splitlines() == inside
