"""A corpus of many sources and shards: tokenized by many processes and nodes, then merged."""
