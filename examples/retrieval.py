"""Questions answered from the passages that BM25 finds: as payloads of a store, beside their texts.

    python examples/retrieval_corpus.py testbed runs/corpus
    python -m latentwire_fast.encode --run runs/context --data passages=runs/corpus/corpus.jsonl \\
        --out runs/corpus/store
    python examples/retrieval.py --run runs/context --folder runs/corpus
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bm25s
import tyro

import latentwire_fast as lw
from latentwire_fast.data.passages import load_passages
from latentwire_fast.evaluation.metrics import f1
from latentwire_fast.files.text import read_text
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.serving.payload_batch import payloads_of
from latentwire_fast.wire.store import PayloadStore


class Way(NamedTuple):
    """How the reader gets the passages that were found: how many bytes a passage has, and the
    prefill of a question about several."""

    name: str
    bytes_of: Callable[[str], int]
    prefill: Callable[[str, list[str]], Any]


def search(texts: dict[str, str], questions: list[str], most: int) -> list[list[str]]:
    """The ids of the best `most` passages for each question, best first."""
    index, ids = bm25s.BM25(), [*texts]
    index.index(bm25s.tokenize([*texts.values()], show_progress=False), show_progress=False)
    asked = bm25s.tokenize(questions, show_progress=False)
    found = index.retrieve(asked, k=min(most, len(ids)), show_progress=False).documents
    return [[ids[number] for number in row] for row in found]


def main(
    run: Path,
    folder: Path,
    reader: str = "llama",
    k: tuple[int, ...] = (1, 3),
    questions: int = 100,
    max_new_tokens: int = 16,
) -> None:
    """Answer questions and print scores, bytes and times.

    Args:
        run: a finished run of context mode.
        folder: corpus.jsonl, questions.jsonl, and the store of the run's payloads.
        reader: who answers.
        k: how many passages are in a prompt.
        questions: how many are asked.
        max_new_tokens: of an answer.
    """
    model = lw.Interlingua.from_pretrained(run / "model")
    store = PayloadStore(folder / "store")
    store.check_model(model.digest)
    texts = load_passages(f"passages={folder / 'corpus.jsonl'}")
    lines = read_text(folder / "questions.jsonl").split("\n")
    asked = [json.loads(line) for line in lines][:questions]
    found = search(texts, [q["question"] for q in asked], max(k))

    llm = lw.Reader.load(model.cards[reader].source, name=reader)
    receiver, prompts = lw.Receiver.of(model, llm), llm.prompts

    def from_texts(question: str, ids: list[str]) -> Any:
        context = "\n".join(texts[i] for i in ids)
        return receiver.prefill([prompts.build([lw.Turn(question)], context=context)])

    def from_payloads(question: str, ids: list[str]) -> Any:
        prompt = prompts.build([lw.Turn(question)], context=None, latent=model.mode)
        # Texts that were cut into chunks have several payloads each.
        payloads = [one for i in ids for one in payloads_of(store[i])]
        return receiver.prefill([prompt], payloads=[payloads])

    ways = (
        Way("text", store.text_bytes, from_texts),
        Way("payload", lambda one: lw.wire.payload_bytes(store[one]), from_payloads),
    )
    decoding = DecodeOptions(max_new_tokens=max_new_tokens)
    print(f"{len(texts):,} passages, {len(asked):,} questions, reader {reader}")
    print("k  found  way      bytes  first token      F1")
    for count in k:
        ids = [row[:count] for row in found]
        hits = [bool({*row} & {*q["gold"]}) for row, q in zip(ids, asked, strict=True)]
        for way in ways:
            seconds, scores = [], []
            for question, row in zip(asked, ids, strict=True):
                start = time.perf_counter()
                first = way.prefill(question["question"], row)
                seconds.append(time.perf_counter() - start)
                answer = llm.decode(first.generate(decoding)[0])
                if question["answers"]:
                    scores.append(f1(answer, question["answers"]))
            size = statistics.mean(sum(map(way.bytes_of, row)) for row in ids)
            score = f"{100 * statistics.mean(scores):.1f}" if scores else "-"
            print(
                f"{count}  {100 * statistics.mean(hits):4.0f}%  {way.name:<7}  {size:5,.0f}  "
                f"{1e3 * statistics.median(seconds):8.1f} ms  {score:>6}"
            )


if __name__ == "__main__":
    tyro.cli(main)
