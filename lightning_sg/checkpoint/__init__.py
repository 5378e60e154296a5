"""Checkpoints of a model whose stages are on several processes: whole, or in shards."""
