PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: eval serve test test-slow lint clean

# All methods on the bundled collection; ARGS="--dataset path/to/beir" for another.
eval: $(VENV)/.installed
	$(BIN)/python -m rerank_lab.eval $(ARGS)

# The v3 API on http://127.0.0.1:8000; ARGS="--port 9000" for another port, and so on.
serve: $(VENV)/.installed
	$(BIN)/python -m rerank_lab.server $(ARGS)

# A worker a core, each with one thread: kernels in Triton's interpreter and servers keep no more busy.
test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# Full collections, long fuzzing, other versions.
test-slow: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[offline,report,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
