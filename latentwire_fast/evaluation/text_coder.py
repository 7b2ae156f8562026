"""A text as bytes, and back, by what a reader expects: the shortest form that it knows of a text.

The reader gives each next token a probability; the range coder makes of the true ones about
`sum of -log2 p` bits (Deletang et al., "Language modeling is compression", arXiv:2309.10668). The
text stands where a prompt has it: what is before it there costs nothing, and what may follow it
there ends it.

**Decoding needs the logits bit for bit as they were when the text was encoded**: the same weights
on the same machine with the same libraries, read one token at a time on both sides.

Shapes: V vocabulary; G groups of W tokens each, G * W >= V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentwire_fast.config.schema import Mode
from latentwire_fast.errors import PayloadError
from latentwire_fast.prompts.builder import (
    CONTEXT_LABEL,
    Prompt,
    Turn,
    context_text,
    question_text,
)
from latentwire_fast.readers.decoding_cache import decoding_cache
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.target_scores import PASS_LOGITS
from latentwire_fast.wire import range_coder
from latentwire_fast.wire.frequencies import whole_frequencies
from latentwire_fast.wire.range_stream import StreamDecoder

MOST_TOKENS = 2**17  # of a decoded text
# The first symbol says which token ends the text. Nearly always it is the first of `ends`.
_END_ROW = [0, 15 * range_coder.TOTAL // 16, range_coder.TOTAL]
_LEAST_WEIGHT = 1e-30  # no group of tokens has none


class TextCoder:
    """Codes texts by one reader.

    Args:
        mode: what the texts are: contexts, whose label stands before them and costs nothing, or in
            pure mode the whole user's part of a prompt.

    Attributes:
        ends: the token that stands behind a text in a prompt, and the one that ends an answer. A
            text ends with the more likely of the two; not with the first if it holds that itself.
    """

    def __init__(self, reader: Reader, *, mode: Mode) -> None:
        builder = reader.prompts
        self.reader, self.mode = reader, mode
        self._label = [*builder.label_ids] if mode == "context" else []
        self._head = [*builder.build_context("", max_tokens=0).ids, *self._label]
        if mode == "context":
            behind = builder.text_ids(question_text("?"))
        else:
            prompt = builder.build([Turn("")], context=None, user_ids=[])
            behind = prompt.ids[builder.content_start :]
        self.ends = (*behind[:1], builder.eos_id)[0], builder.eos_id
        self._width = math.isqrt(reader.vocabulary - 1) + 1  # W

    # --- tokens ---------------------------------------------------------------------------------

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text that are coded."""
        whole = texts if self.mode == "pure" else [context_text(text) for text in texts]
        found = self.reader.prompts.text_ids_of_many([*whole])
        return [ids[len(self._label) :] for ids in found]

    def text(self, ids: Sequence[int]) -> str:
        """The text of such tokens. It is the one that they were made of where the tokenizer loses
        nothing."""
        whole = str(
            self.reader.tokenizer.decode(
                [*self._label, *ids],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
        )
        return whole if self.mode == "pure" else whole.removeprefix(f"{CONTEXT_LABEL} ")

    def positions(self, ids: Sequence[int]) -> int:
        """How many positions the reader needs to code so many tokens."""
        return len(self._head) + len(ids) + 1

    # --- how many bits --------------------------------------------------------------------------

    @torch.no_grad()
    def bits(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """`-log2 p` of each text's tokens and of its end, in one pass over the whole text.

        Args:
            rows: of `ids`.

        Raises:
            DataError: the reader has no positions for a text.
        """
        prompts = []
        for ids in rows:
            prompt = Prompt()
            prompt.add(self._head)
            prompt.add([*ids, self.ends[0]], target=True)
            prompts.append(prompt)
        longest = max((len(prompt.ids) for prompt in prompts), default=1)
        size = max(1, PASS_LOGITS // (self.reader.head_weight.shape[0] * longest))
        found: list[float] = []
        for start in range(0, len(prompts), size):
            chunk = rows[start : start + size]
            scores = self.reader.score(prompts[start : start + size])
            own, ends = [], []
            for hidden_nD, labels_n in scores.head.chunks(scores.hidden_ND, scores.labels_N):
                log_nV = scores.head.logits(hidden_nD).log_softmax(-1).double() / -math.log(2)
                own += log_nV.gather(1, labels_n.to(log_nV.device)[:, None])[:, 0].tolist()
                ends += log_nV[:, [*self.ends]].tolist()
            at = 0
            for ids in chunk:
                _, end_bits = self._end(ids, ends[at + len(ids)])
                found.append(math.fsum(own[at : at + len(ids)]) + end_bits)
                at += len(ids) + 1
        return found

    def _end(self, ids: Sequence[int], bits: Sequence[float]) -> tuple[int, float]:
        """Which of `ends` ends a text, and what that costs with the symbol that says so.

        Args:
            bits: what each of them costs behind the text.
        """
        costs = {
            which: bits[which] + math.log2(range_coder.TOTAL / (_END_ROW[which + 1] - begin))
            for which, begin in enumerate(_END_ROW[:2])
            if which or self.ends[0] not in ids
        }
        best = min(costs, key=lambda which: costs[which])
        return best, costs[best]

    # --- bytes ----------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, ids: Sequence[int]) -> bytes:
        """The bytes of a text's tokens: one step of the reader per token."""
        steps = _Steps(self.reader)
        symbols: list[int] = []
        rows: list[range_coder.Row] = []

        def add(token: int, tokens: _NextToken) -> None:
            group, place = divmod(token, self._width)
            symbols.extend((group, place))
            rows.extend((tokens.groups(), tokens.within(group)))

        expected = self._next(steps.read(self._head))
        for token in ids:
            add(token, expected)
            expected = self._next(steps.read([token]))
        which, _ = self._end(ids, [expected.bits(token) for token in self.ends])
        add(self.ends[which], expected)
        return range_coder.encode([which, *symbols], range_coder.Rows([_END_ROW, *rows]))

    @torch.no_grad()
    def decode(self, message: bytes) -> list[int]:
        """The tokens that `encode` made these bytes of: again one step of the reader per token.

        Raises:
            PayloadError: it made them of none, or with other logits.
        """
        stream, steps = StreamDecoder(message), _Steps(self.reader)
        end = self.ends[stream.symbol(_END_ROW)]
        most = min(MOST_TOKENS, self.reader.max_positions - len(self._head))
        ids: list[int] = []
        expected = self._next(steps.read(self._head))
        while True:
            group = stream.symbol(expected.groups())
            token = group * self._width + stream.symbol(expected.within(group))
            if token == end:
                break
            if token >= self.reader.vocabulary or len(ids) >= most:
                raise PayloadError(
                    "these bytes are no text that this reader coded; check that weights, machine "
                    "and libraries are those that it was encoded with"
                )
            ids.append(token)
            expected = self._next(steps.read([token]))
        stream.finish()
        return ids

    def _next(self, logits_V: Tensor) -> _NextToken:
        return _NextToken(logits_V, self._width)


class _NextToken:
    """What a reader expects next, as whole numbers: a token is coded as its group and its place in
    that. In one row of the range coder, a large vocabulary would have no room for differences."""

    def __init__(self, logits_V: Tensor, width: int) -> None:
        weights_V = logits_V.double().softmax(-1).cpu().numpy() + _LEAST_WEIGHT
        groups = -(-len(weights_V) // width)
        padded = np.full(groups * width, _LEAST_WEIGHT)
        padded[: len(weights_V)] = weights_V
        self._weights_GW = padded.reshape(groups, width)

    def groups(self) -> range_coder.Row:
        """The row of the groups."""
        return _row(self._weights_GW.sum(1))

    def within(self, group: int) -> range_coder.Row:
        """The row of a group's tokens."""
        return _row(self._weights_GW[group])

    def bits(self, token: int) -> float:
        """`-log2 p` of a token."""
        return -math.log2(self._weights_GW.flat[token])


def _row(weights_S: np.ndarray) -> range_coder.Row:
    ends: list[int] = np.cumsum(whole_frequencies(weights_S)).tolist()
    return [0, *ends]


class _Steps:
    """A reader that reads on: each call takes the next tokens, and gives the logits `[V]` behind
    them."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._head = reader, reader.output_head
        self._cache = decoding_cache(reader.model)

    def read(self, ids: Sequence[int]) -> Tensor:
        ids_1T = torch.tensor([[*ids]], device=self._reader.device)
        output = self._reader.backbone(
            input_ids=ids_1T, past_key_values=self._cache, use_cache=True
        )
        return self._head.logits(output.last_hidden_state[0, -1:])[0]
