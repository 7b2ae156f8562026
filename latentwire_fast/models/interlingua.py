"""Encoder, bottleneck and every reader's attachments as one model: what is trained, saved and
shared.

    model = Interlingua.from_pretrained("runs/demo/model")
    payload = model.encode_payloads(["Nulnak is already 94 years old."])[0]     # bytes
    latent_BMd = model.decode_payloads([payload])
    soft_BMD = model.prefix("llama", latent_BMd)
    given = model.reader_inputs("llama", latent_BMd)                            # for generate

Shapes: B batch, M latents, d the latent's width, D a reader's; L layers, H key/value heads of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentwire_fast.config.schema import AttachmentConfig, BottleneckConfig, EncoderConfig, Mode
from latentwire_fast.errors import CheckpointError, ConfigError, PayloadError
from latentwire_fast.files.tensors import parameter_digest, read_tensors
from latentwire_fast.models import saved_model
from latentwire_fast.models.attachments.base import Attachment, Place, ReaderInputs
from latentwire_fast.models.bottlenecks.base import Bottleneck
from latentwire_fast.models.encoders.base import Encoder
from latentwire_fast.models.poolers.base import Selection
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.lora import ReaderLora
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ATTACHMENTS, BOTTLENECKS, ENCODERS
from latentwire_fast.wire.header import Header, located

Task = Literal["autoencode", "continue"]
TASKS: tuple[Task, ...] = ("autoencode", "continue")
LORA = "lora"  # the folder of a saved model that holds those of its readers


class Interlingua(nn.Module):
    """One latent language: an encoder that writes it, a bottleneck that sends it, and attachments
    that let each reader understand it.

    Args:
        encoder: a ready module (see `build_encoder`).
        readers: a card per reader name; attachments are built for these.
        mode: `context`: the latent stands for the context, the question stays text. `pure`: it
            stands for both, so the encoder may answer and send the answer.

    Attributes:
        cards: of its readers, by name.
        lora: the low-rank updates of those readers that have them, by name.
    """

    table_parameters: ClassVar[tuple[str, ...]] = ("task_tokens",)

    def __init__(
        self,
        encoder: Encoder,
        readers: Mapping[str, ReaderCard],
        *,
        bottleneck: BottleneckConfig,
        attachments: Sequence[AttachmentConfig],
        mode: Mode,
    ) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.cards = dict(readers)
        self.attachment_configs = tuple(attachments)
        self.encoder = encoder
        self.attachments = nn.ModuleDict()
        self.task_tokens = nn.ParameterDict()
        self.lora = nn.ModuleDict()
        shape = {"latents": encoder.config.latents, "d_z": encoder.config.d_z}
        self.bottleneck: Bottleneck = BOTTLENECKS.part_of(bottleneck).build(bottleneck, **shape)
        for name, card in self.cards.items():
            built = {
                config.kind: ATTACHMENTS.part_of(config).build(config, card, **shape)
                for config in self.attachment_configs
            }
            self.attachments[name] = nn.ModuleDict(built)
            self.task_tokens[name] = nn.Parameter(
                torch.randn(len(TASKS), card.d_model) * card.embedding_rms
            )

    @property
    def encoder_config(self) -> EncoderConfig:
        """The encoder's settings."""
        return self.encoder.config

    @property
    def bottleneck_config(self) -> BottleneckConfig:
        """The bottleneck's settings."""
        return self.bottleneck.config

    def encode(self, contexts: Sequence[str], questions: Sequence[str] | None = None) -> Tensor:
        """Latents `[B, M, d_z]` fp32, unquantised. Pure mode needs the questions, context mode
        refuses.

        Raises:
            ConfigError: no list of texts; questions given or missing against the mode, or not one
                for each context.
        """
        self._check_texts(contexts, questions)
        return self.encoder(contexts, questions)

    def select(
        self, contexts: Sequence[str], questions: Sequence[str] | None = None
    ) -> tuple[Tensor, Selection]:
        """Latents `[B, M, d_z]` and the positions that they stand at (`Encoder.select`).

        Raises:
            ConfigError: as `encode`, or the encoder selects no positions.
        """
        self._check_texts(contexts, questions)
        return self.encoder.select(contexts, questions)

    def _check_texts(self, contexts: Sequence[str], questions: Sequence[str] | None) -> None:
        if isinstance(contexts, str) or isinstance(questions, str) or not contexts:
            raise ConfigError("no list of texts to encode; give a list, such as [text]")
        if (questions is not None) != (self.mode == "pure"):
            raise ConfigError(
                f"this model was trained in {self.mode!r} mode: its encoder "
                + (
                    "needs the question with the context"
                    if questions is None
                    else "reads no question"
                )
            )
        if questions is not None and len(questions) != len(contexts):
            raise ConfigError(
                f"{len(questions)} questions for {len(contexts)} contexts; give one for each"
            )

    def parts(self, reader: str) -> dict[str, Attachment]:
        """The attachments of one reader by kind.

        Raises:
            ConfigError: none were trained for that reader.
        """
        if reader not in self.cards:
            raise ConfigError(f"no adapter for reader {reader!r}; there are {sorted(self.cards)}")
        parts = cast(nn.ModuleDict, self.attachments[reader])
        return {kind: cast(Attachment, part) for kind, part in parts.items()}

    def attachment(self, reader: str, gives: Place) -> Attachment | None:
        """The attachment that makes one entry of a reader's inputs, if one does."""
        found = (part for part in self.parts(reader).values() if part.gives == gives)
        return next(found, None)

    @property
    def positions(self) -> int:
        """How many of a reader's positions a latent takes."""
        parts = self.parts(next(iter(self.cards))).values()
        return sum(part.positions - part.head_positions for part in parts)

    def quantize(self, latent_BMd: Tensor, bits: int | None = None) -> Tensor:
        """What the receiver gets at this width (the bottleneck's own if not given); gradients pass
        straight through."""
        bits = self.bottleneck.config.bits if bits is None else bits
        return cast(Tensor, self.bottleneck(latent_BMd, bits))

    def prefix(self, reader: str, latent_BMd: Tensor, *, gain: float = 1.0) -> Tensor:
        """Soft tokens `[B, M, D]` of one reader; M = 0 where it has none."""
        soft = self.attachment(reader, "prefixes")
        if soft is None:
            return latent_BMd.new_zeros(len(latent_BMd), 0, self.cards[reader].d_model)
        return cast(Tensor, soft(latent_BMd, gain=gain))

    def deep_prefix(self, reader: str, latent_BMd: Tensor, *, gain: float = 1.0) -> Tensor | None:
        """Keys and values `[L, 2, B, H, P, d_head]` of one reader; None where it has none."""
        deep = self.attachment(reader, "deep")
        return None if deep is None else cast(Tensor, deep(latent_BMd, gain=gain))

    def reader_inputs(
        self, reader: str, latent_BMd: Tensor, *, gain: float = 1.0, task: Task | None = None
    ) -> ReaderInputs:
        """Inputs of one reader in the latent's place.

        Args:
            gain: see the attachments.
            task: puts a pretraining task's token behind the soft tokens.
        """
        soft = self.prefix(reader, latent_BMd, gain=gain)
        if task is not None:
            token = self.task_tokens[reader][TASKS.index(task)]
            soft = torch.cat([soft, token.expand(len(soft), 1, -1)], 1)
        deep = self.attachment(reader, "deep")
        return {
            "prefixes": soft,
            "deep": self.deep_prefix(reader, latent_BMd, gain=gain),
            "head": 0 if deep is None else deep.head_positions,
        }

    @torch.no_grad()
    def prefix_rms(self, reader: str, latent_BMd: Tensor) -> dict[str, float]:
        """Root mean squares of what one reader is given, by name, for the log."""
        rms: dict[str, float] = {}
        for part in self.parts(reader).values():
            rms |= part.rms(latent_BMd)
        return rms

    @property
    def fingerprint(self) -> int:
        """16 bits of a digest, which the payloads that it writes carry, so that a stranger's are
        refused.

        Cached: read it only once training is over.
        """
        return self.fingerprints[self.bottleneck.version]

    @cached_property
    def fingerprints(self) -> dict[int, int]:
        """By version of the wire format: 16 bits of the encoder's digest; in version 2 of all that
        a body is read with, since its frame says nothing else about that."""
        encoder = parameter_digest(self.encoder.state_dict().items())
        facts = json.dumps([encoder, *self.bottleneck.format_facts()])
        tensors = parameter_digest(self.bottleneck.format_tensors().items())
        whole = hashlib.sha256(f"{facts} {tensors}".encode()).hexdigest()
        return {1: int(encoder[:4], 16), 2: int(whole[:4], 16)}

    def fit_bottleneck(self, latents: Sequence[Tensor]) -> None:
        """Have the bottleneck learn what it can from latents `[B, M, d]` of training texts, now
        that the encoder stays as it is. Payloads that were made before are another model's then."""
        self.bottleneck.fit(latents)
        self.__dict__.pop("fingerprints", None)

    def payloads(self, latent_BMd: Tensor, *, bits: int | None = None) -> list[bytes]:
        """One payload per latent, made on the latents' device: only the bytes leave it."""
        bits = self.bottleneck.config.bits if bits is None else bits
        return self.bottleneck.pack(latent_BMd, bits=bits, fingerprint=self.fingerprint)

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
        self._check_texts(contexts, questions)
        for text, question in zip(contexts, questions or repeat(None), strict=False):
            self.encoder.check_length(text, question)
        return self.payloads(self.encode(contexts, questions), bits=bits)

    def decode_payloads(self, payloads: Sequence[bytes]) -> Tensor:
        """Latents `[B, M, d_z]` of payloads of one width that this model's encoder wrote, unpacked
        on the model's device.

        Raises:
            PayloadError: damaged bytes, another shape, or another model's fingerprint.
        """
        return self.open_payloads(payloads)[0]

    def open_payloads(self, payloads: Sequence[bytes]) -> tuple[Tensor, list[Header]]:
        """As `decode_payloads`, with the payloads' headers."""
        for i, payload in enumerate(payloads):
            with located(f"payload {i}"):
                header = self.bottleneck.read_header(payload)
            own = self.fingerprints[header.version]
            if header.fingerprint != own:
                raise PayloadError(
                    f"payload {i} was written by model {header.fingerprint:#06x}, this is "
                    f"{own:#06x}; decode it with the model that encoded it"
                )
        device = next(self.parameters()).device
        latent_BMd, headers = self.bottleneck.unpack(payloads, device=device)
        found, expected = headers[0], self.encoder_config
        if (found.latents, found.d_z) != (expected.latents, expected.d_z):
            raise PayloadError(
                f"the payloads hold latents {(found.latents, found.d_z)}, this model's are "
                f"{(expected.latents, expected.d_z)}"
            )
        return latent_BMd, headers

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

    def adapt(self, reader: Reader, *, merge: bool = False) -> None:
        """Have a reader read with its low-rank updates, where this model has any for it.

        Args:
            merge: add them to its weights for good (see `ReaderLora.merge`).

        Raises:
            ConfigError, CheckpointError: as `check_reader` and `ReaderLora.attach`; or the reader
                has updates that are not of this model.
        """
        self.check_reader(reader)
        lora = self.lora_of(reader.name)
        if lora is not None:
            lora.attach(reader)
            if merge:
                lora.merge()
        elif reader.lora is not None:
            raise ConfigError(
                f"reader {reader.name!r} has low-rank updates (LoRA) of another model; load it "
                "again for this one"
            )

    def lora_of(self, reader: str) -> ReaderLora | None:
        """The low-rank updates of one reader, if it has any."""
        return cast(ReaderLora, self.lora[reader]) if reader in self.lora else None

    def trained_state(self) -> dict[str, Tensor]:
        """Every tensor that is not rebuilt from elsewhere, by name."""
        return {name: value.detach() for name, value in self.state_dict().items()}

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named parameters that receive gradients."""
        return [(n, p) for n, p in self.named_parameters() if p.requires_grad]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json, model.safetensors, what the encoder saves besides, and readers'
        low-rank updates in `lora/NAME`, as peft does."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            key: value.cpu().contiguous()
            for key, value in self.trained_state().items()
            if not key.startswith(f"{LORA}.")
        }
        save_file(state, folder / "model.safetensors")
        files = ["model.safetensors", *self.encoder.save(folder)]
        for name in self.lora:
            place = f"{LORA}/{name}"
            saved = cast(ReaderLora, self.lora[name]).save(folder / place)
            files += [f"{place}/{file}" for file in saved]
        settings = saved_model.SavedModel(
            mode=self.mode,
            encoder=self.encoder_config,
            bottleneck=self.bottleneck_config,
            attachments=self.attachment_configs,
            readers=self.cards,
            lora=tuple(sorted(self.lora)),
        )
        size = sum(p.numel() for _, p in self.trained_parameters())
        saved_model.write(folder, settings, trained_parameters=size, files=files)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Interlingua:
        """Load what `save_pretrained` wrote.

        Raises:
            CheckpointError: a file is missing or damaged, another version wrote them, or they name
                a part that is not registered.
        """
        folder = Path(folder)
        saved = saved_model.read(folder)
        model = cls(
            ENCODERS.part_of(saved.encoder).load(folder, saved.encoder),
            saved.readers,
            bottleneck=saved.bottleneck,
            attachments=saved.attachments,
            mode=saved.mode,
        )
        model.load_state_dict(read_tensors(folder / "model.safetensors"))
        for name in saved.lora:
            model.lora[name] = ReaderLora.load(folder / LORA / name)
        return model.eval()
