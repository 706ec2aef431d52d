"""Baselines: one folder each, with the rules that make its model folders."""

import bench  # noqa: F401  (its environment, before torch is loaded)
