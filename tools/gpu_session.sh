#!/bin/bash
# Everything about the GPU decoder that needs a GPU: bash tools/gpu_session.sh MODEL (a Transformers folder, fp16).
# From the repository's root; about six minutes on an H200, most of it compiling. Scratch goes to $TMPDIR.
set -u
export PYTHONPATH=src:tests TMPDIR="${TMPDIR:-/dev/shm}"
timeout 300 python3 -m pytest tests/runtime/gpu tests/kernels/triton -q -p no:cacheprovider 2>&1 | tail -15
timeout 200 python3 benchmarks/gpu_real_model.py "$1"
timeout 60 python3 benchmarks/gpu_attention.py
for way in "" --apart; do
  timeout 90 python3 benchmarks/gpu_decode.py --folder "$TMPDIR/mistral" $way
done
timeout 60 python3 benchmarks/gpu_opening.py "$TMPDIR/mistral"
timeout 60 python3 benchmarks/gpu_decode.py --folder "$TMPDIR/mistral_act" --act-order --quick --batches --prompts
for kind in "3 128" "8 128" "4 32"; do
  set -- "$1" $kind
  timeout 60 python3 benchmarks/gpu_decode.py --bits "$2" --group "$3" --quick --batches --prompts
done
timeout 60 python3 benchmarks/prompt_lookup.py "$TMPDIR/real_model" --device cuda
