"""An audit log made afterwards: of a prediction file, or of the trainer's validation dumps.

Such records say so (``origin``), have no digest of what the engine was shown, and carry the time of copying.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from medr1_verl.audit.log import AuditLog, read_answers, set_aside
from medr1_verl.audit.provenance import data_provenance, model_provenance
from medr1_verl.audit.trail import answer_record
from medr1_verl.audit.verify import verify
from medr1_verl.errors import UserError
from medr1_verl.evaluation.evaluate import model_name
from medr1_verl.evaluation.predictions import FILE_NAME, read_rows
from medr1_verl.evaluation.questions import Question, parquet_files, read_questions
from medr1_verl.prompt import IMAGE_MARK

_BATCH = 1000


def record(
    source: Path, output: Path, data: Sequence[Path], model: str | None, key: Any = None, again: bool = False
) -> int:
    """Write a closed log of ``source`` to ``output``; returns the number of answers.

    ``source`` is a prediction file, a ``STEP.jsonl`` of verl's validation dumps, a folder of those, or a run folder,
    which stands for its predictions. ``data`` are the parquet files that were asked, ``model`` the folder of the model.
    With ``again`` a log that is there stays where it is whole and holds just these answers; else it is set aside
    under a numbered name, and the new one names its root. Raises :class:`UserError`, also where ``output`` exists
    otherwise.
    """
    if model is not None and not Path(model).is_dir():
        raise UserError(f"--model {model}: no such folder")
    if output.exists() and not again:
        raise UserError(f"{output}: exists; a log is never written anew, give another --output")
    questions = read_questions([str(path) for path in data]) if data else []
    dumps = _validation_files(source)

    def read() -> Iterator[dict[str, Any]]:
        return _validation(dumps, questions) if dumps else _predictions(_prediction_file(source), questions)

    answers = read()
    first = next(answers, None)
    if first is None:
        raise UserError(f"{source}: holds no answer")
    follows = None
    if output.exists():
        if _holds(output, read()):
            return verify(output).answers
        follows = set_aside(output)
    name = first["model"] or (model_name(model) if model else "")
    context = {
        "source": "validation" if dumps else "predictions",
        "model": model_provenance(model or "", name, served=model is None),
        "data": data_provenance(parquet_files([str(path) for path in data])) if data else [],
        "template_sha256": None,
        "engine": "unknown",
        "versions": {},  # those of today say nothing of the answers
    }
    partial = output.with_name(output.name + ".partial")
    partial.unlink(missing_ok=True)
    log = AuditLog(partial, follows)
    try:
        number = log.context(context)
        batch: list[dict[str, Any]] = []
        for answer in chain([first], answers):
            batch.append(answer["record"] | {"context": number})
            if len(batch) >= _BATCH:
                log.add(batch)
                batch.clear()
        log.add(batch)
        log.close(key)
    finally:
        log.stop()
    partial.rename(output)
    return log.answers


def _holds(log: Path, answers: Iterator[dict[str, Any]]) -> bool:
    """Whether a log is complete and unaltered and its answers are these, whatever was noted of model and data."""
    if not verify(log).good:
        return False
    for known, answer in zip_longest(read_answers(log), answers):
        if known is None or answer is None:
            return False
        fields = json.loads(json.dumps(answer["record"]))
        if any(known.get(name) != value for name, value in fields.items() if name != "context"):
            return False
    return True


def _validation_files(source: Path) -> list[Path]:
    """verl writes ``<step>.jsonl``."""
    if source.is_dir():
        return sorted((file for file in source.glob("*.jsonl") if file.stem.isdigit()), key=lambda file: int(file.stem))
    return [source] if source.stem.isdigit() and source.suffix == ".jsonl" else []


def _prediction_file(source: Path) -> Path:
    file = source / FILE_NAME if source.is_dir() else source
    if not file.is_file():
        raise UserError(f"{source}: is neither a prediction file nor a folder of one, nor of validation dumps")
    return file


def _predictions(file: Path, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    asked = {question.question_id: question for question in questions}
    for row in read_rows(file):
        question = asked.get(row["question_id"])
        if asked and question is None:
            raise UserError(f"{file}: question {row['question_id']!r} is not in the data given; give the rows asked")
        if question is not None and row.get("image_sha256") != question.image_sha256:
            raise UserError(f"{file}: question {row['question_id']!r} has another image in the data given")
        try:
            answer = answer_record(row, 0, "predictions", question.question if question else None, None)
        except KeyError as error:
            raise UserError(
                f"{file}: question {row['question_id']!r} lacks {error}; was it written by medr1?"
            ) from None
        yield {"model": str(row.get("model", "")), "record": answer}


def _validation(files: Sequence[Path], questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    """Rows of verl 0.9's validation dumps: input, output, gts, score, step, uid, and the reward's own keys.

    Runs with this plugin name the row in them (:mod:`medr1_verl.validation_rows`). In a dump without that, the row is
    the one that has this prompt and this answer, where exactly one of the data has; else ``question_id`` and the image
    stay null, and the prompt stands in the record.
    """
    find = _Rows(questions)
    for file in files:
        for number, row in _rows(file):
            where = f"{file}, line {number}"
            try:
                prompt, gold, output = row["input"], str(row["gts"]), row["output"]
                scores = {name: row[name] for name in ("score", "acc", "format", "parsed") if name in row}
                pred, step = str(row.get("pred", "")), int(row["step"])
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{where}: is no validation answer of verl 0.9 (lacks {error})") from None
            named, sha256 = row.get("question_id"), row.get("image_sha256")
            if named is None:
                one, same = find.by_words(prompt, gold, where)
            else:
                one, same = find.by_name(str(named), sha256, prompt, where)
            prediction = {
                "question_id": named if named is not None else one.question_id if one else None,
                "dataset": one.dataset if one else None,
                "modality": one.modality if one else None,
                "question_type": one.question_type if one else None,
                "options": same.options if same else None,
                "style": same.style if same else None,
                "image_sha256": one.image_sha256 if one else sha256 or "",
                "decoding": "validation",
                "output": output,
                "pred": pred,
                "answer": gold,
            }
            answer = answer_record(prediction, 0, "validation", same.question if same else None, None)
            yield {"model": "", "record": answer | {"score": scores, "step": step, "prompt": prompt}}


class _Rows:
    """Which row of the data a validation answer belongs to."""

    def __init__(self, questions: Sequence[Question]):
        self._by_name = {question.question_id: question for question in questions}
        self._by_words: dict[tuple[str, str], list[Question]] = defaultdict(list)
        for question in questions:
            self._by_words[_own_text(question), question.answer].append(question)

    def by_name(
        self, name: str, sha256: str | None, prompt: str, where: str
    ) -> tuple[Question | None, Question | None]:
        """(the row of that name, the same where it was asked in the row's own words). Raises :class:`UserError`."""
        if not self._by_name:
            return None, None
        question = self._by_name.get(name)
        if question is None:
            raise UserError(f"{where}: question {name!r} is not in the data given; give the rows asked")
        if sha256 is not None and sha256 != question.image_sha256:
            raise UserError(f"{where}: question {name!r} has another image in the data given; give the rows asked")
        asked_so = _user_turn(prompt) == _own_text(question)
        return question, question if asked_so else None

    def by_words(self, prompt: str, gold: str, where: str) -> tuple[Question | None, Question | None]:
        """(the one row with this prompt and answer, the first of several). Raises :class:`UserError` for none."""
        found = self._by_words.get((_user_turn(prompt), gold), [])
        if self._by_name and not found:
            raise UserError(f"{where}: its question is not in the data given; give the rows asked")
        return found[0] if len(found) == 1 else None, found[0] if found else None


def _own_text(question: Question) -> str:
    return "".join(message["content"] for message in question.messages).replace(IMAGE_MARK, "").strip()


def _user_turn(prompt: str) -> str:
    """The row's own text in a prompt that the chat template wrapped and the tokenizer decoded without its marks."""
    text = prompt.strip().removesuffix("assistant").strip()
    text = text.rpartition("\nuser\n")[2] if "\nuser\n" in text else text.removeprefix("user\n")
    return text.strip()


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                except ValueError:
                    raise UserError(f"{file}, line {number}: is not JSON; was the run killed there?") from None
                yield number, row
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
