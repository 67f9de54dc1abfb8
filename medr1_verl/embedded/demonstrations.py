"""Worked answers to training rows, with stated noise, for a supervised start before GRPO.

A model that was only shown right answers is sure of itself: it samples no errors, so every group of answers earns one
reward and GRPO has nothing to compare. These demonstrations are therefore wrong now and then, in ways that a reward
can tell apart, and the rate of each way is an argument.

The reasoning names what the image shows *and* the letter of that option, so that a small model can learn the two
steps one after the other: see, then look the word up in the list.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medr1_verl.errors import UserError
from medr1_verl.prompt import LETTERS
from medr1_verl.styles import STYLES


@dataclass(frozen=True)
class Noise:
    """Shares of the demonstrations, 0 to 1, each drawn apart from the others.

    ``wrong`` of them reason towards an option drawn at random, all alike, so towards the right one now and then.
    ``slip`` of them answer with a letter drawn at random, whatever they have reasoned. That draw leans to the front of
    the list: each letter is ``lean`` times as likely as the next (1: all alike). Language models answer multiple-choice
    questions with such a bias for a place (Zheng et al. 2024, "Large Language Models Are Not Robust Multiple Choice
    Selectors") and give answers that do not follow from what they wrote (Turpin et al. 2023, "Language Models Don't
    Always Say What They Think"). It earns nothing, because letters are dealt evenly, and a reward can take it away.
    ``malformed`` of them break the format in one of the ways of :data:`MALFORMATIONS`.
    """

    wrong: float = 0.2
    slip: float = 0.8
    lean: float = 4.0
    malformed: float = 0.35

    def letter(self, options: int, rng: random.Random) -> str:
        """The letter of a slip, one of ``options`` letters."""
        return rng.choices(LETTERS[:options], [self.lean**-place for place in range(options)])[0]


CLEAN = Noise(wrong=0.0, slip=0.0, malformed=0.0)


def reasoning(option: str, letter: str) -> str:
    """The text of the think block."""
    return f"The image shows {option} ({letter})."


def answer_text(style: str, option: str, letter: str, answer: str) -> str:
    """A well-formed answer in ``style``: each of its blocks, in its order, nothing between them.

    It reasons towards ``option``, whose letter is ``letter``, and answers ``answer``.
    """
    inside = {"think": reasoning(option, letter), "answer": answer}
    return "".join(f"<{block}>{inside[block]}</{block}>" for block in STYLES[style].blocks)


# Each breaks a rule of the strict reward: a block missing, a block not closed, text outside the blocks.
MALFORMATIONS = ("answer tags missing", "answer not closed", "text after the blocks")


def _malform(text: str, letter: str, way: str) -> str:
    if way == "answer tags missing":
        return text.replace(f"<answer>{letter}</answer>", letter)
    if way == "answer not closed":
        return text.replace(f"<answer>{letter}</answer>", f"<answer>{letter}")
    return f"{text} {letter}."


def demonstrations(
    rows: Iterable[Mapping[str, Any]], seed: int = 0, noise: Noise | None = None
) -> list[dict[str, Any]]:
    """One demonstration for each row that has options: ``{"messages": [user, assistant], "images": ...}``.

    ``rows`` are rows of the converted parquet; the user turn and the images are taken over as they are, so that verl's
    supervised trainer reads the result (``messages`` and ``images`` columns). The same rows, seed and noise give the
    same demonstrations; draw them anew with another seed for each epoch, or the noise is learnt by heart.

    Raises :class:`UserError` where no row has options.
    """
    noise = Noise() if noise is None else noise
    rng = random.Random(f"demonstrations {seed}")
    made = []
    for row in rows:
        info = row["extra_info"]
        options: Sequence[str] = info["options"]
        if not options:
            continue
        place = LETTERS.index(info["answer"])
        if rng.random() < noise.wrong:
            place = rng.randrange(len(options))
        answer = letter = LETTERS[place]
        if rng.random() < noise.slip:
            answer = noise.letter(len(options), rng)
        text = answer_text(info["style"], options[place], letter, answer)
        if rng.random() < noise.malformed:
            text = _malform(text, answer, rng.choice(MALFORMATIONS))
        messages = [dict(turn) for turn in row["prompt"]] + [{"role": "assistant", "content": text}]
        made.append({"messages": messages, "images": row["images"]})
    if not made:
        raise UserError("no row has options: demonstrations are made for multiple-choice rows only")
    return made
