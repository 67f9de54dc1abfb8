"""verl's own trainer and the real vLLM engine on a machine without a GPU.

Everything that only the CPU needs is in this package, and nothing of it acts unless the platform is
"cpu" (``VERL_PLATFORM=cpu``, which the recipes export where there is no GPU):

* ``platform``  verl's description of the device (memory, process groups, Ray resource)
* ``patches``   what verl, vLLM and torchvision assume about CUDA, one function for each assumption
* ``site/``     a ``sitecustomize`` that brings the patches into every process of the run
* ``environ``   the environment variables that switch all of this on

On a CPU, nobody upstream runs ``main_ppo``; verl's platform plugin interface is what makes it possible.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SITE_DIR = Path(__file__).parent / "site"


def enabled() -> bool:
    """True where this process was told to run on the CPU platform."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def environ() -> dict[str, str]:
    """Environment of a process (and of all its children) on the CPU platform. User's own settings win."""
    paths = [str(SITE_DIR), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    wanted = {
        "VERL_PLATFORM": "cpu",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        # GiB that vLLM sets aside for its key-value cache; its own default is half of the machine.
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Ray gives an actor's process one OpenMP thread unless it is told otherwise.
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        # Trainer, engine and agent loops share the cores: a thread that spins while it waits takes one from the others.
        "OMP_WAIT_POLICY": "PASSIVE",
        # vLLM would bind its threads to cores of its own; here trainer and engine take turns on all of them.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # The engine in the process that asks for it, or in one of its own where verl serves it, but never in two: each
        # takes seconds to start, and every token would travel between them. vLLM wants two to bind threads to cores.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vLLM would compile two small functions of its sampler, in C++: 17 s, which a short run does not earn back.
        "TORCHDYNAMO_DISABLE": "1",
        # A warning about memory binding, from every process.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return wanted | {k: v for k, v in os.environ.items() if k in wanted and k not in ("PYTHONPATH", "VERL_PLATFORM")}


def activate() -> None:
    """Switch this process, and every process that it starts, to the CPU platform."""
    from medr1_verl.cpu import patches

    os.environ.update(environ())
    if str(SITE_DIR) not in sys.path:
        sys.path.insert(0, str(SITE_DIR))
    patches.install()
