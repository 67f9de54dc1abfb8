"""Reads a completion: which blocks it has, what stands in them, which option the answer names.

A scan with ``str.find`` and ``str.count`` only, so that time grows linearly with the text whatever it
repeats: a lazy pattern such as ``<think>.*?</think>`` takes quadratic time on repeated tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from medr1_verl.styles import BLOCKS, STYLES, Style

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# What may stand in the answer block for the i-th option: its letter in either case, with or without one trailing
# "." or ")". ASCII only, so that a full-width or Cyrillic look-alike is not taken for the letter.
_LETTER_FORMS: dict[str, tuple[int, str]] = {
    form + end: (index, letter)
    for index, letter in enumerate(LETTERS)
    for form in (letter, letter.lower())
    for end in ("", ".", ")")
}
_ALL_TAGS = tuple(tag for block in BLOCKS for tag in (f"<{block}>", f"</{block}>"))
# White space for str.strip is what Unicode calls so; these characters leave no mark on the page either.
_INVISIBLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180e\u200b\u200c\u200d\u200e\u200f"
    "\u202a\u202b\u202c\u202d\u202e\u2060\u2061\u2062\u2063\u2064\u2066\u2067\u2068\u2069\u206a\u206b"
    "\u206c\u206d\u206e\u206f\u2800\u3164\ufe00\ufe01\ufe0e\ufe0f\ufeff\uffa0"
)
_BLANK = _INVISIBLE + "".join(chr(code) for code in range(0x3001) if chr(code).isspace())


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
    spec = style if isinstance(style, Style) else STYLES[style]
    contents = _blocks(text, spec)
    if contents is None:
        answer = _only_block(text, "<answer>", "</answer>", inside_of=("<think>", "</think>"))
        return Parsed(False, reasoning(text), answer, "" if answer is None else option_letter(answer, options))
    think, answer = contents
    well_formed = answer != "" and (think.strip(_BLANK) != "" or not spec.reasons)
    return Parsed(well_formed, think, answer, option_letter(answer, options))


def option_letter(answer: str, options: Sequence[str] | None = None) -> str:
    """Letter of the option that ``answer`` names by its letter or by its own text, or "" if it names none.

    The letter goes first: it is what the prompt asks for. The text must be the option's, upper or lower case, with or
    without its final period (in OmniMedVQA often only the right option ends with one), and must fit one option only:
    a few rows have the same text twice.
    """
    known = _LETTER_FORMS.get(answer)
    if known is not None and (options is None or known[0] < len(options)):
        return known[1]
    if options is None or not answer:
        return ""
    for normalize in (str.strip, _text_key):
        wanted = normalize(answer)
        found = [
            index for index, option in enumerate(options) if isinstance(option, str) and normalize(option) == wanted
        ]
        if found:
            return LETTERS[found[0]] if len(found) == 1 and found[0] < len(LETTERS) else ""
    return ""


def _text_key(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().lower()


def _blocks(text: str, spec: Style) -> tuple[str, str] | None:
    """(think, answer), each stripped, when the text is exactly the blocks of the style, in order; else None."""
    position = 0
    think = answer = ""
    for opening, closing in spec.tags:
        start = text.find(opening, position)
        if start < 0 or (start > position and not text[position:start].isspace()):
            return None
        start += len(opening)
        end = text.find(closing, start)
        if end < 0:
            return None
        if opening == "<answer>":
            answer = text[start:end].strip()
        else:
            think = text[start:end].strip()
        position = end + len(closing)
    if position < len(text) and not text[position:].isspace():
        return None
    # The usual text has no other "<", which settles at once that no tag occurs a second time.
    if text.count("<") != 2 * len(spec.tags) and any(
        text.count(tag) != (1 if any(tag in pair for pair in spec.tags) else 0) for tag in _ALL_TAGS
    ):
        return None
    return think, answer


def _only_block(text: str, opening: str, closing: str, inside_of: tuple[str, str] | None = None) -> str | None:
    """Content of the block if the text has exactly one, and not inside another block that is still open; else None."""
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start = text.find(opening)
    end = text.find(closing)
    if end < start:
        return None
    if inside_of is not None and text.rfind(inside_of[0], 0, start) > text.rfind(inside_of[1], 0, start):
        return None
    return text[start + len(opening) : end].strip()


def reasoning(text: str) -> str:
    """The reasoning, stripped; "" where there is not exactly one such block. Needs no style."""
    return _only_block(text, "<think>", "</think>") or ""


def why_malformed(text: str, style: str | Style = "think") -> str:
    """The first reason why :func:`parse` does not call the text well formed, in words; "" if it does."""
    spec = style if isinstance(style, Style) else STYLES[style]
    if parse(text, spec).format:
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
    if _blocks(text, spec) is None:
        return "text outside the blocks"
    answer = _only_block(text, "<answer>", "</answer>")
    return "empty <answer>" if not answer else "empty <think>"
