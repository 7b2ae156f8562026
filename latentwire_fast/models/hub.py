"""Saved models on the Hugging Face hub: what `Interlingua` pushes, and where it loads from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download

from latentwire_fast.errors import CheckpointError

CARD = "README.md"
LIBRARY = "latentwire-fast"
TAGS = ("prompt-compression", "soft-prompt", "latent")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CARD_TEXT = """\
---
{{ card_data }}
---
A model of LatentWire Fast: texts to payloads of a few hundred bytes, which frozen LLMs read.

    import latentwire_fast as lw
    model = lw.Interlingua.from_pretrained("OWNER/NAME")

Nothing was measured of it when it was pushed: `python -m latentwire_fast.evaluate` writes a card
with scores and sizes into a run's model folder, and it goes along when that model is pushed.
"""


class HubModel(ModelHubMixin, library_name=LIBRARY, tags=[*TAGS], model_card_template=_CARD_TEXT):
    """What a model that can be pushed has besides: `push_to_hub` is the mixin's own.

    Attributes:
        card: the model card (README.md) of the folder that it was loaded from, if there was one.
    """

    card: str | None = None

    def generate_model_card(self, *args: Any, **options: Any) -> ModelCard:
        """The card of the folder that the model was loaded from, or else one without scores."""
        if self.card is not None:
            return ModelCard(self.card, ignore_metadata_errors=True)
        return super().generate_model_card(*args, **options)

    def read_card(self, folder: Path) -> None:
        """Take over the card of a folder."""
        path = folder / CARD
        self.card = path.read_text(encoding="utf-8") if path.is_file() else None

    def write_card(self, folder: Path) -> None:
        """Write the card beside the model."""
        self.generate_model_card().save(folder / CARD)


def local_folder(source: str | Path, **options: Any) -> Path:
    """The folder of a saved model; one on the hub is downloaded, or found in the hub's cache.

    Args:
        source: a folder, or `OWNER/NAME` on the hub. What exists here is taken for a folder, and a
            `Path` always is.
        options: of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

    Raises:
        CheckpointError: neither a folder nor a model on the hub.
    """
    folder = Path(source)
    if isinstance(source, Path) or folder.exists() or not _HUB_ID.fullmatch(source):
        return folder
    try:
        return Path(snapshot_download(source, **options))
    except Exception as error:  # of HTTP, of the cache, of the id: the library has many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{source!r} is no folder here, and cannot be had from the hub ({reason[:300]}); check "
            "the path, or the id and the connection"
        ) from error
