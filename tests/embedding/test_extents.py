"""Rows of a set, divided among tables: places and rows lead to each other, and no two tables have a row in common."""

import random

import torch

from tessera.embedding.extents import MOST_BITS, Extents


def test_places_are_rows_of_one_table_alone():
    draw, extents, sizes = random.Random(1), Extents(4), [0, 0, 0, 0]
    for _ in range(60):
        table = draw.randrange(3)
        wanted = sizes[table] + draw.choice([1, 60, 5000, 100_000])
        end = extents.end_with(table, wanted)
        extents.grow(table, wanted)
        sizes[table] = extents.capacity[table]
        assert extents.end == end and wanted <= sizes[table] < 2 * wanted + 64
        assert sizes[table] - wanted < 1 << MOST_BITS
    assert sum(sizes) == extents.end and sizes[3] == 0
    seen = []
    for table, size in enumerate(sizes):
        places = torch.arange(size)
        rows = extents.rows(table, places)
        assert bool((rows.diff() > 0).all()) and extents.places(table, rows).equal(places)
        some = torch.randperm(size)[:1000]
        assert extents.rows(torch.full_like(some, table), some).equal(rows[some])
        begin, end = size // 3, size - size // 5
        spans = list(extents.spans(table, begin, end))
        assert [place for place, _, _ in spans] == [begin + sum(c for _, _, c in spans[:n]) for n in range(len(spans))]
        assert torch.cat([torch.arange(0)] + [torch.arange(r, r + c) for _, r, c in spans]).equal(rows[begin:end])
        seen.append(rows)
    assert torch.cat(seen).sort().values.equal(torch.arange(extents.end))


def test_neighbouring_stretches_of_a_lonely_table_are_one():
    extents = Extents(1)
    extents.grow(0, 300_000)
    assert list(extents.spans(0, 10, 300_000)) == [(10, 10, 299_990)]
    assert list(extents.spans(0, 7, 7)) == []
