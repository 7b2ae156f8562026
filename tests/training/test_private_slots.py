"""A run whose readers have slots of their own: trained, resumed, loaded, evaluated, added to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.overrides import with_overrides
from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError, PayloadError
from latentwire_fast.evaluation.evaluator import Evaluator
from latentwire_fast.evaluation.report import metrics_csv
from latentwire_fast.evaluation.report.view import build_view
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.registry import POOLERS
from latentwire_fast.training.trainer import Trainer
from runs import assert_resumes, deep, new_process, soft, tiny_config, train
from test_entry_points import in_this_process

pytestmark = pytest.mark.usefixtures("on_the_cpu")

TEXTS = ["Nulnak is already 94 years old.", "Ro lives in Pada."]


def config_of(*folders: Path, **changes: Any) -> RunConfig:
    """Two steps with 4 latents, of which one is each reader's own."""
    changes.setdefault("private_slots", {folder.name: 1 for folder in folders})
    return tiny_config(
        *folders,
        attachments=(soft("mlp", expansion=1, dropout=0.1),),
        stages=(StageConfig("s", steps=2, objectives=weighted(answer=1.0), quantize=6),),
        data={"eval_examples": 4, "facts": 1},
        evaluation={
            **{"batch_size": 4, "timing_examples": 1, "resamples": 20, "bits": (16,)},
            "max_new_tokens": 2,
        },
        **changes,
    )


@pytest.fixture(scope="module")
def run(llama_folder: Path, qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A finished run of both readers."""
    new_process(0)
    config = config_of(llama_folder, qwen_folder)
    return train(config, tmp_path_factory.mktemp("runs") / "whole")


def test_it_is_saved_loaded_and_resumed(run: Trainer, tmp_path: Path) -> None:
    config = run.session.config
    assert run_config_from_json(to_json(config)) == config
    assert_resumes(config, tmp_path / "cut", run)
    ours, loaded = run.session.model.eval(), Interlingua.from_pretrained(run.folder.model)
    assert loaded.slots == ours.slots
    for name in config.readers:
        own = ours.encode_payloads(TEXTS, reader=name)
        assert loaded.encode_payloads(TEXTS, reader=name) == own
        given = [m.prefix(name, m.decode_payloads(own, reader=name)) for m in (ours, loaded)]
        assert torch.equal(*given)
        assert given[0].shape[1] == 3


def test_gradients_of_an_own_slot_come_from_its_reader(run: Trainer) -> None:
    model = run.session.model
    latent = torch.randn(2, 4, model.encoder_config.d_z, requires_grad=True)
    model.prefix("llama", latent).square().sum().backward()
    assert latent.grad is not None
    assert [bool(slot.any()) for slot in latent.grad.unbind(1)] == [True, True, True, False]


def test_bytes_of_both_payloads_are_reported(run: Trainer, examples: list[Example]) -> None:
    session = run.session
    readers = {"llama": session.readers["llama"]}
    model = session.model.eval()
    results = Evaluator(session.config, model, readers, examples[:2], progress=False).run()
    metrics = results.metrics()
    sizes, entry = metrics["bytes"], metrics["readers"]["llama"]
    own = sizes["payload_alone_mean"]["llama"]
    assert metrics["latent"]["private_slots"] == {"llama": 1, "qwen2": 1}
    assert own["16"] == 16 + 3 * 8 * 2 < sizes["payload_mean"]["16"] == 16 + 4 * 8 * 2
    assert own["6"] < sizes["payload_mean"]["6"]
    assert entry["latent_alone"]["payload_mean"] == own["6"]
    assert entry["latent"]["prefix_positions_mean"] == 3
    facts = dict(build_view(metrics, [], [], {}, extra={})["facts"])
    bits = results.config.bottleneck.bits
    assert bits == 6
    assert facts["Slots"].startswith("2 shared, 1 of llama alone, 1 of qwen2 alone; alone: ")
    assert "bytes,latent_6_bits_for_llama,payload_mean," in metrics_csv(metrics, {})


def test_the_command_writes_a_payload_for_one_reader(run: Trainer, tmp_path: Path) -> None:
    note, out = tmp_path / "note.txt", tmp_path / "note.lwire"
    note.write_text(TEXTS[0])
    arguments = ("--run", run.folder.path, "--context", note, "--out", out, "--device", "cpu")
    status, output, errors = in_this_process("encode", *arguments, "--reader", "llama")
    assert status == 0, errors
    model = Interlingua.from_pretrained(run.folder.model)
    own = model.encode_payloads([TEXTS[0]], reader="llama")[0]
    assert out.read_bytes() == own
    assert f"{len(own)} bytes for" in output
    status, _, errors = in_this_process("encode", *arguments, "--reader", "lama")
    assert status == 2
    assert "no adapter for reader 'lama'; there are ['llama', 'qwen2']" in errors


def test_an_added_reader_gets_the_shared_slots(
    llama_folder: Path, qwen_folder: Path, tmp_path: Path
) -> None:
    """Of the payloads that are out there; none that are for the first reader alone."""
    first = train(config_of(llama_folder), tmp_path / "first")
    base, own = str(first.folder.path), config_of(qwen_folder, private_slots={})
    with pytest.raises(ConfigError, match="slots that are for its reader 'llama' alone; give"):
        train(with_overrides(own, base=base, readers={"llama": str(qwen_folder)}), tmp_path / "no")
    config = with_overrides(own, base=base, readers={"added": str(qwen_folder)})
    assert config.private_slots == {"llama": 1}
    added = train(config, tmp_path / "added").session.model.eval()
    sender = Interlingua.from_pretrained(first.folder.model)
    payloads = sender.encode_payloads(TEXTS)
    assert added.encode_payloads(TEXTS) == payloads
    shared = added.encode_payloads(TEXTS, reader="added")
    assert len(shared[0]) < len(payloads[0])
    given = [
        added.prefix("added", added.decode_payloads(made, reader="added"))
        for made in (payloads, shared)
    ]
    assert given[0].shape == given[1].shape == (2, 3, added.cards["added"].d_model)
    torch.testing.assert_close(given[0], given[1], rtol=0, atol=0.2)
    with pytest.raises(PayloadError, match="is for reader 'llama' alone, with 4 of the 4 slots"):
        added.decode_payloads(sender.encode_payloads(TEXTS, reader="llama"), reader="added")
    with pytest.raises(PayloadError, match="for readers without slots of their own, with 3 of the"):
        sender.decode_payloads(shared, reader="llama")
    with pytest.raises(ConfigError, match="no adapter for reader 'added'"):
        sender.encode_payloads(TEXTS, reader="added")


def test_objectives_see_what_a_reader_gets(
    llama_folder: Path, qwen_folder: Path, tmp_path: Path
) -> None:
    """Those that compare slot by slot."""
    pure = replace(
        config_of(llama_folder, qwen_folder),
        mode="pure",
        stages=(StageConfig("s", steps=1, objectives=weighted(embed=1.0)),),
    )
    selected = tiny_config(
        *(llama_folder, qwen_folder),
        encoder={"pooler": POOLERS.config("selected"), "frozen": True},
        attachments=(deep(width=16, heads=2, expansion=1),),
        stages=(StageConfig("s", steps=1, objectives=weighted(select=1.0, kv=1.0)),),
        private_slots={"qwen2": 2},
    )
    for name, config in (("embed", pure), ("kv", selected)):
        assert train(config, tmp_path / name).session.state.step == 1


def test_it_checks_itself(llama_folder: Path, qwen_folder: Path) -> None:
    for private, message in (
        ({"lama": 1}, r"private_slots\['lama'\]: the run's readers are \['llama', 'qwen2'\]"),
        ({"llama": 0}, r"private_slots\['llama'\]=0, expected at least 1"),
        ({"llama": 2, "qwen2": 2}, "private_slots: 4 of 4 latents; leave one at least"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of(llama_folder, qwen_folder, private_slots=private)
