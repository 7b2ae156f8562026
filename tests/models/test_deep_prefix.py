"""Deep prefixes: their shape and gradients, and that a reader takes them for what they are.

The replay tests put a text's own keys and values into the cache in the text's place: a reader must
then say exactly what it says after the text.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import runs
from latentwire_fast import wire
from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.methods.base import unanswered
from latentwire_fast.models.attachments.deep import DeepPrefix
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.batch import PaddingSide
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.kv_geometry import KVGeometry
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import PayloadKind, Receiver
from readers import tiny_interlingua
from runs import changed, records, tiny_config, train

M, D_Z, P = 4, 8, 6
GEOMETRY = KVGeometry(layers=3, heads=2, head_width=8, rms=((1.0, 2.0), (3.0, 0.5), (1.5, 1.0)))


def module(**options: object) -> DeepPrefix:
    config = DeepPrefix.Config(width=64, expansion=2, **options)  # type: ignore[arg-type]
    return DeepPrefix(config, latents=M, d_z=D_Z, geometry=GEOMETRY)


def answered(reader: Reader, examples: list[Example]) -> list[Prompt]:
    """Text prompts with their answers."""
    return [
        reader.prompts.build([Turn(e.question, e.answers[0])], context=e.context) for e in examples
    ]


def keys_and_values(reader: Reader, prompt: Prompt) -> tuple[Tensor, Prompt]:
    """The cache of a prompt's first P tokens as a deep prefix, and the prompt that is left."""
    output = reader.backbone(input_ids=torch.tensor([prompt.ids[:P]]), use_cache=True)
    layers = output.past_key_values.layers
    deep = torch.stack([torch.stack([layer.keys, layer.values]) for layer in layers])
    return deep, Prompt(prompt.ids[P:], 0, prompt.is_target[P:])


def replayed(reader: Reader, prompts: list[Prompt]) -> tuple[Tensor, list[Prompt]]:
    with torch.no_grad():
        parts, rest = zip(*(keys_and_values(reader, p) for p in prompts), strict=True)
    return torch.cat(parts, 2), list(rest)


def nothing(reader: Reader, prompts: list[Prompt]) -> Tensor:
    """No soft tokens."""
    return torch.zeros(len(prompts), 0, reader.d_model)


# --- the module ---------------------------------------------------------------------------------


def test_a_fresh_prefix_has_the_readers_own_rms() -> None:
    deep = module()(torch.randn(64, M, D_Z))
    assert deep.shape == (3, 2, 64, 2, M, 8)
    rms = deep.pow(2).mean((2, 3, 4, 5)).sqrt()
    torch.testing.assert_close(rms, torch.tensor(GEOMETRY.rms), rtol=0.15, atol=0)


def test_every_parameter_and_the_latent_receive_a_gradient() -> None:
    deep, latent = module(), torch.randn(2, M, D_Z, requires_grad=True)
    deep(latent).square().sum().backward()
    assert latent.grad is not None
    assert bool(latent.grad.any(-1).all())
    assert all(p.grad is not None and bool(p.grad.any()) for p in deep.parameters())


@pytest.mark.parametrize("length", [1, 3, 7])
def test_a_length_of_its_own(length: int) -> None:
    deep, latent = module(length=length), torch.randn(2, M, D_Z, requires_grad=True)
    assert deep.positions == length
    made = deep(latent)
    assert made.shape == (3, 2, 2, 2, length, 8)
    made.square().sum().backward()
    assert latent.grad is not None
    assert bool(latent.grad.any(-1).all()), "every latent is read"
    assert all(p.grad is not None and bool(p.grad.any()) for p in deep.parameters())
    torch.testing.assert_close(deep(latent[1:]), made[:, :, 1:])
    if length > 1:
        assert not torch.allclose(made[..., 0, :], made[..., 1, :])


def test_every_slot_depends_on_every_latent_of_its_row_and_on_no_other_row() -> None:
    deep, latent = module().eval(), torch.randn(2, M, D_Z)
    for changed_latent in range(M):
        other = latent.clone()
        other[1, changed_latent] += 1.0
        differs_BM = (deep(latent) != deep(other)).any(-1).any(3).any(0).any(0)
        assert not differs_BM[0].any()
        assert differs_BM[1].all()


def test_gain_scales_values_and_leaves_keys() -> None:
    deep, latent = module().eval(), torch.randn(2, M, D_Z)
    plain, louder = deep(latent), deep(latent, gain=2.0)
    assert torch.equal(louder[:, 0], plain[:, 0])
    torch.testing.assert_close(louder[:, 1], 2 * plain[:, 1])


def test_dropout_works_in_training_only() -> None:
    deep, latent = module(dropout=0.5), torch.randn(2, M, D_Z)
    assert not torch.equal(deep(latent), deep(latent))
    deep.eval()
    assert torch.equal(deep(latent), deep(latent))


# --- in a reader --------------------------------------------------------------------------------


def test_the_geometry_is_that_of_the_readers_cache(reader: Reader) -> None:
    deep, _ = replayed(reader, answered(reader, [Example("1", "a b", "c?", ["d"])]))
    g = reader.kv_geometry
    assert deep.shape == (g.layers, 2, 1, g.heads, P, g.head_width)
    assert len(g.rms) == g.layers
    assert all(0 < value < 100 for pair in g.rms for value in pair)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_texts_own_keys_and_values_replay_it(
    reader: Reader, examples: list[Example], side: PaddingSide
) -> None:
    prompts = answered(reader, examples[::3])
    deep, rest = replayed(reader, prompts)
    plain = reader.target_logprobs(reader.collate(prompts, side=side))
    batch = reader.collate(rest, prefixes=nothing(reader, rest), deep=deep, side=side)
    torch.testing.assert_close(reader.target_logprobs(batch), plain, rtol=1e-4, atol=1e-4)


class Replay(nn.Module):
    """A deep prefix that is the same whatever the payloads say."""

    def __init__(self, deep: Tensor) -> None:
        super().__init__()
        self.deep = nn.Parameter(deep, requires_grad=False)

    def forward(self, _latent: Tensor, *, gain: float) -> Tensor:
        assert gain == 1.0
        return self.deep


def test_generation_replays_too(reader: Reader, examples: list[Example]) -> None:
    prompts = [unanswered(p) for p in answered(reader, examples[::3])]
    deep, rest = replayed(reader, prompts)
    options = DecodeOptions(max_new_tokens=8)
    kind = PayloadKind(latents=P, d_z=D_Z, fingerprint=0)
    receiver = Receiver(reader, deep_prefix=Replay(deep), payload_kind=kind)
    payloads = wire.pack_batch(torch.zeros(len(rest), P, D_Z), bits=8, group_size=16)
    found = receiver.prefill(rest, payloads=payloads)
    expected = Receiver.for_text(reader).prefill(prompts)
    assert found.generate(options) == expected.generate(options)
    torch.testing.assert_close(found.logits_BV, expected.logits_BV, rtol=1e-4, atol=1e-4)


def test_one_prefix_serves_a_whole_batch(reader: Reader, examples: list[Example]) -> None:
    prompts = answered(reader, examples[:3])
    shared, _ = replayed(reader, prompts[:1])
    rest = [Prompt(p.ids[P:], 0, p.is_target[P:]) for p in prompts]
    soft = nothing(reader, rest)
    once = reader.target_logprobs(reader.collate(rest, prefixes=soft, deep=shared))
    copies = shared.repeat(1, 1, 3, 1, 1, 1)
    each = reader.target_logprobs(reader.collate(rest, prefixes=soft, deep=copies))
    torch.testing.assert_close(once, each)


def test_gradients_reach_the_prefix_the_same_with_checkpointing(
    llama_folder: Path, qwen_folder: Path, examples: list[Example]
) -> None:
    """Recomputing a layer in backward must find the same keys and values, once."""
    for folder in (llama_folder, qwen_folder):
        gradients = []
        for checkpointing in (False, True):
            reader = Reader.load(folder, name="reader")
            deep, rest = replayed(reader, answered(reader, examples[:2]))
            if checkpointing:
                reader.enable_gradient_checkpointing()
            deep.requires_grad_()
            batch = reader.collate(rest, prefixes=nothing(reader, rest), deep=deep)
            reader.target_hidden(batch).square().sum().backward()
            gradients.append(deep.grad)
        assert gradients[0] is not None
        assert bool(gradients[0].any(-1).all())
        torch.testing.assert_close(gradients[0], gradients[1])


def test_what_does_not_fit_is_refused(reader: Reader, examples: list[Example]) -> None:
    deep, rest = replayed(reader, answered(reader, examples[:3]))
    with pytest.raises(ConfigError, match="a deep prefix for 2 prompts, but 3 prompts"):
        reader.collate(rest, prefixes=nothing(reader, rest), deep=deep[:, :, :2])
    for other in (deep[:-1], deep[:, :, :, :1], deep[..., :-1]):
        with pytest.raises(ConfigError):
            reader.target_hidden(reader.collate(rest, prefixes=nothing(reader, rest), deep=other))


# --- in a model ---------------------------------------------------------------------------------


@pytest.fixture(params=[("deep",), ("soft", "deep")], ids=["deep", "both"])
def model(request: pytest.FixtureRequest, readers: dict[str, Reader]) -> Interlingua:
    base = tiny_interlingua(readers, "context", latents=M)
    torch.manual_seed(0)
    return Interlingua(
        base.encoder,
        {name: ReaderCard.of(reader) for name, reader in readers.items()},
        bottleneck=base.bottleneck_config,
        attachments=[
            {"soft": runs.soft(expansion=2), "deep": runs.deep(width=32, expansion=2)}[kind]
            for kind in request.param
        ],
        mode="context",
    ).eval()


def test_positions_and_parts_follow_the_configuration(model: Interlingua) -> None:
    both = len(model.attachment_configs) == 2
    assert model.positions == (2 * M if both else M)
    assert set(model.parts("llama")) == {"deep"} | ({"soft"} if both else set())
    reader_inputs = model.reader_inputs("llama", torch.randn(2, M, D_Z))
    assert reader_inputs["prefixes"].shape[:2] == (2, M if both else 0)
    assert reader_inputs["deep"] is not None
    assert reader_inputs["deep"].shape[2] == 2
    assert set(model.prefix_rms("llama", torch.randn(2, M, D_Z))) >= {"keys", "values"}


def test_a_saved_model_makes_the_same_prefixes(model: Interlingua, tmp_path: Path) -> None:
    loaded = Interlingua.from_pretrained(model.save_pretrained(tmp_path / "model"))
    latent = torch.randn(2, M, D_Z)
    assert loaded.cards == model.cards
    for name in model.cards:
        ours, theirs = model.reader_inputs(name, latent), loaded.reader_inputs(name, latent)
        assert torch.equal(ours["prefixes"], theirs["prefixes"])
        assert ours["deep"] is not None
        assert theirs["deep"] is not None
        assert torch.equal(ours["deep"], theirs["deep"])


def test_a_task_token_stands_in_the_prompt(model: Interlingua) -> None:
    latent = torch.randn(2, M, D_Z)
    plain = model.reader_inputs("llama", latent)["prefixes"]
    marked = model.reader_inputs("llama", latent, task="continue")["prefixes"]
    assert marked.shape[1] == plain.shape[1] + 1
    assert torch.equal(marked[:, :-1], plain)


@pytest.fixture(scope="module")
def config(llama_folder: Path, qwen_folder: Path) -> RunConfig:
    return tiny_config(llama_folder, qwen_folder, attachments=(runs.deep(width=32, expansion=1),))


def test_training_reaches_a_deep_prefix(config: RunConfig, tmp_path: Path) -> None:
    trainer = train(config, tmp_path / "run")
    lines = records(tmp_path / "run")
    assert len(lines) == config.total_steps
    for name in trainer.session.readers:
        assert all(line["grad_norms"][name] > 0 for line in lines)
        assert {"keys", "values"} <= lines[-1]["rms"][name].keys()


def test_checkpointing_changes_nothing_in_training(config: RunConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "plain")
    saving = changed(
        config, optim={"gradient_checkpointing": True}, encoder={"gradient_checkpointing": True}
    )
    train(saving, tmp_path / "saving")
    assert records(tmp_path / "saving") == records(tmp_path / "plain")
