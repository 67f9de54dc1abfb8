"""From questions and image files to the parquet that verl reads. One stage of a row's way per module:

``readers``    files of questions -> raw rows          ``splits``  the published split files; ``recover`` their gaps
``check``      raw row -> checked question, or why not ``text``    the stage of everything that needs no image
``images``     image file -> clean 8-bit picture       ``png``     its lossless file; ``dicom`` the DICOM decoder
``worker``     one process that converts images        ``pool``    all of them, and the shards they leave on disk
``partition``  which question goes to train or test    ``rows``    questions and images -> parquet rows
``manifest``   what the run says about itself          ``publish`` files on disk and the atomic rename
``run``        ``convert()``: the stages in order      ``verify``  the result read back
``options``    what can be chosen                      ``cli``     the command line
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medr1_verl.convert.options import Options
    from medr1_verl.convert.run import Result, convert

__all__ = ["Options", "Result", "convert"]


def __getattr__(name: str) -> Any:
    """``Options``, ``Result`` and ``convert`` on first use: the worker processes never load pyarrow."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from medr1_verl.convert import options, run

    return getattr(options if name == "Options" else run, name)
