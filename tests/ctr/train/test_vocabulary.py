"""Tables that admit a vocabulary: rows are those of its ids, on any number of ranks; OptFS writes one, too."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tessera.ctr.config import load_config
from tessera.ctr.data.errors import SchemaError
from tessera.ctr.data.vocabularies import Vocabulary
from tessera.ctr.report.data_page import write_statistics
from tessera.ctr.train.trainer import Trainer
from tests.ctr.train.states import arguments, newest, rows_of_state, tensors_of_state, write_data
from tests.ranks import on_ranks

AT_LEAST = 3


def train(process, folder: Path, name: str, *overrides: str) -> None:
    fixed = ["trainer.batch_size=100", *overrides]
    Trainer(load_config(arguments(folder / "data", folder / name, *fixed), ""), process).fit()


def admission(folder: Path, threshold: int = 1) -> list[str]:
    given = {"kind": "vocabulary", "threshold": threshold, "vocabulary": folder}
    return [f"embedding.admission.{key}={value}" for key, value in given.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    write_data(folder / "data", 400, 100)
    write_statistics([str(folder / "data/train")], None, folder / "stats", vocabulary=[], min_count=2)
    return folder


def often(folder: Path, column: str) -> set[int]:
    values = pq.read_table(folder / "data/train/part.parquet")[column].to_pylist()
    return {one for one, count in Counter(values).items() if count >= AT_LEAST}


def test_rows_are_those_of_the_vocabulary_on_one_rank_and_two(folder):
    overrides = [*admission(folder / "stats/vocabulary", AT_LEAST), "embedding.oov=learned"]
    overrides += ["embedding.tables.row.admission.kind=none"]
    for world in (1, 2):
        on_ranks(world, train, folder, f"on-{world}", *overrides)
    one, two = (rows_of_state(newest(folder / f"on-{world}"), numbers=False) for world in (1, 2))
    for table in ("c", "d"):
        assert set(one[table]) == set(two[table]) == often(folder, table)
    assert len(one["row"]) == 400 and 0 < len(one["c"]) < len({*pq.read_table(folder / "data/train")["c"].to_pylist()})
    assert not one["d"], "none of these ids occurs three times"
    oov = np.frombuffer(tensors_of_state(newest(folder / "on-1"))["tables/others"], np.float32).reshape(3, -1)
    assert oov.any(1).tolist() == [False, True, True]  # as rows go, no id of `row` is unknown


def search_and_train_again(process, folder: Path) -> None:
    optfs = ["selection.method=optfs", "selection.l1=0.02", "selection.sharpest=10", "trainer.epochs=2"]
    optfs += ["optimizer.sparse.name=rowwise_adagrad", "optimizer.sparse.lr=0.3"]
    train(process, folder, "optfs", *optfs)
    train(process, folder, "again", *admission(folder / "optfs/importance/optfs/vocabulary"))


def test_ids_that_optfs_drops_have_no_row_in_the_next_run(folder):
    on_ranks(2, search_and_train_again, folder)
    saved = rows_of_state(folder / "optfs/best", numbers=False)
    vocabulary = Vocabulary(str(folder / "optfs/importance/optfs/vocabulary"))
    dropped = 0
    for table, rows in saved.items():
        gates = {one: np.frombuffer(row["values"], np.float32)[-1] for one, row in rows.items()}
        kept = {one for one, gate in gates.items() if gate > -0.5}
        assert set(vocabulary.ids_of(table, [], 1).tolist()) == kept
        assert set(rows_of_state(newest(folder / "again"), numbers=False).get(table, {})) == kept
        dropped += len(rows) - len(kept)
    assert 0 < dropped < sum(map(len, saved.values()))


def test_a_run_without_its_vocabulary_ends_at_the_start_with_a_line(folder):
    with pytest.raises(SchemaError, match="embedding.admission.vocabulary: .*nowhere cannot be read"):
        on_ranks(1, train, folder, "lost", *admission(folder / "nowhere"))
