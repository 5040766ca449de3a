"""Define the keys of `selection`: gates that rank the fields while a model is trained."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tessera.embedding.errors import ConfigError
from tessera.embedding.settings import setting


@dataclass
class SelectionConfig:
    """A factor for each field, trained beside the model (docs/feature_selection.md)."""

    method: str = setting(
        "none",
        "none | dropout: each field is dropped with a probability that is learned (concrete dropout) | "
        "lpfs: learned factors, pulled towards 0 (LPFS) | autofield: keep or drop, learned on the valid split "
        "(AutoField) | optfs: a factor for each id (OptFS) | dnis: masks over columns, for the dims of tables (DNIS)",
        choices=("none", "dropout", "lpfs", "autofield", "optfs", "dnis"),
    )
    penalty: float = setting(
        0.01, "dropout: added to the summed loss of a batch for each field that is kept, times its share", at_least=0
    )
    temperature: float = setting(0.1, "dropout: of the relaxed draw; towards 0 a field is in or out", above=0)
    threshold: float = setting(
        0.01, "lpfs: after each step factors come nearer to 0 by this times the dense learning rate", at_least=0
    )
    eps: float = setting(0.1, "lpfs: the gate x^2 / (x^2 + eps) begins with this one", above=0)
    eps_decay: float = setting(0.9978, "lpfs: eps is multiplied by this every 100 steps", above=0, at_most=1)
    every: int = setting(10, "autofield, dnis: steps from one batch of the valid split to the next", at_least=1)
    lr: float = setting(0.001, "autofield, dnis: learning rate of what learns on the valid split, by Adam", above=0)
    cooling: float = setting(
        0.00005, "autofield: the temperature of draws is 1 less this times the step, at least 0.01", at_least=0
    )
    l1: float = setting(
        0.0001, "optfs: added to the loss per look-up, times the absolute value of the weight", at_least=0
    )
    sharpest: float = setting(
        2000.0, "optfs: gates are sigmoid(weight x sharpness), sharpness from 1 to this", at_least=1
    )
    sharpening_steps: int = setting(10_000, "optfs: steps until gates are sharpest", at_least=1)

    block: int = setting(4, "dnis: columns that are kept or dropped together", at_least=1)
    pull: float = setting(0.00001, "dnis: L1 on masks, added to the loss of the valid split", at_least=0)
    keep_above: float = setting(
        0.5, "dnis: a block is kept whose mask is above this share of the largest one", at_least=0, below=1
    )

    def check(self) -> None:
        """Raise ConfigError for a key that the method does not read."""
        for field in fields(self):
            readers = field.metadata["comment"].partition(":")[0].split(", ")
            value = getattr(self, field.name)
            if field.name != "method" and self.method not in readers and value != field.default:
                raise ConfigError(
                    f"selection.{field.name} is {value}, which only selection.method={' or '.join(readers)} reads; "
                    f"it is {self.method}"
                )


def refuse_gates(selection: SelectionConfig, what: str) -> None:
    """Raise ConfigError where gates rank fields: such a model is no one's to serve."""
    if selection.method != "none":
        raise ConfigError(
            f"selection.method is {selection.method}, whose gates rank fields; {what} is of a model without them: "
            "train one on the best fields (data.drop)"
        )
