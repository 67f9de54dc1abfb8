"""Run code around the import of a module that may not be imported yet.

Patching ``verl`` or ``vllm`` eagerly would import torch into every process of a run, and in vLLM's
engine core (spawned, and importing vLLM before any plugin) there is no moment of our own at all.
So the patches wait: an import hook calls each one right after its module was executed.
Standard library only, and cheap enough for interpreter start-up.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

After = Callable[[ModuleType], None]
Around = Callable[[ModuleType, Callable[[ModuleType], None]], None]

_after: dict[str, list[After]] = {}
_around: dict[str, Around] = {}
_searching = threading.local()


class _Finder:
    """A ``sys.meta_path`` entry that wraps ``exec_module`` of the modules somebody asked about."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _after and name not in _around:
            return None
        names = _searching.__dict__.setdefault("names", set())
        if name in names:  # our own find_spec call below: let the other finders answer it
            return None
        names.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            names.discard(name)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            around = _around.get(name)
            if around is None:
                execute(module)
            else:
                around(module, execute)
            for action in _after.get(name, ()):
                action(module)

        # On the instance, not in a wrapper class: everything else that is asked of the loader
        # (get_data, resource readers, isinstance checks) stays as it was.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _Finder()


def _ensure_installed() -> None:
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def after_import(name: str, action: After) -> None:
    """Call ``action(module)`` once ``name`` is imported: at once if it already is, else right after its execution."""
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        action(module)
        return
    _after.setdefault(name, []).append(action)
    _ensure_installed()


def around_import(name: str, wrapper: Around) -> None:
    """Execute ``name`` through ``wrapper(module, execute)``; no effect if it is imported already."""
    _around[name] = wrapper
    _ensure_installed()
