"""Natural Questions (Kwiatkowski et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentwire_fast.data.examples import Example
from latentwire_fast.data.row_files import RowFile
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import (
    Row,
    RowError,
    cell,
    clip,
    distinct,
    identifier,
    records_of,
    text,
    texts,
    whole,
)


class NaturalQuestions(HubSet):
    """Search queries answered in a page of Wikipedia.

    Its own files are JSON lines: the whole ones have `document_tokens`, the simplified ones
    `document_text`, in which spaces separate the tokens.
    """

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "google-research-datasets/natural_questions"
        columns: tuple[str, ...] = ("id", "document", "question", "annotations")
        subset: str | None = "default"
        is_streamed: bool = True

    files = "v1.0-simplified_nq-dev-all.jsonl.gz (questions without pages: nq_open=FILE)"

    def from_file(self, row: Row, file: RowFile) -> Row:
        """The columns of its own files, by the hub's names."""
        if "question_text" not in row:
            if "document" not in row and "answer" in row:
                raise RowError("no 'document': questions of NQ open have none; give nq_open=FILE")
            return row
        if "document_text" in row:
            words = text(row, "document_text", strip=False).split(" ")
            tokens = [{"token": w, "is_html": w.startswith("<") and w[-1] == ">"} for w in words]
        else:
            tokens = [
                {"token": text(t, "token"), "is_html": cell(t, "html_token")}
                for t in records_of(row, "document_tokens")
            ]
        return {
            "id": cell(row, "example_id"),
            "question": {"text": text(row, "question_text")},
            "document": {"tokens": tokens},
            "annotations": [_with_texts(a, tokens) for a in records_of(row, "annotations")],
        }

    def convert(self, row: Row) -> Example | None:
        """The annotated long answer as context, the short answers as answers; None without both."""
        for annotation in records_of(row, "annotations"):
            long = cell(annotation, "long_answer")
            spans = records_of(annotation, "short_answers")
            answers = distinct(found for span in spans for found in texts(span, "text"))
            start, end = whole(long, "start_token"), whole(long, "end_token")
            if not answers or start < 0:
                continue
            tokens = records_of(cell(row, "document"), "tokens")[start:end]
            words = (text(t, "token", strip=False) for t in tokens if not cell(t, "is_html"))
            question = text(cell(row, "question"), "text")
            return Example(identifier(row), clip(" ".join(words)), question, answers)
        return None


def _with_texts(annotation: Mapping[str, Any], tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """An annotation whose short answers have their texts."""
    spans = []
    for span in records_of(annotation, "short_answers"):
        found = tokens[whole(span, "start_token") : whole(span, "end_token")]
        spans.append({"text": [" ".join(t["token"] for t in found if not t["is_html"])]})
    return {"long_answer": cell(annotation, "long_answer"), "short_answers": spans}
