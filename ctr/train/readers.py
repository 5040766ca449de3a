"""The readers of a run, as one part of its saved states."""

from __future__ import annotations

from collections.abc import Iterator

from tessera.ctr.config import Config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.config import SPLITS
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema
from tessera.ctr.runs.log import RunLog
from tessera.ctr.train.engine import Engine
from tessera.ctr.train.evaluate import read_split
from tessera.ctr.train.state_parts import FoundState, PartState
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError


class Readers(dict[str, ParquetReader | None]):
    """Split -> its reader, None for a split that there is not. The position of `train` is saved, and how many rows each
    reader has left out as bad."""

    @property
    def train(self) -> ParquetReader:
        """The reader of `train`. Ask only while there is one."""
        reader = self["train"]
        assert reader is not None
        return reader

    def train_batches(self, engine: Engine, log: RunLog) -> Iterator[Batch]:
        """Return the remaining batches of the current epoch, for the engine's steps."""
        reader, epoch = self.train, engine.progress.epoch
        batches = log.progress(reader.epoch(epoch), reader, epoch)
        return engine.pipeline.feed(batches, begins=not reader.steps_done)

    def state(self) -> PartState:
        train = self["train"]
        bad_rows = {split: reader.bad_row_counts.copy() for split, reader in self.items() if reader is not None}
        return PartState({"reader": None if train is None else train.state()}, {"bad_rows": bad_rows})

    def load(self, found: FoundState) -> None:
        """Continue from a state; on another number of ranks, rank 0 takes all counts of bad rows.

        Raises DataError: the data are not those of the state.
        """
        train = self["train"]
        if train is not None:
            train.load_state(found.training["reader"])
        everyone, process = [one["bad_rows"] for one in found.training["of_ranks"]], found.process
        first, stop = (process.rank, process.rank + 1) if found.same_ranks else (0, len(everyone) * process.is_main)
        for counts in everyone[first:stop]:
            for split, reader in self.items():
                if reader is None:
                    continue
                for reason, count in counts.get(split, {}).items():
                    reader.bad_row_counts[reason] = reader.bad_row_counts.get(reason, 0) + count


def open_splits(config: Config, schema: Schema, process: Process) -> Readers:
    """Open the readers of the splits of `scripts/train.py`.

    Raises:
        ConfigError: there is no training data. DataError, SchemaError: what is wrong with the files.
    """
    readers = Readers((split, read_split(config, schema, process, split)) for split in SPLITS)
    if readers["train"] is None:
        raise ConfigError("data.train is null; training needs it")
    return readers
