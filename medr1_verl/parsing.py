"""Reads a completion: which blocks it has, what stands in them, which option the answer names.

A scan with ``str.find`` only, so that time grows linearly with the text whatever it repeats: a lazy pattern such as
``<think>.*?</think>`` takes quadratic time on repeated tags.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from medr1_verl.styles import BLOCKS, STYLES, Style

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# What may stand in the answer block for the i-th option: its letter in either case, with or without one trailing
# "." or ")". ASCII only, so that a full-width or Cyrillic look-alike is not taken for the letter.
LETTER_FORMS: dict[str | None, tuple[int, str]] = {
    form + end: (index, letter)
    for index, letter in enumerate(LETTERS)
    for form in (letter, letter.lower())
    for end in ("", ".", ")")
}
_ALL_TAGS = tuple(tag for block in BLOCKS for tag in (f"<{block}>", f"</{block}>"))
# The first character that leaves a mark on the page: neither white space nor one of Unicode's invisible characters.
_MARK = re.compile(
    "[^\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]"
)
_THINK = STYLES["think"]
_MAX_ENDING = 80  # characters of a completion's end that are worth remembering


class Parsed(NamedTuple):
    """What :func:`parse` found.

    format: the completion is exactly the blocks of the style, in order, none empty, only white space around them.
    think: the reasoning without surrounding white space; "" where there is not exactly one such block.
    answer: content of the answer block without surrounding white space; None where there is not exactly one such block.
    pred: letter of the option that ``answer`` names, or "".
    """

    format: bool
    think: str
    answer: str | None
    pred: str


def parse(text: str, style: str | Style = "think", options: Sequence[str] | None = None) -> Parsed:
    """Read one completion by the strict rule of ``style``.

    ``options`` are the option texts of the question, the first being A; None means that they are not known, and
    any letter is then taken for an option. Raises KeyError for a style that does not exist.

    The answer is read even where the format is broken elsewhere, provided that there is exactly one answer block
    and that it does not stand inside reasoning: format and accuracy are separate rewards.
    """
    well_formed, answer = read(text, style if isinstance(style, Style) else STYLES[style])
    return Parsed(well_formed, reasoning(text), answer, option_letter(answer, options) if answer else "")


def read(text: str, style: Style) -> tuple[bool, str | None]:
    """(format, answer) of :class:`Parsed`: all that the score needs, and all that it pays for.

    Reasoning without any "<" cannot change what its completion is, and what follows it is one of a handful of strings
    in a run; so that ending is scanned once, behind a one-letter reasoning, and remembered.
    """
    if style is _THINK and text.startswith("<think>"):
        end = text.find("<", 7)
        if end > 7 and len(text) - end <= _MAX_ENDING and "!" <= text[7] <= "~":
            return _scan_ending(text[end:])
    return _scan(text, style)


@lru_cache(maxsize=4096)
def _scan_ending(ending: str) -> tuple[bool, str | None]:
    return _scan("<think>x" + ending, _THINK)


def _scan(text: str, style: Style) -> tuple[bool, str | None]:
    position = 0
    answer = ""
    filled = True
    for opening, closing, opening_length, closing_length, is_answer in style.scan:
        start = position
        if not text.startswith(opening, start):
            # Then the next "<" must start the tag: anything else before it is text outside the blocks.
            start = text.find("<", position)
            if not text.startswith(opening, start) or not text[position:start].isspace():
                return False, _lone_answer(text)
        start += opening_length
        end = text.find("<", start)
        if not text.startswith(closing, end):  # a "<" inside the block; fine unless it starts a tag
            end = text.find(closing, start)
            if end < 0 or any(text.find(tag, start, end) >= 0 for tag in _ALL_TAGS):
                return False, _lone_answer(text)
        if is_answer:
            answer = text[start:end].strip()
        else:
            filled = _MARK.search(text, start, end) is not None
        position = end + closing_length
    if position != len(text) and not text[position:].isspace():
        return False, _lone_answer(text)
    return filled and answer != "", answer


def option_letter(answer: str, options: Sequence[str] | None = None) -> str:
    """Letter of the option that ``answer`` names by its letter or by its own text, or "" if it names none.

    The letter goes first: it is what the prompt asks for. The text must be the option's, upper or lower case, with or
    without its final period (in OmniMedVQA often only the right option ends with one), and must fit one option only:
    a few rows have the same text twice.
    """
    known = LETTER_FORMS.get(answer)
    if known is not None and (options is None or known[0] < len(options)):
        return known[1]
    if options is None or not answer:
        return ""
    for normalize in (str.strip, _text_key):
        wanted = normalize(answer)
        found = [
            letter
            for letter, option in zip(LETTERS, options, strict=False)
            if isinstance(option, str) and normalize(option) == wanted
        ]
        if found:
            return found[0] if len(found) == 1 else ""
    return ""


def reasoning(text: str) -> str:
    """The reasoning, stripped; "" where there is not exactly one such block. Needs no style."""
    return _lone_block(text, "think")


def why_malformed(text: str, style: str | Style = "think") -> str:
    """The first reason why :func:`parse` does not call the text well formed, in words; "" if it does."""
    spec = style if isinstance(style, Style) else STYLES[style]
    if read(text, spec)[0]:
        return ""
    own = [tag for pair in spec.tags for tag in pair]
    for tag in own:
        count = text.count(tag)
        if count != 1:
            return f"no {tag}" if count == 0 else f"{count} times {tag}"
    for tag in _ALL_TAGS:
        if tag not in own and tag in text:
            return f"{tag} has no place in the {spec.name} style"
    if sorted(own, key=text.find) != own:
        return "blocks out of order: " + " ".join(sorted(own, key=text.find))
    outside = text
    for opening, closing in spec.tags:
        before, _, rest = outside.partition(opening)
        outside = before + rest.partition(closing)[2]
    if outside.strip():
        return "text outside the blocks"
    return "empty <answer>" if not _lone_block(text, "answer") else "empty <think>"


def _text_key(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().lower()


def _lone_answer(text: str) -> str | None:
    """Content of the answer block of a malformed text, if it has exactly one, and not inside reasoning; else None."""
    span = _lone_span(text, "<answer>", "</answer>")
    if span is None or text.rfind("<think>", 0, span[0]) > text.rfind("</think>", 0, span[0]):
        return None
    return text[span[0] : span[1]].strip()


def _lone_block(text: str, block: str) -> str:
    """Stripped content of the block if the text has each of its two tags once and in order; else ""."""
    span = _lone_span(text, f"<{block}>", f"</{block}>")
    return "" if span is None else text[span[0] : span[1]].strip()


def _lone_span(text: str, opening: str, closing: str) -> tuple[int, int] | None:
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    if (
        start < 0
        or text.find(closing, 0, end) >= 0
        or text.find(opening, 0, start) >= 0
        or text.find(opening, end) >= 0
    ):
        return None
    return start + len(opening), end
