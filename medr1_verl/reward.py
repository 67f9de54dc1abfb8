"""The verifiable reward: ``compute_score`` is called by verl for every sampled completion.

    reward.custom_reward_function.path=pkg://medr1_verl.reward
    +reward.custom_reward_function.reward_kwargs.style=think

An exception here would not stop a run: verl 0.9 marks the whole prompt group as failed and goes on without
it. So nothing is raised; what is wrong is counted, logged once per kind, and scores 0.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import Any

from medr1_verl.parsing import LETTERS, parse
from medr1_verl.reference import reference_rewards
from medr1_verl.styles import STYLES

logger = logging.getLogger(__name__)

MODES = ("strict", "reference")

_faults: Counter[str] = Counter()
_faults_lock = threading.Lock()


class _RowFault(Exception):
    """What makes a row unscorable. ``kind`` is what is logged once."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    style: str | None = None,
    accuracy_weight: float = 1.0,
    format_weight: float = 1.0,
    mode: str = "strict",
    **kwargs: Any,
) -> dict[str, Any]:
    """Score one completion; never raises, and takes time linear in the text.

    data_source: ``omnimedvqa/<modality>``; not used for the score.
    solution_str: the completion as text, special tokens removed (as verl decodes it).
    ground_truth: letter of the right option.
    extra_info: of the row; ``options`` (list of texts) and ``style`` are read.
    style: think, no-think or think-after; default the row's own, and think where it has none.
    mode: ``strict``, or ``reference`` for what the released Med-R1 code pays, quirks included.
    kwargs: verl adds its own here when a judge model is deployed; ignored.

    Returns score (accuracy_weight * acc + format_weight * format), acc, format, parsed (all 0 or 1) and pred (letter,
    or "" where the answer names no option of this question).
    """
    try:
        info = extra_info if isinstance(extra_info, dict) else {}
        name = style if style is not None else info.get("style") or "think"
        if name not in STYLES:
            raise _RowFault("unknown style", f"style {name!r} is not one of {', '.join(STYLES)}")
        if mode == "strict":
            options = info.get("options")
            if ground_truth not in LETTERS[: len(options) if options is not None else None] or len(ground_truth) != 1:
                raise _RowFault("ground truth", f"ground truth {ground_truth!r} is no option letter of the row")
            found = parse(solution_str, name, options)
            pred = found.pred
            acc = 1 if pred == ground_truth else 0
            well_formed = 1 if found.format else 0
        elif mode == "reference":
            acc, well_formed, pred = reference_rewards(solution_str, ground_truth, name)
        else:
            raise _RowFault("unknown mode", f"mode {mode!r} is not one of {', '.join(MODES)}")
        return {
            "score": float(accuracy_weight * acc + format_weight * well_formed),
            "acc": acc,
            "format": well_formed,
            "parsed": 1 if pred else 0,
            "pred": pred,
        }
    except Exception as error:
        _report(error, extra_info)
        return {"score": 0.0, "acc": 0, "format": 0, "parsed": 0, "pred": ""}


def fault_counts() -> dict[str, int]:
    """How many completions this process could not score, by kind of fault."""
    with _faults_lock:
        return dict(_faults)


def _report(error: Exception, extra_info: object) -> None:
    """Count the fault and log the first of its kind with the row it was met in."""
    kind = error.kind if isinstance(error, _RowFault) else type(error).__name__
    with _faults_lock:
        _faults[kind] += 1
        first = _faults[kind] == 1
    if first:
        row = extra_info.get("question_id", extra_info.get("index")) if isinstance(extra_info, dict) else None
        logger.warning(
            "medr1_verl.reward: %s (row %r): score 0; further ones of this kind are counted, not logged", error, row
        )
