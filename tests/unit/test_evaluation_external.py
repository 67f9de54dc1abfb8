"""Questions of other benchmarks from plain JSONL."""

import json

import pytest
from PIL import Image

from medr1_verl.errors import UserError
from medr1_verl.evaluation.controls import apply_control
from medr1_verl.evaluation.questions import read_questions
from medr1_verl.prompt import render_prompt


@pytest.fixture
def write(tmp_path):
    (tmp_path / "images").mkdir()
    for name, colour in (("a.png", (255, 0, 0)), ("b.png", (0, 255, 0))):
        Image.new("RGB", (40, 30), colour).save(tmp_path / "images" / name)

    def to_file(*rows, name="bench.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    return to_file


CLOSED = {"image": "images/a.png", "question": "Is it red?", "answer": "Yes"}
CHOICE = {
    "image": "images/b.png",
    "question": "Colour?",
    "options": ["red", "green"],
    "answer": "green",
    "modality": "ct",
}
OPEN = {"image": ["images/a.png", "images/b.png"], "question": "What differs?", "answer": "the colour"}


def test_the_three_kinds(write):
    closed, choice, opened = read_questions([write(CLOSED, CHOICE, OPEN)])
    assert (closed.options, closed.answer, closed.question_type) == (("yes", "no"), "A", "closed")
    assert (closed.question_id, closed.dataset, closed.modality) == ("bench_1", "bench", "other")
    assert closed.messages[0]["content"] == render_prompt("Is it red?", ("yes", "no"), "think")
    assert (choice.answer, choice.modality) == ("B", "ct")
    assert (opened.options, opened.answer, opened.question_type) == ((), "the colour", "open")
    assert opened.messages[0]["content"] == render_prompt("What differs?", (), "think", n_images=2)
    assert [picture.getpixel((0, 0)) for picture in opened.load_images()] == [(255, 0, 0), (0, 255, 0)]
    assert opened.image_sha256 == f"{closed.image_sha256}\n{choice.image_sha256}"


def test_style_letters_and_controls(write):
    (question,) = read_questions([write(CHOICE | {"answer": "B"})], style="no-think")
    assert question.answer == "B"
    assert question.messages[0]["content"] == render_prompt("Colour?", ("red", "green"), "no-think")
    open_question = read_questions([write(OPEN)])[0]
    assert apply_control([open_question], "relettered") == [open_question]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["{broken"], "line 1: is not JSON"),
        (["[]"], "is no JSON object"),
        ([CLOSED, {"image": "images/a.png"}], "line 2: has no question, answer"),
        ([CHOICE | {"answer": "blue"}], "answer 'blue' is none of its options"),
        ([CHOICE | {"options": ["one"]}], "options must be a list"),
        ([CHOICE | {"options": "red"}], "options must be a list"),
        ([CLOSED | {"image": "images/none.png"}], "No such file"),
        ([CLOSED | {"question_id": "x"}, CHOICE | {"question_id": "x"}], "'x' occurs twice"),
        ([""], "has no rows"),
    ],
)
def test_bad_rows_are_named(write, rows, says):
    with pytest.raises(UserError, match=says) as error:
        read_questions([write(*rows)])
    assert "\n" not in str(error.value)
