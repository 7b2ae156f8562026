"""Gist tokens (Mu et al., 2023, arXiv:2304.08467): learned tokens behind a context, and a mask that
hides the context from all that follows. What a reader answers from is their keys and values.

Nothing is sent: it is a cache of one reader, which no other reader can use. It is the nearest
published method to compare latents with.

Shapes: B rows, T positions, G gist tokens, D the reader's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentwire_fast.errors import CheckpointError
from latentwire_fast.files.tensors import read_tensors
from latentwire_fast.prompts.batch import PromptBatch
from latentwire_fast.prompts.builder import Prompt, PromptBuilder, Turn, context_text
from latentwire_fast.readers.loading import GISTS
from latentwire_fast.readers.lora import ReaderLora
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.target_scores import TargetScores


class Gists(nn.Module):
    """The gist tokens of one reader, and the low-rank updates by which it learns to use them.

    Args:
        lora: attached to the reader.
        tokens_GD: their embeddings.
    """

    table_parameters: ClassVar[tuple[str, ...]] = ("tokens_GD",)

    def __init__(self, lora: ReaderLora, tokens_GD: Tensor) -> None:
        super().__init__()
        self.lora = lora
        self.tokens_GD = nn.Parameter(tokens_GD)

    @classmethod
    def fresh(cls, reader: Reader, lora: ReaderLora, count: int) -> Gists:
        """Tokens that begin as embeddings of the vocabulary, drawn at random."""
        weight_VD = reader.embedding.weight.detach()
        rows_G = torch.randint(len(weight_VD), (count,)).to(weight_VD.device)
        return cls(lora, weight_VD[rows_G].float().clone())

    def trained_state(self) -> dict[str, Tensor]:
        """Every tensor of them by name."""
        return {name: value.detach() for name, value in self.state_dict().items()}

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named parameters that receive gradients."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def save(self, folder: Path) -> None:
        """Write the updates as peft does, and the tokens beside them."""
        self.lora.save(folder)
        save_file({"tokens_GD": self.tokens_GD.detach().cpu().contiguous()}, folder / GISTS)

    @classmethod
    def load(cls, folder: Path, reader: Reader) -> Gists:
        """What `save` wrote, for the reader that it was trained with.

        Raises:
            CheckpointError: a file is missing or damaged, or of a reader of another width.
        """
        tokens_GD = read_tensors(folder / GISTS).get("tokens_GD")
        width = reader.embedding.weight.shape[1]
        if tokens_GD is None or tokens_GD.shape[1:] != (width,):
            raise CheckpointError(
                f"{folder / GISTS} has no gist tokens of width {width}; load the reader that they "
                "were trained for"
            )
        lora = ReaderLora.load(folder)
        lora.attach(reader)
        return cls(lora, tokens_GD.to(reader.device)).eval()

    # --- reading ----------------------------------------------------------------------------------

    def hidden(self, reader: Reader, prompts: Sequence[Prompt]) -> tuple[Tensor, PromptBatch]:
        """Last hidden states `[B, T, D]` of gist prompts, and the batch that they are of."""
        tokens_BGD = self.tokens_GD.expand(len(prompts), -1, -1)
        batch = reader.collate(prompts, prefixes=tokens_BGD)
        assert batch.embeds_BTD is not None
        ends = [prompt.latent_at or 0 for prompt in prompts]
        mask_B1TT = gist_mask(
            batch.embeds_BTD, start=context_start(reader.prompts), ends=ends, gists=self.count
        )
        output = reader.backbone(
            inputs_embeds=batch.embeds_BTD,
            attention_mask=mask_B1TT,
            position_ids=batch.positions_BT,
            use_cache=False,
        )
        return output.last_hidden_state, batch

    def target_hidden(self, reader: Reader, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Hidden states `[N, D]` at the positions that predict answer tokens, and those tokens."""
        hidden_BTD, batch = self.hidden(reader, prompts)
        return hidden_BTD[batch.rows_N, batch.cols_N], batch.labels_N

    @property
    def count(self) -> int:
        """How many gist tokens there are, G."""
        return len(self.tokens_GD)

    @torch.no_grad()
    def score(self, reader: Reader, prompts: Sequence[Prompt]) -> TargetScores:
        """Log-probabilities of the prompts' answer tokens, in one pass."""
        hidden_BTD, batch = self.hidden(reader, prompts)
        return TargetScores(
            hidden_ND=hidden_BTD[batch.rows_N, batch.cols_N],
            head=reader.output_head,
            labels_N=batch.labels_N,
            rows_N=batch.rows_N,
            step_N=batch.step_N,
            prompts=len(prompts),
            stop_ids=tuple(reader.stop_ids),
        )

    @torch.no_grad()
    def answers(self, reader: Reader, prompts: Sequence[Prompt], *, most: int) -> list[str]:
        """Greedy answers of at most so many tokens to prompts without one. Every token reads the
        whole prompt again: it is a baseline to score, and not to serve."""
        rows = [replace(p, ids=[*p.ids], is_target=[False] * len(p.ids)) for p in prompts]
        said: list[list[int]] = [[] for _ in rows]
        open_rows = list(range(len(rows)))
        for _ in range(most):
            hidden_BTD, batch = self.hidden(reader, [rows[i] for i in open_rows])
            last_B = batch.lengths_B.to(hidden_BTD.device) - 1
            picked_BD = hidden_BTD[torch.arange(len(open_rows), device=last_B.device), last_B]
            next_B = reader.output_head.logits(picked_BD).argmax(-1).tolist()
            for i, token in zip(open_rows, next_B, strict=True):
                said[i].append(token)
                rows[i].add([token])
            open_rows = [i for i in open_rows if said[i][-1] not in reader.stop_ids]
            if not open_rows:
                break
        return [reader.decode(ids) for ids in said]


def context_start(builder: PromptBuilder) -> int:
    """Index of a text prompt's first id of the context, behind its label."""
    return builder.content_start + len(builder.label_ids)


def gist_prompt(builder: PromptBuilder, turns: Sequence[Turn], context: str) -> Prompt:
    """A text prompt with the place of gist tokens behind its context."""
    prompt = builder.build(turns, context=context)
    length = len(builder.text_ids(context_text(context)))
    return replace(prompt, latent_at=builder.content_start + length)


def gist_mask(like_BTD: Tensor, *, start: int, ends: Sequence[int], gists: int) -> Tensor:
    """What is added to attention scores `[B, 1, T, T]`: each position reads those before it, and
    what stands behind the gist tokens reads no context.

    Args:
        like_BTD: embeddings, for the shape and the dtype.
        start: of the contexts. ends: of each: its gist tokens begin there.
    """
    size, device = like_BTD.shape[1], like_BTD.device
    place_T = torch.arange(size, device=device)
    is_seen_TT = place_T[:, None] >= place_T[None]
    end_B11 = torch.tensor(ends, device=device)[:, None, None]
    is_behind_BT1 = place_T[None, :, None] >= end_B11 + gists
    is_context_B1T = (place_T[None, None] >= start) & (place_T[None, None] < end_B11)
    is_seen_BTT = is_seen_TT & ~(is_behind_BT1 & is_context_B1T)
    mask_BTT = like_BTD.new_zeros(len(ends), size, size)
    return mask_BTT.masked_fill(~is_seen_BTT, torch.finfo(like_BTD.dtype).min)[:, None]
