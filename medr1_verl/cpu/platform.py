"""verl's platform interface for the CPU (verl >= 0.9: ``verl.plugin.platform``)."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def _resident_bytes(*_: Any) -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def _peak_resident_bytes(*_: Any) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory_free_and_total(*_: Any) -> tuple[int, int]:
    page = resource.getpagesize()
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def _nothing(*_: Any, **__: Any) -> None:
    return None


# verl calls these on its device module and compares that module with ``torch.cpu`` by identity
# (utils/profiler/performance.py), so torch.cpu itself gets them: process memory stands for device memory.
_DEVICE_MODULE_CALLS = {
    "memory_allocated": _resident_bytes,
    "memory_reserved": _resident_bytes,
    "max_memory_allocated": _peak_resident_bytes,
    "max_memory_reserved": _peak_resident_bytes,
    "mem_get_info": _memory_free_and_total,
    "reset_peak_memory_stats": _nothing,
    "empty_cache": _nothing,
    "ipc_collect": _nothing,
    # A resumed run restores the device's generator without asking whether there is one (checkpoint_manager.py).
    "get_rng_state": torch.get_rng_state,
    "set_rng_state": torch.set_rng_state,
}


class PlatformCPU(PlatformBase):
    """One logical device per Ray "GPU"; collectives over gloo; weights travel through shared memory."""

    device_name = "cpu"
    vendor_name = "cpu"

    @property
    def device_module(self) -> ModuleType:
        for name, call in _DEVICE_MODULE_CALLS.items():
            if not hasattr(torch.cpu, name):
                setattr(torch.cpu, name, call)
        return torch.cpu

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # Never found by auto-detection: installing the plugin must not turn a GPU machine's
        # CPU-only Ray actors into a CPU platform. Only VERL_PLATFORM=cpu selects it.
        return False

    def current_device(self) -> Any:
        # A torch.device, not an index: verl passes it to Tensor.to(), and to(0) means cuda:0.
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        # verl's resource pools count Ray's "GPU" only, so the recipe declares logical ones (ray_init.num_gpus).
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None


def register() -> None:
    """Make ``VERL_PLATFORM=cpu`` known to verl."""
    if PlatformRegistry.get("cpu") is None:
        PlatformRegistry.register(platform="cpu")(PlatformCPU)
