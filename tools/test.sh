#!/usr/bin/env bash
# Installs what the tests need and runs lint, types and the tests. Arguments go to pytest:
#
#   tools/test.sh                 everything a machine without a GPU can run
#   tools/test.sh -m gpu          the GPU tests alone
#   tools/test.sh tests/mlp -x    a part of it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
MEGASPARSE_EXTRAS=dev source tools/environment.sh

# The launchers are tested on a real SLURM; those tests are skipped where there is none.
if [[ $# == 0 || $* == *tests/slurm* ]]; then
    tools/install_slurm.sh || echo "tests/slurm will be skipped" >&2
fi

ruff check .
mypy
exec python -m pytest "$@"
