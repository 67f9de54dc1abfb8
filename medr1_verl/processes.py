"""The processes of a run: found through /proc, measured, and ended together.

Ray starts its daemons in sessions of their own, so a process group does not hold a run together. Two things do:
a subreaper, to which every orphaned descendant falls, and a mark in the environment that all of them inherit.
Linux only, as verl and vLLM are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

RUN_MARK = "MEDR1_RUN_DIR"

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans(adopt: bool = True) -> None:
    """Orphaned descendants of this process become its children instead of init's, or init's again."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def die_with_parent() -> None:
    """For ``preexec_fn``: this process gets SIGTERM when its parent is gone, even by kill -9."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _stat(pid: int) -> tuple[int, str] | None:
    """(parent pid, state) of a process, None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return int(parent), state


def parent(pid: int) -> int | None:
    """The parent's pid, None if the process is gone."""
    stat = _stat(pid)
    return None if stat is None else stat[0]


def all_pids() -> list[int]:
    """Every process that is listed in /proc."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def descendants(root: int) -> list[int]:
    """Pids of all living descendants of ``root`` (zombies left out), parents before children."""
    children: dict[int, list[int]] = {}
    for pid in all_pids():
        stat = _stat(pid)
        if stat is not None and stat[1] != "Z":
            children.setdefault(stat[0], []).append(pid)
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def marked(run_dir: Path) -> list[int]:
    """Pids of living processes that were started for the run in ``run_dir``, this one left out."""
    return [pid for pid in all_pids() if pid != os.getpid() and alive(pid) and run_of(pid) == str(run_dir)]


def run_of(pid: int) -> str | None:
    """Folder of the run that a process was started for, None for any other and for those that cannot be looked at."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    start = f"{RUN_MARK}=".encode()
    return next((os.fsdecode(line[len(start) :]) for line in environment if line.startswith(start)), None)


def supervised(run_dir: str) -> bool:
    """Whether a supervisor is watching over the run in this folder."""
    words = ("medr1_verl.supervise", Path(run_dir).name)
    return any(all(word in text for word in words) for text in map(title, all_pids()))


def title(pid: int) -> str:
    """What ``ps`` shows for a process, "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    stat = _stat(pid)
    return stat is not None and stat[1] != "Z"


def memory_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes together; a page shared by several counts once (proportional set size)."""
    total = 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


def end(pids: Iterable[int], patience: float = 10.0) -> list[int]:
    """SIGTERM, then SIGKILL after ``patience`` seconds. Returns the pids that were alive."""
    targets = [pid for pid in pids if alive(pid)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and any(map(alive, targets)):
            reap()
            time.sleep(0.1)
        if not any(map(alive, targets)):
            break
    return targets


def reap() -> None:
    """Collect the exit status of every dead child that nobody else waits for."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
