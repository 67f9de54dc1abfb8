"""The tables as Markdown, CSV and LaTeX; JSON is the tables as they are."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

NAMES = {
    "ct": "CT",
    "mri": "MRI",
    "xray": "X-ray",
    "ultrasound": "Ultrasound",
    "dermoscopy": "Dermoscopy",
    "fundus": "Fundus",
    "oct": "OCT",
    "microscopy": "Microscopy",
    "modality_recognition": "Modality recognition",
    "anatomy_identification": "Anatomy identification",
    "disease_diagnosis": "Disease diagnosis",
    "lesion_grading": "Lesion grading",
    "other_biological_attributes": "Other attributes",
}
MISSING = "-"
TITLES = {"modality": "Tested on each modality", "question_type": "Tested on each question type"}


def number(value: float | None, signed: bool = False) -> str:
    """Two decimals; a dash for what was not measured."""
    if value is None:
        return MISSING
    return f"{value:+.2f}" if signed else f"{value:.2f}"


def _interval(cell: dict[str, Any], key: str = "accuracy") -> str:
    signed = key == "points"
    return f"{number(cell[key], signed)} [{number(cell['low'], signed)}, {number(cell['high'], signed)}]"


def _gain(cell: dict[str, Any] | None) -> str:
    if cell is None or "gain" not in cell:
        return MISSING
    gain = cell["gain"]
    relative = MISSING if gain["relative"] is None else f"{gain['relative']:+.1f} %"
    return f"{_interval(gain, 'points')} ({relative})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"
    return "\n".join([_line(header), rule, *map(_line, lines)])


def markdown(tables: dict[str, Any]) -> str:
    """The report that a person reads."""
    level = f"{100 * tables['level']:g} %"
    parts = [
        f"Accuracy in per cent by the {tables['reading']} reading, with {level} intervals ({tables['replicates']} "
        f"bootstrap draws of whole images, seed {tables['seed']}). In a cell: accuracy [interval], then chance, the "
        "blind option prior (options normalised, learned from the run's own training rows; it sees neither image nor "
        "question) and the number of rows. A dash is what was not measured."
    ]
    for by, title in TITLES.items():
        if tables[by] is not None:
            parts += [f"## {title}", _matrix_markdown(tables[by], tables["base"])]
    parts += ["## Runs", _runs_markdown(tables["runs"], tables["base"])]
    return "\n\n".join(parts) + "\n"


def _matrix_markdown(table: dict[str, Any], base: str | None) -> str:
    columns = table["columns"]

    def body(cell: dict[str, Any] | None) -> str:
        if cell is None:
            return MISSING
        beside = f"chance {number(cell['chance'])}, blind {number(cell['prior_normalized'])}, n {cell['n']}"
        return f"{_interval(cell)}<br>{beside}"

    header = ["trained on / tested on", *(NAMES.get(slug, slug) for slug in columns), "macro mean", "micro mean"]
    lines = []
    for row in table["rows"]:
        means = [_interval(row[kind]) if row[kind] else MISSING for kind in ("macro", "micro")]
        lines.append([row["run"], *(body(row["cells"][slug]) for slug in columns), *means])
    if table["overall"]:
        for kind in ("macro", "micro"):
            means = [
                _interval(table["column_means"][slug][kind]) if table["column_means"][slug] else MISSING
                for slug in columns
            ]
            overall = _interval(table["overall"][kind])
            lines.append([f"column mean, {kind}", *means, *([overall, ""] if kind == "macro" else ["", overall])])
    parts = [_grid(header, lines)]
    missing = [f"{row['run']} ({', '.join(row['missing'])})" for row in table["rows"] if row["missing"]]
    if missing:
        parts.append(f"Means are left out where a slice was not tested: {'; '.join(missing)}.")
    places = [
        (label, table[key])
        for label, key in (("all cells", "overall"), ("diagonal", "diagonal"), ("off the diagonal", "off_diagonal"))
    ]
    if any(place for _, place in places):
        parts.append(
            _grid(
                ["mean over", "cells", "macro", "micro", f"gain over {base}, macro: points (relative)", "gain, micro"],
                [
                    [
                        label,
                        str(place["cells"]),
                        _interval(place["macro"]),
                        _interval(place["micro"]),
                        _gain(place["macro"]),
                        _gain(place["micro"]),
                    ]
                    for label, place in places
                    if place
                ],
            )
        )
    if any(cell and "gain" in cell for row in table["rows"] for cell in row["cells"].values()):
        parts += [f"### Gain over {base}", _gains_markdown(table)]
    if any(cell and cell.get("controls") for row in table["rows"] for cell in row["cells"].values()):
        parts += ["### What the image contributes", _controls_markdown(table)]
    if any(cell and cell["unleaked_n"] is not None for row in table["rows"] for cell in row["cells"].values()):
        parts += ["### Without rows whose image was trained on", _unleaked_markdown(table)]
    return "\n\n".join(parts)


def _gains_markdown(table: dict[str, Any]) -> str:
    """Points [interval] (relative), and McNemar's p on the same rows."""

    def body(cell: dict[str, Any] | None) -> str:
        if cell is None or "gain" not in cell:
            return MISSING
        p = f"<br>p {cell['mcnemar']['p']:.2g}" if "mcnemar" in cell else ""
        return _gain(cell) + p

    columns = table["columns"]
    header = ["run", *(NAMES.get(slug, slug) for slug in columns), "macro mean", "micro mean"]
    rows = [row for row in table["rows"] if any(cell and "gain" in cell for cell in row["cells"].values())]
    lines = [
        [row["run"], *(body(row["cells"][slug]) for slug in columns), body(row["macro"]), body(row["micro"])]
        for row in rows
    ]
    note = "Points [interval] (relative to the base); p: McNemar's exact test on the same rows."
    return note + "\n\n" + _grid(header, lines)


def _controls_markdown(table: dict[str, Any]) -> str:
    """Accuracy under the control, and accuracy with the image minus that, paired on the same rows."""
    columns = table["columns"]
    header = ["run, control", *(NAMES.get(slug, slug) for slug in columns), "macro mean", "micro mean"]
    lines = []
    for row in table["rows"]:
        controls = list(
            dict.fromkeys(name for cell in row["cells"].values() if cell for name in cell.get("controls", ()))
        )
        for control in controls:
            places = [*(row["cells"][slug] for slug in columns), row["macro"], row["micro"]]
            told = []
            for cell in places:
                found = (cell or {}).get("controls", {}).get(control)
                told.append(
                    f"{number(found['accuracy'])}<br>{_interval(found['difference'], 'points')}" if found else MISSING
                )
            lines.append([f"{row['run']}, {control}", *told])
    note = "Accuracy under the control; below it, accuracy as asked minus that [interval], on the same rows."
    return note + "\n\n" + _grid(header, lines)


def _unleaked_markdown(table: dict[str, Any]) -> str:
    columns = table["columns"]

    def body(cell: dict[str, Any] | None) -> str:
        return (
            MISSING if cell is None else f"{number(cell['unleaked_accuracy'])} (n {cell['unleaked_n']} of {cell['n']})"
        )

    header = ["run", *(NAMES.get(slug, slug) for slug in columns)]
    return _grid(header, [[row["run"], *(body(row["cells"][slug]) for slug in columns)] for row in table["rows"]])


_RUN_COLUMNS = (
    ("rows", "n"),
    ("images", "images"),
    ("strict", "strict"),
    ("tolerant", "tolerant"),
    ("released code", "reference"),
    ("format", "format"),
    ("unparsed", "unparsed"),
    ("unparsed, tolerant", "unparsed_tolerant"),
    ("tokens, mean", "tokens_mean"),
    ("tokens, median", "tokens_median"),
    ("cut off", "truncated"),
    ("token F1, open questions", "token_f1"),
    ("chance", "chance"),
    ("blind prior, exact", "prior_exact"),
    ("blind prior, normalised", "prior_normalized"),
    ("majority letter", "majority_letter_accuracy"),
    ("rows with an unseen image", "unleaked_n"),
)


def _runs_markdown(runs: Sequence[dict[str, Any]], base: str | None) -> str:
    shown = [(label, key) for label, key in _RUN_COLUMNS if any(run.get(key) is not None for run in runs)]
    controls = list(dict.fromkeys(control for run in runs for control in run["controls"]))
    gained = any("gain" in run for run in runs)
    header = ["run", "style", "accuracy", *([f"over {base}"] if gained else [])]
    header += [*(label for label, _ in shown), *(f"minus {control}" for control in controls)]
    lines = []
    for run in runs:
        values = [str(run[key]) if isinstance(run.get(key), int) else number(run.get(key)) for _, key in shown]
        differences = [
            _interval(run["controls"][control]["difference"], "points") if control in run["controls"] else MISSING
            for control in controls
        ]
        over = _gain(run) + (f"<br>p {run['mcnemar']['p']:.2g}" if "mcnemar" in run else "")
        lines.append([run["run"], run["style"], _interval(run), *([over] if gained else []), *values, *differences])
    return _grid(header, lines)


# --- for programs and papers ------------------------------------------------------------------------------------------


def long_rows(tables: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat dict for every cell of both matrices, and for every mean of a row."""
    flat = []
    for by in TITLES:
        for row in (tables[by] or {"rows": []})["rows"]:
            places = [*row["cells"].items(), ("macro", row["macro"]), ("micro", row["micro"])]
            for place, cell in places:
                if cell is None:
                    continue
                gain, test = cell.get("gain", {}), cell.get("mcnemar", {})
                line = {
                    "table": by,
                    "run": row["run"],
                    "trained_on": row["trained_on"] or "",
                    "tested_on": place,
                    "n": cell["n"],
                    "images": cell["images"],
                    "accuracy": cell["accuracy"],
                    "low": cell["low"],
                    "high": cell["high"],
                    "chance": cell.get("chance"),
                    "prior_normalized": cell.get("prior_normalized"),
                    "prior_exact": cell.get("prior_exact"),
                    "tolerant": cell.get("tolerant"),
                    "reference": cell.get("reference"),
                    "unparsed": cell.get("unparsed"),
                    "unleaked_n": cell.get("unleaked_n"),
                    "unleaked_accuracy": cell.get("unleaked_accuracy"),
                    "gain_points": gain.get("points"),
                    "gain_low": gain.get("low"),
                    "gain_high": gain.get("high"),
                    "gain_relative": gain.get("relative"),
                    "mcnemar_run_only": test.get("run_only"),
                    "mcnemar_base_only": test.get("base_only"),
                    "mcnemar_p": test.get("p"),
                }
                for control in ("blank", "shuffled", "text-only", "relettered"):
                    found = cell.get("controls", {}).get(control, {})
                    line[f"{control}_accuracy"] = found.get("accuracy")
                    for key in ("points", "low", "high"):
                        line[f"minus_{control}_{key}"] = found.get("difference", {}).get(key)
                flat.append(line)
    return flat


def csv_text(tables: dict[str, Any]) -> str:
    """:func:`long_rows` with a header; empty where nothing was measured."""
    rows = long_rows(tables)
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return stream.getvalue()


def latex(tables: dict[str, Any]) -> str:
    """Both matrices as booktabs tables: accuracy, interval below, chance and blind prior below that."""
    parts = []
    for by, title in TITLES.items():
        table = tables[by]
        if table is None:
            continue
        columns = table["columns"]
        lines = [
            r"\begin{table}",
            r"\centering\small",
            rf"\caption{{{title}: accuracy (\%), {100 * tables['level']:g}\,\% interval, chance\,/\,blind prior.}}",
            rf"\begin{{tabular}}{{l{'r' * (len(columns) + 2)}}}",
            r"\toprule",
            " & ".join(["", *(NAMES.get(slug, _tex(slug)) for slug in columns), "Macro", "Micro"]) + r" \\",
            r"\midrule",
        ]
        for row in table["rows"]:
            places = [*(row["cells"][slug] for slug in columns), row["macro"], row["micro"]]
            lines.append(
                " & ".join([_tex(row["run"]), *(number(cell and cell["accuracy"]) for cell in places)]) + r" \\"
            )
            lines.append(" & ".join(["", *(_tex_small(cell) for cell in places)]) + r" \\")
            beside = [_tex_beside(row["cells"][slug]) for slug in columns]
            lines.append(" & ".join(["", *beside, "", ""]) + r" \\[2pt]")
        if table["overall"]:
            lines.append(r"\midrule")
            for kind in ("macro", "micro"):
                means = [
                    number(mean and mean[kind]["accuracy"])
                    for mean in (table["column_means"][slug] for slug in columns)
                ]
                overall = number(table["overall"][kind]["accuracy"])
                ends = [overall, ""] if kind == "macro" else ["", overall]
                lines.append(" & ".join([f"Mean, {kind}", *means, *ends]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        parts.append("\n".join(lines).replace(f" {MISSING} ", " -- "))
    return "\n\n".join(parts) + "\n"


def _tex(text: str) -> str:
    for character in "\\&%$#_{}":
        text = text.replace(character, rf"\{character}" if character != "\\" else "/")
    return text


def _tex_small(cell: dict[str, Any] | None) -> str:
    return "" if cell is None else rf"{{\tiny [{number(cell['low'])}, {number(cell['high'])}]}}"


def _tex_beside(cell: dict[str, Any] | None) -> str:
    return "" if cell is None else rf"{{\tiny {number(cell['chance'])}\,/\,{number(cell['prior_normalized'])}}}"
