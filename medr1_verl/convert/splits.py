"""The published split files of Med-R1: reading them, and joining them with the raw questions.

A split file is ``<folder>/{train,test}/<modality or question type>_{train,test}.json``, a list of
``{"image": "Images/...", "problem": "<question> A)..., B)...", "solution": "<answer> C </answer>"}``. Their
rows decide membership and order. Where the raw question is there, its own fields are used (and its gold answer must
agree); where it is not, the options are parsed back out of the problem and the rest comes from ``recover``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from medr1_verl.convert import recover
from medr1_verl.convert.check import check_options, match_gold
from medr1_verl.convert.question import RawRow, RejectedError
from medr1_verl.convert.readers import SourceFile, json_files, load_json_rows, row_fault
from medr1_verl.errors import UserError
from medr1_verl.prompt import LETTERS
from medr1_verl.taxonomy import modality_slug, question_type_slug

# White space before the letter, because DRIMDB asks about "image quality assessment (IQA)".
_FIRST = re.compile(r"(?:(?<=\s)|^)A\)")
_SOLUTION = re.compile(r"\s*<answer>\s*([A-Z])\s*</answer>\s*")
_NEXT = [re.compile(rf",\s+{letter}\)") for letter in LETTERS]
_SPLITS = ("train", "test")


def parse_problem(problem: str) -> tuple[str, list[str]]:
    """(question, options) of a problem text; raises ``bad_options`` unless there is just one way to read it.

    Options hold commas and parentheses, so the only mark of an option is ", " and the next letter with ")".
    """
    starts = list(_FIRST.finditer(problem))
    if len(starts) != 1:
        raise RejectedError("bad_options", f'{len(starts)} places where the options could begin ("A)")')
    question, rest = problem[: starts[0].start()].strip(), problem[starts[0].end() :]
    options = []
    for letter, mark in zip(LETTERS[1:], _NEXT[1:], strict=True):
        parts = mark.split(rest)
        if len(parts) > 2:
            places = f'{len(parts) - 1} places where option {letter} could begin (", {letter})")'
            raise RejectedError("bad_options", places)
        options.append(parts[0].strip())
        if len(parts) == 1:
            break
        rest = parts[1]
    return question, options


def render_problem(question: str, options: Iterable[str]) -> str:
    """The problem text that the published files give to a question: what :func:`parse_problem` takes apart."""
    lettered = ", ".join(f"{letter}){option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question} {lettered}"


def parse_solution(solution: object) -> str:
    """The letter in ``<answer> C </answer>``; raises ``bad_row``."""
    found = _SOLUTION.fullmatch(solution) if isinstance(solution, str) else None
    if not found:
        raise RejectedError("bad_row", f"the solution {solution!r:.60} is not <answer> X </answer>")
    return found.group(1)


def _key(image: str, problem: str) -> tuple[str, str]:
    return image, " ".join(problem.split())


class RawIndex:
    """Raw questions by image and rendered problem text."""

    def __init__(self, rows: Iterable[RawRow]):
        self._rows: dict[tuple[str, str], list[RawRow]] = {}
        self.rows = 0
        for raw in rows:
            self.rows += 1
            if raw.fault or not isinstance(raw.question, str) or not isinstance(raw.images, list):
                continue
            try:
                options = check_options(raw.options)
            except RejectedError:
                continue
            problem = render_problem(raw.question, options)
            self._rows.setdefault(_key(str(raw.images[0]), problem), []).append(raw)

    def take(self, image: str, problem: str) -> RawRow | None:
        """The raw row of a split row; of several equal ones each is handed out once."""
        rows = self._rows.get(_key(image, problem))
        return rows.pop(0) if rows else None


def _split_files(folder: Path) -> list[tuple[str, Path]]:
    if folder.is_file():
        return [("test" if folder.stem.endswith("_test") else "train", folder)]
    files = [(split, path) for split in _SPLITS for path in json_files(folder / split)]
    if files:
        return files
    inside = [name for name in ("modality", "question_type") if (folder / name / "train").is_dir()]
    hint = f"; give {' or '.join(str(folder / name) for name in inside)}" if inside else ""
    raise UserError(f"no split files in {folder}: expected train/*.json and test/*.json there{hint}")


def _slice_of(path: Path) -> str:
    return re.sub(r"_(?:train|test)$", "", path.stem)


class _Sibling:
    """What the other published split says about the same rows: image and problem -> modality or question type slug.

    Med-R1 publishes every row twice, in ``Splits/modality`` and in ``Splits/question_type``. Read only if needed.
    """

    def __init__(self, folder: Path):
        other = {"modality": "question_type", "question_type": "modality"}.get(folder.resolve().name)
        self.folder = folder.resolve().parent / other if other else None
        self._slugs: dict[tuple[str, str], str] | None = None

    def _load(self) -> dict[tuple[str, str], str]:
        slugs: dict[tuple[str, str], str] = {}
        if self.folder is None:
            return slugs
        for path in (path for split in _SPLITS for path in json_files(self.folder / split)):
            name = _slice_of(path)
            slug = modality_slug(name) or question_type_slug(name)
            if slug is None:
                continue
            for row in load_json_rows(path, path.name, []):
                if isinstance(row, dict) and isinstance(row.get("image"), str) and isinstance(row.get("problem"), str):
                    slugs[_key(row["image"], row["problem"])] = slug
        return slugs

    def slug(self, image: str, problem: str) -> str | None:
        if self._slugs is None:
            self._slugs = self._load()
        return self._slugs.get(_key(image, problem))


class SplitReader:
    """Rows of split files as :class:`RawRow`, with counts for the manifest in :attr:`notes`.

    ``folder`` holds ``train`` and ``test``, or is one split file.
    """

    def __init__(self, folder: Path, raw: RawIndex, files: list[SourceFile]):
        self.raw = raw
        self.files = files
        self.sibling = _Sibling(folder.parents[1] if folder.is_file() and len(folder.parents) > 1 else folder)
        self._label: tuple[str | None, str | None] = None, None  # slugs that the file's name gives
        self.paths = _split_files(folder)
        self.notes = {
            "split_rows": 0,
            "raw_rows": raw.rows,
            "joined_with_raw": 0,
            "recovered_from_text": 0,
            "raw_rows_in_no_split": 0,
        }

    def __iter__(self) -> Iterator[RawRow]:
        for split, path in self.paths:
            name = f"{split}/{path.name}"
            label = _slice_of(path)
            self._label = modality_slug(label), question_type_slug(label)
            for number, row in enumerate(load_json_rows(path, name, self.files)):
                self.notes["split_rows"] += 1
                raw = RawRow(name, number, gold_kind="letter", split=split)
                raw.fault = row_fault(row)
                try:
                    if not raw.fault:
                        self._fill(raw, row)
                except RejectedError as error:
                    raw.fault = (error.reason, error.message)
                yield raw
        self.notes["raw_rows_in_no_split"] = self.raw.rows - self.notes["joined_with_raw"]

    def _fill(self, raw: RawRow, row: dict[str, Any]) -> None:
        image, problem = row.get("image"), row.get("problem")
        if not isinstance(image, str) or not isinstance(problem, str):
            raise RejectedError("bad_row", "image or problem is missing or not text")
        letter = parse_solution(row.get("solution"))
        raw.images = [image]
        raw.gold = letter
        source = self.raw.take(image, problem)
        if source is not None:
            self.notes["joined_with_raw"] += 1
            self._from_raw(raw, source, letter)
        else:
            self.notes["recovered_from_text"] += 1
            self._from_text(raw, image, problem, letter)

    def _from_raw(self, raw: RawRow, source: RawRow, letter: str) -> None:
        raw.question_id, raw.dataset, raw.question = source.question_id, source.dataset, source.question
        raw.modality, raw.question_type, raw.options = source.modality, source.question_type, source.options
        own = match_gold(source.gold, check_options(source.options))
        if own != letter:
            where = f"row {source.row} of {source.file}"
            raise RejectedError("ambiguous_gold", f"the split file says {letter}, {where} says {own}")

    def _from_text(self, raw: RawRow, image: str, problem: str, letter: str) -> None:
        digest = hashlib.sha256(f"{image}\n{problem}".encode("utf-8", "replace")).hexdigest()[:12]
        question, options = parse_problem(problem)
        dataset = recover.dataset_of(image)
        raw.dataset = dataset or "unknown"
        raw.question_id = f"{raw.dataset}_{digest}"
        raw.question, raw.options = question, options
        index = LETTERS.index(letter)
        gold = options[index] if index < len(options) else ""
        modality, question_type = self._label
        if modality is None:
            modality = recover.modality_of(image) or (self.sibling.slug(image, problem) if question_type else None)
        if question_type is None:
            question_type = self.sibling.slug(image, problem)
        if question_type is None:
            question_type = recover.question_type_of(image, modality, question, gold)
        raw.modality = modality or f"not in the text, the file name or the path {image[:60]}"
        raw.question_type = question_type or "not in the text or the file name"
