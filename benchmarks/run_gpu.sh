#!/usr/bin/env bash
# GPU tests, then benchmarks, on a CUDA machine. Wrong kernels are not worth timing: the benchmarks wait for the tests.
# PYTHON: the interpreter. OUT: where results go. BUDGET: seconds in all; what it cuts off is the least valuable.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
BUDGET=${BUDGET:-470}

gpu=$("$PYTHON" - <<'PY'
import re
try:
    import torch
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
except ImportError:
    name = ""
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
PY
)
if [ -z "$gpu" ]; then
  echo "make gpu: no CUDA device that PyTorch can use on this machine; nothing was tested or measured" >&2
  exit 1
fi

OUT=${OUT:-benchmarks/results/$gpu}
mkdir -p "$OUT"
left() { echo $((BUDGET - SECONDS)); }

"$PYTHON" -m fastmae env | tee "$OUT/environment.txt"

# Nearly all the time of the tests is compilation, which several processes share out among the cores.
workers=()
if "$PYTHON" -c "import xdist" 2>/dev/null; then workers=(-n 8); fi

echo "== GPU tests"
if ! timeout --signal=INT --kill-after=20 "$(left)" "$PYTHON" -m pytest tests -m gpu -q ${workers[@]+"${workers[@]}"} --junit-xml="$OUT/tests.xml"; then
  echo "make gpu: the GPU tests did not pass (or none ran, or they took over $BUDGET s): no benchmarks" >&2
  exit 1
fi

# Most valuable first: the whole step, then the ops by their share of it, then whatever else there is.
first=(step model attention masked_patch_mse restore_tokens gather_patches gather_tokens masking)
files=()
for stem in "${first[@]}"; do [ -f "benchmarks/bench_$stem.py" ] && files+=("benchmarks/bench_$stem.py"); done
for file in benchmarks/bench_*.py; do
  [ -f "$file" ] && [[ " ${files[*]-} " != *" $file "* ]] && files+=("$file")
done
if [ ${#files[@]} -eq 0 ]; then
  echo "make gpu: there is no benchmarks/bench_*.py" >&2
  exit 1
fi

failed=()
for file in "${files[@]}"; do
  name=$(basename "$file" .py)
  if [ "$(left)" -lt 15 ]; then
    echo "== $name: left out, $SECONDS of $BUDGET s are gone"
    failed+=("$name")
    continue
  fi
  echo "== $name ($(left) s left)"
  rm -f "$OUT/$name.json"
  timeout --signal=INT --kill-after=20 "$(left)" "$PYTHON" -m pytest "$file" -q --benchmark-json="$OUT/$name.json" || failed+=("$name")
done
echo "== results in $OUT after $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
  echo "make gpu: not complete: ${failed[*]}" >&2
  exit 1
fi
