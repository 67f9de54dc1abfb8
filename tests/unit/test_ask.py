"""One question about one image. The engine is a table of answers here; the real one is asked in tests/e2e."""

import io
import json
import os
import socket
import time
from pathlib import Path

import jsonschema
import pytest
from PIL import Image

from medr1_verl import ask
from medr1_verl.audit.log import SCHEMA_FILE, read_answers
from medr1_verl.audit.trail import picture_sha256
from medr1_verl.audit.verify import verify
from medr1_verl.cli import main as medr1
from medr1_verl.errors import UserError
from medr1_verl.evaluation.engine import Output


def png(size=(800, 400), **options):
    file = io.BytesIO()
    Image.new("RGB", size, (9, 80, 200)).save(file, "PNG", **options)
    return file.getvalue()


class TableEngine:
    text = "<think>blue\x1b[2J</think><answer>B</answer>"
    asked = ()

    def __init__(self, *args):
        pass

    def ask(self, questions, decoding, max_tokens):
        TableEngine.asked = [(question, question.load_images()) for question in questions]
        for question in questions:
            yield question, [Output(self.text, 7, 0)]

    def finish(self):
        pass


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(ask, "OfflineEngine", TableEngine)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny"
    path.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"):
        (path / name).write_text(name)
    (tmp_path / "image.png").write_bytes(png())
    return str(path)


def test_one_question(tmp_path, model, capsys):
    arguments = ["ask", "--model", model, "image.png", "Which color?", "--option", "red", "--option", "blue"]
    assert medr1([*arguments, "--audit", "log.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "answer:    B) blue" in out
    assert "blue[U+001B][2J" in out
    assert "no medical device" in out
    log = tmp_path / "log.jsonl"
    assert verify(log).good
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))
    for line in log.read_text().splitlines():
        validator.validate(json.loads(line))
    (record,) = read_answers(log)
    question, pictures = TableEngine.asked[0]
    assert pictures[0].size == (384, 192)
    assert record["images"][0]["seen_sha256"] == picture_sha256(pictures[0])
    assert (record["question"], record["options"], record["pred"], record["answer"]) == (
        "Which color?",
        ["red", "blue"],
        "B",
        None,
    )
    assert record["score"] == {"format": 1, "parsed": 1}
    assert record["context"]["source"] == "question"
    assert question.messages[0]["content"].startswith("<image>Which color?\nA) red\nB) blue\n")
    assert str(tmp_path) not in log.read_text()


def test_nothing_in_it_names_a_place_or_a_person(tmp_path, model, nothing_private):
    """Neither the machine nor what an image file says of the patient."""
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("PatientName", "Jane Roe")
    (tmp_path / "roe-jane-1970.png").write_bytes(png(pnginfo=info))
    assert medr1(["ask", "--model", model, "roe-jane-1970.png", "Which color?", "--audit", "log.jsonl"]) == 0
    nothing_private(tmp_path / "log.jsonl", more=["Jane", "jane"])


def test_each_call_has_a_log_of_its_own(tmp_path, model):
    assert medr1(["ask", "--model", model, "image.png", "Which color?"]) == 0
    (log,) = tmp_path.glob("asked-*.jsonl")
    assert verify(log).good


def test_only_pixels_are_kept(model):
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("PatientName", "Jane Roe")
    picture = ask.prepare_image(png(pnginfo=info))
    assert picture.info == {}


@pytest.mark.parametrize(
    ("output", "options", "said"),
    [
        ("<think>x</think><answer>B</answer>", ["red", "blue"], "B) blue"),
        ("blue, I think", ["red", "blue"], "none that can be read (no <think>)"),
        ("<think>x</think><answer>a blue field</answer>", [], "a blue field"),
        ("<think>x</think><answer>C</answer>", ["red", "blue"], "none that can be read"),
    ],
)
def test_what_is_said(model, monkeypatch, output, options, said, capsys):
    monkeypatch.setattr(TableEngine, "text", output)
    arguments = [part for option in options for part in ("--option", option)]
    assert medr1(["ask", "--model", model, "image.png", "Which?", *arguments]) == 0
    assert f"answer:    {said}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["image.png"], "give an image and a question"),
        (["none.png", "Which?"], "cannot be read"),
        (["tiny/config.json", "Which?"], "cannot be used"),
        (["image.png", " "], "the question is empty"),
        (["image.png", "Which?", "--option", "one"], "two or more"),
        (["image.png", "Which?", "--option", "one", "--option", "one"], "that differ"),
        (["image.png", "Which <image>?"], "may not hold the mark"),
        (["image.png", "Which?", "--audit-key", "none.pem"], "key none.pem"),
    ],
)
def test_bad_input_is_one_line(model, arguments, words, capsys):
    assert medr1(["ask", "--model", model, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_broken_engine_leaves_an_unfinished_log(tmp_path, model, monkeypatch):
    def die(self, *_):
        raise UserError("the engine died")

    monkeypatch.setattr(TableEngine, "ask", die)
    assert medr1(["ask", "--model", model, "image.png", "Which?", "--audit", "log.jsonl"]) == 2
    assert [fault.code for fault in verify(tmp_path / "log.jsonl").faults] == ["incomplete"]


def test_web_page(tmp_path, model, monkeypatch, request, capsys):
    """The page as a browser and as Gradio's own client see it: an answer, a fault as a message, the records of both
    answers; nothing is asked of the network, and nothing that was uploaded is left.
    """
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    from gradio_client import Client, handle_file

    chromium = request.getfixturevalue("chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    uploads = []

    def visitors(page):
        uploads.append(Path(os.environ["GRADIO_TEMP_DIR"]))
        client = Client(address, verbose=False)
        image = handle_file(str(tmp_path / "image.png"))
        said, why, _ = client.predict(image, "Which color?", "red\nblue\n", api_name="/ask")
        assert (said, why) == ("B) blue", "blue\x1b[2J")
        with pytest.raises(Exception, match="the question is empty"):
            client.predict(image, "", "", api_name="/ask")
        browse(chromium, address, tmp_path / "image.png")
        raise KeyboardInterrupt  # how a person ends it

    monkeypatch.setattr(gradio.Blocks, "block_thread", visitors)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # restored afterwards
    arguments = ["ask", "--model", model, "--serve", "--port", str(port), "--audit", str(tmp_path / "log.jsonl")]
    assert medr1(arguments) == 0
    assert "on this machine only" in capsys.readouterr().out
    assert verify(tmp_path / "log.jsonl").answers == 2
    assert not uploads[0].exists()


def browse(chromium, address, image):
    chromium.get_log("performance")
    chromium.get(address)
    body = "return document.body.innerText"
    until(lambda: "Drop Image Here" in chromium.execute_script(body))
    assert "This is no medical device" in chromium.execute_script(body)
    chromium.find_element("css selector", "input[type=file]").send_keys(str(image))
    until(lambda: chromium.find_elements("css selector", "[data-testid=image] img, .image-frame img"))
    question, options, answer, *_ = chromium.find_elements("css selector", "textarea")
    question.send_keys("Which color?")
    options.send_keys("red\nblue")
    next(b for b in chromium.find_elements("css selector", "button") if b.text == "Ask").click()
    until(lambda: answer.get_property("value") == "B) blue")
    chromium.save_screenshot(str(Path(os.environ.get("MEDR1_SCREENSHOTS", image.parent)) / "ask.png"))
    asked = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    assert {url for url in urls if not url.startswith((address, "data:", "blob:"))} == set()


def until(ready):
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_page_without_gradio_is_one_line(model, monkeypatch, capsys):
    monkeypatch.setattr(ask, "find_spec", lambda name: None)
    assert medr1(["ask", "--model", model, "--serve"]) == 2
    assert "pip install 'medr1-verl[serve]'" in capsys.readouterr().err
