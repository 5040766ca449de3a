"""Find the saved model of a run that is to be exported."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tessera.ctr.config import Config
from tessera.ctr.daily.publish import publications_of
from tessera.ctr.runs.saved_model import has_model, replaced
from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.files import Place
from tessera.ctr.serving.saved_models import LATEST, Publications, SavedModel
from tessera.ctr.train.find_state import find_saved
from tessera.ctr.train.state_parts import BEST
from tessera.distributed.locations import filesystem_of
from tessera.distributed.rank import Process
from tessera.distributed.saved.manifest import CheckpointError
from tessera.embedding.errors import TesseraError


@dataclass(frozen=True)
class Source:
    """The saved model that is exported. models: newest first, see `newest_rows`. published: the link to the
    publication that it is, for servers that follow; None if it is none."""

    name: str
    step: int
    models: list[SavedModel]
    published: dict[str, str] | None = None


def open_source(location: str, name: str) -> Source:
    """Return a saved model by its folder, with those that it builds on beside it.

    Raises ExportError: it is none, or damaged.
    """
    place = _place(location)
    models = [SavedModel(place)]
    parent = location.rstrip("/").rpartition("/")[0]
    for link in reversed(models[0].manifest.get("chain", [])):
        model = SavedModel(_place(f"{parent}/{link['name']}"))
        if model.manifest["checksum"] != link["checksum"]:
            raise ExportError(f"{model.place.name} is not the one that {location} builds on")
        models.append(model)
    return Source(name, int(models[0].manifest["step"]), models)


def _place(location: str) -> Place:
    filesystem, root = filesystem_of(location)
    return Place(location, filesystem, root)


def source_of_run(config: Config, run_dir: Path, process: Process) -> Source:
    """Return what a run over days has published last; of another run the best model or, where it keeps none, that of
    its newest saved state.

    Raises TesseraError: there is none, or it is damaged.
    """
    published = publications_of(config, run_dir)
    if published.exists(LATEST):
        links = Publications(published.name, *filesystem_of(published.name)).latest()
        source = open_source(f"{published.name}/{links[-1]['name']}", links[-1]["name"])
        return replace(source, published=links[-1])
    best = run_dir / BEST
    if has_model(best):
        best = best if best.exists() else replaced(best)
        source = open_source(str(best), BEST)
        return replace(source, name=f"{BEST}-step-{source.step}")

    def warn(sentence: str) -> None:
        print(f"warning: {sentence}", file=sys.stderr)

    try:
        saved = find_saved(config.trainer.checkpoint.folder or str(run_dir), process, warn)
    except CheckpointError as error:
        raise TesseraError(f"{run_dir} holds no best model, and {error}; train the run first") from None
    return open_source(saved.name, f"step-{saved.step}")
