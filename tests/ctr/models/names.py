"""The models by their yaml: those of pooled features alone, those that read sequences, and those over labels."""

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SEQUENCE_MODELS = ["bst", "dare", "dien", "din", "hstu"]
MODELS = sorted({path.stem for path in (ROOT / "conf/model").glob("*.yaml")} - set(SEQUENCE_MODELS))
OF_FUNNELS = ["esmm", "gnolr"]  # labels that lead to each other
OVER_LABELS = ["dbmtl", "mmoe", "ple", "shared_bottom", *OF_FUNNELS]
OF_ONE_LABEL = [name for name in MODELS if name not in OVER_LABELS]
# Their default tests are one case each, the others slow: all share layers with the models above.
MORE = ["afn", "afn_plus", "dcn", "dlrm", "ecn", "edcn", "fcn", "fibinet", "final_net", "fmfm", "fwfm", "gdcn"]
MORE += ["mask_net", "optinter", "rank_mixer", "wukong"]
# Keys of the widths of hidden layers, where they are not `hidden` alone.
HIDDEN = {
    **dict.fromkeys(("lr", "fm", "autoint", "ecn", "edcn", "fcn", "fmfm", "fwfm", "rank_mixer"), []),
    "dlrm": ["bottom", "hidden"],
    "wukong": ["fm_hidden", "hidden"],
    "afn_plus": ["hidden", "deep_hidden"],
    **dict.fromkeys(("final_mlp", "final_net"), ["hidden1", "hidden2"]),
    "fgcnn": ["classifier.hidden"],
    **dict.fromkeys(("mmoe", "ple"), ["expert"]),
    **dict.fromkeys(("dbmtl", "shared_bottom"), ["bottom"]),
}


def quick(models: list[str]) -> list[Any]:
    """Return models as parameters of a test, those of MORE marked as slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in MORE else name for name in models]
