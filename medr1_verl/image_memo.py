"""A processor that remembers: the samples of one prompt show one image, which is prepared once.

verl's agent loop (0.9.1, experimental/agent_loop) prepares a prompt's text and images anew for each of its n samples,
and then each sample's twice more, for the reward and for the trainer: 3 n times where n + 1 would do, and the images
once. The work grows with the image, so it also costs a GPU run, where a few CPU processes do it while the GPU waits.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from PIL import Image

MEMORY = 256 * 2**20  # bytes of prepared images that one process keeps


class Memo:
    """Results by key, the least recently used forgotten when they hold more than ``limit`` bytes; for many threads."""

    def __init__(self, limit: int = MEMORY) -> None:
        self._limit = limit
        self._known: OrderedDict[Any, Future] = OrderedDict()
        self._sizes: dict[Any, int] = {}
        self._held = 0
        self._guard = threading.Lock()

    def get(self, key: Any, make: Any) -> Any:
        """``make()``, a mapping of tensors, or what it returned for this key before. Its errors are not kept."""
        with self._guard:
            future = self._known.get(key)
            mine = future is None
            if future is None:
                future = self._known[key] = Future()
            else:
                self._known.move_to_end(key)
        if not mine:
            return future.result()  # perhaps still being made, by another thread
        try:
            result = make()
        except BaseException as error:
            with self._guard:
                self._known.pop(key, None)
            future.set_exception(error)
            raise
        future.set_result(result)
        with self._guard:
            if key in self._known:
                self._sizes[key] = sum(getattr(value, "nbytes", 0) for value in result.values())
                self._held += self._sizes[key]
            while self._held > self._limit:
                oldest = next(key for key in self._known if key in self._sizes)
                del self._known[oldest]
                self._held -= self._sizes.pop(oldest)
        return result


def _content(value: Any) -> Any:
    """Something hashable that is equal for equal values. Raises ``TypeError`` where that cannot be told (arrays)."""
    if value is None or isinstance(value, str | bytes | int | float | Enum):
        return value
    if isinstance(value, Image.Image):
        pixels = hashlib.blake2b(value.tobytes(), digest_size=16).digest()
        return value.mode, value.size, pixels, repr(value.getpalette()) if value.mode in ("P", "PA") else None
    if isinstance(value, Mapping):
        return "mapping", tuple((key, _content(inner)) for key, inner in sorted(value.items()))
    if isinstance(value, list | tuple):
        return "sequence", tuple(_content(inner) for inner in value)
    if is_dataclass(value):
        return type(value).__name__, tuple(
            (field.name, _content(getattr(value, field.name))) for field in fields(value)
        )
    raise TypeError(f"cannot compare a {type(value).__name__} by its content")


def remember(processor: Any, memo: Memo | None = None) -> None:
    """Make this processor (its class stays what it says) answer from memory what it was asked before.

    Text, numbers and PIL images are told apart by their content; a call with anything else goes through.
    """
    memo = Memo() if memo is None else memo
    own = type(processor)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            key = _content((args, kwargs))
        except TypeError:
            return own.__call__(self, *args, **kwargs)
        known = memo.get(key, lambda: own.__call__(self, *args, **kwargs))
        # Callers add to it and take from it; lists they might change in place, tensors they do not.
        return type(known)(
            {key: value if hasattr(value, "nbytes") else deepcopy(value) for key, value in known.items()}
        )

    processor.__class__ = type(own.__name__, (own,), {"__call__": __call__, "__module__": own.__module__})
