"""Rows for verl's supervised trainer: the same questions, the same prompt, and the answer block as what to say.

    python -m medr1_verl.sft_rows --train data/train.parquet --output sft.parquet

verl masks everything but the assistant's turn, so the loss is on the answer alone. (The released Med-R1 baseline
trains on prompt and answer together, and its target begins with a literal "None" where a rationale was meant to
be; it is no fair opponent for GRPO.) OmniMedVQA has no rationales, so in the styles with reasoning the target is
the answer block without it: accuracy compares with GRPO's, the format rate does not.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medr1_verl.cli import run as run_command
from medr1_verl.errors import UserError
from medr1_verl.prompt import IMAGE_MARK, render_prompt
from medr1_verl.styles import STYLES
from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES


def sft_table(
    table: pa.Table, style: str | None = None, slices: Sequence[str] = (), shuffle_images: int | None = None
) -> pa.Table:
    """Columns ``messages`` and ``images`` of the rows in ``slices`` (modality or question type slugs; all if empty).

    ``style`` asks in another style than the rows' own. ``shuffle_images`` is a seed with which every row gets the
    images of another row: what is learned from such data cannot come from the image, which makes it a control.
    """
    infos: list[dict[str, Any]] = table.column("extra_info").to_pylist()
    prompts = table.column("prompt").to_pylist()
    kept = [
        number
        for number, info in enumerate(infos)
        if not slices or info["modality"] in slices or info["question_type"] in slices
    ]
    messages = []
    for number in kept:
        info = infos[number]
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in prompts[number]]
        if style is not None and style != info["style"]:
            marks = sum(turn["content"].count(IMAGE_MARK) for turn in turns)
            content = render_prompt(info["question"], info["options"] or (), style, marks)
            turns = [{"role": "user", "content": content}]
        messages.append([*turns, {"role": "assistant", "content": f"<answer>{info['answer']}</answer>"}])
    images = table.column("images").take(pa.array(kept, pa.int64()))
    if shuffle_images is not None:
        images = images.take(pa.array(_derangement(len(kept), shuffle_images), pa.int64()))
    return pa.table({"messages": messages, "images": images})


def _derangement(size: int, seed: int) -> list[int]:
    """A drawn order in which no row keeps its place (a drawn circle over all rows)."""
    circle = list(range(size))
    random.Random(seed).shuffle(circle)
    order = [0] * size
    for place, number in enumerate(circle):
        order[number] = circle[(place + 1) % size]
    return order


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m medr1_verl.sft_rows", description="Training rows for verl's supervised trainer."
    )
    parser.add_argument("--train", type=Path, required=True, metavar="PARQUET", help="what medr1 convert wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="PARQUET")
    parser.add_argument("--style", choices=tuple(STYLES), help="ask in this style instead of the rows' own")
    parser.add_argument(
        "--slice", nargs="+", default=[], choices=(*MODALITIES, *QUESTION_TYPES), help="these rows only"
    )
    parser.add_argument(
        "--shuffle-images", type=int, metavar="SEED", help="control: every row gets another row's images"
    )
    args = parser.parse_args(argv)
    try:
        table = pq.read_table(args.train, columns=["prompt", "images", "extra_info"])
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{args.train}: cannot be read as a parquet of medr1 convert: {str(error).splitlines()[0]}"
        ) from error
    rows = sft_table(table, args.style, args.slice, args.shuffle_images)
    if rows.num_rows < (1 if args.shuffle_images is None else 2):
        raise UserError(f"{args.train}: has no rows of {', '.join(args.slice) or 'any kind'} to train on")
    partial = args.output.with_name(args.output.name + ".partial")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, partial)
    partial.replace(args.output)
    print(rows.num_rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None, "sft rows"))
