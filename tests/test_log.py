"""Certification logs: what is written comes back, and what is broken is refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.errors import BenchError
from bench.smoothing.log import read_log, write_log
from bench.statistics import certified_accuracy

REFERENCE = Path(__file__).parents[2] / "shared/reference"
HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"


def log_of(folder: Path, text: str) -> Path:
    """A log file with this text."""
    path = folder / "log.tsv"
    path.write_text(text)
    return path


def test_radii_survive_bit_for_bit(tmp_path: Path) -> None:
    radii = np.random.default_rng(0).random(2000) * 2
    rows = [
        {"idx": i, "label": 1, "predict": 1, "radius": float(r), "correct": 1, "time": 0.5}
        for i, r in enumerate(radii)
    ]
    write_log(rows, tmp_path / "log.tsv")
    np.testing.assert_array_equal(read_log(tmp_path / "log.tsv")["radius"], radii)


def test_a_radius_is_never_rounded_up(tmp_path: Path) -> None:
    row = {"idx": 0, "label": 1, "predict": 1, "radius": 0.2499999, "correct": 1, "time": 0.5}
    write_log([row], tmp_path / "log.tsv")
    curve = certified_accuracy(read_log(tmp_path / "log.tsv"), [0.2, 0.25])
    assert curve["value"].tolist() == [1.0, 0.0]


def test_both_dialects_of_time(tmp_path: Path) -> None:
    text = HEADER + "0\t3\t3\t0.5\t1\t15.4\n1\t3\t3\t0.5\t1\t0:02:31.25\n"
    assert read_log(log_of(tmp_path, text))["time"].tolist() == [15.4, 151.25]


def test_correct_is_recomputed(tmp_path: Path) -> None:
    text = HEADER + "0\t3\t3\t0.5\t7\t1\n1\t3\t4\t0.5\t1\t1\n2\t3\t-1\t0.0\t1\t1\n"
    assert read_log(log_of(tmp_path, text))["correct"].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("idx\tlabel\tpredict\n0\t1\t1\n", "lacks the columns .*radius"),
        ("", "not a certification log"),
        (HEADER, "no images"),
        (HEADER + "0\t3\t3\t0.5\t1\t1\n1\t3\t3\t0.\n", "line 3"),
        (HEADER + "0\t3\t3\thalf\t1\t1\n", "line 2"),
        (HEADER + "0\t3\t3\t0.5\t1\tsoon\n", "line 2"),
        (HEADER + "0\t3\t3\t0.5\t1\t1\t9\n", "longer than its header"),
        (HEADER + "4\t3\t3\t0.5\t1\t1\n4\t3\t3\t0.5\t1\t1\n", "image 4 twice"),
    ],
)
def test_broken_logs_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(BenchError, match=complaint):
        read_log(log_of(tmp_path, text))


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"absent\.tsv is missing"):
        read_log(tmp_path / "absent.tsv")


def published_source(log: Path) -> tuple[str, float, str]:
    """Which rows of published.csv were computed from this log."""
    if log.parent.name == "cohen":
        dataset, network, _, sigma = log.stem.split("_")
        key = {"cifar10": "CIFAR-10", "imagenet": "ImageNet"}[dataset]
        folder = f"data/certify/{dataset}/{network}/noise_{sigma}/test/sigma_{sigma}"
        return key, float(sigma), f"locuslab/smoothing@78a4d94:{folder}"
    sigma = log.stem.split("_")[-1]
    return "Fashion-MNIST", float(sigma), "/cohen/noise_"


def test_published_logs_give_the_published_values() -> None:
    logs = sorted(REFERENCE.glob("logs/*/*.tsv"))
    if not logs:
        pytest.skip(f"{REFERENCE} is not beside this checkout")
    published = pd.read_csv(REFERENCE / "published.csv")
    for log in logs:
        dataset, sigma, source = published_source(log)
        rows = published[
            (published["dataset"] == dataset)
            & np.isclose(published["sigma"], sigma)
            & published["source"].str.contains(source, regex=False)
            & published["note"].str.startswith("computed from log")
        ]
        assert len(rows) >= 2, log
        curve = certified_accuracy(read_log(log), rows["radius"])
        reported = rows["certified_accuracy_percent"].to_numpy()
        np.testing.assert_allclose(100 * curve["value"], reported, atol=0.005 + 1e-9)
