"""Verdicts from results made by hand: at each bar, beyond it, and where nothing can be said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from latentwire_fast.evaluation.hypotheses.base import (
    NOT_MEASURED,
    CodedEvidence,
    Evidence,
    judge_hypotheses,
)
from latentwire_fast.evaluation.method_result import MethodResult
from latentwire_fast.evaluation.metrics import paired_interval

COUNT = 200
SEED, RESAMPLES = 5, 100
TEXT_F1, FLOOR_F1, BUDGET_F1 = 0.8, 0.05, 0.1
TEXT_POSITIONS, LATENTS = 60, 12
BITS = (16, 8, 6, 4)
NAMES = ("llama", "qwen")


def result(
    f1: float, *, positions: int = LATENTS, nll: float = 1.0, ms: float | None = None
) -> MethodResult:
    """A method whose F1 has exactly this mean: the first examples correct, the rest wrong."""
    correct = round(f1 * COUNT)
    scores = [1.0] * correct + [0.0] * (COUNT - correct)
    return MethodResult(
        predictions=[str(i) for i in range(COUNT)],
        em=scores,
        f1=scores,
        positions=[positions] * COUNT,
        nll=[nll] * COUNT,
        tokens=[3] * COUNT,
        prefill_ms=ms,
    )


def reader_results(**changed: MethodResult) -> dict[str, MethodResult]:
    """A reader on which every hypothesis holds, with some methods replaced."""
    methods = {
        "text": result(TEXT_F1, positions=TEXT_POSITIONS, ms=4.0),
        "latent": result(TEXT_F1, ms=2.0),
        "token_budget": result(BUDGET_F1),
        "token_budget_question": result(BUDGET_F1),
        "bm25_sentences": result(BUDGET_F1),
        "selective_context": result(BUDGET_F1),
        "closed_book": result(FLOOR_F1),
        "first_words": result(FLOOR_F1),
    }
    return methods | changed


def verdicts(
    results: Mapping[str, Mapping[str, MethodResult]] | None = None,
    *,
    by_bits: Mapping[int, float] | None = None,
    joint: MethodResult | None = None,
    payload: Mapping[int, int] | None = None,
    brotli: int = 150,
    utf8: float = 230.0,
    unseen: bool = False,
    coded: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """`judge_hypotheses` on good readers, but for what is given."""
    results = {name: reader_results() for name in NAMES} if results is None else results
    sizes = payload or {16: 400, 8: 220, 6: 172, 4: 124}
    widths = by_bits or dict.fromkeys(BITS, TEXT_F1)
    return judge_hypotheses(
        Evidence(
            methods=results,
            by_bits={
                name: {"latent": {bits: result(f1) for bits, f1 in widths.items()}}
                for name in results
            },
            joint=joint,
            bits=6,
            payload_sizes={bits: [size] * COUNT for bits, size in sizes.items()},
            utf8_sizes=[utf8] * COUNT,
            brotli_sizes=[brotli] * COUNT,
            are_added_readers=unseen,
            coded={
                name: CodedEvidence([size] * COUNT, {"payload": 2.0, "coded_text": 90.0})
                for name, size in (coded or dict.fromkeys(results, 150.0)).items()
            },
            seed=SEED,
            resamples=RESAMPLES,
        )
    )


def one_reader_with(**changed: MethodResult) -> dict[str, dict[str, MethodResult]]:
    """Two readers, of which only the second differs: the worst decides."""
    return {"llama": reader_results(), "qwen": reader_results(**changed)}


def test_all_eight_are_there_with_their_keys() -> None:
    judged = verdicts()
    assert list(judged) == [f"H{i}" for i in range(1, 9)]
    for entry in judged.values():
        assert {"value", "low", "high", "bar", "verdict"} <= set(entry)
        assert entry["verdict"] in ("pass", "fail", "not measured")
    assert [e["verdict"] for e in judged.values()] == [
        *("pass", "pass", "pass"),
        "not measured",  # one candidate, nothing to rescore
        *("pass", "pass"),
        "not measured",  # no third reader
        "pass",
    ]


# --- H1: F1 against text, and positions ---------------------------------------------------------


@pytest.mark.parametrize(("f1", "verdict"), [(0.8, "pass"), (0.785, "pass"), (0.775, "fail")])
def test_the_latent_may_lose_two_points_against_text(f1: float, verdict: str) -> None:
    h1 = verdicts(one_reader_with(latent=result(f1, ms=2.0)))["H1"]
    assert h1["verdict"] == verdict
    assert h1["value"] == pytest.approx(f1 - TEXT_F1)
    assert h1["bar"] == -0.02


@pytest.mark.parametrize(("positions", "verdict"), [(48, "pass"), (47, "fail")])
def test_the_latent_needs_four_times_fewer_positions(positions: int, verdict: str) -> None:
    text = result(TEXT_F1, positions=positions, ms=4.0)
    h1 = verdicts(one_reader_with(text=text))["H1"]
    assert h1["verdict"] == verdict
    assert h1["position_ratio"] == pytest.approx(positions / LATENTS)
    assert h1["value"] == 0


def test_the_interval_is_the_paired_one_of_the_worst_reader() -> None:
    latent = result(0.7, ms=2.0)
    results = one_reader_with(latent=latent)
    expected = paired_interval(
        latent.f1, results["qwen"]["text"].f1, seed=SEED, resamples=RESAMPLES
    )
    h1 = verdicts(results)["H1"]
    assert (h1["value"], h1["low"], h1["high"]) == expected
    assert h1["low"] < h1["value"] < h1["high"]


# --- H2: F1 against the token budgets -----------------------------------------------------------


@pytest.mark.parametrize(
    "baseline",
    ["token_budget", "token_budget_question", "bm25_sentences", "selective_context"],
)
@pytest.mark.parametrize(("f1", "verdict"), [(0.765, "pass"), (0.775, "fail"), (0.9, "fail")])
def test_three_points_over_every_shortened_text_are_needed(
    baseline: str, f1: float, verdict: str
) -> None:
    h2 = verdicts(one_reader_with(**{baseline: result(f1)}))["H2"]
    assert h2["verdict"] == verdict
    assert h2["value"] == pytest.approx(TEXT_F1 - f1)
    assert h2["bar"] == 0.03


def test_h2_does_without_pruned_text_where_a_reader_cannot_prune() -> None:
    methods = one_reader_with()
    methods["qwen"].pop("selective_context")
    assert verdicts(methods)["H2"]["verdict"] == "pass"
    methods["qwen"].pop("bm25_sentences")
    assert verdicts(methods)["H2"]["verdict"] == "not measured"


# --- H3: NLL ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nll", "verdict"), [(0.5, "pass"), (1.04, "pass"), (1.06, "fail")])
def test_five_percent_more_nll_than_text_is_allowed(nll: float, verdict: str) -> None:
    h3 = verdicts(one_reader_with(latent=result(TEXT_F1, nll=nll, ms=2.0)))["H3"]
    assert h3["verdict"] == verdict
    assert h3["value"] == pytest.approx(max(nll, 1.0))  # the other reader's ratio is 1
    assert h3["bar"] == 1.05


# --- H4: joint rescoring ------------------------------------------------------------------------


@pytest.mark.parametrize(("f1", "verdict"), [(0.82, "pass"), (0.81, "fail"), (0.7, "fail")])
def test_joint_rescoring_needs_one_and_a_half_points_over_the_best_single_reader(
    f1: float, verdict: str
) -> None:
    worse = one_reader_with(latent=result(0.5, ms=2.0))  # the better one counts
    h4 = verdicts(worse, joint=result(f1))["H4"]
    assert h4["verdict"] == verdict
    assert h4["value"] == pytest.approx(f1 - TEXT_F1)
    assert h4["bar"] == 0.015


# --- H5: prefill time and bytes -----------------------------------------------------------------


@pytest.mark.parametrize(("ms", "verdict"), [(3.9, "pass"), (4.0, "fail"), (4.1, "fail")])
def test_a_faster_prefill_is_needed_with_every_reader(ms: float, verdict: str) -> None:
    h5 = verdicts(one_reader_with(latent=result(TEXT_F1, ms=ms)))["H5"]
    assert h5["verdict"] == verdict
    assert h5["value"] == pytest.approx(4.0 / ms)
    assert (h5["low"], h5["high"]) == (None, None)  # two medians have no interval


@pytest.mark.parametrize(("utf8", "verdict"), [(173.0, "pass"), (172.0, "fail")])
def test_a_payload_below_the_texts_bytes_is_needed(utf8: float, verdict: str) -> None:
    assert verdicts(utf8=utf8)["H5"]["verdict"] == verdict


def test_the_prefill_is_not_measured_without_times() -> None:
    assert verdicts(one_reader_with(latent=result(TEXT_F1)))["H5"] == NOT_MEASURED


# --- H6: bytes against brotli -------------------------------------------------------------------


@pytest.mark.parametrize(("brotli", "verdict"), [(125, "pass"), (124, "fail"), (100, "fail")])
def test_fewer_bytes_than_brotli_are_needed(brotli: int, verdict: str) -> None:
    h6 = verdicts(brotli=brotli)["H6"]
    assert h6["verdict"] == verdict
    assert h6["value"] == pytest.approx(124 / brotli)
    assert (h6["bits"], h6["bar"]) == (4, 1.0)


@pytest.mark.parametrize(
    ("four", "six", "bits", "verdict"),
    [
        (0.76, 0.8, 4, "pass"),  # 95% exactly
        (0.755, 0.8, 6, "fail"),  # 172 bytes against brotli's 150
        (0.755, 0.755, 8, "fail"),
    ],
)
def test_the_narrowest_width_that_keeps_95_percent_is_taken(
    four: float, six: float, bits: int, verdict: str
) -> None:
    h6 = verdicts(by_bits={16: 0.8, 8: 0.8, 6: six, 4: four})["H6"]
    assert (h6["bits"], h6["verdict"]) == (bits, verdict)


def test_no_width_that_keeps_the_score_is_a_failure_however_small_it_is() -> None:
    h6 = verdicts(by_bits=dict.fromkeys(BITS, 0.7), brotli=10_000)["H6"]
    assert h6["verdict"] == "fail"
    assert h6["value"] < 1


# --- H8: bytes against the text coded by a reader -------------------------------------------------


@pytest.mark.parametrize(
    ("llama", "qwen", "verdict"), [(125, 130, "pass"), (500, 124, "fail"), (11.9, 11.8, "fail")]
)
def test_fewer_bytes_than_the_shorter_coded_text_are_needed(
    llama: float, qwen: float, verdict: str
) -> None:
    h8 = verdicts(coded={"llama": llama, "qwen": qwen})["H8"]
    assert h8["verdict"] == verdict
    assert h8["value"] == pytest.approx(124 / min(llama, qwen))
    assert h8["bits"] == 4
    assert h8["first_token_ms_p50"]["llama"] == {"payload": 2.0, "coded_text": 90.0}


def test_coded_text_counts_only_at_enough_of_the_texts_f1() -> None:
    h8 = verdicts(by_bits=dict.fromkeys(BITS, 0.7), coded=dict.fromkeys(NAMES, 10_000.0))["H8"]
    assert h8["verdict"] == "fail"
    assert h8["value"] < 1
    widths = {16: 0.8, 8: 0.8, 6: 0.8, 4: 0.7}
    assert verdicts(by_bits=widths, coded=dict.fromkeys(NAMES, 170.0))["H8"]["bits"] == 6


def test_coded_text_is_judged_where_every_reader_codes_it() -> None:
    assert verdicts(coded={"llama": 100.0})["H8"] == NOT_MEASURED


# --- H7: readers added afterwards -----------------------------------------------------------------


@pytest.mark.parametrize(("f1", "verdict"), [(0.76, "pass"), (0.75, "pass"), (0.74, "fail")])
def test_an_added_reader_may_lose_five_points_against_text(f1: float, verdict: str) -> None:
    h7 = verdicts(one_reader_with(latent=result(f1, ms=2.0)), unseen=True)["H7"]
    assert h7["value"] == pytest.approx(f1 - TEXT_F1)
    assert h7["low"] <= h7["value"] <= h7["high"]
    assert (h7["bar"], h7["verdict"]) == (-0.05, verdict)


def test_added_readers_are_not_measured_where_the_encoder_learned_with_all() -> None:
    assert verdicts()["H7"] == NOT_MEASURED


# --- a reader that cannot read ------------------------------------------------------------------


@pytest.mark.parametrize("floor", ["closed_book", "first_words"])
@pytest.mark.parametrize("f1", [TEXT_F1, 0.9])
def test_nothing_is_compared_with_a_text_score_at_or_below_its_floor(floor: str, f1: float) -> None:
    """Equal failures would pass: 0 is not more than 2 points below 0."""
    judged = verdicts(one_reader_with(**{floor: result(f1)}), joint=result(0.9))
    for name in ("H1", "H3", "H4", "H6"):
        assert judged[name] == NOT_MEASURED
    for name in ("H2", "H5"):
        assert judged[name]["verdict"] in ("pass", "fail")


def test_a_text_score_just_above_its_floors_is_enough() -> None:
    barely = reader_results(
        text=result(FLOOR_F1 + 1 / COUNT, positions=TEXT_POSITIONS, ms=4.0),
        latent=result(FLOOR_F1, ms=2.0),
    )
    judged = verdicts({"llama": barely}, joint=result(0.9))
    assert all(judged[name]["verdict"] != "not measured" for name in ("H1", "H3", "H4", "H6"))


def test_an_untrained_pair_passes_nothing_that_compares_with_text() -> None:
    zero = {
        name: replace(method, em=[0.0] * COUNT, f1=[0.0] * COUNT)
        for name, method in reader_results().items()
    }
    judged = verdicts(
        {"llama": zero, "qwen": zero},
        by_bits=dict.fromkeys(BITS, 0.0),
        joint=result(0.0),
        unseen=True,
    )
    for name in ("H1", "H3", "H4", "H6", "H7", "H8"):
        assert judged[name] == NOT_MEASURED
    assert judged["H2"]["verdict"] == "fail"


def test_a_text_nll_of_zero_does_not_stop_the_report() -> None:
    """fp32 rounds a very sure answer's log-probability to 0."""
    sure = result(TEXT_F1, positions=TEXT_POSITIONS, ms=4.0)
    sure.nll[0] = 0.0
    h3 = verdicts(one_reader_with(text=sure))["H3"]
    assert h3["value"] == pytest.approx(COUNT / (COUNT - 1))
