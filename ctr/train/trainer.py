"""Training over epochs: evaluation, saved states, log and the kept best model are visible lines of the loop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from tessera.ctr.config import Config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.config import schema_of
from tessera.ctr.distil.teacher_logits import prepare
from tessera.ctr.export.dry_run import check_export
from tessera.ctr.metrics.steering import higher_is_better, steering_value
from tessera.ctr.metrics.tasks import scored_rows
from tessera.ctr.models.calibration import calibration_of
from tessera.ctr.report.report import write_report
from tessera.ctr.report.result import PREDICTIONS, begin_result, commit_result
from tessera.ctr.runs.log import RunLog
from tessera.ctr.runs.saved_model import load_model, save_model
from tessera.ctr.selection.dim_masks import DimMasks
from tessera.ctr.selection.gate_result import write_gates
from tessera.ctr.selection.held_out import HeldOutGates
from tessera.ctr.selection.kept_ids import write_kept_ids
from tessera.ctr.selection.optfs import OptFS
from tessera.ctr.selection.table_sizes import write_sizes
from tessera.ctr.table_settings import large_row_rate
from tessera.ctr.train.calibrate import calibrate
from tessera.ctr.train.checkpoints import Checkpoints
from tessera.ctr.train.clock import ttl_in_vain
from tessera.ctr.train.engine import Engine, prepare_device, slow_amp
from tessera.ctr.train.evaluate import evaluate, read_split
from tessera.ctr.train.profiling import StepProfiler
from tessera.ctr.train.readers import open_splits
from tessera.ctr.train.state_parts import BEST, BestModel, RandomNumbers
from tessera.distributed.collectives import gather_objects, on_first_rank, wait_for_all
from tessera.distributed.rank import Process
from tessera.distributed.tables import owned_tables
from tessera.kernels import backend


class Trainer:
    """One run of scripts/train.py: an engine, the readers of the splits, a folder and its saved states. It goes on from
    the newest state if it may.

    Raises (before the run folder is made):
        ConfigError, SchemaError, DataError: what is wrong with the configuration or the files.
    """

    def __init__(self, config: Config, process: Process) -> None:
        self.config, self.process = config, process
        prepare_device(config, process)
        schema = schema_of(config.data)
        self.higher_is_better = higher_is_better(schema.tasks, config.trainer.early_stop.metric)
        self.readers = open_splits(config, schema, process)
        check_export(config, process)
        self.engine = Engine(config, schema, process)
        self.progress = self.engine.progress
        self.log = RunLog(config, process, self.engine.plan)
        self.profiler = StepProfiler(config.trainer.profile, self.log.folder, process)
        self.log.passed_over(self.readers)
        parts = {
            **self.engine.parts(),
            "readers": self.readers,
            "random numbers": RandomNumbers(process),
            "log": self.log,
            "best model": BestModel(self.log.folder, process),
        }
        self.checkpoints = Checkpoints(self.engine, self.log, parts, "scripts/train.py")
        self.checkpoints.begin()
        if calibration := calibration_of(self.engine.network.tower):
            calibration.reset()  # of a model that this one begins with

    def fit(self) -> None:
        """Train for the configured epochs or steps; evaluate, keep the best model, score it, write the report."""
        engine, every = self.engine, self.config.trainer.eval_every
        self.begin()
        self.profiler.at(engine.step)
        held_out = self._held_out()
        while not self.finished:
            for batch in self.readers.train_batches(engine, self.log):
                loss_sum, weight = engine.train_step(batch)
                self.profiler.at(engine.step)
                engine.expire_if_due()
                self.log.train(engine, batch, loss_sum, weight)
                if engine.inside_step:
                    continue
                if held_out and engine.step % self.config.selection.every == 0:
                    engine.learn_gates(next(held_out))
                if every and engine.step % every == 0:
                    self.evaluate()
                self.checkpoints.after_step()
                if self.finished:
                    break
            else:
                self.progress.epoch += 1
                if engine.distil:
                    self.log.distil(engine.step, self.progress.epoch, engine.distil.end_epoch())
                if not every:
                    self.evaluate()
                self.checkpoints.after_epoch()
        self.profiler.close(engine.step)
        self.log.interval(engine)
        self.evaluate()
        self.end()

    def begin(self) -> None:
        """Prepare the run before the first step: have the teacher's logits, if there is one to learn from."""
        self.process.can_stop_later = True
        config = self.config
        for warning in (
            ttl_in_vain(config, self.readers.train),
            slow_amp(config, self.process),
            large_row_rate(config),
        ):
            if warning:
                self.log.warn(warning)
        if self.engine.distil and not self.finished:
            prepare(self.engine, self.readers.train, self.log.folder / "teacher")

    def _held_out(self) -> Iterator[Batch] | None:
        """Return the batches of the valid split, again and again, from where the run stands, for gates that learn on
        them; None without such gates."""
        if not isinstance(self.engine.gates, HeldOutGates):
            return None
        reader = read_split(self.config, self.engine.schema, self.process, "valid")
        assert reader is not None and reader.steps_per_epoch  # as `check` has it
        batches = itertools.chain.from_iterable(reader.epoch(0) for _ in itertools.count())
        done = self.engine.step // self.config.selection.every
        return itertools.islice(batches, done % reader.steps_per_epoch, None)

    def end(self) -> None:
        """Finish the run after the last step: save the state, then score the kept model and write the report."""
        backend.check(self.process.device)
        self.checkpoints.save()
        self.checkpoints.close()
        self.process.can_stop_later = False
        self.report()

    @property
    def finished(self) -> bool:
        trainer, progress, distil = self.config.trainer, self.progress, self.engine.distil
        patience = trainer.early_stop.patience
        out_of_patience = patience is not None and progress.evaluations_since_best >= patience
        enough = trainer.max_steps is not None and progress.step >= trainer.max_steps
        one_more = progress.epoch < trainer.epochs or (distil is not None and distil.wants_more(progress.epoch))
        return out_of_patience or enough or not one_more

    def evaluate(self) -> None:
        """Score the valid split; keep the model if it is the best so far. All ranks see the same numbers."""
        engine, progress = self.engine, self.progress
        valid = self.readers["valid"]
        if valid is None or progress.evaluated_step == progress.step:
            return
        began, progress.evaluated_step = time.perf_counter(), progress.step
        with engine.optimizers.evaluated():
            metrics = evaluate(engine.model, valid, self.process)
        name = self.config.trainer.early_stop.metric
        value, best = steering_value(metrics, name), progress.best
        better = value is not None and (best is None or (value > best if self.higher_is_better else value < best))
        self.log.evaluation(progress.step, "valid", metrics, is_best=better)
        if better:
            progress.best, progress.evaluations_since_best = value, 0
            with engine.optimizers.evaluated():
                save_model(engine.model, self.log.folder / BEST, self.process, progress.step)
        else:
            progress.evaluations_since_best += 1
            engine.optimizers.after_evaluation(progress.evaluations_since_best)
        self.log.not_training(time.perf_counter() - began)

    def report(self) -> None:
        """Score the best model (without any evaluation, the last one) on the valid and test splits; write the report.

        Predictions and report take the place of those of an earlier end of this run as one thing.
        """
        folder, process, step = self.log.folder, self.process, self.progress.step
        which = "best" if self.progress.best is not None else "last"
        if which == "best":
            step = load_model(self.engine.model, folder / BEST, process)
        else:
            self.engine.optimizers.become_evaluated()
            save_model(self.engine.model, folder / BEST, process, step)
        new = on_first_rank(process, lambda: begin_result(folder))
        if self.config.trainer.calibration != "none":
            scored_splits = {split: one for split in ("valid", "test") if (one := self.readers[split]) is not None}
            calibrate(self.engine.model, scored_splits, self.engine.schema.tasks, process, new, self.log.say)
            save_model(self.engine.model, folder / BEST, process, step)
        scored = {}
        for split in ("valid", "test"):
            reader = self.readers[split]
            if reader is not None:
                metrics = evaluate(self.engine.model, reader, process, new / PREDICTIONS, split)
                self.log.final_evaluation(step, which, split, metrics)
                scored[split] = scored_rows(self.engine.schema.tasks, metrics)
        process.stage = "writing the report"
        self.log.bad_rows(self.readers)
        wait_for_all()  # all predictions are written
        report = on_first_rank(process, lambda: self._write_report(new, scored))
        if gates := self.engine.gates:
            written = on_first_rank(process, lambda: write_gates(gates, folder, step, which))
            if isinstance(gates, DimMasks):
                self._write_sizes(gates, written)
            if isinstance(gates, OptFS):
                self.log.say(write_kept_ids(owned_tables(self.engine.tables), folder, process))
            self.log.say(f"importance of fields by selection.method={gates.method}: {written}")
        if not scored:
            self.log.say("nothing was scored: data.valid and data.test are null")
        self.log.say(report)
        self.log.close()

    def _write_sizes(self, gates: DimMasks, folder: Path) -> None:
        """Write what the masks of tables say of their dims. Collective."""
        counts = gather_objects({name: len(table) for name, table in owned_tables(self.engine.tables).items()})
        rows = {name: sum(one.get(name, 0) for one in counts) for name in gates.tables}
        same = sum(dim == gates.width for dim in self.engine.network.tower.embedding_dims.values())
        keep = self.config.selection.keep_above
        on_first_rank(self.process, lambda: write_sizes(gates, folder, rows, keep, same))

    def _write_report(self, new: Path, scored: dict[str, dict[str, int]]) -> str:
        """Write the report, on the first rank. Returns its summary."""
        folder = self.log.folder
        report = write_report(folder, result=new, scored=scored)
        commit_result(folder)
        return report.summary()
