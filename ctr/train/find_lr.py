"""Find learning rates by a short run in which one of them grows from step to step (Smith, Cyclical Learning Rates for
Training Neural Networks, 2017, section 3.3): that of the dense weights, then that of the rows, each from first values.

The other side learns meanwhile, so the loss falls anyway: what counts is how far it lies below that of a run on the
same batches in which the rate stands still next to 0. Nothing is saved and no run folder is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tessera.ctr.config import Config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.config import schema_of
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.report.rate_curve import RateCurve
from tessera.ctr.table_settings import settings_of_all
from tessera.ctr.train.engine import Engine, prepare_device
from tessera.ctr.train.evaluate import read_split
from tessera.ctr.train.nonfinite import NonFiniteError
from tessera.distributed.collectives import gather_objects, sum_over_ranks
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError

SIDES = {"dense": "optimizer.dense.lr", "rows": "optimizer.sparse.lr"}
LOOK_EVERY = 10  # steps from one look at the losses to the next
SMOOTHING = 0.95  # of an exponential mean over steps
DIVERGED = 2.0  # times the least smoothed loss so far: the run ends
STILL = 1e-9  # times the configured rate: weights stay as they are
FEWEST = 20  # steps, of which a slope can be told


def find_rates(config: Config, process: Process, steps: int, low: float, high: float) -> list[RateCurve]:
    """Return the curve of each side, the same on every rank.

    low, high: of the growing rate, as multiples of the configured one.

    Raises ConfigError: a mistake in the arguments, or a run that begins with another model or learns of a teacher.
    """
    check(config, steps, low, high)
    prepare_device(config, process)
    for one in (config.optimizer.dense, config.optimizer.sparse):
        one.warmup_steps, one.schedule = 0, type(one.schedule)()
    curves = []
    for side in SIDES:
        still, _ = _run(config, process, side, np.full(steps, STILL))
        factors = np.geomspace(low, high, steps)
        factors = factors[factors < largest_factor(config, side)]
        loss, ended = _run(config, process, side, factors)
        if not ended and len(factors) < steps:
            ended = "a larger rate times optimizer.sparse.decay is 1 or more"
        configured = config.optimizer.dense.lr if side == "dense" else config.optimizer.sparse.lr
        curves.append(curve_of(side, configured, factors[: len(loss)] * configured, loss, still[: len(loss)], ended))
    return curves


def check(config: Config, steps: int, low: float, high: float) -> None:
    """Raise ConfigError for what `find_rates` refuses."""
    if steps < FEWEST:
        raise ConfigError(f"--steps is {steps}; expected {FEWEST} or more")
    if not 0 < low < high:
        raise ConfigError(f"--low is {low:g} and --high is {high:g}; expected low below high, and more than 0")
    largest = largest_factor(config, "rows")
    if np.count_nonzero(np.geomspace(low, high, steps) < largest) < FEWEST:
        raise ConfigError(
            f"--high is {high:g}, --low {low:g} and --steps {steps}: fewer than {FEWEST} rates are below 1 / decay, "
            f"{largest:.3g} times the configured one; expected a lower --high, more --steps or a lower "
            "optimizer.sparse.decay"
        )
    if config.trainer.warm_start.path is not None:
        raise ConfigError("trainer.warm_start.path is set; expected null, as rates are found from first values")
    if config.trainer.accumulate != 1:
        rows = config.trainer.batch_size * config.trainer.accumulate
        raise ConfigError(
            f"trainer.accumulate is {config.trainer.accumulate}; expected 1, to find rates: "
            f"trainer.batch_size={rows} trainer.accumulate=1 has as many rows in a step"
        )
    if config.trainer.distil.kind != "none":
        raise ConfigError(f"trainer.distil.kind is {config.trainer.distil.kind}; expected none, to find rates")


def largest_factor(config: Config, side: str) -> float:
    """Return the factor at which the rate of a side reaches 1 / decay, where rows would turn their signs; infinity
    without decay. The tables' rates grow together, so the table with the largest rate x decay says it."""
    products = [sparse.lr * sparse.decay for _, sparse in settings_of_all(config)]
    return 1 / max(products) if side == "rows" and max(products) > 0 else math.inf


def _run(config: Config, process: Process, side: str, factors: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the loss of each step, float64 [steps or fewer], and why there are fewer. factors: of the side's rate."""
    schema = schema_of(config.data)
    reader = read_split(config, schema, process, "train")
    if reader is None:
        raise ConfigError("data.train is null; training needs it")
    engine = Engine(config, schema, process)
    sums: list[Tensor] = []
    losses: list[float] = []
    for step, batch in zip(range(len(factors)), _batches(engine, reader), strict=False):
        engine.optimizers.scale(**{"dense": 1.0, "rows": 1.0, side: float(factors[step])})
        ended = ""
        try:
            loss_sum, weight = engine.train_step(batch)
        except NonFiniteError as error:  # on a CPU
            ended = str(error)
            sums.append(torch.tensor([math.inf, 1.0], dtype=torch.float64))
        else:
            sums.append(torch.stack([loss_sum.double(), weight.double()]).cpu())
        ended = next((one for one in gather_objects(ended) if one), "")
        if (step + 1) % LOOK_EVERY == 0 or step + 1 == len(factors) or ended:
            losses += _over_ranks(sums)
            if ended or _has_diverged(smoothed(np.array(losses))):
                return np.array(losses), ended or "the loss rose"
    return np.array(losses), ""


def _batches(engine: Engine, reader: ParquetReader) -> Iterator[Batch]:
    """Yield batches of as many epochs as are wanted."""
    epoch = 0
    while True:
        yield from engine.pipeline.feed(reader.epoch(epoch), begins=True)
        epoch += 1


def _over_ranks(sums: list[Tensor]) -> list[float]:
    """Return the mean loss of steps over all ranks; `sums` is emptied."""
    both = torch.stack(sums)
    sums.clear()
    sum_over_ranks(both)
    return (both[:, 0] / both[:, 1]).tolist()


def smoothed(loss: np.ndarray) -> np.ndarray:
    """Return the exponential mean over steps, without the bias of its beginning, float64 [steps]."""
    found, mean = np.empty(len(loss)), 0.0
    for at, value in enumerate(loss):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        found[at] = mean / (1 - SMOOTHING ** (at + 1))
    return found


def _has_diverged(smooth: np.ndarray) -> bool:
    return len(smooth) >= FEWEST and bool(smooth[-1] > DIVERGED * smooth.min())


def curve_of(
    side: str, configured: float, rate: np.ndarray, loss: np.ndarray, still: np.ndarray, ended: str
) -> RateCurve:
    """Return a curve with what it suggests. rate, loss, still: float64 [steps]; the finite beginning counts."""
    finite = np.isfinite(loss)
    count = len(loss) if finite.all() else int(np.argmin(finite))
    rate, loss, still = rate[:count], loss[:count], still[:count]
    smooth = smoothed(loss - still)
    suggested, least = None, float(rate[int(np.argmin(smooth))]) if count else math.nan
    if count >= FEWEST:
        first = FEWEST // 2  # the mean of few losses is noise
        slope = np.gradient(smooth, np.log(rate))[first:]
        steepest = int(np.argmin(slope))
        suggested = float(rate[first + steepest]) if slope[steepest] < 0 else None
    return RateCurve(side, SIDES[side], configured, rate, loss, still, smooth, suggested, least, ended)
