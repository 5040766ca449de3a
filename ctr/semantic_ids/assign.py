"""Vectors of items -> items with their semantic ids, the codebooks and a report, in a folder.

    items/part-00000.parquet   item, codes list<int32>, sid list<int64>: the ids of the prefixes of the codes
    codebooks.safetensors      what assigns ids to new items
    semantic_ids.json          the version, the settings, and how good the ids are

Vectors are read twice and some thousand at a time, once to choose those that codebooks are made of and once to assign
ids. What stays in memory are keys and codes, 8 bytes and 4 for each level of every item, and the chosen vectors; while
ids are compared it is below 100 bytes of an item.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tessera.ctr.data import columns
from tessera.ctr.data.convert.output import PartsWriter, Writing, complete_folder
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.listing import list_files
from tessera.ctr.report.files import json_text
from tessera.ctr.semantic_ids.codebooks import Codebooks, Making, make_codebooks, prefix_ids, range_of
from tessera.ctr.semantic_ids.items import CODEBOOKS, ITEMS, REPORT, Folder, indices_in_buckets
from tessera.ctr.semantic_ids.kmeans import Workers, workers
from tessera.ctr.semantic_ids.vectors import Vectors


def write_semantic_ids(
    paths: Sequence[str], output: Path, making: Making | Path, *, item: str = "item", vector: str = "vector",
    collision_level: bool = False, threads: int = 1, writing: Writing | None = None, overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Give the items of parquet files semantic ids; return the report.

    Args:
        making: how to make codebooks; or an earlier output, whose codebooks are used and whose items the output holds
            too, as they are where the files do not have them.
        collision_level: one code more, that tells items with the same codes apart. An earlier output that has it
            keeps it.

    Raises DataError (files, rows, codebooks), SchemaError (columns), ConfigError (output in the way).
    """
    vectors = Vectors(paths, item, vector)
    earlier = Folder.load(making) if isinstance(making, Path) else None
    if earlier is not None and earlier.item_type != vectors.item_type:
        raise SchemaError(f"column {item!r} is {vectors.item_type}, expected {earlier.item_type}, as in {making}")
    sources = [Path(path) for path in paths if "://" not in path]
    sources += [making] if isinstance(making, Path) else []
    with complete_folder(output, sources, overwrite=overwrite) as folder, workers(threads) as by:
        if isinstance(making, Making):
            codebooks = make_codebooks(vectors.sample(making.sample, making.seed), making, by)
        else:
            assert earlier is not None
            codebooks = earlier.codebooks
        keys, codes, squares = _encode(vectors, codebooks, by)
        carried = np.zeros(0, bool) if earlier is None else ~np.isin(earlier.keys, keys)
        if earlier is not None:
            collision_level |= earlier.report["collision_level"]
            keys = np.concatenate([earlier.keys[carried], keys])
            codes = np.concatenate([earlier.codes[carried, : codebooks.levels], codes])
        report = _report(codes, squares, len(codes) - int(carried.sum())) | {"collision_level": collision_level}
        if collision_level:
            codes = _with_index(keys, codes, earlier)
        writer = PartsWriter(folder, writing or Writing())
        _write(writer, vectors, earlier, carried, codes, codebooks.version)
        codebooks.save(folder / CODEBOOKS)
        made = asdict(making) if isinstance(making, Making) else earlier.report["made"] if earlier else {}
        said = {"version": codebooks.version, "dim": codebooks.dim, "codes": [len(one) for one in codebooks.centroids]}
        report = said | report | {"normalise": codebooks.normalise, "made": made, "vectors": list(map(str, paths))}
        (folder / REPORT).write_text(json_text(report) + "\n")
    return report


def _encode(vectors: Vectors, codebooks: Codebooks, by: Workers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return keys int64 [n], codes int32 [n, levels] and sums of squared residuals float64 [levels + 1]."""
    keys, codes, squares = [], [], np.zeros(codebooks.levels + 1)
    for batch in vectors.batches():
        if not len(batch.keys):
            continue
        if batch.x.shape[1] != codebooks.dim:
            raise DataError(
                f"column {vectors.vector!r}: found {batch.x.shape[1]} numbers, expected {codebooks.dim}, as in the "
                "codebooks"
            )
        found, squared = codebooks.encode(batch.x, by)
        keys.append(batch.keys)
        codes.append(found)
        squares += squared
    if not keys:
        raise DataError(f"{vectors.files[0].path}: no rows found, expected items with vectors")
    all_keys = np.concatenate(keys)
    ordered = np.sort(all_keys)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise DataError(vectors.named_twice(int(ordered[twice[0]])))
    return all_keys, np.concatenate(codes), squares


def _buckets(codes: np.ndarray) -> np.ndarray:
    """Return a number for each row, int64 [n], the same for the same codes."""
    return prefix_ids(codes, "0")[:, -1]


def _with_index(keys: np.ndarray, codes: np.ndarray, earlier: Folder | None) -> np.ndarray:
    levels, before = codes.shape[1], None
    if earlier is not None and earlier.codes.shape[1] > levels:
        before = (_buckets(earlier.codes[:, :levels]), earlier.keys, earlier.codes[:, levels])
    return np.column_stack([codes, indices_in_buckets(_buckets(codes), keys, before)])


def _report(codes: np.ndarray, squares: np.ndarray, read: int) -> dict[str, Any]:
    """Return how good ids without a collision level are. error: of the items read, the share of the squares of their
    vectors that is left after each level."""
    prefixes = [len(np.unique(_buckets(codes[:, : level + 1]))) for level in range(codes.shape[1])]
    sizes = np.unique(_buckets(codes), return_counts=True)[1]
    return {
        "items": len(codes),
        "read": read,
        "error": (squares[1:] / squares[0] if squares[0] else np.zeros(codes.shape[1])).tolist(),
        "mean_square": (squares / read).tolist(),
        "used_codes": [len(np.unique(codes[:, level])) for level in range(codes.shape[1])],
        "prefixes": prefixes,
        "unique": prefixes[-1] / len(codes),
        "alone": float((sizes == 1).sum() / len(codes)),
        "largest_bucket": int(sizes.max()),
        "buckets": range_of(sizes),
    }


def _write(
    writer: PartsWriter, vectors: Vectors, earlier: Folder | None, carried: np.ndarray, codes: np.ndarray, version: str
) -> None:
    done = 0
    for items in _items(vectors, earlier, carried):
        here = codes[done : done + len(items)]
        done += len(items)
        names = [vectors.item, "codes", "sid"]
        writer.append(
            ITEMS, pa.table([items.cast(vectors.item_type), _lists(here), _lists(prefix_ids(here, version))], names)
        )
    assert done == len(codes)
    writer.close()


def _items(vectors: Vectors, earlier: Folder | None, carried: np.ndarray) -> Iterator[pa.Array]:
    """Yield the items in the order of their codes."""
    if earlier is not None:
        row = 0
        for file in list_files(str(earlier.path / ITEMS)).files:
            with file.open() as parquet:
                for batch in parquet.iter_batches(1 << 16):
                    array = columns.plain(batch.column(0))
                    yield array.filter(pa.array(carried[row : row + len(array)]))
                    row += len(array)
    for items in vectors.batches(vectors=False):
        yield items.array.dictionary_decode() if pa.types.is_dictionary(items.array.type) else items.array


def _lists(values: np.ndarray) -> pa.Array:
    rows, width = values.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * width), pa.array(values.ravel()))
