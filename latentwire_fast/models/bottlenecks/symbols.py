"""The base class of bottlenecks that send symbols: whole numbers, range coded (wire version 2).

Shapes: B texts, M latents, d latent width, N symbols of a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from latentwire_fast.config.schema import BottleneckConfig
from latentwire_fast.errors import PayloadError
from latentwire_fast.models.bottlenecks.alphabet import Alphabet, usage_of
from latentwire_fast.models.bottlenecks.autoregressive import AutoregressivePrior
from latentwire_fast.models.bottlenecks.base import Bottleneck
from latentwire_fast.models.bottlenecks.running_prior import RunningPrior
from latentwire_fast.models.bottlenecks.symbol_config import SymbolConfig
from latentwire_fast.wire.frame import VERSION_2, Frame, read_frame, seal_frame
from latentwire_fast.wire.frequencies import (
    fitted_frequencies,
    flat_frequencies,
    flat_rows,
    rows_of,
)
from latentwire_fast.wire.header import Header, located
from latentwire_fast.wire.payload import require_latent
from latentwire_fast.wire.range_coder import Rows, decode, encode, most_bytes
from latentwire_fast.wire.recurrent_prior import Layout

_UNORDERED_FEATURES = 8  # numbers that stand for a symbol whose values have no order


class SymbolBottleneck(Bottleneck):
    """Latents as symbols. A subclass says which (`alphabet`, `symbols`, `values`)."""

    Config: ClassVar[type[BottleneckConfig]] = SymbolConfig
    config: SymbolConfig
    version = VERSION_2
    has_soft_symbols: ClassVar[bool] = False

    def __init__(self, config: SymbolConfig, *, latents: int, d_z: int) -> None:
        super().__init__(config)
        self.latents, self.d_z = latents, d_z
        self._rows: dict[tuple[int, int], Rows] = {}
        self.frequencies_S: Tensor | None
        flat = None
        if self.has_prior:
            flat = torch.from_numpy(flat_frequencies(self.alphabet(config.bits).sizes_N))
        self.register_buffer("frequencies_S", flat)
        self.running: RunningPrior | None = None
        if config.running_prior:
            self.running = RunningPrior(self.alphabet(config.bits).sizes_N)
        self.autoregressive: AutoregressivePrior | None = None
        if config.prior == "autoregressive":
            self.autoregressive = AutoregressivePrior(self._layout())

    @classmethod
    def build(cls, config: BottleneckConfig, *, latents: int, d_z: int) -> Bottleneck:
        """A fresh one for latents `[B, M, d_z]`."""
        assert isinstance(config, SymbolConfig)
        return cls(config, latents=latents, d_z=d_z)

    # --- what a subclass defines ------------------------------------------------------------------

    def alphabet(self, bits: int) -> Alphabet:
        """The symbols at this width."""
        raise NotImplementedError

    def places(self, bits: int, latents: int) -> np.ndarray:
        """Which symbols of the alphabet a latent of so many rows has: of each row equally many, row
        by row."""
        size = len(self.alphabet(bits).sizes_N)
        return np.arange(size // self.latents * latents)

    def symbols(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """Latents as symbols `[B, N]`, whole numbers from 0."""
        raise NotImplementedError

    def values(self, symbols_BN: Tensor, bits: int, latents: int) -> Tensor:
        """The latents `[B, M, d]` fp32 that symbols stand for, each below its size.

        Raises:
            PayloadError: symbols that no latent has.
        """
        raise NotImplementedError

    def soft_symbols(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The first symbols `[B, n]` before they are rounded, with a gradient to the latents: all
        that the latents' values decide. Only where `has_soft_symbols`."""
        raise NotImplementedError

    @property
    def row_symbols(self) -> int:
        """Symbols of each row at its own width, which stand row by row before all others."""
        return len(self.places(self.config.bits, 1))

    @property
    def has_prior(self) -> bool:
        """Whether it has frequencies of its own."""
        return self.config.prior != "flat"

    def is_fitted_at(self, bits: int) -> bool:
        """Whether these frequencies are those of the symbols at this width."""
        return self.has_prior and bits == self.config.bits

    # --- the wire ---------------------------------------------------------------------------------

    def rows(self, bits: int, latents: int) -> Rows:
        """The range coder's rows for a latent of so many rows at this width."""
        key = (bits, latents)
        if key not in self._rows:
            sizes_N = self.alphabet(bits).sizes_N
            if self.is_fitted_at(bits):
                assert self.frequencies_S is not None
                rows = rows_of(self.frequencies_S.cpu().numpy(), sizes_N)
            else:
                rows = flat_rows(sizes_N)
            self._rows[key] = rows.at(self.places(bits, latents).tolist())
        return self._rows[key]

    def looks_back(self, bits: int) -> bool:
        """Whether frequencies go by the symbols before at this width."""
        return self.autoregressive is not None and bits == self.config.bits

    def _layout(self) -> Layout:
        bits, in_row = self.config.bits, self.row_symbols
        return Layout(
            rows=self.latents,
            sizes_C=tuple(self.alphabet(bits).sizes_N[self.places(bits, 1)][:in_row].tolist()),
            features=1 if self.has_soft_symbols else _UNORDERED_FEATURES,
            width=self.config.prior_width,
        )

    def _rest(self, bits: int, latents: int) -> Rows:
        """Of the symbols behind those of the rows."""
        rows = self.rows(bits, latents)
        return rows.at(range(latents * self.row_symbols, len(rows)))

    def encode(self, symbols_BN: Tensor, bits: int, latents: int) -> list[bytes]:
        """Symbols `[B, N]` as the bodies of payloads."""
        if self.looks_back(bits):
            assert self.autoregressive is not None
            return self.autoregressive.encode(symbols_BN, self._rest(bits, latents))
        rows = self.rows(bits, latents)
        return [encode(of_text, rows) for of_text in symbols_BN.cpu().tolist()]

    def decode(self, bodies: Sequence[bytes], bits: int, latents: int) -> np.ndarray:
        """The symbols `[B, N]` int64 of bodies.

        Raises:
            PayloadError: bytes that `encode` never writes.
        """
        if self.looks_back(bits):
            assert self.autoregressive is not None
            rest, known = self._rest(bits, latents), latents * self.row_symbols
            return self.autoregressive.decode(bodies, known, rest)
        return decode(bodies, self.rows(bits, latents))

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._rows.clear()  # of other frequencies

    @torch.no_grad()
    def pack(self, latent_BMd: Tensor, *, bits: int, fingerprint: int) -> list[bytes]:
        """One payload of version 2 per latent.

        Raises:
            PayloadError: no finite latents `[B, M, d_z]` of this width, or with more rows than the
                model's; a width that it does not send.
        """
        self.check_latents(latent_BMd, bits)
        latents = latent_BMd.shape[1]
        symbols_BN = self.symbols(latent_BMd.detach().float(), bits)
        return [
            seal_frame(
                Frame(
                    fingerprint=fingerprint,
                    body=body,
                    latents=None if latents == self.latents else latents,
                    bits=None if bits == self.config.bits else bits,
                )
            )
            for body in self.encode(symbols_BN, bits, latents)
        ]

    def read_header(self, payload: bytes) -> Header:
        """What a payload says of itself, and the model of it.

        Raises:
            PayloadError: bytes that are no payload of version 2, or not one of this layout.
        """
        return self._header(read_frame(payload))

    def unpack(
        self, payloads: Sequence[bytes], *, device: torch.device
    ) -> tuple[Tensor, list[Header]]:
        """Latents `[B, M, d_z]` fp32 on a device, and the headers of payloads of one layout.

        Raises:
            PayloadError: none; bytes that `pack` never writes; or two of different layouts.
        """
        if not payloads:
            raise PayloadError("no payloads to unpack; give at least one")
        bodies, headers = [], []
        for i, payload in enumerate(payloads):
            with located(f"payload {i}"):
                frame = read_frame(payload)
                header = self._header(frame)
                if len(frame.body) > most_bytes(len(self.places(header.bits, header.latents))):
                    raise PayloadError("it is longer than any payload of this model; check it")
            bodies.append(frame.body)
            headers.append(header)
            if (header.bits, header.latents) != (headers[0].bits, headers[0].latents):
                raise PayloadError(
                    f"payload {i} has (M, bits) {(header.latents, header.bits)}, payload 0 has "
                    f"{(headers[0].latents, headers[0].bits)}; unpack them one by one"
                )
        bits, latents = headers[0].bits, headers[0].latents
        symbols_BN = torch.from_numpy(self.decode(bodies, bits, latents)).to(device)
        return self.values(symbols_BN, bits, latents), headers

    def _header(self, frame: Frame) -> Header:
        latents = self.latents if frame.latents is None else frame.latents
        bits = self.config.bits if frame.bits is None else frame.bits
        self._check_layout(bits, latents)
        if frame.latents == self.latents or frame.bits == self.config.bits:
            raise PayloadError("it repeats what its model says; check what wrote it")
        return Header(
            version=VERSION_2,
            bits=bits,
            latents=latents,
            d_z=self.d_z,
            group_size=0,
            fingerprint=frame.fingerprint,
        )

    def check_latents(self, latent_BMd: Tensor, bits: int) -> None:
        """Raise unless these are finite latents `[B, M, d_z]` that can be sent at this width.

        Raises:
            PayloadError: they are not.
        """
        require_latent(latent_BMd, dims="[B, M, d_z]")
        _, latents, d_z = latent_BMd.shape
        self._check_layout(bits, latents)
        if d_z != self.d_z:
            raise PayloadError(f"the latents are {d_z} wide, this bottleneck's are {self.d_z}")

    def _check_layout(self, bits: int, latents: int) -> None:
        if bits not in self.config.rates:
            raise PayloadError(
                f"bits={bits}; this bottleneck sends {', '.join(map(str, self.config.rates))}"
            )
        if not 1 <= latents <= self.latents:
            raise PayloadError(f"M is {latents}; this model has 1 to {self.latents} latents")

    # --- what it learns ---------------------------------------------------------------------------

    @property
    def measures_rate(self) -> bool:
        """Whether it knows in training how often symbols come."""
        return self.running is not None

    def rate(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """By text, the bits of its symbols under what has come so far."""
        assert self.running is not None
        soft_Bn = self.soft_symbols(latent_BMd.float(), bits)
        return self.running.bits(soft_Bn, self.places(bits, latent_BMd.shape[1]))

    @property
    def learns(self) -> bool:
        """Whether it keeps something of each step."""
        return self.running is not None

    @torch.no_grad()
    def learn(self, latent_BMd: Tensor, bits: int) -> None:
        """Count the symbols of a step, at the width that the prior is of."""
        if self.running is not None and bits == self.config.bits:
            symbols_BN = self.symbols(latent_BMd.float(), bits)
            self.running.learn(symbols_BN, self.places(bits, latent_BMd.shape[1]))

    @property
    def fits_texts(self) -> int:
        """How many training texts `fit` wants; 0 without a prior of its own."""
        return self.config.prior_texts if self.has_prior else 0

    @property
    def prior_bits(self) -> int:
        """The width that the frequencies are learned at."""
        return self.config.bits

    @torch.no_grad()
    def fit(self, latents: Sequence[Tensor]) -> None:
        """Learn how often each symbol comes in latents `[B, M, d]` with all M rows."""
        if self.frequencies_S is None:
            return
        bits = self.prior_bits
        alphabet = self.alphabet(bits)
        symbols_RN = torch.cat([self.symbols(z_BMd.float(), bits).cpu() for z_BMd in latents])
        found = fitted_frequencies(symbols_RN.numpy(), alphabet.sizes_N, alphabet.kinds_N.tolist())
        self.frequencies_S.copy_(torch.from_numpy(found))
        self._rows.clear()
        if self.autoregressive is not None:
            self._fit_what_goes_by_the_symbols_before(latents, alphabet.sizes_N, found)

    def _fit_what_goes_by_the_symbols_before(
        self, latents: Sequence[Tensor], sizes_N: np.ndarray, frequencies_S: np.ndarray
    ) -> None:
        assert self.autoregressive is not None
        bits, known = self.config.bits, self.latents * self.row_symbols
        symbols_RN = torch.cat([self.symbols(z_BMd.float(), bits) for z_BMd in latents])
        at_known = np.zeros(len(sizes_N), bool)
        at_known[self.places(bits, self.latents)[:known]] = True
        of_known = frequencies_S[np.repeat(at_known, sizes_N)]
        steps = self.config.prior_steps
        self.autoregressive.fit(symbols_RN[:, :known], of_known, steps=steps)

    @torch.no_grad()
    def describe(self, latent_BMd: Tensor) -> dict[str, Any]:
        """Usage and perplexity of the symbols of these latents at its own width."""
        bits, alphabet = self.config.bits, self.alphabet(self.config.bits)
        if not latent_BMd.isfinite().all():
            return {}
        symbols_BN = self.symbols(latent_BMd.float(), bits).cpu()
        places = self.places(bits, latent_BMd.shape[1])
        sent = Alphabet(alphabet.sizes_N[places], alphabet.kinds_N[places])
        return usage_of(symbols_BN.numpy(), sent)

    def format_facts(self) -> list[Any]:
        """The symbols of a payload: the model's name for them, their number and sizes."""
        config = self.config
        return [config.kind, self.latents, self.d_z, config.bits, config.prior]

    def format_tensors(self) -> dict[str, Tensor]:
        """The frequencies, where it has any."""
        found = {} if self.frequencies_S is None else {"frequencies_S": self.frequencies_S}
        if self.autoregressive is not None:
            found |= {f"prior.{name}": of for name, of in self.autoregressive.named_buffers()}
        return found
