"""XSum (Narayan et al. 2018): articles with a summary of one sentence."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.data.examples import Example
from latentwire_fast.data.row_files import RowFile
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import Row, cell, digest, text

_PROMPT = "A summary is"  # ends every input of the CSV copy that LLM-Merging (2024) gives out


class XSum(HubSet):
    """News articles to be summarised; scored by ROUGE-L."""

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "EdinburghNLP/xsum"
        columns: tuple[str, ...] = ("document", "summary")

    files = "rows with document and summary, or with input and target"
    metric = "rougeL"

    def from_file(self, row: Row, file: RowFile) -> Row:
        """`input` and `target` by the hub's names, without the prompt behind the article."""
        if "input" not in row:
            return row
        article = text(row, "input").removesuffix(_PROMPT)
        return {"document": article, "summary": cell(row, "target")}

    def convert(self, row: Row) -> Example | None:
        """The whole article as context; None without one, or without a summary."""
        article, summary = text(row, "document"), text(row, "summary")
        if not (article and summary):
            return None
        question = "What is this about, in one sentence?"
        return Example(digest(article, summary), article, question, (summary,))
