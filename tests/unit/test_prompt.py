"""The prompt of each style, and what a user's template may and may not be."""

import pytest

from medr1_verl.errors import UserError
from medr1_verl.parsing import parse
from medr1_verl.prompt import load_template, parse_template, render_prompt
from medr1_verl.styles import STYLES

OPTIONS = ["MRI", "X-ray", "CT"]


@pytest.mark.parametrize("style", STYLES)
def test_the_prompt_asks_for_the_blocks_that_the_parser_accepts_in_that_order(style):
    text = render_prompt("What is it?", OPTIONS, style)
    assert text.startswith("<image>What is it?\nA) MRI\nB) X-ray\nC) CT\n")
    tags = [tag for pair in STYLES[style].tags for tag in pair]
    places = [text.find(tag) for tag in tags]
    assert -1 not in places
    assert places == sorted(places)
    foreign = {"<think>", "</think>", "<answer>", "</answer>"} - set(tags)
    assert not any(tag in text for tag in foreign)
    completion = "".join(f"{opening}C{closing}" for opening, closing in STYLES[style].tags)
    assert parse(completion, style, OPTIONS) == (True, "C" if STYLES[style].reasons else "", "C", "C")


@pytest.mark.parametrize(
    ("template", "expected", "why"),
    [
        ("{question} {options_inline}\n{style}", "<image>Q {x}? A)a, B){style}\nI", "released layout, in one line"),
        ("Q: {{ question }}\n{{options}}\n{{ style }}", "<image>Q: Q {x}?\nA) a\nB) {style}\nI", "jinja-like braces"),
        ("{question}\n<image>\n{options}\n{style}", "Q {x}?\n<image>\nA) a\nB) {style}\nI", "own place of the image"),
        ('{"q": "{question}"} {options} {style}', '<image>{"q": "Q {x}?"} A) a\nB) {style} I', "other braces are text"),
        ("{question}\r\n{options}\r\n{style}\r\n", "<image>Q {x}?\nA) a\nB) {style}\nI", "Windows line ends"),
    ],
)
def test_template(template, expected, why):
    parsed = parse_template(template + "\n--- think\nI\n")
    assert render_prompt(" Q {x}? ", ["a", "{style}"], "think", template=parsed) == expected, why


def test_a_template_file_of_a_windows_editor(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeff{question}\r\n{options}\r\n{style}\r\n--- think\r\nI\r\n".encode())
    assert render_prompt("Q", ["a"], "think", template=load_template(path)) == "<image>Q\nA) a\nI"


def test_a_style_without_a_section_keeps_the_projects_wording():
    template = parse_template("{question}\n{options}\n{style}\n--- think\nmine\n")
    assert render_prompt("Q", OPTIONS, "think", template=template).endswith("\nmine")
    assert render_prompt("Q", OPTIONS, "no-think", template=template).endswith(STYLES["no-think"].instruction)


def test_open_question_asks_for_words_and_has_no_empty_line():
    text = render_prompt("What is it?", [], "think")
    assert text == "<image>What is it?\n" + STYLES["think"].open_instruction
    assert "letter" not in text


def test_several_images():
    assert render_prompt("Q", OPTIONS, "think", n_images=3).startswith("<image><image><image>Q\n")
    template = parse_template("{question}\n<image>\n{options}\n{style}")
    assert "\n<image><image>\n" in render_prompt("Q", OPTIONS, "think", n_images=2, template=template)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{question}\n{style}", "{options}"),
        ("{options}\n{style}", "{question}"),
        ("{question}\n{options}", "{style}"),
        ("", "{question}"),
        ("{question}\n{question}\n{options}\n{style}", "2 times"),
        ("{question}\n{options}\n{style}\n--- thinking\nx", "--- thinking"),
        ("{question}\n{options}\n{style}\n--- think\n\n", "empty"),
        ("{question}\n{options}\n{style}\n--- think\na\n--- think\nb", "two sections"),
        ("<image><image>{question}\n{options}\n{style}", "<image>"),
    ],
)
def test_a_template_that_cannot_work_is_refused_by_name(tmp_path, text, named):
    path = tmp_path / "mine.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_template(path)
    assert "mine.txt" in str(caught.value)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_template_file_that_cannot_be_read_is_refused(tmp_path, content):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.txt"):
        load_template(path)
