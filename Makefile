# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow soak bench bench-rivals lint env clean
.DEFAULT_GOAL := quickstart

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[data,plots,reproduce,serve]'
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/pip install -q -c constraints.txt -e '.[data,plots,reproduce,serve,test]'
	touch $@

env: $(VENV)/.ready

quickstart: $(VENV)/.ready
	$(BIN)/landmark quickstart

test: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

test-slow: $(VENV)/.ready-test
	$(BIN)/python -m pytest -q -m slow --timeout=1800

soak: $(VENV)/.ready
	$(BIN)/landmark bench soak $(or $(MODEL),runs/quickstart) --minutes 10

bench: $(VENV)/.ready-test
	$(BIN)/python bench/bench_train.py
	$(BIN)/python bench/bench_train.py --memory
	$(BIN)/python bench/bench_generate.py
	$(BIN)/python bench/bench_families.py

bench-rivals: $(VENV)/.ready-test
	$(BIN)/python bench/bench_rivals.py --install $(VENV)/rivals

lint: $(VENV)/.ready-test
	$(BIN)/ruff check landmark tests bench
	$(BIN)/mypy landmark

clean:
	rm -rf $(VENV) runs
