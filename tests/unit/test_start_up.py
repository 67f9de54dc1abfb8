"""What a CPU run does meanwhile: the engine is the fork of a server that has imported, in today's environment."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

from medr1_verl.cpu import start_up

SCRIPT = """
import os, subprocess, sys, types
from medr1_verl.cpu import start_up

start_up.ENGINE = ("json.tool",)  # stands for vLLM
worker = types.SimpleNamespace(mode=1)
context = types.SimpleNamespace(worker=worker, get_task_name=lambda: "{task}.__init__")
sys.modules["ray"] = types.SimpleNamespace(
    is_initialized=lambda: True, WORKER_MODE=1, get_runtime_context=lambda: context
)
executed = []
start_up.engine_imported_meanwhile(types.ModuleType("server"), executed.append)
module = types.SimpleNamespace(get_mp_context=lambda: "vLLM's own")
start_up.engine_from_fork_server(module)
context = module.get_mp_context()
print(len(executed), context if isinstance(context, str) else "fork server")
if not isinstance(context, str):
    os.environ["SET_AFTER_THE_START"] = "seen"
    show = ("import os; print(os.environ['SET_AFTER_THE_START'])",)
    engine = context.Process(target=exec, name="EngineCore", args=show)
    engine.start()
    engine.join(30)
    print(engine.name, engine.exitcode, context.get_start_method())
"""


def run(task: str) -> list[str]:
    code = SCRIPT.format(task=task)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


def test_the_engine_comes_from_the_fork_server_with_todays_environment():
    assert sorted(run("vLLMHttpServer")) == sorted(["1 fork server", "seen", "EngineCore 0 forkserver"])


def test_others_that_import_the_server_have_no_fork_server():
    assert run("WorkerDict") == ["1 vLLM's own"]


def test_the_trainer_imports_the_server_while_it_waits(monkeypatch):
    imported = []
    monkeypatch.setattr(start_up.importlib, "import_module", imported.append)
    started = []
    monkeypatch.setattr(
        start_up.threading,
        "Thread",
        lambda target, args, **_: SimpleNamespace(start=lambda: (started.append(args), target(*args))),
    )

    class PPOTrainer:
        def __init__(self, name):
            self.config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(name=name)))

        def _init_resource_pool_mgr(self):
            return "pools"

    start_up.server_imported_meanwhile(SimpleNamespace(PPOTrainer=PPOTrainer))
    assert PPOTrainer("sglang")._init_resource_pool_mgr() == "pools"
    assert not imported
    assert PPOTrainer("vllm")._init_resource_pool_mgr() == "pools"
    assert imported == [start_up.SERVER]
