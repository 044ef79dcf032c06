"""Tar shards in the WebDataset layout: reading, streaming, writing."""
