"""The fixed token ids of prompts: what stands around the texts that users write."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from latentwire_fast.config.prompt import PromptConfig
from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.template import TemplatePieces, template_pieces
from latentwire_fast.prompts.text_tokens import TextTokenizer, control_ids


@dataclass(frozen=True)
class TemplateIds:
    """A chat template's pieces as token ids, with BOS and end as the configuration says.

    Attributes:
        opening: before the first user's text.
        after_prefix: behind a latent.
        to_assistant: between a user's text and the anchor of an answer.
        end: the token that ends an answer.
        to_user: between that and the next user's text.
        trims: whether the template takes white space off the ends of a user's text.
    """

    opening: list[int]
    after_prefix: list[int]
    to_assistant: list[int]
    end: int
    to_user: list[int]
    trims: bool

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, text: TextTokenizer, config: PromptConfig
    ) -> TemplateIds:
        """Those of a tokenizer.

        Args:
            text: its text tokenizer.

        Raises:
            ConfigError: it has not what the configuration asks for, or a chat template that cannot
                be used.
        """
        pieces = template_pieces(tokenizer, config)
        opening = _with_bos(text.template_ids(pieces.opening), tokenizer, config, pieces)
        after_prefix = _bos_after_prefix(tokenizer, config)
        end, to_user = _ends(tokenizer, text, pieces)
        header = "" if config.anchor == "none" else pieces.to_assistant
        if config.anchor == "chat" and not (pieces.is_chat and header.strip()):
            raise ConfigError(
                f"anchor='chat': tokenizer {tokenizer.name_or_path!r} has no chat template with a "
                "header for the assistant; take 'text' or 'none'"
            )
        to_assistant = text.template_ids(header)
        return cls(opening, after_prefix, to_assistant, end, to_user, pieces.trims)


def _with_bos(
    opening: list[int],
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
    pieces: TemplatePieces,
) -> list[int]:
    """The opening with or without the BOS token, as the configuration says."""
    wanted, bos_id = config.bos, tokenizer.bos_token_id
    if bos_id is None:
        return opening
    if wanted is False and opening[:1] == [bos_id]:
        return opening[1:]
    if (wanted or (wanted is None and not pieces.is_chat)) and opening[:1] != [bos_id]:
        return [bos_id, *opening]
    return opening


def _bos_after_prefix(tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> list[int]:
    if not config.append_bos_after_prefix:
        return []
    if tokenizer.bos_token_id is None:
        raise ConfigError(
            f"append_bos_after_prefix: tokenizer {tokenizer.name_or_path!r} has no BOS token; "
            "leave the option out"
        )
    return [tokenizer.bos_token_id]


def _ends(
    tokenizer: PreTrainedTokenizerBase, text: TextTokenizer, pieces: TemplatePieces
) -> tuple[int, list[int]]:
    """The token that ends an answer, and the ids between that and the next user's text."""
    controls = control_ids(tokenizer)
    after = text.template_ids(pieces.to_user)
    closing = _first_control(tokenizer, text.template_ids(pieces.closing), controls)
    end = _first_control(tokenizer, after, controls)
    if closing is None:
        return int(tokenizer.eos_token_id), after
    if end is None or end[1] != closing[1]:
        return closing[1], after
    return closing[1], after[end[0] + 1 :]


def _first_control(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], controls: Collection[int]
) -> tuple[int, int] | None:
    """Place and id of the first control token, if nothing but white space is before it."""
    for place, token in enumerate(ids):
        if token in controls:
            return place, token
        if str(tokenizer.decode([token])).strip():
            break
    return None
