"""The embedded default's folder: whole or not there; the data alone for a plan, and then not drawn twice."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import medr1_verl.embedded
from medr1_verl.embedded import prepare


@pytest.fixture
def built(monkeypatch):
    """Training files that a model was built from; the real builder is tested in test_tiny_model.py."""
    calls = []

    def build(train, model, plan):
        assert train.is_file()
        calls.append(train)
        model.mkdir()

    fake = SimpleNamespace(build=build)
    monkeypatch.setitem(sys.modules, "medr1_verl.embedded.tiny_model", fake)
    monkeypatch.setattr(medr1_verl.embedded, "tiny_model", fake, raising=False)
    return calls


def test_the_data_alone_and_then_the_model_from_the_same(tmp_path, built, capsys):
    data = prepare.prepare(tmp_path, 1, 3, data_only=True)
    assert sorted(p.name for p in data.iterdir()) == ["data", "raw"]
    assert not built
    drawn = (data / "data" / "train.parquet").read_bytes()
    assert prepare.prepare(tmp_path, 1, 3, data_only=True) == data
    assert capsys.readouterr().err.count("drawing the images") == 1

    whole = prepare.prepare(tmp_path, 1, 3)
    assert sorted(p.name for p in whole.iterdir()) == ["data", "model", "raw"]
    assert (whole / "data" / "train.parquet").read_bytes() == drawn
    assert len(built) == 1
    assert "drawing the images" not in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [whole.name], "nothing half-made, nothing twice"
    assert prepare.prepare(tmp_path, 1, 3) == prepare.prepare(tmp_path, 1, 3, data_only=True) == whole
    assert len(built) == 1


def test_a_model_that_cannot_be_built_leaves_the_data(tmp_path, built, monkeypatch):
    data = prepare.prepare(tmp_path, 1, 3, data_only=True)

    def build(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sys.modules["medr1_verl.embedded.tiny_model"], "build", build)
    with pytest.raises(RuntimeError):
        prepare.prepare(tmp_path, 1, 3)
    assert [p.name for p in tmp_path.iterdir()] == [data.name]
