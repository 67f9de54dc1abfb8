"""``medr1``: one console script, one module per command, each imported only when it is called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from medr1_verl import __version__
from medr1_verl.errors import UserError

# command -> (module with ``main(argv) -> exit code``, what ``medr1 --help`` says of it)
COMMANDS: dict[str, tuple[str, str]] = {
    "convert": ("medr1_verl.convert.cli", "raw OmniMedVQA (or your own questions) to verl's parquet"),
    "doctor": ("medr1_verl.doctor.cli", "can this machine run the recipes, and what to do where it cannot"),
    "inspect": ("medr1_verl.inspect", "what is in a data set: counts, letters, chance, blind prior, leakage"),
    "evaluate": ("medr1_verl.evaluation.evaluate", "a model over test rows through vLLM: predictions and accuracy"),
    "tables": ("medr1_verl.evaluation.tables_cli", "predictions to the paper's matrices, with intervals and controls"),
    "report": ("medr1_verl.report.cli", "a run as one HTML page, with a browser of its answers"),
    "card": ("medr1_verl.cards", "a model card of a run, a data card of a data set"),
    "ask": ("medr1_verl.ask", "one question about one image, or a small local web page"),
    "reasoning": ("medr1_verl.reasoning_quality", "what can be counted of the reasoning in predictions"),
    "audit": ("medr1_verl.audit.cli", "logs of every answer: verify, show, export"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_line}" for name, (_, help_line) in COMMANDS.items()]
    return "usage: medr1 COMMAND ...   (medr1 COMMAND --help for its options)\n\n" + "\n".join(lines)


def run(main, argv: Sequence[str] | None, name: str) -> int:
    """Call a command's ``main`` and turn a :class:`UserError` into one line and exit code 2."""
    try:
        return main(argv)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `medr1 ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at the end
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"medr1-verl {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"medr1: no command {argv[0]!r}; one of: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[argv[0]][0])
    return run(module.main, argv[1:], f"medr1 {argv[0]}")


if __name__ == "__main__":
    sys.exit(main())
