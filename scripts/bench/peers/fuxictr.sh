#!/bin/bash
# Measure FuxiCTR's DeepFM in an environment of its own, beside our figures of scripts/bench/defaults.py.
# Usage: scripts/bench/peers/fuxictr.sh ENVIRONMENT REPOSITORY [arguments of fuxictr_accuracy.py]
# REPOSITORY is a checkout of https://github.com/reczoo/FuxiCTR: what PyPI has comes without its models.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
environment=${1:?folder of the environment} repository=${2:?folder of FuxiCTR}
shift 2
if [ ! -x "$environment/bin/python" ]; then
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet torch==2.13.0
  "$environment/bin/pip" install --quiet numpy pandas scikit-learn tqdm pyarrow polars h5py PyYAML keras_preprocessing
fi
exec "$environment/bin/python" "$here/fuxictr_accuracy.py" --repository "$repository" "$@"
