"""Training steps per second of deepctr-torch, Criteo-shaped; runs in the environment of deepctr_torch.sh.

Its models, its forward pass and torch's Adam over everything, as its `fit` does, on ids that are encoded and preloaded
(its reading and encoding is not counted): 13 numeric and 26 id fields, batch 4096, dim 16, MLP 400x3, no L2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from deepctr_torch.inputs import DenseFeat, SparseFeat
from deepctr_torch.models import PNN, AutoInt, DCNMix, DeepFM, xDeepFM

BATCH, DIM, HIDDEN = 4096, 16, (400, 400, 400)
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--models", default="DeepFM,AutoInt,PNN")
parser.add_argument("--ids", type=int, default=2_700_000, help="distinct ids of all fields together")
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--serve", action="store_true", help="take one step of the model for each line of standard input")
options = parser.parse_args()


def build(name: str) -> torch.nn.Module:
    rows = options.ids // 26
    columns = [SparseFeat(f"C{i}", rows, embedding_dim=DIM) for i in range(26)]
    columns += [DenseFeat(f"I{i}", 1) for i in range(13)]
    plain = {"dnn_hidden_units": HIDDEN, "l2_reg_embedding": 0, "device": "cpu"}
    if name == "PNN":
        return PNN(columns, use_inner=True, **plain)
    if name == "AutoInt":
        return AutoInt(columns, columns, att_layer_num=3, att_head_num=2, **plain)
    models = {"DeepFM": DeepFM, "xDeepFM": xDeepFM, "DCNMix": DCNMix}
    return models[name](columns, columns, l2_reg_linear=0, **plain)


def stepper(name: str) -> Callable[[], None]:
    model = build(name)
    optimizer = torch.optim.Adam(model.parameters())
    ids = torch.randint(0, options.ids // 26, (BATCH, 26)).float()  # its input is one float matrix
    inputs, labels = torch.cat([ids, torch.rand(BATCH, 13)], 1), torch.randint(0, 2, (BATCH,)).float()

    def step() -> None:
        optimizer.zero_grad()
        F.binary_cross_entropy(model(inputs).squeeze(), labels).backward()
        optimizer.step()

    return step


def milliseconds_per_step(name: str) -> float:
    step = stepper(name)
    step()
    times = []
    for _ in range(options.steps):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


if __name__ == "__main__":
    torch.set_num_threads(options.threads)
    if options.serve:
        step = stepper(options.models)
        print("ready", flush=True)
        for _ in sys.stdin:
            step()
            print("done", flush=True)
        sys.exit()
    for model_name in options.models.split(","):
        milliseconds = milliseconds_per_step(model_name)
        print(
            f"{model_name:<10}{milliseconds:>10.1f} ms/step{BATCH / milliseconds * 1e3:>12,.0f} samples/s", flush=True
        )
