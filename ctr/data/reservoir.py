"""A bounded, uniform sample of all rows of earlier periods, to be replayed beside the rows of a new one (IncCTR's data
module, arXiv 2009.02147).

Every row has a random priority that is a function of (seed, name of its partition, its number there) alone, and the
sample is the rows with the `size` smallest ones: a uniform sample without replacement. It does not depend on the order
in which partitions come, on how often one is added, or on ranks; and it is found from the sample before and the new
rows, as all that is in the sample of both is in the sample of one or of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tessera.ctr.data.counter_random import bits, key
from tessera.ctr.data.decode import WindowDecoder
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.files import one_line
from tessera.ctr.data.footers import RowGroups, read_footers
from tessera.ctr.data.listing import Listing, list_files
from tessera.ctr.data.schema import Schema
from tessera.distributed.atomic import replacing_file
from tessera.embedding.config import key_of
from tessera.embedding.errors import ConfigError

PRIORITY, PARTITION = "reservoir_priority", "reservoir_partition"  # columns beside those of the schema
RESERVOIR = 7  # first word of the key, so that no other random numbers are drawn from the same stream
ROW_GROUP_ROWS = 16384


@dataclass(frozen=True)
class _Chosen:
    """Rows of a partition: row group, place in it and priority, each [n]."""

    group: np.ndarray
    place: np.ndarray
    priority: np.ndarray


def add_to_reservoir(
    before: Path | None,
    path: str | Listing | Sequence[str | Listing],
    partition: str,
    schema: Schema,
    size: int,
    seed: int,
    output: Path,
    days: list[str] | None = None,
) -> int:
    """Write `output`: the sample `before` (None: of nothing) and the rows of a partition. Returns its rows.

    partition: the name by which its rows are known, such as the day; rows of that name in `before` are replaced. path,
    days: as those of `ParquetReader`. The file holds the columns that the schema reads, and appears when complete.
    `output` may be `before`, but one file per partition lets a job that was killed do the same again.

    Raises ConfigError for a size below 1, SchemaError and DataError as the reader does, or DataError where columns of
    the partition have types that do not go with those of `before`.
    """
    if size < 1:
        raise ConfigError(f"reservoir: size is {size}; expected at least 1")
    groups = read_footers(list_files(path, days).files, schema)
    columns = WindowDecoder(schema, groups, skip_bad_rows=False, drop_labels=False).columns
    rows = _read(groups, _smallest(groups, partition, size, seed), columns, partition)
    if before is not None:
        kept = pq.read_table(before)
        kept = kept.filter(pc.not_equal(kept[PARTITION], partition))
        try:
            rows = pa.concat_tables([kept, rows.select(kept.column_names)], promote_options="permissive")
        except (pa.ArrowException, KeyError) as error:
            raise DataError(f"{path}: rows do not go with those of {before}: {one_line(error)}") from None
    rows = rows.sort_by([(PRIORITY, "ascending"), (PARTITION, "ascending")]).slice(0, size)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(output) as partial:
        pq.write_table(rows, partial, row_group_size=ROW_GROUP_ROWS, write_page_checksum=True)
    return rows.num_rows


def _smallest(groups: RowGroups, partition: str, size: int, seed: int) -> _Chosen:
    """Return the rows with the smallest priorities, a row group at a time: memory for the size and one row group."""
    stream = key(RESERVOIR, seed, key_of(partition))
    group: np.ndarray = np.zeros(0, np.int64)
    place: np.ndarray = np.zeros(0, np.int64)
    priority: np.ndarray = np.zeros(0, np.uint64)
    for number, (first, rows) in enumerate(zip(groups.first.tolist(), groups.rows.tolist(), strict=True)):
        here = bits(stream, np.arange(first, first + rows, dtype=np.uint64))
        group = np.concatenate([group, np.full(rows, number)])
        place = np.concatenate([place, np.arange(rows)])
        priority = np.concatenate([priority, here])
        if len(priority) > size:
            chosen = np.argpartition(priority, size - 1)[:size]
            group, place, priority = group[chosen], place[chosen], priority[chosen]
    return _Chosen(group, place, priority)


def _read(groups: RowGroups, chosen: _Chosen, columns: list[str], partition: str) -> pa.Table:
    parts = []
    for number in np.unique(chosen.group):
        here = np.flatnonzero(chosen.group == number)
        here = here[np.argsort(chosen.place[here])]
        file = groups.files[groups.file[number]]
        try:
            with file.open() as parquet:
                table = parquet.read_row_group(int(groups.index[number]), columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{groups.where(number)}: cannot be read: {one_line(error)}") from None
        table = table.take(pa.array(chosen.place[here])).select(columns).replace_schema_metadata()
        table = table.append_column(PRIORITY, pa.array(chosen.priority[here]))
        parts.append(table.append_column(PARTITION, pa.array([partition] * len(here), pa.string())))
    try:
        return _plain(pa.concat_tables(parts, promote_options="permissive"))
    except pa.ArrowException as error:
        raise DataError(f"{groups.files[0].path} and others: types differ: {one_line(error)}") from None


def _plain(table: pa.Table) -> pa.Table:
    """Replace dictionaries by their values: those of different partitions differ."""
    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
    return table
