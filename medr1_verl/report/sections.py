"""The fixed part of the page: figures, tables and curves as HTML. Every text from a file goes through ``escape``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from medr1_verl.evaluation.formats import number
from medr1_verl.reasoning_quality import HEADINGS
from medr1_verl.report.collect import Audit, public_text
from medr1_verl.taxonomy import QUESTION_TYPES

NAMES = {
    "ct": "CT",
    "mri": "MRI",
    "xray": "X-ray",
    "oct": "OCT",
    **{slug: slug.replace("_", " ") for slug in QUESTION_TYPES},
}
_DASHES = ("", "6 3", "2 2", "9 3 2 3", "1 3", "12 4", "4 4 1 4", "8 2 2 2 2 2")
_COLORS = ("#0b5c8a", "#a33b00", "#2f6b2f", "#6b3fa0", "#7a5c00", "#9c1f5c", "#1f6f6f", "#444444")


def section(title: str, name: str, *parts: str) -> str:
    body = "\n".join(part for part in parts if part)
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>\n{body}</section>' if body else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table of texts; the first column heads its rows."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        lines.append(f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    return (
        f'<div class="wide" tabindex="0"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """Names and values; None is left out."""
    items = [
        f"<dt>{escape(name)}</dt><dd>{escape(public_text(str(value)))}</dd>"
        for name, value in pairs
        if value not in (None, "", [])
    ]
    return f"<dl>{''.join(items)}</dl>" if items else ""


def run_section(summary: dict[str, Any] | None, sentence: str, audit: Audit) -> str:
    """What was run, and what the audit logs beside it say."""
    parts = [f"<p>{escape(sentence)}</p>" if sentence else ""]
    if summary is not None:
        parts.append(
            facts(
                [
                    ("steps", summary.get("steps")),
                    ("seconds", summary.get("seconds")),
                    ("seed", summary.get("seed")),
                    ("trained from", summary.get("model")),
                    ("rows evaluated", summary.get("rows_evaluated")),
                    ("failed groups", summary.get("failed_groups")),
                    ("smallest Pearson correlation of rollout and actor", summary.get("pearson_min")),
                    ("peak memory (GiB)", summary.get("peak_memory_gib")),
                ]
            )
        )
        rows = [
            (label, *(_share(summary.get(f"{name}_{when}")) for when in ("before", "after")))
            for label, name in (
                ("accuracy, sampled at T=1", "accuracy"),
                ("accuracy, greedy", "greedy"),
                ("accuracy, greedy, blank image", "blank"),
                ("answers in the asked form (T=1)", "format"),
            )
        ]
        parts.append(table(["held out, per cent", "before", "after"], rows, "Before and after training"))
        warnings = [public_text(str(text)) for text in summary.get("warnings") or []]
        if warnings:
            items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
            parts.append(f"<h3>Warnings during training</h3><ul>{items}</ul>")
    for context in audit.contexts:
        model = context.get("model", {})
        parts.append(
            f"<h3>Provenance, from the audit log ({escape(str(context.get('source', 'unknown')))})</h3>"
            + facts(
                [
                    ("model", model.get("name")),
                    ("weights, SHA-256", model.get("weights_sha256")),
                    ("hub revision", model.get("revision")),
                    ("base", model.get("base")),
                    ("training step", model.get("step")),
                    ("configuration, SHA-256", model.get("config_sha256")),
                    ("data", ", ".join(f"{one['file']} {one['sha256']}" for one in context.get("data", []))),
                    ("versions", ", ".join(f"{name} {text}" for name, text in context.get("versions", {}).items())),
                ]
            )
        )
    state = "".join(f"<li>{escape(line)}</li>" for line in audit.lines)
    parts.append(
        f"<h3>Audit logs</h3><ul>{state}</ul>" if state else "<p>No audit log stands beside the predictions.</p>"
    )
    return section("Run", "run", *parts)


def data_section(manifests: Sequence[dict[str, Any]]) -> str:
    """Counts of the converter's manifests."""
    parts = []
    for manifest in manifests:
        split = manifest.get("split") or {}
        parts.append(
            facts(
                [
                    ("source", (manifest.get("input") or {}).get("source")),
                    ("rows read", manifest.get("rows_in")),
                    ("rows kept", manifest.get("rows_out")),
                    ("rows rejected", manifest.get("rows_rejected")),
                    ("split by", split.get("method")),
                    ("test rows whose image is in training", split.get("test_rows_whose_image_is_in_train")),
                ]
            )
        )
        for name, counts in (manifest.get("counts") or {}).items():
            types = [slug for slug in QUESTION_TYPES if any(slug in row for row in counts.values())]
            rows = [
                (NAMES.get(slug, slug), *(str(row.get(kind, 0)) for kind in types), str(sum(row.values())))
                for slug, row in counts.items()
            ]
            parts.append(table(["modality", *(NAMES[kind] for kind in types), "all"], rows, f"Rows of {name}"))
    return section("Data", "data", *parts)


def tables_section(tables: dict[str, Any] | None, reasoning: Sequence[dict[str, Any]]) -> str:
    """Accuracy by slice with intervals, chance and controls, and what can be counted of the reasoning."""
    parts = []
    if tables is not None:
        level = f"{100 * tables['level']:g} %"
        parts.append(
            f"<p>Accuracy in per cent by the {escape(tables['reading'])} reading of greedy answers [{level} interval "
            "over images], then chance and the number of rows. Lines of controls: accuracy with the image taken away "
            "or changed, and in brackets what the image adds (asked as it is minus control) with its interval.</p>"
        )
        for by, title in (("modality", "By modality"), ("question_type", "By question type")):
            matrix = tables[by]
            if matrix:
                parts.append(_matrix(matrix, title))
    lines = [
        (
            f"{line['model']}, {line['control']}, {line['decoding']}",
            str(line["answers"]),
            *("-" if line[name] is None else f"{100 * line[name]:.1f}" for name in list(HEADINGS)[1:]),
        )
        for line in reasoning
    ]
    if lines:
        caption = "What can be counted of the reasoning, in per cent; none of it says that the reasoning is right"
        parts.append(table(["answers of", *HEADINGS.values()], lines, caption))
    return section("Tables", "tables", *parts)


def _matrix(matrix: dict[str, Any], title: str) -> str:
    slugs = matrix["columns"]
    rows: list[list[str]] = []

    def cell(found: dict[str, Any] | None) -> str:
        if found is None:
            return "-"
        text = f"{number(found['accuracy'])}\n[{number(found['low'])}, {number(found['high'])}]"
        if "chance" in found:
            text += f"\nchance {number(found['chance'])}\nn {found['n']}"
        return text

    def control_cell(found: dict[str, Any] | None, control: str) -> str:
        one = ((found or {}).get("controls") or {}).get(control)
        if one is None:
            return "-"
        points, low, high = (number(one["difference"][name], True) for name in ("points", "low", "high"))
        return f"{number(one['accuracy'])}\n({points} [{low}, {high}])"

    for row in matrix["rows"]:
        cells = [*(row["cells"][slug] for slug in slugs), row["macro"], row["micro"]]
        rows.append([row["run"], *map(cell, cells)])
        controls = sorted({name for one in cells if one for name in one.get("controls", {})})
        rows += [[f"{row['run']}, {name}", *(control_cell(one, name) for one in cells)] for name in controls]
    header = ["", *(NAMES.get(slug, slug) for slug in slugs), "mean of the columns", "mean of the rows"]
    return table(header, rows, title)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


# --- curves ---------------------------------------------------------------------------------------------------------


def curves_section(panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[tuple[int, float]]]]]]) -> str:
    """Line charts of the metrics over training steps; each with its numbers as a table."""
    parts = [_chart(title, lines) for title, lines in panels if any(points for _, points in lines)]
    return section("Training curves", "curves", f'<div class="charts">{"".join(parts)}</div>' if parts else "")


def _chart(title: str, lines: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> str:
    width, height, left, bottom, top = 420, 230, 52, 34, 10
    lines = [(label, points) for label, points in lines if points]
    steps = [step for _, points in lines for step, _ in points]
    values = [value for _, points in lines for _, value in points if math.isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return left + (width - left - 10) * (step - first) / (last - first)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / (high - low)

    shapes = [
        f'<line x1="{left}" y1="{y(value):.1f}" x2="{width - 10}" y2="{y(value):.1f}" class="grid"/>'
        f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{_short(value)}</text>'
        for value in (low, (low + high) / 2, high)
    ]
    shapes += [
        f'<text x="{x(step):.1f}" y="{height - 12}" text-anchor="{anchor}">{step}</text>'
        for step, anchor in {first: "start", max(steps): "start" if first == max(steps) else "end"}.items()
    ]
    keys = []
    for index, (label, points) in enumerate(lines):
        color, dash = _COLORS[index % len(_COLORS)], _DASHES[index % len(_DASHES)]
        place = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points if math.isfinite(value))
        style = f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"'
        shapes.append(f'<polyline points="{place}" {style}/>')
        if len(points) < 3:
            shapes += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3" fill="{color}"/>' for s, v in points]
        if label and len(lines) > 1:
            keys.append(
                f'<span class="key"><svg width="34" height="8" aria-hidden="true"><line x1="0" y1="4" x2="34" y2="4" '
                f"{style}/></svg> {escape(NAMES.get(label, label))}</span>"
            )
    summary = "; ".join(
        f"{NAMES.get(label, label) or title}: {_short(points[0][1])} at step {points[0][0]}, "
        f"{_short(points[-1][1])} at step {points[-1][0]}"
        for label, points in lines
    )
    by_step: dict[int, dict[int, float]] = {}
    for index, (_, points) in enumerate(lines):
        for step, value in points:
            by_step.setdefault(step, {})[index] = value
    numbers: Callable[[dict[int, float], int], str] = lambda row, index: _short(row[index]) if index in row else "-"  # noqa: E731
    rows = [[str(step), *(numbers(row, index) for index in range(len(lines)))] for step, row in sorted(by_step.items())]
    names = [NAMES.get(label, label) or title for label, _ in lines]
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(f"{title}. {summary}")}">{"".join(shapes)}</svg>{"".join(keys)}'
        f"<details><summary>numbers</summary>{table(['step', *names], rows, title)}</details></figure>"
    )


def _short(value: float) -> str:
    return f"{value:.3g}"
