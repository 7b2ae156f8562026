"""A run's outcome in a few lines for the terminal."""

from __future__ import annotations

from typing import Any

ROWS = (
    ("text", "full text"),
    ("latent", "latent"),
    ("token_budget", "token budget"),
    ("token_budget_question", "  question kept"),
    ("byte_budget", "byte budget"),
    ("closed_book", "closed book"),
    ("shuffled_latent", "shuffled latent"),
    ("first_words", "first words"),
)


def summary_lines(metrics: dict[str, Any]) -> list[str]:
    """A table of F1 per method and reader, the bytes, and the verdicts."""
    readers = metrics["readers"]
    latent, sizes = metrics["latent"], metrics["bytes"]
    width = str(latent["bits"])
    lines = [
        f"F1 on {metrics['examples']} held-out examples ({metrics['run']['mode']} mode)",
        f"{'':18}" + "".join(f"{name:>12}" for name in readers),
    ]
    for method, label in ROWS:
        values = [readers[name][method]["f1"]["mean"] for name in readers]
        lines.append(f"{label:18}" + "".join(f"{100 * v:12.1f}" for v in values))
    for bits in sizes["payload_mean"]:
        values = [readers[name]["latent_bits"][bits]["f1"] for name in readers]
        label = f"latent {bits} bits"
        size = sizes["payload_mean"][bits]
        cut = [readers[name]["byte_budget_bits"][bits]["f1"] for name in readers]
        lines.append(
            f"{label:18}"
            + "".join(f"{100 * v:12.1f}" for v in values)
            + f"  {size:.0f} B (text cut to that: "
            + ", ".join(f"{100 * v:.1f}" for v in cut)
            + ")"
        )
    lines.append(
        f"text {sizes['text_utf8_mean']:.0f} B, brotli {sizes['text_brotli_mean']:.0f} B, "
        f"payload {sizes['payload_mean'][width]:.0f} B at {width} bits"
    )
    verdicts = (f"{name} {entry['verdict']}" for name, entry in metrics["hypotheses"].items())
    lines.append(", ".join(verdicts))
    return lines
