"""Edits reach the numbers: what a stage imports is listed, or named here as of no consequence."""

import ast
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.sources import ATTACK, CERTIFICATION, ROOT, TRAINING, python_files

# Settings are in the fingerprints of the jobs that they define; the rest moves bytes and words.
NO_NUMBERS = {
    "bench/__init__.py",
    "bench/config.py",
    "bench/errors.py",
    "bench/files.py",
    "bench/memory.py",
    "bench/parameterization_settings.py",
    "bench/progress.py",
    "bench/settings.py",
    "bench/smoothing/log.py",
    "bench/sources.py",
    "bench/statistics.py",
}


def imported(path: Path) -> set[str]:
    """Modules of this project that a file names in its imports, as files."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    stems = [name.replace(".", "/") for name in names if name.partition(".")[0] == "bench"]
    files = [f"{stem}{end}" for stem in stems for end in (".py", "/__init__.py")]
    return {file for file in files if (ROOT / file).exists()}


def closure(start: str) -> set[str]:
    """All that a module imports, and what that imports."""
    found, left = set(), {start}
    while left:
        name = left.pop()
        found.add(name)
        left |= imported(ROOT / name) - found
    return found


def listed(*places: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in python_files(*places)}


@pytest.mark.parametrize(
    ("module", "places"),
    [
        # Only the black-box methods ask served models, whose identity is in their folders.
        ("bench/jobs.py", (*TRAINING, "bench/remote.py")),
        ("bench/certification.py", (*TRAINING, *CERTIFICATION)),
        ("bench/attacks.py", (*TRAINING, *ATTACK)),
    ],
)
def test_what_a_stage_imports_reruns_it(module, places):
    assert closure(module) - listed(*places) - NO_NUMBERS == set()


def test_no_list_names_what_is_gone():
    assert all((ROOT / place).exists() for place in (*TRAINING, *ATTACK))
    assert all((ROOT / name).exists() for name in NO_NUMBERS)


def test_sources_that_are_not_there_are_named():
    with pytest.raises(BenchError, match=r"there is no baselines/mien: correct the rule"):
        python_files("bench/jobs.py", "baselines/mien")


def test_what_a_baseline_will_cost_is_no_source_of_its_numbers():
    names = {path.name for path in python_files("baselines/denoised_smoothing")}
    assert "train.py" in names
    assert "plan.py" not in names
    assert [path.name for path in python_files("bench/plan.py")] == ["plan.py"]
