"""``medr1 doctor``: every check, as a screen, as hints or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from medr1_verl import old_keys, versions
from medr1_verl.cli import run as run_command
from medr1_verl.doctor import hardware, software, sources
from medr1_verl.doctor.machine import Check, Machine, look
from medr1_verl.errors import UserError

# What the line is called -> the function that looks.
CHECKS: dict[str, Callable[[Machine], Check | list[Check]]] = {
    "python": software.check_python,
    "packages": software.check_packages,
    "TransferQueue": software.check_transfer_queue,
    "GPU": hardware.check_gpu,
    "CUDA": hardware.check_driver,
    "flash-attn": software.check_attention,
    "GPU memory": hardware.check_fit,
    "host memory": hardware.check_memory,
    "/dev/shm": hardware.check_shared_memory,
    "open files": hardware.check_open_files,
    "Ray": hardware.check_ray,
    "disk": hardware.check_disk,
    "model": sources.check_model_files,
    "data": sources.check_data,
    "settings": sources.check_settings,
}


def examine(machine: Machine) -> list[Check]:
    """Every check. One that fails by itself becomes a line that says so."""
    found: list[Check] = []
    for name, check in CHECKS.items():
        try:
            result = check(machine)
        except UserError as error:
            result = Check("fail", str(error), "correct it")
        except Exception as error:  # the doctor must outlive whatever it finds
            result = Check("warn", f"could not be checked: {type(error).__name__}: {error}")
        found += [replace(line, name=name) for line in (result if isinstance(result, list) else [result])]
    return found


_MARKS = {"ok": "ok", "warn": "warn", "fail": "FAIL", "skip": "-"}


def screen(machine: Machine, checks: Sequence[Check]) -> str:
    """The report for a person."""
    what = "the embedded default" if machine.embedded else Path(machine.model).name
    lines = [f"medr1 doctor: {machine.profile} profile, {what}"]
    for check in checks:
        if check.status == "skip" and not check.text:
            continue
        lines.append(f"  {_MARKS[check.status]:<5}{check.name:<14}{check.text}")
        if check.status in ("warn", "fail"):
            advice = ": ".join(filter(None, (check.hint, check.fix)))
            lines += [f"       {'':<14}-> {advice}"] if advice else []
    failed = [check.name for check in checks if check.status == "fail"]
    lines.append(
        f"The recipes cannot run yet: {', '.join(dict.fromkeys(failed))}" if failed else "The recipes can run here."
    )
    return "\n".join(lines)


def hints(checks: Sequence[Check]) -> str:
    """What to do, failures first: a comment, then a command or setting."""
    lines = []
    for status in ("fail", "warn"):
        for check in checks:
            if check.status == status and (check.hint or check.fix):
                lines.append(f"# {check.name}: {check.text}" + (f". {check.hint}" if check.hint else ""))
                lines += [check.fix] if check.fix else []
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="medr1 doctor",
        description="Can this machine run the recipes, and what to do where it cannot. Reads the recipes' variables.",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="FILE|KEY=VALUE",
        help="launch scripts, configurations, overrides to look through",
    )
    parser.add_argument("--fix-hints", action="store_true", help="print only what to do, failures first, to be copied")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args(argv)
    settings = [setting for source in args.settings for setting in old_keys.read_settings(source)]
    machine = look(settings=settings)
    profile = machine.profile
    checks = examine(machine)
    can_run = not any(check.status == "fail" for check in checks)
    if args.json:
        found = {name: versions.installed(name) for name in versions.SHOWN}
        report = {
            "can_run": can_run,
            "profile": profile,
            "model": machine.model or None,
            "checks": [asdict(check) for check in checks],
            "versions": found,
            "gpus": [asdict(gpu) for gpu in machine.gpus],
        }
        print(json.dumps(report, indent=2))
    elif args.fix_hints:
        print(hints(checks) or "# nothing to do")
    else:
        print(screen(machine, checks))
    return 0 if can_run else 1


if __name__ == "__main__":
    sys.exit(run_command(main, None, "medr1 doctor"))
