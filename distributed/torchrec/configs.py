"""What torchrec knows of dynamic tables: one table whose memory is theirs."""

from __future__ import annotations

from collections.abc import Sequence

from torchrec import EmbeddingBagConfig, EmbeddingConfig

from tessera.embedding.config import DynamicTableConfig


def torchrec_config(
    kind: type, name: str, tables: Sequence[DynamicTableConfig], features: list[str], expected_rows: int, width: int
) -> EmbeddingConfig | EmbeddingBagConfig:
    """Return the config of `kind` for tables with so many rows each. width: of an answer, in floats."""
    rows = 0
    for config in tables:
        # The planner counts rows * dim * 4 bytes; a dynamic row has state and bookkeeping as well.
        expected = expected_rows
        if config.cache_limit is not None:  # what is on the device; the host's memory is not the planner's
            expected = min(expected, config.cache_limit)
        rows += -(-expected * config.bytes_per_row // (4 * width))
    made: EmbeddingConfig | EmbeddingBagConfig = kind(
        name=name, embedding_dim=width, num_embeddings=rows, feature_names=features
    )
    return made
