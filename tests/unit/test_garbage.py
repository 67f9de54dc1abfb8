"""No collection while a process starts, none of what it started with afterwards."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import gc, os, time
from medr1_verl import garbage
{before}
garbage.pause(0.5)
print("collects", gc.isenabled())
garbage.pause(60)  # once is enough: the first pause ends on time
child = os.fork()
if child == 0:
    os._exit(0 if gc.isenabled() and gc.get_freeze_count() else 1)
print("fork", os.waitpid(child, 0)[1])
time.sleep(1)
print("collects", gc.isenabled(), gc.get_freeze_count() > 1000)
"""


def run(before: str = "") -> list[str]:
    code = SCRIPT.format(before=before)
    own = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}  # there, it has paused already
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.splitlines()


def test_a_pause_ends_by_itself_and_in_a_fork_at_once():
    assert run() == ["collects False", "fork 0", "collects True True"]


def test_whoever_switched_collection_off_keeps_it_off():
    assert run("gc.disable()") == ["collects False", "fork 256", "collects False False"]
