"""Parts from outside the package: registered, trained for two steps, saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentwire_fast import registry
from latentwire_fast.config.schema import (
    AdapterConfig,
    AttachmentConfig,
    BottleneckConfig,
    EncoderConfig,
    PoolerConfig,
    RunConfig,
    StageConfig,
)
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.models.adapters.base import Adapter
from latentwire_fast.models.attachments.base import Attachment
from latentwire_fast.models.bottlenecks.base import Bottleneck
from latentwire_fast.models.encoders.base import Encoder, Limit, rms_normalize
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.lm_text import LMFacts, LMText
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.reader import load_readers
from latentwire_fast.registry import ADAPTERS, ATTACHMENTS, BOTTLENECKS, ENCODERS, POOLERS
from latentwire_fast.training.builders import build_model
from latentwire_fast.wire import Header, pack_batch, unpack_batch
from runs import tiny_config, train

pytestmark = pytest.mark.usefixtures("on_the_cpu")


class LetterEncoder(Encoder):
    """The mean embedding of the letters at every M-th place."""

    @dataclass(frozen=True)
    class Config(EncoderConfig):
        """Nothing but the longest text."""

        most: int = 1000

        def check(self, run: RunConfig) -> None:
            if run.mode == "pure":
                raise ConfigError("letters hold no answers: use mode='context'")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.table = nn.Embedding(128, config.d_z)

    def forward(self, contexts: Sequence[str], questions: Sequence[str] | None = None) -> Tensor:
        count = self.config.latents
        rows = []
        for text in contexts:
            padded = text.ljust(count)[: self.config.most]
            ids = [torch.tensor([ord(c) % 128 for c in padded[i::count]]) for i in range(count)]
            rows.append(torch.stack([self.table(part).mean(0) for part in ids]))
        return rms_normalize(torch.stack(rows))

    @property
    def limit(self) -> Limit:
        return Limit("most", self.config.most, "letters")

    def length_of(self, text: str) -> int:
        return len(text)


class LastStates(Pooler):
    """The states of the last positions, each with a learned weight."""

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """Nothing to set."""

    def __init__(self, config: Config, lm: LMFacts) -> None:
        super().__init__(config, lm)
        self.weights = nn.Parameter(torch.ones(lm.latents, 1))

    def forward(self, text: LMText) -> Tensor:
        hidden_BTD, lengths_B = text.hidden()
        steps = torch.arange(len(self.weights), 0, -1)
        places_BM = (lengths_B[:, None] - steps).clamp(min=0)
        rows = torch.arange(len(text))[:, None]
        return hidden_BTD[rows, places_BM] * self.weights


class Halves(Bottleneck):
    """Whatever the width asked for, fp16."""

    @dataclass(frozen=True)
    class Config(BottleneckConfig):
        """Nothing to set."""

    def forward(self, latent_BMd: Tensor, bits: int) -> Tensor:
        return latent_BMd + (latent_BMd.half().float() - latent_BMd).detach()

    def pack(self, latent_BMd: Tensor, *, bits: int, fingerprint: int) -> list[bytes]:
        return pack_batch(latent_BMd, bits=16, group_size=0, fingerprint=fingerprint)

    def unpack(
        self, payloads: Sequence[bytes], *, device: torch.device
    ) -> tuple[Tensor, list[Header]]:
        return unpack_batch(payloads, device=device)


class Doubled(Adapter):
    """The latent twice, side by side."""

    @dataclass(frozen=True)
    class Config(AdapterConfig):
        """Nothing to set."""

    def __init__(self, config: Config, *, latents: int, d_z: int, d_model: int) -> None:
        super().__init__(config, latents=latents, d_z=d_z, d_model=d_model)
        self.shape = (d_model, 2 * d_z)

    def forward(self, latent_BMd: Tensor) -> Tensor:
        return torch.cat([latent_BMd, latent_BMd], -1)

    def first_projection(self) -> Tensor:
        return torch.randn(self.shape)


class OneToken(Attachment):
    """One soft token: a linear map of the mean latent."""

    @dataclass(frozen=True)
    class Config(AttachmentConfig):
        """Nothing to set."""

    gives = "prefixes"

    def __init__(self, config: AttachmentConfig, d_z: int, d_model: int) -> None:
        super().__init__(config)
        self.map = nn.Linear(d_z, d_model)

    @classmethod
    def build(
        cls, config: AttachmentConfig, card: ReaderCard, *, latents: int, d_z: int
    ) -> Attachment:
        return cls(config, d_z, card.d_model)

    @property
    def positions(self) -> int:
        return 1

    def forward(self, latent_BMd: Tensor, *, gain: float = 1.0) -> Tensor:
        return gain * self.map(latent_BMd.mean(1, keepdim=True))


PARTS = {
    "encoder": (ENCODERS, LetterEncoder),
    "pooler": (POOLERS, LastStates),
    "bottleneck": (BOTTLENECKS, Halves),
    "adapter": (ADAPTERS, Doubled),
    "attachment": (ATTACHMENTS, OneToken),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part is registered, for one test."""
    for table, part in PARTS.values():
        monkeypatch.setattr(table, "_added", {})
        table.register("mine", part)


def changes_of(kind: str) -> dict[str, Any]:
    """The change of a run's configuration that puts a part in."""
    return {
        "encoder": {"encoder": LetterEncoder.Config(latents=4, d_z=8)},
        "pooler": {"encoder": {"pooler": LastStates.Config()}},
        "bottleneck": {"bottleneck": Halves.Config()},
        "adapter": {"attachments": (ATTACHMENTS.config("soft", adapter=Doubled.Config()),)},
        "attachment": {"attachments": (OneToken.Config(),)},
    }[kind]


def run_of(kind: str, *folders: Path) -> RunConfig:
    stages = (StageConfig("answer", steps=1), StageConfig("quantized", steps=1, quantize=6))
    return tiny_config(*folders, **changes_of(kind), stages=stages)


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_from_outside_is_trained_saved_and_loaded(
    kind: str, llama_folder: Path, qwen_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    config = run_of(kind, llama_folder, qwen_folder)
    assert run_config_from_json(to_json(config)) == config
    train(config, tmp_path)
    loaded = Interlingua.from_pretrained(tmp_path / "model")
    payloads = loaded.encode_payloads(["Nulnak is already 94 years old."])
    latent = loaded.decode_payloads(payloads)
    reader_inputs = loaded.reader_inputs("llama", latent)
    assert (
        reader_inputs["prefixes"].shape[1] == loaded.positions == (1 if kind == "attachment" else 4)
    )
    table, part = PARTS[kind]
    assert any(type(module) is part for module in loaded.modules())
    monkeypatch.setattr(table, "_added", {})
    with pytest.raises(CheckpointError, match=r"no .* 'mine'; there are .*register the part"):
        Interlingua.from_pretrained(tmp_path / "model")


def test_a_part_checks_itself_against_the_run(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="letters hold no answers: use mode='context'"):
        tiny_config(llama_folder, **changes_of("encoder"), mode="pure")


def test_a_part_that_is_not_registered_says_so(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.BOTTLENECKS, "_added", {})
    config = tiny_config(llama_folder, **changes_of("bottleneck"))
    for use in (to_json, lambda run: build_model(run, load_readers(run.readers))):
        with pytest.raises(ConfigError, match="is the Config of no registered bottleneck; regist"):
            use(config)
