"""The embedded default in one call: phantoms, converted like any raw OmniMedVQA folder, and a tiny Qwen2-VL.

    python -m medr1_verl.embedded.prepare --root data/embedded --seed 42      prints the folder
    python -m medr1_verl.embedded.prepare --root ... --data-only              without the model: seconds, not minutes

The folder is named by a hash of everything that decides its content (the modules that draw, convert, ask and build,
and the arguments), so a second call finds it and returns at once, and a changed module makes a new one. It gets its
name when it is whole: ``raw/`` (drawn images and questions), ``data/`` (parquet), ``model/``. With the data alone, it
is called ``HASH.data`` until the model is asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
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


def prepare(root: Path, seed: int, images_per_modality: int = IMAGES_PER_MODALITY, data_only: bool = False) -> Path:
    """The folder with ``data/train.parquet``, ``data/test.parquet`` and ``model/``; made if it is not there.

    data_only: a folder without ``model/`` will do.
    """
    folder = root / key(seed, images_per_modality)
    data = folder.with_suffix(".data")
    for known in (folder, data) if data_only else (folder,):
        if known.is_dir():
            return known
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as making:
        partial = Path(making) / "whole"
        if data.is_dir():
            shutil.copytree(data, partial)  # not moved: whoever was told of it may be reading
        else:
            _draw(partial, seed, images_per_modality)
        if data_only:
            partial.rename(data)
            return data
        from medr1_verl.embedded import tiny_model
        from medr1_verl.embedded.plan import Plan

        print("  building the tiny model and warming it up", file=sys.stderr)
        tiny_model.build(partial / "data" / "train.parquet", partial / "model", Plan(seed))
        partial.rename(folder)
    shutil.rmtree(data, ignore_errors=True)
    return folder


def _draw(folder: Path, seed: int, images_per_modality: int) -> None:
    from medr1_verl.convert import Options, convert
    from medr1_verl.embedded import phantoms

    print("  drawing the images", file=sys.stderr)
    phantoms.generate(folder / "raw", seed, images_per_modality)
    print("  converting them to parquet", file=sys.stderr)
    convert(
        Options(
            input=folder / "raw",
            output=folder / "data",
            seed=seed,
            image_size=IMAGE_SIZE,
            test_fraction=TEST_FRACTION,
            strict=True,
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m medr1_verl.embedded.prepare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--root", type=Path, required=True, help="where such folders are kept")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--images-per-modality", type=int, default=IMAGES_PER_MODALITY)
    parser.add_argument("--data-only", action="store_true", help="a folder without the model will do")
    args = parser.parse_args(argv)
    print(prepare(args.root, args.seed, args.images_per_modality, args.data_only))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None, "embedded default"))
