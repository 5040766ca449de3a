"""The models by their yaml: those of pooled features alone, those that read sequences, and those over labels."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SEQUENCE_MODELS = ["dare", "din", "hstu"]
MODELS = sorted({path.stem for path in (ROOT / "conf/model").glob("*.yaml")} - set(SEQUENCE_MODELS))
OF_FUNNELS = ["esmm", "gnolr"]  # labels that lead to each other
OVER_LABELS = ["dbmtl", "mmoe", "ple", "shared_bottom", *OF_FUNNELS]
OF_ONE_LABEL = [name for name in MODELS if name not in OVER_LABELS]
