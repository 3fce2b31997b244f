#!/bin/bash
# Submits the whole chain, each stage once those before it have succeeded: supervised -> merge -> evaluate -> report.
#   slurm/pipeline.sh CONFIG BASE TEST_SHARDS OUT [words for the training, such as --train.max_steps 100]
# OUT gets lora/, merged/, evaluation/{base,lora,merged}/ and report.html. In the environment, for each stage:
#   TRAIN_SBATCH MERGE_SBATCH EVALUATE_SBATCH REPORT_SBATCH   options of sbatch, as in "--nodes=4 --time=12:00:00"
#   MERGE_WORDS EVALUATE_WORDS                                words of the program (default: --method layerwise; none)
set -eu
fail() { echo "pipeline: $1" >&2; exit 2; }
[ $# -ge 4 ] || fail "usage: slurm/pipeline.sh CONFIG BASE TEST_SHARDS OUT [--train.key value …]"
config=$1 base=$2 shards=$3 out=$4 here=${HPE_HOME:-$PWD}/slurm
shift 4
[ -f "$here/common.sh" ] || fail "no $here/common.sh: run it from the project's root, or set HPE_HOME to it"
[ -f "$config" ] || fail "$config: no such config"
[ -d "$base" ] || fail "$base: no such folder; name that of the base"
[ -f "$shards/index.json" ] || fail "$shards: no finished shard set; build it with slurm/shards.sh"
[ ! -e "$out" ] || fail "$out is there already: name another folder, or remove it"
mkdir -p "$out"

jobs=
# NAME OPTIONS PREDECESSORS SCRIPT WORDS…: the job's number is left in $id. Who waits for a failed one is cancelled.
submit() {
    local name=$1 options=$2 after=$3
    shift 3
    # shellcheck disable=SC2086 # options are words to be split
    id=$(sbatch --parsable --kill-on-invalid-dep=yes ${after:+--dependency=afterok:$after} --job-name="hpe-$name" \
        --output="$out/%x-%j.log" $options "$@") || { [ -z "$jobs" ] || scancel $jobs; fail "$name: sbatch refused it; the stages before it are cancelled"; }
    id=${id%%;*}
    jobs="$jobs $id"
    printf '%-16s job %-8s %s\n' "$name" "$id" "${after:+after $after}"
}

submit train "${TRAIN_SBATCH:-}" "" "$here/train.sh" "$config" --run-dir "$out/lora" --model.base "$base" "$@"
train=$id
# shellcheck disable=SC2086
submit merge "${MERGE_SBATCH:-}" "$train" "$here/merge.sh" \
    --base "$base" --adapter "$out/lora/last" ${MERGE_WORDS:---method layerwise} --out "$out/merged"
merge=$id
judged=
judge() { # SYSTEM MODEL PREDECESSOR
    # shellcheck disable=SC2086
    submit "evaluate-$1" "${EVALUATE_SBATCH:-}" "$3" "$here/evaluate.sh" \
        --model "$2" --name "$1" --shards "$shards" ${EVALUATE_WORDS:-} --resume --out "$out/evaluation/$1"
    judged=$judged:$id
}
judge base "$base" "$train"
judge lora "$out/lora/last" "$train"
judge merged "$out/merged" "$merge"
submit report "${REPORT_SBATCH:-}" "${judged#:}" "$here/report.sh" "$out/evaluation" --out "$out"
cat <<END
follow:  squeue --me                      a failed stage cancels those after it
         tail -f $out/hpe-*.log
         hpe-launch status $out/lora      step, time left, losses
stop:    scancel$jobs
end:     $out/report.html
END
