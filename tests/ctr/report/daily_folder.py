"""A made-up folder of daily retraining: predictions and a report of each day, and the line of each in days.jsonl."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import date, timedelta
from pathlib import Path

import numpy as np

from tessera.ctr.metrics.exact import evaluate_predictions
from tessera.ctr.report.report import write_report
from tests.ctr.report.run_folder import CONFIG, PLAN, write_predictions

METRICS = ("auc", "logloss", "gauc", "normalized_entropy", "calibration", "pr_auc", "observed_rate")
HELD, SKIPPED = 8, 11


def day_columns(day: int, rows: int, noise: float = 0.5, shift: float = 0.0) -> dict[str, np.ndarray]:
    """Rows of a day, the same for every run but for the prediction: the truth's logit with noise, moved by shift."""
    generator = np.random.default_rng([7, day])
    truth = generator.normal(-1.2, 1.3, rows)
    new_ids = generator.random(rows) < (0.9 if day == 0 else 0.12)
    label = generator.random(rows) < 1 / (1 + np.exp(-truth))
    error = generator.normal(0, 1, (2, rows))
    # Half of the noise is common to all runs, as two models of the same data err alike.
    logit = truth + noise * (error[0] + np.random.default_rng([8, day, int(1e6 * noise)]).normal(0, 1, rows)) + shift
    logit = np.where(new_ids, 0.5 * (logit + 1.2) - 1.2, logit)
    return {
        "prediction": (1 / (1 + np.exp(-logit))).astype(np.float32),
        "label": label.astype(np.float32),
        "weight": np.ones(rows, np.float32),
        "group": generator.integers(0, max(1, rows // 20), rows),
        "row": np.arange(rows),
        "new_ids": new_ids,
    }


def day_record(day: int, partition: str, columns: dict[str, np.ndarray] | None, table_rows: int) -> dict:
    """The line of days.jsonl; columns None: the day was skipped."""
    status = "held" if day == HELD else "skipped" if columns is None else "trained"
    reason = {
        "held": "logloss 0.6120 is above 0.5401, the mean of the 7 days before plus 3 of their standard deviations",
        "skipped": f"the files of {partition} have no success marker",
    }.get(status)
    measured = parts = None
    if columns is not None:
        plain = {name: columns[name] for name in ("prediction", "label", "weight", "group")}
        measured, parts = evaluate_predictions(**plain), []
        for chosen in (~columns["new_ids"], columns["new_ids"]):
            one = evaluate_predictions(**{name: values[chosen] for name, values in plain.items()})
            parts.append({"rows": one["rows"], **{name: one[name] for name in METRICS}})
    tables = {"rows": table_rows, "bytes": 152 * table_rows, "new": 31_000 + 900 * day}
    tables["expired"] = max(0, day - 4) * 3100
    published = {"trained": "full" if day % 7 == 0 else "delta"}.get(status)
    return {
        "partition": partition,
        "status": status,
        "reason": reason,
        "fingerprint": f"{day:016x}",
        "rows": measured["rows"] if measured else None,
        "positives": measured["positives"] if measured else None,
        **{name: measured[name] if measured else None for name in METRICS},
        "known": parts and parts[0],
        "new": parts and parts[1],
        "tables": None if columns is None else tables,
        "samples_per_second": None if columns is None else 81_000 + 4000 * np.sin(day),
        "evaluate_seconds": None if columns is None else 41.5 + day,
        "train_seconds": None if columns is None or status == "held" else 183.0 + 6 * (day % 3),
        "published": published,
        "published_bytes": {"full": 152 * table_rows, "delta": 5_100_000, None: None}[published],
        "step": 1200 * (day + 1),
    }


def make_daily_run(
    folder: Path, days: int = 14, rows: int = 2000, noise: float = 0.5, reports: Collection[int] = ()
) -> Path:
    """Days from 2026-01-03 on, of which one is held and one skipped; `reports`: the days whose pages are written."""
    folder.mkdir(parents=True)
    lines = []
    for day in range(days):
        partition = str(date(2026, 1, 3) + timedelta(days=day))
        columns = None if day == SKIPPED else day_columns(day, rows, noise, 1.5 * (day == HELD))
        lines.append(day_record(day, partition, columns, 190_000 + 21_000 * min(day, 7)))
        if columns is not None:
            write_predictions(folder / "days" / partition / "predictions", "test-00000.parquet", columns, "test")
            if day in reports:
                write_report(folder / "days" / partition)
    (folder / "days.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "plan.txt").write_text(PLAN)
    (folder / "versions.json").write_text(json.dumps({"python": "3.11.2", "torch": "2.13.0"}))
    return folder
