#!/usr/bin/env bash
# Check the types of all packages by mypy, as pyproject.toml says. The folder `ctr` is imported as `tessera.ctr`:
# mypy finds it there through a folder of links.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p build/typecheck/tessera
for mark in */py.typed; do
  folder=$(dirname "$mark")
  ln -sfn "../../../$folder" "build/typecheck/tessera/$folder"
done
exec "${TESSERA_VENV:-.venv}/bin/python" -m mypy -p tessera "$@"
