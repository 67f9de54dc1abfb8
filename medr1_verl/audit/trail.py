"""Writes the audit log of an evaluation, or of a single question, while the answers come."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from medr1_verl.audit.log import AuditLog, key_digest, set_aside
from medr1_verl.audit.provenance import data_provenance, model_provenance, template_sha256, versions
from medr1_verl.audit.signing import load_private_key
from medr1_verl.audit.verify import verify
from medr1_verl.parsing import reasoning

if TYPE_CHECKING:  # the evaluation calls this module
    from medr1_verl.evaluation.engine import Decoding, Output
    from medr1_verl.evaluation.questions import Question
    from medr1_verl.prompt import Template

SCORES = ("acc", "format", "parsed", "acc_tolerant", "acc_reference", "acc_mean", "pred_tolerant", "pred_reference")
_STRIP = 2**16


def picture_sha256(picture: Image.Image) -> str:
    """SHA-256 of a picture's size and RGB pixels: the same whatever file format they came in."""
    width, height = picture.size
    digest = hashlib.sha256(f"RGB {width} {height}\n".encode())
    # In strips: a copy of the whole picture at once is six times as slow where its memory is fetched anew each time.
    rows = max(1, _STRIP // (3 * width))
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(top + rows, height)))
        digest.update((strip if strip.mode == "RGB" else strip.convert("RGB")).tobytes())
    return digest.hexdigest()


def _seen(pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """What the record says of the pictures that the engine was given."""
    return [
        {"seen_sha256": picture_sha256(picture), "width": picture.width, "height": picture.height}
        for picture in pictures
    ]


class Trail:
    """The log of one evaluation. Made before the engine starts: the weights are hashed while that goes on."""

    def __init__(
        self,
        path: Path,
        model: str,
        name: str,
        data: Sequence[Path],
        *,
        source: str = "evaluation",
        served: bool = False,
        template: Template | None = None,
        key: Path | None = None,
    ):
        """Nothing is written yet. Raises :class:`UserError` for a key that is none."""
        self.path = path
        self._key = None if key is None else load_private_key(key)
        self._log: AuditLog | None = None
        self._buffer: list[dict[str, Any]] = []
        self._seen: dict[str, Future[list[dict[str, Any]]]] = {}

        def context() -> dict[str, Any]:
            return {
                "source": source,
                "model": model_provenance(model, name, served),
                "data": data_provenance(data),
                "template_sha256": None if template is None else template_sha256(template),
                "engine": "server" if served else "vllm",
                "versions": versions(),
            }

        self._make_context = context
        # A hub model may still have to be fetched by the engine: its digest waits for the first answer.
        self._pool = ThreadPoolExecutor(2, "digests")
        self._context = self._pool.submit(context) if served or Path(model).is_dir() else None
        self._number: int | None = None

    def start(self, known: Iterable[tuple[Question, Mapping[str, Any], Decoding]], asking: bool, afresh: bool) -> None:
        """Open the log, and copy to it the ``known`` answers of the prediction file that it does not have.

        An unfinished log is gone on with. One that is closed stays as it is where nothing is to be added; else, and
        with ``afresh``, it is set aside under a numbered name and a new one names its root.
        """
        missing = list(known)
        follows = None
        if self.path.exists() and self.path.stat().st_size:
            report = verify(self.path)
            damage = [fault for fault in report.faults if fault.code not in ("incomplete", "torn")]
            usable = not afresh and not damage
            if usable:
                have = AuditLog.keys_of(self.path)
                missing = [one for one in missing if _key(one[1]) not in have]
                if report.good and not missing and not asking:
                    return
            if damage or afresh or report.closed:
                follows = set_aside(self.path)
            if damage:
                print(f"{self.path}: {damage[0]}; it was set aside, and a new log is written", file=sys.stderr)
        self._log = AuditLog(self.path, follows)
        for question, row, decoding in missing:
            self._buffer.append(self._record(question, row, decoding, [], [], "predictions"))
            if len(self._buffer) >= 1000:
                self.write()
        self.write()

    def watch(self, question: Question) -> Question:
        """The same question; the pictures that the engine loads of it are noted."""
        load = question.load_images

        def noted() -> list[Image.Image]:
            pictures = load()
            # In a thread: hashing leaves the interpreter free, and the answer takes far longer to come.
            self._seen[question.question_id] = self._pool.submit(_seen, list(pictures))
            return pictures

        return replace(question, load_images=noted)

    def answer(self, question: Question, row: Mapping[str, Any], decoding: Decoding, outputs: Sequence[Output]) -> None:
        """Keep one new answer until the next :meth:`write`."""
        seen = self._seen.pop(question.question_id, None)
        self._buffer.append(
            self._record(question, row, decoding, seen.result() if seen is not None else [], outputs, "live")
        )

    def write(self) -> None:
        """Bring the answers so far to the disk."""
        if self._log is not None and self._buffer:
            self._log.add(self._buffer)
            self._buffer.clear()

    def finish(self) -> str | None:
        """All answers are in: write the footer. Returns the root, None where the log was complete before."""
        if self._log is None:
            return None
        self.write()
        return self._log.close(self._key)

    def stop(self) -> None:
        """Leave the log as it is, finished or not."""
        self._pool.shutdown(cancel_futures=True)
        if self._log is not None:
            self._log.stop()

    def _context_number(self) -> int:
        assert self._log is not None
        if self._number is None:
            self._number = self._log.context(self._context.result() if self._context else self._make_context())
        return self._number

    def _record(
        self,
        question: Question,
        row: Mapping[str, Any],
        decoding: Decoding,
        seen: Sequence[Mapping[str, Any]],
        outputs: Sequence[Output],
        origin: str,
    ) -> dict[str, Any]:
        sampled = decoding.temperature > 0
        record = answer_record(
            row,
            self._context_number(),
            origin,
            question=question.question,
            sampling={
                "temperature": decoding.temperature,
                "top_p": decoding.top_p,
                "n": decoding.n,
                "seed": decoding.seed_of(question.question_id) if sampled else None,
                "max_tokens": row["max_tokens"],
            },
            seen=seen,
        )
        if len(outputs) > 1:
            record["samples"] = [output.text for output in outputs]
        return record


def answer_record(
    row: Mapping[str, Any],
    context: int,
    origin: str,
    question: str | None,
    sampling: Mapping[str, Any] | None,
    seen: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """An ``answer`` of the schema from a row of predictions, with what the row does not say.

    ``seen`` are the pictures that the engine was given; a control may have taken them away, or put others there.
    """
    sources = [part for part in str(row.get("image_sha256") or "").split("\n") if part]
    images = [
        {
            "source_sha256": sources[number] if number < len(sources) else None,
            **(seen[number] if number < len(seen) else {"seen_sha256": None, "width": None, "height": None}),
        }
        for number in range(max(len(sources), len(seen)))
    ]
    return {
        "context": context,
        "question_id": row["question_id"],
        "dataset": row.get("dataset"),
        "modality": row.get("modality"),
        "question_type": row.get("question_type"),
        "question": question,
        "options": None if row.get("options") is None else list(row["options"]),
        "prompt_sha256": row.get("prompt_sha256"),
        "style": row.get("style"),
        "control": row.get("control", "none"),
        "decoding": row.get("decoding", "greedy"),
        "sampling": sampling,
        "images": images,
        "output": row["output"],
        "reasoning": reasoning(row["output"]),
        "pred": row["pred"],
        "answer": row.get("answer"),
        "score": {name: row[name] for name in SCORES if row.get(name) is not None},
        "tokens": row.get("tokens"),
        "truncated": row.get("truncated"),
        "origin": origin,
    }


def _key(row: Mapping[str, Any]) -> int:
    return key_digest(row["question_id"], row.get("control", "none"), row.get("decoding", "greedy"))
