"""vLLM's offline engine, asked exactly as verl asks it in training.

verl 0.9 splits the prompt at its ``<image>`` marks, brings every picture to the model's patch grid with
``qwen_vl_utils`` and applies the processor's chat template; so does this module. ``load_format`` stays vLLM's
own (the weights are read, never dummy ones).
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from medr1_verl.errors import UserError
from medr1_verl.evaluation.questions import Question
from medr1_verl.prompt import IMAGE_MARK


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn: greedy at temperature 0, else ``n`` samples a question, reproducible by ``seed``."""

    temperature: float = 0.0
    n: int = 1
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.n < 1:
            raise UserError(f"decoding {self}: temperature >= 0, 0 < top-p <= 1 and n >= 1 are needed")
        if self.temperature == 0 and self.n > 1:
            raise UserError(f"n={self.n} at temperature 0 gives {self.n} times the same answer; set a temperature")

    @property
    def name(self) -> str:
        """What the prediction file calls it: ``greedy``, or ``T=1 n=4 seed=0``."""
        if self.temperature == 0:
            return "greedy"
        top_p = "" if self.top_p == 1 else f" top_p={self.top_p:g}"
        return f"T={self.temperature:g}{top_p} n={self.n} seed={self.seed}"

    def seed_of(self, question_id: str) -> int:
        """Seed of one question's samples: its own, so that an interrupted run goes on as if it had not been."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{question_id}".encode()).digest()[:4], "big") >> 1


def split_content(content: str) -> list[dict[str, str]]:
    """A message's text as the chat template wants it: text parts and image parts in the order of the marks."""
    parts = [part for part in re.split(f"({IMAGE_MARK})", content) if part]
    return [{"type": "image"} if part == IMAGE_MARK else {"type": "text", "text": part} for part in parts]


class Output(NamedTuple):
    """One answer: its text (special tokens removed, as the reward sees it), its length in tokens (None where a server
    did not say), and 1 where it was cut off at the limit.
    """

    text: str
    tokens: int | None
    truncated: int


def prompt(processor: Any, question: Question) -> dict[str, Any]:
    """What the engine is given: the chat-templated text, and the pictures on the model's patch grid.

    ``processor`` is the model's, from transformers.
    """
    messages: list[dict[str, Any]] = [dict(message) for message in question.messages]
    for message in messages:
        if IMAGE_MARK in message["content"]:
            message["content"] = split_content(message["content"])
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pictures = question.load_images()
    if not pictures:
        return {"prompt": text}
    from qwen_vl_utils import fetch_image

    patch_size = getattr(processor.image_processor, "patch_size", 14)
    images = [fetch_image({"image": picture}, image_patch_size=patch_size) for picture in pictures]
    return {"prompt": text, "multi_modal_data": {"image": images}}


@dataclass(frozen=True)
class EngineOptions:
    """What a machine may need set; None leaves vLLM's (or this project's) own choice."""

    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    enforce_eager: bool | None = None


class OfflineEngine:
    """One vLLM engine in this process; started once for any number of passes."""

    def __init__(self, model: str, options: EngineOptions | None = None, max_images: int = 1, log: Path | None = None):
        """Load ``model``, a directory or a hub id; whatever is wrong with it is one line, a :class:`UserError`."""
        check_model(model)
        options = options or EngineOptions()
        self._log = log
        on_cpu = _prepare_process(log)
        try:
            import vllm
            from transformers import AutoProcessor
            from transformers.utils import logging as transformers_logging
        except ImportError as error:
            raise UserError(
                f"vLLM cannot be imported here ({error}); install the extra gpu or cpu of medr1-verl, "
                "or ask a running server with --base-url"
            ) from error
        transformers_logging.set_verbosity_error()
        self._sampling_params = vllm.SamplingParams
        try:
            self._processor: Any = AutoProcessor.from_pretrained(model)
        except Exception as error:
            raise self._fault(f"the processor of {model} cannot be loaded", error) from error
        if not hasattr(self._processor, "image_processor"):
            raise UserError(f"{model}: its processor takes no images; a vision-language model is needed")
        context = options.max_model_len or _context_length(model, 4096)
        settings: dict[str, Any] = {
            "model": model,
            "tensor_parallel_size": options.tensor_parallel_size,
            "limit_mm_per_prompt": {"image": max(1, max_images), "video": 0},
            "max_model_len": context,
            # Prompts in one piece, as in training: with images there is little to gain from cutting them, and on a
            # CPU vLLM cannot take back a seeded draw for a half-read prompt ("CPU Generator does not use offset").
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(context, 8192),
            "dtype": options.dtype or ("float32" if on_cpu else "auto"),
            "enforce_eager": on_cpu if options.enforce_eager is None else options.enforce_eager,
            "seed": 0,
            "use_tqdm_on_load": False,
        }
        if options.gpu_memory_utilization is not None:
            settings["gpu_memory_utilization"] = options.gpu_memory_utilization
        self.chunk = 64 if on_cpu else 1024
        try:
            self._llm: Any = vllm.LLM(**settings)
        except Exception as error:
            raise self._fault(f"vLLM could not start {model}", error) from error

    def ask(
        self, questions: Sequence[Question], decoding: Decoding, max_tokens: int
    ) -> Iterator[tuple[Question, list[Output]]]:
        """Each question with its ``decoding.n`` outputs, in order."""
        prompts = [prompt(self._processor, question) for question in questions]
        params = [
            self._sampling_params(
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                n=decoding.n,
                max_tokens=max_tokens,
                seed=None if decoding.temperature == 0 else decoding.seed_of(question.question_id),
            )
            for question in questions
        ]
        try:
            results = self._llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:
            raise self._fault("vLLM could not answer", error) from error
        for question, result in zip(questions, results, strict=True):
            yield (
                question,
                [Output(one.text, len(one.token_ids), int(one.finish_reason == "length")) for one in result.outputs],
            )

    def _fault(self, what: str, error: Exception) -> UserError:
        """One line for the screen; the traceback goes to the log file, for whoever has to dig."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        where = ""
        if self._log is not None:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write("".join(traceback.format_exception(error)))
            where = f" (details: {self._log})"
        return UserError(f"{what}: {lines[0][:300]}{where}")

    def finish(self) -> None:
        """Every answer is in: nobody needs the log any more."""
        if self._log is not None:
            self._log.unlink(missing_ok=True)


def _prepare_process(log: Path | None) -> bool:
    """Environment for vLLM, before it is imported; True where it runs on the CPU.

    vLLM's own messages go to ``log``, also those of its engine's process, unless the user set ``VLLM_LOGGING_LEVEL``.
    """
    from medr1_verl import cpu

    if "VLLM_LOGGING_LEVEL" not in os.environ and "VLLM_LOGGING_CONFIG_PATH" not in os.environ:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("", encoding="utf-8")
            os.environ["VLLM_LOGGING_CONFIG_PATH"] = _logging_config(log)
    on_cpu = cpu.enabled() or not _has_gpu()
    if on_cpu:
        cpu.activate()
        # One process fewer to start: on a CPU the engine's own process would only repeat all imports.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        atexit.register(_quiet_exit)
    return on_cpu


def _logging_config(log: Path) -> str:
    """Path of a file that tells vLLM, in every process of its, to append its messages to ``log``."""
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(levelname)s %(asctime)s %(name)s: %(message)s"}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(log.resolve()), "formatter": "line"}},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="medr1-vllm-log-", delete=False) as file:
        json.dump(config, file)
    atexit.register(Path(file.name).unlink, missing_ok=True)
    return file.name


def _quiet_exit() -> None:
    """With the engine in this process, triton's bindings list hundreds of "leaked" names while Python shuts down,
    after everything that anybody should read has been written.
    """
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "torch and vLLM are not installed; install the extra gpu or cpu of medr1-verl, "
            "or ask a running server with --base-url"
        ) from error
    return torch.cuda.is_available() or (hasattr(torch, "npu") and torch.npu.is_available())


def _context_length(model: str, at_most: int) -> int:
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(model).get_text_config()
    return min(at_most, getattr(text, "max_position_embeddings", at_most))


def check_model(model: str) -> None:
    """Raise :class:`UserError` where ``model`` is a directory that no engine could load, saying what it lacks."""
    path = Path(model)
    if not path.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            return  # a hub id: transformers and vLLM find it, or say that they cannot
        raise UserError(f"{model}: no such model directory (and no hub id of the form owner/name)")
    if not path.is_dir():
        raise UserError(f"{model}: is a file; give the directory of a Hugging Face model")
    names = {file.name for file in path.iterdir()}
    if any(name.startswith("model_world_size_") for name in names):
        raise UserError(
            f"{model}: is a sharded training checkpoint; merge it first: "
            "python -m verl.model_merger merge --backend fsdp --local_dir DIR --target_dir OUT"
        )
    if "config.json" not in names:
        raise UserError(f"{model}: has no config.json; give the directory of a Hugging Face model")
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise UserError(f"{model}: has no weights (*.safetensors); was the merge or the download interrupted?")
    if not names & {"preprocessor_config.json", "processor_config.json"}:
        raise UserError(
            f"{model}: has no processor (preprocessor_config.json or processor_config.json); "
            "copy the base model's processor and tokenizer files beside the weights"
        )
    if not names & {"tokenizer.json", "tokenizer_config.json", "vocab.json"}:
        raise UserError(f"{model}: has no tokenizer; copy the base model's tokenizer files beside the weights")


def weights_digest(model: str) -> str:
    """Twelve hex digits that change when the weights do, in well under a second; "" for a hub id.

    Hashes config.json, and of every weight file its name, its size and a mebibyte at its start, middle and end.
    """
    path = Path(model)
    if not path.is_dir():
        return ""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with open(file, "rb") as stream:
            for start in (0, size // 2, max(0, size - 2**20)):
                stream.seek(start)
                digest.update(stream.read(2**20))
    return digest.hexdigest()[:12]
