"""Questions of other benchmarks: one JSON object a line, images as files beside it (docs/evaluation.md)."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from medr1_verl.errors import UserError
from medr1_verl.evaluation.questions import Question
from medr1_verl.parsing import option_letter
from medr1_verl.prompt import LETTERS, Template, render_prompt

YES_NO = ("yes", "no")


def read_jsonl(file: Path, style: str = "think", template: Template | None = None) -> list[Question]:
    """The questions of ``file``; an answer "yes" or "no" without options makes a closed question of these two.

    Raises :class:`UserError` naming the line for one that is no question, whose answer is none of its options, or
    whose image is missing.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    digests: dict[Path, str] = {}
    questions = [
        _question(file, number, line, style, template, digests) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not questions:
        raise UserError(f"{file}: has no rows")
    return questions


def _question(
    file: Path, number: int, line: str, style: str, template: Template | None, digests: dict[Path, str]
) -> Question:
    where = f"{file}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: is no JSON object")
    lacking = [key for key in ("image", "question", "answer") if row.get(key) in (None, "", [])]
    if lacking:
        raise UserError(f"{where}: has no {', '.join(lacking)}")
    options = row.get("options") or ()
    if not isinstance(options, (list, tuple)) or len(options) == 1 or len(options) > len(LETTERS):
        raise UserError(f"{where}: options must be a list of 2 to {len(LETTERS)} texts, or absent")
    options = tuple(str(option) for option in options)
    answer = str(row["answer"]).strip()
    if not options and answer.lower().rstrip(".") in YES_NO:
        options = YES_NO
    if options:
        letter = option_letter(answer, options)
        if not letter:
            raise UserError(f"{where}: answer {answer!r} is none of its options, or fits two of them")
        answer = letter
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    paths = [file.parent / str(image) for image in images]
    dataset = str(row.get("dataset") or file.stem)
    modality = str(row.get("modality") or "other")
    return Question(
        question_id=str(row.get("question_id") or f"{file.stem}_{number}"),
        data_source=f"{dataset}/{modality}",
        dataset=dataset,
        modality=modality,
        question_type=str(row.get("question_type") or ("closed" if options else "open")),
        style=style,
        messages=({"role": "user", "content": render_prompt(row["question"], options, style, len(paths), template)},),
        question=str(row["question"]),
        options=options,
        answer=answer,
        image_sha256="\n".join(_sha256(path, where, digests) for path in paths),
        load_images=partial(_load, paths, where),
    )


def _sha256(path: Path, where: str, digests: dict[Path, str]) -> str:
    if path not in digests:
        try:
            digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{where}: image {path}: {error.strerror}") from error
    return digests[path]


def _load(paths: list[Path], where: str) -> list[Image.Image]:
    pictures: list[Any] = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                pictures.append(picture.convert("RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{where}: image {path} cannot be read: {error}") from error
    return pictures
