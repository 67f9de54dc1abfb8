"""A run's processes import torch, transformers, vLLM and verl one after the other; here some of it happens meanwhile.

The trainer starts its worker, then vLLM's server, which starts the engine, each a process of its own that imports for
six to ten seconds on one core while the other core waits. Nothing else about these processes changes.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

SERVER = "verl.workers.rollout.vllm_rollout.vllm_async_server"
TRAINER = "verl.trainer.ppo.v1.trainer_base"
# What an engine for Qwen2-VL on a CPU imports, verl's extension of its worker included.
ENGINE = (
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.models.qwen2_vl",
    "verl.workers.rollout.vllm_rollout.utils",
)

_fork_server = False


def server_imported_meanwhile(module: Any) -> None:
    """The trainer waits for the worker to build the model, and only then imports vLLM for its server (verl 0.9.1,
    trainer/ppo/v1/trainer_base.py). Here it imports while it waits.
    """
    trainer = getattr(module, "PPOTrainer", None)
    if trainer is None or not hasattr(trainer, "_init_resource_pool_mgr"):
        return
    original = trainer._init_resource_pool_mgr

    @functools.wraps(original)
    def _init_resource_pool_mgr(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if self.config.actor_rollout_ref.rollout.name == "vllm":
            threading.Thread(target=_import_quietly, args=(SERVER,), daemon=True, name="medr1-import").start()
        return result

    trainer._init_resource_pool_mgr = _init_resource_pool_mgr


def _import_quietly(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception:  # whoever needs it imports it again, and tells
        sys.modules.pop(name, None)


def engine_imported_meanwhile(module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
    """The process of vLLM's server starts the engine when it has imported vLLM itself, and the engine imports it all
    again, because vLLM spawns it there (vllm 0.28, utils/system_utils.py). A fork server imports at the same time, from
    the first import of verl on, and the engine is its fork. It has one thread, so that nothing is lost in a fork.
    """
    global _fork_server
    if _of_server():
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(ENGINE))
        multiprocessing.forkserver.ensure_running()
        _fork_server = True
    execute(module)


def _of_server() -> bool:
    """Whether this process is the server's, by the name of its first task: all of a run's processes import verl."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    return context.worker.mode == ray.WORKER_MODE and "HttpServer" in (context.get_task_name() or "")


def engine_from_fork_server(module: Any) -> None:
    """Hand vLLM the fork server's context, in the process that has started one."""
    original = getattr(module, "get_mp_context", None)
    if original is None:
        return

    @functools.wraps(original)
    def get_mp_context() -> Any:
        spawning = original()  # sets what a process in a Ray actor needs
        return _ForkServerContext() if _fork_server else spawning

    module.get_mp_context = get_mp_context


class _ForkServerContext:
    """Processes by the fork server, with the environment of today and not of the fork server's start."""

    def __init__(self) -> None:
        self._context: Any = multiprocessing.get_context("forkserver")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def Process(
        self, target: Callable, name: str | None = None, args: tuple = (), kwargs: Any = None, **more: Any
    ) -> Any:
        own = (dict(os.environ), target, args, kwargs or {})
        return self._context.Process(target=_in_environment, name=name, args=own, **more)


def _in_environment(environment: dict[str, str], target: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    # Only what differs: setproctitle finds the place of a title by the environment, and loses it with an emptied one.
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
    target(*args, **kwargs)
