"""Tables that differ from each other: random settings against a dictionary of rows, and against tables all alike."""

from dataclasses import replace

import pytest
import torch

from tessera.distributed.projections import Projections, columns_in, first_projection
from tessera.embedding.config import DynamicTableConfig, Group
from tests.distributed.random_settings import DIMS, IDS, Dictionary, alike, draw_job, joined, train_many
from tests.ranks import on_ranks

SEEDS = range(8)


@pytest.fixture(scope="module")
def expected():
    return {seed: Dictionary(*draw_job(seed, exact=True)).train() for seed in SEEDS}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_random_settings_train_as_a_dictionary_of_rows_does(world, expected):
    results = on_ranks(world, train_many, [draw_job(seed, exact=True) for seed in SEEDS])
    close = {"rel": 1e-4, "abs": 2e-5}
    for seed in SEEDS:
        found, wanted = joined([rank[seed] for rank in results]), expected[seed]
        for outputs, wanted_outputs in zip(found["outputs"], wanted["outputs"], strict=True):
            assert outputs == pytest.approx(wanted_outputs, **close), seed
        assert found["rows"].keys() == wanted["rows"].keys() and found["rows"], seed
        for key, (values, state, seen, count) in wanted["rows"].items():
            assert found["rows"][key][0] == pytest.approx(values, **close), (seed, key)
            assert found["rows"][key][1] == pytest.approx(state, **close), (seed, key)
            assert found["rows"][key][2:] == (seen, count)
        assert found["dense"].keys() == wanted["dense"].keys()
        for name, weight in wanted["dense"].items():
            torch.testing.assert_close(torch.tensor(found["dense"][name]), torch.tensor(weight), rtol=1e-4, atol=2e-5)


def test_the_random_settings_are_all_of_them():
    """The test above has each optimizer, dim and TTL, both paths and both kinds of OOV rows."""
    jobs = [draw_job(seed, exact=True) for seed in SEEDS]
    tables = [table for _, all_of_one, *_ in jobs for table in all_of_one]
    assert {table.optimizer.name for table in tables} == {"sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl"}
    assert {table.groups[0].dim for table in tables} == {1, 2, 3, 4} and {t.ttl_seconds for t in tables} == {None, 2, 3}
    assert {options["oov"] for *_, options in jobs} == {"zeros", "learned"}
    assert {options.get("init") for *_, options in jobs} == {None, "oov"}
    assert any(0 < len(options["bag_tables"]) < 3 for *_, options in jobs)


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_table_among_others_is_bit_for_bit_what_it_is_among_its_like(world):
    """With formats that round at random, limits and evictions; the loss adds up over fields, so tables do not meet."""
    jobs, of_table = [], []
    for seed in range(4):
        job = draw_job(seed, exact=False)
        jobs.append(job)
        of_table.append(None)
        for table in job[1]:
            jobs.append((seed, alike(table), *job[2:]))
            of_table.append(table.name)
    results = on_ranks(world, train_many, jobs)
    evicted = 0
    for rank in results:
        for number, name in enumerate(of_table):
            if name is None:
                mixed = rank[number]["rows"]
                continue
            mine = {key: row for key, row in rank[number]["rows"].items() if key[0] == name}
            assert mine == {key: row for key, row in mixed.items() if key[0] == name} and mine
            table = next(table for table in jobs[number][1] if table.name == name)
            evicted += table.max_rows is not None and len(mine) <= table.max_rows
    assert evicted


def test_caches_of_tables_that_differ_change_nothing():
    """Of several sizes, with scales that round at random and limits."""
    jobs = [draw_job(seed, exact=False) for seed in range(3)]
    cached = []
    for seed, tables, *rest in jobs:
        sizes = zip(tables, (90, 120, 150), strict=True)
        cached.append((seed, [replace(table, cache_rows=rows) for table, rows in sizes], *rest))
    plain, found = on_ranks(1, train_many, jobs)[0], on_ranks(1, train_many, cached)[0]
    assert found == plain


def narrow(name: str, dim: int, std: float = 0.5) -> DynamicTableConfig:
    features = {"a": ("a",), "bc": ("b", "c"), "d": ("d",)}[name]
    return DynamicTableConfig(name, features, (Group("v", dim, std), Group("w", 1, std)), seed=5)


def test_projected_rows_begin_with_the_standard_deviation_of_rows():
    for dim in (1, 3, 4, 16):
        table = DynamicTableConfig("a", ("a",), (Group("v", dim, 0.5),), seed=5)
        matrix = first_projection(table, table.groups[0], 16).double()
        torch.testing.assert_close(matrix @ matrix.t(), torch.eye(dim).double() * 16 / dim, rtol=1e-6, atol=1e-6)
        rows = torch.randn(4000, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.5
        torch.testing.assert_close((rows @ matrix).square().mean(1), rows.square().mean(1))
        assert (rows @ matrix).std() == pytest.approx(0.5, rel=0.05)
    other = DynamicTableConfig("b", ("b",), (Group("v", 4, 0.5),), seed=5)
    assert not torch.equal(
        first_projection(table, table.groups[0], 16)[:4], first_projection(other, other.groups[0], 16)
    )


def test_the_gradient_of_a_projection_is_that_of_its_dense_definition_in_float64():
    tables = [narrow("a", 2), narrow("bc", 4), narrow("d", 3)]
    projections = Projections(tables, IDS, DIMS).double()
    torch.manual_seed(0)
    v = torch.randn(5, 4, 4, dtype=torch.float64)
    v[:, 0, 2:] = v[:, 3, 3:] = 0
    v.requires_grad_()

    def projected(v, *weights):
        for own, weight in zip(projections.weights, weights, strict=True):
            own.data = weight.data
        return torch.func.functional_call(
            projections, {f"weights.{i}": w for i, w in enumerate(weights)}, ({"v": v, "w": v[..., :1]},)
        )["v"]

    def dense(v, first, second):
        return torch.stack([v[:, 0, :2] @ first, v[:, 1], v[:, 2], v[:, 3, :3] @ second], 1)

    weights = [weight.detach().clone().requires_grad_() for weight in projections.weights]
    assert torch.autograd.gradcheck(projected, (v, *weights))
    torch.testing.assert_close(projected(v, *weights), dense(v, *weights))
    mix = torch.randn(5, 4, 4, dtype=torch.float64)
    found, wanted = (torch.autograd.grad((f(v, *weights) * mix).sum(), [v, *weights]) for f in (projected, dense))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    frozen = projections({"v": v, "w": v[..., :1]}, frozen=True)["v"]
    assert torch.autograd.grad(frozen.sum(), list(projections.weights), allow_unused=True) == (None, None)


def test_columns_of_narrow_tables():
    assert columns_in(narrow("bc", 4), DIMS) is None
    assert columns_in(narrow("a", 2), DIMS).tolist() == [0, 1, 4]
