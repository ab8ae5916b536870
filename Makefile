# `make demo` and `make test` are all that is needed: each builds its own environment from the
# pinned versions in constraints.txt, with nothing but Python 3.11 and make on the machine.

PYTHON ?= python3.11
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

TEST := .venv-test/bin
DEMO := .venv-demo/bin

.PHONY: demo gallery sweep test test-slow lint bench clean

demo: .venv-demo/.done  ## train on real digits, log offline, draw the spectrum
	$(DEMO)/lightning-hessian demo --out demo_output

gallery: .venv-demo/.done  ## draw the figures of docs/gallery.md from a real run
	OMP_NUM_THREADS=1 $(DEMO)/python docs/make_gallery.py

sweep: .venv-demo/.done  ## train 24 networks on real digits, and one report over them (15 minutes)
	$(DEMO)/python examples/sweep/train.py --out sweep_output
	$(DEMO)/lightning-hessian report sweep_output --out sweep_output/report --no-cache \
		--monitor val_loss --monitor val_error --group optimizer --size num_parameters

test: .venv-test/.done lint  ## lint, type check, and all tests but the slow ones
	OMP_NUM_THREADS=1 $(TEST)/python -m pytest -m "not slow"

test-slow: .venv-test/.done  ## the tests that take minutes
	OMP_NUM_THREADS=1 $(TEST)/python -m pytest -m slow

lint: .venv-test/.done  ## ruff and mypy
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .
	$(TEST)/mypy

.venv-%/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/pip install --quiet --editable ".[$*]"
	touch $@

bench: .venv-test/.done  ## what a measurement costs, in gradients
	OMP_NUM_THREADS=1 $(TEST)/python benchmarks/cost.py

clean:  ## remove the environments and what was built
	rm -rf .venv-demo .venv-test build dist *.egg-info demo_output sweep_output
