"""Logs of an evaluation, of predictions and of validation dumps; exports. The engine is a table of answers here."""

import contextlib
import csv
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medr1_verl.audit.export import to_csv
from medr1_verl.audit.log import SCHEMA_FILE, read_answers
from medr1_verl.audit.provenance import data_provenance, folder_sha256, public_name
from medr1_verl.audit.trail import picture_sha256
from medr1_verl.audit.verify import verify
from medr1_verl.cli import main as medr1
from medr1_verl.errors import UserError
from medr1_verl.evaluation import evaluate as module
from medr1_verl.evaluation.engine import Decoding, Output
from medr1_verl.evaluation.evaluate import Pass, evaluate
from medr1_verl.prompt import render_prompt

OPTIONS = ["CT", "MRI", "OCT"]
ROWS = 8


def row(number):
    picture = io.BytesIO()
    Image.new("RGB", (56, 28), (number, 0, 255 - number)).save(picture, "PNG")
    question = "Which one?" if number < 2 else f"Which one of {number}?"  # the first two differ in their picture only
    return {
        "data_source": "omnimedvqa/ct",
        "prompt": [{"role": "user", "content": render_prompt(question, OPTIONS, "think")}],
        "images": [{"bytes": picture.getvalue()}],
        "ability": "medical_vqa",
        "reward_model": {"style": "rule", "ground_truth": "A"},
        "extra_info": {
            "question_id": f"q{number}",
            "dataset": "set",
            "modality": "ct",
            "question_type": "modality_recognition",
            "question": question,
            "options": OPTIONS,
            "answer": "A",
            "image_sha256": f"{number:064x}",
            "style": "think",
        },
    }


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([row(number) for number in range(ROWS)]), folder / "test.parquet")
    (folder / "manifest.json").write_text("{}")
    return folder / "test.parquet"


@pytest.fixture
def model(tmp_path):
    run = tmp_path / "runs" / "tiny"
    (run / "config").mkdir(parents=True)
    (run / "config" / "config.yaml").write_text("a: 1\n")
    (run / "run.json").write_text(json.dumps({"MODEL_PATH": "/home/somebody/models/base-2b"}))
    path = run / "model"
    path.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"):
        (path / name).write_text(name)
    return path


class TableEngine:
    """Loads the pictures, as an engine does, and answers A; dies when told to."""

    chunk = 3

    def __init__(self):
        self.asked = 0
        self.die_at = None

    def ask(self, questions, decoding, max_tokens):
        for question in questions:
            question.load_images()
        for question in questions:
            if self.asked == self.die_at:
                raise UserError("the engine died")
            self.asked += 1
            texts = ["<think>so</think><answer>A</answer>", "<answer>B</answer>"]
            yield question, [Output(texts[index % 2], 9, 0) for index in range(decoding.n)]

    def finish(self):
        pass


@pytest.fixture
def engine(monkeypatch):
    table = TableEngine()
    monkeypatch.setattr(module, "_start", lambda *args: table)
    return table


def answers(path):
    return list(read_answers(path))


def test_log_of_an_evaluation(tmp_path, data, model, engine):
    log = tmp_path / "audit.jsonl"
    passes = [Pass(), Pass("blank"), Pass("shuffled"), Pass("text-only"), Pass(decoding=Decoding(1.0, 3))]
    evaluate(str(model), [data], passes, tmp_path / "out", audit=log)
    report = verify(log)
    assert report.good
    assert report.answers == ROWS * len(passes)
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))
    for line in log.read_text().splitlines():
        validator.validate(json.loads(line))
    by_key = {(a["question_id"], a["control"], a["decoding"]): a for a in answers(log)}
    own = hashlib.sha256(b"RGB 56 28\n" + bytes([3, 0, 252]) * (56 * 28)).hexdigest()
    plain, blank, shuffled, text_only = (by_key["q3", c, "greedy"] for c in ("none", "blank", "shuffled", "text-only"))
    source = f"{3:064x}"
    assert plain["images"] == [{"source_sha256": source, "seen_sha256": own, "width": 56, "height": 28}]
    assert blank["images"][0]["seen_sha256"] == picture_sha256(Image.new("RGB", (56, 28), (128, 128, 128)))
    assert shuffled["images"][0]["seen_sha256"] not in (own, None)
    assert text_only["images"] == [{"source_sha256": source, "seen_sha256": None, "width": None, "height": None}]
    assert (plain["question"], plain["options"], plain["reasoning"], plain["pred"]) == (
        "Which one of 3?",
        OPTIONS,
        "so",
        "A",
    )
    assert plain["score"]["acc"] == 1
    assert plain["sampling"] == {"temperature": 0.0, "top_p": 1.0, "n": 1, "seed": None, "max_tokens": 256}
    sampled = by_key["q3", "none", "T=1 n=3 seed=0"]
    assert len(sampled["samples"]) == 3
    assert sampled["sampling"]["seed"] == Decoding(1.0, 3).seed_of("q3")
    about = plain["context"]["model"]
    assert (about["name"], about["base"]) == ("tiny", "base-2b")
    assert about["config_sha256"] == hashlib.sha256(b"a: 1\n").hexdigest()
    assert plain["context"]["data"][0]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()


def test_weights_digest_is_sha256sums(model):
    """The command is the one in docs/audit.md."""
    command = r"ls | grep -v '\.md$' | LC_ALL=C sort | xargs sha256sum | sha256sum"
    assert command in (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    (model / "README.md").write_text("a card")
    printed = subprocess.run(command, shell=True, cwd=model, capture_output=True, check=True, text=True).stdout
    assert folder_sha256(model) == printed.split()[0]


def test_nothing_in_it_names_a_place_or_a_person(tmp_path, data, model, engine, nothing_private):
    """Nor do the log of validation dumps, the table, and the log that Inspect reads."""
    log = tmp_path / "audit.jsonl"
    evaluate(str(model), [data], [Pass(), Pass("blank")], tmp_path / "out", audit=log)
    (tmp_path / "5.jsonl").write_text(json.dumps(dump(4, "Which one of 4?")) + "\n")
    validation = tmp_path / "validation-audit.jsonl"
    command = ["audit", "record", str(tmp_path / "5.jsonl"), "--data", str(data), "--output", str(validation)]
    assert medr1([*command, "--model", str(model)]) == 0
    assert to_csv(log, tmp_path / "log.csv") == 2 * ROWS
    nothing_private(log, validation, tmp_path / "log.csv", tmp_path / "out" / "predictions.jsonl")
    pytest.importorskip("inspect_ai.log", reason="inspect_ai is not installed")
    assert medr1(["audit", "export", str(log), "--format", "inspect", "--output", str(tmp_path / "logs")]) == 0
    nothing_private(*sorted((tmp_path / "logs").glob("*.eval")))


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-2B-Instruct"),
        ("/home/somebody/models/qwen", "qwen"),
        ("../a/b/qwen", "qwen"),
        ("my-run", "my-run"),
    ],
)
def test_public_name(name, public):
    assert public_name(name) == public


@pytest.mark.parametrize(
    ("folder", "manifest_in", "named"),
    [
        ("somebody", None, "test.parquet"),
        ("somebody", "somebody", "test.parquet"),
        ("ct", None, "ct/test.parquet"),  # a slice: eight files of one name are told apart
        ("ct", ".", "ct/test.parquet"),
        ("part1", ".", "part1/test.parquet"),  # below the manifest, so named by the converter
    ],
)
def test_names_of_data_files(tmp_path, folder, manifest_in, named):
    file = tmp_path / folder / "test.parquet"
    file.parent.mkdir()
    file.write_bytes(b"rows")
    if manifest_in is not None:
        (tmp_path / manifest_in / "manifest.json").write_text("{}")
    (found,) = data_provenance([file])
    assert found["file"] == named
    assert (found["manifest_sha256"] is None) == (manifest_in is None)


@pytest.mark.parametrize("die_at", [0, 1, 4, 7])
def test_interrupted_evaluation_goes_on_in_the_same_log(tmp_path, data, model, engine, die_at):
    log = tmp_path / "audit.jsonl"
    engine.die_at = die_at
    with pytest.raises(UserError, match="the engine died"):
        evaluate(str(model), [data], [Pass()], tmp_path / "out", audit=log)
    assert [fault.code for fault in verify(log).faults] == ["incomplete"]
    engine.die_at = None
    evaluate(str(model), [data], [Pass()], tmp_path / "out", audit=log)
    assert verify(log).good
    assert sorted(a["question_id"] for a in answers(log)) == [f"q{n}" for n in range(ROWS)]
    assert {a["origin"] for a in answers(log)} == {"live"}


def test_answers_from_before_the_log_are_copied(tmp_path, data, model, engine):
    evaluate(str(model), [data], [Pass()], tmp_path / "out")
    log = tmp_path / "audit.jsonl"
    evaluate(str(model), [data], [Pass(), Pass("blank")], tmp_path / "out", audit=log)
    assert verify(log).good
    assert {a["control"]: a["origin"] for a in answers(log)} == {"none": "predictions", "blank": "live"}


def test_closed_log_is_kept(tmp_path, data, model, engine):
    log = tmp_path / "audit.jsonl"

    def once(*passes, **options):
        evaluate(str(model), [data], list(passes), tmp_path / "out", audit=log, **options)
        assert verify(log).good

    once(Pass())
    before = log.read_bytes()
    root = verify(log).root
    once(Pass())
    assert log.read_bytes() == before, "nothing was asked: the log stays"
    once(Pass(), Pass("blank"))
    assert (tmp_path / "audit.1.jsonl").read_bytes() == before
    assert json.loads(log.read_text().splitlines()[0])["follows"] == root
    assert {a["control"] for a in answers(log)} == {"blank"}
    once(Pass(), fresh=True)
    assert (tmp_path / "audit.2.jsonl").is_file()
    assert len(answers(log)) == ROWS


def test_damaged_log_is_kept_and_all_answers_written_again(tmp_path, data, model, engine, capsys):
    log = tmp_path / "audit.jsonl"
    evaluate(str(model), [data], [Pass()], tmp_path / "out", audit=log)
    log.write_bytes(log.read_bytes().replace(b'"pred":"A"', b'"pred":"B"', 1))
    evaluate(str(model), [data], [Pass()], tmp_path / "out", audit=log)
    assert "was altered" in capsys.readouterr().err
    assert verify(log).good
    assert len(answers(log)) == ROWS
    assert not verify(tmp_path / "audit.1.jsonl").good


def test_command_line(tmp_path, data, model, engine, capsys):
    arguments = ["evaluate", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    assert medr1([*arguments, "--audit"]) == 0
    assert verify(tmp_path / "out" / "audit.jsonl").good
    assert medr1([*arguments, "--audit-key", "k"]) == 2
    assert "add --audit" in capsys.readouterr().err


# --- logs made afterwards


def test_log_of_predictions(tmp_path, data, model, engine, capsys):
    evaluate(str(model), [data], [Pass(), Pass("blank")], tmp_path / "out")
    log = tmp_path / "log.jsonl"
    arguments = ["audit", "record", str(tmp_path / "out"), "--data", str(data), "--model", str(model)]
    assert medr1([*arguments, "--output", str(log)]) == 0
    assert verify(log).answers == 2 * ROWS
    one = answers(log)[0]
    assert (one["origin"], one["question"]) == ("predictions", "Which one?")
    assert one["context"]["model"]["weights_sha256"] == folder_sha256(model)
    assert medr1([*arguments, "--output", str(log)]) == 2
    assert "exists" in capsys.readouterr().err


def dump(number, question, step=5):
    text = render_prompt(question, OPTIONS, "think", n_images=0)
    return {
        "input": f"system\nYou are a helpful assistant.\nuser\n{text}\nassistant\n",
        "output": "<think>so</think><answer>A</answer>",
        "gts": "A",
        "score": 2.0,
        "step": step,
        "reward": 2.0,
        "acc": 1,
        "format": 1,
        "parsed": 1,
        "pred": "A",
        "uid": f"{number}",
    }


def test_log_of_validation_dumps(tmp_path, data):
    folder = tmp_path / "validation"
    folder.mkdir()
    for step in (0, 10, 5):
        rows = [dump(0, "Which one?", step), dump(1, "Which one of 4?", step)]
        (folder / f"{step}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    log = tmp_path / "log.jsonl"
    assert medr1(["audit", "record", str(folder), "--data", str(data), "--output", str(log)]) == 0
    assert verify(log).good
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))
    for line in log.read_text().splitlines():
        validator.validate(json.loads(line))
    found = answers(log)
    assert [one["step"] for one in found] == [0, 0, 5, 5, 10, 10]
    two_rows_have_it, unique = found[:2]
    assert (two_rows_have_it["question_id"], two_rows_have_it["question"]) == (None, "Which one?")
    assert (unique["question_id"], unique["images"][0]["source_sha256"]) == ("q4", f"{4:064x}")
    assert unique["score"] == {"score": 2.0, "acc": 1, "format": 1, "parsed": 1}


def test_dumps_that_name_their_rows(tmp_path, data):
    """Rows with one prompt and answer are told apart; one asked in other words keeps its name, not its options."""
    named = [
        dump(0, "Which one?") | {"question_id": "q0", "image_sha256": f"{0:064x}"},
        dump(1, "Which one?") | {"question_id": "q1", "image_sha256": f"{1:064x}"},
        dump(2, "Asked otherwise?") | {"question_id": "q2", "image_sha256": f"{2:064x}"},
    ]
    (tmp_path / "5.jsonl").write_text("".join(json.dumps(one) + "\n" for one in named))
    log = tmp_path / "log.jsonl"
    command = ["audit", "record", str(tmp_path / "5.jsonl"), "--data", str(data), "--output", str(log)]
    assert medr1(command) == 0
    found = answers(log)
    assert [one["question_id"] for one in found] == ["q0", "q1", "q2"]
    assert [one["images"][0]["source_sha256"] for one in found] == [f"{number:064x}" for number in range(3)]
    assert [one["options"] for one in found] == [OPTIONS, OPTIONS, None]
    assert [one["modality"] for one in found] == ["ct"] * 3


def test_a_log_made_again(tmp_path, data, capsys):
    """The same answers leave it as it is; more of them set it aside, and the new log names its root."""
    folder, log = tmp_path / "validation", tmp_path / "log.jsonl"
    folder.mkdir()
    command = ["audit", "record", str(folder), "--data", str(data), "--output", str(log), "--again"]
    (folder / "0.jsonl").write_text(json.dumps(dump(4, "Which one of 4?", 0)) + "\n")
    assert medr1(command) == 0
    before, root = log.read_bytes(), verify(log).root
    assert medr1(command) == 0
    assert log.read_bytes() == before
    (folder / "5.jsonl").write_text(json.dumps(dump(4, "Which one of 4?", 5)) + "\n")
    assert medr1(command) == 0
    assert verify(log).good
    assert [one["step"] for one in answers(log)] == [0, 5]
    assert json.loads(log.read_text().splitlines()[0])["follows"] == root
    assert (tmp_path / "log.1.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "0.jsonl",
            json.dumps(dump(0, "Which one?") | {"question_id": "q99"}) + "\n",
            "line 1: question 'q99' is not in the data given",
        ),
        (
            "0.jsonl",
            json.dumps(dump(0, "Which one?") | {"question_id": "q0", "image_sha256": "f" * 64}) + "\n",
            "line 1: question 'q0' has another image",
        ),
        ("0.jsonl", "{", "line 1: is not JSON"),
        ("0.jsonl", '{"input": "x"}\n', "line 1: is no validation answer"),
        ("0.jsonl", "", "holds no answer"),
        ("0.jsonl", json.dumps(dump(0, "Another?")) + "\n", "is not in the data given"),
        (
            "predictions.jsonl",
            json.dumps({"question_id": "q0", "acc": 1, "image_sha256": "0" * 64}) + "\n",
            "lacks 'output'",
        ),
        ("predictions.jsonl", '{"question_id": "z", "acc": 1}\n', "not in the data given"),
        ("notes.txt", "", "holds no answer"),
    ],
)
def test_bad_sources_are_one_line(tmp_path, data, name, content, words, capsys):
    source = tmp_path / name
    source.write_text(content)
    arguments = ["audit", "record", str(source), "--data", str(data), "--output", str(tmp_path / "log.jsonl")]
    assert medr1(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "log.jsonl").exists()


# --- for others


def test_show(tmp_path, data, model, engine, capsys):
    log = tmp_path / "log.jsonl"
    evaluate(str(model), [data], [Pass(), Pass("blank")], tmp_path / "out", audit=log)
    capsys.readouterr()
    assert medr1(["audit", "show", str(log), "q3"]) == 0
    out = capsys.readouterr().out
    assert out.count('"question_id": "q3"') == 2
    assert medr1(["audit", "show", str(log), "5"]) == 0
    assert json.loads(capsys.readouterr().out)["seq"] == 5
    assert medr1(["audit", "show", str(log), "q99"]) == 2
    assert "no answer 'q99'" in capsys.readouterr().err


def test_csv(tmp_path, data, model, engine, monkeypatch):
    formula = '=HYPERLINK("http://x")'
    monkeypatch.setattr(
        engine, "ask", lambda questions, *_: ((question, [Output(formula, 9, 0)]) for question in questions)
    )
    log = tmp_path / "log.jsonl"
    evaluate(str(model), [data], [Pass()], tmp_path / "out", audit=log)
    table = tmp_path / "log.csv"
    assert to_csv(log, table) == ROWS
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[2]["question_id"] == "q2"
    assert rows[2]["output"] == "'" + formula
    assert rows[2]["acc"] == "0"
    with pytest.raises(UserError, match="exists"):
        to_csv(log, table)


def test_inspect_log(tmp_path, data, model, engine, capsys):
    inspect_log = pytest.importorskip("inspect_ai.log", reason="inspect_ai is not installed")
    log = tmp_path / "log.jsonl"
    evaluate(str(model), [data], [Pass(), Pass("blank")], tmp_path / "out", audit=log)
    arguments = ["audit", "export", str(log), "--format", "inspect", "--output", str(tmp_path / "logs")]
    assert medr1([*arguments, "--data", str(data)]) == 0
    files = sorted((tmp_path / "logs").glob("*.eval"))
    assert len(files) == 2
    read = inspect_log.read_eval_log(str(files[0]))
    assert read.status == "success"
    assert len(read.samples) == ROWS
    assert read.results.scores[0].metrics["mean"].value == 1.0
    sample = read.samples[0]
    assert sample.scores["acc"].value == 1
    assert sample.messages[0].content[0].image.startswith(("data:image/png;base64,", "attachment://"))
    blank = inspect_log.read_eval_log(str(files[1])).samples[0].messages[0].content
    assert [part.type for part in blank] == ["text", "text"], "an image that the model was not shown is not in the log"
    assert medr1(arguments) == 2
    assert "give an empty folder" in capsys.readouterr().err


def test_inspects_own_viewer_opens_it(tmp_path, data, model, engine, chromium):
    """The log in the list, its samples with their scores, and a sample with its question and the answer's own words."""
    pytest.importorskip("inspect_ai.log", reason="inspect_ai is not installed")
    log = tmp_path / "log.jsonl"
    evaluate(str(model), [data], [Pass()], tmp_path / "out", audit=log)
    folder = tmp_path / "logs"
    arguments = ["audit", "export", str(log), "--format", "inspect", "--output", str(folder), "--data", str(data)]
    assert medr1(arguments) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "inspect_ai", "view", "start", "--log-dir", str(folder), "--port", str(port)]
    with open(tmp_path / "viewer.log", "wb") as told:
        viewer = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=told, stderr=told)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: urllib.request.urlopen(address, timeout=5).close() or True, viewer, tmp_path / "viewer.log")
        for place, words in (
            ("", ("medical_vqa none greedy", "tiny")),
            ("#/logs/000.eval", ("test.parquet — 8 samples", "acc_tolerant", "Which one of 7?")),
            ("#/logs/000.eval/samples/sample/q7/1/", ("Which one of 7?", "B) MRI", "so</think><answer>A</answer>")),
        ):
            chromium.get("about:blank")
            chromium.get(f"{address}/{place}")
            wait_for(
                lambda words=words: all(word in visible(chromium) for word in words), viewer, lambda: visible(chromium)
            )
            shots = Path(os.environ.get("MEDR1_SCREENSHOTS", tmp_path))
            chromium.save_screenshot(str(shots / f"inspect_{len(place)}.png"))
        assert chromium.find_elements("css selector", "img[src^='data:image/png']"), "the picture of the question"
    finally:
        viewer.terminate()
        viewer.wait(timeout=30)


def visible(chromium):
    return chromium.execute_script("return document.body.innerText")


def wait_for(ready, viewer, told):
    """Until ``ready`` is true; a minute at most."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if ready():
                return
        assert viewer.poll() is None, "the viewer ended"
        time.sleep(0.2)
    pytest.fail(told() if callable(told) else told.read_text())
