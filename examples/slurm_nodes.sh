#!/bin/bash
# Several machines: sbatch --nodes=4 examples/slurm_nodes.sh RUN.yaml
#SBATCH --job-name=diffalign
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

# One torchrun a machine; the first machine is where they meet. The run folder must be on a disk that all of them see. With
# `accelerate launch` instead: --num_machines, --machine_rank $SLURM_NODEID, --main_process_ip, --main_process_port, --num_processes.
run=${1:?give a run file}
folder=${2:-runs/$(basename "$run" .yaml)}
mkdir -p "$folder"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
  --rdzv-backend=c10d --rdzv-endpoint="$first:29500" --rdzv-id="$SLURM_JOB_ID" \
  -m diffalign train "$run" --folder "$folder" --resume
