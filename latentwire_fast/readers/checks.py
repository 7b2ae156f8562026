"""Whether a causal LM and its tokenizer can be used at all: found out when they are loaded."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import PromptBuilder

# What configurations call a cap or a factor on the logits. Where it is weak, the logits of a prompt
# hardly show it.
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)


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
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    beyond = sorted(i for i in prompts.control_ids_used if i >= rows)
    if beyond:
        token = prompts.tokenizer.convert_ids_to_tokens(beyond[0])
        raise ConfigError(
            f"{name}: its prompts need token {token!r}, number {beyond[0]}, and the model knows "
            f"{rows}; give the tokenizer that belongs to the model, or one without that chat "
            "template or EOS"
        )


def check_logits(model: PreTrainedModel, ids_BT: Tensor, *, name: str) -> None:
    """Raise unless the logits are finite, and the output embedding of the last hidden states.

    Raises:
        ConfigError: NaN or infinity, or logits that are capped or scaled.
    """
    config = model.config.get_text_config()
    declared = [key for key in _LOGIT_TRANSFORMS if (getattr(config, key, None) or 1) != 1]
    with torch.no_grad():
        logits = model(input_ids=ids_BT, use_cache=False).logits
        hidden = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        ours = model.get_output_embeddings()(hidden)
    if not bool(logits.isfinite().all()):
        raise ConfigError(
            f"{name} ({model.config.model_type}) computes NaN or infinity: its weights are "
            f"damaged, or overflow in {model.dtype}; another dtype may do"
        )
    if declared or not torch.allclose(logits.float(), ours.float(), rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"{name} ({model.config.model_type}) transforms its logits after the output embedding "
            f"({', '.join(declared) or 'soft-capping or scaling'}); such models are not supported "
            "as readers"
        )


def learns_positions(model: PreTrainedModel) -> bool:
    """Whether a model has a table of positions, beyond which it cannot read (as GPT-2 has); others
    compute them."""
    tokens = model.get_input_embeddings()
    modules = model.base_model.modules()
    return any(isinstance(module, nn.Embedding) and module is not tokens for module in modules)
