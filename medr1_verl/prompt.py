"""The user turn: image marks first (as in the paper's code), then question, lettered options, instruction.

A template file may replace the wording; what a released checkpoint was trained with is needed to score it fairly.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medr1_verl.errors import UserError
from medr1_verl.parsing import LETTERS
from medr1_verl.styles import STYLES, Style

IMAGE_MARK = "<image>"

_FIELD = re.compile(
    r"\{\{\s*(question|options|options_inline|style)\s*\}\}|\{(question|options|options_inline|style)\}"
)
_SECTION = re.compile(r"^---[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Template:
    """A user's own prompt: ``body`` with its fields, and the instruction of each style that the file words anew."""

    body: str
    instructions: Mapping[str, str] = field(default_factory=dict)


DEFAULT_TEMPLATE = Template("{question}\n{options}\n{style}")


def render_prompt(
    question: str,
    options: Sequence[str],
    style: str = "think",
    n_images: int = 1,
    template: Template | None = None,
) -> str:
    """Text of the user turn; verl replaces each ``<image>`` mark by the next picture of the row.

    ``options`` is empty for an open question. The marks stand first unless the template has one of its own, which
    then stands for all of them. Raises KeyError for a style that does not exist.
    """
    template = template or DEFAULT_TEMPLATE
    has_options = len(options) > 0  # not bool(options): a row's options may be a numpy array
    values = {
        "question": question.strip(),
        "options": "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)),
        "options_inline": ", ".join(f"{letter}){option}" for letter, option in zip(LETTERS, options, strict=False)),
        "style": template.instructions.get(style) or _instruction(STYLES[style], has_options),
    }
    body = template.body
    marks = IMAGE_MARK * n_images
    body = body.replace(IMAGE_MARK, marks, 1) if IMAGE_MARK in body else marks + body
    if not has_options:  # the field's own line goes with it
        body = re.sub(r"^[ \t]*(\{\{\s*options\s*\}\}|\{options\})[ \t]*\n", "", body, flags=re.MULTILINE)
    # One pass over the template: braces inside a question or an option are text.
    return _FIELD.sub(lambda match: values[match[1] or match[2]], body)


def _instruction(style: Style, has_options: bool) -> str:
    return style.instruction if has_options else style.open_instruction


def load_template(path: str | os.PathLike[str]) -> Template:
    """Read a template file; raises :class:`UserError` naming the file and what it lacks.

    Plain UTF-8 text with ``{question}``, ``{options}`` (one a line, "A) ...") or ``{options_inline}`` ("A)x, B)y", as
    the released prompts have it), and ``{style}``, where the style's instruction goes. ``{{ question }}`` is the same
    as ``{question}``; other braces are text. A line ``--- think`` (or no-think, think-after) after the body starts
    this file's own instruction for that style; a style without one keeps the project's wording. ``<image>`` may occur
    once, to say where the pictures go.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # editors on Windows write a mark first
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"template {os.fspath(path)}: cannot be read as UTF-8 text: {error}") from error
    return parse_template(text, os.fspath(path))


def parse_template(text: str, name: str = "template") -> Template:
    """The :class:`Template` in ``text``; ``name`` is what an error calls it. Raises :class:`UserError`."""
    pieces = _SECTION.split(text.replace("\r\n", "\n"))
    body = pieces[0].strip("\n")
    instructions: dict[str, str] = {}
    for style, wording in zip(pieces[1::2], pieces[2::2], strict=True):
        if style not in STYLES:
            raise UserError(f"template {name}: section '--- {style}' is no style; one of {', '.join(STYLES)}")
        if style in instructions:
            raise UserError(f"template {name}: two sections '--- {style}'; keep one")
        if not wording.strip():
            raise UserError(f"template {name}: section '--- {style}' is empty; write its instruction or remove it")
        instructions[style] = wording.strip("\n")
    used = [match[1] or match[2] for match in _FIELD.finditer(body)]
    for wanted in ("question", "options", "style"):
        found = [use for use in used if use == wanted or (wanted == "options" and use == "options_inline")]
        if not found:
            raise UserError(f"template {name}: lacks the field {{{wanted}}}; add it where the {wanted} should stand")
        if len(found) > 1:
            raise UserError(f"template {name}: has the field {{{wanted}}} {len(found)} times; keep one")
    if body.count(IMAGE_MARK) > 1 or any(IMAGE_MARK in wording for wording in instructions.values()):
        raise UserError(
            f"template {name}: {IMAGE_MARK} may stand once, in the body; it stands for all pictures of a row"
        )
    return Template(body, instructions)
