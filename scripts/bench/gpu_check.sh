#!/usr/bin/env bash
# Check kernels and tables on a machine with a GPU, torch, triton and pytest; then measure (MEASURE=0: do not).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
"$python" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "gpu_check: no GPU at hand (torch.cuda.is_available() is False)")'
"$python" -m pytest -q -m "slow or not slow" tests/kernels tests/embedding/test_gpu_tables.py
[ "${MEASURE:-1}" = 0 ] && exit
"$python" scripts/bench/gpu_tables.py
"$python" scripts/bench/gpu_deepfm.py
