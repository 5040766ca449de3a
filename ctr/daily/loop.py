"""Day after day: evaluate with yesterday's model, guard, train one pass, expire, save, publish, report.

What is done, and the weights that it led to, are one moment: the newest saved state. Publications, records and reports
are made from it, and made again where a job was killed before they were.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from tessera.ctr.daily.calendar import Calendar, Due, any_asked_to_stop
from tessera.ctr.daily.guard import out_of_band
from tessera.ctr.daily.incremental import Incremental
from tessera.ctr.daily.partitions import PartitionError, sources_of
from tessera.ctr.daily.publish import Publisher, point
from tessera.ctr.daily.records import (
    COUNTS,
    HELD,
    METRICS,
    SKIPPED,
    TABLES,
    TRAINED,
    clear_day,
    day_dir,
    measure,
    new_record,
    records_of,
    write_day_report,
    write_records,
)
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.report.days import write_index
from tessera.ctr.train.evaluate import evaluate, open_reader
from tessera.ctr.train.optimizers import Optimizers
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.collectives import on_first_rank, sum_over_ranks, wait_for_all
from tessera.distributed.plan import size
from tessera.distributed.process import Stopped, say
from tessera.distributed.saved.manifest import TRAINING
from tessera.distributed.saved.row_files import ColumnSource
from tessera.distributed.saved.states import Saved, folder_name

HELD_STATUS = 3  # exit status: the guard holds a day; what was published before stays


class Daily(Trainer):
    """A run that lives through the partitions of a data set, in order.

    Attributes:
        records: of the partitions that are done (ctr/daily/records.py), in order.
        record: of the partition in work, as far as it is known; None between two.
    """

    command = "scripts/daily.py"

    def open_readers(self) -> dict[str, ParquetReader | None]:
        """None yet: readers change from day to day."""
        return {"train": None, "day": None}

    def begin(self) -> None:
        for key, value in {
            "trainer.early_stop.patience": self.config.trainer.early_stop.patience,
            "trainer.eval_every": self.config.trainer.eval_every,
            "optimizer.plateau.factor": self.config.optimizer.plateau.factor,
        }.items():
            if value is not None:
                self.log.warn(f"{key} is {value} and does nothing here: a run over days scores each day once")
        self.records: list[dict[str, Any]] = []
        self.record: dict[str, Any] | None = None
        self.calendar = Calendar(self.config, self.process, self.log.say)
        self.publisher = Publisher(self.log.folder, self.config, self.model.module, self.process)
        if self.config.daily.method == "window":
            self.first_tower = copy.deepcopy(self.model.module.tower.state_dict())
        self.incremental = Incremental(self)
        super().begin()

    def state(self) -> dict[str, Any]:
        reader = self.readers["train"]
        daily = copy.deepcopy({"records": self.records, "record": self.record})  # it is written behind training
        return {"reader": reader and reader.state(), "daily": daily}

    def state_files(self) -> dict[tuple[str, str], ColumnSource]:
        return self.publisher.files_of_state()

    def load_state(self, saved: Saved) -> None:
        self.records, self.record = records_of(saved.training, f"{saved.name}/{TRAINING}")
        self.publisher.restore(saved)
        if self.record is not None:
            self._open(self.record["partition"])
            self.readers["train"].load_state(saved.training["reader"])

    def states_to_keep(self) -> set[str]:
        trained = [record for record in self.records if record["status"] == TRAINED]
        return {folder_name(record["step"]) for record in trained[-self.config.daily.keep_days :]}

    def run(self) -> None:
        """All partitions that are due. Leaves with status 3 where the guard holds one, with 75 when asked to stop."""
        self.process.can_stop_later = True
        self.catch_up()
        for due in self.calendar.due(self.records):
            if due.key in self.config.daily.skip:
                self.pass_over(due)
                continue
            self.open_day(due)
            if self.record["rows"] is None:
                self.evaluate_day()
            if self.wants_training():
                self.guard()
                self.train_day()
            self.close_day()
            self.leave_if_asked()
        self.checkpoints.close()
        if self.records:
            newest = self.records[-1]["partition"]
            self.log.say(f"all {len(self.records)} partitions up to {newest} are done; nothing to do")
        self.log.close()

    def catch_up(self) -> None:
        """Publish and tell what the newest state says is done, where a job was killed before it did."""
        last = max((i for i, record in enumerate(self.records) if record["published"]), default=None)
        if last is not None:
            records, at_its_end = self.records[: last + 1], self.step == self.records[last]["step"]
            missing = self.publisher.missing(records)
            if missing == [records[-1]["partition"]] and at_its_end:
                self.publisher.publish(records)
            elif missing:
                self.log.warn(f"{self.publisher.root.name}: {missing[0]} is missing or damaged; the next one is whole")
            elif at_its_end:
                self.publisher.follow()
            self._weigh_published(len(records), records[-1])
        else:
            self.publisher.check_free()
        if self.process.is_main and self.records:
            self._tell()

    def _weigh_published(self, number: int, record: dict[str, Any]) -> None:
        record["published_bytes"] = self.publisher.bytes_of(record["partition"])
        self.log.published(number, record["published_bytes"])

    def open_day(self, due: Due) -> None:
        """Open the partition's files; a state inside it goes on with its record."""
        if self.record is None:
            self.record, self.epoch = new_record(due.key, due.fingerprint), 0
            self._open(due.key)
        if (due.key, due.fingerprint) != (self.record["partition"], self.record["fingerprint"]):
            raise PartitionError(
                f"the state stands inside {self.record['partition']} with fingerprint {self.record['fingerprint']}; "
                f"found {due.key} with {due.fingerprint} (daily.rollback_to goes back to the end of a day before)"
            )

    def evaluate_day(self) -> None:
        """Progressive validation: the model has seen the days before, and nothing of this one."""
        record, folder = self.record, self.log.folder
        key, began = record["partition"], time.perf_counter()
        on_first_rank(self.process, lambda: clear_day(folder, key))
        marks = self.growing is not None
        predictions = day_dir(folder, key) / "predictions"
        evaluate(self.model, self.readers["day"], self.process, predictions, key, mark_new_ids=marks)
        wait_for_all()
        record |= on_first_rank(self.process, lambda: measure(predictions))
        record["evaluate_seconds"] = time.perf_counter() - began
        record["tables"] = self._counts()
        self.log.evaluation(self.step, "progressive", {name: record[name] for name in COUNTS + METRICS}, is_best=False)
        if record["new"]:
            self.log.say(
                f"{key} · {record['new']['rows'] / record['rows']:.1%} of {record['rows']:,} rows have new ids"
            )
        self.log.bad_rows({"progressive": self.readers["day"]})

    def wants_training(self) -> bool:
        daily = self.config.daily
        trained = sum(record["status"] == TRAINED for record in self.records)
        return daily.method != "stale" or trained < daily.stale_after

    def guard(self) -> None:
        """Hold a day whose numbers leave their bands, unless it is accepted, or its training has begun.

        Raises Stopped, with status 3, on all ranks.
        """
        record = self.record
        if record["step"] is not None:  # it was let through, and a state stands behind some of its steps
            return
        trained = [one for one in self.records if one["status"] == TRAINED]
        learnt = trained[self.config.trainer.warm_start.path is None :]  # the first model had learnt nothing
        problem = out_of_band(self.config.daily.guard, record, learnt)
        accepted = record["partition"] in self.config.daily.accept
        if problem is not None and not accepted:
            self._hold(problem)
        record["reason"] = f"accepted although {problem}" if problem else None
        record["step"] = self.step

    def _hold(self, problem: str) -> None:
        """The live model stays as it was, and so does what is saved; a held day leaves a record and a report."""
        key = self.record["partition"]
        held = self.record | {"status": HELD, "reason": problem, "step": self.step}
        held["tables"] = self._counts_since(held["tables"])
        self.records, self.record = [*self.records, held], None
        if self.process.is_main:
            self._tell()
            line = f"{key} is held, not trained and not published: {problem}; "
            line += f"daily.accept=[{key}] trains it, daily.skip=[{key}] passes it over"
            self.log.warn(line)
            say(line)
        self.checkpoints.close()
        self.log.close()
        wait_for_all()  # a launcher ends the other ranks when the first one leaves
        raise Stopped(HELD_STATUS)

    def train_day(self) -> None:
        """`daily.epochs` passes over the partition (method window: over the last ones), then expire."""
        reader, epochs, began = self.readers["train"], self.config.daily.epochs, time.perf_counter()
        self.begin_period(goes_on=self.record["train_seconds"] is not None)
        before = self.record["train_seconds"] or 0.0
        while self.epoch < epochs or (self.distil and self.distil.wants_more(self.epoch)):
            for _ in self.steps(reader):
                self.record["train_seconds"] = before + time.perf_counter() - began
                is_last = self.epoch >= epochs - 1 and reader.steps_done == reader.steps_per_epoch
                self.checkpoints.after_step(save_follows=is_last)
            self.epoch += 1
            if self.distil:
                self.log.distil(self.step, self.epoch, self.distil.end_epoch())
        self.log_interval()
        if self.growing:
            self.growing.expire(self.now, everywhere=True)
        self.record["train_seconds"] = before + time.perf_counter() - began

    def begin_period(self, goes_on: bool) -> None:
        """Before the first step on a partition, or (goes_on) before the next one of a state inside it."""
        if not goes_on:
            if self.config.daily.method == "window":
                self._start_anew()
            if self.growing:
                self.growing.begin_period()
        if self.distil:
            self.incremental.ask_teacher(goes_on)

    def close_day(self) -> None:
        """Make the day part of the state, then publish and tell it; `catch_up` does so if the job is killed here."""
        record, trained = self.record, self.record["train_seconds"] is not None
        record |= {"status": TRAINED if trained else SKIPPED, "step": self.step}
        record["tables"] = self._counts_since(record["tables"])
        if trained:
            rows = self.readers["train"].rows * self.config.daily.epochs
            record["samples_per_second"] = rows / record["train_seconds"]
            record["published"] = self.publisher.next_kind(self.records)
            self.log.bad_rows({"train": self.readers["train"]})
        else:
            record["reason"] = f"method stale trains the first {self.config.daily.stale_after} partitions"
        self.record, self.readers = None, self.open_readers()
        self._add(record)
        if trained:
            self.publisher.publish(self.records)
            self._weigh_published(len(self.records), record)
            self.log.say(
                f"{record['partition']} · trained {rows:,} rows in {record['train_seconds']:.1f} s · "
                f"published {size(record['published_bytes'])} ({record['published']})"
            )
        if self.process.is_main:
            self._tell()

    def pass_over(self, due: Due) -> None:
        reason = "daily.skip" if due.path else "missing, daily.skip"
        record = new_record(due.key, due.fingerprint) | {"status": SKIPPED, "reason": reason, "step": self.step}
        if self.record is not None and self.record["partition"] == due.key:
            raise PartitionError(
                f"daily.skip has {due.key}, whose training has begun; daily.rollback_to goes back to the day before it"
            )
        self._add(record)
        self.log.say(f"{due.key} · passed over: {reason}")
        if self.process.is_main:
            write_records(self.log.folder, self.records)

    def leave_if_asked(self) -> None:
        """Raises Stopped, on all ranks, if one was asked to stop; all is saved."""
        if any_asked_to_stop(self.process):
            behind = f" behind {self.records[-1]['partition']}" if self.records else ""
            line = f"stopped by {self.process.stopped_by}{behind}; the same command goes on"
            self.log.say(line)
            self.checkpoints.close()
            self.log.close()
            raise Stopped(line=line)

    def _add(self, record: dict[str, Any]) -> None:
        """A partition is done: from this save on, a restarted job begins behind it."""
        self.records.append(record)
        self.records.sort(key=lambda one: one["partition"])
        self.log.day(len(self.records), self.step, record)
        self.checkpoints.save(again=True)
        self.checkpoints.wait()

    def _tell(self) -> None:
        """Write what follows from the records: `latest`, days.jsonl, and the reports that are not there yet."""
        self.process.stage = "publishing and reporting"
        point(self.publisher.root, self.records, self.config.daily.keep_days, self.log.warn)
        for before, record in zip([None, *self.records], self.records, strict=False):
            if self.config.daily.report and record["rows"] is not None:
                write_day_report(self.log.folder, record, before["step"] if before else 0)
        write_records(self.log.folder, self.records)
        write_index(self.log.folder)

    def _open(self, key: str) -> None:
        """Readers of a partition: for evaluation in the order of the files, for training shuffled, and with method
        window also over the trained ones before it."""
        daily, keys = self.config.daily, [key]
        if daily.method == "window":
            trained = [record["partition"] for record in self.records if record["status"] == TRAINED]
            keys = [*trained[max(0, len(trained) - daily.window_days + 1) :], key]
        paths = sources_of(self.config, keys)
        replay = self.config.trainer.replay.path
        if daily.replay_rows is not None:
            replay = self.incremental.sample_of_history()
        self.readers = {
            "train": open_reader(self.config, self.schema, self.process, paths, training=True, replay=replay),
            "day": open_reader(self.config, self.schema, self.process, paths[-1], training=False),
        }
        self.log.passed_over(self.readers)

    def _start_anew(self) -> None:
        """Method window: the model as it was before the first step."""
        self.model.module.tower.load_state_dict(self.first_tower)
        if self.sharded:
            self.sharded.restart()
        self.optimizers = Optimizers(self.config.optimizer, self.model)
        self.checkpoints.forget_tables()
        self.publisher.forget()
        self.record["tables"] |= {"new": 0, "expired": 0}

    def _counts(self) -> dict[str, int | None]:
        """Rows and bytes of all tables now, rows added and given up since there are tables. The same on all ranks."""
        if self.growing is None:
            return dict.fromkeys(TABLES)
        stats = self.growing.stats().values()
        names = ("rows", "bytes", "admitted", "expired", "evicted")
        counts = torch.tensor([sum(int(one[name]) for one in stats) for name in names])
        sum_over_ranks(counts)
        rows, held, new, expired, evicted = counts.tolist()
        return {"rows": rows, "bytes": held, "new": new, "expired": expired + evicted}

    def _counts_since(self, before: dict[str, int | None]) -> dict[str, int | None]:
        now = self._counts()
        if now["rows"] is None:
            return now
        return now | {name: now[name] - before[name] for name in ("new", "expired")}
