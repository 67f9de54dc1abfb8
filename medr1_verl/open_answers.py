"""Questions without options: how near an answer in words comes to the right one.

Normalized exact match decides ``acc``; what the score pays may be another metric from 0 to 1: token F1, or a function
of the user's own, which is the place for a judge model.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

OpenMetric = Callable[[str, str, Mapping[str, Any]], float]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def normalize(text: str) -> str:
    """Lower case, punctuation to spaces, no articles, single spaces: the usual rule of open question answering."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(answer: str, gold: str, info: Mapping[str, Any]) -> float:
    """1 where both are the same after :func:`normalize`, and not empty."""
    wanted = normalize(gold)
    return float(wanted != "" and normalize(answer) == wanted)


def token_f1(answer: str, gold: str, info: Mapping[str, Any]) -> float:
    """Harmonic mean of precision and recall over the words of both after :func:`normalize`, counted with repetition."""
    given, wanted = normalize(answer).split(), normalize(gold).split()
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0


METRICS: dict[str, OpenMetric] = {"exact": exact, "token_f1": token_f1}


@lru_cache(maxsize=16)
def open_metric(name: str) -> OpenMetric:
    """``exact``, ``token_f1``, or a function ``package.module:name`` of (answer, gold, extra_info) to 0..1.

    The function is called in the threads of verl's reward workers, so a blocking call to a judge model is in order
    there. Raises ValueError, ImportError or AttributeError where there is no such function.
    """
    if name in METRICS:
        return METRICS[name]
    module, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise ValueError(f"open_metric {name!r} is none of {', '.join(METRICS)} and not package.module:function")
    metric = getattr(importlib.import_module(module), attribute)
    if not callable(metric):
        raise ValueError(f"open_metric {name!r} is not a function")
    return metric
