"""An analytic model of what a run takes: memory, and operations, which are time.

* A frozen reader multiplies 2 N operations per position forward (N weights of its layers) and 2 N
  backward, to its inputs only. Recomputed activations are another 2 N. A trained LM has 6 N.
* Activations that backward needs, per layer and position, in bytes: `e (2 D + 2 Q + 2 K + 3 I) + 16
  D`, with e of an element, widths D of the model, Q and K of queries and keys, I inside the MLPs.
  Measured of Llama, Qwen2 and Gemma 3 in fp32 and bf16: 0.69 to 1.29 times that. Recomputed
  activations leave one state per layer, and one layer at a time.
* Time is operations over the GPU's rate times MFU (`budget.py`), the share that such runs reach.

What it leaves out: the optimiser's own arithmetic, the evaluation, data on its way, and what the
allocator keeps besides (count on a tenth).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from latentwire_fast.config.schema import ReaderConfig, RunConfig, StageConfig
from latentwire_fast.data.sources import heldout_examples
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.shapes import Shape
from latentwire_fast.training.optimizers import build_optimizers

CHARACTERS_PER_TOKEN = 4.5  # of English, with vocabularies of pretrained LMs
TEMPLATE_TOKENS = 20  # of a prompt: its template, labels and anchor
SAMPLE = 100  # held-out examples whose lengths are measured
LATENTS_READ = {"answer", "kd", "autoencode", "continuation"}  # a reader reads the latent, backward
# A reader reads the text, forward only.
TEXT_READ = {"kd", "kv", "select", "attention", "attention_continued"}
ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
LM = "core"  # the attribute of an encoder that holds its LM


@dataclass(frozen=True)
class Lengths:
    """Tokens of an example, on average. Those of SQuAD, unless an example can be read."""

    context: float = 165
    question: float = 14
    answer: float = 5

    @classmethod
    def of(cls, config: RunConfig) -> Lengths:
        """Of the held-out examples where they are at hand, by their characters."""
        if "hub:" in config.data.source:
            return cls()
        try:
            examples = heldout_examples(config.data, count=SAMPLE)
        except (ConfigError, DataError, OSError):
            return cls()
        texts = zip(*((e.context, e.question, e.answers[0]) for e in examples), strict=True)
        means = (sum(map(len, text)) / len(examples) / CHARACTERS_PER_TOKEN for text in texts)
        return cls(*(max(1.0, mean) for mean in means))


@dataclass(frozen=True)
class RunCosts:
    """The arithmetic of a run's steps.

    Attributes:
        config: of the run.
        shapes: of the readers, by name.
        model: what is trained, on the meta device.
        lm: the shape of the encoder's LM; None where it has none.
        lengths: tokens of an example.
    """

    config: RunConfig
    shapes: Mapping[str, Shape]
    model: Interlingua
    lm: Shape | None
    lengths: Lengths

    # --- tokens -----------------------------------------------------------------------------------

    @property
    def questions(self) -> int:
        """Asked of one example in a step."""
        return self.config.data.questions_per_context if self.config.mode == "context" else 1

    @property
    def chunks(self) -> int:
        """Latents of an example."""
        length = self.config.data.chunk_length
        return 1 if length is None else max(1, math.ceil(self.lengths.context / length))

    @property
    def with_latent(self) -> float:
        """Positions of a prompt that has the latent in the place of text."""
        asked = self.lengths.question if self.config.mode == "context" else 0
        return self.chunks * self.model.positions + asked + self.lengths.answer + TEMPLATE_TOKENS

    @property
    def with_text(self) -> float:
        """Positions of a prompt that has the text."""
        size = self.lengths
        return size.context + size.question + size.answer + TEMPLATE_TOKENS

    @property
    def encoded(self) -> float:
        """Positions that the encoder's LM reads of an example."""
        asked = self.lengths.question if self.config.mode == "pure" else 0
        length = self.lengths.context + asked + TEMPLATE_TOKENS
        longest = getattr(self.config.encoder, "max_tokens", length)
        return min(length, self.chunks * longest) + self.chunks * self.config.encoder.latents

    # --- operations -------------------------------------------------------------------------------

    def step_flops(self, stage: StageConfig) -> float:
        """Operations of one optimiser step."""
        kinds = {objective.kind for objective in stage.objectives if objective.weight}
        unknown = kinds - LATENTS_READ - TEXT_READ - {"embed", "scales"}
        per_example = self._encoder_flops()
        share = 1 / len(self.shapes) if self.config.optim.readers == "alternate" else 1.0
        for name, shape in self.shapes.items():
            own = self._attachment_flops(name)
            if kinds & LATENTS_READ or unknown:
                passes = 6 if self.config.optim.gradient_checkpointing else 4
                own += self.questions * passes / 2 * self._forward(shape, self.with_latent)
                own += self.questions * 6 * self.lengths.answer * shape.width * shape.vocabulary
            if kinds & TEXT_READ or unknown:
                prompts = self.questions if kinds & {"kd", "select"} else 1
                own += prompts * self._forward(shape, self.with_text)
            per_example += share * own
        return per_example * self.config.optim.batch_size

    @staticmethod
    def _forward(shape: Shape, positions: float) -> float:
        return 2 * shape.matmul * positions + shape.attention_flops(round(positions))

    def _encoder_flops(self) -> float:
        """Of one example. Learned queries go through the LM, and so does their gradient."""
        trained = sum(p.numel() for p in self.model.encoder.parameters() if p.requires_grad)
        if self.lm is None:
            return 6.0 * trained * self.encoded
        passes = 1.0
        if self._trains_lm:
            passes = 3.0
        elif getattr(self.config.encoder, "pooler", None) and self._reads_queries:
            passes = 2.0
        others = 0 if self._trains_lm else 6.0 * trained * self.config.encoder.latents
        return passes * self._forward(self.lm, self.encoded) + others

    @property
    def _trains_lm(self) -> bool:
        core = getattr(self.model.encoder, LM, None)
        return core is not None and any(p.requires_grad for p in core.parameters())

    @property
    def _reads_queries(self) -> bool:
        return bool(self.config.encoder.pooler.kind == "queries")  # type: ignore[attr-defined]

    def _attachment_flops(self, reader: str) -> float:
        """Of one example: attachments run once per latent, or between a reader's layers at each
        position of its prompts."""
        flops = 0.0
        for part in self.model.parts(reader).values():
            rows: float = self.config.encoder.latents
            if part.gives == "layers":
                rows = self.questions * self.with_latent
            flops += 6.0 * rows * sum(p.numel() for p in part.parameters())
        return flops

    # --- memory -----------------------------------------------------------------------------------

    def memory(self) -> dict[str, float]:
        """Bytes by part."""
        weights = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        parts = {f"reader {n}": self._reader_bytes(n, r) for n, r in self._loaded().items()}
        parts["model, fp32"] = 4.0 * weights
        parts["gradients"] = 4.0 * trained
        parts["optimiser"] = 4.0 * self._optimiser_values()
        parts["activations of the encoder"] = self._micro * self._encoder_activations()
        parts["deep prefixes"] = self._micro * sum(map(self._prefix_bytes, self.shapes))
        readers = [self._micro * self._reader_activations(name) for name in self.shapes]
        together = self.config.optim.readers == "sum"
        parts["activations of readers"] = sum(readers) if together else max(readers)
        return parts

    def _loaded(self) -> dict[str, ReaderConfig]:
        """Readers of one source and the same options are in memory once."""
        first: dict[ReaderConfig, str] = {}
        for name, reader in self.config.readers.items():
            first.setdefault(reader, name)
        return {name: reader for reader, name in first.items()}

    def _reader_bytes(self, name: str, reader: ReaderConfig) -> float:
        element = ELEMENT[reader.compute_dtype or reader.dtype]
        return self.shapes[name].weight_bytes(element=element, in_4bit=reader.load_in_4bit)

    @property
    def _micro(self) -> int:
        optim = self.config.optim
        return optim.micro_batch or optim.batch_size

    def _optimiser_values(self) -> int:
        """AdamW keeps two values of each parameter, Muon one."""
        values = 0
        for optimizer in build_optimizers(self.model, self.config.optim):
            kept = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
            values += kept * sum(p.numel() for g in optimizer.param_groups for p in g["params"])
        return values

    def _prefix_bytes(self, name: str) -> float:
        """Of one example: keys and values in fp32, and their gradient."""
        deep, shape = self.model.attachment(name, "deep"), self.shapes[name]
        positions = 0 if deep is None else deep.positions
        return 8.0 * positions * 2 * shape.layers * shape.kv_heads * shape.head_width

    def _encoder_activations(self) -> float:
        """Bytes of one example."""
        element = 2 if self.config.optim.mixed_precision == "bf16" else 4
        if self.lm is None:
            return 0.0
        kept = self._trains_lm or self._reads_queries
        again = getattr(self.config.encoder, "gradient_checkpointing", False)
        states = self.encoded * self.lm.width * element
        if not kept:  # the hidden states that a pooler reads
            return (self.lm.layers + 1) * states
        return activation_bytes(self.lm, self.encoded, element=element, recomputed=again)

    def _reader_activations(self, name: str) -> float:
        """Bytes of one example's questions, and their logits in fp32 with their gradient."""
        shape, reader = self.shapes[name], self.config.readers[name]
        element = ELEMENT[reader.compute_dtype or reader.dtype]
        again = self.config.optim.gradient_checkpointing
        kept = activation_bytes(shape, self.with_latent, element=element, recomputed=again)
        return self.questions * (kept + 8 * self.lengths.answer * shape.vocabulary)


def activation_bytes(shape: Shape, positions: float, *, element: int, recomputed: bool) -> float:
    """Bytes that the backward pass through a decoder with frozen weights needs of a prompt.

    Args:
        recomputed: the layers' activations are computed again in backward.
    """
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    layer = element * (2 * shape.width + 2 * queries + 2 * keys + 3 * shape.inner)
    layer += 16 * shape.width
    if not recomputed:
        return positions * shape.layers * layer
    return positions * (shape.layers * shape.width * element + layer)
