"""The sequential test: exact size by independent means, false claims, what it saves."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, norm

from bench.config import PRESETS, CertificationSettings
from bench.files import read_json, write_json
from bench.smoothing.bounds import p_a_lower, radius_cap
from bench.smoothing.log import read_log
from bench.smoothing.protocol import radius_grid
from bench.smoothing.sequential import (
    BoundaryTable,
    Plan,
    boundary_table,
    cache_folder,
    compute_boundaries,
    futility,
    looks_until,
)

ALPHA = 0.001
REPEATS = 100
SHARED = Path(os.environ.get("BENCH_SHARED", Path(__file__).parents[2] / "shared"))
LOGS = SHARED / "reference/logs/cohen"
GRID = tuple(np.round(np.arange(13) * 0.25, 10))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def shipped(preset: str, levels: tuple[float, ...]) -> Plan:
    """The plan that a preset makes of these levels."""
    chosen = CertificationSettings(preset=preset)
    return Plan(levels, chosen.alpha, chosen.horizon, chosen.reserve, chosen.n)


@pytest.fixture(scope="module")
def table() -> BoundaryTable:
    """The default preset's table at every level of `GRID`."""
    return compute_boundaries(shipped("default", GRID))


def exact_size(looks: list[int], allowed: list[int], q: Fraction) -> Fraction:
    """P(claim at any look) at failure probability q, draw by draw in rational arithmetic."""
    law, claimed, drawn = {0: Fraction(1)}, Fraction(0), 0
    for look, most in zip(looks, allowed, strict=True):
        for _ in range(look - drawn):
            step: dict[int, Fraction] = {}
            for failures, mass in law.items():
                step[failures] = step.get(failures, Fraction(0)) + mass * (1 - q)
                step[failures + 1] = step.get(failures + 1, Fraction(0)) + mass * q
            law = step
        claimed += sum((mass for failures, mass in law.items() if failures <= most), Fraction(0))
        law = {failures: mass for failures, mass in law.items() if failures > most}
        drawn = look
    return claimed


@pytest.mark.parametrize("z", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_exact_size_by_rational_arithmetic_stays_below_alpha(z, alpha):
    table = compute_boundaries(Plan((z,), alpha, 96))
    looks = [int(look) for look in table.looks]
    size = exact_size(looks, table.allowed[0].tolist(), Fraction(float(norm.sf(z))))
    assert size <= alpha
    # One failure more at the last look and the size is exceeded: nothing is left unspent.
    looser = [*table.allowed[0][:-1].tolist(), int(table.allowed[0][-1]) + 1]
    assert exact_size(looks, looser, Fraction(float(norm.sf(z)))) > alpha


def union_bound_boundary(z: float, looks: np.ndarray, spending: np.ndarray) -> list[int]:
    """A second, coarser test: each look's plain tail adds up, unspent alpha rolls over."""
    spent, allowed = 0.0, []
    for look, budget in zip(looks, spending, strict=True):
        most = int(binom.ppf(budget - spent, look, norm.sf(z))) if budget > spent else -1
        while most >= 0 and binom.cdf(most, look, norm.sf(z)) > budget - spent:
            most -= 1
        spent += float(binom.cdf(most, look, norm.sf(z)))
        allowed.append(most)
    return allowed


def share_until(looks: np.ndarray, plan: Plan) -> np.ndarray:
    """Share of alpha up to each look: a line, the reserve at its look, 2 % for those after."""
    first = int((looks <= plan.reserve_at).sum())
    before = np.linspace(0, 0.98 - plan.reserve, first + 1)[1:-1]
    return np.concatenate([before, np.linspace(0.98, 1, len(looks) - first + 1)])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("z", [0.0, 1.0, 3.0])
def test_a_shipped_table_is_no_stricter_than_the_union_bound_and_near_it(z, preset):
    plan = shipped(preset, (z,))
    table = compute_boundaries(plan)
    spending = 0.999 * plan.alpha * share_until(table.looks, plan)
    coarse = np.array(union_bound_boundary(z, table.looks, spending))
    late = table.looks >= 10_000
    gap = (table.allowed[0] - coarse)[late] / np.sqrt(table.looks[late] * norm.sf(z) * norm.cdf(z))
    # In standard deviations: the exact recursion may claim a little earlier, never much.
    assert (gap > -0.3).all()
    assert (gap < 1.0).all()


def simulate(table: BoundaryTable, p: float, runs: int, n: int, seed: int = 3) -> np.ndarray:
    """Levels claimed by `runs` images whose candidate has probability p; nobody gives up."""
    chance = np.random.default_rng(seed)
    failures, level = np.zeros(runs, np.int64), np.zeros(runs, np.int64)
    before = 0
    for look, allowed in zip(table.looks, table.allowed.T, strict=True):
        if look > n:
            break
        failures += chance.binomial(int(look) - before, 1 - p, runs)
        level = np.maximum(level, (failures[:, None] <= allowed).sum(axis=1))
        before = int(look)
    return level


@pytest.mark.parametrize(
    ("p", "true_levels"),
    [
        (0.5, 0),  # a tie of two classes, at the first threshold exactly
        (0.5 - 1e-12, 0),
        (0.1, 0),  # ten equal classes
        (0.0, 0),
        (float(norm.cdf(0.25)), 1),
        (float(norm.cdf(1.0)) - 1e-12, 4),
        (float(norm.cdf(1.1)), 5),  # between two thresholds
        (float(norm.cdf(3.0)), 12),
        (1.0, 13),
    ],
)
def test_false_claims_of_200000_images_stay_within_alpha(table, p, true_levels):
    runs = 200_000
    level = simulate(table, p, runs, 100_000)
    assert (level > true_levels).sum() <= binom.isf(1e-4, runs, ALPHA)
    if p == 1.0:
        assert (level == 13).all()


def test_stopping_at_the_luckiest_moment_gains_nothing(table):
    """The level is the best over all looks: every optional stopping rule claims at most this."""
    whole = simulate(table, float(norm.cdf(0.5)), 50_000, 1_000_000)
    assert (whole > 2).sum() <= binom.isf(1e-4, 50_000, ALPHA)


def peeking_table(z: float) -> BoundaryTable:
    """Plain Clopper-Pearson at every look: what the sequential test must not be."""
    looks = looks_until(100_000)
    allowed = [
        max(
            (f for f in range(look + 1) if p_a_lower(look - f, look, ALPHA) > norm.cdf(z)),
            default=-1,
        )
        if look <= 64
        else int(binom.ppf(ALPHA, look, norm.sf(z))) - 1
        for look in map(int, looks)
    ]
    return BoundaryTable(looks, np.array([allowed], np.int64))


def test_peeking_with_clopper_pearson_is_rejected_by_the_same_bound():
    runs = 200_000
    false = (simulate(peeking_table(0.0), 0.5, runs, 100_000) > 0).sum()
    assert false > 5 * binom.isf(1e-4, runs, ALPHA)


def test_levels_are_nested_and_never_beyond_clopper_pearson(table):
    assert (np.diff(table.allowed, axis=0) <= 0).all()
    for z, row in zip(GRID, table.allowed, strict=True):
        for look, failures in zip(table.looks.tolist(), row.tolist(), strict=True):
            if failures >= 0:
                assert p_a_lower(look - failures, look, ALPHA) > norm.cdf(z)


@settings(max_examples=40, deadline=None)
@given(
    z=st.floats(0, 3),
    step=st.floats(0.01, 0.5),
    alpha=st.floats(1e-7, 0.2),
    horizon=st.integers(10, 3000),
)
def test_boundaries_order_by_level_and_budget(z, step, alpha, horizon):
    table = compute_boundaries(Plan((z, z + step), alpha, horizon))
    assert table.looks[-1] == horizon
    assert (np.diff(table.looks) > 0).all()
    assert (table.allowed[1] <= table.allowed[0]).all()
    for level, row in zip((z, z + step), table.allowed, strict=True):
        assert binom.cdf(row[0], table.looks[0], norm.sf(level)) <= alpha
    # What was claimed at a look stays claimed: later looks allow at least as many failures.
    assert (np.diff(table.allowed[0]) >= 0).all()


@pytest.fixture
def computed(monkeypatch) -> list[Plan]:
    """Plans whose tables were computed, which the tables alone do not tell from read ones."""
    plans = []

    def counting(plan: Plan) -> BoundaryTable:
        plans.append(plan)
        return compute_boundaries(plan)

    monkeypatch.setattr("bench.smoothing.sequential.compute_boundaries", counting)
    return plans


def with_another_boundary(path: Path) -> str:
    """The cached table at `path` with one number changed, under a seal that fits it."""
    value = read_json(path)
    value["allowed"][0][-1] += 1
    write_json(path, value)
    return path.read_text()


def test_tables_come_back_from_the_cache_and_damage_is_repaired(computed):
    plan = Plan((0.0, 1.0), ALPHA, 1000)
    first = boundary_table(plan)
    assert boundary_table(plan).sha256 == first.sha256
    assert computed == [plan]
    (path,) = cache_folder().glob("*.json")
    unsealed = path.read_text().replace('"allowed": [', '"allowed": [[9],')
    for damage in ("", "{}", unsealed, with_another_boundary(path)):
        computed.clear()
        path.write_text(damage)
        assert boundary_table(plan).sha256 == first.sha256
        assert boundary_table(plan).sha256 == first.sha256
        assert computed == [plan]
    assert boundary_table(Plan((0.0, 1.0), 0.01, 1000)).sha256 != first.sha256


def test_a_table_that_cannot_be_kept_is_used_all_the_same(computed, monkeypatch, tmp_path):
    plan = Plan((0.0, 1.0), ALPHA, 1000)
    kept = boundary_table(plan)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert boundary_table(plan).sha256 == kept.sha256
    assert computed == [plan, plan]


@pytest.mark.parametrize("bad", [Plan((1.0, 0.5), ALPHA, 1000), Plan((0.0,), 0.0, 1000)])
def test_impossible_plans_are_refused(bad):
    with pytest.raises(ValueError, match="must"):
        boundary_table(bad)


def replay(path: Path, sigma: float, step: float) -> tuple[float, np.ndarray]:
    """Mean draws, and certified accuracy lost to fixed N, on a log's images as known p."""
    chance, n, repeats = np.random.default_rng(0), 100_000, REPEATS
    log = read_log(path)
    counts = np.arange(n // 2, n + 1)
    bounds = sigma * norm.ppf(beta.isf(1 - ALPHA, counts, n - counts + 1))
    abstained = (log["predict"] == -1).to_numpy()
    p = (np.interp(log["radius"], bounds, counts) + 0.5) / (n + 1)
    # A log does not tell p where it abstains.
    p = np.where(abstained, chance.uniform(0.25, 0.505, len(p)), p)
    right = log["correct"].to_numpy() == 1
    grid = np.array(radius_grid(step, radius_cap(n, ALPHA, sigma)))
    least = counts[np.searchsorted(bounds, grid)]
    fixed = (binom.sf(least - 1, n, p[:, None]) * right[:, None]).mean(axis=0)
    p, right = np.repeat(p, repeats), np.repeat(right, repeats)
    table = boundary_table(shipped("default", tuple(grid / sigma)))
    give_up = futility(table, n, float(PRESETS["default"]["futility"]))
    drawn, failures, level = (np.zeros(len(p), np.int64) for _ in range(3))
    live, before = np.ones(len(p), bool), 0
    for k in range(table.last_look(n) + 1):
        look = int(table.looks[k])
        failures[live] += chance.binomial(look - before, 1 - p[live])
        drawn[live], before = look, look
        reached = (failures[:, None] <= table.allowed[:, k]).sum(axis=1)
        level[live] = np.maximum(level, reached)[live]
        following = np.minimum(level, len(grid) - 1)
        live &= (level < len(grid)) & (failures < give_up[following, k])
    ours = ((level[:, None] > np.arange(len(grid))) & right[:, None]).mean(axis=0)
    return float(drawn.mean()) + 100, 100 * (fixed - ours)


@pytest.mark.skipif(not LOGS.exists(), reason=f"{LOGS} is absent: set BENCH_SHARED")
@pytest.mark.parametrize(("step", "most"), [(0.25, 10_500), (0.5, 5_000)])
def test_replaying_cohens_logs_saves_nine_tenths_of_the_draws(step, most):
    paths = sorted(LOGS.glob("*.tsv"))
    assert len(paths) == 7
    results = [replay(path, float(path.stem.split("_")[-1]), step) for path in paths]
    losses = np.concatenate([lost for _, lost in results])
    assert np.mean([drawn for drawn, _ in results]) <= most
    assert losses.mean() <= 0.15
    assert losses.max() <= 0.4
