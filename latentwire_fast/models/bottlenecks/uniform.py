"""Uniform steps per group of values: fp16 at 16 bits, else codes with one fp16 scale per group.

Shapes: B texts, M latents, d latent width, n = M * d values, G groups of g, N symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from latentwire_fast import ops, reference, wire
from latentwire_fast.config.base import require
from latentwire_fast.config.schema import BITS
from latentwire_fast.errors import PayloadError
from latentwire_fast.models.bottlenecks.alphabet import Alphabet
from latentwire_fast.models.bottlenecks.symbol_config import Prior, SymbolConfig
from latentwire_fast.models.bottlenecks.symbols import SymbolBottleneck
from latentwire_fast.wire.frame import is_frame
from latentwire_fast.wire.header import Header, check_frame
from latentwire_fast.wire.payload import require_range

# A scale's sign is never set and its exponent never 31, so it is below 0x7c00: 496 values of its
# exponent and upper digits, which a prior can learn, and 64 of its lower digits, which are noise.
_LOW_DIGITS = 6
_SCALE_SIZES = (0x7C00 >> _LOW_DIGITS, 1 << _LOW_DIGITS)
_KINDS = {"code": 0, "scale": 1, "digits": 2}


class UniformQuantizer(SymbolBottleneck):
    """Groups of consecutive values that share a scale (`docs/wire_format.md`). Nothing is learned
    but, in version 2, how often each code comes."""

    @dataclass(frozen=True)
    class Config(SymbolConfig):
        """Uniform steps per group of values.

        Attributes:
            group_size: values that share a scale.
            version: of the wire format. 2 has shorter payloads, also of 3 and 2 bits, which the
                receiver's host decodes.
            prior: in version 2 only; see `SymbolConfig`.
        """

        group_size: int = 32
        version: Literal[1, 2] = 1
        prior: Prior = "flat"

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                not self.running_prior or self.bits < 16,
                "running_prior=True needs codes: bits=16 sends the values themselves",
            )
            require(
                self.group_size in ops.GROUP_SIZES, f"group_size={self.group_size}: 16, 32 or 64"
            )
            require(
                self.version == 2 or self.prior == "flat",
                f"prior={self.prior!r} needs version=2: version 1 is not entropy coded",
            )
            require(
                self.prior != "autoregressive" or self.bits < 16,
                "prior='autoregressive' needs codes: bits=16 sends the values themselves; take "
                "prior='static', or fewer bits",
            )

        @property
        def rates(self) -> tuple[int, ...]:
            """The widths that can be sent, the largest first."""
            return BITS if self.version == 1 else (*BITS, 3, 2)

    config: Config
    sends_codes = True
    has_soft_symbols = True

    def __init__(self, config: Config, *, latents: int, d_z: int) -> None:
        super().__init__(config, latents=latents, d_z=d_z)
        self.version = config.version

    def forward(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The latent as the receiver gets it at this width; gradients pass straight through."""
        if bits == 16:
            return latent_BMd + (latent_BMd.half().float() - latent_BMd).detach()
        return ops.fake_quantize(latent_BMd, bits=bits, group_size=self.config.group_size)

    def pack(self, latent_BMd: Tensor, *, bits: int, fingerprint: int) -> list[bytes]:
        """One payload per latent, made on the latents' device.

        Raises:
            PayloadError: as `wire.pack`, or in version 2 as `SymbolBottleneck.pack`.
        """
        if self.version == 2:
            return super().pack(latent_BMd, bits=bits, fingerprint=fingerprint)
        return wire.pack_batch(
            latent_BMd, bits=bits, group_size=self.config.group_size, fingerprint=fingerprint
        )

    def read_header(self, payload: bytes) -> Header:
        """What a payload of either version says of itself.

        Raises:
            PayloadError: bytes that are no payload that it reads.
        """
        is_first = self.version == 1 or not is_frame(payload)
        return check_frame(payload) if is_first else super().read_header(payload)

    def unpack(
        self, payloads: Sequence[bytes], *, device: torch.device
    ) -> tuple[Tensor, list[Header]]:
        """Latents `[B, M, d_z]` fp32 on a device, and the headers of payloads of one layout. Those
        of version 1 are read also where version 2 is written.

        Raises:
            PayloadError: as `wire.unpack_batch`, or in version 2 as `SymbolBottleneck.unpack`; or
                some are of version 1 and some of version 2.
        """
        if self.version == 2:
            for i, payload in enumerate(payloads):
                if is_frame(payload) != is_frame(payloads[0]):
                    raise PayloadError(
                        f"payload {i} is of another version of the wire format than payload 0; "
                        "unpack them in two batches"
                    )
        if self.version == 1 or (payloads and not is_frame(payloads[0])):
            return wire.unpack_batch(payloads, device=device)
        return super().unpack(payloads, device=device)

    # --- symbols of version 2: the codes, then an upper and a lower part of each scale ------------

    def alphabet(self, bits: int) -> Alphabet:
        """Codes from -qmax to qmax and two symbols a scale; at 16 bits two bytes a value."""
        values = self.latents * self.d_z
        if bits == 16:
            return Alphabet(np.full(2 * values, 256), np.tile([0, 1], values))
        groups, codes = self._groups(values), np.full(values, 2 * reference.largest_code(bits) + 1)
        kinds = np.concatenate(
            [np.full(values, _KINDS["code"]), np.tile([_KINDS["scale"], _KINDS["digits"]], groups)]
        )
        return Alphabet(np.concatenate([codes, np.tile(_SCALE_SIZES, groups)]), kinds)

    @property
    def row_symbols(self) -> int:
        """The codes of a row; the scales stand behind all rows."""
        return self.d_z

    def _groups(self, values: int) -> int:
        return -(-values // self.config.group_size)

    def places(self, bits: int, latents: int) -> np.ndarray:
        """The codes of the first rows, and the scales of their groups."""
        values = latents * self.d_z
        if bits == 16:
            return np.arange(2 * values)
        scales = self.latents * self.d_z + np.arange(2 * self._groups(values))
        return np.concatenate([np.arange(values), scales])

    def symbols(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """Latents as symbols `[B, N]`.

        Raises:
            PayloadError: a value beyond what the bits can carry.
        """
        latent_Bn = latent_BMd.flatten(1)
        if bits == 16:
            half_Bn = latent_Bn.half() + 0.0  # one byte string per value: -0.0 becomes 0.0
            require_range(half_Bn.isfinite(), latent_Bn, bits)
            words_Bn = half_Bn.view(torch.int16).int() & 0xFFFF
            return torch.stack([words_Bn >> 8, words_Bn & 0xFF], -1).flatten(1)
        require_range(latent_Bn.abs() <= reference.largest_value(bits), latent_Bn, bits)
        codes, scales = self._quantize(latent_Bn, bits)
        # Twice, as version 1 does: what the result stands for then has these symbols again.
        return self._symbols_of(*self._quantize(self._dequantize(codes, scales), bits), bits)

    def soft_symbols(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The codes before they are rounded; scales count as constants, and are left out."""
        latent_Bn, qmax = latent_BMd.flatten(1), reference.largest_code(bits)
        size = self.config.group_size
        _, scales_BG = self._quantize(latent_Bn.detach(), bits)
        steps_Bn = scales_BG.float().repeat_interleave(size, -1)[:, : latent_Bn.shape[1]]
        return (latent_Bn / steps_Bn.clamp(min=1e-30)).clamp(-qmax, qmax) + qmax

    def _quantize(self, latent_Bn: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Codes `[B, n]` and scales `[B, G]`."""
        size = self.config.group_size
        codes_BGg, scales_BG = reference.quantize(latent_Bn, bits=bits, group_size=size)
        return codes_BGg.flatten(1)[:, : latent_Bn.shape[1]], scales_BG

    def _dequantize(self, codes_Bn: Tensor, scales_BG: Tensor) -> Tensor:
        size, values = self.config.group_size, codes_Bn.shape[1]
        return codes_Bn.float() * scales_BG.float().repeat_interleave(size, -1)[:, :values]

    def _symbols_of(self, codes_Bn: Tensor, scales_BG: Tensor, bits: int) -> Tensor:
        words_BG = scales_BG.view(torch.int16).int()
        low_BG = words_BG & ((1 << _LOW_DIGITS) - 1)
        scales_BN = torch.stack([words_BG >> _LOW_DIGITS, low_BG], -1).flatten(1)
        return torch.cat([codes_Bn.int() + reference.largest_code(bits), scales_BN], 1)

    def values(self, symbols_BN: Tensor, bits: int, latents: int) -> Tensor:
        """The latents `[B, M, d]` that symbols stand for.

        Raises:
            PayloadError: symbols that `symbols` gives of no latent.
        """
        values, shape = latents * self.d_z, (len(symbols_BN), latents, self.d_z)
        if bits == 16:
            words_BN = symbols_BN.int()
            words_Bn = words_BN[:, ::2] << 8 | words_BN[:, 1::2]
            latent_Bn = words_Bn.to(torch.int16).view(torch.float16).float()
        else:
            codes_Bn = (symbols_BN[:, :values] - reference.largest_code(bits)).to(torch.int8)
            scales_BN = symbols_BN[:, values:].int()
            words_BG = scales_BN[:, ::2] << _LOW_DIGITS | scales_BN[:, 1::2]
            scales_BG = words_BG.to(torch.int16).view(torch.float16)
            latent_Bn = self._dequantize(codes_Bn, scales_BG)
        self._check_canonical(latent_Bn, symbols_BN, bits)
        return latent_Bn.reshape(shape)

    def _check_canonical(self, latent_Bn: Tensor, symbols_BN: Tensor, bits: int) -> None:
        if bits == 16:
            again = self.symbols(latent_Bn.nan_to_num(0.0, 0.0, 0.0)[:, None], bits)
        else:
            again = self._symbols_of(*self._quantize(latent_Bn, bits), bits)
        wrong_BN = again != symbols_BN
        if wrong_BN.any():
            row, column = wrong_BN.nonzero()[0].tolist()
            raise PayloadError(
                f"payload {row}: symbol {column} is not the one that its latent has; the CRC is "
                "right, so it was sent like this: check what wrote it"
            )

    def describe(self, latent_BMd: Tensor) -> dict[str, Any]:
        """Usage and perplexity of the symbols of version 2."""
        return super().describe(latent_BMd) if self.version == 2 else {}

    def format_facts(self) -> list[Any]:
        """The symbols, and the size of the groups."""
        return [*super().format_facts(), self.config.group_size]
