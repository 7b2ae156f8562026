"""Runs whose contexts are several latents, and whose latents differ in number: trained, stopped,
resumed, validated, evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast import wire
from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import (
    ContinuationConfig,
    RunConfig,
    StageConfig,
    ValidationConfig,
)
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.pipeline import evaluate_run
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.registry import ATTACHMENTS, POOLERS
from latentwire_fast.serving import Receiver
from latentwire_fast.training.trainer import Trainer
from receiving import asking, at_most
from runs import (
    assert_resumes,
    changed,
    deep,
    soft,
    tiny_config,
    train,
    train_on_the_cpu,
)
from test_entry_points import in_this_process

pytestmark = pytest.mark.usefixtures("on_the_cpu")

LENGTH = 24  # tokens of a chunk: two facts


def config_of(folder: Path, **changes: Any) -> RunConfig:
    """Passages of one to four facts, with a soft and a deep prefix of each chunk."""
    objectives = weighted(answer=1.0, kd=0.5, autoencode=0.1)
    stage = StageConfig("s", steps=2, objectives=objectives, quantize=6)
    config = tiny_config(
        folder,
        attachments=(soft(expansion=1, dropout=0.1), deep(width=16, heads=2, expansion=2)),
        data={"facts": 4, "chunk_length": LENGTH, "eval_examples": 6},
        stages=(stage,),
    )
    config = changed(
        config,
        encoder={"pooler": POOLERS.config("spans"), "frozen": True},
        evaluation={"bits": (6,), "max_new_tokens": 2, "hybrid_tokens": 8},
    )
    return changed(config, **changes)


VARYING: dict[str, Any] = {
    "pooler": POOLERS.config("spans"), "frozen": True, "tokens_per_latent": 9.0
}  # fmt: skip


@pytest.fixture(scope="module", params=["fixed", "varying"])
def trained(
    request: pytest.FixtureRequest,
    llama_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trainer:
    """A run of two steps, without dropout."""
    parts = (soft(expansion=1), deep(width=16, heads=2, expansion=2))
    config = config_of(llama_folder, attachments=parts)
    if request.param == "varying":
        config = changed(config, encoder=VARYING)
    return train_on_the_cpu(config, tmp_path_factory.mktemp("chunked"))


def test_a_run_is_trained_resumed_and_evaluated(llama_folder: Path, tmp_path: Path) -> None:
    validation = ValidationConfig(every=2, examples=2)
    config = config_of(llama_folder, validation=validation, encoder=VARYING)
    whole = train(config, tmp_path / "whole")
    assert_resumes(config, tmp_path / "cut", whole)

    metrics = evaluate_run(tmp_path / "whole", progress=False)
    latent = metrics["latent"]
    assert latent["chunk_length"] == LENGTH
    assert latent["payloads_mean"] >= 2
    model = Interlingua.from_pretrained(whole.folder.model)
    assert 1 < latent["M_mean"] < latent["M"] == model.encoder_config.latents
    assert "truncated" not in metrics
    methods = metrics["readers"]["llama"]
    assert methods["hybrid"]["sent_bytes_mean"] > 16
    positions = methods["latent"]["prefix_positions_mean"]
    # Soft tokens and a deep prefix of each payload.
    assert positions == pytest.approx(2 * latent["payloads_mean"] * latent["M_mean"])


def test_a_batch_gives_the_loss_of_its_items_alone(trained: Trainer) -> None:
    """Items of one, two and more chunks."""
    session = trained.session
    (stage,), stream = session.config.stages, session.stream
    items = [stream.batch(0, 1, facts=facts)[0] for facts in (1, 3, 4, 6)]
    prepared = session.objectives.prepare(items, stage, ["llama"])
    assert len({len(item.chunks) for item in prepared}) > 2
    counts = {(kind, "llama"): 1 for kind in ("answer", "kd", "autoencode")}
    together = session.objectives.compute(prepared, stage, counts)
    alone = [session.objectives.compute([item], stage, counts) for item in prepared]
    for key, value in together.sums.items():
        torch.testing.assert_close(value, torch.stack([one.sums[key] for one in alone]).sum())
    together.total.backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0
        for name, p in session.model.trained_parameters()
        if "down.weight" in name
    )


def test_a_long_text_in_python(trained: Trainer) -> None:
    """What `encode_chunks` gives is what a `Receiver` takes, and its bytes are those of single
    payloads."""
    model = Interlingua.from_pretrained(trained.folder.model)
    text = "Nulnak lives in Bakrim. Fosvun has a red lamp and is 94. Selpon is a baker in Nelvok."
    (message,) = model.encode_chunks([text], length=LENGTH)
    chunks = model.cut([text], length=LENGTH).contexts
    assert [*message] == [model.encode_payloads([chunk])[0] for chunk in chunks]
    llama = trained.session.readers["llama"]
    prompts = asking(llama, ["Where?", "Who is a baker?"])
    answers = Receiver.of(model, llama).generate(prompts, payloads=[message], options=at_most(4))
    assert len(answers) == 2


def test_a_deep_prefix_alone_may_be_of_fewer_latents(llama_folder: Path, tmp_path: Path) -> None:
    """There are no soft tokens to put one behind the other."""
    config = config_of(llama_folder, attachments=(deep(width=16, heads=2, expansion=2),))
    trained = train(changed(config, encoder=VARYING), tmp_path)
    model, reader = trained.session.model.eval(), trained.session.readers["llama"]
    (message,) = model.encode_chunks(["Nulnak lives in Bakrim. Fosvun has a red lamp."], length=14)
    assert len({model.latents_of(payload) for payload in message} | {4}) > 1
    prompts = asking(reader, ["Where?"])
    Receiver.of(model, reader).generate(prompts, payloads=[message], options=at_most(2))


def test_objectives_about_one_latent_are_refused(llama_folder: Path) -> None:
    stage = StageConfig("s", steps=1, objectives=weighted(answer=1.0, continuation=0.5))
    with pytest.raises(ConfigError, match=r"'continuation' is about one latent .*chunk_length"):
        config_of(llama_folder, stages=(stage,))
    with pytest.raises(ConfigError, match="chunk_length=0"):
        config_of(llama_folder, data={"chunk_length": 0})


def test_a_long_text_on_the_command_line(trained: Trainer, tmp_path: Path) -> None:
    """One file with a payload for each chunk, and one answer from all of them."""
    run, note, payload = trained.folder.path, tmp_path / "note.txt", tmp_path / "note.lwire"
    note.write_text("Nulnak lives in Bakrim. Fosvun has a red lamp. Selpon is a baker in Nelvok.")
    encode = ("--run", run, "--context", note, "--out", payload)
    status, output, error = in_this_process("encode", *encode, "--chunk-length", LENGTH)
    assert status == 0, error
    payloads = [*wire.read_payloads(payload)]
    assert len(payloads) > 1
    size = payload.stat().st_size
    assert f"{size} bytes for" in output
    assert f"in {len(payloads)} payloads" in output
    asked = ("--run", run, "--reader", "llama", "--payload", payload, "--question", "Where?")
    status, output, error = in_this_process("generate", *asked, "--together")
    assert status == 0, error
    assert output.count("answer: ") == 1
    assert f"{size} bytes, payload to logits" in output
    status, output, error = in_this_process("generate", *asked)
    assert output.count("answer: ") == len(payloads)
    payload.write_bytes(payload.read_bytes()[:-1])
    status, output, error = in_this_process("generate", *asked)
    assert status != 0
    assert "answer: " not in output, "a file that was cut short gives no answer at all"
    assert f"payload {len(payloads) - 1}" in error


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"encoder": VARYING | {"pooler": POOLERS.config("hierarchical", heads=2)}}, "pooler 'hi"),
        ({"attachments": (ATTACHMENTS.config("soft_matched"),)}, "attachment 'soft_matched'"),
        ({"attachments": (soft(calibration="example"),)}, "calibration='example' is over all M"),
        (
            {"stages": (StageConfig("s", steps=1, objectives=weighted(attention=1.0)),)},
            "'attention' is about M latents",
        ),
        ({"evaluation": {"continuation": ContinuationConfig("text=x")}}, "evaluation.continuation"),
        ({"evaluation": {"pca_texts": 20}}, r"evaluation\.pca_texts is about M latents"),
    ],
)
def test_parts_that_take_one_number_of_latents_are_refused(
    llama_folder: Path, changes: dict[str, Any], match: str
) -> None:
    config = config_of(llama_folder, data={"chunk_length": None})
    with pytest.raises(ConfigError, match=match):
        changed(config, **{"encoder": VARYING, **changes})


def test_continuation_takes_fewer_latents(llama_folder: Path, tmp_path: Path) -> None:
    stage = StageConfig("s", steps=1, objectives=weighted(continuation=1.0))
    config = config_of(llama_folder, data={"chunk_length": None}, stages=(stage,))
    config = changed(config, encoder=VARYING, attachments=(soft(expansion=1),))
    session = train(config, tmp_path).session
    items = [session.stream.batch(0, 1, facts=facts)[0] for facts in (1, 4)]
    prepared = session.objectives.prepare(items, stage, ["llama"])
    counts = {("continuation", "llama"): 1}
    together = session.objectives.compute(prepared, stage, counts).total
    alone = [session.objectives.compute([item], stage, counts).total for item in prepared]
    torch.testing.assert_close(together, torch.stack(alone).sum())
