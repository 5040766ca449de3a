"""Rank the fields of a run and write the result: `importance.json` for programs, a page with a chart for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tessera.ctr.config import Config, as_yaml
from tessera.ctr.data.config import schema_of
from tessera.ctr.metrics.steering import steering_value
from tessera.ctr.network import build_model
from tessera.ctr.output_folders import replacing_on_ranks
from tessera.ctr.runs.score import load_model_of_run
from tessera.ctr.selection.gate_result import MEANINGS
from tessera.ctr.selection.importance import METHODS, Ranking
from tessera.ctr.selection.result import PLACE, Importance, write_result
from tessera.ctr.train.engine import set_tf32, set_threads
from tessera.ctr.train.evaluate import read_split
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError, did_you_mean


def rank_run(
    config: Config,
    process: Process,
    run_dir: Path,
    method: str,
    split: str = "valid",
    repeats: int = 5,
    output: Path | None = None,
) -> tuple[Path, list[Importance]]:
    """Write the ranking of a run's fields to a folder (default: importance/<method> in the run folder), on all ranks.

    Returns the folder, and the fields, most important first.

    Raises:
        ConfigError: no such method or split, less than one repeat, or an output that is in the way.
    """
    if method in MEANINGS:
        raise ConfigError(
            f"--method {method} ranks while a model is trained; {run_dir} holds no such ranking, expected one of a run "
            f"with selection.method={method}"
        )
    if method not in METHODS:
        raise ConfigError(f"--method {method!r}" + did_you_mean(method, METHODS, f"expected {', '.join(METHODS)}"))
    if repeats < 1:
        raise ConfigError(f"--repeats is {repeats}; expected at least 1")
    set_threads(config)
    set_tf32(config, process)
    config.trainer.shuffle = False
    schema = schema_of(config.data)
    reader = read_split(config, schema, process, split)
    if reader is None:
        raise ConfigError(f"data.{split} is null; there is nothing to rank the fields by")
    model, _ = build_model(config, schema, process)
    which, step = load_model_of_run(model, config, run_dir, process)
    target = output or run_dir / PLACE / method
    sources: list[str | Path] = [run_dir, config.data.path]
    with replacing_on_ranks(process, target, "--output", "importance.py", sources, [run_dir / PLACE]) as folder:
        ranking = Ranking(config, model, reader, process, split)
        found = ranking.by(method, repeats)
        if process.is_main:
            about = _about(ranking, method, split, repeats) | {"run": str(run_dir), "model": which, "step": step}
            write_result(folder, about, found)
            (folder / "config.yaml").write_text(as_yaml(config))
    return target, found


def _about(ranking: Ranking, method: str, split: str, repeats: int) -> dict[str, Any]:
    """Return what importance.json says beside the fields."""
    permutes = method == "permutation"
    return {
        "method": method,
        "meaning": METHODS[method].format(metric=ranking.metric),
        "split": split,
        "rows": ranking.reader.rows,
        "repeats": repeats if permutes else None,
        "seed": ranking.config.trainer.seed if permutes else None,
        "metric": ranking.metric if permutes else None,
        "value": steering_value(ranking.scores, ranking.metric) if permutes else None,
    }
