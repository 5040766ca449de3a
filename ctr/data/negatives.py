"""Leave out part of the rows with label 0 when training data are read: fewer rows, and what they say of the others.

With a share r of the negatives kept, the odds of a row of a sample are those of the data divided by r:

    z_sample = z - ln r        (X. He et al., Practical Lessons from Predicting Clicks on Ads, ADKDD 2014, section 6.3)

The loss of training is taken of z - ln r, so the logit z of the model itself is that of all rows: evaluation, scores
and exports need no correction, and cannot lack it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tessera.ctr.data.counter_random import bits, key, uniform

STREAM = 0x6E656761  # keeps these numbers apart from others of the same seed


@dataclass(frozen=True)
class Negatives:
    """Which rows with label 0 are read: a share of them, chosen by (seed, number of the row in the data set) alone, so
    the same in every epoch and on any number of ranks, and with a larger share those and more."""

    rate: float
    seed: int

    def kept(self, rows: np.ndarray) -> np.ndarray:
        """Return bool [n]: whether a row is read if its label is 0. rows: int64 [n], their numbers."""
        return uniform(bits(key(STREAM, self.seed), rows.astype(np.uint64))) < self.rate
