#!/usr/bin/env bash
# Installs what tests/slurm needs on Debian or Ubuntu, as root: SLURM and munge. The daemons that the packages would
# start stay off; the tests start their own.
set -euo pipefail
[[ $EUID == 0 ]] || { echo "run this as root" >&2; exit 1; }
if command -v slurmctld >/dev/null && command -v munged >/dev/null; then
    exit 0
fi
apt-get update
RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge
