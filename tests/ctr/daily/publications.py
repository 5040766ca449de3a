"""Small publications, written as a run over days writes them, without the run."""

from __future__ import annotations

from pathlib import Path

import torch

from tessera.ctr.daily.day_record import DayRecord, Stage
from tessera.ctr.daily.latest import chain_of, write_latest
from tessera.ctr.daily.publish import LEFT_OUT, READER
from tessera.distributed.saved.dense import save_tensors
from tessera.distributed.saved.manifest import read_manifest
from tessera.distributed.saved.row_files import copied, rows_of
from tessera.distributed.saved.states import save
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import TableParts, describe_tables
from tessera.embedding.table import DynamicTable
from tests.ctr.train.states import rows_of_state, tensors_of_state
from tests.distributed.saved_tables import alone, config, content, step


class Publications:
    """`published/` of one small table that changes from day to day."""

    def __init__(self, root: str | Path) -> None:
        self.root, self.process = Storage(root), alone()
        self.table = DynamicTable(config(ttl_seconds=2))
        self.records: list[DayRecord] = []
        self._mark = 0

    def publish(self, kind: str) -> str:
        """Train and publish one more day; returns its name."""
        number = len(self.records) + 1
        name, table, delta = f"2026-01-{number:02d}", self.table, kind == "delta"
        step(table, number)
        self.records.append(DayRecord(name, None, Stage.TRAINED, published=kind, step=number))

        def write(storage: Storage) -> dict:
            save_tensors(storage, {"tower/w": torch.full((3,), float(number))}, self.process)
            files = {("rows", "a"): rows_of(table, LEFT_OUT, self._mark if delta else 0)}
            if delta:
                files["gone", "a"] = copied({"id": table.evicted(READER)})
            TableParts(files, {}).write(storage, self.process)
            return {}

        before = chain_of(self.records)[:-1]
        chain = [{"name": n, "checksum": read_manifest(self.root.below(n))["checksum"]} for n in before]
        said = {"partition": name, "tables": describe_tables({"a": table})}
        save(self.root, name, write, lambda *_: said, self.process, step=number, kind="model", chain=chain)
        table.take_evicted(READER)
        self._mark = table.mark()
        write_latest(self.root, self.records)
        return name

    def is_served(self, folder: Path) -> bool:
        """Whether a folder is the model as it is now, bit for bit: all rows of the table, the dense side."""
        rows = rows_of_state(folder)["a"]
        mine = {i: (row["values"], row["last_seen"], row["count"]) for i, row in rows.items()}
        expected = {i: (row[0], *row[2:4]) for i, row in content({"a": self.table})["a"].items()}
        tower = torch.full((3,), float(len(self.records))).numpy().tobytes()
        return mine == expected and tensors_of_state(folder) == {"tower/w": tower}


def published(root: str | Path, *kinds: str) -> Publications:
    publications = Publications(root)
    for kind in kinds:
        publications.publish(kind)
    return publications
