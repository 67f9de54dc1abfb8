"""Is an audit log complete and unaltered, and if not, where does it first differ?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medr1_verl.audit.log import START, check_version, raw_lines, record_problem, unseal

MAX_FAULTS = 20
RECENT = 4096


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. ``line`` counts from 1; ``offset`` is the byte at which that line starts.

    code: altered, missing, repeated, replaced, bad_record, after_footer, torn, incomplete, footer, signature, root.
    """

    code: str
    line: int
    offset: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line} (byte {self.offset}) {self.message}"


@dataclass
class Report:
    """What :func:`verify` found. ``records`` are the good lines before the first fault, the footer among them.

    ``root`` is the hash of the last good line, without the footer; ``footer`` its record, None where there is none.
    """

    records: int = 0
    answers: int = 0
    root: str = START
    closed: bool = False
    footer: dict[str, Any] | None = None
    faults: list[Fault] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.faults


def verify(path: Path) -> Report:
    """Read a log once, in constant memory. Raises :class:`UserError` where it cannot be read or is of another schema.

    The first of ``faults`` is where the log first differs from one that was written and left alone; further ones are
    looked for, up to a number, as if the line at fault were in its place.
    """
    chain = _Chain()
    number = offset = 0
    for number, line in enumerate(raw_lines(path), 1):
        try:
            chain.follow(line, number, path)
        except _Broken as broken:
            if len(chain.report.faults) < MAX_FAULTS:
                chain.report.faults.append(Fault(broken.code, number, offset, str(broken)))
        offset += len(line)
    if not chain.report.closed:
        what = "is where the log ends" if number else "does not exist, the file is empty"
        why = "there is no footer: it was cut off, or its writer was stopped before closing it"
        chain.report.faults.append(Fault("incomplete", number + 1, offset, f"{what}; {why}"))
    return chain.report


class _Broken(Exception):
    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class _Chain:
    """What is known of the lines so far: which hash and number the next one must carry."""

    def __init__(self) -> None:
        self.report = Report()
        self._prev: str | None = START  # None: unknown, the line before is damaged
        self._seq = 0
        self._recent: dict[str, int] = {}  # hash -> line, of the last lines, to tell where a copied one came from

    def follow(self, line: bytes, number: int, path: Path) -> None:
        """Take one more line; raises :class:`_Broken` if it is not the one that must come here."""
        report, prev, seq = self.report, self._prev, self._seq
        if report.closed:
            raise _Broken("after_footer", "stands after the footer that closed the log")
        self._prev, self._seq = None, seq + 1
        if not line.endswith(b"\n"):
            raise _Broken("torn", f"is torn: {len(line)} bytes without an end, as a killed writer leaves them")
        try:
            record, digest = unseal(line)
        except ValueError as error:
            message = "is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            raise _Broken("altered", message) from None
        if number == 1 and record.get("kind") == "header":
            check_version(record, path)
        if problem := record_problem(record):
            raise _Broken("bad_record", problem)
        # From here on the line is whole in itself: the next one is compared to it, even if this one is out of place.
        self._prev, self._seq = digest, record["seq"] + 1
        known, self._recent[digest] = dict(self._recent) if prev != record["prev"] else self._recent, number
        if len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]
        report.closed = record["kind"] == "footer"
        if (record["kind"] == "header") != (number == 1):
            raise _Broken(
                "missing", f"is record {record['seq']} ({record['kind']}): the header must come first, and only there"
            )
        if record["seq"] != seq or (prev is not None and record["prev"] != prev):
            raise _Broken(*_out_of_chain(record, seq, known))
        if report.faults:
            return
        if report.closed:
            if record["root"] != record["prev"] or record["answers"] != report.answers:
                raise _Broken("footer", f"is a footer over {record['answers']} answers; there are {report.answers}")
            report.footer = record
        else:
            report.root = digest
        report.records += 1
        report.answers += record["kind"] == "answer"


def _out_of_chain(record: Mapping[str, Any], seq: int, known: Mapping[str, int]) -> tuple[str, str]:
    """Code and message for a record that is whole in itself and does not follow the line before it."""
    found = record["seq"]
    if found > seq:
        span = f"record {seq}" if found == seq + 1 else f"records {seq} to {found - 1}"
        return "missing", f"is record {found}, but {span} must come first: deleted or moved"
    if found < seq:
        twin = known.get(record["prev"])
        where = "" if twin is None else f", following line {twin}"
        return "repeated", (
            f"is record {found} again{where}, where record {seq} must come: "
            "copied, moved, or two processes wrote this log"
        )
    return "replaced", f"is record {found}, but was chained to another line than the one before it: one was replaced"
