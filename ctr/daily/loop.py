"""Day after day: evaluate with yesterday's model, guard, train one pass, expire, save, publish, report.

What is done, and the weights that it led to, are one moment: the newest saved state. Publications, records and reports
are made from it, and made again where a job was killed before they were.
"""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import replace

from tessera.ctr.config import Config
from tessera.ctr.daily.bands import out_of_band
from tessera.ctr.daily.calendar import Calendar, Due, any_asked_to_stop
from tessera.ctr.daily.corrected import CorrectedDays
from tessera.ctr.daily.day_readers import DayReaders
from tessera.ctr.daily.day_record import COUNTS, METRICS, DayRecord, Days, Stage
from tessera.ctr.daily.incremental import ask_teacher
from tessera.ctr.daily.latest import is_served
from tessera.ctr.daily.partitions import PartitionError, sources_of
from tessera.ctr.daily.publish import Publisher, point
from tessera.ctr.daily.records import clear_day, day_dir, measure, write_day_report, write_records
from tessera.ctr.daily.table_counts import count_tables
from tessera.ctr.data.config import schema_of
from tessera.ctr.export.dry_run import check_export
from tessera.ctr.export.published import PublishedCheck
from tessera.ctr.report.days import write_index
from tessera.ctr.runs.log import RunLog
from tessera.ctr.selection.config import refuse_gates
from tessera.ctr.train.checkpoints import Checkpoints
from tessera.ctr.train.engine import Engine, prepare_device, slow_amp
from tessera.ctr.train.evaluate import evaluate
from tessera.ctr.train.profiling import StepProfiler
from tessera.ctr.train.state_parts import BestModel, RandomNumbers
from tessera.distributed.collectives import on_first_rank, wait_for_all
from tessera.distributed.last_word import say
from tessera.distributed.plan import size
from tessera.distributed.process import Stopped
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError
from tessera.kernels import backend

HELD_STATUS = 3  # exit status: the guard holds a day; what was published before stays


class Daily:
    """A run that lives through the partitions of a data set, in order. It goes on from the newest state.

    Attributes:
        days: what is known of the partitions: those that are done, and the current one.
        readers: of the current partition.

    Raises:
        ConfigError: what is wrong with the configuration.
    """

    def __init__(self, config: Config, process: Process) -> None:
        self.config, self.process = config, process
        refuse_gates(config.selection, "what is retrained by day")
        if config.trainer.calibration != "none":
            raise ConfigError(
                f"trainer.calibration is {config.trainer.calibration}, and a run over days has no valid split to fit "
                "it on; expected none"
            )
        prepare_device(config, process)
        schema = schema_of(config.data)
        check_export(config, process)
        self.engine = Engine(config, schema, process)
        self.progress = self.engine.progress
        self.log = RunLog(config, process, self.engine.plan)
        self._warn_of_keys_without_effect()
        self.profiler = StepProfiler(config.trainer.profile, self.log.folder, process)
        self.days = Days(config.daily.keep_days)
        tower, folder = self.engine.network.tower, self.log.folder
        enabled = config.daily.memory.enabled
        self.memory = CorrectedDays(config, schema, tower, process, folder) if enabled else None
        self.readers = DayReaders(config, schema, process, self.days, self.log)
        self.calendar = Calendar(config, process, self.log.say)
        self.publisher = Publisher(self.log.folder, config, self.engine.network, process)
        anew = config.daily.method == "window"
        self.first_tower = copy.deepcopy(self.engine.network.tower.state_dict()) if anew else None
        parts = {
            **self.engine.parts(),
            "days": self.days,
            "publisher": self.publisher,
            "readers": self.readers,
            "random numbers": RandomNumbers(process),
            "log": self.log,
            "best model": BestModel(self.log.folder, process),
        }
        self.checkpoints = Checkpoints(self.engine, self.log, parts, "scripts/daily.py")
        self.checkpoints.begin()

    def run(self) -> None:
        """All partitions that are due. Leaves with status 3 where the guard holds one, with 75 when asked to stop."""
        self.process.can_stop_later = True
        with self.engine.optimizers.evaluated():
            self.catch_up()
        for due in self.calendar.due(self.days.done):
            if due.key in self.config.daily.skip:
                self.pass_over(due)
                continue
            record = self.open_day(due)
            if record.stage is Stage.OPENED:
                self.evaluate_day(record)
            if self.wants_training():
                if record.stage is Stage.EVALUATED:
                    self.guard(record)
                self.train_day(record)
            self.close_day(record)
            self.leave_if_asked()
        self.checkpoints.close()
        if self.days.done:
            newest = self.days.done[-1].partition
            self.log.say(f"all {len(self.days.done)} partitions up to {newest} are done; nothing to do")
        self.log.close()

    def catch_up(self) -> None:
        """Publish and tell what the newest state says is done, where a job was killed before it did."""
        done, step = self.days.done, self.progress.step
        last = max((i for i, record in enumerate(done) if record.published), default=None)
        if last is not None:
            records, at_its_end = done[: last + 1], step == done[last].step
            missing = self.publisher.missing(records)
            if missing == [records[-1].partition] and at_its_end:
                self.publisher.publish(records)
            elif missing:
                self.log.warn(f"{self.publisher.root.name}: {missing[0]} is missing or damaged; the next one is whole")
            elif at_its_end:
                self.publisher.follow()
            if at_its_end:
                self.check_published(records[-1])
            self._weigh_published(len(records), records[-1])
        else:
            self.publisher.check_free()
        if self.process.is_main and done:
            self._tell()

    def open_day(self, due: Due) -> DayRecord:
        """Open the partition's files; a state inside it goes on with its record."""
        if self.days.current is None:
            self.days.current, self.progress.epoch = DayRecord(due.key, due.fingerprint), 0
            self.readers.open(due.key)
        record = self.days.current
        if (due.key, due.fingerprint) != (record.partition, record.fingerprint):
            raise PartitionError(
                f"the state stands inside {record.partition} with fingerprint {record.fingerprint}; "
                f"found {due.key} with {due.fingerprint} (daily.rollback_to goes back to the end of a day before)"
            )
        return record

    def evaluate_day(self, record: DayRecord) -> None:
        """Progressive validation: the model has seen the days before, and nothing of this one."""
        folder, key, began = self.log.folder, record.partition, time.perf_counter()
        on_first_rank(self.process, lambda: clear_day(folder, key))
        marks = self.engine.dynamic is not None
        predictions = day_dir(folder, key) / "predictions"
        watching = self.memory.watching(key) if self.memory else nullcontext()
        with watching as watch, self.engine.optimizers.evaluated():
            evaluate(
                self.engine.model, self.readers.day, self.process, predictions, key, mark_new_ids=marks, watch=watch
            )
        wait_for_all()
        measured = on_first_rank(self.process, lambda: measure(predictions))
        record.known, record.new = measured.pop("known"), measured.pop("new")
        record.metrics, record.stage = measured, Stage.EVALUATED
        record.evaluate_seconds = time.perf_counter() - began
        record.tables = count_tables(self.engine.dynamic)
        shown = {name: measured[name] for name in COUNTS + METRICS}
        for task, one in measured.get("tasks", {}).items():
            shown |= {f"{task}.{name}": value for name, value in one.items()}
        self.log.evaluation(self.progress.step, "progressive", shown, is_best=False)
        if record.new:
            rows = measured["rows"]
            self.log.say(f"{key} · {record.new['rows'] / rows:.1%} of {rows:,} rows have new ids")
        if self.memory:
            self.log.say(self.memory.correct(key, self.days.done))
        self.log.bad_rows({"progressive": self.readers["day"]})

    def wants_training(self) -> bool:
        daily = self.config.daily
        return daily.method != "stale" or len(self.days.trained) < daily.stale_after

    def guard(self, record: DayRecord) -> None:
        """Hold a day whose numbers leave their bands, unless it is accepted.

        Raises Stopped, with status 3, on all ranks.
        """
        learnt = self.days.trained[self.config.trainer.warm_start.path is None :]  # the first model had learnt nothing
        assert record.metrics is not None  # it is evaluated
        before = [one.metrics for one in learnt if one.metrics is not None]
        problem = out_of_band(self.config.daily.bands, record.metrics, before)
        if problem is not None and record.partition not in self.config.daily.accept:
            self._hold(record, problem)
        record.reason = f"accepted although {problem}" if problem else None
        record.stage, record.step = Stage.ADMITTED, self.progress.step

    def _hold(self, record: DayRecord, problem: str) -> None:
        """Record a held day, with a report; the live model stays as it was, and so does what is saved."""
        key, tables = record.partition, count_tables(self.engine.dynamic).since(record.tables)
        held = replace(record, stage=Stage.HELD, reason=problem, step=self.progress.step, tables=tables)
        self.days.done, self.days.current = [*self.days.done, held], None
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

    def train_day(self, record: DayRecord) -> None:
        """`daily.epochs` passes over the partition (method window: over the last ones), then expire."""
        engine, reader, epochs = self.engine, self.readers.train, self.config.daily.epochs
        began, before = time.perf_counter(), record.train_seconds or 0.0
        self.begin_period(record)
        self.profiler.at(engine.step)
        while self.progress.epoch < epochs or (engine.distil and engine.distil.wants_more(self.progress.epoch)):
            for batch in self.readers.train_batches(engine, self.log):
                loss_sum, weight = engine.train_step(batch)
                self.profiler.at(engine.step)
                engine.expire_if_due()
                self.log.train(engine, batch, loss_sum, weight)
                record.stage, record.train_seconds = Stage.TRAINING, before + time.perf_counter() - began
                if engine.inside_step:
                    continue
                is_last = self.progress.epoch >= epochs - 1 and reader.steps_done == reader.steps_per_epoch
                self.checkpoints.after_step(save_follows=is_last)
            self.progress.epoch += 1
            if engine.distil:
                self.log.distil(engine.step, self.progress.epoch, engine.distil.end_epoch())
        self.profiler.close(engine.step)
        self.log.interval(engine)
        if engine.dynamic:
            engine.dynamic.expire(self.progress.now, everywhere=True)
        backend.check(self.process.device)
        record.stage, record.train_seconds = Stage.TRAINING, before + time.perf_counter() - began

    def begin_period(self, record: DayRecord) -> None:
        """Prepare training before the first step on a partition, or before the next one of a state inside it."""
        goes_on = record.stage is Stage.TRAINING
        if not goes_on:
            if self.config.daily.method == "window":
                self._start_anew(record)
            if self.engine.dynamic:
                self.engine.dynamic.begin_period()
        if self.engine.distil:
            rows = self.readers.train.rows
            ask_teacher(self.engine, self.days, self.readers.day, rows, self.log.folder, goes_on=goes_on)

    def close_day(self, record: DayRecord) -> None:
        """Make the day part of the state, then publish and tell it; `catch_up` does so if the job is killed here."""
        trained, rows = record.stage is Stage.TRAINING, 0
        record.tables = count_tables(self.engine.dynamic).since(record.tables)
        record.step = self.progress.step
        if trained:
            assert record.train_seconds is not None
            rows = self.readers.train.rows * self.config.daily.epochs
            record.stage, record.samples_per_second = Stage.TRAINED, rows / record.train_seconds
            record.published = self.publisher.next_kind(self.days.done)
            self.log.bad_rows({"train": self.readers.train})
        else:
            record.stage = Stage.SKIPPED
            record.reason = f"method stale trains the first {self.config.daily.stale_after} partitions"
        self.days.current = None
        self.readers.close()
        self._add(record)
        if trained:
            with self.engine.optimizers.evaluated():
                self.publisher.publish(self.days.done)
                self.check_published(record)
            self._weigh_published(len(self.days.done), record)
            held = "" if record.published_bytes is None else f" {size(record.published_bytes)}"
            self.log.say(
                f"{record.partition} · trained {rows:,} rows in {record.train_seconds:.1f} s · "
                f"published{held} ({record.published})"
            )
        if self.process.is_main:
            self._tell()

    def check_published(self, record: DayRecord) -> None:
        """Compare an export of what is published with the live model, unless it is to be served already.

        Raises ExportError, on all ranks: they differ, and `latest` is left as it was.
        """
        name, root = record.partition, self.publisher.root
        if not self.config.export.published or on_first_rank(self.process, lambda: is_served(root, name)):
            return
        try:
            paths = sources_of(self.config, [name])
        except PartitionError:  # it is gone since; golden rows are made up
            paths = []
        checked = PublishedCheck(self.config, self.engine.schema, self.engine.model, self.process)
        checked.check(root.below(name).name, name, day_dir(self.log.folder, name), paths)

    def pass_over(self, due: Due) -> None:
        """Leave out a partition that daily.skip names."""
        reason, step = "daily.skip" if due.path else "missing, daily.skip", self.progress.step
        if self.days.current is not None and self.days.current.partition == due.key:
            raise PartitionError(
                f"daily.skip has {due.key}, whose training has begun; daily.rollback_to goes back to the day before it"
            )
        self._add(DayRecord(due.key, due.fingerprint, Stage.SKIPPED, reason, step=step))
        self.log.say(f"{due.key} · passed over: {reason}")
        if self.process.is_main:
            write_records(self.log.folder, self.days.done)

    def leave_if_asked(self) -> None:
        """Raise Stopped, on all ranks, if one was asked to stop; all is saved."""
        if any_asked_to_stop(self.process):
            behind = f" behind {self.days.done[-1].partition}" if self.days.done else ""
            line = f"stopped by {self.process.stopped_by}{behind}; the same command goes on"
            self.log.say(line)
            self.checkpoints.close()
            self.log.close()
            raise Stopped(line=line)

    def _add(self, record: DayRecord) -> None:
        """Record a partition as done and save: a restarted job begins behind it."""
        self.days.add(record)
        self.log.day(len(self.days.done), self.progress.step, record.to_json())
        self.checkpoints.save(again=True)
        self.checkpoints.wait()

    def _weigh_published(self, number: int, record: DayRecord) -> None:
        record.published_bytes = self.publisher.bytes_of(record.partition)
        self.log.published(number, record.published_bytes)

    def _tell(self) -> None:
        """Write what follows from the records: `latest`, days.jsonl, and the reports that are not there yet."""
        self.process.stage, done = "publishing and reporting", self.days.done
        point(self.publisher.root, done, self.config.daily.keep_days, self.log.warn)
        for before, record in zip([None, *done], done, strict=False):
            if self.config.daily.report and record.metrics is not None:
                write_day_report(self.log.folder, record, before.end_step if before else 0)
        write_records(self.log.folder, done)
        write_index(self.log.folder)

    def _start_anew(self, record: DayRecord) -> None:
        """Reset the model to that before the first step, for method window."""
        assert self.first_tower is not None
        self.engine.network.tower.load_state_dict(self.first_tower)
        if self.engine.sharded:
            self.engine.sharded.restart()
        self.engine.optimizers.begin_anew()
        self.checkpoints.forget_tables()
        self.publisher.forget()
        record.tables = replace(record.tables, new=0, expired=0)

    def _warn_of_keys_without_effect(self) -> None:
        for key, value in {
            "trainer.early_stop.patience": self.config.trainer.early_stop.patience,
            "trainer.eval_every": self.config.trainer.eval_every,
            "optimizer.plateau.factor": self.config.optimizer.plateau.factor,
        }.items():
            if value is not None:
                self.log.warn(f"{key} is {value} and does nothing here: a run over days scores each day once")
        if warning := slow_amp(self.config, self.process):
            self.log.warn(warning)
