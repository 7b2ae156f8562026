"""A request of the harness, cut into what a payload stands for and what stays text.

The harness hands a model one text, and the document that the text was made from. The *context part*
is the value of one field of the document (`context`, unless told otherwise), where it stands in the
text for the last time: examples before it (few-shot) stay text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from latentwire_fast.errors import DataError
from latentwire_fast.prompts.builder import CONTEXT_LABEL

_QUESTION_LABEL = "Question:"


class RequestParts(NamedTuple):
    """A request's text: `before`, the context part, `after`.

    The spaces before the context part belong to it, as those behind `Context:` do in the prompts
    that a model is trained with.
    """

    before: str
    context: str
    after: str


def split_request(
    text: str, doc: Mapping[str, Any], *, field: str, task: str | None = None
) -> RequestParts:
    """The parts of a request's text.

    Args:
        doc: the document that it was made from.
        field: of the document, that holds the context part.
        task: its name, for messages.

    Raises:
        DataError: the document has no such text, or the request does not contain it.
    """
    where = "a request of the harness" if task is None else f"task {task!r}"
    context = doc.get(field)
    if not isinstance(context, str) or not context.strip():
        texts = sorted(key for key, value in doc.items() if isinstance(value, str))
        raise DataError(
            f"{where}: the document's field {field!r} holds no text that a payload could stand "
            f"for; give another with context_field=NAME (it has {texts}), or take mode=text"
        )
    context = context.strip()
    before, found, after = text.rpartition(context)
    if not found:
        raise DataError(
            f"{where}: the document's field {field!r} is not in the request word for word "
            f"(it begins with {context[:40]!r}, the request with {text[:40]!r}); name the field "
            "that is with context_field=NAME, or take mode=text"
        )
    return RequestParts(before.rstrip(" "), context, after)


def whole_question(parts: RequestParts, *, anchor: str) -> str:
    """What a latent of pure mode holds beside the context part: the rest of the request, without
    the labels that every prompt has.

    Args:
        anchor: the words that ask for the answer, such as `Answer:`.
    """
    before = parts.before.removesuffix(CONTEXT_LABEL).strip()
    after = parts.after.strip().removeprefix(_QUESTION_LABEL)
    after = (after.removesuffix(anchor) if anchor else after).strip()
    return f"{before}\n{after}".strip()
