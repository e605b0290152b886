# shellcheck shell=bash
# What the launchers share; sourced by them. Settings come from the environment (`sbatch --export`), else from the site
# file, else from the defaults here:
#
#   MEGASPARSE_ROOT        the checkout; else the directory of `sbatch`, else that of the script given to it
#   MEGASPARSE_SITE        the site file, bash that is sourced; else slurm/site.sh where there is one
#   MEGASPARSE_VENV        a virtual environment to activate on every node
#   MEGASPARSE_PYTHON      the interpreter (python)
#   MEGASPARSE_CONTAINER   an image; MEGASPARSE_CONTAINER_RUNTIME: pyxis (srun --container-image) or apptainer
#   MEGASPARSE_MOUNTS      source:target pairs separated by commas, besides the checkout and the working directory
#   MEGASPARSE_INTERFACE   network interface of NCCL and gloo, for example ib0 or eth0
#   MEGASPARSE_CPU_BIND    srun --cpu-bind (none)
#   srun_arguments         (site file alone) an array of further arguments for every srun

say() { printf '[%s] %s\n' "$(date '+%F %T')" "$*"; }

give_up() {
    say "error: $1" >&2
    exit "${2:-2}"
}

# Runs a command while the caller's signal traps are served; its exit code.
attend() {
    "$@" &
    local child=$! code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the command
        wait "$child" || true
    done
    code=0
    wait "$child" || code=$?
    return "$code"
}

# Makes this job's run save and leave: its loop finds the file under any launcher, even where the ranks still start. (The
# file `stop` of the run directory would end the run of another job, while this one waits for it to end.) What a full
# disk keeps from being written must not end the caller, which waits for the run.
# shellcheck disable=SC2154
leave_stop_file() { # SIGNAL
    echo "$1" >"$logs/signalled" || true
}

# Sources a file that is the site's or the user's, who may rely on unset variables being empty; what fails in it ends the
# job with a word of where.
source_foreign() {
    local file=$1
    set +u -E
    trap 'give_up "$file: code $? of: ${BASH_COMMAND/#source*/its last command}" 1' ERR
    # shellcheck disable=SC1090
    source "$file"
    trap - ERR
    set -u +E
}

# Sources the site file, activates the virtual environment, fills `python`, `srun_arguments`, `per_node` (ranks) and
# `cpus` (of a rank).
set_up() {
    [[ -n ${SLURM_JOB_ID:-} ]] || give_up "this is a batch script: sbatch ${BASH_SOURCE[1]} ..."
    local site=${MEGASPARSE_SITE:-$root/slurm/site.sh}
    srun_arguments=()
    if [[ -f $site ]]; then
        source_foreign "$site"
    elif [[ -n ${MEGASPARSE_SITE:-} ]]; then
        give_up "MEGASPARSE_SITE=$site is not a file"
    fi
    if [[ -n ${MEGASPARSE_VENV:-} ]]; then
        source_foreign "$MEGASPARSE_VENV/bin/activate"
    fi
    if [[ -n ${MEGASPARSE_INTERFACE:-} ]]; then
        export NCCL_SOCKET_IFNAME=$MEGASPARSE_INTERFACE GLOO_SOCKET_IFNAME=$MEGASPARSE_INTERFACE
    fi
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    python=("${MEGASPARSE_PYTHON:-python}")
    local mounts="$root:$root,$PWD:$PWD${MEGASPARSE_MOUNTS:+,$MEGASPARSE_MOUNTS}"
    if [[ -n ${MEGASPARSE_CONTAINER:-} ]]; then
        case ${MEGASPARSE_CONTAINER_RUNTIME:-pyxis} in
            pyxis)
                srun_arguments+=("--container-image=$MEGASPARSE_CONTAINER" "--container-mounts=$mounts"
                    "--container-workdir=$PWD") ;;
            apptainer) python=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$MEGASPARSE_CONTAINER" "${python[@]}") ;;
            *) give_up "MEGASPARSE_CONTAINER_RUNTIME=$MEGASPARSE_CONTAINER_RUNTIME: pyxis or apptainer" ;;
        esac
    fi
    # srun passes the environment on whatever `sbatch --export` said; one task may use all CPUs of its share.
    per_node=${SLURM_NTASKS_PER_NODE:-1}
    cpus=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / per_node))}
    ((cpus > 0)) || cpus=1
    srun_arguments+=(--export=ALL "--cpu-bind=${MEGASPARSE_CPU_BIND:-none}" "--cpus-per-task=$cpus")
    unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK # srun gets it as an argument
}

# One process on the first node, in the container where there is one.
run_once() {
    if [[ -n ${MEGASPARSE_CONTAINER:-} ]]; then
        srun "${srun_arguments[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 "${python[@]}" "$@" </dev/null
    else
        "${python[@]}" "$@" </dev/null
    fi
}

# Where the ranks meet: the first node, as SLURM itself reaches it, and a port of this job below the ephemeral range.
set_rendezvous() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # not head: it may end scontrol by SIGPIPE
    MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p') || MASTER_ADDR=
    MASTER_ADDR=${MASTER_ADDR:-$first} # a busy controller may not answer
    local try
    for try in 0 1 2 3 4 5 6 7 8 9; do # this script runs on the first node, so it can see which ports are taken
        MASTER_PORT=$((20000 + (SLURM_JOB_ID + try * 997) % 10000))
        (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null || break
    done
    export MASTER_ADDR MASTER_PORT
}
