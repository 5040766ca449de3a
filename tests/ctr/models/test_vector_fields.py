"""Vector fields in every tower: projected where it reads fields, as they are where it only puts them side by side."""

from dataclasses import replace

import pytest
import torch

from tessera.ctr.models.numeric import Raw
from tests.ctr.models.names import OF_ONE_LABEL
from tests.ctr.models.test_towers import make, named

AS_THEY_ARE = ("dnn", "wide_deep", "dlrm", "lr")
LENGTH, ROWS = 5, 6


def with_vector(kind: str = "scaled"):
    fields = named(2, 2, kind)
    return replace(fields, vectors={"V": LENGTH}), replace(fields, ids=("V", *fields.ids))


def drawn(tower, fields):
    torch.manual_seed(4)
    numeric = torch.randn(ROWS, fields.columns, dtype=torch.float64, requires_grad=True)
    shapes = {group: (ROWS, len(fields.ids), dim) for group, dim in tower.embedding_dims.items()}
    return numeric, {group: torch.randn(shape, dtype=torch.float64) for group, shape in shapes.items()}


def some(models: list[str]) -> list:
    """The others share their layers with these: they are slow tests."""
    return [one if one in ("deepfm", "final_mlp") else pytest.param(one, marks=pytest.mark.slow) for one in models]


@pytest.mark.parametrize("model", some([one for one in OF_ONE_LABEL if one not in (*AS_THEY_ARE, "fgcnn")]))
def test_a_projected_vector_is_one_more_field(model):
    """A tower with an id field in the vector's place, whose embedding is what its matrix gives, says the same."""
    fields, beside = with_vector()
    tower, other = make(model, fields), make(model, beside)
    numeric, embeddings = drawn(tower, fields)
    state = tower.state_dict()
    matrices = {name: value for name, value in state.items() if ".vectors.matrices.0.weight" in name}
    assert all(value.shape[1] == LENGTH for value in matrices.values()) and matrices
    missing = other.load_state_dict({k: v for k, v in state.items() if k not in matrices}, strict=True)
    assert not missing.missing_keys
    found = {}
    for group, vectors in embeddings.items():
        # By its width: that of the first-order weights, or of the vectors of the group that this part reads.
        names = [n for n, m in matrices.items() if m.shape[0] == vectors.shape[2] and (group != "u" or "feat" in n)]
        deep = [name for name in names if name.startswith("deep_")]
        name = deep[0] if group == "deep" and deep else names[0]
        found[group] = torch.cat([(numeric[:, 2:] @ matrices[name].T).unsqueeze(1), vectors], 1)
    torch.testing.assert_close(tower(numeric, embeddings), other(numeric[:, :2], found), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("model", some(OF_ONE_LABEL))
@pytest.mark.parametrize("kind", ["scaled", "raw"])
def test_every_number_of_a_vector_reaches_the_answer(model, kind):
    fields, _ = with_vector(kind)
    if kind == "raw" and model in ("fm", "fmfm", "fwfm", "lr", "fgcnn"):
        pytest.skip("raw numbers are read by a linear part alone, or too few fields are left")
    tower = make(model, fields)
    numeric, embeddings = drawn(tower, fields)
    (gradient,) = torch.autograd.grad(tower.eval()(numeric, embeddings).sum(), numeric)
    assert (gradient[:, 2:].abs().sum(0) > 0).all()


def test_towers_that_put_fields_side_by_side_have_the_numbers_themselves():
    fields, _ = with_vector()
    tower = make("dnn", fields)
    assert tower.embed.count == 4 and tower.embed.inputs == 4 * tower.embed.dim + LENGTH
    numeric, embeddings = drawn(tower, fields)
    flat = tower.embed.flat(numeric, tower.embed(numeric, embeddings["v"]))
    assert torch.equal(flat[:, -LENGTH:], numeric[:, 2:])
    raw = make("dnn", replace(fields, embed_numeric=Raw))
    assert raw.embed.inputs == 2 * raw.embed.dim + fields.columns
