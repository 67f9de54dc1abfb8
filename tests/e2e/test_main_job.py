"""The main job for real: raw images -> converter -> parquet -> verl's GRPO trainer and vLLM -> merged model -> answers.

One short run on the CPU, on the real images of ``../shared`` where they are, else on phantoms; every test looks at what
that run left. Minutes, not seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from medr1_verl import cpu, processes
from medr1_verl.audit.verify import verify
from medr1_verl.evaluation.predictions import read_rows
from medr1_verl.guards import PEARSON
from medr1_verl.run_folder import read_metrics, whole_checkpoint

pytestmark = pytest.mark.e2e

SUMMARY_KEYS = (
    *("steps", "seconds", "reward_first", "reward_last", "pearson_min", "failed_groups", "peak_memory_gib"),
    *("accuracy_before", "accuracy_after", "greedy_before", "greedy_after", "blank_before", "blank_after"),
    *("format_before", "format_after", "model", "seed"),
)


@dataclass(frozen=True)
class Done:
    """Where the run left what."""

    folder: Path
    data: Path
    model: Path
    run: Path
    rollout_weights: Path
    output: str
    steps: int
    real_images: bool
    max_tokens: int


@pytest.fixture(scope="session")
def job(prepared) -> Done:
    weights = prepared.folder / "rollout.safetensors"
    output = prepared.run("job", MEDR1_ROLLOUT_WEIGHTS=str(weights))
    numbers = {
        "steps": int(prepared.settings["TOTAL_STEPS"]),
        "max_tokens": int(prepared.settings["MAX_RESPONSE_LENGTH"]),
    }
    places = {"folder": prepared.folder, "data": prepared.data, "model": prepared.model, "run": prepared.run_dir("job")}
    return Done(**places, **numbers, rollout_weights=weights, output=output, real_images=prepared.real_images)


def predictions(job: Done) -> list[dict]:
    return list(read_rows(job.run / "predictions.jsonl"))


def test_the_manifest_adds_up(prepared):
    import pyarrow.parquet as pq

    manifest = json.loads((prepared.data / "manifest.json").read_text())
    written = {name: pq.read_metadata(prepared.data / f"{name}.parquet").num_rows for name in ("train", "test")}
    rejected = (prepared.data / "rejected.jsonl").read_text().count("\n")
    assert manifest["rows_in"] == sum(written.values()) + rejected
    if prepared.real_images:
        assert manifest["rows_in"] == 106


def test_every_step_trained_and_no_group_failed(job):
    metrics = read_metrics(job.run)
    assert sorted(step for step, m in metrics.items() if "actor/loss" in m) == list(range(1, job.steps + 1))
    assert json.loads((job.run / "summary.json").read_text())["failed_groups"] == 0
    assert "Error in _run_prompt" not in (job.run / "logs" / "train.log").read_text(errors="replace")


def test_rollout_and_actor_agree_at_every_step(job):
    pearson = [m[PEARSON] for m in read_metrics(job.run).values() if PEARSON in m]
    assert len(pearson) == job.steps
    assert min(pearson) >= 0.99


def test_reward_parts_are_logged_at_every_step(job):
    for step, metrics in read_metrics(job.run).items():
        if step:
            assert 0 <= metrics["reward/all/format"] <= 1
            assert metrics["reward/all/score"] == pytest.approx(metrics["critic/score/mean"], abs=1e-6)
            assert 0 <= metrics["reward/all/acc"] <= 1


def test_training_changed_the_parameters(job):
    from safetensors.torch import load_file

    before, after = load_file(job.model / "model.safetensors"), load_file(job.run / "model" / "model.safetensors")
    shared = before.keys() & after.keys()
    assert len(shared) >= 50
    changed = [name for name in shared if not before[name].bfloat16().equal(after[name].bfloat16())]
    assert len(changed) > 0.9 * len(shared), "vision tower and language model are both trained"
    assert any("visual" in name for name in changed)


def actor_as_model(job: Done) -> Path:
    """The actor's last checkpoint as a model folder in float32; verl's merger rounds to bfloat16."""
    import torch
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    shard = whole_checkpoint(job.run) / "actor" / "model_world_size_1_rank_0.pt"
    state = torch.load(shard, weights_only=False)
    state = {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in state.items()}
    model = Qwen2VLForConditionalGeneration.from_pretrained(job.run / "model", dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}, "tied to the embeddings"
    model.save_pretrained(job.folder / "actor")
    AutoProcessor.from_pretrained(job.run / "model").save_pretrained(job.folder / "actor")
    return job.folder / "actor"


def test_the_engine_ended_with_the_weights_of_the_actor(job):
    """What vLLM sampled from after the last sync, against the actor's checkpoint loaded into a fresh engine: equal."""
    code = f"""
from pathlib import Path
from vllm import LLM
from medr1_verl.rollout_weights import write_weights
if __name__ == "__main__":
    llm = LLM(model={str(actor_as_model(job))!r}, dtype="float32", enforce_eager=True, max_model_len=1024)
    llm.apply_model(lambda model: write_weights(model, Path({str(job.folder / "fresh.safetensors")!r})))
"""
    environment = os.environ | cpu.environ() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (job.folder / "fresh.safetensors").is_file(), done.stderr[-3000:]
    from safetensors.torch import load_file

    rollout, fresh = load_file(job.rollout_weights), load_file(job.folder / "fresh.safetensors")
    assert rollout.keys() == fresh.keys()
    different = [name for name in rollout if not rollout[name].equal(fresh[name])]
    assert different == []


def test_merging_only_rounds(job):
    """The merged model is the actor in bfloat16, every tensor."""
    from safetensors.torch import load_file

    actor = load_file(actor_as_model(job) / "model.safetensors")
    merged = load_file(job.run / "model" / "model.safetensors")
    assert actor.keys() == merged.keys()
    assert [name for name in actor if not actor[name].bfloat16().equal(merged[name].bfloat16())] == []


def test_the_merged_model_answers_in_transformers_as_in_vllm(job):
    """Greedy answers of plain transformers, from the parquet's own prompts and bytes, against predictions.jsonl."""
    import io

    import pyarrow.parquet as pq
    import torch
    from PIL import Image
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    rows = {r["extra_info"]["question_id"]: r for r in pq.read_table(job.data / "test.parquet").to_pylist()}
    answers = [a for a in predictions(job) if a["control"] == "none" and a["decoding"] == "greedy"][:12]
    processor = AutoProcessor.from_pretrained(job.run / "model")
    model = Qwen2VLForConditionalGeneration.from_pretrained(job.run / "model", dtype=torch.float32).eval()
    same = 0
    for answer in answers:
        row = rows[answer["question_id"]]
        text = row["prompt"][0]["content"].removeprefix("<image>")
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        picture = Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB")
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=job.max_tokens, do_sample=False)
        said = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        same += said == answer["output"]
    # Two engines add up floating-point numbers in different orders: a tie between two tokens may fall either way.
    assert same >= len(answers) - 1


def test_the_answers_depend_on_the_image(job):
    """Sampled with the same seeds, a blank image must give other answers; a blind engine gives the same ones."""
    greedy = [a for a in predictions(job) if a["decoding"] == "greedy"]
    shown = {a["question_id"]: a["output"] for a in greedy if a["control"] == "none"}
    blank = {a["question_id"]: a["output"] for a in greedy if a["control"] == "blank"}
    assert shown.keys() == blank.keys()
    assert any(shown[i] != blank[i] for i in shown)


def test_the_outputs_are_where_they_are_promised(job):
    summary = json.loads((job.run / "summary.json").read_text())
    assert [key for key in SUMMARY_KEYS if key not in summary] == []
    assert [key for key in SUMMARY_KEYS if summary[key] is None] == []
    assert summary["steps"] == job.steps
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "model/config.json",
        "predictions.jsonl",
        "audit.jsonl",
        "report.html",
    ):
        assert (job.run / name).exists(), name
    log = verify(job.run / "audit.jsonl")
    assert log.good
    assert log.answers == len(list(read_rows(job.run / "predictions.jsonl")))
    assert "Held-out accuracy" in job.output


def test_nothing_is_left_running(job):
    assert processes.marked(job.run) == []
