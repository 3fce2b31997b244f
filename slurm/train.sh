#!/bin/bash
# Trains one stage: sbatch [options] slurm/train.sh CONFIG [--run-dir DIR] [--train.lr 1e-4 …]
# Options given to sbatch win over these, as in: sbatch --nodes=4 slurm/train.sh …
#SBATCH --job-name=hpe-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8    # one task per GPU
#SBATCH --gres=gpu:8           # a task sees all GPUs of its node and takes that of its local rank
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append     # a requeued job goes on in the same log
#SBATCH --requeue              # after a pre-emption or the failure of a node
#SBATCH --signal=B:USR1@120    # two minutes before the time limit this script is told
set -u
common=${HPE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh
[ -f "$common" ] || { echo "no $common: run sbatch from the project's root, or set HPE_HOME to it" >&2; exit 2; }
. "$common"

restarts=${SLURM_RESTART_COUNT:-0}
[ "$restarts" = 0 ] || set -- "$@" --resume
"$launch" train "$@" &
pid=$!
ending=no
trap 'kill -USR1 "$pid"' USR1
# TERM is scancel, which means it, or a pre-emption, after which Slurm requeues by itself.
trap 'ending=yes; kill -USR1 "$pid"' TERM
while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
wait "$pid"
code=$?

# 85: the ranks saved and stopped on request, and there are steps left.
if [ "$code" = 85 ] && [ "$ending" = no ]; then
    if [ "$restarts" -lt "${HPE_MAX_RESTARTS:-20}" ]; then
        trap '' USR1 TERM
        echo "== $(date '+%F %T') back into the queue"
        scontrol requeue "$SLURM_JOB_ID" && trap - TERM && sleep 60    # TERM, which Slurm now sends, ends it
    else
        echo "$SLURM_JOB_NAME: restarted $restarts times already; submit it again with --resume, or raise HPE_MAX_RESTARTS" >&2
    fi
fi
exit "$code"
