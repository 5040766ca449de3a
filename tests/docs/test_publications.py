"""The reader of publications in the docs reads what is published."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist

from tessera.distributed.tables import owned_tables
from tests.ctr.export.test_versions import LIFE, Days
from tests.distributed.saved_tables import alone
from tests.docs.pages import ROOT, blocks

TEXT = (ROOT / "docs" / "publications.md").read_text()


def test_the_reader_of_the_docs_gives_the_rows_of_the_live_model(tmp_path):
    (code,) = blocks(TEXT, "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 42
    reader: dict = {}
    exec(code, reader)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        days = Days(alone(), tmp_path, *LIFE, "embedding.formats={c: fp16}", model="fm")
        for kind in ("full", "delta", "delta", "delta"):
            days.publish(kind)
        found = reader["tables"](tmp_path / "run" / "published")
        live = owned_tables(days.model.module.tables)
        assert found.keys() == live.keys()
        for name, table in live.items():
            snapshot = table.snapshot()
            rows, ids = snapshot.rows_in_use()
            batch = snapshot.read(rows)
            snapshot.release()
            assert sorted(found[name]) == sorted(ids.tolist()) and len(ids)
            for one, stored in zip(batch.ids.tolist(), batch.values, strict=True):
                mine = np.concatenate([found[name][one][group] for group in ("v", "w")])
                expected = stored.contiguous().numpy()
                assert mine.tobytes() == expected.tobytes()
    finally:
        dist.destroy_process_group()
    path = next((tmp_path / "run/published/2026-01-02/rows").glob("*/*.parquet"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged"):
        reader["tables"](tmp_path / "run" / "published")
