#!/bin/bash
# Builds or checks shard sets: sbatch [options] slurm/shards.sh build SOURCE … --out DIR
#SBATCH --job-name=hpe-shards
#SBATCH --ntasks=32            # one task per CPU; the bytes do not depend on how many
#SBATCH --cpus-per-task=1
#SBATCH --time=8:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue              # a build that was stopped goes on where it was
set -u
common=${HPE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh
[ -f "$common" ] || { echo "no $common: run sbatch from the project's root, or set HPE_HOME to it" >&2; exit 2; }
. "$common"
exec "$launch" shards "$@"
