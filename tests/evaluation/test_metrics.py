"""Scores against the official script's rules and hand-worked values; intervals against theory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentwire_fast.evaluation import metrics


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Red,  lamp!", "red lamp"),
        ("a an the", ""),
        ("theatre and banana", "theatre and banana"),
        ("U.S. $5", "us 5"),
        ("well-known", "wellknown"),
        ("\tNulnak\n", "nulnak"),
        ("“Quoted” — dash", "“quoted” — dash"),  # the official script keeps non-ASCII punctuation
    ],
)
def test_normalize_answer(text: str, normal: str) -> None:
    assert metrics.normalize_answer(text) == normal


def test_f1_by_hand() -> None:
    # 2 common tokens of 3 predicted and 4 expected: 2 * (2/3 * 2/4) / (2/3 + 2/4) = 4/7
    assert metrics.f1("red lamp shop", ["old red lamp light"]) == pytest.approx(4 / 7)
    # a repeated token counts as often as it occurs in both
    assert metrics.f1("pip pip", ["pip"]) == pytest.approx(2 / 3)
    assert metrics.f1("nothing alike", ["red lamp"]) == 0.0


def test_best_answer_counts() -> None:
    answers = ["October 1973", "1973"]
    assert metrics.exact_match("the 1973", answers) == 1.0
    assert metrics.f1("in 1973", answers) == pytest.approx(2 / 3)


def test_answers_that_normalise_to_nothing_follow_v1() -> None:
    """Official v1.1: two empty token lists share no token, so F1 is 0 where EM is 1."""
    assert metrics.exact_match("a", ["the"]) == 1.0
    assert metrics.f1("a", ["the"]) == 0.0


def test_no_answer_follows_v2() -> None:
    assert metrics.f1("", [""]) == metrics.exact_match("", [""]) == 1.0
    assert metrics.f1("Berlin", [""]) == metrics.exact_match("Berlin", [""]) == 0.0


@settings(deadline=None)
@given(st.text(max_size=40), st.lists(st.text(max_size=40), min_size=1, max_size=3))
def test_scores_stay_in_range(prediction: str, answers: list[str]) -> None:
    assert metrics.exact_match(prediction, answers) in (0.0, 1.0)
    assert 0.0 <= metrics.f1(prediction, answers) <= 1.0
    assert metrics.exact_match(answers[0], answers) == 1.0


@pytest.mark.parametrize("score", [metrics.exact_match, metrics.f1, metrics.rouge])
def test_no_answers_is_an_error(score) -> None:
    with pytest.raises(ValueError, match="no answers"):
        score("lamp", [])


def test_accuracy_keeps_the_label_a() -> None:
    assert metrics.accuracy([" a", "B", ""], ["A", "B", "A"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no predictions"):
        metrics.accuracy([], [])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        metrics.accuracy(["A"], [])


def test_rouge_by_hand() -> None:
    scores = metrics.rouge("the cat sat", ["the cat ran off", "a dog"])
    assert scores["rouge1"] == pytest.approx(4 / 7)  # 2 of 3 and 2 of 4
    assert scores["rouge2"] == pytest.approx(2 / 5)  # 1 of 2 and 1 of 3
    assert scores["rougeL"] == pytest.approx(4 / 7)
    assert set(scores) == set(metrics.ROUGE_TYPES)


def test_first_token_hit() -> None:
    ranked = [7, 3, 9]
    assert metrics.first_token_hit(ranked, 3, k=1) == 0.0
    assert metrics.first_token_hit(ranked, 3, k=2) == 1.0
    assert metrics.first_token_hit(np.array(ranked), 9, k=3) == 1.0
    with pytest.raises(ValueError, match="3 ids are ranked"):
        metrics.first_token_hit(ranked, 3, k=5)


def test_reciprocal_rank() -> None:
    ranked = [f"p{i}" for i in range(1, 20)]
    assert metrics.reciprocal_rank(ranked, {"p4", "p2"}) == 0.5
    assert metrics.reciprocal_rank(ranked, {"p11"}) == 0.0
    assert metrics.reciprocal_rank(ranked, {"p11"}, limit=11) == pytest.approx(1 / 11)
    assert metrics.reciprocal_rank([], {"p1"}) == 0.0


def test_a_uniform_guess() -> None:
    assert metrics.uniform_nll(640) == pytest.approx(math.log(640))


def test_diversity_and_empty_rate() -> None:
    shares = metrics.distinct_shares(["x", "x", "y", "z"])
    assert shares == [0.5, 0.5, 1.0, 1.0]
    assert sum(shares) == 3
    assert metrics.distinct_shares([]) == []
    assert metrics.empty_rate(["", " \n", "x", "y"]) == 0.5
    with pytest.raises(ValueError, match="no predictions"):
        metrics.empty_rate([])


def test_mean_interval_matches_theory() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=1000)
    interval = metrics.mean_interval(values, seed=0)
    half = 1.96 * values.std() / math.sqrt(1000)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    narrow = metrics.mean_interval(values, seed=0, confidence=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high


def test_interval_covers_the_truth() -> None:
    """95% intervals of 200 Bernoulli samples hold the true rate about 95 times in 100."""
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(100):
        interval = metrics.mean_interval(rng.random(200) < 0.3, seed=seed, resamples=400)
        hits += interval.low <= 0.3 <= interval.high
    assert 88 <= hits <= 100


def test_intervals_repeat_with_their_seed() -> None:
    values = np.random.default_rng(2).random(50)
    assert metrics.mean_interval(values, seed=3) == metrics.mean_interval(values, seed=3)
    assert metrics.mean_interval(values, seed=3) != metrics.mean_interval(values, seed=4)


def test_blocks_do_not_change_the_draw_of_large_sets(monkeypatch) -> None:
    values = np.random.default_rng(2).random(500)
    whole = metrics.mean_interval(values, seed=0, resamples=100)
    monkeypatch.setattr(metrics, "_RESAMPLE_ELEMENTS", 500 * 10)
    blocks = metrics.mean_interval(values, seed=0, resamples=100)
    assert blocks.mean == whole.mean
    assert blocks.low == pytest.approx(whole.low, abs=0.01)


@pytest.mark.parametrize("values", [[1.0], [0.0] * 5, [1.0] * 300])
def test_constant_values_give_a_point(values: list[float]) -> None:
    assert metrics.mean_interval(values, seed=0) == (values[0],) * 3


@pytest.mark.parametrize("values", [[], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_degenerate_values_are_errors(values: list[float]) -> None:
    with pytest.raises(ValueError, match="interval of"):
        metrics.mean_interval(values, seed=0)


def test_paired_interval_is_tighter_than_two_means() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(300)
    b = a - 0.02 + rng.normal(0, 0.01, 300)
    difference = metrics.paired_interval(a, b, seed=0)
    assert difference.low > 0.015
    assert difference.high < 0.025
    single = metrics.mean_interval(a, seed=0)
    assert single.high - single.low > 5 * (difference.high - difference.low)
    with pytest.raises(ValueError, match="one length"):
        metrics.paired_interval([1.0], [1.0, 2.0], seed=0)


def test_ratio_interval_is_a_ratio_of_sums() -> None:
    nll, tokens = [2.0, 1.0, 3.0], [1, 3, 2]
    interval = metrics.ratio_interval(nll, tokens, seed=0)
    assert interval.mean == 1.0, "a ratio of sums, not a mean of ratios"
    assert 1 / 3 <= interval.low <= interval.high <= 2.0
    constant = metrics.ratio_interval([1.0, 2.0, 4.0], [2.0, 4.0, 8.0], seed=0)
    assert constant == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="index 1"):
        metrics.ratio_interval([1.0, 1.0], [1.0, 0.0], seed=0)
    with pytest.raises(ValueError, match="no values"):
        metrics.ratio_interval([], [], seed=0)


def test_examples_of_one_cluster_are_resampled_together() -> None:
    """Ten equal answers to each of twenty passages are worth twenty answers, not two hundred."""
    passages = [float(i % 3 == 0) for i in range(20)]
    values = [v for v in passages for _ in range(10)]
    clusters = [f"passage {i}" for i in range(20) for _ in range(10)]
    clustered = metrics.mean_interval(values, seed=0, clusters=clusters)
    assert clustered == metrics.mean_interval(passages, seed=0)
    plain = metrics.mean_interval(values, seed=0)
    assert clustered.mean == plain.mean
    assert clustered.high - clustered.low > 2.5 * (plain.high - plain.low)


def test_clusters_of_one_change_nothing() -> None:
    values, tokens = [1.0, 2.0, 4.0, 0.5], [2, 3, 5, 1]
    options: dict[str, Any] = {"seed": 0, "resamples": 200}
    each = {**options, "clusters": "abcd"}
    assert metrics.mean_interval(values, **each) == metrics.mean_interval(values, **options)
    assert metrics.ratio_interval(values, tokens, **each) == metrics.ratio_interval(
        values, tokens, **options
    )
    assert metrics.paired_interval(values, values, **each) == (0.0, 0.0, 0.0)


def test_clusters_may_have_any_order_and_size() -> None:
    """A ratio of sums over all examples of the clusters that were drawn."""
    nll, tokens, clusters = [1.0, 8.0, 3.0, 2.0], [1.0, 2.0, 2.0, 1.0], "abab"
    found = metrics.ratio_interval(nll, tokens, seed=1, clusters=clusters)
    assert found == metrics.ratio_interval([4.0, 10.0], [3.0, 3.0], seed=1)
    one = metrics.ratio_interval(nll, tokens, seed=1, clusters="aaaa")
    assert one == (14 / 6,) * 3
