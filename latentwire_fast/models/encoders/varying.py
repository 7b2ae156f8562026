"""What a run has to be like where the number of latents goes by the length of the text."""

from __future__ import annotations

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import PoolerConfig, RunConfig


def check_varying(pooler: PoolerConfig, run: RunConfig) -> None:
    """Raise unless everything that an encoder's latents go through takes fewer than M of them.

    Raises:
        ConfigError: something does not.
    """
    advice = "leave out encoder.tokens_per_latent, or take"
    require(
        pooler.varies,
        f"pooler {pooler.kind!r} makes M latents of every text; {advice} 'spans', 'layer_spans', "
        "'selected', 'queries', 'cross_attention', 'convolution' or 'mean'",
    )
    for attachment in run.attachments:
        require(
            attachment.varies,
            f"attachment {attachment.kind!r} takes M latents of every text; {advice} 'soft', "
            "'coprocessor' or 'deep' (without a `length`)",
        )
        calibration = getattr(attachment, "calibration", "none")
        require(
            calibration in ("none", "token"),
            f"attachment {attachment.kind!r}: calibration={calibration!r} is over all M latents; "
            f"{advice} 'token' or 'none'",
        )
    prior = getattr(run.bottleneck, "prior", "flat")
    require(
        prior == "flat",
        f"bottleneck {run.bottleneck.kind!r}: prior={prior!r} counts the symbols of M latents of "
        "every text; leave out encoder.tokens_per_latent, or take prior='flat'",
    )
    require(
        not run.private_slots,
        "private_slots share out M latents of every text, and encoder.tokens_per_latent makes "
        "fewer of some; leave out one of them",
    )
    require(
        not run.evaluation.pca_texts,
        "evaluation.pca_texts is about M latents of every text, and encoder.tokens_per_latent "
        "makes fewer of some; leave out one of them",
    )
    require(
        run.evaluation.continuation is None,
        "evaluation.continuation is about M latents of every text, and encoder.tokens_per_latent "
        "makes fewer of some; leave out one of them",
    )
