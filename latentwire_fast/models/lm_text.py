"""A batch of texts before an encoder's LM: all that a pooler can see of them.

Shapes: B texts, T positions, M queries, D the LM's width, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from latentwire_fast.errors import ConfigError
from latentwire_fast.files.tensor_cache import TensorCache, digest_of, find_all
from latentwire_fast.models.token_states import StatesFacts, TokenStates
from latentwire_fast.prompts.batch import PromptBatch, collate
from latentwire_fast.prompts.builder import Prompt, PromptBuilder
from latentwire_fast.readers.embeddings import embedding_size, input_embedding
from latentwire_fast.readers.logits import LogitTransform


@dataclass(frozen=True, kw_only=True)
class LMFacts(StatesFacts):
    """Facts of an LM that a pooler is built for.

    Attributes:
        anchor_D: fp32 embedding of the token behind which the LM expects an answer to begin.
        embedding_std: standard deviation of the embeddings' values.
        logits: what the LM does to its output embedding's results.
        tied: whether the LM's input embeddings are its output embeddings.
    """

    anchor_D: Tensor
    embedding_std: float
    logits: LogitTransform
    tied: bool

    @classmethod
    def of(
        cls, core: PreTrainedModel, prompts: PromptBuilder, *, latents: int, source: str
    ) -> LMFacts:
        """The facts of an LM without its head.

        Raises:
            ConfigError: its embeddings are of another width than its layers (as OPT-350M's are).
        """
        embedding = input_embedding(core)
        width, config = embedding.weight.shape[1], core.config.get_text_config()
        if width != config.hidden_size:
            raise ConfigError(
                f"encoder LM {source!r} has embeddings of width {width} and layers of width "
                f"{config.hidden_size}, which poolers do not know; take another LM (--encoder)"
            )
        anchor = torch.tensor(prompts.anchor_ids[-1], device=embedding.weight.device)
        return cls(
            latents=latents,
            width=width,
            layers=config.num_hidden_layers,
            # On the CPU, where queries are drawn also for an LM on a GPU: the same on all machines.
            anchor_D=embedding(anchor).detach().float().cpu(),
            embedding_std=embedding_size(embedding).std,
            logits=LogitTransform.declared(config),
            tied=bool(config.tie_word_embeddings),
            source=source,
        )


class LMText(TokenStates):
    """Texts as prompts of an LM. Each of its methods is one pass of the LM over all of them.

    Args:
        core: the LM without its head.
        prompts: one per text, by its builder.
        cache: of the states of a frozen LM; None computes them each time.
    """

    def __init__(
        self,
        core: PreTrainedModel,
        builder: PromptBuilder,
        prompts: Sequence[Prompt],
        *,
        cache: TensorCache | None = None,
    ) -> None:
        self.last_layer = core.config.num_hidden_layers
        self._core = core
        self._builder = builder
        self._prompts = prompts
        self._cache = cache

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def embedding(self) -> nn.Embedding:
        """The LM's input embeddings, `[V, D]`."""
        return input_embedding(self._core)

    def hidden(self) -> tuple[Tensor, Tensor]:
        """Last hidden states `[B, T, D]` of the whole prompts, padded on the right, and the real
        length of each `[B]`."""
        states = self._states((self.last_layer,))
        return states[0], self._collate(self._prompts).lengths_B

    def layers(self, numbers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Hidden states `[B, T, D]` of these layers, 0 for the embeddings, and a mask `[B, T]` of
        the positions that hold the text itself, without its label.

        Positions count from the text's first token, where an encoder's `text_ends` counts from.
        """
        start = self._builder.content_start
        states = [states_BTD[:, start:] for states_BTD in self._states(numbers)]
        return states, self._is_text(self._collate(self._prompts))[:, start:]

    def _states(self, numbers: Sequence[int]) -> list[Tensor]:
        """Hidden states `[B, T, D]` of these layers, of whole prompts padded on the right."""
        if self._cache is None:
            return self._run(self._prompts, numbers)

        def compute(missing: list[int]) -> list[Tensor]:
            prompts = [self._prompts[i] for i in missing]
            states_SBTD = torch.stack(self._run(prompts, numbers))
            return [states_SBTD[:, b, : len(p.ids)] for b, p in enumerate(prompts)]

        keys = [digest_of([prompt.ids, *numbers]) for prompt in self._prompts]
        device = self.embedding.weight.device
        rows = [row_STD.transpose(0, 1) for row_STD in find_all(self._cache, keys, compute)]
        states_BTSD = pad_sequence(rows, batch_first=True).to(device)
        return list(states_BTSD.unbind(2))

    def _run(self, prompts: Sequence[Prompt], numbers: Sequence[int]) -> list[Tensor]:
        batch = self._collate(prompts)
        if list(numbers) == [self.last_layer]:
            return [self._core(**batch.model_inputs(), use_cache=False).last_hidden_state]
        output = self._core(**batch.model_inputs(), use_cache=False, output_hidden_states=True)
        return [output.hidden_states[i] for i in numbers]

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
