"""Payload bytes to a first token: what a reader does with a latent, and no more.

    receiver = Receiver.of(model, reader)
    first = receiver.prefill([payload], [receiver.prompt("Where does Nulnak live?")])
    first.logits_BV, first.generate(32)

On the CPU, and where a reader's layers are on several devices, a prefill runs op by op. On a CUDA
device it is one graph from the payload's codes to the logits, captured once for each shape of batch
(`graphs.py`). Both give what `Reader.generate` gives. `docs/prefill.md` has the timings.

Shapes: B rows, T columns of the padded prompts, R payloads (1 or B), M latents, d latent width, D
`d_model`, V vocabulary; L layers, H key/value heads, P deep positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from latentwire_fast.config.schema import Mode
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt, Turn, question_text
from latentwire_fast.readers.attention import causal_mask, mask_free
from latentwire_fast.readers.kv_cache import layer_devices
from latentwire_fast.readers.kv_placement import plan
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving.batch import Batch
from latentwire_fast.serving.graphs import CapturedPass, GraphMemory, PassCache, write_through
from latentwire_fast.serving.input_buffer import InputBuffer, Layout, lay_out
from latentwire_fast.serving.payload_batch import Parcel, PayloadKind
from latentwire_fast.serving.prefilled import Prefilled
from latentwire_fast.serving.prefixes import TrainedParts, put_soft
from latentwire_fast.wire import Header

Engine = Literal["auto", "eager", "compile", "graph"]
Mark = Callable[[str], None]

# A graph serves prompts of up to so many different lengths: on average half of it is padding.
WIDTH_STEP = 8


def unmarked(_phase: str) -> None:
    """The `mark` of a receiver that nobody times."""


class Receiver:
    """Turns payloads into first tokens of one reader.

    Args:
        reader: on a device, frozen.
        adapter: latent `[R, M, d]` to soft tokens `[R, M, D]`; None with a deep prefix only.
        deep_prefix: latent to keys and values `[L, 2, R, H, P, d_head]`, P = M; None without one.
        latents, d_z, fingerprint: of the payloads that these were trained for.
        mode: what the latent stands for, see `PromptBuilder.build`.
        engine: `auto` is `graph` where all of the reader is on one CUDA device, else `eager`;
            `compile` is `torch.compile` of the backbone, which raises where it would be compiled
            more often than torch allows.
        new_tokens: how many tokens a cache made by a graph has room for behind the prompt.
        max_graphs: how many shapes of batch are kept captured.
        mark: called with the name of each phase when it has been queued: `parse`, `dequantise`
            (where it is not part of the adapter, see `TrainedParts`), `adapter`, `placement`,
            `reader`.

    Raises:
        ConfigError: neither adapter nor deep prefix; parts on different devices; a reader that
            cannot be captured, whose layers are where nothing can be placed, or one with a layer
            that does not attend to all positions.
    """

    def __init__(
        self,
        reader: Reader,
        adapter: nn.Module | None,
        *,
        latents: int,
        d_z: int,
        fingerprint: int,
        deep_prefix: nn.Module | None = None,
        mode: Mode = "context",
        engine: Engine = "auto",
        new_tokens: int = 32,
        max_graphs: int = 8,
        mark: Mark = unmarked,
    ) -> None:
        self.reader, self.mode = reader, mode
        self._kind = PayloadKind(latents, d_z, fingerprint)
        self._soft_tokens = latents if adapter is not None else 0
        self._deep_positions = latents if deep_prefix is not None else 0
        self._new_tokens = new_tokens
        self._mark = mark
        self._config = reader.model.config.get_text_config(decoder=True)
        self._check_layers()
        self.engine = self._choose(engine)
        self._parts = TrainedParts(adapter, deep_prefix, reader=reader)
        self._backbone: Callable[..., Any] = reader.backbone
        if self.engine == "compile":
            # One compilation for all lengths of a batch; one for each takes a minute of a reader.
            self._backbone = torch.compile(reader.backbone, dynamic=True)
        if self.engine == "graph":
            self._memory = GraphMemory(reader.device)
        self.passes = PassCache(max_graphs)

    @classmethod
    def of(cls, model: Interlingua, reader: Reader, **options: Any) -> Receiver:
        """A receiver for what `model` encodes.

        Raises:
            ConfigError, CheckpointError: `model` was not trained for this reader.
        """
        model.check_reader(reader)
        return cls(
            reader,
            model.attachment(reader.name, "prefixes"),
            deep_prefix=model.attachment(reader.name, "deep"),
            latents=model.encoder_config.latents,
            d_z=model.encoder_config.d_z,
            fingerprint=model.fingerprint,
            mode=model.mode,
            **options,
        )

    def prompt(self, question: str = "") -> Prompt:
        """The reader's template with room for a latent, and in context mode the question."""
        return self.reader.prompts.build([Turn(question)], context="", latent=self.mode)

    def prompts(self, questions: Sequence[str]) -> list[Prompt]:
        """`prompt` of each question. They are tokenised together: one by one, a batch of 32 takes
        milliseconds."""
        builder = self.reader.prompts
        before = [] if self.mode == "pure" else self._before_latent
        after: list[list[int]] = [[] for _ in questions]
        if self.mode == "context":
            texts = [question_text(question) for question in questions]
            encoded = builder.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
            after = encoded["input_ids"]
        prompts = []
        for ids in after:
            prompt = builder.build([Turn("")], context=None, user_ids=[*before, *ids])
            prompt.latent_at = builder.content_start + len(before)
            prompt.content = len(ids)
            prompts.append(prompt)
        return prompts

    @cached_property
    def _before_latent(self) -> list[int]:
        """What announces the context in context mode."""
        return self.reader.prompts.label_ids

    @torch.no_grad()
    def prefill(self, payloads: Sequence[bytes], prompts: Sequence[Prompt]) -> Prefilled:
        """Read payloads with their prompts.

        Args:
            payloads: one per prompt, or one that all prompts ask about; all of one bit width.
            prompts: built with `latent=`, as by `prompt`.

        Raises:
            PayloadError: bytes that are no payload, or not one that this receiver was made for.
            ConfigError: counts that do not match, prompts without room for a latent, more positions
                than the reader has.
        """
        parcel = self._kind.open(payloads)
        if len(payloads) not in (1, len(prompts)):
            raise ConfigError(
                f"{len(payloads)} payloads for {len(prompts)} prompts; give one for each, or one "
                "for all of them"
            )
        return self._run(prompts, parcel)

    @torch.no_grad()
    def read(self, prompts: Sequence[Prompt]) -> Prefilled:
        """Read text prompts with the same engine: what latents are compared with.

        Raises:
            ConfigError: prompts with room for a latent, more positions than the reader has.
        """
        return self._run(prompts, None)

    def generate(
        self, payloads: Sequence[bytes], prompts: Sequence[Prompt], *, max_new_tokens: int = 32
    ) -> list[list[int]]:
        """Prefill and decode greedily; the new token ids of each row, without EOS."""
        return self.prefill(payloads, prompts).generate(max_new_tokens)

    # --- checks -----------------------------------------------------------------------------------

    def _choose(self, engine: Engine) -> Engine:
        devices = {group.device for group in plan(layer_devices(self.reader.model))}
        devices.add(str(self.reader.device))
        on_one_gpu = len(devices) == 1 and self.reader.device.type == "cuda"
        if engine == "graph" and not on_one_gpu:
            raise ConfigError(
                f"a graph needs all of reader {self.reader.name!r} on one CUDA device; it is on "
                f"{sorted(devices)}: use engine='eager'"
            )
        return ("graph" if on_one_gpu else "eager") if engine == "auto" else engine

    def _check_layers(self) -> None:
        for number, layer in enumerate(DynamicCache(config=self.reader.model.config).layers):
            if type(layer) is not DynamicLayer:
                # Its window would count the padding behind a shorter prompt.
                raise ConfigError(
                    f"layer {number} of reader {self.reader.name!r} keeps its past in a "
                    f"{type(layer).__name__}; a receiver takes full attention in every layer: use "
                    "`Reader.generate`"
                )

    @property
    def _position_limit(self) -> int | None:
        """Padding stays within it too: a learned table of positions has no more rows."""
        return getattr(self._config, "max_position_embeddings", None)

    def _capacity(self, layout: Layout, deep: int) -> int:
        """Positions that a cache for this batch may hold."""
        limit = self._position_limit
        longest = int(layout.lengths_B.max())
        if limit is not None and deep + longest + self._new_tokens > limit:
            raise ConfigError(
                f"{deep} deep positions, a prompt of {longest} and {self._new_tokens} new tokens "
                f"exceed the {limit} positions of reader {self.reader.name!r}; shorten the prompt "
                "or ask for fewer tokens"
            )
        return deep + layout.width + self._new_tokens

    # --- the pass ---------------------------------------------------------------------------------

    def _run(self, prompts: Sequence[Prompt], parcel: Parcel | None) -> Prefilled:
        deep = 0 if parcel is None else self._deep_positions
        layout = lay_out(
            prompts,
            soft_tokens=None if parcel is None else self._soft_tokens,
            pad_id=self.reader.pad_id,
            multiple=1 if self.engine == "eager" else WIDTH_STEP,
            most=None if self._position_limit is None else self._position_limit - deep,
        )
        largest, vocabulary = int(layout.ids_BT.max()), self.reader.embedding.num_embeddings
        if largest >= vocabulary:  # on a GPU the error would come too late to say where from
            raise ConfigError(
                f"a prompt has token {largest}, and reader {self.reader.name!r} knows {vocabulary} "
                "of them; build it with that reader's `prompts`"
            )
        capacity = self._capacity(layout, deep)
        batch = Batch(layout, parcel)
        outcome = partial(
            Prefilled,
            self.reader,
            lengths_B=layout.lengths_B,
            width=layout.width,
            deep_positions=deep,
            capacity=capacity,
        )
        if self.engine == "graph":
            with torch.cuda.device(self.reader.device):
                captured = self.passes.get(
                    batch.shape, lambda: self._capture(batch, deep=deep, capacity=capacity)
                )
                captured.fill(batch.values())
                self._mark("parse")
                logits_BV = captured.replay()
                batch.verify()  # while the GPU works; nothing is handed out before
            return outcome(logits_BV, cache=captured.cache, captured=captured)
        batch.verify()
        inputs = InputBuffer(batch.fields, device=self.reader.device)
        inputs.fill(batch.values())
        self._mark("parse")
        cache = DynamicCache(config=self.reader.model.config)
        logits_BV = self._forward(inputs.tensors, batch.header, target=cache, cache=lambda: cache)
        return outcome(logits_BV, cache=cache, captured=None)

    def _forward(
        self,
        inputs: Mapping[str, Tensor],
        header: Header | None,
        *,
        target: Cache,
        cache: Callable[[], Cache],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits `[B, V]` of the next token.

        Args:
            target: takes the deep prefix; cache: makes what the reader then works with.
            attention_mask: only where transformers cannot make its own.
        """
        ids_BT = inputs["ids"]
        embeds_BTD = self.reader.embedding(ids_BT)
        first = 0
        if header is not None:
            soft_RMD, deep_L2RHPd = self._parts(inputs, header, mark=self._mark)
            if soft_RMD is not None:
                embeds_BTD = put_soft(embeds_BTD, soft_RMD, inputs["source"])
            if deep_L2RHPd is not None:
                first = deep_L2RHPd.shape[4]
                self.reader.filler.fill(target, prefix_L2BHPD=deep_L2RHPd, batch_size=len(ids_BT))
            self._mark("placement")
        positions_1T = torch.arange(first, first + ids_BT.shape[1], device=ids_BT.device)[None]
        hidden_BTD = self._call_backbone(
            inputs_embeds=embeds_BTD,
            attention_mask=attention_mask,
            position_ids=positions_1T,
            past_key_values=cache(),
            use_cache=True,
        )
        last_B = inputs["last"].to(hidden_BTD.device)
        rows = torch.arange(len(last_B), device=hidden_BTD.device)
        logits_BV = self.reader.head(hidden_BTD[rows, last_B])
        self._mark("reader")
        return logits_BV

    def _call_backbone(self, **arguments: Any) -> Tensor:
        if self.engine != "compile":
            return self._backbone(**arguments).last_hidden_state
        if self._deep_positions:
            self.reader.filler.wait()  # its hooks are not for compiled code
        # By default, what would be compiled once too often runs uncompiled, and nobody knows.
        strict = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
        with strict, mask_free(self.reader.model):
            return self._backbone(**arguments).last_hidden_state

    def _capture(self, batch: Batch, *, deep: int, capacity: int) -> CapturedPass:
        model = self.reader.model
        rows, width = batch.layout.ids_BT.shape
        static = StaticCache(config=model.config, max_cache_len=capacity)
        if not deep:  # otherwise the filler sets it up, as one block
            geometry = self.reader.kv_geometry
            static.early_initialization(
                rows, geometry.heads, geometry.head_width, model.dtype, self.reader.device
            )
        with mask_free(model) as needs_no_mask:
            embeddings = self.reader.embedding.weight
            forward = partial(
                self._forward,
                header=batch.header,
                target=static,
                cache=lambda: write_through(static, length=deep),
                attention_mask=None
                if needs_no_mask
                else causal_mask(
                    width, deep + width, dtype=embeddings.dtype, device=embeddings.device
                ),
            )
            return CapturedPass(forward, batch, cache=static, memory=self._memory)
