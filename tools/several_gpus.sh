#!/bin/bash
# Everything that needs two GPUs: bash tools/several_gpus.sh, from the repository's root, at most ten minutes on two
# H200. Words after it go to the benchmark, so that --device cpu --source FOLDER tries the script without a GPU.
# NVLink multicast stays off: a program that uses it can put GPUs that others share out of service.
# Ends with 1 where a part failed; the others run all the same.
set -u
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONPATH="$PWD/src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" TMPDIR="${TMPDIR:-/dev/shm}"
failed=0
part() {
    echo "== $1"
    shift
    timeout "$@" || { echo "failed with $?"; failed=1; }
}
part "decoding, sums through NCCL" 160 python3 benchmarks/several_gpus.py --only decode "$@"
part "quantising" 180 python3 benchmarks/several_gpus.py --only quantise "$@"
part "tests" 120 python3 -m pytest tests/runtime/gpu/test_two_gpus.py tests/runtime/gpu/test_sharing.py -v -p no:cacheprovider
export QUANTMILL_SUMS=one-shot
part "decoding, sums through memory that both see" 120 python3 benchmarks/several_gpus.py --only decode "$@"
exit $failed
