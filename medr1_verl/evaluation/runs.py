"""Prediction files as arrays: which runs there are, that they answered the same rows, and what they were trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medr1_verl.errors import UserError
from medr1_verl.evaluation.predictions import FILE_NAME, read_rows
from medr1_verl.option_prior import PSEUDO_COUNT, OptionPrior, exact, normalized
from medr1_verl.prompt import LETTERS
from medr1_verl.slices import SLUGS

READINGS = {"strict": "acc", "tolerant": "acc_tolerant", "reference": "acc_reference"}
_MEASURES = (
    "acc",
    "acc_tolerant",
    "acc_reference",
    "parsed",
    "parsed_tolerant",
    "format",
    "tokens",
    "truncated",
    "token_f1",
)


@dataclass
class Questions:
    """The rows that were asked, each once, whichever files they came from."""

    ids: dict[str, int] = field(default_factory=dict)
    modality: list[str] = field(default_factory=list)
    question_type: list[str] = field(default_factory=list)
    image: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    n_options: list[int] = field(default_factory=list)
    options: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, row: dict[str, Any], file: Path) -> int:
        """Index of the row's question; raises :class:`UserError` where another file asked it otherwise."""
        index = self.ids.setdefault(row["question_id"], len(self.ids))
        plain = row.get("control", "none") != "relettered"
        if index == len(self.modality):
            self.modality.append(row["modality"])
            self.question_type.append(row["question_type"])
            self.image.append(row["image_sha256"])
            self.answer.append(row["answer"] if plain else "")
            self.n_options.append(row["n_options"])
            self.options.append(tuple(row.get("options") or ()) if plain else ())
            return index
        if plain and not self.answer[index]:
            self.answer[index], self.options[index] = row["answer"], tuple(row.get("options") or ())
        if (
            self.image[index] != row["image_sha256"]
            or (plain and self.answer[index] != row["answer"])
            or self.modality[index] != row["modality"]
        ):
            raise UserError(
                f"{file}: question {row['question_id']!r} has another image, answer or modality than in the other "
                "files; a table compares answers to one data set"
            )
        return index


@dataclass
class Run:
    """One model's answers. ``measures[control][name]`` has one value for every question, nan where it was not asked."""

    name: str
    files: list[Path]
    styles: set[str]
    trained_on: str | None
    measures: dict[str, dict[str, NDArray[np.float32]]]

    def asked(self, control: str = "none") -> NDArray[np.bool_]:
        return ~np.isnan(self.measures[control]["acc"])


def load_runs(sources: Sequence[str], decoding: str | None = None) -> tuple[Questions, list[Run]]:
    """Read every source (``PATH`` or ``NAME=PATH``; a directory stands for the prediction files in it).

    A run has the model's name. Files of one model make one run, so that its slices, or its controls, may be in files
    of their own; where they answer the same questions, or the weights were others, they are different runs after all,
    named by their directories.
    ``decoding`` picks one where a file holds several; None takes greedy answers, or the only other kind there is.
    Raises :class:`UserError` for an unfinished or broken file, a question answered twice, and different data.
    """
    questions = Questions()
    files = []
    for source in sources:
        name, path = _split_source(source)
        for file in _prediction_files(path):
            files += [(run, parts, name is not None) for run, parts in _collect(file, name, questions).items()]
    total = len(questions.ids)
    runs = []
    for name, parts in _combine(files).items():
        measures = {}
        for control, (indices, values) in parts.decoded(decoding).items():
            matrix = np.full((len(_MEASURES), total), np.nan, dtype=np.float32)
            matrix[:, indices] = np.array(values, dtype=np.float32).T
            measures[control] = dict(zip(_MEASURES, matrix, strict=True))
        if "none" not in measures:
            raise UserError(
                f"{parts.files[0]}: has answers under {', '.join(measures)} only; controls need control none"
            )
        trained_on = trained_slice(name) or (trained_slice(parts.label) if len(parts.files) == 1 else None)
        runs.append(Run(name, parts.files, parts.styles, trained_on, measures))
    return questions, runs


@dataclass
class _Collected:
    """What is read of one run so far; ``answers[decoding][control]`` has question numbers and their values."""

    files: list[Path] = field(default_factory=list)
    styles: set[str] = field(default_factory=set)
    weights: set[str] = field(default_factory=set)
    answers: dict[str, dict[str, tuple[list[int], list[list[float]]]]] = field(default_factory=dict)
    seen: set[tuple[str, str, int]] = field(default_factory=set)

    @property
    def label(self) -> str:
        """What its directory calls it."""
        return self.files[0].resolve().parent.name if self.files[0].name == FILE_NAME else self.files[0].stem

    def merge(self, other: _Collected) -> _Collected:
        """This, with another file's answers to other questions, controls or decodings added."""
        self.files += other.files
        self.styles |= other.styles
        self.seen |= other.seen
        for decoding, controls in other.answers.items():
            for control, (indices, values) in controls.items():
                own = self.answers.setdefault(decoding, {}).setdefault(control, ([], []))
                own[0].extend(indices)
                own[1].extend(values)
        return self

    def decoded(self, wanted: str | None) -> dict[str, tuple[list[int], list[list[float]]]]:
        """The answers of one decoding; None takes greedy ones, or the only other kind there is."""
        kinds = list(self.answers)
        if wanted is None:
            if "greedy" not in kinds and len(kinds) > 1:
                raise UserError(f"{self.files[0]}: holds answers decoded {', '.join(kinds)}; pick one with --decoding")
            wanted = "greedy" if "greedy" in kinds else kinds[0]
        if wanted not in kinds:
            raise UserError(f"{self.files[0]}: has no answers decoded {wanted!r}; it has {', '.join(kinds)}")
        return self.answers[wanted]


def _collect(file: Path, name: str | None, questions: Questions) -> dict[str, _Collected]:
    """What ``file`` holds, by run: by the model's name, or all as ``name``."""
    found: dict[str, _Collected] = {}
    for row in read_rows(file):
        try:
            run = name or row["model"]
            parts = found.setdefault(run, _Collected([file]))
            index = questions.add(row, file)
            control, decoding = row.get("control", "none"), row.get("decoding", "greedy")
            if (decoding, control, index) in parts.seen:
                raise UserError(
                    f"{file}: run {run!r} answers question {row['question_id']!r} ({control}) twice; "
                    "evaluate again with --fresh, or remove one of the lines"
                )
            parts.seen.add((decoding, control, index))
            parts.styles.add(row["style"])
            if row.get("weights"):  # a server does not tell
                parts.weights.add(row["weights"])
            indices, values = parts.answers.setdefault(decoding, {}).setdefault(control, ([], []))
            indices.append(index)
            values.append(_values(row))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{file}: question {row['question_id']!r} lacks {error}; was it written by medr1 evaluate?"
            ) from error
    if not found:
        raise UserError(f"{file}: is empty; run medr1 evaluate again")
    return found


def _combine(files: Sequence[tuple[str, _Collected, bool]]) -> dict[str, _Collected]:
    """Runs from (name, one file's answers, the user named it): files of one run that do not overlap are one."""
    runs: dict[str, _Collected] = {}
    by_name: dict[str, list[tuple[_Collected, bool]]] = {}
    for name, parts, named in files:
        by_name.setdefault(name, []).append((parts, named))
    for name, members in by_name.items():
        answers = sum(len(parts.seen) for parts, _ in members)
        weights = set().union(*(parts.weights for parts, _ in members))
        if len(set().union(*(parts.seen for parts, _ in members))) == answers and len(weights) <= 1:
            for parts, _ in members:
                runs[name] = runs[name].merge(parts) if name in runs else parts
            continue
        for parts, named in members:
            if named or parts.label in runs:
                raise UserError(
                    f"{parts.files[0]}: run {name!r} answers the same questions as in another file, or had other "
                    "weights there; give each file once, and runs of their own names as NAME=PATH"
                )
            runs[parts.label] = parts
    return runs


def _values(row: dict[str, Any]) -> list[float]:
    nan = float("nan")
    tolerant = row.get("pred_tolerant")
    return [
        row["acc"],
        row.get("acc_tolerant", nan),
        row.get("acc_reference", nan),
        row["parsed"],
        nan if tolerant is None else float(tolerant != ""),
        row["format"],
        nan if row.get("tokens") is None else row["tokens"],
        row.get("truncated", nan),
        row.get("token_f1", nan),
    ]


def _split_source(source: str) -> tuple[str | None, Path]:
    name, separator, path = source.partition("=")
    if separator and name and "/" not in name:
        return name, Path(path)
    return None, Path(source)


def _prediction_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory; give what medr1 evaluate wrote")
    found = [path / FILE_NAME] if (path / FILE_NAME).is_file() else sorted(path.glob(f"*/{FILE_NAME}"))
    if found:
        return found
    if (path / f"{FILE_NAME}.partial").is_file():
        raise UserError(f"{path}: its evaluation did not finish; run the same medr1 evaluate again to go on, then this")
    raise UserError(f"{path}: no {FILE_NAME} in it or one level below; run medr1 evaluate first")


def trained_slice(name: str) -> str | None:
    """The modality or question type that a run's name ends with: ``ct``, ``grpo-ct``, ``sft_lesion_grading``."""
    for slug in (*SLUGS["modality"], *SLUGS["question_type"]):
        if name == slug or name.endswith((f"-{slug}", f"_{slug}", f"/{slug}")):
            return slug
    return None


def check_styles(runs: Sequence[Run]) -> None:
    """Refuse runs of several styles: their prompts differ, so their difference is not the model's alone."""
    styles = {style: run.name for run in runs for style in sorted(run.styles)}
    if len(styles) > 1:
        told = ", ".join(f"{name} is {style}" for style, name in styles.items())
        raise UserError(f"runs of different styles in one table ({told}); compare styles with --styles")


# --- training rows: what the blind prior may learn, and which images are known -------------------------------------


@dataclass(frozen=True)
class TrainingRows:
    """Options and images of the training rows; ``modality`` and ``question_type`` say which slice each is of."""

    modality: list[str]
    question_type: list[str]
    image: list[str]
    options: list[tuple[str, ...]]
    gold: list[int]

    def of(self, trained_on: str | None) -> Iterator[int]:
        """Row numbers of one slice; of all rows with None."""
        for number, slugs in enumerate(zip(self.modality, self.question_type, strict=True)):
            if trained_on is None or trained_on in slugs:
                yield number

    def images(self, trained_on: str | None) -> set[str]:
        return {part for number in self.of(trained_on) for part in self.image[number].split("\n")}

    def prior(self, trained_on: str | None, normalize: bool) -> OptionPrior:
        rows = [(self.options[number], self.gold[number]) for number in self.of(trained_on) if self.options[number]]
        return OptionPrior(rows, normalized if normalize else exact, PSEUDO_COUNT)

    def majority_letter(self, trained_on: str | None) -> str:
        """The letter that is right most often in the slice."""
        counts = np.bincount([self.gold[number] for number in self.of(trained_on) if self.options[number]], minlength=1)
        return LETTERS[int(counts.argmax())]


def read_training_rows(paths: Iterable[str | Path]) -> TrainingRows:
    """The training parquets in ``paths``; a directory stands for its ``train.parquet``, or those one level below."""
    rows = TrainingRows([], [], [], [], [])
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            own = path / "train.parquet"
            files = [own] if own.is_file() else sorted(path.glob("*/train.parquet"))
        if not files or not all(file.is_file() for file in files):
            raise UserError(f"{path}: no training parquet there; give the train.parquet that medr1 convert wrote")
        for file in files:
            try:
                infos = pq.read_table(file, columns=["extra_info"]).column("extra_info").to_pylist()
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{file}: cannot be read as parquet: {str(error).splitlines()[0]}") from error
            for info in infos:
                options = tuple(info["options"] or ())
                rows.modality.append(info["modality"])
                rows.question_type.append(info["question_type"])
                rows.image.append(info["image_sha256"])  # one line for each image of the row
                rows.options.append(options)
                rows.gold.append(LETTERS.index(info["answer"]) if options else -1)
    return rows
