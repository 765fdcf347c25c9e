#!/usr/bin/env bash
# GPU tests, then benchmarks, on a CUDA machine. Wrong kernels are not worth timing: the benchmarks wait for the tests.
# PYTHON: the interpreter. OUT: where results go. BUDGET: seconds in all; what it cuts off is the least valuable.
# ONLY: names from the plan below, to run no others. Needs no network and no git.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
BUDGET=${BUDGET:-470}
ONLY=${ONLY:-}

# Attention goes first, since "auto" picks by what it finds. Then the most valuable: the trainer from JPEGs on a disk
# against the model alone, with MFU and where the time goes; the whole step; the ops by their share of it; whatever else
# there is. Each line is a name, a file, and its arguments (pytest's for bench_*.py). The seconds are a guess for one
# H100 and 16 cores, compilation found in the cache: environment 8, tests 110, attention 40, compilation 90, the plan 630,
# together 880: what is cut off, ONLY runs in a second go. Images are cut from the embedded photographs.
# The large step: start 15, 16 competitors' models 10, their first steps 10, 5 rounds 20, compilation from the cache 35,
# memory and launches 10.
# A graph of 32 blocks takes the compiler about 50 s, so ViT-L in five modes of it (200 s) and its residual streams in
# bf16, compiled (100 s), come last, seldom reached in one go (ONLY="modes-large step-residual"); ViT-H is not
# compiled.
first="attention      bench_attention.py"
plan=(
  "end-to-end-large    end_to_end.py --recipe imagenet-vit-l --batch 256 --seconds 25" # 60
  "step-large          bench_step.py --model large --levers"   # 100
  "end-to-end-huge     end_to_end.py --recipe imagenet-vit-h --batch 128 --seconds 15" # 50
  "step-base           bench_step.py --model base"             # 45
  "modes               bench_modes.py --model base"            # 130
  "end-to-end-compiled end_to_end.py --recipe imagenet-vit-l --batch 256 --seconds 20 --train.compile blocks" # 90
  "step-huge           bench_step.py --model huge --no-compile" # 30
  "block               bench_block.py"                         # 20
  "norm_linear         bench_norm_linear.py"                   # 14
  "gelu_linear         bench_gelu_linear.py"                   # 12
  "masked_patch_mse    bench_masked_patch_mse.py"              # 14
  "restore_tokens      bench_restore_tokens.py"                # 10
  "gather_patches      bench_gather_patches.py"                # 10
  "gather_tokens       bench_gather_tokens.py"                 # 8
  "masking             bench_masking.py"                       # 7
  "data                bench_data.py --rounds 4 -k loader"     # 80
)
last=(
  "modes-large         bench_modes.py --model large"
  "step-residual       bench_step.py --model large --bf16-residual -k compile"
)

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

for file in benchmarks/bench_*.py; do
  file=$(basename "$file")
  [[ " $first ${plan[*]} " == *" $file "* ]] || plan+=("$(basename "${file#bench_}" .py) $file")
done
plan+=("${last[@]}")

OUT=${OUT:-benchmarks/results/$gpu}
mkdir -p "$OUT"
left() { echo $((BUDGET - SECONDS)); }
wanted() { [ -z "$ONLY" ] || [[ " $ONLY " == *" $1 "* ]]; }
# Runs pytest, in a time limit that pytest can end in good order.
limited() { timeout --signal=INT --kill-after=20 "$1" "$PYTHON" -m pytest "${@:2}"; }

"$PYTHON" -m fastmae env | tee "$OUT/environment.txt"

# Nearly all the time of the tests is compilation, which several processes share out among the cores.
workers=()
if "$PYTHON" -c "import xdist" 2>/dev/null; then workers=(-n 12); fi

echo "== GPU tests"
if ! limited "$(left)" tests -m gpu -q ${workers[@]+"${workers[@]}"} --junit-xml="$OUT/tests.xml"; then
  echo "make gpu: the GPU tests did not pass (or none ran, or they took over $BUDGET s): no benchmarks" >&2
  exit 1
fi

failed=()
# Runs one line of the plan.
measure() {
  local name file arguments
  read -r name file arguments <<<"$1"
  wanted "$name" || return 0
  if [ "$(left)" -lt 15 ]; then
    echo "== $name: left out, $SECONDS of $BUDGET s are gone"
    failed+=("$name")
    return 0
  fi
  echo "== $name ($(left) s left)"
  rm -f "$OUT/$name.json"
  # shellcheck disable=SC2086  # the arguments are words
  if [[ "$file" != bench_* ]]; then
    # As a module, so that fastmae is found where it is not installed.
    timeout --signal=INT --kill-after=20 "$(left)" "$PYTHON" -m "benchmarks.${file%.py}" "$OUT/$name.json" \
      ${arguments:-} || failed+=("$name")
    return 0
  fi
  # shellcheck disable=SC2086
  limited "$(left)" "benchmarks/$file" -q --benchmark-json="$OUT/$name.json" ${arguments:-} || failed+=("$name")
  # Single times are large and not worth keeping.
  if [ -f "$OUT/$name.json" ]; then "$PYTHON" benchmarks/report.py slim "$OUT/$name.json" || failed+=("$name"); fi
}

measure "$first"
if [ -f "$OUT/attention.json" ]; then
  # What was committed for other devices stays in the table; what was just measured is used by all that follows.
  tables=("$OUT/attention.json")
  for file in benchmarks/results/*/attention.json; do
    [ -f "$file" ] && [ ! "$file" -ef "$OUT/attention.json" ] && tables+=("$file")
  done
  "$PYTHON" benchmarks/choose_attention.py "${tables[@]}" || failed+=(choose_attention)
fi

# torch.compile keeps what it made on disk. Making it in several processes at once, untimed, takes a third of the time.
# Two of ViT-L at once fit into 80 GB. Whatever fails here is compiled, or fails again, where it is timed.
warm() { limited 120 "$@" -q --benchmark-disable >/dev/null 2>&1 || true; }
if [ -z "$ONLY" ] && [ ${#workers[@]} -gt 0 ] && [ "$(left)" -gt 300 ]; then
  echo "== compilation ($(left) s left)"
  for one in reference-compile fastmae-compile; do
    for model in large base; do
      warm benchmarks/bench_step.py --model "$model" -k "$one"
    done &
  done
  warm benchmarks --ignore benchmarks/bench_step.py --ignore benchmarks/bench_modes.py -k compile -n 8 &
  wait
fi

for line in "${plan[@]}"; do measure "$line"; done
echo "== results in $OUT after $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
  echo "make gpu: not complete: ${failed[*]}" >&2
  exit 1
fi
