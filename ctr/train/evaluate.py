"""Score a split: streaming metrics over all ranks, and each rank's predictions as parquet on request."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.config import Config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.config import paths_of, split_days
from tessera.ctr.data.day_folders import DayFolders
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.labels import Label
from tessera.ctr.data.listing import Listing
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema
from tessera.ctr.instantiate import class_of
from tessera.ctr.metrics.tasks import Answer, TaskMetrics, label_of, logit_of, prediction_of
from tessera.ctr.report.predictions import ANSWER, PLACE, REQUIRED, SPLIT_OF_FILE
from tessera.ctr.report.result import answer_folder
from tessera.ctr.runs.slice_columns import SliceColumn
from tessera.ctr.train.step_pipeline import to_device
from tessera.distributed.atomic import partial_of, put_in_place
from tessera.distributed.collectives import gather
from tessera.distributed.new_ids import rows_with_new_ids
from tessera.distributed.rank import Process
from tessera.kernels import backend


def read_split(config: Config, schema: Schema, process: Process, split: str) -> ParquetReader | None:
    """Return the reader of `train`, `valid` or `test` below data.path, or None if the configuration has no such
    split."""
    paths = paths_of(config.data, split)
    if paths is None:
        return None
    training = split == "train"
    replay = config.trainer.replay.path if training else None
    return open_reader(
        config, schema, process, paths, training=training, days=split_days(config.data, split), replay=replay
    )


def open_reader(
    config: Config,
    schema: Schema,
    process: Process,
    path: str | Listing | Sequence[str | Listing],
    *,
    training: bool,
    days: list[str] | None = None,
    replay: str | None = None,
) -> ParquetReader:
    """Open a reader of folders, files, patterns or URIs as the configuration says; only one for training shuffles.

    days: only these days of `path`. replay: a file with more rows, of any day.
    """
    data, trainer = config.data, config.trainer
    reader = ParquetReader(
        path,
        schema,
        batch_size=trainer.batch_size,
        rank=process.rank,
        world_size=process.world_size,
        seed=trainer.seed,
        shuffle=trainer.shuffle and training,
        lanes=data.lanes,
        order=data.order if training else "mixed",
        period_days=data.period_days,
        window_rows=data.window_rows,
        threads=data.threads,
        bad_rows=data.bad_rows,
        days=days,
        replay=replay,
        replay_weight=trainer.replay.weight,
        # Numbers of rows tell two runs' predictions apart, and the teacher's.
        numbered=not training or trainer.distil.kind != "none",
        nested=bool(getattr(class_of(config.model), "is_nested", False)),
        folders=DayFolders.of(data.partition),
        marker=config.daily.marker,
        negative_rate=data.negative_rate if training else 1.0,
        where=data.where,
    )
    agree_on_files(reader, process)
    return reader


def agree_on_files(reader: ParquetReader, process: Process) -> None:
    """Each rank lists files for itself. Raises DataError on all of them where one sees others than rank 0, as when
    files come or change while the job starts."""
    if process.world_size == 1:
        return
    state = reader.state()
    seen = hashlib.sha256(repr((state["fingerprint"], state["contents"])).encode()).digest()
    mine = torch.tensor([int.from_bytes(seen[:7], "little")])
    everyone = gather(mine).flatten()
    for rank, other in enumerate(everyone.tolist()):
        if other != everyone[0]:
            raise DataError(
                f"{reader.groups.files[0].path} and the files beside it: rank {rank} sees others than rank 0; start "
                "again when nobody writes there, and with the same folder on every host"
            )


@torch.no_grad()
def evaluate(
    model: DistributedModelParallel,
    reader: ParquetReader,
    process: Process,
    predictions: Path | None = None,
    split: str = "valid",
    slices: Sequence[str] = (),
    *,
    mark_new_ids: bool = False,
    watch: Callable[[Batch, Tensor], None] | None = None,
) -> dict[str, float | None]:
    """Return metrics of the whole split, the same on every rank.

    Args:
        model: a `Network`, sharded.
        predictions: a folder; this rank's rows go to `<split>-<rank>.parquet` in it (written under another name
            and renamed when complete). Where the reader numbers rows, row and logit are among the columns. With
            several labels there is a folder for each answer, `answer_folder`.
        slices: features of the schema whose values are written beside each prediction, for the report's tables by
            value.
        mark_new_ids: tell in a column `new_ids` of the predictions whether a row has ids without a row of their own in
            the tables, which must be dynamic.
        watch: told of each batch and its logits.
    """
    was_training = model.training
    model.eval()
    metrics = TaskMetrics(reader.schema.tasks, process.device, grouped=reader.schema.group is not None)
    columns = [SliceColumn(reader.schema, name, reader.groups.unsigned) for name in slices]
    answers = metrics.answers if predictions else []
    writers = []
    if predictions:
        writers = [
            _PredictionWriter(answer_folder(predictions, answer.name), split, process.rank, columns, told)
            for answer, told in zip(answers, _told_of(answers), strict=True)
        ]
    for number, batch in enumerate(reader.epoch(0)):
        process.stage = f"evaluation of {split}, batch {number}"
        batch = to_device(batch, process.device)
        logits, _ = model(batch)
        metrics.update(logits, batch.labels, batch.known, batch.weight, batch.group)
        if watch:
            watch(batch, logits)
        new_ids = rows_with_new_ids(model.module.tables, batch.ids) if mark_new_ids and writers else None
        for answer, writer in zip(answers, writers, strict=True):
            writer.write(_scores_of(answer, metrics.labels, logits, batch), batch, new_ids)
    for writer in writers:
        writer.close()
    backend.check(process.device)  # rows that a kernel on a GPU skipped were scored as zeros
    metrics.all_reduce(dist.group.WORLD)
    model.train(was_training)
    return metrics.compute()


def _scores_of(answer: Answer, labels: Sequence[Label], logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Return prediction, label, weight (0 where the label does not count) and logit of an answer, [B] each."""
    logit = logit_of(answer, labels, logits)
    label, weight = label_of(answer, labels, batch.labels, batch.known, batch.weight)
    return {"prediction": prediction_of(answer, logit), "label": label, "weight": weight, "logit": logit}


def _told_of(answers: Sequence[Answer]) -> list[dict[bytes | str, bytes | str]]:
    """Return what the files of each answer say of it: what it is, and its place; nothing of a single label's."""
    return [
        {ANSWER: "number" if one.label.is_number else "joint" if one.joint else "label", PLACE: str(place)}
        if one.name
        else {}
        for place, one in enumerate(answers)
    ]


class _PredictionWriter:
    """Appends rows to one parquet file that appears under its name only when complete."""

    def __init__(
        self,
        folder: Path,
        split: str,
        rank: int,
        slices: Sequence[SliceColumn],
        told: Mapping[bytes | str, bytes | str],
    ) -> None:
        """told: metadata of the file, beside the split."""
        self._slices = slices
        self._metadata: dict[bytes | str, bytes | str] = {SPLIT_OF_FILE: split, **told}
        folder.mkdir(parents=True, exist_ok=True)
        self._split = split
        self._final = folder / f"{split}-{rank:05d}.parquet"
        self._partial = partial_of(self._final)
        self._writer: pq.ParquetWriter | None = None

    def write(self, scores: dict[str, Tensor], batch: Batch, new_ids: Tensor | None) -> None:
        columns = {name: scores[name] for name in REQUIRED}
        if batch.group is not None:
            columns["group"] = batch.group
        if new_ids is not None:
            columns["new_ids"] = new_ids
        if batch.number is not None:
            columns |= {"row": batch.number, "logit": scores["logit"]}
        arrays = {name: pa.array(values[: batch.rows].cpu().numpy()) for name, values in columns.items()}
        arrays["split"] = pa.DictionaryArray.from_arrays(pa.array([0] * batch.rows, pa.int8()), pa.array([self._split]))
        table = pa.table(arrays, metadata=self._metadata)
        for column in self._slices:
            table = table.append_column(column.field, column.values(batch))
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._partial, table.schema, write_page_checksum=True)
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is None:  # this rank has no rows; the file tells that the split was scored
            fields = [(name, pa.float32()) for name in REQUIRED]
            self._writer = pq.ParquetWriter(self._partial, pa.schema(fields, self._metadata))
        self._writer.close()
        put_in_place(self._partial, self._final)
