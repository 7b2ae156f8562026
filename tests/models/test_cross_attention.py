"""Poolers of several layers, `cross_attention` and `layer_spans`: of all the text, nothing else."""

from __future__ import annotations

import pytest
import torch

from latentwire_fast.errors import ConfigError
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.encoders.lm import LMEncoder
from latentwire_fast.models.poolers.cross_attention import spread
from latentwire_fast.models.poolers.spans import pool_spans, span_weights
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ENCODERS, POOLERS

KINDS = ("cross_attention", "layer_spans")


def encoder_of(reader: Reader, kind: str, **options: object) -> LMEncoder:
    torch.manual_seed(1)
    pooler = POOLERS.config(kind, heads=2, **options)
    config = ENCODERS.config(
        "lm", source=reader.source, latents=3, d_z=8, pooler=pooler, frozen=True
    )
    built = build_encoder(config, {reader.name: reader}).eval()
    assert isinstance(built, LMEncoder)
    return built


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(reader: Reader, kind: str) -> None:
    encoder = encoder_of(reader, kind)
    texts = ["Nulnak lives in Paris.", "Kel is 7.", "Nulnak has a red cat and Kel a blue dog."]
    together = encoder(texts)
    alone = torch.cat([encoder([text]) for text in texts])
    assert together.shape == (3, 3, 8)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_is_trained_but_the_lm(reader: Reader, kind: str) -> None:
    encoder = encoder_of(reader, kind, states=2, layers=1).train()
    encoder(["Nulnak lives in Paris."]).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("core.")), name


def test_which_layers_are_read() -> None:
    assert spread(31, 6) == (0, 6, 12, 18, 24, 30)
    assert spread(5, 1) == (4,)
    assert spread(3, 9) == (0, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_do_not_divide_the_width_are_refused(reader: Reader, kind: str) -> None:
    pooler = POOLERS.config(kind, heads=7)
    config = ENCODERS.config("lm", source=reader.source, pooler=pooler, frozen=True)
    with pytest.raises(ConfigError, match="does not divide"):
        build_encoder(config, {reader.name: reader})


def test_spans_of_positions_in_the_middle() -> None:
    states = torch.randn(2, 7, 4)
    inside = torch.zeros(2, 7, dtype=torch.bool)
    inside[0, 2:6] = True
    inside[1, 1:2] = True
    found = span_weights(inside, 2) @ states
    wanted = torch.cat(
        [
            pool_spans(states[:1, 2:6], torch.tensor([4]), 2),
            pool_spans(states[1:, 1:2], torch.tensor([1]), 2)[:, :1].expand(-1, 2, -1),
        ]
    )
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1, 0], wanted[1, 0])
