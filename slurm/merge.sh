#!/bin/bash
# Merges adapters: sbatch [options] slurm/merge.sh --base DIR --adapter DIR … --method layerwise --out DIR
#SBATCH --job-name=hpe-merge
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16     # threads share the layers; docs/merging.md says how much memory it takes
#SBATCH --mem=64G
#SBATCH --time=2:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue              # an adapter begins anew in minutes, whole weights go on
set -u
common=${HPE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh
[ -f "$common" ] || { echo "no $common: run sbatch from the project's root, or set HPE_HOME to it" >&2; exit 2; }
. "$common"
exec "$launch" merge "$@"
