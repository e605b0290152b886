#!/usr/bin/env bash
# Installs what tests/slurm needs, as root on Debian or Ubuntu: SLURM and munge. The daemons that the packages would
# start stay off; the tests start their own. Says why where it cannot.
set -euo pipefail

give_up() {
    echo "SLURM cannot be installed: $1" >&2
    exit 1
}

if [[ -x $(PATH=$PATH:/usr/sbin command -v slurmctld) && -x $(PATH=$PATH:/usr/sbin command -v munged) ]]; then
    exit 0
fi
[[ $EUID == 0 ]] || give_up "this takes root"
command -v apt-get >/dev/null || give_up "there is no apt-get"
echo "Installing SLURM for the tests of the launchers"
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{
    timeout 120 apt-get update # lists that are there already may do
    timeout 300 apt-get install -y --no-install-recommends slurm-wlm munge
} >"$log" 2>&1 </dev/null || give_up "apt-get failed: $(tail -n 3 "$log")"
