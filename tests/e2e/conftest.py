"""What the runs of the recipe have in common: converted data, a tiny model, and how a run is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from medr1_verl import cpu

ROOT = Path(__file__).parents[2]
REAL_PACK = ROOT.parent / "shared" / "data" / "omnimedvqa_real"
RECIPE = ["bash", str(ROOT / "recipes" / "run_medr1_grpo.sh")]
SETTINGS = {
    "PROFILE": "cpu",
    "TRAIN_BATCH_SIZE": "8",
    "ROLLOUT_N": "4",
    "LR": "3e-4",
    "MAX_PROMPT_LENGTH": "512",
    "MAX_RESPONSE_LENGTH": "48",
    "TOTAL_STEPS": "4",
    "SAVE_FREQ": "2",
    "TEST_FREQ": "-1",
    "VAL_SAMPLES": "-1",
    "SEED": "7",
}


@dataclass(frozen=True)
class Job:
    """Data and model that runs are started with, and the folder that they are started in."""

    folder: Path
    data: Path
    model: Path
    real_images: bool
    settings: dict[str, str]

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(self, name: str, **changes: str) -> subprocess.Popen:
        """The recipe, its output in one pipe. In a session of its own, and open to Ctrl-C: a test that runs in the
        background would hand that down as ignored.
        """
        environment = os.environ | self.settings | {"PYTHON": sys.executable, "RUN_NAME": name}
        environment |= {
            "RUNS_DIR": str(self.folder / "runs"),
            "DATA_DIR": str(self.data),
            "MODEL_PATH": str(self.model),
        }
        return subprocess.Popen(
            RECIPE,
            env=environment | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def run(self, name: str, **changes: str) -> str:
        """A whole run; what it printed."""
        process = self.start(name, **changes)
        output, _ = process.communicate(timeout=1500)
        assert process.returncode == 0, output[-4000:]
        return output


def wait_for(process: subprocess.Popen, condition: Callable[[], bool], seconds: float) -> None:
    """Until the condition holds; where it does not, in time or at all, the test fails with what the run printed."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.5)
    if not condition():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"not within {seconds} s; exit code {process.returncode}: {output[-3000:]}")


def medr1(*arguments: str | Path, module: str = "medr1_verl.cli") -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | cpu.environ())
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Job:
    """Converted data, of real images where they are, and a tiny model that speaks the format sometimes."""
    pytest.importorskip("verl")
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("runs")
    raw = REAL_PACK
    if not raw.is_dir():
        raw = folder / "raw"
        medr1("--output", raw, "--seed", "1", "--images-per-modality", "6", module="medr1_verl.embedded.phantoms")
    data, model = folder / "data", folder / "model"
    medr1("convert", "--input", raw, "--output", data, "--image-size", "112", "--seed", "7")
    warm_up = ("--train", data / "train.parquet", "--output", model, "--seed", "7", "--clean", "40", "--noisy", "20")
    medr1(*warm_up, module="medr1_verl.embedded.tiny_model")
    return Job(folder, data, model, REAL_PACK.is_dir(), SETTINGS)


@pytest.fixture(scope="session")
def waiting() -> Callable[[subprocess.Popen, Callable[[], bool], float], None]:
    return wait_for
