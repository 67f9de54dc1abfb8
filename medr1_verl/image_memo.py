"""An image processor that remembers: the samples of one prompt show one image, which is prepared once.

verl's agent loop (0.9.1, experimental/agent_loop) prepares a prompt's images anew for each of its n samples, and then
again for the trainer: 2 n times what once would do. The work grows with the image, so it also costs a GPU run, where it
is done by a few CPU processes while the GPU waits.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

MEMORY = 256 * 2**20  # bytes of prepared images that one process keeps


class Memo:
    """Results by key, the least recently used forgotten when they hold more than ``limit`` bytes; for many threads."""

    def __init__(self, limit: int = MEMORY) -> None:
        self._limit = limit
        self._known: OrderedDict[Any, Future] = OrderedDict()
        self._sizes: dict[Any, int] = {}
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
            while sum(self._sizes.values()) > self._limit:
                oldest = next(key for key in self._known if key in self._sizes)
                del self._known[oldest], self._sizes[oldest]
        return result


def _digest(image: Any) -> Any:
    """What an image shows; an image of another kind than PIL's is not told apart from any other, so not remembered."""
    return image.mode, image.size, hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def remember(image_processor: Any, memo: Memo | None = None) -> None:
    """Make this image processor (its class stays what it says) answer for a known image from memory."""
    memo = Memo() if memo is None else memo
    own = type(image_processor)

    def __call__(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        shown = images if isinstance(images, Sequence) else [images]
        try:
            key = (tuple(_digest(image) for image in shown), args, repr(sorted(kwargs.items())))
            hash(key)
        except (AttributeError, TypeError):  # videos, arrays, nested lists: as they always were
            return own.__call__(self, images, *args, **kwargs)
        known = memo.get(key, lambda: own.__call__(self, images, *args, **kwargs))
        return type(known)(dict(known))  # callers add to it and take from it

    image_processor.__class__ = type(own.__name__, (own,), {"__call__": __call__, "__module__": own.__module__})
