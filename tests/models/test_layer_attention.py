"""Cross-attention between a reader's layers: its formula, its gradients, and what a reader and a
receiver make of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from families import OTHERS, READERS
from latentwire_fast import wire
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.attachments.cross_attention import Block, CrossAttention
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.kv_cache import decoder_layers
from latentwire_fast.readers.layer_updates import updated_layers
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ATTACHMENTS
from latentwire_fast.serving import PayloadKind, Receiver, ReceiverOptions
from readers import tiny_interlingua
from reading import latent_prompts
from receiving import at_most, gpt2_reader
from runs import deep, soft

M, D_Z, D = 4, 8, 24


def config(**options: Any) -> CrossAttention.Config:
    return CrossAttention.Config(**{"width": 16, "heads": 2, "expansion": 2, **options})


def part_of(reader: Reader, **options: Any) -> CrossAttention:
    torch.manual_seed(0)
    card = ReaderCard.of(reader)
    part = CrossAttention.build(config(**options), card, latents=M, d_z=D_Z).eval()
    part.start(reader, mode="context", contexts=[])
    return part


def open_gates(part: nn.Module, gate: float = 0.5) -> None:
    for block in part.modules():
        if isinstance(block, Block):
            nn.init.constant_(block.gate, gate)


def scored(reader: Reader, prompts: list[Prompt], **inputs: Any) -> Tensor:
    none = torch.zeros(len(prompts), 0, reader.d_model)
    return reader.score(prompts, prefixes=none, **inputs).gold_N


# --- the module -----------------------------------------------------------------------------------


def explicit(block: Block, hidden_BTD: Tensor, memory_BMW: Tensor) -> Tensor:
    """The formula, one head and one position at a time."""
    width = memory_BMW.shape[-1] // block.heads
    key, value = block.key_value(memory_BMW).chunk(2, -1)
    rows = []
    for b, hidden_TD in enumerate(hidden_BTD):
        row = []
        for hidden_D in hidden_TD:
            query = block.query(block.norm(hidden_D))
            read = []
            for h in range(block.heads):
                part = slice(h * width, (h + 1) * width)
                weight_M = (key[b, :, part] @ query[part] / math.sqrt(width)).softmax(0)
                read.append(weight_M @ value[b, :, part])
            read_W = torch.cat(read)
            inner = nn.functional.gelu(block.up(block.inner_norm(read_W)))
            row.append(hidden_D + block.gate.tanh() * block.out(read_W + block.down(inner)))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_values_and_gradients_are_those_of_the_formula() -> None:
    part = CrossAttention(config(), latents=M, d_z=D_Z, d_model=D, layers=[1]).double()
    open_gates(part)
    latent = torch.randn(2, M, D_Z, dtype=torch.double, requires_grad=True)
    hidden = torch.randn(2, 3, D, dtype=torch.double, requires_grad=True)
    inputs = [latent, hidden, *part.parameters()]
    found = part(latent)[1](hidden)
    memory = part.norm(part.lift(latent) + part.slots)
    (block,) = part.blocks.values()
    assert isinstance(block, Block)
    wanted = explicit(block, hidden, memory)
    torch.testing.assert_close(found, wanted)
    direction = torch.randn_like(wanted)
    ours = torch.autograd.grad((found * direction).sum(), inputs)
    theirs = torch.autograd.grad((wanted * direction).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
        assert one.any()
    torch.autograd.gradcheck(lambda z, x: part(z)[1](x), (latent, hidden), fast_mode=True)


def test_gradients_reach_the_gates_first_and_then_everything() -> None:
    part = CrossAttention(config(), latents=M, d_z=D_Z, d_model=D, layers=[0, 2])
    latent, hidden = torch.randn(2, M, D_Z), torch.randn(2, 3, D)

    def reached() -> set[str]:
        part.zero_grad()
        updates = part(latent)
        updates[2](updates[0](hidden)).pow(3).sum().backward()
        return {n for n, p in part.named_parameters() if p.grad is not None and p.grad.any()}

    assert reached() == {"blocks.0.gate", "blocks.2.gate"}
    open_gates(part)
    assert reached() == {name for name, _ in part.named_parameters()}


@pytest.mark.parametrize(
    ("options", "layers", "wanted"),
    [
        ({}, 32, (7, 15, 23)),
        ({}, 4, (0, 1, 2)),
        ({}, 2, (0,)),
        ({"count": 1}, 30, (14,)),
        ({"count": 4}, 4, (0, 1, 2)),
        ({"layers": (15, 5, 10)}, 32, (5, 10, 15)),
    ],
)
def test_the_layers_are_named_or_spread(
    options: dict[str, Any], layers: int, wanted: tuple[int, ...], reader: Reader
) -> None:
    card = ReaderCard(8, 1.0, "", reader.kv_geometry, "here", layers)
    assert config(**options).layers_of(card) == wanted
    with pytest.raises(ConfigError, match=r"layers=\(1, 40\), and reader 'here' has \d+ of them"):
        config(layers=(1, 40)).layers_of(card)


# --- in a reader ----------------------------------------------------------------------------------


def test_closed_gates_change_no_bit(reader: Reader, examples: list[Example]) -> None:
    part, prompts = part_of(reader), latent_prompts(reader, examples[:3], answered=True)
    with torch.no_grad():
        plain = scored(reader, prompts)
        assert torch.equal(scored(reader, prompts, layers=part(torch.randn(3, M, D_Z))), plain)
        open_gates(part)
        assert not torch.allclose(
            scored(reader, prompts, layers=part(torch.randn(3, M, D_Z))), plain, atol=1e-3
        )
        assert torch.equal(scored(reader, prompts), plain), "nothing stays behind"


def test_what_is_read_has_the_size_of_the_hidden_states(reader: Reader) -> None:
    part = part_of(reader)
    open_gates(part, 20.0)  # tanh is 1
    sizes = []

    def watched(update: Any) -> Any:
        def look(hidden: Tensor) -> Tensor:
            new = update(hidden)
            made, own = ((x.square().mean(-1).sqrt().median()) for x in (new - hidden, hidden))
            sizes.append(float(made / own))
            return hidden

        return look

    updates = {n: watched(update) for n, update in part(torch.randn(1, M, D_Z)).items()}
    ids = torch.tensor([reader.prompts.text_ids("Nulnak lives in Paris.")])
    with torch.no_grad(), updated_layers(reader.model, updates):
        reader.backbone(input_ids=ids)
    assert len(sizes) == len(part.blocks)
    assert all(0.1 < size < 4 for size in sizes), sizes


def test_each_row_reads_its_own_latent_or_all_read_one(
    reader: Reader, examples: list[Example]
) -> None:
    part, prompts = part_of(reader), latent_prompts(reader, examples[:3], answered=True)
    open_gates(part)
    latent = torch.randn(3, M, D_Z)
    with torch.no_grad():
        together = scored(reader, prompts, layers=part(latent))
        alone = [scored(reader, [p], layers=part(latent[i : i + 1])) for i, p in enumerate(prompts)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
        left = scored(reader, prompts, layers=part(latent), side="left")
        torch.testing.assert_close(together, left, rtol=1e-4, atol=1e-4)
        one = scored(reader, prompts, layers=part(latent[:1]))
        three = scored(reader, prompts, layers=part(latent[:1].expand(3, -1, -1)))
        torch.testing.assert_close(one, three)
        with pytest.raises(ConfigError, match="latents for 2 prompts, but 3 prompts"):
            scored(reader, prompts, layers=part(latent[:2]))


def test_gradients_through_a_reader_are_finite_differences(
    readers: dict[str, Reader], examples: list[Example]
) -> None:
    """Along one direction, in fp64 (GPT-2: the norms of others compute in fp32); the same where
    activations are recomputed."""
    exact = gpt2_reader(readers["llama"], positions=128)
    exact.model.double()
    part = part_of(exact).double()
    open_gates(part)
    prompts = latent_prompts(exact, examples[:2], answered=True)
    latent = torch.randn(2, M, D_Z, dtype=torch.double)
    parameters = [*part.parameters()]
    directions = [torch.randn_like(p) for p in parameters]

    def loss() -> Tensor:
        none = torch.zeros(2, 0, exact.d_model, dtype=torch.double)
        batch = exact.collate(prompts, prefixes=none, layers=part(latent))
        return exact.target_hidden(batch).sin().sum()

    gradients = torch.autograd.grad(loss(), parameters)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(step * d)
            ends.append(loss())
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, slope, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        for p, d in zip(parameters, directions, strict=True):
            p.add_(1e-5 * d)
    exact.enable_gradient_checkpointing()
    again = torch.autograd.grad(loss(), parameters)
    for one, other in zip(again, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


# --- in a model, and in a receiver ----------------------------------------------------------------


@pytest.fixture(params=[(), ("soft",), ("deep",)], ids=["alone", "with soft", "with deep"])
def model(request: pytest.FixtureRequest, readers: dict[str, Reader]) -> Interlingua:
    base = tiny_interlingua(readers, "context", latents=M)
    others = {"soft": soft(expansion=2), "deep": deep(width=16, expansion=1, in_place=True)}
    torch.manual_seed(0)
    made = Interlingua(
        base.encoder,
        {name: ReaderCard.of(reader) for name, reader in readers.items()},
        bottleneck=base.bottleneck_config,
        attachments=[
            ATTACHMENTS.config("cross_attention", width=16, heads=2),
            *(others[kind] for kind in request.param),
        ],
        mode="context",
    ).eval()
    for name, reader in readers.items():
        for part in made.parts(name).values():
            part.start(reader, mode="context", contexts=[])
    open_gates(made)
    return made


def test_a_receiver_reads_and_decodes_as_scoring_does(
    model: Interlingua, reader: Reader, examples: list[Example]
) -> None:
    """Decoding with a cache gives what single passes over all of it give."""
    taken = len(model.attachment_configs) - 1
    assert model.positions == M * taken
    assert model.compared_positions_of(next(iter(model.cards))) == M * (taken + 1)
    prompts = latent_prompts(reader, examples[:3], answered=False)
    payloads = model.payloads(torch.randn(3, M, D_Z), bits=8)
    hooks = [{*layer._forward_hooks} for layer in decoder_layers(reader.model)]
    receiver = Receiver.of(model, reader, options=ReceiverOptions(keep_head=True))
    assert receiver.engine == "eager"
    assert "attend to the latents through hooks" in receiver.reason
    together = receiver.generate(prompts, payloads=payloads, options=at_most(4))
    latents = model.decode_payloads(payloads)
    for row, prompt in enumerate(prompts):
        alone = receiver.generate([prompt], payloads=[payloads[row]], options=at_most(4))
        assert alone == [together[row]]
        inputs = model.reader_inputs(reader.name, latents[row : row + 1])
        ids: list[int] = []
        for _ in range(4):
            longer = Prompt([*prompt.ids, *ids, 0], prompt.latent_at)
            longer.is_target = [False] * (len(longer.ids) - 1) + [True]
            with torch.no_grad():
                batch = reader.collate([longer], **inputs)
                logits = reader.of_tokens(reader.logits(reader.target_hidden(batch)))
            token = int(logits[0].argmax())
            if token in reader.stop_ids:
                break
            ids.append(token)
        assert together[row] == ids
    other = receiver.prefill(prompts, payloads=payloads[:1]).logits_BV
    assert not torch.allclose(other[1], receiver.prefill(prompts, payloads=payloads).logits_BV[1])
    assert [{*layer._forward_hooks} for layer in decoder_layers(reader.model)] == hooks


@pytest.mark.parametrize("name", ["Gemma 2", "GPT-2", "Falcon, ALiBi", "LFM2"])
def test_other_families_decode_it(
    name: str, llama_tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    """Scores of a ragged batch, of each prompt alone, and of what is decoded agree."""
    families = [*READERS, *(family for family, _ in OTHERS)]
    family = next(family for family in families if family.name == name)
    try:
        other = Reader(family.model(llama_tokenizer), llama_tokenizer, name="other")
    except (ValueError, KeyError) as error:
        pytest.skip(f"not in this transformers: {error}")
    part = part_of(other)
    open_gates(part)
    latent, prompts = torch.randn(3, M, D_Z), latent_prompts(other, examples[:3], answered=False)
    kind = PayloadKind(M, D_Z, 0)
    payloads = wire.pack_batch(latent, bits=16, group_size=0)
    receiver = Receiver(other, payload_kind=kind, layers=part)
    found = receiver.generate(prompts, payloads=payloads, options=at_most(3))
    for row, (prompt, ids) in enumerate(zip(prompts, found, strict=True)):
        alone = receiver.prefill([prompt], payloads=[payloads[row]])
        assert alone.generate(at_most(3)) == [ids]
        targets = [False] * len(prompt.ids) + [True] * len(ids)
        answered = Prompt([*prompt.ids, *ids], prompt.latent_at, targets)
        if ids:
            scores = receiver.score([answered], payloads=[payloads[row]])
            likeliest = scores.logprobs_NV.argmax(-1).tolist()
            assert likeliest == ids


@pytest.mark.parametrize("engine", ["graph", "compile"])
def test_an_engine_that_is_captured_or_compiled_is_refused(
    engine: Any, model: Interlingua, reader: Reader
) -> None:
    with pytest.raises(ConfigError, match=r"through hooks .*; the engine 'auto' reads with it op"):
        Receiver.of(model, reader, options=ReceiverOptions(engine=engine))
