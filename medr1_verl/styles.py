"""The three answer styles of the paper. Prompt, format rule and parser come from one definition each.

A style is an ordered list of blocks. The prompt asks for exactly these blocks in this order; the
strict parser (:mod:`medr1_verl.parsing`) accepts exactly these blocks in this order. The wording is
this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BLOCKS = ("think", "answer")
"""Every block that some style has. A tag of a block that a style does not have is a format fault in it."""


@dataclass(frozen=True, eq=False)
class Style:
    """One answer style: ``blocks`` are tag names in the order in which the answer must have them."""

    name: str
    blocks: tuple[str, ...]
    wording: str
    """What the prompt asks for, with ``{answer}`` where it says what stands in the answer block."""
    tags: tuple[tuple[str, str], ...] = field(init=False)
    """(opening tag, closing tag) of each block, in order; what the parser looks for."""
    scan: tuple[tuple[str, str, int, int, bool], ...] = field(init=False, repr=False)
    """The same, laid out for the parser's inner loop: with both lengths, and whether it is the answer block."""

    def __post_init__(self) -> None:
        tags = tuple((f"<{block}>", f"</{block}>") for block in self.blocks)
        object.__setattr__(self, "tags", tags)
        object.__setattr__(self, "scan", tuple((o, c, len(o), len(c), o == "<answer>") for o, c in tags))

    @property
    def instruction(self) -> str:
        """The request for a question with lettered options."""
        return self.wording.replace("{answer}", "the letter of the one correct option")

    @property
    def open_instruction(self) -> str:
        """The request for a question without options."""
        return self.wording.replace("{answer}", "the answer in as few words as possible")

    @property
    def reasons(self) -> bool:
        """Whether the style has a reasoning block."""
        return "think" in self.blocks


STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style(
            "think",
            ("think", "answer"),
            "First reason about what the image shows, between <think> and </think>. "
            "Then give {answer}, between <answer> and </answer>. "
            "Write nothing outside these two blocks.",
        ),
        Style(
            "no-think",
            ("answer",),
            "Give {answer}, between <answer> and </answer>. Write nothing outside this block.",
        ),
        Style(
            "think-after",
            ("answer", "think"),
            "First give {answer}, between <answer> and </answer>. "
            "Then explain it by what the image shows, between <think> and </think>. "
            "Write nothing outside these two blocks.",
        ),
    )
}
