# kdfast: from clone to paper. `make help` lists the targets.
STUDY ?= digits
PYTHON ?= python3.11
# cpu, cu130, … take torch from PyTorch's own index; empty: from PyPI (with CUDA on Linux, several GB)
TORCH_BACKEND ?=
RERUN ?=
N ?=
ALL ?=
PROFILE ?=
CLEAR ?=
RUN ?=
N ?=
ALL ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
TEX := texlive-latex-recommended texlive-latex-extra texlive-science latexmk lmodern
SLURM := slurmctld slurmd slurm-client munge
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# uv installs in parallel; it takes pip's extra places to look for packages with it
UV := UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv pip install --quiet --python $(BIN)/python

.PHONY: help reproduce paper release verify efficiency status cache doctor test bench stress slurm lint clean env tex
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1|/' | awk -F'|' '{printf "  %-12s %s\n", $$1, $$2}'

reproduce: ## train what is missing of STUDY (default digits), analyse your runs, build build/<study>/paper.pdf; RERUN=1 retrains stale ones and those of other data; PROFILE=slurm does it on a cluster
	@$(MAKE) --no-print-directory -j2 env tex
	@$(BIN)/python -m kdfast reproduce --study $(STUDY) $(if $(RERUN),--rerun) $(if $(PROFILE),--profile $(PROFILE))

paper: ## build build/paper.pdf from the released records of all studies, or of STUDY; trains nothing
	@$(MAKE) --no-print-directory -j2 env tex
	@$(BIN)/python -m kdfast paper $(if $(filter command line environment,$(origin STUDY)),--study $(STUDY))

release: env ## copy your records of STUDY to experiments/results/<study>/ for committing
	@$(BIN)/python -m kdfast release --study $(STUDY)

verify: env ## rerun a random cell (N=3: three) of the released STUDY and note in its verified.json: equal on the same processor and versions, else within its seeds' spread
	@OMP_NUM_THREADS=1 $(BIN)/python -m kdfast verify --study $(STUDY) $(if $(RUN),--run $(RUN)) $(if $(N),--n $(N))

efficiency: env ## measure speed, memory and size of STUDY's networks and exported students, on a quiet machine
	@$(BIN)/python -m kdfast efficiency --study $(STUDY)

status: env ## list the runs of STUDY: done, stale, of other data, failed or missing
	@$(BIN)/python -m kdfast status --study $(STUDY)

cache: env ## list the cached teacher outputs; CLEAR=1 removes it
	@$(BIN)/python -m kdfast cache $(if $(CLEAR),--clear)

doctor: env ## check every record, its weights and predictions, checkpoints and cached teacher outputs; names what is damaged; ALL=1 evaluates the weights of all runs, not of a few
	@$(BIN)/python -m kdfast doctor $(if $(ALL),--all)

bench: env ## measure what distillation costs here, on a quiet machine (half an hour); results go to benchmarks/results/
	@$(UV) -e ".[bench]"
	@for name in step memory loader options method_cost amortise grid; do $(BIN)/python -m benchmarks.$$name || exit 1; done

test: ## run the test suite (10 minutes at most on 2 cores)
	@$(MAKE) --no-print-directory -j2 env tex
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

stress: env ## kill a small study and fill its disk by chance, plan studies of 10,000 runs (20 minutes); writes docs/robustness.md
	@$(BIN)/python tests/stress.py
	@$(BIN)/python -m benchmarks.scale
	@$(BIN)/python -m kdfast.report.robustness

slurm: ## install SLURM for the tests of clusters, which start one of their own (Debian, Ubuntu)
	@command -v slurmctld >/dev/null || { \
	  command -v apt-get >/dev/null || { echo "no apt-get: the tests of clusters are skipped" >&2; exit 1; }; \
	  $(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $(SLURM) >/dev/null; }

lint: env ## check style, that imports go one way between the packages, and that notebooks hold no outputs
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/nbstripout --verify experiments/*.ipynb analysis/*.ipynb

clean: ## remove what was built (figures, papers, the environment); runs/ stays
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m kdfast.kernels.client --stop; fi
	rm -rf build $(VENV) .snakemake .pytest_cache .ruff_cache

env: $(READY) ## create .venv with the pinned packages

$(READY): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "kdfast needs $(PYTHON): install it, or name another with PYTHON=…" >&2; exit 1; }
	@echo "Installing the pinned packages into $(VENV) (about a minute, and the time of their download) …"
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) has no venv: install it (Debian: apt install python3.11-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	@$(UV) --compile-bytecode $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND)) -r requirements.txt
	@$(UV) --no-deps -e .
	@touch $@

tex: ## install the TeX packages that the paper needs, where latexmk is missing (Debian, Ubuntu)
	@command -v latexmk >/dev/null || { \
	  command -v apt-get >/dev/null || { echo "the paper needs TeX: install TeX Live with latexmk, or the packages $(TEX)" >&2; exit 1; }; \
	  echo "Installing TeX (484 MB): $(TEX) …"; \
	  $(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $(TEX) >/dev/null; }
