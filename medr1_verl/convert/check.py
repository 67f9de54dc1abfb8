"""Raw row -> checked question, or the reason why not. When in doubt about the gold answer a row is rejected."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import PurePosixPath

from medr1_verl.convert.question import Question, RawRow, RejectedError
from medr1_verl.prompt import LETTERS
from medr1_verl.taxonomy import modality_slug, question_type_slug

MAX_QUESTION = 8000  # characters; the longest problem of the published files has 937
MAX_OPTION = 2000

# White space that JSON can carry inside a string becomes one blank: a line break inside an option would end it.
_LINE_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1f\x85\u2028\u2029]+")
# Other control characters, text-direction overrides and halves of surrogate pairs (not valid UTF-8).
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Marks with a meaning in the prompt: verl splits the text at <image>, <video> and <audio>, the reward looks for
# <think> and <answer>, and <|...|> are Qwen2-VL's own control tokens.
_MARKS = re.compile(r"<\s*/?\s*(?:image|video|audio|think|answer)\s*/?\s*>|<\|[^<>|\s]{1,64}\|>", re.IGNORECASE)
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_][^\\:\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]*")
_SUSPECT = re.compile(r"[<\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


_modality = lru_cache(4096)(modality_slug)
_question_type = lru_cache(4096)(question_type_slug)


def clean_text(value: str, what: str, limit: int) -> str:
    """``value`` stripped, line breaks and tabs as single blanks; raises ``bad_text`` for what could break a prompt."""
    if _SUSPECT.search(value):
        value = _LINE_BREAKS.sub(" ", value)
        if found := _CONTROL.search(value):
            raise RejectedError("bad_text", f"{what} has the control character U+{ord(found.group()):04X}")
        if found := _MARKS.search(value):
            raise RejectedError("bad_text", f"{what} has the literal mark {found.group()!r}, which the prompt reserves")
    value = value.strip()
    if len(value) > limit:
        raise RejectedError("bad_text", f"{what} has {len(value)} characters; at most {limit} are taken")
    return value


def normalize_option(text: str) -> str:
    """Lower case, no trailing period, single blanks: what is left when the typographic tells are gone.

    In the published files the only option ending in "." or starting in lower case is very often the gold one.
    """
    return " ".join(text.lower().split()).rstrip(". ")


def _field(value: object, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        problem = "is missing" if value is None else f"is a {type(value).__name__}, not text"
        raise RejectedError("bad_row", f"{what} {problem}")
    return value if isinstance(value, str) else str(value)


def check_options(value: object) -> tuple[str, ...]:
    """Option texts in letter order; raises ``bad_options`` or ``bad_text``."""
    if not isinstance(value, (list, tuple)):
        raise RejectedError("bad_options", "the options are not a list")
    if not 2 <= len(value) <= len(LETTERS):
        raise RejectedError("bad_options", f"{len(value)} option(s); a question needs 2 to {len(LETTERS)}")
    options = []
    for letter, option in zip(LETTERS, value, strict=False):
        if isinstance(option, bool) or not isinstance(option, (str, int, float)):
            problem = "is missing" if option is None else f"is a {type(option).__name__}, not text"
            raise RejectedError("bad_options", f"option {letter} {problem}")
        text = clean_text(option if isinstance(option, str) else str(option), f"option {letter}", MAX_OPTION)
        if not text:
            raise RejectedError("bad_options", f"option {letter} is empty")
        options.append(text)
    return tuple(options)


def _unique(matches: list[int], gold: str) -> str | None:
    if len(matches) > 1:
        letters = " and ".join(LETTERS[i] for i in matches)
        raise RejectedError("ambiguous_gold", f"the gold answer {gold!r} is the text of options {letters}")
    return LETTERS[matches[0]] if matches else None


def match_gold(gold: object, options: tuple[str, ...], kind: str = "text") -> str:
    """The letter of the one option that ``gold`` means.

    A text is compared exactly first, then without case and trailing period (the gold of a question is often the only
    option written with a period). Two options with that text, or a letter that is also the text of another option,
    raise ``ambiguous_gold``; none raises ``gold_not_in_options``.
    """
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        problem = "missing" if gold is None else f"a {type(gold).__name__}, not text"
        raise RejectedError("bad_row", f"the gold answer is {problem}")
    text = _LINE_BREAKS.sub(" ", gold if isinstance(gold, str) else str(gold)).strip()
    if not text:
        raise RejectedError("bad_row", "the gold answer is empty")
    shown = text if len(text) <= 80 else text[:77] + "..."
    by_letter = LETTERS[: len(options)].find(text.upper()) if len(text) == 1 and text.isascii() else -1
    if kind == "letter":
        if by_letter < 0 or not text.isupper():
            raise RejectedError("gold_not_in_options", f"the gold letter {shown!r} is not one of the options")
        return LETTERS[by_letter]
    letter = _unique([i for i, option in enumerate(options) if option == text], shown)
    if letter is None:
        key = normalize_option(text)
        letter = _unique([i for i, option in enumerate(options) if normalize_option(option) == key], shown)
    if kind == "either" and by_letter >= 0:
        if letter is not None and letter != LETTERS[by_letter]:
            raise RejectedError("ambiguous_gold", f"{shown!r} is a letter and also the text of option {letter}")
        letter = LETTERS[by_letter]
    if letter is None:
        raise RejectedError("gold_not_in_options", f"the gold answer {shown!r} is none of the options")
    return letter


def check_image_path(value: object) -> str:
    """A relative POSIX path without ``..``; raises ``bad_row`` or ``unsafe_path``. Links are followed later."""
    if not isinstance(value, str) or not value.strip():
        raise RejectedError("bad_row", "the image path is missing or not text")
    if _PLAIN_PATH.fullmatch(value) and "//" not in value and "/." not in value:
        return value  # the usual case, without the cost of taking the path apart
    if _CONTROL.search(value):
        raise RejectedError("unsafe_path", "the image path has a control character")
    path = PurePosixPath(value.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", value) or "://" in value:
        raise RejectedError("unsafe_path", f"{value[:200]!r} is not a relative path inside the input folder")
    return str(path)


def check_row(raw: RawRow) -> Question:
    """The checked question of ``raw``; raises :class:`RejectedError`."""
    if raw.fault:
        raise RejectedError(*raw.fault)
    question_id = clean_text(_field(raw.question_id, "question_id"), "question_id", MAX_OPTION)
    if not question_id:
        raise RejectedError("bad_row", "question_id is empty")
    modality = _modality(raw.modality) if isinstance(raw.modality, str) else None
    if modality is None:
        raise RejectedError("unknown_modality", f"modality {raw.modality!r:.80} is not one of the 8")
    question_type = _question_type(raw.question_type) if isinstance(raw.question_type, str) else None
    if question_type is None:
        raise RejectedError("unknown_question_type", f"question type {raw.question_type!r:.80} is not one of the 5")
    text = clean_text(_field(raw.question, "question"), "question", MAX_QUESTION)
    if not text:
        raise RejectedError("bad_row", "question is empty")
    options = check_options(raw.options)
    answer = match_gold(raw.gold, options, raw.gold_kind)
    if not isinstance(raw.images, (list, tuple)) or not raw.images:
        raise RejectedError("bad_row", "the row names no image")
    return Question(
        file=raw.file,
        row=raw.row,
        question_id=question_id,
        dataset=clean_text(_field(raw.dataset, "dataset"), "dataset", MAX_OPTION),
        modality=modality,
        question_type=question_type,
        question=text,
        options=options,
        answer=answer,
        images=tuple(check_image_path(path) for path in raw.images),
        split=raw.split,
    )
