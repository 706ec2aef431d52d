"""Result folders that agree, and doctored ones that must not."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.compare import agree, compare_results
from bench.errors import BenchError
from bench.statistics import accuracy_interval

RADII = np.array([0.0, 0.25, 0.5])


def write_results(
    folder: Path,
    successes: list[int],
    radii: np.ndarray = RADII,
    methods: tuple[str, ...] = ("lora", "full"),
    trainable: int = 130,
) -> Path:
    """Tables of a run on 500 images in which every method has these successes."""
    low, high = accuracy_interval(successes, 500)
    point = {"sigma": 0.5, "seed": 0}
    values = {"radius": radii, "value": np.array(successes) / 500, "low": low, "high": high}
    curves = [pd.DataFrame({"method": m, **point, **values, "n_images": 500}) for m in methods]
    costs = pd.DataFrame(
        [{"method": m, **point, "trainable_parameters": trainable} for m in methods]
    )
    (folder / "tables").mkdir(parents=True)
    pd.concat(curves).to_csv(folder / "tables/certified_accuracy.csv", index=False)
    costs.to_csv(folder / "tables/cost.csv", index=False)
    return folder


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """The results the others are compared with."""
    return write_results(tmp_path / "ours", [400, 300, 100])


def test_a_folder_agrees_with_itself_and_with_its_tables(ours: Path) -> None:
    frame = compare_results(ours, ours / "tables")
    assert agree(frame)
    assert len(frame) == 2 * len(RADII) + 2
    assert (frame["difference"] == 0).all()


def test_noise_agrees_and_doctoring_does_not(ours: Path, tmp_path: Path) -> None:
    assert agree(compare_results(ours, write_results(tmp_path / "near", [410, 290, 105])))
    frame = compare_results(ours, write_results(tmp_path / "doctored", [400, 350, 100]))
    assert not agree(frame)
    assert frame.loc[~frame["agrees"], "radius"].tolist() == [0.25, 0.25]


def test_the_halves_that_face_each_other_are_joined(ours: Path, tmp_path: Path) -> None:
    other = write_results(tmp_path / "other", [400, 300, 110])
    low, high = accuracy_interval([110, 100], 500)
    expected = np.hypot(high[1] - 100 / 500, 110 / 500 - low[0])
    for pair in ((ours, other), (other, ours)):
        last = compare_results(*pair).query("radius == 0.5").iloc[0]
        assert last["joint_half_width"] == pytest.approx(expected)


def test_an_ended_curve_counts_as_zero_of_its_images(ours: Path, tmp_path: Path) -> None:
    short = write_results(tmp_path / "short", [400, 300], RADII[:2])
    assert not agree(compare_results(ours, short))
    barely = write_results(tmp_path / "barely", [400, 300, 1])
    assert agree(compare_results(barely, short))
    assert agree(compare_results(short, barely))


def test_a_missing_method_disagrees(ours: Path, tmp_path: Path) -> None:
    fewer = write_results(tmp_path / "fewer", [400, 300, 100], methods=("lora",))
    for pair in ((ours, fewer), (fewer, ours)):
        frame = compare_results(*pair)
        assert set(frame.loc[~frame["agrees"], "method"]) == {"full"}


def test_other_trainable_parameters_disagree(ours: Path, tmp_path: Path) -> None:
    frame = compare_results(ours, write_results(tmp_path / "b", [400, 300, 100], trainable=131))
    assert set(frame.loc[~frame["agrees"], "quantity"]) == {"trainable_parameters"}


def test_a_count_that_neither_side_knows_agrees(ours: Path) -> None:
    cost = pd.read_csv(ours / "tables/cost.csv").astype({"trainable_parameters": float})
    cost.loc[0, "trainable_parameters"] = np.nan
    cost.to_csv(ours / "tables/cost.csv", index=False)
    assert compare_results(ours, ours)["agrees"].all()


def test_other_radii_are_an_error(ours: Path, tmp_path: Path) -> None:
    other = write_results(tmp_path / "other", [400, 300, 100], np.array([0.0, 0.1, 0.5]))
    with pytest.raises(BenchError, match="radius_step"):
        compare_results(ours, other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.drop(columns="seed"), "has no column seed"),
        (lambda table: table.assign(sigma="a quarter"), "sigma must hold numbers"),
        (lambda table: table[:0], "has no rows"),
    ],
)
def test_a_table_that_is_none_of_ours_is_named(ours: Path, tmp_path: Path, change, said) -> None:
    other = write_results(tmp_path / "b", [400, 300, 100])
    path = other / "tables/certified_accuracy.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)
    for pair in ((ours, other), (other, ours)):
        with pytest.raises(BenchError, match=rf"certified_accuracy\.csv:? {said}"):
            compare_results(*pair)


def test_a_folder_without_tables_is_named(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="has no tables"):
        compare_results(ours, tmp_path)
