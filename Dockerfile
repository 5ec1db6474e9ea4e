# What `make` needs, and what it installs: Python 3.11, the pinned packages and TeX. The devcontainer uses it too.
# tests/docker.sh tries its RUN lines where there is no Docker.
FROM python:3.11-slim-bookworm
# cu130, … for GPUs; empty: from PyPI
ARG TORCH_BACKEND=cpu
RUN apt-get update && apt-get install -y --no-install-recommends make git
WORKDIR /kdfast
COPY . .
RUN make env TORCH_BACKEND=$TORCH_BACKEND
RUN make tex
CMD ["make", "help"]
