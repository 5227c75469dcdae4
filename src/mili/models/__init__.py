"""Checkpoints and networks: where a model comes from, how its weights are read, and the graph that runs it."""
