"""The wheel beside packages whose names are those of our folders: Dask's `distributed`, Hugging Face's `kernels`."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.ranks import ROOT

SMALL = ["data=synthetic", "model.hidden=[16]", "model.embedding_dim=4", "trainer.batch_size=500", "trainer.device=cpu"]
OTHERS = "import distributed, kernels; print(distributed.Client, distributed.__file__, kernels.__file__)"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    without = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "TESSERA_BUILD")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=without | environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """What `make wheel` makes: suffix -> file."""
    folder = tmp_path_factory.mktemp("dist")
    run("scripts/wheel.sh", folder, cwd=ROOT, TESSERA_VENV=sys.prefix)
    return {path.suffix: path for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_holds_tessera_alone_for_every_python(built):
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"tessera", "tessera_ctr"}
    assert "-cp310-abi3-manylinux_2_" in built[".whl"].name
    for wanted in ("tessera/kernels/_C.abi3.so", "tessera/kernels/_build.json", "tessera/kernels/py.typed",
                   "tessera/conf/model/deepfm.yaml", "tessera/ctr/report/run.html"):  # fmt: skip
        assert wanted in names
    with tarfile.open(built[".gz"]) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "kernels/csrc/random.cpp", "requirements/base.txt", "tests/conftest.py"} <= sources
    assert not [name for name in sources if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_lives_beside_packages_of_the_same_names(built, tmp_path):
    run(sys.executable, "-m", "venv", "env", cwd=tmp_path)
    python, command = tmp_path / "env/bin/python", tmp_path / "env/bin/tessera"
    try:
        run(python, "-m", "pip", "install", "-q", "distributed", "kernels", cwd=tmp_path)
    except AssertionError as error:
        pytest.skip(f"Dask's distributed and Hugging Face's kernels cannot be installed here: {str(error)[-300:]}")
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    before = run(python, "-c", OTHERS, cwd=tmp_path)
    # torch and the rest come from this environment, whose own .pth files do not count there.
    (site / "rest.pth").write_text(sysconfig.get_path("purelib"))
    run(python, "-m", "pip", "install", "-q", "--no-deps", built[".whl"], cwd=tmp_path)
    assert run(command, "--version", cwd=tmp_path).startswith("tessera ")
    found = run(python, "-c", "import tessera.kernels as k; print(k.__file__)", cwd=tmp_path)
    assert found.startswith(str(site))
    run(command, "prepare", "synthetic", "--rows", "3000", "--output", "data", cwd=tmp_path)
    run(command, "train", *SMALL, "data.path=data", "trainer.run_dir=run", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert json.loads((tmp_path / "run/report.json").read_text())["rows"] == 300
    doctor = run(command, "doctor", cwd=tmp_path)
    assert "compiled with" in doctor and "no other package hides tessera" in doctor
    run(python, "-c", f"{OTHERS}; import tessera.distributed.process, tessera.kernels.backend", cwd=tmp_path)
    run(python, "-m", "pip", "uninstall", "-q", "-y", "tessera-ctr", cwd=tmp_path)
    assert run(python, "-c", OTHERS, cwd=tmp_path) == before
    assert not list((site / "tessera").rglob("*"))  # pip leaves the empty folder of a namespace
