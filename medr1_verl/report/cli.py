"""``medr1 report``: the run, the data, tables and curves, and a browser of answers, in one HTML file."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medr1_verl import __version__
from medr1_verl.errors import UserError
from medr1_verl.evaluation.runs import load_runs
from medr1_verl.evaluation.tables import Settings, build
from medr1_verl.reasoning_quality import assess, summarize
from medr1_verl.report import sections
from medr1_verl.report.collect import (
    Answers,
    collect_answers,
    prediction_files,
    public_text,
    read_audit,
    read_json,
    read_predictions,
)
from medr1_verl.run_folder import read_metrics
from medr1_verl.summary import learned, panels

EMBED_AT_MOST = 300
"""Images that go into the page by themselves; more of them go into a folder beside it."""

_HERE = Path(__file__).parent
_SELECTS = (
    ("column", "answers of", ()),
    ("modality", "modality", (("", "all"),)),
    ("type", "question type", (("", "all"),)),
    ("verdict", "verdict", (("", "all"), ("right", "right"), ("wrong", "wrong"), ("unparsed", "unparsed"))),
    (
        "disagreement",
        "disagreement",
        (("", "any"), ("models", "another model answers otherwise"), ("controls", "a control answers otherwise")),
    ),
    (
        "quality",
        "reasoning",
        (
            ("", "any"),
            ("other-modality", "names another modality only"),
            ("no-modality", "names no modality"),
            ("not-named", "does not name its answer"),
            ("contradicts", "ends on another option"),
            ("template", "mostly a template"),
            ("same-without", "the same without the image"),
        ),
    ),
)


def write_report(
    folders: Sequence[Path], output: Path, data: Sequence[Path], images: str | None = None
) -> tuple[list[str], int]:
    """Write the page; returns what is missing in it, in words, and the number of answers. Raises :class:`UserError`.

    ``images``: ``embed`` puts them into the page, ``files`` into a folder beside it, ``none`` leaves them out; None
    embeds up to 300.
    """
    run_dir = folders[0]
    notes: list[str] = []
    files = [file for folder in folders for file in prediction_files(folder)]
    rows = read_predictions(files)
    if not rows and not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"{run_dir}: no predictions and no metrics there; give the folder of a run or of an evaluation")
    if not rows:
        notes.append("no answers: the run has no predictions yet")
    data = data or _data_of(run_dir)
    audit = read_audit(dict.fromkeys(file.parent for file in files))
    qualities = assess(rows)
    content, more = collect_answers(rows, qualities, data, audit) if rows else (Answers(), [])
    notes += more
    summary = read_json(run_dir / "summary.json")
    if summary is None and (run_dir / "metrics.jsonl").is_file():
        notes.append("summary.json is missing: the run did not end, or is still going on")
    manifests = [
        found for path in data if (found := read_json((path if path.is_dir() else path.parent) / "manifest.json"))
    ]
    tables = None
    if rows:
        try:
            tables = build(*load_runs([str(file) for file in files]), Settings())
        except UserError as error:
            notes.append(f"no tables: {public_text(str(error))}")
    metrics = read_metrics(run_dir) if run_dir.is_dir() else {}
    body = [
        sections.run_section(summary, _sentence(summary), audit),
        sections.data_section(manifests),
        sections.tables_section(tables, summarize(rows, qualities)),
        sections.curves_section(panels(metrics)),
        _browser() if rows else "",
    ]
    title = run_dir.resolve().stem if run_dir.is_file() else run_dir.resolve().name
    links = _store_images(content, output, images)
    html = _page(title, body, notes, content, links)
    partial = output.with_name(output.name + ".partial")
    try:
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    return notes, len(content.answers)


def _data_of(run_dir: Path) -> list[Path]:
    """The test rows of a run of the recipe, from what it noted."""
    noted = (read_json(run_dir / "run.json") or {}).get("DATA_DIR")
    return [Path(noted)] if noted and (Path(noted) / "test.parquet").is_file() else []


def _sentence(summary: dict[str, Any] | None) -> str:
    try:
        return "" if summary is None else learned(summary)
    except (KeyError, TypeError, ValueError):
        return ""  # a summary of another version: its known figures are listed all the same


def _store_images(content: Answers, output: Path, how: str | None) -> dict[str, str]:
    """Where the page finds each picture: a data URI, or a file in the folder ``<page>_images``."""
    if how == "none":
        for question in content.questions:
            question["images"] = []
        for answer in content.answers:
            answer[6].pop("seen", None)
        return {}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = output.with_name(output.stem + "_images")
        if how == "embed" or (how is None and len(content.pictures) <= EMBED_AT_MOST):
            return {key: picture.uri for key, picture in content.pictures.items()}
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        for key, picture in tqdm(content.pictures.items(), desc="image files", delay=2):
            (folder / f"{key}.{picture.suffix}").write_bytes(picture.data)
    except OSError as error:
        raise UserError(f"{output.parent}: cannot be written: {error.strerror}") from error
    return {key: f"{folder.name}/{key}.{picture.suffix}" for key, picture in content.pictures.items()}


def _browser() -> str:
    selects = "".join(
        f'<label>{escape(label)}<select id="{name}">'
        + "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in options)
        + "</select></label>"
        for name, label, options in _SELECTS
    )
    return sections.section(
        "Answers",
        "browser",
        "<p>Keys: j and k next and previous answer, n and p next and previous page, / search, Esc leaves a field.</p>",
        f'<fieldset><legend>Filters</legend>{selects}<label>search<input id="search" type="search"></label></fieldset>',
        '<div class="browser"><div><div class="pager"><button type="button" id="previous">previous page</button>'
        '<button type="button" id="next">next page</button><span id="count" role="status"></span></div>'
        '<ul id="list" aria-label="answers"></ul></div>'
        '<article id="detail" aria-label="answer" aria-live="polite"></article></div>',
    )


def _json_script(name: str, value: Any) -> str:
    # Pure ASCII without "<": nothing in it can end the script element or be markup.
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _page(title: str, body: Sequence[str], notes: Sequence[str], content: Answers, links: dict[str, str]) -> str:
    missing = "".join(f"<li>{escape(note)}</li>" for note in notes)
    # No address may be asked: images come from the page itself or from beside it.
    policy = (
        "default-src 'none'; img-src data: file: 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
    data = {"questions": content.questions, "columns": content.columns, "answers": content.answers}
    scripts = ""
    if content.answers:
        program = (_HERE / "browser.js").read_text(encoding="utf-8")
        scripts = f"{_json_script('answers', data)}\n{_json_script('images', links)}\n<script>\n{program}</script>"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<title>{escape(title)} - Med-R1 report</title><link rel="icon" href="data:,">',
            f"<style>\n{(_HERE / 'page.css').read_text(encoding='utf-8')}</style></head>",
            f"<body><header><h1>{escape(title)}</h1>",
            f"<p>Report of medr1-verl {escape(__version__)}.</p>",
            '<p class="notice">For research. This is no medical device, and no answer in it is medical advice.</p>',
            f'<div class="notice"><p>Not in this report:</p><ul>{missing}</ul></div>' if missing else "",
            "</header><main>",
            *body,
            f"</main>{scripts}</body></html>",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="medr1 report",
        description="One HTML page that needs no network: the run, the data, tables, curves, and a browser of answers.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="run folder; more of them add their answers to compare"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: DIR/report.html")
    parser.add_argument(
        "--data", nargs="+", type=Path, default=[], metavar="PARQUET", help="rows asked (default: those of the run)"
    )
    parser.add_argument(
        "--images",
        choices=("embed", "files", "none"),
        help=f"default: embed up to {EMBED_AT_MOST} images, else files in a folder beside the page",
    )
    args = parser.parse_args(argv)
    first = args.folders[0]
    output = args.output or (first / "report.html" if first.is_dir() else first.with_name("report.html"))
    notes, answers = write_report(args.folders, output, args.data, args.images)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{output}: {answers} answers, {output.stat().st_size / 2**20:.1f} MiB")
    return 0
