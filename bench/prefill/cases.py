"""Rows of the prefill benchmark as something that runs: from a request to a token on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache

from bench.prefill.clock import Clock, Sample
from bench.prefill.rows import COLD, DEEP, WARM, Row
from bench.prefill.shapes import Workload, build_encoder, rest_prompts, split_prompts, text_prompts
from latentwire_fast import wire
from latentwire_fast.config.schema import AttachmentConfig
from latentwire_fast.models.encoders.lm import LMEncoder
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ATTACHMENTS
from latentwire_fast.serving import PayloadKind, Receiver, ReceiverOptions
from latentwire_fast.serving.input_buffer import lay_out

FINGERPRINT = 1
GROUP_SIZE = 32


@dataclass
class Bench:
    """One reader with everything that its rows share.

    Attributes:
        adapter: latent to soft tokens; freshly drawn, as the deep prefix is.
        dtype: of reader, adapters and encoder.
        drawn_on: where adapters draw their weights, whose generator decides them; `device` if not
            given.
        scratch: a folder for the encoder's weights.
        seed: of the latents that stand for encoded texts in rows without an encoder.
    """

    reader: Reader
    encoder_source: str
    adapter: AttachmentConfig
    d_z: int
    dtype: torch.dtype
    device: str
    scratch: Path
    seed: int = 0
    drawn_on: str | None = None

    def payloads(self, latent_BMd: Tensor, bits: int) -> list[bytes]:
        return wire.pack_batch(
            latent_BMd, bits=bits, group_size=GROUP_SIZE, fingerprint=FINGERPRINT
        )

    def random_payloads(self, rows: int, latents: int, bits: int) -> list[bytes]:
        """Payloads that some encoder might have sent."""
        generator = torch.Generator().manual_seed(self.seed)
        return self.payloads(torch.randn(rows, latents, self.d_z, generator=generator), bits)

    def receiver(
        self,
        *,
        latents: int,
        engine: str,
        clock: Clock,
        deep: bool = False,
    ) -> Receiver:
        """A receiver with freshly drawn adapters."""
        shape = {"latents": latents, "d_z": self.d_z}
        config = DEEP if deep else self.adapter
        reader = self.reader
        # Without the digest of its weights, which takes longer than the rows: nobody asks for it.
        card = ReaderCard(reader.d_model, reader.embedding_rms, "", reader.kv_geometry)
        torch.manual_seed(self.seed)
        with torch.device(self.drawn_on or self.device):
            part = ATTACHMENTS.part_of(config).build(config, card, **shape)
        part.to(self.device, self.dtype).eval().requires_grad_(False)
        return Receiver(
            self.reader,
            None if deep else part,
            deep_prefix=part if deep else None,
            payload_kind=PayloadKind(**shape, fingerprint=FINGERPRINT),
            options=ReceiverOptions(engine=engine, mark=clock.mark),  # type: ignore[arg-type]
        )

    def encoder(self, latents: int, workload: Workload) -> LMEncoder:
        torch.manual_seed(self.seed)
        return build_encoder(
            self.encoder_source,
            latents=latents,
            d_z=self.d_z,
            max_tokens=2 * workload.tokens + 64,
            dtype=self.dtype,
            device=self.device,
        )

    def weights_file(self, core: nn.Module) -> Path:
        """The encoder's weights as a file."""
        path = self.scratch / "encoder.safetensors"
        if not path.exists():
            save_file({k: v.contiguous() for k, v in core.state_dict().items()}, path)
        return path


@dataclass
class Case:
    """A row that can be run.

    Attributes:
        run: one timed prefill.
        logits: of the first token, untimed: what the gate compares.
        reference: the row, if any, that must have the same logits.
        payload_bytes: of one payload, measured.
    """

    row: Row
    run: Callable[[], Sample]
    logits: Callable[[], Tensor]
    reference: Row | None = None
    payload_bytes: int | None = None


def question_prompts(bench: Bench, workload: Workload) -> list[Prompt]:
    """A workload's questions with room for a latent."""
    turns = [Turn(question) for question in workload.questions]
    return bench.reader.prompts.build_many(turns, latent="context")


def build_case(bench: Bench, row: Row, workload: Workload) -> Case:
    """Make one row runnable.

    Args:
        workload: the texts of its batch; of rows that do not depend on the text, their questions.
    """
    makers: Mapping[str, Callable[[Bench, Row, Workload], Case]] = {
        "text": _text,
        "latent": _encoded,
        "latent_cached": _cached,
        "deep_prefix": _cached,
        "kv_reuse": _kv_reuse,
    }
    return makers[row.method](bench, row, workload)


def _finish(clock: Clock, logits_BV: Tensor) -> Sample:
    token_B = logits_BV.argmax(-1)
    clock.mark("token")
    token_B.tolist()
    return clock.stop()


def _eager(row: Row) -> Row | None:
    """This row in the engine that is transformers' own path; None where it is that one already."""
    return None if row.engine == "eager" else Row(**{**row.__dict__, "engine": "eager"})


def _text(bench: Bench, row: Row, workload: Workload) -> Case:
    clock = Clock(bench.device)
    options = ReceiverOptions(engine=row.engine, mark=clock.mark)  # type: ignore[arg-type]
    receiver = Receiver.for_text(bench.reader, options=options)
    builder = bench.reader.prompts

    def run() -> Sample:
        clock.start()
        prompts = text_prompts(builder, workload)
        clock.mark("tokenise")
        return _finish(clock, receiver.prefill(prompts).logits_BV)

    def logits() -> Tensor:
        return receiver.prefill(text_prompts(builder, workload)).logits_BV

    return Case(row, run, logits, _eager(row))


def _cached(bench: Bench, row: Row, workload: Workload) -> Case:
    clock = Clock(bench.device)
    latents, bits = row.latents or 0, row.bits or 0
    deep = row.method == "deep_prefix"
    receiver = bench.receiver(latents=latents, engine=row.engine, deep=deep, clock=clock)
    payloads = bench.random_payloads(row.batch, latents, bits)

    def run() -> Sample:
        clock.start()
        prompts = question_prompts(bench, workload)
        clock.mark("tokenise")
        return _finish(clock, receiver.prefill(prompts, payloads=payloads).logits_BV)

    def logits() -> Tensor:
        return receiver.prefill(question_prompts(bench, workload), payloads=payloads).logits_BV

    return Case(row, run, logits, _eager(row), len(payloads[0]))


@torch.no_grad()
def _encoded(bench: Bench, row: Row, workload: Workload) -> Case:
    clock = Clock(bench.device)
    latents, bits = row.latents or 0, row.bits or 0
    receiver = bench.receiver(latents=latents, engine=row.engine, clock=clock)
    encoder = bench.encoder(latents, workload)
    cold = row.encoder == "cold"
    file = bench.weights_file(encoder.core) if cold else None

    @torch.no_grad()
    def run() -> Sample:
        if file is not None:
            _unload(encoder.core)
        clock.start()
        if file is not None:
            encoder.core.load_state_dict(load_file(file, device=bench.device), assign=True)
            clock.mark(COLD)
        payloads = bench.payloads(encoder(workload.contexts), bits)
        clock.mark(WARM)
        prompts = question_prompts(bench, workload)
        clock.mark("tokenise")
        return _finish(clock, receiver.prefill(prompts, payloads=payloads).logits_BV)

    @torch.no_grad()
    def logits() -> Tensor:
        payloads = bench.payloads(encoder(workload.contexts), bits)
        return receiver.prefill(question_prompts(bench, workload), payloads=payloads).logits_BV

    size = len(bench.random_payloads(1, latents, bits)[0])
    return Case(row, run, logits, _eager(row), size)


def _unload(module: nn.Module) -> None:
    """Give up the memory of a module's weights (and keep its buffers, which no file has)."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(weight.to("meta"), requires_grad=False))


@torch.no_grad()
def _kv_reuse(bench: Bench, row: Row, workload: Workload) -> Case:
    """The context's keys and values are in host memory, as if they had been received; what follows
    them is read behind them."""
    clock, reader = Clock(bench.device), bench.reader
    held_ids, rests = split_prompts(reader.prompts, workload)
    shortest = min(map(len, held_ids))
    ids_BN = torch.tensor([ids[:shortest] for ids in held_ids])
    layers = reader.backbone(input_ids=ids_BN.to(reader.device), use_cache=True).past_key_values
    held = torch.stack([torch.stack([layer.keys, layer.values]) for layer in layers.layers]).cpu()
    if bench.device != "cpu":
        held = held.pin_memory()
    del layers
    past = held.shape[4]

    @torch.no_grad()
    def read(asked: list[Prompt]) -> Tensor:
        layout = lay_out(asked, soft_tokens=None, pad_id=reader.pad_id)
        ids_BT = torch.from_numpy(layout.ids_BT).to(reader.device)
        last_B = torch.from_numpy(layout.lengths_B - 1).to(reader.device)
        clock.mark("parse")
        cache = DynamicCache(config=reader.model.config)
        reader.filler.fill(cache, prefix_L2BHPD=held, batch_size=row.batch, stable=True)
        clock.mark("placement")
        positions = torch.arange(past, past + layout.width, device=reader.device)[None]
        hidden_BTD = reader.backbone(
            input_ids=ids_BT, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        logits_BV = reader.logits(hidden_BTD[torch.arange(row.batch, device=reader.device), last_B])
        clock.mark("reader")
        return logits_BV

    def run() -> Sample:
        clock.start()
        asked = rest_prompts(reader.prompts, rests)
        clock.mark("tokenise")
        return _finish(clock, read(asked))

    # Contexts of one length each: then it is what reading all of the text would have given.
    same = all(len(ids) == shortest for ids in held_ids)
    reference = Row(row.reader, "text", "eager", row.batch, row.text_tokens) if same else None
    return Case(row, run, lambda: read(rest_prompts(reader.prompts, rests)), reference)
