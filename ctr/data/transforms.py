"""Transform numeric features, as `Feature.transform` names the transforms."""

from __future__ import annotations

import numpy as np

from tessera.ctr.data.schema import Feature


def transform(feature: Feature, x: np.ndarray) -> np.ndarray:
    """Clip and transform numbers [n] to numbers [n]. A value that is not finite gives one that is not finite."""
    x = clipped(feature, x)
    if feature.transform == "log1p":
        return np.copysign(np.log1p(np.abs(x)), x)
    if feature.transform in ("log2_square", "log2_square_floor"):
        large = x > 2
        squares = np.square(np.log(np.where(large, x, 1)))
        return np.where(large, np.floor(squares) if feature.transform.endswith("floor") else squares, x)
    if feature.transform == "standardise":
        return (x - feature.mean) / feature.std
    if feature.transform == "min_max":
        return (x - feature.min) / (feature.max - feature.min)
    assert feature.transform == "none", feature.transform
    return x


def clipped(feature: Feature, x: np.ndarray) -> np.ndarray:
    """Return numbers [n] within `clip`, those that are not finite as they are."""
    if not feature.clip:
        return x
    x = x if x.dtype.kind == "f" else x.astype(np.float64)
    return np.where(np.isfinite(x), np.clip(x, feature.clip[0], feature.clip[1]), x)


def bucket(feature: Feature, x: np.ndarray) -> np.ndarray:
    """Return the number of boundaries <= x, int64 [n]."""
    # In the precision of the data, so that a stored float32 0.7 is not below the boundary 0.7.
    x = clipped(feature, x)
    kind = x.dtype if x.dtype.kind == "f" else np.float64
    return np.searchsorted(np.array(feature.boundaries, kind), x, side="right")
