"""Protocols of a model's tables: what the rest of the system may ask of them, for each kind.

`Tables` is what every kind has: `NoTables` has no more. What only some kinds can do is a protocol of its own:
`ShardedTables` (static and dynamic) are spread over ranks, `PrefilledTables` (static) have rows before training, and
`DynamicTablesProtocol` (dynamic) have rows that come and go by id. A caller asks with isinstance, or with the functions
below.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from tessera.distributed.host_manager import CacheStats
from tessera.distributed.plan import TableSize
from tessera.distributed.window import WHOLE, Window
from tessera.embedding.set_table import OwnedTable


@runtime_checkable
class Tables(Protocol):
    """An nn.Module that turns the ids of a batch into embeddings."""

    def __call__(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return group -> [B, pooled fields, dim] float32, zeros for empty bags, and the rows of sequences by
        `sequences.events_key`. ids: raw int64 ids, stride B."""
        ...

    def squares_looked_up(self, embeddings: dict[str, Tensor]) -> Tensor:
        """Return the sum of squares of all rows that the batch looked up, float32 [], differentiable: what L2
        multiplies. embeddings: what the forward pass returned."""
        ...

    def sizes(self) -> list[TableSize]:
        """Return what each table takes, for the plan."""
        ...

    def tensors(self) -> dict[str, Any]:
        """Return what is saved by name, live: tensors and shards. Rows of dynamic tables are saved by id instead."""
        ...


@runtime_checkable
class ShardedTables(Tables, Protocol):
    """Tables that torchrec spreads over the ranks."""

    compute_kernel: str

    def sharders(self) -> list[Any]:
        """Return torchrec's sharders for the modules inside."""
        ...

    @property
    def tells(self) -> bool:
        """Whether what a rank tells all others travels with its ids."""
        ...

    def begin(self, ids: KeyedJaggedTensor, times: Tensor | None = None, told: Tensor | None = None) -> Any:
        """Begin to send the ids of a coming training batch to the owners of their rows. Collective. Batches are begun
        in the order of their steps. times: int64 [B] of the rows' events, in seconds; told: float64 [n], what this rank
        tells all others, where `tells`.

        Returns what holds the memory that the step will use and, where `tells`, has what all ranks told as `told`:
        float64 [ranks, n], on the host.
        """
        ...

    def send_begun(self) -> None:
        """Go on with what `begin` started, as long as the device is busy. Collective."""
        ...

    def restart(self) -> None:
        """Reset to the state before the first step."""
        ...


@runtime_checkable
class PrefilledTables(ShardedTables, Protocol):
    """Tables whose rows are all there before the first step."""

    def fill(self) -> None:
        """Draw this rank's first rows, after sharding."""
        ...


@runtime_checkable
class DynamicTablesProtocol(ShardedTables, Protocol):
    """What dynamic tables can do: rows are added when their ids are admitted, and removed when they expire or are
    evicted."""

    prefetches: bool
    learns_scales: bool

    def owned(self) -> dict[str, OwnedTable]:
        """Return this rank's part of each table, after sharding."""
        ...

    def begin_step(
        self,
        now: int,
        *,
        learn_scales: bool = False,
        perturbs: bool = False,
        times: Tensor | None = None,
        window: Window = WHOLE,
    ) -> None:
        """Set the time of the coming batch, in seconds, with which its rows are touched, whether it has a second pass,
        for scales or over perturbed rows, and what it is to its step. times: int64 [B]."""
        ...

    def bring(self, now: int) -> None:
        """With `prefetches` begin to bring the rows of the batch that was begun last. now: its time, in seconds."""
        ...

    def begin_period(self) -> None:
        """Count rows that are there now as old from here on."""
        ...

    def perturb(self, rho: float, xi: float) -> None:
        """Perturb the rows of the batch for a second pass. Collective."""
        ...

    def second_pass(self, *, dense: bool = False) -> AbstractContextManager[None]:
        """Enter the second pass of a step, which trains the rows' scales (of quantisation) alone, or rows by gradients
        at perturbed ones. dense: and what the dense optimizer trains."""
        ...

    def expire(self, now: int, *, everywhere: bool = False) -> None:
        """Remove rows not seen for their table's TTL, in the next part of each table or everywhere."""
        ...

    def stats(self) -> dict[str, dict[str, float]]:
        """Return this rank's counts by table."""
        ...

    def cache_stats(self) -> CacheStats | None:
        """Return what the caches of this rank did since the last call; None if tables have no cache."""
        ...

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Return by name what the dense optimizer trains."""
        ...

    def clear(self) -> None:
        """Forget all rows."""
        ...


def as_sharded(tables: Tables) -> ShardedTables | None:
    """Return `tables` if they are spread over the ranks."""
    return tables if isinstance(tables, ShardedTables) else None


def as_dynamic(tables: Tables) -> DynamicTablesProtocol | None:
    """Return `tables` if their rows come and go."""
    return tables if isinstance(tables, DynamicTablesProtocol) else None


def owned_tables(tables: Tables) -> dict[str, OwnedTable]:
    """Return this rank's part of each dynamic table by name; nothing if the tables are of another kind."""
    return tables.owned() if isinstance(tables, DynamicTablesProtocol) else {}
