"""Whether payloads that one machine or torch wrote are read to the same values by another.

    python -m bench.wire_digests --folder payloads --make-them   # writes them, and their digests
    python -m bench.wire_digests --folder payloads               # reads them, and compares

A table of every bottleneck with the static and the autoregressive prior: how many payloads, and the
first digits of the sha256 of their symbols and of their values in fp32. The second call ends with
an error if one is not as in the first.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from safetensors.torch import load_file, save_file

from latentwire_fast import wire
from latentwire_fast.models.bottlenecks.symbols import SymbolBottleneck
from latentwire_fast.registry import BOTTLENECKS
from latentwire_fast.wire.frame import read_frame
from latentwire_fast.wire.native_prior import has_native

SHAPE = {"latents": 12, "d_z": 16}
KINDS: dict[str, dict[str, Any]] = {
    "uniform": {"version": 2, "bits": 4},
    "fsq": {"levels": (8, 5)},
    "vq": {"bits": 9},
    "residual_vq": {"bits": 18, "code_bits": 6, "stages": 3},
    "soft_codebook": {"version": 2, "bits": 4, "codes": 64},
}
PRIORS = ("static", "autoregressive")
BATCH = 250


def bottleneck(kind: str, prior: str) -> SymbolBottleneck:
    """One that has learned nothing."""
    torch.manual_seed(0)
    config = BOTTLENECKS.config(kind, prior=prior, prior_steps=30, **KINDS[kind])
    part: SymbolBottleneck = BOTTLENECKS.part_of(config).build(config, **SHAPE)
    return part.eval()


def latents(count: int, *, seed: int) -> torch.Tensor:
    """Latents `[N, M, d]` whose rows go by the rows before."""
    generator = torch.Generator().manual_seed(seed)
    latent_NMd = torch.randn(count, *SHAPE.values(), generator=generator)
    return latent_NMd + latent_NMd.cumsum(1) / 2


def digests(part: SymbolBottleneck, payloads: list[bytes]) -> list[str]:
    """Of the payloads' symbols and of their values."""
    symbols, values = hashlib.sha256(), hashlib.sha256()
    for first in range(0, len(payloads), BATCH):
        several = payloads[first : first + BATCH]
        bodies, shape = [read_frame(payload).body for payload in several], SHAPE["latents"]
        symbols_BN = part.decode(bodies, part.config.bits, shape)
        latent_BMd = part.values(torch.from_numpy(symbols_BN), part.config.bits, shape)
        symbols.update(symbols_BN.tobytes())
        values.update(latent_BMd.numpy().tobytes())
    return [symbols.hexdigest(), values.hexdigest()]


def make(folder: Path, kind: str, prior: str, count: int) -> None:
    """Write a bottleneck and its payloads."""
    part = bottleneck(kind, prior)
    part.fit([latents(500, seed=1)])
    folder.mkdir(parents=True)
    save_file(part.state_dict(), folder / "bottleneck.safetensors")
    bits = part.config.bits
    wire.write_payloads(
        folder / "payloads.lwire", part.pack(latents(count, seed=2), bits=bits, fingerprint=1)
    )


def main(*, folder: Path, make_them: bool = False, count: int = 1000, threads: int = 1) -> None:
    """Print the table.

    Args:
        folder: with the payloads.
        make_them: write them first.
        count: payloads of each bottleneck and prior.
        threads: that torch computes with.
    """
    torch.set_num_threads(threads)
    way = "C++" if has_native() else "Python"
    python = sys.version.split()[0]
    print(f"torch {torch.__version__}, numpy {np.__version__}, Python {python}, prior in {way}")
    print("| bottleneck | prior | payloads | symbols | values |\n|---|---|---:|---|---|")
    different = 0
    for kind in KINDS:
        for prior in PRIORS:
            own = folder / f"{kind}_{prior}"
            if make_them:
                make(own, kind, prior, count)
            part = bottleneck(kind, prior)
            part.load_state_dict(load_file(own / "bottleneck.safetensors"))
            payloads = list(wire.read_payloads(own / "payloads.lwire"))
            found = digests(part, payloads)
            if make_them:
                (own / "digests.json").write_text(json.dumps(found))
            different += found != json.loads((own / "digests.json").read_text())
            short = " | ".join(digest[:12] for digest in found)
            print(f"| {kind} | {prior} | {len(payloads):,} | {short} |", flush=True)
    if different:
        raise SystemExit(f"{different} of them are not what was written")
    print("all as they were written")


if __name__ == "__main__":
    tyro.cli(main)
