"""Encoder, quantiser and one adapter per reader as one model: what is trained, saved and shared.

model = Interlingua.from_pretrained("runs/demo/model")
payload = model.encode_payloads(["Nulnak is already 94 years old."])[0]     # bytes
prefix = model.prefix("llama", model.decode_payloads([payload]))            # [1, M, d_model]
given = model.reader_inputs("llama", model.decode_payloads([payload]))           # for generate
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Literal, TypedDict, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from latentwire_fast import ops, wire
from latentwire_fast.config.schema import AdapterConfig, EncoderConfig, Mode, QuantizerConfig
from latentwire_fast.errors import CheckpointError, ConfigError, PayloadError
from latentwire_fast.files.tensors import parameter_digest, read_tensors
from latentwire_fast.models import saved_model
from latentwire_fast.models.adapters.deep_prefix import DeepPrefix
from latentwire_fast.models.adapters.soft_prompt import Adapter, rms_of
from latentwire_fast.models.encoders.byte import ByteEncoder
from latentwire_fast.models.encoders.lm import Encoder, LMEncoder
from latentwire_fast.models.poolers.selected import Selection
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.loading import load_tokenizer
from latentwire_fast.readers.reader import Reader

Task = Literal["autoencode", "continue"]
TASKS: tuple[Task, ...] = ("autoencode", "continue")


class ReaderInputs(TypedDict):
    """What a latent becomes for one reader: keyword arguments of `Reader.collate` and `generate`.

    prefixes: soft tokens `[B, M, d_model]`, none of them (M = 0) where the prefix is deep only.
    deep: keys and values `[L, 2, B, H, M, d_head]`, or None.
    """

    prefixes: Tensor
    deep: Tensor | None


class Interlingua(nn.Module):
    """One latent language: an encoder that writes it and an adapter per reader that understands it.

    Args:
        readers: a card per reader name; adapters are built for these.
        mode: `context`: the latent stands for the context, the question stays text. `pure`: it
            stands for both, so the encoder may answer and send the answer.
        encoder: a ready module (see `build_encoder`).
    """

    table_parameters = ("task_tokens",)

    def __init__(
        self,
        encoder: Encoder,
        readers: Mapping[str, ReaderCard],
        *,
        encoder_config: EncoderConfig,
        quantizer: QuantizerConfig,
        adapter: AdapterConfig,
        mode: Mode,
    ) -> None:
        super().__init__()
        self.encoder_config = encoder_config
        self.quantizer = quantizer
        self.adapter_config = adapter
        self.mode: Mode = mode
        self.cards = dict(readers)
        self.encoder = encoder
        self.adapters = nn.ModuleDict()
        self.deep_prefixes = nn.ModuleDict()
        self.task_tokens = nn.ParameterDict()
        shape = {"latents": encoder_config.latents, "d_z": encoder_config.d_z}
        for name, card in self.cards.items():
            if adapter.prefix != "deep":
                self.adapters[name] = Adapter(
                    adapter, **shape, d_model=card.d_model, target_rms=card.embedding_rms
                )
            if adapter.prefix != "soft":
                self.deep_prefixes[name] = DeepPrefix(adapter, **shape, geometry=card.kv)
            self.task_tokens[name] = nn.Parameter(
                torch.randn(len(TASKS), card.d_model) * card.embedding_rms
            )

    def encode(self, contexts: Sequence[str], questions: Sequence[str] | None = None) -> Tensor:
        """Latents `[B, M, d_z]` fp32, unquantised. Pure mode needs the questions, context mode
        refuses.

        Raises:
            ConfigError: questions given or missing against the mode.
        """
        self._check_questions(questions)
        return self.encoder(contexts, questions)

    def select(
        self, contexts: Sequence[str], questions: Sequence[str] | None = None
    ) -> tuple[Tensor, Selection]:
        """The same with the positions that the latents stand at (`LMEncoder.select`).

        Raises:
            ConfigError: as `encode`, or the encoder selects no positions.
        """
        self._check_questions(questions)
        if not isinstance(self.encoder, LMEncoder):
            raise ConfigError("a byte encoder selects no positions")
        return self.encoder.select(contexts, questions)

    def _check_questions(self, questions: Sequence[str] | None) -> None:
        if (questions is not None) != (self.mode == "pure"):
            raise ConfigError(
                f"this model was trained in {self.mode!r} mode: its encoder "
                + (
                    "needs the question with the context"
                    if questions is None
                    else "reads no question"
                )
            )

    def parts(self, reader: str) -> dict[str, nn.Module]:
        """The trained modules of one reader: its adapter, its deep prefix, or both.

        Raises:
            ConfigError: none were trained for that reader.
        """
        if reader not in self.cards:
            raise ConfigError(f"no adapter for reader {reader!r}; there are {sorted(self.cards)}")
        found = {"adapter": self.adapters, "deep_prefix": self.deep_prefixes}
        return {part: modules[reader] for part, modules in found.items() if reader in modules}

    @property
    def positions(self) -> int:
        """How many of a reader's positions a latent takes."""
        return self.encoder_config.latents * (2 if self.adapter_config.prefix == "both" else 1)

    def quantize(self, latent_BMd: Tensor, bits: int | None = None) -> Tensor:
        """What the receiver gets at this width; gradients pass straight through."""
        bits = self.quantizer.bits if bits is None else bits
        if bits == 16:
            return latent_BMd + (latent_BMd.half().float() - latent_BMd).detach()
        return ops.fake_quantize(latent_BMd, bits=bits, group_size=self.quantizer.group_size)

    def prefix(self, reader: str, latent_BMd: Tensor, *, gain: float = 1.0) -> Tensor:
        """Soft tokens `[B, M, d_model]` of one reader; M = 0 with a deep prefix only."""
        module = self.parts(reader).get("adapter")
        if module is None:
            return latent_BMd.new_zeros(len(latent_BMd), 0, self.cards[reader].d_model)
        return cast(Tensor, module(latent_BMd, gain=gain))

    def deep_prefix(self, reader: str, latent_BMd: Tensor, *, gain: float = 1.0) -> Tensor | None:
        """Keys and values `[L, 2, B, H, M, d_head]` of one reader; None with soft tokens only."""
        module = self.parts(reader).get("deep_prefix")
        return None if module is None else cast(Tensor, module(latent_BMd, gain=gain))

    def reader_inputs(
        self, reader: str, latent_BMd: Tensor, *, gain: float = 1.0, task: Task | None = None
    ) -> ReaderInputs:
        """What one reader is given in the latent's place.

        Args:
            gain: see `Adapter` and `DeepPrefix`.
            task: puts a pretraining task's token behind the soft tokens.
        """
        soft = self.prefix(reader, latent_BMd, gain=gain)
        if task is not None:
            token = self.task_tokens[reader][TASKS.index(task)]
            soft = torch.cat([soft, token.expand(len(soft), 1, -1)], 1)
        return {"prefixes": soft, "deep": self.deep_prefix(reader, latent_BMd, gain=gain)}

    @torch.no_grad()
    def prefix_rms(self, reader: str, latent_BMd: Tensor) -> dict[str, float]:
        """RMS of the soft tokens before and after calibration, and of deep keys and values."""
        rms: dict[str, float] = {}
        parts = self.parts(reader)
        if "adapter" in parts:
            rms |= cast(Adapter, parts["adapter"]).rms(latent_BMd)
        deep = self.deep_prefix(reader, latent_BMd)
        if deep is not None:
            keys, values = deep.unbind(1)
            rms |= {"keys": rms_of(keys), "values": rms_of(values)}
        return rms

    @cached_property
    def fingerprint(self) -> int:
        """16 bits of the encoder's digest: payloads carry it, so that a stranger's are refused.

        Cached: read it only once training is over.
        """
        return int(parameter_digest(self.encoder.state_dict().items())[:4], 16)

    def payloads(self, latent_BMd: Tensor, *, bits: int | None = None) -> list[bytes]:
        """One payload per latent."""
        return wire.pack_batch(
            latent_BMd.float().cpu(),
            bits=self.quantizer.bits if bits is None else bits,
            group_size=self.quantizer.group_size,
            fingerprint=self.fingerprint,
        )

    @torch.no_grad()
    def encode_payloads(
        self,
        contexts: Sequence[str],
        questions: Sequence[str] | None = None,
        *,
        bits: int | None = None,
    ) -> list[bytes]:
        """Text to payload bytes.

        Raises:
            ConfigError: as `encode`. DataError: a text is longer than the encoder reads.
        """
        for text, question in zip(contexts, questions or repeat(None), strict=False):
            self.encoder.check_length(text, question)
        return self.payloads(self.encode(contexts, questions), bits=bits)

    def decode_payloads(self, payloads: Sequence[bytes]) -> Tensor:
        """Latents `[B, M, d_z]` of payloads of one width that this model's encoder wrote.

        Raises:
            PayloadError: damaged bytes, another shape, or another model's fingerprint.
        """
        latent_BMd, headers = wire.unpack_batch(payloads)
        for i, header in enumerate(headers):
            if header.fingerprint != self.fingerprint:
                raise PayloadError(
                    f"payload {i} was written by model {header.fingerprint:#06x}, this is "
                    f"{self.fingerprint:#06x}; decode it with the model that encoded it"
                )
        found, expected = headers[0], self.encoder_config
        if (found.latents, found.d_z) != (expected.latents, expected.d_z):
            raise PayloadError(
                f"the payloads hold latents {(found.latents, found.d_z)}, this model's are "
                f"{(expected.latents, expected.d_z)}"
            )
        return latent_BMd.to(next(self.parameters()).device)

    def check_reader(self, reader: Reader) -> None:
        """Raise unless this is the reader, weight for weight, that the adapter was trained for."""
        self.parts(reader.name)
        card = self.cards[reader.name]
        if card.fingerprint != reader.fingerprint:
            raise CheckpointError(
                f"reader {reader.name!r} from {reader.source!r} has other weights (digest "
                f"{reader.fingerprint[:12]}) than the adapter was trained for "
                f"({card.fingerprint[:12]}, {card.source!r}); load that reader, or train an "
                "adapter for this one"
            )

    def trained_state(self) -> dict[str, Tensor]:
        """Every tensor that is not rebuilt from elsewhere, by name."""
        return {name: value.detach() for name, value in self.state_dict().items()}

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named parameters that receive gradients."""
        return [(n, p) for n, p in self.named_parameters() if p.requires_grad]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json, model.safetensors, and the encoder's LM config and tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.cpu().contiguous() for k, v in self.trained_state().items()}
        save_file(state, folder / "model.safetensors")
        files = ["model.safetensors"]
        if isinstance(self.encoder, LMEncoder):
            self.encoder.core.config.save_pretrained(folder / "encoder")
            self.encoder.tokenizer.save_pretrained(folder / "encoder")
            files += [f"encoder/{path.name}" for path in sorted((folder / "encoder").iterdir())]
        trained = self.trained_parameters()
        values = {
            "mode": self.mode,
            "encoder": asdict(self.encoder_config),
            "quantizer": asdict(self.quantizer),
            "adapter": asdict(self.adapter_config),
            "readers": {name: asdict(card) for name, card in self.cards.items()},
            "trained_parameters": sum(p.numel() for _, p in trained),
        }
        saved_model.write_config(folder, values, files=files)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Interlingua:
        """Load what `save_pretrained` wrote.

        Raises:
            CheckpointError: a file is missing or damaged, or another version wrote them.
        """
        folder = Path(folder)
        config = saved_model.read_config(folder)
        try:
            encoder_config = EncoderConfig(**config["encoder"])
            cards = {name: ReaderCard.from_json(card) for name, card in config["readers"].items()}
            quantizer = QuantizerConfig(**config["quantizer"])
            adapter = AdapterConfig(**config["adapter"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder} was saved by another version of latentwire-fast ({error!r}); train it "
                "again, or use the version that saved it"
            ) from None
        if encoder_config.kind == "lm":
            lm_config = AutoConfig.from_pretrained(folder / "encoder")
            # The configuration is the reader's, whose dtype may be shorter than what was trained.
            core = AutoModel.from_config(lm_config, dtype=torch.float32)
            tokenizer = load_tokenizer(folder / "encoder")
            encoder: Encoder = LMEncoder(core, tokenizer, encoder_config)
        else:
            encoder = ByteEncoder(encoder_config)
        model = cls(
            encoder,
            cards,
            encoder_config=encoder_config,
            quantizer=quantizer,
            adapter=adapter,
            mode=config["mode"],
        )
        model.load_state_dict(read_tensors(folder / "model.safetensors"))
        return model.eval()
