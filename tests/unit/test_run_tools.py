"""Preflight, run folders, guards, processes and summary: small files in, a verdict out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medr1_verl import guards, preflight, processes, run_folder, summary
from medr1_verl.errors import UserError


def row(**changes):
    return {
        "data_source": "omnimedvqa/ct",
        "prompt": [{"role": "user", "content": "<image>What?\nA) a\nB) b"}],
        "images": [{"bytes": b"x"}],
        "reward_model": {"style": "rule", "ground_truth": "A"},
        "extra_info": {"index": 0},
    } | changes


def parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows) if rows else pa.table({"prompt": pa.array([], pa.string())}), path)
    return path


# --- preflight --------------------------------------------------------------------------------------------


def test_a_good_parquet_is_counted(tmp_path):
    assert preflight.check_parquet(parquet(tmp_path / "t.parquet", [row()] * 3), "training") == 3


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda p: None, "no training file"),
        (lambda p: p.write_bytes(b"PAR1 not really"), "not a readable parquet"),
        (lambda p: parquet(p, []), "has no rows"),
        (lambda p: parquet(p, [{k: v for k, v in row().items() if k != "images"}]), "'images'"),
        (lambda p: parquet(p, [row(images=[])]), "1 <image> marks and 0 images"),
    ],
)
def test_a_bad_parquet_is_refused_by_name(tmp_path, make, named):
    path = tmp_path / "train.parquet"
    make(path)
    with pytest.raises(UserError, match="parquet") as caught:
        preflight.check_parquet(path, "training")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "train", "samples", "mini", "gpus", "named"),
    [
        (100, 8, 4, 8, 1, None),
        (100, 4, 4, 4, 8, None),
        (100, 4, 4, 4, 16, None),
        (7, 8, 4, 8, 1, "TRAIN_BATCH_SIZE=8, but the training file has 7 rows; use at most 7"),
        (100, 8, 4, 3, 1, "MINI_BATCH_SIZE=3 does not divide TRAIN_BATCH_SIZE=8; 1 does"),
        (100, 6, 2, 6, 8, "= 12 answers cannot be shared by 8 GPUs; MINI_BATCH_SIZE=12"),
    ],
)
def test_batch_arithmetic(rows, train, samples, mini, gpus, named):
    if named is None:
        preflight.check_batches(rows, train, samples, mini, gpus)
        return
    with pytest.raises(UserError) as caught:
        preflight.check_batches(rows, train, samples, mini, gpus)
    assert named in str(caught.value)


@pytest.mark.parametrize(("constant", "named"), [("CPU_MEMORY_GIB", "of memory"), ("SHARED_MEMORY_GIB", "/dev/shm")])
def test_too_little_memory_is_refused(monkeypatch, tmp_path, constant, named):
    monkeypatch.setattr(preflight, constant, 10**6)
    with pytest.raises(UserError, match=named):
        preflight.check_machine("cpu", tmp_path)


# --- run folders ------------------------------------------------------------------------------------------


def checkpoint(run_dir: Path, step: int, world: int = 1, torn: bool = False) -> Path:
    folder = run_dir / "checkpoints" / f"global_step_{step}"
    (folder / "actor").mkdir(parents=True)
    for rank in range(world):
        shard = folder / "actor" / f"model_world_size_{world}_rank_{rank}.pt"
        with zipfile.ZipFile(shard, "w") as archive:
            archive.writestr("data", "weights" * 100)
        if torn:
            shard.write_bytes(shard.read_bytes()[:50])
    (folder / "data.pt").write_text("")
    (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, torn=True)
    assert run_folder.step_of(run_folder.whole_checkpoint(tmp_path)) == 10
    assert run_folder.faults_of(tmp_path / "checkpoints" / "global_step_20") == [
        "actor/model_world_size_1_rank_0.pt is torn"
    ]


def test_a_missing_rank_is_a_fault(tmp_path):
    folder = checkpoint(tmp_path, 5, world=2)
    (folder / "actor" / "model_world_size_2_rank_1.pt").unlink()
    assert run_folder.faults_of(folder) == ["no shard of rank 1 of 2"]
    assert run_folder.whole_checkpoint(tmp_path) is None


def test_an_unfinished_run_goes_on_and_a_finished_one_is_set_aside(tmp_path):
    run_dir, settings = tmp_path / "r", {"MODEL_PATH": "m"}
    assert run_folder.open_run(run_dir, "auto", 20, settings) == "a new run"
    checkpoint(run_dir, 10)
    assert run_folder.open_run(run_dir, "auto", 20, settings) == "going on from step 10"
    with pytest.raises(UserError, match="MODEL_PATH=m, and now MODEL_PATH=other"):
        run_folder.open_run(run_dir, "auto", 20, {"MODEL_PATH": "other"})
    checkpoint(run_dir, 20)
    (run_dir / "summary.json").write_text("{}")
    assert run_folder.open_run(run_dir, "auto", 30, settings) == "going on from step 20"
    (run_dir / "summary.json").write_text("{}")
    words = run_folder.open_run(run_dir, "auto", 20, settings)
    assert words.startswith("a new run; the earlier one of this name is now r.")
    aside = next(p for p in tmp_path.iterdir() if p.name.startswith("r."))
    assert run_folder.step_of(run_folder.whole_checkpoint(aside)) == 20, "nothing was lost"
    assert run_folder.whole_checkpoint(run_dir) is None


def test_metrics_of_an_interrupted_run_are_joined(tmp_path):
    def line(step, **data):
        return json.dumps({"step": step, "data": data}) + "\n"

    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "metrics.jsonl").write_text(line(0, val=1) + line(1, a=1) + '{"step": 2, "da')
    assert list(run_folder.read_metrics(torn)) == [0, 1]

    run_dir = tmp_path / "resumed"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text(line(0, val=1) + line(1, a=1) + line(2, a=2) + line(3, a=3))
    checkpoint(run_dir, 2)
    (run_dir / "run.json").write_text("{}")
    run_folder.open_run(run_dir, "auto", 4, {})
    (run_dir / "metrics.jsonl").write_text(line(2, val=5) + line(3, a=30) + line(4, a=40))
    run_folder.join_metrics(run_dir)
    assert run_folder.read_metrics(run_dir) == {
        0: {"val": 1},
        1: {"a": 1},
        2: {"a": 2, "val": 5},
        3: {"a": 30},
        4: {"a": 40},
    }


# --- guards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "name"),
    [
        ({guards.PEARSON: 0.98}, "rollout and actor disagree"),
        ({"critic/advantages/min": 0.0, "critic/advantages/max": 0.0}, "no group has an advantage"),
        ({"reward/all/format": 0.0}, "no answer has the format"),
        ({"response_length/min": 40, guards.LENGTH_LIMIT: 40}, "every answer is cut off"),
    ],
)
def test_a_guard_trips_once_after_its_patience(metrics, name):
    guard = next(g for g in guards.GUARDS if g.name == name)
    watch = guards.GuardWatch()
    tripped = [[g.name for g in watch.step(metrics)] for _ in range(guard.patience + 2)]
    assert tripped == [[]] * (guard.patience - 1) + [[name]] + [[]] * 2
    assert guard.advice


def test_good_metrics_trip_no_guard():
    watch = guards.GuardWatch()
    good = {guards.PEARSON: 0.9999, "critic/advantages/min": -1.0, "critic/advantages/max": 1.0}
    good |= {"reward/all/format": 0.5, "response_length/min": 17, "response_length/clip_ratio": 1.0}
    good |= {guards.LENGTH_LIMIT: 40}
    assert not any(watch.step(good) for _ in range(30))
    watch = guards.GuardWatch()
    assert not any(watch.step({guards.PEARSON: 0.9 if i % 2 else 1.0}) for i in range(30)), "in a row, not in all"


# --- processes --------------------------------------------------------------------------------------------


# A process that starts another in a session of its own, as Ray does with its daemons.
WITH_ORPHAN = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
time.sleep(600)
"""


def test_a_run_is_found_by_its_mark_and_ended_with_its_orphans(tmp_path):
    started = subprocess.Popen(
        [sys.executable, "-c", WITH_ORPHAN], env=os.environ | {processes.RUN_MARK: str(tmp_path)}
    )
    deadline = time.monotonic() + 20
    while len(processes.marked(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started.pid in processes.marked(tmp_path)
    assert len(processes.marked(tmp_path)) == 2
    assert len(processes.descendants(os.getpid())) >= 2
    assert processes.memory_bytes(processes.marked(tmp_path)) > 2**20
    assert processes.marked(tmp_path / "another") == []
    ended = processes.end(processes.marked(tmp_path))
    started.wait()
    assert len(ended) == 2
    assert processes.marked(tmp_path) == []


# --- supervision ------------------------------------------------------------------------------------------

TRAINER = """
import json, os, sys, time
print("Started a local Ray instance"); sys.stdout.flush()
with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as file:
    for step in range(1, 4):
        data = {"training/global_step": step, "critic/score/mean": step / 3}
        file.write(json.dumps({"step": step, "data": data}) + "\\n")
print("Error in _run_prompt for uid=1")
"""


def supervise(tmp_path: Path, code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "medr1_verl.supervise", "--run-dir", str(tmp_path), *arguments, "--"]
    return subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_supervision_shows_steps_and_counts_failed_groups(tmp_path):
    done = supervise(tmp_path, TRAINER + "time.sleep(1.5)", "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stderr
    assert "Ray is up" in done.stderr
    outcome = json.loads((tmp_path / "supervision.json").read_text())
    assert outcome["failed_groups"] == 1
    assert outcome["cause"] is None


RAY_SAYS = """(Runner pid=1) ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
\tclass_name: create_colocated_worker_cls.<locals>.WorkerDict
\tactor_id: 0a
\tpid: 77
\tip: 1.2.3.4"""


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("import sys; print('Could not override \\'a.b\\'.'); print('Key b is not in struct'); sys.exit(1)", "Key b"),
        ("import sys; sys.exit(7)", "exit code 7"),
        (f"print({RAY_SAYS!r}); exit(1)", "WorkerDict (process 77) died: ray.exceptions.ActorDiedError"),
        ("import os; print('ValueError: an old one'); os.kill(os.getpid(), 9)", "was killed (SIGKILL): by hand, or by"),
        (
            "print('(WorkerDict pid=12) torch.OutOfMemoryError: too big'); raise SystemExit(1)",
            "OutOfMemoryError: too big",
        ),
    ],
)
def test_a_failed_trainer_is_named_in_one_line(tmp_path, code, cause):
    done = supervise(tmp_path, code)
    assert done.returncode == 1
    assert cause in done.stderr.splitlines()[0]
    assert "train.log" in done.stderr.splitlines()[1]


def test_a_worker_is_named_and_not_ray_that_ends_after_it(tmp_path):
    raylet = "exec -a '/ray/raylet --x' sleep 1.5"
    code = f"import subprocess, time; subprocess.Popen(['bash', '-c', {raylet!r}]).wait(); time.sleep(1)"
    done = supervise(tmp_path, f"{code}; print({RAY_SAYS!r}); exit(1)")
    assert done.stderr.startswith("training failed: WorkerDict (process 77) died: ray.exceptions.ActorDiedError")


def test_a_death_that_the_trainer_does_not_notice_ends_the_run(tmp_path, monkeypatch):
    from medr1_verl import supervise as module

    # A trainer that waits for ever on a child which calls itself a vLLM engine and then dies.
    engine = "exec -a VLLM::EngineCore sleep 2"
    code = f"import subprocess, time; subprocess.Popen(['bash', '-c', '{engine}']); time.sleep(600)"
    monkeypatch.setattr(module, "_GRACE_SECONDS", 1.0)
    outcome = module.supervise([sys.executable, "-c", code], tmp_path)
    assert outcome.cause.startswith("VLLM::EngineCore (process ")
    assert outcome.seconds < 30
    assert processes.marked(tmp_path) == []


# A trainer that ends as verl's does: TransferQueue first, then with the exception.
FAILING = """
import subprocess, sys, time
def start(title):
    return subprocess.Popen(["bash", "-c", f"exec -a '{title}' sleep 600"])
queue, engine = start("ray::TransferQueueController"), start("VLLM::EngineCore")
time.sleep(1)
for process in (%s):
    process.kill(); process.wait(); time.sleep(0.02)
time.sleep(0.5)
raise ValueError("no groups")
"""


@pytest.mark.parametrize(
    ("killed", "named"),
    [
        ("engine, queue", r"VLLM::EngineCore \(process \d+\) died: ValueError: no groups"),
        ("queue,", "ValueError: no groups"),
    ],
)
def test_what_verl_ends_itself_is_not_the_cause(tmp_path, monkeypatch, killed, named):
    from medr1_verl import supervise as module

    monkeypatch.setattr(module, "_LOOK_EVERY_SECONDS", 0.0)
    outcome = module.supervise([sys.executable, "-c", FAILING % killed], tmp_path)
    assert re.fullmatch(named, outcome.cause)


# A process of this title that forks (a data loader's worker, a raylet on its way to a worker), the fork ending first.
FORKING = """
import os, sys, time
if os.fork() == 0:
    {orphan}
    time.sleep(1.1)
    os._exit(0)
time.sleep(2.6)
"""


@pytest.mark.parametrize(
    ("title", "orphan"),
    [
        ("ray::TaskRunnerV1.run", ""),
        ("ray::vLLMHttpServer", ""),
        ("/ray/raylet --x", ""),
        ("/ray/raylet --x", "os.fork() and os._exit(0)"),
    ],
)
def test_the_end_of_a_fork_is_no_death(tmp_path, monkeypatch, title, orphan):
    from medr1_verl import supervise as module

    (tmp_path / "forking.py").write_text(FORKING.format(orphan=orphan))
    start = f"exec -a '{title}' {sys.executable} {tmp_path / 'forking.py'}"
    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(module, "_LOOK_EVERY_SECONDS", 0.0)
    code = f"import subprocess; subprocess.Popen(['bash', '-c', {start!r}]).wait()"
    outcome = module.supervise([sys.executable, "-c", code], tmp_path / "run")
    assert outcome.cause is None
    assert outcome.seconds > 2.5, "the forks ended while the run went on"


def test_an_interrupt_ends_everything(tmp_path):
    command = [sys.executable, "-m", "medr1_verl.supervise", "--run-dir", str(tmp_path), "--"]
    running = subprocess.Popen([*command, sys.executable, "-c", WITH_ORPHAN], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while len(processes.marked(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(2)
    _, error = running.communicate(timeout=40)
    assert running.returncode == 130
    assert "interrupted" in error
    assert processes.marked(tmp_path) == []


# --- summary ----------------------------------------------------------------------------------------------


def predictions(path: Path, hits: dict[tuple[str, str], list[int]]) -> Path:
    with open(path, "w") as file:
        for (control, decoding), accs in hits.items():
            for i, acc in enumerate(accs):
                record = {"question_id": str(i), "control": control, "decoding": decoding, "acc": acc, "format": 1}
                record |= {"modality": "ct" if i % 2 else "mri", "question_type": "lesion_grading", "n_options": 4}
                file.write(json.dumps(record | {"output": "line\u2028separator"}, ensure_ascii=False) + "\n")
    return path


def test_summary_reads_every_figure_and_leaves_the_unmeasured_null(tmp_path):
    lines = [{"step": 0, "data": {"val": 1}}]
    lines += [{"step": s, "data": {summary.REWARD: s / 10, guards.PEARSON: 1 - s / 1000}} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    supervision = {"seconds": 12.0, "peak_memory_gib": 3.0, "failed_groups": 0, "warnings": []}
    (tmp_path / "supervision.json").write_text(json.dumps(supervision))
    sampled = "T=1 n=1 seed=42"
    hits = {("none", "greedy"): [1, 1, 0, 1], ("blank", "greedy"): [0, 0, 0, 1], ("none", sampled): [1, 0, 1, 0]}
    predictions(tmp_path / "predictions.jsonl", hits)
    before = predictions(tmp_path / "before.jsonl", {("none", "greedy"): [1, 0, 0, 0]})
    result = summary.summarize(tmp_path, "tiny", 42, before)
    expected = {
        "steps": 3,
        "reward_first": 0.1,
        "reward_last": 0.3,
        "greedy_before": 0.25,
        "greedy_after": 0.75,
        "accuracy_before": None,
        "accuracy_after": 0.5,
        "blank_before": None,
        "blank_after": 0.25,
        "format_before": None,
        "format_after": 1.0,
        "pearson_min": 0.997,
        "failed_groups": 0,
        "peak_memory_gib": 3.0,
        "model": "tiny",
        "seed": 42,
    }
    assert {key: result[key] for key in expected} == expected
    assert result["accuracy_by_modality"] == {"ct": 1.0, "mri": 0.5}
    said = summary.table(result, tmp_path)
    assert "held out, 4 rows" in said
    assert "0.750" in said
    assert f"predictions    {tmp_path / 'predictions.jsonl'}" in said
    (tmp_path / "predictions.jsonl").unlink()
    said = summary.table(summary.summarize(tmp_path, "tiny", 42, None), tmp_path)
    assert "not evaluated" in said
    assert "greedy" not in said
    assert "predictions" not in said


def test_a_run_without_a_step_has_no_summary(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no training step"):
        summary.summarize(tmp_path, "m", 1, None)
