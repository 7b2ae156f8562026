"""A run on a CPU computes nothing in bf16: CPUs without bf16 instructions emulate each one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentwire_fast.config.presets import PRESETS, load_preset
from latentwire_fast.training import trainer as trainer_module
from latentwire_fast.training.trainer import Trainer
from runs import changed, tiny_config

pytestmark = pytest.mark.usefixtures("on_the_cpu")


class Dtypes(TorchDispatchMode):
    """Collects the dtypes of what operators return, in forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= {value.dtype for value in tree_leaves(result) if isinstance(value, Tensor)}
        return result


@pytest.mark.parametrize(("precision", "fast"), [("no", True), ("bf16", True), ("bf16", False)])
def test_a_run_is_in_fp32(
    llama_folder: Path,
    qwen_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    fast: bool,
) -> None:
    """The smoke preset with both optimisers. Asked for bf16, it is seen to use it, unless the CPU
    would have to emulate it."""
    monkeypatch.setattr(trainer_module, "is_fast_at_bf16", lambda device_type: fast)
    config = tiny_config(llama_folder, qwen_folder)
    config = changed(config, optim={"mixed_precision": precision})
    with Dtypes() as dtypes:
        Trainer(config, tmp_path / "run", progress=False).run()
    assert torch.float32 in dtypes.found
    assert (torch.bfloat16 in dtypes.found) == (precision == "bf16" and fast)
    assert torch.float16 not in dtypes.found


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("testbed")])
def test_the_testbed_presets_ask_for_fp32_and_one_thread(preset: str) -> None:
    config = load_preset(preset)
    assert config.optim.mixed_precision == "no"
    assert {reader.dtype for reader in config.readers.values()} == {"float32"}
    assert config.threads == 1
