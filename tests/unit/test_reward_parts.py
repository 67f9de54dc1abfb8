"""Optional parts, open questions, and faults in the middle of a run."""

import logging
import threading

import pytest

from medr1_verl import parts, reward
from medr1_verl.open_answers import exact, open_metric, token_f1
from medr1_verl.reward import compute_score, fault_counts

OPTIONS = ["MRI", "X-ray", "CT", "Ultrasound"]
ROW = {"options": OPTIONS, "style": "think", "modality": "ct", "question_id": "q7"}


@pytest.fixture(autouse=True)
def _fresh_fault_counts(monkeypatch):
    monkeypatch.setattr(reward, "_faults", type(reward._faults)())


def score(think, answer="C", row=ROW, **kwargs):
    return compute_score("omnimedvqa/ct", f"<think>{think}</think><answer>{answer}</answer>", "C", row, **kwargs)


@pytest.mark.parametrize(
    ("part", "think", "answer", "expected", "why"),
    [
        ("length", "w " * 10, "C", 1.0, "as short as may be"),
        ("length", "w " * 180, "C", 1.0, "as long as may be"),
        ("length", "w " * 5, "C", 0.5, "half of the least"),
        ("length", "w", "C", 0.1, "one word"),
        ("length", "w " * 270, "C", 0.5, "half as long again"),
        ("length", "w " * 1000, "C", 0.0, "far too long"),
        ("repetition", "one two three four five six", "C", 1.0, "nothing is said twice"),
        ("repetition", "one two three", "C", 1.0, "too short to repeat itself"),
        ("repetition", "the lung is dark " * 50, "C", 4 / 197, "one sentence again and again"),
        ("repetition", "The lung is dark. the LUNG is dark.", "C", 4 / 5, "case does not make it new"),
        ("modality", "This CT shows bone.", "C", 1.0, "named"),
        ("modality", "Computed\ntomography", "C", 1.0, "a line end inside the name"),
        ("modality", "computed tomography", "C", 1.0, "named in full"),
        ("modality", "the product of ct", "C", 0.0, "lower-case ct is no CT"),
        ("modality", "The tract is intact, a fact.", "C", 0.0, "'ct' inside a word does not name it"),
        ("modality", "An MRI.", "C", 0.0, "another modality"),
        ("modality", "CT, not MRI", "C", 0.5, "two named"),
        (
            "modality",
            "CT MRI X-ray ultrasound OCT fundus dermoscopy microscopy",
            "C",
            1 / 8,
            "a list of all earns little",
        ),
        ("modality", "bone", "C", 0.0, "none named"),
        ("letter_case", "x", "C", 1.0, "the letter as asked for"),
        ("letter_case", "x", "C.", 1.0, "with its period"),
        ("letter_case", "x", "c", 0.0, "lower case"),
        ("letter_case", "x", "CT", 0.0, "the text"),
        ("letter_case", "x", "A", 1.0, "a wrong letter is still a letter"),
        ("letter_case", "x", "E", 0.0, "no option"),
    ],
)
def test_part(part, think, answer, expected, why):
    plain = score(think, answer)
    result = score(think, answer, **{f"{part}_weight": 0.5})
    assert result[f"{part}_part"] == pytest.approx(expected), why
    assert result["score"] == pytest.approx(plain["score"] + 0.5 * expected)
    assert f"{part}_part" not in plain
    assert {key: value for key, value in result.items() if key in plain and key != "score"} == {
        key: value for key, value in plain.items() if key != "score"
    }


def test_weight_zero_reports_and_pays_nothing():
    assert score("CT", modality_weight=0) == score("CT") | {"modality_part": 1.0}


def test_bounds_of_the_length_can_be_set():
    assert score("w w w", length_weight=1, min_words=3, max_words=4)["length_part"] == 1.0
    assert score("w " * 6, length_weight=1, min_words=3, max_words=4)["length_part"] == 0.5


def test_no_part_is_paid_without_the_format():
    for text in ("<answer>C</answer>", "<think>This CT shows bone</think>C", "a CT " * 30):
        result = compute_score("", text, "C", ROW, **dict.fromkeys(parts.WEIGHT_KEYS, 1.0))
        assert [result[f"{name}_part"] for name in parts.PARTS] == [0.0] * 4


@pytest.mark.parametrize(
    ("modality", "names"),
    [
        ("ct", ["CT", "CTs", "computed tomography", "CAT scan"]),
        ("mri", ["MRI", "mri", "MR image", "magnetic resonance"]),
        ("xray", ["X-ray", "x rays", "xray", "radiograph", "Radiography", "mammogram", "mammography"]),
        ("ultrasound", ["ultrasound", "ultrasonography", "sonogram", "echocardiography"]),
        ("dermoscopy", ["dermoscopy", "dermatoscopic"]),
        ("fundus", ["fundus photograph", "fundoscopy"]),
        ("oct", ["OCT", "optical coherence tomography"]),
        ("microscopy", ["microscopy", "micrograph", "histology", "histopathological"]),
    ],
)
def test_names_of_each_modality_name_no_other(modality, names):
    for name in names:
        row = ROW | {"modality": modality}
        assert score(f"a {name} here", row=row, modality_weight=1)["modality_part"] == 1.0, name


# ------------------------------------------------------------------ open questions

OPEN = {"options": [], "style": "think", "question_id": "q8"}


def open_score(answer, gold="the left lung", **kwargs):
    return compute_score("own/xray", f"<think>x</think><answer>{answer}</answer>", gold, OPEN, **kwargs)


@pytest.mark.parametrize(
    ("answer", "acc", "f1", "why"),
    [
        ("the left lung", 1, 1.0, "word for word"),
        ("Left Lung.", 1, 1.0, "case, article and period do not count"),
        ("left-lung", 1, 1.0, "nor does a hyphen for the space"),
        ("left", 0, 2 / 3, "half of it"),
        ("lung left", 0, 1.0, "word order is exact match's business"),
        ("right lung", 0, 0.5, "one word of two"),
        ("left left lung lung", 0, 2 / 3, "saying it twice loses precision"),
        ("heart", 0, 0.0, "nothing shared"),
        ("the", 0, 0.0, "an article alone is nothing"),
    ],
)
def test_open_answer(answer, acc, f1, why):
    result = open_score(answer)
    assert (result["acc"], result["format"], result["parsed"]) == (acc, 1, int(answer != "the")), why
    assert result["score"] == acc + 1
    assert open_score(answer, open_metric="exact") == result | {"open_score": float(acc)}
    by_f1 = open_score(answer, open_metric="token_f1")
    assert by_f1["open_score"] == pytest.approx(f1)
    assert by_f1["score"] == pytest.approx(f1 + 1)
    assert by_f1["acc"] == acc


def test_a_ground_truth_in_words_makes_a_row_without_options_open():
    text = "<think>x</think><answer>pneumonia</answer>"
    assert compute_score("own/xray", text, "Pneumonia", None)["acc"] == 1
    assert compute_score("own/xray", text, "Pneumonia", {"options": None})["pred"] == "pneumonia"


def test_a_closed_row_has_the_same_keys_under_open_metric():
    assert score("x", open_metric="token_f1") == score("x") | {"open_score": 1.0}


def test_a_long_open_answer_does_not_travel_in_full():
    result = open_score("word " * 20_000)
    assert len(result["pred"]) == reward.MAX_PRED_LENGTH


def test_a_function_of_the_users_own_can_judge(tmp_path, monkeypatch, caplog):
    (tmp_path / "my_judge.py").write_text(
        "def judge(answer, gold, info):\n"
        "    if 'raise' in answer:\n"
        "        raise ConnectionError('judge is down')\n"
        "    return 0.75 if 'l' in answer else 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert open_score("lung", open_metric="my_judge:judge")["open_score"] == 0.75
    assert open_score("heart", open_metric="my_judge:judge")["open_score"] == 1.0, "kept within 0..1"
    for _ in range(3):
        down = open_score("raise", open_metric="my_judge:judge")
        assert (down["open_score"], down["score"], down["format"]) == (0.0, 1.0, 1)
    assert fault_counts() == {"open_metric": 3}
    assert len(caplog.records) == 1
    assert "judge is down" in caplog.text


@pytest.mark.parametrize("name", ["bleu", "no_such_module:f", "math:no_such", "math:pi", ":f", "math:"])
def test_a_metric_that_does_not_exist_counts_nothing_and_is_reported(name):
    with pytest.raises((ValueError, ImportError, AttributeError)):
        open_metric(name)
    assert open_score("left lung", open_metric=name)["open_score"] == 0.0
    assert fault_counts() == {"open_metric": 1}


def test_metrics_on_their_own():
    assert exact("A lung", "lung", {}) == 1.0
    assert exact("", "", {}) == 0.0, "an empty truth is nobody's answer"
    assert token_f1("", "lung", {}) == 0.0


# ------------------------------------------------------------------ faults in the middle of a run


@pytest.mark.parametrize(
    ("kwargs", "kind", "named"),
    [
        ({"style": "thinking"}, "style", "thinking"),
        ({"extra_info": ROW | {"style": "thinking"}}, "style", "thinking"),
        ({"mode": "lenient"}, "mode", "lenient"),
        ({"ground_truth": "E"}, "ground truth", "'E'"),
        ({"ground_truth": "CT"}, "ground truth", "'CT'"),
        ({"ground_truth": "c"}, "ground truth", "'c'"),
        ({"ground_truth": None}, "ground truth", "None"),
        ({"ground_truth": ["C"]}, "TypeError", "unhashable"),
        ({"extra_info": OPEN, "ground_truth": " "}, "ground truth", "' '"),
        ({"solution_str": None}, "completion", "NoneType"),
        ({"solution_str": b"<answer>C</answer>"}, "completion", "bytes"),
        ({"accuracy_weight": "much"}, "TypeError", "accuracy_weight"),
        ({"accuracy_weight": float("nan")}, "weight", "nan"),
        ({"format_weight": float("inf")}, "weight", "inf"),
        ({"length_weight": "much"}, "TypeError", ""),
        ({"extra_info": 7}, "AttributeError", "int"),
    ],
)
def test_what_cannot_be_scored_is_logged_once_counted_and_0(kwargs, kind, named, caplog):
    call = {
        "data_source": "omnimedvqa/ct",
        "solution_str": "<think>x</think><answer>C</answer>",
        "ground_truth": "C",
        "extra_info": ROW,
    }
    for _ in range(3):
        result = compute_score(**call | kwargs)
        assert {key: result[key] for key in ("score", "acc", "format", "parsed", "pred")} == {
            "score": 0.0,
            "acc": 0,
            "format": 0,
            "parsed": 0,
            "pred": "",
        }
    assert fault_counts() == {kind: 3}
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert named in caplog.text
    if "extra_info" not in kwargs:
        assert "'q7'" in caplog.text, "the row is named"


def test_an_exception_planted_in_a_part_costs_that_part_only(monkeypatch, caplog):
    def broken(found, info, settings):
        raise ZeroDivisionError("planted")

    monkeypatch.setitem(parts.PARTS, "repetition", broken)
    for _ in range(4):
        result = score("This CT shows bone", repetition_weight=0.5, modality_weight=0.25)
        assert (result["repetition_part"], result["modality_part"], result["score"]) == (0.0, 1.0, 2.25)
    assert fault_counts() == {"part repetition": 4}
    assert len(caplog.records) == 1
    assert "part repetition: ZeroDivisionError: planted" in caplog.text


def test_threads_share_nothing_but_the_fault_counts():
    texts = [f"<think>{'x' * n}</think><answer>{'ABCD'[n % 4]}</answer>" for n in range(1, 60)] + [None] * 5
    expected = [compute_score("", text, "C", ROW) for text in texts]
    before = fault_counts()["completion"]
    wrong = []

    def work():
        for _ in range(20):
            wrong.extend(
                text for text, want in zip(texts, expected, strict=True) if compute_score("", text, "C", ROW) != want
            )

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert fault_counts()["completion"] == before + 8 * 20 * 5
