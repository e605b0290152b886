#!/usr/bin/env bash
# Runs torchrun's agent of one node: agent.sh LOGS COMMAND... (started by srun).
#
# The ranks are in sessions of their own, which a signal to the job step may not reach, and the agent would end at
# SIGUSR1: this script leaves the stop file, which the training loop finds.
set -euo pipefail

# shellcheck source=slurm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
logs=$1
shift
trap 'leave_stop_file SIGUSR1' USR1
trap ':' TERM # the agent's to answer

# shellcheck disable=SC2329
run_agent() {
    trap '' USR1
    trap - TERM
    PET_NODE_RANK=$SLURM_NODEID exec "$@"
}
attend run_agent "$@"
