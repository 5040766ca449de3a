"""Measure a server that follows a run over days: 1 user x 200 candidates of DeepFM over sockets, before and while
changes are published, and how long a publication takes until it is served, beside an export of the whole model.

python -m tessera.scripts.bench.serve --rows 1000000 --changed 0.01 --deltas 10
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from tessera.ctr.config import Config
from tessera.ctr.daily.day_record import DayRecord, Stage
from tessera.ctr.daily.publish import Publisher, point
from tessera.ctr.data.config import schema_of
from tessera.ctr.export.export import Options, export_model
from tessera.ctr.export.source import source_of_run
from tessera.ctr.network import build_model
from tessera.ctr.runs.saved_model import load_model
from tessera.ctr.runs.score import run_config
from tessera.ctr.runs.score_rows import row_reader
from tessera.distributed.process import start
from tessera.distributed.rank import Process
from tessera.distributed.tables import as_dynamic
from tessera.scripts.bench.export import IDS, free_port, make_run, rows_of, say

PORT, CANDIDATES = free_port(), 200
USER = ("x0", "x1", "x2", "c0", "c1", "c2", "c3")


class Days:
    """A model that is published again and again, a share of its rows touched before each."""

    def __init__(self, folder: Path, config: Config, rows: int, process: Process) -> None:
        self.folder, self.config, self.known = folder, config, rows // IDS
        self.model, _ = build_model(config, schema_of(config.data), process)
        load_model(self.model, folder / "run" / "best", process)
        self.publisher = Publisher(folder / "run", config, self.model.module, process)
        self.records: list[DayRecord] = []

    def publish(self, kind: str, share: float) -> str:
        """Return the name of what was published."""
        number = len(self.records) + 1
        path = self.folder / "day.parquet"
        pq.write_table(rows_of(max(1, int(self.known * share)), number * 1000, self.known), path)
        dynamic = as_dynamic(self.model.module.tables)
        assert dynamic is not None
        self.model.train()
        with torch.no_grad():
            for batch in row_reader(self.config, [str(path)]).epoch(0):
                dynamic.begin_step(number + 1)
                self.model.module.tables(batch.ids)
            for value in self.model.module.dense_parameters().values():
                value.mul_(1.01)
        name = f"2026-{1 + number // 28:02d}-{1 + number % 28:02d}"
        self.records.append(DayRecord(name, None, Stage.TRAINED, published=kind, step=number))
        self.publisher.publish(self.records)
        point(self.publisher.root, self.records, keep_days=200)
        return name


@dataclass
class Load:
    """Clients that ask one question again and again. answers: when, seconds, status, version and scores of each."""

    body: str
    answers: list[tuple[float, float, int, str, list[float]]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
        while not self.ended.is_set():
            begun = time.perf_counter()
            connection.request("POST", "/rank", self.body, {"content-type": "application/json"})
            answer = connection.getresponse()
            said = json.loads(answer.read())
            took = time.perf_counter() - begun
            self.answers.append((begun, took, answer.status, said.get("version", ""), said.get("scores", [])))

    def figures(self, begin: float, end: float) -> list[str]:
        """Return requests, failed ones, requests/s, p50 and p99 in milliseconds."""
        chosen = [one for one in self.answers if begin <= one[0] < end]
        failed = sum(status != 200 for _, _, status, _, _ in chosen)
        p50, p99 = np.percentile([one[1] for one in chosen] or [np.nan], [50, 99]) * 1e3
        return [f"{len(chosen):,}", f"{failed}", f"{len(chosen) / (end - begin):.0f}", f"{p50:.1f}", f"{p99:.1f}"]

    def mixed(self) -> int:
        """Return how many answers differ from the first one of their version: those of two models."""
        first: dict[str, np.ndarray] = {}
        count = 0
        for _, _, _, version, scores in self.answers:
            found = np.array(scores, np.float32)
            count += not np.allclose(first.setdefault(version, found), found, rtol=0, atol=1e-6)
        return count


def served() -> str:
    """Return the version that is served, "" while the server starts."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=30)
        connection.request("GET", "/ready")
        return str(json.loads(connection.getresponse().read()).get("version", ""))
    except OSError:
        return ""


def wait_for(name: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not served().startswith(name or "20"):
        if time.monotonic() > end:
            raise SystemExit(f"{name or 'a model'} is not served")
        time.sleep(0.05)


def measure(folder: Path, days: Days, options: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "tessera.scripts.serve", str(folder / "export"), "--port", str(PORT)]
    command += ["--follow", f"{folder}/run/published", "--poll-seconds", "0.1"]
    rows = rows_of(CANDIDATES, 0, days.known).to_pylist()
    candidates = [{name: value for name, value in row.items() if name not in USER} for row in rows]
    load = Load(json.dumps({"user": {name: rows[0][name] for name in USER}, "candidates": candidates}))
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for("")
        clients = [threading.Thread(target=load.ask, daemon=True) for _ in range(options.clients)]
        for client in clients:
            client.start()
        time.sleep(2)
        begun = time.perf_counter()
        time.sleep(options.seconds)
        between = time.perf_counter()
        took = []
        for _ in range(options.deltas):
            name = days.publish("delta", options.changed)
            at = time.perf_counter()
            wait_for(name)
            took.append(time.perf_counter() - at)
        ended = time.perf_counter()
        load.ended.set()
        for client in clients:
            client.join(timeout=60)
        heads = ["", "no changes", "changes published"]
        names = ["requests", "of these failed", "requests/s", "p50, ms", "p99, ms"]
        columns = [load.figures(begun, between), load.figures(between, ended)]
        lines = [heads, ["---"] * 3, *zip(names, *columns, strict=True)]
        lines += [
            ["answers of two models", "", f"{load.mixed()} of {len(load.answers):,}, {options.deltas + 1} models"]
        ]
        lines += [["from published to served", "", f"{np.median(took):.2f} s, at most {max(took):.2f} s"]]
        say("\n".join(f"| {' | '.join(line)} |" for line in lines))
    finally:
        server.terminate()
        server.wait(timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of all tables together")
    parser.add_argument("--changed", type=float, default=0.01, help="share of them that each publication changes")
    parser.add_argument("--deltas", type=int, default=10, help="publications of changes")
    parser.add_argument("--seconds", type=float, default=10.0, help="of load before the first of them")
    parser.add_argument("--clients", type=int, default=2)
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    process = start("cpu")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        days = Days(folder, make_run(folder, options.rows, process)[0], options.rows, process)
        days.publish("full", options.changed)
        config = run_config(folder / "run", [])
        source = source_of_run(config, folder / "run", process)
        exported = export_model(config, process, source, folder / "export", [folder / "run"], Options())
        say(f"the whole model: {exported.rows:,} rows, exported in {exported.seconds:.1f} s")
        measure(folder, days, options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
