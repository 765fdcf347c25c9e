# Every target uses the Python on the PATH: activate a virtual environment with `pip install -c constraints.txt -e ".[dev]"`.
PYTHON ?= python

.PHONY: help test test-plain test-interpreter lint format bench gpu release-check soak

help:
	@echo "make test           all tests; those of the ops in plain PyTorch and in Triton's interpreter"
	@echo "make lint           ruff, style and format"
	@echo "make format         let ruff mend what it can"
	@echo "make bench          the benchmarks, on this machine"
	@echo "make gpu            on a CUDA machine: GPU tests, then benchmarks into OUT (default benchmarks/results/<gpu>)"
	@echo "make release-check  the README's first command in a fresh virtual environment, whole, with its promises checked"
	@echo "make soak           kill and resume a training run KILLS (default 50) times; the weights must come out the same"

# One of the tests runs those of the ops again in Triton's interpreter, in a process of its own, because Triton decides
# when a kernel is defined whether it is interpreted.
test:
	$(PYTHON) -m pytest tests

test-plain:
	$(PYTHON) -m pytest tests --ignore tests/test_interpreter.py

test-interpreter:
	TRITON_INTERPRET=1 $(PYTHON) -m pytest tests -m ops

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench:
	$(PYTHON) -m pytest benchmarks

gpu:
	@PYTHON="$(PYTHON)" OUT="$(OUT)" bash benchmarks/run_gpu.sh

release-check:
	@OUT="$(OUT)" bash .ci/release-check

KILLS ?= 50
soak:
	$(PYTHON) tests/soak.py --kills $(KILLS)
