"""Refusals before a run: lengths, images and LoRA against what model, engine and memory can take."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medr1_verl import image_tokens, memory, preflight
from medr1_verl.errors import UserError
from medr1_verl.image_tokens import Grid

QWEN = "Qwen/Qwen2-VL-2B-Instruct"  # made for 32,768 positions


def refusal(function, *arguments) -> str | None:
    """The one line of the refusal, None where there is none."""
    try:
        function(*arguments)
    except UserError as error:
        said = str(error)
    else:
        return None
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("prompt", "response", "tokens", "model", "named"),
    [
        (1024, 256, 10240, QWEN, None),
        (1024, 256, 1280, QWEN, None),
        (32512, 256, None, QWEN, None),
        (32513, 256, None, QWEN, "was made for 32768; MAX_PROMPT_LENGTH=32512 works"),
        (1024, 40000, None, QWEN, "MAX_RESPONSE_LENGTH=16384 works"),
        (1024, 256, 1279, QWEN, "TOKENS_PER_GPU=1279 cannot hold one answer"),
        (1024, 256, 1279, QWEN, "TOKENS_PER_GPU=1280 works"),
        (10**6, 256, None, "someone/unknown", None),
    ],
)
def test_lengths(prompt, response, tokens, model, named):
    said = refusal(preflight.check_lengths, prompt, response, tokens, model)
    assert said is None if named is None else named in said


@pytest.mark.parametrize("layout", ["as published", "as transformers 5 saves it"])
def test_the_models_own_length_is_read(tmp_path, layout):
    keys = {"max_position_embeddings": 512}
    config = keys if layout == "as published" else {"text_config": keys}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert refusal(preflight.check_lengths, 300, 212, None, str(tmp_path)) is None
    assert "MAX_PROMPT_LENGTH=299 works" in refusal(preflight.check_lengths, 300, 213, None, str(tmp_path))


@pytest.mark.parametrize(
    ("rank", "train_vision", "named"),
    [
        (0, True, None),
        (0, False, None),
        (32, False, None),
        (32, True, "LORA_RANK=32 with TRAIN_VISION=1"),
        (512, False, None),
        (513, False, "LORA_RANK=512 works"),
    ],
)
def test_lora(rank, train_vision, named):
    said = refusal(preflight.check_lora, rank, train_vision)
    assert said is None if named is None else named in said


@pytest.mark.parametrize(
    ("tensor_parallel", "gpus", "model", "named"),
    [
        (1, 3, QWEN, None),
        (2, 8, QWEN, None),
        (2, 3, QWEN, "ROLLOUT_TP=2 does not divide the 3 GPUs; ROLLOUT_TP=1 works"),
        (4, 6, QWEN, "ROLLOUT_TP=2 works"),
        (8, 8, QWEN, "does not divide the 12 attention heads of Qwen/Qwen2-VL-2B-Instruct; ROLLOUT_TP=4 works"),
        (8, 8, "someone/unknown", None),
    ],
)
def test_parallel(tensor_parallel, gpus, model, named):
    said = refusal(preflight.check_parallel, tensor_parallel, gpus, model)
    assert said is None if named is None else named in said


# --- images -----------------------------------------------------------------------------------------------

SIZES = [(384, 384, 196), (28, 28, 4), (112, 112, 16), (10, 10, 4), (640, 480, 391), (2800, 28, 100), (399, 385, 196)]


@pytest.mark.parametrize(("width", "height", "tokens"), SIZES)
def test_visual_tokens(width, height, tokens):
    assert Grid().tokens(width, height) == tokens


@pytest.mark.heavy
@pytest.mark.parametrize("least", [3136, 50176])
@pytest.mark.parametrize("most", [401408, 12845056])
def test_visual_tokens_are_those_of_the_processor(least, most):
    """Against smart_resize of qwen-vl-utils, then of transformers, as verl calls them."""
    pytest.importorskip("torch")
    import random

    first = pytest.importorskip("qwen_vl_utils.vision_process").smart_resize
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl")
    second, random_sides = module.smart_resize, random.Random(1)
    grid = Grid(least=least, most=most)
    sizes = [(random_sides.randint(20, 3000), random_sides.randint(20, 3000)) for _ in range(500)]
    for width, height in [*((w, h) for w, h, _ in SIZES), *sizes]:
        if max(width, height) / min(width, height) > 190:
            continue
        rows, columns = first(height, width, 28)
        rows, columns = second(rows, columns, factor=28, min_pixels=least, max_pixels=most)
        assert grid.tokens(width, height) == rows * columns // 784, (width, height)


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, images: list[dict], words: int = 10, group: int = 4) -> Path:
    text = "<image>" + "word " * words
    rows = [{"images": [image], "prompt": [{"role": "user", "content": text}]} for image in images]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def test_the_longest_row_is_found(tmp_path):
    images = [{"bytes": picture(56, 56)}] * 9
    images[5] = {"bytes": picture(640, 480)}
    row = image_tokens.longest_row(parquet(tmp_path / "t.parquet", images), Grid())
    assert (row.number, row.visual, row.words, row.size) == (5, 391, 10, "640 x 480")


def test_stored_by_path_with_limits_of_the_row(tmp_path):
    (tmp_path / "big.png").write_bytes(picture(1000, 1000))
    image = {"image": f"file://{tmp_path / 'big.png'}", "max_pixels": 401408}
    row = image_tokens.longest_row(parquet(tmp_path / "t.parquet", [image]), Grid())
    assert row.visual == 484  # 616 x 616


def test_what_cannot_be_read_counts_as_nothing(tmp_path):
    images = [{"bytes": b"no picture"}, {"bytes": b""}]
    assert image_tokens.longest_row(parquet(tmp_path / "t.parquet", images), Grid()) is None


def test_a_large_file_is_sampled_evenly(tmp_path):
    file = parquet(tmp_path / "t.parquet", [{"bytes": picture(28, 28)}] * 1000, group=50)
    numbers = [number for number, _ in image_tokens._spread(file, 100)]
    assert 80 <= len(numbers) <= 120
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 900


@pytest.mark.parametrize(
    ("side", "prompt", "named"),
    [
        (384, 1024, None),
        (384, 206, None),  # 196 + 10 words: possible, for all that is certain
        (384, 205, "needs more than 206 tokens: its image (384 x 384) is 196 of them; MAX_PROMPT_LENGTH=384 works"),
        (2000, 1024, "--image-size 812 when converting"),
    ],
)
def test_images(tmp_path, side, prompt, named):
    file = parquet(tmp_path / "t.parquet", [{"bytes": picture(side, side)}])
    said = refusal(preflight.check_images, file, prompt, QWEN)
    assert said is None if named is None else named in said
    if said and "--image-size" in said:
        size = int(said.split("--image-size ")[1].split()[0])
        smaller = parquet(tmp_path / "s.parquet", [{"bytes": picture(size, size)}])
        assert refusal(preflight.check_images, smaller, prompt, QWEN) is None, "the advice works"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, Grid()),
        ({"patch_size": 16, "merge_size": 2}, Grid(32, 4 * 1024, 16384 * 1024)),
        ({"min_pixels": 3136, "max_pixels": 401408}, Grid(28, 3136, 401408)),
        ({"size": {"shortest_edge": 3136, "longest_edge": 401408}}, Grid(28, 3136, 401408)),
        ({"size": None}, Grid()),
        ([], Grid()),
    ],
)
def test_the_processors_limits(tmp_path, config, expected):
    if config is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert image_tokens.grid_of(str(tmp_path)) == expected


def test_qwen3s_cells_are_taken_from_its_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(memory.PUBLISHED["Qwen/Qwen3-VL-2B-Instruct"]))
    file = parquet(tmp_path / "t.parquet", [{"bytes": picture(384, 384)}], words=0)
    assert "is 144 of them" in refusal(preflight.check_images, file, 100, str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--lora-rank", "32", "--train-vision", "1"], "LORA_RANK=32"),
        (["--max-prompt", "1024", "--max-response", "40000"], "was made for 32768"),
        (["--max-prompt", "100"], "MAX_PROMPT_LENGTH=100"),
        (["--lora-rank", "32", "--max-prompt", "1024", "--max-response", "256"], None),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, arguments, named):
    image = {"bytes": picture(384, 384)}
    row = {
        "data_source": "omnimedvqa/ct",
        "prompt": [{"role": "user", "content": "<image>What?"}],
        "images": [image],
        "reward_model": {"style": "rule", "ground_truth": "A"},
        "extra_info": {"index": 0, "options": ["a", "b"], "style": "think"},
    }
    file = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist([row] * 8), file)
    fixed = ["--profile", "gpu", "--run-dir", str(tmp_path / "run"), "--train", str(file), "--val", str(file)]
    fixed += ["--model", QWEN, "--train-batch", "4", "--mini-batch", "4", "--samples", "4", "--gpus", "1"]
    command = [sys.executable, "-m", "medr1_verl.preflight", *fixed, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert done.returncode == (0 if named is None else 2), done.stderr
    if named is not None:
        assert named in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
