"""What the benchmarks of the embedded default share: how they start the recipe, and the line that names the machine."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = ["bash", str(ROOT / "recipes" / "run_medr1_grpo.sh")]


def environment(folder: Path, name: str, **settings: object) -> dict[str, str]:
    """Environment of a run called ``name`` that keeps what it makes in ``folder``, with variables of the recipe."""
    own = {
        "PROFILE": "cpu",
        "PYTHON": sys.executable,
        "RUNS_DIR": folder / "runs",
        "EMBEDDED_DIR": folder / "embedded",
        "RUN_NAME": name,
    }
    return os.environ | {key: str(value) for key, value in (own | settings).items()}


def machine() -> str:
    return f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, {platform.platform()}"
