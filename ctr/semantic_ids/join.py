"""Add semantic ids to the rows of a data set: file by file, a row group at a time, in the order of the rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from tessera.ctr.data import columns
from tessera.ctr.data.convert.output import COMPRESSIONS, SUMMARY, complete_folder, write_description
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.files import DataFile, one_line
from tessera.ctr.data.listing import list_files
from tessera.ctr.data.schema import nearest
from tessera.ctr.report.files import json_text
from tessera.ctr.semantic_ids.items import Folder
from tessera.ctr.semantic_ids.vectors import item_kind, items_keys

SCHEMA, TEACHER = "schema.yaml", "teacher.json"


def join_semantic_ids(
    data: str, semantic_ids: Path, output: Path, *, item: str, name: str = "sid", overwrite: bool = False
) -> dict[str, Any]:
    """Write the files of `data` once more, with a column `name` list<int64> of the semantic ids of column `item`; null
    where the item has none. Return the summary written to prepare.json.

    The schema.yaml beside the data gets a feature of the column. Memory is that of the ids, 16 bytes and 8 for each
    level of every item, and of one row group. Raises DataError (files), SchemaError (columns), ConfigError (output).
    """
    ids, files = Folder.load(semantic_ids), list_files(data).files
    order = np.argsort(ids.keys, kind="stable")
    keys, sids = ids.keys[order], ids.sids[order]
    local = [] if "://" in data else [Path(data)]
    with complete_folder(output, [*local, semantic_ids], overwrite=overwrite) as folder:
        rows: dict[str, int] = {}
        without = 0
        for file in files:
            written, missing = _join(file, folder / file.name, item, name, ids.kind, (keys, sids))
            of = file.name.rpartition("/")[0]
            rows[of or "all"] = rows.get(of or "all", 0) + written
            without += missing
        summary = {
            "kind": "join-semantic-ids",
            "files": {"all": [data]},
            "rows": rows,
            "version": ids.codebooks.version,
            "without": without,
            "dropped": 0,
            "bad_rows": {},
        }
        _describe(Path(data) if local else None, folder, name, summary)
    return summary


def _join(
    file: DataFile, target: Path, item: str, name: str, kind: str, ids: tuple[np.ndarray, np.ndarray]
) -> tuple[int, int]:
    """Write one file; return its rows, and how many of them have no semantic id."""
    try:
        parquet = file.open()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.path}: cannot be read: {one_line(error)}") from None
    with parquet:
        schema = parquet.schema_arrow
        _check(file, schema, item, name, kind)
        target.parent.mkdir(parents=True, exist_ok=True)
        metadata, without = parquet.metadata, 0
        compression = "snappy"
        if metadata.num_row_groups and metadata.num_columns:
            stored = metadata.row_group(0).column(0).compression.lower()
            compression = {"uncompressed": "none"}.get(stored, stored if stored in COMPRESSIONS else "zstd")
        wider = schema.append(pa.field(name, pa.list_(pa.int64())))
        with pq.ParquetWriter(target, wider, compression=compression, write_page_checksum=True) as writer:
            for number in range(metadata.num_row_groups):
                try:
                    table = parquet.read_row_group(number)
                except (OSError, pa.ArrowException) as error:
                    raise DataError(f"{file.path}, row group {number}: cannot be read: {one_line(error)}") from None
                column, missing = _sids(table.column(item).combine_chunks(), *ids)
                without += missing
                made = pa.Table.from_arrays([*table.columns, column], schema=wider)
                writer.write_table(made, row_group_size=max(1, table.num_rows))
        return metadata.num_rows, without


def _check(file: DataFile, schema: pa.Schema, item: str, name: str, kind: str) -> None:
    if item not in schema.names:
        raise SchemaError(f"{file.path}: column {item!r} not found; {nearest(item, schema.names)}")
    if name in schema.names:
        raise SchemaError(f"{file.path}: column {name!r} is there already, expected another --name")
    found = item_kind(schema.field(item).type, f"{file.path}: column {item!r}")
    if found != kind:
        raise SchemaError(f"{file.path}: column {item!r} is {found}, but the items with semantic ids are {kind}")


def _sids(items: pa.Array | pa.ChunkedArray, keys: np.ndarray, sids: np.ndarray) -> tuple[pa.Array, int]:
    """Return the lists of each row, and how many are null."""
    if isinstance(items, pa.ChunkedArray):
        items = items.chunk(0) if items.num_chunks else pa.array([], items.type)
    items = columns.plain(items)
    wanted = items_keys(items)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    there = keys[at] == wanted
    if items.null_count:
        there &= ~items.is_null().to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(there * sids.shape[1])]).astype(np.int32)
    lists = pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(sids[at[there]].ravel()), mask=None if there.all() else pa.array(~there)
    )
    return lists, int((~there).sum())


def _describe(data: Path | None, folder: Path, name: str, summary: dict[str, Any]) -> None:
    if data is None or not (data / SCHEMA).is_file():
        (folder / SUMMARY).write_text(json_text(summary) + "\n")
        return
    whole: Any = OmegaConf.to_container(OmegaConf.load(data / SCHEMA))
    schema = whole["schema"]
    if name in [one["name"] for one in schema["features"]]:
        raise SchemaError(f"{data / SCHEMA}: feature {name!r} is there already, expected another --name")
    feature = {"name": name, "kind": "ids", "pooling": "sum"}
    write_description(folder, schema | {"features": [*schema["features"], feature]}, summary)
    if (data / TEACHER).is_file():  # the best possible AUC is that of the same labels
        shutil.copyfile(data / TEACHER, folder / TEACHER)
