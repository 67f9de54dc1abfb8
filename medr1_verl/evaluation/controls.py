"""The same rows with the image, or the order of the options, taken away: what is left of the accuracy?

* blank       a uniform mid-grey picture of the same size
* shuffled    the pictures of another row of the same slice, never a row with the same image
* text-only   no picture and no mark for one
* relettered  the row's own picture, its options in another order, so that the right letter moves
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from PIL import Image

from medr1_verl.errors import UserError
from medr1_verl.evaluation.questions import Question
from medr1_verl.prompt import IMAGE_MARK, LETTERS, Template, render_prompt

CONTROLS = ("none", "blank", "shuffled", "text-only", "relettered")
SLICES: dict[str, Callable[[Question], str]] = {
    "modality": lambda question: question.modality,
    "question_type": lambda question: question.question_type,
    "all": lambda question: "",
}
GREY = (128, 128, 128)


def apply_control(
    questions: Sequence[Question],
    control: str,
    seed: int = 0,
    shuffle_within: str = "modality",
    template: Template | None = None,
) -> list[Question]:
    """The questions under one control, in the same order, with the same ids. Deterministic in ``seed``.

    ``shuffle_within`` says which rows may lend their picture: those of the same modality (a picture of the right kind
    and the wrong content), of the same question type, or all. Note that a modality-recognition question keeps its
    right answer when the picture comes from the same modality. ``template`` is needed for ``relettered`` where the
    questions were rendered with one. Raises :class:`UserError` where a slice has a single image.
    """
    if control == "none":
        return list(questions)
    if control == "blank":
        return [replace(question, load_images=_blank(question)) for question in questions]
    if control == "text-only":
        return [_without_images(question) for question in questions]
    if control == "relettered":
        return [_relettered(question, seed, template) for question in questions]
    if control == "shuffled":
        donors = _donors(questions, SLICES[shuffle_within], shuffle_within, seed)
        return [
            replace(question, load_images=donor.load_images) for question, donor in zip(questions, donors, strict=True)
        ]
    raise UserError(f"control {control!r} is not one of {', '.join(CONTROLS)}")


def _blank(question: Question) -> Callable[[], list[Image.Image]]:
    return lambda: [Image.new("RGB", picture.size, GREY) for picture in question.load_images()]


def _without_images(question: Question) -> Question:
    messages = tuple(message | {"content": message["content"].replace(IMAGE_MARK, "")} for message in question.messages)
    return replace(question, messages=messages, load_images=list)


def _relettered(question: Question, seed: int, template: Template | None) -> Question:
    """Options in a drawn order that moves the right one to another letter (an open question stays as it is)."""
    if not question.options:
        return question
    drawn = row_random(seed, question.question_id)
    order = list(range(len(question.options)))
    while order.index(question.gold) == question.gold:
        drawn.shuffle(order)
    options = tuple(question.options[index] for index in order)
    text = render_prompt(question.question, options, question.style, question.n_images, template)
    return replace(
        question,
        options=options,
        answer=LETTERS[order.index(question.gold)],
        messages=({"role": "user", "content": text},),
    )


def _donors(
    questions: Sequence[Question], slice_of: Callable[[Question], str], within: str, seed: int
) -> list[Question]:
    """For each question another one of its slice with another image and the same number of images."""
    slices: dict[tuple[str, int], list[Question]] = defaultdict(list)
    for question in questions:
        slices[slice_of(question), question.n_images].append(question)
    donors = []
    for question in questions:
        members = slices[slice_of(question), question.n_images]
        drawn = row_random(seed, question.question_id)
        for _ in range(20):
            donor = members[drawn.randrange(len(members))]
            if donor.image_sha256 != question.image_sha256:
                break
        else:
            others = [member for member in members if member.image_sha256 != question.image_sha256]
            if not others:
                raise UserError(
                    f"control shuffled: no row of {within} {slice_of(question)!r} has another image than question "
                    f"{question.question_id!r}; take more rows, or shuffle within question_type or all"
                )
            donor = others[drawn.randrange(len(others))]
        donors.append(donor)
    return donors


def row_random(seed: int, question_id: str) -> random.Random:
    """A generator of this row's own: the same whichever rows are asked, in whatever order."""
    digest = hashlib.sha256(f"{seed}:{question_id}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
