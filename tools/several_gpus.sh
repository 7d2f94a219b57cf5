#!/bin/bash
# Everything that needs two GPUs: bash tools/several_gpus.sh, from the repository's root, about eight minutes on two
# H200. Words after it go to the benchmark, so that --device cpu --source FOLDER tries the script without a GPU.
# NVLink multicast stays off: a program that uses it can put GPUs that others share out of service.
set -u
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONPATH="$PWD/src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" TMPDIR="${TMPDIR:-/dev/shm}"
timeout 150 python3 -m pytest tests/runtime/gpu/test_two_gpus.py tests/runtime/gpu/test_sharing.py -v -p no:cacheprovider
timeout 200 python3 benchmarks/several_gpus.py --only decode "$@"
timeout 200 python3 benchmarks/several_gpus.py --only quantise "$@"
QUANTMILL_SUMS=one-shot timeout 120 python3 benchmarks/several_gpus.py --only decode "$@"
