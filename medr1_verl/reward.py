"""The verifiable reward: ``compute_score`` is called by verl for every sampled completion.

    reward.custom_reward_function.path=pkg://medr1_verl.reward
    +reward.custom_reward_function.reward_kwargs.style=think

An exception here would not stop a run: verl 0.9 marks the whole prompt group as failed and goes on without
it. So nothing is raised; what is wrong is counted, logged once per kind, and scores 0. What can be known beforehand
(``reward_kwargs``, ground truths) is refused before the run starts by :mod:`medr1_verl.config_check`.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if importlib.util.find_spec("medr1_verl") is None:  # loaded by path from a checkout that is not installed
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from medr1_verl.open_answers import exact, normalize, open_metric
from medr1_verl.parsing import LETTER_FORMS, LETTERS, Parsed, option_letter, parse, read
from medr1_verl.parts import PARTS, WEIGHT_KEYS
from medr1_verl.reference import reference_rewards
from medr1_verl.styles import STYLES

logger = logging.getLogger(__name__)

MODES = ("strict", "reference")
MAX_PRED_LENGTH = 200
"""Of the normalized answer to an open question, which stands in ``pred``."""

_LETTER_INDEX = {letter: index for index, letter in enumerate(LETTERS)}
_faults: Counter[str] = Counter()
_faults_lock = threading.Lock()


class _RowFault(Exception):
    """What makes a completion unscorable. ``kind`` is what is logged once."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
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
    ground_truth: letter of the right option; for a question without options the answer in words.
    extra_info: of the row; ``options`` (list of texts; empty for an open question) and ``style`` are read. Where
        ``options`` is missing, any letter is taken for an option, and a ground truth that is no letter is in words.
    style: think, no-think or think-after; default the row's own, and think where it has none.
    mode: ``strict``, or ``reference`` for what the released Med-R1 code pays, quirks included.
    kwargs: ``<part>_weight`` of the optional parts and their settings (:mod:`medr1_verl.parts`); ``open_metric``
        (:mod:`medr1_verl.open_answers`); verl adds its own where a judge model is deployed, which are ignored.

    Returns score (accuracy_weight * acc + format_weight * format), acc, format, parsed (all 0 or 1) and pred (letter,
    or "" where the answer names no option of this question; for an open question the normalized answer). With an
    optional part on, also ``<part>_part``, whose weighted value is in the score; with ``open_metric``, ``open_score``,
    which then takes the place of acc in the score.
    """
    try:
        info = extra_info or {}
        spec = STYLES.get(style or info.get("style") or "think")
        if spec is None:
            raise _RowFault("style", f"style {style or info.get('style')!r} is none of {', '.join(STYLES)}")
        options = info.get("options")
        earned: float
        well_formed: int
        if mode == "strict":
            well_formed, answer = read(solution_str, spec)
            number = len(LETTERS) if options is None else len(options)
            if _LETTER_INDEX.get(ground_truth, len(LETTERS)) < number:
                named = LETTER_FORMS.get(answer)  # nearly always; option_letter also knows the options' texts
                if named is not None and named[0] < number:
                    pred = named[1]
                else:
                    pred = option_letter(answer, options) if answer else ""
                earned = acc = 1 if pred == ground_truth else 0
            elif options is not None and number:
                raise _RowFault("ground truth", f"ground truth {ground_truth!r} is no option letter of the row")
            else:
                pred, acc, earned = _open_answer(answer, ground_truth, info, kwargs)
        elif mode == "reference":
            earned, well_formed, pred = reference_rewards(solution_str, ground_truth, spec.name)
            acc = int(earned)
        else:
            raise _RowFault("mode", f"mode {mode!r} is none of {', '.join(MODES)}")
        score = 0.0 + accuracy_weight * earned + format_weight * well_formed
        result: dict[str, Any] = {
            "score": score,
            "acc": acc,
            "format": 1 if well_formed else 0,
            "parsed": 1 if pred else 0,
            "pred": pred,
        }
        if kwargs:
            score = _add_optional(result, earned, solution_str, spec.name, info, kwargs)
        if score - score != 0.0:  # infinite, or not a number
            raise _RowFault("weight", f"the weights make the score {score}")
        return result
    except Exception as error:
        if isinstance(solution_str, str):
            _report(error, extra_info)
        else:
            kind = type(solution_str).__name__
            _report(_RowFault("completion", f"the completion is no text but {kind}"), extra_info)
        return _nothing(kwargs)


def fault_counts() -> dict[str, int]:
    """How many completions (or parts of one) this process could not score, by kind of fault."""
    with _faults_lock:
        return dict(_faults)


def _open_answer(
    answer: str | None, ground_truth: object, info: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> tuple[str, int, float]:
    """(pred, acc, what accuracy_weight pays) for a question without options."""
    if not isinstance(ground_truth, str) or not ground_truth.strip():
        raise _RowFault("ground truth", f"ground truth {ground_truth!r} of an open question is no text")
    if not answer:
        return "", 0, 0.0
    acc = int(exact(answer, ground_truth, info))
    earned = float(acc)
    if kwargs.get("open_metric") is not None:
        try:
            earned = min(1.0, max(0.0, float(open_metric(kwargs["open_metric"])(answer, ground_truth, info))))
        except Exception as error:  # a judge that cannot be reached costs this answer, not the group
            _report(error, info, "open_metric")
            earned = 0.0
    return normalize(answer)[:MAX_PRED_LENGTH], acc, earned


def _add_optional(
    result: dict[str, Any], earned: float, text: str, style: str, info: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> float:
    """Add to ``result`` the parts that ``kwargs`` switches on, and return its score; a part that raises counts 0."""
    found: Parsed | None = None
    for key, name in WEIGHT_KEYS.items():
        weight = kwargs.get(key)
        if weight is None:
            continue
        value = 0.0
        if result["format"]:
            try:
                found = found or parse(text, style, info.get("options"))
                value = min(1.0, max(0.0, float(PARTS[name](found, info, kwargs))))
            except Exception as error:
                _report(error, info, f"part {name}")
        result[f"{name}_part"] = value
        result["score"] = float(result["score"] + weight * value)
    if kwargs.get("open_metric") is not None:
        result["open_score"] = float(earned)
    return result["score"]


def _nothing(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a completion that cannot be scored: the same keys as any other of this configuration."""
    result: dict[str, Any] = {"score": 0.0, "acc": 0, "format": 0, "parsed": 0, "pred": ""}
    for key, name in WEIGHT_KEYS.items():
        if kwargs.get(key) is not None:
            result[f"{name}_part"] = 0.0
    if kwargs.get("open_metric") is not None:
        result["open_score"] = 0.0
    return result


def _report(error: Exception, extra_info: object, where: str = "") -> None:
    """Count the fault and log the first of its kind, with the row it was met in."""
    kind = where or (error.kind if isinstance(error, _RowFault) else type(error).__name__)
    with _faults_lock:
        _faults[kind] += 1
        first = _faults[kind] == 1
    if not first:
        return
    row = extra_info.get("question_id", extra_info.get("index")) if isinstance(extra_info, Mapping) else None
    logger.warning(
        "medr1_verl.reward: %s%s (row %r): counts 0; more of this kind are counted, not logged",
        f"{where}: {type(error).__name__}: " if where else "",
        error,
        row,
        exc_info=not isinstance(error, _RowFault),
    )
