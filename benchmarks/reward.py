"""What scoring one completion costs: this reward beside the rewards it is compared with, interleaved in one run.

    python benchmarks/reward.py [--completions 10000] [--rounds 5] [--json FILE]

The others are written anew here from what they do, not copied: the released Med-R1 reward (math_verify on the whole
completion, then two patterns), EasyR1's r1v reward (mathruler), one in the manner of MedVLThinker (patterns, then
letter, "X. text" or text), a single lazy pattern. ``pip install math-verify==0.5.2 mathruler
pylatexenc sympy tqdm`` is what the first two need; without it they are left out, and said to be.

Three tables: microseconds of CPU per completion on a mix (a fifth malformed); milliseconds for one text of 100 KB made
to hurt; growth from 10 KB to 1 MB as the slope of log time over log length (1 = linear).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from medr1_verl.reward import compute_score

Reward = Callable[..., object]

SENTENCES = (
    "The image is an axial slice with a bright ring of bone and grey soft tissue inside it.",
    "There is no shift of the midline and the ventricles are of normal size.",
    "A dark area without vessels at the edge of the lung could be a pneumothorax.",
    "The layers of the retina are separated by a dark space below the fovea.",
    "Compared with option B, the border is irregular and the pigment is not uniform.",
    "The cells have large, dark nuclei; their number is higher than expected.",
    "Since the contrast is that of soft tissue and bone is dark, this is not a CT.",
    "The lesion measures 5 mm, which speaks against the second option.",
)
OPTION_SETS = (
    ["MRI", "X-ray", "CT", "Ultrasound"],
    ["Yes", "No."],
    ["Melanoma", "Nevus", "Basal cell carcinoma", "Benign keratosis."],
    ["No diabetic retinopathy", "Mild", "Moderate", "Severe"],
)


def call(text: str, gold: str, options: list[str], index: int = 0) -> dict[str, Any]:
    """The keyword arguments with which verl's reward manager calls a reward function."""
    row = {"options": options, "style": "think", "modality": "ct", "question_id": f"q{index}", "index": index}
    return {"data_source": "omnimedvqa/ct", "solution_str": text, "ground_truth": gold, "extra_info": row}


def mix(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Calls with ``number`` completions, every fifth malformed.

    The reasoning has 45 to 150 words, the 60 to 165 tokens of the paper's curves; one in twenty has a "<" in it.
    """
    rng = random.Random(seed)
    rows = []
    for index in range(number):
        options = rng.choice(OPTION_SETS)
        letters = "ABCD"[: len(options)]
        gold, said = rng.choice(letters), rng.choice(letters)
        reasoning = " ".join(rng.choice(SENTENCES) for _ in range(rng.randint(3, 10)))
        if index % 20 == 7:
            reasoning += " It measures < 5 mm."
        answer = rng.choice([said] * 6 + [said.lower(), said + ".", f" {said}) ", options[letters.index(said)]])
        text = f"<think>{reasoning}</think>{rng.choice(['', chr(10)])}<answer>{answer}</answer>"
        if index % 5 == 4:
            text = rng.choice(
                [
                    answer,
                    reasoning,
                    f"<think>{reasoning}<answer>{answer}</answer>",
                    f"<think></think><answer>{answer}</answer>",
                    f"{text} {reasoning}",
                    f"{text}<answer>{rng.choice(letters)}</answer>",
                    f"<think>{reasoning} <answer>{answer}</answer></think><answer>{answer}</answer>",
                    f"<answer>{answer}</answer><think>{reasoning}</think>",
                    text[: len(text) * 2 // 3],
                ]
            )
        rows.append(call(text, gold, options, index))
    return rows


# ------------------------------------------------------------------ the rewards


reference = functools.partial(compute_score, mode="reference")

# As in the code they stand for, the patterns are handed to ``re`` as text at every call.
ANSWER = r"<answer>(.*?)</answer>"
WHOLE = r"<think>.*?</think>\s*<answer>.*?</answer>"
LAZY = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


def released(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> object:
    """Med-R1 at 88d76c7: math_verify first, which decides nothing for letters but takes its time."""
    from math_verify import parse, verify

    accuracy = 0.0
    solution = f"<answer> {ground_truth} </answer>"
    try:
        if float(verify(parse(solution_str), parse(solution))) > 0:
            accuracy = 1.0
    except Exception:
        pass
    if accuracy == 0.0:
        wanted = re.search(ANSWER, solution)
        found = re.search(ANSWER, solution_str)
        given = found.group(1).strip() if found else solution_str.strip()
        accuracy = float(given == (wanted.group(1).strip() if wanted else solution.strip()))
    return accuracy + float(re.fullmatch(WHOLE, solution_str, re.DOTALL) is not None)


def easyr1(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> object:
    """EasyR1's r1v: whole pattern for the format, mathruler's grader for the answer."""
    from mathruler.grader import grade_answer

    formatted = float(re.fullmatch(WHOLE, solution_str, re.DOTALL) is not None)
    found = re.search(ANSWER, solution_str)
    given = found.group(1).strip() if found else solution_str.strip()
    try:
        accuracy = float(grade_answer(given, ground_truth))
    except Exception:
        accuracy = 0.0
    return {"overall": (formatted + accuracy) / 2, "format": formatted, "accuracy": accuracy}


def medvlthinker_like(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> object:
    """In the manner of MedVLThinker: one pattern for the format, one for the answer, then three spellings of it."""
    if re.search(WHOLE, solution_str, re.DOTALL) is None:
        return 0.0
    found = re.search(ANSWER, solution_str)
    if found is None:
        return 0.0
    given = found.group(1).strip().lower()
    for index, option in enumerate(extra_info["options"]):
        letter = "abcdefghij"[index]
        if given in (letter, f"{letter}. {option.lower()}", option.lower()):
            return float(letter == ground_truth.lower())
    return 0.0


def one_lazy_pattern(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> object:
    found = LAZY.fullmatch(solution_str)
    accuracy = float(found is not None and found.group(2).strip() == ground_truth)
    formatted = float(found is not None)
    return {"score": accuracy + formatted, "acc": accuracy, "format": formatted}


def contenders() -> tuple[dict[str, Reward], list[str]]:
    """Name to reward, and the names of those whose libraries are not installed."""
    rewards: dict[str, Reward] = {"strict": compute_score, "reference": reference}
    missing = []
    for name, reward, library in (
        ("released Med-R1", released, "math_verify"),
        ("EasyR1", easyr1, "mathruler.grader"),
        ("MedVLThinker-like", medvlthinker_like, "re"),
        ("one lazy pattern", one_lazy_pattern, "re"),
    ):
        try:
            __import__(library)
            rewards[name] = reward
        except ImportError:
            missing.append(name)
    return rewards, missing


# ------------------------------------------------------------------ the measurements


def per_completion(rewards: dict[str, Reward], rows: list, rounds: int) -> dict[str, float]:
    """Microseconds of CPU per completion: median over rounds, the rewards taking turns on slices of 500 completions."""
    for reward in rewards.values():
        for row in rows[:50]:
            reward(**row)
    totals: dict[str, list[float]] = {name: [] for name in rewards}
    for round_number in range(rounds):
        spent = dict.fromkeys(rewards, 0.0)
        names = list(rewards)
        for start in range(0, len(rows), 500):
            piece = rows[start : start + 500]
            names.append(names.pop(0))  # another one goes first each time
            for name in names:
                reward = rewards[name]
                before = time.process_time()
                for row in piece:
                    reward(**row)
                spent[name] += time.process_time() - before
        for name, seconds in spent.items():
            totals[name].append(seconds / len(rows) * 1e6)
        print(f"  round {round_number + 1}/{rounds}", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in totals.items()}


HARD_TEXTS: dict[str, str] = {
    "repeated <think>": "<think>",
    "repeated <answer>": "<answer>",
    "repeated <think></think>": "<think></think>",
    "repeated <answer>C</answer>": "<answer>C</answer>",
    "repeated think and answer": "<think>x</think><answer>C</answer>",
    "repeated <think></think><answer>": "<think></think><answer>",
    "white space": " ",
    "angle brackets": "<",
    "unclosed </thin": "</thin",
    "invisible characters": "\u200b",
    "plain words": "word ",
}


def hard_text(piece: str, length: int, wrapped: bool) -> str:
    """``length`` characters of ``piece`` over and over: alone, or as the reasoning of an otherwise right completion."""
    text = piece * (length // len(piece))
    return f"<think>{text}</think><answer>C</answer>" if wrapped else text


def milliseconds(reward: Reward, text: str, repeats: int = 5) -> float:
    row = call(text, "C", ["a", "b", "c", "d"])
    best = math.inf
    for _ in range(repeats):
        before = time.process_time()
        reward(**row)
        best = min(best, time.process_time() - before)
        if best > 0.2:
            break
    return best * 1e3


def slope(reward: Reward, piece: str, wrapped: bool) -> float:
    """Log-log slope of time over length, 10 KB to 1 MB."""
    lengths = [10_000, 30_000, 100_000, 300_000, 1_000_000]
    times = []
    for length in lengths:
        text = hard_text(piece, length, wrapped)
        loops = max(1, 2_000_000 // length)
        times.append(min(_loop(reward, text, loops) for _ in range(7)))
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(t) for t in times]).slope


def _loop(reward: Reward, text: str, loops: int) -> float:
    row = call(text, "C", ["a", "b", "c", "d"])
    before = time.process_time()
    for _ in range(loops):
        reward(**row)
    return (time.process_time() - before) / loops


def import_milliseconds() -> float:
    """Of medr1_verl.reward alone, over what starting Python costs; median of 9."""

    def start(code: str) -> float:
        before = time.perf_counter()
        root = str(Path(__file__).resolve().parent.parent)
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root})
        return time.perf_counter() - before

    with_it, without = [], []
    for _ in range(9):
        without.append(start("pass"))
        with_it.append(start("import medr1_verl.reward"))
    return (statistics.median(with_it) - statistics.median(without)) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completions", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()

    rewards, missing = contenders()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, CPython {platform.python_version()}"
    print(f"machine: {machine}")
    if missing:
        print("left out, library not installed: " + ", ".join(missing))

    rows = mix(arguments.completions)
    print(
        f"\nmicroseconds of CPU per completion, {len(rows)} completions, a fifth malformed, {arguments.rounds} rounds"
    )
    figures = per_completion(rewards, rows, arguments.rounds)
    for name, value in figures.items():
        print(f"  {name:<22}{value:10.2f}   {value / figures['strict']:8.1f} x strict")

    print("\nmilliseconds for one text of 100 KB (alone | as the reasoning)")
    hard: dict[str, dict[str, list[float]]] = {}
    for name, reward in rewards.items():
        hard[name] = {}
        for label, piece in HARD_TEXTS.items():
            ours = name in ("strict", "reference")
            if not ours and label != "repeated <answer>":
                continue  # seconds each, some of them minutes; one is enough to show it
            variants = (False, True) if ours else (False,)
            hard[name][label] = [milliseconds(reward, hard_text(piece, 100_000, wrapped)) for wrapped in variants]
            print(f"  {name:<22}{label:<36}" + " | ".join(f"{value:9.3f}" for value in hard[name][label]), flush=True)

    print("\nslope of log time over log length, 10 KB to 1 MB (alone | as the reasoning)")
    slopes = {
        name: {
            label: [slope(rewards[name], piece, wrapped) for wrapped in (False, True)]
            for label, piece in HARD_TEXTS.items()
        }
        for name in ("strict", "reference")
    }
    for name, by_label in slopes.items():
        for label, values in by_label.items():
            print(f"  {name:<22}{label:<36}" + " | ".join(f"{value:6.2f}" for value in values))

    imported = import_milliseconds()
    print(f"\nimport medr1_verl.reward: {imported:.0f} ms")
    if arguments.json:
        result = {
            "machine": machine,
            "microseconds_per_completion": figures,
            "milliseconds_100kb": hard,
            "slopes": slopes,
            "import_milliseconds": imported,
            "left_out": missing,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
