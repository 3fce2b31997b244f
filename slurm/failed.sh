#!/bin/bash
# Started by pipeline.sh's chain when a stage has failed: says which one, and what became of those after it.
#SBATCH --job-name=hpe-failed
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=0:05:00
for id in "$@"; do
    scontrol -o show job "$id" |
        sed -E 's/^JobId=([0-9]+) JobName=([^ ]+).* JobState=([A-Z_]+) .* ExitCode=([0-9]+):.* StdOut=([^ ]+).*/\2 (job \1): \3, exit code \4; its log: \5/'
done
