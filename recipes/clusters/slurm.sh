#!/bin/bash
# An elastic job under Slurm: it is requeued when it is preempted or its time is up, and goes on from its checkpoint.
#   sbatch recipes/clusters/slurm.sh train.py --lr 0.1
# The script's Trainer has `strategy=EasyScaleStrategy(num_ests=4)`, `devices=2` and `num_nodes=2`, as the lines below.
# `scontrol update JobId=... NumNodes=...` on a requeued job that is pending, and the Trainer's arguments, change the
# devices; the number of ESTs stays.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=SIGUSR1@120

export EASYSCALE_ELASTIC_DIR="${SLURM_SUBMIT_DIR}/elastic/${SLURM_JOB_ID}"
srun python "$@"
