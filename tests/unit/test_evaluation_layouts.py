"""Published benchmarks in small: each layout as its readme describes it, through the converter and the reader."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medr1_verl.cli import run
from medr1_verl.evaluation.layouts import main
from medr1_verl.evaluation.questions import read_questions


def png(colour=(255, 0, 0)):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return file.getvalue()


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png())


def converted(layout, source, output):
    assert main([layout, str(source), "--output", str(output)]) == 0
    return read_questions([output])


def test_vqa_rad(tmp_path):
    """Rows for training (freeform, para) are left out; answers come with numbers and stray tabs."""
    picture(tmp_path / "rad" / "VQA_RAD Image Folder" / "synpic1.jpg")
    base = {"image_name": "synpic1.jpg", "image_organ": "HEAD", "question_type": "PRES"}
    rows = [
        {"qid": 1, "question": "Infarct?", "answer": "Yes", "answer_type": "CLOSED", "phrase_type": "freeform"},
        {"qid": 2, "question": "Infarct?", "answer": "No", "answer_type": "CLOSED", "phrase_type": "test_freeform"},
        {"qid": 3, "question": "How many?", "answer": 2, "answer_type": "OPEN ", "phrase_type": "test_para"},
        {"qid": 4, "question": "Where? ", "answer": "left lobe\t", "answer_type": "OPEN", "phrase_type": "test_para"},
    ]
    (tmp_path / "rad" / "VQA_RAD Dataset Public.json").write_text(json.dumps([base | row for row in rows]))
    found = converted("vqa-rad", tmp_path / "rad", tmp_path / "out" / "rad.jsonl")
    assert [(q.question_id, q.answer, q.question_type) for q in found] == [
        ("vqa-rad_2", "B", "closed"),
        ("vqa-rad_3", "2", "open"),
        ("vqa-rad_4", "left lobe", "open"),
    ]
    assert found[0].options == ("yes", "no")
    assert found[0].load_images()[0].size == (40, 30)


def test_slake(tmp_path):
    """English rows only; modalities by the names that the tables know."""
    picture(tmp_path / "Slake1.0" / "imgs" / "xmlab0" / "source.jpg")
    base = {"img_id": 0, "img_name": "xmlab0/source.jpg", "answer_type": "OPEN", "base_type": "vqa"}
    rows = [
        {"qid": 9, "question": "Which modality?", "answer": "MRI", "q_lang": "en", "modality": "MRI"},
        {"qid": 10, "question": "?", "answer": "MRI", "q_lang": "zh", "modality": "MRI"},
        {"qid": 11, "question": "Lung?", "answer": "No", "q_lang": "en", "modality": "X-Ray", "answer_type": "CLOSED"},
    ]
    (tmp_path / "Slake1.0" / "test.json").write_text(json.dumps([base | row for row in rows]))
    found = converted("slake", tmp_path / "Slake1.0", tmp_path / "slake.jsonl")
    assert [(q.question_id, q.modality, q.answer, q.question_type, q.dataset) for q in found] == [
        ("slake_9", "mri", "MRI", "open", "slake"),
        ("slake_11", "xray", "B", "closed", "slake"),
    ]


def test_path_vqa(tmp_path):
    """Images come out of the parquet, each once."""
    rows = [
        {"image": {"bytes": png(), "path": None}, "question": "Present?", "answer": "yes"},
        {"image": {"bytes": png(), "path": None}, "question": "Where?", "answer": "in the canals of hering"},
        {"image": {"bytes": png((0, 9, 0)), "path": None}, "question": "Where?", "answer": "colon"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet")
    found = converted("path-vqa", tmp_path, tmp_path / "out" / "path.jsonl")
    assert [(q.question_id, q.answer) for q in found] == [
        ("path-vqa_0", "A"),
        ("path-vqa_1", "in the canals of hering"),
        ("path-vqa_2", "colon"),
    ]
    assert len(list((tmp_path / "out" / "path_images").iterdir())) == 2
    assert found[2].load_images()[0].getpixel((0, 0)) == (0, 9, 0)


@pytest.mark.parametrize(
    ("name", "images", "row"),
    [
        ("test_clean.csv", "images", {"Answer": "Focal uptake", "Answer_label": "B"}),
        ("test_2.csv", "images_2", {"Answer": "B"}),
    ],
)
def test_pmc_vqa(tmp_path, name, images, row):
    """Both versions: the right answer by its letter, choices without the letters before them."""
    picture(tmp_path / images / "PMC1_F1.jpg")
    row |= {"Figure_path": "PMC1_F1.jpg", "Question": " Which uptake?"}
    row |= {
        f"Choice {letter}": f" {letter}:{text} " for letter, text in zip("ABCD", ["a", "b", "c: d", "e"], strict=True)
    }
    with open(tmp_path / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    (found,) = converted("pmc-vqa", tmp_path / name, tmp_path / "pmc.jsonl")
    assert (found.options, found.answer, found.question) == (("a", "b", "c: d", "e"), "B", "Which uptake?")


@pytest.mark.parametrize(
    ("layout", "files", "source", "words"),
    [
        ("vqa-rad", {}, ".", "needs one VQA_RAD*.json"),
        ("slake", {}, ".", "test.json: cannot be read as JSON"),
        ("slake", {"test.json": '[{"qid": 1}]'}, ".", "row 0: has no img_name, question, answer, q_lang"),
        ("slake", {"test.json": "[]"}, ".", "has no test rows of slake"),
        ("path-vqa", {}, ".", "no test*.parquet in it"),
        ("path-vqa", {"test.parquet": "x"}, ".", "is no parquet with image, question and answer"),
        ("pmc-vqa", {"test.csv": "a\n"}, "test.csv", "the folder of its images (images or figures) is not beside it"),
        ("pmc-vqa", {"test.csv": "a\n1\n", "images/x": ""}, "test.csv", "row 1: has no Figure_path, Question"),
    ],
)
def test_bad_sources_are_one_line(tmp_path, layout, files, source, words, capsys):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    arguments = [layout, str(tmp_path / source), "--output", str(tmp_path / "out.jsonl")]
    assert run(main, arguments, "layouts") == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()
