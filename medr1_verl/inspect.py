"""``medr1 inspect``: what is in a data set, how far it can be answered without looking, and what leaks into it.

A source is a parquet of the converter, a published split file, a table of questions, or a raw OmniMedVQA folder (its
images are not needed). Accuracies are 0 to 100.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from medr1_verl.convert import partition, readers, splits
from medr1_verl.convert.check import check_row
from medr1_verl.convert.images import SIGNATURE_SIDE
from medr1_verl.convert.question import RejectedError
from medr1_verl.errors import UserError
from medr1_verl.option_prior import PSEUDO_COUNT, OptionPrior, chance, exact, normalized
from medr1_verl.prompt import LETTERS
from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES


@dataclass(slots=True)
class Row:
    """A question as this command sees it; ``images`` and ``sha256`` (parquet only) name its pictures."""

    modality: str
    question_type: str
    dataset: str
    options: tuple[str, ...]
    gold: int
    images: tuple[str, ...]
    sha256: tuple[str, ...] = ()


@dataclass
class Source:
    """The rows of one source; ``kind`` is parquet, splits, table or raw."""

    path: Path
    kind: str
    rows: list[Row]
    rejected: int


def _parquet_rows(path: Path) -> list[Row]:
    try:
        table = pq.read_table(path, columns=["extra_info"])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path} as parquet: {str(error).splitlines()[0]}") from None
    if table.column_names != ["extra_info"]:
        raise UserError(f"{path} has no extra_info column; it was not written by medr1 convert")
    rows = []
    try:
        for info in table.column("extra_info").to_pylist():
            rows.append(
                Row(
                    info["modality"],
                    info["question_type"],
                    info["dataset"],
                    tuple(info["options"]),
                    LETTERS.index(info["answer"]),
                    tuple(info["image_path"].split("\n")),
                    tuple(info["image_sha256"].split("\n")),
                )
            )
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: extra_info lacks a field; it was not written by medr1 convert") from None
    return rows


def _checked(raws: Iterator[Any]) -> tuple[list[Row], int]:
    rows, rejected = [], 0
    for raw in raws:
        try:
            q = check_row(raw)
        except RejectedError:
            rejected += 1
            continue
        gold = LETTERS.index(q.answer)
        rows.append(Row(q.modality, q.question_type, q.dataset, q.options, gold, q.images))
    return rows, rejected


def load(path: Path) -> Source:
    """The rows of ``path``; raises :class:`UserError` for anything that is no source."""
    if path.is_dir():
        root = path.parent if path.name == "QA_information" else path
        if (root / "QA_information").is_dir():
            return Source(path, "raw", *_checked(readers.read_omnimedvqa(root, [], "all")))
        if (path / "train").is_dir() or (path / "test").is_dir():
            return Source(path, "splits", *_checked(iter(splits.SplitReader(path, splits.RawIndex(()), []))))
        if parquets := sorted(file.name for file in path.glob("*.parquet")):
            raise UserError(f"{path} is a folder; name one file of it: {', '.join(parquets)}")
        if files := readers.json_files(path):
            raws = (
                readers.omnimedvqa_row(row, file.name, number)
                for file in files
                for number, row in enumerate(readers.load_json_rows(file, file.name, []))
            )
            return Source(path, "raw", *_checked(raws))
        raise UserError(f"{path} is a folder without questions; name a parquet, a split file or a raw folder")
    if not path.is_file():
        raise UserError(f"there is no {path}")
    if path.suffix == ".parquet":
        return Source(path, "parquet", _parquet_rows(path), 0)
    if path.suffix == ".json":
        rows_in_file = readers.load_json_rows(path, path.name, [])
        if rows_in_file and isinstance(rows_in_file[0], dict) and "problem" in rows_in_file[0]:
            return Source(path, "splits", *_checked(iter(splits.SplitReader(path, splits.RawIndex(()), []))))
        if rows_in_file and isinstance(rows_in_file[0], dict) and "gt_answer" in rows_in_file[0]:
            raws = (readers.omnimedvqa_row(row, path.name, number) for number, row in enumerate(rows_in_file))
            return Source(path, "raw", *_checked(raws))
    if path.suffix.lower() in readers.TABLE_SUFFIXES:
        return Source(path, "table", *_checked(readers.read_table(path, [])))
    raise UserError(f"{path}: a .parquet, .json, .jsonl or .csv file, or a raw OmniMedVQA folder, can be inspected")


# ------------------------------------------------------------------------------------------------------ figures


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _prior_rows(rows: Sequence[Row]) -> list[tuple[tuple[str, ...], int]]:
    return [(row.options, row.gold) for row in rows]


def count_leaked(rows: Sequence[Row], train: Sequence[Row]) -> int:
    """Rows with an image that ``train`` has too: by SHA-256 of the source file where both know it, else by path."""
    by_bytes = all(row.sha256 for row in rows) and all(row.sha256 for row in train)

    def names(row: Row) -> tuple[str, ...]:
        return row.sha256 if by_bytes else row.images

    known = {name for row in train for name in names(row)}
    return sum(any(name in known for name in names(row)) for row in rows)


def report(source: Source, against: Source | None = None) -> dict[str, Any]:
    """All figures of ``source``; the option prior and the leakage with ``against``, a training set."""
    rows = source.rows
    pairs = _prior_rows(rows)

    def counts(values: Any, order: Any = ()) -> dict[str, int]:
        found = Counter(values)
        return {key: found[key] for key in [*order, *sorted(set(found) - set(order))] if found[key]}

    figures: dict[str, Any] = {
        "source": str(source.path),
        "kind": source.kind,
        "rows": len(rows),
        "rejected": source.rejected,
        "images": len({name for row in rows for name in (row.sha256 or row.images)}),
        "modality": counts((row.modality for row in rows), MODALITIES),
        "question_type": counts((row.question_type for row in rows), QUESTION_TYPES),
        "dataset": counts(row.dataset for row in rows),
        "letters": counts(LETTERS[row.gold] for row in rows),
        "options": counts(str(len(row.options)) for row in rows),
        "chance": _rounded(chance(pairs)),
        "majority_letter": _rounded(100 * max(Counter(row.gold for row in rows).values(), default=0) / len(rows))
        if rows
        else None,
    }
    if against is not None:
        train = _prior_rows(against.rows)
        figures["against"] = str(against.path)
        for name, key in (("exact", exact), ("normalized", normalized)):
            figures[f"option_prior_{name}"] = _rounded(OptionPrior(train, key).accuracy(pairs))
            figures[f"option_prior_{name}_smoothed"] = _rounded(OptionPrior(train, key, PSEUDO_COUNT).accuracy(pairs))
        figures["leaked_rows"] = count_leaked(rows, against.rows)
    return figures


# ----------------------------------------------------------------------------------------------------- pictures


def _pictures(path: Path, description: str) -> Iterator[tuple[dict[str, Any], list[Image.Image]]]:
    """(extra_info, decoded images) of each row of a parquet, one row group in memory."""
    file = pq.ParquetFile(path)
    with tqdm(total=file.metadata.num_rows, desc=description, unit="row", mininterval=0.5) as bar:
        for batch in file.iter_batches(batch_size=32, columns=["images", "extra_info"]):
            for row in batch.to_pylist():
                bar.update(1)
                try:
                    stored = [image.get("bytes") or Path(image["image"]).read_bytes() for image in row["images"]]
                    yield row["extra_info"], [Image.open(io.BytesIO(data)).convert("RGB") for data in stored]
                except (OSError, KeyError, TypeError) as error:
                    raise UserError(f"{path}: row {row['extra_info'].get('index')}: {error}") from None


def near_leaked(path: Path, train: Path) -> int:
    """Rows of one parquet that show a picture of the other, or a copy of it (other format, size or quality)."""

    def thumbnails(name: Path) -> tuple[list[int], np.ndarray]:
        owners, found = [], []
        for number, (_, pictures) in enumerate(_pictures(name, f"reading {name.name}")):
            for picture in pictures:
                small = picture.convert("L").resize((SIGNATURE_SIDE, SIGNATURE_SIDE), Image.Resampling.BOX)
                owners.append(number)
                found.append(np.asarray(small).ravel())
        return owners, np.asarray(found, np.uint8).reshape(len(found), SIGNATURE_SIDE**2)

    owners, ours = thumbnails(path)
    _, theirs = thumbnails(train)
    return len({owner for owner, hit in zip(owners, partition.any_same_picture(ours, theirs), strict=True) if hit})


def contact_sheet(path: Path, target: Path, count: int = 48) -> int:
    """PNG of ``count`` pictures spread over a parquet, each with modality, size, gold letter and question."""
    total = pq.ParquetFile(path).metadata.num_rows
    wanted = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()) if total else set()
    columns, cell, caption = 6, 200, 42
    sheet = Image.new("RGB", (columns * cell, max(1, -(-len(wanted) // columns)) * (cell + caption)), (48, 48, 48))
    draw = ImageDraw.Draw(sheet)
    placed = 0
    for number, (info, pictures) in enumerate(_pictures(path, "contact sheet")):
        if number not in wanted:
            continue
        x, y = placed % columns * cell, placed // columns * (cell + caption)
        picture = pictures[0]
        size = f"{picture.width}x{picture.height}" + (f" +{len(pictures) - 1}" if len(pictures) > 1 else "")
        sheet.paste(ImageOps.contain(picture, (cell - 6, cell - 6)), (x + 3, y + 3))
        lines = (f"{info['modality']} {size} gold {info['answer']}", info["question"][:34], info["answer_text"][:34])
        for i, line in enumerate(lines):
            draw.text((x + 3, y + cell + 13 * i), line.encode("ascii", "replace").decode(), fill=(255, 255, 255))
        placed += 1
    sheet.save(target)
    return placed


# ------------------------------------------------------------------------------------------------- command line


def _table(figures: dict[str, Any]) -> str:
    lines = [f"{figures['source']} ({figures['kind']}): {figures['rows']:,} rows, {figures['images']:,} images"]
    if figures["rejected"]:
        lines.append(f"  {figures['rejected']:,} more rows cannot be used; medr1 convert --dry-run says why")
    for name in ("modality", "question_type", "letters", "options"):
        title = "options per question" if name == "options" else name.replace("_", " ")
        shares = (f"{key} {n:,} ({100 * n / max(1, figures['rows']):.1f} %)" for key, n in figures[name].items())
        lines.append(f"  {title}: " + ", ".join(shares))
    if figures["chance"] is not None:
        lines.append(
            f"  chance {figures['chance']:.2f}, always the most frequent letter {figures['majority_letter']:.2f}"
        )
    if "against" in figures and figures["chance"] is not None:
        lines.append(f"  answered without the image, from the options alone (counted over {figures['against']}):")
        for name, says in (("exact", "options as written"), ("normalized", "without case and trailing period")):
            plain, smoothed = figures[f"option_prior_{name}"], figures[f"option_prior_{name}_smoothed"]
            lines.append(f"    {says}: {plain:.2f} (with two imagined showings: {smoothed:.2f})")
        lines.append(f"  rows whose image is in the training set: {figures['leaked_rows']:,}")
        if "leaked_rows_near" in figures:
            lines.append(f"  rows that show a picture of the training set or a copy: {figures['leaked_rows_near']:,}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="medr1 inspect", description=__doc__.split("\n\n")[0] if __doc__ else None)
    p.add_argument("source", metavar="SOURCE", type=Path, help="parquet, split file, table, or raw OmniMedVQA folder")
    p.add_argument("--against", metavar="TRAIN", type=Path, help="a training set: option prior and leakage")
    p.add_argument("--near", action="store_true", help="leakage by picture too (two parquets): finds re-encoded copies")
    p.add_argument("--sheet", metavar="PNG", type=Path, help="write a contact sheet of a parquet's pictures")
    p.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    arguments = p.parse_args(argv)
    source = load(arguments.source)
    against = load(arguments.against) if arguments.against else None
    figures = report(source, against)
    if arguments.near:
        if source.kind != "parquet" or against is None or against.kind != "parquet":
            raise UserError("--near compares the pictures of two parquet files: give SOURCE and --against as .parquet")
        figures["leaked_rows_near"] = near_leaked(arguments.source, arguments.against)
    if arguments.sheet:
        if source.kind != "parquet":
            raise UserError("--sheet needs a parquet: no other source holds pictures")
        try:
            shown = contact_sheet(arguments.source, arguments.sheet)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {arguments.sheet}: {error}") from None
        print(f"{shown} pictures in {arguments.sheet}", file=sys.stderr)
    print(json.dumps(figures, indent=1, ensure_ascii=False) if arguments.json else _table(figures))
    return 0
