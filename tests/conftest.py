"""Fixtures for all tests."""

from __future__ import annotations

import shutil
import socket
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medr1_verl import cpu

CHROMIUM_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,1000"
)


@pytest.fixture
def shared_dir() -> Path:
    """The folder ``shared`` beside the repository, with data that the project does not ship."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no test data: {folder} is absent")
    return folder


PRIVATE = {
    "LOGNAME": "login-of-a-person",
    "USER": "login-of-a-person",
    "HOSTNAME": "host-in-radiology",
    "HOME": "/home/somebody",
    "OPENAI_API_KEY": "key-of-the-environment",
    "HF_TOKEN": "key-of-the-environment",
    "SLURM_JOB_NODELIST": "value-of-the-environment",
}


@pytest.fixture
def nothing_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Sets an environment that gives a person, a host and keys away; the function that it returns fails for files that
    hold any of these, a path of this machine, its name, or one of ``more``. Zip files are looked into.
    """
    # A short host name may be part of any word; the one that is set below is not.
    host = socket.gethostname()
    machine = (host if len(host) > 5 else "", str(Path.home()), str(tmp_path), str(tmp_path.parent))
    for name, value in PRIVATE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: PRIVATE["HOSTNAME"])

    def check(*files: Path, more: Iterable[str] = ()) -> None:
        words = {word for word in (*machine, *PRIVATE.values(), "somebody", *more) if word}
        for file in files:
            contents = {file.name: file.read_bytes()}
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    contents = {name: archive.read(name) for name in archive.namelist()}
            for name, content in contents.items():
                assert content, name
                for word in words:
                    assert word.encode() not in content, (name, word)

    return check


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium, driven by Selenium; its console is kept for ``get_log("browser")``."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in [*CHROMIUM_FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU, heavy tests need the CPU platform before anything imports torchvision or vLLM."""
    if shutil.which("nvidia-smi") is None:
        cpu.activate()
