#!/bin/bash
# Measure deepctr-torch 0.3.0 in an environment of its own, beside our figures of scripts/bench/models.py and scripts/sweep.py.
# Usage: scripts/bench/peers/deepctr_torch.sh [folder of the environment] [speed|accuracy] [arguments of that script]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
environment=${1:-/tmp/deepctr-torch}
[ $# -gt 0 ] && shift
what=speed
if [ "${1:-}" = speed ] || [ "${1:-}" = accuracy ]; then
  what=$1
  shift
fi
if [ ! -x "$environment/bin/python" ]; then
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet torch==2.13.0
  # Its own requirements name TensorFlow, of which the models here need nothing.
  "$environment/bin/pip" install --quiet --no-deps deepctr-torch==0.3.0
  "$environment/bin/pip" install --quiet numpy pandas scikit-learn tqdm requests pyarrow
fi
exec "$environment/bin/python" "$here/deepctr_torch_$what.py" "$@"
