"""``medr1 convert --template``: a user's own prompt in the parquet."""

import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medr1_verl.cli import run as run_command
from medr1_verl.convert.cli import main
from medr1_verl.prompt import load_template, render_prompt

TEMPLATE = "{question} {options_inline}\n{style}\n--- think\nReason in <think></think>, answer in <answer></answer>.\n"


@pytest.fixture
def tree(tmp_path):
    """One question on one picture, in OmniMedVQA's layout."""
    folder = tmp_path / "raw" / "Images" / "Made Up"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "1.png")
    rows = [
        {
            "dataset": "Made Up",
            "question_id": "Made Up_0001",
            "question_type": "Disease Diagnosis",
            "question": "What is shown?",
            "gt_answer": "Drusen",
            "image_path": "Images/Made Up/1.png",
            "option_A": "Normal",
            "option_B": "Drusen",
            "modality_type": "Fundus Photography",
        }
    ]
    questions = tmp_path / "raw" / "QA_information" / "Open-access"
    questions.mkdir(parents=True)
    (questions / "Made Up.json").write_text(json.dumps(rows))
    return tmp_path / "raw"


def _convert(tree, output, *arguments):
    command = ["--input", str(tree), "--output", str(output), "--workers", "1", "--test-fraction", "0", *arguments]
    return run_command(main, command, "medr1 convert")


def test_the_rows_ask_in_the_users_words(tree, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(TEMPLATE)
    assert _convert(tree, tmp_path / "out", "--template", str(path)) == 0
    (row,) = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    expected = "<image>What is shown? A)Normal, B)Drusen\nReason in <think></think>, answer in <answer></answer>."
    assert row["prompt"] == [{"role": "user", "content": expected}]
    assert expected == render_prompt("What is shown?", ["Normal", "Drusen"], template=load_template(path))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["template_sha256"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()


def test_without_one_the_manifest_says_so(tree, tmp_path):
    assert _convert(tree, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["template_sha256"] is None


@pytest.mark.parametrize(
    ("text", "named"), [("{question} {style}", "{options}"), ("{options} {style}", "{question}"), (None, "mine.txt")]
)
def test_one_that_cannot_work_is_refused_before_anything_is_read(tmp_path, capsys, text, named):
    path = tmp_path / "mine.txt"
    if text is not None:
        path.write_text(text)
    assert _convert(tmp_path / "nowhere", tmp_path / "out", "--template", str(path)) == 2
    error = capsys.readouterr().err.strip()
    assert named in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()
