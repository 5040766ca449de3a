"""Score any data set with the model of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.config import Config, as_yaml, typed
from tessera.ctr.data.config import schema_of
from tessera.ctr.data.id_names import names_of_ids
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.metrics.tasks import answers_of, scored_rows
from tessera.ctr.network import build_model
from tessera.ctr.output_folders import replacing_on_ranks
from tessera.ctr.report.files import json_text
from tessera.ctr.report.predictions import NEW_IDS, SLICE
from tessera.ctr.report.report import Report, write_report
from tessera.ctr.report.result import answer_folder
from tessera.ctr.report.slices import SLICE_NAMES, largest_ids
from tessera.ctr.runs.log import copy_teacher
from tessera.ctr.runs.saved_model import fill_model, has_model, load_model
from tessera.ctr.runs.slice_columns import SliceColumn
from tessera.ctr.runs.stored_config import read_config, targets_of
from tessera.ctr.train.engine import set_tf32, set_threads
from tessera.ctr.train.evaluate import evaluate, read_split
from tessera.ctr.train.find_state import find_saved
from tessera.ctr.train.state_parts import BEST
from tessera.distributed.atomic import write_text
from tessera.distributed.collectives import wait_for_all
from tessera.distributed.rank import Process
from tessera.distributed.saved.manifest import CheckpointError
from tessera.distributed.tables import owned_tables
from tessera.embedding.errors import ConfigError, TesseraError

PLACE = "evaluations"  # in the folder of the run


def run_config(run_dir: Path, overrides: list[str], named: Collection[str] = ()) -> Config:
    """Return the configuration a run was trained with, with `data.*` and `trainer.*` keys replaced by the overrides.

    A class outside of `tessera.ctr.models` is imported only if it is among `named`, or an override names it as the run
    does: `model.target=my_models.Mine`.

    Raises:
        ConfigError: no run there, an unknown key, or an override of what the saved model depends on.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it holds no config.yaml")
    targets = targets_of(overrides)
    saved = read_config(path, {*targets.values(), *named})
    for key, target in targets.items():
        if OmegaConf.select(saved, key) != target:
            raise ConfigError(f"override {key}={target}: the model of {run_dir} is {OmegaConf.select(saved, key)}")
    overrides = [override for override in overrides if override.partition("=")[0] not in targets]
    for override in overrides:
        if not override.startswith(("data.", "trainer.")) or "=" not in override or override.startswith("data.schema"):
            raise ConfigError(
                f"override {override!r}: a trained model is scored with its own schema, model and tables; "
                "only data.<key>=<value> and trainer.<key>=<value> can change"
            )
    fitted = next((one for one in overrides if one.startswith("trainer.calibration=")), None)
    if fitted is not None:
        raise ConfigError(f"override {fitted!r}: a trained model has the calibration that it was trained with")
    try:
        merged = OmegaConf.merge(saved, OmegaConf.from_dotlist(overrides))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    assert isinstance(merged, DictConfig)
    return typed(merged)


def score_run(
    config: Config, process: Process, run_dir: Path, split: str, output: Path | None, slices: Sequence[str] = ()
) -> Report | None:
    """Write predictions and the report of one split to `output` (default: evaluations/<time> in the run folder).

    Returns the report on the first rank, None on the others.

    slices: features by whose values the report breaks the metrics down; `new_ids` are rows with ids that the model's
    tables do not know.
    """
    set_threads(config)
    set_tf32(config, process)
    config.trainer.shuffle = False  # so that predictions carry the places of their rows, also those of training data
    schema = schema_of(config.data)
    reader = read_split(config, schema, process, split)
    if reader is None:
        raise ConfigError(f"data.{split} is null; there is nothing to score")
    features = [name for name in slices if name != NEW_IDS]
    for feature in features:
        SliceColumn(schema, feature)  # a name that the schema lacks ends the job before anything is written
    model, _ = build_model(config, schema, process)
    marks = NEW_IDS in slices
    if marks and not owned_tables(model.module.tables):
        raise ConfigError("slice new_ids: embedding.kind is static; expected dynamic, which knows its ids")
    which, step = load_model_of_run(model, config, run_dir, process)
    output, places = output or run_dir / PLACE / f"{datetime.now():%Y%m%d-%H%M%S}", [run_dir / PLACE]
    sources: list[str | Path] = [run_dir, config.data.path]
    with replacing_on_ranks(process, output, "--output", "evaluate.py", sources, places) as folder:
        if process.is_main:
            (folder / "config.yaml").write_text(as_yaml(config))
            copy_teacher(config, folder)
        metrics = evaluate(model, reader, process, folder / "predictions", split, features, mark_new_ids=marks)
        wait_for_all()
        if process.is_main:
            _write_slice_names(folder, reader, split, features)
            with open(folder / "metrics.jsonl", "w") as file:
                line = {"kind": "eval", "split": split, "step": step, "model": which, **metrics}
                file.write(json.dumps(line) + "\n")
            report = write_report(folder, scored={split: scored_rows(schema.tasks, metrics)})
    return replace(report, folder=output) if process.is_main else None


def load_model_of_run(
    model: DistributedModelParallel, config: Config, run_dir: Path, process: Process
) -> tuple[str, int]:
    """Fill `model` with the best model of the run or, where it keeps none, with that of its newest saved state.

    Returns "best" or "newest", and the step that the model is of.

    Raises:
        TesseraError: the run has neither.
    """
    if has_model(run_dir / BEST):
        return "best", load_model(model, run_dir / BEST, process)

    def warn(sentence: str) -> None:
        if process.is_main:
            print(f"warning: {sentence}", file=sys.stderr)

    states = config.trainer.checkpoint.folder or str(run_dir)
    try:
        saved = find_saved(states, process, warn)
    except CheckpointError as error:
        raise TesseraError(f"{run_dir} holds no best model, and {error}; train the run first") from None
    fill_model(model, saved, process, in_place=False)
    return "newest", saved.step


def _write_slice_names(folder: Path, reader: ParquetReader, split: str, slices: Sequence[str]) -> None:
    """The strings of the ids that the report will show, where ids are hashes of strings."""
    names = {}
    first = answer_folder(folder / "predictions", answers_of(reader.schema.tasks)[0].name)
    for feature in reader.schema.categorical:
        if feature.name in slices and feature.dtype == "string":
            ids = largest_ids(first, split, SLICE + feature.name)
            found = names_of_ids(reader.groups, feature, ids)
            names[feature.name] = {f"{hashed % 2**64:x}": name for hashed, name in found.items()}
    if names:
        write_text(folder / SLICE_NAMES, json_text(names) + "\n")
