"""Whether a causal LM and its tokenizer can be used at all: found out when they are loaded."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import PromptBuilder
from latentwire_fast.readers.embeddings import input_embedding
from latentwire_fast.readers.logits import LogitTransform

# By what logits may differ from those that we compute, relative to their size: rounding.
_TOLERANCE = {torch.float32: 1e-4}
_TOLERANCE_OF_HALVES = 2e-2


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """A causal LM without its output embedding."""
    inner = model.base_model
    if inner is model:  # Llama 4's text model names its inner model in another way than it says
        inner = getattr(model, "model", model)
    return inner


def check_vocabulary(tokenizer: Tokenizer, model: PreTrainedModel, *, name: str) -> None:
    """Raise unless the model has an embedding for every token that a text may have.

    Control tokens are passed over: some models have a tokenizer with those of their larger kin.

    Raises:
        ConfigError: tokens beyond the embedding; their look-up would end the process on a GPU.
    """
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = {i: t for t, i in tokenizer.get_vocab().items() if i >= rows and i not in control}
    if beyond:
        first = min(beyond)
        raise ConfigError(
            f"{name}: its tokenizer has {len(beyond)} tokens that the model does not know (the "
            f"first is {beyond[first]!r}, number {first} of {rows}); give the tokenizer that "
            "belongs to the model, or save the model after `resize_token_embeddings`"
        )


def check_prompt_ids(prompts: PromptBuilder, model: PreTrainedModel, *, name: str) -> None:
    """Raise unless the model has an embedding for every control token that prompts are made of.

    Raises:
        ConfigError: one is beyond the embedding.
    """
    rows = input_embedding(model).weight.shape[0]
    beyond = sorted(i for i in prompts.control_ids_used if i >= rows)
    if beyond:
        token = prompts.tokenizer.convert_ids_to_tokens(beyond[0])
        raise ConfigError(
            f"{name}: its prompts need token {token!r}, number {beyond[0]}, and the model knows "
            f"{rows}; give the tokenizer that belongs to the model, or one without that chat "
            "template or EOS"
        )


@torch.no_grad()
def check_logits(model: PreTrainedModel, ids_BT: Tensor, *, name: str) -> LogitTransform:
    """What a model does to its logits behind the output embedding, tried on a few tokens.

    Raises:
        ConfigError: NaN or infinity; no output embedding over the last hidden states, or logits
            that are not scaled or capped as the configuration says.
    """
    family = model.config.model_type
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"{name} ({family}) has no output embedding; give a causal LM")
    logits = model(input_ids=ids_BT, use_cache=False).logits.float()
    hidden = backbone_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    if not bool(logits.isfinite().all()):
        raise ConfigError(
            f"{name} ({family}) computes NaN or infinity: its weights are damaged, or overflow in "
            f"{model.dtype}; another dtype may do"
        )
    raw = head(hidden).float()
    declared = LogitTransform.declared(model.config.get_text_config(decoder=True))
    # Some models do not do what their configuration says; where rounding hides it, they do.
    errors = {t: float((t(raw) - logits).norm()) for t in (declared, LogitTransform())}
    best = min(errors, key=errors.__getitem__)
    tolerance = _TOLERANCE.get(model.dtype, _TOLERANCE_OF_HALVES) * float(logits.norm())
    if errors[declared] <= max(tolerance, errors[best]):
        best = declared
    if errors[best] > tolerance:
        raise ConfigError(
            f"{name} ({family}) does something to its logits after the output embedding that is "
            "neither a scale nor a cap of its configuration; choose another reader"
        )
    return best


def learns_positions(model: PreTrainedModel) -> bool:
    """Whether a model has a table of positions, beyond which it cannot read (as GPT-2 has); others
    compute them."""
    rows = input_embedding(model).weight.shape[0]
    tables = (m for m in backbone_of(model).modules() if isinstance(m, nn.Embedding))
    # What has as many rows as there are tokens is a second embedding of these (as Gemma 3n has).
    return any(table.weight.shape[0] != rows for table in tables) or _computes_a_table(model)


def _computes_a_table(model: PreTrainedModel) -> bool:
    """Whether it looks positions up in a table that it computes once (as GPT-J does), or cuts one
    of a fixed length (as MPT does)."""
    config = model.config.get_text_config(decoder=True)
    limit = position_limit(config)
    if limit is None or getattr(config, "model_type", "") == "mpt":
        return limit is not None
    return any(
        buffer.dim() > 1 and limit in buffer.shape for buffer in backbone_of(model).buffers()
    )


def position_limit(config: Any) -> int | None:
    """How many positions a model was made for, by its configuration; None where it says nothing."""
    names = ("max_position_embeddings", "max_seq_len")
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
