"""kill -9 of what a run cannot do without: a named end within two minutes, nothing left, the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

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


SETTINGS = {"TOTAL_STEPS": "60", "SAVE_FREQ": "1", "VAL_SAMPLES": "8", "EVALUATE": "0"}


def started(prepared, waiting, run: Path) -> subprocess.Popen:
    """The run, once it has done a step in this start."""
    metrics = run / "metrics.jsonl"
    process = prepared.start(run.name, **SETTINGS)
    # What the start before has left is set aside first.
    waiting(process, lambda: (run / "logs").is_dir() and not (run / "supervision.json").exists(), 120)
    waiting(process, lambda: metrics.exists() and "training/global_step" in metrics.read_text(), 540)
    return process


def die(prepared, waiting, run: Path, victim: str) -> str:
    """Start or go on, kill the victim; what the run printed."""
    title, named = DEATHS[victim]
    process = started(prepared, waiting, run)
    fork_servers = [p for p in processes.marked(run) if "multiprocessing.forkserver" in processes.title(p)]
    assert len(fork_servers) == 1, "the engine's, in the process of its server"
    os.kill(min(p for p in processes.marked(run) if title in processes.title(p)), signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=150)
    assert time.monotonic() - killed < 120
    assert process.returncode == 1
    assert named in next(line for line in output.splitlines() if line.startswith("training failed: "))
    assert processes.marked(run) == []
    return output


def interrupt(prepared, waiting, run: Path) -> str:
    """Go on, then Ctrl-C; what the run printed."""
    process = started(prepared, waiting, run)
    os.killpg(process.pid, signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        os.killpg(process.pid, signal.SIGTERM) if process.poll() is None else None
    assert process.returncode == 130
    assert processes.marked(run) == []
    return output


def test_every_death_is_named_and_the_same_command_goes_on(prepared, waiting):
    run = prepared.run_dir("killed").resolve()
    steps = []
    for victim in DEATHS:
        output = die(prepared, waiting, run, victim)
        assert not steps or f"going on from step {steps[-1]}" in output, victim
        steps.append(step_of(whole_checkpoint(run)))
    assert f"going on from step {steps[-1]}" in interrupt(prepared, waiting, run)
    done = [step for step in read_metrics(run) if step]
    assert done == list(range(1, done[-1] + 1)), "no step is missing over four starts"
