"""Fixtures for all tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from medr1_verl import cpu


@pytest.fixture
def shared_dir() -> Path:
    """The folder ``shared`` beside the repository, with data that the project does not ship."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no test data: {folder} is absent")
    return folder


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU, heavy tests need the CPU platform before anything imports torchvision or vLLM."""
    if shutil.which("nvidia-smi") is None:
        cpu.activate()
