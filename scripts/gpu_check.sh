#!/bin/bash
# Does the GPU side build here, is it right, how fast is it: one run of less than nine minutes.
#
#   bash scripts/gpu_check.sh [FOLDER [STAGE...]]   results: FOLDER/gpu_check.json and gpu_check.md
#   bash scripts/gpu_check.sh --dry [FOLDER [STAGE...]]   the same, tiny and on the CPU
#
# Needs torch with CUDA, nvcc, ninja and pytest; neither DeepSpeed nor tokenizers. Uses
# flash-linear-attention, compute-sanitizer and ncu where they are. What is worth most comes first.
# Each stage has a limit of its own, none stops the next, none begins after DEADLINE seconds; the
# results are written anew after each, so that a run that is cut off leaves those of its stages. Those
# that found no time can be named for a second run, whose results join those already in FOLDER.
set -u
shopt -s globstar
cd "$(dirname "$0")/.."
dry=; [ "${1:-}" = --dry ] && { dry=--dry; shift; }
out=${1:-${OUT:-gpu_check}}; mkdir -p "$out"; out=$(cd "$out" && pwd)
export PYTHONPATH=src:tests PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
only=" ${*:2} "
DEADLINE=520
logs=$(mktemp -d)
[[ $only = "  " ]] && rm -f "$out"/gpu_check.{json,md}

stage() { # NAME LIMIT COMMAND...
  local name=$1 limit=$2 began=$SECONDS left=$((DEADLINE - SECONDS)) rc; shift 2
  # On a fresh machine others would compile in their own time, or under a sanitizer.
  [[ $only = "  " || $name = build || $only = *" $name "* ]] || return
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 5 ]; then rc=skipped; echo "no time is left" > "$logs/$name.log"
  elif ! command -v "$1" > /dev/null; then rc=skipped; echo "no $1 here" > "$logs/$name.log"
  # Interrupted, pytest still tells what failed.
  else timeout -s INT -k 10 "$limit" "$@" > "$logs/$name.log" 2>&1; rc=$?; fi
  printf '%s\t%s\t%s\n' "$name" "$rc" $((SECONDS - began)) >> "$logs/stages.tsv"
  echo "== $name: rc $rc, $((SECONDS - began)) s, at $SECONDS s"
  tail -n "${LINES_OF:-12}" "$logs/$name.log" | cut -c1-200
  "$python" scripts/bench/gpu_report.py "$logs" "$out"
}

steps() { # NAME LIMIT FLAGS...
  local name=$1 limit=$2; shift 2
  LINES_OF=40 stage "$name" "$limit" "$python" scripts/bench/gpu_steps.py $dry \
    --json "$logs/$name.json" --budget $((limit * 2 / 3)) "$@"
}

if [ -n "$dry" ]; then
  device=cpu devices=cpu wkv_shapes="1,64,2,64" seconds=0.05
  small="1x16" table6="1x16" large="1x32" repeats=1
else
  device=cuda devices="cpu cuda"
  wkv_shapes="8,4096,64,64 4,1024,40,64 1,4096,32,64 8,1,64,64" seconds=1
  small="4x512" table6="1x512" large="8x2048" repeats=5
fi

stage facts 20 bash -c 'nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm \
  --format=csv,noheader; python3 --version; true'
LINES_OF=40 stage build 150 "$python" scripts/dev/build_kernels.py $devices
stage tests 100 "$python" -m pytest -q -p no:cacheprovider --noconftest -o addopts= \
  --import-mode=importlib --tb=short --maxfail=20 -m "not slow" tests/**/test_*_gpu.py
for operator in wkv6 wkv7; do
  LINES_OF=40 stage $operator 60 "$python" scripts/bench/wkv.py --operator $operator \
    --device $device --dtypes bf16 --seconds $seconds --shapes $wkv_shapes \
    --json "$logs/$operator.json"
done
steps steps 90 --methods bone bat lora bat_col --shapes $small --repeats $repeats
steps table6 40 --methods lora bone bat --shapes $table6 --repeats $repeats
steps graphs 60 --methods bone --shapes $small $large --graphs 0 1 --repeats $repeats
steps profiles 50 --methods bone --shapes $small $large --repeats 3 --profile
stage memcheck 45 compute-sanitizer --tool memcheck --error-exitcode 9 --print-limit 4 \
  "$python" scripts/dev/wkv_small.py
stage racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 --print-limit 4 \
  "$python" scripts/dev/wkv_small.py
steps generation 50 --sizes 1.6b --methods bone --quant none nf4 --shapes $small --repeats 2 --generate
steps settings 60 --methods bone --grad_cp 0 2 --shapes $small --repeats 3
steps quantised 60 --methods bone --quant nf4 fp8 --shapes $small --repeats 3
steps fp8 40 --methods bone --quant fp8_compute --shapes $small $large --repeats 3
for operator in wkv6 wkv7; do
  for pass in forward backward; do  # by namespace: the sequential kernels have the same names
    LINES_OF=40 stage counters_${operator}_$pass 40 ncu --clock-control none -c 1 \
      --kernel-name-base demangled -k "regex:$operator::(chunk_)?${pass}_kernel" \
      --section SpeedOfLight --section Occupancy --section WarpStateStats \
      --section SchedulerStats "$python" scripts/bench/wkv.py --operator $operator \
      --device $device --dtypes bf16 --seconds 0.1 --shapes 8,4096,64,64
  done
done
steps sizes 60 --sizes 1.6b 2.9b 7b --methods bone --shapes $small --repeats 3

echo "the whole logs: $logs"
