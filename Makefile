# Two commands do everything on a machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
SHARE := $(if $(SEED),--share-seed $(SEED))

.PHONY: demo demo-style test test-all faults lint docs site notebooks zoo bench clean

demo: $(STAMP)  ## tune a ViT pretrained on emoji to handwritten digits, by six methods and three seeds; a table, a plot, examples
	$(BIN)/mmpeft compare -c vision/demo --out runs/demo

demo-style: $(STAMP)  ## tune a pretrained text-to-image UNet to OpenMoji from 64 drawings; grids before and after
	$(BIN)/mmpeft fit -c diffusion/demo_style
	$(BIN)/mmpeft test -c diffusion/demo_style --ckpt_path last

test: lint  ## everything that CI checks: of the matrix the share of the day, which SEED=<number> repeats
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q -m "not slow and not gpu" $(SHARE)

test-all: lint  ## the same with every cell of the matrix, and what takes minutes
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q -m "not gpu" --share-seed all

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.support.typed
	$(BIN)/lint-imports

faults: $(STAMP)  ## damaged files, killed writers and writers side by side, ten times as many as in `test`
	MMPEFT_MUTATIONS=2000 $(BIN)/python -m pytest -n $(WORKERS) -q tests/fuzz
	MMPEFT_SAVES=200 MMPEFT_KILLS=200 $(BIN)/python -m pytest -n $(WORKERS) -q tests/unit/test_files.py

docs: $(STAMP)  ## regenerate the tables in docs/, and the stubs of the public names
	$(BIN)/python -m tests.support.stubs
	$(BIN)/python -m tests.matrix.table
	$(BIN)/python -m tests.compat.table

site: $(STAMP)  ## the documentation as a site in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(STAMP)  ## run the notebooks in docs/notebooks and keep what they print and draw
	$(BIN)/python -m tests.docs.notebooks

zoo: $(STAMP)  ## judge every model of the libraries, those in outputs/zoo already left out, and write docs/zoo.md
	$(BIN)/python -m tests.zoo.run --jobs $(WORKERS)
	$(BIN)/python -m tests.zoo.table

bench: $(STAMP)  ## step time, memory and call cost beside HF PEFT
	$(BIN)/python benchmarks/beside_peft.py
	$(BIN)/python benchmarks/liveness.py

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -e ".[all,dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
