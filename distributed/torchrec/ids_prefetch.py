"""Run the first part of a sharded collection's forward pass ahead of its step: send the ids of a batch to their
owners."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding_types import KJTList, ShardedEmbeddingModule
from torchrec.distributed.types import Awaitable

from tessera.distributed.distinct_ids import DistinctIds


class IdsPrefetch:
    """A batch on its way. Every call is collective: all ranks make it in the same place.

    How many ids go where is exchanged first, and only when the host knows that can ids be sent. So a caller has
    something else queued on the device between the two, as torchrec's TrainPipelineSparseDist has.

    Args:
        module: a sharded EmbeddingCollection or EmbeddingBagCollection.
    """

    def __init__(self, module: ShardedEmbeddingModule, features: KeyedJaggedTensor) -> None:
        self._module, self._context = module, module.create_context()
        self._numbers: Awaitable[Awaitable[KJTList]] = module.input_dist(self._context, features)
        self._ids: KJTList | None = None

    def send(self) -> KJTList:
        """Send the ids, if that is not done. Returns those that this rank received. On a GPU the current stream waits
        for them, the host for their numbers alone."""
        if self._ids is None:
            self._ids = self._numbers.wait().wait()
        return self._ids

    def answer(self) -> Awaitable:
        """Return the output of the module's forward pass."""
        return self._module.compute_and_output_dist(self._context, self.send())


@dataclass
class PrefetchedBatch:
    """The ids of a pending batch, and what has been sent of them ahead of its step, if anything.

    ages: int64 [B] of the batch's rows, None where they have no times; ages_of_ranks: of all ranks', for the pooled
    output dist.
    """

    ids: KeyedJaggedTensor
    ages: Tensor | None = None
    ages_of_ranks: Tensor | None = None
    asked: DistinctIds | None = None
    rows: IdsPrefetch | None = None  # of the row path and of the pooled output dist
    bags: IdsPrefetch | None = None
