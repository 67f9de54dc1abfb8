"""What holds for every completion. ``MEDR1_FUZZ=50`` multiplies the number of examples by 50."""

import math
import os
import re
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medr1_verl.parsing import LETTERS, option_letter, parse, read, reasoning
from medr1_verl.reference import reference_rewards
from medr1_verl.reward import compute_score
from medr1_verl.styles import STYLES

EXAMPLES = settings(max_examples=150 * int(os.environ.get("MEDR1_FUZZ", "1")), deadline=None)

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
PIECES = [*TAGS, "C", "c.", "A", "CT", " ", "\n", "\r\n", "<", ">", "/", "<Think>", "\u200b", "\u3000", "x", "word "]
tagged = st.lists(st.sampled_from(PIECES), max_size=16).map("".join)
texts = st.one_of(tagged, st.text(max_size=60))
styles = st.sampled_from(sorted(STYLES))
white = st.text(alphabet=" \n\t\r\u00a0\u2028\u3000", max_size=4)
# Reasoning as a model writes it: any text that is not blank and has no tag of a block in it.
reasonings = st.text(min_size=1, max_size=80).filter(
    lambda text: re.search("[!-~]", text) is not None and not any(tag in text for tag in TAGS)
)
OPTIONS = ["MRI", "X-ray", "CT", "Ultrasound"]
anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
    st.binary(max_size=10),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.builds(object),
)
KEYS = {"score", "acc", "format", "parsed", "pred"}


def completion(style, think, answer, gaps=("", "", "")):
    content = {"think": think, "answer": answer}
    blocks = [f"<{block}>{content[block]}</{block}>" for block in STYLES[style].blocks]
    return gaps[0] + gaps[1].join(blocks) + gaps[2]


@EXAMPLES
@given(
    anything,
    anything,
    anything,
    anything,
    st.dictionaries(
        st.sampled_from(
            [
                "style",
                "mode",
                "accuracy_weight",
                "format_weight",
                "length_weight",
                "repetition_weight",
                "modality_weight",
                "letter_case_weight",
                "min_words",
                "max_words",
                "open_metric",
                "reward_router_address",
                "unheard_of",
            ]
        ),
        anything,
        max_size=6,
    ),
)
def test_nothing_is_ever_raised_and_the_keys_depend_on_the_configuration_only(source, text, truth, info, kwargs):
    keys = KEYS | {
        key.replace("_weight", "_part")
        for key in ("length_weight", "repetition_weight", "modality_weight", "letter_case_weight")
        if kwargs.get(key) is not None
    }
    if kwargs.get("open_metric") is not None:
        keys |= {"open_score"}
    result = compute_score(source, text, truth, info, **kwargs)
    assert set(result) == keys
    assert isinstance(result["score"], float)
    assert math.isfinite(result["score"])


@EXAMPLES
@given(
    texts,
    st.sampled_from(LETTERS),
    styles,
    st.dictionaries(st.sampled_from(["options", "style", "modality", "index", "question_id"]), anything, max_size=4),
)
def test_nothing_is_raised_for_any_row(text, truth, style, info):
    assert set(compute_score("", text, truth, info, style=style, modality_weight=0.1)) == KEYS | {"modality_part"}


@EXAMPLES
@given(texts, styles, st.sampled_from(["strict", "reference"]), st.floats(0, 10), st.floats(0, 10))
def test_the_score_is_the_weighted_sum_within_its_bounds(text, style, mode, accuracy_weight, format_weight):
    row = {"options": OPTIONS, "style": style}
    weights = {"accuracy_weight": accuracy_weight, "format_weight": format_weight}
    result = compute_score("", text, "C", row, mode=mode, **weights)
    assert result["score"] == accuracy_weight * result["acc"] + format_weight * result["format"]
    assert 0 <= result["score"] <= accuracy_weight + format_weight
    assert {result["acc"], result["format"], result["parsed"]} <= {0, 1}
    assert result["parsed"] == (result["pred"] != "")
    assert result["acc"] <= result["parsed"]


@EXAMPLES
@given(texts, styles)
@example("<think>x</think><answer>A</answer><answer>C</answer>", "think")
def test_only_one_letter_can_be_right(text, style):
    row = {"options": OPTIONS, "style": style}
    results = [compute_score("", text, letter, row) for letter in "ABCD"]
    assert sum(result["acc"] for result in results) <= 1
    assert len({(result["format"], result["parsed"], result["pred"]) for result in results}) == 1


@EXAMPLES
@given(reasonings, styles, white, white, white, white, st.sampled_from(["C", "c", "C.", "c.", "C)", "c)", "CT", "ct"]))
def test_the_right_answer_in_well_formed_blocks_gets_the_full_score(think, style, before, gap, after, inner, answer):
    text = completion(style, think, inner + answer + inner, (before, gap, after))
    result = compute_score("", text, "C", {"options": OPTIONS, "style": style})
    assert result == {"score": 2.0, "acc": 1, "format": 1, "parsed": 1, "pred": "C"}


@EXAMPLES
@given(texts, styles, white, white)
def test_white_space_around_the_blocks_changes_nothing(text, style, before, after):
    row = {"options": OPTIONS, "style": style}
    spaced = re.sub(r"(</think>|</answer>)(\s*)(?=<think>|<answer>)", lambda m: m[1] + m[2] + after, text)
    assert compute_score("", before + spaced + after, "C", row) == compute_score("", text, "C", row)


@EXAMPLES
@given(tagged, styles)
def test_the_scan_agrees_with_the_rule_written_as_a_pattern(text, style):
    no_tag = r"((?:(?!</?think>|</?answer>).)*)"
    blocks = r"\s*".join(rf"<{block}>{no_tag}</{block}>" for block in STYLES[style].blocks)
    match = re.fullmatch(rf"\s*{blocks}\s*", text, re.DOTALL)
    content = dict(zip(STYLES[style].blocks, match.groups(), strict=True)) if match else {"answer": ""}
    well_formed = content["answer"].strip() != "" and content.get("think", "x").strip(" \r\n\u200b\u3000") != ""
    assert read(text, STYLES[style])[0] == well_formed


@EXAMPLES
@given(tagged)
def test_what_is_remembered_of_endings_never_changes_a_verdict(text):
    """Completions beginning with reasoning take a short cut, unless the reasoning is led by a space."""
    for style in STYLES.values():
        assert read("<think>x" + text, style) == read("<think> x" + text, style)


@EXAMPLES
@given(tagged, st.sampled_from(["C", "A", "CT", ""]))
def test_reference_mode_agrees_with_the_released_patterns(text, gold):
    """The released rule as its two patterns have it; think-after is the think pattern with the blocks exchanged."""
    found = re.search(r"<answer>(.*?)</answer>", text)
    student = (found.group(1) if found else text).strip()
    patterns = {
        "think": r"<think>.*?</think>\s*<answer>.*?</answer>",
        "no-think": r"\s*<answer>.*?</answer>",
        "think-after": r"<answer>.*?</answer>\s*<think>.*?</think>",
    }
    for style, pattern in patterns.items():
        accuracy, well_formed, _ = reference_rewards(text, f"<answer> {gold} </answer>", style)
        assert accuracy == (student == gold)
        assert well_formed == (re.fullmatch(pattern, text, re.DOTALL) is not None)


@EXAMPLES
@given(st.text(max_size=12), st.lists(st.text(max_size=6), max_size=6))
def test_an_answer_names_an_option_of_the_question_or_none(answer, options):
    letter = option_letter(answer, options)
    assert letter == "" or LETTERS.index(letter) < len(options)


def _calls(function, *args, **kwargs):
    """How many function and method calls, Python's and C's, one call makes."""
    number = 0

    def count(frame, event, argument):
        nonlocal number
        number += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function(*args, **kwargs)
    finally:
        sys.setprofile(None)
    return number


@settings(max_examples=60 * int(os.environ.get("MEDR1_FUZZ", "1")), deadline=None)
@given(tagged.filter(bool), tagged, tagged, styles)
@example("<think></think>", "", "", "think")
@example("<", "<think>", "</think><answer>C</answer>", "think")
@example("<answer>C</answer>", "", "", "no-think")
def test_work_grows_no_faster_than_the_text(piece, before, after, style):
    """The strict parser makes a bounded number of passes over the text, each a linear method of str, whatever it has;
    so the number of calls must not depend on how often the piece is repeated.
    """
    row = {"options": OPTIONS, "style": style}
    short, long = (before + piece * number + after for number in (50, 2000))
    for text in (short, long):
        assert _calls(compute_score, "", text, "C", row) <= 120
        assert _calls(parse, text, style, OPTIONS) <= 140
        assert _calls(reasoning, text) <= 20


@pytest.mark.parametrize("style", STYLES)
def test_a_numpy_array_or_a_tuple_of_options_is_as_good_as_a_list(style):
    np = pytest.importorskip("numpy")
    text = completion(style, "x", "CT")
    for options in (OPTIONS, tuple(OPTIONS), np.array(OPTIONS, dtype=object), np.array(OPTIONS)):
        assert compute_score("", text, "C", {"options": options, "style": style})["score"] == 2.0
        assert compute_score("", text, "E", {"options": options, "style": style})["score"] == 0.0
