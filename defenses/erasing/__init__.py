"""Erasers: each takes a model that may hold a backdoor and returns one that should not."""
