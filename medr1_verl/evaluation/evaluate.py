"""``medr1 evaluate``: a model over test rows; predictions, and accuracy by modality and question type.

From Python, several passes share one start of the engine::

    from medr1_verl.evaluation.evaluate import Pass, evaluate
    from medr1_verl.evaluation.engine import Decoding

    results = evaluate(
        "runs/ct/model", ["data/test.parquet"], output="runs/ct",
        passes=[Pass(), Pass("blank"), Pass(decoding=Decoding(temperature=1.0))],
    )
    results[0].accuracy, results[1].accuracy, results[2].accuracy
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from medr1_verl.audit.log import FILE_NAME as AUDIT_NAME
from medr1_verl.audit.trail import Trail
from medr1_verl.errors import UserError
from medr1_verl.evaluation.answers import majority, read_answer
from medr1_verl.evaluation.controls import CONTROLS, SLICES, apply_control
from medr1_verl.evaluation.engine import Decoding, EngineOptions, OfflineEngine, Output, check_model, weights_digest
from medr1_verl.evaluation.predictions import Key, PredictionFile, key_of, predictions_path
from medr1_verl.evaluation.questions import Question, parquet_files, read_questions
from medr1_verl.prompt import Template, load_template
from medr1_verl.styles import STYLES
from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES

SAVE_EVERY = 1.0  # seconds: what a killed run may lose of a server's answers


@dataclass(frozen=True)
class Pass:
    """One way of asking all rows: what is taken away, and how answers are drawn."""

    control: str = "none"
    decoding: Decoding = field(default_factory=Decoding)


@dataclass(frozen=True)
class PassResult:
    """The answers of one pass, in the order of the questions. Shares are 0-1."""

    control: str
    decoding: str
    rows: list[dict[str, Any]]

    def mean(self, key: str) -> float:
        """Mean of ``acc``, ``format``, ``parsed``, ``acc_tolerant`` or ``acc_reference`` over the rows."""
        return sum(row[key] for row in self.rows) / len(self.rows)

    @property
    def accuracy(self) -> float:
        return self.mean("acc")

    @property
    def format(self) -> float:
        return self.mean("format")

    @property
    def parsed(self) -> float:
        return self.mean("parsed")

    def accuracy_by(self, key: str) -> dict[str, float]:
        """Accuracy for every value of ``modality``, ``question_type``, ``dataset`` or another key of the rows."""
        values: dict[str, list[int]] = defaultdict(list)
        for row in self.rows:
            values[row[key]].append(row["acc"])
        return {value: sum(hits) / len(hits) for value, hits in values.items()}


class Engine(Protocol):
    """What answers: the offline engine, or a server."""

    chunk: int

    def ask(
        self, questions: Sequence[Question], decoding: Decoding, max_tokens: int
    ) -> Iterator[tuple[Question, list[Output]]]:
        """Each question with its ``decoding.n`` outputs, in any order."""

    def finish(self) -> None:
        """Called once, when every answer is in."""


def evaluate(
    model: str | Path,
    data: Sequence[str | Path],
    passes: Sequence[Pass] = (Pass(),),
    output: str | Path | None = None,
    *,
    max_tokens: int = 256,
    limit: int | None = None,
    style: str | None = None,
    template: Template | None = None,
    shuffle_within: str = "modality",
    control_seed: int = 0,
    name: str | None = None,
    engine_options: EngineOptions | None = None,
    base_url: str | None = None,
    concurrency: int = 16,
    fresh: bool = False,
    audit: str | Path | None = None,
    audit_key: str | Path | None = None,
) -> list[PassResult]:
    """Ask ``model`` every row of ``data`` in every pass; results in the order of ``passes``.

    ``output`` is a directory or a .jsonl file; answers that it already holds are not asked again, and the engine is not
    started where nothing is left to ask. With None nothing is kept. ``model`` is a directory or hub id; with
    ``base_url``, the name under which an OpenAI-compatible server serves it. ``audit`` is a file for the audit log,
    signed by the private key in the file ``audit_key``. Raises :class:`UserError`.
    """
    model = str(model)
    if max_tokens < 1 or (limit is not None and limit < 1):
        raise UserError("max-tokens and limit must be at least 1")
    if base_url is None:
        check_model(model)
    questions = read_questions(data, limit, style, template)
    file = None if output is None else PredictionFile(predictions_path(output), fresh)
    about = {"model": name or model_name(model), "weights": weights_digest(model) if base_url is None else ""}
    known = {} if file is None else file.rows
    trail: Trail | None = None
    if audit is not None:
        trail = Trail(
            Path(audit),
            model,
            about["model"],
            parquet_files(data),
            served=base_url is not None,
            template=template,
            key=None if audit_key is None else Path(audit_key),
        )
    engine: Engine | None = None
    results = []
    try:
        todo = []
        for one in passes:
            asked = apply_control(questions, one.control, control_seed, shuffle_within, template)
            about_pass = about | {"control": one.control, "decoding": one.decoding.name, "max_tokens": max_tokens}
            todo.append((one, asked, about_pass))
        stale = "" if file is None else _stale(todo, file)
        if file is not None and stale:
            print(f"{stale}; asking all again, the earlier answers are in {file.set_aside()}", file=sys.stderr)
        left = sum(key not in known for one, asked, _ in todo for key in _keys(one, asked))
        if trail is not None:
            trail.start(_answered(todo, known), asking=left > 0, afresh=fresh or stale != "")
        if left:
            max_images = max(question.n_images for question in questions)
            engine = _start(model, engine_options, max_images, base_url, concurrency, file)
        with tqdm(total=left, unit="answer", desc="evaluate", disable=not left) as progress:
            for one, asked, about_pass in todo:
                progress.set_postfix_str(f"{one.control}, {one.decoding.name}")
                rows = _run_pass(engine, one, asked, about_pass, known, file, trail, progress)
                results.append(PassResult(one.control, one.decoding.name, rows))
        if file is not None:
            file.finish()
        if engine is not None:
            engine.finish()
        if trail is not None:
            trail.finish()
    finally:
        if file is not None:
            file.close()
        if trail is not None:
            trail.stop()
    return results


def _start(
    model: str,
    options: EngineOptions | None,
    max_images: int,
    base_url: str | None,
    concurrency: int,
    file: PredictionFile | None,
) -> Engine:
    if base_url is not None:
        from medr1_verl.evaluation.server import ServerEngine

        return ServerEngine(base_url, model, concurrency)
    print(f"starting vLLM with {model} (a minute or so)", file=sys.stderr)
    log = None if file is None else file.path.with_suffix(".vllm.log")
    return OfflineEngine(model, options, max_images, log)


def _keys(one: Pass, asked: Iterable[Question]) -> Iterator[Key]:
    return ((question.question_id, one.control, one.decoding.name) for question in asked)


def _run_pass(
    engine: Engine | None,
    one: Pass,
    asked: Sequence[Question],
    about: dict[str, Any],
    known: dict[Key, dict[str, Any]],
    file: PredictionFile | None,
    trail: Trail | None,
    progress: tqdm,
) -> list[dict[str, Any]]:
    rows = dict(known)
    left = [question for key, question in zip(_keys(one, asked), asked, strict=True) if key not in rows]
    saved = time.monotonic()
    for start in range(0, len(left), engine.chunk if engine else 1):
        assert engine is not None  # started whenever something is left to ask
        new: dict[Key, dict[str, Any]] = {}
        chunk = left[start : start + engine.chunk]
        if trail is not None:
            chunk = [trail.watch(question) for question in chunk]
        try:
            for question, outputs in engine.ask(chunk, one.decoding, about["max_tokens"]):
                row = _row(question, outputs, about)
                new[key_of(row)] = row
                if trail is not None:
                    trail.answer(question, row, one.decoding, outputs)
                progress.update()
                if time.monotonic() > saved + SAVE_EVERY:
                    saved = _save(new, rows, file, trail)
        finally:
            saved = _save(new, rows, file, trail)
    return [rows[key] for key in _keys(one, asked)]


def _answered(
    todo: Iterable[tuple[Pass, Sequence[Question], dict[str, Any]]], known: dict[Key, dict[str, Any]]
) -> Iterator[tuple[Question, dict[str, Any], Decoding]]:
    """What this evaluation need not ask, as an earlier one did."""
    for one, asked, _ in todo:
        for key, question in zip(_keys(one, asked), asked, strict=True):
            if key in known:
                yield question, known[key], one.decoding


def _save(
    new: dict[Key, dict[str, Any]],
    rows: dict[Key, dict[str, Any]],
    file: PredictionFile | None,
    trail: Trail | None,
) -> float:
    """Move new answers to the known ones and to the disk; returns the time."""
    if file is not None and new:
        file.add(new.values())
    if trail is not None:
        trail.write()
    rows.update(new)
    new.clear()
    return time.monotonic()


def _row(question: Question, outputs: Sequence[Output], about: dict[str, Any]) -> dict[str, Any]:
    """One line of the prediction file. With several samples, the first one that gives the majority's letter stands
    for all: its output, format and readings; ``preds`` and ``acc_mean`` keep the rest.
    """
    readings = [
        read_answer(output.text, question.style, question.options, question.answer)
        | {"tokens": output.tokens, "truncated": output.truncated}
        for output in outputs
    ]
    chosen = readings[0]
    samples: dict[str, Any] = {}
    if len(readings) > 1:
        preds = [reading["pred"] for reading in readings]
        letter = majority(preds)
        chosen = readings[preds.index(letter)]
        samples = {"preds": preds, "acc_mean": sum(reading["acc"] for reading in readings) / len(readings)}
    return {
        "question_id": question.question_id,
        "data_source": question.data_source,
        "dataset": question.dataset,
        "modality": question.modality,
        "question_type": question.question_type,
        "style": question.style,
        "control": about["control"],
        "decoding": about["decoding"],
        **chosen,
        **samples,
        "answer": question.answer,
        "n_options": len(question.options),
        "options": list(question.options),
        "image_sha256": question.image_sha256,
        "prompt_sha256": prompt_sha256(question),
        "max_tokens": about["max_tokens"],
        "model": about["model"],
        "weights": about["weights"],
    }


def prompt_sha256(question: Question) -> str:
    """Sixteen hex digits of the SHA-256 over the messages: rows asked in other words are told apart."""
    text = json.dumps(question.messages, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stale(todo: Iterable[tuple[Pass, Sequence[Question], dict[str, Any]]], file: PredictionFile) -> str:
    """Why answers in the file cannot be gone on from, "" where they can.

    A run trained on, or evaluated with other settings, under its own name is asked anew. Raises :class:`UserError` for
    answers of a model of another name: that file was given by mistake.
    """
    for one, asked, about in todo:
        for row in file.rows.values():
            if row["model"] != about["model"]:
                raise UserError(
                    f"{file.path}: holds answers of model {row['model']!r}, not of {about['model']!r}; "
                    "give another --output, or --fresh to replace them"
                )
            if row.get("weights") != about["weights"]:
                return f"{file.path}: was made with weights {row.get('weights')!r}, now they are {about['weights']!r}"
        for question in asked:
            known = file.rows.get((question.question_id, one.control, one.decoding.name))
            now = {
                "max_tokens": about["max_tokens"],
                "prompt_sha256": prompt_sha256(question),
                "image_sha256": question.image_sha256,
                "answer": question.answer,
            }
            for key, value in now.items():
                if known is not None and known.get(key) != value:
                    return f"{file.path}: was made with {key} {str(known.get(key))!r}, now it is {str(value)!r}"
    return ""


def model_name(model: str) -> str:
    """What tables call the model: the run's name for ``runs/<name>/model``, else the directory's, or the hub id."""
    path = Path(model)
    if not path.is_dir():
        return model
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


# --- the screen ---------------------------------------------------------------------------------------------------


def accuracy_table(results: Sequence[PassResult]) -> str:
    """Accuracy in per cent by modality and by question type, one column for each pass, and the rates below."""
    decodings = {result.decoding for result in results}
    names = [
        result.control if len(decodings) == 1 else f"{result.control} {result.decoding.split(' seed=')[0]}"
        for result in results
    ]
    first = results[0].rows
    blocks: list[list[list[str]]] = []
    for key, order in (("modality", MODALITIES), ("question_type", QUESTION_TYPES)):
        shares = [result.accuracy_by(key) for result in results]
        counts: dict[str, int] = defaultdict(int)
        for row in first:
            counts[row[key]] += 1
        values = [value for value in order if value in counts] + sorted(set(counts) - set(order))
        blocks.append([[value, str(counts[value]), *(_percent(share[value]) for share in shares)] for value in values])
    overall = ["all", str(len(first)), *(_percent(result.accuracy) for result in results)]
    rates = [
        [label, "", *(_percent(result.mean(key)) for result in results)]
        for label, key in (
            ("format", "format"),
            ("parsed", "parsed"),
            ("tolerant reading", "acc_tolerant"),
            ("released code's reading", "acc_reference"),
        )
    ]
    if any("acc_mean" in row for result in results for row in result.rows):
        means = [
            _percent(sum(row.get("acc_mean", row["acc"]) for row in result.rows) / len(result.rows))
            for result in results
        ]
        rates.append(["mean of the samples", "", *means])
    return _aligned([["", "rows", *names], *blocks[0], *blocks[1], overall], rates)


def _aligned(*parts: list[list[str]]) -> str:
    lines = [line for part in parts for line in part]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = "  ".join("-" * width for width in widths)

    def text(line: list[str]) -> str:
        return "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])

    return f"\n{rule}\n".join("\n".join(map(text, part)) for part in parts)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medr1 evaluate",
        description="Ask a model the rows of test parquets through vLLM and write predictions.jsonl. "
        "A run that was stopped goes on where it was.",
    )
    parser.add_argument("--model", required=True, help="model directory or hub id; with --base-url the served name")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="test.parquet files, directories that hold them, or JSONL",
    )
    parser.add_argument("--output", required=True, help="directory (gets predictions.jsonl) or a .jsonl file")
    parser.add_argument("--name", help="what tables call the model (default: the run's or the directory's name)")
    parser.add_argument("--control", nargs="+", default=["none"], choices=CONTROLS, help="default: none")
    parser.add_argument(
        "--pass",
        dest="passes",
        nargs="+",
        type=_control_and_temperature,
        metavar="CONTROL:T",
        help="exactly these passes instead of every control at every temperature, as in: none:0 blank:0 none:1",
    )
    parser.add_argument(
        "--shuffle-within",
        default="modality",
        choices=tuple(SLICES),
        help="which rows lend pictures to control shuffled",
    )
    parser.add_argument(
        "--temperature", nargs="+", type=float, default=[0.0], help="0 is greedy (default); several make several passes"
    )
    parser.add_argument(
        "--n", type=int, default=1, help="samples a question where temperature > 0; the majority counts"
    )
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the controls")
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="new tokens an answer (default 256, as in training)"
    )
    parser.add_argument("--limit", type=int, help="ask so many rows only, spread over modalities and question types")
    parser.add_argument("--style", choices=tuple(STYLES), help="ask in this style instead of the rows' own")
    parser.add_argument(
        "--template", help="prompt template file (as `medr1 convert --template`) instead of the rows' own prompt"
    )
    parser.add_argument("--fresh", action="store_true", help="forget answers that --output already holds")
    parser.add_argument(
        "--audit",
        nargs="?",
        const="",
        metavar="FILE",
        help=f"keep an audit log of every answer (default FILE: {AUDIT_NAME} beside the predictions)",
    )
    parser.add_argument("--audit-key", metavar="KEY", help="Ed25519 private key (PEM or OpenSSH) that signs the log")
    engine = parser.add_argument_group("vLLM in this process")
    engine.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs to split the model over")
    engine.add_argument("--gpu-memory", type=float, metavar="SHARE", help="share of each GPU that vLLM may take (0-1)")
    engine.add_argument(
        "--max-model-len", type=int, help="prompt and answer together, in tokens (default: at most 4096)"
    )
    engine.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"))
    engine.add_argument("--enforce-eager", action="store_true", default=None, help="no CUDA graphs")
    server = parser.add_argument_group("a running server instead")
    server.add_argument("--base-url", help="of an OpenAI-compatible server, for example http://localhost:8000/v1")
    server.add_argument("--concurrency", type=int, default=16, help="requests at a time (default 16)")
    return parser


def _control_and_temperature(text: str) -> tuple[str, float]:
    control, _, temperature = text.partition(":")
    if control not in CONTROLS:
        raise argparse.ArgumentTypeError(f"{control!r} is not one of {', '.join(CONTROLS)}")
    try:
        return control, float(temperature)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not CONTROL:TEMPERATURE, such as none:0") from None


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    asked = args.passes or [(control, temperature) for temperature in args.temperature for control in args.control]
    passes = [
        Pass(control, Decoding(temperature, args.n if temperature else 1, args.top_p, args.seed))
        for control, temperature in dict.fromkeys(asked)
    ]
    if args.n > 1 and not any(one.decoding.temperature for one in passes):
        raise UserError(f"--n {args.n} needs a --temperature above 0")
    if args.audit_key and args.audit is None:
        raise UserError("--audit-key signs an audit log; add --audit")
    audit = args.audit if args.audit != "" else predictions_path(args.output).with_name(AUDIT_NAME)
    started = time.monotonic()
    results = evaluate(
        args.model,
        args.data,
        passes,
        args.output,
        max_tokens=args.max_tokens,
        limit=args.limit,
        style=args.style,
        template=load_template(args.template) if args.template else None,
        shuffle_within=args.shuffle_within,
        control_seed=args.seed,
        name=args.name,
        engine_options=EngineOptions(
            args.tensor_parallel, args.gpu_memory, args.max_model_len, args.dtype, args.enforce_eager
        ),
        base_url=args.base_url,
        concurrency=args.concurrency,
        fresh=args.fresh,
        audit=audit,
        audit_key=args.audit_key,
    )
    row = results[0].rows[0]
    print(f"{row['model']}, {row['style']}, {args.max_tokens} new tokens at most; accuracy in per cent")
    print(accuracy_table(results))
    print(f"{predictions_path(args.output)} ({time.monotonic() - started:.0f} s)")
    if audit is not None:
        print(f"{audit} (medr1 audit verify)")
    return 0
