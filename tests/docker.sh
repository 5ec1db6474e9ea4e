#!/usr/bin/env bash
# Tries the Dockerfile's RUN lines one by one in a bare Debian 12 (its Python 3.11 in place of the image's), where there is no
# Docker. Not in CI: it downloads some GB. `tests/docker.sh [FOLDER]`; TORCH_BACKEND as in the Dockerfile, empty unless set.
set -euo pipefail
. "$(dirname "$0")/debian_root.sh"
root=${1:-/tmp/kdfast-bookworm}
make_root "$root" bookworm "python3 python3-venv"
sed -n 's/^RUN //p' "$(dirname "$0")/../Dockerfile" | while read -r line; do
  echo "RUN $line"
  in_root "$root" "export DEBIAN_FRONTEND=noninteractive; $line" </dev/null
done
in_root "$root" 'make help; .venv/bin/kdfast status --study digits | head -3; latexmk --version | head -2
  .venv/bin/python -c "from fastai.vision.all import *; from kdfast.all import *; print(Distill, vision_learner)"'
