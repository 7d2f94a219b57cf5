#!/bin/bash
# Compile every Triton kernel of the linears and of the decoder by the oldest Triton that pyproject.toml allows, for all
# GPUs they are meant for; no GPU is needed: bash tools/old_triton.sh [pytest's options]. From the repository's root.
set -eu
python="${PYTHON:-.venv/bin/python}"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
oldest=$(grep -o 'triton>=[0-9.]*' pyproject.toml | head -1 | cut -d= -f2)
"$python" -m pip install --quiet --no-deps --target "$folder" "triton==$oldest.*"
export PYTHONPATH="$folder:src" TRITON_CACHE_DIR="$folder/cache"
"$python" -c 'import triton; print("Triton", triton.__version__)'
"$python" -m pytest tests/kernels/triton/test_triton_compile.py tests/runtime/gpu/test_compile_decoder.py -m slow -q \
  -p no:cacheprovider "$@"
