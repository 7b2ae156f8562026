"""Models on the hub: pushed to and loaded from one on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, close_session, constants

from hub_server import Hub, local_hub
from latentwire_fast.errors import CheckpointError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.reader import Reader
from readers import tiny_interlingua

CARD = "---\nlibrary_name: latentwire-fast\n---\nmeasured\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine, the only one that the library knows meanwhile."""
    with local_hub() as hub:
        settings = {
            "ENDPOINT": hub.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        for name, value in settings.items():  # of HF_ENDPOINT and so on, read at import
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # its connections belong to other tests
        yield hub
        close_session()


def test_a_pushed_model_is_the_same_model(
    readers: dict[str, Reader], tmp_path: Path, hub: Hub
) -> None:
    folder, again = tmp_path / "model", tmp_path / "again"
    tiny_interlingua(readers, "context").save_pretrained(folder)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "README.md" not in files, "saving writes no card"
    (folder / "README.md").write_text(CARD)
    model = Interlingua.from_pretrained(folder)
    address = model.push_to_hub("me/model", token="hf_token_of_this_test")
    assert str(address).startswith(f"{hub.address}/me/model")
    assert hub.files["me/model"] == {**files, "README.md": CARD.encode()}
    loaded = Interlingua.from_pretrained("me/model")
    loaded.save_pretrained(again)
    assert {p.name: p.read_bytes() for p in again.iterdir()} == files
    texts = ["Nulnak is 94."]
    assert loaded.encode_payloads(texts) == model.encode_payloads(texts)
    with pytest.raises(CheckpointError, match="'me/other' is no folder here, and cannot be had"):
        Interlingua.from_pretrained("me/other")


def test_a_model_without_a_card_gets_one(
    readers: dict[str, Reader], tmp_path: Path, hub: Hub
) -> None:
    model = tiny_interlingua(readers, "context")
    model.save_pretrained(
        tmp_path / "model", push_to_hub=True, repo_id="me/bare", token="hf_token_of_this_test"
    )
    written = {p.name for p in (tmp_path / "model").iterdir()}
    assert {*hub.files["me/bare"]} == {*written, "README.md"}
    card = ModelCard(hub.files["me/bare"]["README.md"].decode())
    assert card.data.library_name == "latentwire-fast"
    assert "prompt-compression" in card.data.tags
    # Once there, it is found without a connection.
    Interlingua.from_pretrained("me/bare")
    asked = len(hub.requests)
    Interlingua.from_pretrained("me/bare", local_files_only=True)
    assert len(hub.requests) == asked


def test_what_is_no_id_is_a_folder(tmp_path: Path) -> None:
    for source in (tmp_path / "a" / "b", "runs/demo/model", "model", "../a/b"):
        with pytest.raises(CheckpointError, match=r"is .* a saved model"):
            Interlingua.from_pretrained(source)


def test_without_a_connection_it_is_one_line() -> None:
    """Tests are offline."""
    with pytest.raises(CheckpointError, match="cannot be had from the hub") as refusal:
        Interlingua.from_pretrained("owner/name")
    assert "\n" not in str(refusal.value)
