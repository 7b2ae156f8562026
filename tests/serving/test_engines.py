"""Which engine reads, and that a reader with more than plain causal attention is read right."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_receiver import asking, make_model, random_payloads
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from families import OTHERS
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers import attention
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver, ReceiverOptions, engines, graph_engine, prefilled
from latentwire_fast.serving.engines import why_no_graph, why_no_step, why_not_mask_free
from reading import decode_slowly, text_prompts

NEW_TOKENS = 12
AT_MOST = DecodeOptions(max_new_tokens=NEW_TOKENS, eos_ban_steps=NEW_TOKENS)
WINDOW = 8
decoder_init = prefilled._Decoder.__init__


def shape(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def mistral(tokenizer: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**shape(tokenizer), sliding_window=WINDOW))


def qwen2(tokenizer: Any) -> PreTrainedModel:
    """One layer with a window, one without."""
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**shape(tokenizer), **window))


def gemma2(tokenizer: Any) -> PreTrainedModel:
    """A window and soft-capped scores; the cap on logits is left out, readers have none."""
    caps = {"final_logit_softcapping": None, "attn_logit_softcapping": 5.0}
    config = Gemma2Config(**shape(tokenizer), head_dim=8, sliding_window=WINDOW, **caps)
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config)


def gemma3(tokenizer: Any) -> PreTrainedModel:
    config = Gemma3TextConfig(
        **shape(tokenizer),
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )
    return Gemma3ForCausalLM(config)


def gpt_neo(tokenizer: Any) -> PreTrainedModel:
    """A window that it cuts out by itself, from the columns of the cache."""
    config = GPTNeoConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPTNeoForCausalLM(config)


WINDOWED: list[Callable[[Any], PreTrainedModel]] = [mistral, qwen2, gemma2, gemma3, gpt_neo]


def windowed(build: Callable[[Any], PreTrainedModel], like: Reader) -> Reader:
    torch.manual_seed(0)
    return Reader(build(like.tokenizer).eval(), like.tokenizer, name=build.__name__)


# --- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", WINDOWED)
def test_a_ragged_batch_of_texts_is_each_text_alone(
    readers: dict[str, Reader], build: Callable[[Any], PreTrainedModel], examples: list[Example]
) -> None:
    """Prompts are longer than the window, and of several lengths: padding is in none."""
    reader = windowed(build, readers["llama"])
    prompts = text_prompts(reader, examples[::4], answered=False)
    assert len({len(prompt.ids) for prompt in prompts}) > 2
    assert min(len(prompt.ids) for prompt in prompts) > WINDOW
    receiver = Receiver.for_text(reader)
    assert receiver.engine == "eager"
    expected = [
        decode_slowly(reader, prompt, None, steps=NEW_TOKENS, stops=reader.stop_ids, ban=NEW_TOKENS)
        for prompt in prompts
    ]
    first = receiver.prefill(prompts)
    assert first.generate(AT_MOST) == expected
    assert first.generate(AT_MOST) == expected, "decoding again starts from the prompts"


@torch.no_grad()
def alone(model: Interlingua, reader: Reader, payload: bytes, prompt: Prompt) -> list[int]:
    """Greedy tokens of one row, each from a pass over everything before it, with the deep prefix
    in transformers' own cache of the model."""
    reader_inputs = model.reader_inputs(reader.name, model.decode_payloads([payload]))
    at, deep = prompt.latent_at, reader_inputs["deep"]
    embeds_TD = reader.embedding(torch.tensor(prompt.ids))
    embeds = torch.cat([embeds_TD[:at], reader_inputs["prefixes"][0], embeds_TD[at:]])[None]
    ids: list[int] = []
    for _ in range(NEW_TOKENS):
        cache = DynamicCache(config=reader.model.config)
        for number, (keys, values) in enumerate([] if deep is None else deep):
            cache.update(keys, values, number)
        first = 0 if deep is None else deep.shape[4]
        logits_V = reader.model(
            inputs_embeds=embeds,
            position_ids=torch.arange(first, first + embeds.shape[1])[None],
            past_key_values=cache,
        ).logits[0, -1]
        logits_V[reader.stop_ids] = -torch.inf
        ids.append(int(logits_V.argmax()))
        embeds = torch.cat([embeds, reader.embedding(torch.tensor([ids[-1:]]))], 1)
    return ids


@pytest.mark.parametrize("prefix", ["soft", "deep", "both"])
@pytest.mark.parametrize("build", [mistral, qwen2, gemma2, gemma3])
def test_a_ragged_batch_of_payloads_is_each_payload_alone(
    readers: dict[str, Reader], build: Callable[[Any], PreTrainedModel], prefix: str
) -> None:
    """Deep prefixes too: training computes the same, from the same keys and values."""
    reader = windowed(build, readers["llama"])
    model = make_model(reader, prefix)
    questions = ["Who?", "Where does Nulnak live now, and since when does he?", "What is his job?"]
    payloads, prompts = random_payloads(model), asking(reader, questions)
    receiver = Receiver.of(model, reader)
    found = receiver.generate(prompts, payloads=payloads, options=AT_MOST)
    for ids, payload, prompt in zip(found, payloads, prompts, strict=True):
        assert ids == alone(model, reader, payload, prompt)
    answered = [
        Prompt([*p.ids, *ids], p.latent_at, [False] * len(p.ids) + [True] * len(ids))
        for p, ids in zip(prompts, found, strict=True)
    ]
    scores = receiver.score(answered, payloads=payloads)
    best = scores.logprobs_NV.index_fill(1, torch.tensor(reader.stop_ids), -torch.inf).argmax(-1)
    assert torch.equal(best, scores.labels_N), "scoring sees what decoding sees"


# --- which engine -------------------------------------------------------------------------------


def test_a_reader_on_the_cpu_is_read_op_by_op_and_says_why(reader: Reader) -> None:
    assert Receiver.for_text(reader).engine == "eager"
    assert "on one CUDA device, and it is on ['cpu']" in Receiver.for_text(reader).reason
    asked = Receiver.for_text(reader, options=ReceiverOptions(engine="eager"))
    assert asked.reason == "asked for"
    with pytest.raises(ConfigError, match=r"cannot run as a CUDA graph: a graph needs all of it"):
        Receiver.for_text(reader, options=ReceiverOptions(engine="graph"))


def test_plain_readers_pass_the_trial(reader: Reader) -> None:
    assert why_not_mask_free(reader) is None
    assert "CUDA" in str(why_no_graph(reader))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (mistral, "a sliding window"),
        (gemma3, "a sliding window"),
        (gpt_neo, "attention of its own that cannot be replaced"),
    ],
)
def test_what_cannot_be_captured_is_known_before_the_first_prompt(
    readers: dict[str, Reader], build: Callable[[Any], PreTrainedModel], reason: str
) -> None:
    reader = windowed(build, readers["llama"])
    assert reason in str(why_not_mask_free(reader))
    with pytest.raises(ConfigError, match=f"reader {build.__name__!r} cannot be compiled") as error:
        Receiver.for_text(reader, options=ReceiverOptions(engine="compile"))
    assert "engine='eager'" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Falcon, one key head", "attention of its own that cannot be replaced"),
        ("DeepSeek-V3", "a static cache does not hold its past: its keys are 1 heads of width 16"),
    ],
)
def test_families_that_no_graph_reads_are_known_too(
    readers: dict[str, Reader], name: str, reason: str
) -> None:
    tokenizer = readers["llama"].tokenizer
    family = next(family for family, _ in OTHERS if family.name == name)
    reader = Reader(family.model(tokenizer).eval(), tokenizer, name=name)  # type: ignore[arg-type]
    assert reason in str(why_not_mask_free(reader))


def test_a_soft_cap_is_found_by_the_trial(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = windowed(gemma2, readers["llama"])
    assert not reader.abilities.deep  # probed with its own attention, as when it is loaded
    reader.model.config._attn_implementation = "sdpa"
    monkeypatch.setattr(engines, "has_window", lambda model: False)
    reason = str(why_not_mask_free(reader))
    assert reason.startswith("a trial failed: ")
    assert "softcap" in reason


def test_attention_that_differs_without_its_mask_is_found_by_the_trial(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2).contiguous(), None

    attention.AttentionInterface.register(attention.MASK_FREE, everything)
    try:
        assert "in a trial its hidden states were" in str(why_not_mask_free(reader))
    finally:
        attention.AttentionInterface.register(attention.MASK_FREE, attention.causal_attention)
    assert why_not_mask_free(reader) is None


def test_attention_that_is_not_plain_is_refused_in_words_for_any_program(
    reader: Reader,
) -> None:
    query = torch.randn(1, 2, 3, 4)
    with pytest.raises(ConfigError, match="wants attention with softcap") as error:
        attention.causal_attention(reader.model, query, query, query, None, softcap=50.0)
    assert "engine" not in str(error.value)


def test_a_reader_that_cannot_decode_from_a_cache_is_refused(readers: dict[str, Reader]) -> None:
    tokenizer = readers["llama"].tokenizer
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1)
    config.eos_token_id = tokenizer.eos_token_id
    reader = Reader(MambaForCausalLM(config).eval(), tokenizer, name="mamba")
    expected = r"reader 'mamba' \(mamba\) cannot be used: when it decodes .*; choose another reader"
    with pytest.raises(ConfigError, match=expected):
        Receiver.for_text(reader)


def test_a_capture_that_fails_leaves_the_prompts_to_the_eager_engine(
    reader: Reader,
    uncaptured: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such stream")

    model = make_model(reader, "both")
    payloads = random_payloads(model)
    prompts = asking(reader, ["Who?", "Where does he live?", "What is it?"])
    captured = Receiver.of(model, reader)
    expected = captured.generate(prompts, payloads=payloads, options=AT_MOST)
    receiver = Receiver.of(model, reader)
    asked = Receiver.of(model, reader, options=ReceiverOptions(engine="graph"))
    assert receiver.engine == "graph"
    monkeypatch.setattr("latentwire_fast.serving.forward_pass.CapturedPass", fails)
    with caplog.at_level(logging.WARNING):
        found = [receiver.generate(prompts, payloads=payloads, options=AT_MOST) for _ in range(2)]
    assert found == [expected] * 2
    assert (receiver.engine, receiver.reason) == ("eager", "a capture failed: no such stream")
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    with pytest.raises(RuntimeError, match="no such stream"):
        asked.prefill(prompts, payloads=payloads)
    decided = Receiver.of(model, reader)
    assert (decided.engine, decided.reason) == ("eager", "a capture failed: no such stream")
    with pytest.raises(ConfigError, match="as a CUDA graph: a capture failed: no such stream; the"):
        Receiver.of(model, reader, options=ReceiverOptions(engine="graph"))


@pytest.mark.usefixtures("uncaptured")
def test_tokens_are_decoded_by_a_graph_too(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind a graph, unless a trial or the capture fails: then op by op, with the same answers."""
    model = make_model(reader, "both")
    payloads = random_payloads(model)
    prompts = asking(reader, ["Who?", "Where does he live?", "What is it?"])
    answers, ran = {}, []
    monkeypatch.setattr(
        prefilled._Decoder, "__init__", lambda *a, **k: ran.append(how) or decoder_init(*a, **k)
    )

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such stream")

    for how in ("graph", "refused", "failed"):
        with monkeypatch.context() as patch:
            if how == "refused":
                patch.setattr(graph_engine, "why_no_step", lambda reader: "a trial failed")
            if how == "failed":
                patch.setattr(graph_engine, "CapturedStep", fails)
            receiver = Receiver.of(model, reader)
            options = {"payloads": payloads, "options": AT_MOST}
            answers[how] = [receiver.generate(prompts, **options) for _ in range(2)]
            assert receiver.engine == "graph"
    assert ran == ["refused"] * 2 + ["failed"] * 2
    assert answers["graph"][0] == answers["graph"][1]
    assert answers["graph"] == answers["refused"] == answers["failed"]
    assert "decodes op by op: a capture failed: no such stream" in caplog.text
    assert len(caplog.records) == 1


def test_a_reader_that_takes_no_full_mask_decodes_op_by_op(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_no_step(reader) is None
    forward = reader.backbone.forward

    def takes_masks_of_two_dimensions(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("a mask has two dimensions")
        return forward(*args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(reader.backbone, "forward", takes_masks_of_two_dimensions)
    assert why_no_step(reader) == "a trial failed: ValueError: a mask has two dimensions"
    assert why_not_mask_free(reader) is None


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("engine", "fast"),
        ("new_tokens", 0),
        ("graph_bytes", 0),
        ("prefix_gain", 0.0),
        ("prefix_gain", -1.0),
        ("prefix_gain", 1e30),
        ("prefix_gain", float("inf")),
        ("prefix_gain", float("nan")),
    ],
)
def test_impossible_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        ReceiverOptions(**{option: value})


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("prefix", ["soft", "deep", "both"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_gain_scales_soft_tokens_and_the_values_of_a_deep_prefix(
    reader: Reader, prefix: str, kind: str
) -> None:
    model = make_model(reader, prefix, kind=kind)
    payloads, prompts = random_payloads(model), asking(reader, ["Who?", "Where?", "What is it?"])
    receiver = Receiver.of(model, reader, options=ReceiverOptions(prefix_gain=2.5))
    reader_inputs = model.reader_inputs(reader.name, model.decode_payloads(payloads), gain=2.5)
    with torch.no_grad():
        batch = reader.collate(prompts, **reader_inputs)
        cache = DynamicCache()
        if reader_inputs["deep"] is not None:
            for number, (keys, values) in enumerate(reader_inputs["deep"]):
                cache.update(keys, values, number)
        hidden = reader.backbone(**batch.model_inputs(), past_key_values=cache).last_hidden_state
        rows = torch.arange(len(prompts))
        expected = reader.head(hidden[rows, batch.lengths_B - 1])
    found = receiver.prefill(prompts, payloads=payloads).logits_BV
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = Receiver.of(model, reader).prefill(prompts, payloads=payloads).logits_BV
    assert not torch.allclose(found, plain, atol=1e-2)


@pytest.mark.parametrize("prefix", ["soft", "deep", "both"])
def test_adapters_run_in_the_readers_dtype(llama_folder: Any, prefix: str) -> None:
    reader = Reader.load(llama_folder, name="llama", dtype=torch.bfloat16)
    model = make_model(reader, prefix)
    seen: list[torch.dtype] = []
    receiver = Receiver.of(model, reader)
    for part in (receiver._pass.parts.adapter, receiver._pass.parts.deep_prefix):  # type: ignore[union-attr]
        if part is not None:
            part.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    payloads, prompts = random_payloads(model), asking(reader, ["Who?", "Where?", "What?"])
    found = receiver.prefill(prompts, payloads=payloads).logits_BV.float()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "the model's own stay"
    exact = Reader.load(llama_folder, name="llama")
    again = make_model(exact, prefix)
    again.load_state_dict(model.state_dict())
    expected = Receiver.of(again, exact).prefill(prompts, payloads=payloads).logits_BV
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("prefix", "kind"), [("soft", "linear"), ("both", "mlp")])
def test_adapters_run_in_the_readers_dtype_under_autocast_too(
    llama_folder: Any, prefix: str, kind: str, dtype: torch.dtype
) -> None:
    """From codes (`linear`) and from latents. Before, autocast chose another one."""
    reader = Reader.load(llama_folder, name="llama", dtype=dtype)
    model = make_model(reader, prefix, kind=kind)
    receiver = Receiver.of(model, reader)
    batch = receiver._batch(asking(reader, ["Who?"] * 3), random_payloads(model), None)
    expected = receiver._pass.prefixes(batch)
    with torch.autocast("cpu", torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
        found = receiver._pass.prefixes(batch)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype == dtype
            assert torch.equal(one, other)


def test_a_prompt_beyond_computed_positions_is_read_and_said_once(
    llama_folder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reader = Reader.load(llama_folder, name="llama")
    prompt = reader.prompts.build([Turn("Who?")], context="Nulnak is old. " * 4)
    expected = Receiver.for_text(reader).generate([prompt], options=AT_MOST)
    reader.model.config.max_position_embeddings = 20
    receiver = Receiver.for_text(reader)
    with caplog.at_level(logging.WARNING):
        assert [receiver.generate([prompt], options=AT_MOST) for _ in range(2)] == [expected] * 2
    assert len(caplog.records) == 1
    assert "reader 'llama' knows 20: what it says" in caplog.text
