#!/usr/bin/env bash
# Create .venv and install the pinned stack and this project into it. What is already there is skipped; an
# interrupted installation is repaired by running this again. docs/install.md explains the variables:
#   TESSERA_PYTHON       interpreter to build the environment from          (default: the first suitable one on PATH)
#   TESSERA_VENV         folder of the environment                          (default: .venv)
#   TESSERA_STACK        cpu | cuda                                         (default: cuda where a driver is found)
#   TESSERA_TORCH_INDEX  package index with the wanted torch build, used beside those that pip is configured with
#   TESSERA_BUILD        0 = do not compile the kernels, require = fail without them
# Options: --rebuild  install the project and compile its kernels again even if nothing has changed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

rebuild=no
for option in "$@"; do
  case "$option" in
    --rebuild) rebuild=yes ;;
    *) die "unknown option $option (expected --rebuild)" ;;
  esac
done

venv=${TESSERA_VENV:-.venv}
python=$venv/bin/python
busy=$venv/.tessera-installing         # there while packages are being written
packages_stamp=$venv/.tessera-packages
project_stamp=$venv/.tessera-project
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONNOUSERSITE=1
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX

suitable() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }
hash_of() { "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'; }

find_python() {
  local candidate
  if [ -n "${TESSERA_PYTHON:-}" ]; then
    suitable "$TESSERA_PYTHON" || die "TESSERA_PYTHON=$TESSERA_PYTHON is no working Python 3.10, 3.11 or 3.12"
    base_python=$TESSERA_PYTHON
    return
  fi
  for candidate in python3 python3.12 python3.11 python3.10 /usr/bin/python3; do
    if suitable "$candidate"; then base_python=$candidate; return; fi
  done
  die "no Python 3.10, 3.11 or 3.12 found (python3 is $(python3 --version 2>&1 || true));" \
    "install one or set TESSERA_PYTHON to its path"
}

create_environment() {
  find_python
  say "creating $venv with $("$base_python" --version)"
  "$base_python" -m venv --clear "$venv" >"$log" 2>&1 ||
    die "$base_python cannot create environments ($(grep -m1 . "$log" || true));" \
      "install its venv module (Debian, Ubuntu: apt-get install python3-venv) or set TESSERA_PYTHON"
}

ensure_environment() {
  if [ -e "$busy" ]; then
    say "the last installation into $venv was interrupted; starting it afresh"
    create_environment
  elif "$python" -m pip --version >/dev/null 2>&1; then
    suitable "$python" || die "$venv holds $("$python" --version), expected 3.10 to 3.12; remove it or set TESSERA_VENV"
  elif [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    die "$venv is not a virtual environment; move it away or set TESSERA_VENV"
  else
    create_environment
  fi
}

detect_stack() {
  case "${TESSERA_STACK:-}" in
    cpu | cuda) stack=$TESSERA_STACK ;;
    "") if nvidia-smi -L 2>/dev/null | grep -q GPU || [ -e /proc/driver/nvidia/version ]; then stack=cuda; else stack=cpu; fi ;;
    *) die "TESSERA_STACK=$TESSERA_STACK, expected cpu or cuda" ;;
  esac
}

installed_files() { find "$venv"/lib*/python*/site-packages -maxdepth 1 2>/dev/null | sort; }

# pip downloads everything before it installs anything. After a failed download the environment is as before;
# after any other end the marker stays and the next run starts afresh.
pip_install() {
  local before
  before=$(installed_files)
  touch "$busy"
  if ! "$python" -m pip install "${quiet[@]}" "$@"; then
    [ "$before" != "$(installed_files)" ] || rm -f "$busy"
    die "pip install $* failed; see docs/install.md"
  fi
  rm -f "$busy"
}

has() { "$python" -c 'import importlib.metadata as m, sys; m.version(sys.argv[1])' "$1" >/dev/null 2>&1; }

install_packages() {
  local torch extra=() wrong
  torch=$(grep '^torch==' requirements/torch.txt)
  [ -z "${TESSERA_TORCH_INDEX:-}" ] || extra=(--extra-index-url "$TESSERA_TORCH_INDEX")
  # A CPU wheel counts as newer than the plain version and would be taken where both are offered.
  [ "$stack" = cpu ] || torch="$torch,!=${torch#torch==}+cpu"
  say "installing $torch and its dependencies"
  pip_install "${extra[@]}" -c requirements/base.txt "$torch"
  # Both fbgemm builds write the same files: take both away before the right one goes in.
  wrong=fbgemm-gpu
  [ "$stack" = cpu ] || wrong=fbgemm-gpu-cpu
  if has "$wrong"; then
    say "removing $wrong"
    touch "$busy"
    "$python" -m pip uninstall -qq -y fbgemm-gpu fbgemm-gpu-cpu
    rm -f "$busy"
  fi
  say "installing the packages of requirements/$stack.txt"
  pip_install --no-deps -r requirements/build.txt
  pip_install --no-deps --no-build-isolation --use-pep517 -r "requirements/$stack.txt" -r requirements/test.txt
}

main() {
  local key compiler
  log=$(mktemp "${TMPDIR:-/tmp}/tessera-setup.XXXXXX")
  trap 'rm -f "$log"' EXIT
  quiet=(-q)
  [ ! -t 1 ] || quiet=()
  detect_stack
  ensure_environment

  key=$( (echo "$stack"; cksum requirements/*.txt) | hash_of)
  if [ "$(cat "$packages_stamp" 2>/dev/null)" != "$key" ]; then
    rm -f "$packages_stamp" "$project_stamp"
    install_packages
    echo "$key" >"$packages_stamp"
  fi

  # The folder and the compiler count too: a moved clone and a compiler installed later are both noticed.
  compiler=$(${CXX:-c++} --version 2>/dev/null || echo none)
  key=$( (echo "$key $PWD $compiler ${TESSERA_BUILD:-}"; cksum pyproject.toml setup.py kernels/csrc/*) | hash_of)
  if [ "$rebuild" = yes ] || [ "$(cat "$project_stamp" 2>/dev/null)" != "$key" ] || [ ! -e kernels/_build.json ]; then
    say "installing tessera-ctr and compiling its kernels"
    rm -f "$project_stamp"
    # Remains of a killed installation have no list of files, and pip would refuse to replace them.
    rm -rf "$venv"/lib/python*/site-packages/{tessera_ctr-*.dist-info,__editable__*tessera_ctr*}
    # pip shows what a build says only when it fails; the doctor below tells whether the kernels were compiled.
    "$python" -m pip install -q --no-build-isolation --no-deps -e . || die "pip install -e . failed; see docs/install.md"
    "$python" scripts/doctor.py --quick
    echo "$key" >"$project_stamp"
  fi
}

main
