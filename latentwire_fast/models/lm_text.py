"""A batch of texts before an encoder's LM: all that a pooler can see of them.

Shapes: B texts, T positions, M queries, D the LM's width, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latentwire_fast.prompts.batch import PromptBatch, collate
from latentwire_fast.prompts.builder import Prompt, PromptBuilder


@dataclass(frozen=True)
class LMFacts:
    """Facts of an LM that a pooler is built for.

    Attributes:
        latents: M.
        width: D.
        layers: of the LM; its hidden states are one more, the embeddings.
        anchor_D: fp32 embedding of the token behind which the LM expects an answer to begin.
        embedding_std: standard deviation of the embeddings' values.
        tied: whether the LM's input embeddings are its output embeddings.
        source: where the LM comes from, for messages.
    """

    latents: int
    width: int
    layers: int
    anchor_D: Tensor
    embedding_std: float
    tied: bool
    source: str

    @classmethod
    def of(
        cls, core: PreTrainedModel, prompts: PromptBuilder, *, latents: int, source: str
    ) -> LMFacts:
        """The facts of an LM without its head."""
        weight_VD = cast(nn.Embedding, core.get_input_embeddings()).weight.detach()
        return cls(
            latents=latents,
            width=core.config.hidden_size,
            layers=core.config.num_hidden_layers,
            anchor_D=weight_VD[prompts.anchor_ids[-1]].float(),
            embedding_std=weight_VD.float().std().item(),
            tied=bool(core.config.tie_word_embeddings),
            source=source,
        )


class LMText:
    """Texts as prompts of an LM. Each of its methods is one pass of the LM over all of them.

    Args:
        core: the LM without its head.
        prompts: one per text, by its builder.
    """

    def __init__(
        self, core: PreTrainedModel, builder: PromptBuilder, prompts: Sequence[Prompt]
    ) -> None:
        self._core = core
        self._builder = builder
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def embedding(self) -> nn.Embedding:
        """The LM's input embeddings, `[V, D]`."""
        return cast(nn.Embedding, self._core.get_input_embeddings())

    def hidden(self) -> tuple[Tensor, Tensor]:
        """Last hidden states `[B, T, D]` of the whole prompts, padded on the right, and the real
        length of each `[B]`."""
        batch = self._collate(self._prompts)
        states_BTD = self._core(**batch.model_inputs(), use_cache=False).last_hidden_state
        return states_BTD, batch.lengths_B

    def all_layers(self) -> tuple[list[Tensor], Tensor]:
        """Hidden states `[B, T, D]` of every layer, embeddings first, and a mask `[B, T]` of the
        positions that hold the text itself, without its label.

        Positions count from the text's first token, where an encoder's `text_ends` counts from.
        """
        batch = self._collate(self._prompts)
        output = self._core(**batch.model_inputs(), use_cache=False, output_hidden_states=True)
        start = self._builder.content_start
        states = [states_BTD[:, start:] for states_BTD in output.hidden_states]
        return states, self._is_text(batch)[:, start:]

    def read_queries(self, queries_BMD: Tensor) -> Tensor:
        """Last hidden states `[B, M, D]` of input embeddings that follow each text."""
        prompts = [replace(prompt, latent_at=len(prompt.ids)) for prompt in self._prompts]
        batch = self._collate(prompts, queries_BMD)
        hidden_BTD = self._core(**batch.model_inputs(), use_cache=False).last_hidden_state
        rows, columns = batch.places_P2.unbind(1)
        return hidden_BTD[rows, columns].view(queries_BMD.shape)

    def _collate(self, prompts: Sequence[Prompt], queries: Tensor | None = None) -> PromptBatch:
        eos_id = self._builder.eos_id
        return collate(prompts, embedding=self.embedding, pad_id=eos_id, prefixes=queries)

    def _is_text(self, batch: PromptBatch) -> Tensor:
        start = self._builder.content_start
        label = len(self._builder.label_ids)
        column_T = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)
        stop_B1 = torch.tensor([[start + p.content] for p in self._prompts], device=column_T.device)
        # an empty context has no position but its label's
        first_B1 = torch.minimum(torch.full_like(stop_B1, start + label), stop_B1 - 1)
        return (column_T >= first_B1) & (column_T < stop_B1)
