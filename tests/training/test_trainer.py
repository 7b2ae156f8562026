"""The training loop: D1, N1, N3, O1, C6, several processes, and what a run folder accepts."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from torch import Tensor

from crashes import InScript
from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import ReaderConfig, RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import CheckpointError, ConfigError, DataError, TrainingError
from latentwire_fast.files.lock import RunLock
from latentwire_fast.files.tensors import parameter_digest
from latentwire_fast.models.attachments.soft import SoftPrompt
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.objective_set import Losses, ObjectiveSet
from latentwire_fast.prompts.builder import PromptBuilder
from latentwire_fast.readers.loading import load_tokenizer
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import SCHEDULES
from latentwire_fast.training.checkpoint import load_checkpoint
from latentwire_fast.training.distributed import Reducer
from latentwire_fast.training.guards import NonFiniteGuard
from latentwire_fast.training.optimizer_state import optimizer_state
from latentwire_fast.training.step import facts_at, lr_factor
from latentwire_fast.training.trainer import Trainer
from readers import tiny_model
from runs import (
    changed,
    contents,
    environment_on_the_cpu,
    model_digest,
    records,
    soft,
    store,
    stored,
    tiny_config,
    tiny_squad,
    train,
    train_on_the_cpu,
    training_state,
)

RMS = {"pre", "post", "post_p5", "post_p95"}  # of soft tokens
pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def config(llama_folder: Path, qwen_folder: Path) -> RunConfig:
    return tiny_config(llama_folder, qwen_folder)


@pytest.fixture(scope="module")
def plain(
    config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """One undisturbed run: its folder, its state at the end, its records."""
    run_dir = tmp_path_factory.mktemp("runs") / "plain"
    trainer = train_on_the_cpu(config, run_dir)
    return run_dir, training_state(trainer), records(run_dir)


# --- D1: the same bits again; what a run writes -------------------------------------------------


def test_the_same_seed_gives_the_same_bits(
    config: RunConfig, plain: tuple[Path, dict, list], tmp_path: Path
) -> None:
    run_dir, state, lines = plain
    again = train(config, tmp_path / "again")
    assert training_state(again) == state
    assert records(tmp_path / "again") == lines
    assert model_digest(tmp_path / "again") == model_digest(run_dir)


def test_another_seed_gives_other_bits(
    config: RunConfig, plain: tuple[Path, dict, list], tmp_path: Path
) -> None:
    train(changed(config, seed=1), tmp_path)
    assert records(tmp_path)[0]["loss"] != plain[2][0]["loss"]


def test_diagnostics_hold_every_stage(config: RunConfig, plain: tuple[Path, dict, list]) -> None:
    run_dir, _, lines = plain
    assert [line["step"] for line in lines] == list(range(6))
    assert [line["stage"] for line in lines] == [s.name for s in config.stages for _ in range(2)]
    names = {"llama", "qwen2"}
    pretrain, answer, quantized = lines[0], lines[2], lines[4]
    assert set(pretrain["losses"]) == {
        f"{o}/{n}" for o in ("autoencode", "continuation") for n in names
    }
    assert pretrain["accuracy"] == {}
    assert set(answer["losses"]) == {f"{o}/{n}" for o in ("answer", "kd") for n in names}
    assert set(quantized["losses"]) == {f"answer/{n}" for n in names}
    assert set(answer["accuracy"]) == names
    for line in lines:
        stage = next(s for s in config.stages if s.name == line["stage"])
        weights = {objective.kind: objective.weight for objective in stage.objectives}
        total = sum(weights[k.split("/")[0]] * v for k, v in line["losses"].items())
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert set(line["grad_norms"]) == {"encoder", *names}
        parts = math.hypot(*line["grad_norms"].values())
        assert parts <= line["grad_norm"] * (1 + 1e-5), "task tokens are the only other part"
        assert all(set(line["rms"][n]) == RMS for n in names)
        assert line["latent"]["effective_rank"] <= 3 + 1e-6, "four latents span three directions"
    full = [json.loads(line) for line in (run_dir / "diagnostics.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_second"] > 0 for line in full)
    assert [line["seconds"] for line in full] == sorted(line["seconds"] for line in full)
    assert list((run_dir / "tensorboard").iterdir())


def test_the_saved_model_is_the_trained_one(plain: tuple[Path, dict, list]) -> None:
    run_dir, state, _ = plain
    model = Interlingua.from_pretrained(run_dir / "model")
    assert parameter_digest(model.trained_state().items()) == state["model"]
    assert not (run_dir / "model.tmp").exists()
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == [
        "step-00000004",
        "step-00000006",
    ]


def test_alternate_readers_train_in_turn(config: RunConfig, tmp_path: Path) -> None:
    """One reader per step; the other's adapter rests."""
    stages = (StageConfig("answer", steps=4),)
    config = changed(config, stages=stages, optim={"readers": "alternate"}, save_every=1)
    adapters: list[dict[str, str]] = []

    def keep(trainer: Trainer) -> None:
        adapters.append(
            {
                n: parameter_digest(a.named_parameters())
                for n, a in trainer.session.model.attachments.items()
            }
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save", keep)
        train(config, tmp_path)
    assert [set(line["accuracy"]) for line in records(tmp_path)] == [{"llama"}, {"qwen2"}] * 2
    moved = [{n for n in a if a[n] != b[n]} for a, b in itertools.pairwise(adapters)]
    assert moved == [{"qwen2"}, {"llama"}, {"qwen2"}]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_readers_in_sequence_train_as_their_sum(
    config: RunConfig, tmp_path: Path, precision: str
) -> None:
    """Stages of every kind in micro-batches. AdamW alone: Muon makes more of a last digit."""
    optim = {"muon_lr": None, "mixed_precision": precision}
    config = changed(config, attachments=(soft(expansion=1),), optim=optim)
    train(config, tmp_path / "sum")
    train(changed(config, optim={"readers": "sequential"}), tmp_path / "sequential")
    found, expected = records(tmp_path / "sequential"), records(tmp_path / "sum")
    assert [line["step"] for line in found] == list(range(6))
    near = {"no": 1e-5, "bf16": 1e-2}[precision]  # in bf16 each step's rounding moves the next
    for line, other in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=near)
        assert line["losses"] == pytest.approx(other["losses"], rel=near)
        assert line["grad_norms"] == pytest.approx(other["grad_norms"], rel=10 * near)
    assert found[0]["losses"] == expected[0]["losses"]


def test_distillation_is_switched_on_in_a_file(config: RunConfig, tmp_path: Path) -> None:
    """The JSON form of a configuration with one more objective in a stage."""
    data = to_json(config)
    data["stages"][2]["objectives"].append({"kind": "kd", "weight": 0.5})
    train(run_config_from_json(data), tmp_path)
    last = records(tmp_path)[-1]
    assert set(last["losses"]) == {f"{o}/{n}" for o in ("answer", "kd") for n in config.readers}
    total = sum({"answer": 1.0, "kd": 0.5}[k.split("/")[0]] * v for k, v in last["losses"].items())
    assert last["loss"] == pytest.approx(total, rel=1e-5)


def test_gradient_checkpointing_changes_nothing(config: RunConfig, tmp_path: Path) -> None:
    config = changed(config, attachments=(soft(expansion=1),))
    train(config, tmp_path / "plain")
    saving = changed(
        config, optim={"gradient_checkpointing": True}, encoder={"gradient_checkpointing": True}
    )
    trainer = train(saving, tmp_path / "saving")
    cores = [
        trainer.session.model.encoder.core,
        *(r.backbone for r in trainer.session.readers.values()),
    ]
    assert all(isinstance(layer.forward, partial) for core in cores for layer in core.layers)
    assert records(tmp_path / "saving") == records(tmp_path / "plain")


def test_bf16_stays_close_to_fp32(config: RunConfig, tmp_path: Path) -> None:
    config = changed(config, attachments=(soft(expansion=1),), stages=config.stages[:2])
    train(config, tmp_path / "fp32")
    AcceleratorState._reset_state(reset_partial_state=True)
    train(changed(config, optim={"mixed_precision": "bf16"}), tmp_path / "bf16")
    first, same = records(tmp_path / "bf16")[0], records(tmp_path / "fp32")[0]
    assert first["loss"] == pytest.approx(same["loss"], rel=0.05)
    assert first["loss"] != same["loss"], "bf16 was not used"


def test_a_file_is_trained_on_in_epochs_with_cached_teachers(
    config: RunConfig, tmp_path: Path
) -> None:
    """From the second epoch on the teacher's states come from the disk, also in a later process."""
    data = tiny_squad(tmp_path / "data.json", passages=4)
    stages = (StageConfig("answer", steps=4, objectives=weighted(answer=1.0, kd=1.0)),)
    config = changed(config, data={"source": str(data)}, stages=stages)
    trainer = train(config, tmp_path / "run")
    items = len(trainer.session.stream.items)
    cache = trainer.session.objectives.teacher
    assert cache is not None
    asked = 4 * config.optim.batch_size * len(trainer.session.readers)
    assert cache.misses == items * len(trainer.session.readers)
    assert cache.hits == asked - cache.misses


# --- N1: non-finite values ----------------------------------------------------------------------


def poison(
    patch: pytest.MonkeyPatch, owner: type, method: str, trainer: Trainer, step: int
) -> None:
    """Puts a NaN into what `owner.method` returns during one step."""
    original = getattr(owner, method)

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        output = original(self, *args, **kwargs)
        if trainer.session.state.step != step:
            return output
        mask = torch.zeros_like(output, dtype=torch.bool)
        mask.view(-1)[-1] = True
        return output.masked_fill(mask, math.nan)

    patch.setattr(owner, method, poisoned)


@pytest.mark.parametrize(
    ("owner", "method"),
    [(Reader, "target_hidden"), (SoftPrompt, "forward")],
    ids=["reader", "adapter"],
)
def test_a_nan_stops_the_run_before_the_optimiser(
    config: RunConfig,
    plain: tuple[Path, dict, list],
    tmp_path: Path,
    owner: type,
    method: str,
) -> None:
    config = changed(config, save_every=1)
    trainer = Trainer(config, tmp_path, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, owner, method, trainer, step=3)
        with pytest.raises(TrainingError, match=r"step 3: loss nan.*the optimiser was not stepped"):
            trainer.run()
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == 3
    batch = trainer.session.stream.batch(3, config.optim.batch_size, facts=config.data.facts)
    assert report["example_ids"] == [item.id for item in batch]
    assert report["loss"] == "nan"
    assert report["parameters_with_nonfinite_gradients"]
    before = load_checkpoint(tmp_path / "checkpoints")  # saved at the end of the step before
    assert before.step == 3
    now, _ = optimizer_state(trainer.session.state.optimizers, trainer.session.state.named)
    assert parameter_digest(now.items()) == parameter_digest(before.tensors["optimizer"].items())
    assert (
        parameter_digest(trainer.session.model.trained_state().items())
        == before.state["model_digest"]
    )
    assert len(records(tmp_path)) == 3, "the poisoned step was logged"
    assert not trainer.finished
    train(config, tmp_path)  # without the poison the run goes on as if nothing had been
    assert model_digest(tmp_path) == model_digest(plain[0])


# --- N3: frozen readers -------------------------------------------------------------------------


def test_readers_are_the_same_before_and_after(config: RunConfig, tmp_path: Path) -> None:
    before = {n: Reader.from_config(n, c).weights_digest() for n, c in config.readers.items()}
    trainer = train(config, tmp_path)
    for name, reader in trainer.session.readers.items():
        assert reader.weights_digest() == before[name]
        assert all(p.grad is None and not p.requires_grad for p in reader.model.parameters())


@pytest.mark.parametrize("touch", ["weight", "gradient"])
def test_a_touched_reader_is_never_saved_with(
    config: RunConfig, tmp_path: Path, touch: str
) -> None:
    trainer = Trainer(config, tmp_path, progress=False)
    save = trainer.save

    def meddle() -> None:
        save()
        weight = trainer.session.readers["qwen2"].model.model.norm.weight
        if touch == "weight":
            weight[0] += 1e-6
        else:
            weight.grad = torch.zeros_like(weight)

    trainer.save = meddle  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="frozen qwen2"):
        trainer.run()
    assert not trainer.finished


# --- O1: out of memory --------------------------------------------------------------------------


class Memory:
    """`ObjectiveSet.compute` with room for `fits` items once it was called `free` times.

    Keeps the sizes that were tried, and the gradients that reach the optimiser.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, fits: int, free: int = 0) -> None:
        self.sizes: list[int] = []
        self.gradients: list[dict[str, Tensor]] = []
        compute = ObjectiveSet.compute

        def limited(objectives: ObjectiveSet, items: Any, *args: Any, **options: Any) -> Losses:
            self.sizes.append(len(items))
            if len(items) > fits and len(self.sizes) > free:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return compute(objectives, items, *args, **options)

        patch.setattr(ObjectiveSet, "compute", limited)
        check = NonFiniteGuard.check

        def watched(guard: NonFiniteGuard, loss: Tensor, **options: Any) -> None:
            named = options["named_parameters"]
            self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
            check(guard, loss, **options)

        patch.setattr(NonFiniteGuard, "check", watched)


@pytest.mark.parametrize(
    ("begin", "fits", "free", "first", "readers"),
    [
        (8, 4, 0, [8, 4, 4], "sum"),
        (4, 2, 1, [4, 4, 2, 2, 2, 2], "sum"),
        (4, 2, 1, [4, 4, 2, 2, 2, 2], "sequential"),
    ],
    ids=["at once", "in mid-accumulation", "readers in sequence"],
)
def test_out_of_memory_is_retried_with_the_same_gradient(
    config: RunConfig,
    tmp_path: Path,
    begin: int,
    fits: int,
    free: int,
    first: list[int],
    readers: str,
) -> None:
    optim = {"batch_size": 8, "readers": readers}
    config = changed(config, attachments=(soft(expansion=1),), optim=optim)
    memories = {}
    for micro, room in ((8, 8), (begin, fits)):
        with pytest.MonkeyPatch.context() as patch:
            memories[room] = Memory(patch, fits=room, free=free)
            now = changed(config, optim={"micro_batch": micro})
            trainer = train(now, tmp_path / str(room))
        assert trainer.session.state.micro_batch == room
    assert memories[8].sizes == [8] * 6
    assert memories[fits].sizes == first + [fits] * (5 * 8 // fits), "tried once, remembered"
    expected, found = memories[8].gradients[0], memories[fits].gradients[0]
    assert found.keys() == expected.keys()
    norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max().item() <= 1e-6 * norm, name
    whole, retried = (records(tmp_path / str(room))[0] for room in (8, fits))
    assert retried["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert retried["latent"] == pytest.approx(whole["latent"], rel=1e-4), "each item counts once"


def test_a_resumed_run_starts_with_what_fitted(config: RunConfig, tmp_path: Path) -> None:
    config = changed(config, optim={"batch_size": 8, "micro_batch": None}, save_every=1)
    with pytest.MonkeyPatch.context() as patch:
        Memory(patch, fits=4)
        patch.setattr(Trainer, "_finish", lambda self: None)
        train(config, tmp_path)
    assert load_checkpoint(tmp_path / "checkpoints").state["micro_batch"] == 4


def test_one_item_that_does_not_fit_ends_the_run(config: RunConfig, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Memory(patch, fits=0)
        with pytest.raises(TrainingError, match="out of memory with one example"):
            train(config, tmp_path)


# --- C5: a disk that refuses --------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("No space left")])
def test_a_model_that_cannot_be_saved_costs_nothing_but_the_saving(
    config: RunConfig, plain: tuple[Path, dict, list], tmp_path: Path, error: Exception
) -> None:
    def refuse(model: Interlingua, folder: Path) -> Path:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interlingua, "save_pretrained", refuse)
        with pytest.raises(CheckpointError, match=r"not save the model .*No space left.*same"):
            train(config, tmp_path)
    assert load_checkpoint(tmp_path / "checkpoints").step == 6
    (tmp_path / "model.tmp").mkdir(exist_ok=True)
    (tmp_path / "model.tmp" / "left").write_text("by a save that was cut short")
    assert train(config, tmp_path).finished
    assert not (tmp_path / "model" / "left").exists()
    assert model_digest(tmp_path) == model_digest(plain[0])


# --- C6: run folders ----------------------------------------------------------------------------


def test_the_second_writer_is_refused(config: RunConfig, tmp_path: Path) -> None:
    with (
        RunLock(tmp_path),
        pytest.raises(TrainingError, match=f"in use by process {os.getpid()}"),
    ):
        train(config, tmp_path)
    assert contents(tmp_path) == {}


def test_a_folder_of_another_configuration_is_refused(
    config: RunConfig, plain: tuple[Path, dict, list]
) -> None:
    run_dir = plain[0]
    before = contents(run_dir)
    with pytest.raises(ConfigError, match=r"another configuration \(differs in optim, seed\)"):
        train(changed(config, seed=3, optim={"clip": 2.0}), run_dir)
    assert contents(run_dir) == before


@pytest.mark.parametrize("text", ["{", "[]", '{"preset": 1', "\udcff"], ids=repr)
def test_a_folder_with_a_damaged_configuration_is_refused(
    config: RunConfig, tmp_path: Path, text: str
) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json"):
        train(config, tmp_path)
    assert contents(tmp_path) == before


def test_a_finished_run_is_left_alone(config: RunConfig, plain: tuple[Path, dict, list]) -> None:
    run_dir = plain[0]
    before = contents(run_dir)
    trainer = Trainer(config, run_dir, progress=False)
    assert trainer.finished
    trainer.run()
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"encoder": {"source": "testbed:nobody"}}, ConfigError, "no shipped reader"),
        ({"data": {"source": "nowhere.json"}}, DataError, r"nowhere\.json.*no such file"),
    ],
    ids=["encoder", "data"],
)
def test_what_cannot_start_leaves_no_configuration_behind(
    config: RunConfig, tmp_path: Path, change: dict, error: type, message: str
) -> None:
    """Otherwise the corrected command would be refused as another configuration."""
    with pytest.raises(error, match=message):
        train(changed(config, **change), tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.fixture
def merging(config: RunConfig, llama_folder: Path, tmp_path: Path) -> RunConfig:
    """A run whose first reader has a token that ends behind the anchor, inside the answer."""
    tokenizer = load_tokenizer(llama_folder)
    tokenizer.add_tokens(["Answer: "])
    folder = tmp_path / "merging"
    tiny_model("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return changed(config, readers={**config.readers, "llama": ReaderConfig(str(folder))})


@pytest.mark.parametrize("source", ["testbed", "file"])
def test_answers_that_tokenise_differently_are_refused(
    merging: RunConfig, tmp_path: Path, source: str
) -> None:
    if source == "file":
        source = str(tiny_squad(tmp_path / "data.json"))
    message = rf"(\d+) of \1 answers of {source}, .* after 'Answer:' for reader 'llama'; leave"
    with pytest.raises(ConfigError, match=message):
        train(changed(merging, data={"source": source}), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_held_out_answers_are_checked_before_the_training(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        PromptBuilder, "check_alignment", lambda self, answers: [a for a in answers if a == "odd"]
    )
    heldout = [Example("id", "The lamp is odd.", "How is the lamp?", ("odd", "strange"))]
    trainer = Trainer(config, tmp_path, heldout=heldout, progress=False)
    with pytest.raises(ConfigError, match=r"1 of 1 answers of testbed \(held out\), such as 'odd'"):
        trainer.run()
    assert not (tmp_path / "config.json").exists()


def test_more_processes_than_examples_are_refused(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, optim={"batch_size": 1, "micro_batch": None})
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    message = "batch_size=1 leaves some of 2 processes without an example; set --batch-size to 2"
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_stage_has_its_share_of_the_learning_rate(config: RunConfig) -> None:
    schedule = SCHEDULES.config("warmup_cosine", warmup_steps=10, decay_from=0.3)
    stages = (StageConfig("a", steps=50), StageConfig("b", steps=50, lr=0.5))
    config = changed(config, stages=stages, optim={"lr_schedule": schedule})
    factors = [lr_factor(config, step) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:31] == [1.0] * 21
    assert factors[65] == pytest.approx(0.25), "half way down the cosine, in the stage of half rate"
    assert factors[99] == pytest.approx(0.0, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(factors[30:]))


def test_a_curriculum_counts_the_steps_of_its_stage(config: RunConfig) -> None:
    levels = SCHEDULES.config("steps", levels=((0.5, 1), (1.0, 4)))
    stages = (StageConfig("a", steps=3), StageConfig("b", steps=4, facts=levels))
    config = changed(config, stages=stages, data={"facts": 2})
    assert [facts_at(config, step) for step in range(7)] == [2, 2, 2, 1, 1, 4, 4]


# --- several processes (C3) ---------------------------------------------------------------------


def in_two_processes(config: Path, run_dir: Path) -> subprocess.Popen[str]:
    """The training command under torch's launcher, on the CPU with gloo."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            # behind `--`: the launcher would take --run for the start of its own --run-path
            *("--nproc-per-node", "2", "-m", "--", "latentwire_fast.train"),
            *(str(config), "--run", str(run_dir), "--no-eval"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment_on_the_cpu(),
    )


def assert_same_losses(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5, rel=1e-5)
        assert line["losses"] == pytest.approx(other["losses"], abs=1e-5, rel=1e-5)
        assert line["accuracy"] == pytest.approx(other["accuracy"], abs=1e-6)


def case_two_processes(root: Path) -> list[int]:
    """Train `config.json` in two processes, as the launcher does, but by forks of one that has
    imported everything; their exit statuses. They meet at a port that was free a moment ago."""
    config = stored(root / "config.json")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in common.items()}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            try:
                Trainer(config, root / "two", progress=False).run()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.slow
@pytest.mark.parametrize("turns", ["sum", "alternate"])
def test_two_processes_give_the_losses_of_one(
    config: RunConfig, tmp_path: Path, in_script: InScript, turns: str
) -> None:
    """The same global batch cut in two, with both optimisers."""
    assert config.optim.muon_lr is not None
    config = changed(config, attachments=(soft(expansion=1),), optim={"readers": turns})
    train(config, tmp_path / "one")
    store(config, tmp_path / "config.json")
    assert in_script(case_two_processes, tmp_path) == [0, 0]
    assert_same_losses(records(tmp_path / "two"), records(tmp_path / "one"))


@pytest.mark.slow
def test_two_processes_with_dropout_go_on_bit_exactly_from_a_signal_to_one(
    config: RunConfig, tmp_path: Path, in_script: InScript
) -> None:
    """Each has its own random state, which the checkpoint holds: both draw on every step, and not
    as many numbers (a batch of three is cut into two and one)."""
    assert config.attachments[0].adapter.dropout > 0  # type: ignore[attr-defined]
    stages = (StageConfig("answer", steps=40),)
    config = changed(config, optim={"batch_size": 3}, stages=stages, save_every=1000)
    path, run_dir = store(config, tmp_path / "config.json"), tmp_path / "two"
    process = in_two_processes(path, run_dir)
    diagnostics = run_dir / "diagnostics.jsonl"
    while not (diagnostics.exists() and diagnostics.stat().st_size):
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "stopped by a signal after step" in output, output[-4000:]
    stopped = load_checkpoint(run_dir / "checkpoints").step
    assert 0 < stopped < 40
    assert len(records(run_dir)) == stopped
    assert in_script(case_two_processes, tmp_path) == [0, 0]
    plain = tmp_path / "undisturbed"
    plain.mkdir()
    store(config, plain / "config.json")
    assert in_script(case_two_processes, plain) == [0, 0]
    assert records(run_dir) == records(plain / "two")
    assert model_digest(run_dir) == model_digest(plain / "two")


def test_another_number_of_processes_is_a_warning(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_finish", lambda self: None)
        patch.setattr(Reducer, "each", lambda self, value: [value, value])
        train(config, tmp_path)
    assert len(load_checkpoint(tmp_path / "checkpoints").state["rng"]) == 2
    train(config, tmp_path)
    assert "saved by 2 processes, resumed by 1" in caplog.text
