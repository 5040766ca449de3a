"""Plug dynamic tables into torchrec: their kernel, their sharding, and what ranks send each other."""
