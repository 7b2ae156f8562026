"""`--dry-run`: counts are those of the built run, memory is within the stated factor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from latentwire_fast.config.presets import PRESETS, squad_llama_qwen, weighted
from latentwire_fast.config.schema import LoraSettings, ReaderConfig, RunConfig, StageConfig
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.readers import shapes
from latentwire_fast.readers.loading import load_weights
from latentwire_fast.readers.reader import load_readers
from latentwire_fast.readers.shapes import KNOWN, Shape, model_config
from latentwire_fast.registry import BOTTLENECKS, ENCODERS, POOLERS
from latentwire_fast.training.budget import budget
from latentwire_fast.training.builders import build_model
from latentwire_fast.training.run_costs import activation_bytes
from runs import deep, soft, tiny_config

LOADING = ("readers.reader", "models.encoders.lm")  # modules that load weights


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in LOADING:
        name = f"latentwire_fast.{module}.load_weights"
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("weights were loaded"))


def encoders(folder: Path) -> dict[str, Any]:
    lm = {"source": str(folder), "latents": 4, "d_z": 8}
    return {
        "spans": ENCODERS.config("lm", **lm, pooler=POOLERS.config("spans")),
        "queries": ENCODERS.config("lm", **lm, pooler=POOLERS.config("queries", rehearsals=1)),
        "frozen": ENCODERS.config("lm", **lm, pooler=POOLERS.config("spans"), frozen=True),
        "byte": ENCODERS.config("byte", latents=4, d_z=8, width=16, heads=2),
    }


# --- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["spans", "queries", "frozen", "byte"])
def test_counts_are_those_of_the_built_run(
    kind: str, llama_folder: Path, qwen_folder: Path
) -> None:
    config = tiny_config(llama_folder, qwen_folder, attachments=(soft(), deep(width=16)))
    config = replace(config, encoder=encoders(llama_folder)[kind])
    found = budget(config)
    with pytest.MonkeyPatch.context() as patch:
        for module in LOADING:
            patch.setattr(f"latentwire_fast.{module}.load_weights", load_weights)
        readers = load_readers(config.readers)
        model = build_model(config, readers)
    assert sum(found.trained.values()) == sum(p.numel() for _, p in model.trained_parameters())
    for name, reader in readers.items():
        count = sum(p.numel() for p in reader.model.parameters())
        assert found.frozen[f"reader {name}"] == count
    for bits, size in found.payload.items():
        (payload,) = model.bottleneck.pack(torch.ones(1, 4, 8), bits=bits, fingerprint=1)
        assert len(payload) == size


# --- payloads -----------------------------------------------------------------------------------

PAYLOADS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "fsq": {"bits": 3, "levels": (8, 5)},
    "vq": {"bits": 5},
    "residual_vq": {"bits": 12, "code_bits": 4, "stages": 3},
    "soft_codebook": {"codes": 40},
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"prior": "flat"} | options) for kind, options in PAYLOADS.items()),
        ("uniform", {"version": 2, "prior": "static"}),
        ("soft_codebook", {"version": 2, "prior": "static"}),
        ("fsq", {"prior": "static", "running_prior": True}),
    ],
)
def test_bytes_of_payloads_are_known_for_every_bottleneck(
    kind: str, options: dict[str, Any], llama_folder: Path, qwen_folder: Path
) -> None:
    config = tiny_config(llama_folder, qwen_folder)
    bottleneck = BOTTLENECKS.config(kind, **options)
    asked = ("answer", "commitment") if "vq" in kind else ("answer",)
    stage = StageConfig("sent", 1, weighted(**dict.fromkeys(asked, 1.0)), quantize=bottleneck.bits)
    slots = {llama_folder.name: 1}
    config = replace(config, bottleneck=bottleneck, stages=(stage,), private_slots=slots)
    random_state = torch.get_rng_state()
    found = budget(config)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(found.payload) == set(bottleneck.rates)
    part = BOTTLENECKS.part_of(bottleneck).build(bottleneck, latents=4, d_z=8)
    for bits, size in found.payload.items():
        (payload,) = part.pack(torch.randn(1, 4, 8), bits=bits, fingerprint=1)
        assert abs(len(payload) - size) <= 3 * (part.version - 1)
    text = "\n".join(found.lines())
    assert f"payload for reader {llama_folder.name} alone, bytes: " in text
    assert ("without a learned prior" in text) == (bottleneck.prior == "static")


def test_every_bottleneck_of_the_package_has_its_bytes_tested() -> None:
    assert sorted(PAYLOADS) == sorted(BOTTLENECKS.names())


@pytest.mark.parametrize(
    ("source", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
    ],
)
def test_known_shapes_have_the_published_sizes(source: str, parameters: int) -> None:
    shape = Shape.of(model_config(source))
    assert shape.parameters == parameters
    in_half = shape.weight_bytes(element=2, in_4bit=False)
    assert in_half == 2 * parameters
    assert 0.25 < shape.weight_bytes(element=2, in_4bit=True) / in_half < 0.5


# --- presets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_budget_offline(name: str) -> None:
    found = budget(PRESETS[name]())
    assert found.hours > 0
    text = "\n".join(found.lines())
    assert "hours on one H100 (bf16), at 35% of 989 TFLOP/s" in text
    assert "  fits in 80 GB" in text


def test_the_large_preset_is_what_it_says() -> None:
    """Two readers of 7 and 8 billion weights, in bf16: most of the memory."""
    found = budget(squad_llama_qwen())
    assert found.memory["reader llama"] == 2 * 8_030_261_248
    assert 35e9 < sum(found.memory.values()) < 80e9
    assert 10 < found.hours < 100
    config = squad_llama_qwen()
    twice = replace(config, optim=replace(config.optim, batch_size=2 * config.optim.batch_size))
    assert budget(twice).hours == pytest.approx(2 * found.hours)
    assert sum(budget(twice).memory.values()) == pytest.approx(sum(found.memory.values()))
    plain = replace(config, optim=replace(config.optim, gradient_checkpointing=False))
    kept = "activations of readers"
    assert budget(plain).memory[kept] > 2 * found.memory[kept]
    assert budget(plain).hours < found.hours
    small = {name: replace(r, load_in_4bit=True) for name, r in config.readers.items()}
    assert budget(replace(config, readers=small)).memory["reader llama"] < 7e9


def test_a_source_that_is_not_at_hand_says_what_is(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network\nand more")

    monkeypatch.setattr(shapes.AutoConfig, "from_pretrained", fail)
    config = replace(tiny_config(llama_folder), readers={"a": ReaderConfig("some/model")})
    with pytest.raises(ConfigError, match=r"'some/model' is not known: no network \(without a ne"):
        budget(config)


def test_the_dry_run_of_a_base_trains_no_encoder(llama_folder: Path) -> None:
    config: RunConfig = tiny_config(llama_folder)
    found = budget(replace(config, base=str(llama_folder)))
    assert not any(part.startswith("encoder") for part in found.trained)
    assert "the encoder is the base's" in "\n".join(found.lines())


# --- memory, measured ---------------------------------------------------------------------------


def saved_bytes(model: PreTrainedModel, *, rows: int, positions: int) -> int:
    """What autograd keeps for backward besides weights, for gradients to the inputs."""
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        width = model.config.hidden_size
        inputs = torch.randn(rows, positions, width, dtype=model.dtype, requires_grad=True)
        output = model.model(inputs_embeds=inputs, use_cache=False)
    tensors: list[Tensor | nn.Parameter] = [*model.parameters(), *model.buffers()]
    own = {t.untyped_storage().data_ptr() for t in tensors}
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del output
    return sum(size for place, size in found.items() if place not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "inner", "kv_heads"), [(128, 512, 2), (256, 256, 4)])
def test_activations_are_within_the_stated_factor(
    width: int, inner: int, kv_heads: int, dtype: torch.dtype
) -> None:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval().to(dtype)
    measured = saved_bytes(model, rows=2, positions=40)
    predicted = activation_bytes(Shape.of(config), 2 * 40, element=dtype.itemsize, recomputed=False)
    assert 0.65 < measured / predicted < 1.35


def test_shapes_of_the_presets_are_in_one_place() -> None:
    config = squad_llama_qwen()
    sources = [reader.source for reader in config.readers.values()]
    assert {*sources, config.encoder.source} <= set(KNOWN)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"frozen": ("encodr",)}, ConfigError, "frozen='encodr' is no trained part"),
        ({"source": "other.json"}, ConfigError, "source='other.json' is none of the pieces"),
        ({"warm_start": "none"}, CheckpointError, "neither model/model.safetensors nor a"),
    ],
)
def test_names_that_are_not_there_are_refused(
    llama_folder: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    config = tiny_config(llama_folder)
    if "warm_start" in changes:
        config = replace(config, warm_start={"encoder": str(tmp_path / "none")})
    else:
        stages = (replace(config.stages[0], **changes), *config.stages[1:])
        config = replace(config, stages=stages)
    with pytest.raises(error, match=message):
        budget(config)


def test_low_rank_updates_may_be_frozen(llama_folder: Path) -> None:
    config = tiny_config(llama_folder)
    reader = replace(config.readers["llama"], lora=LoraSettings())
    stages = (replace(config.stages[0], frozen=("lora.llama",)), *config.stages[1:])
    assert budget(replace(config, readers={"llama": reader}, stages=stages)).trained
