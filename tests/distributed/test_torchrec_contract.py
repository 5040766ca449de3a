"""The names inside torchrec 1.8 that distributed/ relies on. A release that moves one fails here, with its name."""

import inspect
from importlib import metadata

import pytest
import torch
from torchrec import KeyedJaggedTensor
from torchrec.distributed import comm_ops, embedding, embedding_lookup, embedding_sharding, embeddingbag, types
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding, RwSparseFeaturesDist

from tessera.distributed.torchrec.row_sharding import ByOwner, by_owner


def test_the_pinned_release():
    assert metadata.version("torchrec").startswith("1.8.")


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (embedding_lookup.GroupedEmbeddingsLookup._create_embedding_kernel, ["self", "config", "pg", "device", "env"]),
        (RwSequenceEmbeddingSharding.create_lookup, ["self", "device", "fused_params", "feature_processor"]),
        (BaseBatchedEmbedding.__init__, ["self", "config", "pg", "device"]),
        (embedding.ShardedEmbeddingCollection.create_embedding_sharding,
         ["sharding_type", "sharding_infos", "env", "device", "qcomm_codecs_registry"]),
        (embedding.EmbeddingCollectionSharder.shard, ["self", "module", "params", "env", "device", "module_fqn"]),
        (embedding_lookup.GroupedPooledEmbeddingsLookup._create_embedding_kernel,
         ["self", "config", "device", "pg", "sharding_type", "env"]),
        (RwPooledEmbeddingSharding.__init__, ["self", "sharding_infos", "env", "device"]),
        (RwPooledEmbeddingSharding.create_input_dist, ["self", "device"]),
        (RwPooledEmbeddingSharding.create_lookup, ["self", "device", "fused_params", "feature_processor"]),
        (RwPooledEmbeddingSharding.create_output_dist, ["self", "device"]),
        (embedding_sharding.BaseEmbeddingDist.forward, ["self", "local_embs", "sharding_ctx"]),
        (embeddingbag.ShardedEmbeddingBagCollection.create_embedding_bag_sharding,
         ["sharding_infos", "env", "device", "permute_embeddings", "qcomm_codecs_registry"]),
        (embeddingbag.ShardedEmbeddingBagCollection.__init__,
         ["self", "module", "table_name_to_parameter_sharding", "env", "fused_params", "device"]),
        (embeddingbag.EmbeddingBagCollectionSharder.shard, ["self", "module", "params", "env", "device", "module_fqn"]),
        (embedding.ShardedEmbeddingCollection.input_dist, ["self", "ctx", "features"]),
        (embedding.ShardedEmbeddingCollection.compute_and_output_dist, ["self", "ctx", "input"]),
        (embedding.ShardedEmbeddingCollection.create_context, ["self"]),
        (embeddingbag.ShardedEmbeddingBagCollection.input_dist, ["self", "ctx", "features"]),
        (embeddingbag.ShardedEmbeddingBagCollection.compute_and_output_dist, ["self", "ctx", "input"]),
        (embeddingbag.ShardedEmbeddingBagCollection.create_context, ["self"]),
    ],
)  # fmt: skip
def test_signatures(function, parameters):
    assert list(inspect.signature(function).parameters)[: len(parameters)] == parameters


def test_the_input_dist_takes_what_moves_raw_ids():
    needed = {"pg", "num_features", "feature_hash_sizes", "is_sequence", "need_pos", "keep_original_indices"}
    assert needed <= set(inspect.signature(RwSparseFeaturesDist.__init__).parameters)
    source = inspect.getsource(RwSparseFeaturesDist)
    for name in ("self._world_size", "self._is_sequence", "self.unbucketize_permute_tensor", "self._dist("):
        assert name in source


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("stride", [1, 5])
def test_grouping_by_owner_is_fbgemms(ranks, stride):
    """What groups ids on a GPU, on the CPU beside what groups them there."""
    generator = torch.Generator().manual_seed(ranks)
    for longest in (0, 1, 40):
        lengths = torch.randint(0, longest + 1, (3 * stride,), generator=generator, dtype=torch.int32)
        ids = torch.randint(-(2**63), 2**63 - 1, (int(lengths.sum()),), generator=generator)
        ids[: len(ids) // 4] %= 2 * ranks
        for weights in (None, torch.rand(len(ids), generator=generator)):
            features = KeyedJaggedTensor(["a", "b", "c"], ids, weights, lengths=lengths, stride=stride)
            expected, places = embedding_sharding.bucketize_kjt_before_all2all(
                features, ranks, torch.ones(3, dtype=torch.int64), output_permute=True, keep_original_indices=True
            )
            grouped, found_places = by_owner(features, ranks)
            assert grouped.keys() == expected.keys() and grouped.stride() == expected.stride()
            assert grouped.values().equal(expected.values()) and grouped.lengths().equal(expected.lengths())
            assert found_places.equal(places)
            assert weights is None or grouped.weights().equal(expected.weights())


def test_attributes_that_subclasses_read():
    source = inspect.getsource(RwSequenceEmbeddingSharding) + inspect.getsource(
        RwSequenceEmbeddingSharding.__mro__[1].__mro__[1]
    )
    for name in ("_grouped_embedding_configs", "_env", "_pg", "_device", "_has_feature_processor"):
        assert name in source
    assert "_get_num_features" in dir(RwSequenceEmbeddingSharding)
    assert "self._lookups" in inspect.getsource(embedding.ShardedEmbeddingCollection)
    assert "self._emb_modules" in inspect.getsource(embedding_lookup.GroupedEmbeddingsLookup)
    assert "self._lookups" in inspect.getsource(embeddingbag.ShardedEmbeddingBagCollection)
    assert "self._emb_modules" in inspect.getsource(embedding_lookup.GroupedPooledEmbeddingsLookup)
    for lookup in (embedding_lookup.GroupedEmbeddingsLookup, embedding_lookup.GroupedPooledEmbeddingsLookup):
        assert "self._feature_splits" in inspect.getsource(lookup)
    assert "qcomm_codecs_registry" in inspect.getsource(embedding_sharding.EmbeddingSharding)
    assert "_param_per_table" in inspect.getsource(BaseBatchedEmbedding)
    assert EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value == "customized_kernel"


def test_a_forward_pass_is_the_two_halves_that_are_called_apart():
    source = inspect.getsource(types.ShardedModule.forward)
    assert "self.input_dist(ctx, *input, **kwargs).wait().wait()" in source
    assert "self.compute_and_output_dist(ctx, dist_input)" in source
    for module in (embedding.ShardedEmbeddingCollection, embeddingbag.ShardedEmbeddingBagCollection):
        assert module.forward is types.ShardedModule.forward


def test_what_brings_rows_in_its_own_messages_finds_ranks_and_codecs():
    assert "self._env = env" in inspect.getsource(embedding.ShardedEmbeddingCollection.__init__)
    assert isinstance(embedding.ShardedEmbeddingCollection.qcomm_codecs_registry, property)
    source = inspect.getsource(comm_ops.All2All_Seq_Req.backward)  # as `answers.py`: first decoded, then divided
    assert source.index(".decode(") < source.index("div_(dist.get_world_size(ctx.pg))")


def test_owners_of_bags_know_the_rows_of_each_rank():
    assert embedding_sharding.EmbeddingShardingContext().batch_size_per_rank == []
    assert "batch_size_per_rank = awaitable._stride_per_rank" in inspect.getsource(embedding_sharding)


def test_gradients_that_come_back_are_averaged_over_ranks():
    assert comm_ops.get_gradient_division() is True


@pytest.mark.parametrize("weighted", [False, True])
def test_what_goes_to_each_rank_is_counted_as_torchrec_does(weighted):
    generator = torch.Generator().manual_seed(1)
    for ranks, features, stride in ((1, 1, 3), (4, 1, 5), (3, 2, 4), (5, 3, 1)):
        lengths = torch.randint(0, 4, (ranks * features * stride,), generator=generator, dtype=torch.int32)
        values = torch.arange(int(lengths.sum()))
        ids = KeyedJaggedTensor(
            keys=[f"k{i}" for i in range(features)] * ranks,
            values=values,
            weights=values.float() if weighted else None,
            lengths=lengths,
            stride=stride,
        )
        splits = [features] * ranks
        assert ByOwner.of(ids).dist_splits(splits) == ids.dist_splits(splits)
        assert ByOwner.of(ids).dist_labels() == ids.dist_labels()
        for mine, theirs in zip(ByOwner.of(ids).dist_tensors(), ids.dist_tensors(), strict=True):
            assert torch.equal(mine, theirs)
