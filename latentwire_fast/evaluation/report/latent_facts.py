"""What a report says of the latents: their shape, whose they are, how an encoder was fitted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from latentwire_fast.evaluation.report.formatting import number, percent, size


def latent_facts(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Labels and texts."""
    latent, encoder = metrics.get("latent") or {}, metrics.get("encoder") or {}
    if latent:
        yield (
            "Latent",
            f"{_latents(latent)}, d_z = {latent.get('d_z')}, {latent.get('bits')} bits"
            + (f", groups of {latent['group_size']}" if latent.get("group_size") else ""),
        )
    if latent.get("private_slots"):
        yield "Slots", _slots(latent, metrics.get("bytes") or {})
    if encoder.get("explained_variance") is not None:
        yield (
            "Principal components",
            f"{percent(encoder['explained_variance']).text}% of the variance of "
            f"{number(encoder.get('vectors') or 0, digits=0)} vectors",
        )


def _slots(latent: Mapping[str, Any], sizes: Mapping[str, Any]) -> str:
    """Whose the slots are, and what a payload for one reader alone takes."""
    private, bits = latent["private_slots"], str(latent.get("bits"))
    owned = ", ".join(f"{count} of {name} alone" for name, count in private.items())
    alone = ", ".join(
        f"{size(found.get(bits))} bytes for {name}"
        for name, found in (sizes.get("payload_alone_mean") or {}).items()
    )
    return f"{latent['M'] - sum(private.values())} shared, {owned}; alone: {alone}"


def _latents(latent: Mapping[str, Any]) -> str:
    """How many vectors a latent has, and how many latents a text."""
    text = f"M = {latent.get('M')}"
    if latent.get("M_mean") is not None:
        text = f"M up to {latent.get('M')}, {number(latent['M_mean'], digits=1)} on average"
    if latent.get("payloads_mean") is not None:
        text += f", {number(latent['payloads_mean'], digits=1)} payloads of a text"
    return text
