"""The names inside torchrec 1.8 that distributed/ relies on. A release that moves one fails here, with its name."""

import inspect
from importlib import metadata

import pytest
from torchrec.distributed import embedding, embedding_lookup
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist


def test_the_pinned_release():
    assert metadata.version("torchrec").startswith("1.8.")


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (embedding_lookup.GroupedEmbeddingsLookup._create_embedding_kernel, ["self", "config", "pg", "device", "env"]),
        (RwSequenceEmbeddingSharding.create_input_dist, ["self", "device"]),
        (RwSequenceEmbeddingSharding.create_lookup, ["self", "device", "fused_params", "feature_processor"]),
        (BaseBatchedEmbedding.__init__, ["self", "config", "pg", "device"]),
        (embedding.ShardedEmbeddingCollection.create_embedding_sharding,
         ["sharding_type", "sharding_infos", "env", "device", "qcomm_codecs_registry"]),
        (embedding.EmbeddingCollectionSharder.shard, ["self", "module", "params", "env", "device", "module_fqn"]),
    ],
)  # fmt: skip
def test_signatures(function, parameters):
    assert list(inspect.signature(function).parameters)[: len(parameters)] == parameters


def test_the_input_dist_takes_what_moves_raw_ids():
    needed = {"pg", "num_features", "feature_hash_sizes", "is_sequence", "need_pos", "keep_original_indices"}
    assert needed <= set(inspect.signature(RwSparseFeaturesDist.__init__).parameters)


def test_attributes_that_subclasses_read():
    source = inspect.getsource(RwSequenceEmbeddingSharding) + inspect.getsource(
        RwSequenceEmbeddingSharding.__mro__[1].__mro__[1]
    )
    for name in ("_grouped_embedding_configs", "_env", "_pg", "_device", "_has_feature_processor"):
        assert name in source
    assert "_get_num_features" in dir(RwSequenceEmbeddingSharding)
    assert "self._lookups" in inspect.getsource(embedding.ShardedEmbeddingCollection)
    assert "self._emb_modules" in inspect.getsource(embedding_lookup.GroupedEmbeddingsLookup)
    assert "_param_per_table" in inspect.getsource(BaseBatchedEmbedding)
    assert EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value == "customized_kernel"
