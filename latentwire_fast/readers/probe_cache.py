"""What probes have found, kept among the user's caches: once for each digest of weights.

One JSON file per reader, `probes/KEY.json`. The key is a digest of all that may change the outcome:
weights, configuration, dtype, attention, device and versions. A file that cannot be read or written
costs nothing but the probe.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict

import torch
import transformers

from latentwire_fast.errors import ConfigError
from latentwire_fast.files.atomic import write_atomically
from latentwire_fast.files.user_cache import user_cache
from latentwire_fast.readers.abilities import ReaderAbilities
from latentwire_fast.readers.probe import Subject, probe

logger = logging.getLogger(__name__)

VERSION = 1  # of the trials: another one makes all of them anew


def probed_abilities(subject: Subject, *, digest: str) -> ReaderAbilities:
    """What a reader may be used for, from the cache or from a probe now.

    Args:
        digest: of its weights.
    """
    try:
        path = user_cache("probes") / f"{_key(subject, digest)}.json"
        return ReaderAbilities.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        pass
    except ConfigError as error:  # no such folder can be made
        logger.debug("%s", error)
        return probe(subject)
    except (OSError, ValueError, TypeError) as error:
        logger.debug("probing again: %s", error)
    found = probe(subject)
    try:
        write_atomically(path, json.dumps(asdict(found), indent=2) + "\n")
    except OSError as error:
        logger.debug("not kept: %s", error)
    return found


def _key(subject: Subject, digest: str) -> str:
    model = subject.model
    config = model.config.get_text_config(decoder=True)
    facts = [
        VERSION,
        torch.__version__,
        transformers.__version__,
        digest,
        config.to_json_string(use_diff=False),
        config._attn_implementation,
        str(model.dtype),
        subject.device.type,
        [subject.pad_id, len(subject.tokens), subject.tokens[0]],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
