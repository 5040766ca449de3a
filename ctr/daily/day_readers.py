"""The readers of the partition in work."""

from __future__ import annotations

from tessera.ctr.config import Config
from tessera.ctr.daily.day_record import Days
from tessera.ctr.daily.incremental import sample_of_history
from tessera.ctr.daily.partitions import sources_of
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema
from tessera.ctr.runs.log import RunLog
from tessera.ctr.train.evaluate import open_reader
from tessera.ctr.train.readers import Readers
from tessera.ctr.train.state_parts import FoundState
from tessera.distributed.rank import Process


class DayReaders(Readers):
    """`day`: its rows in the order of the files, for evaluation. `train`: shuffled, and with method window also those
    of trained partitions before it. Both are None between two partitions."""

    def __init__(self, config: Config, schema: Schema, process: Process, days: Days, log: RunLog) -> None:
        super().__init__(train=None, day=None)
        self._config, self._schema, self._process, self._days, self._log = config, schema, process, days, log

    @property
    def day(self) -> ParquetReader:
        """The reader of `day`. Ask only inside a partition."""
        reader = self["day"]
        assert reader is not None
        return reader

    def open(self, partition: str) -> None:
        """Raises PartitionError, DataError: what is wrong with its files."""
        config, keys = self._config, [partition]
        if config.daily.method == "window":
            trained = [record.partition for record in self._days.trained]
            keys = [*trained[max(0, len(trained) - config.daily.window_days + 1) :], partition]
        paths = sources_of(config, keys)
        replay = config.trainer.replay.path
        if config.daily.replay_rows is not None:
            replay = sample_of_history(config, self._schema, self._process, self._days, self._log.folder)
        self["train"] = open_reader(config, self._schema, self._process, paths, training=True, replay=replay)
        self["day"] = open_reader(config, self._schema, self._process, paths[-1], training=False)
        self._log.passed_over(self)

    def close(self) -> None:
        """Close the readers when the partition is done."""
        self.update(train=None, day=None)

    def load(self, found: FoundState) -> None:
        """Open the partition that the state stands inside. `days` are loaded before."""
        if self._days.current is not None:
            self.open(self._days.current.partition)
        super().load(found)
