PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: eval report reports serve test test-slow lint clean

# All methods on the bundled collection; ARGS="--dataset path/to/beir" for another.
eval: $(VENV)/.installed
	$(BIN)/python -m rerank_lab.eval $(ARGS)

# The newest results (or ARGS="results/a results/b --out DIR") as report.md and report.html.
report: $(VENV)/.installed
	$(BIN)/python -m rerank_lab.report $(ARGS)

# reports/baseline: numpydoc, SciFact and Cranfield, the last two as BEIR folders in DATA; goes on where it
# was interrupted, and takes finished results as they are (rm -r results/baseline to measure anew).
reports: $(VENV)/.installed
	@test -d "$(DATA)/scifact" -a -d "$(DATA)/cranfield" || { echo "make reports DATA=folder, which holds scifact and cranfield in BEIR's layout" >&2; exit 2; }
	set -e; for collection in numpydoc "$(DATA)/scifact" "$(DATA)/cranfield"; do \
	    $(BIN)/python -m rerank_lab.eval --config experiments/baseline.toml --dataset "$$collection" --out "results/baseline/$$(basename "$$collection")" --resume; \
	done
	test -f results/baseline/bench.json || { $(BIN)/python -m rerank_kernels.bench --device cpu --json >results/baseline/bench.tmp && mv results/baseline/bench.tmp results/baseline/bench.json; }
	$(BIN)/python -m rerank_lab.report results/baseline/numpydoc results/baseline/scifact results/baseline/cranfield \
	    --bench results/baseline/bench.json --quote numpydoc --out reports/baseline \
	    --command 'make reports DATA=folder'
	for name in numpydoc scifact cranfield; do cp results/baseline/$$name/results.json reports/baseline/$$name.json; done

# The v3 API on http://127.0.0.1:8000; ARGS="--port 9000" for another port, and so on.
serve: $(VENV)/.installed
	$(BIN)/python -m rerank_lab.server $(ARGS)

# Files go in the order of tests/conftest.py, the longest first. A worker a core, each with one thread: kernels in Triton's interpreter and servers keep no more busy.
test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Full collections, long fuzzing, other versions.
test-slow: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[offline,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
