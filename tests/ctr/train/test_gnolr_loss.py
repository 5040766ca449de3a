"""GNOLR's model and loss together: the ordinal likelihood of its levels, whose gradients hold where two levels nearly
meet; and what neither GNOLR nor ESMM learns from."""

from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from tessera.ctr.config import load_config
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.labels import labels_of
from tessera.ctr.train.task_loss import TaskLoss
from tessera.ctr.train.trainer import Trainer
from tests.ctr.models.test_over_labels import FUNNEL, fields_of, make
from tests.ctr.train.funnel import funnel_table, options
from tests.ctr.train.test_task_loss import batch_of

SHARES = [0.3, 0.1, 0.02]
OFFSETS = [-math.log(share / (1 - share)) for share in SHARES]


def tower_of(slopes: list[float], angles: list[float]):
    """A tower whose cosines are those of these angles, whatever the row: its nets answer their biases."""
    tower = make("gnolr", fields_of(FUNNEL[: len(slopes)]), shares=SHARES[: len(slopes)], slopes=slopes, hidden=[2])
    with torch.no_grad():
        for nets, turned in zip(tower.nets, (0.0, 1.0), strict=True):
            for net, angle in zip(nets, angles, strict=True):
                net[-1].weight.zero_()
                net[-1].bias.copy_(torch.tensor([math.cos(turned * angle), math.sin(turned * angle)]))
    return tower


def loss_of(tower, levels: list[int]) -> torch.Tensor:
    """The loss of rows that reached these levels, summed."""
    count, rows = len(tower.slopes), len(levels)
    values = [[float(level > i) for i in range(count)] for level in levels]
    numeric = torch.zeros(rows, 2, dtype=torch.float64)
    logits = tower(numeric, {"v": torch.zeros(rows, 4, 4, dtype=torch.float64)})
    return TaskLoss(labels_of(FUNNEL[:count]), tower)(logits, batch_of(values), float(rows))


def probabilities(tower, angles: list[float]) -> list[float]:
    """P(level >= i) of each level."""
    z, found = 0.0, []
    for slope, angle, offset in zip(tower.slopes, angles, OFFSETS, strict=False):
        z += slope * math.cos(angle)
        found.append(1 / (1 + math.exp(offset - z)))
    return found


@pytest.mark.parametrize("angles", [[0.4, 1.2], [2.5, 0.3, 1.9]])
def test_the_loss_is_the_likelihood_of_the_levels(angles):
    count = len(angles)
    tower = tower_of([1.3, 1.1, 1.2][:count], angles)
    q = [*probabilities(tower, angles)]
    for level in range(count + 1):
        expected = 0.0
        for i in range(count):  # L_i
            if level == 0:
                expected -= math.log(1 - q[0])
            elif level > i:
                expected -= math.log(q[i])
            else:
                expected -= math.log(q[level - 1] - q[level])
        assert float(loss_of(tower, [level]).detach()) == pytest.approx(expected, rel=1e-7)


def test_the_first_level_alone_is_the_cross_entropy_of_its_distance_from_a():
    """L_1 = CE(click, sigmoid(Z_1 - a_1)), which is there once for each level."""
    tower = tower_of([1.3, 1.1], [0.4, 1.2])
    logit = torch.tensor(1.3 * math.cos(0.4) - OFFSETS[0], dtype=torch.float64)
    values = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    known = torch.tensor([True, False]).expand(2, 2)
    zeros = torch.zeros(2, 2, dtype=torch.float64), {"v": torch.zeros(2, 4, 4, dtype=torch.float64)}
    found = TaskLoss(labels_of(FUNNEL[:2]), tower)(tower(*zeros), batch_of(values, known), 2.0)
    expected = F.binary_cross_entropy_with_logits(logit.expand(2), values[:, 0], reduction="sum")
    torch.testing.assert_close(found, 2 * expected)


@pytest.mark.parametrize("distance", [1e-1, 1e-6])
def test_gradients_are_finite_differences_where_levels_nearly_meet(distance):
    """Of all three levels' rows, in the weights that turn the vectors; q_1 - q_2 is `distance`."""
    angles = [0.7, 1e-3]
    q1 = 1 / (1 + math.exp(OFFSETS[0] - math.cos(0.7)))
    z2 = math.log((q1 - distance) / (1 - q1 + distance)) + OFFSETS[1]
    slope = (z2 - math.cos(0.7)) / math.cos(1e-3)
    tower = tower_of([1.0, slope], angles)
    q = probabilities(tower, angles)
    assert q[0] - q[1] == pytest.approx(distance, rel=1e-6)
    biases = [net[-1].bias for nets in tower.nets for net in nets]
    for level in range(3):
        gradients = torch.autograd.grad(loss_of(tower, [level]), biases)
        for bias, gradient in zip(biases, gradients, strict=True):
            for place in range(2):
                ends, step, kept = [], 1e-7, float(bias[place].detach())
                for sign in (1, -1):
                    with torch.no_grad():
                        bias[place] = kept + sign * step
                        ends.append(float(loss_of(tower, [level])))
                with torch.no_grad():
                    bias[place] = kept
                assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-4, abs=2e-7)


@pytest.mark.parametrize(
    ("model", "more"),
    [("esmm", []), ("gnolr", ["model.user=[user]", "model.shares=[0.5, 0.2]", "model.slopes=[1, 1]"])],
)
def test_a_log_with_a_purchase_without_a_click_is_refused(process, tmp_path, model, more):
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    table = funnel_table(40, 0)
    buy, click = table["buy"].to_pylist(), table["click"].to_pylist()
    row = click.index(0)
    buy[row] = 1
    pq.write_table(table.set_column(1, "buy", pa.array(buy, pa.int8())), folder / "part-0.parquet")
    no_others = ["data.valid=null", "data.test=null"]
    trainer = Trainer(load_config(options(tmp_path / "data", tmp_path / "run", model, *no_others, *more), ""), process)
    line = rf"part-0.parquet row group 0 row {row}: column 'buy' found 1, expected 0 where 'click' is 0"
    with pytest.raises(DataError, match=line):
        next(trainer.readers["train"].epoch(0))
    trainer.log.close()
