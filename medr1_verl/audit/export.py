"""A log as a table (CSV), or as a log of Inspect, the evaluation framework whose viewer many know."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medr1_verl.audit.log import read_answers
from medr1_verl.errors import UserError
from medr1_verl.parsing import LETTERS

COLUMNS = (
    "seq",
    "time",
    "question_id",
    "dataset",
    "modality",
    "question_type",
    "style",
    "control",
    "decoding",
    "question",
    "options",
    "answer",
    "pred",
    "reasoning",
    "output",
    "tokens",
    "truncated",
    "source_sha256",
    "seen_sha256",
    "model",
    "weights_sha256",
    "step",
    "origin",
    "sha256_of_line_before",
)
SCORES = ("acc", "format", "parsed", "acc_tolerant", "acc_reference")


def to_csv(log: Path, output: Path) -> int:
    """Write one row for each answer; returns their number.

    A text that a spreadsheet would take for a formula (it begins with =, +, -, @, tab or return) gets a ' before it.
    """
    count = 0
    with _new(output) as file:
        writer = csv.writer(file)
        writer.writerow((*COLUMNS, *SCORES))
        for record in read_answers(log):
            model = record["context"].get("model", {})
            values = record | {
                "options": None if record["options"] is None else " | ".join(record["options"]),
                "source_sha256": " ".join(image["source_sha256"] or "" for image in record["images"]),
                "seen_sha256": " ".join(image["seen_sha256"] or "" for image in record["images"]),
                "model": model.get("name"),
                "weights_sha256": model.get("weights_sha256"),
                "step": record.get("step", model.get("step")),
                "sha256_of_line_before": record["prev"],
            }
            scores = [record["score"].get(name) for name in SCORES]
            writer.writerow([_cell(value) for value in (*(values[name] for name in COLUMNS), *scores)])
            count += 1
    return count


def _new(output: Path):
    try:
        return open(output, "x", encoding="utf-8", newline="", errors="backslashreplace")
    except FileExistsError:
        raise UserError(f"{output}: exists; remove it or give another --output") from None
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value


def to_inspect(log: Path, folder: Path, images: Mapping[str, list[str]] | None = None) -> list[Path]:
    """Write one ``.eval`` log for each model, control and decoding into ``folder``; returns their paths.

    ``images`` gives the pictures of a question as data URIs, to be seen in the viewer. Open the folder with
    ``inspect view --log-dir FOLDER``. Needs the library inspect_ai (extra ``inspect``).
    """
    try:
        from inspect_ai.log import write_eval_log
    except ImportError as error:
        raise UserError("an Inspect log needs the library inspect_ai: pip install 'medr1-verl[inspect]'") from error
    groups: dict[tuple[str, str, str, int | None], list[dict[str, Any]]] = {}
    for record in read_answers(log):
        name = record["context"].get("model", {}).get("name", "unknown")
        key = name, record["control"], record["decoding"], record.get("step")
        groups.setdefault(key, []).append(record)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, records in enumerate(groups.values()):
        path = folder / f"{number:03d}.eval"
        if path.exists():
            raise UserError(f"{path}: exists; give an empty folder as --output")
        write_eval_log(_inspect_log(records, images or {}), str(path))
        written.append(path)
    return written


def _inspect_log(records: list[dict[str, Any]], images: Mapping[str, list[str]]) -> Any:
    from inspect_ai.log import (
        EvalConfig,
        EvalDataset,
        EvalLog,
        EvalMetric,
        EvalResults,
        EvalScore,
        EvalSpec,
        EvalStats,
    )
    from inspect_ai.model import GenerateConfig

    first = records[0]
    context = first["context"]
    model = context.get("model", {})
    sampling = first["sampling"] or {}
    scores = sorted({name for r in records for name, value in r["score"].items() if not isinstance(value, str)})
    count: dict[str, int] = {}
    samples = []
    for record in records:
        sample_id = record["question_id"] or f"line {record['seq'] + 1}"
        count[sample_id] = count.get(sample_id, 0) + 1
        samples.append(_inspect_sample(record, sample_id, count[sample_id], images))
    means = {name: [r["score"][name] for r in records if name in r["score"]] for name in scores}
    return EvalLog(
        status="success",
        eval=EvalSpec(
            created=first["time"],
            task=" ".join(filter(None, ("medical_vqa", first["control"], first["decoding"]))),
            dataset=EvalDataset(
                name=", ".join(one["file"] for one in context.get("data", [])) or None, samples=len(records)
            ),
            model=model.get("name") or "unknown",
            model_generate_config=GenerateConfig(
                temperature=sampling.get("temperature"),
                top_p=sampling.get("top_p"),
                max_tokens=sampling.get("max_tokens"),
            ),
            config=EvalConfig(),
            packages={name: version for name, version in context.get("versions", {}).items() if name != "python"},
            metadata={"model": model, "data": context.get("data", []), "style": first["style"]},
        ),
        stats=EvalStats(started_at=first["time"], completed_at=records[-1]["time"]),
        results=EvalResults(
            total_samples=len(records),
            completed_samples=len(records),
            scores=[
                EvalScore(
                    name=name,
                    scorer="medr1",
                    metrics={"mean": EvalMetric(name="mean", value=sum(values) / len(values))},
                )
                for name, values in means.items()
            ],
        ),
        samples=samples,
    )


def _inspect_sample(record: Mapping[str, Any], sample_id: str, epoch: int, images: Mapping[str, Iterable[str]]) -> Any:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessageAssistant,
        ChatMessageUser,
        Content,
        ContentImage,
        ContentText,
        ModelOutput,
        ModelUsage,
    )
    from inspect_ai.scorer import Score

    options = record["options"] or []
    name = record["context"].get("model", {}).get("name") or "unknown"
    tokens = record["tokens"]
    usage = None if tokens is None else ModelUsage(output_tokens=tokens, total_tokens=tokens)
    lines = [record["question"] or record.get("prompt") or ""]
    lines += [f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    content: list[Content] = []
    if record["control"] in ("none", "relettered"):
        content += [ContentImage(image=uri) for uri in images.get(record["question_id"] or "", [])]
    else:
        content.append(ContentText(text=f"[control {record['control']}: the question's own image was not shown]"))
    user = ChatMessageUser(content=[*content, ContentText(text="\n".join(lines))])
    assistant = ChatMessageAssistant(content=record["output"])
    explanation = record["reasoning"] or record["output"]
    kept = (
        "modality",
        "question_type",
        "dataset",
        "control",
        "decoding",
        "images",
        "sampling",
        "seq",
        "prev",
        "origin",
    )
    return EvalSample(
        id=sample_id,
        epoch=epoch,
        input=[user],
        choices=options or None,
        target=record["answer"] or "",
        messages=[user, assistant],
        output=ModelOutput(
            model=name,
            usage=usage,
            choices=[
                ChatCompletionChoice(message=assistant, stop_reason="max_tokens" if record["truncated"] else "stop")
            ],
        ),
        model_usage={} if usage is None else {name: usage},
        scores={
            part: Score(value=value, answer=record["pred"] or None, explanation=explanation)
            for part, value in record["score"].items()
            if not isinstance(value, str)
        },
        metadata={key: record[key] for key in kept},
    )


def as_json(record: Mapping[str, Any]) -> str:
    """For a person: indented, other scripts readable, but nothing that moves the cursor or turns the text around."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    return "".join(ch if ch == "\n" or ch.isprintable() else f"\\u{ord(ch):04x}" for ch in text)
