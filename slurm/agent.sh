#!/usr/bin/env bash
# Runs torchrun's agent of one node: agent.sh LOGS RUN COMMAND... (started by srun).
#
# The ranks are in sessions of their own, which a signal to the job step may not reach, and the agent would end at
# SIGUSR1: this script leaves the stop file, which the training loop finds.
set -euo pipefail

logs=$1 run=$2
shift 2
trap 'echo SIGUSR1 >"$logs/signalled"; : >"$run/stop"' USR1
trap ':' TERM # the agent's to answer

(trap '' USR1; trap - TERM; PET_NODE_RANK=$SLURM_NODEID exec "$@") &
agent=$!
code=0
wait "$agent" || code=$?
while kill -0 "$agent" 2>/dev/null; do # a signal ended the wait, not the agent
    wait "$agent" || true
done
code=0
wait "$agent" || code=$?
exit "$code"
