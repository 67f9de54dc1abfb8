#!/usr/bin/env python3
"""OmniMedVQA to verl's parquet. The same as ``medr1 convert``; runs from a plain checkout too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    try:
        from medr1_verl.cli import run
        from medr1_verl.convert.cli import main
    except ModuleNotFoundError as error:
        sys.exit(f"{Path(__file__).name}: no module {error.name!r}; pip install numpy pillow pyarrow tqdm")
    sys.exit(run(main, None, Path(__file__).name))
