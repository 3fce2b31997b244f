#!/bin/bash
# Writes the report of result folders: sbatch [options] slurm/report.sh RUN … --out DIR
#SBATCH --job-name=hpe-report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=0:30:00
#SBATCH --output=%x-%j.log
set -u
common=${HPE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh
[ -f "$common" ] || { echo "no $common: run sbatch from the project's root, or set HPE_HOME to it" >&2; exit 2; }
. "$common"
exec "${launch%hpe-launch}cogvlm-hpe" report "$@"
