"""Filters that decide which unknown ids of a batch get a row.

`admit(ids int64 [u] distinct, counts int64 [u], now, step)` returns bool [u]. Counts are added first: an id passes
in the batch in which it reaches the threshold. The answer depends on the ids, their counts and what the filter has
seen before, neither on their order in the batch nor (exact and probabilistic filter) on the other ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.embedding.config import Admission
from tessera.embedding.errors import TesseraError
from tessera.embedding.row_index import ID, RowIndex
from tessera.embedding.sliding import SlidingHashFilter
from tessera.kernels.gather import gather
from tessera.kernels.random import uniform
from tessera.kernels.touch import COUNT, LAST_SEEN

COUNTER_CHUNK_ROWS = 1 << 16
SURE = 0.95  # with this probability the probabilistic filter has let an id pass that was seen `threshold` times


def admission_filter(
    admission: Admission, seed: int, key: int, ttl_seconds: int | None, device: torch.device | str
) -> ExactCounter | SlidingHashFilter | ProbabilisticFilter | VocabularyFilter | None:
    """Return the configured filter; None if every id passes."""
    if admission.kind == "exact" and admission.threshold > 1:
        return ExactCounter(admission.threshold, ttl_seconds, device)
    if slides(admission):
        return SlidingHashFilter(admission.threshold, admission.capacity, admission.splits, device)
    if admission.kind == "vocabulary":
        return VocabularyFilter(device)
    return ProbabilisticFilter(admission.threshold, seed, key) if admits_by_chance(admission) else None


def slides(admission: Admission) -> bool:
    """Return whether ids are counted by a sliding filter."""
    return admission.kind == "sliding" and admission.threshold > 1


def admits_by_chance(admission: Admission) -> bool:
    """Return whether ids are admitted by lot."""
    return admission.kind == "probabilistic" and admission.threshold > 1


class ExactCounter:
    """Counts every id that has no row yet, and forgets it when it passes.

    About 60 bytes per pending id; ids that do not come back within `ttl_seconds` are dropped by `expire`, the only
    bound of the memory. An evicted id begins at zero.
    """

    def __init__(self, threshold: int, ttl_seconds: int | None = None, device: torch.device | str = "cpu") -> None:
        self._threshold = threshold
        self._ttl_seconds = ttl_seconds
        self._index = RowIndex(COUNTER_CHUNK_ROWS, device)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        return self._index.nbytes

    def admit(self, ids: Tensor, counts: Tensor, now: int | Tensor, step: int) -> Tensor:
        rows = self._index.find(ids)
        seen = gather(self._index.meta, rows, 1, begin=COUNT).flatten() if self._index.meta else 0
        passed = seen + counts >= self._threshold
        pending = ~passed
        first = pending & (rows < 0)
        rows[first] = self._index.add(ids[first], mark=0)
        times = now[pending] if isinstance(now, Tensor) else now
        self._index.touch(rows[pending], times, counts[pending])
        self._index.remove(rows[passed & (rows >= 0)])
        return passed

    def expire(self, now: int, budget_rows: int | None = None) -> None:
        """Drop ids not seen for ttl_seconds; looks at `budget_rows` of them (None: at all)."""
        if self._ttl_seconds is not None:
            for rows in self._index.expired(now, self._ttl_seconds, budget_rows):
                self._index.remove(rows)

    def export_state(self) -> dict[str, Tensor]:
        """Return ids, counts, last_seen: int64 [k]. May be cut by id, as rows may."""
        parts = [torch.empty((0, 4), dtype=torch.int64)] + [meta for _, meta in self._index.walk(COUNTER_CHUNK_ROWS)]
        meta = torch.cat([part.to(parts[-1].device) for part in parts])
        names = {"ids": ID, "counts": COUNT, "last_seen": LAST_SEEN}
        return {name: meta[:, column].contiguous() for name, column in names.items()}

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Add what another counter knew of ids that this one does not know."""
        rows = self._index.add(state["ids"], mark=0)
        self._index.write(rows, state["last_seen"], state["counts"], state["ids"], mark=0)


class ProbabilisticFilter:
    """Admits an id at random with chance 1 - (1 - p)^count, where (1 - p)^threshold = 5 %; remembers nothing.

    The random draw is a function of (seed, table, id, step), so that neither order nor rank matters. miss: 1 - p.
    """

    nbytes = 0

    def __init__(self, threshold: int, seed: int, key: int) -> None:
        self.miss = (1 - SURE) ** (1 / threshold)
        self._seed = seed
        self._key = key

    def admit(self, ids: Tensor, counts: Tensor, now: int | Tensor, step: int) -> Tensor:
        # step + 1: at step 0 the same numbers make the initial values of a row.
        lot = uniform(self._seed, self._key, ids, 1, step + 1).flatten()
        admitted: Tensor = lot < 1 - self.miss ** counts.to(torch.float64)
        return admitted

    def expire(self, now: int, budget_rows: int | None = None) -> None:
        """Do nothing: there is nothing to forget."""

    def export_state(self) -> dict[str, Tensor]:
        return {}

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Do nothing: there is nothing to restore."""


class VocabularyFilter:
    """Admits the ids of a vocabulary, and no others. It counts nothing, and whoever trains gives it the vocabulary; it
    takes part in no saved state.

    Raises TesseraError when it is asked without a vocabulary.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._ids: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._ids is None else self._ids.nbytes

    def give(self, ids: Tensor) -> None:
        """Admit these ids from now on: int64 [n], distinct, ascending."""
        self._ids = ids.to(self._device)

    def admit(self, ids: Tensor, counts: Tensor, now: int | Tensor, step: int) -> Tensor:
        if self._ids is None:
            raise TesseraError("admission.kind is vocabulary, and the table was given none")
        if not len(self._ids):
            return torch.zeros_like(ids, dtype=torch.bool)
        place = torch.searchsorted(self._ids, ids).clamp(max=len(self._ids) - 1)
        return self._ids[place] == ids

    def expire(self, now: int, budget_rows: int | None = None) -> None:
        """Do nothing: a vocabulary stays."""

    def export_state(self) -> dict[str, Tensor]:
        return {}

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Do nothing: there is nothing to restore."""
