"""Which source files define numbers, for Snakemake and for what is kept between runs."""

from pathlib import Path

from bench.errors import BenchError
from bench.files import sha256_file, sha256_json

ROOT = Path(__file__).parents[1]
TRAINING = (
    "bench/augmentation.py",
    "bench/backbones.py",
    "bench/cost.py",
    "bench/data.py",
    "bench/jobs.py",
    "bench/lenet.py",
    "bench/model_folder.py",
    "bench/provenance.py",
    "bench/replicas.py",
    "bench/resolution.py",
    "bench/training.py",
    "bench/training_state.py",
    "bench/objectives",
    "bench/parameterizations",
)
# What trains is behind the models that are certified, so its edits reach certificates as well.
CERTIFICATION = (
    "bench/backbones.py",
    "bench/certification.py",
    "bench/data.py",
    "bench/lenet.py",
    "bench/model_folder.py",
    "bench/remote.py",
    "bench/resolution.py",
    *(
        f"bench/smoothing/{name}.py"
        for name in (
            "bounds",
            "engine",
            "journal",
            "noise",
            "protocol",
            "rules",
            "sequential",
            "voting",
        )
    ),
)
ATTACK = (
    *CERTIFICATION,
    "bench/attacks.py",
    "bench/objectives/attack.py",
    "bench/objectives/noise.py",
)


def training_sources(*baselines: str | None) -> tuple[str, ...]:
    """Where the code of a training is: what all share, and the folders of its baselines."""
    named = {f"baselines/{baseline}" for baseline in baselines if baseline is not None}
    shared = ("baselines/command.py", "baselines/settings.py") if named else ()
    return (*TRAINING, *shared, *sorted(named))


def baseline_folder(method: str, baseline: str) -> Path:
    """The folder of a method's baseline.

    Raises:
        BenchError: there is none, or it has no rules.
    """
    folders = {path.parent.name: path.parent for path in ROOT.glob("baselines/*/rules.smk")}
    if baseline not in folders:
        known = ", ".join(sorted(folders))
        raise BenchError(
            f"methods.{method}.baseline: there is no baselines/{baseline}/rules.smk: take one of "
            f"{known}, or write it"
        )
    return folders[baseline]


def python_files(*places: str) -> list[Path]:
    """The Python files at or below `places`, relative to this checkout.

    Of a folder not `plan.py`, which says what a baseline will cost and defines no number.

    Raises:
        BenchError: there is no such place. Snakemake would leave out the rule that names it.
    """
    found: list[Path] = []
    for place in places:
        path = ROOT / place
        if not path.exists():
            raise BenchError(f"there is no {place}: correct the rule that names it as its code")
        below = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        found += [file for file in below if file == path or file.name != "plan.py"]
    return found


def sources_sha256(*places: str) -> str:
    """Hash of the names and contents of `python_files(*places)`."""
    files = python_files(*places)
    return sha256_json([(str(path.relative_to(ROOT)), sha256_file(path)) for path in files])
