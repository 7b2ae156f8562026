"""Which ops each preset calls: in every stage of its training, in its evaluation, when a text is
encoded and when a payload is answered.

Every op on the reader's device runs its Triton kernel here, so the lists say which kernels are on
the product's main path. They are held: a change that takes an op off the path, or puts one on it,
has to change this file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_device import KERNELS, needs_kernels
from latentwire_fast import encode, generate, ops
from latentwire_fast.config.presets import load_preset
from latentwire_fast.config.schema import OptimConfig, ReaderConfig, RunConfig
from latentwire_fast.evaluation.pipeline import evaluate_run
from latentwire_fast.training import trainer as trainer_module
from latentwire_fast.training.step import train_step
from runs import changed, train

pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

# Forward and backward of the projection to embeddings, or to keys and values.
PROJECTION = {"project_calibrate", "project_calibrate_backward"}
QUANTISED = {"fake_quantize"}
# Cross-entropy, distillation or both; the likelihoods of an evaluation, too.
LOSSES = {"linear_losses"}
ON_THE_WIRE = {"quantize_pack", "unpack_dequantize"}

TESTBED = {
    "align": PROJECTION,
    "answer": PROJECTION | LOSSES,
    "quantized": PROJECTION | QUANTISED | LOSSES,
    "evaluate": ON_THE_WIRE | LOSSES | {"project_calibrate"},
    "encode": ON_THE_WIRE,
    "generate": ON_THE_WIRE | {"project_calibrate"},
}
EXPECTED = {
    "testbed": TESTBED,
    "testbed_byte": TESTBED,
    # Its adapter is linear: a receiver projects the codes themselves.
    "testbed_smoke": {
        "pretrain": PROJECTION | LOSSES,
        "answer": PROJECTION | LOSSES,
        "quantized": PROJECTION | QUANTISED | LOSSES,
        # The page "Is it collapsing?" looks at the soft tokens of latents as they are.
        "evaluate": ON_THE_WIRE | LOSSES | {"dequantize_project_calibrate", "project_calibrate"},
        "encode": ON_THE_WIRE,
        "generate": ON_THE_WIRE | {"dequantize_project_calibrate"},
    },
    "testbed_context": {
        "select": PROJECTION,
        "sharpen": PROJECTION,
        "match": PROJECTION,
        "settle": PROJECTION,
        "quantized": PROJECTION | QUANTISED | LOSSES,
        "evaluate": ON_THE_WIRE | LOSSES | {"project_calibrate"},
        "encode": ON_THE_WIRE,
        "generate": ON_THE_WIRE | {"project_calibrate"},
    },
    "squad_llama_qwen": {
        "held": PROJECTION,
        "match": PROJECTION,
        "answer": PROJECTION | LOSSES,
        "quantized": PROJECTION | QUANTISED | LOSSES,
        "evaluate": ON_THE_WIRE | LOSSES | {"project_calibrate"},
        "encode": ON_THE_WIRE,
        "generate": ON_THE_WIRE | {"project_calibrate"},
    },
}


@dataclass
class Trace(TorchDispatchMode):
    """Names of the project's ops that run while it is entered, by the phase they run in."""

    phase: str = ""
    calls: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "latentwire_fast":
            self.calls.setdefault(self.phase, set()).add(name)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Record what runs in the block as this phase."""
        self.phase = phase
        self.calls.setdefault(phase, set())
        with self, ops.backend(KERNELS):
            yield


@pytest.fixture(autouse=True)
def _accelerate_starts_anew() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def small(preset: str, reader: Path, tmp_path: Path) -> RunConfig:
    """A preset with its stages, objectives and kinds of parts, at sizes for the interpreter."""
    config = load_preset(preset)
    attachments = tuple(
        replace(part, width=16, heads=2, layers=1, expansion=1) if part.kind == "deep" else part
        for part in config.attachments
    )
    source = {} if config.encoder.source is None else {"source": str(reader)}
    return changed(
        config,
        readers={"llama": ReaderConfig(str(reader))},
        encoder={**source, "latents": 4, "d_z": 16},
        attachments=attachments,
        stages=tuple(replace(stage, steps=1) for stage in config.stages),
        optim=OptimConfig(batch_size=2),
        data={"source": "testbed", "eval_examples": 2},
        evaluation={"batch_size": 2, "timing_examples": 1, "resamples": 10, "bits": (6,)},
    )


def run_main(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    module.main()


@pytest.mark.slow
@pytest.mark.parametrize("preset", EXPECTED)
def test_ops_of_every_entry_point(
    preset: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, trace, run = small(preset, llama_folder, tmp_path), Trace(), tmp_path / "run"

    def traced_step(session: Any, *rest: Any) -> Any:
        stage, _ = session.config.stage_at(session.state.step)
        with trace.of(stage.name):
            return train_step(session, *rest)

    monkeypatch.setattr(trainer_module, "train_step", traced_step)
    train(config, run)
    with trace.of("evaluate"):
        evaluate_run(run, progress=False)
    text, payload = tmp_path / "text.txt", tmp_path / "text.lwire"
    text.write_text("Nulnak lives in Bakrim. She is 94 years old.\n")
    question = ["--question", "Where does Nulnak live?"]
    with trace.of("encode"):
        asked = question if config.mode == "pure" else []
        run_main(encode, monkeypatch, *("--run", run, "--context", text, "--out", payload), *asked)
    with trace.of("generate"):
        asked = question if config.mode == "context" else []
        reader = ["--reader", "llama", "--payload", payload]
        run_main(generate, monkeypatch, "--run", run, *reader, *asked)
    assert trace.calls == EXPECTED[preset]
