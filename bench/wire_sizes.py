"""Bytes and times of a trained model's payloads under each version of the wire format.

    python -m bench.wire_sizes --run runs/context

The latents are the model's own, of held-out texts; priors are learned from training texts. What a
receiver gets is the same in both versions at equal bits, so scores are those of the run. Times are
those of the bottleneck alone, on the CPU: latents to payloads, and back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from latentwire_fast import wire
from latentwire_fast.config.schema import BottleneckConfig, RunConfig
from latentwire_fast.config.serialization import read_run_config
from latentwire_fast.data.sources import load_examples
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.bottlenecks.base import Bottleneck
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.registry import BOTTLENECKS

BATCH = 50
CPU = torch.device("cpu")


def setups(own: BottleneckConfig) -> dict[str, BottleneckConfig]:
    """What is measured, by name: version 1, then version 2 without and with a prior."""
    size = getattr(own, "group_size", 32)
    found = {}
    for bits in (6, 4):
        found[f"version 1, {bits} bits"] = uniform(bits=bits, group_size=size)
    for prior in ("flat", "static", "autoregressive"):
        for bits in (6, 4, 3, 2):
            name = f"version 2, {bits} bits, {prior} prior"
            found[name] = uniform(bits=bits, group_size=size, version=2, prior=prior)
    return found


def uniform(**options: Any) -> BottleneckConfig:
    """Settings of the bottleneck `uniform`."""
    config: BottleneckConfig = BOTTLENECKS.config("uniform", **options)
    return config


@torch.no_grad()
def encoded(model: Interlingua, contexts: Sequence[str]) -> Tensor:
    """The latents `[N, M, d]` of texts."""
    parts = [model.encode(contexts[i : i + BATCH]) for i in range(0, len(contexts), BATCH)]
    return torch.cat(parts)


def distinct_contexts(config: RunConfig, split: Any, count: int) -> list[str]:
    """The first different contexts of a split of the run's data."""
    data = config.data
    examples = load_examples(data.source, split=split, count=4 * count, seed=17, data=data)
    return list(dict.fromkeys(example.context for example in examples))[:count]


def milliseconds(call: Callable[[], Any], *, repeats: int) -> float:
    """The smallest CPU time of some calls: other processes take none of it."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def measured(part: Bottleneck, latent_NMd: Tensor) -> list[float]:
    """Mean bytes, and milliseconds per payload: encoding and decoding one, and 256 together."""
    bits = part.config.bits
    payloads = part.pack(latent_NMd, bits=bits, fingerprint=1)
    row = [sum(map(len, payloads)) / len(payloads)]
    for count, repeats in ((1, 30), (256, 8)):
        several = latent_NMd.repeat(-(-count // len(latent_NMd)), 1, 1)[:count]
        sent = part.pack(several, bits=bits, fingerprint=1)
        pack = partial(part.pack, several, bits=bits, fingerprint=1)
        unpack = partial(part.unpack, sent, device=CPU)
        row += [milliseconds(call, repeats=repeats) / count for call in (pack, unpack)]
    return row


def main(*, run: Path, held: int = 300, fitted: int = 2000) -> None:
    """Print the table.

    Args:
        run: a finished run in context mode.
        held: texts that are measured.
        fitted: texts that priors are learned from.
    """
    torch.set_num_threads(1)
    folder = RunFolder(run)
    config, model = read_run_config(run), Interlingua.from_pretrained(folder.model)
    training = distinct_contexts(config, "train", fitted)
    texts = distinct_contexts(config, "heldout", held)
    assert not set(texts) & set(training)
    known, latent_NMd = encoded(model, training), encoded(model, texts)
    utf8, brotli = (
        sum(map(size, texts)) / len(texts) for size in (wire.utf8_bytes, wire.brotli_bytes)
    )
    shape = {"latents": model.encoder_config.latents, "d_z": model.encoder_config.d_z}
    print(f"{len(texts)} texts: {utf8:.1f} bytes of UTF-8, {brotli:.1f} of brotli; {shape}")
    print("| payload | bytes | of brotli | encode 1, ms | decode 1 | encode 256 | decode 256 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, setup in setups(model.bottleneck_config).items():
        part = BOTTLENECKS.part_of(setup).build(setup, **shape).eval()
        part.fit([known])
        size, *times = measured(part, latent_NMd)
        cells = " | ".join(f"{t:.3f}" for t in times)
        print(f"| {name} | {size:.1f} | {size / brotli:.2f} | {cells} |")


if __name__ == "__main__":
    tyro.cli(main)
