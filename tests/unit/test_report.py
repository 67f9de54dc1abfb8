"""The report: what is on the page, what is not, and the page in a real browser."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medr1_verl.audit.log import AuditLog
from medr1_verl.audit.trail import answer_record, picture_sha256
from medr1_verl.cli import main as medr1
from medr1_verl.report.collect import public_text

EVIL = (
    '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"> "quotes" '
    "\u202eturned\u202c \x1b[2J"
)
OPTIONS = ["CT", "MRI", "OCT", "<b>X-Ray</b>"]
ROWS = 130
LONG = 1_000_000


def colour(number):
    return (number, 0, 255 - number)


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (56, 28), colour(number)).save(file, "PNG")
    return file.getvalue()


def output_of(number):
    if number == 1:
        return EVIL
    if number % 10 == 3:
        return "no tags"
    return f"<think>This CT shows number {number}.</think><answer>{'A' if number % 2 else 'B'}</answer>"


def prediction(number, model="run", control="none"):
    output = output_of(number) if control == "none" else "<think>Grey.</think><answer>A</answer>"
    letter = re.search("<answer>(.)</answer>", output)
    pred = letter[1] if letter else ""
    return {
        "question_id": f"q{number}",
        "data_source": "omnimedvqa/ct",
        "dataset": "set",
        "modality": ("ct", "mri")[number % 2],
        "question_type": ("disease_diagnosis", "lesion_grading")[number // 2 % 2],
        "style": "think",
        "control": control,
        "decoding": "greedy",
        "output": output,
        "pred": pred,
        "acc": int(pred == "A"),
        "format": int(bool(pred)),
        "parsed": int(bool(pred)),
        "answer": "A",
        "n_options": 4,
        "options": OPTIONS,
        "image_sha256": f"{number:064x}",
        "model": model,
    }


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with data, controls, an audit log, metrics and a summary."""
    root = tmp_path_factory.mktemp("report")
    data, folder = root / "data", root / "runs" / "my-run"
    data.mkdir()
    folder.mkdir(parents=True)
    rows = [
        {
            "images": [{"bytes": png(number)}],
            "extra_info": {
                "question_id": f"q{number}",
                "question": EVIL if number == 1 else f"Which one is number {number}?",
                "image_sha256": f"{number:064x}",
            },
        }
        for number in range(ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), data / "test.parquet")
    counts = {"train": {"ct": {"disease_diagnosis": 7}}, "test": {"ct": {"disease_diagnosis": 3}}}
    manifest = {"arguments": {"input": "/home/somebody/OmniMedVQA"}, "rows_in": 10, "rows_out": 10, "counts": counts}
    (data / "manifest.json").write_text(json.dumps(manifest))
    plain = [prediction(number) for number in range(ROWS)]
    shuffled = [prediction(number, control="shuffled") for number in range(ROWS)]
    write_lines(folder / "predictions.jsonl", plain + shuffled)
    write_lines(folder / "before.jsonl", [prediction(number, "before") for number in range(0, ROWS)])
    (folder / "run.json").write_text(json.dumps({"MODEL_PATH": "/home/somebody/base", "DATA_DIR": str(data)}))
    metrics = [
        {"step": step, "data": {"critic/score/mean": step / 10, "actor/entropy": 1 / (step + 1)}} for step in range(9)
    ]
    write_lines(folder / "metrics.jsonl", metrics)
    summary = {
        "steps": 9,
        "greedy_after": 0.5,
        "model": "/home/somebody/base",
        "warnings": ["see /home/somebody/x/train.log"],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    log = AuditLog(folder / "audit.jsonl")
    about = {"name": "run", "weights_sha256": None, "revision": None, "base": None, "step": None, "config_sha256": None}
    context = log.context(
        {"source": "evaluation", "model": about, "data": [], "template_sha256": None, "engine": "vllm", "versions": {}}
    )
    records = []
    for row in plain + shuffled:
        number = int(row["question_id"][1:])
        shown = Image.new("RGB", (56, 28), colour(number if row["control"] == "none" else (number + 1) % ROWS))
        seen = [{"seen_sha256": picture_sha256(shown), "width": 56, "height": 28}]
        records.append(answer_record(row, context, "live", "?", None, seen))
    log.add(records)
    log.close()
    return folder


def content(page, name="answers"):
    found = re.search(f'<script type="application/json" id="{name}">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found[1])


# --- what is on the page


def test_page(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert medr1(["report", str(run), "--output", str(page)]) == 0
    assert f"{3 * ROWS} answers" in capsys.readouterr().out
    found = content(page)
    assert [column["control"] for column in found["columns"]] == ["none", "shuffled", "none"]
    assert found["questions"][1]["question"] == EVIL
    assert found["answers"][1][2] == EVIL
    text = page.read_text()
    assert text.count("</script>") == 3, "no text of a model ends a script"
    assert "hacked" not in re.sub('<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert "complete and unaltered, 260 answers" in text
    for words in ("Before and after training", "Rows of train", "By modality", "mean reward", "no medical device"):
        assert words in text, words
    assert not re.search(r"""(?:src|href)=["']https?:|@import|url\(""", text), "nothing is fetched"


def test_nothing_in_it_names_a_place_or_a_person(run, tmp_path, nothing_private):
    page = tmp_path / "page.html"
    assert medr1(["report", str(run), "--output", str(page)]) == 0
    nothing_private(page, more=[str(run.parent)])


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("see /home/anna/runs/x/train.log now", "see train.log now"),
        ("file:///home/anna/x.png", "file://x.png"),
        ("val-core/omnimedvqa/ct/acc and 3/4", "val-core/omnimedvqa/ct/acc and 3/4"),
        ("</b>", "</b>"),
    ],
)
def test_public_text(text, public):
    assert public_text(text).replace("file://", "") == public.replace("file://", "")


def test_images_in_files_or_not_at_all(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert medr1(["report", str(run), "--output", str(page), "--images", "files"]) == 0
    links = content(page, "images")
    assert len(links) == ROWS
    key = content(page)["questions"][7]["images"][0]
    assert (tmp_path / links[key]).read_bytes() == png(7)
    assert medr1(["report", str(run), "--output", str(page), "--images", "none"]) == 0
    assert content(page, "images") == {}
    assert medr1(["report", str(run), "--output", str(page), "--images", "embed"]) == 0
    assert base64.b64decode(content(page, "images")[key].partition(",")[2]) == png(7)


@pytest.mark.parametrize(
    ("removed", "note"),
    [
        ("summary.json", "summary.json is missing"),
        ("predictions.jsonl", None),
        ("run.json", "the data was not given"),
        ("metrics.jsonl", None),
        ("audit.jsonl", None),
    ],
)
def test_missing_parts_are_named_and_the_rest_is_shown(run, tmp_path, removed, note, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / removed).unlink()
    assert medr1(["report", str(folder)]) == 0
    error = capsys.readouterr().err
    assert note is None or note in error
    assert (folder / "report.html").stat().st_size > 10_000


def test_damaged_log_is_told_on_the_page(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    log = folder / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"pred":"A"', b'"pred":"B"', 1))
    assert medr1(["report", str(folder)]) == 0
    assert "NOT VALID, line" in (folder / "report.html").read_text()


def test_other_images_than_those_asked_are_not_shown(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    write_lines(folder / "predictions.jsonl", [prediction(5) | {"image_sha256": "f" * 64}, prediction(6)])
    (folder / "before.jsonl").unlink()
    assert medr1(["report", str(folder)]) == 0
    assert "1 answers are to other images" in capsys.readouterr().err
    assert content(folder / "report.html")["questions"][0]["images"] == []


def test_moved_images_are_counted(tmp_path, capsys):
    info = {"question_id": "q0", "question": "?", "image_sha256": f"{0:064x}"}
    rows = [{"images": [{"image": str(tmp_path / "moved.png")}], "extra_info": info}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    write_lines(tmp_path / "predictions.jsonl", [prediction(0)])
    assert medr1(["report", str(tmp_path), "--data", str(tmp_path / "test.parquet")]) == 0
    assert "1 images could not be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such folder"),
        ("", "no predictions and no metrics"),
        ('{"question_id": "q", "acc": 1}\n', "lacks output"),
    ],
)
def test_bad_folders_are_one_line(tmp_path, content, words, capsys):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        (folder / "predictions.jsonl").write_text(content)
    assert medr1(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_answers_given_twice_are_refused(run, capsys):
    assert medr1(["report", str(run), str(run), "--output", "unused.html"]) == 2
    assert "twice" in capsys.readouterr().err


# --- in a real browser


@pytest.fixture(scope="module", params=["embed", "files"])
def opened(request, run, tmp_path_factory):
    """A page with images inside, and one with images beside it; the answer to q2 is a megabyte long."""
    root = tmp_path_factory.mktemp(request.param)
    folder = root / "run"
    shutil.copytree(run, folder)
    rows = [prediction(number) for number in range(ROWS)]
    rows[2] |= {"output": "<think>" + "long " * (LONG // 5) + "</think><answer>A</answer>", "pred": "A", "acc": 1}
    write_lines(folder / "predictions.jsonl", rows + [prediction(number, control="shuffled") for number in range(ROWS)])
    path = root / "report.html"
    assert medr1(["report", str(folder), "--output", str(path), "--images", request.param]) == 0
    return path


@pytest.fixture
def page(request, opened, chromium, tmp_path):
    """The page opened from a file:// address; afterwards its console must be empty and nothing injected have run."""
    chromium.get_log("browser")  # what pages of other tests have said
    chromium.get(opened.as_uri())
    assert chromium.execute_script("return document.documentElement.dataset.ready") == "1"
    yield chromium
    shots = Path(os.environ.get("MEDR1_SCREENSHOTS", tmp_path))
    chromium.execute_script("document.getElementById('browser').scrollIntoView()")
    chromium.save_screenshot(str(shots / f"{request.node.name}.png"))
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return window.hacked") is None


def choose(page, name, value):
    page.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('change'))",
        name,
        value,
    )


def text(page, name):
    return page.execute_script("return document.getElementById(arguments[0]).textContent", name)


def click_answer(page, question_id):
    page.execute_script(
        "for (const b of document.querySelectorAll('#list button'))"
        " if (b.querySelector('small').textContent.endsWith(', ' + arguments[0])) b.click()",
        question_id,
    )


def shown_colours(page):
    """Colour of every picture of the answer, read from its pixels as the browser drew them (data URIs only)."""
    return page.execute_async_script(
        """const done = arguments[0];
        Promise.all([...document.querySelectorAll('#detail img')].map((image) => image.decode().then(() => {
          const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;
          const context = canvas.getContext('2d'); context.drawImage(image, 0, 0, 1, 1);
          try { return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3); }
          catch (error) { return image.naturalWidth; } // pixels of a file may not be read: its width
        }))).then(done, (error) => done(String(error)))"""
    )


def test_right_image_for_an_answer(page, request):
    for number in (0, 7, 40):
        click_answer(page, f"q{number}")
        assert f"number {number}?" in text(page, "detail")
        expected = list(colour(number)) if "embed" in request.node.name else 56
        assert shown_colours(page) == [expected]
        key = page.execute_script("return document.querySelector('#detail img').dataset.key")
        assert key == hashlib.sha256(png(number)).hexdigest()[:24]


def test_shuffled_control_shows_what_the_model_was_shown(page, request):
    choose(page, "column", "1")
    click_answer(page, "q7")
    assert "What the model was shown, by the audit log" in text(page, "detail")
    if "embed" in request.node.name:
        assert shown_colours(page) == [list(colour(8)), list(colour(7))]


def test_filters_and_pages(page):
    assert text(page, "count") == f"{ROWS} answers, page 1 of 2"
    page.execute_script("document.getElementById('next').click()")
    assert text(page, "count") == f"{ROWS} answers, page 2 of 2"
    assert page.execute_script("return document.querySelectorAll('#list button').length") == ROWS - 100
    for name, value, wanted in (
        ("modality", "ct", lambda n: n % 2 == 0),
        ("type", "lesion_grading", lambda n: n // 2 % 2 == 1),
        ("verdict", "unparsed", lambda n: prediction(n)["pred"] == ""),
        ("verdict", "right", lambda n: n == 2 or prediction(n)["acc"]),
        ("disagreement", "controls", lambda n: n != 2 and prediction(n)["pred"] != "A"),
        ("disagreement", "models", lambda n: n == 2),
        ("quality", "other-modality", lambda n: n % 2 == 1 and "CT" in output_of(n)),
    ):
        choose(page, name, value)
        count = sum(1 for number in range(ROWS) if wanted(number))
        assert text(page, "count").startswith(f"{count} answers"), (name, value)
        choose(page, name, "")
    page.execute_script(
        "const e = document.getElementById('search'); e.value = 'number 77?'; e.dispatchEvent(new Event('input'))"
    )
    for _ in range(50):
        if text(page, "count").startswith("1 answers"):
            break
        page.execute_async_script("setTimeout(arguments[0], 50)")
    assert "number 77?" in text(page, "detail")


def test_keys(page):
    from selenium.webdriver.common.keys import Keys

    body = page.find_element("tag name", "body")
    body.send_keys("jj")
    assert page.execute_script("return document.querySelector('#list [aria-current=true]').dataset.place") == "2"
    page.switch_to.active_element.send_keys("k")
    assert page.execute_script("return document.activeElement.dataset.place") == "1"
    page.switch_to.active_element.send_keys("n")
    assert text(page, "count").endswith("page 2 of 2")
    page.find_element("tag name", "body").send_keys("/")
    assert page.switch_to.active_element.get_attribute("id") == "search"
    page.switch_to.active_element.send_keys("j", Keys.ESCAPE)
    assert page.switch_to.active_element.tag_name == "body"


def test_hostile_text_is_text(page):
    click_answer(page, "q1")
    shown = page.execute_script("return document.querySelector('#detail pre').textContent")
    assert shown == EVIL.replace("\u202e", "[U+202E]").replace("\u202c", "[U+202C]").replace("\x1b", "[U+001B]")
    assert page.execute_script("return document.querySelectorAll('#detail script, #detail b').length") == 0
    assert "<b>X-Ray</b>" in text(page, "detail")


def test_a_megabyte_of_text(page):
    click_answer(page, "q2")
    length = "return document.querySelector('#detail pre').textContent.length"
    assert page.execute_script(length) == 20_000
    page.execute_script("document.querySelector('#detail pre + button').click()")
    assert page.execute_script(length) > LONG
    assert page.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_twenty_thousand_answers(chromium, tmp_path_factory):
    """A run over a whole test set and a control of it: 20,000 answers to 10,000 questions, images in side files."""
    root = tmp_path_factory.mktemp("large")
    count = 10_000
    rows = [
        {
            "images": [{"bytes": png(number % 200)}],
            "extra_info": {
                "question_id": f"q{number}",
                "question": f"Which one is number {number}?",
                "image_sha256": f"{number:064x}",
            },
        }
        for number in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "test.parquet")
    answers = [prediction(number, control=control) for control in ("none", "blank") for number in range(count)]
    write_lines(root / "predictions.jsonl", answers)
    assert medr1(["report", str(root), "--data", str(root / "test.parquet"), "--images", "files"]) == 0
    chromium.get_log("browser")  # what pages of other tests have said
    chromium.get((root / "report.html").as_uri())
    assert chromium.execute_script("return document.documentElement.dataset.ready") == "1"
    assert text(chromium, "count") == "10000 answers, page 1 of 100"
    assert chromium.execute_script("return document.querySelectorAll('#list button').length") == 100, "one page of them"
    choose(chromium, "modality", "mri")
    choose(chromium, "verdict", "unparsed")
    wanted = [n for n in range(count) if n % 2 and prediction(n)["pred"] == ""]
    assert text(chromium, "count").startswith(f"{len(wanted)} answers")
    chromium.find_element("tag name", "body").send_keys("n")
    shown = chromium.execute_script(
        "return [...document.querySelectorAll('#list button small')].map((e) => e.textContent.split(', ').at(-1))"
    )
    assert shown == [f"q{number}" for number in wanted[100:200]]
    click_answer(chromium, shown[7])
    assert shown_colours(chromium) == [56], "its picture, from the folder beside the page"
    key = chromium.execute_script("return document.querySelector('#detail img').dataset.key")
    assert key == hashlib.sha256(png(wanted[107] % 200)).hexdigest()[:24]
    assert chromium.get_log("browser") == []


def test_every_control_has_a_name_and_texts_contrast(page):
    unnamed = page.execute_script(
        "return [...document.querySelectorAll('select, input, button, img, [role=img]')].filter((e) =>"
        " !(e.labels && e.labels.length) && !e.textContent.trim() && !e.getAttribute('aria-label') && !e.alt).length"
    )
    assert unnamed == 0
    css = (Path(__file__).parents[2] / "medr1_verl" / "report" / "page.css").read_text()
    colours = dict(re.findall(r"--(\w+): (#\w{6})", css))
    for ink in ("ink", "soft", "link"):
        for ground in ("ground", "panel"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)


def contrast(one, other):
    def luminance(text):
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
