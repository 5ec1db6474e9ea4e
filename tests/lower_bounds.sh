#!/usr/bin/env bash
# The library at its lower bounds, torch 2.11 with torchvision 0.26 first of all: installs the oldest release of each package that
# pyproject.toml allows, imports the library and runs the fast tests. Not in CI: it downloads some GB. `tests/lower_bounds.sh [FOLDER]`
# Found with torch 2.11.0: nothing that needs a newer torch; fastai 2.8.8 to 2.8.11 fail by themselves beside fasttransform 0.0.5.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-/tmp/kdfast-lower-bounds}
[ -d "$venv" ] || python3.11 -m venv "$venv"
"$venv/bin/pip" install -q uv $(sed -nE 's/^ *"(torch|torchvision)>=([0-9.]+)",$/\1==\2/p' pyproject.toml) # torch by pip: it has a cache of it
"$venv/bin/uv" pip install -q --python "$venv/bin/python" --upgrade --resolution lowest-direct -r pyproject.toml \
  --extra paper --extra track --extra export --extra dev
"$venv/bin/pip" install -q --no-deps -e .
"$venv/bin/python" -c "from fastai.vision.all import *; from kdfast.all import *; print(Distill, vision_learner)"
"$venv/bin/python" -m pytest -q -p no:cacheprovider $(sed '/^#/d' tests/fast.txt)
