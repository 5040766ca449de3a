"""What `tessera plan` does: statistics from data or a file, plans for many numbers of ranks, text and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tessera.ctr.config import Config
from tessera.ctr.data.config import schema_of
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.schema import Schema
from tessera.ctr.plan.estimate import Planner
from tessera.ctr.plan.hardware import hardware
from tessera.ctr.plan.show import check_picture, draw, table_of_collectives, table_of_ranks, table_of_tables
from tessera.ctr.plan.statistics import Statistics, from_data, from_file
from tessera.ctr.train.evaluate import read_split
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError

MOST_RANKS = 1024
SAMPLE_ROWS = 65536  # at least so many rows are read, and BATCHES
BATCHES = 8


@dataclass(frozen=True)
class PlanOptions:
    """The options of `tessera plan`, named as they are there."""

    ranks: int = 8
    ranks_per_host: int = 8
    device: str = "cpu"
    numbers: tuple[str, ...] = ()
    statistics: Path | None = None
    write_statistics: Path | None = None
    batches: int | None = None
    samples: int | None = None
    rows_per_rank: int | None = None
    output: Path | None = None


def plan(config: Config, options: PlanOptions) -> None:
    """Print a plan.

    Raises:
        ConfigError: a mistake in the options or the configuration. DataError, SchemaError: in the data.
    """
    _check(options)
    machine = hardware(options.device, options.numbers)
    if options.output is not None:
        check_picture(options.output)
    schema = schema_of(config.data)
    known = _statistics(config, schema, options)
    planner = Planner(config, schema, known, machine, options.ranks_per_host, options.samples, options.rows_per_rank)
    chosen = planner.plan(options.ranks)
    print(known.method(), end="\n\n")
    print(table_of_tables(chosen, planner.samples), table_of_collectives(chosen), sep="\n\n", end="\n\n")
    plans, refused = [], []
    for ranks in _numbers_of_ranks(options.ranks):
        try:
            plans.append(chosen if ranks == options.ranks else planner.plan(ranks))
        except ConfigError as error:
            refused.append(f"{ranks} ranks: {error}")
    print(_title(config, options))
    print(table_of_ranks(plans, [planner.batch(one.ranks) for one in plans], machine.memory_gib), *refused, sep="\n")
    if options.output is not None:
        draw(plans, options.output)
        print(f"picture: {options.output}")


def _numbers_of_ranks(also: int) -> list[int]:
    powers = [2**power for power in range(MOST_RANKS.bit_length())]
    return sorted({*powers, also})


def _title(config: Config, options: PlanOptions) -> str:
    batch = f"{config.trainer.batch_size:,} rows over all ranks"
    if options.rows_per_rank:
        batch = f"{options.rows_per_rank:,} rows of each rank"
    own = f" with {', '.join(options.numbers)}" if options.numbers else ""
    return f"batches of {batch}; {options.ranks_per_host} ranks a host; device {options.device}{own}"


def _check(options: PlanOptions) -> None:
    for name in ("ranks", "ranks_per_host", "batches", "samples", "rows_per_rank"):
        value = getattr(options, name)
        most = {"ranks": 2**20, "rows_per_rank": 2**40}.get(name, 2**62)  # a batch over all ranks fits 64 bits
        if value is not None and not 1 <= value <= most:
            expected = "at least 1" if value < 1 else f"at most {most}"
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected {expected}")
    ranks, of_host = options.ranks, options.ranks_per_host
    if ranks > of_host and ranks % of_host:
        raise ConfigError(f"--ranks is {ranks}; expected a multiple of --ranks-per-host {of_host}")
    if options.write_statistics is not None and options.statistics is not None:
        raise ConfigError("--write-statistics and --statistics are both given; statistics of a file are there already")
    if options.write_statistics is not None and not options.write_statistics.parent.is_dir():
        raise ConfigError(f"--write-statistics {options.write_statistics}: no such folder")
    for key, path in (("--write-statistics", options.write_statistics), ("--output", options.output)):
        if path is not None and path.is_dir():
            raise ConfigError(f"{key} {path} is a folder; expected the name of a file")


def _statistics(config: Config, schema: Schema, options: PlanOptions) -> Statistics:
    if options.statistics is not None:
        return from_file(options.statistics, schema)
    if config.data.train is None:
        raise ConfigError("data.train is null and there is no --statistics; a plan needs the data or statistics of it")
    process = Process(0, 0, 1, torch.device("cpu"), dist.HashStore())
    try:
        reader = read_split(config, schema, process, "train")
    except DataError as error:
        raise DataError(f"{error}; or plan from --statistics") from None
    assert reader is not None
    known = from_data(reader, schema, options.batches or max(BATCHES, -(-SAMPLE_ROWS // config.trainer.batch_size)))
    if options.write_statistics is not None:
        known.to_file(options.write_statistics)
        print(f"statistics: {options.write_statistics}")
    return known
