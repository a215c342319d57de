# Every target does its own set-up from nothing. PYTHON picks the interpreter (3.11 or newer); PIP_ARGS is handed to pip,
# for instance an index that has CPU builds of torch.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
HOME_DIR ?= lightship-home

export HF_HUB_OFFLINE = 1
export OMP_WAIT_POLICY = PASSIVE
export MLFLOW_DISABLE_TELEMETRY = true
export PREFECT_SERVER_ANALYTICS_ENABLED = false
export DO_NOT_TRACK = 1

.PHONY: demo test check bench clean help

help:
	@echo "make demo    release the embedded MoE model on this CPU: quantize, verify, evaluate, benchmark, judge, promote"
	@echo "make test    run the tests"
	@echo "make check   lint, format, types, packaging"
	@echo "make bench   rerun the committed benchmarks"
	@echo "make clean   remove the environment, builds and caches; releases in $(HOME_DIR) stay"

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "==> setting up $(VENV): about three minutes on a fresh machine"
	@$(PYTHON) -m venv $(VENV)
	@echo "    torch"
	@$(BIN)/python -m pip install -qq $(PIP_ARGS) -c constraints.txt torch
	@echo "    lightship and everything that it, its tests and its checks need"
	@$(BIN)/python -m pip install -qq $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/installed
	@echo "==> releasing the embedded model, see recipes/demo.toml"
	@$(BIN)/lightship release demo/checkpoint --recipe recipes/demo.toml --home $(HOME_DIR)
	@echo "  first       . $(VENV)/bin/activate"

# Two processes. A file's tests share what is slow to start, so they stay together; by name, the longest file is early.
test: $(VENV)/installed
	@echo "==> testing"
	@$(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/installed
	@echo "==> lint"
	@$(BIN)/ruff check .
	@echo "==> format"
	@$(BIN)/ruff format --check .
	@echo "==> types, of a plain install: mypy cannot see through the editable one"
	@rm -rf build && $(BIN)/python -m pip install -qq --no-deps --no-build-isolation --target build/types .
	@MYPYPATH=build/types $(BIN)/mypy -p lightship
	@echo "==> packaging"
	@$(BIN)/python -m pytest -q tests/test_packaging.py

bench: $(VENV)/installed
	@echo "==> rounding methods side by side on the embedded model"
	@$(BIN)/python benchmarks/rounding.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
