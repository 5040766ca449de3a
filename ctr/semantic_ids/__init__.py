"""Semantic ids: items with near vectors get ids that begin alike, so that a new item starts with rows that others
trained.

    kmeans.py     k-means, the same on any number of threads
    codebooks.py  a codebook for each level of residuals, their file and version, and the ids of prefixes
    vectors.py    parquet files of items and their vectors
    items.py      items with their codes, and the index of an item among those with the same codes
    assign.py     vectors -> items with semantic ids, and a report
    join.py       adds the ids to the rows of a data set
    command.py    the two subcommands of `tessera prepare`
"""
