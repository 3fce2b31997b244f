#!/bin/bash
# Judges models: sbatch [options] slurm/evaluate.sh --model DIR [--adapter DIR …] --shards DIR … --out DIR
#SBATCH --job-name=hpe-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8    # one task per GPU; the scores do not depend on how many
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=8:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue              # what is judged already stays so
set -u
common=${HPE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh
[ -f "$common" ] || { echo "no $common: run sbatch from the project's root, or set HPE_HOME to it" >&2; exit 2; }
. "$common"
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || set -- "$@" --resume
exec "$launch" evaluate "$@"
