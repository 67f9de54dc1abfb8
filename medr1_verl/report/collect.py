"""What the page shows, read from run folders, data and audit logs. Whatever is missing is named, and the rest shown."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from medr1_verl.audit.log import read_answers
from medr1_verl.audit.trail import picture_sha256
from medr1_verl.audit.verify import verify
from medr1_verl.errors import UserError
from medr1_verl.evaluation.predictions import FILE_NAME, read_rows
from medr1_verl.evaluation.questions import parquet_files
from medr1_verl.parsing import reasoning
from medr1_verl.reasoning_quality import Column, Quality, column_of, difference

_PATH = re.compile(r"(?<![\w.<])(?:file:/)?/(?:[^\s/<>'\"]+/)+")
BEFORE = "before.jsonl"
"""Answers of the model before training, as the recipe keeps them."""


def public_text(text: str) -> str:
    """The text with every absolute path cut to its last part: folders often name people and machines."""
    return _PATH.sub("", text)


@dataclass
class Picture:
    """An image of the data: its bytes as stored, and the digest of its pixels that audit records name."""

    data: bytes
    suffix: str

    @property
    def uri(self) -> str:
        kind = {"jpg": "jpeg"}.get(self.suffix, self.suffix)
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"


@dataclass
class Answers:
    """The browser's content: questions, columns (model, control, decoding) and one answer for each pair asked."""

    questions: list[dict[str, Any]] = field(default_factory=list)
    columns: list[dict[str, str]] = field(default_factory=list)
    answers: list[list[Any]] = field(default_factory=list)
    pictures: dict[str, Picture] = field(default_factory=dict)


def prediction_files(folder: Path) -> list[Path]:
    """Those of a run folder (with the answers before training), or of the runs one level below."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run folder, or what medr1 evaluate wrote")
    own = [file for file in (folder / FILE_NAME, folder / BEFORE) if file.is_file()]
    return own or sorted(folder.glob(f"*/{FILE_NAME}"))


def read_predictions(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of all files. A question answered twice under one model, control and decoding is a UserError."""
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, Column]] = set()
    for file in files:
        for row in read_rows(file):
            lacking = [key for key in ("output", "pred", "modality", "question_type", "image_sha256") if key not in row]
            if lacking:
                raise UserError(f"{file}: question {row['question_id']!r} lacks {lacking[0]}; was it written by medr1?")
            key = row["question_id"], column_of(row)
            if key in seen:
                raise UserError(
                    f"{file}: model {row.get('model')!r} answers question {row['question_id']!r} twice; "
                    "give every run once, evaluated under its own --name"
                )
            seen.add(key)
            rows.append(row)
    return rows


# --- the data: question texts and images ----------------------------------------------------------------------------


def read_data(paths: Sequence[Path], wanted: set[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Picture], int]:
    """(question and picture keys by question id, pictures by key, images that could not be read)."""
    questions: dict[str, dict[str, Any]] = {}
    pictures: dict[str, Picture] = {}
    lost = 0
    for file in parquet_files([str(path) for path in paths]):
        try:
            table = pq.read_table(file, columns=["extra_info", "images"], memory_map=True)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise UserError(
                f"{file}: cannot be read as a parquet of medr1 convert: {str(error).splitlines()[0]}"
            ) from error
        images = table.column("images")
        infos = table.column("extra_info").to_pylist()
        for number, info in enumerate(tqdm(infos, desc=f"images of {file.name}", delay=2)):
            if info["question_id"] not in wanted:
                continue
            keys = []
            for cell in images[number].as_py() or []:
                key, picture = _picture(cell)
                lost += picture is None
                if picture is not None:
                    pictures.setdefault(key, picture)
                    keys.append(key)
            questions[info["question_id"]] = {
                "question": info["question"],
                "images": keys,
                "image_sha256": info["image_sha256"],
            }
    return questions, pictures, lost


def _picture(cell: dict[str, Any]) -> tuple[str, Picture | None]:
    """(key, picture); None for an image that is not there any more, or that is none. Other formats become PNG."""
    try:
        data = cell.get("bytes")
        if data is None:
            data = Path(str(cell["image"]).removeprefix("file://")).read_bytes()
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            suffix = "png"
        elif data[:3] == b"\xff\xd8\xff":
            suffix = "jpg"
        else:
            with Image.open(io.BytesIO(data)) as image:
                file = io.BytesIO()
                image.convert("RGB").save(file, "PNG")
            data, suffix = file.getvalue(), "png"
    except (OSError, KeyError, SyntaxError, Image.DecompressionBombError):
        return "", None
    return hashlib.sha256(data).hexdigest()[:24], Picture(data, suffix)


# --- the audit logs -------------------------------------------------------------------------------------------------


@dataclass
class Audit:
    """What the logs beside the predictions say: their state in words, and the picture each answer was given to."""

    lines: list[str] = field(default_factory=list)
    seen: dict[tuple[str, Column], list[str]] = field(default_factory=dict)
    contexts: list[dict[str, Any]] = field(default_factory=list)


def read_audit(folders: Iterable[Path]) -> Audit:
    audit = Audit()
    for folder in folders:
        for log in sorted(folder.glob("*audit*.jsonl")) if folder.is_dir() else []:
            try:
                report = verify(log)
                if report.good:
                    audit.lines.append(
                        f"{log.name}: complete and unaltered, {report.answers} answers, root {report.root}"
                    )
                else:
                    audit.lines.append(f"{log.name}: NOT VALID, {report.faults[0]}")
                for record in read_answers(log):
                    context = record["context"]
                    if context and context not in audit.contexts:
                        audit.contexts.append(context)
                    seen = [image["seen_sha256"] for image in record["images"] if image["seen_sha256"]]
                    if seen and record["question_id"]:
                        column = context.get("model", {}).get("name", ""), record["control"], record["decoding"]
                        audit.seen[record["question_id"], column] = seen
            except UserError as error:
                audit.lines.append(public_text(str(error)))
    return audit


# --- put together ---------------------------------------------------------------------------------------------------


def collect_answers(
    rows: Sequence[dict[str, Any]], qualities: Sequence[Quality | None], data: Sequence[Path], audit: Audit
) -> tuple[Answers, list[str]]:
    """The browser's content, and what is missing in it, in words."""
    content = Answers()
    notes: list[str] = []
    known: dict[str, dict[str, Any]] = {}
    if data:
        known, content.pictures, lost = read_data(data, {row["question_id"] for row in rows})
        if lost:
            notes.append(f"{lost} images could not be read: were they moved since the conversion?")
    else:
        notes.append("question texts and images are not shown: the data was not given (--data)")
    by_pixels = _by_pixels(content.pictures, audit)
    own_reasoning = {
        (row["question_id"], column_of(row)[0], column_of(row)[2]): reasoning(row["output"])
        for row in rows
        if row.get("control", "none") == "none"
    }
    numbers: dict[str, int] = {}
    columns: dict[Column, int] = {}
    foreign = 0
    for row, quality in zip(rows, qualities, strict=True):
        plain = row.get("control", "none") != "relettered"
        data_row = known.get(row["question_id"])
        if data_row is not None and data_row["image_sha256"] != row["image_sha256"]:
            data_row = None
            foreign += 1
        number = numbers.setdefault(row["question_id"], len(content.questions))
        if number == len(content.questions):
            content.questions.append(
                {
                    "id": row["question_id"],
                    "modality": row["modality"],
                    "type": row["question_type"],
                    "dataset": row.get("dataset", ""),
                    "question": data_row["question"] if data_row else None,
                    "options": list(row.get("options") or []) if plain else [],
                    "answer": row.get("answer") if plain else None,
                    "images": data_row["images"] if data_row else [],
                }
            )
        question = content.questions[number]
        if plain and question["answer"] is None:
            question["options"], question["answer"] = list(row.get("options") or []), row.get("answer")
        column = column_of(row)
        place = columns.setdefault(column, len(columns))
        if place == len(content.columns):
            content.columns.append(dict(zip(("model", "control", "decoding"), column, strict=True)))
        seen = [by_pixels[digest] for digest in audit.seen.get((row["question_id"], column), []) if digest in by_pixels]
        extra: dict[str, Any] = {}
        if not plain:
            extra["options"], extra["answer"] = list(row.get("options") or []), row.get("answer")
        if seen and seen != question["images"]:
            extra["seen"] = seen
        if quality is not None:
            extra["quality"] = [
                quality.modality,
                quality.names_answer,
                quality.contradicts,
                round(quality.template, 3),
                _change(row, own_reasoning),
            ]
        if row.get("truncated"):
            extra["cut"] = 1
        content.answers.append([number, place, row["output"], row["pred"], row["acc"], row.get("format"), extra])
    if foreign:
        notes.append(f"{foreign} answers are to other images than the data given has; their images are not shown")
    used = {key for q in content.questions for key in q["images"]}
    used |= {key for answer in content.answers for key in answer[6].get("seen", [])}
    content.pictures = {key: picture for key, picture in content.pictures.items() if key in used}
    return content, notes


def _by_pixels(pictures: dict[str, Picture], audit: Audit) -> dict[str, str]:
    """Key of a picture by the digest of its pixels, where the logs name such digests."""
    if not audit.seen:
        return {}
    found = {}
    for key, picture in tqdm(pictures.items(), desc="pixels of the images", delay=2):
        with Image.open(io.BytesIO(picture.data)) as image:
            found[picture_sha256(image.convert("RGB"))] = key
    return found


def _change(row: dict[str, Any], own: dict[tuple[str, str, str], str]) -> float | None:
    model, control, decoding = column_of(row)
    if control in ("none", "relettered"):
        return None
    before = own.get((row["question_id"], model, decoding))
    return round(difference(before, reasoning(row["output"])), 3) if before else None


def read_json(path: Path) -> dict[str, Any] | None:
    """An object from a JSON file, None where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
