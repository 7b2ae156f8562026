"""What a run takes, computed from its configuration alone: no weights are loaded.

    print("\\n".join(budget(load_preset("squad_llama_qwen")).lines()))

Parameter counts and payload sizes are exact, the latter with version 1 of the wire format: the
model is built on torch's meta device. Memory and time are estimated (`run_costs.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.models.encoders.base import Encoder
from latentwire_fast.models.interlingua import LORA, Interlingua
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.kv_geometry import KVGeometry
from latentwire_fast.readers.shapes import Shape, shape_of
from latentwire_fast.registry import BOTTLENECKS, ENCODERS
from latentwire_fast.training.builders import named_sources
from latentwire_fast.training.frozen_parts import check_frozen, is_within
from latentwire_fast.training.run_costs import LM, Lengths, RunCosts
from latentwire_fast.training.warm_start import warm_start

GPU, GPU_FLOPS, GPU_BYTES, MFU = "H100 (bf16)", 989e12, 80e9, 0.35


@dataclass(frozen=True)
class Budget:
    """What a run takes.

    Attributes:
        trained, frozen: parameters by part.
        payload: bytes of an example with all latents, by the bits that the bottleneck sends.
        memory: bytes on the device by part.
        flops: operations of the training by stage.
        lengths: tokens of an example.
    """

    trained: Mapping[str, int]
    frozen: Mapping[str, int]
    payload: Mapping[int, int]
    memory: Mapping[str, float]
    flops: Mapping[str, float]
    lengths: Lengths
    notes: tuple[str, ...] = ()

    @property
    def hours(self) -> float:
        """On `GPU`, at `MFU`."""
        return sum(self.flops.values()) / (GPU_FLOPS * MFU) / 3600

    def lines(self) -> list[str]:
        """A table for the terminal."""
        size = self.lengths
        total = sum(self.memory.values())
        fits = "fits" if 1.1 * total < GPU_BYTES else "does not fit"
        return [
            "dry run: nothing was loaded or trained",
            *_section("trained parameters", self.trained, "{:,.0f}"),
            *_section("frozen parameters", self.frozen, "{:,.0f}"),
            f"payload of an example, bytes: {_listed(self.payload)}",
            f"an example: {size.context:.0f} tokens of context, {size.question:.0f} of a question, "
            f"{size.answer:.0f} of an answer (estimated)",
            *_section("memory, GB (estimated)", _scaled(self.memory, 1e-9), "{:,.3f}"),
            f"  {fits} in {GPU_BYTES / 1e9:.0f} GB, with a tenth for what the allocator keeps",
            *_section("training, PFLOP (estimated)", _scaled(self.flops, 1e-15), "{:,.3g}"),
            f"{self.hours:.2f} hours on one {GPU}, at {MFU:.0%} of {GPU_FLOPS / 1e12:.0f} TFLOP/s",
            *self.notes,
        ]


def _scaled(values: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: factor * value for name, value in values.items()}


def _section(title: str, values: Mapping[str, float], form: str) -> Iterable[str]:
    yield f"{title}: {form.format(sum(values.values()))}"
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        yield f"  {name:<{width}}  {form.format(value)}"


def budget(config: RunConfig) -> Budget:
    """The budget of a run.

    Raises:
        ConfigError: the shape of a reader, or of the encoder's LM, is not known here; or a stage
            names parts or data that the run has not.
        CheckpointError: a run that it begins as is not trained.
    """
    shapes = {name: shape_of(r.source) for name, r in config.readers.items()}
    model = _model(config, shapes)
    _check_names(config, model)
    core = getattr(model.encoder, LM, None)
    lm = None if core is None else Shape.of(core.config)
    lengths = Lengths.of(config)
    notes = []
    if config.base is not None:
        model.encoder.requires_grad_(False)
        notes.append("the encoder is the base's, and is not trained")
    if lm is None:
        notes.append("the activations of an encoder without an LM are not counted")
    if any(o.kind == "kd" for stage in config.stages for o in stage.objectives):
        each = lengths.answer * 2 * sum(shape.width for shape in shapes.values())
        notes.append(
            f"the teacher's cache takes {each:,.0f} bytes on disk per question (estimated)"
        )
    if any(stage.epochs is not None for stage in config.stages):
        notes.append("stages in epochs are not counted: their steps follow from the data")
    notes += _payload_notes(model)
    costs = RunCosts(config, shapes, model, lm, lengths)
    return Budget(
        trained=_by_part(model, trained=True),
        frozen=_by_part(model, trained=False)
        | {f"reader {name}": shape.parameters for name, shape in shapes.items()},
        payload=_payload(model, model.encoder_config.latents),
        memory=costs.memory(),
        flops={stage.name: stage.steps * costs.step_flops(stage) for stage in config.stages},
        lengths=lengths,
        notes=tuple(notes),
    )


def _model(config: RunConfig, shapes: Mapping[str, Shape]) -> Interlingua:
    """What is trained, on the meta device."""
    sources = {name: reader.source for name, reader in config.readers.items()}
    cards = {name: _card(shape, sources[name]) for name, shape in shapes.items()}
    encoder: Encoder = ENCODERS.part_of(config.encoder).outline(config.encoder)
    with torch.device("meta"):
        return Interlingua(
            encoder,
            cards,
            bottleneck=config.bottleneck,
            attachments=config.attachments,
            mode=config.mode,
            private_slots=config.private_slots,
        )


def _check_names(config: RunConfig, model: Interlingua) -> None:
    """Raise where a training would: what stages and `warm_start` name has to be there."""
    named_sources(config)
    loras = [f"{LORA}.{name}" for name, reader in config.readers.items() if reader.lora is not None]
    given = [part for stage in config.stages for part in stage.frozen if is_within(part, loras)]
    names = [name for name, _ in model.trained_parameters()]
    check_frozen(config.stages, [*names, *loras, *given])  # updates have no outline
    for part, run in config.warm_start.items():
        if not is_within(part, [LORA]):
            warm_start(model, part, Path(run))


def _card(shape: Shape, source: str) -> ReaderCard:
    """The card of a reader of which only the shape is known."""
    rms = ((1.0, 1.0),) * shape.layers
    geometry = KVGeometry(shape.layers, shape.kv_heads, shape.head_width, rms)
    return ReaderCard(shape.width, 1.0, "", geometry, source, shape.layers)


def _by_part(model: Interlingua, *, trained: bool) -> dict[str, int]:
    """Parameters of the model by part, those that are trained or the others."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad is not trained:
            continue
        steps = name.split(".")
        part = "encoder"
        if steps[0] == "encoder" and steps[1] == LM:
            part = "encoder's LM"
        elif steps[0] == "attachments":
            part = f"{steps[2]} of {steps[1]}"
        elif steps[0] == "task_tokens":
            part = f"task tokens of {steps[1]}"
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def _payload(model: Interlingua, latents: int) -> dict[int, int]:
    """Bytes of an example with so many latents, at each width, as a fresh bottleneck packs them."""
    settings = model.encoder_config
    drawn = torch.Generator().manual_seed(0)
    latent_BMd = torch.randn(1, latents, settings.d_z, generator=drawn)
    config = model.bottleneck_config
    with torch.random.fork_rng(devices=[]):  # codes are drawn
        bottleneck = BOTTLENECKS.part_of(config).build(
            config, latents=settings.latents, d_z=settings.d_z
        )
    return {
        bits: len(bottleneck.pack(latent_BMd, bits=bits, fingerprint=0)[0])
        for bits in sorted(config.rates)
    }


def _payload_notes(model: Interlingua) -> Iterable[str]:
    """What the bytes of a payload go by besides."""
    if model.encoder_config.varies:
        yield "payloads are those of texts with all latents; shorter texts have smaller ones"
    for name in model.slots.private:
        sizes = _payload(model, model.slots.count(name))
        yield f"payload for reader {name} alone, bytes: {_listed(sizes)}"
    if model.bottleneck.fits_texts:
        yield "payloads are those without a learned prior, with which they are mostly smaller"
    if model.bottleneck.version > 1:
        yield "payloads of version 2 differ by a few bytes from text to text"


def _listed(sizes: Mapping[int, int]) -> str:
    """Bytes of a payload by width."""
    return ", ".join(f"{count:,} at {bits} bits" for bits, count in sizes.items())
