"""``medr1 tables``: prediction files to the matrices of the paper, with intervals, controls and blind baselines."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from medr1_verl.errors import UserError
from medr1_verl.evaluation import formats
from medr1_verl.evaluation.runs import READINGS, check_styles, load_runs, read_training_rows
from medr1_verl.evaluation.statistics import REPLICATES
from medr1_verl.evaluation.tables import Settings, build

FORMATS = ("md", "csv", "json", "tex", "png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medr1 tables",
        description="Tables from what medr1 evaluate wrote. A run stands in the row of the slice that its name ends "
        "with (ct, grpo-ct, sft_lesion_grading, ...); other runs, such as a base model, stand above.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]DIR", help="directories or files of predictions; NAME= renames a run"
    )
    parser.add_argument("--base", metavar="NAME", help="run to compare the others with")
    parser.add_argument(
        "--train", nargs="+", metavar="PARQUET", help="training rows: for the blind option prior and leaked images"
    )
    parser.add_argument("--output", metavar="DIR", help="write the tables here (default: Markdown to the screen only)")
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, help="of --output (default: all; png where matplotlib is installed)"
    )
    parser.add_argument("--reading", choices=tuple(READINGS), default="strict", help="of the answers (default: strict)")
    parser.add_argument("--decoding", help="where a file holds several: 'greedy' (default), 'T=1 n=4 seed=0', ...")
    parser.add_argument("--styles", action="store_true", help="runs of different styles may stand in one table")
    parser.add_argument("--level", type=float, default=95.0, help="of the intervals, in per cent (default 95)")
    parser.add_argument("--replicates", type=int, default=REPLICATES, help=f"bootstrap draws (default {REPLICATES})")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if not 50 <= args.level < 100 or args.replicates < 100:
        raise UserError("--level must be at least 50 and below 100, --replicates at least 100")
    questions, runs = load_runs(args.runs, args.decoding)
    if not args.styles:
        check_styles(runs)
    training = read_training_rows(args.train) if args.train else None
    tables = build(
        questions, runs, Settings(args.reading, args.level / 100, args.replicates, args.seed), args.base, training
    )
    text = formats.markdown(tables)
    print(text)
    if args.output:
        directory = Path(args.output)
        contents = {
            "md": lambda: text,
            "csv": lambda: formats.csv_text(tables),
            "json": lambda: json.dumps(tables, indent=1) + "\n",
            "tex": lambda: formats.latex(tables),
        }
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for kind in args.formats or FORMATS:
                if kind in contents:
                    (directory / f"tables.{kind}").write_text(contents[kind](), encoding="utf-8")
            if args.formats is None and importlib.util.find_spec("matplotlib") is None:
                print("no heat maps: matplotlib is not installed; pip install 'medr1-verl[report]'", file=sys.stderr)
            elif "png" in (args.formats or FORMATS):
                from medr1_verl.evaluation.figures import write_heatmaps

                write_heatmaps(tables, directory)
        except OSError as error:
            raise UserError(f"{directory}: cannot be written: {error.strerror}") from error
        print(f"written to {directory}")
    return 0
