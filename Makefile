# Every target uses the Python on the PATH: activate a virtual environment with `pip install -c constraints.txt -e ".[dev]"`.
PYTHON ?= python

.PHONY: help test test-train test-rest test-interpreter lint format bench bench-cpu bench-data report gpu release-check soak

help:
	@echo "make test           all tests; those of the ops in plain PyTorch and in Triton's interpreter"
	@echo "make lint           ruff, style and format"
	@echo "make format         let ruff fix what it can"
	@echo "make bench          the benchmarks, on this machine"
	@echo "make bench-cpu      the results that are committed for a CPU, into CPU_RESULTS (about fifteen minutes)"
	@echo "make bench-data     the loaders of a CPU, into CPU_RESULTS; IMAGES=FOLDER of JPEGs (about three minutes)"
	@echo "make report         write all generated tables from the committed results"
	@echo "make gpu            on a CUDA machine: tests and benchmarks, in nine minutes, into OUT; FLAGS=--second for the rest"
	@echo "make release-check  the README's first command in a fresh virtual environment, whole, with its promises checked"
	@echo "make soak           the slow tests; kill and resume runs KILLS (default 50) times, into SOAK_RESULTS: they must end the same"

# Three processes, two at a time: on two cores they take as long together as the slowest takes alone. Triton decides when
# a kernel is defined whether it is interpreted, so the tests of the ops run again in a process where kernels are.
test:
	$(MAKE) -k -j2 --output-sync=target test-train test-interpreter test-rest

# Threads of PyTorch's own would mostly wait for those of the other process, at full load.
test-train test-rest test-interpreter: export OMP_NUM_THREADS = 1

test-train:
	$(PYTHON) -m pytest tests/train tests/integration

test-rest:
	$(PYTHON) -m pytest tests --ignore tests/train --ignore tests/integration

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

# What is committed about a CPU: one thread, since two compete for caches and with whatever else runs.
CPU_RESULTS ?= benchmarks/results/cpu
CPU_BENCH = $(PYTHON) -m pytest -q --threads 1 --precision bf16
bench-cpu:
	mkdir -p $(CPU_RESULTS)
	$(CPU_BENCH) benchmarks/bench_attention.py --results $(CPU_RESULTS)/attention.jsonl
	$(CPU_BENCH) benchmarks --compile --results $(CPU_RESULTS)/ops.jsonl \
	  $(foreach name,step attention data quick ceilings,--ignore benchmarks/bench_$(name).py)
	$(CPU_BENCH) benchmarks/bench_step.py --changes --compile --model small-32px:128 --rounds 5 \
	  --results $(CPU_RESULTS)/step-small.jsonl
	$(CPU_BENCH) benchmarks/bench_step.py --changes --compile --model base:8 --rounds 5 \
	  --results $(CPU_RESULTS)/step-base.jsonl
	$(PYTHON) benchmarks/report.py collect $(CPU_RESULTS)/*.jsonl

# One thread of PyTorch's, since the loaders have threads of their own, and all cores for each of them in turn.
bench-data:
	mkdir -p $(CPU_RESULTS)
	$(PYTHON) -m pytest benchmarks/bench_data.py -q --threads 1 --rounds 7 $(if $(IMAGES),--images $(IMAGES)) \
	  --results $(CPU_RESULTS)/data.jsonl
	$(PYTHON) benchmarks/report.py collect $(CPU_RESULTS)/data.jsonl

report:
	$(PYTHON) benchmarks/report.py write

gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(OUT),--out $(OUT)) $(FLAGS)

release-check:
	@OUT="$(OUT)" bash .ci/release-check

# SOAK_RESULTS, a folder of benchmarks/results, takes the result of the kills; make report puts it into docs/running.md.
KILLS ?= 50
SOAK_RESULTS ?=
soak:
	$(PYTHON) -m pytest tests -m slow
	PYTHONPATH=.:tests/helpers:$(PYTHONPATH) $(PYTHON) tests/soak/soak.py --kills $(KILLS) $(if $(SOAK_RESULTS),--out $(SOAK_RESULTS)/soak.json)
