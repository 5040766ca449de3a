"""A plan as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tessera.ctr.plan.estimate import BOUNDS, RanksPlan
from tessera.distributed.plan import size
from tessera.embedding.errors import ConfigError

PICTURES = (".svg", ".png")
DASHES = ((None, None), (2, 2))  # rows and gradients are often one line, and so are ids and counts


def table_of_tables(plan: RanksPlan, samples: int) -> str:
    """Return rows and bytes of each table as text."""
    lines = [
        f"tables on {_ranks(plan.ranks)}, rows expected after {samples:,} samples; ids of one rank and step:",
        f"{'table':<20}{'rows':>14}{'values':>8}{'state':>7}{'other':>7}{'bytes/row':>10}{'in all':>11}{'per rank':>11}"
        f"{'ids':>9}{'hottest':>9}{'asked':>9}{'owned':>9}",
    ]
    for table in plan.tables:
        whole, note = table.size, " (sums of owners)" if table.size.summed_by_owner else ""
        if whole.cache_rows is not None:
            note += f" (on the host, {whole.cache_rows:,} rows of each rank on the device)"
        lines.append(
            f"{whole.name:<20}{whole.rows:>14,}{table.values:>8}{table.state:>7}{table.bookkeeping:>7}"
            f"{whole.row_bytes:>10}{size(whole.bytes):>11}{size(whole.bytes / plan.ranks):>11}"
            f"{table.ids:>9,.0f}{table.hottest:>9.1%}{table.distinct:>9,.0f}{table.owned:>9,.0f}{note}"
        )
    sums = (sum(getattr(table, key) for table in plan.tables) for key in ("ids", "distinct", "owned"))
    ids, distinct, owned = sums
    rows, in_all = sum(table.size.rows for table in plan.tables), sum(table.size.bytes for table in plan.tables)
    lines.append(
        f"{'in all':<20}{rows:>14,}{'':>32}{size(in_all):>11}{size(plan.table_bytes):>11}"
        f"{ids:>9,.0f}{'':>9}{distinct:>9,.0f}{owned:>9,.0f}"
    )
    return "\n".join(lines)


def table_of_collectives(plan: RanksPlan) -> str:
    """Return what one rank sends in a step as text, by collective."""
    if plan.ranks == 1:
        return "one rank sends nothing"
    lines = [
        f"one of {plan.ranks} ranks sends in a step:",
        f"{'what':<22}{'collective':<12}{'calls':>6}{'bytes':>14}",
    ]
    lines += [
        f"{one.name:<22}{one.kind:<12}{one.calls:>6g}{one.sent:>14,.0f}{'  through the host' if one.on_host else ''}"
        for one in plan.collectives
    ]
    calls = sum(one.calls for one in plan.collectives)
    lines.append(f"{'in all':<34}{calls:>6g}{plan.sent:>14,.0f}")
    if plan.hosts > 1:
        lines.append(f"{'of it to other hosts':<40}{plan.sent_between:>14,.0f}")
    return "\n".join(lines)


def table_of_ranks(plans: Sequence[RanksPlan], batch: Sequence[int], memory_gib: float) -> str:
    """Return one line for each number of ranks as text. batch: rows of a step over all ranks, by plan."""
    lines = [
        "estimated milliseconds of a step, not measured:",
        f"{'ranks':>6}{'hosts':>6}{'rows/rank':>10}{'tables/rank':>12}{'sent/rank':>11}"
        + "".join(f"{name:>10}" for name in BOUNDS)
        + f"{'step ms':>10}{'samples/s':>12}  bound by",
    ]
    for plan, rows in zip(plans, batch, strict=True):
        full = " (tables do not fit)" if plan.table_bytes > memory_gib * 2**30 else ""
        lines.append(
            f"{plan.ranks:>6,}{plan.hosts:>6,}{plan.rows:>10,}{size(plan.table_bytes):>12}{size(plan.sent):>11}"
            + "".join(f"{plan.ms[name]:>10.3f}" for name in BOUNDS)
            + f"{plan.step_ms:>10.2f}{rows / plan.step_ms * 1e3:>12,.0f}  {plan.bound}{full}"
        )
    return "\n".join(lines)


def check_picture(path: Path) -> None:
    """Raise ConfigError for a name that is of no picture."""
    if path.suffix not in PICTURES:
        raise ConfigError(f"--output {path}: expected a name that ends in {' or '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: no folder {path.parent}")


def draw(plans: Sequence[RanksPlan], path: Path) -> None:
    """Draw time of a step, bytes sent and bytes of tables over the number of ranks, as svg or png."""
    import matplotlib
    from matplotlib.figure import Figure

    ranks = [plan.ranks for plan in plans]
    style = {"axes.grid": True, "grid.linewidth": 0.5, "svg.hashsalt": "plan", "legend.frameon": False, "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        times, sent = figure.subplots(1, 2)
        for name in BOUNDS:
            times.plot(ranks, [plan.ms[name] or float("nan") for plan in plans], marker=".", label=name)
        times.plot(ranks, [plan.step_ms for plan in plans], color="black", linewidth=2, label="step")
        times.set(ylabel="estimated ms of a step")
        names = list(dict.fromkeys(one.name for plan in plans for one in plan.collectives))
        for number, name in enumerate(names):
            sums = [sum(one.sent for one in plan.collectives if one.name == name) for plan in plans]
            look = {"marker": ".", "dashes": DASHES[number % 2], "zorder": 2 + number % 2, "label": name}
            sent.plot(ranks, [value or float("nan") for value in sums], **look)
        sent.plot(ranks, [plan.table_bytes for plan in plans], color="black", linestyle="--", label="tables, kept")
        sent.set(ylabel="bytes of one rank and step")
        for axes in (times, sent):
            axes.set(xlabel="ranks", yscale="log")
            axes.set_xscale("log", base=2)
            axes.set_xticks(ranks, [f"{count}" for count in ranks])
            axes.legend(fontsize=7.5, ncols=2)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _ranks(count: int) -> str:
    return f"{count:,} rank{'s' if count > 1 else ''}"
