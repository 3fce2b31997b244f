#!/bin/sh
# Makes sure that a Slurm controller can be started here; installs Debian's when it may.
set -eu
need="slurmctld slurmd sbatch munged"
missing() { for name in $need; do PATH="$PATH:/usr/sbin:/sbin" command -v "$name" >/dev/null || printf ' %s' "$name"; done; }

if [ "$(id -u)" != 0 ]; then
    echo "test-slurm: a private Slurm needs root (device files, munge); run it in a container" >&2
    exit 1
fi
[ -z "$(missing)" ] && exit 0
if ! command -v apt-get >/dev/null; then
    echo "test-slurm: missing$(missing): install slurmctld, slurmd, slurm-client and munge; without apt-get this script cannot" >&2
    exit 1
fi
echo "== installing Slurm with apt-get"
apt-get update -q >/dev/null
DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
[ -z "$(missing)" ] || { echo "test-slurm: still missing$(missing) after apt-get" >&2; exit 1; }
