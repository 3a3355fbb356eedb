# make sample   draw pictures with the bundled model      PROMPT="…" N=16 SEED=3 OUT=folder
# make test     lint, then all tests                      JOBS=2 ARGS="-k masks"
# make lint     ruff and mypy        make format   let ruff rewrite the code
# make bench    the benchmark suite  make sanitize memcheck and racecheck on a GPU
# make clean    remove what was built; the virtual environment stays
#
# PYTHON=python3.12   the Python to build .venv with (3.11 or newer)
# TORCH_INDEX=URL     where to take torch from if .venv has none yet. The default on Linux is a CUDA build of some GB; the
#                     address of the CPU builds stands on PyTorch's "Get Started" page.

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a penguin wearing a yellow hat and a red shirt
N ?= 8
# What suits the bundled model: examples/scenes/README.md has the measurement.
SAMPLING ?= --temperature 0.6 --top-p 0.95
SEED ?= 0
OUT ?= out
JOBS ?= 2
ARGS ?=
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
CHECKED := dalle_fast kernels examples bench tests setup.py

.PHONY: sample test lint format bench sanitize clean
.DELETE_ON_ERROR:

sample: $(VENV)/.installed
	$(BIN)/dalle-fast sample "$(PROMPT)" -n $(N) --seed $(SEED) --out "$(OUT)" $(SAMPLING)

test: lint
	$(BIN)/pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check $(wildcard $(CHECKED))
	$(BIN)/ruff format --check $(wildcard $(CHECKED))
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix $(wildcard $(CHECKED))
	$(BIN)/ruff format $(wildcard $(CHECKED))

bench: $(VENV)/.installed-test
	$(BIN)/pytest bench --benchmark-only $(ARGS)

sanitize: $(VENV)/.installed-test
	@command -v compute-sanitizer > /dev/null || { echo "make: compute-sanitizer not found; it is part of the CUDA toolkit"; exit 1; }
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/pytest -m gpu $(ARGS)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/pytest -m gpu $(ARGS)

clean:
	rm -rf build dist dalle_fast.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f dalle_fast/_C.*.so dalle_fast/_build_info.json $(VENV)/.installed $(VENV)/.installed-test
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "make: $(PYTHON) not found; on Debian or Ubuntu: apt install python3 python3-venv"; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  "make: $(PYTHON) is Python %d.%d, 3.11 or newer is needed: make PYTHON=python3.12" % v[:2])'
	@"$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "make: $(PYTHON) has no venv module; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# A torch that is there already is kept, whatever its version; otherwise the pinned one is fetched.
define install_torch
@have=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))' 2> /dev/null); \
pin=$$(sed -n 's/^torch==//p' constraints.txt); \
case "$$have" in \
  "" | $$pin | $$pin+*) cp constraints.txt $(VENV)/constraints.txt ;; \
  *) echo "keeping torch $$have"; \
     sed "s/^torch==.*/torch==$$have/; /^triton==/d" constraints.txt > $(VENV)/constraints.txt ;; \
esac; \
test -n "$$have" || { \
  test -n "$(TORCH_INDEX)" || \
    echo "Fetching torch. Its default build may be some GB; TORCH_INDEX in the Makefile leads to a smaller one."; \
  $(PIP) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") torch; }
endef

$(VENV)/.installed: $(BUILD_INPUTS) | $(BIN)/python
	$(install_torch)
	$(PIP) -q -e .
	@touch $@

$(VENV)/.installed-test: $(BUILD_INPUTS) | $(BIN)/python
	$(install_torch)
	$(PIP) -q -e ".[test]"
	$(PIP) -q --no-deps -r tests/peers.txt
	@touch $@ $(VENV)/.installed
