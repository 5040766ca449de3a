"""Accuracy of FuxiCTR's DeepFM on data sets written by `scripts/bench/defaults.py --write`; runs in the environment of
fuxictr.sh.

    scripts/bench/peers/fuxictr.sh ENVIRONMENT REPOSITORY --data build/bench/default_sets

What its template (DeepFM_default of its model zoo) says, but for what has to suit the data: vectors of 16 and an MLP
400x3, as ours, and the batch size of the set instead of 10,000. So Adam at 0.001, rows drawn with 0.0001, no
regularizer, a tenth of the rate after an epoch that is not better by AUC minus logloss on valid, the end after two of
them, and the best epoch is scored. Every id of the training split has a row, all others of a feature share one; several
ids of one row are averaged. Numbers become ids as in its settings for Criteo: floor(log(x)^2) above 2, x as an integer
below. (As numbers they are multiplied with vectors of 0.3; the logloss on Criteo's log is 1.4 then.)
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch

SPLITS = ("train", "valid", "test")
LABEL = "label"
TEMPLATE: dict[str, Any] = {
    "optimizer": "adam",
    "loss": "binary_crossentropy",
    "metrics": ["AUC", "logloss"],
    "monitor": {"AUC": 1, "logloss": -1},
    "monitor_mode": "max",
    "early_stop_patience": 2,
    "learning_rate": 1e-3,
    "embedding_dim": 16,  # 40 there
    "hidden_units": [400, 400, 400],  # 300 there
    "hidden_activations": "relu",
    "net_dropout": 0,
    "batch_norm": False,
    "embedding_regularizer": 0,
    "net_regularizer": 0,
    "verbose": 0,
}
EPOCHS = 100
Columns = dict[str, torch.Tensor]


class Batches:
    """Batches of rows in memory, training rows in a new order in each pass."""

    def __init__(self, columns: Columns, size: int, *, shuffle: bool) -> None:
        self.columns, self.size, self.shuffle = columns, size, shuffle
        self.rows = len(columns[LABEL])

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def __iter__(self) -> Iterator[Columns]:
        order = torch.randperm(self.rows) if self.shuffle else torch.arange(self.rows)
        for places in order.split(self.size):
            yield {name: column[places] for name, column in self.columns.items()}


def bucketised(numbers: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return int64 ids of numbers; what is missing stays so."""
    values = numbers.fill_null(0).to_numpy().astype(np.float64)
    ids = np.where(values > 2, np.floor(np.log(np.maximum(values, 1)) ** 2), np.trunc(values)).astype(np.int64)
    # Above 2 they begin with 1 again (log(3)^2 is 1.2), there as here.
    return pa.chunked_array([pa.array(ids, mask=numbers.is_null().to_numpy())])


def encoded(columns: dict[str, pa.ChunkedArray]) -> tuple[dict[str, np.ndarray], int]:
    """Return the ids of each split as places in a table (0: none, 1: not in the training split), and its rows."""
    known = columns["train"].unique().drop_null()
    found = {}
    for split, column in columns.items():
        places = pyarrow.compute.index_in(column, value_set=known).to_numpy().astype(np.float64)  # NaN: not among them
        missing = column.is_null().to_numpy()
        found[split] = np.where(missing, 0, np.where(np.isnan(places), 1, places + 2)).astype(np.int64)
    return found, len(known) + 2


def bags(columns: dict[str, pa.ChunkedArray]) -> tuple[dict[str, np.ndarray], int, int]:
    """Return lists of ids as places, int64 [rows, longest] filled up with 0, the rows of the table and the length."""
    lists = {split: column.combine_chunks() for split, column in columns.items()}
    flat, size = encoded({split: pa.chunked_array([one.flatten()]) for split, one in lists.items()})
    lengths = {split: one.value_lengths().fill_null(0).to_numpy() for split, one in lists.items()}
    longest = max(int(one.max()) for one in lengths.values())
    found = {}
    for split, counts in lengths.items():
        found[split] = np.zeros((len(counts), longest), np.int64)
        found[split][np.arange(longest) < counts[:, None]] = flat[split]
    return found, size, longest


def read(folder: Path, described: dict[str, Any]) -> tuple[dict[str, Columns], OrderedDict[str, dict[str, Any]]]:
    """Return the columns of each split and FuxiCTR's description of the features."""
    tables = {split: pq.read_table(folder / described["splits"][split]) for split in SPLITS}
    columns: dict[str, Columns] = {
        split: {LABEL: torch.tensor(table[LABEL].to_numpy(), dtype=torch.float32)} for split, table in tables.items()
    }
    features: OrderedDict[str, dict[str, Any]] = OrderedDict()
    for name, kind in described["features"].items():
        stored = {split: table[name] for split, table in tables.items()}
        if kind == "numeric":
            stored = {split: bucketised(one) for split, one in stored.items()}
        if kind == "ids":
            values, size, longest = bags(stored)
            features[name] = {"source": "", "type": "sequence", "vocab_size": size, "padding_idx": 0}
            features[name] |= {"max_len": longest, "feature_encoder": "layers.MaskedAveragePooling()"}
        else:
            values, size = encoded(stored)
            features[name] = {"source": "", "type": "categorical", "vocab_size": size, "padding_idx": 0}
        for split, of_split in values.items():
            columns[split][name] = torch.from_numpy(of_split)
    return columns, features


def fitted(name: str, folder: Path, seed: int) -> dict[str, Any]:
    """Return AUC and logloss of the best epoch on valid and test, the passes, and the seconds of one core."""
    from fuxictr.features import FeatureMap
    from src import DeepFM

    described = json.loads((folder / "set.json").read_text())
    columns, features = read(folder, described)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    feature_map = FeatureMap("set", "")
    feature_map.features, feature_map.labels = features, [LABEL]
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.default_emb_dim = TEMPLATE["embedding_dim"]
    feature_map.set_column_index()
    batches = {split: Batches(columns[split], described["batch"], shuffle=split == "train") for split in SPLITS}
    began = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "set").mkdir()
        model = DeepFM(feature_map, model_root=scratch, **TEMPLATE)
        model.fit(batches["train"], epochs=EPOCHS, validation_data=batches["valid"])
        result = {split: dict(model.evaluate(batches[split])) for split in ("valid", "test")}
    rows = sum(one.get("vocab_size", 0) for one in features.values())
    return result | {"epochs": model._epoch_index + 1, "rows": rows, "seconds": time.process_time() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True, help="of FuxiCTR; its wheel has no DeepFM")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=Path("build/bench/fuxictr.json"), help="results, which go on")
    parser.add_argument("--sets", nargs="+", help="names of folders; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path[:0] = [str(options.repository), str(options.repository / "model_zoo/DeepFM/DeepFM_torch")]
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    for folder in sorted(one.parent for one in options.data.glob("*/set.json")):
        if options.sets and folder.name not in options.sets:
            continue
        for seed in options.seeds:
            key = f"{folder.name} {seed}"
            if key not in results:
                results[key] = fitted(folder.name, folder, seed)
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(results, indent=1) + "\n")
        runs = [results[f"{folder.name} {seed}"] for seed in options.seeds]
        cells = []
        for split in ("valid", "test"):
            for metric in ("AUC", "logloss"):
                values = [run[split][metric] for run in runs]
                spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
                cells.append(f"{split} {metric} {statistics.fmean(values):.4f}{spread}")
        print(f"{folder.name}: {', '.join(cells)}, {[run['epochs'] for run in runs]} passes", flush=True)


if __name__ == "__main__":
    main()
