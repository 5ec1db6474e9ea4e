#!/usr/bin/env bash
set -euo pipefail
. "$(dirname "$0")/debian_root.sh"
root=${1:-/tmp/kdfast-trixie}
make_root "$root" trixie "python3 python3-venv git make"
in_root "$root" 'python3 --version; curl -sI https://pypi.org | head -1 || true; ls | head -30; df -h /dev/shm'
