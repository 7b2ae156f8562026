"""Natural Questions (Kwiatkowski et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.data.examples import Example
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import Row, clip, distinct, records


class NaturalQuestions(HubSet):
    """Search queries answered in a page of Wikipedia."""

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "google-research-datasets/natural_questions"
        columns: tuple[str, ...] = ("id", "document", "question", "annotations")
        subset: str | None = "default"
        is_streamed: bool = True

    def convert(self, row: Row) -> Example | None:
        """The annotated long answer as context, the short answers as answers; None without both."""
        for annotation in records(row["annotations"]):
            long = annotation["long_answer"]
            spans = records(annotation["short_answers"])
            answers = distinct(text for span in spans for text in span["text"])
            if not answers or long["start_token"] < 0:
                continue
            tokens = records(row["document"]["tokens"])[long["start_token"] : long["end_token"]]
            context = clip(" ".join(t["token"] for t in tokens if not t["is_html"]))
            return Example(str(row["id"]), context, row["question"]["text"].strip(), answers)
        return None
