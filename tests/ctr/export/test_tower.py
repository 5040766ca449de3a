"""The graph of a tower: every model's, in other forms, from C++; and the look at it before training begins."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tessera.ctr.config import Config, load_config
from tessera.ctr.data.labels import labels_of
from tessera.ctr.export.dry_run import check_export
from tessera.ctr.export.tower import ServedTower, graph_of, inputs_of
from tessera.ctr.models.deepfm import DeepFM
from tessera.ctr.models.tower import Fields
from tessera.embedding.errors import ConfigError
from tests.ctr.export.graphs import check_graph
from tests.ctr.export.models import overrides_of
from tests.ctr.models.names import MODELS, OF_ONE_LABEL
from tests.ctr.models.test_towers import CASES, NUMERIC, make, named
from tests.distributed.saved_tables import alone

PROGRAM = Path(__file__).with_name("tower.cpp")


def served(model: str, kind: str = "scaled", **changes) -> ServedTower:
    return ServedTower(make(model, named(3, 4, kind), **changes).float().eval(), amp=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("model", "changes"), CASES)
def test_every_model_with_every_numeric_kind_leaves_and_answers_alike(tmp_path, model, changes):
    for kind in NUMERIC:
        check_graph(served(model, kind, **changes), tmp_path / "tower.pt2", 3, 4)


@pytest.mark.parametrize(("numeric", "ids"), [pytest.param(0, 3, marks=pytest.mark.slow), (2, 0)])
def test_a_model_of_one_kind_of_fields_alone(tmp_path, numeric, ids):
    one = ServedTower(make("dnn", named(numeric, ids)).float().eval(), amp=False)
    check_graph(one, tmp_path / "tower.pt2", numeric, ids)
    with zipfile.ZipFile(tmp_path / "tower.pt2") as archive:
        names = archive.namelist()
        assert names and not any(archive.read(name).startswith((b"\x80", b"PK")) for name in names), "it is pickled"
        assert b"File " not in archive.read("tower/models/model.json"), "it names files of this machine"


class Stubborn(DeepFM):
    """Depends on values, which a graph cannot."""

    def forward(self, numeric_bn, embeddings):
        logits = super().forward(numeric_bn, embeddings)
        return logits if float(logits.sum()) > 0 else logits * 2


class Counting(DeepFM):
    """Depends on what no graph keeps."""

    calls = 0

    def forward(self, numeric_bn, embeddings):
        Counting.calls += 1
        return super().forward(numeric_bn, embeddings) + Counting.calls


@pytest.fixture
def process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield alone()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (
            Stubborn,
            "model Stubborn cannot be exported: torch.export says: .*; export.check=never trains it all the same",
        ),
        pytest.param(Counting, "answers otherwise when it is exported: logits differ by", marks=pytest.mark.slow),
    ],
)
def test_a_model_of_ones_own_that_cannot_leave_ends_before_training(process, tmp_path, kind: type[nn.Module], line):
    asked = f"export.check={Config().export.check}"  # as users have it; tests pass it over (tests/composing.py)
    options = overrides_of(tmp_path, f"model.target={__name__}.{kind.__name__}", asked)
    before = torch.random.get_rng_state()
    with pytest.raises(ConfigError, match=line) as error:
        check_export(load_config(options, ""), process)
    assert "\n" not in str(error.value) and torch.equal(torch.random.get_rng_state(), before)
    check_export(load_config([*options, "export.check=never"], ""), process)


def test_what_is_wrong_with_a_model_is_said_without_a_word_of_exports(process, tmp_path):
    config = load_config(overrides_of(tmp_path, "export.check=always"), "")
    config.model["hiden"] = [8]
    with pytest.raises(ConfigError, match="hiden") as error:
        check_export(config, process)
    assert "export" not in str(error.value)


def test_which_models_are_looked_at(process, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr("tessera.ctr.export.dry_run._check", lambda config: looked.append(config.export.check))
    config = load_config(overrides_of(tmp_path), "")
    check_export(config, process)
    assert not looked, "jobs of tests are passed over (tests/composing.py)"
    for check in ("always", "auto", "never"):
        for target, gates in ((config.model["target"], "none"), (f"{__name__}.Stubborn", "none"), ("", "lpfs")):
            one = copy.deepcopy(config)
            one.export.check, one.selection.method, one.model["target"] = check, gates, target
            check_export(one, process)
    assert looked == ["always", "always", "auto"] and Config().export.check == "always"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", OF_ONE_LABEL)
def test_onnx_gives_the_same(tmp_path, model):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    from tessera.ctr.export.other_forms import ONNX, write_onnx

    assert write_onnx(served(model), tmp_path, 3, 4) == ONNX and (tmp_path / ONNX).stat().st_size


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", MODELS)
def test_onnx_gives_the_same_of_several_labels(tmp_path, model):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    from tessera.ctr.export.other_forms import ONNX, write_onnx

    own = {"user": ["A", "a"], "shares": [0.3, 0.1], "slopes": [1.0, 1.2]} if model == "gnolr" else {}
    tower = make(model, _two_labels(), **own).float().eval()
    assert write_onnx(ServedTower(tower, amp=False), tmp_path, 3, 4) == ONNX


def _two_labels() -> Fields:
    labels = labels_of(["click", {"name": "buy", "where": "click"}])
    return Fields(tuple("ABC"), tuple("abcd"), NUMERIC["scaled"], labels, len(labels))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_program_in_cpp_runs_the_compiled_tower(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    from tessera.ctr.export.other_forms import write_compiled

    one = served("deepfm")
    try:
        name = write_compiled(graph_of(one, 3, 4), tmp_path)
    except ConfigError as error:
        pytest.skip(str(error))
    assert len([line for line in PROGRAM.read_text().splitlines() if line.strip()]) <= 60
    torch_folder = Path(torch.__file__).parent
    options = ["-std=c++20", "-O1", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    options += [f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    command = [compiler, *options, str(PROGRAM), "-o", str(tmp_path / "tower"), "-Wl,--no-as-needed", *libraries]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for rows in (1, 300):
        inputs = inputs_of(one.tower.embedding_dims, 3, 4, rows, seed=rows)
        content = b"".join(
            np.array([one.dim(), *one.shape], np.int64).tobytes() + one.numpy().tobytes() for one in inputs
        )
        (tmp_path / "inputs").write_bytes(content)
        command = [str(tmp_path / "tower"), str(tmp_path / name), str(tmp_path / "inputs"), str(tmp_path / "logits")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        found = np.frombuffer((tmp_path / "logits").read_bytes(), np.float32)
        with torch.no_grad():
            np.testing.assert_allclose(found, one(*inputs).numpy(), rtol=0, atol=1e-4)
