"""The file of answers: one JSON line for every question under every control and decoding.

While a run is going on, its answers stand in ``<name>.partial``; the file gets its name when the last
answer is in, so that nothing half-written can be taken for a result. A later run goes on from either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from medr1_verl.errors import UserError

FILE_NAME = "predictions.jsonl"
# Promised keys (and ``control``); the others in a row are this project's own.
KEYS = (
    "question_id",
    "data_source",
    "modality",
    "question_type",
    "style",
    "output",
    "pred",
    "answer",
    "n_options",
    "acc",
    "format",
    "parsed",
    "image_sha256",
    "model",
)

Key = tuple[str, str, str]
"""(question id, control, decoding): what makes a row unique in its file."""


def key_of(row: dict[str, Any]) -> Key:
    return row["question_id"], row.get("control", "none"), row.get("decoding", "greedy")


def predictions_path(output: str | Path) -> Path:
    """``output`` itself where it names a .jsonl file, else ``predictions.jsonl`` in that directory."""
    path = Path(output)
    return path if path.suffix == ".jsonl" else path / FILE_NAME


def read_rows(path: Path, torn_end: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of one file. ``torn_end`` forgives a last line that a killed run left incomplete.

    Raises :class:`UserError` naming the line that is no row.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    row["question_id"], row["acc"]
                except (ValueError, TypeError, KeyError):
                    if torn_end and not line.endswith("\n"):
                        return
                    raise UserError(
                        f"{path}, line {number}: is no prediction; remove that line, or the file to ask all rows again"
                    ) from None
                yield row
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


class PredictionFile:
    """Appends answers to ``path`` and knows which are there already."""

    def __init__(self, path: Path, fresh: bool = False):
        """Open for going on; ``fresh`` forgets what earlier runs left. Raises :class:`UserError` if it cannot."""
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.rows: dict[Key, dict[str, Any]] = {}
        self._file: IO[str] | None = None
        if not fresh:
            for file, torn_end in ((path, False), (self.partial, True)):
                if file.is_file():
                    self.rows.update((key_of(row), row) for row in read_rows(file, torn_end))

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append finished answers and bring them to disk."""
        rows = list(rows)
        self._append(rows)
        self.rows.update((key_of(row), row) for row in rows)

    def _append(self, rows: Iterable[dict[str, Any]]) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self.partial}: cannot be written: {error.strerror}; what is in it is kept") from error

    def _open(self) -> IO[str]:
        """The partial file with what is known already, whole, in one step: a torn last line is not carried on."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.partial.with_name(self.partial.name + ".tmp")
        # A lone surrogate, which only a foreign server could send, is written as the JSON escape that it has to be.
        file = open(beside, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (closed by finish or close)
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows.values())
        file.flush()
        os.replace(beside, self.partial)
        return file

    def set_aside(self) -> Path:
        """Keep the answers so far as ``<name>.old`` and start with none; returns that path."""
        old = self.path.with_name(self.path.name + ".old")
        os.replace(self.path if self.path.is_file() else self.partial, old)
        self.partial.unlink(missing_ok=True)
        self.rows.clear()
        return old

    def finish(self) -> None:
        """All answers are in: give the file its name."""
        if self._file is None and (self.partial.is_file() or not self.path.is_file()):
            self._append([])
        if self._file is not None:
            self.close()
            os.replace(self.partial, self.path)

    def close(self) -> None:
        """Stop in the middle; the next run goes on from here."""
        if self._file is not None:
            self._file.close()
            self._file = None
