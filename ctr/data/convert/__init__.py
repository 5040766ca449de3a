"""Converters: log files as their publishers give them -> a prepared data set that the reader takes.

A prepared data set is a folder with `train/`, `valid/` and `test/` (or `day=YYYY-MM-DD/`) of parquet files,
the `schema.yaml` that describes them to the reader, and `prepare.json` that says what was read and how many
rows went where. Every converter streams: its memory is a few blocks of text and a few row groups, whatever
the input's size.

    lines.py      text, compressed or not -> blocks of whole lines
    delimited.py  blocks -> arrow tables, with the line number of every row; bad rows raise or are counted
    columns.py    columns as text -> columns as stored (hex -> int64, time -> seconds, ...)
    split.py      which folder a row goes to
    output.py     parquet parts in a folder that appears only when it is complete
    pipeline.py   the five above in a row
    criteo.py, avazu.py, movielens.py, csv.py   what is particular to each input
"""
