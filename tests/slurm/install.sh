#!/bin/sh
# Makes sure that a Slurm controller can be started here; installs Debian's when it may.
set -eu
need="slurmctld slurmd sbatch munged"
missing() { for name in $need; do PATH="$PATH:/usr/sbin:/sbin" command -v "$name" >/dev/null || printf ' %s' "$name"; done; }

[ -z "$(missing)" ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "test-slurm: missing$(missing): as root run: apt-get install slurmctld slurmd slurm-client munge" >&2
    exit 1
fi
echo "== installing Slurm with apt-get"
apt-get update -q >/dev/null
DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
[ -z "$(missing)" ] || { echo "test-slurm: still missing$(missing) after apt-get" >&2; exit 1; }
