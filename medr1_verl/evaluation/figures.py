"""Heat maps of the matrices, in one style: same axes, same colours, every value written in its cell.

Accuracies use matplotlib's cividis and differences its PuOr, both readable with any colour vision deficiency; no
information is in colour alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medr1_verl.errors import UserError
from medr1_verl.evaluation.formats import MISSING, NAMES, TITLES


def write_heatmaps(tables: dict[str, Any], directory: Path) -> list[Path]:
    """PNG files of every matrix: accuracy, gain over the base, accuracy minus each control; what was measured of them.

    Raises :class:`UserError` where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "matplotlib is not installed; pip install 'medr1-verl[report]', or leave png out of --formats"
        ) from error
    matplotlib.use("Agg")
    written = []
    for by, title in TITLES.items():
        table = tables[by]
        if table is None:
            continue
        kinds: list[tuple[str, str, bool]] = [("accuracy", f"{title}: accuracy (%)", False)]
        if tables["base"] is not None:
            kinds.append(("gain", f"{title}: gain over {tables['base']} (points)", True))
        controls = {
            name for row in table["rows"] for cell in row["cells"].values() for name in (cell or {}).get("controls", {})
        }
        kinds += [(name, f"{title}: accuracy minus control {name} (points)", True) for name in sorted(controls)]
        for kind, heading, diverging in kinds:
            values = [[_value(row["cells"][slug], kind) for slug in table["columns"]] for row in table["rows"]]
            names = [row["run"] for row in table["rows"]]
            kept = [index for index, line in enumerate(values) if any(value is not None for value in line)]
            if not kept:
                continue
            path = directory / f"heatmap-{by}-{kind}.png"
            _heatmap(
                [values[index] for index in kept],
                [names[index] for index in kept],
                table["columns"],
                heading,
                diverging,
                path,
            )
            written.append(path)
    return written


def _value(cell: dict[str, Any] | None, kind: str) -> float | None:
    if cell is None:
        return None
    if kind == "accuracy":
        return cell["accuracy"]
    if kind == "gain":
        return cell["gain"]["points"] if "gain" in cell else None
    found = cell.get("controls", {}).get(kind)
    return found["difference"]["points"] if found else None


def _heatmap(
    values: list[list[float | None]], rows: list[str], columns: list[str], heading: str, diverging: bool, path: Path
) -> None:
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    data = np.array([[np.nan if value is None else value for value in line] for line in values])
    limit = max(1.0, float(np.nanmax(np.abs(data))))
    low, high = (-limit, limit) if diverging else (0.0, 100.0)
    figure = Figure(figsize=(2.4 + 0.95 * len(columns), 1.7 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["PuOr" if diverging else "cividis"]
    image = axes.imshow(data, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(columns)), [NAMES.get(slug, slug) for slug in columns], rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [NAMES.get(name, name) for name in rows])
    axes.set_xlabel("tested on")
    axes.set_ylabel("run")
    axes.set_title(heading, fontsize=10)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            text = MISSING if value is None else f"{value:+.1f}" if diverging else f"{value:.1f}"
            red, green, blue, _ = colours(0.0 if value is None else (value - low) / (high - low))
            dark = value is not None and 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    figure.colorbar(image, ax=axes, fraction=0.04)
    figure.savefig(path, dpi=150, metadata={"Software": None})
