"""Payloads in batches and files, golden files, byte accounting, what pack refuses."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
from fuzz_wire import repaired
from torch import Tensor

from latentwire_fast import wire
from latentwire_fast.errors import PayloadError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def latent_BMD() -> Tensor:
    return torch.randn(5, 3, 21)


@pytest.fixture
def payloads(latent_BMD: Tensor) -> list[bytes]:
    return wire.pack_batch(latent_BMD, bits=6, group_size=16, fingerprint=3)


# --- what pack refuses ----------------------------------------------------------------------------

FINE = {"bits": 8, "group_size": 16}


@pytest.mark.parametrize(
    ("latent", "arguments", "message"),
    [
        (torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), FINE, r"latent at \[1, 1\] is nan"),
        (torch.tensor([[1.0, -torch.inf]]), FINE, r"at \[0, 1\] is -inf.*training diverged"),
        (torch.tensor([[1e300]], dtype=torch.float64), FINE, r"is 1e\+300.*range of fp32"),
        (torch.tensor([[0.0, -65520.0]]), FINE | {"bits": 16}, r"at \[0, 0, 1\] is -65520.*take 8"),
        (torch.zeros(3), FINE, r"expected a latent \[M, d_z\], got \[3\]"),
        (torch.zeros(1, 2, 3), FINE, r"got \[1, 2, 3\]; reshape it or pick from it"),
        (torch.zeros(2, 2, dtype=torch.int64), FINE, r"tensor of floats, got torch.int64"),
        (np.zeros((2, 2), np.float32), FINE, "tensor of floats, got ndarray; convert"),
        (torch.zeros(0, 4), FINE, r"M \(latents\) is 0; expected an integer from 1 to 65535"),
        (torch.zeros(65536, 1), FINE, r"M \(latents\) is 65536"),
        (torch.zeros(1, 65536), FINE, "d_z is 65536"),
        (torch.zeros(2, 2), FINE | {"bits": 7}, "bits is 7; expected an integer of"),
        (torch.zeros(2, 2), FINE | {"bits": 8.0}, "bits is 8.0; expected an integer of"),
        (torch.zeros(2, 2), FINE | {"group_size": 48}, "group size is 48; expected"),
        (torch.zeros(2, 2), FINE | {"fingerprint": 65536}, "fingerprint is 65536; expected"),
        (torch.zeros(2, 2), FINE | {"fingerprint": -1}, "fingerprint is -1; expected"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_refused(
    latent: Tensor, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(PayloadError, match=message):
        wire.pack(latent, **arguments)


def test_the_largest_values_are_packed() -> None:
    largest = 7 * 65504.0
    latent, _ = wire.unpack(wire.pack(torch.tensor([[largest, -1.0]]), bits=4, group_size=16))
    assert latent.tolist() == [[largest, 0.0]]
    latent, _ = wire.unpack(wire.pack(torch.tensor([[-65519.0]]), bits=16, group_size=16))
    assert latent.item() == -65504.0


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", wire.BITS)
def test_a_batch_is_its_payloads_one_by_one(latent_BMD: Tensor, bits: int) -> None:
    payloads = wire.pack_batch(latent_BMD, bits=bits, group_size=32, fingerprint=9)
    assert payloads == [
        wire.pack(latent, bits=bits, group_size=32, fingerprint=9) for latent in latent_BMD
    ]
    decoded, headers = wire.unpack_batch(payloads)
    singles = [wire.unpack(payload) for payload in payloads]
    assert torch.equal(decoded, torch.stack([latent for latent, _ in singles]))
    assert headers == [header for _, header in singles]


def test_an_empty_batch_packs_to_nothing_and_is_not_unpacked() -> None:
    assert wire.pack_batch(torch.zeros(0, 3, 4), bits=4, group_size=16) == []
    with pytest.raises(PayloadError, match="no payloads to unpack"):
        wire.unpack_batch([])


def test_a_batch_says_which_latent_or_payload_is_wrong(
    latent_BMD: Tensor, payloads: list[bytes]
) -> None:
    latent_BMD[4, 2, 20] = torch.nan
    with pytest.raises(PayloadError, match=r"latent at \[4, 2, 20\] is nan"):
        wire.pack_batch(latent_BMD, bits=6, group_size=16)
    with pytest.raises(PayloadError, match=r"expected a latent \[B, M, d_z\], got \[3, 21\]"):
        wire.pack_batch(latent_BMD[0], bits=6, group_size=16)
    with pytest.raises(PayloadError, match="payload 2: the CRC-32 is"):
        wire.unpack_batch([*payloads[:2], payloads[2][:-1] + b"\xff"])
    with pytest.raises(PayloadError, match="payload 3: the scale of group 3 is NaN"):
        wire.unpack_batch([*payloads[:3], repaired(payloads[3][:-1] + b"\xff"), payloads[4]])
    zeros = payloads[1][:52] + bytes(12) + payloads[1][64:]  # the codes of the last group
    with pytest.raises(PayloadError, match="payload 1: the scale of group 3 is not the one"):
        wire.unpack_batch([payloads[0], repaired(zeros)])


@pytest.mark.parametrize(
    ("shape", "bits", "group_size"),
    [((21, 3), 6, 16), ((3, 20), 6, 16), ((3, 21), 8, 16), ((3, 21), 6, 32), ((3, 21), 16, 16)],
)
def test_a_batch_of_different_layouts_is_refused(
    payloads: list[bytes], shape: tuple[int, int], bits: int, group_size: int
) -> None:
    other = wire.pack(torch.zeros(shape), bits=bits, group_size=group_size)
    with pytest.raises(PayloadError, match=r"payload 1 has .*, payload 0 has \(3, 21, 6, 16\)"):
        wire.unpack_batch([payloads[0], other])


def test_fingerprints_may_differ_in_a_batch(latent_BMD: Tensor) -> None:
    mixed = [wire.pack(latent_BMD[0], bits=4, group_size=16, fingerprint=f) for f in (1, 2)]
    assert [header.fingerprint for header in wire.unpack_batch(mixed)[1]] == [1, 2]


def test_a_header_is_read_from_the_start_of_longer_or_cut_bytes(payloads: list[bytes]) -> None:
    header = wire.unpack(payloads[0])[1]
    assert wire.read_header(b"".join(payloads)) == header
    assert wire.read_header(payloads[0][:16]) == header
    assert header.payload_bytes == len(payloads[0])


# --- files ----------------------------------------------------------------------------------------


def test_a_file_gives_its_payloads_back(tmp_path: Path, payloads: list[bytes]) -> None:
    path = tmp_path / "x.lwire"
    mixed = [*payloads, wire.pack(torch.zeros(1, 2), bits=16, group_size=16)]
    assert wire.write_payloads(path, iter(mixed)) == path.stat().st_size
    assert path.read_bytes() == b"".join(mixed)
    assert list(wire.read_payloads(path)) == mixed
    wire.write_payloads(path, payloads[:1])
    assert list(wire.read_payloads(path)) == payloads[:1]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, size: data[:-1], r"payload 4 at byte {4}: .* cut short"),
        (lambda data, size: data[: size + 7], r"payload 1 at byte {1}: 7 bytes are fewer than"),
        (lambda data, size: data + b"\n", r"payload 5 at byte {5}: 1 bytes are fewer than"),
        (lambda data, size: data[: 2 * size] + bytes(99), r"payload 2 at byte {2}: .*two bytes"),
        (
            lambda data, size: data[: 3 * size + 20] + b"\xa5" + data[3 * size + 21 :],
            r"payload 3 at byte {3}: the CRC-32",
        ),
    ],
)
def test_damage_in_a_file_is_placed(
    tmp_path: Path,
    payloads: list[bytes],
    damage: Callable[[bytes, int], bytes],
    message: str,
) -> None:
    path, size = tmp_path / "x.lwire", len(payloads[0])
    path.write_bytes(damage(b"".join(payloads), size))
    message = message.format(*(i * size for i in range(6)))
    stream, read = wire.read_payloads(path), []
    with pytest.raises(PayloadError, match=f"{path}: {message}"):
        read.extend(stream)
    # What stands before the damage is given all the same.
    assert read == payloads[: len(read)]
    assert message.startswith(f"payload {len(read)} ")


def test_files_that_hold_no_payload_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.lwire"
    with pytest.raises(PayloadError, match="No such file or directory; give the path of"):
        next(wire.read_payloads(path))
    with pytest.raises(PayloadError, match="Is a directory; give the path of"):
        next(wire.read_payloads(tmp_path))
    path.touch()
    with pytest.raises(PayloadError, match="is empty; a payload file holds at least one"):
        next(wire.read_payloads(path))


def test_pipes_are_read_to_their_end(tmp_path: Path, payloads: list[bytes]) -> None:
    """Their size is not known before. A payload comes as soon as it is there, in any pieces."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = wire.read_payloads(pipe)
    written, release = [], threading.Event()

    def write() -> None:
        with pipe.open("wb", buffering=0) as file:
            file.write(payloads[0] + payloads[1][:9])
            assert release.wait(20)
            file.write(payloads[1][9:])
            written.append(True)

    thread = threading.Thread(target=write)
    thread.start()
    assert next(reading) == payloads[0]
    assert not written
    release.set()
    assert list(reading) == payloads[1:2]
    thread.join()


def test_an_empty_or_cut_pipe_is_refused(payloads: list[bytes]) -> None:
    with pytest.raises(PayloadError, match="standard input: is empty"):
        list(wire.read_payload_stream(io.BytesIO(), name="standard input"))
    cut = wire.read_payload_stream(io.BytesIO(payloads[0] + payloads[1][:-1]), name="a pipe")
    assert next(cut) == payloads[0]
    with pytest.raises(PayloadError, match=r"a pipe: payload 1 at byte \d+: .* cut short"):
        next(cut)


def test_memory_grows_with_what_a_stream_holds_and_not_with_what_it_claims() -> None:
    asked: list[int] = []

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            asked.append(size or -1)
            return super().read(size)

    header = bytearray(wire.pack(torch.zeros(1, 1), bits=16, group_size=16)[:16])
    header[4:8] = b"\xff" * 4  # a latent [65535, 65535]: 8.6 GB
    with pytest.raises(PayloadError, match="cut short"):
        list(wire.read_payload_stream(Counting(bytes(header) + bytes(100)), name="a pipe"))
    assert max(asked) <= 1 << 20


def test_payloads_replace_no_device(tmp_path: Path, payloads: list[bytes]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="is a device or a pipe"):
        wire.write_payloads(pipe, payloads)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_failed_write_leaves_the_file_as_it_was(
    tmp_path: Path, payloads: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.lwire"
    wire.write_payloads(path, payloads[:1])

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def unchanged() -> bool:
        return list(tmp_path.iterdir()) == [path] and path.read_bytes() == payloads[0]

    with pytest.raises(PayloadError, match="no payloads to write to"):
        wire.write_payloads(path, [])
    assert unchanged()
    with pytest.raises(PayloadError, match="payload 1: 0 bytes are fewer"):
        wire.write_payloads(path, [payloads[0], b""])
    assert unchanged()
    for owner, name in ((os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(OSError, match="No space left"):
                wire.write_payloads(path, payloads)
        assert unchanged()


# --- golden files ---------------------------------------------------------------------------------


def golden_versions() -> list[int]:
    return [int(folder.name[1:]) for folder in sorted(GOLDEN.glob("v*"))]


def test_every_version_has_golden_files() -> None:
    assert golden_versions() == list(wire.VERSIONS)


@pytest.mark.parametrize("version", [wire.VERSION])  # `test_frames.py` has version 2
def test_golden_files_decode_for_ever(version: int) -> None:
    folder = GOLDEN / f"v{version}"
    expected = json.loads((folder / "expected.json").read_text())
    assert sorted(expected) == sorted(path.name for path in folder.glob("*.lwire"))
    for name, entries in expected.items():
        payloads = list(wire.read_payloads(folder / name))
        assert len(payloads) == len(entries)
        for payload, entry in zip(payloads, entries, strict=True):
            latent, header = wire.unpack(payload)
            fields = {key: getattr(header, key) for key in entry if key != "latent"}
            assert latent.tolist() == entry.pop("latent")
            assert fields == entry
            assert fields["version"] == version
            if version == wire.VERSION:
                bits, size, fingerprint = header.bits, header.group_size, header.fingerprint
                again = wire.pack(latent, bits=bits, group_size=size, fingerprint=fingerprint)
                assert again == payload


@pytest.mark.parametrize("version", [0, wire.VERSION + 1, 255])
def test_an_unknown_version_says_so(payloads: list[bytes], version: int) -> None:
    # Before anything else is read: another version may lay out its header differently.
    payload = repaired(payloads[0][:2] + bytes([version]) + bytes([99] * 40))
    with pytest.raises(
        PayloadError, match=f"format version {version} is unknown, this release rea"
    ):
        wire.unpack(payload)


# --- byte accounting ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", wire.BITS)
@pytest.mark.parametrize("shape", [(1, 1), (12, 16), (3, 21), (32, 256)])
def test_reported_bytes_are_the_bytes_of_the_file(
    tmp_path: Path, bits: int, shape: tuple[int, int]
) -> None:
    path = tmp_path / "x.lwire"
    payload = wire.pack(torch.randn(shape), bits=bits, group_size=32)
    assert wire.write_payloads(path, [payload]) == len(payload) == len(path.read_bytes())
    assert wire.read_header(payload).payload_bytes == len(payload)


@pytest.mark.parametrize("text", ["", "Answer:", "naïve café — 東京 🙂\n" * 30])
def test_text_bytes_are_the_bytes_of_the_files(tmp_path: Path, text: str) -> None:
    plain, packed = tmp_path / "x.txt", tmp_path / "x.br"
    plain.write_text(text, encoding="utf-8", newline="")
    packed.write_bytes(brotli.compress(plain.read_bytes(), quality=11))
    assert wire.utf8_bytes(text) == plain.stat().st_size
    assert wire.brotli_bytes(text) == packed.stat().st_size
    assert brotli.decompress(packed.read_bytes()).decode() == text
