"""Train every combination of a grid with several seeds and print one table, mean ± standard deviation over seeds.

`tessera sweep --output sweeps/a --seeds 1 2 3 --grid model.dropout=0,0.2 model=deepfm,ipnn -- data=ml100k ..`
runs `tessera train` once per combination and seed with the overrides after `--`. The table is sorted by the metric
on the valid split, so that the test split chooses nothing. A run that finished is not repeated: start the same
command again to go on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tessera.ctr.config import load_config
from tessera.ctr.output_folders import claim
from tessera.ctr.report.result import settle_result
from tessera.distributed.process import run_alone
from tessera.embedding.errors import ConfigError, TesseraError

SCORES = ("auc", "logloss")
HIGHER_IS_BETTER = {"auc": True, "logloss": False}


def main(arguments: Sequence[str] | None = None) -> int:
    return run_alone(lambda: sweep(make_parser().parse_args(arguments)))


def sweep(options: argparse.Namespace) -> None:
    """Run what is missing below `options.output` and write table.md there.

    Raises:
        ConfigError: an override that no configuration takes, or an output that no sweep has made; nothing has been
            trained then.
        TesseraError: a run failed.
    """
    combinations = list(itertools.product(*(_choices(entry) for entry in options.grid)))
    configs = [load_config([*options.overrides, *combination], "") for combination in combinations]
    if any(config.data.valid is None for config in configs):
        raise ConfigError("data.valid is null; expected a split, by which the table of a sweep is ordered")
    claim(options.output, "--output", "sweep.py", [config.data.path for config in configs])
    results = {}
    for combination in combinations:
        name = ",".join(combination) or "as given"
        folders = [options.output / _folder(name) / f"seed-{seed}" for seed in options.seeds]
        for folder, seed in zip(folders, options.seeds, strict=True):
            settle_result(folder)
            if not (folder / "report.json").exists():
                _train(options.launcher, [*options.overrides, *combination, f"trainer.seed={seed}"], folder)
        results[name] = [_scores(folder) for folder in folders]
        text = table(results, options.metric)  # after every combination: a sweep that is stopped has said something
        (options.output / "table.md").write_text(text)
    print(text)


def table(results: dict[str, list[dict[str, float | None]]], metric: str) -> str:
    """Markdown, best combination by the valid split first. results: combination -> scores of each seed's run, None
    where a score is undefined; combinations with such a score on the valid split stand last."""

    def on_valid(name: str) -> float:
        values = [scores[f"valid {metric}"] for scores in results[name]]
        defined = [value for value in values if value is not None]
        if len(defined) < len(values):
            return math.inf
        return -statistics.fmean(defined) if HIGHER_IS_BETTER[metric] else statistics.fmean(defined)

    columns = [f"{split} {score}" for split in ("valid", "test") for score in SCORES]
    lines = [f"| | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name in sorted(results, key=on_valid):
        runs = results[name]
        cells = [_cell([scores[column] for scores in runs if column in scores]) for column in columns]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float | None]) -> str:
    if not values:
        return "-"
    defined = [value for value in values if value is not None]
    if len(defined) < len(values):
        return "undefined"
    spread = f" ± {statistics.stdev(defined):.4f}" if len(defined) > 1 else ""
    return f"{statistics.fmean(defined):.4f}{spread}"


def _choices(entry: str) -> list[str]:
    """ "model.dropout=0,0.2" -> ["model.dropout=0", "model.dropout=0.2"]; commas inside brackets do not part."""
    key, equals, values = entry.partition("=")
    if not equals or not values:
        raise ConfigError(f"--grid {entry!r}; expected key=value,value,..")
    parts, depth = [""], 0
    for character in values:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [f"{key}={part}" for part in parts]


def _folder(name: str) -> str:
    """Return a name for a path that is itself part of an override, where = , [ and { mean something."""
    return "".join(character if character.isalnum() or character in "._-" else "_" for character in name)


def _train(launcher: str, overrides: Sequence[str], folder: Path) -> None:
    command = [*launcher.split(), "-m", "tessera.scripts.train", *overrides, f"trainer.run_dir={folder}"]
    command += ["trainer.resume=auto"]  # of a sweep that was stopped, the run goes on
    print(" ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TesseraError(f"run {folder} ended with code {done.returncode}: {last}")


def _scores(folder: Path) -> dict[str, float | None]:
    """Return "valid auc", "test logloss", ..: the best model's, which a finished run scores last."""
    scores = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "eval":
            scores.update({f"{line['split']} {score}": line[score] for score in SCORES})
    return scores


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2021, 2022, 2023])
    parser.add_argument("--grid", nargs="*", default=[], help="key=value,value,..; every combination is run")
    parser.add_argument("--metric", choices=SCORES, default="auc", help="on the valid split, sorts the table")
    parser.add_argument("--launcher", default=sys.executable, help='for ranks: "torchrun --nproc-per-node 2"')
    parser.add_argument("overrides", nargs="*", help="after --: what all runs share")
    return parser


if __name__ == "__main__":
    sys.exit(main())
