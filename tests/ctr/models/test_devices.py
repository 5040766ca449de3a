"""Towers compute where their inputs are and never ask the device for a number: shown on one that has no numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tessera import conf
from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.ctr.models.tower import Events, drawn_inputs, logits_of
from tessera.ctr.network import build_tower, fields_of
from tests.ctr.models.names import MORE, OF_FUNNELS, SEQUENCE_MODELS

FOLDER = Path(conf.__file__).parent
ROWS, IDS = 6, 10
NAMES = ", ".join(f"{{name: c{i}}}" for i in range(IDS))
SEQUENCE = "kind: sequence, pooling: none, align: h, max_length: 4"
HISTORY = f", {{name: h0, table: c0, {SEQUENCE}}}, {{name: h1, dtype: float, {SEQUENCE}}}]"
SCHEMA = f"data.schema.features=[{{name: x, kind: numeric}}, {{name: y, kind: numeric}}, {NAMES}"


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (FOLDER / group).glob("*.yaml"))


def on_meta(rows):
    return torch.empty(rows.shape, device="meta", requires_grad=True)


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"model={name}"] for name in choices("model") if name not in [*OF_FUNNELS, *MORE]),
        *(pytest.param([f"model={name}"], marks=pytest.mark.slow) for name in MORE),
        *([f"numeric={name}"] for name in choices("numeric")),
    ],
    ids=" ".join,
)
def test_a_tower_asks_the_device_for_nothing(overrides):
    """A tensor that stayed on the CPU or a wait for a number (item, nonzero, a mask) is an error on the meta device."""
    reads = overrides[0].removeprefix("model=") in SEQUENCE_MODELS
    config = load_config([*overrides, SCHEMA + HISTORY if reads else SCHEMA + "]", "data.schema.time=null"], "")
    schema = Schema(config.data.schema)
    tower = build_tower(config, schema).to("meta")
    numeric, embeddings, events = drawn_inputs(tower, fields_of(config, schema), ROWS)
    numeric, embeddings = on_meta(numeric), {group: on_meta(one) for group, one in embeddings.items()}
    for name, one in events.items():
        of = {group: {key: on_meta(rows) for key, rows in found.items()} for group, found in one.embeddings.items()}
        events[name] = Events(one.offsets.to("meta"), of, {key: of.to("meta") for key, of in one.numbers.items()})
    logits = logits_of(tower, numeric, embeddings, events)
    assert logits.shape == (ROWS,) and logits.device.type == "meta"
    F.binary_cross_entropy_with_logits(logits, torch.empty(ROWS, device="meta")).backward()
    assert all(one.grad.device.type == "meta" for one in embeddings.values())
