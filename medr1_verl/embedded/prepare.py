"""The embedded default in one call: phantoms, converted like any raw OmniMedVQA folder, and a tiny Qwen2-VL.

    python -m medr1_verl.embedded.prepare --root data/embedded --seed 42      prints the folder

The folder is named by a hash of everything that decides its content (the modules that draw, convert, ask and build,
and the arguments), so a second call finds it and returns at once, and a changed module makes a new one. It gets its
name when it is whole: ``raw/`` (drawn images and questions), ``data/`` (parquet), ``model/``.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import medr1_verl
from medr1_verl.cli import run as run_command

# 16 visual tokens an image: enough to tell the phantoms apart, small enough for a CPU.
IMAGE_SIZE = 112
IMAGES_PER_MODALITY = 100
TEST_FRACTION = 0.2


def key(seed: int, images_per_modality: int) -> str:
    """Twelve hex digits of everything that decides the folder's content."""
    package = Path(medr1_verl.__file__).parent
    sources = [*sorted((package / "embedded").glob("*.py")), *sorted((package / "convert").glob("*.py"))]
    sources += [package / name for name in ("prompt.py", "styles.py", "schema.py", "taxonomy.py")]
    digest = hashlib.sha256(repr((seed, images_per_modality, IMAGE_SIZE, TEST_FRACTION)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def prepare(root: Path, seed: int, images_per_modality: int = IMAGES_PER_MODALITY) -> Path:
    """The folder with ``data/train.parquet``, ``data/test.parquet`` and ``model/``; made if it is not there."""
    folder = root / key(seed, images_per_modality)
    if folder.is_dir():
        return folder
    from medr1_verl.convert import Options, convert
    from medr1_verl.embedded import phantoms, tiny_model
    from medr1_verl.embedded.plan import Plan

    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as making:
        partial = Path(making) / "whole"
        print("  drawing the images", file=sys.stderr)
        phantoms.generate(partial / "raw", seed, images_per_modality)
        print("  converting them to parquet", file=sys.stderr)
        convert(
            Options(
                input=partial / "raw",
                output=partial / "data",
                seed=seed,
                image_size=IMAGE_SIZE,
                test_fraction=TEST_FRACTION,
                strict=True,
            )
        )
        print("  building the tiny model and warming it up", file=sys.stderr)
        tiny_model.build(partial / "data" / "train.parquet", partial / "model", Plan(seed))
        partial.rename(folder)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m medr1_verl.embedded.prepare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--root", type=Path, required=True, help="where such folders are kept")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--images-per-modality", type=int, default=IMAGES_PER_MODALITY)
    args = parser.parse_args(argv)
    print(prepare(args.root, args.seed, args.images_per_modality))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None, "embedded default"))
