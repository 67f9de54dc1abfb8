"""The three answer styles of the paper. Prompt and format rule come from one definition each.

A style is an ordered list of blocks. The prompt asks for exactly these blocks in this order; the
strict reward accepts exactly these blocks in this order. The wording is this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """One answer style: ``blocks`` are tag names in the order in which the answer must have them."""

    name: str
    blocks: tuple[str, ...]
    instruction: str


STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style(
            "think",
            ("think", "answer"),
            "First reason about what the image shows, between <think> and </think>. "
            "Then give the letter of the one correct option, between <answer> and </answer>. "
            "Write nothing outside these two blocks.",
        ),
        Style(
            "no-think",
            ("answer",),
            "Give the letter of the one correct option, between <answer> and </answer>. "
            "Write nothing outside this block.",
        ),
        Style(
            "think-after",
            ("answer", "think"),
            "First give the letter of the one correct option, between <answer> and </answer>. "
            "Then explain it by what the image shows, between <think> and </think>. "
            "Write nothing outside these two blocks.",
        ),
    )
}
