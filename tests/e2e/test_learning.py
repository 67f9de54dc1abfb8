"""GRPO teaches, and only by its reward: two short runs from one model, one paid for right answers, one by a coin.

``benchmarks/learning.py`` asks for more, over three seeds; here are the first steps of the same recipe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl")
pytest.importorskip("vllm")

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "PROFILE": "cpu",
    "PYTHON": sys.executable,
    "SEED": "42",
    "TOTAL_STEPS": "18",
    "SAVE_FREQ": "18",
    "VAL_SAMPLES": "16",
    "EVAL_LIMIT": "512",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learning")


def run(folder: Path, reward: str) -> dict[str, Any]:
    """Summary of a run of the embedded default, cut short; the second finds the first's data and model."""
    environment = os.environ | SETTINGS
    environment |= {
        "REWARD": reward,
        "RUN_NAME": reward,
        "RUNS_DIR": str(folder),
        "EMBEDDED_DIR": str(folder / "model"),
    }
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / "run_medr1_grpo.sh")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads((folder / reward / "summary.json").read_text())


@pytest.fixture(scope="module")
def taught(folder: Path) -> dict[str, Any]:
    return run(folder, "verifiable")


@pytest.fixture(scope="module")
def tossed(folder: Path, taught: dict[str, Any]) -> dict[str, Any]:
    return run(folder, "random")


def test_what_is_paid_for_is_learnt(taught: dict[str, Any]) -> None:
    assert taught["accuracy_after"] - taught["accuracy_before"] > 0.08
    assert taught["greedy_after"] - taught["greedy_before"] > 0.1
    assert taught["format_after"] > 0.95
    assert taught["failed_groups"] == 0
    assert taught["pearson_min"] >= 0.99


def test_the_gain_comes_from_looking(taught: dict[str, Any]) -> None:
    """512 answers to blank images, at chance 1/3, are within 7 points of it 99.9 % of the time."""
    assert abs(taught["blank_before"] - taught["chance"]) < 0.07
    assert abs(taught["blank_after"] - taught["chance"]) < 0.07
    assert taught["greedy_after"] - taught["blank_after"] > 0.1


def test_a_coin_teaches_nothing(taught: dict[str, Any], tossed: dict[str, Any]) -> None:
    """The coin has no seed: noise alone moves the policy, mostly for the worse. The sampled accuracy starts below
    chance, because broken answers count as wrong, and a policy that breaks fewer drifts up to chance, but not beyond.
    """
    assert tossed["greedy_before"] == taught["greedy_before"]
    assert tossed["greedy_after"] - tossed["greedy_before"] < 0.07
    assert tossed["accuracy_after"] - tossed["accuracy_before"] < 0.15
    for after in (tossed["greedy_after"], tossed["accuracy_after"]):
        assert after < tossed["chance"] + 0.07, "99.9 % of the time, at chance"
    assert tossed["format_after"] < taught["format_after"] - 0.05
    paid = {name: s["accuracy_after"] + s["format_after"] for name, s in (("taught", taught), ("tossed", tossed))}
    assert paid["taught"] > paid["tossed"] + 0.1


def test_every_question_type_and_modality_is_asked(folder: Path, taught: dict[str, Any]) -> None:
    from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES

    assert set(taught["accuracy_by_modality"]) == set(MODALITIES)
    rows = [json.loads(line) for line in (folder / "verifiable" / "predictions.jsonl").read_text().splitlines()]
    assert {row["question_type"] for row in rows} == set(QUESTION_TYPES)
