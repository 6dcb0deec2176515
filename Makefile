# Two commands are all a newcomer needs: `make demo` and `make test`. Both build .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Three on two cores: tests of several processes wait for each other half of the time.
WORKERS ?= 3
ZERO := .venv-zero/bin
ZERO_STAMP := .venv-zero/.installed
QUANTIZERS := .venv-quantizers/bin
QUANTIZERS_STAMP := .venv-quantizers/.installed
LLMC := .venv-llm-compressor/bin
LLMC_STAMP := .venv-llm-compressor/.installed
KRONFLUENCE := .venv-kronfluence/bin
KRONFLUENCE_STAMP := .venv-kronfluence/.installed
PEERS := .venv-peers/bin
PEERS_STAMP := .venv-peers/.installed
OLDER_STAMP := .cache/invarlock-0.2.0/.installed
DEVICE ?= cpu

.PHONY: demo test test-slow test-faults drill-table test-faults-slow test-zero test-quantizers test-llm-compressor test-kronfluence test-browser recipes docs lint format benchmark benchmark-distributed benchmark-coverage benchmark-curvature benchmark-factors benchmark-detection benchmark-detection-peers benchmark-speed clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "weightproof needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c 'import torch; print("installed, torch", torch.__version__)'
	@touch $@

demo: $(STAMP)            ## train a small model under guard, keep INT8, roll INT2 back
	$(BIN)/weightproof demo

test: $(STAMP)            ## every test that fits in minutes
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow'

test-slow: $(STAMP)       ## the long ones: more seeds, longer training; writes tests/slow_last_run.txt
	mkdir -p .cache
	$(BIN)/python -m pytest -m slow -v --no-header > .cache/slow_run.txt || { cat .cache/slow_run.txt; exit 1; }
	cp .cache/slow_run.txt tests/slow_last_run.txt && tail -n 1 tests/slow_last_run.txt

test-faults: $(STAMP)     ## snapshots on disk: 1,000 kills, lost power, flipped bits; writes tests/faults/last_run.txt
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python tests/faults/snapshot_faults.py --write

drill-table: $(STAMP)     ## every fault of training, harmful and mild, in two processes; writes tests/faults/strengths.txt
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support:. $(BIN)/python tests/faults/strengths.py --write

test-faults-slow: $(STAMP) ## 50 guarded runs in several processes, a random fault at a random time in each: minutes
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python tests/distributed/fault_storm.py --write

$(ZERO_STAMP): pyproject.toml constraints.txt tests/zero/constraints.txt
	test -x $(ZERO)/python || $(PYTHON) -m venv .venv-zero
	$(ZERO)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(ZERO)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c tests/zero/constraints.txt -e '.[dev]' deepspeed
	@touch $@

test-zero: $(ZERO_STAMP)  ## DeepSpeed ZeRO-1/2/3 in two processes; needs a C++ compiler, which DeepSpeed calls once
	PATH="$(CURDIR)/$(ZERO):$$PATH" $(ZERO)/python -m pytest tests/zero

$(QUANTIZERS_STAMP): pyproject.toml constraints.txt tests/quantizers/constraints.txt
	test -x $(QUANTIZERS)/python || $(PYTHON) -m venv .venv-quantizers
	$(QUANTIZERS)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(QUANTIZERS)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c tests/quantizers/constraints.txt -e '.[dev,quantization]'
	@touch $@

test-quantizers: $(QUANTIZERS_STAMP) ## torchao, bitsandbytes, quanto, HQQ, compressed-tensors on trained models: two minutes
	OMP_NUM_THREADS=1 $(QUANTIZERS)/python -m pytest tests/quantizers

# llm-compressor pins an older transformers and an older huggingface_hub: an environment without the pins of those two.
$(LLMC_STAMP): pyproject.toml constraints.txt tests/llm_compressor/constraints.txt
	test -x $(LLMC)/python || $(PYTHON) -m venv .venv-llm-compressor
	grep -vE '^(transformers|huggingface_hub)==' constraints.txt > .venv-llm-compressor/constraints.txt
	$(LLMC)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(LLMC)/python -m pip install --quiet --disable-pip-version-check -c .venv-llm-compressor/constraints.txt -c tests/llm_compressor/constraints.txt -e '.[dev]' llmcompressor
	@touch $@

test-llm-compressor: $(LLMC_STAMP) ## llm-compressor in memory, beside the older transformers that it asks for
	OMP_NUM_THREADS=1 $(LLMC)/python -m pytest tests/llm_compressor

# kronfluence asks for torchvision, which it uses nowhere: without dependencies, so that torch stays what it is.
$(KRONFLUENCE_STAMP): pyproject.toml constraints.txt tests/kronfluence/constraints.txt
	test -x $(KRONFLUENCE)/python || $(PYTHON) -m venv .venv-kronfluence
	$(KRONFLUENCE)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(KRONFLUENCE)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(KRONFLUENCE)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/kronfluence/constraints.txt
	@touch $@

test-kronfluence: $(KRONFLUENCE_STAMP) ## factors against those of kronfluence, and folders that it wrote; half a minute
	OMP_NUM_THREADS=1 $(KRONFLUENCE)/python -m pytest tests/kronfluence

# invarlock 0.12.1 declares Python 3.12, for one file that neither its guards nor its runner of guards import: without
# dependencies, so that torch stays what it is (what it needs, the project has). weightwatcher names no versions.
$(PEERS_STAMP): pyproject.toml constraints.txt benchmarks/detection/peers-constraints.txt
	test -x $(PEERS)/python || $(PYTHON) -m venv .venv-peers
	$(PEERS)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PEERS)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c benchmarks/detection/peers-constraints.txt -e '.[dev]' powerlaw scikit-learn matplotlib-inline
	$(PEERS)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python invarlock==0.12.1 weightwatcher==0.7.7
	@touch $@

# The last invarlock whose guard rmt decomposes weights; the same reasons as above, beside the newer one in a folder.
$(OLDER_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python --upgrade --target .cache/invarlock-0.2.0 invarlock==0.2.0
	@touch $@

recipes: $(STAMP)         ## every shipped recipe on the demo model, its certificates verified; writes tests/recipes/last_run.txt
	$(BIN)/python tests/recipes/run_all.py --write

test-browser: $(STAMP)    ## the HTML report in headless Chromium (which must be on PATH), with screenshots in .cache
	$(BIN)/python -m pytest tests/browser

docs: $(STAMP)            ## the documentation site, strictly, into .cache/site (tests build it, too)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(STAMP)            ## ruff, pyright, import-linter
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(STAMP)       ## speed ratios measured in one run, one thread
	$(BIN)/python benchmarks/speed.py

benchmark-distributed: $(STAMP) ## what many processes save and send, two pinned cores
	$(BIN)/python benchmarks/distributed.py

benchmark-coverage: $(STAMP) ## how often the loss guard's intervals hold the truth; writes docs/coverage.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py --write

benchmark-factors: $(KRONFLUENCE_STAMP) ## fitting factors against a training step and kronfluence; writes benchmarks/factors.json
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(KRONFLUENCE)/python benchmarks/factors.py --write

benchmark-curvature: $(STAMP) ## loss changes foreseen against measured, plans by them; writes tables of docs/kfac.md and docs/planner.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/curvature.py --write
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/equal_size.py --write

benchmark-detection: $(STAMP) ## what is found, flagged for nothing and missed, of some 2,400 edits; resumable; writes docs/detection.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/detection/run.py --jobs 2

benchmark-detection-peers: $(PEERS_STAMP) ## invarlock and weightwatcher on every edit of the detection benchmark: hours; resumable
	OMP_NUM_THREADS=1 $(PEERS)/python benchmarks/detection/peers.py

# A peer that cannot be installed is a row that says "not run".
benchmark-speed: $(STAMP) ## seconds and memory beside other tools, one thread, one run: a quarter of an hour; resumable
	-$(MAKE) --no-print-directory $(PEERS_STAMP)
	-$(MAKE) --no-print-directory $(OLDER_STAMP)
	$(BIN)/python benchmarks/speed_peers.py --device $(DEVICE)

clean:
	rm -rf .venv .venv-zero .venv-quantizers .venv-llm-compressor .venv-kronfluence .venv-peers .cache weightproof-demo guarded-quantization
