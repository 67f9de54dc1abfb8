"""The tiny model's warm start by verl's own supervised trainer: the same twice, and only the language model learns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl")

pytestmark = pytest.mark.e2e

# In a process of its own: the CPU platform is switched on for good there.
SCRIPT = """
import sys
from pathlib import Path
from medr1_verl import cpu
cpu.activate()
from medr1_verl.convert import Options, convert
from medr1_verl.embedded import phantoms, tiny_model
from medr1_verl.embedded.plan import Plan
from medr1_verl.errors import UserError

root = Path(sys.argv[1])
phantoms.generate(root / "raw", images_per_modality=3, progress=False)
convert(Options(input=root / "raw", output=root / "data", image_size=112, test_fraction=0.34))
train = root / "data" / "train.parquet"
tiny_model.build(train, root / "untaught", Plan(5, 0, 0), progress=False)
for name in ("a", "b"):
    tiny_model.build(train, root / name, Plan(5, 2, 0), progress=False)
"""


def test_the_warm_start(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for file in sorted(path.name for path in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    untaught, taught = (load_file(tmp_path / name / "model.safetensors") for name in ("untaught", "a"))
    assert untaught.keys() == taught.keys()
    assert {weights.dtype for weights in taught.values()} == {torch.float32}
    learnt = {name for name in taught if not torch.equal(taught[name], untaught[name])}
    assert learnt
    assert not any("visual" in name for name in learnt)
    assert sum("layers" in name for name in learnt) > 20
