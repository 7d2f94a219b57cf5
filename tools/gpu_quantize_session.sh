#!/usr/bin/env bash
# Everything about quantising that only a GPU can tell: tools/gpu_quantize_session.sh TEXT [MODEL BLOCKS.npy TEST.npy]
# TEXT: some 1.2 MB to calibrate 7B shapes on, such as WikiText-2's validation part; MODEL and its tokens: the
# small real model, for the formats of factors. Run from the repository's root, with quantmill importable; about
# ten minutes on an H200, most telling first. Needs 60 GB of memory for files in SCRATCH (default /dev/shm).
set -u
text=$1
scratch=${SCRATCH:-/dev/shm}
source_folder=$scratch/quantmill-7b short_folder=$scratch/quantmill-7b-short
run() { echo "== $*"; timeout "${LIMIT:-120}" "$@" 2>&1 | tail -n "${LINES_KEPT:-25}"; }
whole() { run python3 benchmarks/gpu_quantize_whole.py "$text" --scratch "$scratch" "$@"; }
part() { run python3 benchmarks/gpu_quantize.py --layers 2 --scratch "$scratch" "$@"; }
four="--variant 4bit-128g --variant 4bit-32g --variant 8bit-128g --variant 8bit-32g"
LIMIT=240 run python3 -m pytest tests/quantize/test_cuda.py tests/quantize/test_states.py tests/quantize/triton -q -p no:cacheprovider -p no:benchmark
whole --source "$source_folder" $four
whole --source "$source_folder" --max-vram 16GB --max-ram 12GB --eval 16
whole --source "$short_folder" --layers 8 --preset best $four
whole --source "$short_folder" --preset best --max-vram 16GB --max-ram 12GB
whole --source "$short_folder" --seqlen 32768 --samples 8 --max-vram 80GB
LINES_KEPT=60 part --profile
LINES_KEPT=60 part --preset best --profile
[ $# -lt 4 ] || LIMIT=240 run python3 benchmarks/gpu_precision.py "$2" "$3" "$4"
rm -rf "$source_folder" "$short_folder"
