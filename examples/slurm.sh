#!/bin/bash
# One machine with several devices: sbatch examples/slurm.sh RUN.yaml
#SBATCH --job-name=diffalign
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

# Five minutes before the time is up SLURM sends SIGTERM to the job's steps: the step under way is finished, a checkpoint is written, and
# the exit code is 130. A run that goes on in the next slot needs --resume, which begins at the first step where there is no checkpoint.
run=${1:?give a run file}
folder=${2:-runs/$(basename "$run" .yaml)}
mkdir -p "$folder"
srun torchrun --standalone --nproc-per-node="$SLURM_GPUS_ON_NODE" -m diffalign train "$run" --folder "$folder" --resume
