"""Prompts of the harness's requests with a latent in the place of their context part."""

from __future__ import annotations

from collections.abc import Sequence

from latentwire_fast.config.schema import Mode
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.harness.context_payloads import Key
from latentwire_fast.evaluation.harness.requests import RequestParts, whole_question
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.reader import Reader


class RequestPrompts:
    """Builds prompts of one reader.

    In context mode the harness's text stays as it is around the latent. In pure mode the latent
    stands for the whole request, and the prompt is the one that the run was trained with.

    Args:
        reader: is asked.
        mode: what a latent stands for.
        head: how many of a prompt's first ids a deep prefix holds already.
    """

    def __init__(self, reader: Reader, mode: Mode, *, head: int = 0) -> None:
        self.reader = reader
        self.mode = mode
        self._builder = builder = reader.prompts
        self._trained = builder.build([Turn("")], context=None, latent=mode)
        self._head = head

    def key(self, parts: RequestParts) -> Key:
        """What is encoded for a request."""
        if self.mode == "context":
            return parts.context, None
        return parts.context, whole_question(parts, anchor=self._builder.anchor)

    def prompt(self, parts: RequestParts, continuation: str | None = None) -> Prompt:
        """The prompt of a request; the tokens of a continuation are targets.

        Raises:
            ConfigError: context mode, and a deep prefix that holds another beginning than this.
        """
        prompt = Prompt()
        if self.mode == "pure":
            prompt.add(self._trained.ids)
            prompt.latent_at = self._trained.latent_at
            self._add(prompt, "", continuation)
        else:
            prompt.add(self._before(parts.before))
            prompt.latent_at = len(prompt.ids)
            prompt.add(self._builder.after_prefix_ids)
            self._add(prompt, parts.after, continuation)
        return prompt

    def _add(self, prompt: Prompt, after: str, continuation: str | None) -> None:
        """Add what stands behind the latent, and the continuation as targets.

        As in the harness, spaces at the end of the text belong to the continuation, which begins
        where the tokens of the text before it end.
        """
        own = after.rstrip(" ")
        ids = self._builder.template_ids(own)
        prompt.add(ids, content=True)
        if continuation is not None:
            whole = self._builder.template_ids(own + after[len(own) :] + continuation)
            prompt.add(whole[len(ids) :], target=True)

    def _before(self, text: str) -> Sequence[int]:
        """The ids before the latent, with the BOS token that the run's own prompts begin with."""
        ids = self._builder.template_ids(text)
        trained = self._trained.ids[: self._trained.latent_at]
        bos = self.reader.tokenizer.bos_token_id
        if bos is not None and trained[:1] == [bos] and ids[:1] != [bos]:
            ids = [bos, *ids]
        if ids != trained:
            self._explain(text, trained)
        return ids

    def _explain(self, text: str, trained: Sequence[int]) -> None:
        """Say, or raise where nothing can come of it, that the latent is in an unknown place."""
        tokenizer = self.reader.tokenizer
        learned = tokenizer.decode([*trained])
        message = (
            f"reader {self.reader.name!r} learned to read payloads behind "
            f"{learned!r}, and in this request the text before is {text[-60:]!r}"
        )
        if self._head:
            raise ConfigError(
                f"{message}; its deep prefix holds those tokens, so the task's doc_to_text must "
                "begin with them"
                + (
                    ", and --apply_chat_template must be given"
                    if tokenizer.chat_template
                    else ", without few-shot examples"
                )
            )
        self.reader.warn_once("harness", f"{message}: answers may be worse than they could be")
