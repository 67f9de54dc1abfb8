"""The best checkpoint: kept when verl removes it, never half, and none that was not saved and validated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from medr1_verl import best_checkpoint, merge, run_folder, summary
from medr1_verl.errors import UserError


def save(run_dir: Path, step: int, weights: str = "", torn: bool = False) -> Path:
    """What verl writes for one worker."""
    folder = run_dir / "checkpoints" / f"global_step_{step}"
    (folder / "actor" / "huggingface").mkdir(parents=True, exist_ok=True)
    for kind in ("model", "optim", "extra_state"):
        with zipfile.ZipFile(folder / "actor" / f"{kind}_world_size_1_rank_0.pt", "w") as archive:
            archive.writestr("data", weights or f"weights of step {step}")
    if torn:
        shard = folder / "actor" / "model_world_size_1_rank_0.pt"
        shard.write_bytes(shard.read_bytes()[:30])
    (folder / "actor" / "fsdp_config.json").write_text("{}")
    (folder / "actor" / "huggingface" / "config.json").write_text("{}")
    (folder / "data.pt").write_text("")
    (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


def weights_of(folder: Path) -> str:
    with zipfile.ZipFile(folder / "actor" / "model_world_size_1_rank_0.pt") as archive:
        return archive.read("data").decode()


def test_the_best_is_kept_when_verl_removes_it(tmp_path):
    run = tmp_path / "run"
    kept = []
    for step, accuracy in ((10, 0.4), (20, 0.7), (30, 0.7), (40, 0.6)):
        saved = save(run, step)
        kept.append(best_checkpoint.keep_if_best(run, step, accuracy))
        if step > 10:  # verl removes the actor of the one before the last
            shutil.rmtree(saved.with_name(f"global_step_{step - 10}") / "actor")
    assert kept == [True, True, False, False], "of two that are as good, the earlier"
    folder, best = best_checkpoint.best_of(run)
    assert (best.step, best.accuracy) == (20, 0.7)
    assert weights_of(folder) == "weights of step 20"
    assert sorted(p.name for p in (folder / "actor").iterdir()) == [
        "fsdp_config.json",
        "huggingface",
        "model_world_size_1_rank_0.pt",
    ], "the optimizer's state is not kept"
    assert len(list((run / "checkpoints").glob("best_step_*"))) == 1
    assert merge.checkpoint_to_merge(run, "best") == (folder, 20)
    assert merge.checkpoint_to_merge(run, "last")[1] == 40


@pytest.mark.parametrize("torn", [False, True])
def test_a_step_that_was_not_saved_whole_is_not_kept(tmp_path, torn):
    if torn:
        save(tmp_path, 5, torn=True)
    assert not best_checkpoint.keep_if_best(tmp_path, 5, 0.9)
    assert best_checkpoint.best_of(tmp_path) is None
    with pytest.raises(UserError, match=r"no best checkpoint in .*; MERGE=last"):
        merge.checkpoint_to_merge(tmp_path, "best")


@pytest.mark.parametrize("moment", ["rename", "symlink_to", "replace"])
def test_a_crash_while_a_new_best_is_made_leaves_the_one_before(tmp_path, monkeypatch, moment):
    save(tmp_path, 1)
    best_checkpoint.keep_if_best(tmp_path, 1, 0.1)
    save(tmp_path, 2)

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        owner = best_checkpoint.os if moment == "replace" else Path
        patched.setattr(owner, moment, crash)
        with pytest.raises(KeyboardInterrupt):
            best_checkpoint.keep_if_best(tmp_path, 2, 0.2)
    folder, best = best_checkpoint.best_of(tmp_path)
    assert (best.step, weights_of(folder)) == (1, "weights of step 1")
    assert best_checkpoint.keep_if_best(tmp_path, 2, 0.2), "the next attempt is not in its own way"
    folder, best = best_checkpoint.best_of(tmp_path)
    assert (best.step, weights_of(folder)) == (2, "weights of step 2")
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("best*")) == ["best", "best_step_2"]


def test_a_run_that_goes_on_does_not_write_into_the_best(tmp_path):
    """Steps after the checkpoint are done again, and verl overwrites their files where they lie."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    for step in (1, 2, 3, 4):
        save(run, step)
    best_checkpoint.keep_if_best(run, 4, 0.8)
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")  # 4 was not finished
    assert run_folder.open_run(run, "auto", 9, {}, keep=2) == "going on from step 3"
    assert sorted(p.name for p in (run / "checkpoints").glob("global_step_*")) == ["global_step_2", "global_step_3"]
    save(run, 4, weights="done again")
    folder, best = best_checkpoint.best_of(run)
    assert (best.step, weights_of(folder)) == (4, "weights of step 4")
    assert not best_checkpoint.keep_if_best(run, 4, 0.8)
    assert best_checkpoint.keep_if_best(run, 4, 0.9)
    assert weights_of(best_checkpoint.best_of(run)[0]) == "done again"


def test_where_there_are_no_hard_links_files_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not on this file system")

    monkeypatch.setattr(best_checkpoint.os, "link", refuse)
    save(tmp_path, 3)
    assert best_checkpoint.keep_if_best(tmp_path, 3, 0.5)
    assert weights_of(best_checkpoint.best_of(tmp_path)[0]) == "weights of step 3"


VALIDATED = """
import json, os
with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as file:
    for step, accuracy in ((0, 0.9), (1, 0.2), (2, 0.6), (3, 0.3)):
        data = {"training/global_step": step, "val-core/omnimedvqa/ct/acc/mean@1": accuracy}
        file.write(json.dumps({"step": step, "data": data}) + "\\n")
"""


def test_supervision_keeps_the_best_step_that_was_saved(tmp_path):
    save(tmp_path, 2)
    save(tmp_path, 3)
    command = [sys.executable, "-m", "medr1_verl.supervise", "--run-dir", str(tmp_path), "--"]
    done = subprocess.run([*command, sys.executable, "-c", VALIDATED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert best_checkpoint.best_of(tmp_path)[1] == best_checkpoint.Best(2, 0.6), "steps 0 and 1 were not saved"
    assert (
        "validation at step 2: accuracy 0.600 (mean of the modalities); the best checkpoint so far, kept" in done.stderr
    )
    assert json.loads((tmp_path / "supervision.json").read_text())["warnings"] == []
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "data": {summary.REWARD: 1.0}}) + "\n")
    figures = summary.summarize(tmp_path, "tiny", 1, None)
    assert (figures["best_step"], figures["best_accuracy"]) == (2, 0.6)
    assert "(step 2, validation accuracy 0.600)" in summary.table(figures, tmp_path)
