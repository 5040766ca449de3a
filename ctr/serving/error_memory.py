"""An error memory: what a frozen model got wrong lately on rows like this one corrects it, without a gradient
(ReLoop2, Zhu et al., KDD 2023).

A row is known by h, what the last layer of the tower reads of it, scaled to length 1. Each of K arrays has 2^L buckets;
the bucket of a row in array j is the signs of L random projections h R_j. A bucket has running sums of h, of the labels
y and of the model's own predictions p, and a count. A read takes the row's K buckets as neighbours:

    s_j = cos(h, mean h of bucket j),   a = softmax(s / temperature) over buckets that are not empty
    y'  = sum_j a_j mean y_j,   p' = sum_j a_j mean p_j
    e   = gamma (y' - p) + (1 - gamma) (y' - p')
    out = clamp(p + strength e, 0, 1);   p itself where all buckets are empty        (`strength` is lambda)
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.tensor_files import sealed, unsealed, write_whole
from tessera.embedding.settings import setting
from tessera.kernels.pool import sum_by_row
from tessera.kernels.random import normal

FORMAT = 1  # of saved memories
FILE = "memory.safetensors"
ROWS_AT_ONCE = 8192  # that are read together: an array's buckets of them are held in memory


@dataclass
class MemorySettings:
    """How an error memory reads and writes. What is kept depends on arrays, bits and seed alone."""

    arrays: int = setting(16, "K: independent arrays of buckets", at_least=1)
    bits: int = setting(8, "L: an array has 2^L buckets", at_least=0, at_most=20)
    strength: float = setting(0.5, "lambda: share of the error that is corrected; 0: the model as it is", at_least=0)
    gamma: float = setting(
        0.0, "1: the error is that of this prediction; 0: that of the bucket's own predictions", at_least=0, at_most=1
    )
    temperature: float = setting(0.1, "of the softmax over buckets", above=0)
    seed: int = setting(1, "of the projections")


class ErrorMemory:
    """The memory of one model. Any number of threads may read and write.

    Attributes:
        settings: how it reads; strength, gamma and temperature may be other ones than when it was filled.
        base: names the model whose errors these are; a memory of another one is worth nothing.
        rows: that were written.
        written: of a memory that was read, whose labels it has (`answers.py`).
    """

    def __init__(self, width: int, settings: MemorySettings, base: str) -> None:
        """width: H, values of h."""
        self.width, self.settings, self.base, self.rows = width, settings, base, 0
        arrays, bits = settings.arrays, settings.bits
        places = torch.arange(arrays * bits)
        self._planes = normal(settings.seed, 0, places, width).view(arrays, bits, width)
        self._powers = 2 ** torch.arange(bits)
        self._lock = threading.Lock()
        self.written: dict[str, Tensor] = {}
        self._make_empty()

    def _make_empty(self) -> None:
        buckets = 2**self.settings.bits
        self._hidden = torch.zeros(self.settings.arrays, buckets, self.width)
        self._sums = torch.zeros(self.settings.arrays, buckets, 3, dtype=torch.float64)  # of y, of p, rows

    @property
    def bytes(self) -> int:
        """Return the bytes that it takes, however much is written: K 2^L (4 H + 24)."""
        return self._hidden.nbytes + self._sums.nbytes

    def clear(self, base: str) -> None:
        """Forget everything: the model is another one, and so is its h."""
        with self._lock:
            self.base, self.rows = base, 0
            self._make_empty()

    def corrected(self, hidden: Tensor, prediction: Tensor) -> Tensor:
        """Return corrected probabilities float32 [n].

        hidden: float32 [n, width]; prediction: float32 [n], the model's. Nothing is written.
        """
        with self._lock:
            pieces = zip(hidden.split(ROWS_AT_ONCE), prediction.split(ROWS_AT_ONCE), strict=True)
            return torch.cat([self._read(*piece) for piece in pieces]) if len(hidden) else prediction

    def _read(self, hidden: Tensor, prediction: Tensor) -> Tensor:
        unit, settings = _unit(hidden), self.settings
        likeness, means = [], []
        for array, bucket in enumerate(self._buckets(unit)):
            sums = self._sums[array][bucket]
            rows = sums[:, 2]
            mean = _unit(self._hidden[array][bucket])
            likeness.append(((unit * mean).sum(1) / settings.temperature).masked_fill(rows == 0, -math.inf))
            means.append(sums[:, :2] / rows.clamp_min(1).unsqueeze(1))
        s_nk, means_nk2 = torch.stack(likeness, 1), torch.stack(means, 1)
        is_empty = torch.isinf(s_nk).all(1)
        a_nk = torch.softmax(s_nk.masked_fill(is_empty.unsqueeze(1), 0.0), 1)
        label, base = (a_nk.unsqueeze(2) * means_nk2).sum(1).unbind(1)
        error = settings.gamma * (label - prediction) + (1 - settings.gamma) * (label - base)
        moved = (prediction + settings.strength * error).clamp(0, 1).float()
        return torch.where(is_empty, prediction, moved)

    def add(self, hidden: Tensor, label: Tensor, prediction: Tensor) -> None:
        """Write rows whose labels are known now.

        hidden: float32 [n, width]; label, prediction: [n], the prediction being the model's own, not a corrected one.
        """
        if not len(hidden):
            return
        unit = _unit(hidden)
        values = torch.stack([label.double(), prediction.double(), torch.ones(len(hidden), dtype=torch.float64)], 1)
        with self._lock:
            self.rows += len(hidden)
            for array, bucket in enumerate(self._buckets(unit)):
                distinct, place = torch.unique(bucket, return_inverse=True)
                self._hidden[array][distinct] += sum_by_row(unit, place, len(distinct))
                self._sums[array].index_add_(0, bucket, values)

    def checksum(self) -> str:
        """Return what tells its content and its settings from others."""
        with self._lock:
            said = json.dumps([self.base, self.rows, asdict(self.settings)])
            return f"{zlib.crc32(self._sums.numpy().tobytes(), zlib.crc32(said.encode())):08x}"

    def _buckets(self, unit: Tensor) -> list[Tensor]:
        """Return the bucket of each row in each array, int64 [n] each."""
        return [((unit @ planes.t() > 0) * self._powers).sum(1) for planes in self._planes]

    def copied(self, written: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what `memory.safetensors` has now: tensors, and what is said of them. written: which answers have
        their labels in it, as `answers.py` says it."""
        with self._lock:
            tensors = {"hidden": self._hidden.clone(), "planes": self._planes, "sums": self._sums.clone()}
            said = {"format": FORMAT, "base": self.base, "rows": self.rows, "settings": asdict(self.settings)}
        return tensors | dict(written or {}), said

    def save(self, folder: str | Path) -> None:
        """Write the memory to `memory.safetensors` in a folder, whole or not at all."""
        write_whole(Path(folder) / FILE, sealed(*self.copied()))

    @classmethod
    def load(cls, folder: str | Path, settings: MemorySettings | None = None) -> ErrorMemory:
        """Return the memory that `save` wrote. settings: of reading, instead of the saved ones; arrays, bits and seed
        are those of what is kept.

        Raises ExportError: there is none, or it was changed.
        """
        path = Path(folder) / FILE
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ExportError(f"{folder} holds no error memory: {error.strerror or error}") from None
        found, said = unsealed(content, path, "error memory", FORMAT)
        try:
            saved = MemorySettings(**said["settings"])
            if settings is not None:
                kept = {"arrays": saved.arrays, "bits": saved.bits, "seed": saved.seed}
                saved = MemorySettings(**{**asdict(settings), **kept})
            memory = cls(found["hidden"].shape[2], saved, str(said["base"]))
            for name, mine in (("hidden", memory._hidden), ("planes", memory._planes), ("sums", memory._sums)):
                if found[name].shape != mine.shape or found[name].dtype != mine.dtype:
                    raise ValueError(f"{name} is {found[name].dtype} {list(found[name].shape)}")
            memory._hidden, memory._planes, memory._sums = found["hidden"], found["planes"], found["sums"]
            memory.rows = int(said["rows"])
            memory.written = {name: value for name, value in found.items() if name.startswith("written_")}
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ExportError(f"{path} is no error memory: {' '.join(str(error).split())[:200]}") from None
        return memory


def base_of(state: Mapping[str, Tensor]) -> str:
    """Return what tells the dense weights of a tower from those of another one, 16 hexadecimal digits. state: of the
    tower, or of its exported graph."""
    digest = hashlib.sha256()
    for name, value in sorted((name.removeprefix("tower."), value) for name, value in state.items()):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest.update(name.encode() + content)
    return digest.hexdigest()[:16]


def _unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values.float(), dim=1)
