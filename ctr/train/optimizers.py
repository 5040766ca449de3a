"""The dense optimizer and the tables' fused one, each with its own learning rate, warm-up and schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.config_types import DenseConfig, OptimizerConfig, SparseConfig
from tessera.ctr.train.dense_average import KEY, DenseAverage
from tessera.ctr.train.schedule import share_of_rate
from tessera.ctr.train.state_parts import FoundState, PartState
from tessera.embedding.errors import ConfigError, did_you_mean


class Optimizers:
    """Steps both. Rows of tables are updated inside the backward pass; here only their learning rate is set.

    Raises:
        ConfigError: a group of `optimizer.dense.groups` holds no weight.
    """

    def __init__(self, config: OptimizerConfig, model: DistributedModelParallel) -> None:
        self._config, self._model = config, model
        named = model.module.dense_parameters()
        self._groups = grouped(config.dense, list(named))
        # torch numbers parameters group after group.
        self._names = [name for group in self._groups for name in group["names"]]
        self._parameters = [named[name] for name in self._names]
        self._named = named
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget what the dense optimizer has gathered, and begin the schedule of both."""
        self._dense = _dense_optimizer(self._config.dense, self._groups, self._named)
        ema = self._config.dense.ema
        self._average = None if ema.decay is None else DenseAverage(ema.decay, self._names, self._parameters)
        self._fused = self._model.fused_optimizer
        self.steps = 0
        self.factor = 1.0
        self._scale_dense = self._scale_rows = 1.0
        self.dense_lr = self.sparse_lr = 0.0
        self._rates_of_tables: list[float] = []
        self._set_learning_rates()

    def zero_grad(self) -> None:
        self._dense.zero_grad()

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients of the dense weights."""
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if factor != 1 and grads:
            torch._foreach_mul_(grads, factor)

    def step(self) -> None:
        if self._config.dense.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._config.dense.clip_norm)
        self._dense.step()
        self.steps += 1
        if self._average:
            self._average.update(self.steps)
        self._set_learning_rates()

    def state(self) -> PartState:
        """Return the dense optimizer's live state, optimizer/parameter/name -> tensor, and the schedule of both."""
        state = self._dense.state_dict()["state"]
        tensors = {f"optimizer/{self._names[i]}/{key}": value for i, one in state.items() for key, value in one.items()}
        if self._average:
            tensors |= {f"optimizer/{name}": value for name, value in self._average.state().items()}
        return PartState({"schedule": {"steps": self.steps, "factor": self.factor}}, tensors=tensors)

    def evaluated(self) -> AbstractContextManager[None]:
        """Have the dense weights that are evaluated and published in their place, inside the block alone: the average,
        if there is one and `optimizer.dense.ema.evaluate` says so."""
        return self._average.in_place() if self._average and self._config.dense.ema.evaluate else nullcontext()

    def become_evaluated(self) -> None:
        """The same for good, behind the last step."""
        if self._average and self._config.dense.ema.evaluate:
            self._average.replace_weights()

    def load(self, found: FoundState) -> None:
        schedule = found.training["schedule"]
        self.take_over(found.optimizer, schedule["steps"], schedule["factor"])

    def take_over(self, state: Mapping[str, Tensor], steps: int = 0, factor: float = 1.0) -> None:
        """Go on from what the dense optimizer had, parameter/name -> tensor; parameters that are not among them keep
        what they have. steps, factor: of the schedule."""
        places = {name: i for i, name in enumerate(self._names)}
        own = self._dense.state_dict()
        averages = {name: value for name, value in state.items() if name.endswith(f"/{KEY}")}
        if self._average:
            self._average.load(averages)
        for name, value in state.items():
            parameter, _, key = name.rpartition("/")
            if name in averages:
                continue
            own["state"].setdefault(places[parameter], {})[key] = value
        self._dense.load_state_dict(own)
        self.steps, self.factor = steps, factor
        self._set_learning_rates()

    def after_evaluation(self, evaluations_since_best: int) -> None:
        """Lower the learning rates on a plateau, as `optimizer.plateau` says."""
        plateau = self._config.plateau
        if plateau.factor is not None and evaluations_since_best and evaluations_since_best % plateau.patience == 0:
            self.factor *= plateau.factor
            self._set_learning_rates()

    def scale(self, dense: float, rows: float) -> None:
        """Multiply both learning rates, those of single tables too, from the next step on."""
        self._scale_dense, self._scale_rows = dense, rows
        self._set_learning_rates()

    def _set_learning_rates(self) -> None:
        dense, sparse = self._config.dense, self._config.sparse
        dense_lr = self._rate(dense.lr, dense) * self._scale_dense
        self.sparse_lr = self._rate(sparse.lr, sparse) * self._scale_rows
        groups = self._fused.param_groups
        # Tables with a rate of their own follow the same schedule.
        rates = [self._rate(group.get("initial_lr", sparse.lr), sparse) * self._scale_rows for group in groups]
        self.dense_lr = dense_lr
        for group in self._dense.param_groups:
            group["lr"] = self._rate(group["initial_lr"], dense) * self._scale_dense
        if rates != self._rates_of_tables:
            self._rates_of_tables = rates
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            self._fused.step()  # hands the rate to the kernels; rows move only in the backward pass

    def _rate(self, lr: float, side: DenseConfig | SparseConfig) -> float:
        warmup_steps = side.warmup_steps
        rate = lr * min(1.0, (self.steps + 1) / warmup_steps) if warmup_steps else lr
        rate *= share_of_rate(side.schedule, max(0, self.steps - warmup_steps))
        return rate if self.factor == 1 else max(rate * self.factor, min(rate, self._config.plateau.floor))


def grouped(config: DenseConfig, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the groups of dense weights, those of the first group that has their name and then all others:
    {names, lr, weight_decay} each. Without `config.groups` it is one, in the order of `names`.

    Raises:
        ConfigError: a group whose pattern fits no name, or none that an earlier group has left.
    """
    left, found = list(names), []
    for number, group in enumerate(config.groups):
        mine = [name for name in left if fnmatchcase(name, group.pattern)]
        if not mine:
            key, fits = f"optimizer.dense.groups[{number}].pattern", [n for n in names if fnmatchcase(n, group.pattern)]
            if fits:
                raise ConfigError(f"{key} is {group.pattern!r}, and groups before it have {fits[0]} and all else of it")
            hint = did_you_mean(group.pattern, names, f"names are {', '.join(names[:8])}{', ..' * (len(names) > 8)}")
            raise ConfigError(f"{key} is {group.pattern!r}, which is the name of no dense weight{hint}")
        lr = config.lr if group.lr is None else group.lr
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        found.append({"names": mine, "lr": lr, "weight_decay": decay})
        left = [name for name in left if name not in mine]
    if left or not found:
        found.append({"names": left, "lr": config.lr, "weight_decay": config.weight_decay})
    return found


def _dense_optimizer(
    config: DenseConfig, groups: Sequence[Mapping[str, Any]], named: Mapping[str, torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """Return torch's optimizer; the `initial_lr` of its groups is their rate before warm-up and plateaus."""
    parameters = [
        {
            "params": [named[name] for name in group["names"]],
            "lr": group["lr"],
            "initial_lr": group["lr"],
            "weight_decay": group["weight_decay"],
        }
        for group in groups
    ]
    rate, decay, betas = config.lr, config.weight_decay, (config.beta1, config.beta2)
    if config.name == "adam":
        return torch.optim.Adam(parameters, rate, betas, config.eps, weight_decay=decay, fused=True)
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, rate, betas, config.eps, weight_decay=decay, fused=True)
    if config.name == "adagrad":
        return torch.optim.Adagrad(parameters, rate, eps=config.eps, weight_decay=decay)
    return torch.optim.SGD(parameters, rate, weight_decay=decay)
