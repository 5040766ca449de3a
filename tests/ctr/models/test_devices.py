"""Towers compute where their inputs are and never ask the device for a number: shown on one that has no numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tessera import conf
from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.ctr.network import build_tower

FOLDER = Path(conf.__file__).parent
ROWS, IDS = 6, 10
NAMES = ", ".join(f"{{name: c{i}}}" for i in range(IDS))
SCHEMA = f"data.schema.features=[{{name: x, kind: numeric}}, {{name: y, kind: numeric}}, {NAMES}]"


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (FOLDER / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "overrides",
    [*([f"model={name}"] for name in choices("model")), *([f"numeric={name}"] for name in choices("numeric"))],
    ids=" ".join,
)
def test_a_tower_asks_the_device_for_nothing(overrides):
    """A tensor that stayed on the CPU or a wait for a number (item, nonzero, a mask) is an error on the meta device."""
    config = load_config([*overrides, SCHEMA, "data.schema.time=null"], "")
    tower = build_tower(config, Schema(config.data.schema)).to("meta")
    embeddings = {
        group: torch.empty(ROWS, IDS, dim, device="meta", requires_grad=True)
        for group, dim in tower.embedding_dims.items()
    }
    logits = tower(torch.empty(ROWS, 2, device="meta"), embeddings)
    assert logits.shape == (ROWS,) and logits.device.type == "meta"
    F.binary_cross_entropy_with_logits(logits, torch.empty(ROWS, device="meta")).backward()
    assert all(one.grad.device.type == "meta" for one in embeddings.values())
