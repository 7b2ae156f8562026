"""Encoder, bottleneck and every reader's attachments as one model: what is trained, saved and
shared.

    model = Interlingua.from_pretrained("runs/demo/model")                         # or a hub id
    payload = model.encode_payloads(["Nulnak is already 94 years old."])[0]     # bytes
    latent_BMd = model.decode_payloads([payload])
    soft_BMD = model.prefix("llama", latent_BMd)
    given = model.reader_inputs("llama", latent_BMd)                            # for generate

Shapes: B batch, M latents, d the latent's width, D a reader's; L layers, H key/value heads of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentwire_fast.config.schema import AttachmentConfig, BottleneckConfig, Mode
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.files.tensors import read_tensors
from latentwire_fast.models import saved_model
from latentwire_fast.models.attachments.base import Attachment, Place, ReaderInputs
from latentwire_fast.models.codec import LatentCodec
from latentwire_fast.models.encoders.base import Encoder
from latentwire_fast.models.hub import HubModel, local_folder
from latentwire_fast.prompts.batch import LayerUpdates
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.lora import ReaderLora
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ATTACHMENTS, ENCODERS

Task = Literal["autoencode", "continue"]
TASKS: tuple[Task, ...] = ("autoencode", "continue")
LORA = "lora"  # the folder of a saved model that holds those of its readers
HEADS = "heads"  # what is trained with a model and is no part of it


class Interlingua(LatentCodec, HubModel):
    """One latent language: an encoder that writes it, a bottleneck that sends it, and attachments
    that let each reader understand it.

    Args:
        encoder: a ready module (see `build_encoder`).
        readers: a card per reader name; attachments are built for these.
        mode: `context`: the latent stands for the context, the question stays text. `pure`: it
            stands for both, so the encoder may answer and send the answer.
        private_slots: how many of a latent's slots are a reader's own, by its name.

    Attributes:
        cards, slots: as in `LatentCodec`.
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
        super().__init__(
            encoder, readers, bottleneck=bottleneck, mode=mode, private_slots=private_slots
        )
        self.attachment_configs = tuple(attachments)
        self.attachments = nn.ModuleDict()
        self.task_tokens = nn.ParameterDict()
        self.lora = nn.ModuleDict()
        self.heads = nn.ModuleDict()
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

    def parts(self, reader: str) -> dict[str, Attachment]:
        """The attachments of one reader by kind.

        Raises:
            ConfigError: none were trained for that reader.
        """
        self.check_name(reader)
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

    def save_pretrained(  # type: ignore[override]  # returns the folder
        self,
        folder: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> Path:
        """Write config.json, model.safetensors, what the encoder saves besides, and readers'
        low-rank updates in `lora/NAME`, as peft does.

        Args:
            push_to_hub: push it too, to `repo_id` or a repository of the folder's name.
            options: of `push_to_hub`, which itself calls this with `model_card_kwargs`: the model
                card is written for the hub alone, or by an evaluation.
        """
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
        if push_to_hub:
            self.push_to_hub(repo_id or folder.name, **options)
        elif "model_card_kwargs" in options:
            self.write_card(folder)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Interlingua:  # type: ignore[override]
        """Load what `save_pretrained` or `push_to_hub` wrote.

        Args:
            folder: one on this machine, or `OWNER/NAME` on the hub (`local_folder`).
            options: for the hub, such as `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            CheckpointError: a file is missing or damaged, another version wrote them, or they name
                a part that is not registered; or there is no such model on the hub.
        """
        folder = local_folder(folder, **options)
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
        model.read_card(folder)
        return model.eval()
