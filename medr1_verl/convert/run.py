"""``convert()``: the stages of a conversion in order, from the files of questions to the published folder."""

from __future__ import annotations

import base64
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

import medr1_verl
from medr1_verl.convert import images, partition, png, publish
from medr1_verl.convert.manifest import image_facts, make_manifest
from medr1_verl.convert.options import Options
from medr1_verl.convert.pool import ImagePool
from medr1_verl.convert.question import RejectedRow
from medr1_verl.convert.rows import write_rows
from medr1_verl.convert.text import TextStage
from medr1_verl.errors import UserError


@dataclass
class Result:
    """What :func:`convert` hands back: the manifest, and the rows that were left out."""

    manifest: dict[str, Any]
    rejected: list[RejectedRow]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One run at a time per output; the lock goes with the process, however it ends."""
    stream = open(folder / "lock", "w")  # noqa: SIM115 - held open for as long as the lock
    try:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: no advisory locks; two runs into one output are then the user's to avoid
        pass
    except OSError:
        stream.close()
        raise UserError(f"another run is writing to {folder}; wait for it or name another --output") from None
    try:
        yield
    finally:
        stream.close()


def _start_over(staging: Path) -> None:
    """Throw away what an unfinished run has left, but for the lock, which is held."""
    left = [path for path in staging.iterdir() if path.name != "lock"]
    if left:
        print(f"starting over: an unfinished run was found ({staging}); --resume goes on from it", file=sys.stderr)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
        if (
            path.exists()
        ):  # a worker of the unfinished run, which ends with it but not at the same moment, wrote once more
            time.sleep(1)
            shutil.rmtree(path)


def _image_settings(options: Options, root: Path, folder: str) -> dict[str, Any]:
    """What a worker needs to know; all of it but ``folder`` is part of a shard's key."""
    return {
        "root": os.path.realpath(root),
        "folder": folder,
        "image_size": options.image_size,
        "jpeg_quality": options.jpeg_quality,
        "max_pixels": options.max_pixels,
        "dry_run": options.dry_run,
        "code": [medr1_verl.__version__, PIL.__version__, np.__version__, images.RESAMPLER, png.ENCODER],
    }


def _reject_images(text: TextStage, records: dict[str, dict[str, Any]]) -> None:
    kept = []
    for question in text.questions:
        fault = next((records[path]["error"] for path in question.images if "error" in records[path]), None)
        if fault is None:
            kept.append(question)
        else:
            text.rejected.append(RejectedRow(question.file, question.row, question.question_id, *fault))
    text.questions = kept


def _assign(options: Options, text: TextStage, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Set ``split`` of every question; returns what the manifest says about it."""
    questions = text.questions
    paths = sorted({path for question in questions for path in question.images})
    digests = {path: records[path]["sha256"] for path in paths if "sha256" in records.get(path, {})}
    signatures = {path: records[path]["signature"] for path in paths if "signature" in records.get(path, {})}
    groups, joins = partition.group_images(paths, digests, signatures)
    names = partition.row_group_names(questions, groups)
    published = [question.split for question in questions]
    if questions and all(published):
        method = "published"
    elif any(published):
        raise UserError("some rows say train or test and some do not; give all of them a split or none")
    else:
        method = options.split_by
        if method == "image":
            strata = [question.modality for question in questions]
            assigned = partition.split_by_group(names, strata, options.test_fraction, options.seed)
        else:
            strata = [f"{question.modality}/{question.question_type}" for question in questions]
            identities = [question.question_id for question in questions]
            assigned = partition.split_by_group(identities, strata, options.test_fraction, options.seed)
        for question, split in zip(questions, assigned, strict=True):
            question.split = split
    facts: dict[str, Any] = {"method": method}
    if method == "published":
        facts["rows_in_split_files"] = dict(text.published)
        facts["membership_as_published"] = text.published == Counter(published)
    else:
        facts |= {"test_fraction": options.test_fraction, "seed": options.seed}
    train_groups = {name for name, question in zip(names, questions, strict=True) if question.split == "train"}
    sizes = Counter(names)
    return facts | {
        "image_files": len(paths),
        "image_groups": len(sizes),
        "joined_by": joins,
        "near_duplicates_compared": bool(signatures),
        "largest_group_rows": max(sizes.values(), default=0),
        "test_rows_whose_image_is_in_train": sum(
            question.split == "test" and name in train_groups for name, question in zip(names, questions, strict=True)
        ),
    }


def convert(options: Options) -> Result:
    """Run a conversion; raises :class:`UserError` for anything the user can put right.

    Unless ``options.dry_run``, ``options.output`` afterwards holds ``train.parquet``, ``test.parquet``,
    ``manifest.json`` and ``rejected.jsonl`` (with ``by``, the parquet pairs are in one folder per slice).
    """
    output = Path(os.path.abspath(options.output))
    if not options.dry_run:
        publish.check_target(output)
    text = TextStage(options)
    paths = list(dict.fromkeys(path for question in text.questions for path in question.images))
    has_images = text.source == "table" or (text.image_root / "Images").is_dir()
    if options.dry_run:
        return _dry_run(options, text, paths, has_images)
    if not has_images:
        raise UserError(f"no Images folder in {text.image_root}; --dry-run checks the questions without it")
    if not text.questions:
        raise UserError(_nothing_left(text))
    staging = output.with_name(f".{output.name}.partial")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with _locked(staging):
            if not options.resume:
                _start_over(staging)
            (staging / "shards").mkdir(exist_ok=True)
            records = _run_pool(options, text.image_root, staging / "shards", paths)
            result = _conclude(options, text, records, True)
            if not text.questions:
                shutil.rmtree(staging)
                raise UserError(_nothing_left(text))
            _publish(options, staging, output, text, records, result.manifest)
            return result
    except OSError as error:
        raise publish.disk_error(error, staging) from None


def _dry_run(options: Options, text: TextStage, paths: Sequence[str], has_images: bool) -> Result:
    """Everything but pixels: rows, and where there are images, that each is there, safe, and of a usable size."""
    if not has_images:
        print(f"no Images folder in {text.image_root}: only the questions are checked", file=sys.stderr)
        return _conclude(options, text, {}, False)
    with tempfile.TemporaryDirectory(prefix="medr1-dry-run-") as folder:
        return _conclude(options, text, _run_pool(options, text.image_root, Path(folder), paths), True)


def _conclude(options: Options, text: TextStage, records: dict[str, dict[str, Any]], checked: bool) -> Result:
    """Reject the rows of unusable images, set every question's split, and draw up the manifest."""
    if checked:
        _reject_images(text, records)
    text.rejected.sort(key=lambda row: (row.file, row.row))
    split_facts = _assign(options, text, records)
    return Result(make_manifest(options, text, split_facts, image_facts(options, records, checked)), text.rejected)


def _nothing_left(text: TextStage) -> str:
    reasons = Counter(row.reason for row in text.rejected).most_common(3)
    if reasons:
        first = text.rejected[0]
        why = ", ".join(f"{reason} {count}" for reason, count in reasons)
        where = f"{first.file} row {first.row}"
        return f"not one of {text.rows_read} rows can be used ({why}); the first is {where}: {first.message}"
    return f"none of {text.rows_read} rows matches --modality / --question-type"


def _run_pool(options: Options, root: Path, folder: Path, paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Converted images on disk and their records by path; a record keeps its signature as 256 raw bytes."""
    settings = _image_settings(options, root, str(folder))
    pool = ImagePool(paths, settings, options.workers, options.resume)
    pool.run("checking images" if options.dry_run else "converting images")
    records = {}
    for record in pool.records():
        if "signature" in record:
            record["signature"] = base64.b64decode(record["signature"])
        records[record.pop("path")] = record
    return records


def _publish(
    options: Options,
    staging: Path,
    output: Path,
    text: TextStage,
    records: dict[str, dict[str, Any]],
    manifest: dict[str, Any],
) -> None:
    staged = staging / "out"
    if staged.exists():  # an earlier run was stopped while it wrote
        shutil.rmtree(staged)
    staged.mkdir()
    written = write_rows(options, staging / "shards", staged, output, text.questions, records)
    publish.write_jsonl(staged / "rejected.jsonl", (row.as_dict() for row in text.rejected))
    for path in sorted(staged.rglob("*")):
        if path.is_file():
            name = path.relative_to(staged).as_posix()
            facts = written.get(name) or {"bytes": path.stat().st_size, "sha256": publish.sha256_file(path)}
            manifest["outputs"][name] = facts
    publish.write_json(staged / publish.MANIFEST, manifest)
    publish.publish(staged, output)
    shutil.rmtree(staging)
