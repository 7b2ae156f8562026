"""Guards: non-finite values (N1), frozen modules (N3), memory (O1), loss spikes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from latentwire_fast.errors import TrainingError
from latentwire_fast.files.tensors import parameter_digest
from latentwire_fast.training.accumulation import MicroLoss, is_out_of_memory, run_accumulated
from latentwire_fast.training.guards import FrozenGuard, NonFiniteGuard, SpikeGuard
from latentwire_fast.training.optimizer_state import optimizer_state

# --- N1: non-finite values ----------------------------------------------------------------------


class Run:
    """A small model with both kinds of optimiser, and one step as a trainer does it."""

    def __init__(self, run_dir: Path) -> None:
        self.net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
        matrices = [p for p in self.net.parameters() if p.dim() == 2]
        others = [p for p in self.net.parameters() if p.dim() == 1]
        self.optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=1e-3)]
        self.guard = NonFiniteGuard(run_dir / "nonfinite.json")

    def step(self, number: int, *, poison_loss: float = 0.0, poison_gradient: float = 0.0) -> None:
        loss = self.net(torch.randn(4, 16)).square().mean() + poison_loss
        loss.backward()
        gradient = self.net[2].weight.grad
        assert gradient is not None
        gradient[3, 5] += poison_gradient
        self.guard.check(
            loss,
            step=number,
            named_parameters=self.net.named_parameters(),
            example_ids=[f"example-{number}-{i}" for i in range(4)],
            losses={"answer": loss},
        )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def digests(self) -> tuple[str, str, dict]:
        tensors, state = optimizer_state(self.optimizers, self.net.named_parameters())
        return (
            parameter_digest(self.net.named_parameters()),
            parameter_digest(tensors.items()),
            state,
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["poison_loss", "poison_gradient"])
def test_nothing_non_finite_reaches_the_optimiser(tmp_path: Path, where: str, value: float) -> None:
    run = Run(tmp_path)
    for number in (1, 2):
        run.step(number)
    before = run.digests()
    assert not (tmp_path / "nonfinite.json").exists()
    with pytest.raises(TrainingError, match="step 3: loss"):
        run.step(3, **{where: value})
    assert run.digests() == before
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == 3
    assert report["example_ids"] == [f"example-3-{i}" for i in range(4)]
    assert report["losses"] == {"answer": report["loss"]}
    if where == "poison_loss":
        assert report["loss"] == repr(value)
    else:
        assert float(report["loss"]) > 0
        assert report["parameters_with_nonfinite_gradients"] == ["2.weight"]


def test_a_huge_finite_gradient_passes(tmp_path: Path) -> None:
    """Its square overflows fp32, so a guard on the 2-norm would stop the run."""
    Run(tmp_path).step(1, poison_gradient=3e38)
    assert not (tmp_path / "nonfinite.json").exists()


def test_a_full_disk_does_not_hide_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path / "missing folder")
    with pytest.raises(TrainingError, match="step 1: loss nan"):
        run.step(1, poison_loss=float("nan"))
    assert "could not write" in caplog.text


class ReadsOfValues(TorchDispatchMode):
    """Counts the reads of tensor values by the host: on a GPU each waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_one_host_synchronisation_per_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    loss = run.net(torch.randn(4, 16)).square().mean()
    loss.backward()
    named = list(run.net.named_parameters())
    with ReadsOfValues() as reads:
        run.guard.check(loss, step=1, named_parameters=named, example_ids=[])
    assert reads.count == 1


# --- O1: out of memory --------------------------------------------------------------------------

Row = tuple[Tensor, int]


def batch(count: int) -> list[Row]:
    """Rows with unequal numbers of targets: a mean of means would give another gradient."""
    return [(torch.randn(16), 1 + 3 * (i % 4)) for i in range(count)]


class Memory:
    """A loss over rows that runs out of memory above some number of rows per pass."""

    def __init__(self, *, fits: int, error: str = "CUDA out of memory", at_call: int = 1) -> None:
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
        self.fits, self.error, self.at_call = fits, error, at_call
        self.sizes: list[int] = []

    def loss(self, rows: Sequence[Row]) -> MicroLoss:
        self.sizes.append(len(rows))
        if len(rows) > self.fits and len(self.sizes) >= self.at_call:
            raise torch.OutOfMemoryError(self.error)
        outputs = self.net(torch.stack([row for row, _ in rows]))
        targets = torch.tensor([target for _, target in rows])
        total = (outputs.square().sum(1) * targets).sum()
        return MicroLoss(total, float(targets.sum()), {"half": total / 2})

    def gradient(self, rows: Sequence[Row], micro_batch: int) -> tuple[Tensor, Tensor, int]:
        result = run_accumulated(
            rows,
            loss_fn=self.loss,
            parameters=list(self.net.parameters()),
            micro_batch=micro_batch,
        )
        assert result.weight == sum(target for _, target in rows)
        torch.testing.assert_close(result.parts["half"], result.loss / 2)
        grads = [p.grad.flatten() for p in self.net.parameters() if p.grad is not None]
        return torch.cat(grads), result.loss, result.micro_batch


def test_out_of_memory_halves_the_micro_batch(caplog: pytest.LogCaptureFixture) -> None:
    rows = batch(8)
    whole, whole_loss, _ = Memory(fits=8).gradient(rows, 8)
    small = Memory(fits=4)
    halved, halved_loss, micro_batch = small.gradient(rows, 8)
    assert small.sizes == [8, 4, 4]
    assert micro_batch == 4
    assert (halved - whole).abs().max() <= 1e-6
    assert (halved_loss - whole_loss).abs() <= 1e-6
    assert "micro-batches of 4" in caplog.text


def test_a_failure_in_mid_accumulation_leaves_no_gradient_behind() -> None:
    rows = batch(24)
    whole, _, _ = Memory(fits=24).gradient(rows, 24)
    late = Memory(fits=4, at_call=3)
    gradient, _, micro_batch = late.gradient(rows, 8)
    assert late.sizes == [8, 8, 8, 4, 4, 4, 4, 4, 4]
    assert micro_batch == 4
    assert (gradient - whole).abs().max() <= 1e-6
    again, _, _ = late.gradient(rows, 4)  # and gradients of an earlier step do not add up
    assert torch.equal(again, gradient)


@pytest.mark.parametrize(("size", "micro", "fits", "calls"), [
    (7, 8, 3, [7, 3, 3, 1]),
    (5, 64, 1, [5, 2, 1, 1, 1, 1, 1]),
])  # fmt: skip
def test_odd_sizes(size: int, micro: int, fits: int, calls: list[int]) -> None:
    rows = batch(size)
    whole, _, _ = Memory(fits=size).gradient(rows, size)
    small = Memory(fits=fits)
    gradient, _, _ = small.gradient(rows, micro)
    assert small.sizes == calls
    assert (gradient - whole).abs().max() <= 1e-6


def test_a_real_allocation_failure_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.gpu
def test_a_real_gpu_out_of_memory_is_retried() -> None:
    weight = nn.Parameter(torch.ones(1, device="cuda"))
    total = torch.cuda.get_device_properties(0).total_memory
    sizes = []

    def loss(rows: Sequence[int]) -> MicroLoss:
        sizes.append(len(rows))
        block = torch.ones(len(rows), total // 12, dtype=torch.uint8, device="cuda")
        return MicroLoss((block[:, 0].float() * weight).sum(), len(rows))

    torch.use_deterministic_algorithms(False)
    result = run_accumulated(range(16), loss_fn=loss, parameters=[weight], micro_batch=16)
    assert sizes[0] == 16
    assert result.micro_batch < 16
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(1.0)


def test_one_example_that_does_not_fit_ends_the_run() -> None:
    with pytest.raises(TrainingError, match="one example per forward pass"):
        Memory(fits=0).gradient(batch(4), 8)


def test_other_errors_pass_through() -> None:
    def broken(_: Sequence[int]) -> MicroLoss:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_accumulated([1, 2], loss_fn=broken, parameters=[], micro_batch=2)


def test_a_batch_without_targets_is_an_error() -> None:
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(TrainingError, match="no target tokens"):
        run_accumulated(
            [1, 2],
            loss_fn=lambda rows: MicroLoss(weight.sum() * 0, 0),
            parameters=[weight],
            micro_batch=1,
        )


def test_the_divisor_sees_the_weight_and_backward_is_the_callers() -> None:
    """As with several processes: gradients are summed afterwards, so the global weight divides."""
    weight = nn.Parameter(torch.ones(1))
    seen = []

    def backward(loss: Tensor) -> None:
        seen.append(loss.item())
        loss.backward()

    result = run_accumulated(
        [1.0, 2.0, 3.0],
        loss_fn=lambda rows: (weight.sum() * sum(rows), len(rows)),  # type: ignore[arg-type]
        parameters=[weight],
        micro_batch=2,
        backward=backward,
        divisor=lambda local: local + 9,
    )
    assert seen == [3.0, 3.0]
    assert result.loss == 2.0
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(6 / 12)


# --- N3: frozen modules -------------------------------------------------------------------------


def frozen_pair() -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {"llama": nn.Linear(4, 4), "qwen": nn.Linear(4, 3)}
    for module in modules.values():
        module.requires_grad_(False)
    return modules


def test_untouched_readers_pass() -> None:
    modules = frozen_pair()
    guard = FrozenGuard(modules)
    adapter = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for _ in range(3):
        loss = sum(m(adapter(torch.randn(2, 4))).square().sum() for m in modules.values())
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
    guard.verify()
    assert set(guard.digests) == {"llama", "qwen"}
    assert guard.digests["llama"] == parameter_digest(modules["llama"].named_parameters())


def test_a_changed_bit_is_noticed() -> None:
    modules = frozen_pair()
    guard = FrozenGuard(modules)
    bias = modules["qwen"].get_parameter("bias")
    bias.view(torch.int32)[1] ^= 1
    with pytest.raises(TrainingError, match="frozen qwen changed"):
        guard.verify()


def test_a_gradient_is_noticed() -> None:
    modules = frozen_pair()
    guard = FrozenGuard(modules)
    modules["llama"].requires_grad_(True)
    modules["llama"](torch.ones(1, 4)).sum().backward()
    with pytest.raises(TrainingError, match="frozen llama holds gradients, the first in weight"):
        guard.verify()


def test_a_trainable_reader_is_refused() -> None:
    modules = frozen_pair()
    modules["qwen"].get_parameter("bias").requires_grad_(True)
    with pytest.raises(TrainingError, match=r"qwen is not frozen: 1 trainable .* bias"):
        FrozenGuard(modules)


# --- spikes -------------------------------------------------------------------------------------


def noisy_losses(count: int, level: float = 2.0) -> list[float]:
    return (level + 0.05 * torch.randn(count)).tolist()


def test_a_spike_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    guard = SpikeGuard()
    for step, loss in enumerate(noisy_losses(100)):
        assert not guard.watch(loss, step=step, stage="a")
    assert caplog.records == []
    assert guard.watch(6.0, step=100, stage="a")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "step 100: loss 6 is a spike" in caplog.text
    assert not guard.watch(2.0, step=101, stage="a")


def test_no_spike_during_warm_up_nor_in_a_fall() -> None:
    guard = SpikeGuard(warmup=20)
    losses = [9.0, 1.0, 9.0, *torch.linspace(8, 1, 100).tolist()]
    assert not any(guard.watch(loss, step=i, stage="a") for i, loss in enumerate(losses))


def test_a_lasting_new_level_is_accepted() -> None:
    guard = SpikeGuard()
    for step, loss in enumerate(noisy_losses(100)):
        guard.watch(loss, step=step, stage="a")
    spikes = [guard.watch(loss, step=100, stage="a") for loss in noisy_losses(60, level=5.0)]
    assert 1 <= sum(spikes) <= 15
    assert not any(spikes[-40:])


def test_a_stage_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    """Its loss is another one: that it is ten times as large says nothing."""
    guard = SpikeGuard()
    for step, loss in enumerate([*noisy_losses(50), *noisy_losses(50, level=20.0)]):
        assert not guard.watch(loss, step=step, stage="match" if step < 50 else "answer")
    assert caplog.records == []
    assert guard.watch(40.0, step=100, stage="answer")


def test_spike_state_goes_through_json() -> None:
    first = SpikeGuard()
    for step, loss in enumerate(noisy_losses(50)):
        first.watch(loss, step=step, stage="a")
    second = SpikeGuard(state=json.loads(json.dumps(first.state)))
    for step, loss in enumerate([*noisy_losses(5), 4.0, 2.0]):
        assert first.watch(loss, step=step, stage="a") == second.watch(loss, step=step, stage="a")
    assert first.state == second.state
