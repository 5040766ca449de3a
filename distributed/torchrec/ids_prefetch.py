"""Run the first part of a sharded collection's forward pass ahead of its step: send the ids of a batch to their
owners."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.types import Awaitable

from tessera.distributed.distinct_ids import DistinctIds


class IdsPrefetch:
    """A batch on its way. Every call is collective: all ranks make it in the same place.

    What the headers of the ids, or torchrec's exchange of their numbers, say has to come to the host. So a caller has
    something else queued on the device between the two, as torchrec's TrainPipelineSparseDist has.

    Args:
        module: a sharded EmbeddingCollection or EmbeddingBagCollection. features: its input.

    Attributes:
        sent: what `module.input_dist` returned.
    """

    def __init__(self, module: ShardedEmbeddingModule, features: Any) -> None:
        self._module, self._context = module, module.create_context()
        self.sent: Awaitable[Awaitable[Any]] = module.input_dist(self._context, features)
        self._ids: Any = None

    def send(self) -> Any:
        """Send the ids, if that is not done. Returns those that this rank received. On a GPU the current stream waits
        for them, the host for their numbers alone."""
        if self._ids is None:
            self._ids = self.sent.wait().wait()
        return self._ids

    def received(self) -> Iterator[tuple[Any, Any]]:
        """Yield each kernel of this rank with what it is asked for; send first."""
        yield from self._module.received(self.send())

    def answer(self) -> Awaitable:
        """Return the output of the module's forward pass. May be asked for more than once."""
        return self._module.compute_and_output_dist(self._context, self.send())


@dataclass
class PrefetchedBatch:
    """The ids of a pending batch, and what has been sent of them ahead of its step, if anything.

    times: int64 [B] of the batch's rows, None where they have none.
    """

    ids: KeyedJaggedTensor
    times: Tensor | None = None
    asked: DistinctIds | None = None
    rows: IdsPrefetch | None = None  # of the row path and of the pooled output dist
    bags: IdsPrefetch | None = None

    @property
    def told(self) -> Tensor:
        """What all ranks told with their ids: float64 [ranks, n], on the host, which waits for it."""
        told: Tensor = self.sent()[0].sent.told
        return told

    def sent(self) -> list[IdsPrefetch]:
        return [one for one in (self.rows, self.bags) if one is not None]
