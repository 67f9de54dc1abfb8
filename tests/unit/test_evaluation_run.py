"""Rows, controls, the prediction file and going on after a stop; the engine here is a table of answers.

The real engine is asked in tests/e2e.
"""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medr1_verl.errors import UserError
from medr1_verl.evaluation import evaluate as module
from medr1_verl.evaluation.controls import GREY, apply_control
from medr1_verl.evaluation.engine import Decoding, Output, check_model, split_content, weights_digest
from medr1_verl.evaluation.evaluate import Pass, accuracy_table, evaluate, main, model_name
from medr1_verl.evaluation.predictions import KEYS, PredictionFile, read_rows
from medr1_verl.evaluation.questions import read_questions
from medr1_verl.prompt import render_prompt

OPTIONS = ["CT", "MRI", "OCT", "X-Ray"]


def row(number, modality="ct", question_type="modality_recognition", answer="A", options=OPTIONS, question_id=None):
    picture = io.BytesIO()
    Image.new("RGB", (56, 28 * (1 + number % 3)), (number, 0, 255 - number)).save(picture, "PNG")
    return {
        "data_source": f"omnimedvqa/{modality}",
        "prompt": [{"role": "user", "content": render_prompt("Which one?", options, "think")}],
        "images": [{"bytes": picture.getvalue()}],
        "ability": "medical_vqa",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {
            "question_id": question_id or f"q{number}",
            "dataset": "set",
            "modality": modality,
            "question_type": question_type,
            "question": "Which one?",
            "options": options,
            "answer": answer,
            "image_sha256": f"{number:064x}",
            "style": "think",
        },
    }


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def parquet(tmp_path):
    """Twelve rows: two modalities in turn, the right letter going round."""
    rows = [row(n, ("ct", "mri")[n % 2], answer="ABCD"[n % 4]) for n in range(12)]
    return write(tmp_path / "test.parquet", rows)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "runs" / "tiny" / "model"
    path.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"):
        (path / name).write_text(name)
    return path


class TableEngine:
    """Answers A to everything, and counts what it was asked."""

    chunk = 5

    def __init__(self):
        self.asked = []
        self.stop_after = None

    def ask(self, questions, decoding, max_tokens):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise UserError("the engine died")
        self.asked += [question.question_id for question in questions]
        for question in questions:
            yield question, [Output("<think>so</think><answer>A</answer>", 9, 0)] * decoding.n

    def finish(self):
        pass


@pytest.fixture
def engine(monkeypatch):
    table = TableEngine()
    monkeypatch.setattr(module, "_start", lambda *args: table)
    return table


# --- rows


def test_questions_are_the_rows(parquet):
    questions = read_questions([parquet])
    assert [question.question_id for question in questions] == [f"q{n}" for n in range(12)]
    first = questions[0]
    assert first.messages == ({"role": "user", "content": render_prompt("Which one?", OPTIONS, "think")},)
    assert (first.answer, first.gold, first.n_images) == ("A", 0, 1)
    assert first.load_images()[0].getpixel((0, 0)) == (0, 0, 255)
    again = read_questions([parquet.parent])
    assert [question.question_id for question in again] == [f"q{n}" for n in range(12)]


def test_style_asks_anew(parquet):
    question = read_questions([parquet], style="no-think")[0]
    assert question.messages[0]["content"] == render_prompt("Which one?", OPTIONS, "no-think")
    assert question.style == "no-think"


def test_limit_spreads_over_the_cells(tmp_path):
    rows = [row(n, "ct") for n in range(10)] + [row(20, "mri"), row(21, "oct", "disease_diagnosis")]
    chosen = read_questions([write(tmp_path / "t.parquet", rows)], limit=4)
    assert [question.question_id for question in chosen] == ["q0", "q1", "q20", "q21"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path / "none.parquet", "no such file"),
        (lambda path: path, "no test.parquet in it"),
        (lambda path: write(path / "e.parquet", [row(0)][:0] or []), "no column"),
        (lambda path: write_bytes(path / "b.parquet", b"PAR1 torn"), "cannot be read as parquet"),
        (lambda path: write(path / "c.parquet", [{"question": "x"}]), "no column data_source"),
        (lambda path: write(path / "d.parquet", [row(0), row(1, question_id="q0")]), "'q0' occurs twice"),
        (lambda path: write(path / "f.parquet", [row(0, answer="E")]), "ground truth 'E'"),
    ],
)
def test_bad_parquet_is_one_line(tmp_path, make, says):
    with pytest.raises(UserError, match=says) as error:
        read_questions([make(tmp_path)])
    assert "\n" not in str(error.value)


def write_bytes(path, data):
    path.write_bytes(data)
    return path


def test_empty_parquet_is_one_line(tmp_path):
    table = pa.Table.from_pylist([row(0)]).slice(0, 0)
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match="has no rows"):
        read_questions([tmp_path / "t.parquet"])


def test_broken_image_names_its_row(tmp_path):
    broken = row(0) | {"images": [{"bytes": b"no picture"}]}
    question = read_questions([write(tmp_path / "t.parquet", [broken])])[0]
    with pytest.raises(UserError, match="row 0: image cannot be read"):
        question.load_images()


# --- controls


def test_blank_keeps_the_size(parquet):
    for question, blank in zip(
        read_questions([parquet]), apply_control(read_questions([parquet]), "blank"), strict=True
    ):
        picture = blank.load_images()[0]
        assert picture.size == question.load_images()[0].size
        assert picture.getcolors() == [(picture.width * picture.height, GREY)]


def test_text_only_has_neither_mark_nor_image(parquet):
    question = apply_control(read_questions([parquet]), "text-only")[0]
    assert question.load_images() == []
    assert "<image>" not in question.messages[0]["content"]
    assert question.messages[0]["content"] == render_prompt("Which one?", OPTIONS, "think", n_images=0)


@pytest.mark.parametrize("within", ["modality", "question_type", "all"])
def test_shuffled_takes_another_image_of_the_slice(parquet, within):
    questions = read_questions([parquet])
    picture_of = {question.load_images()[0].tobytes(): question for question in questions}
    moved = apply_control(questions, "shuffled", seed=1, shuffle_within=within)
    for question, other in zip(questions, moved, strict=True):
        donor = picture_of[other.load_images()[0].tobytes()]
        assert donor.image_sha256 != question.image_sha256
        if within == "modality":
            assert donor.modality == question.modality
        assert other.messages == question.messages
    again = apply_control(questions[:], "shuffled", seed=1, shuffle_within=within)
    assert [q.load_images()[0].tobytes() for q in again] == [q.load_images()[0].tobytes() for q in moved]


def test_shuffled_needs_a_second_image(tmp_path):
    questions = read_questions([write(tmp_path / "t.parquet", [row(0), row(1, "mri")])])
    with pytest.raises(UserError, match="no row of modality 'ct' has another image"):
        apply_control(questions, "shuffled")


def test_relettered_moves_the_right_letter(tmp_path):
    rows = [row(n, answer="ABCD"[n % 4]) for n in range(40)] + [row(50, options=["yes", "no"], answer="B")]
    questions = read_questions([write(tmp_path / "t.parquet", rows)])
    for question, moved in zip(questions, apply_control(questions, "relettered"), strict=True):
        assert sorted(moved.options) == sorted(question.options)
        assert moved.answer != question.answer
        assert moved.options[moved.gold] == question.options[question.gold]
        assert moved.messages[0]["content"] == render_prompt("Which one?", moved.options, "think")


# --- asking


def test_rows_and_table(parquet, model, engine, tmp_path):
    result, blank = evaluate(model, [parquet], [Pass(), Pass("blank")], tmp_path / "out")
    assert (result.accuracy, result.format, result.parsed) == (0.25, 1, 1)
    assert result.accuracy_by("modality") == {"ct": 0.5, "mri": 0}
    rows = list(read_rows(tmp_path / "out" / "predictions.jsonl"))
    assert len(rows) == 24
    assert [r["control"] for r in rows] == ["none"] * 12 + ["blank"] * 12
    assert not [key for key in KEYS if key not in rows[0]]
    assert rows[0]["model"] == "tiny", "named by its run"
    assert rows[0]["n_options"] == 4
    table = accuracy_table([result, blank])
    assert "ct 6 50.00 50.00" in " ".join(table.split())
    assert "all 12 25.00 25.00" in " ".join(table.split())


def test_finished_rows_are_not_asked_again(parquet, model, engine, tmp_path):
    engine.stop_after = 10
    with pytest.raises(UserError, match="died"):
        evaluate(model, [parquet], [Pass()], tmp_path)
    assert not (tmp_path / "predictions.jsonl").exists(), "half a run has no result"
    partial = tmp_path / "predictions.jsonl.partial"
    with open(partial, "a") as file:
        file.write('{"question_id": "q10", "acc')  # a killed run's torn last line
    engine.stop_after = None
    asked_before = len(engine.asked)
    evaluate(model, [parquet], [Pass()], tmp_path)
    assert engine.asked[asked_before:] == ["q10", "q11"]
    assert [r["question_id"] for r in read_rows(tmp_path / "predictions.jsonl")] == [f"q{n}" for n in range(12)]
    assert not partial.exists()
    evaluate(model, [parquet], [Pass()], tmp_path)
    evaluate(model, [parquet], [Pass(), Pass("text-only")], tmp_path)
    assert len(engine.asked) == 24, "a control is asked, the rest is known"
    evaluate(model, [parquet], [Pass()], tmp_path, fresh=True)
    assert len(engine.asked) == 36


def test_answers_of_another_model_are_refused(parquet, model, engine, tmp_path):
    evaluate(model, [parquet], [Pass()], tmp_path)
    with pytest.raises(UserError, match="holds answers of model 'tiny', not of 'other'; give another --output"):
        evaluate(model, [parquet], [Pass()], tmp_path, name="other")


@pytest.mark.parametrize("change", ["weights", "max_tokens", "style"])
def test_a_changed_run_of_the_same_name_is_asked_anew(parquet, model, engine, tmp_path, capsys, change):
    evaluate(model, [parquet], [Pass()], tmp_path)
    if change == "weights":
        (model / "model.safetensors").write_text("trained on")
    settings = {"max_tokens": 7} if change == "max_tokens" else {"style": "no-think"} if change == "style" else {}
    evaluate(model, [parquet], [Pass()], tmp_path, **settings)
    assert len(engine.asked) == 24
    assert "asking all again, the earlier answers are in" in capsys.readouterr().err
    assert len(list(read_rows(tmp_path / "predictions.jsonl"))) == 12
    assert len(list(read_rows(tmp_path / "predictions.jsonl.old"))) == 12


def test_a_control_is_never_added_to_answers_of_other_weights(parquet, model, engine, tmp_path):
    evaluate(model, [parquet], [Pass()], tmp_path)
    (model / "model.safetensors").write_text("trained on")
    evaluate(model, [parquet], [Pass("blank")], tmp_path)
    rows = list(read_rows(tmp_path / "predictions.jsonl"))
    assert {row["control"] for row in rows} == {"blank"}
    assert len({row["weights"] for row in rows}) == 1


def test_a_broken_line_in_the_middle_is_named(parquet, model, engine, tmp_path):
    evaluate(model, [parquet], [Pass()], tmp_path)
    path = tmp_path / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "{torn\n", *lines[3:]]))
    with pytest.raises(UserError, match="line 4: is no prediction"):
        evaluate(model, [parquet], [Pass()], tmp_path)


def test_samples_vote(parquet, model, monkeypatch):
    class Sampler(TableEngine):
        def ask(self, questions, decoding, max_tokens):
            tagged = [Output(f"<think>so</think><answer>{letter}</answer>", 9, 0) for letter in "BAAC"]
            for question in questions:
                yield question, tagged[: decoding.n]

    monkeypatch.setattr(module, "_start", lambda *args: Sampler())
    (result,) = evaluate(model, [parquet], [Pass(decoding=Decoding(temperature=1.0, n=4))])
    first = result.rows[0]
    assert first["decoding"] == "T=1 n=4 seed=0"
    assert first["preds"] == ["B", "A", "A", "C"]
    assert (first["pred"], first["acc"], first["acc_mean"]) == ("A", 1, 0.5)
    assert "mean of the samples" in accuracy_table([result])


def test_lone_surrogates_survive_the_file(tmp_path):
    file = PredictionFile(tmp_path / "p.jsonl")
    file.add([{"question_id": "q", "acc": 0, "output": "µ \udc80"}])
    file.finish()
    assert next(read_rows(tmp_path / "p.jsonl"))["output"] == "µ \udc80"


def test_command_prints_and_refuses(parquet, model, engine, tmp_path, capsys):
    assert main(["--model", str(model), "--data", str(parquet), "--output", str(tmp_path / "o")]) == 0
    printed = capsys.readouterr().out
    assert "tiny, think, 256 new tokens at most" in printed
    assert "25.00" in printed
    with pytest.raises(UserError, match="needs a --temperature above 0"):
        main(["--model", str(model), "--data", str(parquet), "--output", str(tmp_path / "o"), "--n", "4"])


# --- engine parts that need no engine


def test_split_content_as_verl():
    assert split_content("<image><image>Which?\nA) x") == [
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "Which?\nA) x"},
    ]


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("preprocessor_config.json", "no processor"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_incomplete_model(model, missing, says):
    (model / missing).unlink()
    with pytest.raises(UserError, match=says):
        check_model(str(model))


def test_wrong_model(model, tmp_path):
    with pytest.raises(UserError, match="no such model directory"):
        check_model(str(tmp_path / "nope"))
    with pytest.raises(UserError, match="is a file"):
        check_model(str(model / "config.json"))
    (model / "model_world_size_2_rank_0.pt").write_text("")
    with pytest.raises(UserError, match="merge it first"):
        check_model(str(model))
    check_model("Qwen/Qwen2-VL-2B-Instruct")


def test_digest_sees_the_weights(model):
    before = weights_digest(str(model))
    (model / "model.safetensors").write_text("other.........." * 3)
    assert weights_digest(str(model)) != before
    assert model_name(str(model)) == "tiny"
    assert model_name("Qwen/Qwen2-VL-2B-Instruct") == "Qwen/Qwen2-VL-2B-Instruct"


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"n": 2}, {"temperature": 1, "n": 0}, {"top_p": 0}])
def test_decoding_is_checked(wrong):
    with pytest.raises(UserError):
        Decoding(**wrong)


def test_json_of_a_row_is_one_line(parquet, model, engine, tmp_path):
    evaluate(model, [parquet], [Pass()], tmp_path / "x.jsonl")
    for line in (tmp_path / "x.jsonl").read_text().splitlines():
        json.loads(line)
