"""Flips against SciPy's binomial test, statsmodels' McNemar test and published examples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.statistics.flips import Flips, flips, pooled, sign_test

stats = pytest.importorskip("scipy.stats", reason="needs scipy, which comes with the extra `helm`")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_flips_are_scipys_binomial_test(pairs: list[tuple[bool, bool]]) -> None:
    before, after = zip(*pairs, strict=True)
    found = flips(before, after)
    lost, gained = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    assert (found.lost, found.gained, found.num) == (lost, gained, len(pairs))
    assert found.disagreement_rate == (lost + gained) / len(pairs)
    if lost + gained:
        assert found.p_value == pytest.approx(stats.binomtest(lost, lost + gained).pvalue, rel=1e-9)
        assert found.p_worse == pytest.approx(stats.binomtest(lost, lost + gained, alternative="greater").pvalue, rel=1e-9)
    else:
        assert (found.p_value, found.p_worse) == (1.0, 1.0)


@pytest.mark.parametrize(("lost", "gained"), [(0, 1), (1, 0), (5, 5), (0, 30), (30, 0), (13, 25), (700, 512)])
def test_flips_are_the_exact_test_of_statsmodels(lost: int, gained: int) -> None:
    tables = pytest.importorskip(
        "statsmodels.stats.contingency_tables", reason="needs statsmodels, which comes with the extra `dev`"
    )
    expected = tables.mcnemar([[40, lost], [gained, 20]], exact=True).pvalue
    assert Flips(lost, gained, lost + gained + 60).p_value == pytest.approx(expected, rel=1e-9)


def test_approval_of_a_head_of_government() -> None:
    """Agresti, Categorical Data Analysis (1990), p. 350: of 1,600 asked twice 150 stopped to approve and 86 began to.

    The help of R's ``mcnemar.test`` has it too: chi-squared is 17.356 (p = 3.099e-05), or 16.818 (p = 4.115e-05) with the
    correction for continuity; the exact p lies between.
    """
    before = np.repeat([True, True, False, False], [794, 150, 86, 570])
    after = np.repeat([True, False, True, False], [794, 150, 86, 570])
    found = flips(before, after)
    assert found == Flips(150, 86, 1600)
    assert (found.lost - found.gained) ** 2 / (found.lost + found.gained) == pytest.approx(17.356, abs=5e-4)
    assert 3.099e-05 < found.p_value < 4.115e-05
    assert found.p_worse == pytest.approx(found.p_value / 2)


def test_a_small_table_by_hand() -> None:
    """Of five flips four were lost: 6 of 32 ways are at least as uneven on this side."""
    assert Flips(4, 1, 9).p_worse == pytest.approx(6 / 32)
    assert Flips(1, 4, 9).p_worse == pytest.approx(31 / 32)
    assert Flips(4, 1, 9).p_value == Flips(1, 4, 9).p_value == pytest.approx(12 / 32)


def test_no_disagreement_all_disagreement_and_one_pair() -> None:
    assert flips([1, 0, 1], [1, 0, 1]).p_value == 1
    assert flips([1] * 10, [0] * 10).p_value == pytest.approx(2 / 2**10)
    assert flips([1] * 10, [0] * 10).p_worse == pytest.approx(1 / 2**10)
    assert (flips([True], [False]).p_value, flips([True], [False]).p_worse) == (1, 0.5)


def test_the_sign_test_counts_what_differs_whatever_by() -> None:
    """Ties count neither way; of scores of 0 and 1 it is McNemar's test."""
    assert sign_test([0.5, 0.5, 0.2, 1.0], [0.5, 0.4999, 0.9, 0.0]) == Flips(2, 1, 4)
    before, after = np.random.default_rng(0).integers(0, 2, (2, 100))
    assert sign_test(before, after) == flips(before, after)


def test_pooled_tasks_are_one_long_task() -> None:
    before, after = np.random.default_rng(1).integers(0, 2, (2, 90))
    tasks = [flips(before[i : i + 30], after[i : i + 30]) for i in (0, 30, 60)]
    assert pooled(tasks) == flips(before, after)
    assert pooled(tasks[:1]) == tasks[0]


def test_small_losses_everywhere_are_seen_together() -> None:
    """Ten tasks of 8 lost and 3 gained: none is sure at 1 %, all are."""
    task = Flips(8, 3, 500)
    assert task.p_worse > 0.1
    assert pooled([task] * 10).p_worse == pytest.approx(stats.binomtest(80, 110, alternative="greater").pvalue)
    assert pooled([task] * 10).p_worse < 1e-5


def test_what_is_no_right_or_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 pairs have a score other than 0 and 1"):
        flips([1.0, 0.5], [1.0, 1.0])
    with pytest.raises(ValueError, match="NaN"):
        flips([1.0, float("nan")], [1.0, 1.0])
    with pytest.raises(ValueError, match="NaN"):
        sign_test([1.0], [float("nan")])
    with pytest.raises(ValueError, match="2 values before and 1 after"):
        flips([True, False], [True])
    with pytest.raises(ValueError, match="empty"):
        flips([], [])
    with pytest.raises(ValueError, match="no tasks"):
        pooled([])
