"""Texts to the shards of a payload store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.files.atomic import write_atomically
from latentwire_fast.models.codec import LatentCodec
from latentwire_fast.wire.store.plan import StorePlan, finish_store, start_store
from latentwire_fast.wire.store.shards import Message, shard_bytes


def write_store(
    model: LatentCodec,
    folder: Path,
    plan: StorePlan,
    texts: Mapping[str, str],
    *,
    rank: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> int:
    """Write this process's shards: one in `processes`, from `rank` on. Those that are there already
    are left as they are. The last process that ends completes the store.

    Args:
        model: in eval mode, on the device that encodes.
        texts: all of the store, by id.
        progress: show a bar.

    Returns:
        How many passages were encoded now.

    Raises:
        ConfigError: the folder holds something else; as `check_plan`.
        DataError: a text that is longer than the encoder reads, and is not to be cut into chunks.
        OSError: the file system refuses.
    """
    check_plan(model, plan)
    start_store(folder, plan)
    own = range(rank, plan.shards, processes)
    todo = [shard for shard in own if not (folder / plan.name(shard)).exists()]
    done = sum(len(plan.rows(shard)) for shard in {*own} - {*todo})
    total = sum(len(plan.rows(shard)) for shard in own)
    label = "encode" if processes == 1 else f"encode (process {rank + 1} of {processes})"
    with tqdm(total=total, initial=done, desc=label, unit=" passages", disable=not progress) as bar:
        for shard in todo:
            write_shard(model, folder, plan, shard, shard_texts(plan, shard, texts), bar)
    finish_store(folder, plan)
    return total - done


def shard_texts(plan: StorePlan, shard: int, texts: Mapping[str, str]) -> dict[str, str]:
    """The passages of a shard."""
    rows = plan.rows(shard)
    return dict(islice(texts.items(), rows.start, rows.stop))


def write_shard(
    model: LatentCodec,
    folder: Path,
    plan: StorePlan,
    shard: int,
    texts: Mapping[str, str],
    bar: tqdm | None = None,
) -> None:
    """Encode a shard's passages and write its file, which appears as a whole."""
    messages = encode_texts(model, texts, plan, bar)
    content = shard_bytes([*texts], [*texts.values()], messages, model=plan.model)
    write_atomically(folder / plan.name(shard), content)


@torch.no_grad()
def encode_texts(
    model: LatentCodec, texts: Mapping[str, str], plan: StorePlan, bar: tqdm | None = None
) -> list[Message]:
    """The payload of each text; those of its chunks where the plan says that texts are cut.

    Which texts are encoded together goes by these texts alone, so that the bytes are the same
    whoever encodes them. Texts of about one length come together: little is padded.

    Raises:
        DataError: a text that is longer than the encoder reads.
    """
    if plan.chunk_length is None:
        for identifier, text in texts.items():
            _check_length(model, identifier, text)
    chunks = model.cut([*texts.values()], length=plan.chunk_length)
    order = sorted(range(len(chunks.contexts)), key=lambda i: len(chunks.contexts[i].encode()))
    payloads = [b""] * len(order)
    shown = 0
    with _computing(plan, next(model.parameters()).device):
        for start in range(0, len(order), plan.batch_size):
            batch = order[start : start + plan.batch_size]
            contexts = [chunks.contexts[i] for i in batch]
            slots = None
            if chunks.pieces.slots is not None:
                slots = [chunks.pieces.slots[i] for i in batch]
            latent_BMd = model.encode(contexts)
            packed = model.payloads(latent_BMd, bits=plan.bits, reader=plan.reader, slots=slots)
            for i, payload in zip(batch, packed, strict=True):
                payloads[i] = payload
            if bar is not None:
                reached = len(texts) * (start + len(batch)) // len(order)
                bar.update(reached - shown)
                shown = reached
    return [*(payloads if plan.chunk_length is None else chunks.pieces.group(payloads))]


def check_plan(model: LatentCodec, plan: StorePlan) -> None:
    """Raise, before any work, unless a model can make what a plan asks for.

    Raises:
        ConfigError: it has pure mode, in which there is no context without a question; another
            reader or width than it has.
    """
    if model.mode != "context":
        raise ConfigError(
            f"this model was trained in {model.mode!r} mode: its payloads hold questions too, and "
            "a store holds contexts; give a run of context mode"
        )
    if plan.reader is not None:
        model.check_name(plan.reader)
    shape = model.encoder_config
    model.bottleneck.pack(
        torch.zeros(1, shape.latents, shape.d_z, device=next(model.parameters()).device),
        bits=model.bottleneck.config.bits if plan.bits is None else plan.bits,
        fingerprint=0,
    )


def _check_length(model: LatentCodec, identifier: str, text: str) -> None:
    try:
        model.encoder.check_length(text)
    except DataError as error:
        raise DataError(f"passage {identifier!r}: {error}") from None


@contextlib.contextmanager
def _computing(plan: StorePlan, device: torch.device) -> Iterator[None]:
    """Inside the block, torch computes with the plan's threads and in its dtype."""
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    dtype = getattr(torch, plan.dtype)
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            yield
    finally:
        torch.set_num_threads(before)
