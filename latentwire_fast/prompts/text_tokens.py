"""Token ids of text that users wrote: whatever it spells, it stays text.

A tokenizer has *added tokens* beside those that its model makes: control tokens (`</s>`), and
others that a chat template gives a meaning although they are not declared special (`<think>`,
`<|User|>`). A text that spells one of them must not become it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from latentwire_fast.errors import ConfigError

Span = tuple[int, int]  # first character of a token, and the one behind it


def control_ids(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Every added token that is no white space, by id: what user text must not become.

    Some tokenizers keep runs of spaces or line breaks as added tokens; those are text.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {i: t.content for i, t in added if t.special or t.content.replace("▁", " ").strip()}


class TextTokenizer:
    """Tokenises what users wrote.

    Where a text spells an added token, it is cut behind the first character of that token, and the
    parts are tokenised apart.

    Args:
        tokenizer: a fast Hugging Face tokenizer.

    Raises:
        ConfigError: it is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"tokenizer {tokenizer.name_or_path!r} is none of the `tokenizers` library, which "
                "says where in the text its tokens stand; give a folder with a tokenizer.json"
            )
        self._controls = control_ids(tokenizer)
        self._unknown_id = tokenizer.unk_token_id
        self._tokenizer = _without_dummy_space(tokenizer)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.ids_of_many([text])[0]

    def ids_of_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, tokenised together."""
        if not texts:
            return []
        encoded: list[list[int]] = self._encode(texts)["input_ids"]
        return [
            ids if self._controls.keys().isdisjoint(ids) else [i for i, _ in self._cut(text)]
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def ends(self, text: str) -> list[int]:
        """Index of the character behind each token of `ids(text)`."""
        encoded = self._encode([text], spans=True)
        if self._controls.keys().isdisjoint(encoded["input_ids"][0]):
            return [end for _, end in encoded["offset_mapping"][0]]
        return [end for _, end in self._cut(text)]

    def template_ids(self, text: str) -> list[int]:
        """Token ids of a piece of a chat template, whose control tokens are meant."""
        if not text:
            return []
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _encode(self, texts: Sequence[str], *, spans: bool = False) -> Any:
        return self._tokenizer(
            [*texts],
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=spans,
            verbose=False,  # how long a text may be is not for the tokenizer to say
        )

    def _cut(self, text: str) -> list[tuple[int, int]]:
        """(id, end) of each token of a text that spells control tokens."""
        pieces, begins = [text], [0]
        while True:
            encoded = self._encode(pieces, spans=True)
            rows = [
                [*zip(ids, spans, strict=True)]
                for ids, spans in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            ]
            cuts = [[*self._places(piece, row)] for piece, row in zip(pieces, rows, strict=True)]
            if not any(cuts):
                return [
                    (token, begin + end)
                    for row, begin in zip(rows, begins, strict=True)
                    for token, (_, end) in row
                ]
            cut_pieces, cut_begins = [], []
            for piece, begin, places in zip(pieces, begins, cuts, strict=True):
                edges = [0, *places, len(piece)]
                cut_pieces += [piece[a:b] for a, b in pairwise(edges)]
                cut_begins += [begin + a for a in edges[:-1]]
            pieces, begins = cut_pieces, cut_begins

    def _places(self, piece: str, row: Sequence[tuple[int, Span]]) -> Iterator[int]:
        """Where to cut a piece: behind the first character of each control token in it."""
        for token, (start, end) in row:
            content = self._controls.get(token)
            if content is None:
                continue
            spelled = piece[start:end]
            first = start + len(spelled) - len(spelled.lstrip())  # it may have taken spaces in
            if token == self._unknown_id and content not in spelled:
                continue  # what the tokenizer does not know
            if len(spelled.strip()) > 1:
                yield first + 1


def _without_dummy_space(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or where it puts a space before every text, a copy that does not.

    A prompt is tokenised in pieces: with that space before each, the pieces would not be those of
    the whole.
    """
    backend = tokenizer.backend_tokenizer
    parts = _parts(backend.normalizer) + _parts(backend.pre_tokenizer)
    if not any(map(_puts_space, parts)):
        return tokenizer
    state = json.loads(backend.to_str())
    for place in ("normalizer", "pre_tokenizer"):
        state[place] = _spaceless(state[place])
    copy = type(backend).from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=copy, name_or_path=tokenizer.name_or_path)


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normalizer or a pre-tokenizer as the JSON of its parts."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return [*state.get("normalizers", ()), *state.get("pretokenizers", ())] or [state]


def _puts_space(part: dict[str, Any]) -> bool:
    return (
        (part["type"] == "Prepend" and part["prepend"] in ("▁", " "))
        or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        or (part["type"] == "ByteLevel" and bool(part.get("add_prefix_space")))
    )


def _spaceless(state: Any) -> Any:
    """The JSON of a normalizer or a pre-tokenizer without what puts a space before a text."""
    if state is None or state["type"] == "Prepend":
        return None if state is None or _puts_space(state) else state
    for key in ("normalizers", "pretokenizers"):
        if key in state:
            kept = (_spaceless(part) for part in state[key])
            state[key] = [part for part in kept if part is not None]
    if state["type"] == "Metaspace":
        state["prepend_scheme"] = "never"
    if state["type"] == "ByteLevel":
        state["add_prefix_space"] = False
    return state
