"""Who imports whom, read from the source: also inside of functions, and what is imported for types alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "embedding", "distributed", "ctr", "scripts")  # each may import those before it
#: Modules of ctr/data that turn columns of Arrow into numbers and ids, for training and serving alike.
DECODING = (
    *("aligned", "arrow_types", "bags", "columns", "crosses", "errors", "expressions", "features", "footers", "labels"),
    *("row_group_filter", "schema", "single_values", "transforms", "vectors"),
)
WITHOUT_CIRCLES = ("kernels", "embedding", "distributed", "ctr")


def modules_of(*packages: str) -> dict[str, Path]:
    """Dotted name -> file."""
    paths = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in paths}
    return {".".join(("tessera", *of)).removesuffix(".__init__"): path for path, of in parts.items()}


def imported_by(path: Path, modules: Collection[str]) -> set[str]:
    """Dotted names of what a file imports; `from a import b` is a.b if that is among the modules, else a."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {one if one in modules else node.module for one in inside}
    return found


def a_circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules each of which imports the next, the last one the first; none if there is no such circle."""
    done: set[str] = set()

    def follow(road: list[str]) -> list[str]:
        for name in sorted(imports[road[-1]] & imports.keys() - done):
            if name in road:
                return road[road.index(name) :]
            if circle := follow([*road, name]):
                return circle
        done.add(road[-1])
        return []

    return next((circle for name in sorted(imports) if (circle := follow([name]))), [])


def test_what_a_circle_is():
    assert a_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert a_circle({"a": {"b", "c", "elsewhere"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", WITHOUT_CIRCLES)
def test_no_modules_import_each_other(package):
    modules = modules_of(package)
    imports = {name: imported_by(path, modules) for name, path in modules.items()}
    assert len(imports) > 10
    assert a_circle(imports) == []


@pytest.mark.parametrize("layer", range(len(LAYERS) - 1))
def test_layers_import_one_way(layer):
    above = {f"tessera.{name}" for name in LAYERS[layer + 1 :]}
    for name, path in modules_of(LAYERS[layer]).items():
        wrong = [one for one in imported_by(path, ()) if ".".join(one.split(".")[:2]) in above]
        assert not wrong, f"{name} imports {wrong}"


def test_reports_know_nothing_of_what_is_reported():
    """Training, search and rankings write reports; so what a report shows is defined by it or by data and metrics."""
    below = {f"tessera.ctr.{name}" for name in ("data", "metrics", "output_folders", "report", "yaml_errors")}
    for name, path in modules_of("ctr/report").items():
        of_ctr = [one for one in imported_by(path, ()) if one.startswith("tessera.ctr.")]
        wrong = [one for one in of_ctr if ".".join(one.split(".")[:3]) not in below]
        assert not wrong, f"{name} imports {wrong}"


def test_kernels_need_torch_alone():
    """So that their tests run where there is a GPU, torch, Triton and nothing else."""
    for name, path in modules_of("kernels").items():
        roots = {one.split(".")[0] for one in imported_by(path, ())}
        assert not roots - {"torch", "triton", "tessera"} - sys.stdlib_module_names, name


def test_nothing_is_imported_by_the_name_of_its_folder():
    """`distributed` and `kernels` are packages of others, too."""
    for name, path in modules_of("conf", *LAYERS, "tests").items():
        roots = {one.split(".")[0] for one in imported_by(path, ())}
        assert not roots & {"conf", *LAYERS}, name


def test_nothing_is_put_on_the_path_by_hand():
    for name, path in modules_of("conf", *LAYERS).items():
        text = path.read_text()
        assert "sys.path.insert" not in text and "sys.path.append" not in text and "E402" not in text, name


def test_serving_needs_nothing_of_training():
    """Only kernels, errors and settings, and the modules that decode rows: no torchrec, fbgemm, hydra, omegaconf."""
    allowed = {"tessera.kernels", "tessera.embedding.errors", "tessera.embedding.settings", "tessera.ctr.serving"}
    allowed |= {f"tessera.ctr.data.{name}" for name in DECODING}
    modules = modules_of(*LAYERS)
    for name, path in modules_of("ctr/serving").items():
        for one in imported_by(path, modules):
            if one.startswith("tessera."):
                assert any(one == root or one.startswith(f"{root}.") for root in allowed), f"{name} imports {one}"
            else:
                roots = {"numpy", "pyarrow", "torch", "starlette", "uvicorn", "prometheus_client"}
                assert one.split(".")[0] in roots | sys.stdlib_module_names, f"{name} imports {one}"


def test_a_scorer_is_imported_without_what_training_needs():
    code = "import sys, tessera.ctr.serving; print(*{name.partition('.')[0] for name in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not {"torchrec", "fbgemm_gpu", "hydra", "omegaconf", "pandas", "fsspec"} & set(done.stdout.split())
