"""Payloads of many passages in one folder: a store.

    store = PayloadStore("corpus.store")
    store["passage-17"]                                          # its payload, as bytes
    receiver.generate(prompts, payloads=[[store[i] for i in best]])

A store holds Parquet files (shards) of the same number of passages, `store.json` with all that
their bytes depend on (`plan.py`), and `manifest.json`, which is written last. How one is written
and read is in `docs/stores.md`.
"""

from latentwire_fast.wire.store.payload_store import PayloadStore
from latentwire_fast.wire.store.plan import StorePlan

__all__ = ["PayloadStore", "StorePlan"]
