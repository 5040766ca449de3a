"""Bring an export up to date with what a run over days publishes: whole models, changes, and rollbacks.

A whole publication becomes an export of its own. What one changes becomes a folder of these rows alone, laid over the
export before it (`changes.py`), so that applying it costs what it holds. When changes have become many they are merged
with the export below them into a new one, while the model is served. Every folder is whole and synced before it takes
its name by one rename; so a kill at any moment leaves models that are whole, and a failed update leaves the one that is
served. What is merged is, file by file of its tables, the export that would be made anew.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq

from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.files import hold, sync_folder
from tessera.ctr.serving.saved_models import Publications
from tessera.ctr.serving.scorer import GOLDEN, PREDICTION, Scorer
from tessera.ctr.serving.version_files import Link, name_of, write_changed, write_merged, write_whole

PARTIAL = ".partial-"  # begins names of folders that nobody takes for an export
CHANGED = ".changes"  # ends names of folders of changes
OF_VERSIONS = re.compile(rf".+-[0-9a-f]{{8}}-[0-9a-f]{{8}}({re.escape(CHANGED)})?")
MERGE_SHARE = 0.25  # of changed rows beside the export's, from which they are merged
MOST_CHANGES = 100  # publications over one export


class Versions:
    """The versions made of publications, in one folder that belongs to one server.

    base: the export that the server was given: its graph and its columns are those of all versions. merge_share: of
    changed rows beside those of the export below them, from which both are merged.
    """

    def __init__(self, base: Path, published: str, folder: Path, merge_share: float = MERGE_SHARE) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.publications = Publications(published)
        self.base = Scorer(base)
        self._merge_share = merge_share
        self._merging: set[Path] = set()  # folders that a merge reads and writes, or has written
        self._static = any(table.kind == "static" for table in self.base.description.tables)
        self._lock: IO[str] | None = None

    def begin(self) -> Scorer:
        """Remove what a killed server left half written, and open the version that is furthest along the chain that
        `latest` names; the base if there is none.

        Raises ExportError: another server uses the folder. OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hold()
        for path in self.folder.iterdir():
            if path.name.startswith(PARTIAL):
                shutil.rmtree(path, ignore_errors=True)
        try:
            links = self.publications.latest()
        except ExportError:
            return self.base
        return self._on_disk(links, None, check=True) or self.base

    def _whole(self, link: Link) -> Path:
        """Return the folder of a version that is whole."""
        return self.folder / name_of(link, self.base)

    def _changed(self, link: Link) -> Path:
        """Return the folder of what a publication changes."""
        return self.folder / f"{name_of(link, self.base)}{CHANGED}"

    def _hold(self) -> None:
        """Keep the folder for this process, which may ask again. Raises ExportError: another one has it."""
        if self._lock is None:
            self._lock = hold(self.folder, "--versions")

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def update(self, current: Scorer) -> Scorer | None:
        """Return a scorer of what `latest` names; None if `current` is it, and nothing was merged since it was opened.

        Raises ExportError: what is published is missing, damaged or of another model; OSError: it cannot be written.
            What is served is untouched.
        """
        links = self.publications.latest()
        if current.manifest["published"] == links[-1] and current.folders[0] == self._below(links):
            return None
        scorer = self._on_disk(links, current, check=False)
        if scorer is None or self._static:  # the newest holds all rows of static tables
            scorer = self._made_whole(links)
        place = links.index(scorer.manifest["published"])
        for before, link in zip(links[place:], links[place + 1 :], strict=False):
            if not self._changed(link).is_dir():
                model = self.publications.open([link])[0]
                self._write(self._changed(link), write_changed, link, before, model)
            scorer = scorer.with_changes(self._changed(link))
        self._check(scorer)
        self._forget({*scorer.folders, *current.folders, *self._merging})
        return scorer

    def _below(self, links: Sequence[Link]) -> Path | None:
        """Return the folder of the newest publication of a chain that is there whole."""
        for link in reversed(links):
            if self._whole(link).is_dir():
                return self._whole(link)
            if link == self.base.manifest["published"]:
                return self.base.folder
        return None

    def _on_disk(self, links: Sequence[Link], current: Scorer | None, *, check: bool) -> Scorer | None:
        """Return the model furthest along a chain that needs no publication: the newest whole one with the changes over
        it that are there, or `current` if it is that. check: compare all checksums; what is damaged is removed and made
        again."""
        while (below := self._below(links)) is not None:
            if current is not None and current.folders[0] == below and current.manifest["published"] in links:
                return current
            try:
                scorer = self.base if below == self.base.folder else Scorer(below, check=check, graph=self.base)
                break
            except ExportError:  # damaged on the disk since
                shutil.rmtree(below, ignore_errors=True)
        else:
            return None
        for link in links[links.index(scorer.manifest["published"]) + 1 :]:
            try:
                if not self._changed(link).is_dir():
                    break
                scorer = scorer.with_changes(self._changed(link))
            except ExportError:
                shutil.rmtree(self._changed(link), ignore_errors=True)
                break
        return scorer

    def _made_whole(self, links: Sequence[Link]) -> Scorer:
        """Return the last publication of a chain as an export."""
        path = self._whole(links[-1])
        if not path.is_dir():
            models = self.publications.open(links[-1:] if self._static else links)
            self._write(path, write_whole, links[-1], models)
        return Scorer(path, graph=self.base)

    def merge_due(self, scorer: Scorer) -> bool:
        """Return whether a scorer has so many changes over its export that they should be merged."""
        share = scorer.changed > self._merge_share * scorer.rows
        return len(scorer.folders) > 1 and (share or len(scorer.folders) > MOST_CHANGES)

    def merge(self, scorer: Scorer) -> None:
        """Write a scorer with changes as an export of its own, from which the next `update` goes on. May run in a
        thread beside `update`.

        Raises ExportError: what it reads is gone, for another whole model is served; OSError: it cannot be written.
        """
        path = self._whole(scorer.manifest["published"])
        self._merging = {path, *scorer.folders}
        try:
            if not path.is_dir():
                self._write(path, write_merged, scorer)
        finally:
            self._merging = {path}

    def _write(self, path: Path, write: Callable[..., None], *of: Any) -> None:
        """Write a folder under its name, whole or not at all."""
        partial = self.folder / f"{PARTIAL}{path.name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            write(partial, self.base, *of)
            os.rename(partial, path)
            sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _check(self, scorer: Scorer) -> None:
        """Raise ExportError for a model that scores golden rows as no probability."""
        golden = self.base.folder / GOLDEN
        if golden.exists():
            found = scorer(pq.read_table(golden, partitioning=None).drop_columns([PREDICTION]))
            if not np.isfinite(found).all():
                raise ExportError(f"{scorer.version} scores golden rows as {found[~np.isfinite(found)][0]}")

    def _forget(self, used: set[Path]) -> None:
        """Remove the folders of other versions than are used; what is open stays readable."""
        for path in self.folder.iterdir():
            if path not in used and OF_VERSIONS.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
