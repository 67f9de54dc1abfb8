"""Brings the CPU patches into every Python process of a CPU run.

This folder is on PYTHONPATH only where the CPU platform is switched on. It has to be done at
interpreter start-up: vLLM's engine core is spawned and imports vLLM before it loads any plugin.
"""

import os
import sys


def _run_the_sitecustomize_that_this_one_hides() -> None:
    import importlib.machinery
    import importlib.util

    if hasattr(sys, "_medr1_site"):  # two checkouts on one path would run each other for ever
        return
    setattr(sys, "_medr1_site", True)  # noqa: B010 - an attribute of our own
    here = os.path.dirname(os.path.abspath(__file__))
    others = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_run_the_sitecustomize_that_this_one_hides()

if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    try:
        from medr1_verl import garbage
        from medr1_verl.cpu import patches
    except ImportError:  # another Python, without this package: nothing to patch for
        pass
    else:
        garbage.pause()
        patches.install()
