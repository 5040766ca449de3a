"""Keep saved states on disk: their files, what they hold of a model and its tables, and tools that read them."""
