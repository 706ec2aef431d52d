"""Randomized smoothing: noise, bounds, the certification engine and its logs."""
