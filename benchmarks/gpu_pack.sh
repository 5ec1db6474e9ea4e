#!/bin/sh
# Packs what a GPU machine without a network lacks, in two pieces of about equal size that travel one after the other:
#   sh benchmarks/gpu_pack.sh [FILE…]    files (data archives, a script that unpacks them) to take along
# .gpu/1 has the wheels and the first half of the files, .gpu/2 the other half. There:
#   sh .gpu/1/unpack.sh SITE             installs the wheels into the folder SITE
#   cat .gpu/1/files.0 .gpu/2/files.1 | tar x -C FOLDER
# The machine has Python 3.12, torch, torchvision, pandas, scipy, scikit-learn, matplotlib, pytest; the wheels are what
# `from kdfast.all import *` needs beside them.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WHEELS="annotated-types==0.8.0 beartype==0.23.1 defusedxml==0.7.1 fastai==2.8.12 fastcore==2.2.39 fastdownload==0.0.8
fastprogress==1.1.6 fasttransform==0.0.5 itsdangerous==2.2.0 plum-dispatch==2.9.0 pydantic==2.14.3 pydantic-core==2.50.4
python-fasthtml==0.14.14 python-multipart==0.0.34 starlette==1.10.0 typing-inspection==0.4.5 oauthlib httpx2 uvicorn
beautifulsoup4 soupsieve platformdirs fasterai==0.4.1 torch-pruning==1.6.1"
mkdir -p .gpu/wheels .gpu/1 .gpu/2
for wheel in $WHEELS; do
    name=$(echo "${wheel%%=*}" | tr '-' '_')
    ls .gpu/wheels/"$name"-*.whl >/dev/null 2>&1 || "$PYTHON" -m pip download -q --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform any -d .gpu/wheels "$wheel" || echo "no wheel of $wheel"
done
rm -rf .gpu/1/* .gpu/2/*
cp .gpu/wheels/*.whl .gpu/1
cat > .gpu/1/unpack.sh <<'UNPACK'
set -eu
python3 -m pip install -q --no-index --no-deps --no-compile --target "$1" "$(dirname "$0")"/*.whl
UNPACK
if [ $# -gt 0 ]; then
    for file in "$@"; do set -- "$@" -C "$(cd "$(dirname "$file")" && pwd)" "$(basename "$file")"; shift; done
    tar c "$@" > .gpu/files.tar
    half=$(( ($(stat -c %s .gpu/files.tar) - $(du -sb .gpu/1 | cut -f1)) / 2 ))
    head -c "$half" .gpu/files.tar > .gpu/1/files.0
    tail -c +"$((half + 1))" .gpu/files.tar > .gpu/2/files.1
    rm .gpu/files.tar
fi
du -sb .gpu/1 .gpu/2
