#!/bin/bash
# Started by pipeline.sh's chain when a stage has failed: says which one, and what became of those after it.
# The words are NAME:JOB:LOG, one for each stage.
#SBATCH --job-name=hpe-failed
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=0:05:00
for stage in "$@"; do
    IFS=: read -r name id log <<<"$stage"
    said=$(scontrol -o show job "$id" 2>/dev/null |
        sed -nE 's/.* JobState=([A-Z_]+) .* ExitCode=([0-9]+):.* StdOut=([^ ]+).*/\1, exit code \2; its log: \3/p')
    if [ -z "$said" ]; then    # slurmctld forgets a job that ended MinJobAge ago; the accounting, where there is one, does not
        said=$(sacct -j "$id" -X -n -P -o State,ExitCode 2>/dev/null | sed -nE 's/^([A-Z_]+)[^|]*\|([0-9]+):.*/\1, exit code \2/p')
        said="${said:-Slurm does not know any more how it ended}; its log: $log"
    fi
    echo "hpe-$name (job $id): $said"
done
