#!/usr/bin/env bash
# Makes (or reuses) the project's virtual environment and activates it. Sourced by the other tools.
#
#   MEGASPARSE_VENV      where the environment lives        (default: <repository>/.venv)
#   MEGASPARSE_PYTHON    interpreter to make it with        (default: the first of python3.12, python3.11, python3)
#   MEGASPARSE_EXTRAS    extras of the package to install   (default: none; tools/test.sh asks for "dev")
#
# It is made again only when pyproject.toml, the constraints or the interpreter change.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MEGASPARSE_VENV:-$repository/.venv}
extras=${MEGASPARSE_EXTRAS:-}

find_python() {
    local candidate
    for candidate in ${MEGASPARSE_PYTHON:-python3.12 python3.11 python3}; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "megasparse needs Python 3.11 or newer with the venv module; set MEGASPARSE_PYTHON to one." >&2
    return 1
}

# The two sides pin different torch releases: the GPU side follows what Transformer Engine was built for.
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    constraints=$repository/tools/constraints-gpu.txt
else
    constraints=$repository/tools/constraints-cpu.txt
fi

install_environment() {
    local python wanted stamp
    python=$(find_python)
    stamp=$venv/.megasparse-installed${extras:+-$extras}  # one for each set of extras: they share the environment
    wanted=$({ "$python" --version; cat "$repository/pyproject.toml" "$constraints"; echo "$repository"; } | cksum)
    if [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
        return
    fi
    echo "Installing megasparse into $venv (once; needs about 3 GB and a few minutes)"
    # An environment made by another interpreter cannot be brought up to date, only made anew.
    if [[ -d $venv && $(cat "$venv/.megasparse-python" 2>/dev/null) != "$python $("$python" --version)" ]]; then
        "$python" -m venv --clear "$venv"
    else
        "$python" -m venv "$venv"
    fi
    echo "$python $("$python" --version)" > "$venv/.megasparse-python"
    # torch first and by its exact version: a bare requirement could choose a build for another accelerator.
    "$venv/bin/python" -m pip install --quiet --upgrade pip "setuptools>=77" wheel
    "$venv/bin/python" -m pip install --quiet --constraint "$constraints" "$(grep '^torch==' "$constraints")"
    # setuptools warns of every editable installation whose folder is named like its package.
    PYTHONWARNINGS=ignore "$venv/bin/python" -m pip install --quiet --constraint "$constraints" --no-build-isolation \
        --editable "$repository${extras:+[$extras]}"
    echo "$wanted" > "$stamp"
}

install_environment
# shellcheck disable=SC1091
source "$venv/bin/activate"
