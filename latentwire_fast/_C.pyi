"""The names of the C++ extension (csrc/bindings.cpp)."""

import torch

INTERFACE: int
CODING: int

class Copies:
    prepare: int
    link: int
    scatter: int

class Placement:
    copies: Copies
    def layers(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]: ...
    def scatter(self, index: int, target: torch.Tensor) -> None: ...
    def wait(self, index: int) -> None: ...
    def wait_for_layer(self, layer: int) -> None: ...
    def is_under_way(self, layer: int) -> bool: ...

class Placer:
    def __init__(self, layer_devices: list[str], dtype: torch.dtype) -> None: ...
    def place(self, prefix: torch.Tensor, batch: int, stable: bool) -> Placement: ...

def plan(layer_devices: list[str]) -> list[tuple[str, list[tuple[int, int]]]]: ...

class RecurrentPrior:
    def __init__(
        self,
        rows: int,
        sizes: list[int],
        features: int,
        width: int,
        arrays: dict[str, list[int]],
        powers: list[int],
    ) -> None: ...
    def encode(self, symbols: list[list[int]], rest: list[list[int]]) -> list[bytes]: ...
    def decode(
        self, messages: list[bytes], count: int, rest: list[list[int]]
    ) -> list[list[int]]: ...
