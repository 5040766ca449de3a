"""Labels of a data set: one is one task of the model, with the rows in which it counts and its loss.

A label whose space is another one (`where: click`) is known only where that one is 1. Such labels form chains
("funnels"): click, then buy. The logit of a label is that of its own space: of buy, the probability to buy after a
click. The product along the chain, the probability to click and buy, is the *joint* one; it counts in all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tessera.ctr.data.errors import SchemaError
from tessera.embedding import settings
from tessera.embedding.errors import ConfigError, did_you_mean
from tessera.embedding.settings import setting

MISSING: Any = "???"  # omegaconf's word for a value that must be given; serving reads schemas without omegaconf
LOSSES = ("cross_entropy", "focal", "pairwise", "jrc", "mse")
NULLS = ("bad", "unknown")
ALL = "all"
#: Which losses read a key that not all do.
READ_BY = {
    "smoothing": ("cross_entropy",),
    "gamma": ("focal",),
    "positive_share": ("focal",),
    "mix": ("pairwise", "jrc"),
}


@dataclass
class LabelConfig:
    """One label, `data.schema.labels[]`; its name alone says the same with all defaults."""

    name: str = setting(MISSING, "of the task, in metrics, reports and predictions")
    column: str | None = setting(None, "the column that holds it; null: that of its name")
    where: str = setting(ALL, "the rows in which it counts: all, or those in which another label, named here, is 1")
    nulls: str | None = setting(
        None,
        "what a null is: unknown: the row does not count for this label | bad: a bad row; "
        "null: unknown where there are several labels, bad for a single one",
        choices=NULLS,
    )
    weight: float = setting(1.0, "on its loss, beside those of the others", at_least=0)
    loss: str = setting(
        "cross_entropy",
        "cross_entropy | focal | pairwise (RankNet, BPR) or jrc within data.schema.group | mse: the label is a number",
        choices=LOSSES,
    )
    smoothing: float = setting(
        0.0, "loss cross_entropy: a label y is taken as y (1 - smoothing) + smoothing / 2", at_least=0, below=1
    )
    gamma: float = setting(2.0, "loss focal: exponent of 1 - p, p the probability of the label found", at_least=0)
    positive_share: float | None = setting(
        None, "loss focal: weight of positives, beside 1 - it of negatives; null: 1 for both", above=0, below=1
    )
    mix: float = setting(
        0.5,
        "loss pairwise and jrc: share of cross-entropy, beside 1 - it of the ranking loss",
        at_least=0,
    )


@dataclass(frozen=True)
class Label:
    """A validated label. parent: number of the label that its space is, None: it counts in all rows."""

    name: str = "label"
    column: str = "label"
    parent: int | None = None
    nulls: str = "bad"
    weight: float = 1.0
    loss: str = "cross_entropy"
    smoothing: float = 0.0
    gamma: float = 2.0
    positive_share: float | None = None
    mix: float = 0.5

    @property
    def is_number(self) -> bool:
        """Whether the label is any number, which the model answers as it is; else it is 0 or 1."""
        return self.loss == "mse"

    @property
    def is_plain(self) -> bool:
        """Whether its loss is the cross-entropy to the label itself, over all rows."""
        return self.loss == "cross_entropy" and not self.smoothing and self.parent is None and self.weight == 1


def labels_of(found: Sequence[Any]) -> tuple[Label, ...]:
    """Return the labels of `data.schema.labels`: names, mappings with the keys of `LabelConfig`, or both.

    Raises SchemaError: an unknown key or value, a name twice, or a space that is no other label or a circle.
    """
    configs = [_config(one, f"schema.labels[{i}]") for i, one in enumerate(found)]
    names = [one.name for one in configs]
    several = len(configs) > 1
    for i, name in enumerate(names):
        if name in names[:i]:
            raise SchemaError(f"schema.labels: {name!r} stands twice; names must differ")
        if several and (not name or set(name) & set("./ ") or name == ALL):
            raise SchemaError(
                f"schema.labels: {name!r} names a task; expected a name without dots, slashes and spaces, other than "
                f"{ALL} (column: says what the column is called)"
            )
    labels = tuple(_label(one, names, several=several) for one in configs)
    for i in range(len(labels)):
        _refuse_circle(labels, i)
        if labels[i].parent is not None and (joint := joint_name(labels, i)) in names:
            raise SchemaError(
                f"schema.labels: {joint!r} is the name of the joint probability of its parts; expected another name "
                "for the label, with column: to say what its column is called"
            )
    return labels


def _config(one: Any, where: str) -> LabelConfig:
    if isinstance(one, LabelConfig):
        config = one
    elif isinstance(one, str):
        config = LabelConfig(name=one)
    elif isinstance(one, Mapping):
        known = [field.name for field in fields(LabelConfig)]
        for key in one:
            if key not in known:
                raise SchemaError(
                    f"{where}: unknown key {key!r}{did_you_mean(str(key), known, 'known: ' + ', '.join(known))}"
                )
        if not one.get("name"):
            raise SchemaError(f"{where}: name is missing")
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LabelConfig), dict(one)))
        except OmegaConfBaseException as error:
            raise SchemaError(f"{where}: {str(error).splitlines()[0]}") from None
        assert isinstance(made, LabelConfig)
        config = made
    else:
        raise SchemaError(f"{where}: found {type(one).__name__}, expected a column's name, or keys and values")
    try:
        settings.check(config, f"{where}.")
    except ConfigError as error:
        raise SchemaError(str(error)) from None
    if config.mix > 1:
        raise SchemaError(f"{where}.mix is {config.mix}; expected a number from 0 to 1")
    return config


def _label(config: LabelConfig, names: Sequence[str], *, several: bool) -> Label:
    where = f"schema.labels: {config.name!r}"
    parent = None
    if config.where != ALL:
        others = [name for name in names if name != config.name]
        if config.where not in others:
            known = did_you_mean(config.where, others, f"other labels: {', '.join(others) or 'none'}")
            raise SchemaError(f"{where}: where is {config.where!r}; expected {ALL} or another label{known}")
        parent = list(names).index(config.where)
    default = LabelConfig()
    for key, losses in READ_BY.items():
        if config.loss not in losses and getattr(config, key) != getattr(default, key):
            raise SchemaError(f"{where}: {key} is set, but only loss {' and '.join(losses)} read it")
    return Label(
        name=config.name,
        column=config.name if config.column is None else config.column,
        parent=parent,
        nulls=config.nulls or ("unknown" if several else "bad"),
        weight=config.weight,
        loss=config.loss,
        smoothing=config.smoothing,
        gamma=config.gamma,
        positive_share=config.positive_share,
        mix=config.mix,
    )


def _refuse_circle(labels: Sequence[Label], number: int) -> None:
    at, steps = labels[number].parent, 0
    while at is not None:
        if labels[at].is_number:
            raise SchemaError(
                f"schema.labels: {labels[number].name!r} counts where {labels[at].name!r} is 1, which is a number "
                "(loss: mse); expected a label of 0 and 1"
            )
        at, steps = labels[at].parent, steps + 1
        if steps > len(labels):
            raise SchemaError(f"schema.labels: {labels[number].name!r} counts where it counts itself, in a circle")


def chain_of(labels: Sequence[Label], number: int) -> list[int]:
    """Return the numbers of the labels from the first of a funnel to this one."""
    chain = [number]
    while (parent := labels[chain[0]].parent) is not None:
        chain.insert(0, parent)
    return chain


def joint_name(labels: Sequence[Label], number: int) -> str:
    """Return the name of the joint probability of a funnel up to this label, as in metrics: click_and_buy."""
    return "_and_".join(labels[at].name for at in chain_of(labels, number))
