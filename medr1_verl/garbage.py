"""No garbage collection while a process imports torch, transformers, vLLM and verl, and none of their objects after it.

The import makes about a million objects that stay, and Python's collector looks through all that there are each time
their number has grown by a quarter: a quarter of the time that each of a run's ten processes takes to start. So it
pauses for the first seconds of a process. What exists then is frozen (``gc.freeze``): a full collection during training
looks at what training made, and no longer takes half a second in the middle of a rollout.
"""

from __future__ import annotations

import gc
import os
import threading

# Longer than the imports of any process of a run take on two cores, and short beside a run.
SECONDS = 20.0

_paused = False


def pause(seconds: float = SECONDS) -> None:
    """Stop collecting in this process for its first ``seconds``; nothing where that was done already, or collection
    is off by somebody else's wish. A fork collects from its first moment.
    """
    global _paused
    if _paused or not gc.isenabled():
        return
    _paused = True
    gc.disable()
    os.register_at_fork(after_in_child=resume)
    timer = threading.Timer(seconds, resume)
    timer.daemon = True
    timer.name = "medr1-gc"
    timer.start()


def resume() -> None:
    """Freeze what exists and collect again; nothing where no pause is on."""
    global _paused
    if not _paused:
        return
    _paused = False
    gc.freeze()
    gc.enable()
