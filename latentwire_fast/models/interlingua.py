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
from functools import cached_property, partial
from itertools import repeat
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentwire_fast.config.schema import AttachmentConfig, BottleneckConfig, EncoderConfig, Mode
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.files.tensors import parameter_digest, read_tensors
from latentwire_fast.models import saved_model
from latentwire_fast.models.attachments.base import Attachment, Place, ReaderInputs
from latentwire_fast.models.bottlenecks.base import Bottleneck
from latentwire_fast.models.encoders.base import Encoder
from latentwire_fast.models.encoders.chunks import Chunks, chunks_of
from latentwire_fast.models.poolers.base import Selection
from latentwire_fast.models.ragged import pack_ragged, unpack_ragged
from latentwire_fast.models.slots import Slots
from latentwire_fast.prompts.batch import LayerUpdates
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.lora import ReaderLora
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ATTACHMENTS, BOTTLENECKS, ENCODERS
from latentwire_fast.wire.header import Header, located

Task = Literal["autoencode", "continue"]
TASKS: tuple[Task, ...] = ("autoencode", "continue")
LORA = "lora"  # the folder of a saved model that holds those of its readers
HEADS = "heads"  # what is trained with a model and is no part of it


class Interlingua(nn.Module):
    """One latent language: an encoder that writes it, a bottleneck that sends it, and attachments
    that let each reader understand it.

    Args:
        encoder: a ready module (see `build_encoder`).
        readers: a card per reader name; attachments are built for these.
        mode: `context`: the latent stands for the context, the question stays text. `pure`: it
            stands for both, so the encoder may answer and send the answer.
        private_slots: how many of a latent's slots are a reader's own, by its name.

    Attributes:
        cards: of its readers, by name.
        slots: which of a latent's slots each reader gets.
        lora: the low-rank updates of those readers that have them, by name.
        heads: what objectives train beside the model, by objective; it is not saved.
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
        private_slots: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.cards = dict(readers)
        self.attachment_configs = tuple(attachments)
        self.encoder = encoder
        self.attachments = nn.ModuleDict()
        self.task_tokens = nn.ParameterDict()
        self.lora = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.slots = Slots(encoder.config.latents, dict(private_slots or {}))
        shape = {"latents": encoder.config.latents, "d_z": encoder.config.d_z}
        self.bottleneck: Bottleneck = BOTTLENECKS.part_of(bottleneck).build(bottleneck, **shape)
        for name, card in self.cards.items():
            shape = {"latents": self.slots.count(name), "d_z": encoder.config.d_z}
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

    def positions_of(self, reader: str, payload: bytes | None = None) -> int:
        """How many of one reader's positions a payload takes; a latent, at most, where none is
        given."""
        latents = self.encoder_config.latents if payload is None else self.latents_of(payload)
        return sum(part.positions_of(latents) for part in self.parts(reader).values())

    @property
    def positions(self) -> int:
        """How many of a reader's positions a latent takes, at most."""
        return max(map(self.positions_of, self.cards))

    def compared_positions_of(self, reader: str, payload: bytes | None = None) -> int:
        """How many positions of text it is compared with: those that it takes of one reader, and
        what layers attend to besides."""
        latents = self.encoder_config.latents if payload is None else self.latents_of(payload)
        return sum(part.compared_positions_of(latents) for part in self.parts(reader).values())

    def latents_of(self, payload: bytes) -> int:
        """How many latents a payload for all readers holds."""
        shape = self.encoder_config
        return self.bottleneck.read_header(payload).latents if shape.varies else shape.latents

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
        return cast(Tensor, soft(self.slots.of(reader, latent_BMd), gain=gain))

    def deep_prefix(
        self,
        reader: str,
        latent_BMd: Tensor,
        *,
        gain: float = 1.0,
        absent_BM: Tensor | None = None,
    ) -> Tensor | None:
        """Keys and values `[L, 2, B, H, P, d_head]` of one reader; None where it has none.

        Args:
            absent_BM: vectors that a latent does not have.
        """
        deep = self.attachment(reader, "deep")
        if deep is None:
            return None
        options = {} if absent_BM is None else {"absent_BM": absent_BM}
        return cast(Tensor, deep(self.slots.of(reader, latent_BMd), gain=gain, **options))

    def layer_updates(
        self, reader: str, latent_BMd: Tensor, *, gain: float = 1.0
    ) -> LayerUpdates | None:
        """Updates of the hidden states between one reader's layers; None where it has none."""
        layers = self.attachment(reader, "layers")
        if layers is None:
            return None
        return cast(LayerUpdates, layers(self.slots.of(reader, latent_BMd), gain=gain))

    def reader_inputs(
        self,
        reader: str,
        latent_BMd: Tensor,
        *,
        gain: float = 1.0,
        task: Task | None = None,
        absent_BM: Tensor | None = None,
    ) -> ReaderInputs:
        """Inputs of one reader in the latent's place.

        Args:
            gain: see the attachments.
            task: puts a pretraining task's token behind the soft tokens.
            absent_BM: vectors that a latent does not have (`Pieces.absent_RM`). What is made in
                their place is padding, for `joined_inputs` to leave out.
        """
        soft = self.prefix(reader, latent_BMd, gain=gain)
        if task is not None:
            token = self.task_token(reader, task)
            soft = torch.cat([soft, token.expand(len(soft), 1, -1)], 1)
        deep = self.attachment(reader, "deep")
        return {
            "prefixes": soft,
            "deep": self.deep_prefix(reader, latent_BMd, gain=gain, absent_BM=absent_BM),
            "head": 0 if deep is None else deep.head_positions,
            "layers": self.layer_updates(reader, latent_BMd, gain=gain),
        }

    def task_token(self, reader: str, task: Task) -> Tensor:
        """The embedding `[D]` that tells a reader which pretraining task is meant."""
        return self.task_tokens[reader][TASKS.index(task)]

    @torch.no_grad()
    def prefix_rms(self, reader: str, latent_BMd: Tensor) -> dict[str, float]:
        """Root mean squares of what one reader is given, by name, for the log."""
        rms: dict[str, float] = {}
        for part in self.parts(reader).values():
            rms |= part.rms(self.slots.of(reader, latent_BMd))
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

    def payloads(
        self,
        latent_BMd: Tensor,
        *,
        bits: int | None = None,
        reader: str | None = None,
        slots: Sequence[int] | None = None,
    ) -> list[bytes]:
        """One payload per latent, made on the latents' device: only the bytes leave it.

        Args:
            reader: leave out the slots that are other readers' own; None for all readers.
            slots: how many vectors of each latent are sent, the first ones; None: all. Needed where
                the encoder's number of latents varies (`Encoder.latent_counts`).

        Raises:
            ConfigError: no adapter was trained for that reader; `slots` are needed.
        """
        bits = self.bottleneck.config.bits if bits is None else bits
        owner = None
        if reader is not None:
            self.parts(reader)
            owner, latent_BMd = self.slots.owner(reader), self.slots.of(reader, latent_BMd)
        mark = self.slots.fingerprints(self.fingerprint)[owner]
        pack = partial(self.bottleneck.pack, bits=bits, fingerprint=mark)
        if slots is not None:
            return pack_ragged(pack, latent_BMd, slots)
        if self.encoder_config.varies:
            raise ConfigError(
                "this model's number of latents goes by the text's length: `payloads` needs it as "
                "slots=model.encoder.latent_counts(contexts, questions)"
            )
        return pack(latent_BMd)

    @torch.no_grad()
    def encode_payloads(
        self,
        contexts: Sequence[str],
        questions: Sequence[str] | None = None,
        *,
        bits: int | None = None,
        reader: str | None = None,
    ) -> list[bytes]:
        """Text to payload bytes.

        Args:
            reader: as in `payloads`.

        Raises:
            ConfigError: as `encode` and `payloads`.
            DataError: a text is longer than the encoder reads.
        """
        self._check_texts(contexts, questions)
        for text, question in zip(contexts, questions or repeat(None), strict=False):
            self.encoder.check_length(text, question)
        slots = self.encoder.latent_counts(contexts, questions)
        latent_BMd = self.encode(contexts, questions)
        return self.payloads(latent_BMd, bits=bits, reader=reader, slots=slots)

    def cut(
        self,
        contexts: Sequence[str],
        questions: Sequence[str] | None = None,
        *,
        length: int | None = None,
    ) -> Chunks:
        """Contexts in chunks of at most `length`, in the encoder's unit, at sentence ends; whole
        ones where there is none.

        Raises:
            ConfigError, DataError: as `encode` and `cut_into_chunks`.
        """
        self._check_texts(contexts, questions)
        return chunks_of(self.encoder, contexts, questions, length=length)

    @torch.no_grad()
    def encode_chunks(
        self,
        contexts: Sequence[str],
        questions: Sequence[str] | None = None,
        *,
        length: int | None = None,
        bits: int | None = None,
        reader: str | None = None,
    ) -> list[tuple[bytes, ...]]:
        """Texts of any length to several payloads each, which a `Receiver` takes in the place of
        one.

        Args:
            length: of a chunk at most, in the encoder's unit, with the context's label (and the
                question in pure mode); as much as the encoder reads unless given.
            reader: as in `payloads`.

        Raises:
            ConfigError, DataError: as `cut` and `payloads`.
        """
        length = self.encoder.limit.length if length is None else length
        chunks = self.cut(contexts, questions, length=length)
        latent_RMd = self.encode(chunks.contexts, chunks.questions)
        slots = chunks.pieces.slots
        return chunks.pieces.group(self.payloads(latent_RMd, bits=bits, reader=reader, slots=slots))

    def decode_payloads(self, payloads: Sequence[bytes], *, reader: str | None = None) -> Tensor:
        """Latents `[B, M, d_z]` of payloads of one width that this model's encoder wrote, unpacked
        on the model's device. Where a payload has fewer than M, zeros stand for the others.

        Args:
            reader: allow payloads for this reader alone too, whose latents have fewer slots.

        Raises:
            ConfigError: no adapter was trained for that reader.
            PayloadError: damaged bytes, another shape, another model's fingerprint, or payloads for
                another reader.
        """
        return self.open_payloads(payloads, reader=reader)[0]

    def open_payloads(
        self, payloads: Sequence[bytes], *, reader: str | None = None
    ) -> tuple[Tensor, list[Header]]:
        """As `decode_payloads`, with the payloads' headers."""
        if reader is not None:
            self.parts(reader)
        headers = []
        for i, payload in enumerate(payloads):
            with located(f"payload {i}"):
                headers.append(self.bottleneck.read_header(payload))
        shape, marks = self.encoder_config, self.fingerprints
        self.slots.check(headers, marks, d_z=shape.d_z, reader=reader, fewer=shape.varies)
        unpack = partial(self.bottleneck.unpack, device=next(self.parameters()).device)
        if not (shape.varies and payloads):
            return unpack(payloads)
        counts = [header.latents for header in headers]
        latent_BMd = unpack_ragged(
            lambda several: unpack(several)[0], payloads, counts, latents=shape.latents
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
            if not key.startswith((f"{LORA}.", f"{HEADS}."))
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
            private_slots=self.slots.private,
        )
        named = self.trained_parameters()
        size = sum(p.numel() for name, p in named if not name.startswith(f"{HEADS}."))
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
            private_slots=saved.private_slots,
        )
        model.load_state_dict(read_tensors(folder / "model.safetensors"))
        for name in saved.lora:
            model.lora[name] = ReaderLora.load(folder / LORA / name)
        return model.eval()
