"""The end of a run: ``summary.json``, a table for a person, and the curves as a picture.

    python -m medr1_verl.summary runs/NAME --model MODEL --seed 42 [--before FILE]

Every figure is read from what the run wrote: verl's metrics, the supervision, the predictions of the trained model
and of the model before training. What was not measured is null.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medr1_verl.best_checkpoint import Best, best_of
from medr1_verl.cli import run as run_command
from medr1_verl.errors import UserError
from medr1_verl.evaluation.predictions import read_rows
from medr1_verl.guards import PEARSON
from medr1_verl.run_folder import read_metrics, step_of, whole_checkpoint

REWARD = "critic/score/mean"
SFT_LOSS = "train/loss"  # what verl's supervised trainer writes at every step
_GREEDY = "greedy"


class Answers:
    """Shares (0-1) of one prediction file, by control and by greedy or sampled decoding; None where none were asked."""

    def __init__(self, path: Path | None) -> None:
        self.rows = list(read_rows(path)) if path is not None and path.is_file() else []

    def _of(self, control: str, sampled: bool) -> list[dict[str, Any]]:
        return [r for r in self.rows if r["control"] == control and (r["decoding"] != _GREEDY) == sampled]

    def share(self, key: str, control: str = "none", sampled: bool = False) -> float | None:
        return _mean(row[key] for row in self._of(control, sampled))

    def accuracy_by(self, key: str, sampled: bool = False) -> dict[str, float]:
        groups: dict[str, list[float]] = defaultdict(list)
        for row in self._of("none", sampled):
            groups[row[key]].append(row["acc"])
        return {group: sum(hits) / len(hits) for group, hits in sorted(groups.items())}


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def summarize(run_dir: Path, model: str, seed: int, before_file: Path | None) -> dict[str, Any]:
    """The content of ``summary.json``. Accuracies are of the held-out rows, 0-1."""
    metrics = read_metrics(run_dir)
    trained = {step: m for step, m in metrics.items() if REWARD in m or SFT_LOSS in m}
    if not trained:
        raise UserError(f"{run_dir / 'metrics.jsonl'} holds no training step; see {run_dir / 'logs' / 'train.log'}")
    steps = sorted(trained)
    supervision = json.loads((run_dir / "supervision.json").read_text())
    before, after = Answers(before_file), Answers(run_dir / "predictions.jsonl")
    pearson = [m[PEARSON] for m in trained.values() if PEARSON in m]
    best = best_of(run_dir)
    return {
        "steps": steps[-1],
        "seconds": round(supervision["seconds"], 1),
        "reward_first": trained[steps[0]].get(REWARD),
        "reward_last": trained[steps[-1]].get(REWARD),
        "loss_first": trained[steps[0]].get(SFT_LOSS),  # of verl's supervised trainer
        "loss_last": trained[steps[-1]].get(SFT_LOSS),
        "accuracy_before": before.share("acc", sampled=True),
        "accuracy_after": after.share("acc", sampled=True),
        "greedy_before": before.share("acc"),
        "greedy_after": after.share("acc"),
        "blank_before": before.share("acc", "blank"),
        "blank_after": after.share("acc", "blank"),
        "format_before": before.share("format", sampled=True),
        "format_after": after.share("format", sampled=True),
        "pearson_min": min(pearson) if pearson else None,
        "failed_groups": supervision["failed_groups"],
        "peak_memory_gib": round(supervision["peak_memory_gib"], 2),
        "seconds_per_step": _mean(m["timing_s/step"] for m in trained.values() if "timing_s/step" in m),
        "chance": _mean(1 / row["n_options"] for row in after._of("none", False)),
        "rows_evaluated": len(after._of("none", False)),
        "accuracy_by_modality": after.accuracy_by("modality"),
        "accuracy_by_question_type": after.accuracy_by("question_type"),
        "accuracy_by_modality_before": before.accuracy_by("modality"),
        "best_step": best[1].step if best else None,  # of the steps that were saved and validated
        "best_accuracy": best[1].accuracy if best else None,  # on the validation rows
        "warnings": supervision["warnings"],
        "model": model,
        "seed": seed,
    }


def learned(summary: dict[str, Any]) -> str:
    """One sentence: what the run taught the model, as far as it was measured."""
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    if summary["reward_first"] is None:
        return f"Supervised: the loss went from {summary['loss_first']:.3f} to {summary['loss_last']:.3f}."
    if before is None or after is None:
        first, last = summary["reward_first"], summary["reward_last"]
        return f"Mean reward went from {first:.2f} to {last:.2f}; accuracy was not measured before and after."
    verb = "rose" if after > before else "fell" if after < before else "stayed"
    sentence = f"Held-out accuracy sampled at T=1 {verb} from {before:.2f} to {after:.2f}"
    if summary["format_before"] is not None:
        sentence += f", answers in the asked form from {summary['format_before']:.2f} to {summary['format_after']:.2f}"
    if summary["blank_after"] is not None and summary["greedy_after"] is not None:
        sentence += (
            f"; greedy it is {summary['greedy_after']:.2f}, and {summary['blank_after']:.2f} when the image is blank "
            f"(chance {summary['chance']:.2f})"
        )
    return sentence + "."


def _best_words(best: Best) -> str:
    return f"step {best.step}, validation accuracy {best.accuracy:.3f}"


_MEASURED = (
    ("accuracy, sampled at T=1", "accuracy"),
    ("accuracy, greedy", "greedy"),
    ("accuracy, greedy, blank image", "blank"),
    ("answers in the asked form (T=1)", "format"),
)


def table(summary: dict[str, Any], run_dir: Path) -> str:
    """What the recipe prints at the end."""

    def number(value: float | None, pattern: str = "{:.3f}") -> str:
        return "-" if value is None else pattern.format(value)

    evaluated = summary["rows_evaluated"]
    lines = [
        f"steps {summary['steps']}   {summary['seconds']:.0f} s in all, "
        f"{number(summary['seconds_per_step'], '{:.1f}')} s a step   "
        f"peak memory {summary['peak_memory_gib']:.1f} GiB   "
        f"failed groups {summary['failed_groups']}   Pearson >= {number(summary['pearson_min'], '{:.4f}')}",
        "",
        f"{f'held out, {evaluated} rows' if evaluated else 'not evaluated':34} {'before':>8} {'after':>8}",
        f"{'mean reward of the batch':34} {number(summary['reward_first']):>8} {number(summary['reward_last']):>8}",
    ]
    for label, name in _MEASURED if evaluated else ():
        lines.append(f"{label:34} {number(summary[name + '_before']):>8} {number(summary[name + '_after']):>8}")
    for modality, after in summary["accuracy_by_modality"].items():
        before = summary["accuracy_by_modality_before"].get(modality)
        lines.append(f"{'  ' + modality + ', greedy':34} {number(before):>8} {number(after):>8}")
    checkpoint, best, curves = whole_checkpoint(run_dir), best_of(run_dir), run_dir / "curves.png"
    lines += [
        "",
        learned(summary),
        "",
        f"merged model   {run_dir / 'model'}",
        f"checkpoint     {checkpoint}" + (f" (step {step_of(checkpoint)})" if checkpoint else ""),
        *([f"best           {run_dir / 'checkpoints' / 'best'} ({_best_words(best[1])})"] if best else []),
        *([f"predictions    {run_dir / 'predictions.jsonl'}"] if evaluated else []),
        f"curves         {curves if curves.exists() else 'not drawn: matplotlib is not installed'}",
        f"metrics, logs  {run_dir / 'metrics.jsonl'}, {run_dir / 'logs'}",
    ]
    return "\n".join(lines)


# Panels of the picture: title, (label, metric) of each line. A metric with * stands for one line a modality.
_PANELS = (
    ("mean reward", (("reward", REWARD),)),
    ("answers of the batch", (("accuracy", "reward/all/acc"), ("format", "reward/all/format"))),
    ("accuracy by modality, validation", (("", "val-core/omnimedvqa/*/acc/mean@1"),)),
    ("answer length (tokens)", (("mean", "response_length/mean"),)),
    ("KL to the reference policy", (("kl", "actor/kl_loss"),)),
    ("entropy of the policy", (("entropy", "actor/entropy"),)),
)


def panels(metrics: dict[int, dict]) -> list[tuple[str, list[tuple[str, list[tuple[int, float]]]]]]:
    """(title, curves) of each panel; a curve is its label and (step, value) points, none where it was not logged."""
    found = []
    for title, curves in _PANELS:
        lines = []
        for label, key in curves:
            start, star, end = key.partition("*")
            keys = [key]
            if star:
                keys = sorted({k for m in metrics.values() for k in m if k.startswith(start) and k.endswith(end)})
            for name in keys:
                points = [(step, m[name]) for step, m in metrics.items() if name in m]
                lines.append((name[len(start) : -len(end)] if star else label, points))
        found.append((title, lines))
    return found


def draw_curves(run_dir: Path) -> Path | None:
    """``curves.png`` from the run's metrics; None where matplotlib (extra ``report``) is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    for axis, (title, curves) in zip(axes.flat, panels(read_metrics(run_dir)), strict=True):
        for label, points in curves:
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(axis.lines) > 4:  # beside them: there is no corner that eight curves leave free
            axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        elif len(axis.lines) > 1:
            axis.legend(fontsize="small")
    figure.suptitle(run_dir.name)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def resolve_config(run_dir: Path) -> None:
    """``config.yaml``: what hydra composed for verl, with every reference in it resolved."""
    composed = run_dir / "config" / "config.yaml"
    if composed.is_file():
        from omegaconf import OmegaConf

        config = OmegaConf.load(composed)
        OmegaConf.resolve(config)
        OmegaConf.save(config, run_dir / "config.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m medr1_verl.summary", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--model", required=True, help="the model that was trained, as the run was given it")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--before", type=Path, help="predictions of the model before training")
    args = parser.parse_args(argv)
    summary = summarize(args.run_dir, args.model, args.seed, args.before)
    draw_curves(args.run_dir)
    resolve_config(args.run_dir)
    partial = args.run_dir / "summary.json.partial"
    partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    partial.rename(args.run_dir / "summary.json")
    print(table(summary, args.run_dir))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None, "summary"))
