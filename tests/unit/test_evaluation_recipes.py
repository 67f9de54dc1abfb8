"""The baseline's and the evaluation's recipes: verl's configuration, plans, and bad variables as one line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medr1_verl.schema import arrow_schema, make_row

ROOT = Path(__file__).parents[2]


def recipe(name, tmp_path, environment, gpus=0, *arguments):
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(
        "#!/bin/sh\n" + "".join(f"echo 'GPU {i}: NVIDIA'\n" for i in range(gpus)) + f"exit {int(not gpus)}\n"
    )
    tool.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "VIRTUAL_ENV", "PYTHONPATH")}
    path = os.pathsep.join([str(tool.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(ROOT / "recipes" / name), *arguments],
        env=kept | {"PATH": path, "PYTHON": sys.executable, "RUNS_DIR": str(tmp_path / "runs")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )


@pytest.fixture
def data(tmp_path):
    """Six training rows of ct and mri each, four test rows of ct."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part, slugs in (("train", ["ct", "mri"] * 6), ("test", ["ct"] * 4)):
        rows = []
        for number, slug in enumerate(slugs):
            info = dict.fromkeys(arrow_schema().field("extra_info").type.names, "x") | {
                "index": number,
                "question_id": f"{part}{number}",
                "modality": slug,
                "question_type": "disease_diagnosis",
                "options": ["yes", "no"],
                "answer": "A",
                "style": "think",
            }
            del info["modality"], info["index"]
            info |= {"modality": slug, "index": number}
            rows.append(make_row(images=[{"bytes": b"x"}], prompt="<image>?", extra_info=info))
        pq.write_table(pa.Table.from_pylist(rows, schema=arrow_schema()), folder / f"{part}.parquet")
    return folder


@pytest.fixture
def needs_verl():
    pytest.importorskip("verl")


@pytest.mark.heavy
@pytest.mark.usefixtures("needs_verl")
@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, 0),
        ({"DATA_DIR": "/d", "MODEL_PATH": "/m"}, 0),
        ({"DATA_DIR": "/d"}, 1),
        ({"DATA_DIR": "/d", "STYLE": "no-think", "TRAIN_BATCH_SIZE": "64"}, 8),
    ],
)
def test_sft_command_line_composes(environment, gpus, tmp_path):
    import verl
    from hydra import compose, initialize_config_dir

    done = recipe("run_medr1_sft.sh", tmp_path, environment | {"DRY_RUN": "1"}, gpus, "optim.lr=0.5")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "verl.trainer.sft_trainer" in lines
    overrides = [line for line in lines if "=" in line and not line.startswith(("[", "-", "hydra"))]
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        config = compose("sft_trainer_engine", overrides=overrides)
    assert config.optim.lr == 0.5, "arguments of the user come last and win"
    assert config.engine.strategy == "fsdp2"
    assert config.trainer.n_gpus_per_node == max(gpus, 1)
    assert config.data.train_files.endswith("train.sft.parquet")
    if gpus:
        assert config.optim.lr_scheduler_type == "cosine"
        assert config.optim.lr_warmup_steps_ratio == 0.1
        assert config.data.train_batch_size == int(environment.get("TRAIN_BATCH_SIZE", 128))


@pytest.mark.heavy
@pytest.mark.usefixtures("needs_verl")
def test_plan_of_the_cross_modality_protocol(data, tmp_path):
    environment = {"DATA_DIR": str(data), "MODEL_PATH": "/m", "DRY_RUN": "1", "TOTAL_EPOCHS": "2"}
    done = recipe("run_cross_modality.sh", tmp_path, environment, 4)
    assert done.returncode == 0, done.stderr
    words = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "grpo-ct 6 training rows 3 steps" in words
    assert "grpo-mri 6 training rows 3 steps" in words
    assert "all training 6 steps of 4 rows, 96 sampled answers; 6 steps are left" in words
    assert "evaluation 36 answers: 4 test rows x (2 runs and the base) x 3 controls, 256 new tokens at most" in words
    assert "4 GPU(s) each" in done.stdout
    (tmp_path / "runs" / "cross-modality-gpu" / "grpo-ct" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "cross-modality-gpu" / "grpo-ct" / "model" / "config.json").touch()
    (tmp_path / "runs" / "cross-modality-gpu" / "grpo-ct" / "summary.json").write_text('{"steps": 3, "seconds": 30}')
    words = recipe("run_cross_modality.sh", tmp_path, environment | {"PARALLEL": "2"}, 4).stdout
    assert "(done)" in words
    assert "3 steps are left" in words
    assert "10.0 s a step" in words
    assert "2 GPU(s) each" in words


REFUSALS = [
    ("run_medr1_sft.sh", {"STYLE": "loud"}, 0, "STYLE=loud"),
    ("run_medr1_sft.sh", {"DATA_DIR": "/d", "TRAIN_BATCH_SIZE": "9"}, 2, "not a multiple of N_GPUS=2"),
    ("run_medr1_sft.sh", {"DATA_DIR": "/d"}, 0, "MODEL_PATH is not"),
    ("run_medr1_sft.sh", {"NNODES": "2"}, 0, "NNODES=2"),
    ("evaluate.sh", {}, 0, "MODEL_PATH is not set"),
    ("evaluate.sh", {"MODEL_PATH": "/m"}, 0, "DATA_DIR is not set"),
    ("evaluate.sh", {"MODEL_PATH": "/m", "DATA_DIR": "/d", "EVAL_LIMIT": "x"}, 0, "EVAL_LIMIT=x"),
    ("run_cross_modality.sh", {"METHOD": "dpo"}, 0, "METHOD=dpo"),
    ("run_cross_modality.sh", {"PARALLEL": "2"}, 0, "PARALLEL=2"),
    ("run_cross_task.sh", {"DATA_DIR": "/d", "PARALLEL": "3", "N_GPUS": "2"}, 4, "do not fit on 4 GPUs"),
]


@pytest.mark.parametrize(("name", "environment", "gpus", "says"), REFUSALS)
def test_a_bad_variable_is_one_line(name, environment, gpus, says, tmp_path):
    done = recipe(name, tmp_path, environment, gpus)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.heavy
@pytest.mark.usefixtures("needs_verl")
@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SLICES": "oct"}, "SLICES names oct, which has no training rows"),
        ({"TRAIN_BATCH_SIZE": "7"}, "ct has 6 training rows, fewer than TRAIN_BATCH_SIZE=7"),
        ({"CONTROLS": "blank"}, "lacks none"),
    ],
)
def test_a_plan_that_cannot_be_carried_out(environment, says, data, tmp_path):
    done = recipe(
        "run_cross_modality.sh", tmp_path, {"DATA_DIR": str(data), "MODEL_PATH": "/m", "DRY_RUN": "1"} | environment, 1
    )
    assert done.returncode == 2
    assert says in done.stderr


STUB = """#!/usr/bin/env bash
trap 'echo "$RUN_NAME" >>"$ENDED"; exit 130' INT TERM
echo "$RUN_NAME $$" >>"$STARTED"
sleep 60 & wait
"""


ANSWERS = """import json, os, sys
from pathlib import Path

from medr1_verl.evaluation.evaluate import Output, _row
from medr1_verl.evaluation.questions import read_questions

run = Path(os.environ["RUNS_DIR"]) / os.environ["RUN_NAME"]
run.mkdir(exist_ok=True)
about = {"control": "none", "decoding": "greedy", "max_tokens": 9, "model": run.name, "weights": "w"}
output = [Output("<think>a</think><answer>A</answer>", 5, 0)]
rows = [_row(question, output, about) for question in read_questions([os.environ["DATA_DIR"]])]
(run / "predictions.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""
TRAINED = """echo "$RUN_NAME $$" >>"$STARTED"
mkdir -p "$RUNS_DIR/$RUN_NAME/model" && cd "$RUNS_DIR/$RUN_NAME" && echo "{}" >model/config.json
echo '{"steps": 1, "seconds": 2.0, "model": "m", "seed": 42}' >summary.json
"""


@pytest.fixture
def protocol(data, tmp_path):
    """The cross recipe with stand-ins for those that train and evaluate; a function that gives its environment."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "answers.py").write_text(ANSWERS)
    (tmp_path / "recipes" / "evaluate.sh").write_text(f'"$PYTHON" {tmp_path}/answers.py\n')
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()

    def environment(training, parallel):
        (tmp_path / "recipes" / "run_medr1_sft.sh").write_text(training)
        tool.write_text("#!/bin/sh\n" + "echo 'GPU 0: NVIDIA'\n" * parallel)
        tool.chmod(0o755)
        return os.environ | {
            "PATH": os.pathsep.join([str(tool.parent), os.environ["PATH"]]),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "RUNS_DIR": str(tmp_path / "runs"),
            "RUN_NAME": "cross",
            "METHOD": "sft",
            "DATA_DIR": str(data),
            "MODEL_PATH": "/m",
            "TRAIN_BATCH_SIZE": "2",
            "PROFILE": "gpu",
            "PARALLEL": str(parallel),
            "STARTED": str(tmp_path / "started"),
            "ENDED": str(tmp_path / "ended"),
        }

    return environment


@pytest.mark.heavy
@pytest.mark.usefixtures("needs_verl")
@pytest.mark.parametrize("parallel", [1, 2])
def test_the_protocol_around_its_recipes(protocol, tmp_path, parallel):
    """Every slice with training rows is trained once, told of, and in the tables; a second call trains nothing."""
    command = ["bash", str(tmp_path / "recipes" / "run_cross_modality.sh")]
    environment = protocol(TRAINED, parallel)
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    started = [line.split()[0] for line in (tmp_path / "started").read_text().splitlines()]
    assert sorted(started) == ["sft-ct", "sft-mri"]
    assert done.stdout.count("(done)") == 2
    folder = tmp_path / "runs" / "cross"
    table = (folder / "tables" / "tables.md").read_text()
    for name in ("base", "sft-ct", "sft-mri"):
        assert f"| {name} | 100.00 [" in table
    for name in ("sft-ct", "sft-mri"):
        assert (folder / name / "report.html").is_file()
        assert (folder / name / "model" / "README.md").is_file()


@pytest.mark.heavy
@pytest.mark.usefixtures("needs_verl")
def test_one_failed_slice_leaves_the_others(protocol, tmp_path):
    command = ["bash", str(tmp_path / "recipes" / "run_cross_modality.sh")]
    failing = '[[ "$RUN_NAME" != sft-ct ]] || exit 1\n' + TRAINED
    done = subprocess.run(command, env=protocol(failing, 1), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "ct failed; the others go on" in done.stderr
    assert "the same command goes on with what is missing" in done.stderr
    assert (tmp_path / "runs" / "cross" / "sft-mri" / "report.html").is_file()
    done = subprocess.run(command, env=protocol(TRAINED, 1), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in (tmp_path / "started").read_text().splitlines()] == ["sft-mri", "sft-ct"]


@pytest.mark.heavy
@pytest.mark.usefixtures("needs_verl")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("parallel", [1, 2])
def test_an_interrupted_protocol_ends_and_starts_nothing_more(protocol, tmp_path, sent, parallel):
    started, ended = tmp_path / "started", tmp_path / "ended"
    environment = protocol(STUB, parallel)
    command = ["bash", str(tmp_path / "recipes" / "run_cross_modality.sh")]
    with open(tmp_path / "printed", "w+") as printed:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=printed,
            stderr=printed,
            start_new_session=True,
            # A background job of a script starts with interrupts ignored, and bash cannot trap what it found ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while not (started.is_file() and started.read_text().count("\n") == parallel):
            assert process.poll() is None, (tmp_path / "printed").read_text()
            assert time.monotonic() < deadline, (tmp_path / "printed").read_text()
            time.sleep(0.05)
        process.send_signal(sent)
        assert process.wait(timeout=30) == 128 + sent
    names = [line.split()[0] for line in started.read_text().splitlines()]
    assert sorted(names) == ["sft-ct", "sft-mri"][:parallel], "nothing was started after the signal"
    assert sorted(ended.read_text().split()) == sorted(names)
