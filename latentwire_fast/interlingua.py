"""Encoder, quantiser and one adapter per reader as one model: what is trained, saved and shared.

model = Interlingua.from_pretrained("runs/demo/model")
payload = model.encode_payloads(["Nulnak is already 94 years old."])[0]     # bytes
prefix = model.prefix("llama", model.decode_payloads([payload]))            # [1, M, d_model]
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from latentwire_fast import ops, wire
from latentwire_fast.adapters import Adapter
from latentwire_fast.checkpoint import file_entry, parameter_digest, read_tensors
from latentwire_fast.config import AdapterConfig, EncoderConfig, Mode, QuantizerConfig
from latentwire_fast.encoders import ByteEncoder, Encoder, LMEncoder
from latentwire_fast.errors import CheckpointError, ConfigError, PayloadError
from latentwire_fast.reader import (
    Reader,
    checkpoint_activations,
    load_tokenizer,
    load_weights,
)

Task = Literal["autoencode", "continue"]
TASKS: tuple[Task, ...] = ("autoencode", "continue")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ReaderCard:
    """What an adapter must know of its reader, and how it recognises it."""

    d_model: int
    embedding_rms: float
    fingerprint: str
    source: str = ""

    @classmethod
    def of(cls, reader: Reader) -> ReaderCard:
        """The card of a loaded reader."""
        return cls(reader.d_model, reader.embedding_rms, reader.fingerprint, reader.source)


class Interlingua(nn.Module):
    """One latent language: an encoder that writes it and an adapter per reader that understands it.

    Args:
        readers: a card per reader name; adapters are built for these.
        mode: `context`: the latent stands for the context, the question stays text. `pure`: it
            stands for both, so the encoder may answer and send the answer.
        encoder: a ready module (see `build_encoder`).
    """

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
        self.task_tokens = nn.ParameterDict()
        for name, card in self.cards.items():
            self.adapters[name] = Adapter(
                adapter,
                latents=encoder_config.latents,
                d_z=encoder_config.d_z,
                d_model=card.d_model,
                target_rms=card.embedding_rms,
            )
            self.task_tokens[name] = nn.Parameter(
                torch.randn(len(TASKS), card.d_model) * card.embedding_rms
            )

    def encode(self, contexts: Sequence[str], questions: Sequence[str] | None = None) -> Tensor:
        """Latents `[B, M, d_z]` fp32, unquantised. Pure mode needs the questions, context mode
        refuses.

        Raises:
            ConfigError: questions given or missing against the mode.
        """
        if (questions is not None) != (self.mode == "pure"):
            raise ConfigError(
                f"this model was trained in {self.mode!r} mode: its encoder "
                + (
                    "needs the question with the context"
                    if questions is None
                    else "reads no question"
                )
            )
        return self.encoder(contexts, questions)

    def adapter(self, reader: str) -> Adapter:
        """The adapter of one reader.

        Raises:
            ConfigError: no adapter for that reader.
        """
        if reader not in self.adapters:
            raise ConfigError(
                f"no adapter for reader {reader!r}; there are {sorted(self.adapters)}"
            )
        return cast(Adapter, self.adapters[reader])

    def quantize(self, latent_BMd: Tensor, bits: int | None = None) -> Tensor:
        """What the receiver gets at this width; gradients pass straight through."""
        bits = bits or self.quantizer.bits
        if bits == 16:
            return latent_BMd + (latent_BMd.half().float() - latent_BMd).detach()
        return ops.fake_quantize(latent_BMd, bits=bits, group_size=self.quantizer.group_size)

    def prefix(self, reader: str, latent_BMd: Tensor, *, gain: float = 1.0) -> Tensor:
        """Prefix embeddings `[B, M, d_model]` of one reader."""
        return cast(Tensor, self.adapter(reader)(latent_BMd, gain=gain))

    def task_prefix(self, reader: str, latent_BMd: Tensor, task: Task) -> Tensor:
        """The prefix with a task token behind it, `[B, M + 1, d_model]`."""
        token = self.task_tokens[reader][TASKS.index(task)]
        prefix = self.prefix(reader, latent_BMd)
        return torch.cat([prefix, token.expand(len(prefix), 1, -1)], 1)

    @cached_property
    def fingerprint(self) -> int:
        """16 bits of the encoder's digest: payloads carry it, so that a stranger's are refused.

        Cached: read it only once training is over.
        """
        return int(parameter_digest(self.encoder.state_dict().items())[:4], 16)

    def payloads(self, latent_BMd: Tensor, *, bits: int | None = None) -> list[bytes]:
        """One payload per latent."""
        return [
            wire.pack(
                latent,
                bits=bits or self.quantizer.bits,
                group_size=self.quantizer.group_size,
                fingerprint=self.fingerprint,
            )
            for latent in latent_BMd.detach().float().cpu()
        ]

    @torch.no_grad()
    def encode_payloads(
        self,
        contexts: Sequence[str],
        questions: Sequence[str] | None = None,
        *,
        bits: int | None = None,
    ) -> list[bytes]:
        """Text to payload bytes."""
        return self.payloads(self.encode(contexts, questions), bits=bits)

    def decode_payloads(self, payloads: Sequence[bytes]) -> Tensor:
        """Latents `[B, M, d_z]` of payloads that this model's encoder wrote.

        Raises:
            PayloadError: damaged bytes, another shape, or another model's fingerprint.
        """
        latents = []
        expected = (self.encoder_config.latents, self.encoder_config.d_z)
        for i, payload in enumerate(payloads):
            latent, header = wire.unpack(payload)
            if header.fingerprint != self.fingerprint:
                raise PayloadError(
                    f"payload {i} was written by model {header.fingerprint:#06x}, this is "
                    f"{self.fingerprint:#06x}; decode it with the model that encoded it"
                )
            if tuple(latent.shape) != expected:
                raise PayloadError(
                    f"payload {i} holds a latent {tuple(latent.shape)}, this model's is {expected}"
                )
            latents.append(latent)
        return torch.stack(latents).to(next(self.parameters()).device)

    def check_reader(self, reader: Reader) -> None:
        """Raise unless this is the reader, weight for weight, that the adapter was trained for."""
        card = self.cards.get(reader.name)
        if card is None:
            raise ConfigError(
                f"no adapter for reader {reader.name!r}; there are {sorted(self.cards)}"
            )
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
        config: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "mode": self.mode,
            "encoder": asdict(self.encoder_config),
            "quantizer": asdict(self.quantizer),
            "adapter": asdict(self.adapter_config),
            "readers": {name: asdict(card) for name, card in self.cards.items()},
            "trained_parameters": sum(p.numel() for _, p in trained),
            "files": {name: file_entry(folder / name) for name in files},
        }
        config["sha256"] = _digest(config)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Interlingua:
        """Load what `save_pretrained` wrote.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        folder = Path(folder)
        config = _read_config(folder)
        encoder_config = EncoderConfig(**config["encoder"])
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
            {name: ReaderCard(**card) for name, card in config["readers"].items()},
            encoder_config=encoder_config,
            quantizer=QuantizerConfig(**config["quantizer"]),
            adapter=AdapterConfig(**config["adapter"]),
            mode=config["mode"],
        )
        model.load_state_dict(read_tensors(folder / "model.safetensors"))
        return model.eval()


def _digest(config: Mapping[str, Any]) -> str:
    """sha256 of a config.json's values but this one."""
    values = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json, once it and the files that it lists are known to be undamaged."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {folder} a saved model?") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} is no saved model of format version {FORMAT_VERSION}")
    if config.get("sha256") != _digest(config):
        raise CheckpointError(f"{path} was changed after it was written; copy the folder again")
    for name, entry in config["files"].items():
        file = folder / name
        if not file.is_file() or file_entry(file) != entry:
            raise CheckpointError(
                f"{file} is missing or damaged (config.json has its sha256); copy the folder again"
            )
    return config


def build_encoder(config: EncoderConfig, readers: Mapping[str, Reader]) -> Encoder:
    """A fresh encoder. An LM encoder copies the weights of the reader with the same source, if
    any."""
    if config.kind == "byte":
        return ByteEncoder(config)
    for reader in readers.values():
        if reader.source == config.source:
            core = cast(PreTrainedModel, copy.deepcopy(reader.backbone).float())
            tokenizer = reader.tokenizer
            break
    else:
        core = load_weights(AutoModel, config.source, dtype=torch.float32)
        tokenizer = load_tokenizer(config.source)
    if config.gradient_checkpointing:
        checkpoint_activations(core)
    return LMEncoder(core.train(), tokenizer, config)
