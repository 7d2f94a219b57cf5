#!/usr/bin/env bash
# Everything about quantising that only a GPU can tell: tools/gpu_quantize_session.sh MODEL BLOCKS.npy TEST.npy
# Run from the repository's root, with quantmill importable; about three minutes on an H200, most telling first.
set -u
model=$1 blocks=$2 test=$3
source_folder=/dev/shm/quantmill-7b
run() { echo "== $*"; timeout "${LIMIT:-90}" "$@" 2>&1 | tail -n "${LINES_KEPT:-25}"; }
four="--variant 4bit-128g --variant 4bit-32g --variant 8bit-128g --variant 8bit-32g"
LIMIT=240 run python3 -m pytest tests/quantize/test_cuda.py tests/quantize/test_states.py -q -p no:cacheprovider -p no:benchmark
LIMIT=240 run python3 -m pytest tests/quantize/triton -q -p no:cacheprovider -p no:benchmark
run python3 benchmarks/gpu_quantize.py --layers 2 --source "$source_folder"
run python3 benchmarks/gpu_quantize.py --source "$source_folder" $four
run python3 benchmarks/gpu_quantize.py --source "$source_folder" --preset best $four
LINES_KEPT=60 run python3 benchmarks/gpu_quantize.py --source "$source_folder" --profile
run python3 benchmarks/gpu_quantize.py --source "$source_folder" --max-vram 16e9 --max-ram 12e9
run python3 benchmarks/gpu_quantize.py --source "$source_folder" --preset best --max-vram 16e9 --max-ram 12e9
run python3 benchmarks/gpu_quantize.py --source "$source_folder" --seqlen 32768 --samples 16 --max-vram 80e9
LIMIT=240 run python3 benchmarks/gpu_precision.py "$model" "$blocks" "$test"
rm -rf "$source_folder"
