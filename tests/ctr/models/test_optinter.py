"""OptInter's three ways of a pair, each against the network that has that way alone."""

from __future__ import annotations

import pytest
import torch

from tessera.ctr.models.layers import pairs
from tessera.ctr.models.optinter import OptInter
from tessera.ctr.models.tower import Fields
from tessera.embedding.errors import ConfigError
from tests.ctr.models.test_bad_input import refusal

FIELDS = Fields(("x",), ("b_a", "a", "b", "c"), crosses=(("b_a", "b", "a"),))
ROWS, DIM, PAIR = 6, 4, 3


def tower(fields: Fields = FIELDS, factorise=None, pair_dim=PAIR, decay=5e-5) -> OptInter:
    torch.manual_seed(1)
    return OptInter(fields, DIM, pair_dim, factorise, decay, [5], 0.0, batch_norm=False).double()


def inputs(one: OptInter, ids: int = 4):
    drawn = torch.Generator().manual_seed(2)
    numeric = torch.randn(ROWS, 1, generator=drawn, dtype=torch.float64)
    dims = one.embedding_dims
    return numeric, {
        g: torch.randn(ROWS, ids, dim, generator=drawn, dtype=torch.float64, requires_grad=True)
        for g, dim in dims.items()
    }


def parts(one: OptInter, numeric, embeddings):
    """Vectors of x, a, b, c; those that are multiplied; that of the cross."""
    own = one.embed(numeric, embeddings["v"][:, 1:])
    multiplied = one.embed_pairs(numeric, embeddings["s"][:, 1:]) if one.embed_pairs else None
    return own, multiplied, embeddings["s"][:, :1]


@pytest.mark.parametrize("way", [0, 1, 2])
def test_each_way_alone(way):
    one = tower()
    assert one.pairs == (("a", "b"), ("x", "a"), ("x", "b"), ("x", "c"), ("a", "c"), ("b", "c"))
    with torch.no_grad():
        one.alpha.fill_(-1000.0)
        one.alpha[:, way] = 1000.0
        one.alpha[1:, 2] = -500.0  # pairs without a cross cannot be memorised, and are left out before all else
    numeric, embeddings = inputs(one)
    own, multiplied, cross = parts(one, numeric, embeddings)
    places = {name: at for at, name in enumerate("xabc")}
    products = [multiplied[:, places[a]] * multiplied[:, places[b]] for a, b in one.pairs]
    of_pairs = {0: [cross[:, 0]] + [0 * p for p in products[1:]], 1: products, 2: [0 * p for p in products]}[way]
    expected = one.mlp(torch.cat([own.flatten(1), *of_pairs], 1)).squeeze(1)
    torch.testing.assert_close(one(numeric, embeddings), expected, rtol=1e-12, atol=1e-12)


def test_what_is_fixed_is_input_and_nothing_else():
    one = tower(factorise=[["c", "a"]])
    numeric, embeddings = inputs(one)
    own, multiplied, cross = parts(one, numeric, embeddings)
    whole = torch.cat([own.flatten(1), multiplied[:, 1] * multiplied[:, 3], cross[:, 0]], 1)
    torch.testing.assert_close(one(numeric, embeddings), one.mlp(whole).squeeze(1))
    names = ("a", "b", "c")
    nothing = tower(Fields(("x",), names), factorise=[])
    assert nothing.embedding_dims == {"v": DIM}  # it is a DNN
    assert nothing.mlp[0].in_features == 4 * DIM
    first, second = pairs(4)
    everything = tower(
        Fields(("x",), names),
        pair_dim=None,
        factorise=[["xabc"[i], "xabc"[j]] for i, j in zip(first, second, strict=True)],
    )
    numeric, embeddings = inputs(everything, 3)
    e = everything.embed(numeric, embeddings["v"])
    whole = torch.cat([e.flatten(1), (e[:, first] * e[:, second]).flatten(1)], 1)
    torch.testing.assert_close(everything(numeric, embeddings), everything.mlp(whole).squeeze(1))


def test_the_softmax_gets_colder_and_mixes_all_three():
    one = tower(decay=1e-3)
    with torch.no_grad():
        one.alpha[0] = torch.tensor([0.3, 0.1, -0.2])
    for step, temperature in ((0, 1.0), (600, 0.4), (5000, 0.01)):
        one.begin_step(step)
        torch.testing.assert_close(one.shares()[0], torch.softmax(one.alpha[0] / temperature, 0))
        assert one.shares()[1].tolist() == [0, 0.5, 0.5]
    one.begin_step(0)
    numeric, embeddings = inputs(one)
    own, multiplied, cross = parts(one, numeric, embeddings)
    p, places = one.shares(), {name: at for at, name in enumerate("xabc")}
    mixed = [p[k, 1] * multiplied[:, places[a]] * multiplied[:, places[b]] for k, (a, b) in enumerate(one.pairs)]
    mixed[0] = mixed[0] + p[0, 0] * cross[:, 0]
    expected = one.mlp(torch.cat([own.flatten(1), *mixed], 1)).squeeze(1)
    torch.testing.assert_close(one(numeric, embeddings), expected)


def test_a_cross_of_a_field_that_is_no_input_is_a_field():
    one = tower(Fields(("x",), ("b_a", "a"), crosses=(("b_a", "b", "a"),)))
    assert one.pairs == (("x", "b_a"), ("x", "a"), ("b_a", "a"))


CROSSES = (
    "data.schema.features=[{name: a}, {name: b}, "
    "{name: c, kind: cross, of: [a, b]}, {name: d, kind: cross, of: [b, a]}]"
)
TWO = "data.schema.features=[{name: user}, {name: item}]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([CROSSES], "'c' and 'd' both cross 'b' with 'a'; expected one cross of a pair"),
        ([TWO, "model.factorise=[[user, itm]]"], "model.factorise names 'itm', no embedded field; did you mean item?"),
        ([TWO, "model.factorise=[[user]]"], "model.factorise has ['user']; expected pairs of two fields"),
        ([TWO, "model.factorise=[user]"], "model.factorise has 'user'; expected pairs of two fields"),
        ([TWO, "model.pair_dim=0"], "model.pair_dim is 0; expected at least 1"),
    ],
)
def test_a_mistake_is_one_line(overrides, message):
    assert message in refusal("model=optinter", *overrides)


def test_error_is_of_the_configuration():
    with pytest.raises(ConfigError):
        tower(factorise=[["a", "a"]])
