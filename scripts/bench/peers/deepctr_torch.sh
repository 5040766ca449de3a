#!/bin/bash
# Measure deepctr-torch 0.3.0 in an environment of its own, beside our figures of scripts/bench/models.py.
# Usage: scripts/bench/peers/deepctr_torch.sh [folder of the environment] [arguments of deepctr_torch_speed.py]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
environment=${1:-/tmp/deepctr-torch}
[ $# -gt 0 ] && shift
if [ ! -x "$environment/bin/python" ]; then
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet torch==2.13.0
  # Its own requirements name TensorFlow, of which the models here need nothing.
  "$environment/bin/pip" install --quiet --no-deps deepctr-torch==0.3.0
  "$environment/bin/pip" install --quiet numpy pandas scikit-learn tqdm requests
fi
exec "$environment/bin/python" "$here/deepctr_torch_speed.py" "$@"
