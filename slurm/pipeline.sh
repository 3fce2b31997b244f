#!/bin/bash
# Submits the whole chain, each stage once those before it have succeeded:
# weak -> supervised -> merge -> continued -> evaluate -> report.
#   slurm/pipeline.sh [--weak FILE] [--continued FILE] CONFIG BASE TEST_SHARDS OUT [--train.key value …]
# CONFIG is the supervised stage's; weak and continued are left out where no FILE is given for them, and words after OUT
# go to all trainings. OUT gets a folder for each stage, evaluation/ with one for the base and each stage, and
# report.html. In the environment, for each kind of job:
#   TRAIN_SBATCH MERGE_SBATCH EVALUATE_SBATCH REPORT_SBATCH   options of sbatch, as in "--nodes=4 --time=12:00:00"
#   MERGE_WORDS EVALUATE_WORDS                                words of the program (default: --method layerwise; none)
set -eu
fail() { echo "pipeline: $1" >&2; exit 2; }
weak= continued=
while [ $# -gt 1 ]; do
    case $1 in
        --weak) weak=$2 ;;
        --continued) continued=$2 ;;
        *) break ;;
    esac
    shift 2
done
[ $# -ge 4 ] || fail "usage: slurm/pipeline.sh [--weak FILE] [--continued FILE] CONFIG BASE TEST_SHARDS OUT [--train.key value …]"
export HPE_HOME=${HPE_HOME:-$PWD}
config=$1 base=$2 shards=$3 out=$4 here=$HPE_HOME/slurm merge_words=${MERGE_WORDS:---method layerwise}
shift 4
[ -f "$here/common.sh" ] || fail "no $here/common.sh: run it from the project's root, or set HPE_HOME to it"
. "$here/common.sh"
[ -d "$base" ] || fail "$base: no such folder; name that of the base"
[ -f "$shards/index.json" ] || fail "$shards: no finished shard set; build it with slurm/shards.sh"
case $merge_words in *--output*) fail "MERGE_WORDS '$merge_words': the stages after it take an adapter; leave --output out" ;; esac
[ ! -e "$out" ] || fail "$out is there already: name another folder, or remove it"
check() { # CONFIG WORDS…
    "${launch%hpe-launch}cogvlm-hpe" train --config "$@" --check || fail "$1: see above; nothing was submitted"
}
# With an --adapter.init wherever the stage will get one: the check does not look whether it is there.
[ -z "$weak" ] || check "$weak" --model.base "$base" "$@"
check "$config" --model.base "$base" ${weak:+--adapter.init "$out/weak/last"} "$@"
[ -z "$continued" ] || check "$continued" --model.base "$base" --adapter.init "$out/merged" "$@"
case $out in *[[:space:]]*) fail "$out: name a folder without spaces" ;; esac
mkdir -p "$out"
out=$(cd "$out" && pwd)

jobs= stages= from= last= systems="--with-base --name base" results=$out/evaluation/base
# NAME OPTIONS PREDECESSORS SCRIPT WORDS…: the job's number is left in $id. Who waits for a failed one is cancelled.
submit() {
    local name=$1 options=$2 after=$3
    shift 3
    # shellcheck disable=SC2086 # options are words to be split
    id=$(sbatch --parsable --kill-on-invalid-dep=yes ${after:+--dependency=$after} --job-name="hpe-$name" \
        --output="$out/%x-%j.log" $options "$@") || { [ -z "$jobs" ] || scancel $jobs; fail "$name: sbatch refused it; the stages before it are cancelled"; }
    id=${id%%;*}
    jobs="$jobs $id"
    stages="$stages $name:$id:$out/hpe-$name-$id.log"
    case $after in afterok:*) after="after ${after#afterok:}" ;; afternotok:*) after="only if one of them fails" ;; esac
    printf '%-20s job %-8s %s\n' "$name" "$id" "$after"
}
made() { # NAME ADAPTER: what the last job leaves
    from=$2 last=$id
    systems="$systems --adapter $2 --name $1"
    results="$results $out/evaluation/$1"
}
train() { # NAME CONFIG WORDS…
    local name=$1 file=$2
    shift 2
    submit "$name" "${TRAIN_SBATCH:-}" "${last:+afterok:$last}" "$here/train.sh" "$file" --run-dir "$out/$name" \
        --model.base "$base" ${from:+--adapter.init "$from"} "$@"
    made "$name" "$out/$name/last"
}

[ -z "$weak" ] || train weak "$weak" "$@"
train supervised "$config" "$@"
# shellcheck disable=SC2086
submit merge "${MERGE_SBATCH:-}" "afterok:$last" "$here/merge.sh" \
    --base "$base" --adapter "$from" $merge_words --out "$out/merged"
made merged "$out/merged"
[ -z "$continued" ] || train continued "$continued" "$@"
# shellcheck disable=SC2086 # all systems at once: they share the base and what they all see of an image
submit evaluate "${EVALUATE_SBATCH:-}" "afterok:$last" "$here/evaluate.sh" \
    --model "$base" $systems --shards "$shards" ${EVALUATE_WORDS:-} --out "$out/evaluation"
# shellcheck disable=SC2086
submit report "${REPORT_SBATCH:-}" "afterok:$id" "$here/report.sh" $results --out "$out"
ids=${jobs# }
# shellcheck disable=SC2086 # Slurm ends this one without a start where every stage succeeds.
submit failed "${REPORT_SBATCH:-}" "afternotok:${ids// /?afternotok:}" --output="$out/FAILED.txt" "$here/failed.sh" $stages
cat <<END
follow:  squeue --me                      a failed stage cancels those after it, and $out/FAILED.txt says so
         tail -f $out/hpe-*.log
         hpe-launch status $out/supervised      step, time left, losses
stop:    scancel$jobs
end:     $out/report.html
END
