#!/usr/bin/env bash
# On a CUDA machine: the tests on the GPU, then the forward and compress benchmarks. Writes benchmarks/results/<gpu>.json and prints
# its table. Needs torch >= 2.10, triton >= 3.4, numpy and pytest, nothing that is compiled here, and no network; what else is
# installed is compared with. `--dry-run` does everything but the GPU's part. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
tests=(tests/test_{gram,truncated_svd,project,compress,reconstruct,error_grams,lora_shrink,lora_expand,lora_forward}.py)

if [ "${1:-}" = --dry-run ]; then
    "$python" -m pytest --collect-only -qq "${tests[@]}" > /dev/null
else
    "$python" -m benchmarks.gpu --check
    "$python" -m pytest -q "${tests[@]}" -k "cuda and not ptxsim"
fi
"$python" -m benchmarks.gpu "$@"
