#!/usr/bin/env bash
# The library with Python 3.13, that of Debian 13, in a root of its own: installs it with the pins of requirements.txt, imports it and
# runs the fast tests. Not in CI: it downloads some GB (torch from PyPI comes with CUDA). `tests/other_python.sh [FOLDER]`
# Found with Python 3.13.5 and torch 2.13.0: nothing in kdfast needs 3.11; two tests took addresses' digits and a compiler for granted.
set -euo pipefail
. "$(dirname "$0")/debian_root.sh"
root=${1:-/tmp/kdfast-trixie}
make_root "$root" trixie "python3 python3-venv git g++"
in_root "$root" 'python3 --version; [ -d /venv ] || python3 -m venv /venv; /venv/bin/pip install -q -r requirements.txt; /venv/bin/pip install -q --no-deps .
  cd /tmp && /venv/bin/python -c "from fastai.vision.all import *; from kdfast.all import *; print(Distill, vision_learner)"'
in_root "$root" "/venv/bin/python -m pytest -q -p no:cacheprovider $(sed '/^#/d' "$(dirname "$0")/fast.txt" | xargs)"
