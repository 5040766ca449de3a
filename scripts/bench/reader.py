"""Measure rows per second of the reader beside pyarrow alone, and whether its memory grows with the data.

    python scripts/bench/reader.py --rows 2000000 --links 4 --runs 5 --threads 1 2

Criteo-shaped data (13 float32 with nulls, 26 ids of Zipf frequencies) is written to a temporary folder, once with
integer ids and once with strings, and each file is linked some times to make a longer epoch. In each run pyarrow
decodes the columns and drops them, once by whole row groups and once in batches (`ParquetFile.iter_batches`, as
one does when memory is bounded), then the reader delivers shuffled batches of the same columns, all with the same
number of decoding threads. The runs alternate, so that noise of the machine meets all. Printed are medians, and
the medians of the runs' ratios to pyarrow's batches and to its row groups.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema

ROOT = Path(__file__).resolve().parents[2]

# Distinct values of Criteo's categorical columns, as counted in the Kaggle log.
CARDINALITIES = [
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
]  # fmt: skip
ROW_GROUP, FILE = 65536, 8 * 65536
GOALS = {"integers": 0.7, "strings": 0.4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--links", type=int, default=16, help="links to each file: lanes read twice where they meet")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="write the data here and keep it")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # a child process: read this and print the peak
    args = parser.parse_args()
    if args.peak_of:
        return print_peak(args.peak_of, args.batch_size)
    print_versions(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for ids in GOALS:
            if not (folder / ids).exists():
                write_data(folder / ids, args.rows, ids)
        print(f"\n{'':18}{'pyarrow rows/s':>32}{'reader':>16}{'ratio to':>18}")
        print(f"{'ids':10}{'threads':>8}{'row groups':>16}{'batches':>16}{'rows/s':>16}", end="")
        print(f"{'batches':>10}{'groups':>8}{'goal':>6}")
        for ids in GOALS:
            for threads in args.threads:
                with linked(folder / ids, args.links) as links:
                    print_speed(Path(links), ids, threads, args)
        print(f"\n{'ids':10}{'rows':>12}{'peak memory':>14}")
        for ids in GOALS:
            for times in (1, 10):
                print_memory(folder, ids, times, args)


def print_speed(folder: Path, ids: str, threads: int, args: argparse.Namespace) -> None:
    groups = [(file, g) for file in sorted(folder.iterdir()) for g in range(pq.ParquetFile(file).num_row_groups)]
    columns = pq.ParquetFile(groups[0][0]).schema_arrow.names
    reader = ParquetReader(str(folder), schema_of(ids), args.batch_size, threads=threads)
    speeds = []  # of pyarrow's row groups, its batches, and the reader
    for run in range(args.runs + 1):
        times = [pyarrow_alone(groups, columns, threads, whole=whole) for whole in (True, False)]
        start = time.perf_counter()
        rows = sum(batch.rows for batch in reader.epoch(run))
        times.append(time.perf_counter() - start)
        if run:  # the first warms up caches and allocators
            speeds.append([rows / seconds for seconds in times])
    whole, batches, ours = np.median(speeds, axis=0)
    to_whole, to_batches = (statistics.median(run[2] / run[i] for run in speeds) for i in (0, 1))
    print(f"{ids:10}{threads:8}{whole:16,.0f}{batches:16,.0f}{ours:16,.0f}", end="")
    print(f"{to_batches:10.2f}{to_whole:8.2f}{GOALS[ids]:6.1f}", flush=True)


def pyarrow_alone(groups: list, columns: list[str], threads: int, *, whole: bool) -> float:
    """Return the seconds to decode all row groups, each as a whole or in batches."""

    def decode(file: Path, group: int) -> None:
        parquet = pq.ParquetFile(file)
        if whole:
            parquet.read_row_group(group, columns=columns, use_threads=False)
        else:
            for _ in parquet.iter_batches(32768, row_groups=[group], columns=columns, use_threads=False):
                pass

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(decode, *group) for group in groups]:
            done.result()
    return time.perf_counter() - start


def print_memory(folder: Path, ids: str, times: int, args: argparse.Namespace) -> None:
    """Peak of a process of its own that reads the data set, or ten links to each of its files."""
    with linked(folder / ids, times) as links:
        child = [sys.executable, __file__, "--peak-of", f"{ids}:{links}", "--batch-size", str(args.batch_size)]
        rows, peak = subprocess.run(child, check=True, capture_output=True, text=True).stdout.split()[-2:]
    print(f"{ids:10}{int(rows):12,}{int(peak) / 1024:11,.0f} MB", flush=True)


@contextlib.contextmanager
def linked(folder: Path, times: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=folder.parent) as links:
        for file in folder.iterdir():
            for i in range(times):
                os.link(file, Path(links) / f"{i}-{file.name}")
        yield links


def print_peak(what: str, batch_size: int) -> None:
    ids, folder = what.split(":", 1)
    reader = ParquetReader(folder, schema_of(ids), batch_size, threads=2)
    rows = sum(batch.rows for batch in reader.epoch(0))
    # Not getrusage: its peak includes the parent's memory from before the exec.
    status = Path("/proc/self/status").read_text()
    print(rows, next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def schema_of(ids: str) -> Schema:
    numeric = [{"name": f"I{i}", "kind": "numeric"} for i in range(1, 14)]
    dtype = "int" if ids == "integers" else "string"
    return Schema.from_config({"features": numeric + [{"name": f"C{i}", "dtype": dtype} for i in range(1, 27)]})


def write_data(folder: Path, rows: int, ids: str) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number, start in enumerate(range(0, rows, FILE)):
        n = min(FILE, rows - start)
        columns = {"label": (random.random(n) < 0.25).astype(np.int8)}
        for i in range(13):
            values = np.floor(np.exp(random.normal(1, 1.5, n))).astype(np.float32)
            columns[f"I{i + 1}"] = pa.array(values, mask=random.random(n) < (0.2 if i % 3 == 0 else 0))
        for i, cardinality in enumerate(CARDINALITIES):
            # Log-uniform ranks have Zipf frequencies; the product scatters them over 32 bits, as hashes are.
            rank = np.minimum((cardinality + 1.0) ** random.random(n) - 1, cardinality - 1).astype(np.uint64)
            code = (rank * np.uint64(2654435761) + np.uint64(i)) & np.uint64(0xFFFFFFFF)
            columns[f"C{i + 1}"] = as_hex(code) if ids == "strings" else code.astype(np.int64)
        pq.write_table(pa.table(columns), folder / f"{number:04}.parquet", row_group_size=ROW_GROUP)


def as_hex(codes: np.ndarray) -> pa.Array:
    """Return strings of 8 hexadecimal digits, as Criteo stores them."""
    shifts = np.arange(28, -4, -4, dtype=np.uint64)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[(codes[:, None] >> shifts) & np.uint64(15)]
    offsets = np.arange(0, 8 * len(codes) + 1, 8, dtype=np.int32)
    return pa.StringArray.from_buffers(len(codes), pa.py_buffer(offsets), pa.py_buffer(digits))


def print_versions(args: argparse.Namespace) -> None:
    import torch

    from tessera.kernels import backend

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line for line in lines if line.startswith("model name")), platform.processor())
    print(f"{model.split(':')[-1].strip()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    hashing = "compiled" if "cpp" in backend.available_backends() else "plain torch"
    print(f"pyarrow {pa.__version__}, numpy {np.__version__}, torch {torch.__version__}, hashing {hashing}")
    print(f"{args.rows:,} rows linked {args.links} times, row groups of {ROW_GROUP:,}, ", end="")
    print(f"batches of {args.batch_size:,}, medians of {args.runs} runs")


if __name__ == "__main__":
    main()
