"""Intervals and tests: known values, and the coverage of the interval where rows share images.

MEDR1_SLOW=1 runs the coverage on the full grid (ten seconds); by default two of its points.
"""

import math
import os

import numpy as np
import pytest

from medr1_verl.evaluation.statistics import (
    bootstrap_sums,
    difference_interval,
    mcnemar,
    share_interval,
    t_quantile,
)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (3, 1, 10 / 16),
        (5, 5, 1.0),
        (10, 0, 2 / 2**10),
        (400, 500, 2 * sum(math.comb(900, k) for k in range(401)) / 2**900),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(first, second, p):
    assert mcnemar(first, second) == pytest.approx(p, rel=1e-9)
    assert mcnemar(second, first) == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [(0.975, 5, 2.5706), (0.975, 10, 2.2281), (0.975, 30, 2.0423), (0.95, 20, 1.7247), (0.975, 10**6, 1.9600)],
)
def test_t_quantile(probability, degrees, value):
    assert t_quantile(probability, degrees) == pytest.approx(value, abs=0.01)


def test_draws_are_of_whole_images_and_seeded():
    counts = np.array([[3.0, 3.0], [0.0, 2.0], [1.0, 1.0]])  # right answers and rows of three images
    sums = bootstrap_sums(counts, 500, seed=1)
    possible = {
        (3.0 * a + c, 3.0 * a + 2.0 * b + c) for a in range(4) for b in range(4 - a) for c in [3 - a - b]
    }  # every draw is three images, each with all of its rows
    assert {tuple(line) for line in sums} <= possible
    assert np.array_equal(sums, bootstrap_sums(counts, 500, seed=1))
    assert not np.array_equal(sums, bootstrap_sums(counts, 500, seed=2))
    assert sums.mean(axis=0) == pytest.approx(counts.sum(axis=0), rel=0.1)


def test_copies_of_a_row_are_worth_nothing():
    """An image asked five times, always with the same outcome, must not make the interval narrower."""
    right = np.array([1.0] * 30 + [0.0] * 20)
    once = np.stack([right, np.ones(50)], axis=1)
    intervals = []
    for counts in (once, once * 5):
        sums = bootstrap_sums(counts, 2000, seed=0)
        rows = int(counts[:, 1].sum())
        intervals.append(share_interval(0.6, sums[:, 0] / sums[:, 1], rows, 50))
    assert intervals[0] == pytest.approx(intervals[1])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_interval_at_the_ends_is_not_a_point(share):
    low, high = share_interval(share, np.full(100, share), 40, 20)
    assert 0 <= low < high <= 1
    assert high - low > 0.1


def test_one_image_says_nothing():
    assert share_interval(1.0, np.ones(100), 5, 1) == (0.0, 1.0)


def test_difference_interval_by_hand():
    """Bonett and Price: 100 pairs, 15 and 5 that differ, z for t: 0.0980 +- 1.96 sqrt((22/102 - 0.0980^2)/102)."""
    replicates = np.array([0.1 - math.sqrt((0.2 - 0.01) / 100 * 0.99), 0.1 + math.sqrt((0.2 - 0.01) / 100 * 0.99)])
    t = t_quantile(0.975, 99)
    half = t * math.sqrt((22 / 102 - (10 / 102) ** 2) / 102)
    assert difference_interval(0.1, replicates, 100) == pytest.approx((10 / 102 - half, 10 / 102 + half))


def test_no_difference_is_not_a_point():
    low, high = difference_interval(0.0, np.zeros(100), 20)
    assert low == pytest.approx(-high)
    assert 0.1 < high < 0.2
    assert difference_interval(0.0, np.zeros(100), 1) == (-1, 1)


def coverage(accuracy, images, agreement, repeats=1000, draws=400):
    """How often the 95 % interval holds the true accuracy: 1-3 rows an image, right together as ``agreement`` says."""
    generator = np.random.default_rng(images + int(1000 * accuracy))
    held = 0
    for seed in range(repeats):
        rows = generator.choice([1, 2, 3], size=images, p=[0.8, 0.15, 0.05])
        if agreement:
            scale = (1 - agreement) / agreement
            chance = generator.beta(accuracy * scale, (1 - accuracy) * scale, size=images)
        else:
            chance = accuracy
        right = generator.binomial(rows, chance)
        sums = bootstrap_sums(np.stack([right, rows], axis=1).astype(float), draws, seed)
        low, high = share_interval(right.sum() / rows.sum(), sums[:, 0] / sums[:, 1], int(rows.sum()), images)
        held += low <= accuracy <= high
    return held / repeats


GRID = [
    (accuracy, images, agreement)
    for images in (50, 200)
    for accuracy in (0.25, 0.6, 0.9, 0.97)
    for agreement in (0, 0.5)
]


@pytest.mark.parametrize(
    ("accuracy", "images", "agreement"),
    GRID if os.environ.get("MEDR1_SLOW") else [(0.6, 50, 0.5), (0.9, 100, 0)],
)
def test_nominal_95_covers_93_to_97(accuracy, images, agreement):
    assert 0.93 <= coverage(accuracy, images, agreement) <= 0.97


def difference_coverage(first, second, images, agreement, same, repeats=1000, draws=300):
    """How often the interval holds the true difference: rows of an image are one draw with chance ``agreement``, and
    the second model answers as the first would with chance ``same``.
    """
    generator = np.random.default_rng(images + int(1000 * first) + int(100 * second))
    held = 0
    for seed in range(repeats):
        rows = generator.choice([1, 2, 3], size=images, p=[0.8, 0.15, 0.05])
        draw = generator.random((2, images, 3))
        together = generator.random(images) < agreement
        draw[:, together] = draw[:, together, :1]
        copied = (generator.random(images) < same)[:, None]
        asked = np.arange(3) < rows[:, None]
        mine = ((draw[0] < first) & asked).sum(axis=1)
        theirs = ((np.where(copied, draw[0], draw[1]) < second) & asked).sum(axis=1)
        sums = bootstrap_sums(np.stack([mine, theirs, rows], axis=1).astype(float), draws, seed)
        found = (mine.sum() - theirs.sum()) / rows.sum()
        low, high = difference_interval(found, (sums[:, 0] - sums[:, 1]) / sums[:, 2], images)
        held += low <= first - second <= high
    return held / repeats


@pytest.mark.parametrize(
    ("first", "second", "images", "agreement", "same"),
    [
        (first, second, images, agreement, same)
        for images in (50, 200)
        for first, second in ((0.6, 0.5), (0.9, 0.8), (0.9, 0.9), (0.97, 0.9), (0.3, 0.3))
        for agreement, same in ((0, 0), (0.5, 0), (0.5, 0.8))
    ]
    if os.environ.get("MEDR1_SLOW")
    else [(0.6, 0.5, 50, 0.5, 0), (0.97, 0.9, 50, 0.5, 0.8)],
)
def test_differences_cover_too(first, second, images, agreement, same):
    """Never less than 93 %; the imagined images make it more than 95 % where there are few, or where little differs."""
    found = difference_coverage(first, second, images, agreement, same)
    assert found >= 0.93
    if not same and first < 0.95:
        assert found <= 0.98
