"""``medr1 reasoning``: properties of reasoning that can be counted, from predictions.

None of them says that the reasoning is right: a text can name everything and still be made up. They show reasoning that
cannot have led to its answer, or that would have been written for any image:

* modality      does it name the image's modality (right), another one only (other), or none?
* names_answer  does it name the option that is then answered?
* contradicts   is the last option that it names, and does not reject, another one than the answer?
* template      share of its word 5-grams that occur in the reasoning about many other images
* image_change  how far it differs from the reasoning under a control, where the image was taken away or changed
                (1 - Jaccard index of the word 3-grams: 0 is the same text, 1 has nothing in common)

Only answers with a reasoning block are counted; the share that has one is given first.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from medr1_verl.errors import UserError
from medr1_verl.evaluation.predictions import FILE_NAME, read_rows
from medr1_verl.modality_names import modalities_named
from medr1_verl.parsing import LETTERS, reasoning

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_LETTER = r"(?:\b(?:option|answer|choice)(?:\s+is)?\s*:?\s*\(?([A-Z])\b\)?|\(([A-Z])\)|(?<![A-Za-z(])([A-Z])\))"
# Such options occur in any text without being meant; only their letter counts.
_COMMON = {"yes", "no", "none", "not", "other", "others", "all", "both", "one", "two", "three", "left", "right"}
_NEGATED = re.compile(
    r"(?:\b(?:not|no|without|neither|nor|never|unlikely|rather than|instead of|rul\w+ out|exclud\w+|absence of|"
    r"lack of|unlike)|n't)\b(?:(?!\bbut\b)[^,;:.]){0,25}$",
    re.IGNORECASE,
)
GRAM = 5
COMMON_SHARE = 0.05
"""A 5-gram belongs to a template if it occurs with so many of the images (and with three at least)."""


class Quality(NamedTuple):
    """Of one reasoning; None where the question does not apply (no answer given, no such control)."""

    modality: str
    names_answer: bool | None
    contradicts: bool | None
    template: float


def modality_named(text: str, modality: str) -> str:
    """``right`` if the text names ``modality`` (a slug), ``other`` if only others, ``none`` if it names none."""
    found = modalities_named(text)
    return "right" if modality in found else "other" if found else "none"


def options_named(text: str, options: Sequence[str]) -> list[tuple[int, bool]]:
    """(index of the option, is it rejected?) for every mention in the text, in order, by its text or by its letter.

    An option that is part of a longer one counts only where the longer one does not stand.
    """
    texts = {option.strip().rstrip(".").lower(): index for index, option in reversed(list(enumerate(options)))}
    usable = sorted((text for text in texts if text and text not in _COMMON), key=len, reverse=True)
    parts = [rf"(?<!\w)({'|'.join(map(re.escape, usable))})(?!\w)"] if usable else []
    mentions = []
    for match in re.finditer("|".join([*(f"(?i:{part})" for part in parts), _LETTER]), text):
        if usable and match[1]:
            index = texts[match[1].lower()]
        else:
            letter = next(group for group in match.groups()[len(parts) :] if group)
            index = LETTERS.index(letter)
        if index < len(options):
            mentions.append((index, _NEGATED.search(text[max(0, match.start() - 45) : match.start()]) is not None))
    return mentions


def answer_named(text: str, options: Sequence[str], pred: str) -> tuple[bool | None, bool | None]:
    """(does the reasoning name the answered option, does it end on another one); (None, None) without an answer."""
    if not options or pred not in LETTERS[: len(options)] or not pred:
        return None, None
    given = LETTERS.index(pred)
    named = False
    last: list[tuple[int, bool]] = []
    for sentence in _SENTENCE.split(text):
        mentions = options_named(sentence, options)
        named = named or any(index == given for index, _ in mentions)
        last = [mention for mention in mentions if not mention[1]] or last
    return named, bool(last) and given not in {index for index, _ in last}


def grams(text: str, length: int = GRAM) -> set[Hashable]:
    """The word n-grams of a text, numbers and case aside."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def template_shares(texts: Sequence[tuple[str, str]]) -> list[float]:
    """For each (image, reasoning): the share of its 5-grams that occur in the reasoning about many other images.

    A text of fewer than five words counts as one piece.
    """
    images: dict[Hashable, set[str]] = defaultdict(set)
    pieces = [grams(text) or {text.lower().strip()} for _, text in texts]
    for (image, _), found in zip(texts, pieces, strict=True):
        for gram in found:
            images[gram].add(image)
    needed = max(3.0, COMMON_SHARE * len({image for image, _ in texts}))
    common = {gram for gram, where in images.items() if len(where) >= needed}
    return [len(found & common) / len(found) for found in pieces]


def difference(one: str, other: str) -> float:
    """1 - Jaccard index of the word 3-grams: 0 for the same text, 1 for nothing in common."""
    if one == other:
        return 0.0
    a, b = grams(one, 3), grams(other, 3)
    return 1 - len(a & b) / len(a | b) if a | b else 1.0


Column = tuple[str, str, str]
"""(model, control, decoding): answers that are counted together."""


def column_of(row: dict[str, Any]) -> Column:
    return str(row.get("model", "")), row.get("control", "none"), row.get("decoding", "greedy")


def assess(rows: Sequence[dict[str, Any]]) -> list[Quality | None]:
    """Quality of every row of predictions, None where there is no reasoning. Templates are sought within a column."""
    texts = [reasoning(row["output"]) for row in rows]
    groups: dict[Column, list[int]] = defaultdict(list)
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if text:
            groups[column_of(row)].append(number)
    found: list[Quality | None] = [None] * len(rows)
    with tqdm(total=sum(map(len, groups.values())), desc="reasoning", unit="answer", delay=2) as progress:
        for members in groups.values():
            shares = template_shares([(str(rows[number].get("image_sha256")), texts[number]) for number in members])
            for number, share in zip(members, shares, strict=True):
                row = rows[number]
                named, contradicts = answer_named(texts[number], row.get("options") or (), row["pred"])
                found[number] = Quality(modality_named(texts[number], row["modality"]), named, contradicts, share)
                progress.update()
    return found


def image_changes(rows: Sequence[dict[str, Any]]) -> dict[Column, list[float]]:
    """For every column of a control: how far each reasoning differs from that about the image itself."""
    own: dict[tuple[str, str, str], str] = {}
    for row in rows:
        model, control, decoding = column_of(row)
        if control == "none":
            own[model, decoding, row["question_id"]] = reasoning(row["output"])
    changes: dict[Column, list[float]] = defaultdict(list)
    for row in tqdm(rows, desc="reasoning with and without the image", unit="answer", delay=2):
        model, control, decoding = column_of(row)
        before, after = own.get((model, decoding, row["question_id"])), reasoning(row["output"])
        if control not in ("none", "relettered") and before and after:
            changes[model, control, decoding].append(difference(before, after))
    return dict(changes)


def summarize(
    rows: Sequence[dict[str, Any]], qualities: Sequence[Quality | None] | None = None
) -> list[dict[str, Any]]:
    """One dict for each column: shares (0-1, None where nothing was counted) and the numbers of answers behind them.

    ``qualities`` are those of :func:`assess`, where they are at hand.
    """
    qualities = assess(rows) if qualities is None else qualities
    changes = image_changes(rows)
    groups: dict[Column, list[Quality | None]] = defaultdict(list)
    for row, quality in zip(rows, qualities, strict=True):
        groups[column_of(row)].append(quality)
    lines = []
    for column, members in groups.items():
        known = [quality for quality in members if quality is not None]
        named = Counter(quality.modality for quality in known)
        answered = [quality for quality in known if quality.names_answer is not None]
        change = changes.get(column, [])
        lines.append(
            dict(zip(("model", "control", "decoding"), column, strict=True))
            | {
                "answers": len(members),
                "with_reasoning": len(known) / len(members),
                "names_modality": _share(named["right"], len(known)),
                "names_other_modality": _share(named["other"], len(known)),
                "names_answer": _share(sum(bool(quality.names_answer) for quality in answered), len(answered)),
                "contradicts": _share(sum(bool(quality.contradicts) for quality in answered), len(answered)),
                "template": _share(sum(quality.template for quality in known), len(known)),
                "image_change": _share(sum(change), len(change)),
                "same_without_image": _share(sum(value == 0 for value in change), len(change)),
            }
        )
    return lines


def _share(total: float, count: int) -> float | None:
    return total / count if count else None


HEADINGS = {
    "answers": "answers",
    "with_reasoning": "with reasoning",
    "names_modality": "names its modality",
    "names_other_modality": "names another only",
    "names_answer": "names its answer",
    "contradicts": "ends on another",
    "template": "template",
    "image_change": "changed without the image",
    "same_without_image": "same without the image",
}


def markdown(lines: Iterable[dict[str, Any]]) -> str:
    """A table in per cent."""
    header = ["model", "control", "decoding", *HEADINGS.values()]
    table = ["| " + " | ".join(header) + " |", "|" + " --- |" * 3 + " ---: |" * len(HEADINGS)]
    for line in lines:
        cells = [str(line[name]) for name in ("model", "control", "decoding", "answers")]
        cells += ["-" if line[name] is None else f"{100 * line[name]:.1f}" for name in list(HEADINGS)[1:]]
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="medr1 reasoning",
        description="Countable properties of the reasoning in predictions, in per cent of the answers that have one.",
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="PATH", help="prediction files, or folders of one")
    parser.add_argument("--json", action="store_true", help="shares (0-1) as JSON instead of a table")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for source in args.sources:
        file = source / FILE_NAME if source.is_dir() else source
        for row in read_rows(file):
            if not {"output", "pred", "modality"} <= row.keys():
                raise UserError(f"{file}: question {row['question_id']!r} has no output; was it written by medr1?")
            rows.append(row)
    if not rows:
        raise UserError(f"{', '.join(map(str, args.sources))}: no predictions there")
    lines = summarize(rows)
    print(json.dumps(lines, indent=1) if args.json else markdown(lines))
    return 0
