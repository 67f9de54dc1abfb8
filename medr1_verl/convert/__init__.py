"""From questions and image files to the parquet that verl reads. One stage of a row's way per module:

``readers``  files of questions -> raw rows           ``check``   raw row -> checked question, or a reason why not
``images``   image file -> clean 8-bit picture -> PNG  ``pool``    the worker processes and their shards of pictures
``splits``   which question goes to train or test      ``publish`` parquet, manifest, rejected rows, the atomic rename
``run``      ``convert()``: the stages in order        ``cli``     the command line
"""

from medr1_verl.convert.run import Options, convert

__all__ = ["Options", "convert"]
