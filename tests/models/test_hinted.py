"""A hint about the answer's length behind the latents: trained, sent, read, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.methods.base import EvaluationCase, evaluation_methods
from latentwire_fast.models.encoders.base import Encoder, build_encoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.registry import BOTTLENECKS, ENCODERS, POOLERS
from latentwire_fast.serving import Receiver
from latentwire_fast.training.trainer import Trainer
from receiving import asking, at_most
from runs import assert_resumes, deep, soft, tiny_config, train_on_the_cpu

BYTE = ENCODERS.config("byte", width=16, layers=1, heads=2)
TEXTS = ["Nulnak lives in Bakrim.", "Ro is 7."]
EDGES = (1, 4, 9)


def hinted(**options: Any) -> Any:
    return ENCODERS.config(
        "hinted", **{"text": BYTE, "latents": 5, "d_z": 8, "edges": EDGES} | options
    )


def encoder_of(**options: Any) -> Encoder:
    torch.manual_seed(2)
    return build_encoder(hinted(**options), {}).eval()


def told(latent_BMd: torch.Tensor) -> list[int]:
    """The hints of latents: 0 is "not known"."""
    return latent_BMd[:, -1].argmax(-1).tolist()


@torch.no_grad()
def test_the_hint_is_one_more_latent() -> None:
    encoder = encoder_of()
    latent = encoder(TEXTS)
    assert latent.shape == (2, 5, 8)
    assert torch.equal(latent[:, :4], encoder.text(TEXTS))  # type: ignore[operator]
    assert told(latent) == [0, 0]
    lengths = [[0], [1], [2], [4], [9], [10], [], [2, 3], [1, 2]]
    with_hints = encoder.with_hints(latent[:1].expand(9, -1, -1), lengths)
    assert told(with_hints) == [1, 1, 2, 2, 3, 4, 0, 2, 0]
    torch.testing.assert_close(with_hints[:, -1].square().mean(-1), torch.ones(9))
    assert torch.equal(with_hints[:, :4], latent[:1, :4].expand(9, -1, -1))


def test_a_share_of_the_hints_is_left_out() -> None:
    latent = torch.zeros(400, 5, 8)
    known = [[5]] * 400
    assert set(told(encoder_of(drop=0.0).with_hints(latent, known, drop=True))) == {3}
    assert set(told(encoder_of(drop=1.0).with_hints(latent, known, drop=True))) == {0}
    torch.manual_seed(0)
    found = told(encoder_of(drop=0.25).with_hints(latent, known, drop=True))
    assert 60 < found.count(0) < 140
    assert found.count(0) + found.count(3) == 400


@torch.no_grad()
@pytest.mark.parametrize(
    "bottleneck",
    [
        *(BOTTLENECKS.config("uniform", bits=bits, group_size=16) for bits in (4, 6)),
        BOTTLENECKS.config("uniform", bits=4, version=2, prior="flat"),
        BOTTLENECKS.config("fsq", prior="flat"),
    ],
    ids=["4 bits", "6 bits", "version 2", "fsq"],
)
def test_payloads_keep_hints_apart(bottleneck: Any) -> None:
    model = Interlingua(
        encoder_of(), {}, bottleneck=bottleneck, attachments=(), mode="context"
    ).eval()
    texts = TEXTS[:1] * 4
    sent = model.encode_payloads(texts, answer_lengths=[1, 2, 5, 10])
    assert told(model.decode_payloads(sent)) == [1, 2, 3, 4]
    unknown = model.encode_payloads(texts)
    assert told(model.decode_payloads(unknown)) == [0] * 4
    with pytest.raises(ConfigError, match="1 answer_lengths for 4 contexts"):
        model.encode_payloads(texts, answer_lengths=[1])


def config_of(folder: Path, **changes: Any) -> RunConfig:
    lm = ENCODERS.config("lm", source=str(folder), pooler=POOLERS.config("spans"), frozen=True)
    stage = StageConfig("s", steps=2, objectives=weighted(answer=1.0), quantize=6)
    given: dict[str, Any] = {
        "encoder": hinted(text=lm),
        "attachments": (soft("hinted"), deep(width=16, heads=2, expansion=1)),
        "stages": (stage,),
        "data": {"eval_examples": 2},
    }
    return tiny_config(folder, **given | changes)


@pytest.fixture(scope="module")
def trained(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return train_on_the_cpu(config_of(llama_folder), tmp_path_factory.mktemp("hinted"))


@pytest.mark.usefixtures("on_the_cpu")
def test_a_run_is_resumed_and_loaded(trained: Trainer, llama_folder: Path, tmp_path: Path) -> None:
    config = config_of(llama_folder)
    assert run_config_from_json(to_json(config)) == config
    assert_resumes(config, tmp_path / "cut", trained)
    model = Interlingua.from_pretrained(trained.folder.model)
    whole, lengths = trained.session.model.eval(), [1, 30]
    payloads = model.encode_payloads(TEXTS, answer_lengths=lengths)
    assert payloads == whole.encode_payloads(TEXTS, answer_lengths=lengths)
    assert payloads != model.encode_payloads(TEXTS)
    adapter: Any = model.attachments["llama"]["soft"].adapter
    assert adapter.hint.weight.abs().max() > 0, "it was trained"
    reader = trained.session.readers["llama"]
    prompts = asking(reader, ["Where?", "How old?"])
    answers = Receiver.of(model, reader).generate(prompts, payloads=payloads, options=at_most(2))
    assert len(answers) == 2


def test_the_training_knows_lengths_and_a_validation_does_not(trained: Trainer) -> None:
    session = trained.session
    (stage,), model = session.config.stages, session.model
    items = session.stream.batch(0, 12, facts=1)
    prepared = session.objectives.prepare(items, stage, ["llama"])
    counts = {("answer", "llama"): 12}
    torch.manual_seed(1)
    model.train()
    latent = session.objectives.compute(prepared, stage, counts).latent_BMd
    assert {0} < set(told(latent)), "some are known, some were left out"
    model.eval()
    assert set(told(session.objectives.compute(prepared, stage, counts).latent_BMd)) == {0}


@torch.no_grad()
def test_an_evaluation_gives_the_gold_length_to_the_oracle_alone(trained: Trainer) -> None:
    model, reader = trained.session.model.eval(), trained.session.readers["llama"]
    rows = zip(TEXTS, ("Bakrim", "7"), strict=True)
    examples = [Example(str(i), text, "What?", (answer,)) for i, (text, answer) in enumerate(rows)]
    payloads = model.encode_payloads(TEXTS, bits=6)
    case = EvaluationCase(model, reader, examples, {6: payloads})
    method = evaluation_methods()["latent_hinted"]
    assert method.fits(case)
    inputs = method.build(case, range(2), bits=6)
    lengths = [model.encoder.length_of(example.answers[0]) for example in examples]
    assert inputs.payloads == model.encode_payloads(TEXTS, bits=6, answer_lengths=lengths)
    assert inputs.sent_bytes == [len(payload) for payload in payloads]
    assert inputs.positions == [10, 10]  # soft tokens and a deep prefix: the hint is counted too


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"edges": (1, 1)}, r"edges=\[1, 1\], expected whole numbers"),
        ({"edges": ()}, r"edges=\[\], expected"),
        ({"edges": tuple(range(7))}, "d_z=8: 7 edges make 9 hints"),
        ({"drop": 1.5}, "drop=1.5, expected 0 to 1"),
        ({"latents": 1}, "latents=1: one is the hint"),
        ({"text": ENCODERS.config("lm", tokens_per_latent=4.0)}, "'hinted' takes another one"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        hinted(**options)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"private_slots": {"llama": 1}}, "hint for all readers.*leave out private_slots"),
        ({"data": {"chunk_length": 20}}, r"leave out data\.chunk_length"),
        ({"encoder": BYTE}, "adapter 'hinted' reads the hint of the encoder 'hinted'"),
    ],
)
def test_what_is_refused_together(llama_folder: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config_of(llama_folder, **changes)


def test_other_encoders_give_no_hints() -> None:
    encoder = build_encoder(BYTE, {})
    with pytest.raises(ConfigError, match="encoder 'byte' gives no hints"):
        encoder.with_hints(torch.zeros(1, 12, 16), [[1]])
