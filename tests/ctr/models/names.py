"""The models by their yaml: those of pooled features alone, and those that read sequences."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SEQUENCE_MODELS = ["dare", "din", "hstu"]
MODELS = sorted({path.stem for path in (ROOT / "conf/model").glob("*.yaml")} - set(SEQUENCE_MODELS))
