"""setup.sh with a stand-in for Python and pip, setup.py in copies of the tree, and the pinned lists."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tessera.kernels import build_record

ROOT = Path(__file__).resolve().parents[2]
LISTS = sorted((ROOT / "requirements").glob("*.txt"))

# Stands for the base interpreter and for the one in the environment: creates "environments", notes what
# pip is asked to install, leaves a file in site-packages for fbgemm. STUB_FAIL makes pip end with an error
# when a word of its command matches; STUB_FAIL_LATE lets it write a file before.
STUB = """#!/bin/bash
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case "$*" in
  "-m venv "*)
    echo venv >>"$STUB_LOG"
    rm -rf "$4" && mkdir -p "$4/bin" "$4/lib/python3/site-packages"
    cp "${BASH_SOURCE[0]}" "$4/bin/python" && touch "$4/pyvenv.cfg" ;;
  "-m pip --version") ;;
  "-m pip "*)
    echo "${@:3}" >>"$STUB_LOG"
    for word in "$@"; do
      if [ -n "${STUB_FAIL:-}" ] && [[ $word == $STUB_FAIL ]]; then
        [ -z "${STUB_FAIL_LATE:-}" ] || touch "$here/../lib/python3/site-packages/half"
        exit 1
      fi
      case $word in
        */cuda.txt) touch "$here/../lib/python3/site-packages/fbgemm-gpu" ;;
        */cpu.txt) touch "$here/../lib/python3/site-packages/fbgemm-gpu-cpu" ;;
      esac
    done ;;
  "scripts/doctor.py "*) echo '{}' >kernels/_build.json ;;
  "-c import importlib.metadata"*) [ -e "$here/../lib/python3/site-packages/${@: -1}" ] ;;
  *) exec "$STUB_PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A copy of what the installation reads."""
    for name in ("scripts", "requirements", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__", "_C*.so", "_build.json")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def setup(project):
    """setup(**environment) -> (exit status, output, what the stand-in was asked for)."""
    stub, log = project / "stub", project / "log"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(*options, **changes):
        log.write_text("")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TESSERA_")}
        environment |= {"TESSERA_PYTHON": str(stub), "TESSERA_STACK": "cpu", "STUB_PYTHON": sys.executable}
        environment |= {"STUB_LOG": str(log), **changes}
        command = ["bash", str(project / "scripts" / "setup.sh"), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()

    return run


class TestSetupScript:
    def test_order_of_a_first_installation(self, setup):
        status, output, calls = setup()
        assert status == 0, output
        kinds = [re.sub(r"-q ", "", call) for call in calls]
        assert kinds == [
            "venv",
            "install -c requirements/base.txt torch==2.13.0",
            "install --no-deps -r requirements/build.txt",
            "install --no-deps --no-build-isolation --use-pep517 -r requirements/cpu.txt -r requirements/test.txt",
            "install --no-build-isolation --no-deps -e .",
        ]

    def test_nothing_is_done_twice(self, setup):
        setup()
        assert setup() == (0, "", [])

    def test_rebuild_installs_only_the_project(self, setup):
        setup()
        assert setup("--rebuild")[2] == ["install -q --no-build-isolation --no-deps -e ."]

    def test_changed_sources_are_compiled_again(self, setup, project):
        setup()
        (project / "kernels" / "csrc" / "new.cpp").touch()
        assert setup()[2] == ["install -q --no-build-isolation --no-deps -e ."]

    def test_changed_list_is_installed_without_a_new_environment(self, setup, project):
        setup()
        with (project / "requirements" / "test.txt").open("a") as file:
            file.write("another==1.0\n")
        calls = setup()[2]
        assert len(calls) == 4 and "venv" not in calls

    def test_torch_index_is_passed_on(self, setup):
        calls = setup(TESSERA_TORCH_INDEX="file:///wheels")[2]
        assert [call for call in calls if "file:///wheels" in call] == [calls[1]]

    def test_cuda_avoids_the_cpu_wheel_and_exchanges_fbgemm(self, setup):
        setup()
        calls = setup(TESSERA_STACK="cuda")[2]
        assert calls[0].endswith("torch==2.13.0,!=2.13.0+cpu")
        assert calls[1] == "uninstall -qq -y fbgemm-gpu fbgemm-gpu-cpu"
        assert "-r requirements/cuda.txt" in calls[3]

    def test_failed_download_keeps_the_environment(self, setup):
        status, output, _ = setup(STUB_FAIL="*cpu.txt")
        assert status == 1 and "setup: pip install" in output and "failed" in output
        status, _, calls = setup()
        assert status == 0 and "venv" not in calls

    def test_half_written_packages_are_repaired(self, setup):
        assert setup(STUB_FAIL="*cpu.txt", STUB_FAIL_LATE="1")[0] == 1
        status, output, calls = setup()
        assert status == 0 and calls[0] == "venv" and "interrupted" in output

    def test_half_created_environment_is_repaired(self, setup, project):
        (project / ".venv").mkdir()
        (project / ".venv" / "pyvenv.cfg").touch()
        status, _, calls = setup()
        assert status == 0 and calls[0] == "venv"

    def test_a_folder_that_is_no_environment_is_left_alone(self, setup, project):
        (project / "mine").mkdir()
        (project / "mine" / "notes.txt").touch()
        status, output, calls = setup(TESSERA_VENV="mine")
        assert (status, calls) == (1, []) and "mine is not a virtual environment" in output
        assert (project / "mine" / "notes.txt").exists()

    @pytest.mark.parametrize(
        ("options", "changes", "message"),
        [
            ("", {"TESSERA_PYTHON": "/bin/false"}, "/bin/false is no working Python 3.10, 3.11 or 3.12"),
            ("", {"TESSERA_STACK": "tpu"}, "TESSERA_STACK=tpu, expected cpu or cuda"),
            ("--fast", {}, "unknown option --fast (expected --rebuild)"),
        ],
    )
    def test_mistakes_end_with_one_line(self, setup, options, changes, message):
        status, output, calls = setup(*options.split(), **changes)
        assert (status, calls, output.count("\n")) == (1, [], 1)
        assert output.startswith("setup: ") and message in output


def build(project, **changes):
    """Run setup.py as an editable installation does. Returns (finished process, build record)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TESSERA_")} | changes
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=project)
    return done, build_record.read(project / "kernels")


class TestBuild:
    def test_without_a_compiler(self, project):
        done, record = build(project, CXX="/bin/false")
        assert done.returncode == 0 and "plain torch is used instead: no working C++ compiler" in done.stderr
        assert record["library"] is None and "no working C++ compiler" in record["reason"]

    def test_with_a_compiler_that_fails(self, project):
        compiler = project / "c++"
        compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "c++ 99" && exit 0\nexit 1\n')
        compiler.chmod(0o755)
        done, record = build(project, CXX=str(compiler))
        assert done.returncode == 0
        assert record["library"] is None and "the compilation failed with c++ 99" in record["reason"]

    def test_without_torch(self, project):
        (project / "torch.py").write_text("raise ImportError('no torch')")
        done, record = build(project, PYTHONPATH=str(project))
        assert done.returncode == 0 and record["reason"] == "torch is not installed"

    def test_switched_off(self, project):
        done, record = build(project, TESSERA_BUILD="0")
        assert done.returncode == 0 and record["reason"] == "TESSERA_BUILD=0"

    def test_required(self, project):
        done, _ = build(project, TESSERA_BUILD="require", CXX="/bin/false")
        assert done.returncode != 0 and "TESSERA_BUILD=require, but the kernels were not compiled" in done.stderr

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
    def test_compiled_library_is_loaded_until_the_sources_change(self, project):
        done, record = build(project, TESSERA_BUILD="require")
        assert done.returncode == 0, done.stderr
        assert (project / "kernels" / record["library"]).is_file()
        show = "import kernels.backend as b; print(b.backend(), b.problem)"

        def loaded():
            command = [sys.executable, "-c", show]
            return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=project).stdout

        assert loaded() == "cpp None\n"
        with (project / "kernels" / "csrc" / "mix.h").open("a") as file:
            file.write("// changed\n")
        assert loaded().startswith("reference ") and "compiled from other sources" in loaded()
        assert build(project, TESSERA_BUILD="require")[0].returncode == 0
        assert loaded() == "cpp None\n"


class TestBuildRecord:
    def write(self, folder, **changes):
        (folder / "csrc").mkdir(exist_ok=True)
        (folder / "csrc" / "a.cpp").write_text("int a;")
        (folder / "_C.so").touch()
        fields = {"library": "_C.so", "torch": "2.13.0", "sources": build_record.source_hash(folder / "csrc")}
        build_record.write(folder, **{**fields, **changes})

    def test_current(self, tmp_path):
        self.write(tmp_path)
        assert build_record.problem("2.13.0", tmp_path) is None

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"torch": "2.12.0"}, "compiled for torch 2.12.0, found 2.13.0"),
            ({"sources": "0"}, "compiled from other sources"),
            ({"library": "gone.so"}, "gone.so is missing"),
            ({"library": None, "reason": "no compiler"}, "not compiled: no compiler"),
        ],
    )
    def test_not_usable(self, tmp_path, changes, words):
        self.write(tmp_path, **changes)
        assert words in build_record.problem("2.13.0", tmp_path)

    @pytest.mark.parametrize("content", ["", "[]", "{}", "{half"])
    def test_torn_record(self, tmp_path, content):
        self.write(tmp_path)
        (tmp_path / "_build.json").write_text(content)
        assert "have not been compiled" in build_record.problem("2.13.0", tmp_path)

    def test_record_is_plain_json(self, tmp_path):
        self.write(tmp_path)
        assert set(json.loads((tmp_path / "_build.json").read_text())) == {"library", "torch", "sources"}


def entries(path):
    """(name, version, marker) of every line of a list."""
    requirements = pytest.importorskip("packaging.requirements")
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    for line in lines:
        if line and not line.startswith("-r "):
            requirement = requirements.Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"{path.name}: {line} is not pinned"
            yield re.sub(r"[-_.]+", "-", requirement.name).lower(), specifier.version, requirement.marker


def test_lists_pin_each_package_to_one_version():
    versions = {}
    for path in LISTS:
        for name, version, _ in entries(path):
            assert versions.setdefault(name, version) == version, f"{path.name}: {name}"


def test_lists_are_complete():
    """Whatever a package of the lists asks for is in the lists too (torch's own libraries aside)."""
    requirements = pytest.importorskip("packaging.requirements")
    pinned = {name: version for path in LISTS for name, version, _ in entries(path) if name != "torch"}
    missing = []
    for name, version in pinned.items():
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # the other stack's, or with a marker for another Python
        if found.version != version:
            continue  # another version may want other packages
        for requirement in map(requirements.Requirement, found.requires or []):
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if needed and re.sub(r"[-_.]+", "-", requirement.name).lower() not in {*pinned, "torch"}:
                missing.append(f"{name} wants {requirement}")
    assert not missing
