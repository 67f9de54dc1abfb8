"""``convert()``: the stages of a conversion in order, from the files of questions to the published folder."""

from __future__ import annotations

import hashlib
import os
import platform
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
from tqdm import tqdm

import medr1_verl
from medr1_verl.convert import images, partition, png, publish, readers, splits
from medr1_verl.convert.check import check_row, normalize_option
from medr1_verl.convert.pool import ImagePool
from medr1_verl.convert.question import Question, RawRow, RejectedError, RejectedRow
from medr1_verl.errors import UserError
from medr1_verl.prompt import LETTERS, load_template, render_prompt
from medr1_verl.schema import IMAGE_STORES, make_row
from medr1_verl.styles import STYLES
from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES

SPLITS = ("train", "test")
MANIFEST_VERSION = 1


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Options:
    """Everything that decides the result; the names are those of the command line."""

    input: str | Path
    output: str | Path
    access: str = "open"
    splits: str | Path | None = None
    split_by: str = "image"
    test_fraction: float = 0.2
    seed: int = 42
    modality: Sequence[str] = ()
    question_type: Sequence[str] = ()
    by: str = "none"
    style: str = "think"
    template: str | Path | None = None
    image_size: int = 384
    image_store: str = "bytes"
    jpeg_quality: int = 0
    max_pixels: int = images.MAX_PIXELS
    normalize_options: bool = False
    shuffle_options: bool = False
    workers: int = field(default_factory=usable_cores)
    limit: int = 0
    strict: bool = False
    resume: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.input = Path(self.input)
        self.output = Path(self.output)
        self.splits = Path(self.splits) if self.splits is not None else None
        self.template = Path(self.template) if self.template is not None else None
        if self.template is not None:
            load_template(self.template)  # refused before anything is read
        for name, allowed in (
            ("access", readers.ACCESS_FOLDERS),
            ("split_by", ("row", "image")),
            ("by", ("none", "modality", "question_type")),
            ("style", STYLES),
            ("image_store", IMAGE_STORES),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)!r}: one of {', '.join(allowed)}")
        for name, slugs in (("modality", MODALITIES), ("question_type", QUESTION_TYPES)):
            if unknown := [value for value in getattr(self, name) if value not in slugs]:
                raise UserError(f"--{name.replace('_', '-')} {unknown[0]!r}: one of {', '.join(slugs)}")
        if not 0 <= self.test_fraction <= 1:
            raise UserError(f"--test-fraction {self.test_fraction}: a number from 0 to 1")
        if self.image_size and self.image_size < images.MIN_SIDE:
            raise UserError(f"--image-size {self.image_size}: 0 (keep the size) or at least {images.MIN_SIDE}")
        if self.workers < 1 or self.limit < 0:
            raise UserError("--workers must be 1 or more, --limit 0 or more")
        if self.jpeg_quality and not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"--jpeg-quality {self.jpeg_quality}: 1 to 100, or 0 for lossless PNG")

    def arguments(self) -> dict[str, Any]:
        """The options as the manifest records them."""
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, (list, tuple)) else value
            for name, value in asdict(self).items()
        }


@dataclass
class Result:
    """What :func:`convert` hands back: the manifest and the rejected rows; ``images_checked`` is False in a dry run
    over an input that has no image folder.
    """

    manifest: dict[str, Any]
    rejected: list[RejectedRow]


# ------------------------------------------------------------------------------------------------ text stage


class _TextStage:
    """Questions that passed every check that needs no image, and the rows that did not."""

    def __init__(self, options: Options):
        self.options = options
        self.files: list[readers.SourceFile] = []
        self.questions: list[Question] = []
        self.rejected: list[RejectedRow] = []
        self.rows_read = 0
        self.filtered = 0
        self.options_changed = 0
        self.notes: dict[str, Any] = {}
        self.published: Counter[str] = Counter()  # rows of each split in a source that decides it
        self.source, self.image_root, rows = self._open()
        self._check(rows)
        if options.limit:
            self._limit()

    def _open(self) -> tuple[str, Path, Iterator[RawRow]]:
        options = self.options
        root = Path(options.input)
        if root.is_file() and root.suffix.lower() in readers.TABLE_SUFFIXES:
            if options.splits:
                raise UserError("--splits goes with an OmniMedVQA folder, not with a table of questions")
            return "table", root.parent, readers.read_table(root, self.files)
        if not root.is_dir():
            kinds = "an OmniMedVQA folder or a .jsonl, .json or .csv file"
            problem = "is neither" if root.exists() else "does not exist; give"
            raise UserError(f"--input {root} {problem} {kinds}")
        if options.splits:
            raw: Iterable[RawRow] = ()
            if (root / "QA_information").is_dir():
                raw = readers.read_omnimedvqa(root, self.files, options.access)
            reader = splits.SplitReader(Path(options.splits), splits.RawIndex(raw), self.files)
            self.notes["splits"] = reader.notes
            return "published splits", root, iter(reader)
        return "omnimedvqa", root, readers.read_omnimedvqa(root, self.files, options.access)

    def _keep(self, question: Question) -> bool:
        return (not self.options.modality or question.modality in self.options.modality) and (
            not self.options.question_type or question.question_type in self.options.question_type
        )

    def _check(self, rows: Iterable[RawRow]) -> None:
        seen: dict[str, tuple[str, int]] = {}
        for raw in tqdm(rows, desc="reading questions", unit="row", mininterval=0.5, delay=1):
            self.rows_read += 1
            if raw.split:
                self.published[raw.split] += 1
            try:
                question = check_row(raw)
                if not self._keep(question):
                    self.filtered += 1
                    continue
                first = seen.setdefault(question.question_id, (raw.file, raw.row))
                if first != (raw.file, raw.row):
                    where = f"row {first[1]} of {first[0]}"
                    raise RejectedError("duplicate_question_id", f"{question.question_id!r} is already {where}")
                self.questions.append(self._treat_options(question))
            except RejectedError as error:
                identity = raw.question_id if isinstance(raw.question_id, str) else None
                self.rejected.append(RejectedRow(raw.file, raw.row, identity, error.reason, error.message))

    def _treat_options(self, question: Question) -> Question:
        """``--normalize-options`` and ``--shuffle-options``; the gold letter follows its text."""
        gold = ord(question.answer) - ord("A")
        options = list(question.options)
        if self.options.normalize_options:
            options = [normalize_option(option) for option in options]
            if not all(options):
                raise RejectedError("bad_options", "an option is nothing but a period")
            if options.count(options[gold]) > 1:
                raise RejectedError("ambiguous_gold", f"without its typography, {options[gold]!r} is there twice")
        if self.options.shuffle_options:
            order = list(range(len(options)))
            random.Random(f"{self.options.seed}\n{question.question_id}").shuffle(order)
            options = [options[i] for i in order]
            gold = order.index(gold)
        if tuple(options) != question.options:
            self.options_changed += 1
        question.options, question.answer = tuple(options), LETTERS[gold]
        return question

    def _limit(self) -> None:
        """Keep ``--limit`` rows spread over the whole input: the files are sorted by data set, so the first rows of
        one would be of one modality only.
        """
        total = len(self.questions) + len(self.rejected)
        if total <= self.options.limit:
            return
        chosen = set(random.Random(self.options.seed).sample(range(total), self.options.limit))
        keep_questions = [q for i, q in enumerate(self.questions) if i in chosen]
        keep_rejected = [r for i, r in enumerate(self.rejected, len(self.questions)) if i in chosen]
        self.filtered += total - self.options.limit
        self.questions, self.rejected = keep_questions, keep_rejected


# ------------------------------------------------------------------------------------------------- the stages


def _staging(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


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


def _reject_images(text: _TextStage, records: dict[str, dict[str, Any]]) -> None:
    kept = []
    for question in text.questions:
        fault = next((records[path]["error"] for path in question.images if "error" in records[path]), None)
        if fault is None:
            kept.append(question)
        else:
            text.rejected.append(RejectedRow(question.file, question.row, question.question_id, *fault))
    text.questions = kept


def _assign(options: Options, text: _TextStage, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
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


def _counts(questions: Iterable[Question]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for modality in MODALITIES:
        for question_type in QUESTION_TYPES:
            table.setdefault(modality, {})[question_type] = 0
    for question in questions:
        table[question.modality][question.question_type] += 1
    return {m: {q: n for q, n in row.items() if n} for m, row in table.items() if any(row.values())}


def _slices(options: Options, questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Folder below the output -> its questions ("" is the output itself)."""
    if options.by == "none":
        return {"": list(questions)}
    slices: dict[str, list[Question]] = {}
    for slug in MODALITIES if options.by == "modality" else QUESTION_TYPES:
        chosen = [question for question in questions if getattr(question, options.by) == slug]
        if chosen:
            slices[slug] = chosen
    return slices


class _StoredImages:
    """Random access to the converted files in the shards; the stream of the last shard is kept open."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._shard = -1
        self._stream: Any = None

    def read(self, record: dict[str, Any]) -> bytes:
        if record["shard"] != self._shard:
            self.close()
            self._stream = open(self.folder / f"{record['shard']:06d}.bin", "rb")  # noqa: SIM115 - closed in close()
            self._shard = record["shard"]
        self._stream.seek(record["offset"])
        return self._stream.read(record["length"])

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def _write_rows(
    options: Options, staged: Path, output: Path, text: _TextStage, records: dict[str, dict[str, Any]]
) -> None:
    extension = "jpg" if options.jpeg_quality else "png"
    template = None if options.template is None else load_template(options.template)
    store = _StoredImages(staged.parent / "shards")
    with tqdm(total=len(text.questions), desc="writing parquet", unit="row", mininterval=0.5) as bar:
        for slug, chosen in _slices(options, text.questions).items():
            folder = staged / slug
            folder.mkdir(parents=True, exist_ok=True)
            for split in SPLITS:
                parquet = publish.ParquetFile(folder / f"{split}.parquet", options.image_store)
                for index, question in enumerate(q for q in chosen if q.split == split):
                    stored: list[dict[str, Any]] = []
                    size = 0
                    for path in question.images:
                        record = records[path]
                        data = store.read(record)
                        if options.image_store == "bytes":
                            stored.append({"bytes": data})
                            size += len(data)
                        else:
                            name = f"{record['sha256'][:32]}.{extension}"
                            place = Path("images") / name[:2] / name
                            if not (staged / place).exists():
                                (staged / place).parent.mkdir(parents=True, exist_ok=True)
                                (staged / place).write_bytes(data)
                            stored.append({"image": str(output / place)})
                    extra = {
                        "index": index,
                        "split": split,
                        "question_id": question.question_id,
                        "dataset": question.dataset,
                        "modality": question.modality,
                        "question_type": question.question_type,
                        "question": question.question,
                        "options": list(question.options),
                        "answer": question.answer,
                        "answer_text": question.answer_text,
                        "image_path": "\n".join(question.images),
                        "image_sha256": "\n".join(records[path]["sha256"] for path in question.images),
                        "style": options.style,
                    }
                    prompt = render_prompt(
                        question.question, question.options, options.style, len(question.images), template
                    )
                    parquet.add(make_row(images=stored, prompt=prompt, extra_info=extra), size)
                    bar.update(1)
                parquet.close()
    store.close()


def _manifest(options: Options, text: _TextStage, split_facts: dict[str, Any], image_facts: dict[str, Any]) -> dict:
    by_split = {split: [q for q in text.questions if q.split == split] for split in SPLITS}
    return {
        "manifest_version": MANIFEST_VERSION,
        "medr1_verl": medr1_verl.__version__,
        "arguments": options.arguments(),
        "template_sha256": options.template and hashlib.sha256(Path(options.template).read_bytes()).hexdigest(),
        "input": {
            "source": text.source,
            "files": [file.as_dict() for file in text.files],
            "rows_read": text.rows_read,
            "left_out_by_options": text.filtered,
            "rows_with_options_changed": text.options_changed,
            **text.notes,
        },
        "rows_in": len(text.questions) + len(text.rejected),
        "rows_out": len(text.questions),
        "rows_rejected": len(text.rejected),
        "rejected": dict(sorted(Counter(row.reason for row in text.rejected).items())),
        "rows": {split: len(chosen) for split, chosen in by_split.items()},
        "counts": {split: _counts(chosen) for split, chosen in by_split.items()},
        "letters": {split: dict(sorted(Counter(q.answer for q in c).items())) for split, c in by_split.items()},
        "split": split_facts,
        "images": image_facts,
        "software": {
            "python": platform.python_version(),
            "pillow": PIL.__version__,
            "pyarrow": pa.__version__,
            "numpy": np.__version__,
        },
        "outputs": {},
    }


def _image_facts(options: Options, pool_size: int, records: dict[str, dict[str, Any]], checked: bool) -> dict[str, Any]:
    good = [record for record in records.values() if "error" not in record]
    facts: dict[str, Any] = {
        "checked": checked,
        "files": pool_size,
        "unusable": len(records) - len(good),
        "resampler": images.RESAMPLER,
        "encoder": f"jpeg/{options.jpeg_quality}" if options.jpeg_quality else png.ENCODER,
    }
    if options.jpeg_quality and good and not options.dry_run:
        psnr = [record["psnr"] for record in good]
        facts["lossy"] = {
            "psnr_median_db": round(float(np.median(psnr)), 2),
            "psnr_minimum_db": round(min(psnr), 2),
            "bytes": sum(record["length"] for record in good),
            "bytes_lossless": sum(record["png_bytes"] for record in good),
        }
    return facts


def convert(options: Options) -> Result:
    """Run a conversion; raises :class:`UserError` for anything the user can put right.

    Unless ``options.dry_run``, ``options.output`` afterwards holds ``train.parquet``, ``test.parquet``,
    ``manifest.json`` and ``rejected.jsonl`` (with ``by``, the parquet pairs are in one folder per slice).
    """
    if options.dry_run:
        return _convert(options, None)
    output = Path(os.path.abspath(options.output))
    publish.check_target(output)
    staging = _staging(output)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with _locked(staging):
            if not options.resume:
                _start_over(staging)
            (staging / "shards").mkdir(exist_ok=True)
            return _convert(options, staging)
    except OSError as error:
        raise publish.disk_error(error, staging) from None


def _convert(options: Options, staging: Path | None) -> Result:
    text = _TextStage(options)
    paths = list(dict.fromkeys(path for question in text.questions for path in question.images))
    image_folder = text.image_root / "Images"
    checked = staging is not None or text.source == "table" or image_folder.is_dir()
    records: dict[str, dict[str, Any]] = {}
    if staging is None and checked:
        with _temporary_folder() as folder:
            records = _run_pool(options, text.image_root, folder, paths)
    elif staging is not None:
        if not image_folder.is_dir() and text.source != "table":
            raise UserError(f"no Images folder in {text.image_root}; --dry-run checks the questions without it")
        records = _run_pool(options, text.image_root, staging / "shards", paths)
    if checked:
        _reject_images(text, records)
    else:
        print(f"no Images folder in {text.image_root}: only the questions are checked", file=sys.stderr)
    text.rejected.sort(key=lambda row: (row.file, row.row))
    split_facts = _assign(options, text, records)
    manifest = _manifest(options, text, split_facts, _image_facts(options, len(paths), records, checked))
    if staging is not None:
        if not text.questions:
            raise UserError(_nothing_left(text))
        _publish(options, staging, text, records, manifest)
    return Result(manifest, text.rejected)


def _nothing_left(text: _TextStage) -> str:
    reasons = Counter(row.reason for row in text.rejected).most_common(3)
    if reasons:
        first = text.rejected[0]
        why = ", ".join(f"{reason} {count}" for reason, count in reasons)
        where = f"{first.file} row {first.row}"
        return f"not one of {text.rows_read} rows can be used ({why}); the first is {where}: {first.message}"
    return f"none of {text.rows_read} rows matches --modality / --question-type"


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="medr1-dry-run-") as name:
        yield Path(name)


def _run_pool(options: Options, root: Path, folder: Path, paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Converted images on disk and their records by path; a record keeps its signature as 256 raw bytes."""
    import base64

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
    text: _TextStage,
    records: dict[str, dict[str, Any]],
    manifest: dict[str, Any],
) -> None:
    output = Path(os.path.abspath(options.output))
    staged = staging / "out"
    if staged.exists():
        shutil.rmtree(staged)
    staged.mkdir()
    _write_rows(options, staged, output, text, records)
    publish.write_jsonl(staged / "rejected.jsonl", (row.as_dict() for row in text.rejected))
    for path in sorted(staged.rglob("*")):
        if path.is_file() and path.parent.parent.name != "images":
            manifest["outputs"][path.relative_to(staged).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": publish.sha256_file(path),
            }
    publish.write_json(staged / publish.MANIFEST, manifest)
    publish.publish(staged, output)
    shutil.rmtree(staging)
