#!/usr/bin/env bash
# Runs one rank: rank.sh LOGS COMMAND... (started by srun, or by torchrun which srun started).
#
# - The rank's output goes to LOGS/rank_00003.log and on to the merged log.
# - When the rank ends, LOGS/exit/rank_00003 says when, which rank, with which code, on which node: the earliest failure
#   is the one to look at. A rank that SLURM ends together with the others writes none.
# - Ends that all ranks agree on (75 requeue, 65 not finite) become 0 here, so that srun --kill-on-bad-exit does not
#   kill a rank which is still writing; the launcher reads them from the files.
# - SIGUSR1 while the rank still starts would kill it: it is ignored until the training loop listens, and this script
#   leaves the stop file, which the loop finds when it is there.
set -euo pipefail

# shellcheck source=slurm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
logs=$1
shift
rank=${RANK:-${SLURM_PROCID:-0}}
name=rank_$(printf '%05d' "$rank")

exec 3>&1
exec > >(trap '' TERM USR1 INT; exec tee -a "$logs/$name.log" >&3) 2>&1
writer=$!
exec 3>&-
trap 'leave_stop_file SIGUSR1' USR1
trap ':' TERM

# shellcheck disable=SC2329
run_rank() {
    trap '' USR1
    trap - TERM
    exec "$@"
}
code=0
attend run_rank "$@" || code=$?

end=$(printf '%s %s %s %s' "$(date +%s.%N)" "$rank" "$code" "${SLURMD_NODENAME:-$(hostname)}")
if ! { echo "$end" >"$logs/exit/.$name" && mv "$logs/exit/.$name" "$logs/exit/$name"; }; then
    echo "error: $logs/exit/$name cannot be written"
fi
if ((code > 128)); then
    echo "rank $rank on ${SLURMD_NODENAME:-$(hostname)}: ended by signal $((code - 128))"
elif ((code != 0)); then
    echo "rank $rank on ${SLURMD_NODENAME:-$(hostname)}: ended with code $code"
fi
exec >&- 2>&-
for ((i = 0; i < 50; i++)); do # the log's writer ends when the last child of the rank has
    kill -0 "$writer" 2>/dev/null || break
    sleep 0.1
done
case $code in
    65 | 75) exit 0 ;;
    *) exit "$code" ;;
esac
