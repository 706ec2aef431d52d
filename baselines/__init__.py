"""Baselines: one folder each, with the rules that make its model folders."""
