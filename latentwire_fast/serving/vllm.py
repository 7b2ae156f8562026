"""Payloads and questions as prompts of vLLM, which reads input embeddings in the place of tokens.

    asking = VllmPrompts(model, reader)
    prompts = reader.prompts.build_many([Turn("Where does Nulnak live?")], latent=model.mode)
    llm = vllm.LLM(FOLDER, enable_prompt_embeds=True)
    outputs = llm.generate(asking.embeds(prompts, [payload]), SamplingParams(**asking.sampling()))
    asking.answer(outputs[0].outputs[0].token_ids)

The prompt is the one that the reader was trained with: its builder applies the chat template, and
each token's embedding is what the reader's own embedding module returns, Gemma's factor included.
vLLM adds nothing to either. It is not imported here, and need not be installed where prompts are
made. `vllm_server.py` sends them to a server; `docs/serving.md` has the limits and the numbers.

Shapes: B prompts, T columns of the padded prompts, T_b positions of prompt b, R payloads, M
latents, N soft tokens of all prompts, D `d_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from latentwire_fast.config.parts import check_gain
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.joined import join_soft
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving.input_buffer import lay_out
from latentwire_fast.serving.payload_batch import Message, PayloadKind
from latentwire_fast.serving.prefixes import put_soft

# What vLLM takes; integers would be codes that nobody dequantised.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class EmbedsPrompt(TypedDict):
    """vLLM's prompt of that name: input embeddings `[T, D]`."""

    prompt_embeds: Tensor


class TokensPrompt(TypedDict):
    """vLLM's prompt of that name: token ids."""

    prompt_token_ids: list[int]


class VllmPrompts:
    """Makes one reader's prompts for a vLLM that serves it.

    Of the reader it keeps the input embeddings and the prompt builder: a caller who drops the
    reader frees its other weights.

    Args:
        model: with soft tokens, and nothing else, for this reader.
        reader: that it was trained for, on any device.
        gain: factor on the calibrated size of soft tokens; 1 is what was trained.

    Attributes:
        prompts: the reader's prompt builder.
        max_positions: of a prompt, at most: what the reader was made for.
        width: D.

    Raises:
        CheckpointError: `model` was trained for other weights than this reader's.
        ConfigError: it gives this reader something that vLLM takes from nobody: a deep prefix,
            updates between layers, or low-rank updates that were not merged.
    """

    def __init__(self, model: Interlingua, reader: Reader, *, gain: float = 1.0) -> None:
        check_gain("gain", gain)
        model.check_reader(reader)
        check_servable(model, reader.name)
        reader.require("prefixes")
        self._model, self._name, self._gain = model, reader.name, gain
        self._kind = PayloadKind.of(model, reader.name, unpacked=True)
        self._embedding, self._pad_id = reader.embedding, reader.pad_id
        self._stop_ids = reader.stop_ids
        self.prompts = reader.prompts
        self.max_positions = reader.max_positions
        self.width = reader.d_model

    def embeds(self, prompts: Sequence[Prompt], payloads: Sequence[Message]) -> list[EmbedsPrompt]:
        """Prompts about payloads, for `vllm.LLM.generate`.

        Args, Raises: as of `embeddings`.
        """
        return [{"prompt_embeds": rows_TD} for rows_TD in self.embeddings(prompts, payloads)]

    @staticmethod
    def tokens(prompts: Sequence[Prompt]) -> list[TokensPrompt]:
        """Prompts of text alone, for `vllm.LLM.generate`.

        Raises:
            ConfigError: a prompt with room for a latent.
        """
        if any(prompt.latent_at is not None for prompt in prompts):
            raise ConfigError(
                "a prompt has room for a latent, and tokens cannot fill it; build it as text "
                "(latent=None), or give `embeds` its payload"
            )
        return [{"prompt_token_ids": prompt.ids} for prompt in prompts]

    @torch.no_grad()
    def embeddings(self, prompts: Sequence[Prompt], payloads: Sequence[Message]) -> list[Tensor]:
        """Input embeddings `[T_b, D]` of prompts, on the CPU, in the dtype of the reader's own.

        Each has memory of its own, and is checked (`check_embeddings`).

        Args:
            prompts, payloads: as of `Receiver.prefill`.

        Raises:
            PayloadError: bytes that are no payload, or one of another model.
            ConfigError: counts that do not match, prompts without room for a latent, tokens that
                the reader has not, or values that its dtype cannot hold.
            DataError: more positions than the reader was made for.
        """
        soft = self._soft_tokens(payloads)
        if len(soft) not in (1, len(prompts)):
            raise ConfigError(
                f"{len(soft)} payloads for {len(prompts)} prompts; give one for each, or one for "
                "all of them (several for one prompt: a list in the place of a payload)"
            )
        soft = soft if len(soft) > 1 else soft * len(prompts)
        sizes = [len(tokens_MD) for tokens_MD in soft]
        layout = lay_out(prompts, soft_tokens=sizes, pad_id=self._pad_id)
        largest = int(layout.ids_BT.max())
        if largest >= self._embedding.num_embeddings:
            raise ConfigError(
                f"a prompt has token {largest}, and reader {self._name!r} knows "
                f"{self._embedding.num_embeddings} of them; build it with that reader's `prompts`"
            )
        before_B1 = (np.cumsum(sizes) - sizes)[:, None]
        source_BT = np.where(layout.slots_BT < 0, -1, layout.slots_BT + before_B1)
        device = self._embedding.weight.device
        embeds_BTD = put_soft(
            self._embedding(torch.from_numpy(layout.ids_BT).to(device)),
            torch.cat(soft).to(device),
            torch.from_numpy(source_BT).to(device),
        )
        rows = zip(embeds_BTD.cpu(), layout.lengths_B.tolist(), strict=True)
        made = [rows_TD[:length].clone() for rows_TD, length in rows]
        check_embeddings(made, width=self.width, max_positions=self.max_positions)
        return made

    def sampling(self, options: DecodeOptions | None = None) -> dict[str, Any]:
        """Arguments of `vllm.SamplingParams`, and fields of a request to its server, that decode as
        `Receiver.generate` does. They name what a server would otherwise take from the model's
        `generation_config.json`, such as a penalty on repetitions.

        Raises:
            ConfigError: options that sample the first token alone: vLLM has no such thing.
        """
        options = options or DecodeOptions()
        if options.first_token_temperature > 0:
            raise ConfigError(
                f"first_token_temperature={options.first_token_temperature}: vLLM samples all "
                "tokens or none; take 0, or decode with `Receiver`"
            )
        return {
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": options.max_new_tokens,
            "min_tokens": min(options.eos_ban_steps, options.max_new_tokens),
            "stop_token_ids": self._stop_ids,
        }

    def answer_ids(self, token_ids: Sequence[int]) -> list[int]:
        """What vLLM generated, up to what ends the answer and without it."""
        ends = [place for place, token in enumerate(token_ids) if token in self._stop_ids]
        return list(token_ids[: ends[0]] if ends else token_ids)

    def answer(self, token_ids: Sequence[int]) -> str:
        """The text of that answer."""
        ids = self.answer_ids(token_ids)
        return str(self.prompts.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _soft_tokens(self, payloads: Sequence[Message]) -> list[Tensor]:
        """The soft tokens `[M_b, D]` of each message."""
        parcel = self._kind.open(payloads)
        assert parcel.latent_RMd is not None  # `unpacked`
        soft_RMD = self._model.prefix(self._name, parcel.latent_RMd, gain=self._gain)
        return [*soft_RMD] if parcel.pieces.is_single else join_soft(soft_RMD, parcel.pieces)


def check_servable(model: Interlingua, reader: str) -> None:
    """Raise unless all that a model gives a reader can stand among input embeddings.

    Raises:
        ConfigError: it cannot, with the reason.
    """
    reasons = {
        "deep": "a deep prefix (keys and values of every layer), and vLLM's requests cannot fill "
        "its KV cache",
        "layers": "updates of its hidden states between layers, and vLLM's requests carry none",
    }
    for part in model.parts(reader).values():
        if part.gives in reasons:
            raise ConfigError(
                f"this model gives reader {reader!r} {reasons[part.gives]}: they carry input "
                "embeddings alone. Answer with latentwire_fast.serving.Receiver, or train soft "
                "tokens alone (attachment 'soft')"
            )
    lora = model.lora_of(reader)
    if lora is not None and not lora.merged:
        raise ConfigError(
            f"reader {reader!r} has low-rank updates (LoRA), without which vLLM would read; "
            "call model.adapt(reader, merge=True) and reader.model.save_pretrained(FOLDER), and "
            "have vLLM serve that folder"
        )


def check_embeddings(
    embeddings: Sequence[Tensor], *, width: int, max_positions: int | None = None
) -> None:
    """Raise unless these are what vLLM can read. It checks less itself: other shapes may stop it,
    and sparse tensors have overwritten its memory (CVE-2025-62164).

    Args:
        embeddings: `[T_b, D]` of each prompt.
        width: D.
        max_positions: T_b at most; None for any number.

    Raises:
        ConfigError: none, another shape, layout or dtype, or values that are not finite.
        DataError: too many positions.
    """
    if not embeddings:
        raise ConfigError("no embeddings to send; give at least one prompt")
    for number, rows_TD in enumerate(embeddings):
        where = f"embeddings of prompt {number}"
        if not isinstance(rows_TD, Tensor) or rows_TD.layout != torch.strided:
            found = rows_TD.layout if isinstance(rows_TD, Tensor) else type(rows_TD).__name__
            raise ConfigError(f"{where}: {found}, expected a dense tensor")
        if rows_TD.dim() != 2 or rows_TD.shape[1] != width or not len(rows_TD):
            raise ConfigError(
                f"{where}: {list(rows_TD.shape)}, expected [positions, {width}], the width of the "
                "reader that is served"
            )
        if rows_TD.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ConfigError(f"{where}: {rows_TD.dtype}, expected one of {names}")
        if max_positions is not None and len(rows_TD) > max_positions:
            raise DataError(
                f"{where}: {len(rows_TD):,} positions, and the reader knows {max_positions:,}; "
                "shorten the texts, or choose another reader"
            )
        if not bool(rows_TD.isfinite().all()):
            raise ConfigError(
                f"{where}: not all values are finite in {rows_TD.dtype}; take a smaller gain, or "
                "load the reader in another dtype"
            )
