"""Snakemake as tests run it, and what it makes."""

import subprocess
import sys
from pathlib import Path

import pandas as pd

SMOKE = ["--configfile", "config/smoke.yaml"]
RUN_ONLY = ["machine", "git_revision", "git_dirty", "certification_seconds", "training_seconds"]
RUN_ONLY += ["peak_memory_bytes"]


def snakemake(where: Path, *arguments: str, ok: bool = True) -> str:
    """Run Snakemake in `where` and return what it said."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, said
    return said


def tables(where: Path) -> dict[str, pd.DataFrame]:
    """The tables of a run of smoke, without what differs from run to run."""
    paths = sorted((where / "results/smoke/tables").glob("*.csv"))
    return {path.name: pd.read_csv(path).drop(columns=RUN_ONLY, errors="ignore") for path in paths}


def assert_same_tables(where: Path, other: Path) -> list[str]:
    """Both runs have the same tables; their names."""
    found, expected = tables(where), tables(other)
    assert list(found) == list(expected) != []
    for name, table in found.items():
        pd.testing.assert_frame_equal(table, expected[name], obj=name)
    return list(found)
