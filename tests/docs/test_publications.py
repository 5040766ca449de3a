"""The reader of publications in the docs reads what is published, and brings a real key-value store up to date."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest
import torch.distributed as dist

from tessera.ctr.daily.publish import point
from tessera.distributed.tables import owned_tables
from tests.ctr.export.test_versions import LIFE, Days
from tests.distributed.saved_tables import alone
from tests.docs.pages import ROOT, blocks

READER, STORE = blocks((ROOT / "docs" / "publications.md").read_text(), "python")
KINDS = ("full", "delta", "delta", "delta")


@pytest.fixture(scope="module")
def functions() -> dict:
    found: dict = {}
    exec(READER, found)
    exec(STORE, found)
    return found


@pytest.fixture(scope="module")
def days(tmp_path_factory, functions):
    """Four days, and in `tables` the rows of each as the reader of the docs has them."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        folder = tmp_path_factory.mktemp("days")
        days = Days(alone(), folder, *LIFE, "embedding.formats={c: fp16}", model="fm")
        days.tables = []
        for kind in KINDS:
            days.publish(kind)
            days.tables.append(functions["tables"](folder / "run" / "published"))
        yield days
    finally:
        dist.destroy_process_group()


def test_the_reader_of_the_docs_gives_the_rows_of_the_live_model(days):
    assert len([line for line in READER.splitlines() if line.strip()]) <= 40
    found, live = days.tables[-1], owned_tables(days.model.module.tables)
    assert found.keys() == live.keys()
    for name, table in live.items():
        snapshot = table.snapshot()
        rows, ids = snapshot.rows_in_use()
        batch = snapshot.read(rows)
        snapshot.release()
        assert sorted(found[name]) == sorted(ids.tolist()) and len(ids)
        for one, stored in zip(batch.ids.tolist(), batch.values, strict=True):
            mine = np.concatenate([found[name][one][group] for group in ("v", "w")])
            expected = stored.contiguous().numpy()
            assert mine.tobytes() == expected.tobytes()


def test_a_file_that_was_changed_is_told(days, tmp_path, functions):
    published = shutil.copytree(days.folder / "run" / "published", tmp_path / "published")
    path = next((published / "2026-01-02" / "rows").glob("*/*.parquet"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged"):
        functions["tables"](published)


@pytest.fixture
def store(tmp_path):
    """A real server, on a socket in a folder."""
    redis = pytest.importorskip("redis", reason="redis, the client, is not installed")
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        pytest.skip("neither redis-server nor valkey-server is installed")
    socket = tmp_path / "socket"
    command = [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(200):
                if socket.exists():
                    break
                time.sleep(0.05)
            yield redis.Redis(unix_socket_path=str(socket))
        finally:
            server.terminate()


def test_a_store_is_brought_up_to_date_and_its_readers_see_whole_models_alone(days, tmp_path, store, functions):
    load, look_up, published = functions["load"], functions["look_up"], days.folder / "run" / "published"
    every = shutil.copytree(published, tmp_path / "every")  # for going back removes what lay behind
    ids = sorted({one for found in days.tables for one in found["c"]})
    seen: set[str] = set()

    def check() -> None:
        name, rows = look_up(store, "c", ids)
        expected = days.tables[int(name[-1]) - 1]["c"]
        assert rows == [expected[one].tobytes() if one in expected else None for one in ids], name
        seen.add(name)

    def show(count: int) -> None:
        shutil.copytree(every, published, dirs_exist_ok=True)
        point(days.publisher.root, days.records[:count], keep_days=20)
        load(published, store)
        check()
        assert store.dbsize() == 2 + sum(map(len, days.tables[count - 1].values()))

    show(1)
    problems: list[BaseException] = []
    ended = threading.Event()

    def read() -> None:
        try:
            while not ended.is_set():
                check()
        except BaseException as error:
            problems.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for count in (2, 4, 3, 4):  # one is rolled back, which begins with the whole model again
            show(count)
    finally:
        ended.set()
        reader.join()
    assert not problems and seen == {f"2026-01-0{day}" for day in (1, 2, 3, 4)}
    assert json.loads(store.get("serving"))["link"]["name"] == "2026-01-04"
