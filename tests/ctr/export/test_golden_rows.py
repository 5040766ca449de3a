"""Golden rows of an export: what they have in columns that are read as numbers, and evaluation that gives none."""

from __future__ import annotations

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
from tessera.ctr.serving import ExportError
from tests.ctr.export.models import export, make_run, overrides_of
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


def test_a_model_that_gives_no_number_is_told_so(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        make_run(alone(), tmp_path, overrides_of(tmp_path, model="lr"))
        _spoil(tmp_path)
        with pytest.raises(ExportError, match="evaluation gives nan for golden row 0, expected finite scores") as error:
            export(alone(), tmp_path)
        assert "\n" not in str(error.value) and not (tmp_path / "export").exists()
    finally:
        dist.destroy_process_group()


def _spoil(folder) -> None:
    """Save the model of a run anew, one of its weights no number."""
    config = run_config(folder / "run", [])
    model, _ = build_model(config, schema_of(config.data), alone())
    load_model(model, folder / "run" / "best", alone())
    with torch.no_grad():
        next(iter(model.module.tower.parameters())).fill_(float("nan"))
    save_model(model, folder / "run" / "best", alone(), step=7)
