"""Deep prefixes in the text's place: behind the reader's own keys and values of a prompt's head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentwire_fast.errors import ConfigError
from latentwire_fast.models.attachments.deep import DeepPrefix
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.own_kv import head_keys_values, text_keys_values
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.serving import Receiver
from latentwire_fast.training.builders import build_model
from runs import deep, soft, tiny_config

CONTEXT = "Nulnak lives in Paris and is 94 years old."
TURN = [Turn("Where does Nulnak live?", "Paris")]


def test_a_texts_own_keys_and_values_in_its_place_are_that_text(reader: Reader) -> None:
    head = head_keys_values(reader, "context")
    first = head.shape[4]
    tokens = len(reader.prompts.build_context(CONTEXT).ids) - first
    own = text_keys_values(reader, CONTEXT, slots=tokens, first=first)[:, :, None]
    none = torch.zeros(1, 0, reader.d_model)
    prompt = reader.prompts.build(TURN, context=CONTEXT, latent="context")
    with torch.no_grad():
        text = reader.score([reader.prompts.build(TURN, context=CONTEXT)]).gold_N
        deep_prefix = torch.cat([head, own], 4)
        placed = reader.score([prompt], prefixes=none, deep=deep_prefix, head=first).gold_N
        before = reader.score([prompt], prefixes=none, deep=own).gold_N
    torch.testing.assert_close(placed, text, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before, text, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["context", "pure"])
@pytest.mark.parametrize("with_soft", [False, True], ids=["deep", "both"])
def test_trained_saved_and_received(
    llama_folder: Path, qwen_folder: Path, tmp_path: Path, mode: str, with_soft: bool
) -> None:
    """The head comes with the saved model, and the receiver reads as training did."""
    parts = (deep(width=16, heads=2, expansion=1, in_place=True),)
    parts += (soft("linear"),) if with_soft else ()
    config = tiny_config(llama_folder, qwen_folder, mode=mode, attachments=parts)
    readers = load_readers(config.readers)
    model = build_model(config, readers, [CONTEXT, "Kel is 7 years old."]).eval()
    loaded = Interlingua.from_pretrained(model.save_pretrained(tmp_path / "model"))
    questions = [TURN[0].question] if mode == "pure" else None
    payload = model.encode_payloads([CONTEXT], questions, bits=16)
    for name, reader in readers.items():
        prompt = reader.prompts.build(TURN, context=CONTEXT, latent=model.mode)
        assert prompt.latent_at is not None
        inputs = loaded.reader_inputs(name, loaded.decode_payloads(payload))
        assert inputs["head"] == prompt.latent_at
        assert model.positions == model.encoder_config.latents * len(parts)
        with torch.no_grad():
            wanted = reader.score([prompt], **inputs).gold_N
        receiver = Receiver.of(loaded, reader)
        found = receiver.score([prompt], payloads=payload).gold_N
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        question = reader.prompts.build([Turn(TURN[0].question)], context=None, latent=model.mode)
        assert len(receiver.generate([question, question], payloads=payload)) == 2


def test_it_starts_from_the_average_key_and_value(reader: Reader) -> None:
    torch.manual_seed(0)
    texts = [CONTEXT, "Kel is 7 years old.", "Mor has a red cat."]
    config = DeepPrefix.Config(width=16, heads=2, expansion=1, in_place=True)
    part = DeepPrefix(config, latents=5, d_z=8, geometry=reader.kv_geometry)
    part.start(reader, mode="context", contexts=texts)
    first = part.head_positions
    own = torch.cat([text_keys_values(reader, t, slots=5, first=first) for t in texts], 3)
    g = reader.kv_geometry
    bias = part.project.bias.detach().view(g.layers, 2, g.heads, g.head_width)
    torch.testing.assert_close(bias * part.gain.detach()[..., None, None], own.mean(3))
    with torch.no_grad():
        made = part(torch.randn(64, 5, 8))[..., first:, :]
    assert 0.3 < (made.std((2, 4)).mean() / own.std(3).mean()) < 1.2


def test_a_prompt_for_another_place_is_refused(reader: Reader) -> None:
    prompt = reader.prompts.build(TURN, context=CONTEXT, latent="context")
    head = head_keys_values(reader, "context")
    none = torch.zeros(1, 0, reader.d_model)
    with pytest.raises(ConfigError, match="stands behind"):
        reader.score([prompt], prefixes=none, deep=head, head=head.shape[4] + 1)
