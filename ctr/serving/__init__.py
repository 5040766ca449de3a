"""Score exports of trained models, without the system that trained them: numpy, pyarrow and torch are enough.

    from tessera.serving import Scorer

    scorer = Scorer.load("exports/mine")
    scorer(rows)                       # an Arrow table, a pandas data frame, or dicts
    scorer.rank(user, candidates)      # one user, whose features are looked up once

The folder is `ctr/serving/`; it is imported as `tessera.serving`, and by its own modules as `tessera.ctr.serving`.
"""

from tessera.ctr.serving.errors import ExportError, RowError
from tessera.ctr.serving.scorer import Scorer

__all__ = ["ExportError", "RowError", "Scorer"]
