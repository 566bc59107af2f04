#!/bin/bash
#SBATCH --job-name=sweep-797ad60f
#SBATCH --array=0-1%1
#SBATCH --output=runs/sweep/slurm.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --partition=gpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --time=4:00:00

logs=(
  runs/sweep/learning_rate=0.0001/log.txt
  runs/sweep/learning_rate=0.0003/log.txt
)
log=${logs[SLURM_ARRAY_TASK_ID]}
mkdir -p "$(dirname "$log")" && exec >>"$log" 2>&1 || exit 1
task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID  # SLURM_JOB_ID of one of the tasks is that of the whole array
echo "$(date '+%F %T') job $task on $SLURM_JOB_NODELIST, started again ${SLURM_RESTART_COUNT:-0} times"
export PYTHONUNBUFFERED=1
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not read the former
each() { srun --kill-on-bad-exit=0 "$@"; }  # a process for each task; when one fails, the others say why
one() { JAX_NUM_PROCESSES=1 "$@"; }  # a process on the first node

case $SLURM_ARRAY_TASK_ID in
0)
  each /venv/bin/python /clone/launch/train.py --config=robot.py --config.train.learning_rate=0.0001 --workdir=runs/sweep/learning_rate=0.0001 &&
  one /venv/bin/python /clone/launch/evaluate.py --config=robot.py --config.train.learning_rate=0.0001 --workdir=runs/sweep/learning_rate=0.0001
  ;;
1)
  each /venv/bin/python /clone/launch/train.py --config=robot.py --config.train.learning_rate=0.0003 --workdir=runs/sweep/learning_rate=0.0003 &&
  one /venv/bin/python /clone/launch/evaluate.py --config=robot.py --config.train.learning_rate=0.0003 --workdir=runs/sweep/learning_rate=0.0003
  ;;
esac
code=$?
if [ $code = 75 ]; then  # it was told to stop, and has saved
  scontrol requeue incomplete "$task" && sleep 60  # meanwhile Slurm ends this shell
fi
exit $code
