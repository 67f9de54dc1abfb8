"""The audit log: one JSON line for each answer, chained by SHA-256 and closed by a footer.

Every line ends with ``,"sha256":"<64 hex digits>"}``: the SHA-256 of all bytes of the line before that, so that a
change of a single byte shows. Every line but the first names the hash of the line before it as ``prev`` and counts on
in ``seq``, so that a line that is missing, added or moved shows. The footer has the number of answers and, as ``root``,
the hash of the last line before it; a log without a footer is not complete.

Whoever can rewrite the whole file can also recompute the chain: only a signature (:mod:`medr1_verl.audit.signing`), or
a root that was noted elsewhere, shows that.

Lines are pure ASCII, so that a viewer cannot be confused by what a model wrote. The kinds of lines, and their fields,
are in ``audit/schema.json`` (JSON Schema).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from medr1_verl import __version__
from medr1_verl.errors import UserError

SCHEMA = "medr1-audit/1"
FILE_NAME = "audit.jsonl"
SCHEMA_FILE = Path(__file__).with_name("schema.json")
START = "0" * 64
"""``prev`` of the first line, whose record before it does not exist."""

_SEAL = b',"sha256":"'
_SEAL_LENGTH = len(_SEAL) + 64 + len(b'"}\n')


class Line(NamedTuple):
    """One whole line: its fields without the hash, and the hash."""

    record: dict[str, Any]
    sha256: str


def now() -> str:
    """UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seal(record: Mapping[str, Any]) -> tuple[bytes, str]:
    """The line of a record, with its hash."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode("ascii")[:-1]
    digest = hashlib.sha256(body).hexdigest()
    return body + _SEAL + digest.encode() + b'"}\n', digest


def unseal(line: bytes) -> Line:
    """The record of a line. Raises ValueError, saying what is wrong, where its hash does not fit its bytes."""
    if not line.endswith(b'"}\n') or line[-_SEAL_LENGTH : -_SEAL_LENGTH + len(_SEAL)] != _SEAL:
        raise ValueError("is no whole record")
    stated = line[-3 - 64 : -3].decode("latin-1")
    if hashlib.sha256(line[:-_SEAL_LENGTH]).hexdigest() != stated:
        raise ValueError("was altered: its bytes do not fit its hash")
    record = json.loads(line[:-_SEAL_LENGTH] + b"}")
    if not isinstance(record, dict):
        raise ValueError("is no record")
    return Line(record, stated)


def read_answers(path: Path) -> Iterator[dict[str, Any]]:
    """Every answer of a log, each with its ``context`` replaced by the record that it names; whatever can be read.

    Lines that are damaged are left out: whether there are any is for ``verify`` to say. Raises :class:`UserError` for
    a file that cannot be read, or that holds no record at all.
    """
    contexts: dict[int, dict[str, Any]] = {}
    any_record = False
    for line in raw_lines(path):
        try:
            record = unseal(line).record
        except ValueError:
            continue
        if record.get("kind") == "header":
            check_version(record, path)
        if record_problem(record):
            continue
        any_record = True
        if record["kind"] == "context":
            contexts[record["seq"]] = record
        elif record["kind"] == "answer":
            yield record | {"context": contexts.get(record["context"], {})}
    if not any_record:
        raise UserError(f"{path}: holds no audit record; was it written by medr1?")


def raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file with their ends. Raises :class:`UserError` where it cannot be read."""
    try:
        with open(path, "rb") as file:
            yield from file
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def check_version(header: Mapping[str, Any], path: Path) -> None:
    """Raise :class:`UserError` for a log of another schema version."""
    found = header.get("schema")
    if found != SCHEMA:
        raise UserError(
            f"{path}: is a log of schema {found!r}, this medr1-verl {__version__} reads {SCHEMA!r}; "
            f"use the version that wrote it ({header.get('medr1_verl', 'not named in it')}) or a newer one"
        )


@lru_cache(maxsize=1)
def _required() -> dict[str, list[str]]:
    """Fields that a record of each kind must have, from the published schema."""
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    kinds = {name: one for name, one in schema["$defs"].items() if "kind" in one.get("properties", {})}
    return {name: one["required"] for name, one in kinds.items()}


def record_problem(record: Mapping[str, Any]) -> str:
    """Why a line with a right hash is no record all the same; "" for one that is."""
    required = _required().get(record.get("kind", ""))
    if required is None:
        return f"is of no kind that there is ({record.get('kind')!r})"
    lacking = [name for name in required if name not in record and name != "sha256"]
    if lacking:
        return f"lacks {', '.join(lacking)}"
    if not isinstance(record["seq"], int) or not isinstance(record["prev"], str):
        return "has no number (seq) or no hash of the line before it (prev)"
    return ""


class AuditLog:
    """Appends records to a log, as one process at a time.

    A log that was never closed is gone on with: a last line that a killed writer left torn is cut off, and a
    ``resumed`` record says how many bytes that were and their SHA-256. A closed log is never opened again.
    """

    def __init__(self, path: Path, follows: str | None = None):
        """Open ``path``, new or unfinished. ``follows`` is the root of the log that a new one goes on from.

        Raises :class:`UserError` where another process is writing it, where it is closed or damaged, and where it
        cannot be written.
        """
        self.path = path
        self.answers = 0
        self._seq = 0
        self._prev = START
        self._context: tuple[str, int] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115 (closed by close or stop)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            _lock(self._file, path)
            if os.fstat(self._file.fileno()).st_size:
                self._go_on()
            else:
                self._append([{"kind": "header", "schema": SCHEMA, "medr1_verl": __version__, "follows": follows}])
        except BaseException:
            self._file.close()
            raise

    def _go_on(self) -> None:
        from medr1_verl.audit.verify import verify  # which reads this module

        report = verify(self.path)
        if any(fault.code not in ("incomplete", "torn") for fault in report.faults):
            raise UserError(f"{self.path}: {report.faults[0]}; keep it as it is and give another file")
        if report.closed:
            raise UserError(f"{self.path}: is closed, nothing can be added to it; give another file")
        self._seq, self._prev, self.answers = report.records, report.root, report.answers
        torn = [fault for fault in report.faults if fault.code == "torn"]
        cut = b""
        if torn:
            with open(self.path, "rb") as file:
                file.seek(torn[0].offset)
                cut = file.read()
            os.truncate(self.path, torn[0].offset)
        if not self._seq:  # killed inside the very first line
            self._append([{"kind": "header", "schema": SCHEMA, "medr1_verl": __version__, "follows": None}])
        digest = hashlib.sha256(cut).hexdigest() if cut else None
        self._append([{"kind": "resumed", "torn_bytes": len(cut), "torn_sha256": digest}])

    def context(self, fields: Mapping[str, Any]) -> int:
        """``seq`` of the context that has these fields: written now unless it is the one in force."""
        text = json.dumps(fields, sort_keys=True)
        if self._context is None or self._context[0] != text:
            self._append([{"kind": "context", **fields}])
            self._context = (text, self._seq - 1)
        return self._context[1]

    def add(self, answers: Iterable[Mapping[str, Any]]) -> None:
        """Append answers (fields of the schema's ``answer`` but kind, seq, prev) and bring them to the disk."""
        self.answers += self._append({"kind": "answer", **answer} for answer in answers)

    def _append(self, records: Iterable[Mapping[str, Any]]) -> int:
        lines = []
        for record in records:
            head = {"kind": record["kind"], "seq": self._seq, "prev": self._prev, "time": now()}
            line, self._prev = seal(head | dict(record))
            self._seq += 1
            lines.append(line)
        try:
            self._file.write(b"".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}; what is in it is kept") from error
        return len(lines)

    def close(self, key: Any = None) -> str:
        """Write the footer, signed where a private ``key`` is given; returns the root. The log is then complete."""
        from medr1_verl.audit.signing import signature_fields

        root = self._prev
        footer = {"answers": self.answers, "root": root}
        self._append([{"kind": "footer", **footer, **(signature_fields(key, root, self.answers) if key else {})}])
        self.stop()
        return root

    def stop(self) -> None:
        """Leave the log unfinished; a later run goes on from here."""
        self._file.close()

    @staticmethod
    def keys_of(path: Path) -> set[int]:
        """What :func:`key_digest` gives for every answer in the log at ``path``."""
        return {
            key_digest(record["question_id"], record["control"], record["decoding"]) for record in read_answers(path)
        }


def key_digest(question_id: str | None, control: str, decoding: str) -> int:
    """A question under a control and a decoding, in eight bytes: a set of many takes little memory."""
    text = json.dumps([question_id, control, decoding])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _lock(file: IO[bytes], path: Path) -> None:
    """Held until the file is closed. Raises :class:`UserError` where another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another process is writing this log; give another file") from None
    except OSError:
        pass  # a file system without locks: verify tells two writers from the chain


def set_aside(path: Path) -> str | None:
    """Rename the log at ``path`` to the first free ``<name>.N.jsonl``; returns the hash of its last good line."""
    from medr1_verl.audit.verify import verify

    with open(path, "ab") as file:
        _lock(file, path)
        report = verify(path)
        number = 1
        while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        path.rename(aside)
    return report.root if report.records else None
