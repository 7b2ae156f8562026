"""The one receiver: prompts about payloads, texts or embeddings to answers. See `receiver.py`."""

from latentwire_fast.serving.options import Engine, ReceiverOptions
from latentwire_fast.serving.payload_batch import PayloadKind
from latentwire_fast.serving.prefilled import Prefilled
from latentwire_fast.serving.receiver import Receiver

__all__ = ["Engine", "PayloadKind", "Prefilled", "Receiver", "ReceiverOptions"]
