"""Text to latent `[B, M, d_z]`: an encoder that starts from a pretrained LM, and one on raw bytes.

Both end in an RMS-normalised latent: the quantiser's groups then share one scale of values.
Shapes: B texts, T positions, M latents, D the encoder's width.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latentwire_fast.config.schema import EncoderConfig
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.encoders.base import Texts, check_length, rms_normalize
from latentwire_fast.models.encoders.byte import ByteEncoder
from latentwire_fast.models.poolers.selected import PositionSelector, Selection
from latentwire_fast.models.poolers.spans import pool_spans
from latentwire_fast.prompts.batch import PromptBatch, collate
from latentwire_fast.prompts.builder import Prompt, PromptBuilder, Turn, encoded_text


class LMEncoder(nn.Module):
    """A causal LM that reads the text, and a pooler that makes M latents of its hidden states.

    `queries`: M learned tokens follow the text; their last hidden states become the latents (the
    in-context autoencoder of ICAE, arXiv:2307.06945). `spans`: the text's hidden states are
    averaged over M contiguous spans (as ARC-Encoder pools, arXiv:2510.20535). `selected`: the
    latents stand at M of the text's own positions (`selection.py`).

    With `rehearsals`, queries behind the text first say what the LM would say: each pass gives
    every query the distribution that its predecessor came to, as an expected embedding, so that
    after r passes the first r tokens are what greedy decoding would write (Jacobi iteration; no
    gradient). The encoder then starts from all that the LM knows, not from its next token alone:
    with 3 passes the Llama reader was at its text score after 210 steps, without at a third of it.

    Args:
        core: the LM without its head; trained unless `config.frozen`.
        tokenizer: its tokenizer. The text is laid out as a prompt of that LM, which is what it
            knows.
    """

    table_parameters = ("memory", "query_offsets")
    pretrained_modules = ("core",)

    def __init__(
        self, core: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EncoderConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.core = core.requires_grad_(not config.frozen)
        self.prompts = PromptBuilder(tokenizer)
        self.tokenizer = tokenizer
        width = core.config.hidden_size
        embedding = cast(nn.Embedding, core.get_input_embeddings())
        scale = embedding.weight.detach().float().std().item()
        self.selector: PositionSelector | None = None
        if config.pooling == "selected":
            self.selector = PositionSelector(
                layers=core.config.num_hidden_layers, width=width, latents=config.latents
            )
        elif config.pooling != "spans":
            # Queries that start as the anchor's last token already hold the LM's idea of an answer.
            start = embedding.weight[self.prompts.anchor_ids[-1]].detach().float()
            noise = torch.randn(config.latents, width) * (0.3 * scale)
            self.memory = nn.Parameter(start + noise)
        if config.rehearsals:
            if config.pooling != "queries" or not core.config.tie_word_embeddings:
                raise ConfigError(
                    "rehearsals need pooling='queries' and an encoder LM with tied embeddings"
                )
            self.query_offsets = nn.Parameter(torch.zeros(config.latents, width))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.d_z)

    def check_length(self, context: str, question: str | None = None) -> None:
        """Raise unless the encoder reads all of a text: `forward` cuts the context of what is
        longer.

        Raises:
            DataError: more than `max_tokens`.
        """
        length = len(self.prompts.text_ids(encoded_text(context, question)))
        check_length(length, self.config.max_tokens, "tokens")

    def forward(self, contexts: Texts, questions: Texts | None = None) -> Tensor:
        """Latents `[B, M, d_z]` fp32 of contexts, or of contexts with questions (pure mode)."""
        if self.selector is not None:
            return self.select(contexts, questions)[0]
        prompts = self._prompts(contexts, questions)
        if self.config.pooling == "spans":
            batch = self._collate(prompts, None)
            hidden_BTD = self.core(**batch.model_inputs(), use_cache=False).last_hidden_state
            return self._latent(pool_spans(hidden_BTD, batch.lengths_B, self.config.latents))
        for prompt in prompts:
            prompt.latent_at = len(prompt.ids)
        queries_BMD = self.memory.expand(len(prompts), -1, -1)
        for _ in range(self.config.rehearsals):
            with torch.no_grad():
                said_BMD = self._rehearse(self._read(prompts, queries_BMD))
            queries_BMD = torch.cat([queries_BMD[:, :1], said_BMD], 1) + self.query_offsets
        return self._latent(self._read(prompts, queries_BMD))

    def select(self, contexts: Texts, questions: Texts | None = None) -> tuple[Tensor, Selection]:
        """Latents `[B, M, d_z]` fp32, and the positions that they stand at: of the text alone,
        counted from its first token, where `text_ends` counts from.

        Raises:
            ConfigError: the encoder's pooling selects no positions.
        """
        if self.selector is None:
            raise ConfigError(f"pooling={self.config.pooling!r} selects no positions")
        prompts = self._prompts(contexts, questions)
        batch = self._collate(prompts, None)
        output = self.core(**batch.model_inputs(), use_cache=False, output_hidden_states=True)
        start = self.prompts.content_start
        selection = self.selector(
            [hidden_BTD[:, start:] for hidden_BTD in output.hidden_states],
            self._choosable(prompts, batch)[:, start:],
        )
        return self._latent(selection.states_BMD), selection

    def text_ends(self, context: str, question: str | None = None) -> list[int]:
        """Index of the character behind each token of the text that is read."""
        ends = self.prompts.text_ends(encoded_text(context, question))
        if question is None:
            return ends[: self.config.max_tokens]
        return self._fit(ends, ends, context)

    def _fit(self, tokens: list[int], ends: list[int], context: str) -> list[int]:
        """Those of a pure-mode text's tokens that are read, given where they end: the context is
        cut and the question stays."""
        limit = self.config.max_tokens
        question = bisect_right(ends, len(encoded_text(context, None)))  # its first token
        kept = max(0, question - max(0, len(tokens) - limit))
        return [*tokens[:kept], *tokens[question:]][:limit]

    def _choosable(self, prompts: Sequence[Prompt], batch: PromptBatch) -> Tensor:
        """Mask `[B, T]` of the positions that hold the text itself, without its label."""
        start = self.prompts.content_start
        label = len(self.prompts.label_ids)
        column_T = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)
        stop_B1 = torch.tensor([[start + p.content] for p in prompts], device=column_T.device)
        # an empty context has no position but its label's
        first_B1 = torch.minimum(torch.full_like(stop_B1, start + label), stop_B1 - 1)
        return (column_T >= first_B1) & (column_T < stop_B1)

    def _latent(self, pooled_BMD: Tensor) -> Tensor:
        return rms_normalize(self.project(self.norm(pooled_BMD.float())).float())

    def _prompts(self, contexts: Texts, questions: Texts | None) -> list[Prompt]:
        prompts = []
        for i, context in enumerate(contexts):
            if questions is None:
                prompt = self.prompts.build_context(context, max_tokens=self.config.max_tokens)
            else:
                text = encoded_text(context, questions[i])
                ids = self.prompts.text_ids(text)
                if len(ids) > self.config.max_tokens:
                    ids = self._fit(ids, self.prompts.text_ends(text), context)
                prompt = self.prompts.build([Turn(questions[i])], context=context, user_ids=ids)
            prompts.append(prompt)
        return prompts

    def _collate(self, prompts: Sequence[Prompt], queries: Tensor | None) -> PromptBatch:
        embedding = cast(nn.Embedding, self.core.get_input_embeddings())
        return collate(prompts, embedding=embedding, pad_id=self.prompts.eos_id, prefixes=queries)

    def _read(self, prompts: Sequence[Prompt], queries_BMD: Tensor) -> Tensor:
        """Last hidden states `[B, M, D]` of the queries."""
        batch = self._collate(prompts, queries_BMD)
        hidden_BTD = self.core(**batch.model_inputs(), use_cache=False).last_hidden_state
        rows, columns = batch.places_P2.unbind(1)
        return hidden_BTD[rows, columns].view(queries_BMD.shape)

    def _rehearse(self, hidden_BMD: Tensor) -> Tensor:
        """Expected embeddings `[B, M - 1, D]` of what all queries but the last predict."""
        weight = cast(nn.Embedding, self.core.get_input_embeddings()).weight
        return (hidden_BMD[:, :-1] @ weight.T).softmax(-1) @ weight


Encoder = LMEncoder | ByteEncoder
