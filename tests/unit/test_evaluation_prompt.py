"""The evaluation asks exactly what verl's rollout asks: same text, same tokens, same pixels."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medr1_verl.evaluation.engine import prompt
from medr1_verl.evaluation.questions import read_questions
from medr1_verl.prompt import render_prompt
from medr1_verl.schema import arrow_schema, make_row


@pytest.fixture
def parquet(tmp_path):
    """Sizes on and off the grid of 28 pixels, one row with two images, one grey PNG."""
    rows = []
    for number, sizes in enumerate([[(112, 112)], [(100, 60)], [(384, 250), (30, 30)], [(57, 140)]]):
        images = []
        for width, height in sizes:
            picture = Image.linear_gradient("L").resize((width, height))
            stream = io.BytesIO()
            (picture if number == 3 else picture.convert("RGB").rotate(37)).save(stream, "PNG")
            images.append({"bytes": stream.getvalue()})
        options = ["one", "two (2)", "three, or so"]
        info = dict.fromkeys(arrow_schema().field("extra_info").type.names, "x") | {
            "index": number,
            "question_id": f"q{number}",
            "modality": "ct",
            "question": "Which?",
            "options": options,
            "answer": "B",
            "style": "think",
        }
        rows.append(
            make_row(images=images, prompt=render_prompt("Which?", options, n_images=len(images)), extra_info=info)
        )
    path = tmp_path / "test.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=arrow_schema()), path)
    return path


@pytest.mark.heavy
def test_same_as_the_rollout_of_verl(parquet):
    pytest.importorskip("verl")
    pytest.importorskip("vllm")
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from medr1_verl.embedded.tiny_model import make_processor, make_tokenizer

    questions = read_questions([parquet])
    processor = make_processor(make_tokenizer(question.messages[0]["content"] for question in questions))
    config = OmegaConf.create(
        {"prompt_key": "prompt", "image_key": "images", "max_prompt_length": 4096, "filter_overlong_prompts": False}
    )
    rows = RLHFDataset(str(parquet), processor.tokenizer, config, processor)
    for question, row in zip(questions, rows, strict=True):
        # What verl's agent loop does with a row: pictures from the messages, then the chat template.
        messages = row["raw_prompt"]
        images, _, _ = RLHFDataset._process_multi_modal_info(messages, processor.image_processor.patch_size, config)
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        own = prompt(processor, question)
        assert own["prompt"] == text
        pictures = own["multi_modal_data"]["image"]
        assert [picture.size for picture in pictures] == [image.size for image in images]
        assert [picture.tobytes() for picture in pictures] == [image.tobytes() for image in images]
        wanted = processor(text=[text], images=images, return_tensors="pt")
        given = processor(text=[own["prompt"]], images=pictures, return_tensors="pt")
        assert given["input_ids"].equal(wanted["input_ids"])
        assert given["pixel_values"].equal(wanted["pixel_values"])
