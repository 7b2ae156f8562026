"""An encoder that starts from a pretrained LM.

Shapes: B texts, M latents, D the LM's width.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import (
    EncoderConfig,
    PoolerConfig,
    PromptConfig,
    RunConfig,
    TemplateConfig,
)
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.files.tensor_cache import TensorCache
from latentwire_fast.files.tensors import parameter_digest
from latentwire_fast.models.encoders.base import Encoder, Limit, Texts, rms_normalize
from latentwire_fast.models.encoders.truncation import cut_context
from latentwire_fast.models.encoders.varying import check_varying
from latentwire_fast.models.lm_text import LMFacts, LMText
from latentwire_fast.models.poolers.base import Pooler, Selection
from latentwire_fast.models.token_states import TokenStates
from latentwire_fast.prompts.builder import Prompt, PromptBuilder, Turn, encoded_text
from latentwire_fast.prompts.scaffold import Scaffold, in_scaffold
from latentwire_fast.readers.checkpointing import checkpoint_activations
from latentwire_fast.readers.checks import (
    check_prompt_ids,
    check_vocabulary,
    learns_positions,
    position_limit,
)
from latentwire_fast.readers.loading import load_tokenizer, load_weights
from latentwire_fast.readers.logits import LogitTransform
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.shapes import model_config
from latentwire_fast.registry import POOLERS

FOLDER = "encoder"  # of a saved model: the LM's configuration and tokenizer


class LMEncoder(Encoder):
    """A causal LM that reads the text, and a pooler that makes M states of what it holds.

    Args:
        core: the LM without its head; trained unless `config.frozen`.
        tokenizer: its tokenizer. The text is laid out as a prompt of that LM, which is what it
            knows.
        shared: the core is a reader's own module, which nothing may change.
        facts: of an LM without weights; otherwise they are read off it.

    Raises:
        ConfigError: the pooler cannot work with this LM.
    """

    @dataclass(frozen=True)
    class Config(EncoderConfig, TemplateConfig):
        """An encoder that starts from a pretrained causal LM; `template` and `date` are of the
        chat template that its text is laid out in.

        Attributes:
            source: the LM: a reader's source (its own weights are taken), a folder or a hub id.
            pooler: what the LM holds to M latents.
            frozen: keep the LM's weights and train only what was added.
            max_tokens: longest text that is read.
            tokens_per_latent: a text of n tokens gets ceil(n / tokens_per_latent) latents, from
                `least_latents` to `latents`; None: `latents`, whatever its length.
            scaffold: what stands around the text: the LM's chat template where it has one
                (`chat`), the roles in plain words (`neutral`), or nothing (`none`).
            gradient_checkpointing: recompute the LM's activations in backward.
        """

        source: str = "testbed:llama"
        pooler: PoolerConfig = field(default_factory=lambda: POOLERS.config("queries"))
        frozen: bool = False
        max_tokens: int = 1024
        scaffold: Scaffold = "chat"
        gradient_checkpointing: bool = False
        tokens_per_latent: float | None = None
        least_latents: int = 1

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("max_tokens", "least_latents")
            require(
                self.tokens_per_latent is None or self.tokens_per_latent > 0,
                f"tokens_per_latent={self.tokens_per_latent}, expected above 0, or none",
            )
            require(
                self.least_latents == 1 or self.varies,
                f"least_latents={self.least_latents} is of encoders with tokens_per_latent; give "
                "that too, or leave it out",
            )
            require(
                self.least_latents <= self.latents,
                f"least_latents={self.least_latents}, expected at most latents={self.latents}",
            )
            require(
                self.template is None or self.scaffold == "chat",
                f"template={self.template!r} names a chat template, and scaffold="
                f"{self.scaffold!r} takes none; leave one of them out",
            )

        @property
        def selects_positions(self) -> bool:
            """Whether its pooler does."""
            return self.pooler.selects_positions

        @property
        def varies(self) -> bool:
            """Whether the number of latents goes by the text's length."""
            return self.tokens_per_latent is not None

        def builder(self, tokenizer: PreTrainedTokenizerBase) -> PromptBuilder:
            """How its text is laid out."""
            bos = True if self.scaffold == "neutral" else None  # no template of the LM's brings it
            prompt = PromptConfig(template=self.template, date=self.date, bos=bos)
            return PromptBuilder(in_scaffold(tokenizer, self.scaffold), prompt)

        def check(self, run: RunConfig) -> None:
            """Its pooler checks itself, and what takes the latents in."""
            self.pooler.check(run)
            if self.varies:
                check_varying(self.pooler, run)

        def allows(self, trained: EncoderConfig) -> bool:
            """Whether it is one: it may read less than asked, and its LM may have moved."""
            if not isinstance(trained, LMEncoder.Config) or trained.max_tokens > self.max_tokens:
                return False
            return trained == replace(self, source=trained.source, max_tokens=trained.max_tokens)

    pretrained_modules: ClassVar[tuple[str, ...]] = ("core",)
    config: Config

    def __init__(
        self,
        core: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        *,
        shared: bool = False,
        facts: LMFacts | None = None,
    ) -> None:
        super().__init__(config)
        self.prompts = config.builder(tokenizer)
        check_prompt_ids(self.prompts, core, name=f"encoder LM {config.source!r}")
        self.tokenizer = tokenizer
        lm = facts or LMFacts.of(core, self.prompts, latents=config.latents, source=config.source)
        self.pooler: Pooler = POOLERS.part_of(config.pooler)(
            config.pooler, self.facts_for_pooler(lm)
        )
        self.core = core.requires_grad_(not config.frozen)
        self.norm = nn.LayerNorm(lm.width)
        self.project = nn.Linear(lm.width, config.d_z)
        self.states_cache: TensorCache | None = None  # of a frozen LM, while it is trained
        if shared:
            self.register_load_state_dict_pre_hook(_refuse_other_core)

    def facts_for_pooler(self, lm: LMFacts) -> LMFacts:
        """What its pooler is built for."""
        return lm

    @classmethod
    def build(cls, config: EncoderConfig, readers: Mapping[str, Reader]) -> LMEncoder:
        """A fresh encoder, whose own `config` may read less than the given one.

        It starts from the reader with the same source, if any, unless its weights are quantised:
        from a copy of its weights, or from that module itself where nothing will change it. It
        reads no more tokens than an LM with a table of positions has room for.
        """
        assert isinstance(config, LMEncoder.Config)
        reader = _reader_of(config.source, readers)
        shared = reader is not None and _can_share(config, reader)
        if reader is None:
            core = load_weights(AutoModel, config.source, dtype=torch.float32)
            tokenizer = load_tokenizer(config.source)
            check_vocabulary(tokenizer, core, name=f"encoder LM {config.source!r}")
        else:
            backbone = reader.backbone if shared else copy.deepcopy(reader.backbone).float()
            core, tokenizer = cast(PreTrainedModel, backbone), reader.tokenizer
        if learns_positions(core):
            config = _within_positions(config, core, config.builder(tokenizer))
        if config.gradient_checkpointing:
            checkpoint_activations(core)
        return cls(core, tokenizer, config, shared=shared).train()

    @classmethod
    def outline(cls, config: EncoderConfig) -> LMEncoder:
        """An encoder whose LM has the shape of its source, and no weights. Its tokenizer is another
        one, for texts cannot be read anyway."""
        assert isinstance(config, LMEncoder.Config)
        with torch.device("meta"):
            core = AutoModel.from_config(model_config(config.source), dtype=torch.float32)
            lm = LMFacts(
                latents=config.latents,
                width=core.config.hidden_size,
                layers=core.config.num_hidden_layers,
                anchor_D=torch.zeros(core.config.hidden_size),
                embedding_std=1.0,
                logits=LogitTransform(),
                tied=bool(core.config.tie_word_embeddings),
                source=config.source,
            )
            return cls(core, load_tokenizer("testbed:llama"), config, facts=lm)

    def train(self, mode: bool = True) -> LMEncoder:
        """A frozen LM stays in eval mode: it has nothing to learn from dropout, and may be a
        reader's own."""
        super().train(mode)
        if self.config.frozen:
            self.core.eval()
        return self

    @property
    def limit(self) -> Limit:
        """In tokens."""
        return Limit("max_tokens", self.config.max_tokens, "tokens")

    def length_of(self, text: str) -> int:
        """Its tokens."""
        return len(self.prompts.text_ids(text))

    def forward(self, contexts: Texts, questions: Texts | None = None) -> Tensor:
        """Latents `[B, M, d_z]` fp32 of contexts, or of contexts with questions (pure mode)."""
        text = self._text(contexts, questions)
        return self._present(text, self._latent(self.pooler(text)))

    def select(self, contexts: Texts, questions: Texts | None = None) -> tuple[Tensor, Selection]:
        """Latents `[B, M, d_z]` fp32, and the positions that they stand at.

        Raises:
            ConfigError: the encoder's pooler selects no positions.
        """
        text = self._text(contexts, questions)
        selection = self.pooler.select(text)
        return self._present(text, self._latent(selection.states_BMD)), selection

    def text_ends(self, context: str, question: str | None = None) -> list[int]:
        """Index of the character behind each token of the text that is read."""
        ends = self.prompts.text_ends(encoded_text(context, question))
        if question is None:
            return ends[: self.config.max_tokens]
        return cut_context(ends, ends, context, limit=self.config.max_tokens)

    def _latent(self, states_BMD: Tensor) -> Tensor:
        return rms_normalize(self.project(self.norm(states_BMD.float())).float())

    def _present(self, text: TokenStates, latent_BMd: Tensor) -> Tensor:
        """Latents with zeros in the place of those that a text does not get."""
        absent_BM = text.absent_BM(self.config.latents)
        return latent_BMd if absent_BM is None else latent_BMd.masked_fill(absent_BM[..., None], 0)

    def _text(self, contexts: Texts, questions: Texts | None) -> TokenStates:
        cache = self.states_cache if self.config.frozen else None
        prompts = self._prompts(contexts, questions)
        text = LMText(self.core, self.prompts, prompts, cache=cache)
        if self.config.varies:
            text.counts_B = torch.tensor([*map(self._count, prompts)], device=self.core.device)
        return text

    def latent_counts(
        self, contexts: Texts, questions: Texts | None = None
    ) -> tuple[int, ...] | None:
        """One for each `tokens_per_latent` tokens that are read, without the context's label."""
        if not self.config.varies:
            return None
        return tuple(map(self._count, self._prompts(contexts, questions)))

    def _count(self, prompt: Prompt) -> int:
        """How many latents a text gets."""
        config, tokens = self.config, prompt.content - len(self.prompts.label_ids)
        assert config.tokens_per_latent is not None
        wanted = math.ceil(tokens / config.tokens_per_latent)
        return max(config.least_latents, min(config.latents, wanted))

    def _prompts(self, contexts: Texts, questions: Texts | None) -> list[Prompt]:
        prompts = []
        for i, context in enumerate(contexts):
            if questions is None:
                prompt = self.prompts.build_context(context, max_tokens=self.config.max_tokens)
            else:
                text = encoded_text(context, questions[i])
                ids = self.prompts.text_ids(text)
                limit = self.config.max_tokens
                if len(ids) > limit:
                    ids = cut_context(ids, self.prompts.text_ends(text), context, limit=limit)
                prompt = self.prompts.build([Turn(questions[i])], context=context, user_ids=ids)
            prompts.append(prompt)
        return prompts

    def keep_states(self, folder: Path, *, rank: int) -> None:
        """Keep the states of a frozen LM."""
        if self.config.frozen and self.pooler.states:
            digest = parameter_digest(self.core.named_parameters())
            self.states_cache = TensorCache(folder / f"encoder-{digest[:16]}-{rank}")

    def kept_bytes(self, context: str) -> int:
        """The states that the pooler reads, fp16."""
        if not self.config.frozen:
            return 0
        (prompt,) = self._prompts([context], None)
        return 2 * self.pooler.states * len(prompt.ids) * self.norm.normalized_shape[0]

    def save(self, folder: Path) -> list[str]:
        """Write the LM's configuration and its tokenizer."""
        self.core.config.save_pretrained(folder / FOLDER)
        self.tokenizer.save_pretrained(folder / FOLDER)
        return [f"{FOLDER}/{path.name}" for path in sorted((folder / FOLDER).iterdir())]

    @classmethod
    def load(cls, folder: Path, config: EncoderConfig) -> LMEncoder:
        """The encoder that was saved in a folder, before its weights are loaded."""
        assert isinstance(config, LMEncoder.Config)
        lm_config = AutoConfig.from_pretrained(folder / FOLDER, trust_remote_code=False)
        # The configuration is the reader's, whose dtype may be shorter than what was trained.
        core = AutoModel.from_config(lm_config, dtype=torch.float32, trust_remote_code=False)
        return cls(core, load_tokenizer(folder / FOLDER), config)


def _reader_of(source: str, readers: Mapping[str, Reader]) -> Reader | None:
    """The first reader of a source whose weights are not quantised."""
    for reader in readers.values():
        if reader.source == source and not hasattr(reader.model, "hf_quantizer"):
            return reader
    return None


def _can_share(config: LMEncoder.Config, reader: Reader) -> bool:
    """Whether an encoder may use a reader's own module: nothing changes it, it computes in fp32 as
    encoders do, and it is on one device. A reader that gets low-rank updates changes."""
    weights = list(reader.model.parameters())
    whole = {(weight.dtype, weight.device) for weight in weights} == {
        (torch.float32, reader.device)
    }
    placed = getattr(reader.model, "hf_device_map", None) is not None
    alone = not config.gradient_checkpointing and reader.lora_settings is None
    return config.frozen and alone and whole and not placed


def _within_positions(
    config: LMEncoder.Config, core: PreTrainedModel, prompts: PromptBuilder
) -> LMEncoder.Config:
    """Settings that read no more than an LM's table of positions has room for."""
    # all but the text: what a prompt of pure mode has besides it, and the queries
    frame = prompts.build([Turn("")], context="")
    others = len(frame.ids) - frame.content + config.latents
    room = (position_limit(core.config.get_text_config(decoder=True)) or sys.maxsize) - others
    if room < 1:
        raise ConfigError(
            f"encoder LM {config.source!r} has no position left for a text beside "
            f"{config.latents} latents; take fewer, or another LM"
        )
    return replace(config, max_tokens=min(config.max_tokens, room))


def _refuse_other_core(encoder: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before weights are loaded into an encoder that shares its LM with a reader: they must be
    that reader's.

    Raises:
        CheckpointError: they are not; loading them would change the reader.
    """
    for name, weight in cast(LMEncoder, encoder).core.state_dict().items():
        saved = state.get(f"{prefix}core.{name}")
        if saved is not None and not torch.equal(saved.to(weight.device), weight):
            raise CheckpointError(
                f"the encoder's LM was saved with other weights ({name}) than the reader has that "
                "it is taken from; load the reader that the training began with"
            )
