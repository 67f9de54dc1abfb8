"""The parts of ``benchmarks/gpu_grpo.sh``: a model of random weights, memory over time, TRL's trainer, the report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from medr1_verl import memory, processes
from medr1_verl.guards import PEARSON
from medr1_verl.run_folder import read_metrics

GIB = 2**30
# verl's phases of a step that are shown, where it logs them.
PHASES = ("gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "update_weights", "save_checkpoint", "step")


def prompts_of(rows: Path, count: int | None = None) -> list[dict]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(rows)
    found: list[dict] = []
    for batch in file.iter_batches(batch_size=256):
        found += batch.to_pylist()
        if count is not None and len(found) >= count:
            break
    return found[:count]


def config_of(shape: str, tokenizer: Any) -> Any:
    """transformers' configuration of a published shape, for the special tokens of this tokenizer."""
    from transformers import AutoConfig

    published = dict(memory.PUBLISHED[shape])
    tied = published.get("tie_word_embeddings", False)
    text = published.pop("text_config", None) or {
        key: published.pop(key) for key in list(published) if key not in ("model_type", "vision_config")
    }
    token = tokenizer.convert_tokens_to_ids
    # Of half a head's rotary frequencies a quarter is for time and the rest for height and width, as published.
    half = (text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]) // 2
    rope = {"rope_type": "default", "rope_theta": 1e6}
    rope["mrope_section"] = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    ends = {"bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>")}
    return AutoConfig.for_model(
        published["model_type"],
        text_config=text | ends | {"rope_parameters": rope},
        vision_config=published["vision_config"],
        tie_word_embeddings=tied,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def make_model(args: argparse.Namespace) -> None:
    """A Qwen-VL of the published shape with random weights, and a small tokenizer that reads the rows."""
    import torch
    from transformers import AutoModelForImageTextToText

    from medr1_verl.embedded import tiny_model

    tokenizer = tiny_model.make_tokenizer(row["prompt"][0]["content"] for row in prompts_of(args.rows, 2000))
    if args.shape == "tiny":
        model = tiny_model.make_model(tokenizer, args.seed)
    else:
        torch.manual_seed(args.seed)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForImageTextToText.from_config(config_of(args.shape, tokenizer), dtype=torch.bfloat16)
        token = tokenizer.convert_tokens_to_ids
        model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]
        model.generation_config.pad_token_id = token("<|endoftext|>")
    partial = args.output.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tiny_model.make_processor(tokenizer).save_pretrained(partial)
    partial.rename(args.output)
    print(f"  {sum(p.numel() for p in model.parameters()) / 1e9:.3f} B parameters in {args.output}")


def gpu_memory() -> float:
    """GiB in use on the fullest GPU, 0 without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0.0
    asked = [tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    lines = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    return max((float(line) for line in lines if line.isdigit()), default=0.0) / 1024


class Watch(threading.Thread):
    """Peak memory of the GPU and of this process's children, every half second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gpu_gib = self.host_gib = 0.0
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.5):
            self.gpu_gib = max(self.gpu_gib, gpu_memory())
            family = [*processes.descendants(os.getpid()), os.getpid()]
            self.host_gib = max(self.host_gib, processes.memory_bytes(family) / GIB)

    def end(self) -> dict[str, float]:
        self._over.set()
        self.join()
        return {"gpu_gib": self.gpu_gib, "host_gib": self.host_gib}


def watch(args: argparse.Namespace) -> None:
    watching = Watch()
    watching.start()
    started = time.monotonic()
    args.output.unlink(missing_ok=True)
    try:
        done = subprocess.run(args.command[1:] if args.command[0] == "--" else args.command)
    finally:  # what was seen until an interrupt is worth keeping
        result = watching.end() | {"seconds": time.monotonic() - started}
        args.output.write_text(json.dumps(result) + "\n")
    sys.exit(done.returncode)


def train_with_trl(args: argparse.Namespace) -> None:
    """TRL's GRPOTrainer: transformers generates, one process, the reward of this project."""
    import io

    import torch
    import trl
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoProcessor, TrainerCallback

    from medr1_verl.reward import compute_score

    rows = prompts_of(args.rows, args.prompts * args.steps)

    def example(row: dict) -> dict:
        content = row["prompt"][0]["content"].replace("<image>", "")
        image = Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB")
        info = {"options": row["extra_info"]["options"], "style": row["extra_info"]["style"]}
        prompt = [{"role": "user", "content": content}]
        return {"prompt": prompt, "image": image, "gold": row["reward_model"]["ground_truth"], "info": json.dumps(info)}

    def reward(completions: list, gold: list[str], info: list[str], **_: object) -> list[float]:
        return [
            compute_score("omnimedvqa/x", completion[0]["content"], truth, json.loads(about))["score"]
            for completion, truth, about in zip(completions, gold, info, strict=True)
        ]

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

    on_gpu = torch.cuda.is_available()
    config = trl.GRPOConfig(
        output_dir=str(args.output.with_suffix("")),
        per_device_train_batch_size=args.prompts * args.answers,
        num_generations=args.answers,
        max_completion_length=args.max_response,
        max_steps=args.steps,
        learning_rate=args.lr,
        beta=args.kl,
        loss_type="grpo",
        temperature=1.0,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=on_gpu,
        seed=args.seed,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )
    processor = AutoProcessor.from_pretrained(args.model)
    processor.tokenizer.padding_side = "left"  # as Qwen2-VL's own; TRL asks for no side and fails on mixed lengths
    trainer = trl.GRPOTrainer(
        model=str(args.model),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([example(row) for row in rows]),
        processing_class=processor,
        callbacks=[Clock()],
    )
    watching = Watch()
    watching.start()
    trainer.train()
    used = watching.end()
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "completions/mean_length" in log]
    result = {"version": trl.__version__, "step_seconds": seconds, "answer_tokens": lengths} | used
    args.output.write_text(json.dumps(result) + "\n")


def median_after_first(values: list[float]) -> float | None:
    """The first step warms up."""
    return statistics.median(values[1:] or values) if values else None


def report(args: argparse.Namespace) -> None:
    """Print what was measured, and write it to ``result.json``."""
    metrics = {step: m for step, m in read_metrics(args.folder / "recipe").items() if "training/global_step" in m}
    used = json.loads((args.folder / "memory.json").read_text())

    def middle(key: str) -> float | None:
        return median_after_first([m[key] for m in metrics.values() if key in m])

    def peak(key: str) -> float | None:  # verl counts in GiB, whatever the key says
        return max((m[key] for m in metrics.values() if key in m), default=None)

    tool = shutil.which("nvidia-smi")
    names = subprocess.run([tool, "-L"], capture_output=True, text=True).stdout.splitlines() if tool else []
    result: dict = {
        "machine": names[0].split(" (UUID")[0] if names else f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "steps": len(metrics),
        "seconds": {phase: middle(f"timing_s/{phase}") for phase in PHASES},
        "tokens_per_second": middle("perf/throughput"),
        "answer_tokens": middle("response_length/mean"),
        "prompt_tokens": middle("prompt_length/mean"),
        "pearson_min": min((m[PEARSON] for m in metrics.values() if PEARSON in m), default=None),
        "peak_gpu_gib": used["gpu_gib"] or None,
        "actor_allocated_gib": peak("actor/perf/max_memory_allocated_gb"),
        "actor_reserved_gib": peak("actor/perf/max_memory_reserved_gb"),
        "peak_host_gib": used["host_gib"],
    }
    config = memory.config_of(str(args.model))
    if names and config is not None:
        from medr1_verl.doctor.machine import look

        plan = look(os.environ | {"DATA_DIR": "given", "MODEL_PATH": str(args.model)}).plan()
        if plan is not None:
            need = memory.need(memory.shape_of(config), plan)
            result["calculated_gib"] = {"training": need.training, "rollout": need.rollout}
    other = args.folder / "trl.json"
    if other.is_file():
        trl = json.loads(other.read_text())
        result["trl"] = {
            "version": trl["version"],
            "step_seconds": median_after_first(trl["step_seconds"]),
            "answer_tokens": median_after_first(trl["answer_tokens"]),
            "peak_gpu_gib": trl["gpu_gib"] or None,
        }
    (args.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")

    def show(value: float | None, unit: str) -> str:
        return "-" if value is None else f"{value:.2f} {unit}"

    print(f"{result['machine']}; {result['steps']} steps, medians without the first")
    for phase, seconds in result["seconds"].items():
        if seconds is not None:
            print(f"  {phase:18} {show(seconds, 's')}")
    print(f"  tokens a second    {show(result['tokens_per_second'], 'of each GPU, verl perf/throughput')}")
    print(f"  Pearson, least     {result['pearson_min']:.4f}" if result["pearson_min"] else "  Pearson            -")
    print(f"  peak GPU memory    {show(result['peak_gpu_gib'], 'GiB')} (nvidia-smi, everything on the fullest GPU)")
    print(f"  trainer, reserved  {show(result['actor_reserved_gib'], 'GiB')} (torch), of it in use at most", end=" ")
    print(show(result["actor_allocated_gib"], "GiB"))
    if "calculated_gib" in result:
        peaks = result["calculated_gib"]
        print(f"  calculated         {peaks['training']:.2f} GiB training, {peaks['rollout']:.2f} GiB sampling")
    if "trl" in result:
        trl = result["trl"]
        print(f"  TRL {trl['version']:14} {show(trl['step_seconds'], 's a step')}, {show(trl['peak_gpu_gib'], 'GiB')}")
    print(f"  all of it: {args.folder / 'result.json'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("model")
    command.set_defaults(call=make_model)
    command.add_argument(
        "--shape", required=True, choices=("tiny", *(name for name in memory.PUBLISHED if "/Qwen2" in name))
    )
    command.add_argument("--rows", type=Path, required=True)
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--seed", type=int, default=42)
    command = commands.add_parser("watch")
    command.set_defaults(call=watch)
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("command", nargs=argparse.REMAINDER)
    command = commands.add_parser("trl")
    command.set_defaults(call=train_with_trl)
    for name in ("--model", "--rows", "--output"):
        command.add_argument(name, type=Path, required=True)
    for name in ("--steps", "--prompts", "--answers", "--max-response", "--seed"):
        command.add_argument(name, type=int, required=True)
    for name in ("--kl", "--lr"):
        command.add_argument(name, type=float, required=True)
    command = commands.add_parser("report")
    command.set_defaults(call=report)
    command.add_argument("--folder", type=Path, required=True)
    command.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
