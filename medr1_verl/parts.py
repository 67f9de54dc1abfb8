"""Optional parts of the reward, all off by default: each a named function from 0 to 1 with a weight of its own.

    +reward.custom_reward_function.reward_kwargs.length_weight=0.2

adds 0.2 times ``length`` to the score and returns its value as ``length_part``. A weight of 0 pays nothing and still
reports the value. A part is paid only on a well-formed completion, so that none can be had instead of an answer.

A part takes the parsed completion, the row's ``extra_info`` and all ``reward_kwargs``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from medr1_verl.modality_names import modalities_named
from medr1_verl.parsing import Parsed

Part = Callable[[Parsed, Mapping[str, Any], Mapping[str, Any]], float]

MIN_WORDS = 10
MAX_WORDS = 180
NGRAM = 4


def length(found: Parsed, info: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 where the reasoning has ``min_words`` to ``max_words`` words (10 to 180); less in proportion below, and
    falling to 0 at twice the maximum above.

    Prevents reasoning that shrinks to a word (the paper's completions fall to 60-70 tokens within 100 steps, those of
    the fundus run to about 20) and reasoning that grows into the cut at 256 tokens.
    """
    words = len(found.think.split())
    least, most = settings.get("min_words", MIN_WORDS), settings.get("max_words", MAX_WORDS)
    if words < least:
        return words / least
    return 1.0 if words <= most else max(0.0, 2.0 - words / most)


def repetition(found: Parsed, info: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """Share of the reasoning's word 4-grams that are distinct; 1 for fewer than 5 words.

    Prevents loops: a sentence said again and again satisfies any length.
    """
    words = found.think.lower().split()
    number = len(words) - NGRAM + 1
    return 1.0 if number <= 1 else len(set(zip(*(words[i:] for i in range(NGRAM)), strict=False))) / number


def modality(found: Parsed, info: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 where the reasoning names the row's modality and no other, 1/n where it names n of them, 0 where not this one.

    Prevents reasoning that could stand under any picture; the division prevents a list of all modalities.
    """
    named = modalities_named(found.think)
    return 1 / len(named) if info.get("modality") in named else 0.0


def letter_case(found: Parsed, info: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 where the answer is the upper-case letter that the prompt asks for; 0 for the lower-case letter or the text.

    Prevents drift to spellings that other people's parsers do not read.
    """
    return 1.0 if found.answer is not None and found.answer.rstrip(".)") == found.pred != "" else 0.0


PARTS: dict[str, Part] = {
    "length": length,
    "repetition": repetition,
    "modality": modality,
    "letter_case": letter_case,
}
WEIGHT_KEYS: dict[str, str] = {f"{name}_weight": name for name in PARTS}
SETTING_KEYS: dict[str, int] = {"min_words": MIN_WORDS, "max_words": MAX_WORDS}
