"""Rows of one slice, and rows for verl's supervised trainer."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medr1_verl.errors import UserError
from medr1_verl.prompt import render_prompt
from medr1_verl.schema import arrow_schema, make_row
from medr1_verl.sft_rows import main as sft_main
from medr1_verl.sft_rows import sft_table
from medr1_verl.slices import cut


def row(number, modality="ct", question_type="disease_diagnosis", split="train", answer="B"):
    picture = io.BytesIO()
    Image.new("RGB", (28, 28), (number, 0, 0)).save(picture, "PNG")
    info = {
        "index": number,
        "split": split,
        "question_id": f"{split}{number}",
        "dataset": "set",
        "modality": modality,
        "question_type": question_type,
        "question": "Which?",
        "options": ["yes", "no"],
        "answer": answer,
        "answer_text": "no",
        "image_path": "x.png",
        "image_sha256": str(number),
        "style": "think",
    }
    return make_row(
        images=[{"bytes": picture.getvalue()}], prompt=render_prompt("Which?", ["yes", "no"]), extra_info=info
    )


def table(rows):
    return pa.Table.from_pylist(rows, schema=arrow_schema())


@pytest.fixture
def data(tmp_path):
    """Training rows of ct and mri; test rows of ct, mri and oct."""
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(table([row(0), row(1), row(2, "mri")]), folder / "train.parquet")
    pq.write_table(
        table([row(3, split="test"), row(4, "mri"), row(5, "oct", "lesion_grading")]), folder / "test.parquet"
    )
    return folder


def test_cut_by_modality(data, tmp_path):
    out = tmp_path / "out"
    counts = cut(data, out, "modality")
    assert counts == {"ct": {"train": 2, "test": 1}, "mri": {"train": 1, "test": 1}, "oct": {"train": 0, "test": 1}}
    rows = pq.read_table(out / "ct" / "train.parquet")
    assert rows.schema.equals(pq.read_table(data / "train.parquet").schema)
    assert [info["index"] for info in rows.column("extra_info").to_pylist()] == [0, 1]
    assert not (out / "oct" / "train.parquet").exists(), "nothing to train on"
    assert not list(out.glob("**/*.partial"))


def test_cut_by_question_type(data, tmp_path):
    counts = cut(data, tmp_path / "out", "question_type")
    assert counts == {"disease_diagnosis": {"train": 3, "test": 2}, "lesion_grading": {"train": 0, "test": 1}}


def test_a_second_cut_keeps_the_files(data, tmp_path):
    out = tmp_path / "out"
    first = cut(data, out, "modality")
    before = (out / "ct" / "train.parquet").stat().st_mtime_ns
    assert cut(data, out, "modality") == first
    assert (out / "ct" / "train.parquet").stat().st_mtime_ns == before


def test_data_that_is_cut_already_is_linked(data, tmp_path):
    cut(data, tmp_path / "cut", "modality")
    counts = cut(tmp_path / "cut", tmp_path / "again", "modality")
    assert counts["ct"] == {"train": 2, "test": 1}
    assert (tmp_path / "again" / "ct" / "train.parquet").is_symlink()
    assert pq.read_table(tmp_path / "again" / "mri" / "test.parquet").num_rows == 1
    with pytest.raises(UserError, match="is cut by modality; convert with --by question_type"):
        cut(tmp_path / "cut", tmp_path / "other", "question_type")


def test_no_data(tmp_path):
    with pytest.raises(UserError, match="convert first"):
        cut(tmp_path, tmp_path / "out", "modality")


def test_the_answer_is_the_only_thing_said(data):
    rows = sft_table(pq.read_table(data / "train.parquet")).to_pylist()
    assert rows[0]["messages"] == [
        {"role": "user", "content": render_prompt("Which?", ["yes", "no"])},
        {"role": "assistant", "content": "<answer>B</answer>"},
    ]
    assert "None" not in str(rows[0]["messages"][1])
    assert Image.open(io.BytesIO(rows[2]["images"][0]["bytes"])).getpixel((0, 0)) == (2, 0, 0)


def test_another_style_and_slices(data):
    rows = sft_table(pq.read_table(data / "train.parquet"), "no-think", ["mri"]).to_pylist()
    assert len(rows) == 1
    assert rows[0]["messages"][0]["content"] == render_prompt("Which?", ["yes", "no"], "no-think")


def test_shuffled_images_leave_no_row_its_own():
    rows = [row(number, answer="AB"[number % 2]) for number in range(50)]
    shuffled = sft_table(table(rows), shuffle_images=3)
    reds = [Image.open(io.BytesIO(r["images"][0]["bytes"])).getpixel((0, 0))[0] for r in shuffled.to_pylist()]
    assert sorted(reds) == list(range(50))
    assert all(red != number for number, red in enumerate(reds))
    assert shuffled.equals(sft_table(table(rows), shuffle_images=3))
    plain = sft_table(table(rows))
    assert shuffled.column("messages").equals(plain.column("messages"))


def test_sft_command(data, tmp_path, capsys):
    assert sft_main(["--train", str(data / "train.parquet"), "--output", str(tmp_path / "o" / "s.parquet")]) == 0
    assert capsys.readouterr().out.strip() == "3"
    with pytest.raises(UserError, match="no rows of oct"):
        sft_main(["--train", str(data / "train.parquet"), "--output", str(tmp_path / "x"), "--slice", "oct"])
    with pytest.raises(UserError, match="cannot be read"):
        sft_main(["--train", str(tmp_path / "nothing"), "--output", str(tmp_path / "x")])
