"""Fill in what a schema takes from the statistics of the data: means, bounds and boundaries of its numbers."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa

from tessera.ctr.data.config import DataConfig
from tessera.ctr.data.errors import SchemaError
from tessera.ctr.data.features import FeatureConfig, nearest
from tessera.ctr.data.files import one_line
from tessera.distributed.locations import filesystem_of


def fill_fitted(data: DataConfig) -> None:
    """Replace `fitted`, `quantiles` and `clip_quantiles` of the schema's features by the numbers of `data.statistics`,
    which then stand in the configuration as if they had been written there.

    Raises SchemaError: no such file, another form, or a column that it does not have or that holds no numbers.
    """
    wanting = [one for one in data.schema.features if one.fitted or one.clip_quantiles or one.quantiles is not None]
    if not wanting:
        return
    if data.statistics is None:
        key = "fitted" if wanting[0].fitted else "quantiles" if wanting[0].quantiles is not None else "clip_quantiles"
        raise SchemaError(
            f"data.schema.features: {wanting[0].name!r}: {key} is set, but data.statistics is null; expected the "
            "statistics.json that `tessera prepare stats` writes"
        )
    columns = _columns(data.statistics)
    for feature in wanting:
        _fill(feature, _found(feature, columns, data.statistics))


def _columns(path: str) -> dict[str, Any]:
    try:
        filesystem, location = filesystem_of(path)
        with filesystem.open_input_file(location) as file:
            columns = json.loads(file.read())["columns"]
        assert isinstance(columns, dict)
        return columns
    except (OSError, pa.ArrowException) as error:
        raise SchemaError(f"data.statistics: {path} cannot be read: {one_line(error)}") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise SchemaError(f"data.statistics: {path} is no statistics.json of `tessera prepare stats`") from None


def _found(feature: FeatureConfig, columns: dict[str, Any], path: str) -> np.ndarray:
    """Return the quantiles of a feature's column; [0] and [-1] are its smallest and largest value."""
    where, name = f"data.schema.features: {feature.name!r}", feature.column or feature.name
    if feature.expr is not None:
        raise SchemaError(f"{where}: {path} has statistics of columns, and expr is none; set the numbers themselves")
    if name not in columns:
        raise SchemaError(f"{where}: {path} knows no column {name!r}; {nearest(name, columns)}")
    quantiles = columns[name].get("quantiles")
    if not quantiles:
        found = columns[name].get("type", "nothing")
        raise SchemaError(f"{where}: {path} has no numbers of column {name!r} ({found}), expected a column of numbers")
    return np.array([*quantiles, columns[name]["mean"], columns[name]["std"]], np.float64)


def _fill(feature: FeatureConfig, numbers: np.ndarray) -> None:
    where = f"data.schema.features: {feature.name!r}"
    quantiles, mean, std = numbers[:-2], float(numbers[-2]), float(numbers[-1])
    if feature.clip_quantiles:
        _check_quantiles(where, feature)
        feature.clip = [_at(quantiles, share) for share in feature.clip_quantiles]
        feature.clip_quantiles = []
    if len(feature.clip) == 2 and (feature.fitted or feature.quantiles is not None):
        # What the transform sees: mean and std are then those of a line through the quantiles.
        quantiles = np.clip(quantiles, feature.clip[0], feature.clip[1])
        middles = (quantiles[1:] + quantiles[:-1]) / 2
        mean, std = float(middles.mean()), float(middles.std())
    if feature.fitted:
        _fill_transform(where, feature, quantiles, mean, std)
    if feature.quantiles is not None:
        feature.boundaries = _boundaries(where, feature, feature.quantiles, quantiles)
    feature.fitted, feature.quantiles = False, None


def _fill_transform(where: str, feature: FeatureConfig, quantiles: np.ndarray, mean: float, std: float) -> None:
    if feature.transform not in ("standardise", "min_max"):
        raise SchemaError(f"{where}: fitted is set, but only transform: standardise and min_max read it")
    if quantiles[0] == quantiles[-1]:
        raise SchemaError(f"{where}: fitted is set, but the column has one value alone, {quantiles[0]:g}")
    if feature.transform == "standardise":
        feature.mean, feature.std = mean, std
    else:
        feature.min, feature.max = float(quantiles[0]), float(quantiles[-1])


def _boundaries(where: str, feature: FeatureConfig, buckets: int, quantiles: np.ndarray) -> list[float]:
    if feature.transform != "bucketise":
        raise SchemaError(f"{where}: quantiles is set, but only transform: bucketise reads it")
    if feature.boundaries:
        raise SchemaError(f"{where}: quantiles and boundaries are both set; set one of them")
    if not 2 <= buckets < len(quantiles):
        raise SchemaError(f"{where}: quantiles {buckets}, expected 2 to {len(quantiles) - 1}")
    inner = {_at(quantiles, part / buckets) for part in range(1, buckets)}
    found = sorted(one for one in inner if one > quantiles[0])  # one at the smallest value has an empty bucket below
    if not found:
        raise SchemaError(f"{where}: quantiles of a column that is nearly always {quantiles[0]:g}; set boundaries")
    return found


def _at(quantiles: np.ndarray, share: float) -> float:
    return float(np.interp(share * (len(quantiles) - 1), np.arange(len(quantiles)), quantiles))


def _check_quantiles(where: str, feature: FeatureConfig) -> None:
    found = feature.clip_quantiles
    if len(found) != 2 or not all(map(math.isfinite, found)) or not 0 <= found[0] < found[1] <= 1:
        raise SchemaError(f"{where}: clip_quantiles {found}, expected two rising shares, as [0.01, 0.99]")
    if feature.clip:
        raise SchemaError(f"{where}: clip and clip_quantiles are both set; set one of them")
