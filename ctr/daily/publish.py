"""Models for serving: `published/` in the run folder, or where `daily.publish_to` says. A whole model now and then, and
what has changed in between.

A publication is a folder in the form of a saved model (docs/checkpoints.md), called as its partition. One with changes
has the rows touched since the publication before, the ids evicted since (`gone/`), and the whole dense side; its
manifest's chain names what it builds on. `latest` names the chain that is to be served; nothing else does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.ctr.config import Config
from tessera.ctr.daily.day_record import DayRecord
from tessera.ctr.daily.latest import LATEST, OF_A_MODEL, chain_of, write_latest
from tessera.ctr.data.day_folders import KEY
from tessera.ctr.network import Network
from tessera.ctr.output_folders import check_place
from tessera.ctr.train.state_parts import FoundState, PartState
from tessera.distributed.collectives import on_all_ranks, on_first_rank
from tessera.distributed.locations import missing_bucket
from tessera.distributed.rank import Process
from tessera.distributed.saved.dense import save_tensors
from tessera.distributed.saved.manifest import MANIFEST, CheckpointError, read_manifest, read_training
from tessera.distributed.saved.row_files import EVICTED, copied, files_of, folder_name, read_columns, rows_of
from tessera.distributed.saved.states import DELETED, PARTIAL, REPLACED, clean, discard, save
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import TableParts, describe_tables
from tessera.distributed.tables import owned_tables
from tessera.embedding.errors import ConfigError
from tessera.embedding.set_table import OwnedTable

FOLDER = "published"
READER = "published"  # of ids that tables gave up
TOUCHED, EVICTED_SINCE = "touched", "given_up"  # kinds of files of a state: what is not published yet
MARKED = "|".join(map(re.escape, (PARTIAL, REPLACED, DELETED)))
OF_PUBLICATIONS = re.compile(rf"({MARKED})?({LATEST}|{KEY.pattern})")  # names that a run's publications may have
LEFT_OUT = ("state", "row", "period")  # columns of rows that serving has no use for


class Publisher:
    """Publishes the live model, and remembers what has changed since, also over restarts."""

    def __init__(self, run_dir: Path, config: Config, network: Network, process: Process) -> None:
        self.root = publications_of(config, run_dir)
        self._config, self._network, self._process = config, network, process
        self._marks: dict[str, int] = {}
        on_first_rank(process, self._make_place)

    def _make_place(self) -> None:
        """Make the folder of publications, and remove what a killed job has left half written in it.

        Raises ConfigError: `daily.publish_to` cannot be written to, lies in the data, or holds files of others.
        """
        chosen = self._config.daily.publish_to
        if chosen is None:
            self.root.make()
        else:
            check_publish_to(chosen, self._config.data.path)
        clean(self.root)

    def check_free(self) -> None:
        """Refuse a `daily.publish_to` that another run publishes to. Called where this run has published nothing.

        Raises ConfigError, on all ranks.
        """

        def check() -> None:
            if self._config.daily.publish_to is not None and self.root.exists(LATEST):
                raise ConfigError(
                    f"daily.publish_to {self.root.name} holds publications, and this run has published none; "
                    "expected a place of its own for each run"
                )

        on_first_rank(self._process, check)

    def next_kind(self, records: Sequence[DayRecord]) -> str:
        """full or delta: by schedule, and full where changes would not do: without dynamic tables, on other ranks than
        before, after a publication that is not there any more or more ids evicted than tables remember. All ranks
        call it.

        records: of the days before.
        """
        chain = chain_of(records)
        tables = owned_tables(self._network.tables)
        possible = 0 < len(chain) < self._config.daily.full_every and self._marks.keys() == tables.keys() != set()
        possible = possible and all(table.evicted(READER) is not None for table in tables.values())
        if self._process.is_main:
            manifests = self._manifests(chain)
            possible = possible and manifests is not None and manifests[-1]["world_size"] == self._process.world_size
        return "delta" if on_all_ranks(possible) else "full"

    def _manifests(self, chain: Sequence[str]) -> list[dict] | None:
        """Return the manifests of a chain of publications, the whole one first; None if one of them is missing."""
        try:
            return [read_manifest(self.root.below(name)) for name in chain]
        except CheckpointError:
            return None

    def missing(self, records: Sequence[DayRecord]) -> list[str]:
        """Return the publications that the newest one is made of and that are missing or differ from the records.
        Collective."""

        def is_there(name: str) -> bool:
            manifests = self._manifests([name])
            return manifests is not None and manifests[0]["step"] == steps[name]

        steps = {record.partition: record.step for record in records}
        return on_first_rank(self._process, lambda: [name for name in chain_of(records) if not is_there(name)])

    def publish(self, records: Sequence[DayRecord]) -> None:
        """Publish the live model as the last record says, then name it in `latest`. All ranks call it.

        Raises CheckpointError: it cannot be written; what was published before is untouched.
        """
        record, process, tables = records[-1], self._process, owned_tables(self._network.tables)
        delta = record.published == "delta"

        def write(storage: Storage) -> dict[str, Any]:
            tower = {f"tower/{n}": value for n, value in self._network.tower.state_dict().items()}
            weights = {n: v for n, v in self._network.tables.tensors().items() if n.startswith("tables/")}
            save_tensors(storage, tower | weights, process)
            files = {
                ("rows", name): rows_of(table, LEFT_OUT, self._marks.get(name, 0) if delta else 0)
                for name, table in tables.items()
            }
            if delta:
                files |= {(EVICTED, name): copied({"id": _evicted(table)}) for name, table in tables.items()}
            TableParts(files, {}).write(storage, process)
            return {}

        def describe(*_: object) -> dict[str, Any]:
            config = asdict(self._config)
            parts = {key: config[key] for key in ("model", "numeric", "embedding")} | {
                "schema": config["data"]["schema"]
            }
            return {"partition": record.partition, "tables": describe_tables(tables), "config": parts}

        process.stage = f"publishing {record.partition}"
        before = chain_of(records)[:-1] if delta else []
        chain = [{"name": n, "checksum": read_manifest(self.root.below(n))["checksum"]} for n in before]
        save(self.root, record.partition, write, describe, process, step=record.end_step, kind="model", chain=chain)
        self.follow()

    def follow(self) -> None:
        """Record changes from here on: the live tables are published."""
        for name, table in owned_tables(self._network.tables).items():
            table.take_evicted(READER)
            self._marks[name] = table.mark()

    def forget(self) -> None:
        """Make the next publication whole: the live tables are new ones."""
        self._marks = {}

    def state(self) -> PartState:
        """Return the ids touched and evicted since the last publication."""
        files = {}
        for name, mark in self._marks.items():
            table = owned_tables(self._network.tables)[name]
            evicted = table.evicted(READER)
            if evicted is None:  # too many: the next publication is whole
                continue
            touched = torch.cat([evicted.new_empty(0), *table.touched_since(mark)])
            files[TOUCHED, name] = copied({"id": touched.cpu()})
            files[EVICTED_SINCE, name] = copied({"id": evicted.cpu()})
        return PartState(files=files)

    def load(self, found: FoundState) -> None:
        """The tables are loaded before."""
        self._marks, folder = {}, found.saved.folders[0]
        for name, table in owned_tables(self._network.tables).items():
            if all(self._is_whole(folder, kind, name) for kind in (TOUCHED, EVICTED_SINCE)):
                ids = [self._ids(folder, kind, name).to(table.device) for kind in (TOUCHED, EVICTED_SINCE)]
                self._marks[name] = table.restore_changes(READER, *ids)

    def _is_whole(self, folder: Storage, kind: str, table: str) -> bool:
        """Return whether a table's folder has the files of all ranks that saved."""
        names = folder.names(f"{kind}/{folder_name(table)}")
        return bool(names) and len(names) == int(names[0].removesuffix(".parquet").rpartition("-of-")[2])

    def _ids(self, folder: Storage, kind: str, table: str) -> torch.Tensor:
        process, parts = self._process, [torch.empty(0, dtype=torch.int64)]
        for path in files_of(folder, kind, table, process):
            parts += [columns["id"] for columns in read_columns(folder, path, process.rank, process.world_size)]
        return torch.cat(parts)

    def bytes_of(self, partition: str) -> int | None:
        """Return the bytes of all files of a publication; None if it is not there any more."""
        try:
            manifest = read_manifest(self.root.below(partition))
        except CheckpointError:
            return None
        return sum(file["bytes"] for file in manifest["files"].values())


def _evicted(table: OwnedTable) -> Tensor:
    """Return the ids, int64 [n] on the host, that a table has evicted since the last publication."""
    ids = table.evicted(READER)
    assert ids is not None  # or the publication would be a whole one
    return ids.cpu()


def publications_of(config: Config, run_dir: Path) -> Storage:
    """Return the folder of a run's publications."""
    return Storage(config.daily.publish_to or run_dir / FOLDER)


def check_publish_to(place: str, data: str) -> None:
    """Make the place that the user has chosen for publications.

    Raises ConfigError: it cannot be written to, lies in the data, or holds something else.
    """
    root = Storage(place)
    try:
        if "://" not in place:
            check_place(Path(place), "daily.publish_to", [data])
        elif bucket := missing_bucket(place):
            raise ConfigError(f"daily.publish_to {place}: there is no bucket {bucket}")
        root.make()
        names = root.names()
    except OSError as error:
        raise ConfigError(f"daily.publish_to {place} cannot be written to: {error.strerror or error}") from None
    for name in names:
        if not OF_PUBLICATIONS.fullmatch(name):
            raise ConfigError(
                f"daily.publish_to {place} holds {name}, which no run has published; expected a new folder, an empty "
                "one or the publications of this run"
            )


def point(
    root: Storage, records: Sequence[DayRecord], keep_days: int, warn: Callable[[str], None] = lambda _: None
) -> None:
    """Let `latest` name what the records say, and remove publications that neither it nor the last `keep_days` trained
    days need. Whatever else lies there is left alone. Rank 0 calls it."""
    published = [record for record in records if record.published]
    chains = [chain_of(published[: n + 1]) for n in range(max(0, len(published) - keep_days), len(published))]
    if published and all(root.exists(name) for name in chains[-1]):
        write_latest(root, records)
    known = {record.partition for record in published}
    for name in set(root.names()) - {LATEST}.union(*chains):
        if not KEY.fullmatch(name):
            continue
        if problem := _not_ours(root.below(name), known=name in known):
            warn(f"{root.below(name).name} is not needed any more and is kept, because {problem}")
        else:
            discard(root, name)


def _not_ours(folder: Storage, *, known: bool) -> str | None:
    """Why a folder that is called as a partition is not a publication of ours, or not only. known: records have it."""
    try:
        manifest = read_manifest(folder)
        files, own = {MANIFEST, *manifest["files"]}, read_training(folder).get("partition") == folder.base_name
    except CheckpointError:
        files, own = {path for path in folder.all_files() if OF_A_MODEL.fullmatch(path)}, known
    other = next((path for path in folder.all_files() if path not in files), None)
    return f"it holds {other}, which no run has published" if other else None if own else "no run has published it"
