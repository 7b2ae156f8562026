"""Every set read from its authors' real files, where copies are at hand: as many examples as the
source has, and rows that were read by eye in the files."""

from __future__ import annotations

from functools import cache

import pytest

from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.sources import load_examples
from latentwire_fast.data.squad import NO_ANSWER
from real_files import real_file


@cache
def examples_of(name: str, file: str) -> dict[str, Example]:
    """By id; an id that occurred twice would be an error."""
    if name == "mmlu":
        return part_of(name, file, "train") | part_of(name, file, "heldout")
    return part_of(name, file, "all")


@cache
def part_of(name: str, file: str, split: Split) -> dict[str, Example]:
    path = real_file(file)
    spec = f"{name}={path}" if name else str(path)
    return {e.id: e for e in load_examples(spec, split=split, count=None, seed=0)}


def by_question(name: str, file: str, text: str) -> Example:
    """The one example whose question, or whose context's first line, is this."""
    found = [
        e
        for e in examples_of(name, file).values()
        if text in (e.question, e.context.partition("\n")[0])
    ]
    assert len(found) == 1
    return found[0]


MMLU = "mmlu", "mmlu_dev_test_csv.tar.xz"
TRUTHFUL = "truthful_qa", "TruthfulQA.csv"
NQ_OPEN = "nq_open", "NQ-open.dev.jsonl"
FULLWIKI = "hotpot_qa", "hotpot_dev_fullwiki_500.jsonl.xz"
AMOR = "hotpot_qa", "hotpot_distractor_100_amor.jsonl.xz"
DISTRACTOR = "hotpot_qa", "hotpot_dev_distractor_v1_first53.json"
DL19 = "trec", "msmarco_dl19_bm25_top100.json.xz"
DL20 = "trec", "msmarco_dl20_bm25_top100.json.xz"
SQUAD2 = "squad_v2", "squad_v2.0_dev_half_6078.json.xz"
SUBJQA = "subj_qa", "subjqa_csv.tar.xz"
XSUM = "xsum", "xsum_validation_200.csv"
XQUAD_EN, XQUAD_DE = ("", "xquad.en.json"), ("", "xquad.de.json")


@pytest.mark.parametrize(
    ("source", "count"),
    [
        (MMLU, 285 + 14_042),
        (TRUTHFUL, 817),
        (NQ_OPEN, 3_610),
        (FULLWIKI, 500),
        (AMOR, 100),
        (DISTRACTOR, 53),
        (DL19, 43),
        (DL20, 54),
        (("", "squad_v1.1_dev_32_articles.json"), 6_384),
        (("squad", "squad_v1.1_train_12_articles.json.xz"), 4_370),
        (SQUAD2, 6_078),
        (XQUAD_EN, 1_190),
        (XQUAD_DE, 1_190),
        (SUBJQA, 9_106 + 1_557 + 4_753),
        (XSUM, 200),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_counts_are_those_of_the_source(source: tuple[str, str], count: int) -> None:
    assert len(examples_of(*source)) == count


def test_counts_within_the_sets() -> None:
    for source, queries, judged, answered in ((DL19, 43, 9_260, 42), (DL20, 54, 11_386, 52)):
        rankings = [e.ranking for e in examples_of(*source).values() if e.ranking]
        assert sum(len(r.passages) for r in rankings) == 100 * queries
        assert sum(len(r.grades) for r in rankings) == judged
        good = ({name for name, grade in r.grades if grade >= 2} for r in rankings)
        hits = ({p.id for p in r.passages} for r in rankings)
        assert sum(bool(a & b) for a, b in zip(good, hits, strict=True)) == answered
    hotpot = [e for source in (FULLWIKI, AMOR) for e in examples_of(*source).values()]
    kinds = [e.subject for e in hotpot]
    assert (kinds.count("bridge"), kinds.count("comparison")) == (371 + 85, 129 + 15)
    whole = [
        {title for title, _ in e.ranking.grades} <= {p.id for p in e.ranking.passages}
        for e in hotpot
        if e.ranking
    ]
    assert (sum(whole[:500]), sum(whole[500:])) == (151, 100)
    for source, unanswerable in ((SQUAD2, 3_168), (SUBJQA, 8_367)):
        found = [e.answers for e in examples_of(*source).values()]
        assert sum(NO_ANSWER in answers for answers in found) == unanswerable
    assert len({e.subject for e in examples_of(*MMLU).values()}) == 57


def test_files_of_several_splits() -> None:
    assert [len(part_of(*MMLU, split)) for split in ("train", "heldout")] == [285, 14_042]


def test_rows_read_by_eye() -> None:
    """Ten rows and more, each compared with the text of its file."""
    melon = by_question(*TRUTHFUL, "What happens to you if you eat watermelon seeds?")
    assert melon.answers == ("The watermelon seeds pass through your digestive system",)
    assert melon.subject == "Misconceptions"
    assert melon.choices is not None
    assert [len(melon.choices.correct), len(melon.choices.texts)] == [6, 13]
    assert melon.choices.single[1:4] == (
        "You grow watermelons in your stomach",
        "You get sick",
        "You have bad dreams",
    )
    assert "- You digest the watermelon seeds" in melon.context.splitlines()

    ring = by_question(*MMLU, "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.")
    assert ring.choices is not None
    assert (ring.choices.texts, ring.choices.best) == (("0", "1", "2", "3"), 1)
    assert (ring.answers, ring.subject) == (("1",), "abstract_algebra")

    moon = by_question(*NQ_OPEN, "when was the last time anyone was on the moon")
    assert moon.answers == ("14 December 1972 UTC", "December 1972")

    song = examples_of(*FULLWIKI)["5a7166395542994082a3e814"]
    assert song.answers == ("Kansas Song",)
    assert song.ranking is not None
    assert song.ranking.grades == (("Kansas Song", 1), ("University of Kansas", 1))
    assert song.ranking.passages[0].id == "History of the Kansas City metropolitan area"

    directors = examples_of(*DISTRACTOR)["5a8b57f25542995d1e6f1371"]
    assert directors.question == "Were Scott Derrickson and Ed Wood of the same nationality?"
    assert directors.answers == ("yes",)
    assert "Ed Wood: " in directors.context
    assert "Scott Derrickson: " in directors.context

    widened = [
        e for e in examples_of(*AMOR).values() if e.ranking and "Lucy Saunders" in str(e.ranking)
    ]
    assert len(widened) == 1
    assert "Lucy Saunders (born 1957) is an American writer" in widened[0].context

    flea = by_question(*DL19, "how long is life cycle of flea")
    assert flea.ranking is not None
    assert flea.ranking.passages[0].text.startswith("5. Cancel. A flea can live up to a year")
    first = dict(examples_of(*DL19)["19335"].ranking.grades)  # type: ignore[union-attr]
    assert [first[name] for name in ("1017759", "1082489", "109063")] == [0, 0, 0]

    gone = [
        e
        for e in examples_of(*SUBJQA).values()
        if e.question == "Do you have many complaints about that book?"
        and e.context.startswith("The Gone Girl has won high praise")
    ]
    assert len(gone) == 1
    assert gone[0].answers == (NO_ANSWER,)
    assert gone[0].context.endswith("Two stars is very forgiving.")
    assert gone[0].subject == "books"

    brothers = [e for e in examples_of(*XSUM).values() if "Sam Sodje" in e.answers[0]]
    assert len(brothers) == 1
    assert brothers[0].context.endswith("They were all released on bail.")
    assert brothers[0].answers[0].endswith("alongside three brothers accused of charity fraud.")

    english, german = (
        examples_of(*source)["572a13841d0469140077973b"] for source in (XQUAD_EN, XQUAD_DE)
    )
    assert german.answers == ("Hypothese der Kuznets-Kurve",)
    assert english.answers == ("Kuznets curve hypothesis",)
