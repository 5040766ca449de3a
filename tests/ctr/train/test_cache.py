"""Training with a cache, through the command: the run and its saved states are those without, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.train.trainer import Trainer
from tessera.embedding.errors import ConfigError
from tests.ctr.train.states import (
    arguments,
    metrics_of,
    newest,
    rows_of_state,
    tensors_of_state,
    training_of_state,
    write_data,
)
from tests.ctr.train.warm_ranks import WarmRanks

ROWS, BATCH = 1500, 100
CACHE = ["embedding.cache_rows=450"]  # table `d` has a new id in every row: two batches bring 200, the run 1500
SETTINGS = {
    "expiry and deltas": [
        "embedding.ttl_days=2",
        "embedding.max_rows=700",
        "embedding.eviction=lru",
        "trainer.eval_every=4",
        "trainer.checkpoint.full_every=2",
        "optimizer.sparse.name=adam",
    ],
    "scales": [
        "embedding.format=int8",
        "embedding.alpt.every=2",
        "embedding.admission.kind=exact",
        "embedding.admission.threshold=2",
        "embedding.oov=learned",
        "embedding.pooled_output_dist=always",
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", ROWS)


def trained(
    ranks: WarmRanks, world: int, data: Path, run_dir: Path, *more: str, status: int = 0, end=None, overlap=False
) -> str:
    common = [f"trainer.batch_size={BATCH}", "trainer.checkpoint.every=5", "trainer.checkpoint.keep_last=9"]
    output = run_dir.with_suffix(".output")
    statuses = ranks.run(world, arguments(data, run_dir, *common, *more), output, end=end, overlap=overlap)
    assert statuses == [status] * world, output.read_text()
    return output.read_text()


def without_cache(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["kind"] != "cache"]


def training_but_for_cache(state: Path) -> dict:
    training = training_of_state(state)
    for key in ("cache_rows", "cache_bytes"):
        training["config"]["embedding"].pop(key)
    return training


def assert_same_states(one: Path, other: Path) -> None:
    assert [state.name for state in sorted(one.glob("step-*"))] == [s.name for s in sorted(other.glob("step-*"))]
    for state in sorted(one.glob("step-*")):
        twin = other / state.name
        assert tensors_of_state(state) == tensors_of_state(twin)
        for kind in ("rows", "waiting", "gone"):
            assert rows_of_state(state, kind) == rows_of_state(twin, kind)
        assert training_but_for_cache(state) == training_but_for_cache(twin)


@pytest.mark.slow  # tests/golden has a run with a cache
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_with_a_cache_is_the_run_without(ranks, data, tmp_path, setting):
    """Its saved states too; and a run that goes on from one on another number of ranks, with another cache."""
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    trained(ranks, 2, data, plain, *SETTINGS[setting])
    said = trained(ranks, 2, data, cached, *SETTINGS[setting], *CACHE)
    assert "% hits · " in said and " rows in, " in said
    assert without_cache(metrics_of(cached)) == metrics_of(plain)
    assert_same_states(cached / "checkpoints", plain / "checkpoints")
    assert tensors_of_state(cached / "best") == tensors_of_state(plain / "best")
    lines = [line for line in metrics_of(cached) if line["kind"] == "cache"]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15]
    assert all(
        line[key] == sum(t[key] for t in line["tables"].values()) for line in lines for key in ("hits", "misses")
    )
    assert all(line["hit_rate"] == line["hits"] / (line["hits"] + line["misses"]) for line in lines)
    assert sum(line["written_back"] for line in lines) > 0
    goes_on = f"trainer.resume={cached / 'checkpoints' / 'step-000000000010'}"
    ends = []
    for name, cache in (("plain-1", []), ("cached-1", ["embedding.cache_bytes=20000"])):
        trained(ranks, 1, data, tmp_path / name, *SETTINGS[setting], *cache, goes_on)
        ends.append(tmp_path / name)
    assert without_cache(metrics_of(ends[1])) == metrics_of(ends[0])
    assert_same_states(*(end / "checkpoints" for end in ends))


def test_a_run_with_a_cache_that_was_asked_to_stop_goes_on(ranks, data, tmp_path):
    """The next batch is read and on its way when a rank is asked to stop; the state is that of a step all the same."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(ranks, 1, data, whole, *CACHE)
    auto = "trainer.resume=auto"
    said = trained(ranks, 1, data, parts, *CACHE, auto, status=75, end=(7, signal.SIGTERM, [0]))
    assert "stopped by SIGTERM, state saved" in said
    stopped = newest(parts)
    assert stopped.name not in ("step-000000000005", "step-000000000010")
    trained(ranks, 1, data, parts, *CACHE, auto)
    one, other = newest(parts), newest(whole)
    assert tensors_of_state(one) == tensors_of_state(other)
    assert rows_of_state(one) == rows_of_state(other)
    assert without_cache(metrics_of(parts)) == without_cache(metrics_of(whole))


def test_the_next_batch_is_begun_unless_something_looks_at_the_tables_first(process, data, tmp_path):
    when = ["trainer.eval_every=7", "trainer.checkpoint.every=5", "trainer.max_steps=13", f"trainer.batch_size={BATCH}"]
    config = load_config(arguments(data, tmp_path / "run", *CACHE, *when), "")
    trainer = Trainer(config, process)
    begin, begun_in = trainer.engine.tables.begin, []

    def watched(*of_batch: object) -> object:
        begun_in.append(trainer.engine.step)
        return begin(*of_batch)

    trainer.engine.tables.begin = watched
    trainer.fit()
    evaluation, state = (7,), (5, 10)  # a line of the log, behind every third step, is not among them
    alone_steps = (0, *evaluation, *state)
    assert begun_in == [step if step in alone_steps else step - 1 for step in range(13)]


def test_a_cache_that_is_too_small_is_one_line(ranks, data, tmp_path):
    said = trained(ranks, 1, data, tmp_path / "run", "embedding.cache_rows=150", status=2)
    assert said.splitlines()[-1].endswith(
        "table row: two batches in a row need 200 rows in the cache, which has 150; "
        "raise cache_rows or cache_bytes, or make the batch smaller"
    )


@pytest.mark.parametrize("key", ["cache_rows", "cache_bytes"])
def test_static_tables_have_no_cache(key):
    with pytest.raises(ConfigError, match=f"embedding.{key} is 1000, which static tables do not read"):
        load_config(["embedding=static", f"+embedding.{key}=1000"], "")
