"""The tiny Qwen2-VL: a directory that the real classes load, built the same twice, that sees like the real tower."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy
pytest.importorskip("torch")
pytest.importorskip("transformers")

# In a process of its own: the CPU platform is switched on for good there, and torch's threads are set.
SCRIPT = """
import io, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
if not torch.cuda.is_available():
    from medr1_verl import cpu
    cpu.activate()
from PIL import Image
from medr1_verl.convert import Options, convert
from medr1_verl.embedded import inputs, phantoms, tiny_model, warm_start
from medr1_verl.embedded.inputs import chat, vary
from medr1_verl.embedded.plan import Plan
from medr1_verl.embedded.pretraining import look

root = Path(sys.argv[1])
phantoms.generate(root / "raw", images_per_modality=3, progress=False)
convert(Options(input=root / "raw", output=root / "data", image_size=112, test_fraction=0.34))
train = root / "data" / "train.parquet"
for name in ("a", "b"):
    tiny_model.build(train, root / name, Plan(5, 0, 0), cache=root / f"cache-{name}", progress=False)
files = sorted(p.name for p in (root / "a").iterdir())
assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(files), files
for name in files:
    assert (root / "a" / name).read_bytes() == (root / "b" / name).read_bytes(), name
print("same twice")

warm_start.warm_start = None  # a build from the cache must not train
tiny_model.build(train, root / "c", Plan(5, 0, 0), cache=root / "cache-a", progress=False)
assert (root / "c" / "model.safetensors").read_bytes() == (root / "a" / "model.safetensors").read_bytes()
print("from the cache")

from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(root / "a")
model = AutoModelForImageTextToText.from_pretrained(root / "a", dtype=torch.float32).eval()
assert type(model).__name__ == "Qwen2VLForConditionalGeneration" and type(processor).__name__ == "Qwen2VLProcessor"
assert 0.5e6 < model.num_parameters() < 2e6, model.num_parameters()
text = "Any text: Ünïcode, 日本, <think>\\n\\t</think>"
assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text

rows = inputs.read_rows(train)
row = rows[0]
picture = Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB")
prompt = processor.apply_chat_template(chat(row["prompt"]), add_generation_prompt=True, tokenize=False)
inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
assert out.shape[1] > inputs["input_ids"].shape[1]
print("generates")

# What the warm start is trained on is what verl's own data set makes of the same messages, every tensor.
from omegaconf import OmegaConf
import pyarrow, pyarrow.parquet
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from medr1_verl.embedded.lessons import Lessons
wanted = {"seed": 3, "steps": 2, "wrong": 0.5, "slip": 0.5, "lean": 2.0, "malformed": 0.5}
config = OmegaConf.create({"lessons": wanted, "pad_mode": "no_padding", "max_length": 4096})
ours = Lessons([str(train)], processor.tokenizer, config, processor)
assert len(ours) == 64
assert len({number for number, _ in ours._shown}) == min(64, len(rows))
messages = [
    [*rows[number]["prompt"], {"role": "assistant", "content": answer}] for number, answer in ours._shown[:20]
]
images = [rows[number]["images"] for number, _ in ours._shown[:20]]
pyarrow.parquet.write_table(pyarrow.table({"messages": messages, "images": images}), root / "sft.parquet")
theirs = MultiTurnSFTDataset([str(root / "sft.parquet")], processor.tokenizer, config, processor)
for place in range(20):
    number, answer = ours._shown[place]
    numbers = ours._pictures.of_row[number]
    still = ours._item(number, answer, [ours._pictures.patches[n] for n in numbers],
                       [ours._pictures.grids[n] for n in numbers])
    for key, value in theirs[place].items():
        pairs = value.items() if isinstance(value, dict) else [(key, value)]
        for name, tensor in pairs:
            own = still[key][name] if isinstance(value, dict) else still[key]
            assert torch.equal(own, tensor), (place, name)
moved = ours[0]["multi_modal_inputs"]["pixel_values"]
assert not torch.equal(moved, theirs[0]["multi_modal_inputs"]["pixel_values"])
print("same items")

# One batched pass over equal images is the tower's own.
with torch.no_grad():
    patches = torch.randn(2, 64, 1176)
    own = model.model.visual(patches.flatten(0, 1), grid_thw=torch.tensor([(1, 8, 8)] * 2)).pooler_output
    assert torch.allclose(look(model.model.visual, patches, (1, 8, 8)), own, atol=1e-4)
# Varying an image by nothing gives the image back; by anything keeps both frames equal.
real = torch.stack(ours._pictures.patches[:3])
torch_randint, torch_randn = torch.randint, torch.randn
torch.randint = lambda *a, **k: torch.zeros(2, 3, 1, dtype=torch.long)
torch.randn = lambda *a, **k: torch.zeros(2, 3, 1, 1, 1)
assert torch.equal(vary(real, (1, 8, 8), None), real)
torch.randint, torch.randn = torch_randint, torch_randn
varied = vary(real, (1, 8, 8), torch.Generator().manual_seed(0)).view(-1, 3, 2, 196)
assert torch.equal(varied[:, :, 0], varied[:, :, 1]) and varied.shape[0] == 3 * 64
print("sees alike")
"""


def test_built_saved_loaded_and_generating(tmp_path: Path) -> None:
    import medr1_verl

    package = Path(medr1_verl.__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line]
    for fact in ("same twice", "from the cache", "generates", "same items", "sees alike"):
        assert fact in said, done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "{tmp}/none.parquet", "--output", "{tmp}/m"], "no training file"),
        (["--train", "{tmp}/text.parquet", "--output", "{tmp}/m"], "not a readable parquet"),
        (["--train", "{tmp}/text.parquet", "--output", "{tmp}"], "not a model"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    from medr1_verl.embedded import tiny_model
    from medr1_verl.errors import UserError

    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=message):
        tiny_model.main([argument.format(tmp=tmp_path) for argument in arguments])
    assert not (tmp_path / "m").exists()
