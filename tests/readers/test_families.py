"""Every family of readers, from a tiny random model: what works works as with text, and what cannot
work is refused by the probe, in one sentence (F2, F22, F27, F28).

`docs/readers.md` has the table of what is tried here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from families import OTHERS, READERS, WINDOW, Family
from latentwire_fast import encode as encode_command
from latentwire_fast.config.schema import AttachmentConfig, ReaderConfig, RunConfig, StageConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.pipeline import evaluate_run
from latentwire_fast.generate import (
    GenerateArguments,
    answers,
    decode_options,
    load,
    receiver_options,
)
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.attention import own_attention
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.decoding_cache import decoding_cache
from latentwire_fast.readers.probe import kept
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.trace import observe
from latentwire_fast.registry import ENCODERS, OBJECTIVES, POOLERS
from latentwire_fast.serving import Receiver
from reading import decode_slowly, text_prompts
from runs import deep, soft, tiny_config, train

DEEP = {"width": 16, "layers": 1, "heads": 2, "expansion": 1}
PARTS: dict[str, tuple[AttachmentConfig, ...]] = {
    "soft": (soft(expansion=1),),
    "deep": (deep(**DEEP),),
    "both": (soft(expansion=1), deep(**DEEP)),
}
BYTES = ENCODERS.config("byte", latents=4, d_z=8, width=16, layers=1, heads=2)
NEW_TOKENS = 5
AT_MOST = DecodeOptions(max_new_tokens=NEW_TOKENS, eos_ban_steps=NEW_TOKENS)


def saved(family: Family, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """A folder with a model of a family."""
    family.model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=READERS, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def folder(
    family: Family,
    llama_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return saved(family, llama_tokenizer, tmp_path_factory.mktemp("families") / "reader")


@pytest.fixture(scope="module")
def reader(family: Family, folder: Path) -> Reader:
    return Reader.load(folder, name="reader", attn_implementation=family.attention)


@pytest.fixture(scope="module")
def ragged() -> list[Example]:
    """Eight questions on texts of several lengths, all longer than the windows."""
    return [e for facts in (1, 2, 3, 4) for e in make_examples(2, seed=facts, facts=facts)]


def config_of(family: Family, folder: Path, parts: str, **changes: object) -> RunConfig:
    """Two steps on a reader, the second with quantised latents."""
    changes = {
        "readers": {"reader": ReaderConfig(str(folder), attn_implementation=family.attention)},
        "attachments": PARTS[parts],
        "stages": (StageConfig("answer", steps=1), StageConfig("quantized", steps=1, quantize=6)),
        "encoder": BYTES,
        "mode": "context",
        **changes,
    }
    return tiny_config(folder, **changes)


# --- everything, with every family --------------------------------------------------------------


def test_every_use_is_open(reader: Reader) -> None:
    assert not any(vars(reader.abilities).values()), reader.abilities


def test_embeddings_replayed_are_the_text(reader: Reader, ragged: list[Example]) -> None:
    prompts = text_prompts(reader, ragged[::3], answered=True)
    cut = [
        Prompt(
            ids=prompt.ids[:2] + prompt.ids[7:],
            latent_at=2,
            is_target=prompt.is_target[:2] + prompt.is_target[7:],
        )
        for prompt in prompts
    ]
    embeddings = [reader.embedding(torch.tensor(prompt.ids[2:7])) for prompt in prompts]
    expected = reader.score(prompts).logprobs_NV
    torch.testing.assert_close(
        reader.score(cut, prefixes=embeddings).logprobs_NV, expected, rtol=0, atol=2e-4
    )


def test_a_prefix_of_its_own_keys_and_values_is_the_text(
    reader: Reader, ragged: list[Example]
) -> None:
    prompts = text_prompts(reader, ragged[::3], answered=True)
    for length in (4, 14):  # shorter and longer than the windows
        for prompt in prompts:
            cache = decoding_cache(reader.model)
            head = torch.tensor([prompt.ids[:length]])
            with torch.no_grad():
                reader.backbone(input_ids=head, past_key_values=cache, use_cache=True)
            rest = Prompt(prompt.ids[length:], 0, prompt.is_target[length:])
            torch.testing.assert_close(
                reader.score([rest], deep=kept(cache)).logprobs_NV,
                reader.score([prompt]).logprobs_NV,
                rtol=0,
                atol=2e-4,
            )


def test_a_batch_of_eight_is_each_alone(reader: Reader, ragged: list[Example]) -> None:
    prompts = text_prompts(reader, ragged, answered=True)
    alone = torch.cat([reader.score([prompt]).logprobs_NV for prompt in prompts])
    for side in ("left", "right"):
        together = reader.score(prompts, side=side).logprobs_NV
        torch.testing.assert_close(together, alone, rtol=0, atol=2e-4)
    asked = text_prompts(reader, ragged, answered=False)
    receiver = Receiver.for_text(reader)
    found = receiver.generate(asked, options=AT_MOST)
    assert found == [receiver.generate([prompt], options=AT_MOST)[0] for prompt in asked]
    slow = decode_slowly(
        reader, asked[0], None, steps=NEW_TOKENS, stops=reader.stop_ids, ban=NEW_TOKENS
    )
    assert found[0] == slow


@pytest.mark.parametrize("parts", ["soft", "deep"])
def test_two_steps_of_training(family: Family, folder: Path, parts: str, tmp_path: Path) -> None:
    trainer = train(config_of(family, folder, parts), tmp_path / "run")
    assert trainer.session.state.step == 2


def test_training_evaluation_encoding_and_answering(
    family: Family,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With both kinds of prefix, and an encoder that starts from the same model."""
    evaluation = {"timing_examples": 1, "resamples": 5, "bits": (6,), "max_new_tokens": 3}
    config = config_of(
        family,
        folder,
        "both",
        encoder=ENCODERS.config("lm", source=str(folder), latents=4, d_z=8),
        evaluation={**evaluation, "batch_size": 4},
        data={"eval_examples": 4},
    )
    run = tmp_path / "run"
    train(config, run)
    metrics = evaluate_run(run, out=tmp_path / "metrics.json", progress=False)
    scores = metrics["readers"]["reader"]
    assert scores["embedding_replay"]["nll_per_token"]["mean"] == pytest.approx(
        scores["text"]["nll_per_token"]["mean"], abs=1e-3
    )
    note, payload = tmp_path / "note.txt", tmp_path / "note.lwire"
    note.write_text("Nulnak is a baker in Bakrim.")
    arguments = ["--run", run, "--context", note, "--out", payload]
    monkeypatch.setattr(sys, "argv", ["encode", *map(str, arguments)])
    encode_command.main()
    assert "bytes for" in capsys.readouterr().out
    args = GenerateArguments(
        run=run, reader="reader", payload=payload, question="Who?", eos_ban_steps=2
    )
    model, reader = load(args)
    options = {"receiving": receiver_options(args), "decoding": decode_options(args)}
    (answer,) = answers(model, reader, args, **options)
    assert answer.tokens >= 2


# --- windows (F2, F3), and readers that take soft tokens only (F27, F28) ------------------------


@pytest.mark.parametrize(
    ("name", "objectives"), [("Mistral, window", ("select", "kv")), ("Gemma 3", ("select",))]
)
def test_positions_are_selected_for_readers_with_windows(
    name: str, objectives: tuple[str, ...], llama_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The recipe of `testbed_context`, on texts that are longer than the window."""
    family = next(family for family in READERS if family.name == name)
    folder = saved(family, llama_tokenizer, tmp_path / "reader")
    config = config_of(
        family,
        folder,
        "deep",
        encoder=ENCODERS.config(
            "lm",
            source=str(folder),
            latents=4,
            d_z=8,
            pooler=POOLERS.config("selected"),
            frozen=True,
        ),
        stages=(
            StageConfig("select", 1, tuple(OBJECTIVES.config(kind) for kind in objectives)),
            StageConfig("answer", steps=1),
        ),
        evaluation={"timing_examples": 1, "resamples": 5, "bits": (6,), "max_new_tokens": 2},
        data={"eval_examples": 3},
    )
    train(config, tmp_path / "run")
    metrics = evaluate_run(tmp_path / "run", out=tmp_path / "metrics.json", progress=False)
    assert metrics["readers"]["reader"]["latent"]["f1"] is not None


def test_the_attention_that_is_observed_is_that_within_the_window(
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    family = next(family for family in READERS if family.name == "Mistral, window")
    reader = Reader(family.model(llama_tokenizer), llama_tokenizer, name="mistral")
    context = "Nulnak is a baker in Bakrim, and 94 years old."
    prompts = [reader.prompts.build([Turn("Who?", "a baker")], context=context)]
    found = observe(reader, prompts)
    batch = reader.collate(prompts)
    with own_attention(reader.model, "eager"):
        attentions = reader.backbone(input_ids=batch.ids_BT, output_attentions=True).attentions
    expected = sum(layer[0, :, batch.cols_N].sum((0, 1)) for layer in attentions)
    torch.testing.assert_close(found.attention_BT[0], expected, rtol=1e-4, atol=1e-5)
    assert (found.attention_BT[0, : batch.ids_BT.shape[1] - 2 * WINDOW] == 0).all()
    assert found.layers[0][0].shape[2] == batch.ids_BT.shape[1], "keys of all positions"


@pytest.mark.parametrize("name", ["LFM2", "Bart's decoder", "Gemma 4 (text)"])
def test_readers_of_soft_tokens_alone(
    name: str, llama_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """What they say in a ragged batch is what they say alone; a deep prefix is refused before
    anything is trained, where they take none."""
    family, refused = next(entry for entry in OTHERS if entry[0].name == name)
    try:
        folder = saved(family, llama_tokenizer, tmp_path / "reader")
    except (ValueError, KeyError) as error:
        pytest.skip(f"not in this transformers: {error}")
    evaluation = {"timing_examples": 1, "resamples": 5, "bits": (6,), "max_new_tokens": 3}
    few = {"evaluation": {**evaluation, "batch_size": 3}, "data": {"eval_examples": 3}}
    train(config_of(family, folder, "soft", **few), tmp_path / "run")
    metrics = evaluate_run(tmp_path / "run", out=tmp_path / "metrics.json", progress=False)
    assert metrics["readers"]["reader"]["latent"]["f1"] is not None
    reader = Reader.load(folder, name="reader", attn_implementation=family.attention)
    asked = text_prompts(reader, make_examples(3, seed=1, facts=2), answered=False)
    first = Receiver.for_text(reader).prefill(asked)
    slow = [
        decode_slowly(reader, prompt, None, steps=NEW_TOKENS, stops=reader.stop_ids, ban=NEW_TOKENS)
        for prompt in asked
    ]
    assert first.generate(AT_MOST) == slow
    assert first.generate(AT_MOST) == slow, "a second time too"
    if "deep" in refused:
        with pytest.raises(ConfigError, match=r"reader 'reader' \(.*\) takes no deep prefix: "):
            train(config_of(family, folder, "both"), tmp_path / "deep")
        assert not (tmp_path / "deep" / "config.json").exists()


# --- the probe ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("other", "expected"), OTHERS, ids=[family.name for family, _ in OTHERS])
def test_what_the_probe_finds(
    other: Family, expected: dict[str, str], llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    try:
        model = other.model(llama_tokenizer)
    except (ValueError, KeyError) as error:
        pytest.skip(f"not in this transformers: {error}")
    reader = Reader(model, llama_tokenizer, name="other")
    if "reads" in expected:
        with pytest.raises(ConfigError, match=r"reader 'other' \(.*\) cannot be used: ") as refusal:
            assert reader.abilities
        assert expected["reads"] in str(refusal.value)
        assert str(refusal.value).endswith("; choose another reader")
        return
    found = {use: reason for use, reason in vars(reader.abilities).items() if reason}
    assert found.keys() == expected.keys(), found
    for use, reason in found.items():
        assert reason.startswith(expected[use])
    if "deep" in expected:
        with pytest.raises(ConfigError, match=r"no deep prefix: .* give it soft tokens alone"):
            reader.require("deep")
    if "left" in expected:
        prompt = reader.prompts.build([Turn("Who?", "he")], context=None)
        with pytest.raises(ConfigError, match=r"takes no padding on the left: .* pad on the right"):
            reader.score([prompt, prompt], side="left")


# --- the documentation --------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_documentation_has_what_is_tried_here(repository: Path) -> None:
    text = (repository / "docs" / "readers.md").read_text()
    checks = [
        "replay = text",
        "own K/V = text",
        "two steps: soft, deep, both",
        "evaluate, encode, generate",
        "batch 1 = 8, left and right",
    ]
    rows = [["family", *checks], *([family.name, *["yes"] * len(checks)] for family in READERS)]
    assert table(rows) in text
    uses = ["reads", "soft", "deep", "together", "left"]
    names = ["used at all", "soft tokens", "deep prefix", "lengths in one batch", "padded left"]
    others = [
        [family.name, *("no" if use in refused or "reads" in refused else "yes" for use in uses)]
        for family, refused in OTHERS
    ]
    assert table([["family", *names], *others]) in text
