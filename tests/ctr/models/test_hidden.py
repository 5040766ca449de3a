"""What the last layer of a tower reads, of every model that has one."""

import pytest
import torch

from tessera.ctr.models.hidden import hidden_of, last_layer
from tessera.embedding.errors import ConfigError
from tests.ctr.models.names import OF_ONE_LABEL, SEQUENCE_MODELS
from tests.ctr.models.test_sequence_models import inputs as sequence_inputs
from tests.ctr.models.test_sequence_models import tower_of
from tests.ctr.models.test_towers import inputs, make, named

QUICK = ["autoint_plus", "bst", "dcn_v2", "deepfm", "fgcnn", "lr", "final_mlp"]  # the others by -m slow
WITHOUT = ["fcn", "final_mlp", "final_net", "fm", "fmfm", "fwfm", "lr"]
FIELDS = named(2, 3)


def each(models: list[str]) -> list:
    return [model if model in QUICK else pytest.param(model, marks=pytest.mark.slow) for model in models]


@pytest.mark.parametrize("model", each([model for model in OF_ONE_LABEL if model not in WITHOUT]))
def test_the_layer_is_the_last_one_that_the_logit_depends_on(model):
    tower = make(model, FIELDS).eval()
    numeric, embeddings = inputs(tower, FIELDS, 300)
    with hidden_of(tower) as hidden, torch.no_grad():
        logits = tower(numeric, embeddings)
        found = hidden.take()
        tower(numeric[:1], {name: of[:1] for name, of in embeddings.items()})
        assert hidden.take().shape == (1, found.shape[1]), "what was taken is forgotten"
        layer = last_layer(tower)
        before, layer.bias = layer.bias, torch.nn.Parameter(layer.bias + 1)
        moved = tower(numeric, embeddings) - logits
        layer.bias = before
    assert found.shape == (300, layer.in_features) and found.dtype == torch.float32
    assert moved[0] > 0, "it is the last layer, of one of several towers with a weight perhaps"
    torch.testing.assert_close(moved, moved[:1].expand(300))


@pytest.mark.parametrize("model", each(SEQUENCE_MODELS))
def test_models_of_sequences_have_one(model):
    tower = tower_of(model).eval()
    with hidden_of(tower) as hidden, torch.no_grad():
        logits = tower(*sequence_inputs(tower))
        found = hidden.take()
    torch.testing.assert_close(last_layer(tower).double()(found.double())[:, 0], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", each(WITHOUT))
def test_others_say_so_in_a_line(model):
    with pytest.raises(ConfigError, match="has no layer whose input an error memory could know rows by"):
        last_layer(make(model, FIELDS))
