#!/bin/sh
# Debian's Chromium for the report's browser test, where this may be installed; without it that test is skipped by name.
set -eu
command -v chromium >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "test: no chromium and no right to install it: the report's browser test will be skipped" >&2
    exit 0
fi
echo "== installing chromium with apt-get"
if ! { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium; } \
    >/dev/null 2>&1; then
    echo "test: apt-get gives no chromium (offline?): the report's browser test will be skipped" >&2
fi
