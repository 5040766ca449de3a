"""Read models that training has saved or published, as docs/publications.md describes them: parquet, safetensors, JSON.

A model is one folder, or the changes of the newest folder over those before it down to a whole one. Every file is
compared with its checksum before it is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tessera.ctr.serving.decay import Decay
from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.files import Place, checksum, is_inside, read_manifest
from tessera.ctr.serving.table_writer import folder_of

FORMAT = 2  # of saved models
LATEST = "latest"
TRAINING = "training.json"
DTYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class RowPart:
    """Rows of a table as they are stored. ids: int64 [n]; values: uint8 [n, bytes], one group after the other; scales:
    float32 [n, groups], or None where no group has any; decay: float64 [n, 1 or 2], how far values are decayed, or None
    where they do not decay."""

    ids: np.ndarray
    values: np.ndarray
    scales: np.ndarray | None
    decay: np.ndarray | None = None

    def take(self, chosen: np.ndarray) -> RowPart:
        scales = None if self.scales is None else self.scales[chosen]
        decay = None if self.decay is None else self.decay[chosen]
        return RowPart(self.ids[chosen], self.values[chosen], scales, decay)


class SavedModel:
    """One folder: a whole model, or changes.

    Raises ExportError: it is none, or was changed.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.manifest = read_manifest(place, FORMAT)
        self._checked: set[str] = set()
        self.training: dict[str, Any] = self._read(TRAINING) if TRAINING in self.manifest["files"] else {}

    @property
    def link(self) -> dict[str, str]:
        """What `latest` and chains call it: name and checksum."""
        return {"name": self.place.name.rstrip("/").rpartition("/")[2], "checksum": self.manifest["checksum"]}

    @property
    def is_whole(self) -> bool:
        return not self.manifest.get("chain")

    def check(self) -> None:
        """Compare every file with its checksum. Raises ExportError: one differs."""
        for path in self.manifest["files"]:
            self._check(path)

    def _check(self, path: str) -> None:
        if path in self._checked:
            return
        sealed = self.manifest["files"].get(path)
        problem = f"{path} is not listed" if sealed is None else self.place.problem(path, sealed)
        if problem:
            raise ExportError(f"{self.place.name} is damaged: {problem}")
        self._checked.add(path)

    def _read(self, path: str) -> dict[str, Any]:
        self._check(path)
        return self.place.read_json(path)

    def _files(self, kind: str, table: str) -> list[str]:
        folder = f"{kind}/{folder_of(table).removeprefix('tables/')}/"
        return sorted(path for path in self.manifest["files"] if path.startswith(folder))

    def rows(self, table: str) -> Iterator[RowPart]:
        """Yield the rows of a table, some row groups at a time. Raises ExportError: a file is not what was written."""
        for path in self._files("rows", table):
            yield from self._parts(path, ["id", "values", "step_size", "decay"])

    def decay_of(self, table: str) -> Decay:
        """Return how the rows of a table decay. Raises ExportError: it is not what is written."""
        described = self.training.get("tables", {}).get(table, {})
        try:
            floats = int(described["columns"]["decay"][1]) if "decay" in described.get("columns", {}) else 0
            decayed = float(described.get("decayed", 0.0))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            floats = -1
        if floats not in (0, 1, 2) or not decayed <= 0:
            raise ExportError(f"{self.place.name} does not say how rows of table {table} are decayed")
        return Decay(floats, decayed)

    def gone(self, table: str) -> np.ndarray:
        """Return the ids whose rows were given up since the folder before, int64 [n]."""
        parts = [part.ids for path in self._files("gone", table) for part in self._parts(path, ["id"])]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def row_count(self, table: str) -> int:
        """Return how many rows `rows` will yield. Raises ExportError: a file is not what was written."""
        count = 0
        for path in self._files("rows", table):
            self._check(path)
            try:
                with self.place.open(path) as file:
                    count += pq.ParquetFile(file).metadata.num_rows
            except (OSError, ValueError, pa.ArrowException) as error:
                raise ExportError(f"{self.place.name}/{path} cannot be read: {' '.join(str(error).split())}") from None
        return count

    def _parts(self, path: str, names: list[str]) -> Iterator[RowPart]:
        self._check(path)
        try:
            with self.place.open(path) as file:
                parquet = pq.ParquetFile(file)
                names = [name for name in names if name in parquet.schema_arrow.names]
                for group in range(parquet.num_row_groups):
                    table = parquet.read_row_group(group, names).combine_chunks()
                    if table.num_rows:
                        yield _part(table)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise ExportError(f"{self.place.name}/{path} cannot be read: {' '.join(str(error).split())}") from None

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the dense tensors whose names begin so, whole, by name."""
        found: dict[str, Tensor] = {}
        for name, offset, shape, values in self.pieces(prefix):
            whole = found.setdefault(name, torch.zeros(shape, dtype=values.dtype))
            here = tuple(slice(at, at + size) for at, size in zip(offset, values.shape, strict=True))
            whole[here] = values
        return found

    def pieces(self, prefix: str) -> Iterator[tuple[str, list[int], list[int], Tensor]]:
        """Yield name, offset in the whole tensor, shape of the whole tensor, and values of each piece."""
        described: dict[str, Any] = {}
        for path in sorted(self.manifest["files"]):
            if path.startswith("dense/") and path.endswith(".json"):
                described |= self._read(path)
        for path, tensors in described.items():
            wanted = [name for name in tensors if name.startswith(prefix)]
            if not wanted or not is_inside(path):
                continue
            self._check(path)
            with self.place.open(path) as file:
                content = read_safetensors(file.read(), f"{self.place.name}/{path}")
            for name in wanted:
                yield name, tensors[name]["offset"], tensors[name]["shape"], content[name]


def _part(table: pa.Table) -> RowPart:
    ids = table["id"].chunk(0).to_numpy()
    values, scales, decay = (_bytes(table, name) for name in ("values", "step_size", "decay"))
    empty = np.zeros((len(ids), 0), np.uint8)
    return RowPart(
        ids,
        empty if values is None else values,
        None if scales is None else scales.view(np.float32),
        None if decay is None else decay.view(np.float64),
    )


def _bytes(table: pa.Table, name: str) -> np.ndarray | None:
    if name not in table.column_names:
        return None
    array = table[name].chunk(0)
    width = array.type.byte_width
    return np.frombuffer(array.buffers()[1], np.uint8)[array.offset * width :][: len(array) * width].reshape(-1, width)


def read_safetensors(content: bytes, where: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name. Raises ExportError: it is none."""
    try:
        (size,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + size])
        found = {}
        for name, one in header.items():
            if name != "__metadata__":
                begin, end = one["data_offsets"]
                values = bytearray(content[8 + size + begin : 8 + size + end])
                part = torch.frombuffer(values, dtype=torch.uint8) if values else torch.zeros(0, dtype=torch.uint8)
                found[name] = part.view(DTYPES[one["dtype"]]).view(one["shape"])
        return found
    except (struct.error, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ExportError(f"{where} is no safetensors file: {error}") from None


def safetensors_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors file of some tensors, one behind the other. metadata: what it says of itself."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, at = [], 0
    for name, value in tensors.items():
        part = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [at, at + len(part)],
        }
        parts.append(part)
        at += len(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def newest_rows(models: Sequence[SavedModel], table: str) -> Iterator[RowPart]:
    """Yield the rows of a table, each id once: from the newest folder that has it, unless it was given up since.

    models: newest first, down to a whole one.
    """
    known = np.zeros(0, np.int64)
    for number, model in enumerate(models):
        seen = [known, model.gone(table)]
        for part in model.rows(table):
            seen.append(part.ids)
            kept = part.take(~is_in(part.ids, known)) if len(known) else part
            if len(kept.ids):
                yield kept
        if number + 1 < len(models):
            known = np.unique(np.concatenate(seen))


def is_in(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return bool [n]: whether each id is among `known`, sorted int64 [m]."""
    if not len(known):
        return np.zeros(len(ids), bool)
    return known[np.searchsorted(known, ids).clip(max=len(known) - 1)] == ids


class Publications:
    """The folder that a daily run publishes to."""

    def __init__(self, location: str, filesystem: pa.fs.FileSystem | None = None, root: str = "") -> None:
        self.place = Place(location, filesystem, root)

    def latest(self) -> list[dict[str, str]]:
        """Return the chain that is to be served: name and checksum of each publication, the whole one first.

        Raises ExportError: nothing is published, or `latest` is damaged.
        """
        latest = self.place.read_json(LATEST)
        chain = latest.get("chain")
        links = chain if isinstance(chain, list) else []
        fine = all(isinstance(link, dict) and {"name", "checksum"} == link.keys() for link in links)
        fine = fine and all(isinstance(link["name"], str) and "/" not in link["name"] for link in links)
        if not links or not fine or latest.get("checksum") != checksum(latest):
            raise ExportError(f"{self.place.name}: {LATEST} is damaged: its checksum or its chain is none")
        if not all(is_inside(link["name"]) for link in links):
            raise ExportError(f"{self.place.name}: {LATEST} names a folder that is not beside it")
        return links

    def open(self, links: Sequence[dict[str, str]]) -> list[SavedModel]:
        """Return the publications of some links of a chain, newest first, every file checked.

        Raises ExportError: one is missing, changed or damaged.
        """
        models = []
        for link in reversed(links):
            model = SavedModel(self.place.below(link["name"]))
            if model.manifest["checksum"] != link["checksum"]:
                raise ExportError(f"{model.place.name} is not the one that {LATEST} names")
            model.check()
            models.append(model)
        return models
