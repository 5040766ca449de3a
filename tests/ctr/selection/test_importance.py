"""Fields ranked without training: what is permuted, gradients against a loop over rows, the command's result."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tessera.ctr.config import load_config
from tessera.ctr.models.deepfm import DeepFM
from tessera.ctr.models.din import DIN
from tessera.ctr.models.dlrm import DLRM
from tessera.ctr.models.numeric import AutoDis, Raw, ScaledVectors
from tessera.ctr.report.importance_page import importance_page
from tessera.ctr.runs.score import run_config
from tessera.ctr.selection.field_groups import field_groups, field_names
from tessera.ctr.selection.field_vectors import FieldVectors
from tessera.ctr.selection.importance import METHODS
from tessera.ctr.selection.permutation import permuted, row_order, with_bags
from tessera.ctr.selection.ranked_run import rank_run
from tessera.ctr.selection.sensitivity import Means, Probe, RatioOfSums
from tessera.embedding.errors import ConfigError
from tests.ctr.report.html_page import check_page
from tests.ctr.selection.fields import REAL, ROWS, batch_of, fields_with, network_of, schema_with
from tests.ctr.train.states import arguments, write_data
from tests.ranks import on_ranks

AUTODIS = partial(AutoDis, buckets=3, temperature=1.0, skip=0.1, slope=0.01, init_std=1.0)


def test_what_shares_a_table_is_aligned_or_indicates_is_one_field():
    schema = schema_with(sequences=True)
    assert field_names(schema) == ["x", "x_missing", "y", "a", "item", "bag", "seen", "price"]
    assert [(group.features, group.fields) for group in field_groups(schema)] == [
        (("x",), (0, 1)),
        (("y",), (2,)),
        (("a",), (3,)),
        (("item", "seen", "price"), (4, 6, 7)),
        (("bag",), (5,)),
    ]


def test_a_permuted_field_is_what_looking_up_the_permuted_batch_gives():
    schema = schema_with(sequences=True)
    fields = fields_with(schema, ScaledVectors)
    network = network_of(DIN(fields, 4, [5], [3], 0.0, batch_norm=False, softmax=False), schema, fields)
    batch = batch_of(schema)
    embeddings = network.tables(batch.ids)
    lengths = batch.ids["seen"].lengths().tolist()
    for group in field_groups(schema):
        order = row_order(REAL, ROWS, 5, group.name, 0)
        assert sorted(order.tolist()) == list(range(ROWS)) and order[REAL:].tolist() == list(range(REAL, ROWS))
        ids, numeric = batch.ids, batch.numeric.clone()
        prices = list(batch.numbers["price"].split(lengths))
        for at in group.fields:
            name = field_names(schema)[at]
            if name in schema.id_names:
                ids = with_bags(ids, name, order)
            elif name == "price":
                prices = [prices[row] for row in order.tolist()]
            else:
                numeric[:, at] = batch.numeric[order, at]
        whole = batch_of(schema)
        whole.ids, whole.numeric, whole.numbers = ids, numeric, {"price": torch.cat(prices)}
        expected = network.of_tower(whole, network.tables(ids))
        assert torch.equal(network.of_tower(*permuted(schema, group, batch, embeddings, order)), expected), group
        assert not torch.equal(network.of_tower(batch, embeddings)[:REAL], expected[:REAL])


def test_bags_in_another_order():
    schema = schema_with(sequences=False)
    ids = batch_of(schema).ids
    order = torch.tensor([3, 0, 2, 1, 5, 4, 6])
    found = with_bags(ids, "bag", order)
    for name in schema.id_names:
        before = [one.tolist() for one in ids[name].values().split(ids[name].lengths().tolist())]
        after = [one.tolist() for one in found[name].values().split(found[name].lengths().tolist())]
        assert after == ([before[row] for row in order.tolist()] if name == "bag" else before)


def test_an_order_depends_on_seed_field_and_repeat_alone():
    orders = [row_order(50, 50, *key) for key in [(1, "a", 0), (1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1)]]
    assert torch.equal(orders[0], orders[1])
    assert all(not torch.equal(orders[0], other) for other in orders[2:])


@pytest.mark.parametrize("numeric", ["scaled", "autodis", "raw", "as they are", "sequences"])
def test_one_pass_gives_what_a_loop_over_rows_gives(numeric):
    """The loop takes the gradient of each row's loss to the vectors that the tower reads, one row at a time."""
    torch.manual_seed(3)
    schema = schema_with(sequences=numeric == "sequences")
    kind = {"autodis": AUTODIS, "raw": Raw, "as they are": Raw}.get(numeric, ScaledVectors)
    fields = fields_with(schema, kind)
    tower = {
        "as they are": lambda: DLRM(fields, 4, [6, 4], [5], 0.0, batch_norm=False),
        "sequences": lambda: DIN(fields, 4, [5], [3], 0.0, batch_norm=False, softmax=False),
    }.get(numeric, lambda: DeepFM(fields, 4, [5], 0.0, batch_norm=False))()
    places = FieldVectors(tower, fields, kind.func if isinstance(kind, partial) else kind)
    network, batch, groups = network_of(tower, schema, fields), batch_of(schema), field_groups(schema)
    means, embeddings = Means(), network.tables(batch.ids)
    means.rows = REAL
    with places.changed(means):
        network.of_tower(batch, embeddings)
    probe = Probe(groups, means, ROWS, batch.numeric)

    def losses() -> torch.Tensor:
        logits = network.of_tower(batch, embeddings)
        return F.binary_cross_entropy_with_logits(logits, batch.labels[:, 0], batch.weight, reduction="none")

    with places.changed(probe):
        of_masks, of_shifts = probe.gradients(losses().sum())
    owner = {at: number for number, group in enumerate(groups) for at in group.fields}
    for row in range(REAL):
        sites: dict[str, tuple] = {}

        def leaf(site, first, vectors, rows, sites=sites):
            sites[site] = (first, vectors.detach().requires_grad_(), rows)
            return sites[site][1]

        with places.changed(leaf):
            loss = losses()[row]
        found = torch.autograd.grad(loss, [vectors for _, vectors, _ in sites.values()], allow_unused=True)
        mask, shift = torch.zeros(len(groups)).double(), torch.zeros(len(groups)).double()
        for (first, vectors, rows), grad in zip(sites.values(), found, strict=True):
            mine = torch.arange(ROWS) == row if rows is None else rows == row
            for k in range(vectors.shape[1]):
                e, g = vectors[mine, k].detach(), grad[mine, k]
                other = vectors[:REAL, k] if rows is None else vectors[:, k]
                mask[owner[first + k]] += (g * e).sum()
                shift[owner[first + k]] += (g * (other.detach().mean(0) - e)).sum()
        torch.testing.assert_close(of_masks[row], mask, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(of_shifts[row], shift, rtol=1e-10, atol=1e-14)
    assert (of_masks[:REAL].abs().sum(0) > 0).all() and not of_masks[REAL:].any()


def test_means_and_standard_errors_of_weighted_values():
    drawn = torch.Generator().manual_seed(0)
    values, weights = (torch.rand(40, 2, generator=drawn, dtype=torch.float64) for _ in range(2))
    sums, one = RatioOfSums(2, torch.device("cpu")), RatioOfSums(2, torch.device("cpu"))
    for part in (slice(0, 7), slice(7, 40)):
        sums.add(values[part] * weights[part, :1], weights[part, 0])
        one.add(values[part], torch.ones(len(values[part])))
    w = weights[:, :1]
    mean = (w * values).sum(0) / w.sum()
    error = (w * (values - mean)).square().sum(0).sqrt() / w.sum()
    assert sums.compute() == (pytest.approx(mean.tolist()), pytest.approx(error.tolist()))
    plain = values.std(0, correction=0) / 40**0.5
    assert one.compute()[1] == pytest.approx(plain.tolist())


def train_and_rank(process, folder: Path, worlds_run: Path | None) -> dict[str, list]:
    from tessera.ctr.train.trainer import Trainer

    if worlds_run is None:
        job = arguments(folder / "data", folder / "run", "trainer.batch_size=100", "trainer.epochs=2")
        Trainer(load_config(job, ""), process).fit()
    run = folder / "run"
    found = {}
    for method in METHODS:
        output = folder / f"{method}-on-2" if worlds_run else None
        found[method] = rank_run(run_config(run, []), process, run, method, "valid", 2, output)[1]
    by_sum = run_config(run, ["trainer.early_stop.metric=auc-0.5*logloss"])
    for one in rank_run(by_sum, process, run, "permutation", "valid", 1, folder / f"by-sum-{process.world_size}")[1]:
        assert one.importance == pytest.approx(one.metrics["auc"] + 0.5 * one.metrics["logloss"])
    with pytest.raises(ConfigError, match="--method 'taylr'; did you mean 'taylor'"):
        rank_run(run_config(run, []), process, run, "taylr")
    with pytest.raises(ConfigError, match="--repeats is 0"):
        rank_run(run_config(run, []), process, run, "permutation", repeats=0)
    with pytest.raises(ConfigError, match="data.test is null"):
        rank_run(run_config(run, []), process, run, "taylor", "test")
    return found


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_fields_of_a_run_are_ranked_on_any_number_of_ranks(tmp_path, world):
    write_data(tmp_path / "data", 600, 200)
    (first,) = on_ranks(1, train_and_rank, tmp_path, None)
    second = first if world == 1 else on_ranks(world, train_and_rank, tmp_path, tmp_path / "run")[0]
    for method, found in first.items():
        told = json.loads((tmp_path / "run" / "importance" / method / "importance.json").read_text())
        assert [one["name"] for one in told["fields"]] == [one.name for one in found]
        values = {one["name"]: one["importance"] for one in told["fields"]}
        assert min(values["c"], values["x"]) > 10 * abs(values["d"])  # whose ids are never seen again
        assert all(one["low"] <= one["importance"] <= one["high"] for one in told["fields"])
        assert (tmp_path / "run" / "importance" / method / "importance.html").exists()
        page = check_page(importance_page(told, "importance.json"))  # of which ranks of tests draw nothing
        assert "svg" in {tag for tag, _ in page.tags}
        if method != "permutation":  # inside of a rank's part of a batch, which two ranks have another one of
            values = [{one.name: one.importance for one in ranking} for ranking in (found, second[method])]
            assert values[0] == pytest.approx(values[1], rel=1e-4)
