"""``medr1 card``: a model card and a data card in Hugging Face's form, from the files of a run and of a data set.

    medr1 card model runs/NAME            writes runs/NAME/model/README.md
    medr1 card data data/omnimedvqa       writes data/omnimedvqa/README.md

Every figure is read from a file: the run's summary, settings and predictions, the data's manifest and rows. What was
not measured is left out and named. Only the statements on use and limits are fixed text. No path is written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medr1_verl import __version__, inspect
from medr1_verl.audit.provenance import folder_sha256, public_name
from medr1_verl.errors import UserError
from medr1_verl.evaluation import formats
from medr1_verl.evaluation.runs import load_runs, read_training_rows
from medr1_verl.evaluation.tables import Settings, build
from medr1_verl.reasoning_quality import markdown as reasoning_table
from medr1_verl.reasoning_quality import summarize
from medr1_verl.report.collect import prediction_files, public_text, read_audit, read_json, read_predictions
from medr1_verl.summary import learned

USE = """\
For research on reasoning and reinforcement learning in medical visual question answering: comparing training
settings, studying what a model takes from the image, reproducing published protocols.

**It is no medical device. It must not be used for diagnosis, triage, treatment or any other decision about a
patient.**"""

LIMITS = (
    "It chooses among given options. Its accuracy on such questions says little about free findings or about images "
    "from another source.",
    "Its reasoning is text that was rewarded for its form and for the answer after it. Nothing in training checked "
    "that the reasoning is true, or that the answer follows from it.",
    "Questions of a data set can often be answered from their options alone. Read every accuracy beside chance, the "
    "blind option prior and the controls.",
)

# Settings of verl that the card lists, where the run changed them: the key in hydra's overrides.
_SETTINGS = {
    "algorithm.adv_estimator": "algorithm",
    "data.train_batch_size": "prompts a step",
    "actor_rollout_ref.rollout.n": "answers a prompt",
    "actor_rollout_ref.rollout.temperature": "temperature",
    "data.max_prompt_length": "prompt, tokens at most",
    "data.max_response_length": "answer, tokens at most",
    "actor_rollout_ref.actor.optim.lr": "learning rate",
    "actor_rollout_ref.actor.kl_loss_coef": "KL coefficient in the loss",
    "actor_rollout_ref.actor.kl_loss_type": "KL estimator",
    "actor_rollout_ref.actor.loss_agg_mode": "loss aggregation",
    "actor_rollout_ref.actor.strategy": "strategy",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "mini-batch",
    "trainer.n_gpus_per_node": "devices a node",
    "trainer.nnodes": "nodes",
    "data.seed": "seed of the data order",
    "optim.lr": "learning rate",  # these three: verl's supervised trainer
    "optim.lr_scheduler_type": "schedule of the learning rate",
    "engine.strategy": "strategy",
}


def model_card(run_dir: Path, data: Path | None = None) -> tuple[str, list[str]]:
    """(the card, what it lacks in words). Raises :class:`UserError` for a folder that is no run."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    summary = read_json(run_dir / "summary.json")
    record = read_json(run_dir / "run.json") or {}
    files = prediction_files(run_dir)
    if summary is None and not files and not record:
        raise UserError(f"{run_dir}: has no summary.json, run.json or predictions; give the folder of a run")
    notes: list[str] = []
    data = data or (Path(record["DATA_DIR"]) if record.get("DATA_DIR") else None)
    if data is not None and not data.is_dir():
        notes.append("the data of the run is not where it was: no blind option prior, no leakage (--data)")
        data = None
    base = public_name(str(record.get("MODEL_PATH") or (summary or {}).get("model") or ""))
    rows = read_predictions(files)
    tables = _tables(files, data, notes) if rows else None
    if not rows:
        notes.append("no predictions: the card has no accuracy")
    name = run_dir.resolve().name
    overrides = _overrides(run_dir / "config" / "overrides.yaml")
    parts = [_front(_model_front(base, name, overrides, tables)), f"# {name}"]
    parts += [_model_sentence(base, overrides, summary), "## Intended use", USE]
    parts += ["## Limits", _list(LIMITS)]
    parts += ["## Training", _training(run_dir, summary, base, record, overrides)]
    manifest = read_json(data / "manifest.json") if data is not None else None
    if manifest is not None:
        parts += ["## Data", _manifest_facts(manifest)]
    if tables is not None:
        parts += [
            "## Evaluation",
            formats.markdown(tables).replace("\n## ", "\n### ").replace("\n### Runs", "\n### Runs"),
        ]
        parts += ["## Reasoning, as far as it can be counted", reasoning_table(summarize(rows))]
    logs = read_audit(dict.fromkeys(file.parent for file in files)).lines
    if logs:
        parts += ["## Audit logs", _list(logs)]
    if notes:
        parts += ["## Not in this card", _list(notes)]
    parts.append(f"Written by medr1-verl {__version__} from the files of the run.")
    return "\n\n".join(part for part in parts if part) + "\n", notes


def _tables(files: Sequence[Path], data: Path | None, notes: list[str]) -> dict[str, Any] | None:
    training = None
    if data is not None:
        try:
            training = read_training_rows([data])
        except UserError as error:
            notes.append(f"no blind option prior and no leakage: {public_text(str(error))}")
    try:
        return build(*load_runs([str(file) for file in files]), Settings(), training=training)
    except UserError as error:
        notes.append(f"no tables: {public_text(str(error))}")
        return None


def _model_sentence(base: str, overrides: dict[str, str], summary: dict[str, Any] | None) -> str:
    how = overrides.get("algorithm.adv_estimator", "")
    text = "A vision-language model for medical visual question answering"
    if how:
        text += f", trained by {how.upper()} with a verifiable reward"
    elif (summary or {}).get("loss_first") is not None:
        text += ", trained by supervised steps on the right answers"
    # Merged runs are folders called "model": that name says nothing to a reader.
    text += f", from {base}." if base and base != "model" else "."
    if summary is not None:
        # A summary of another version may lack what the sentence needs: the tables have the figures all the same.
        with contextlib.suppress(KeyError, TypeError, ValueError):
            text += " " + learned(summary)
    return text


def _model_front(base: str, name: str, overrides: dict[str, str], tables: dict[str, Any] | None) -> dict[str, Any]:
    how = overrides.get("algorithm.adv_estimator")
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["medical", "visual-question-answering", *([how] if how else []), "verl", "med-r1"],
    }
    if base.count("/") == 1:  # a hub id; the name of somebody's folder is no base model to others
        front["base_model"] = base
    rows = (((tables or {}).get("modality") or {}).get("rows")) or []
    own = next((row for row in rows if row["micro"] is not None and row["run"] != "before"), None)
    if own is not None:
        metric = {"type": "accuracy", "value": round(own["micro"]["accuracy"], 2), "name": "accuracy (greedy, strict)"}
        result = {
            "task": {"type": "visual-question-answering"},
            "dataset": {"type": "medical-vqa", "name": f"held-out rows of the run ({own['micro']['n']})"},
            "metrics": [metric],
        }
        front["model-index"] = [{"name": name, "results": [result]}]
    return front


def _training(
    run_dir: Path,
    summary: dict[str, Any] | None,
    base: str,
    record: dict[str, Any],
    overrides: dict[str, str],
) -> str:
    model = run_dir / "model"
    figures = summary or {}
    pairs = [
        ("trained from", base),
        ("steps", figures.get("steps")),
        ("seed", figures.get("seed", record.get("SEED"))),
        ("style", record.get("STYLE") or None),
        *((label, overrides.get(key)) for key, label in _SETTINGS.items()),
        ("seconds", figures.get("seconds")),
        ("peak memory (GiB)", figures.get("peak_memory_gib")),
        ("weights and tokenizer, SHA-256", folder_sha256(model) if model.is_dir() else None),
    ]
    warnings = [public_text(str(text)) for text in figures.get("warnings") or []]
    told = "Warnings during training:\n\n" + _list(warnings) if warnings else ""
    return "\n\n".join(filter(None, [_table(("setting", "value"), _known(pairs)), told]))


def _overrides(path: Path) -> dict[str, str]:
    """Hydra's ``overrides.yaml``: a list of ``- key=value``; later ones win."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.removeprefix("- ").strip("'\" ").lstrip("+").partition("=") for line in lines)
    return {key: value for key, _, value in pairs if value}


# --- data ----------------------------------------------------------------------------------------------------------


def data_card(folder: Path) -> tuple[str, list[str]]:
    """(the card of a converted data set, what it lacks in words). Raises :class:`UserError` where there is none."""
    manifest = read_json(folder / "manifest.json")
    if manifest is None:
        raise UserError(f"{folder}: has no manifest.json; give the folder that medr1 convert wrote")
    notes: list[str] = []
    pairs = _pairs(folder)
    configs = [
        {
            "config_name": name or "default",
            "data_files": [
                {"split": split, "path": f"{name}/{split}.parquet" if name else f"{split}.parquet"}
                for split in ("train", "test")
                if (folder / name / f"{split}.parquet").is_file()
            ],
        }
        for name in pairs
    ]
    front: dict[str, Any] = {
        "task_categories": ["visual-question-answering"],
        "tags": ["medical", "verl", "med-r1"],
        "configs": configs,
    }
    title = folder.resolve().name
    parts = [
        _front(front),
        f"# {title}",
        "Questions about medical images with their options and right answers, as rows that verl's data set reads.",
        "## Intended use",
        USE,
        "## How it was made",
        _manifest_facts(manifest),
    ]
    rejected = manifest.get("rejected") or {}
    if rejected:
        lines = [(str(reason), str(count)) for reason, count in rejected.items()]
        parts += ["Rejected rows, by reason:", _table(("reason", "rows"), lines)]
    for split, counts in (manifest.get("counts") or {}).items():
        kinds = list(dict.fromkeys(kind for row in counts.values() for kind in row))
        cells = [
            [slug, *(str(row.get(kind, 0)) for kind in kinds), str(sum(row.values()))] for slug, row in counts.items()
        ]
        parts += [f"Rows of {split}:", _table(("modality", *kinds, "all"), cells)]
    parts += ["## How far it can be answered without looking", _blind(folder, pairs, notes)]
    parts += ["## Limits", _list(_data_limits(manifest))]
    parts += ["## Files", _files(manifest)]
    if notes:
        parts += ["## Not in this card", _list(notes)]
    parts.append(f"Written by medr1-verl {__version__} from the manifest and the rows.")
    return "\n\n".join(part for part in parts if part) + "\n", notes


def _pairs(folder: Path) -> list[str]:
    """ "" for a pair of files in the folder itself, and the names of the slices that have their own."""
    own = [""] if (folder / "test.parquet").is_file() or (folder / "train.parquet").is_file() else []
    return own + sorted(file.parent.name for file in folder.glob("*/test.parquet"))


def _manifest_facts(manifest: dict[str, Any]) -> str:
    """What the converter noted, without the folders of whoever ran it."""
    arguments, split = manifest.get("arguments") or {}, manifest.get("split") or {}
    source = manifest.get("input") or {}
    listed = [(label, arguments.get(key)) for key, label in (("access", "access"), ("style", "style"))]
    listed += [("image size, at most", arguments.get("image_size")), ("kept of the options", _options_kept(arguments))]
    facts = [
        ("source", source.get("source")),
        ("source files", len(source["files"]) if source.get("files") else None),
        ("rows read", manifest.get("rows_in")),
        ("rows kept", manifest.get("rows_out")),
        ("rows rejected", manifest.get("rows_rejected")),
        *listed,
        ("split by", split.get("method")),
        ("test fraction", split.get("test_fraction")),
        ("seed", split.get("seed")),
        ("test rows whose image is in training", split.get("test_rows_whose_image_is_in_train")),
        ("converter", manifest.get("medr1_verl")),
    ]
    return _table(("", ""), _known(facts))


def _options_kept(arguments: dict[str, Any]) -> str:
    said = [name.replace("_", " ") for name in ("normalize_options", "shuffle_options") if arguments.get(name)]
    return ", ".join(said) or "as in the source"


def _blind(folder: Path, pairs: Sequence[str], notes: list[str]) -> str:
    """Chance, majority letter, blind prior and leakage of each test file against its training file."""
    lines = []
    for name in pairs:
        train, test = folder / name / "train.parquet", folder / name / "test.parquet"
        if not (train.is_file() and test.is_file()):
            notes.append(f"{name or 'the data'}: one of train.parquet and test.parquet is not there")
            continue
        figures = inspect.report(inspect.load(test), inspect.load(train))
        keys = (
            "rows",
            "images",
            "chance",
            "majority_letter",
            "option_prior_exact",
            "option_prior_normalized",
            "leaked_rows",
        )
        lines.append([name or "all", *("-" if figures.get(key) is None else f"{figures[key]:.6g}" for key in keys)])
    header = (
        "test rows of",
        "rows",
        "images",
        "chance",
        "majority letter",
        "option prior",
        "normalised",
        "leaked rows",
    )
    told = (
        "Accuracies in per cent of guessing, of always the same letter, and of an option-frequency table of the "
        "training rows that sees neither image nor question; and test rows whose image is in training too."
    )
    return f"{told}\n\n{_table(header, lines)}" if lines else ""


def _data_limits(manifest: dict[str, Any]) -> Iterable[str]:
    yield "The right answers are the source's own and were not checked by a physician in this conversion."
    yield "Where the option prior is far above chance, a high accuracy does not show that a model looks at the image."
    leaked = (manifest.get("split") or {}).get("test_rows_whose_image_is_in_train")
    if leaked:
        yield f"{leaked} test rows show an image that training rows show too: their accuracy is not that of new images."
    yield "Whether the images may be used, shared or published is a matter of each source's licence."


def _files(manifest: dict[str, Any]) -> str:
    files = manifest.get("outputs") or manifest.get("files") or {}
    entries = files.items() if isinstance(files, dict) else ((one.get("file"), one) for one in files)
    lines = [
        (str(name), str(one.get("sha256") if isinstance(one, dict) else one)) for name, one in entries if name and one
    ]
    return _table(("file", "SHA-256"), lines) if lines else ""


# --- Markdown ------------------------------------------------------------------------------------------------------


def _front(fields: dict[str, Any]) -> str:
    """YAML front matter; every value is JSON, which YAML reads."""
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"])


def _known(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(label, public_text(str(value))) for label, value in pairs if value not in (None, "")]


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="medr1 card", description="A model card or a data card from the files of a run or of a data set."
    )
    commands = parser.add_subparsers(dest="kind", required=True)
    one = commands.add_parser("model", help="of a run; default output: DIR/model/README.md")
    one.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    one.add_argument("--data", type=Path, metavar="DIR", help="data of the run, if it is not where it was")
    other = commands.add_parser("data", help="of a converted data set; default output: DIR/README.md")
    other.add_argument("folder", type=Path, metavar="DIR", help="what medr1 convert wrote")
    for command in (one, other):
        command.add_argument("--output", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.kind == "model":
        card, notes = model_card(args.folder, args.data)
        model = args.folder / "model"
        output = args.output or (model if model.is_dir() else args.folder) / "README.md"
    else:
        card, notes = data_card(args.folder)
        output = args.output or args.folder / "README.md"
    try:
        output.write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(output)
    return 0
