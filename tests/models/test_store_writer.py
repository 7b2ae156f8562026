"""Stores of payloads: the same bytes whoever writes them, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from crashes import Disk, failing
from latentwire_fast import wire
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.errors import ConfigError, DataError, PayloadError
from latentwire_fast.files import atomic
from latentwire_fast.models.codec import LatentCodec
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.store_writer import encode_texts, write_store
from latentwire_fast.registry import BOTTLENECKS, ENCODERS
from latentwire_fast.wire.store import PayloadStore, StorePlan
from latentwire_fast.wire.store.plan import data_digest
from runs import contents

COUNT, SHARD, BATCH = 23, 5, 3


def byte_model(seed: int = 0, *, mode: str = "context") -> LatentCodec:
    """A tiny encoder of bytes with random weights, and no readers."""
    torch.manual_seed(seed)
    config = ENCODERS.config("byte", latents=4, d_z=8, width=16, layers=1, heads=2)
    bottleneck = BOTTLENECKS.config("uniform", bits=6, group_size=32)
    encoder = build_encoder(config, {})
    return LatentCodec(encoder, {}, bottleneck=bottleneck, mode=mode).eval()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> LatentCodec:
    return byte_model()


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Passages of several lengths by id."""
    return {
        f"p{i}": example.context
        for i, example in enumerate(
            e for facts in (1, 4) for e in make_examples(COUNT // 2 + 1, seed=facts, facts=facts)
        )
        if i < COUNT
    }


def plan_of(model: LatentCodec, texts: dict[str, str], **changes: object) -> StorePlan:
    plan = StorePlan(
        model=model.digest,
        data=data_digest(texts),
        passages=len(texts),
        shard_size=SHARD,
        batch_size=BATCH,
    )
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(
    model: LatentCodec, texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A store that one process wrote at once. Read only."""
    folder = tmp_path_factory.mktemp("stores") / "whole"
    assert write_store(model, folder, plan_of(model, texts), texts, progress=False) == COUNT
    return folder


# --- what is in it --------------------------------------------------------------------------------


def test_a_store_gives_back_what_the_model_sends(
    model: LatentCodec, texts: dict[str, str], whole: Path
) -> None:
    store = PayloadStore(whole)
    assert [*store] == [*texts]
    assert len(store) == COUNT
    store.check_model(model.digest)
    store.check_files()
    for identifier in ("p0", "p4", "p5", f"p{COUNT - 1}"):
        text = texts[identifier]
        payload = store[identifier]
        assert payload == model.encode_payloads([text])[0]
        assert store.text_bytes(identifier) == wire.utf8_bytes(text)
        assert store.id_of(text) == identifier
    assert dict(store.items()) == {i: store[i] for i in texts}
    assert store.messages(["p7", "p1"]) == [store["p7"], store["p1"]]
    assert "p3" in store
    assert "p99" not in store
    assert store.id_of("another text") is None


def test_texts_in_chunks_have_several_payloads(
    model: LatentCodec, texts: dict[str, str], tmp_path: Path
) -> None:
    plan = plan_of(model, texts, chunk_length=90)
    write_store(model, tmp_path / "store", plan, texts, progress=False)
    store = PayloadStore(tmp_path / "store")
    counts = {len(store[identifier]) for identifier in texts}
    assert min(counts) == 1
    assert max(counts) > 1
    for identifier in ("p0", f"p{COUNT - 1}"):
        assert [store[identifier]] == model.encode_chunks([texts[identifier]], length=90)


def test_width_and_dtype_are_the_plans(model: LatentCodec, texts: dict[str, str]) -> None:
    (half, *_) = encode_texts(model, texts, plan_of(model, texts, bits=4))
    assert model.bottleneck.read_header(half).bits == 4  # type: ignore[arg-type]
    full = encode_texts(model, texts, plan_of(model, texts))
    assert encode_texts(model, texts, plan_of(model, texts, dtype="bfloat16")) != full


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 7])
def test_several_processes_write_the_same_bytes(
    model: LatentCodec, texts: dict[str, str], whole: Path, tmp_path: Path, processes: int
) -> None:
    """Whichever of them comes last."""
    plan, folder = plan_of(model, texts), tmp_path / "store"
    for rank in reversed(range(processes)):
        write_store(model, folder, plan, texts, rank=rank, processes=processes, progress=False)
        assert (folder / "manifest.json").exists() == (rank == 0)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("nth", [1, 2, 4, 6, 7])
@pytest.mark.parametrize("step", ["write_bytes", "rename"])
def test_a_store_goes_on_where_a_full_disk_stopped_it(
    model: LatentCodec,
    texts: dict[str, str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nth: int,
    step: str,
) -> None:
    """Plan, five shards, manifest: each of the seven may fail."""
    plan, folder = plan_of(model, texts), tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "disk", Disk(failing(step, errno.ENOSPC, nth=nth)))
        with pytest.raises(OSError, match="No space"):
            write_store(model, folder, plan, texts, progress=False)
    with pytest.raises(DataError, match=r"no such file|not complete: it has \d of 5 shards"):
        PayloadStore(folder)
    missing = write_store(model, folder, plan, texts, progress=False)
    assert missing == COUNT - min(COUNT, max(0, nth - 2) * SHARD)
    assert contents(folder) == contents(whole)


def test_what_a_killed_process_left_is_removed(
    model: LatentCodec, texts: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    plan, folder = plan_of(model, texts), tmp_path / "store"
    write_store(model, folder, plan, texts, rank=0, processes=2, progress=False)
    (folder / f".{plan.name(1)}.4711.tmp").write_bytes(b"torn")
    assert write_store(model, folder, plan, texts, progress=False) == 10
    assert contents(folder) == contents(whole)
    assert write_store(model, folder, plan, texts, progress=False) == 0


@pytest.mark.filterwarnings("ignore")  # Ray warns of its own settings
def test_ray_writes_the_same_bytes(
    model: LatentCodec, texts: dict[str, str], tmp_path: Path, whole: Path
) -> None:
    """Two workers; one shard is there already. An error of a worker is the package's own."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from latentwire_fast.models.store_on_ray import write_store_on_ray

    whole_model = Interlingua(
        model.encoder, {}, bottleneck=model.bottleneck_config, attachments=(), mode="context"
    )
    saved = whole_model.save_pretrained(tmp_path / "model")
    plan, folder = plan_of(model, texts), tmp_path / "store"
    write_store(model, folder, plan, texts, rank=4, processes=5, progress=False)
    assert write_store_on_ray(saved, folder, plan, texts, workers=2, progress=False) == 20
    assert contents(folder) == contents(whole)
    long = {"p0": "word " * 5000}
    plan = plan_of(model, long)
    with pytest.raises(DataError, match="passage 'p0': the text has"):
        write_store_on_ray(saved, tmp_path / "long", plan, long, workers=1, progress=False)


# --- what is refused ------------------------------------------------------------------------------


def test_another_store_is_not_gone_on_with(
    model: LatentCodec, texts: dict[str, str], whole: Path
) -> None:
    before = contents(whole)
    other = byte_model(1)
    fewer = dict(list(texts.items())[:-1])
    for writer, given, changes, message in (
        (other, texts, {}, "holds another model's payloads; give another folder"),
        (model, fewer, {}, "holds the payloads of other data"),
        (model, texts, {"bits": 4}, "payloads made with bits=None and not 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_store(writer, whole, plan_of(writer, given, **changes), given, progress=False)
    assert contents(whole) == before


def test_a_plan_without_shards_gives_way(
    model: LatentCodec, texts: dict[str, str], tmp_path: Path
) -> None:
    """After a text that was too long, the command is given a chunk length."""
    folder = tmp_path / "store"
    long = texts | {"p0": "A word. " * 400}
    with pytest.raises(DataError, match=r"passage 'p0': .* --chunk-length"):
        write_store(model, folder, plan_of(model, long), long, progress=False)
    plan = plan_of(model, long, chunk_length=1000)
    write_store(model, folder, plan, long, progress=False)
    assert len(PayloadStore(folder)["p0"]) > 1


def test_places_and_models_that_cannot_be_are_refused(
    model: LatentCodec, texts: dict[str, str], tmp_path: Path
) -> None:
    plan = plan_of(model, texts)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file; a store is a folder"):
        write_store(model, tmp_path / "file", plan, texts, progress=False)
    with pytest.raises(ConfigError, match="holds other files and no store"):
        write_store(model, tmp_path, plan, texts, progress=False)
    pure = byte_model(mode="pure")
    with pytest.raises(ConfigError, match="was trained in 'pure' mode"):
        write_store(pure, tmp_path / "x", plan_of(pure, texts), texts, progress=False)
    with pytest.raises(ConfigError, match="no adapter for reader 'gpt'"):
        write_store(model, tmp_path / "x", plan_of(model, texts, reader="gpt"), texts)
    with pytest.raises(PayloadError, match="bits"):
        write_store(model, tmp_path / "x", plan_of(model, texts, bits=5), texts)
    with pytest.raises(ConfigError, match="batch_size=0, expected at least 1"):
        plan_of(model, texts, batch_size=0)
    assert not (tmp_path / "x").exists()


def test_damage_is_found(
    model: LatentCodec, texts: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "store")
    store = PayloadStore(folder)
    with pytest.raises(DataError, match=r"no passage 'q'; its 23 ids are such as 'p0', 'p1', 'p2'"):
        store["q"]
    with pytest.raises(PayloadError, match=r"are of the model .*; give the run that wrote"):
        store.check_model(byte_model(1).digest)
    shard = folder / store.plan.name(2)
    content = shard.read_bytes()
    shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(DataError, match=r"00002-of-00005.parquet was changed; copy the store"):
        PayloadStore(folder).check_files()
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match="is missing or cut short"):
        PayloadStore(folder)
    shard.write_bytes(b"x" * len(content))
    with pytest.raises(DataError, match="cannot be read"):
        PayloadStore(folder)["p0"]
    plan = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(plan | {"format_version": 9}))
    with pytest.raises(DataError, match="no payload store of format version 1"):
        PayloadStore(folder)
    (folder / "store.json").write_text(json.dumps(plan | {"more": 1}))
    with pytest.raises(DataError, match="is damaged"):
        PayloadStore(folder)
    with pytest.raises(DataError, match="give the folder of a payload store"):
        PayloadStore(tmp_path / "nowhere")
