import os
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.ctr import doctor
from tessera.kernels import build_record

ROOT = Path(__file__).resolve().parents[2]
PINS = doctor.pinned()


def levels(findings):
    return [finding.level for finding in findings]


def fake_distribution(folder, name, version, files=()):
    """A distribution as pip leaves it: metadata, and a record of (path, content, recorded size)."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    record = []
    for path, content, size in files:
        record.append(f"{path},sha256=x,{size}\n")
        if content is not None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
    (info / "RECORD").write_text("".join(record))


def run_doctor(*options, python_options=(), **environment):
    command = [sys.executable, *python_options, str(ROOT / "scripts" / "doctor.py"), *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False
    )


@pytest.mark.parametrize(
    ("version", "level"), [((3, 9, 1), "FAIL"), ((3, 10, 0), "ok"), ((3, 12, 9), "ok"), ((3, 13, 0), "FAIL")]
)
def test_python_version(version, level):
    assert levels(doctor.check_python(version)) == [level]


def test_lists_pin_the_triple():
    triple = {name: PINS[name] for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")}
    assert triple == {
        "torch": "2.13.0",
        "torchrec": "1.8.0",
        "fbgemm-gpu": "1.8.0",
        "fbgemm-gpu-cpu": "1.8.0",
    }


def test_everything_as_pinned(tmp_path):
    for name, version in PINS.items():
        if name != "fbgemm-gpu":
            fake_distribution(tmp_path, name, version + ("+cpu" if name == "torch" else ""))
    found = doctor.installed([str(tmp_path)])
    findings = [*doctor.check_versions(found, PINS), *doctor.check_fbgemm(found, PINS)]
    assert set(levels(findings)) == {"ok"}, [str(f) for f in findings]


def test_wrong_and_missing_versions(tmp_path):
    fake_distribution(tmp_path, "torch", "2.12.0")
    fake_distribution(tmp_path, "numpy", "1.26.4")
    lines = [str(f) for f in doctor.check_versions(doctor.installed([str(tmp_path)]), PINS)]
    assert any(line.startswith("FAIL  torch     2.12.0, expected 2.13.0; cure: ") for line in lines)
    assert any(line.startswith("FAIL  torchrec  is not installed; cure: ") for line in lines)
    assert any(line.startswith("FAIL  packages  not installed: ") for line in lines)
    assert any(line.startswith("warn  packages ") and f"numpy 1.26.4 ({PINS['numpy']})" in line for line in lines)


class TestFbgemm:
    LIBRARY = "fbgemm_gpu/fbgemm_gpu_py.so"

    def only(self, folder):
        (finding,) = doctor.check_fbgemm(doctor.installed([str(folder)]), PINS)
        return finding

    def test_intact(self, tmp_path):
        fake_distribution(tmp_path, "fbgemm_gpu-cpu", "1.8.0", [(self.LIBRARY, b"cpu", 3)])
        assert self.only(tmp_path).level == "ok"

    def test_none(self, tmp_path):
        assert "neither" in self.only(tmp_path).text

    def test_both_builds(self, tmp_path):
        fake_distribution(tmp_path, "fbgemm_gpu-cpu", "1.8.0", [(self.LIBRARY, b"cuda", 3)])
        fake_distribution(tmp_path, "fbgemm_gpu", "1.8.0", [(self.LIBRARY, b"cuda", 4)])
        finding = self.only(tmp_path)
        assert finding.level == "FAIL" and "both installed" in finding.text
        assert "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu" in finding.cure

    def test_overwritten_by_the_other_build(self, tmp_path):
        fake_distribution(tmp_path, "fbgemm_gpu-cpu", "1.8.0", [(self.LIBRARY, b"cuda", 3)])
        finding = self.only(tmp_path)
        assert finding.level == "FAIL" and "another build overwrote it" in finding.text

    def test_library_gone(self, tmp_path):
        fake_distribution(tmp_path, "fbgemm_gpu-cpu", "1.8.0", [(self.LIBRARY, None, 3)])
        assert "is missing" in self.only(tmp_path).text

    def test_other_version(self, tmp_path):
        fake_distribution(tmp_path, "fbgemm_gpu-cpu", "1.5.0")
        assert "1.5.0, expected 1.8.0" in self.only(tmp_path).text


def test_failed_import_names_the_step():
    (finding,) = doctor.check_loading({"torch": "2.13.0", "error": "OSError: undefined symbol"})
    assert finding.level == "FAIL" and "fails after torch: OSError: undefined symbol" in finding.text


@pytest.mark.parametrize("library", ["libcuda.so.1", "libnvidia-ml.so.1"])
def test_cuda_build_without_a_driver_is_a_warning(library):
    error = f"OSError: {library}: cannot open shared object file: No such file or directory"
    (finding,) = doctor.check_loading({"torch": "2.13.0", "backend": "cpp", "error": error})
    assert finding.level == "warn" and "TESSERA_STACK=cpu make install" in finding.cure


def test_probe_survives_a_crashing_import(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PROBE", "import os; os.abort()")
    assert "ended with status -6" in doctor.probe()["error"]


def test_kernels_compiled_or_the_reason(monkeypatch):
    record = {"library": "_C.so", "compiler": "g++ 12"}
    monkeypatch.setattr(build_record, "read", lambda: record)
    (good,) = doctor.check_kernels({"backend": "cpp", "problem": None})
    assert good.level == "ok" and "g++ 12" in good.text
    (stale,) = doctor.check_kernels({"backend": "reference", "problem": "_C.so is missing; run `make install`"})
    assert str(stale).endswith("_C.so is missing; cure: run `make install`")
    (bare,) = doctor.check_kernels({"backend": "reference", "problem": "no working C++ compiler"})
    assert bare.level == "warn" and "install a C++ compiler" in bare.cure
    assert list(doctor.check_kernels({"error": "no torch"})) == []


def test_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    (finding,) = doctor.check_compiler()
    assert finding.level == "warn" and "install g++" in finding.cure


@pytest.mark.parametrize(
    ("environment", "level"),
    [
        ({}, "ok"),
        ({"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}, "ok"),
        ({"OMP_NUM_THREADS": "9"}, "warn"),
        ({"OMP_WAIT_POLICY": "active"}, "warn"),
    ],
)
def test_threads(environment, level):
    assert levels(doctor.check_threads(environment, cores=4)) == [level]


@pytest.mark.parametrize(
    ("found", "gpus", "cuda_fbgemm", "level", "words"),
    [
        ({"torch": "2.13.0+cpu", "cuda": None}, [], False, "ok", "training runs on the CPU"),
        ({"torch": "2.13.0+cpu", "cuda": None}, ["H, 5"], False, "warn", "torch is a CPU build"),
        ({"torch": "2.13.0", "cuda": "13.0"}, ["H, 5"], False, "warn", "fbgemm is a CPU build"),
        ({"torch": "2.13.0+cpu", "cuda": None}, [], True, "FAIL", "torch is a CPU build"),
        ({"torch": "2.13.0", "cuda": "13.0", "gpus": 0}, ["H, 5"], True, "FAIL", "cannot use"),
        ({"torch": "2.13.0", "cuda": "13.0", "gpus": 1}, ["H, 5"], True, "ok", "1 usable"),
    ],
)
def test_gpu_against_builds(found, gpus, cuda_fbgemm, level, words):
    (finding,) = doctor.check_gpu(found, gpus, cuda_fbgemm=cuda_fbgemm)
    assert finding.level == level and words in finding.text


def test_space(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert levels(doctor.check_space(tmp_path, tmp_path)) == ["warn", "warn"]
    assert levels(doctor.check_space(tmp_path, tmp_path / "absent")) == ["warn"]


class TestNames:
    def test_ours(self):
        assert levels(doctor.check_names(sys.path)) == ["ok"]

    @pytest.mark.parametrize("name", ["tessera/__init__.py", "tessera.py"])
    def test_another_first(self, tmp_path, name):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        (finding,) = doctor.check_names([str(tmp_path), *sys.path])
        assert finding.level == "FAIL" and finding.cure
        assert f"{(tmp_path / name.removesuffix('/__init__.py'))} hides our package tessera" in finding.text

    @pytest.mark.slow
    def test_packages_that_have_the_names_of_our_folders_hide_nothing(self, tmp_path):
        for name in ("distributed", "kernels"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise ImportError('not ours')")
        run = run_doctor(PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
        assert "ok    names     no other package hides tessera" in run.stdout
        assert "Traceback" not in run.stderr

    def test_the_whole_script_with_a_foreign_package(self, tmp_path):
        (tmp_path / "tessera").mkdir()
        (tmp_path / "tessera" / "__init__.py").touch()
        run = run_doctor(PYTHONPATH=str(tmp_path))
        assert run.returncode == 1 and run.stderr == ""
        (line,) = (line for line in run.stdout.splitlines() if line.startswith("FAIL  names"))
        assert f"{tmp_path / 'tessera'}" in line and "hides our package" in line and "cure: " in line


def test_where_nothing_is_installed_it_says_so_and_fails():
    run = run_doctor("--quick", python_options=["-S"], PYTHONPATH="")  # -S: no site-packages
    assert run.returncode == 1 and run.stderr == ""
    assert "FAIL  names     tessera cannot be imported: No module named 'tessera'; cure: run `make" in run.stdout


def test_in_this_environment_imports_work():
    run = run_doctor()
    assert "ok    import    torch, fbgemm operators and torchrec load" in run.stdout
    assert run.stderr == ""
