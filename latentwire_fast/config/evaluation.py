"""Settings of the evaluation after training, and of how answers are decoded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latentwire_fast.config.base import Settings, require
from latentwire_fast.registry import METHODS


def check_decoding(temperature: float, top_p: float, eos_ban_steps: int) -> None:
    """Raise unless answers can be decoded with these (temperature 0 is greedy).

    Raises:
        ConfigError: a value outside its range.
    """
    require(
        0 <= temperature < math.inf, f"first_token_temperature={temperature}, expected 0 or above"
    )
    require(0 < top_p <= 1, f"first_token_top_p={top_p}, expected in (0, 1]")
    require(eos_ban_steps >= 0, f"eos_ban_steps={eos_ban_steps}, expected at least 0")


@dataclass(frozen=True)
class ContinuationConfig(Settings):
    """Paragraphs whose second half readers predict, given the first as text and as a payload.

    Attributes:
        source: as in `DataConfig`; all of it, so no training text may be in it.
        examples: how many paragraphs.
    """

    source: str
    examples: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.examples >= 2, f"examples={self.examples}, expected at least 2")


@dataclass(frozen=True)
class EvalConfig(Settings):
    """Evaluation after training.

    Attributes:
        bits: the widths that payloads are scored at, beside the run's own. A bottleneck that sends
            none of them is scored at all that it sends.
        methods: score these alone, `latent` among them; None: all. Most of the time goes into texts
            that are cut to as many positions or bytes, and a sweep can do without them. Hypotheses
            about a method that is left out are not measured.
        chunk_length: of the chunks that scored contexts are cut into; None: as in training
            (`DataConfig.chunk_length`).
        hybrid_tokens: how many of a context's first tokens (the reader's own) the method `hybrid`
            gives as text, with a latent of the rest; None: it is not measured.
        continuation: a measure of running text beside the questions; context mode only.
        pca_texts: fit principal components of each reader's embeddings to so many training texts,
            and score latents of these too (method `pca`); 0 for none.
    """

    batch_size: int = 50
    max_new_tokens: int = 12
    bits: tuple[int, ...] = (16, 8, 6, 4)
    methods: tuple[str, ...] | None = None
    timing_examples: int = 16
    resamples: int = 2000
    first_token_temperature: float = 0.0
    first_token_top_p: float = 1.0
    eos_ban_steps: int = 0
    chunk_length: int | None = None
    hybrid_tokens: int | None = None
    continuation: ContinuationConfig | None = None
    pca_texts: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one(
            "batch_size",
            "max_new_tokens",
            "timing_examples",
            "resamples",
            "chunk_length",
            "hybrid_tokens",
        )
        for bits in self.bits:
            require(bits >= 1, f"bits={bits}, expected widths that the bottleneck sends")
        self._check_methods()
        require(self.pca_texts >= 0, f"pca_texts={self.pca_texts}, expected at least 0")
        check_decoding(self.first_token_temperature, self.first_token_top_p, self.eos_ban_steps)

    def _check_methods(self) -> None:
        if self.methods is None:
            return
        unknown = sorted(set(self.methods) - set(METHODS.names()))
        require(
            not unknown,
            f"methods={unknown}, expected names out of {', '.join(METHODS.names())}",
        )
        require(
            "latent" in self.methods,
            f"methods={list(self.methods)}, and 'latent' is not among them; add it",
        )
