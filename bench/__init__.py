"""A benchmark of certified robustness: PEFTSmoothing and its rivals on one backbone."""

__version__ = "0.1.0"
