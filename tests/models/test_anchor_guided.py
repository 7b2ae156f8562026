"""The encoder on token embeddings with a frozen sentence encoder as its anchor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.schema import EncoderConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.models.encoders.anchor_guided import AnchorGuidedEncoder
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ENCODERS, POOLERS
from latentwire_fast.training.budget import budget
from latentwire_fast.training.builders import absolute_paths
from runs import records, tiny_config, tiny_squad, train

TEXTS = ["Nulnak lives in Paris.", "Kel is 7.", "Nulnak has a red cat and Kel a blue dog. " * 4]
FROZEN = ("embedding.", "anchor.")


def settings(source: str | Path, anchor: Path, **options: Any) -> EncoderConfig:
    config: EncoderConfig = ENCODERS.config(
        "anchor_guided",
        source=str(source),
        anchor=str(anchor),
        **{"latents": 5, "d_z": 8, "width": 16, "heads": 2, "layers": 1, **options},
    )
    return config


def encoder_of(config: EncoderConfig, reader: Reader) -> AnchorGuidedEncoder:
    torch.manual_seed(1)
    built = build_encoder(config, {reader.name: reader}).eval()
    assert isinstance(built, AnchorGuidedEncoder)
    return built


@pytest.mark.parametrize("pooler", ["mean", "spans"])
@pytest.mark.parametrize("pure", [False, True], ids=["context", "pure"])
@torch.no_grad()
def test_a_text_has_the_same_latent_alone_and_in_a_batch(
    reader: Reader, bert_folder: Path, pooler: str, pure: bool
) -> None:
    config = settings(reader.source, bert_folder, pooler=POOLERS.config(pooler))
    encoder = encoder_of(config, reader)
    questions = ["Who?", "How old?", "What colour?"] if pure else None
    together = encoder(TEXTS, questions)
    assert together.shape == (3, 5, 8)
    for i, text in enumerate(TEXTS):
        alone = encoder([text], None if questions is None else [questions[i]])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert torch.cdist(together.flatten(1), together.flatten(1))[0, 1:].min() > 1e-3


def test_all_but_the_embeddings_and_the_anchor_is_trained(
    reader: Reader, bert_folder: Path
) -> None:
    encoder = encoder_of(settings(reader.source, bert_folder), reader).train()
    (encoder(TEXTS) * torch.randn(3, 5, 8)).sum().backward()
    for name, parameter in encoder.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (not name.startswith(FROZEN)), name
    table = reader.backbone.get_input_embeddings().weight
    assert torch.equal(encoder.embedding.weight, table)
    assert encoder.embedding.weight.data_ptr() != table.data_ptr()


@torch.no_grad()
def test_the_anchor_is_read(reader: Reader, bert_folder: Path, roberta_folder: Path) -> None:
    first = encoder_of(settings(reader.source, bert_folder), reader)
    other = encoder_of(settings(reader.source, roberta_folder), reader)
    assert not torch.allclose(first(TEXTS), other(TEXTS), atol=1e-3)


@torch.no_grad()
def test_text_beyond_the_limit_is_cut_or_refused(
    readers: dict[str, Reader], bert_folder: Path
) -> None:
    config = settings(readers["llama"].source, bert_folder, max_tokens=12)
    encoder = encoder_of(config, readers["llama"])
    assert torch.equal(encoder([TEXTS[2]]), encoder([TEXTS[2][:80]]))
    asked = encoder([TEXTS[2]] * 2, ["Who?", "Where?"])
    assert not torch.allclose(asked[0], asked[1], atol=1e-3), "the question is kept"
    with pytest.raises(DataError, match=r"tokens, the encoder reads 12; cut it"):
        encoder.check_length(TEXTS[2])
    assert encoder(["", "é", "日本語 🙂", "[SEP] </s>"]).isfinite().all()


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("shared", [True, False], ids=["of a reader", "of a folder"])
def test_trained_saved_and_loaded(
    bert_folder: Path, llama_folder: Path, qwen_folder: Path, tmp_path: Path, shared: bool
) -> None:
    encoder = settings(llama_folder if shared else qwen_folder, bert_folder)
    config = tiny_config(
        llama_folder,
        encoder=encoder,
        data={"source": str(tiny_squad(tmp_path / "data.json"))},
        stages=(StageConfig("answer", steps=2, quantize=6),),
    )
    assert run_config_from_json(to_json(config)) == config
    session = train(config, tmp_path / "run").session
    trained = session.model.eval()
    assert trained.encoder.states_cache.misses > 0
    assert trained.encoder.kept_bytes(TEXTS[0]) > 0
    assert len(records(tmp_path / "run")) == 2
    loaded = Interlingua.from_pretrained(tmp_path / "run" / "model")
    trained.encoder.states_cache = None  # whose fp16 is not what a loaded model computes
    assert torch.equal(loaded.encode(TEXTS), trained.encode(TEXTS))
    assert loaded.encode_payloads(TEXTS) == trained.encode_payloads(TEXTS)


def test_settings(bert_folder: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="width=30 does not divide among heads=4"):
        settings("x", bert_folder, width=30, heads=4)
    with pytest.raises(ConfigError, match="pooler 'queries' needs a causal LM, which encoder 'anc"):
        settings("x", bert_folder, pooler=POOLERS.config("queries"))
    # Paths, and the size of what is frozen.
    monkeypatch.chdir(bert_folder.parent)
    config = tiny_config(llama_folder, encoder=settings(llama_folder, Path(bert_folder.name)))
    encoder = absolute_paths(config).encoder
    assert encoder.map_sources(str) == settings(llama_folder, bert_folder)
    assert budget(config).frozen["encoder"] > 0
