"""The prefill engine: payload bytes to a first token. `receiver.py` is where to start."""

from latentwire_fast.prefill.outcome import Prefilled
from latentwire_fast.prefill.receiver import Engine, Receiver

__all__ = ["Engine", "Prefilled", "Receiver"]
