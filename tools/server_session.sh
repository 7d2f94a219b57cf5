#!/bin/bash
# Everything about the engine and the server that needs a GPU: bash tools/server_session.sh
# From the repository's root; about three minutes on an H200. Scratch goes to $TMPDIR.
set -u
export PYTHONPATH="$PWD/src:$PWD/tests:$PWD/benchmarks:${PYTHONPATH:-}" TMPDIR="${TMPDIR:-/dev/shm}" HF_HUB_OFFLINE=1
folder="$TMPDIR/mistral_served"
python3 -c "import quantmill.serve.app, uvicorn, llguidance, prometheus_client" || exit 1
timeout 60 python3 -m pytest tests/runtime/test_sampling.py -q -k cuda -p no:cacheprovider 2>&1 | tail -3
[ -f "$folder/tokenizer.json" ] || timeout 60 python3 - "$folder" <<'PY'
import pathlib, sys
import serve_load
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
serve_load.mistral(folder)
PY
cd benchmarks || exit 1
timeout 150 python3 serve_load.py "$folder" --device cuda --engine process thread --requests 256 \
  --longest-prompt 512 --longest-answer 256 --half 100 --alone 32 --log "$TMPDIR/served.log"
timeout 90 python3 engine_passes.py "$folder" --device cuda
