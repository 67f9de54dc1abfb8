"""``medr1 convert``, the same as ``python data_prep/omnimedvqa_to_parquet.py``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from medr1_verl.convert import images, readers
from medr1_verl.convert.options import Options, usable_cores
from medr1_verl.convert.run import Result, convert
from medr1_verl.convert.verify import verify
from medr1_verl.schema import IMAGE_STORES
from medr1_verl.styles import STYLES
from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="medr1 convert",
        description="OmniMedVQA (raw folder, with or without published split files), or a table of your own questions, "
        "to the parquet that verl's RLHFDataset reads.",
    )
    source = p.add_argument_group("what goes in")
    source.add_argument(
        "--input",
        required=True,
        metavar="DIR",
        help="OmniMedVQA root with Images/ and QA_information/, or a .jsonl, .json or .csv file of questions",
    )
    source.add_argument("--access", choices=tuple(readers.ACCESS_FOLDERS), default="open", help="default: %(default)s")
    source.add_argument(
        "--modality",
        nargs="+",
        choices=tuple(MODALITIES),
        default=[],
        metavar="SLUG",
        help="keep only these: " + " ".join(MODALITIES),
    )
    source.add_argument(
        "--question-type",
        nargs="+",
        choices=tuple(QUESTION_TYPES),
        default=[],
        metavar="SLUG",
        help="keep only these: " + " ".join(QUESTION_TYPES),
    )
    source.add_argument("--limit", type=int, default=0, metavar="N", help="only N rows, spread over the whole input")

    split = p.add_argument_group("train and test")
    split.add_argument(
        "--splits", metavar="DIR", help="published split files (Splits/modality or Splits/question_type of Med-R1)"
    )
    split.add_argument(
        "--split-by",
        choices=("row", "image"),
        default="image",
        help="image: no image, nor a copy of it, is in both (default); row: as in the paper",
    )
    split.add_argument("--test-fraction", type=float, default=0.2, metavar="F", help="default: %(default)s")
    split.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    split.add_argument(
        "--by",
        choices=("none", "modality", "question_type"),
        default="none",
        help="one train/test pair, or one per slice in OUTPUT/<slug>/",
    )

    rows = p.add_argument_group("rows")
    rows.add_argument(
        "--style", choices=tuple(STYLES), default="think", help="answer style asked for (default: %(default)s)"
    )
    rows.add_argument(
        "--template",
        metavar="FILE",
        help="your own prompt: text with {question}, {options} and {style}, docs/reward.md (default: the project's)",
    )
    rows.add_argument(
        "--normalize-options",
        action="store_true",
        help="options in lower case, no trailing period: removes typographic tells",
    )
    rows.add_argument("--shuffle-options", action="store_true", help="options in a new order that the seed decides")

    pictures = p.add_argument_group("images")
    pictures.add_argument(
        "--image-size",
        type=int,
        default=384,
        metavar="N",
        help="fit inside N x N px, 0 keeps the size (default: %(default)s)",
    )
    pictures.add_argument(
        "--image-store",
        choices=IMAGE_STORES,
        default="bytes",
        help="inside the parquet (default), or as files in OUTPUT/images",
    )
    pictures.add_argument(
        "--jpeg-quality",
        type=int,
        default=0,
        metavar="Q",
        help="store lossy JPEG instead of PNG; the manifest then says what it costs",
    )
    pictures.add_argument(
        "--max-pixels",
        type=int,
        default=images.MAX_PIXELS,
        metavar="N",
        help="larger images are rejected undecoded (default: %(default)s)",
    )

    run = p.add_argument_group("the run")
    run.add_argument("--output", metavar="DIR", help="written as a whole or not at all; not needed with --dry-run")
    run.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        metavar="N",
        help="processes (default: one per core, here %(default)s)",
    )
    run.add_argument("--resume", action="store_true", help="go on from what an interrupted run has finished")
    run.add_argument("--strict", action="store_true", help="exit with 1 when a row was rejected")
    run.add_argument(
        "--dry-run", action="store_true", help="check everything but pixels, write nothing, print the manifest"
    )
    run.add_argument(
        "--verify",
        nargs="?",
        const="",
        metavar="MODEL",
        help="read the result back, through verl's RLHFDataset where verl is installed; with a Qwen2-VL folder or name "
        "also the longest prompt in tokens",
    )
    return p


def summary(result: Result, seconds: float) -> str:
    """The table at the end of a run."""
    manifest = result.manifest
    lines = [f"{'':<14}{'train':>9}{'test':>9}"]
    counts = manifest["counts"]
    for modality in MODALITIES:
        row = [sum(counts[split].get(modality, {}).values()) for split in ("train", "test")]
        if any(row):
            lines.append(f"{modality:<14}{row[0]:>9,}{row[1]:>9,}")
    lines.append(f"{'all':<14}{manifest['rows']['train']:>9,}{manifest['rows']['test']:>9,}")
    lines.append(
        f"rows in {manifest['rows_in']:,} = out {manifest['rows_out']:,} + rejected {manifest['rows_rejected']:,}"
        + "".join(f", {reason} {count:,}" for reason, count in manifest["rejected"].items())
    )
    split = manifest["split"]
    lines.append(
        f"split {split['method']}: {split['image_files']:,} image files in {split['image_groups']:,} groups, "
        f"test rows whose image is in train {split['test_rows_whose_image_is_in_train']:,}"
    )
    if lossy := manifest["images"].get("lossy"):
        lines.append(
            f"lossy images: PSNR {lossy['psnr_median_db']} dB median, {lossy['psnr_minimum_db']} dB minimum, "
            f"{lossy['bytes'] / max(1, lossy['bytes_lossless']):.0%} of the lossless size"
        )
    lines.append(f"{seconds:.1f} s, {manifest['rows_in'] / max(seconds, 1e-9):,.0f} rows/s")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    arguments = p.parse_args(argv)
    if arguments.output is None:
        if not arguments.dry_run:
            p.error("--output is needed (or --dry-run)")
        arguments.output = "unused"
    model = arguments.verify
    del arguments.verify
    begin = time.monotonic()
    result = convert(Options(**vars(arguments)))
    table = summary(result, time.monotonic() - begin)
    if arguments.dry_run:
        print(json.dumps(result.manifest, indent=1))
        print(table, file=sys.stderr)
    else:
        print(table)
        print(f"written to {arguments.output}")
        if model is not None:
            names = [name for name in result.manifest["outputs"] if name.endswith(".parquet")]
            print("\n".join(verify([Path(arguments.output).resolve() / name for name in names], model)))
    if result.rejected and arguments.strict:
        print(
            f"medr1 convert: --strict: {len(result.rejected)} row(s) were rejected; see rejected.jsonl", file=sys.stderr
        )
        return 1
    return 0
