"""The synthetic funnel: any part drawn alone is the same, labels follow their probabilities, and ceilings are exact."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.schema import Schema
from tessera.ctr.data.synthetic_funnel import Funnel, FunnelConfig, write_funnel
from tessera.ctr.data.truth import STEPS
from tessera.ctr.metrics.exact import auc, logloss
from tessera.ctr.report.report import ceilings_of
from tessera.embedding.errors import ConfigError

CONFIG = FunnelConfig(rows=20_000, click_rate=0.2, buy_rate=0.3)


@pytest.fixture(scope="module")
def block():
    return Funnel(CONFIG).draw(0, 0, 20_000)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("funnel") / "data"
    return folder, write_funnel(CONFIG, folder, Writing(row_group_rows=4096))


def test_any_part_can_be_drawn_alone(block):
    part = Funnel(CONFIG).draw(0, 7000, 500)
    for name in ("click", "would_buy", "click_steps", "buy_steps", "both_steps"):
        np.testing.assert_array_equal(getattr(part, name), getattr(block, name)[7000:7500])
    for name, ids in part.ids.items():
        np.testing.assert_array_equal(ids, block.ids[name][7000:7500])
    assert (Funnel(CONFIG).draw(1, 0, 500).click_steps != block.click_steps[:500]).any()


def test_labels_follow_their_probabilities(block):
    clicked = block.click == 1
    for label, steps in (
        (block.click, block.click_steps),
        (block.would_buy, block.buy_steps),
        (block.would_buy[clicked], block.buy_steps[clicked]),
        (block.buy, block.both_steps),
    ):
        order = np.argsort(steps)
        for tenth in np.array_split(order, 10):
            p = steps[tenth] / STEPS
            assert abs(label[tenth].sum() - p.sum()) < 5 * np.sqrt((p * (1 - p)).sum()) + 1e-9
    assert block.click_steps.mean() / STEPS == pytest.approx(0.2, abs=0.01)
    assert block.buy_steps.mean() / STEPS == pytest.approx(0.3, abs=0.01)
    assert not (block.buy[~clicked]).any(), "nobody buys without a click"


def test_what_ids_do_to_both_labels_is_correlated_as_asked():
    for shared in (0.0, 0.6, 1.0):
        funnel = Funnel(FunnelConfig(rows=10, shared=shared))
        _, click, buy = (0, *funnel._effects(0, np.arange(4000)))
        assert np.corrcoef(click.ravel(), buy.ravel())[0, 1] == pytest.approx(shared, abs=0.03)
        assert buy.std() == pytest.approx(1, abs=0.03)


def test_ceilings_are_the_metrics_of_the_probabilities(written):
    folder, result = written
    # train, valid and test are rows of one day, in this order
    block = Funnel(CONFIG).draw(0, 18_000, 2000)
    table = pq.read_table(folder / "test")
    np.testing.assert_array_equal(table["buy"], block.buy)
    clicked = block.click == 1
    expected = {
        "click": (block.click_steps, block.click),
        "buy": (block.buy_steps[clicked], block.buy[clicked]),
        "click_and_buy": (block.both_steps, block.buy),
        "buy_on_all_rows": (block.buy_steps, block.would_buy),
    }
    for name, (steps, label) in expected.items():
        found = result["splits"]["test"]["tasks"][name]
        assert found["auc"] == pytest.approx(auc(steps / STEPS, label), abs=1e-12)
        assert found["logloss"] == pytest.approx(logloss(steps / STEPS, label), abs=1e-9)


def test_schema_and_ceilings_are_what_a_run_reads(written):
    folder, result = written
    described = Schema.from_config(json.loads(json.dumps(_schema(folder))))
    assert [task.name for task in described.tasks] == ["click", "buy"] and described.tasks[1].parent == 0
    found = ceilings_of(folder / "teacher.json", None, ["test"], "click_and_buy")
    assert found["test"]["auc"] == result["splits"]["test"]["tasks"]["click_and_buy"]["auc"]
    assert ceilings_of(folder / "teacher.json", None, ["test"], "other") == {}


def _schema(folder):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(folder / "schema.yaml"))["schema"]


@pytest.mark.parametrize(
    ("key", "value"), [("users", 1), ("click_rate", 0.0), ("buy_rate", 1.0), ("signal", 0.0), ("shared", 1.5)]
)
def test_settings_that_cannot_be_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key}: found {value}, expected"):
        FunnelConfig(**{key: value})
