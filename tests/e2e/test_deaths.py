"""kill -9 of what a run cannot do without: a named end within two minutes, nothing left, the same command goes on."""

from __future__ import annotations

import os
import signal
import time

import pytest

from medr1_verl import processes
from medr1_verl.run_folder import read_metrics, step_of, whole_checkpoint

pytestmark = pytest.mark.e2e

# What is killed: (part of its title, what the last line must name).
DEATHS = {
    "vLLM's engine": ("VLLM::EngineCore", "VLLM::EngineCore"),
    "a Ray worker": ("ray::WorkerDict", "WorkerDict"),
    "the driver": ("verl.trainer.main_ppo", "SIGKILL"),
}


def test_every_death_is_named_and_the_same_command_goes_on(prepared, waiting):
    run = prepared.run_dir("killed").resolve()
    settings = {"TOTAL_STEPS": "60", "SAVE_FREQ": "1", "VAL_SAMPLES": "8", "EVALUATE": "0"}

    def steps_of_this_start() -> int:
        """Steps since the last start: what earlier ones did is set aside under another name."""
        metrics = run / "metrics.jsonl"
        return metrics.read_text().count("training/global_step") if metrics.exists() else 0

    gone_on_from = None
    for victim, (title, named) in DEATHS.items():
        process = prepared.start("killed", **settings)
        # The file of an interrupted start lies there until the next one sets it aside.
        waiting(process, lambda: (run / "logs").is_dir() and not (run / "supervision.json").exists(), 120)
        waiting(process, lambda: steps_of_this_start() > 0, 400)
        pid = min(p for p in processes.marked(run) if title in processes.title(p))
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        output, _ = process.communicate(timeout=150)
        assert time.monotonic() - killed < 120, victim
        assert process.returncode == 1, victim
        failure = next(line for line in output.splitlines() if line.startswith("training failed: "))
        assert named in failure, victim
        assert processes.marked(run) == [], victim
        if gone_on_from is not None:
            assert f"going on from step {gone_on_from}" in output, victim
        gone_on_from = step_of(whole_checkpoint(run))

    process = prepared.start("killed", **settings)
    waiting(process, lambda: not (run / "supervision.json").exists(), 120)
    waiting(process, lambda: steps_of_this_start() > 0, 400)
    os.killpg(process.pid, signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        os.killpg(process.pid, signal.SIGTERM) if process.poll() is None else None
    assert f"going on from step {gone_on_from}" in output
    assert process.returncode == 130
    assert processes.marked(run) == []
    steps = [step for step in read_metrics(run) if step]
    assert steps == list(range(1, steps[-1] + 1)), "no step is missing over four starts"
