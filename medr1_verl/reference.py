"""The two rewards of the released Med-R1 code (grpo_vqa.py at 88d76c7), quirks included, in linear time.

Written anew from their observed behaviour, for checking released checkpoints and published numbers like for like.
The released accuracy reward first asks math_verify, which parses a lone letter to nothing and so never decides;
that step is left out. For training use the strict mode: these rewards pay for empty reasoning, repeated
blocks, and a bare letter without tags.
"""

from __future__ import annotations

import re

from medr1_verl.parsing import LETTERS

# The released pattern for think is fullmatch(<think>.*?</think>\s*<answer>.*?</answer>) with DOTALL. Lazy or not, it
# holds exactly when the text starts and ends with the outer tags and the inner pair occurs between them once or more.
# White space runs between different tags are disjoint, so this search is linear.
_THINK_THEN_ANSWER = re.compile(r"</think>\s*<answer>")
_ANSWER_THEN_THINK = re.compile(r"</answer>\s*<think>")


def reference_rewards(text: str, ground_truth: str, style: str = "think") -> tuple[int, int, str]:
    """(accuracy, format, predicted letter or "") as the released code would pay for this completion.

    ``ground_truth`` is a letter or the released ``<answer> C </answer>``. Think-after was never released: its format
    rule is the think pattern with the blocks exchanged.
    """
    student = _first_answer(text)
    return int(student == _first_answer(ground_truth)), int(_format(text, style)), _letter(student)


def _letter(student: str) -> str:
    return student if len(student) == 1 and student in LETTERS else ""


def _first_answer(text: str) -> str:
    """Content of the first answer block that opens and closes on one line, else the whole text; stripped.

    The released pattern has no DOTALL, so a block with a line feed in it is not seen.
    """
    for line in text.split("\n"):
        start = line.find("<answer>")
        if start >= 0:
            end = line.find("</answer>", start + len("<answer>"))
            if end >= 0:
                return line[start + len("<answer>") : end].strip()
    return text.strip()


def _format(text: str, style: str) -> bool:
    if style == "no-think":
        body = text.lstrip()
        return body.startswith("<answer>") and body.endswith("</answer>") and len(body) >= len("<answer></answer>")
    if style == "think":
        first, middle, last = "<think>", _THINK_THEN_ANSWER, "</answer>"
    else:
        first, middle, last = "<answer>", _ANSWER_THEN_THINK, "</think>"
    return (
        text.startswith(first)
        and text.endswith(last)
        and middle.search(text, len(first), max(len(first), len(text) - len(last))) is not None
    )
