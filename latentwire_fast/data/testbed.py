"""A reading task without end: short passages of facts about invented people, and questions on them.

A passage holds four facts over three people, shuffled. Six relations: `place`, `dog` and `boss`
have invented names as values, `job` is one of 28, `age` a number 10-99, `thing` a colour and an
object.
Names are two consonant-vowel-consonant syllables ("Nulnak"); the first syllables within one passage
are distinct, so that a copied first token settles the second. Names with `crc32 % 10 == 0` are
*held out*: training passages never contain them, held-out passages contain no others.

    python -m latentwire_fast.data.testbed --count 3 --split heldout
"""

from __future__ import annotations

import argparse
import random
import zlib
from dataclasses import dataclass
from typing import Literal

from latentwire_fast.data.examples import Example

Split = Literal["train", "heldout"]

# 64 syllables of which both testbed tokenizers make two tokens a name (checked by a test).
SYLLABLES = (
    "bak bem bin bor bus dal den dik dom dun fas fel fim fos fut gar gen gil gok gum "
    "hak hin hol hur kas kel kim kon kut lan lek lis lom lux mas mel mir mok mun "
    "nak nel nis nor nul pas pek pil pon pux rak rus rim rok rux san sel sim sok sul "
    "vas vem vir vok vun"
).split()
JOBS = (
    "baker doctor farmer teacher painter pilot lawyer singer writer driver tailor butcher plumber "
    "miner nurse judge sailor weaver potter chemist dentist banker editor guard hunter jeweler "
    "librarian mason"
).split()
COLOURS = "red blue green black white yellow purple orange silver golden brown pink".split()
OBJECTS = (
    "lamp chair wagon piano clock guitar mirror table bottle basket ladder hammer kettle camera "
    "carpet helmet pillow umbrella bicycle violin window statue candle telescope"
).split()


@dataclass(frozen=True)
class Relation:
    """Surface forms of one relation: `{name}` holds, `{value}` is the answer."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS: dict[str, Relation] = {
    "place": Relation(
        (
            "{name} has lived in {value} for many years.",
            "The family home of {name} is in {value} today.",
            "Last winter {name} finally moved to {value} again.",
        ),
        ("Where does {name} live?", "In which town does {name} live?"),
    ),
    "job": Relation(
        (
            "{name} works every morning as a {value}.",
            "People in town know {name} as a {value}.",
            "The current profession of {name} is {value} now.",
        ),
        ("What is the job of {name}?", "What does {name} do for work?"),
    ),
    "age": Relation(
        (
            "{name} is already {value} years old.",
            "This spring {name} turned exactly {value} years old.",
            "The present age of {name} is {value} years.",
        ),
        ("How old is {name}?", "What is the age of {name}?"),
    ),
    "thing": Relation(
        (
            "{name} recently bought a {value} downtown.",
            "Everybody admires how {name} owns a {value}.",
            "The favourite possession of {name} is a {value}.",
        ),
        ("What does {name} own?", "Which thing belongs to {name}?"),
    ),
    "dog": Relation(
        (
            "{name} has a little dog called {value}.",
            "The faithful dog of {name} is named {value}.",
            "Every evening {name} walks a dog named {value}.",
        ),
        ("What is the dog of {name} called?", "What is the name of the dog of {name}?"),
    ),
    "boss": Relation(
        (
            "{name} takes daily orders from {value}.",
            "The manager supervising {name} is {value} now.",
            "At the office {name} reports directly to {value}.",
        ),
        ("Who is the boss of {name}?", "Who supervises {name}?"),
    ),
}
NAME_RELATIONS = frozenset({"place", "dog", "boss"})


@dataclass(frozen=True)
class Passage:
    """A context and one (question, answer) pair per fact, in random order."""

    context: str
    questions: tuple[tuple[str, str], ...]


def is_heldout(name: str) -> bool:
    """Whether a name belongs to the held-out split."""
    return zlib.crc32(name.encode()) % 10 == 0


def random_name(rng: random.Random) -> str:
    """Two syllables, capitalised."""
    return (rng.choice(SYLLABLES) + rng.choice(SYLLABLES)).capitalize()


def _new_name(rng: random.Random, split: Split, used_starts: set[str]) -> str:
    """A name of `split` whose first syllable is not in `used_starts` yet."""
    while True:
        name = random_name(rng)
        if name[:3] not in used_starts and is_heldout(name) == (split == "heldout"):
            used_starts.add(name[:3])
            return name


def _value(rng: random.Random, relation: str, split: Split, used_starts: set[str]) -> str:
    if relation in NAME_RELATIONS:
        return _new_name(rng, split, used_starts)
    if relation == "job":
        return rng.choice(JOBS)
    if relation == "age":
        return str(rng.randint(10, 99))
    return f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}"


def make_passage(
    rng: random.Random, *, facts: int = 4, split: Split = "train", relations: int | None = None
) -> Passage:
    """Draw one passage.

    Args:
        rng: source of all randomness; the same state gives the same passage.
        facts: facts in the passage, 1 to 18. People: one per fact up to 3, then 3 (4 above 4
            facts).
        split: `train` or `heldout` names.
        relations: draw from only so many of the six, so that facts of one kind have to be told
            apart; None draws from all.
    """
    names = list(RELATIONS)
    if relations is not None:
        names = rng.sample(names, relations)
    if not 1 <= facts <= 3 * len(names):
        raise ValueError(f"make_passage: facts={facts}, expected 1 to {3 * len(names)}")
    used_starts: set[str] = set()
    n_people = min(facts, 3) if facts <= 4 else 4
    people = [_new_name(rng, split, used_starts) for _ in range(n_people)]
    pairs = [(person, rng.choice(names)) for person in people]
    rest = [(p, r) for p in people for r in names if (p, r) not in pairs]
    rng.shuffle(rest)
    pairs += rest[: facts - len(pairs)]
    rng.shuffle(pairs)
    triples = [(p, r, _value(rng, r, split, used_starts)) for p, r in pairs]
    context = " ".join(
        rng.choice(RELATIONS[r].statements).format(name=p, value=v) for p, r, v in triples
    )
    questions = [(rng.choice(RELATIONS[r].questions).format(name=p), v) for p, r, v in triples]
    rng.shuffle(questions)
    return Passage(context, tuple(questions))


def make_examples(
    count: int, *, seed: int, facts: int = 4, split: Split = "heldout"
) -> list[Example]:
    """`count` examples, one question per passage, reproducible from `seed`."""
    rng = random.Random(seed)
    examples = []
    for i in range(count):
        passage = make_passage(rng, facts=facts, split=split)
        question, answer = passage.questions[0]
        examples.append(
            Example(
                id=f"testbed-{split}-{seed}-{i}",
                context=passage.context,
                question=question,
                answers=(answer,),
            )
        )
    return examples


def main() -> None:
    """Print a few examples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--facts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "heldout"), default="heldout")
    args = parser.parse_args()
    for example in make_examples(args.count, seed=args.seed, facts=args.facts, split=args.split):
        print(f"{example.context}\n  {example.question} -> {example.answers[0]}")


if __name__ == "__main__":
    main()
