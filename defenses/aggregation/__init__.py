"""Robust aggregation: each rule a function of stacked updates."""
