"""GPU, driver, memory, disk, limits of the system, and what earlier runs left behind."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
from pathlib import Path

from medr1_verl import memory, preflight, processes, versions
from medr1_verl.doctor.machine import GIB, NETWORK_SECONDS, Check, Machine

_OPEN_FILES = 4096  # below it Ray warns, and many workers run out of sockets


def check_gpu(machine: Machine) -> Check:
    if not machine.gpus:
        if machine.profile == "gpu":
            hint = "check the driver (nvidia-smi); without a GPU the same trainer runs on the CPU"
            return Check("fail", machine.gpu_fault or "no NVIDIA driver here", hint, "PROFILE=cpu")
        if machine.gpu_fault:
            return Check("warn", machine.gpu_fault, "the recipes take the CPU profile; check the driver", "nvidia-smi")
        return Check("skip", "none: the CPU profile, a tiny model with the real trainer and engine")
    first = machine.gpus[0]
    text = f"{len(machine.gpus)} x {first.name}, {min(g.total_gib for g in machine.gpus):.1f} GiB"
    if machine.profile == "cpu":
        return Check("skip", f"{text}, not used with PROFILE=cpu")
    wanted = machine.count("N_GPUS", len(machine.gpus))
    if machine.count("NNODES", 1) == 1 and wanted > len(machine.gpus):
        return Check("fail", f"N_GPUS={wanted}, here: {text}", "lower it", f"N_GPUS={len(machine.gpus)}")
    visible = machine.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and len([d for d in visible.split(",") if d.strip()]) < wanted:
        listed = len([d for d in visible.split(",") if d.strip()])
        hint = "CUDA hides the others from the run"
        return Check("fail", f"CUDA_VISIBLE_DEVICES={visible} but N_GPUS={wanted}", hint, f"N_GPUS={listed}")
    if first.capability < 8.0:
        return Check("fail", f"{text}: compute capability {first.capability}", "bf16 needs 8.0 (A100) or later")
    busy = max(gpu.used_gib for gpu in machine.gpus)
    if busy > 1.5:
        hint = "end the programs that nvidia-smi shows: vLLM wants its share free when it starts"
        return Check("warn", f"{text}, {busy:.1f} GiB in use", hint, "nvidia-smi")
    return Check("ok", text)


def check_driver(machine: Machine) -> Check:
    """Whether the driver can run the CUDA release of torch: the installed one, or the one that would be installed."""
    if machine.profile == "cpu" or not machine.gpus:
        return Check("skip", "")
    cuda, driver = versions.torch_cuda(), machine.gpus[0].driver
    whose = "the installed torch" if cuda else "torch of the GPU extra"
    cuda = cuda or versions.TORCH_CUDA
    oldest = versions.OLDEST_DRIVER.get(cuda)
    major = int(driver.split(".")[0]) if driver.split(".")[0].isdigit() else 0
    if oldest is None or not major:
        return Check("warn", f"driver {driver}; {whose} is built for CUDA {cuda}", "not known to fit")
    if major < oldest:
        hint = f"update the driver to {oldest} or later, or install NVIDIA's forward compatibility package"
        return Check("fail", f"driver {driver} is too old for CUDA {cuda} of {whose}", hint)
    return Check("ok", f"driver {driver} runs CUDA {cuda} of {whose}")


def check_fit(machine: Machine) -> Check:
    """Whether the run fits in GPU memory, by the calculation of ``medr1_verl.memory``."""
    if machine.profile == "cpu" or not machine.gpus:
        return Check("skip", "")
    if machine.embedded:
        return Check("ok", "the embedded tiny model fits everywhere")
    shape = machine.shape()
    if shape is None:
        return Check("skip", f"{machine.model}: no configuration of a Qwen-VL model here, so its size is not known")
    plan = machine.plan()
    if plan is None:
        return Check("skip", "nvidia-smi does not say how much memory this GPU has")
    need = memory.need(shape, plan)
    of = f"of {plan.gpu_gib:.0f} GiB (calculated)"
    name = Path(machine.model).name
    if not need.fits:
        # The calculation is no measurement: what it finds a little too large may fit.
        clear = max(need.training, need.rollout) > 1.1 * need.capacity or need.engine_least > need.engine
        text = f"{name} on {plan.gpus}: {need.faults[0]} {of}"
        return Check("fail" if clear else "warn", text, *_what_fits(shape, plan))
    text = f"{name} on {plan.gpus}: training peaks at {need.training:.0f}, sampling at {need.rollout:.0f} {of}"
    return Check("ok", f"{text}; {need.answers_at_once} answers at once")


def _what_fits(shape: memory.Shape, plan: memory.Plan) -> tuple[str, str]:
    here, more = memory.first_fit(shape, plan), memory.first_fit(shape, plan, more_gpus=True)
    if here is not None:
        words = "with LoRA" if here.lora_rank > plan.lora_rank else "on these GPUs"
        return f"this fits {words}", " ".join(memory.settings(here, plan))
    if more is not None:
        return "not on these GPUs; on more of them it does", " ".join(memory.settings(more, plan))
    return "no setting makes it fit on GPUs of this size; take a smaller model", "MODEL_PATH=Qwen/Qwen2-VL-2B-Instruct"


def check_memory(machine: Machine) -> Check:
    free = preflight.available_memory() / GIB
    if machine.profile == "cpu":
        least = float(preflight.CPU_MEMORY_GIB)
        what = "the CPU run"
    else:
        shape, plan = machine.shape(), machine.plan()
        if shape is None or plan is None:
            return Check("ok", f"{free:.0f} GiB free")
        least = memory.need(shape, plan).host
        what = "loading the model and the reference policy"
    if free < least:
        hint = "end other programs, or raise the container's memory limit"
        # Only the CPU figure is measured; the other is a calculation, so it warns.
        return Check(
            "fail" if machine.profile == "cpu" else "warn", f"{free:.1f} GiB free, {what} needs {least:.0f}", hint
        )
    return Check("ok", f"{free:.0f} GiB free, {what} needs {least:.0f}")


def check_shared_memory(machine: Machine) -> Check:
    folder = Path("/dev/shm")
    least = preflight.SHARED_MEMORY_GIB
    if not folder.is_dir():
        return Check("fail", "absent", "Ray and vLLM need it", "docker run --shm-size=8g ...")
    free = shutil.disk_usage(folder).free / GIB
    if free < least:
        hint = "in a container raise its limit; else free it or remount it larger"
        return Check("fail", f"{free:.1f} GiB free, {least} needed", hint, "docker run --shm-size=8g ...")
    return Check("ok", f"{free:.1f} GiB free")


def check_open_files(machine: Machine) -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES:
        return Check("ok", "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} allowed")
    if hard != resource.RLIM_INFINITY and hard < _OPEN_FILES:
        hint = f"the hard limit is {hard}; raise it for the user or the container"
        return Check("warn", f"{soft} allowed, Ray wants {_OPEN_FILES}", hint, "docker run --ulimit nofile=65536 ...")
    high = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    return Check(
        "warn", f"{soft} allowed, Ray wants {_OPEN_FILES}", "in the shell that starts the run", f"ulimit -n {high}"
    )


_RAY_DAEMON = re.compile(r"/(raylet|gcs_server)( |$)")


def check_ray(machine: Machine, temporary: Path = Path("/tmp/ray")) -> Check:
    """An existing cluster where ``RAY_ADDRESS`` names one; else leftovers that hold memory or mislead."""
    address = machine.get("RAY_ADDRESS")
    if address and address not in ("local", "auto"):
        return _check_cluster(address)
    sessions = len(list(temporary.glob("session_2*"))) if temporary.is_dir() else 0
    daemons = [pid for pid in processes.all_pids() if _RAY_DAEMON.search(processes.title(pid))]
    if daemons:
        return _living_cluster(daemons)
    if (temporary / "ray_current_cluster").is_file():
        hint = "harmless to the recipes, which start a cluster of their own; other programs would wait for it"
        return Check(
            "warn", "a dead cluster is still named as the current one", hint, f"rm {temporary}/ray_current_cluster"
        )
    return Check(
        "ok", "no cluster left over" + (f", {sessions} old session folders in {temporary}" if sessions else "")
    )


def _living_cluster(daemons: list[int]) -> Check:
    """Whose daemons these are: of a run that is on, of a killed run of the recipes, or of something else."""
    runs = {processes.run_of(pid) for pid in daemons}
    on = sorted(run for run in runs if run and processes.supervised(run))
    left = sorted(run for run in runs if run and run not in on)
    if left:
        hint = "the next start of that run ends what is left of it"
        return Check("warn", f"a killed run left its Ray cluster: {left[0]}", hint, f"RUN_NAME={Path(left[0]).name}")
    if None in runs:
        held = processes.memory_bytes(daemons) / GIB
        hint = "the recipes start a cluster of their own; if nothing of yours is on, this ends them all"
        return Check("warn", f"{len(daemons)} daemons of a Ray cluster are up ({held:.1f} GiB)", hint, "ray stop")
    return Check("ok", f"the cluster of a run that is on: {on[0]}")


def _check_cluster(address: str) -> Check:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    hint = "start it (ray start --head), or unset RAY_ADDRESS for a cluster of the run's own"
    if not host or not port.isdigit():
        return Check("fail", f"RAY_ADDRESS={address} is not HOST:PORT", hint, "unset RAY_ADDRESS")
    try:
        with socket.create_connection((host, int(port)), timeout=NETWORK_SECONDS):
            return Check("ok", f"RAY_ADDRESS={address} answers")
    except (OSError, OverflowError) as error:
        return Check("fail", f"RAY_ADDRESS={address} does not answer ({error})", hint, "unset RAY_ADDRESS")


def check_disk(machine: Machine) -> Check:
    """Room for the checkpoints that are kept, the one being written, and the merged model."""
    folder = next(path for path in (machine.runs_dir, *machine.runs_dir.resolve().parents) if path.is_dir())
    if not os.access(folder, os.W_OK):
        return Check("fail", f"cannot write to {folder}", "set it to a folder that can be written", "RUNS_DIR=...")
    free = shutil.disk_usage(folder).free / GIB
    shape, keep = machine.shape(), machine.count("KEEP_CHECKPOINTS", 2)
    if shape is not None:
        # A checkpoint holds fp32 weights and both moments of Adam; the merged model is bf16.
        least = (12 * shape.parameters * (keep + 1) + 2 * shape.parameters) / GIB
        what = f"{keep} + 1 checkpoints and the merged model"
    else:
        least, what = (
            2.0,
            "checkpoints of the tiny model" if machine.embedded else "logs (the model's size is not known)",
        )
    if machine.model == "" and versions.installed("verl") is None:
        least += 5.0
        what += " and its environment"
    if free < least:
        hint = "keep fewer checkpoints, or put the runs elsewhere"
        text = f"{free:.0f} GiB free in {folder}, {what} take about {least:.0f}"
        return Check("fail" if free < least / 2 else "warn", text, hint, "KEEP_CHECKPOINTS=1 RUNS_DIR=...")
    return Check("ok", f"{free:.0f} GiB free, {what} take about {least:.0f}")
