"""Test rows as the evaluation sees them, read from the converter's parquet."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from medr1_verl.errors import UserError
from medr1_verl.prompt import IMAGE_MARK, LETTERS, Template, render_prompt
from medr1_verl.styles import STYLES

_COLUMNS = ("data_source", "prompt", "images", "reward_model", "extra_info")
_INFO = ("question_id", "modality", "question_type", "question", "options", "answer", "image_sha256", "style")


@dataclass(frozen=True)
class Question:
    """One row: what is asked (``messages``, with one ``<image>`` mark per picture), of which pictures, and the answer.

    ``messages`` are the row's own, so that a model is asked exactly what it was trained on. ``answer`` is the option
    letter; for an open question ``options`` is empty and ``answer`` is the text.
    """

    question_id: str
    data_source: str
    dataset: str
    modality: str
    question_type: str
    style: str
    messages: tuple[dict[str, str], ...]
    question: str
    options: tuple[str, ...]
    answer: str
    image_sha256: str
    load_images: Callable[[], list[Image.Image]]

    @property
    def n_images(self) -> int:
        return sum(message["content"].count(IMAGE_MARK) for message in self.messages)

    @property
    def gold(self) -> int:
        """Index of the right option."""
        return LETTERS.index(self.answer)

    def rendered(self, style: str, template: Template | None = None) -> Question:
        """The same question asked in another style or by a template of the user's."""
        text = render_prompt(self.question, self.options, style, self.n_images, template)
        return replace(self, style=style, messages=({"role": "user", "content": text},))


def read_questions(
    paths: Sequence[str | Path],
    limit: int | None = None,
    style: str | None = None,
    template: Template | None = None,
) -> list[Question]:
    """All rows of the parquet and JSONL files in ``paths``; a directory stands for the ``test.parquet`` files in it.

    ``limit`` keeps the first rows of every modality x question type in turn, so that a short run still touches all of
    them. ``style`` and ``template`` ask the rows anew instead of with their own prompt. Raises :class:`UserError` for
    a file that is missing, empty or no such parquet, and for a question id that occurs twice.
    """
    if style is not None and style not in STYLES:
        raise UserError(f"style {style!r} is not one of {', '.join(STYLES)}")
    from medr1_verl.evaluation.external import read_jsonl

    files = parquet_files(paths)
    questions = [
        question
        for file in files
        for question in (read_jsonl(file, style or "think", template) if file.suffix == ".jsonl" else _read(file))
    ]
    seen: set[str] = set()
    for question in questions:
        if question.question_id in seen:
            raise UserError(
                f"question id {question.question_id!r} occurs twice in {', '.join(map(str, files))}; "
                "give files that do not overlap"
            )
        seen.add(question.question_id)
    if limit is not None:
        questions = spread(questions, limit)
    if style is not None or template is not None:
        questions = [question.rendered(style or question.style, template) for question in questions]
    return questions


def spread(questions: Iterable[Question], limit: int) -> list[Question]:
    """``limit`` questions, drawn round by round from every modality x question type, in the order of the file."""
    rounds: dict[tuple[str, str], int] = {}
    ranked = []
    for position, question in enumerate(questions):
        cell = (question.modality, question.question_type)
        rounds[cell] = rounds.get(cell, -1) + 1
        ranked.append((rounds[cell], position, question))
    chosen = sorted(ranked, key=lambda item: item[:2])[:limit]
    return [question for _, _, question in sorted(chosen, key=lambda item: item[1])]


def parquet_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files that :func:`read_questions` reads. Raises :class:`UserError` where there are none."""
    return [file for path in paths for file in _parquet_files(Path(path))]


def _parquet_files(path: Path) -> list[Path]:
    if path.is_dir():
        own = path / "test.parquet"
        found = [own] if own.is_file() else sorted(path.glob("*/test.parquet"))
        if not found:
            raise UserError(f"{path}: no test.parquet in it; give what `medr1 convert` wrote, or one parquet file")
        return found
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the test.parquet that `medr1 convert` wrote")
    return [path]


def _read(file: Path) -> list[Question]:
    try:
        table = pq.read_table(file, columns=None, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as parquet: {str(error).splitlines()[0]}") from error
    missing = [column for column in _COLUMNS if column not in table.column_names]
    if missing:
        raise UserError(f"{file}: no column {', '.join(missing)}; this is not a parquet of `medr1 convert`")
    if not table.num_rows:
        raise UserError(f"{file}: has no rows; convert with a larger --test-fraction, or give another file")
    images = table.column("images")
    rows = table.select([column for column in _COLUMNS if column != "images"]).to_pylist()
    return [_question(file, number, row, images) for number, row in enumerate(rows)]


def _question(file: Path, number: int, row: dict[str, Any], images: pa.ChunkedArray) -> Question:
    info = row["extra_info"] or {}
    lacking = [key for key in _INFO if info.get(key) is None and key != "options"]
    if lacking:
        raise UserError(f"{file}, row {number}: extra_info has no {', '.join(lacking)}; convert the data again")
    options = tuple(info.get("options") or ())
    answer = str((row["reward_model"] or {}).get("ground_truth"))
    if options and (len(answer) != 1 or answer not in LETTERS[: len(options)]):
        raise UserError(f"{file}, row {number}: ground truth {answer!r} is no letter of its {len(options)} options")
    if info["style"] not in STYLES:
        raise UserError(f"{file}, row {number}: style {info['style']!r} is not one of {', '.join(STYLES)}")
    return Question(
        question_id=str(info["question_id"]),
        data_source=row["data_source"],
        dataset=str(info.get("dataset") or ""),
        modality=info["modality"],
        question_type=info["question_type"],
        style=info["style"],
        messages=tuple({"role": message["role"], "content": message["content"]} for message in row["prompt"]),
        question=info["question"],
        options=options,
        answer=answer,
        image_sha256=info["image_sha256"],  # one line for each image of the row
        load_images=lambda: _decode(file, number, images[number].as_py()),
    )


def _decode(file: Path, number: int, cells: list[dict[str, Any]]) -> list[Image.Image]:
    pictures = []
    for cell in cells or []:
        try:
            if cell.get("bytes") is not None:
                picture = Image.open(io.BytesIO(cell["bytes"]))
            else:
                picture = Image.open(str(cell["image"]).removeprefix("file://"))
            pictures.append(picture.convert("RGB"))
        except (OSError, KeyError, SyntaxError, Image.DecompressionBombError) as error:
            where = cell.get("image") or "the stored bytes"
            raise UserError(f"{file}, row {number}: image cannot be read from {where}: {error}") from error
    return pictures
