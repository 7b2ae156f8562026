"""The names of the C++ extension (csrc/bindings.cpp)."""

import torch

class Copies:
    prepare: int
    link: int
    scatter: int

class Placement:
    copies: Copies
    def layers(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]: ...
    def scatter(self, index: int, target: torch.Tensor) -> None: ...
    def wait(self, index: int) -> None: ...

class Placer:
    def __init__(self, layer_devices: list[str], dtype: torch.dtype) -> None: ...
    def place(self, prefix: torch.Tensor, batch: int) -> Placement: ...

def plan(layer_devices: list[str]) -> list[tuple[str, list[tuple[int, int]]]]: ...
