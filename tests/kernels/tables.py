"""Small tables in chunks for the tests of the ops that read and write rows."""

import torch

EXTREMES = [0, 1, -1, 2**63 - 1, -(2**63)]


def table(rows, width, chunk_rows=8, dtype=torch.float32, seed=0):
    """(chunks, the same rows as one dense tensor); `rows` is rounded up to whole chunks."""
    count = -(-rows // chunk_rows)
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn((count * chunk_rows, width), generator=generator)
    dense = (dense * 1000).to(dtype) if not dtype.is_floating_point else dense.to(dtype)
    return [chunk.clone() for chunk in dense.split(chunk_rows)], dense


def some_rows(n, rows, seed=0, missing=0.2, distinct=False):
    """int64 [n] row numbers below `rows`, some of them -1."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randperm(rows, generator=generator)[:n] if distinct else None
    if found is None:
        found = torch.randint(0, rows, (n,), generator=generator)
    found[torch.rand(n, generator=generator) < missing] = -1
    return found
