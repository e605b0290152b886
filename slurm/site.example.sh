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
# Compiled kernels of PyTorch and Triton on each node's own disk, where $HOME is slow or full:
# export TRITON_CACHE_DIR=/tmp/$USER/triton TORCHINDUCTOR_CACHE_DIR=/tmp/$USER/inductor
# export HF_HUB_OFFLINE=1 # no internet on compute nodes: what asks the hub for a name need not try for a minute
# srun_arguments=(--mpi=none)
