"""The folder of an export: its golden rows, and what is wrong with it told in one line before a row is scored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from tessera.ctr.config import load_config
from tessera.ctr.data.config import schema_of
from tessera.ctr.export.golden import UNKNOWN, golden_rows
from tessera.ctr.network import build_model
from tessera.ctr.runs.saved_model import load_model, save_model
from tessera.ctr.runs.score import run_config
from tessera.ctr.serving import ExportError, Scorer
from tessera.ctr.serving.files import checksum
from tests.ctr.export.models import damaged, export, make_run, overrides_of
from tests.distributed.saved_tables import alone

NUMBERS = {"x": [3, 4], "y": [5, 6], "z": [7, 8], "v": [[1, 2], [3, 4]], "weights": [[1], [2]], "ages": [[9], []]}
IDS = {"c": [1, 2], "tags": [[1], [2]], "items": [[3], []]}
FEATURES = (
    "data.schema.features=[{name: x, kind: numeric}, {name: band, expr: 'integer(y * 3)'}, "
    "{name: half, kind: numeric, expr: 'y / 2'}, {name: z, kind: numeric, transform: bucketise, boundaries: [0]}, "
    "{name: v, kind: vector, length: 2}, {name: c}, {name: tags, kind: ids, weights: weights}, "
    "{name: items, kind: sequence, pooling: none, align: h, max_length: 3}, "
    "{name: ages, kind: sequence, dtype: float, pooling: none, align: h, max_length: 3}]"
)


def test_ids_become_unknown_ones_and_numbers_of_the_same_type_stay(tmp_path):
    pq.write_table(pa.table(NUMBERS | IDS), tmp_path / "rows.parquet")
    options = ["data=synthetic", FEATURES, "data.schema.time=null", f"data.path={tmp_path}", "model=din"]
    config = load_config(options, "")
    last = golden_rows(config, schema_of(config.data), [str(tmp_path)]).to_pylist()[-1]
    assert {name: last[name] for name in NUMBERS} == {name: values[0] for name, values in NUMBERS.items()}
    assert {name: last[name] for name in IDS} == {"c": UNKNOWN, "tags": [UNKNOWN], "items": [UNKNOWN]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A run, and its export in `export`."""
    folder = tmp_path_factory.mktemp("run")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    make_run(alone(), folder, overrides_of(folder, model="lr"))
    export(alone(), folder)
    yield folder
    dist.destroy_process_group()


def without_files(manifest: dict, path: str) -> dict:
    """A manifest that does not list a file, and is none the less whole."""
    said = {**manifest, "files": {name: seal for name, seal in manifest["files"].items() if name != path}}
    return said | {"checksum": checksum(said)}


VALUES = "tables/c/w.values.npy"


def test_what_is_wrong_is_told_before_a_row_is_scored(folder, tmp_path):
    export, path = folder / "export", folder / "export" / VALUES
    manifest, whole = json.loads((export / "manifest.json").read_text()), path.read_bytes()
    of_kind = {**manifest, "kind": "other"}
    of_kind["checksum"] = checksum(of_kind)
    wrong: list[tuple[Path, bytes | None, str]] = [
        (path, None, f"is damaged: {VALUES} is missing"),
        (path, whole[:-1], f"is damaged: {VALUES} has {len(whole) - 1:,} bytes; the manifest says {len(whole):,}"),
        (path, whole + b"x", f"is damaged: {VALUES} has {len(whole) + 1:,} bytes"),
        (
            export / "manifest.json",
            json.dumps(of_kind).encode(),
            "is of kind 'other'",
        ),
    ]
    for name in (VALUES, "tower.pt2", "features.json", "tables/c/ids.npy"):
        text = json.dumps(without_files(manifest, name)).encode()
        wrong.append((export / "manifest.json", text, f"is damaged: its manifest does not list {name}"))
    for file, content, line in wrong:
        with damaged(file, content), pytest.raises(ExportError, match=line) as error:
            Scorer.load(export, check=False)
        assert "\n" not in str(error.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(ExportError, match=f"{VALUES} is no file"):
        Scorer.load(export)
    path.rmdir()
    path.write_bytes(whole)
    assert Scorer.load(export).check_golden() <= 1e-6
    with pytest.raises(
        ExportError, match="s3://bucket/mine: tables are mapped into memory; expected a folder on this machine"
    ):
        Scorer.load("s3://bucket/mine")


def test_a_model_that_gives_no_number_is_told_so(folder):
    _spoil(folder)
    with pytest.raises(ExportError, match="evaluation gives nan for golden row 0, expected finite scores") as error:
        export(alone(), folder, "spoiled")
    assert "\n" not in str(error.value) and not (folder / "spoiled").exists()


def _spoil(folder) -> None:
    """Save the model of a run anew, one of its weights no number."""
    config = run_config(folder / "run", [])
    model, _ = build_model(config, schema_of(config.data), alone())
    load_model(model, folder / "run" / "best", alone())
    with torch.no_grad():
        next(iter(model.module.tower.parameters())).fill_(float("nan"))
    save_model(model, folder / "run" / "best", alone(), step=7)
