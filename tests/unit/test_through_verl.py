"""Reward, data set class and training metrics through verl's own code: its loader, its reward manager, its trainer."""

import asyncio
import concurrent.futures
import logging
import pickle
from types import SimpleNamespace

import pytest

from medr1_verl import config_check, parts, reward, training_metrics
from medr1_verl.cpu import patches
from medr1_verl.errors import UserError
from medr1_verl.import_hooks import around_import
from medr1_verl.prompt import render_prompt
from medr1_verl.reward import compute_score
from medr1_verl.schema import arrow_schema, make_row

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module", autouse=True)
def _verl():
    # transformers' Qwen2-VL processor needs torchvision, whose registry build fails to load beside a CPU torch.
    around_import("torchvision", patches.torchvision_without_its_operators)
    pytest.importorskip("verl")
    pytest.importorskip("transfer_queue")


def test_verls_trainer_still_needs_and_takes_the_wrap():
    import verl.trainer.ppo.v1.trainer_base as trainer_base

    before = trainer_base.PPOTrainer._compute_metrics
    try:
        training_metrics.install()
        assert trainer_base.PPOTrainer._compute_metrics is not before
        assert trainer_base.PPOTrainer._compute_metrics.__wrapped__ is before
    finally:
        trainer_base.PPOTrainer._compute_metrics = before


def test_step_metrics_of_a_batch_as_transfer_queue_hands_it_out():
    import torch
    from tensordict import TensorDict
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    texts = ["<think>a b</think><answer>A</answer>", "B"]
    sources = ["omnimedvqa/ct", "omnimedvqa/mri"]
    row = {"options": ["x", "y"], "style": "think"}
    samples = [
        {
            "responses": torch.tensor(list(text.encode()), dtype=torch.int64),
            "data_source": source,
            "extra_fields": {"reward_extra_info": compute_score(source, text, "A", row)},
        }
        for text, source in zip(texts, sources, strict=True)
    ]

    def kv_batch_get(keys, partition_id, select_fields) -> TensorDict:
        assert (keys, partition_id) == (["u_0_0", "v_0_0"], "train")
        return list_of_dict_to_tensordict(samples).select(*select_fields)

    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids.tolist()).decode()

    class Batch:
        keys = ("u_0_0", "v_0_0", "pad_0_0")
        tags = ({}, {}, {"is_padding": True})
        partition_id = "train"

    class Trainer:
        tokenizer = Tokenizer()

    metrics = training_metrics.step_metrics(Trainer(), Batch(), kv_batch_get)
    assert metrics["reward/all/score"] == 1.0
    assert metrics["reward/ct/reasoning_words"] == 2
    assert metrics["reward/mri/format"] == 0


# ------------------------------------------------------------------ the reward

ROWS = [
    ("<think>dark lungs</think><answer>C</answer>", 2.0),
    ("<think>dark lungs</think><answer>A</answer>", 1.0),
    ("C", 0.0),
    ("<think></think><answer>C</answer>", 1.0),
]
INFO = {"options": ["MRI", "X-ray", "CT", "Ultrasound"], "style": "think", "modality": "ct", "index": 3}


def _config(path, **kwargs):
    from omegaconf import OmegaConf

    function = {"path": path, "name": "compute_score", "reward_kwargs": kwargs}
    return OmegaConf.create({"reward": {"custom_reward_function": function}})


@pytest.fixture(params=["package", "path", "file url"])
def location(request):
    return {"package": "pkg://medr1_verl.reward", "path": reward.__file__, "file url": f"file://{reward.__file__}"}[
        request.param
    ]


def test_the_reward_is_found_by_package_and_by_path_with_its_settings(location):
    from verl.trainer.ppo.reward import get_custom_reward_fn

    compute_score = get_custom_reward_fn(_config(location, format_weight=0.5))
    call = {"data_source": "omnimedvqa/ct", "solution_str": ROWS[0][0], "ground_truth": "C", "extra_info": dict(INFO)}
    assert compute_score(**call)["score"] == 1.5


class _Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return bytes(ids.tolist()).decode()


def _item(text):
    """One completion as verl's reward worker gets it."""
    import numpy as np
    import torch
    from verl import DataProto

    ids = torch.tensor([list(text.encode())], dtype=torch.int64)
    return DataProto.from_dict(
        tensors={"responses": ids, "attention_mask": torch.ones_like(ids)},
        non_tensors={
            "data_source": np.array(["omnimedvqa/ct"], dtype=object),
            "reward_model": np.array([{"style": "rule", "ground_truth": "C"}], dtype=object),
            "extra_info": np.array([dict(INFO)], dtype=object),
            "__num_turns__": np.array([2]),
        },
    )


def _through_reward_manager(location, texts, **kwargs):
    """What verl's default reward manager makes of the completions, all in flight at once in its threads."""
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
    from verl.trainer.ppo.reward import get_custom_reward_fn

    compute_score = get_custom_reward_fn(_config(location, **kwargs))

    async def run():
        manager = NaiveRewardManager(config=None, tokenizer=_Tokenizer(), compute_score=compute_score)
        manager.loop = asyncio.get_running_loop()
        manager.loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(16))
        return await asyncio.gather(*(manager.run_single(_item(text)) for text in texts))

    return asyncio.run(run())


def test_in_the_threads_of_the_reward_manager(location):
    rows = ROWS * 25
    results = _through_reward_manager(location, [text for text, _ in rows])
    for result, (text, score) in zip(results, rows, strict=True):
        assert result["reward_score"] == score, text
        assert set(result["reward_extra_info"]) == {"score", "acc", "format", "parsed", "pred"}


def test_an_exception_planted_in_a_part_does_not_lose_the_group(monkeypatch, caplog):
    def broken(found, info, settings):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(reward, "_faults", type(reward._faults)())
    monkeypatch.setitem(parts.PARTS, "length", broken)
    with caplog.at_level(logging.WARNING):
        results = _through_reward_manager("pkg://medr1_verl.reward", [ROWS[0][0]] * 8, length_weight=0.5)
    assert [result["reward_score"] for result in results] == [2.0] * 8
    assert [result["reward_extra_info"]["length_part"] for result in results] == [0.0] * 8
    assert reward.fault_counts() == {"part length": 8}
    assert caplog.text.count("part length: ZeroDivisionError: planted") == 1


def test_validation_gets_only_what_it_can_average():
    """verl averages numbers and takes a majority over the string ``pred``; other values it would trip over."""
    import numpy as np
    from verl.trainer.ppo.metric_utils import process_validation_metrics

    scores = [compute_score("omnimedvqa/ct", text, "C", INFO, length_weight=0.1) for text, _ in ROWS]
    infos = {key: [result[key] for result in scores] for key in scores[0]} | {"reward": [1.0] * len(scores)}
    metrics = process_validation_metrics(["omnimedvqa/ct"] * len(scores), ["u"] * len(scores), infos)
    assert np.isclose(metrics["omnimedvqa/ct"]["acc"][f"mean@{len(scores)}"], 0.5)
    assert np.isclose(metrics["omnimedvqa/ct"]["format"][f"mean@{len(scores)}"], 0.5)


def test_main_ppo_refuses_a_wrong_setting_before_it_starts_ray():
    """Through verl's own module: ``main_ppo`` takes ``validate_config`` from it after our check is in place."""
    from hydra import compose, initialize_config_module
    from verl.utils import config as verl_config

    before = verl_config.validate_config
    try:
        config_check.install()
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose(
                "ppo_trainer",
                overrides=[
                    "reward.custom_reward_function.path=pkg://medr1_verl.reward",
                    "+reward.custom_reward_function.reward_kwargs.format_weight=much",
                ],
            )
        with pytest.raises(SystemExit, match=r"reward_kwargs\.format_weight: 'much' is not a finite number"):
            verl_config.validate_config(config, use_reference_policy=False, use_critic=False)
    finally:
        verl_config.validate_config = before


# ------------------------------------------------------------------ the data set class


@pytest.fixture
def parquet(tmp_path):
    """Twelve rows, six CT and six MRI, each with a picture."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    options = ["MRI", "X-ray", "CT", "Ultrasound"]
    rows = []
    for number in range(12):
        picture = io.BytesIO()
        Image.new("RGB", (56, 56), (number, 0, 0)).save(picture, "PNG")
        modality, answer = ("ct", "C") if number % 2 else ("mri", "A")
        question = f"Which modality is picture {number}?"
        info = dict.fromkeys(("dataset", "image_path", "image_sha256"), "x") | {
            "index": number,
            "split": "train",
            "question_id": f"q{number}",
            "modality": modality,
            "question_type": "modality_recognition",
            "question": question,
            "options": options,
            "answer": answer,
            "answer_text": options["ABCD".index(answer)],
            "style": "think",
        }
        prompt = render_prompt(question, options, "think")
        rows.append(make_row(images=[{"bytes": picture.getvalue()}], prompt=prompt, extra_info=info))
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=arrow_schema()), path)
    return path


def _dataset(parquet, medr1=None, **data):
    """As verl builds it: the class found by its configured path, through verl's own factory."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.utils import create_rl_dataset

    max_samples = data.pop("max_samples", -1)
    config = OmegaConf.create(
        {
            "custom_cls": {"path": "pkg://medr1_verl.dataset", "name": "MedVQADataset"},
            "cache_dir": str(parquet.parent / "cache"),
            "image_key": "images",
            "filter_overlong_prompts": False,
            **({} if medr1 is None else {"medr1": medr1}),
            **data,
        }
    )
    processor = type("Processor", (), {"image_processor": None})()
    return create_rl_dataset(str(parquet), config, None, processor, max_samples=max_samples)


def _texts(row):
    return "".join(part["text"] for part in row["raw_prompt"][-1]["content"] if part["type"] == "text")


def test_without_settings_it_is_verls_own_data_set(parquet):
    from verl.utils.dataset.rl_dataset import RLHFDataset

    ours = _dataset(parquet)
    stock = RLHFDataset(str(parquet), None, ours.config, ours.processor)
    assert len(ours) == len(stock) == 12
    for item in (0, 11):
        ours_row, stock_row = ours[item], stock[item]
        assert _texts(ours_row) == _texts(stock_row)
        assert {key: ours_row[key] for key in ("reward_model", "extra_info", "data_source", "index")} == {
            key: stock_row[key] for key in ("reward_model", "extra_info", "data_source", "index")
        }


def test_another_style(parquet):
    row = _dataset(parquet, {"style": "no-think"})[3]
    assert _texts(row) == render_prompt(row["extra_info"]["question"], INFO["options"], "no-think", n_images=0)
    assert row["extra_info"]["style"] == "no-think"
    assert row["raw_prompt"][-1]["content"][0]["type"] == "image"


def test_slices_come_before_the_number_of_samples(parquet):
    assert len(_dataset(parquet, {"modality": ["ct"]})) == 6
    few = _dataset(parquet, {"modality": ["ct"]}, max_samples=4)
    assert [row["data_source"] for row in few] == ["omnimedvqa/ct"] * 4
    chosen = {
        tuple(row["index"] for row in _dataset(parquet, {"modality": ["ct"]}, max_samples=4, shuffle=True, seed=5))
        for _ in range(2)
    }
    assert len(chosen) == 1


def test_slices_that_leave_no_row_are_refused_with_what_there_is(parquet):
    with pytest.raises(UserError, match=r"no row of data\.medr1 slices oct.*ct/modality_recognition"):
        _dataset(parquet, {"modality": "oct"})


def test_rows_without_what_a_setting_needs_are_refused(parquet):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": [[{"role": "user", "content": "x"}]]}), parquet)
    with pytest.raises(UserError, match="has no column extra_info"):
        _dataset(parquet, {"style": "think"})
    rows = [{"prompt": [{"role": "user", "content": "x"}], "extra_info": {"index": 1, "options": ["a"]}}]
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    with pytest.raises(UserError, match=r"row 0 has no extra_info\.question"):
        _dataset(parquet, {"style": "think"})


def _orders(loader):
    """{row index: its options} of one pass, checking that the gold letter followed."""
    orders = {}
    for batch in loader:
        for info, model in zip(batch["extra_info"], batch["reward_model"], strict=True):
            assert info["options"]["ABCD".index(model["ground_truth"])] == info["answer_text"]
            orders[info["index"]] = tuple(info["options"])
    return orders


def _loader(parquet, workers):
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.utils.dataset.rl_dataset import collate_fn

    dataset = _dataset(parquet, {"shuffle_options": True, "seed": 3})
    return StatefulDataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=collate_fn)


@pytest.mark.parametrize("workers", [0, 2])
def test_options_get_a_new_order_in_every_epoch_the_same_for_the_same_seed(parquet, workers):
    loader = _loader(parquet, workers)
    epochs = [_orders(loader) for _ in range(3)]
    assert all(len(epoch) == 12 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [_orders(again) for again in [_loader(parquet, 0)] for _ in range(3)] == epochs


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_with_the_orders_of_its_epoch(parquet, workers):
    whole = _loader(parquet, 0)
    expected = [_orders(whole) for _ in range(3)]
    stopped = _loader(parquet, workers)
    _orders(stopped)
    iterator = iter(stopped)
    seen = {info["index"]: tuple(info["options"]) for _ in range(2) for info in next(iterator)["extra_info"]}
    state = stopped.state_dict()
    del iterator

    resumed = _loader(parquet, workers)
    resumed.load_state_dict(state)
    assert seen | _orders(resumed) == expected[1]
    assert _orders(resumed) == expected[2]


def _in_place_config(path, open_metric=None, **manager):
    config = _config(path, open_metric=open_metric)
    model = {"tokenizer_path": "unused", "path": "unused"}
    own = {"reward_manager": {"source": "register", "name": "naive"} | manager, "reward_model": {"enable": False}}
    config.merge_with({"actor_rollout_ref": {"model": model}, "reward": own})
    return config


@pytest.mark.parametrize(
    ("path", "settings", "in_place"),
    [
        ("pkg://medr1_verl.reward", {}, True),
        ("pkg://medr1_verl.reward", {"open_metric": "token_f1"}, True),
        ("pkg://medr1_verl.reward", {"open_metric": "my.module:judge"}, False),
        ("pkg://medr1_verl.random_reward", {}, True),
        ("pkg://medr1_verl.reward", {"name": "dapo"}, False),
        ("pkg://medr1_verl.reward", {"source": "importlib"}, False),
        ("/home/me/slow.py", {}, False),
        (None, {}, False),
    ],
)
def test_only_this_packages_rewards_have_no_worker(path, settings, in_place):
    from verl.experimental.reward_loop import reward_loop

    from medr1_verl import verl_fixes

    class Manager:
        config = _in_place_config(path, **settings)
        reward_loop_workers = ()

        def _init_reward_loop_workers(self):
            self.reward_loop_workers = ["verl's"]

    assert hasattr(reward_loop.RewardLoopManager, "_init_reward_loop_workers"), "verl has changed"
    verl_fixes.reward_in_place(SimpleNamespace(RewardLoopManager=Manager))
    made = Manager()
    made._init_reward_loop_workers()
    assert (made.reward_loop_workers != ["verl's"]) is in_place
    if in_place:
        (sent,) = pickle.loads(pickle.dumps(made.reward_loop_workers))
        assert sent.compute_score._config == Manager.config


def test_a_reward_without_its_worker_is_the_same_and_leaves_the_row_alone(monkeypatch):
    from verl.experimental.reward_loop import reward_loop

    from medr1_verl import verl_fixes

    items = [_item(text) for text, _ in ROWS]
    monkeypatch.setattr(reward_loop, "copy_to_local", str)
    monkeypatch.setattr(reward_loop, "hf_tokenizer", lambda *_, **__: _Tokenizer())
    config = _in_place_config("pkg://medr1_verl.reward")
    handle = verl_fixes._RewardInPlace(config)

    async def run():
        return await asyncio.gather(*(handle.remote(item) for item in items))

    results = asyncio.run(run())
    assert [result["reward_score"] for result in results] == [score for _, score in ROWS]
    assert all(item.non_tensor_batch["extra_info"][0] == INFO for item in items)
    worker = reward_loop.RewardLoopWorker
    again = asyncio.run(_in_worker(worker, config, _item(ROWS[0][0])))
    assert again == results[0]


async def _in_worker(worker, config, item):
    return await worker(config).compute_score(item)
