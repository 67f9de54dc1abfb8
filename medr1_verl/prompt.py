"""The user turn: image marks first (as in the paper's code), then question, lettered options, instruction."""

from __future__ import annotations

from collections.abc import Sequence

from medr1_verl.styles import STYLES

IMAGE_MARK = "<image>"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def render_prompt(question: str, options: Sequence[str], style: str = "think", n_images: int = 1) -> str:
    """Text of the user turn; verl replaces each ``<image>`` mark by the next picture of the row."""
    lines = [IMAGE_MARK * n_images + question.strip()]
    lines += [f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    lines.append(STYLES[style].instruction)
    return "\n".join(lines)
