"""The paper's two matrices from prediction files: train on one slice, test on all, with what each number is worth.

Every cell has its interval, chance and the blind option prior beside it, and where they were measured the gain over
the base model and what each control changes. All accuracies are in per cent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medr1_verl.errors import UserError
from medr1_verl.evaluation.runs import READINGS, Questions, Run, TrainingRows
from medr1_verl.evaluation.statistics import REPLICATES, bootstrap_sums, difference_interval, mcnemar, share_interval
from medr1_verl.prompt import LETTERS
from medr1_verl.slices import SLUGS

Cell = dict[str, Any]


@dataclass
class Settings:
    """How the tables are made. ``reading`` is strict, tolerant or reference."""

    reading: str = "strict"
    level: float = 0.95
    replicates: int = REPLICATES
    seed: int = 0


@dataclass(frozen=True)
class _Share:
    """A share over some rows: handles of its numerator and of its number of rows."""

    hits: int
    rows: int


class _Counts:
    """Quantities summed over rows, kept per image, so that one set of bootstrap draws serves them all.

    Only images of the questions in ``rows`` are drawn. Add all shares, then ``draw`` once.
    """

    def __init__(self, images: Sequence[str], rows: NDArray[np.bool_]):
        index: dict[str, int] = {}
        self._rows = np.flatnonzero(rows)
        self._cluster = np.array([index.setdefault(images[int(row)], len(index)) for row in self._rows])
        self._n_images = len(index)
        self._columns: list[NDArray[np.float64]] = []
        self._sums: NDArray[np.float64] | None = None

    def add(self, values: NDArray[np.floating], where: NDArray[np.bool_]) -> _Share:
        """A share: the sum of ``values`` over the questions ``where``, and their number."""
        share = _Share(len(self._columns), len(self._columns) + 1)
        for column in (np.where(where, values, 0.0), where.astype(float)):
            sums = np.bincount(self._cluster, weights=column[self._rows], minlength=self._n_images)
            self._columns.append(sums.astype(np.float64))
        return share

    def total(self, handle: int) -> float:
        return float(self._columns[handle].sum())

    def images(self, handle: int) -> NDArray[np.bool_]:
        """Which images the counted rows show."""
        return self._columns[handle] > 0

    def draw(self, replicates: int, seed: int) -> None:
        self._sums = bootstrap_sums(np.stack(self._columns, axis=1), replicates, seed)

    def replicates(self, handle: int) -> NDArray[np.float64]:
        assert self._sums is not None
        return self._sums[:, handle]


@dataclass(frozen=True)
class _Estimate:
    """A share, or a mean of shares, with its replicates (0-1), its rows and which images they show.

    ``sums`` are the replicates' numerator and denominator where it is a plain share.
    """

    value: float
    replicates: NDArray[np.float64]
    rows: int
    shown: NDArray[np.bool_]
    sums: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    @property
    def images(self) -> int:
        return int(self.shown.sum())

    @classmethod
    def of(cls, counts: _Counts, share: _Share) -> _Estimate:
        rows = counts.total(share.rows)
        sums = counts.replicates(share.hits), counts.replicates(share.rows)
        return cls(counts.total(share.hits) / rows, _ratio(*sums), int(rows), counts.images(share.rows), sums)

    @classmethod
    def mean(cls, parts: Sequence[_Estimate]) -> _Estimate:
        """Macro: every part counts the same. Images behind several parts count once."""
        value = float(np.mean([part.value for part in parts]))
        replicates = np.mean([part.replicates for part in parts], axis=0)
        return cls(value, replicates, sum(part.rows for part in parts), np.any([part.shown for part in parts], axis=0))

    @classmethod
    def pooled(cls, parts: Sequence[_Estimate]) -> _Estimate:
        """Micro: every row counts the same. The parts must be plain shares."""
        rows = sum(part.rows for part in parts)
        known = [part.sums for part in parts if part.sums is not None]
        hits, counts = (np.sum([pair[side] for pair in known], axis=0) for side in (0, 1))
        value = sum(part.value * part.rows for part in parts) / rows
        shown = np.any([part.shown for part in parts], axis=0)
        return cls(value, _ratio(hits, counts), rows, shown, (hits, counts))

    def as_cell(self, settings: Settings) -> Cell:
        low, high = share_interval(self.value, self.replicates, self.rows, self.images, settings.level)
        return {"accuracy": 100 * self.value, "low": 100 * low, "high": 100 * high, "n": self.rows}

    def minus(self, other: _Estimate, settings: Settings) -> Cell:
        images = int((self.shown | other.shown).sum())
        difference = self.value - other.value
        low, high = difference_interval(difference, self.replicates - other.replicates, images, settings.level)
        return {"points": 100 * difference, "low": 100 * low, "high": 100 * high}


def build(
    questions: Questions,
    runs: Sequence[Run],
    settings: Settings,
    base: str | None = None,
    training: TrainingRows | None = None,
) -> dict[str, Any]:
    """All tables as one JSON-ready dict: ``modality`` and ``question_type`` matrices, and ``runs``, one row each.

    Runs trained on a modality stand in the modality matrix, runs trained on a question type in the other, all other
    runs (a base model, a run on everything) in both; a matrix that no run was trained for shows all complete runs.
    Raises :class:`UserError` where runs of one matrix did not answer the same rows of a slice, and where ``base`` is
    no run.
    """
    if base is not None and base not in {run.name for run in runs}:
        raise UserError(f"base {base!r} is none of the runs: {', '.join(run.name for run in runs)}")
    made: dict[str, Any] = {
        "reading": settings.reading,
        "level": settings.level,
        "replicates": settings.replicates,
        "seed": settings.seed,
        "base": base,
        "training_rows": None if training is None else len(training.gold),
    }
    for by in SLUGS:
        own = [run for run in runs if run.trained_on in SLUGS[by]]
        members = [run for run in runs if run.trained_on is None or run in own]
        if not own and len(members) < len(runs):
            # All runs were trained for the other matrix: this one breaks down those that answered all rows.
            everything = np.any([run.asked() for run in runs], axis=0)
            members = [run for run in runs if run.asked()[everything].all()]
        made[by] = (
            _Matrix(by, questions, members, own or members, settings, base, training).build() if members else None
        )
    made["runs"] = _overview(questions, runs, settings, base, training)
    return made


class _Matrix:
    """One matrix: rows are runs, columns are test slices."""

    def __init__(
        self,
        by: str,
        questions: Questions,
        runs: Sequence[Run],
        deciding: Sequence[Run],
        settings: Settings,
        base: str | None,
        training: TrainingRows | None,
    ):
        self.by, self.settings, self.training = by, settings, training
        self.runs = sorted(runs, key=lambda run: _order(by, run.trained_on))
        self.base = next((run for run in runs if run.name == base), None)
        self.measure = READINGS[settings.reading]
        slugs = np.array(questions.modality if by == "modality" else questions.question_type)
        universe = np.any([run.asked() for run in deciding], axis=0)
        present = set(slugs[universe])
        self.columns = [slug for slug in SLUGS[by] if slug in present] + sorted(present - set(SLUGS[by]))
        self.rows_of = {slug: universe & (slugs == slug) for slug in self.columns}
        self.questions = questions
        self._check_same_rows()
        self.counts = _Counts(questions.image, universe)
        self.n_options = np.array(questions.n_options)

    def _check_same_rows(self) -> None:
        for slug, rows in self.rows_of.items():
            for run in self.runs:
                answered, wanted = int((rows & run.asked()).sum()), int(rows.sum())
                if answered not in (0, wanted):
                    raise UserError(
                        f"run {run.name!r} answered {answered} of the {wanted} rows of {slug} that the other runs "
                        "answered; evaluate all runs on the same rows"
                    )
        for run in self.runs:
            if np.isnan(run.measures["none"][self.measure]).all():
                raise UserError(f"run {run.name!r}: its files have no {self.settings.reading} reading")

    def build(self) -> dict[str, Any]:
        shares: dict[tuple[str, str, str], _Share] = {}
        for run in self.runs:
            for control, measures in run.measures.items():
                for slug, rows in self.rows_of.items():
                    asked = rows & run.asked(control) & run.asked()
                    if not asked.any():
                        continue
                    shares[run.name, control, slug] = self.counts.add(measures[self.measure], asked)
                    if control != "none":
                        # The plain answers to the rows that the control asked, so that the difference is paired.
                        plain = run.measures["none"][self.measure]
                        shares[run.name, f"none for {control}", slug] = self.counts.add(plain, asked)
        self.counts.draw(self.settings.replicates, self.settings.seed)
        self.estimates = {key: _Estimate.of(self.counts, share) for key, share in shares.items()}
        rows = [self._row(run) for run in self.runs]
        matrix = [run for run in self.runs if run.trained_on in SLUGS[self.by]]
        return {
            "columns": self.columns,
            "rows": rows,
            "column_means": {slug: self._means([(run, slug) for run in matrix]) for slug in self.columns},
            "overall": self._means([(run, slug) for run in matrix for slug in self.columns]),
            "diagonal": self._means([(run, run.trained_on) for run in matrix if run.trained_on in self.columns]),
            "off_diagonal": self._means(
                [(run, slug) for run in matrix for slug in self.columns if slug != run.trained_on]
            ),
        }

    def _row(self, run: Run) -> dict[str, Any]:
        unseen = self._unseen(run)
        hits = {
            name: self._prior_hits(run, normalize)
            for name, normalize in (("prior_normalized", True), ("prior_exact", False))
        }
        cells: dict[str, Cell | None] = {}
        for slug in self.columns:
            if (run.name, "none", slug) not in self.estimates:
                cells[slug] = None
                continue
            rows = self.rows_of[slug]
            cell = self._cell(run, [slug])
            cell["chance"] = _chance(self.n_options[rows])
            for name, expected in hits.items():
                cell[name] = None if expected is None else 100 * float(np.nanmean(expected[rows]))
            cell |= self._unleaked(run, rows, unseen)
            cell |= self._mcnemar(run, rows)
            for name in ("tolerant", "reference"):
                values = run.measures["none"][READINGS[name]][rows]
                cell[name] = None if np.isnan(values).all() else 100 * float(np.nanmean(values))
            cell["unparsed"] = 100 * (1 - float(run.measures["none"]["parsed"][rows].mean()))
            cells[slug] = cell
        complete = all(cells.values())
        return {
            "run": run.name,
            "trained_on": run.trained_on,
            "cells": cells,
            "missing": [slug for slug, cell in cells.items() if cell is None],
            "macro": self._cell(run, self.columns, _Estimate.mean) if complete else None,
            "micro": self._cell(run, self.columns, _Estimate.pooled) if complete else None,
        }

    def _cell(
        self, run: Run, slugs: Sequence[str], combine: Callable[[Sequence[_Estimate]], _Estimate] = _Estimate.mean
    ) -> Cell:
        """Accuracy over ``slugs``, gain over the base and effect of each control, with their intervals."""

        def estimate(name: str, control: str) -> _Estimate | None:
            parts = [self.estimates.get((name, control, slug)) for slug in slugs]
            if any(part is None for part in parts):
                return None
            return parts[0] if len(parts) == 1 else combine([part for part in parts if part is not None])

        own = estimate(run.name, "none")
        assert own is not None
        cell = own.as_cell(self.settings) | {"images": own.images}
        if self.base is not None and run is not self.base:
            other = estimate(self.base.name, "none")
            if other is not None:
                gain = own.minus(other, self.settings)
                cell["gain"] = gain | {"relative": 100 * (own.value / other.value - 1) if other.value else None}
        controls = {}
        for control in run.measures:
            without, plain = estimate(run.name, control), estimate(run.name, f"none for {control}")
            if control != "none" and without is not None and plain is not None:
                controls[control] = without.as_cell(self.settings) | {"difference": plain.minus(without, self.settings)}
        if controls:
            cell["controls"] = controls
        return cell

    def _means(self, places: Sequence[tuple[Run, str | None]]) -> dict[str, Any] | None:
        """Macro and micro mean over cells of the matrix; None where a cell is missing."""
        parts = [self.estimates.get((run.name, "none", slug or "")) for run, slug in places]
        if not parts or any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        result: dict[str, Any] = {"cells": len(known)}
        for name, combine in (("macro", _Estimate.mean), ("micro", _Estimate.pooled)):
            mean = combine(known)
            result[name] = mean.as_cell(self.settings)
            others = (
                [self.estimates.get((self.base.name, "none", slug or "")) for _, slug in places] if self.base else []
            )
            if others and all(others):
                base = combine([other for other in others if other is not None])
                relative = 100 * (mean.value / base.value - 1) if base.value else None
                result[name]["gain"] = mean.minus(base, self.settings) | {"relative": relative}
        return result

    def _prior_hits(self, run: Run, normalize: bool) -> NDArray[np.float64] | None:
        """For every question the prior's chance to be right, learned from what the run was trained on."""
        if self.training is None:
            return None
        prior = self.training.prior(run.trained_on, normalize)
        return np.array(
            [
                prior.expected_hit(options, LETTERS.index(answer)) if options and answer else np.nan
                for options, answer in zip(self.questions.options, self.questions.answer, strict=True)
            ]
        )

    def _unseen(self, run: Run) -> NDArray[np.bool_] | None:
        """Questions none of whose images is among the training images."""
        if self.training is None:
            return None
        known = self.training.images(run.trained_on)
        return np.array([known.isdisjoint(image.split("\n")) for image in self.questions.image])

    def _unleaked(self, run: Run, rows: NDArray[np.bool_], unseen: NDArray[np.bool_] | None) -> Cell:
        if unseen is None:
            return {"unleaked_n": None, "unleaked_accuracy": None}
        kept = rows & unseen
        values = run.measures["none"][self.measure][kept]
        return {"unleaked_n": int(kept.sum()), "unleaked_accuracy": 100 * float(values.mean()) if kept.any() else None}

    def _mcnemar(self, run: Run, rows: NDArray[np.bool_]) -> Cell:
        if self.base is None or run is self.base:
            return {}
        return _mcnemar(run, self.base, rows, self.measure)


def _mcnemar(run: Run, base: Run, rows: NDArray[np.bool_], measure: str) -> Cell:
    """McNemar's test on those of ``rows`` that both answered; {} where there are none."""
    both = rows & run.asked() & base.asked()
    if not both.any():
        return {}
    own, other = (one.measures["none"][measure][both] > 0 for one in (run, base))
    run_only, base_only = int((own & ~other).sum()), int((other & ~own).sum())
    return {"mcnemar": {"run_only": run_only, "base_only": base_only, "p": mcnemar(run_only, base_only)}}


def _ratio(hits: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):  # a small slice may be missing from a draw
        return hits / rows


def _order(by: str, slug: str | None) -> int:
    return SLUGS[by].index(slug) if slug in SLUGS[by] else -1


def _overview(
    questions: Questions, runs: Sequence[Run], settings: Settings, base: str | None, training: TrainingRows | None
) -> list[dict[str, Any]]:
    """One row for each run over all that it answered: readings, format, lengths, controls, blind baselines, and the
    gain over the base on the rows that both answered.
    """
    counts = _Counts(questions.image, np.any([run.asked() for run in runs], axis=0))
    measure = READINGS[settings.reading]
    shares: dict[tuple[str, str], tuple[_Share, _Share]] = {}
    for run in runs:
        for control, measures in run.measures.items():
            both = run.asked(control) & run.asked()
            if both.any():
                shares[run.name, control] = (
                    counts.add(measures[measure], both),
                    counts.add(run.measures["none"][measure], both),
                )
    compared = next((run for run in runs if run.name == base), None)
    gains: dict[str, tuple[_Share, _Share]] = {}
    for run in runs:
        if compared is not None and run is not compared and (both := run.asked() & compared.asked()).any():
            gains[run.name] = (
                counts.add(run.measures["none"][measure], both),
                counts.add(compared.measures["none"][measure], both),
            )
    counts.draw(settings.replicates, settings.seed)
    n_options = np.array(questions.n_options)
    rows = []
    for run in runs:
        asked = run.asked()
        plain = {name: values[asked] for name, values in run.measures["none"].items()}
        percent = {
            name: None if np.isnan(values).all() else 100 * float(np.nanmean(values)) for name, values in plain.items()
        }
        tokens = plain["tokens"]
        lengths = not np.isnan(tokens).all()
        own = _Estimate.of(counts, shares[run.name, "none"][0])
        row: dict[str, Any] = {
            "run": run.name,
            "trained_on": run.trained_on,
            "style": "+".join(sorted(run.styles)),
            **own.as_cell(settings),
            "images": own.images,
            "strict": percent["acc"],
            "tolerant": percent["acc_tolerant"],
            "reference": percent["acc_reference"],
            "format": percent["format"],
            "unparsed": _complement(percent["parsed"]),
            "unparsed_tolerant": _complement(percent["parsed_tolerant"]),
            "tokens_mean": float(np.nanmean(tokens)) if lengths else None,
            "tokens_median": float(np.nanmedian(tokens)) if lengths else None,
            "truncated": percent["truncated"],
            "token_f1": percent["token_f1"],
            "chance": _chance(n_options[asked]),
            "controls": {},
        }
        for control in run.measures:
            if control == "none" or (run.name, control) not in shares:
                continue
            without, same = [_Estimate.of(counts, share) for share in shares[run.name, control]]
            row["controls"][control] = without.as_cell(settings) | {"difference": same.minus(without, settings)}
        if compared is not None and run.name in gains:
            mine, theirs = (_Estimate.of(counts, share) for share in gains[run.name])
            relative = 100 * (mine.value / theirs.value - 1) if theirs.value else None
            row["gain"] = mine.minus(theirs, settings) | {"relative": relative, "n": mine.rows}
            row |= _mcnemar(run, compared, asked, measure)
        if training is not None:
            row |= _blind(questions, run, asked, training)
        rows.append(row)
    return rows


def _blind(questions: Questions, run: Run, asked: NDArray[np.bool_], training: TrainingRows) -> dict[str, Any]:
    """What no image and no model gets on the run's rows: option prior and majority letter of its training rows."""
    exact, loose = (training.prior(run.trained_on, normalize) for normalize in (False, True))
    letter = training.majority_letter(run.trained_on)
    chosen = [index for index in np.flatnonzero(asked) if questions.options[index] and questions.answer[index]]
    rows = [(questions.options[index], LETTERS.index(questions.answer[index])) for index in chosen]
    known = training.images(run.trained_on)
    unleaked = sum(known.isdisjoint(questions.image[index].split("\n")) for index in np.flatnonzero(asked))
    return {
        "prior_exact": exact.expected_accuracy(rows),
        "prior_normalized": loose.expected_accuracy(rows),
        "majority_letter": letter,
        "majority_letter_accuracy": 100
        * sum(questions.answer[index] == letter for index in chosen)
        / max(1, len(chosen)),
        "unleaked_n": unleaked,
    }


def _chance(n_options: NDArray[np.int_]) -> float | None:
    """Expected accuracy of a random option; None where all questions are open."""
    closed = n_options[n_options > 0]
    return 100 * float(np.mean(1 / closed)) if len(closed) else None


def _complement(percent: float | None) -> float | None:
    return None if percent is None else 100 - percent
