"""docs/reliability.md from the `fault` marks: `python -m tests.reliability` writes it."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reliability.md"
COLUMNS = ("fault", "stage", "outcome")
HEAD = """\
# Reliability

What was made to fail, where, and how it ends. Every row is the mark of a test that brings the
fault about and asserts the outcome; `python -m tests.reliability` writes this page, and a test
fails where it differs from the marks.

| fault | stage | outcome | test |
|---|---|---|---|
"""
TAIL = """
A kill is a real SIGKILL: a child counts what it does to files and ends itself there. A full disk
is a limit on the size of files. "Refused" is one line that names the file and the cure.

## What protects what

Files appear by rename. JSON holds its own hash (`content_sha256`), that of a log also the log's,
that of a model folder also the weights'; votes have a checksum per line. These find damage and
mixtures, not a forger, who can make hashes as well. JSON without a hash counts as written by hand.

## Not covered

- Training does not split its batches by itself where memory runs out: most objectives draw noise
  per batch, and batch normalisation sees it, so the step would be another.
  `training.micro_batch_size` splits them, if asked.
- Snakemake compares times of files: an edit of the code that a wrong clock dates before the results
  reruns nothing. Settings are compared by content and always rerun.
- Tables carry no hash: figures, claims and `bench compare` take them as they are.
- Image folders are compared by names and sizes of files; CIFAR files that were there before
  `bench fetch` are held to what it found, not to published hashes.
"""


def marks() -> Iterator[tuple[str, ...]]:
    """Fault, stage, outcome and test of every mark, in the order of files and lines."""
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    given = {word.arg: ast.literal_eval(word.value) for word in mark.keywords}
                    yield *(given[name] for name in COLUMNS), f"`{path.stem}.py::{node.name}`"


def reliability() -> str:
    """The page as the tests say it must be."""
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in sorted(marks())) + TAIL


if __name__ == "__main__":
    PAGE.write_text(reliability())
