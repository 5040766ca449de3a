"""`scripts/inspect_checkpoint.py` on whole, damaged and chained states, and the rows read without any of our code."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tessera.distributed.saved.inspect import inspect
from tessera.distributed.saved.states import folder_name
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import TableSaver
from tessera.embedding.config import Group
from tessera.embedding.errors import ConfigError
from tessera.embedding.table import DynamicTable
from tests.distributed.conftest import process  # noqa: F401 (a fixture)
from tests.distributed.saved_tables import config, content, save_tables, step
from tests.ranks import run_script

GROUPS = (Group("v", 4, 0.5), Group("w", 1, 0.5, format="bf16"))


@pytest.fixture
def saved(process, tmp_path) -> tuple[Path, DynamicTable]:  # noqa: F811
    """A run with a full state and two deltas."""
    run = tmp_path / "run"
    table, chain = DynamicTable(config("adam", groups=GROUPS, ttl_seconds=3)), []
    saver = TableSaver({"a": table})
    for number in range(1, 4):
        step(table, number)
        manifest = save_tables(saver, Storage(run / "checkpoints"), folder_name(number), process, number, chain)
        chain.append({"name": folder_name(number), "checksum": manifest["checksum"]})
    return run, table


def shown(path: Path, *options: str) -> tuple[int, str, str]:
    done = run_script("scripts/inspect_checkpoint.py", str(path), *options)
    return done.returncode, done.stdout, done.stderr


def test_the_command_shows_states_tables_and_rows(saved):
    run, table = saved
    ids = sorted(content({"a": table})["a"])
    status, text, problems = shown(run, "--table", "a", "--id", str(ids[0]))
    assert (status, problems) == (0, "")
    lines = text.splitlines()
    assert lines[0].startswith(f"{folder_name(3)}  delta, builds on 2 earlier  ")
    assert lines[1].startswith(f"{folder_name(2)}  delta, builds on 1 earlier  ")
    assert lines[2].startswith(f"{folder_name(1)}  full  ")
    assert lines[-1].startswith(f"id {ids[0]}  ") and "count 1" in lines[-1]
    status, _, problems = shown(run.parent / "nowhere")
    assert status == 2 and problems == f"error: {run.parent}/nowhere holds no saved states\n"


@pytest.fixture
def alone(saved):
    """`inspect` starts a process group of its own."""
    torch.distributed.destroy_process_group()
    yield saved
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def test_tables_and_rows_are_those_of_the_newest_state_with_all_it_builds_on(alone, capsys):
    run, table = alone
    rows = content({"a": table})["a"]
    assert inspect(str(run), None, None, 5, compacting=False) == 0
    said = capsys.readouterr().out
    assert f"table a: {len(rows)} rows, adam; id int64, " in said
    assert inspect(str(run), "a", None, 3, compacting=False) == 0
    assert sum(line.startswith("id ") for line in capsys.readouterr().out.splitlines()) == 3
    assert inspect(str(run / "checkpoints"), "a", 987654321, 5, compacting=False) == 0
    assert "id 987654321 has no row" in capsys.readouterr().out
    negative = min(rows)
    for one in (negative, negative % 2**64):  # as the table keeps it, and as a file of uint64 does
        assert inspect(str(run), "a", one, 5, compacting=False) == 0
        assert f"id {negative}  " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="has no table 'b'; expected a"):
        inspect(str(run), "b", None, 5, compacting=False)


def test_a_damaged_state_is_listed_as_such_and_the_one_before_is_shown(alone, capsys):
    run, _ = alone
    path = run / "checkpoints" / folder_name(3) / "rows" / "a" / "00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-3])
    assert inspect(str(run), None, None, 5, compacting=False) == 1
    said = capsys.readouterr().out
    assert f"{folder_name(3)}  DAMAGED: " in said and "rows/a/00000-of-00001.parquet has " in said
    assert f"{folder_name(2)}: step 2, " in said


def test_compaction_from_the_command(alone, capsys):
    run, table = alone
    rows = content({"a": table})["a"]
    assert inspect(str(run), None, None, 5, compacting=True) == 0
    said = capsys.readouterr().out
    assert f"{folder_name(3)} is a full state now" in said and f"table a: {len(rows)} rows" in said
    assert json.loads((run / "checkpoints" / folder_name(3) / "manifest.json").read_text())["kind"] == "full"


def expected_values(table: DynamicTable, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = table.gather(table.lookup(torch.from_numpy(ids.copy()), 0, training=False))
    return values[:, :4].numpy(), values[:, 4:].numpy()


def test_rows_by_pyarrow_and_numpy_alone(saved):
    """A chain of deltas as docs/checkpoints.md tells: newest first, a row or a name in gone/ hides older ones."""
    run, table = saved
    hidden: set[int] = set()
    found: dict[int, bytes] = {}
    for number in (3, 2, 1):
        state = run / "checkpoints" / folder_name(number)
        read = pq.read_table(state / "rows" / "a")
        ids = read["id"].to_pylist()
        found |= {i: v for i, v in zip(ids, read["values"].to_pylist(), strict=True) if i not in hidden}
        hidden |= set(ids)
        if (state / "gone").exists():
            hidden |= set(pq.read_table(state / "gone" / "a")["id"].to_pylist())
    assert found.keys() == content({"a": table})["a"].keys()
    training = json.loads((state / "training.json").read_text())
    assert training["tables"]["a"]["groups"] == [["v", 4, "fp32"], ["w", 1, "bf16"]]
    raw = np.frombuffer(b"".join(found.values()), np.uint8).reshape(len(found), 4 * 4 + 2)
    v, w = expected_values(table, np.array(list(found)))
    assert np.array_equal(raw[:, :16].copy().view("<f4"), v)
    assert np.array_equal((raw[:, 16:].copy().view("<u2").astype("<u4") << 16).view("<f4"), w)


def test_rows_by_pandas(saved):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed; pyarrow and numpy are shown above")
    run, table = saved
    frame = pandas.read_parquet(run / "checkpoints" / folder_name(1) / "rows" / "a", columns=["id", "state"])
    state = np.frombuffer(b"".join(frame["state"]), "<f4").reshape(len(frame), -1)
    rows = table.read_rows(table.lookup(torch.from_numpy(frame["id"].to_numpy().copy()), 0, training=False))
    untouched = (rows.count == 1).numpy()
    assert untouched.any() and np.array_equal(state[untouched], rows.state.numpy()[untouched])
