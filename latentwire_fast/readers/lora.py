"""Low-rank updates (LoRA) of a reader, through peft: trained with a run, saved with its model.

    lora = ReaderLora.fresh(reader, LoraSettings(rank=8))    # the reader reads with it from now on
    with reader.base():                                      # and without it in here
        reader.score(prompts)
    lora.save(folder)                                        # in peft's own format

The updates are modules inside the reader's model. Its own weights stay as they are: their digest,
by which trained models know a reader, leaves the updates out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from latentwire_fast.config.schema import LoraSettings
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.files.json_files import read_json
from latentwire_fast.files.tensors import read_tensors
from latentwire_fast.readers.kv_cache import decoder_layers

NAME = "latentwire"  # of our updates among those that a model may have
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # peft's names
_PREFIX = "base_model.model."  # before each name in peft's files
_ATTENTION = ("attn", "attention")


class Adaptable(Protocol):
    """A `Reader`, as far as it matters here."""

    name: str
    source: str
    model: PreTrainedModel
    lora: ReaderLora | None

    @property
    def fingerprint(self) -> str:
        """The digest of its own weights."""
        ...


def own_names(model: nn.Module) -> dict[str, str]:
    """The names of a model's own parameters: as they are without low-rank updates, and now."""
    names = (name for name, _ in model.named_parameters())
    return {name.replace(".base_layer.", "."): name for name in names if f".{NAME}." not in name}


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A model's own parameters, by the names that they have without low-rank updates."""
    for name, now in own_names(model).items():
        yield name, model.get_parameter(now)


class ReaderLora(nn.Module):
    """The low-rank updates of one reader. Its parameters are those in the reader's model.

    Args:
        options: peft's own, as they stand in its file.
        lr_factor: on the learning rate of its parameters.

    Attributes:
        layers: the two factors of each update and its dropout, by the path of the linear layer with
            / for each dot; empty until it is attached to a reader.
        merged: whether the updates were added to the reader's weights, for good.
    """

    table_parameters: ClassVar[tuple[str, ...]] = ("layers",)  # factors, no matrices for Muon

    def __init__(self, options: dict[str, Any], *, lr_factor: float = 1.0) -> None:
        super().__init__()
        self.options = options
        self.lr_factor = lr_factor
        self.layers = nn.ModuleDict()
        self.merged = False
        self._waiting: dict[str, Tensor] = {}
        self._model: list[PreTrainedModel] = []  # a list: as an attribute it would be a submodule

    # --- making and attaching ---------------------------------------------------------------------

    @classmethod
    def fresh(cls, reader: Adaptable, settings: LoraSettings) -> ReaderLora:
        """New updates, attached to a reader: random and zero factors, so that nothing changes yet.

        Raises:
            ConfigError: the reader has no such layers, or updates already; or peft is missing.
        """
        paths = _linear_layers(reader, settings)
        options = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": reader.model.name_or_path or reader.source,
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
            "target_modules": paths,
            "fan_in_fan_out": isinstance(reader.model.get_submodule(paths[0]), Conv1D),
        }
        lora = cls(options, lr_factor=settings.lr)
        lora.attach(reader)
        return lora

    @classmethod
    def load(cls, folder: Path) -> ReaderLora:
        """The updates that `save` wrote, not attached yet.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        lora = cls(read_json(folder / SETTINGS, error=CheckpointError))
        lora._waiting = read_tensors(folder / WEIGHTS)
        return lora

    def attach(self, reader: Adaptable) -> None:
        """Have a reader read with these updates; again is no change.

        Raises:
            ConfigError: the reader has others already, or peft is missing.
        """
        if reader.lora is self:
            return
        if reader.lora is not None or any(_updates(reader.model)):
            raise ConfigError(
                f"reader {reader.name!r} has low-rank updates (LoRA) already; load it again for "
                "those of another model"
            )
        assert reader.fingerprint  # of its own weights: computed now, and kept
        _inject(reader.model, self.options, reader=reader.name)
        self._model = [reader.model]
        for path, layer in _updates(reader.model):
            parts = {"A": layer.lora_A[NAME], "B": layer.lora_B[NAME]}
            for factor, part in parts.items():
                part.float()  # as the run trains them, whatever the reader computes in
                saved = self._waiting.get(f"{_PREFIX}{path}.lora_{factor}.weight")
                if saved is not None:
                    part.load_state_dict({"weight": saved})
            dropout = layer.lora_dropout[NAME]
            self.layers[path.replace(".", "/")] = nn.ModuleDict({**parts, "dropout": dropout})
        if self._waiting:
            self.requires_grad_(False).eval()
            self._waiting = {}
        reader.lora = self

    def _apply(self, fn: Any, recurse: bool = True) -> ReaderLora:
        """Not moved with the model that holds it: it is where its reader's layers are."""
        return self

    # --- what it is -------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """How many parameters the updates have."""
        return sum(weight.numel() for weight in self.weights().values())

    def weights(self) -> dict[str, Tensor]:
        """The factors by their names in peft's files."""
        if self._waiting:
            return dict(self._waiting)
        return {
            f"{_PREFIX}{path.replace('/', '.')}.lora_{factor}.weight": parts[factor].weight.detach()
            for path, parts in cast(Any, self.layers).items()
            for factor in ("A", "B")
        }

    def save(self, folder: Path) -> list[str]:
        """Write the updates as peft does; the names of the files."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.cpu().contiguous() for name, weight in self.weights().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps({**self.options, "inference_mode": True}, indent=2, sort_keys=True)
        (folder / SETTINGS).write_text(text + "\n")
        return [WEIGHTS, SETTINGS]

    def trained_state(self) -> dict[str, Tensor]:
        """Every tensor of it by name."""
        return {name: value.detach() for name, value in self.state_dict().items()}

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named parameters that receive gradients."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    # --- off and merged ---------------------------------------------------------------------------

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the reader reads without the updates.

        Raises:
            ConfigError: they are in its weights for good.
        """
        if self.merged:
            raise ConfigError(
                "this reader's low-rank updates (LoRA) were merged into its weights; load it again "
                "without merging to read with its own"
            )
        layers = [layer for _, layer in _updates(self._model[0])]
        if any(layer.disable_adapters for layer in layers):  # within such a block
            yield
            return
        trained = [parameter.requires_grad for parameter in self.parameters()]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, is_trained in zip(self.parameters(), trained, strict=True):
                parameter.requires_grad_(is_trained)  # peft switches it with the rest

    def merge(self) -> None:
        """Add the updates to the reader's weights for good: it then is an ordinary model, as fast
        as before.

        Raises:
            ConfigError: the weights are quantised, and would be rounded again.
        """
        if self.merged:
            return
        (model,) = self._model
        if getattr(model, "is_quantized", False):
            raise ConfigError(
                "low-rank updates (LoRA) are not merged into quantised weights, which would round "
                "them; leave merge_lora out, or load the reader without load_in_4bit"
            )
        merge_updates(model)
        self.merged = True


@torch.no_grad()
def merge_updates(model: PreTrainedModel) -> None:
    """Put ordinary layers in the place of those with low-rank updates, which are added to their
    weights."""
    for path, layer in list(_updates(model)):
        layer.merge()
        model.set_submodule(path, layer.get_base_layer())
    if hasattr(model, "peft_config"):  # transformers' note that saving means saving the updates
        model._hf_peft_config_loaded = False
        del model.peft_config


def _updates(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a model that peft has put updates into, by path; none are looked for where peft
    was never asked."""
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield path, module


def _inject(model: PreTrainedModel, options: dict[str, Any], *, reader: str) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            f"reader {reader!r} has low-rank updates (LoRA), which need "
            "`pip install latentwire-fast[lora]`"
        ) from None
    known = {key: value for key, value in options.items() if key not in ("peft_type",)}
    inject_adapter_in_model(LoraConfig(**known), model, adapter_name=NAME)


def _linear_layers(reader: Adaptable, settings: LoraSettings) -> list[str]:
    """The paths of the linear layers that the settings name.

    Raises:
        ConfigError: one of the names fits no layer, or there are fewer layers.
    """
    model = reader.model
    layers = decoder_layers(model)
    if settings.layers is not None and settings.layers > len(layers):
        raise ConfigError(
            f"reader {reader.name!r}: lora.layers={settings.layers}, and it has {len(layers)}"
        )
    chosen = set(layers[: settings.layers])
    roots = {path: module for path, module in model.named_modules() if module in chosen}
    linear = [
        (f"{root}.{path}", path)
        for root, layer in roots.items()
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    found: list[str] = []
    for name in settings.projections or ("",):
        fits = [whole for whole, path in linear if _is_named(path, name)]
        if not fits:
            known = sorted({path for _, path in linear})
            raise ConfigError(
                f"reader {reader.name!r} has no linear layer {name!r} for its LoRA; there are "
                f"{', '.join(known[:20])}"
                if name
                else f"reader {reader.name!r}: which of its linear layers are the attention's is "
                f"not known; name them in lora.projections: {', '.join(known[:20])}"
            )
        found += fits
    return sorted(set(found))


def _is_named(path: str, name: str) -> bool:
    """Whether the last parts of a path are these; without a name, whether it is in an attention."""
    if name:
        return f".{path}".endswith(f".{name}")
    return any(word in part for part in path.split(".")[:-1] for word in _ATTENTION)
