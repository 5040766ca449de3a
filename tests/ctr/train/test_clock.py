"""What time it is for the tables: the events decide, no single row does, and ranks agree."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.train.clock import DAY, Clock, left_out, sent_times
from tessera.distributed.collectives import gather
from tests.ranks import on_ranks

SCHEMA = ["data.schema.time=time", "data.schema.time_jump_days=30"]
BATCH, NOW = 200, 1_767_225_600


def clock_of(process, *more: str) -> Clock:
    return Clock(load_config([*SCHEMA, f"trainer.batch_size={BATCH}", *more], ""), process)


def batch_of(times) -> SimpleNamespace:
    """What a clock looks at of a batch, with padding behind its rows."""
    padded = torch.cat([torch.as_tensor(times, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)])
    weight = torch.cat([torch.ones(len(times)), torch.zeros(3)])
    return SimpleNamespace(weight=weight, time=padded, rows=len(times))


def agree(clock, batch, before):
    return clock.agree(batch, gather(clock.tell(batch)), before)


def after(process, *batches) -> list[int]:
    """The clock behind each of the batches."""
    clock, now, found = clock_of(process), 0, []
    for times in batches:
        now = agree(clock, batch_of(times), now).now
        found.append(now)
    return found


HERE = NOW + np.arange(BATCH)
NEWEST = NOW + BATCH - 1


@pytest.mark.parametrize("ahead", [10 * DAY, 29 * DAY, 10_000 * DAY])
@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_ahead_do_not_move_it(process, ahead, rows):
    """Up to 1 % of a batch, in the first one and later; and a batch of two rows."""
    leap = HERE.copy()
    leap[5 : 5 + rows] += ahead
    for found in (after(process, leap), after(process, HERE, leap)):
        assert NOW < found[-1] <= NEWEST
    assert after(process, [NOW, NOW + ahead]) == [NOW]


def test_some_rows_far_ahead_move_it_no_further_than_the_bound(process):
    """A fifth of each batch: the clock stays within the bound of where most rows lie, also after many batches."""
    leap = HERE.copy()
    leap[::5] += 10_000 * DAY
    found = after(process, leap, HERE, *[leap] * 20)
    assert max(found) <= np.median(leap) + 30 * DAY


def test_a_gap_in_the_data_is_followed_at_once_where_most_rows_lie_behind_it(process):
    for gap in (7, 29, 31, 4000):
        found = after(process, HERE, HERE + gap * DAY, HERE + gap * DAY + 60)
        assert NOW + gap * DAY < found[1] <= NEWEST + gap * DAY < found[2] <= NEWEST + gap * DAY + 60


def test_a_batch_that_begins_behind_the_gap_moves_it_to_where_most_of_it_lies(process):
    mixed = HERE.copy()
    mixed[50:] += 400 * DAY
    assert NOW + 400 * DAY < after(process, HERE, mixed)[1] <= NEWEST + 400 * DAY
    mixed = HERE.copy()
    mixed[150:] += 400 * DAY  # a quarter: not before the next batches
    held = int(np.sort(mixed)[99]) + 30 * DAY
    assert after(process, HERE, mixed, HERE + 400 * DAY)[1:] == [held, NEWEST - 2 + 400 * DAY]


def test_it_does_not_go_back_and_a_batch_without_rows_leaves_it(process):
    found = after(process, HERE, HERE - 100 * DAY, [], HERE - 1)
    assert found == [found[0]] * 4
    assert after(process, []) == [0]


def test_a_batch_of_one_row_is_its_time(process):
    assert after(process, [NOW], [NOW + 5], [NOW + 40 * DAY]) == [NOW, NOW + 5, NOW + 40 * DAY]


def agreed(process) -> list[tuple[float, int, bool]]:
    """A sequence of batches with leaps, gaps and ranks without rows."""
    clock, now, found = clock_of(process), 0, []
    generator = np.random.default_rng(3)
    for step in range(30):
        times = NOW + step * DAY + generator.integers(-5 * DAY, DAY, int(generator.integers(1, BATCH)))
        times[generator.random(len(times)) < 0.1 * (step % 3 == 1)] += 900 * DAY
        times += 70 * DAY * (step > 20)
        bounds = np.sort(generator.integers(0, len(times) + 1, 2))
        cuts = {1: [], 2: bounds[:1], 3: bounds}[process.world_size]
        clock._process.stop_asked = step == 7 and process.rank == process.world_size - 1
        found.append(agree(clock, batch_of(np.split(times, cuts)[process.rank]), now))
        now = found[-1].now
    return [tuple(one) for one in found]


def test_it_is_the_same_on_any_number_of_ranks():
    (alone,) = on_ranks(1, agreed)
    assert [stop for _, _, stop in alone] == [step == 7 for step in range(30)]
    assert len({now for _, now, _ in alone}) > 8  # it moved, and it stood still
    for world in (2, 3):
        assert on_ranks(world, agreed) == [alone] * world


LARGE = 20_000


def of_large_batches(process, dealt: str) -> tuple[list[int], int]:
    """The clock behind a few batches, and how many exchanges of all candidates there were."""
    clock, now, found, generator = clock_of(process, f"trainer.batch_size={LARGE}"), 0, [], np.random.default_rng(5)
    exact = 0
    for step in range(6):
        times = NOW + step * DAY + generator.integers(-5 * DAY, DAY, LARGE - 100 * step)
        times = np.sort(times) if dealt == "in order" else times
        parts = np.array_split(times, process.world_size)
        if dealt == "unequal":
            parts = np.split(times, [50, 60][: process.world_size - 1])
        with pytest.MonkeyPatch.context() as patch:
            calls = []
            patch.setattr(
                "tessera.ctr.train.clock.gather", lambda mine, calls=calls: (calls.append(len(mine)), gather(mine))[1]
            )
            found.append(agree(clock, batch_of(parts[process.rank]), now).now)
        exact += clock._newest in calls
        now = found[-1]
    return found, exact


@pytest.mark.parametrize("dealt", ["by chance", "in order", "unequal"])
def test_ranks_send_few_times_and_all_that_matter_where_these_do_not_do(dealt):
    ((alone, _),) = on_ranks(1, of_large_batches, dealt)
    assert sent_times(LARGE, 3) < (left_out(LARGE) + 1) * 0.75
    for world in (2, 3):
        for found, exact in on_ranks(world, of_large_batches, dealt):
            assert found == alone
            assert exact == (0 if dealt == "by chance" else 6)


def test_the_number_of_times_that_a_rank_sends():
    assert [sent_times(LARGE, ranks) for ranks in (1, 2, 4, 64)] == [201, 161, 93, 14]
    assert sent_times(4096 * 1024, 1024) < 100  # all candidates of so large a batch would be 41,944


def test_the_wall_clock(process, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.7)
    clock = clock_of(process, "embedding.clock=wall")
    assert not clock.of_events and agree(clock, batch_of(HERE), 5) == (BATCH, 1_800_000_000, False)
