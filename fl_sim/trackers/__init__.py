"""Trackers: what shows a run in other programs' dashboards, beside `metrics.jsonl`, which every run writes."""
