# Read by the scripts here: finds the project and its programs, and says where a job runs.
home=${HPE_HOME:-$SLURM_SUBMIT_DIR}
site=${HPE_SITE:-$home/slurm/site.conf}
if [ -f "$site" ]; then
    strict=$-
    set +eu    # what a site loads, such as modules or conda, is seldom written for these
    . "$site"
    case $strict in *e*) set -e ;; esac
    case $strict in *u*) set -u ;; esac
fi
launch=$home/.venv/bin/hpe-launch
[ -x "$launch" ] || launch=$(command -v hpe-launch) || {
    echo "${SLURM_JOB_NAME:-${0##*/}}: no hpe-launch in $home/.venv/bin or on PATH: install the project, or see slurm/site.conf.example" >&2
    exit 1
}
[ -z "${SLURM_JOB_ID:-}" ] || echo "== $(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"
