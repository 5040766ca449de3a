"""torch.compile changes neither logits nor gradients, and the length of a batch may change."""

import pytest
import torch

from ctr.config import load_config
from ctr.data.schema import Schema
from ctr.models.network import build_tower

SCHEMA = "data.schema.features=[{name: x, kind: numeric}, {name: a}, {name: b}, {name: c}]"
SMALL = {"fgcnn": ["model.kernel=3", "model.channels=[2]", "model.classifier.hidden=[8]"]}


# Each takes half a minute to compile; the others share these layers.
@pytest.mark.slow
@pytest.mark.parametrize("model", ["deepfm", "ipnn", "autoint_plus", "pin", "fgcnn", "xdeepfm"])
def test_compiled_equals_eager(model):
    config = load_config(
        [f"model={model}", SCHEMA, "data.schema.time=null", *SMALL.get(model, ["model.hidden=[8]"])], ""
    )
    torch.manual_seed(0)
    tower = build_tower(config, Schema(config.data.schema))
    parameters = [parameter for parameter in tower.parameters() if parameter.numel()]
    for rows in (64, 40):
        numeric = torch.randn(rows, 1)
        embeddings = {group: torch.randn(rows, 3, dim) for group, dim in tower.embedding_dims.items()}
        eager = tower.forward(numeric, embeddings)
        tower.compile()
        compiled = tower(numeric, embeddings)
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
        expected = torch.autograd.grad(eager.sum(), parameters, allow_unused=True)
        found = torch.autograd.grad(compiled.sum(), parameters, allow_unused=True)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
