"""Snakemake as tests run it."""

import subprocess
import sys
from pathlib import Path

SMOKE = ["--configfile", "config/smoke.yaml"]


def snakemake(where: Path, *arguments: str, ok: bool = True) -> str:
    """Run Snakemake in `where` and return what it said."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, said
    return said
