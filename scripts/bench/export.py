"""Measure exports: seconds and bytes of one, opening it, the memory of a scorer, a server; and rows/s of
`tessera score` beside `tessera evaluate`, the model being loaded.

python -m tessera.scripts.bench.export --rows 1000000
python -m tessera.scripts.bench.export --rows 10000000 --serve-seconds 0
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.config import Config, load_config
from tessera.ctr.data.config import schema_of
from tessera.ctr.export.export import Options, export_model
from tessera.ctr.export.source import source_of_run
from tessera.ctr.network import build_model
from tessera.ctr.runs.saved_model import save_model
from tessera.ctr.runs.score import run_config
from tessera.ctr.runs.score_rows import config_to_score, row_reader, score_rows
from tessera.ctr.train.evaluate import evaluate, read_split
from tessera.distributed.process import start
from tessera.distributed.rank import Process
from tessera.distributed.tables import as_dynamic

IDS, NUMBERS, BATCH = 8, 5, 65536
Figure = tuple[str, str]


def rows_of(count: int, first: int, known: int) -> pa.Table:
    """Return rows with ids below `known` in each column; those of neighbouring rows differ."""
    numbers = (np.arange(first, first + count) * 7919) % max(1, known)
    draw = np.random.default_rng(first)
    columns = {f"c{i}": pa.array((numbers + i) % known) for i in range(IDS)}
    return pa.table({**{f"x{i}": pa.array(draw.random(count, np.float32)) for i in range(NUMBERS)}, **columns})


def make_run(folder: Path, rows: int, process: Process) -> tuple[Config, DistributedModelParallel]:
    """Save a DeepFM of `rows` rows in all its tables as the best model of a run."""
    known = rows // IDS
    features = [f"{{name: x{i}, kind: numeric}}" for i in range(NUMBERS)] + [f"{{name: c{i}}}" for i in range(IDS)]
    for name, count in (("train", known), ("valid", min(known, 250_000))):
        (folder / "data" / name).mkdir(parents=True)
        table = rows_of(count, 0, known).append_column("label", pa.array(np.arange(count) % 2))
        pq.write_table(table, folder / "data" / name / "rows.parquet", row_group_size=BATCH)
    overrides = [f"data.schema.features=[{', '.join(features)}]", "data.schema.time=null", "model=deepfm"]
    overrides += [f"data.path={folder}/data", f"trainer.run_dir={folder}/run", f"trainer.batch_size={BATCH}"]
    overrides += ["data=synthetic", "trainer.device=cpu", "trainer.threads=2", "embedding.init_std=0.1"]
    config = load_config(overrides, "")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))
    model, _ = build_model(config, schema_of(config.data), process)
    dynamic = as_dynamic(model.module.tables)
    assert dynamic is not None
    model.train()
    with torch.no_grad():
        for batch in row_reader(config, [f"{folder}/data/train"]).epoch(0):
            dynamic.begin_step(1)
            model.module.tables(batch.ids)
    save_model(model, folder / "run" / "best", process, step=1)
    return config, model


def speeds(folder: Path, config: Config, model: DistributedModelParallel, process: Process) -> Iterator[Figure]:
    """Yield rows/s of `score` and `evaluate` on the same file, from parquet to parquet, with the model in memory."""
    config.trainer.shuffle = False
    reader = read_split(config, schema_of(config.data), process, "valid")
    assert reader is not None
    begun = time.perf_counter()
    evaluate(model, reader, process, folder / "evaluated", "valid")
    evaluated = reader.rows / (time.perf_counter() - begun)
    with (
        mock.patch("tessera.ctr.runs.score_rows.build_model", lambda *_: (model, "")),
        mock.patch("tessera.ctr.runs.score_rows.load_model_of_run", lambda *_: ("best", 1)),
    ):
        begun = time.perf_counter()
        data = f"{folder}/data/valid"
        done = score_rows(config_to_score(folder / "run", []), process, folder / "run", data, folder / "scores")
        scored = done.rows / (time.perf_counter() - begun)
    yield "score, parquet to parquet", f"{scored:,.0f} rows/s of {done.rows:,}"
    yield "evaluate on the same file", f"{evaluated:,.0f} rows/s"


def table_of(figures: Sequence[Figure]) -> str:
    """Return lines of a table in Markdown."""
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in figures)])


def say(line: str) -> None:
    print(line, flush=True)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resident() -> tuple[float, float]:
    """MB of this process in memory: its own, and pages of files, which processes share and the kernel takes back."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, files = (int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return own, files


def leave_cache(folder: Path) -> None:
    """Have no file of a folder in the kernel's cache of pages."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


SCORER = """
import json, sys, time
from pathlib import Path
from tessera.scripts.bench.export import resident, rows_of
from tessera.ctr.serving import Scorer
from tessera.ctr.serving.embeddings import Embeddings
import torch
torch.set_num_threads(2)
folder, known, kept = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
begun = time.perf_counter(); scorer = Scorer.load(folder); load = time.perf_counter() - begun
begun = time.perf_counter()
Embeddings(str(folder), scorer.description, scorer._ids, [], weighted=False)
tables = time.perf_counter() - begun
before = resident()
scorer(rows_of(max(1, known // 100), 0, known))
own, files = (after - first for after, first in zip(resident(), before))
table = rows_of(min(known, 200_000), 0, known)
begun = time.perf_counter(); scorer(table); seconds = time.perf_counter() - begun
print(json.dumps([
    [f"opening the tables, {kept}", f"{tables * 1e3:.1f} ms"],
    [f"opening all with the graph, {kept}", f"{load * 1e3:.0f} ms"],
    [f"memory of a scorer that is open, {kept}", f"{before[0]:.0f} MB own, {before[1]:.0f} MB of files"],
    [f"and more when 1 % of the rows were looked up, {kept}", f"{own:.0f} MB own, {files:.0f} MB of files"],
    [f"scorer, Arrow to probabilities, {kept}", f"{table.num_rows / seconds:,.0f} rows/s"],
]))
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def of_server(folder: Path, known: int, seconds: float, clients: int = 4) -> Iterator[Figure]:
    """Ask a server for 200 candidates of one user again and again, and yield how long its answers took."""
    port = free_port()
    words = [sys.executable, "-m", "tessera.scripts.serve", str(folder), "--port", str(port)]
    server = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        rows = rows_of(200, 0, known).to_pylist()
        user = {name: rows[0][name] for name in ("x0", "x1", "x2", "c0", "c1", "c2", "c3")}
        candidates = [{k: v for k, v in row.items() if k not in user} for row in rows]
        body = json.dumps({"user": user, "candidates": candidates})
        _wait_until_ready(port)
        took: list[float] = []
        end = time.monotonic() + seconds

        def ask() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            while time.monotonic() < end:
                begun = time.perf_counter()
                connection.request("POST", "/rank", body, {"content-type": "application/json"})
                answer = connection.getresponse()
                assert answer.status == 200, answer.read()
                answer.read()
                took.append(time.perf_counter() - begun)

        threads = [threading.Thread(target=ask) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        p50, p99 = np.percentile(took, [50, 99]) * 1e3
        speed = f"{len(took) / seconds:.0f} requests/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms"
        yield f"server, {clients} clients, 1 user x 200 candidates", speed
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_until_ready(port: int) -> None:
    for _ in range(300):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of all tables together")
    parser.add_argument("--format", help="of the export's rows")
    parser.add_argument("--serve-seconds", type=float, default=10.0)
    options: Any = parser.parse_args()
    torch.set_num_threads(2)
    process = start("cpu")
    with tempfile.TemporaryDirectory() as place:
        folder, known = Path(place), options.rows // IDS
        run, model = make_run(folder, options.rows, process)
        speed = list(speeds(folder, run, model, process))
        del model
        config = run_config(folder / "run", [])
        source = source_of_run(config, folder / "run", process)
        chosen = Options(options.format)
        exported = export_model(config, process, source, folder / "export", [folder / "run"], chosen)
        figures = [
            (f"export of {exported.rows:,} rows", f"{exported.seconds:.1f} s"),
            ("its bytes", f"{exported.bytes / 1e6:,.0f} MB"),
            ("bytes of the run's best/", f"{bytes_of(folder / 'run' / 'best') / 1e6:,.0f} MB"),
            ("golden rows from evaluation", f"{exported.difference:.1e}"),
        ]
        for kept in ("files in the kernel's cache", "files on the disk"):
            if kept == "files on the disk":
                leave_cache(folder / "export")
            words = [sys.executable, "-c", SCORER, str(folder / "export"), str(known), kept]
            figures += map(tuple, json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout))
        figures += speed
        if options.serve_seconds:
            figures += of_server(folder / "export", known, options.serve_seconds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        say(table_of([*figures, ("memory of this benchmark, at most", f"{peak:,.0f} MB")]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
