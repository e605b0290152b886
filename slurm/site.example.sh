# shellcheck shell=bash disable=SC2034
# Copy to slurm/site.sh: what is the same for every job of this site. Sourced by every launcher on the first node,
# which stops where a command in it fails.

# module load cuda/12.8
# export MEGASPARSE_VENV=/shared/envs/megasparse
# export MEGASPARSE_CONTAINER=/shared/images/megasparse.sqsh MEGASPARSE_CONTAINER_RUNTIME=pyxis
# export MEGASPARSE_MOUNTS=/shared/data:/shared/data
# export MEGASPARSE_INTERFACE=ib0
# export NCCL_IB_HCA=mlx5 NCCL_DEBUG=WARN
# export MEGASPARSE_PREFLIGHT=1
# srun_arguments=(--mpi=none)
