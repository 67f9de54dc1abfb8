"""Validation dumps name the row of every answer."""

import inspect
from types import SimpleNamespace

import pytest

from medr1_verl import validation_rows


def trainer_module(keys):
    """A trainer whose validation goes as verl's: draws uids into the batch, works, and dumps at the end."""

    class PPOTrainer:
        dumped = None

        def __init__(self, batches):
            self.val_dataloader = batches

        def _validate(self):
            for number, batch in enumerate(self.val_dataloader):
                batch["uid"] = [f"u{number}{place}" for place in range(len(batch["raw_prompt"]))]
            self._dump_generations(inputs=[], reward_extra_infos_dict={"acc": [1] * len(keys)} | {"uid": keys})
            return {"val": 1.0}

        def _dump_generations(self, inputs, reward_extra_infos_dict):
            self.dumped = reward_extra_infos_dict

    return SimpleNamespace(PPOTrainer=PPOTrainer)


def batch(*names):
    return {
        "raw_prompt": [None] * len(names),
        "extra_info": [{"question_id": name, "image_sha256": f"sha of {name}", "index": 0} for name in names],
    }


def test_each_answer_gets_its_row():
    """Keys are UID_SESSION_INDEX; several samples of one question share the row, and the last batch counts too."""
    module = trainer_module(["u10_0_0", "u00_0_0", "u00_1_0", "u01_0_0"])
    validation_rows.add_to_trainer(module)
    loader = [batch("a", "b"), batch("c")]
    trainer = module.PPOTrainer(loader)
    assert trainer._validate() == {"val": 1.0}
    assert trainer.dumped["question_id"] == ["c", "a", "a", "b"]
    assert trainer.dumped["image_sha256"] == ["sha of c", "sha of a", "sha of a", "sha of b"]
    assert trainer.dumped["acc"] == [1] * 4
    assert trainer.val_dataloader is loader


@pytest.mark.parametrize("rows", [[{"raw_prompt": [None]}], [{"raw_prompt": [None], "extra_info": [None]}]])
def test_rows_without_names_change_nothing(rows):
    module = trainer_module(["u00_0_0"])
    validation_rows.add_to_trainer(module)
    trainer = module.PPOTrainer(rows)
    trainer._validate()
    assert set(trainer.dumped) == {"acc", "uid"}


def test_a_second_call_changes_nothing():
    module = trainer_module([])
    validation_rows.add_to_trainer(module)
    once = module.PPOTrainer._validate
    validation_rows.add_to_trainer(module)
    assert module.PPOTrainer._validate is once


def test_a_verl_without_that_trainer_is_said_not_hidden(caplog):
    validation_rows.add_to_trainer(SimpleNamespace())
    assert "do not name their rows" in caplog.text


@pytest.mark.heavy
def test_verls_trainer_is_what_this_module_takes_it_for():
    pytest.importorskip("verl")
    from verl.trainer.ppo.v1 import trainer_base

    validate = inspect.getsource(inspect.unwrap(trainer_base.PPOTrainer._validate))
    assert "for batch_dict in self.val_dataloader:" in validate
    assert 'batch_dict["uid"] = ' in validate
    assert '| {"uid": dump_all_keys}' in validate
    assert "reward_extra_infos_dict" in inspect.signature(trainer_base.PPOTrainer._dump_generations).parameters
