"""Parquet files, manifest and rejected rows: written beside the target, then renamed into place as one folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medr1_verl.errors import UserError
from medr1_verl.schema import arrow_schema, arrow_table

# Small row groups: readers that meet more than 2 GiB of nested binary in one group fail ("Nested data conversions not
# implemented for chunked array outputs", huggingface/datasets#7793).
GROUP_ROWS = 100
GROUP_BYTES = 32 << 20

MANIFEST = "manifest.json"


class ParquetFile:
    """Streams rows into one parquet file. The bytes depend on the rows alone.

    A thread encodes and writes a row group, mostly without Python's lock, while the next one is gathered and what is
    on disk already is hashed: two row groups in memory at most.
    """

    def __init__(self, path: Path, image_store: str):
        self.path = path
        self.schema = arrow_schema(image_store)
        self.rows = 0
        self._pending: list[dict[str, Any]] = []
        self._bytes = 0
        text_columns = [name for name in _leaf_names(self.schema) if not name.startswith("images.")]
        compression = dict.fromkeys(text_columns, "zstd")
        compression[_image_leaf(self.schema)] = "none"  # PNG does not get any smaller
        self._writer = pq.ParquetWriter(
            path,
            self.schema,
            compression=compression,
            use_dictionary=text_columns,
            write_statistics=text_columns,
            store_schema=False,
        )
        self._thread = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None
        self._digest = hashlib.sha256()
        self._written_bytes = open(path, "rb", buffering=0)  # noqa: SIM115 - closed in close()

    def add(self, row: dict[str, Any], size: int) -> None:
        """Append a row of ``schema.make_row``; ``size`` is what its images take, in bytes."""
        self._pending.append(row)
        self.rows += 1
        self._bytes += size
        if len(self._pending) >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._wait()  # first, so that its memory is free again
            try:
                table = arrow_table(self._pending, self.schema)
            except OverflowError as error:
                first = self._pending[0]["extra_info"]["question_id"]
                raise UserError(f"{error} (the one from question {first!r} on): use a smaller --image-size") from None
            self._pending, self._bytes = [], 0
            self._written = self._thread.submit(self._writer.write_table, table)
            self._hash()

    def _wait(self) -> None:
        """Until the row group that is being written is written; raises what that raised."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _hash(self) -> None:
        """Take in what has been appended to the file: it is written front to back, nothing twice."""
        while chunk := self._written_bytes.read(1 << 20):
            self._digest.update(chunk)

    def finish(self) -> None:
        """No more rows: the thread completes the file and brings it to the disk; :meth:`close` waits for that."""
        self._flush()
        self._wait()
        self._written = self._thread.submit(self._complete)
        self._thread.shutdown(wait=False)

    def _complete(self) -> None:
        self._writer.close()
        _fsync(self.path)

    def close(self) -> dict[str, Any]:
        """After :meth:`finish`; returns ``bytes`` and ``sha256`` of the file."""
        self._wait()
        self._hash()
        self._written_bytes.close()
        return {"bytes": self.path.stat().st_size, "sha256": self._digest.hexdigest()}


def _leaf_names(schema: pa.Schema) -> list[str]:
    """Parquet column paths of ``schema``, e.g. ``prompt.list.element.role``."""

    def walk(name: str, kind: pa.DataType) -> list[str]:
        if pa.types.is_struct(kind):
            return [leaf for field in kind for leaf in walk(f"{name}.{field.name}", field.type)]
        if pa.types.is_list(kind):
            return walk(f"{name}.list.element", kind.value_type)
        return [name]

    return [leaf for field in schema for leaf in walk(field.name, field.type)]


def _image_leaf(schema: pa.Schema) -> str:
    return next(name for name in _leaf_names(schema) if name.startswith("images."))


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair becomes \\udXXX


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(staged: Path, target: Path) -> None:
    """Give the complete folder ``staged`` its name. ``target`` is at every moment absent, the old data set or the new.

    Only a data set of this converter (or an empty folder) is ever replaced; :func:`check_target` has made sure.
    """
    for path in sorted(staged.rglob("*")):
        if path.is_file():
            _fsync(path)
    if os.name == "posix":
        _fsync(staged)
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        os.rename(target, old)
    os.rename(staged, target)
    if os.name == "posix":
        _fsync(target.parent)
    if old is not None:
        shutil.rmtree(old)


def check_target(target: Path) -> None:
    """Refuse a target that holds anything but a data set of this converter."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"--output {target} is not a folder; name one that does not exist yet")
    if not target.exists():
        return
    names = {path.name for path in target.iterdir()}
    if not names:
        return
    try:
        ours = "medr1_verl" in json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(
            f"--output {target} holds files that this converter did not write; name another folder or empty it"
        )


def disk_error(error: OSError, folder: Path) -> UserError:
    """One clear line for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk is full ({folder}); free some space, then run again with --resume")
    return UserError(f"cannot write to {folder}: {error.strerror or error}")
