"""Readers: files of questions -> :class:`RawRow`, one after the other, in a fixed order.

A reader is a function ``(root: Path, files: list[SourceFile]) -> Iterator[RawRow]``: it appends to ``files`` what it
has read and yields rows as they stand; nothing is judged here but whether a row can be taken apart at all. A file that
cannot be read as a whole ends the run (:class:`UserError`), because skipping it would silently lose its questions.

* :func:`read_omnimedvqa`  ``QA_information/{Open,Restricted}-access/*.json`` below an OmniMedVQA root
* :func:`read_table`       a plain ``.jsonl``, ``.json`` or ``.csv`` with image, question, options, answer, modality
* ``splits.read_splits``   the published Med-R1 split files
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medr1_verl.convert.question import RawRow
from medr1_verl.errors import UserError
from medr1_verl.prompt import LETTERS

ACCESS_FOLDERS = {
    "open": ("Open-access",),
    "restricted": ("Restricted-access",),
    "all": ("Open-access", "Restricted-access"),
}
TABLE_SUFFIXES = (".jsonl", ".json", ".csv")


@dataclass
class SourceFile:
    """One file of questions, for the manifest."""

    name: str
    rows: int
    sha256: str
    encoding: str

    def as_dict(self) -> dict[str, object]:
        return {"file": self.name, "rows": self.rows, "sha256": self.sha256, "encoding": self.encoding}


class _RepeatedKey(dict):
    """A JSON object with a key twice: which of the two values counts is anyone's guess."""

    key = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = _RepeatedKey(found)
    names = [name for name, _ in pairs]
    repeated.key = next(name for name in names if names.count(name) > 1)
    return repeated


def read_text(path: Path) -> tuple[str, str, str]:
    """(text, encoding, SHA-256) of a file in UTF-8 (with or without BOM), UTF-16 with BOM, or else Latin-1."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    digest = hashlib.sha256(data).hexdigest()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings: tuple[str, ...] = ("utf-16",)
    elif data.startswith(b"\xef\xbb\xbf"):
        encodings = ("utf-8-sig",)
    else:
        encodings = ("utf-8", "latin-1")
    for encoding in encodings:
        try:
            return data.decode(encoding), encoding, digest
        except UnicodeDecodeError:
            continue
    raise UserError(f"cannot read {path}: its byte-order mark says {encodings[0]}, its bytes are something else")


def parse_json(text: str, name: str) -> Any:
    """The value of a JSON text; any fault is one line that says where."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not usable JSON: {error}") from None


def load_json_rows(path: Path, name: str, files: list[SourceFile]) -> list[Any]:
    """The list of rows in a JSON file, noted in ``files``."""
    text, encoding, digest = read_text(path)
    rows = parse_json(text, name)
    if not isinstance(rows, list):
        raise UserError(f"{name} is not a list of questions but a {type(rows).__name__}")
    files.append(SourceFile(name, len(rows), digest, encoding))
    return rows


def row_fault(row: object) -> tuple[str, str] | None:
    """Why ``row`` is not an object with unambiguous fields, or None."""
    if not isinstance(row, dict):
        return "bad_row", f"the row is a {type(row).__name__}, not an object with fields"
    if isinstance(row, _RepeatedKey):
        return "bad_row", f"the field {row.key!r} is there twice"
    return None


# ------------------------------------------------------------------------------------------- raw OmniMedVQA


def lettered_options(row: dict[str, Any]) -> tuple[list[object], str | None]:
    """``option_A`` ... in letter order, and what is wrong with the letters, if anything.

    Rows of two or three options lack the other keys, or carry null there (some re-exports do).
    """
    given = {key[7:]: value for key, value in row.items() if key.startswith("option_")}
    if unknown := [key for key in given if len(key) != 1 or key not in LETTERS]:
        return [], f"option_{unknown[0]} is not an option letter"
    present = [letter for letter in LETTERS if given.get(letter) is not None]
    if present != list(LETTERS[: len(present)]):
        return [], "option letters with a gap: " + ", ".join(present)
    return [given[letter] for letter in present], None


def omnimedvqa_row(row: object, file: str, number: int) -> RawRow:
    """One row of a raw ``QA_information`` file.

    One row of "Chest CT Scan" is keyed ``modality`` instead of ``modality_type``; both are read.
    """
    if fault := row_fault(row):
        return RawRow(file, number, fault=fault)
    assert isinstance(row, dict)
    options, problem = lettered_options(row)
    raw = RawRow(
        file=file,
        row=number,
        question_id=row.get("question_id"),
        dataset=row.get("dataset"),
        modality=row.get("modality_type", row.get("modality")),
        question_type=row.get("question_type"),
        question=row.get("question"),
        options=options,
        gold=row.get("gt_answer"),
        images=[row["image_path"]] if row.get("image_path") is not None else None,
    )
    if problem:
        raw.fault = ("bad_options", problem)
    return raw


def json_files(folder: Path) -> list[Path]:
    """The JSON files of ``folder`` in name order, without the hidden ones: macOS leaves a "._x.json" beside each."""
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))


def read_omnimedvqa(root: Path, files: list[SourceFile], access: str = "open") -> Iterator[RawRow]:
    """Every question of an OmniMedVQA root, file by file in name order."""
    information = root / "QA_information"
    paths: list[Path] = []
    for folder in ACCESS_FOLDERS[access]:
        paths += json_files(information / folder)
    if not paths:
        wanted = " or ".join(f"QA_information/{folder}/*.json" for folder in ACCESS_FOLDERS[access])
        raise UserError(f"no questions in {root}: expected {wanted} there (the root of the unzipped OmniMedVQA)")
    for path in paths:
        name = path.relative_to(root).as_posix()
        for number, row in enumerate(load_json_rows(path, name, files)):
            yield omnimedvqa_row(row, name, number)


# ------------------------------------------------------------------------------- plain JSONL, JSON and CSV tables


def _table_options(row: dict[str, Any]) -> tuple[object, tuple[str, str] | None]:
    """Options as a list, as ``{"A": ...}``, as text split by ``|``, or as the columns option_A, option_B, ..."""
    options = row.get("options")
    if isinstance(options, str) and options.strip().startswith(("[", "{")):
        try:
            options = json.loads(options)
        except ValueError:
            return None, ("bad_options", "the options look like JSON but are not")
    if isinstance(options, str):
        return options.split("|"), None
    if isinstance(options, dict):
        row = {f"option_{key}": value for key, value in options.items()}
        options = None
    if options is not None:
        return options, None
    lettered = {key: value for key, value in row.items() if key.startswith("option_") and value != ""}
    values, problem = lettered_options(lettered)
    return values, ("bad_options", problem) if problem else None


def _table_images(row: dict[str, Any]) -> object:
    """``images`` (a list, a JSON list in a cell, or paths split by ``|``) or ``image`` / ``image_path``."""
    for key in ("images", "image", "image_path"):
        value = row.get(key)
        if value is None or value == "":
            continue
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except ValueError:
                return [value]
        if isinstance(value, str):
            return [part.strip() for part in value.split("|")] if key == "images" else [value]
        return value
    return None


def table_row(row: object, file: str, number: int) -> RawRow:
    """One row of a plain table. Needed: image or images, question, options, answer, modality. Taken if there:
    question_id, question_type (else other_biological_attributes), dataset (else the file's name), split.
    """
    if fault := row_fault(row):
        return RawRow(file, number, fault=fault)
    assert isinstance(row, dict)
    stem = Path(file).stem
    options, option_fault = _table_options(row)

    def given(*keys: str, default: object = None) -> object:
        return next((row[key] for key in keys if row.get(key) not in (None, "")), default)

    split = given("split")
    if split not in (None, "train", "test"):
        option_fault = option_fault or ("bad_row", f"split is {split!r:.40}; it can be train or test")
        split = None
    return RawRow(
        file=file,
        row=number,
        question_id=given("question_id", "id", default=f"{stem}_{number:06d}"),
        dataset=given("dataset", default=stem),
        modality=given("modality", "modality_type"),
        question_type=given("question_type", default="other_biological_attributes"),
        question=given("question"),
        options=options,
        gold=given("answer", "gt_answer"),
        gold_kind="either",
        images=_table_images(row),
        split=split if isinstance(split, str) else None,
        fault=option_fault,
    )


def _csv_rows(text: str, name: str) -> list[Any]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        fields = reader.fieldnames or []
        if len(set(fields)) != len(fields):
            raise UserError(f"{name}: a column name is there twice: {', '.join(fields)}")
        rows: list[Any] = []
        for row in reader:
            extra = row.pop(None, None)
            rows.append(dict(row) if not extra else "a row with more cells than the header has columns")
        return rows
    except csv.Error as error:
        raise UserError(f"{name} is not usable CSV: {error}") from None


def read_table(path: Path, files: list[SourceFile]) -> Iterator[RawRow]:
    """Questions of one JSONL, JSON or CSV file; images are relative to the folder that holds the file."""
    name = path.name
    text, encoding, digest = read_text(path)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        rows = _csv_rows(text, name)
    elif suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [parse_json(line, f"{name}, line {number}") for number, line in lines]
    else:
        rows = parse_json(text, name)
        if not isinstance(rows, list):
            raise UserError(f"{name} is not a list of questions but a {type(rows).__name__}")
    files.append(SourceFile(name, len(rows), digest, encoding))
    for number, row in enumerate(rows):
        yield table_row(row, name, number)
