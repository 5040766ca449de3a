"""The names inside torchrec 1.8 that distributed/ relies on. A release that moves one fails here, with its name."""

import inspect
from importlib import metadata

import pytest
from torchrec.distributed import comm_ops, embedding, embedding_lookup, embedding_sharding, embeddingbag, types
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding


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
    source = inspect.getsource(embeddingbag.ShardedEmbeddingBagCollection)
    assert "dist(embs, sharding_context)" in source and "sharding_context = ctx.sharding_contexts[i]" in source
    assert "self._embedding_shardings" in source


def test_gradients_that_come_back_are_averaged_over_ranks():
    assert comm_ops.get_gradient_division() is True
