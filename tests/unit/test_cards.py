"""Cards: every figure is the files' own, what is missing is named, and nothing private is written."""

import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medr1_verl.audit.provenance import folder_sha256
from medr1_verl.cards import data_card, model_card
from medr1_verl.cli import main as medr1
from medr1_verl.schema import arrow_schema, make_row

OPTIONS = ["CT", "MRI", "OCT"]


def info(number, split):
    return {
        "index": number,
        "split": split,
        "question_id": f"{split}{number}",
        "dataset": "set",
        "modality": ("ct", "mri")[number % 2],
        "question_type": "modality_recognition",
        "question": "Which one?",
        "options": OPTIONS,
        "answer": "A",
        "answer_text": "CT",
        "image_path": f"{split}{number}.png",
        "image_sha256": f"{number + (0 if split == 'test' else 7):064x}",
        "style": "think",
    }


def prediction(number, model, control="none"):
    acc = int(number % 3 == 0 and control == "none")
    return {
        "question_id": f"test{number}",
        "data_source": "omnimedvqa/ct",
        "modality": ("ct", "mri")[number % 2],
        "question_type": "modality_recognition",
        "style": "think",
        "control": control,
        "decoding": "greedy",
        "output": "<think>a CT</think><answer>A</answer>",
        "pred": "A" if acc else "B",
        "acc": acc,
        "format": 1,
        "parsed": 1,
        "answer": "A",
        "n_options": 3,
        "options": OPTIONS,
        "image_sha256": f"{number:064x}",
        "model": model,
    }


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    data, folder = tmp_path / "data", tmp_path / "runs" / "ct-run"
    data.mkdir()
    (folder / "model").mkdir(parents=True)
    (folder / "config").mkdir()
    for split, count in (("train", 8), ("test", 9)):
        rows = [make_row(images=[{"bytes": b"x"}], prompt="<image>?", extra_info=info(n, split)) for n in range(count)]
        pq.write_table(pa.Table.from_pylist(rows, arrow_schema()), data / f"{split}.parquet")
    manifest = {
        "medr1_verl": "0.1.0",
        "arguments": {
            "input": "/home/somebody/OmniMedVQA",
            "style": "think",
            "image_size": 384,
            "shuffle_options": True,
        },
        "input": {"source": "omnimedvqa", "files": [{"file": "a.json"}]},
        "rows_in": 20,
        "rows_out": 17,
        "rows_rejected": 3,
        "rejected": {"missing_image": 3},
        "counts": {"test": {"ct": {"modality_recognition": 5}, "mri": {"modality_recognition": 4}}},
        "split": {"method": "image", "seed": 42, "test_rows_whose_image_is_in_train": 2},
        "outputs": {"test.parquet": {"bytes": 1, "sha256": "e" * 64}},
    }
    (data / "manifest.json").write_text(json.dumps(manifest))
    (folder / "model" / "model.safetensors").write_text("weights")
    (folder / "run.json").write_text(json.dumps({"MODEL_PATH": "Qwen/Qwen2-VL-2B-Instruct", "DATA_DIR": str(data)}))
    (folder / "config" / "overrides.yaml").write_text(
        "- algorithm.adv_estimator=grpo\n"
        "- actor_rollout_ref.actor.optim.lr=1e-6\n- actor_rollout_ref.actor.optim.lr=2e-6\n"
        f"- data.train_files={data}/train.parquet\n"
    )
    summary = {
        "steps": 20,
        "seed": 7,
        "warnings": ["see /home/somebody/runs/train.log"],
        "model": "/home/somebody/base",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [prediction(n, "ct-run", control) for control in ("none", "blank") for n in range(9)]
    write_lines(folder / "predictions.jsonl", rows)
    write_lines(folder / "before.jsonl", [prediction(n, "before") for n in range(9)])
    return folder


def front(card):
    """The front matter: one JSON value a line, which YAML reads as well."""
    lines = card.split("---\n")[1].splitlines()
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in lines)}


def test_model_card(run):
    card, notes = model_card(run)
    assert notes == []
    found = front(card)
    assert found["base_model"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert "grpo" in found["tags"]
    result = found["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == pytest.approx(100 * 3 / 9, abs=0.01), "of the run, not of the model before"
    for words in (
        "trained by GRPO with a verifiable reward, from Qwen/Qwen2-VL-2B-Instruct",
        "| learning rate | 2e-6 |",
        "| steps | 20 |",
        f"| weights and tokenizer, SHA-256 | {folder_sha256(run / 'model')} |",
        "| rows kept | 17 |",
        "chance 33.33, blind 100.00",
        "ct-run, blank",
        "no medical device",
        "see train.log",
        "### Without rows whose image was trained on",
        "| ct-run | blank | greedy | 9 | 100.0 |",
    ):
        assert words in card, words


def test_nothing_in_a_card_names_a_place_or_a_person(run, tmp_path, nothing_private):
    for name, (text, _) in (("model.md", model_card(run)), ("data.md", data_card(run.parents[1] / "data"))):
        (tmp_path / name).write_text(text)
    nothing_private(tmp_path / "model.md", tmp_path / "data.md", more=[str(run.parents[1])])


def test_the_card_does_not_change_the_weights_digest(run, capsys):
    before = folder_sha256(run / "model")
    assert medr1(["card", "model", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "model" / "README.md")
    assert folder_sha256(run / "model") == before


@pytest.mark.parametrize(
    ("removed", "note"),
    [
        ("predictions.jsonl", None),
        ("summary.json", None),
        ("config", None),
        ("run.json", None),
        ("../../data", "the data of the run is not where it was"),
    ],
)
def test_missing_parts_are_named_and_the_rest_is_there(run, removed, note, capsys):
    gone = run / removed
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert medr1(["card", "model", str(run)]) == 0
    card = (run / "model" / "README.md").read_text()
    assert "## Intended use" in card
    assert note is None or (note in card and note in capsys.readouterr().err)


def test_no_predictions_no_accuracy(run):
    (run / "predictions.jsonl").unlink()
    (run / "before.jsonl").unlink()
    card, notes = model_card(run)
    assert notes == ["no predictions: the card has no accuracy"]
    assert "model-index" not in card
    assert "## Evaluation" not in card


def test_data_card(run, capsys):
    folder = run.parents[1] / "data"
    assert medr1(["card", "data", str(folder)]) == 0
    card = (folder / "README.md").read_text()
    found = front(card)
    assert found["configs"][0]["data_files"][1] == {"split": "test", "path": "test.parquet"}
    for words in (
        "| missing_image | 3 |",
        "| ct | 5 | 5 |",
        "| rows rejected | 3 |",
        "| kept of the options | shuffle options |",
        "| all | 9 | 9 | 33.3333 | 100 | 100 | 100 | 2 |",
        "2 test rows show an image that training rows show too",
        "e" * 64,
    ):
        assert words in card, words


def test_slices_are_configurations(run):
    folder = run.parents[1] / "data"
    for slug in ("ct", "mri"):
        (folder / slug).mkdir()
        for split in ("train", "test"):
            shutil.copy(folder / f"{split}.parquet", folder / slug)
    for split in ("train", "test"):
        (folder / f"{split}.parquet").unlink()
    card, _ = data_card(folder)
    assert [one["config_name"] for one in front(card)["configs"]] == ["ct", "mri"]
    assert re.search(r"^\| mri \| 9 \|", card, re.MULTILINE)


def test_hugging_face_reads_them(run):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    for text, kind in ((model_card(run)[0], hub.ModelCard), (data_card(run.parents[1] / "data")[0], hub.DatasetCard)):
        card = kind(text)
        assert card.data.tags[0] == "medical"
    results = hub.ModelCard(model_card(run)[0]).data.eval_results
    assert results[0].metric_value == pytest.approx(33.33)


@pytest.mark.parametrize(
    ("kind", "words"), [("model", "has no summary.json, run.json or predictions"), ("data", "has no manifest.json")]
)
def test_other_folders_are_one_line(tmp_path, kind, words, capsys):
    assert medr1(["card", kind, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
