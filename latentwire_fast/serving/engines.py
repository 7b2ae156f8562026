"""Which engine reads a prompt: found out before the first one comes.

A graph and a compiled backbone put plain causal attention in the place of the reader's own, and a
graph keeps its past in a `StaticCache`. Whether a reader stays the same with these is tried on a
few tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import StaticCache

from latentwire_fast.errors import ConfigError
from latentwire_fast.readers.attention import causal_mask, mask_free
from latentwire_fast.readers.decoding_cache import has_window
from latentwire_fast.readers.kv_cache import layer_devices
from latentwire_fast.readers.kv_placement import plan
from latentwire_fast.readers.probe import LENGTHS, tolerance
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.weights import is_offloaded
from latentwire_fast.serving.decode_step import DecodeStep
from latentwire_fast.serving.options import Engine
from latentwire_fast.serving.static_cache import set_length, write_through

_USES = {"graph": "run as a CUDA graph", "compile": "be compiled"}
# Why nothing is captured or compiled where there is cross-attention.
HOOKS = (
    "hidden states between its layers attend to the latents through hooks that are there for one "
    "pass alone"
)


def choose_engine(engine: Engine, reader: Reader) -> tuple[Engine, str]:
    """The engine that a receiver of this reader gets when it asks for `engine`, and why.

    Raises:
        ConfigError: the engine that was asked for cannot read with this reader.
    """
    plan(layer_devices(reader.model))  # raises where nothing can be placed
    assert reader.abilities  # and for a reader that no engine can decode with
    if engine == "eager":
        return engine, "asked for"
    fault = why_no_graph(reader) if engine != "compile" else why_not_mask_free(reader)
    if fault is None:
        return ("graph" if engine == "auto" else engine), "the reader can be captured"
    if engine == "auto":
        return "eager", fault
    raise refusal(reader, _USES[engine], fault)


def choose_with_hooks(engine: Engine, reader: Reader) -> tuple[Engine, str]:
    """`choose_engine` where hidden states between the reader's layers attend to a latent.

    Raises:
        ConfigError: as `choose_engine`; a graph or compiled code was asked for.
    """
    if engine in _USES:
        raise refusal(reader, _USES[engine], HOOKS)
    _, reason = choose_engine("eager", reader)
    return "eager", reason if engine == "eager" else HOOKS


def refusal(reader: Reader, what: str, fault: str) -> ConfigError:
    """The error for an engine that was asked for."""
    return ConfigError(
        f"reader {reader.name!r} cannot {what}: {fault}; the engine 'auto' reads with it op by op"
    )


def why_no_graph(reader: Reader) -> str | None:
    """The reason why a reader cannot be captured as a CUDA graph; None where it can."""
    devices = _devices(reader)
    if len(devices) > 1 or reader.device.type != "cuda":
        return f"a graph needs all of it on one CUDA device, and it is on {devices}"
    if is_offloaded(reader.model):
        return "some of its weights are offloaded, and a graph would not bring them back"
    return why_not_mask_free(reader)


def _devices(reader: Reader) -> list[str]:
    """Where its embeddings and its layers are."""
    layers = {group.device for group in plan(layer_devices(reader.model))}
    return sorted({*layers, str(reader.device)})


def why_not_mask_free(reader: Reader) -> str | None:
    """What keeps a reader from giving the same with attention that is not its own; None where
    nothing does."""
    model = reader.model
    if reader.lora is not None and not reader.lora.merged:
        return (
            "its low-rank updates (LoRA) can be switched off between two prompts; merge them "
            "(merge_lora) to read with them always"
        )
    if has_window(model):
        return "a layer attends to a sliding window, which needs a mask"
    if not getattr(model, "_supports_attention_backend", False):
        return f"a {type(model).__name__} has attention of its own that cannot be replaced"
    if reader.abilities.deep:
        return f"a static cache does not hold its past: {reader.abilities.deep}"
    if len(_devices(reader)) > 1:
        return None  # no graph, and a compiled backbone keeps its past elsewhere than the trial
    return _fault_of_trial(reader, as_step=False)


def why_no_step(reader: Reader) -> str | None:
    """What keeps a reader that can be captured from decoding in a graph; None where nothing does.
    Then it decodes op by op behind its graphs."""
    return _fault_of_trial(reader, as_step=True)


def _fault_of_trial(reader: Reader, *, as_step: bool) -> str | None:
    try:
        difference = _trial(reader, as_step=as_step)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models raise of all kinds on a cache or a mask they do not know
        return f"a trial failed: {type(error).__name__}: {error}"
    if not difference <= tolerance(reader.model.dtype):  # NaN is not either
        return (
            f"in a trial its hidden states were {difference:.2g} (relative to their size) from "
            "those of the model's own attention"
        )
    return None


@torch.no_grad()
def _trial(reader: Reader, *, as_step: bool) -> float:
    """The largest relative difference of last hidden states between two padded rows in a static
    cache without a mask, one decoded token included, and each row read alone.

    Args:
        as_step: whether the token is decoded as a graph would.
    """
    lengths, width = LENGTHS, max(LENGTHS)
    model, device = reader.model, reader.device
    ids_BT = torch.arange(len(lengths) * (width + 1), device=device).view(len(lengths), -1)
    ids_BT = (ids_BT * 7 + 3) % reader.vocabulary
    last_B = torch.tensor(lengths, device=device) - 1
    rows = torch.arange(len(lengths), device=device)
    static = StaticCache(config=model.config, max_cache_len=width + 4)
    geometry = reader.kv_geometry
    static.early_initialization(
        len(lengths), geometry.heads, geometry.head_width, model.dtype, device
    )
    with mask_free(model) as needs_no_mask:
        mask = causal_mask(width, width, dtype=reader.embedding.weight.dtype, device=device)
        prefilled_BTD = reader.backbone(
            inputs_embeds=reader.embedding(ids_BT[:, :width]),
            attention_mask=None if needs_no_mask else mask,
            position_ids=torch.arange(width, device=device)[None],
            past_key_values=write_through(static, length=0),
            use_cache=True,
        ).last_hidden_state
    next_B = ids_BT[rows, last_B + 1]
    if as_step:
        step = DecodeStep(reader, static)
        step.start(np.array(lengths), columns=width)
        step.token_B.copy_(next_B)
        decoded_BD = step.hidden()
    else:
        set_length(static, width)
        columns = torch.arange(width + 4, device=device)
        decoded_BD = reader.backbone(
            input_ids=next_B[:, None],
            attention_mask=((columns <= last_B[:, None]) | (columns == width)).long(),
            position_ids=(last_B + 1)[:, None],
            past_key_values=static,
            use_cache=True,
        ).last_hidden_state[:, -1]
    found = [prefilled_BTD[rows, last_B], decoded_BD]
    differences = []
    for row, length in enumerate(lengths):
        alone_TD = reader.backbone(
            input_ids=ids_BT[row : row + 1, : length + 1], use_cache=False
        ).last_hidden_state[0]
        for place, hidden_BD in zip((length - 1, length), found, strict=True):
            differences.append(_relative(hidden_BD[row], alone_TD[place]))
    return max(differences)


def _relative(found_D: Tensor, expected_D: Tensor) -> float:
    expected_D = expected_D.float()
    return float((found_D.float() - expected_D).norm() / expected_D.norm())
