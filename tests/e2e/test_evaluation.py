"""The evaluation and its recipes for real: vLLM's offline engine, vLLM's own server, verl's SFT trainer.

The model is an untrained tiny Qwen2-VL: what it says is noise, but the same noise by every way of asking.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("verl")
pytest.importorskip("vllm")

from medr1_verl import cpu
from medr1_verl.evaluation.predictions import key_of, read_rows
from medr1_verl.evaluation.questions import read_questions

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | cpu.environ()
TOKENS = 12


def medr1(*arguments: str | Path, module: str = "medr1_verl.cli", fails: bool = False) -> str:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    medr1("--output", folder / "raw", "--seed", 3, "--images-per-modality", 6, module="medr1_verl.embedded.phantoms")
    medr1(
        "convert", "--input", folder / "raw", "--output", folder / "data", "--image-size", 112, "--test-fraction", 0.5
    )
    return folder / "data"


@pytest.fixture(scope="session")
def model(data) -> Path:
    import torch

    from medr1_verl.embedded.tiny_model import make_model, make_processor, make_tokenizer

    processor = make_processor(make_tokenizer(q.messages[0]["content"] for q in read_questions([data])))
    folder = data.parent / "tiny" / "model"
    untrained = make_model(processor.tokenizer, seed=3)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in untrained.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)  # large enough that any change of the input changes the answer
    untrained.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def evaluation(model: Path | str, data: Path, output: Path, *more: str) -> list[str]:
    return [
        "evaluate",
        "--model",
        str(model),
        "--data",
        str(data),
        "--output",
        str(output),
        "--max-tokens",
        str(TOKENS),
        *more,
    ]


def answers(folder: Path) -> dict[tuple, dict]:
    return {key_of(row): row for row in read_rows(folder / "predictions.jsonl")}


PASSES = ("--pass", "none:0", "blank:0", "text-only:0", "none:1")


@pytest.fixture(scope="session")
def offline(model, data, tmp_path_factory) -> Path:
    """An evaluation killed after its first answers were saved, and gone on with."""
    output = tmp_path_factory.mktemp("offline")
    command = [sys.executable, "-m", "medr1_verl.cli", *evaluation(model, data, output, *PASSES)]
    partial = output / "predictions.jsonl.partial"
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (partial.is_file() and partial.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "predictions.jsonl").exists()
    saved = partial.read_text().count("\n")
    printed = medr1(*evaluation(model, data, output, *PASSES))
    assert "modality_recognition" in printed
    rows = answers(output)
    assert 0 < saved < len(rows)
    return output


def test_every_row_is_answered_in_every_pass(offline, data):
    rows = answers(offline)
    n = len(read_questions([data]))
    assert len(rows) == 4 * n
    for control, decoding in (
        ("none", "greedy"),
        ("blank", "greedy"),
        ("text-only", "greedy"),
        ("none", "T=1 n=1 seed=0"),
    ):
        assert sum(key[1:] == (control, decoding) for key in rows) == n
    assert all(row["tokens"] <= TOKENS for row in rows.values())
    assert not (offline / "predictions.jsonl.partial").exists()
    assert not list(offline.glob("*.log")), "the log is there for failures only"


def test_the_image_reaches_the_model(offline):
    """An untrained model says something else of a blank picture, and something else again without one."""
    rows = answers(offline)
    ids = [key[0] for key in rows if key[1:] == ("none", "greedy")]
    for control in ("blank", "text-only"):
        changed = [rows[i, "none", "greedy"]["output"] != rows[i, control, "greedy"]["output"] for i in ids]
        assert sum(changed) > len(ids) / 4


def test_nothing_is_asked_twice(offline, model, data):
    before = (offline / "predictions.jsonl").read_bytes()
    started = time.monotonic()
    medr1(*evaluation(model, data, offline, *PASSES))
    assert (offline / "predictions.jsonl").read_bytes() == before
    assert time.monotonic() - started < 60, "no engine was started"


def test_a_broken_model_is_one_line(model, data, tmp_path):
    broken = tmp_path / "model"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"torn")
    told = medr1(*evaluation(broken, data, tmp_path / "out"), fails=True)
    line = told.strip().splitlines()[-1]
    assert line.startswith("medr1 evaluate: vLLM could not start")
    assert "Traceback" in Path(line.rsplit("details: ", 1)[1].rstrip(")")).read_text()


def test_vllms_own_server_gives_the_same_answers(offline, model, data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # On a CPU, vLLM ends on a seeded sample of a prompt read in pieces ("CPU Generator does not use offset").
    options = ["--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    options += ["--enforce-eager", "--max-model-len", "2048", "--no-enable-chunked-prefill"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options]
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{address}/models", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(1)
        asked = ("--base-url", address, "--pass", "none:0", "text-only:0", "none:1")
        medr1(*evaluation("tiny", data, tmp_path / "out", *asked))
        told = medr1(*evaluation("large", data, tmp_path / "other", *asked), fails=True)
        assert "serves tiny, not 'large'" in told
    finally:
        server.terminate()
        server.wait(timeout=60)
    mine, theirs = answers(offline), answers(tmp_path / "out")
    greedy = [key for key in theirs if key[2] == "greedy"]
    same = [mine[key]["output"] == theirs[key]["output"] for key in greedy]
    assert sum(same) >= 0.95 * len(greedy), "batches of other shapes may round the last bit differently"
    assert all(row["tokens"] is not None for row in theirs.values())


def test_cross_modality_protocol_with_the_supervised_baseline(model, data, tmp_path):
    environment = os.environ | {
        "PROFILE": "cpu",
        "PYTHON": sys.executable,
        "RUNS_DIR": str(tmp_path),
        "RUN_NAME": "cross",
        "METHOD": "sft",
        "SLICES": "ct mri",
        "CONTROLS": "none blank",
        "MODEL_PATH": str(model),
        "DATA_DIR": str(data),
        "TOTAL_STEPS": "2",
        "TRAIN_BATCH_SIZE": "4",
        "LR": "1e-3",
        "MAX_PROMPT_LENGTH": "320",
        "MAX_RESPONSE_LENGTH": str(TOKENS),
        "EVAL_LIMIT": "40",
    }
    command = ["bash", str(ROOT / "recipes" / "run_cross_modality.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    tables = json.loads((tmp_path / "cross" / "tables" / "tables.json").read_text())
    rows = {row["run"]: row for row in tables["modality"]["rows"]}
    assert list(rows) == ["base", "sft-ct", "sft-mri"]
    assert len(tables["modality"]["columns"]) == 8
    for name, row in rows.items():
        assert sum(cell["n"] for cell in row["cells"].values()) == 40, "every slice was tested"
        assert row["macro"]["controls"]["blank"]["difference"]
        if name != "base":
            assert row["cells"]["ct"]["gain"]
            assert row["cells"]["ct"]["prior_normalized"] is not None
            summary = json.loads((tmp_path / "cross" / name / "summary.json").read_text())
            assert summary["steps"] == 2
            assert summary["loss_first"] > 0
    assert (tmp_path / "cross" / "tables" / "heatmap-modality-gain.png").stat().st_size > 10_000
    # Each run has its page and its card, the protocol the card of its data; the card's figures are the tables'.
    assert "## How far it can be answered without looking" in (tmp_path / "cross" / "data-card.md").read_text()
    run = tmp_path / "cross" / "sft-ct"
    assert "complete and unaltered, 80 answers" in (run / "report.html").read_text()
    card = (run / "model" / "README.md").read_text()
    assert "trained by supervised steps on the right answers" in card
    assert f"| sft-ct | {rows['sft-ct']['cells']['ct']['accuracy']:.2f} [" in card
    # The base and the run differ in their weights, and a second call only makes the tables again.
    weights = {name: next(read_rows(tmp_path / "cross" / name / "predictions.jsonl"))["weights"] for name in rows}
    assert len(set(weights.values())) == 3
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("(done)") == 2
    assert ": training" not in again.stdout
