"""Detectors: what tells stamped inputs from clean ones while a model is in use."""
