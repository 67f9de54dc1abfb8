"""One data set cut by modality or question type, so that a run can train on one slice and be tested on all.

    python -m medr1_verl.slices --data data/omnimedvqa --output runs/cross/data --by modality

writes ``<slug>/train.parquet`` and ``<slug>/test.parquet`` and prints, for every slice, slug, training and test rows.
A data set that ``medr1 convert --by`` has cut already (the published splits are) is used as it is: its files are
linked. A slice without training rows has only a test file: no run trains on it, all are tested on it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medr1_verl.cli import run as run_command
from medr1_verl.errors import UserError
from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES

SLUGS = {"modality": tuple(MODALITIES), "question_type": tuple(QUESTION_TYPES)}
PARTS = ("train", "test")


def cut(data: Path, output: Path, by: str) -> dict[str, dict[str, int]]:
    """Rows of every slice that has any, as ``{slug: {"train": n, "test": n}}``; files that are there are kept.

    Raises :class:`UserError` where ``data`` is no converted data set, or is cut the other way.
    """
    counts: dict[str, dict[str, int]] = {}
    whole = {part: data / f"{part}.parquet" for part in PARTS}
    if all(path.is_file() for path in whole.values()):
        for part, path in whole.items():
            table = None
            for slug in SLUGS[by]:
                target = output / slug / f"{part}.parquet"
                if not _newer(target, path):
                    table = _read(path) if table is None else table
                    rows = table.filter(pc.equal(pc.struct_field(table.column("extra_info"), by), slug))
                    target.unlink(missing_ok=True)
                    if rows.num_rows:
                        _write(rows, target)
                if target.is_file():
                    counts.setdefault(slug, dict.fromkeys(PARTS, 0))[part] = pq.read_metadata(target).num_rows
        return counts
    cut_already = [slug for slug in SLUGS[by] if (data / slug / "test.parquet").is_file()]
    if not cut_already:
        other = next(name for name in SLUGS if name != by)
        if any((data / slug / "test.parquet").is_file() for slug in SLUGS[other]):
            raise UserError(f"{data} is cut by {other}; convert with --by {by}, or into one train and test file")
        raise UserError(
            f"{data} has neither train.parquet and test.parquet nor one folder for each {by}; convert first"
        )
    for slug in cut_already:
        counts[slug] = dict.fromkeys(PARTS, 0)
        for part in PARTS:
            source, target = data / slug / f"{part}.parquet", output / slug / f"{part}.parquet"
            if source.is_file() and (rows := pq.read_metadata(source).num_rows):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()))
                counts[slug][part] = rows
    return counts


def _newer(target: Path, source: Path) -> bool:
    return target.is_file() and target.stat().st_mtime >= source.stat().st_mtime


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _write(rows: pa.Table, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    pq.write_table(rows, partial)
    partial.replace(target)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m medr1_verl.slices", description="A data set cut into slices.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="what medr1 convert wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--by", choices=tuple(SLUGS), required=True)
    args = parser.parse_args(argv)
    for slug, rows in cut(args.data, args.output, args.by).items():
        print(slug, rows["train"], rows["test"])
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None, "slices"))
