"""Everything about a question that needs no image: which reader, the checks, the treatment of options, --limit."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medr1_verl.convert import readers, splits
from medr1_verl.convert.check import check_row, normalize_option
from medr1_verl.convert.options import Options
from medr1_verl.convert.question import Question, RawRow, RejectedError, RejectedRow
from medr1_verl.errors import UserError
from medr1_verl.prompt import LETTERS


class TextStage:
    """Questions that passed every check that needs no image, and the rows that did not."""

    def __init__(self, options: Options):
        self.options = options
        self.files: list[readers.SourceFile] = []
        self.questions: list[Question] = []
        self.rejected: list[RejectedRow] = []
        self.rows_read = 0
        self.filtered = 0
        self.options_changed = 0
        self.notes: dict[str, Any] = {}
        self.published: Counter[str] = Counter()  # rows of each split in a source that decides it
        self.source, self.image_root, rows = self._open()
        self._check(rows)
        if options.limit:
            self._limit()

    def _open(self) -> tuple[str, Path, Iterator[RawRow]]:
        options = self.options
        root = Path(options.input)
        if root.is_file() and root.suffix.lower() in readers.TABLE_SUFFIXES:
            if options.splits:
                raise UserError("--splits goes with an OmniMedVQA folder, not with a table of questions")
            return "table", root.parent, readers.read_table(root, self.files)
        if not root.is_dir():
            kinds = "an OmniMedVQA folder or a .jsonl, .json or .csv file"
            problem = "is neither" if root.exists() else "does not exist; give"
            raise UserError(f"--input {root} {problem} {kinds}")
        if options.splits:
            raw: Iterable[RawRow] = ()
            if (root / "QA_information").is_dir():
                raw = readers.read_omnimedvqa(root, self.files, options.access)
            reader = splits.SplitReader(Path(options.splits), splits.RawIndex(raw), self.files)
            self.notes["splits"] = reader.notes
            return "published splits", root, iter(reader)
        return "omnimedvqa", root, readers.read_omnimedvqa(root, self.files, options.access)

    def _keep(self, question: Question) -> bool:
        return (not self.options.modality or question.modality in self.options.modality) and (
            not self.options.question_type or question.question_type in self.options.question_type
        )

    def _check(self, rows: Iterable[RawRow]) -> None:
        seen: dict[str, tuple[str, int]] = {}
        for raw in tqdm(rows, desc="reading questions", unit="row", mininterval=0.5, delay=1):
            self.rows_read += 1
            if raw.split:
                self.published[raw.split] += 1
            try:
                question = check_row(raw)
                if not self._keep(question):
                    self.filtered += 1
                    continue
                first = seen.setdefault(question.question_id, (raw.file, raw.row))
                if first != (raw.file, raw.row):
                    where = f"row {first[1]} of {first[0]}"
                    raise RejectedError("duplicate_question_id", f"{question.question_id!r} is already {where}")
                self.questions.append(self._treat_options(question))
            except RejectedError as error:
                identity = str(raw.question_id) if isinstance(raw.question_id, (str, int)) else None
                self.rejected.append(RejectedRow(raw.file, raw.row, identity, error.reason, error.message))

    def _treat_options(self, question: Question) -> Question:
        """``--normalize-options`` and ``--shuffle-options``; the gold letter follows its text."""
        gold = ord(question.answer) - ord("A")
        options = list(question.options)
        if self.options.normalize_options:
            options = [normalize_option(option) for option in options]
            if not all(options):
                raise RejectedError("bad_options", "an option is nothing but a period")
            if options.count(options[gold]) > 1:
                raise RejectedError("ambiguous_gold", f"without its typography, {options[gold]!r} is there twice")
        if self.options.shuffle_options:
            order = list(range(len(options)))
            random.Random(f"{self.options.seed}\n{question.question_id}").shuffle(order)
            options = [options[i] for i in order]
            gold = order.index(gold)
        if tuple(options) != question.options:
            self.options_changed += 1
        question.options, question.answer = tuple(options), LETTERS[gold]
        return question

    def _limit(self) -> None:
        """Keep ``--limit`` rows spread over the whole input: the files are sorted by data set, so the first rows of
        one would be of one modality only.
        """
        total = len(self.questions) + len(self.rejected)
        if total <= self.options.limit:
            return
        chosen = set(random.Random(self.options.seed).sample(range(total), self.options.limit))
        keep_questions = [q for i, q in enumerate(self.questions) if i in chosen]
        keep_rejected = [r for i, r in enumerate(self.rejected, len(self.questions)) if i in chosen]
        self.filtered += total - self.options.limit
        self.questions, self.rejected = keep_questions, keep_rejected
