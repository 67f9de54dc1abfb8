"""What the stages hand to each other: raw row, checked question, rejected row."""

from __future__ import annotations

from dataclasses import dataclass

# Every reason a row can be left out for; users and tests rely on these names.
REASONS = (
    "missing_image",
    "unreadable_image",
    "unsafe_path",
    "image_too_large",
    "image_too_small",
    "gold_not_in_options",
    "ambiguous_gold",
    "bad_options",
    "bad_row",
    "duplicate_question_id",
    "unknown_modality",
    "unknown_question_type",
    "bad_text",
)


class RejectedError(Exception):
    """A row that cannot become a question: a reason code and one line for a person."""

    def __init__(self, reason: str, message: str):
        assert reason in REASONS, reason
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(slots=True)
class RawRow:
    """One row as its source has it. Nothing is checked yet: a field may hold anything that JSON can say.

    ``gold_kind`` says what ``gold`` is: the ``text`` of an option (OmniMedVQA), a ``letter`` (split files), or
    ``either`` (plain JSONL and CSV, where people write both). ``split`` is train or test where the source decides it.
    ``fault`` is set where the row could not even be taken apart.
    """

    file: str
    row: int
    question_id: object = None
    dataset: object = None
    modality: object = None
    question_type: object = None
    question: object = None
    options: object = None
    gold: object = None
    gold_kind: str = "text"
    images: object = None
    split: str | None = None
    fault: tuple[str, str] | None = None


@dataclass(slots=True)
class Question:
    """A checked question. ``images`` are POSIX paths relative to the input root; ``answer`` is an option letter."""

    file: str
    row: int
    question_id: str
    dataset: str
    modality: str
    question_type: str
    question: str
    options: tuple[str, ...]
    answer: str
    images: tuple[str, ...]
    split: str | None = None

    @property
    def answer_text(self) -> str:
        return self.options[ord(self.answer) - ord("A")]


@dataclass(slots=True)
class RejectedRow:
    """One line of ``rejected.jsonl``."""

    file: str
    row: int
    question_id: str | None
    reason: str
    message: str

    def as_dict(self) -> dict[str, object]:
        return {
            "file": self.file,
            "row": self.row,
            "question_id": self.question_id,
            "reason": self.reason,
            "message": self.message,
        }
