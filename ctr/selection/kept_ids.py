"""Write the ids that OptFS has kept, as a vocabulary that another run's tables admit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tessera.ctr.data.vocabularies import list_tables, write_ids_of_table
from tessera.ctr.selection.optfs import GROUP, STARTS_AT, OptFS
from tessera.ctr.selection.result import PLACE
from tessera.distributed.collectives import gather_objects, on_first_rank
from tessera.distributed.rank import Process
from tessera.embedding.convert import values_of
from tessera.embedding.decay import decayed_rows
from tessera.embedding.decay import kept as part_kept
from tessera.embedding.set_table import OwnedTable

FOLDER = "vocabulary"


def kept_ids(table: OwnedTable) -> Tensor:
    """Return the ids of this rank's rows whose gate has w > 0, int64 [n]."""
    number = [group.name for group in table.config.groups].index(GROUP)
    found = [torch.empty(0, dtype=torch.int64)]
    for batch in table.export_rows():
        if batch.decay is not None:
            batch = decayed_rows(batch, table.config, part_kept(batch.decay, table.decayed))
        w = STARTS_AT + values_of(batch, table.config, number).flatten()
        found.append(batch.ids[w > 0].cpu())
    return torch.cat(found)


def write_kept_ids(tables: Mapping[str, OwnedTable], run_dir: Path, process: Process) -> str:
    """Write the ids of all tables to a vocabulary of tables in a run folder. Collective. Returns a line for the log."""
    folder = run_dir / PLACE / OptFS.method / FOLDER
    on_first_rank(process, lambda: shutil.rmtree(folder, ignore_errors=True))  # of an end that other ranks had
    counts = {}
    for name, table in tables.items():
        ids = kept_ids(table)
        write_ids_of_table(folder, name, process.rank, ids.numpy())
        counts[name] = (len(ids), len(table))
    everyone = gather_objects(counts)
    kept, rows = ({name: sum(one[name][k] for one in everyone) for name in tables} for k in (0, 1))
    on_first_rank(process, lambda: list_tables(folder, kept))
    return (
        f"{sum(kept.values()):,} of {sum(rows.values()):,} ids are kept, for embedding.admission.vocabulary: {folder}"
    )
