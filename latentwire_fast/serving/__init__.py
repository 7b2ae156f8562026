"""The prefill engine: payload bytes to a first token. `receiver.py` is where to start."""

from latentwire_fast.serving.prefilled import Prefilled
from latentwire_fast.serving.receiver import Engine, Receiver

__all__ = ["Engine", "Prefilled", "Receiver"]
