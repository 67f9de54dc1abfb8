"""The blind option prior: a table of option texts that sees neither image nor question, yet scores 95-100 % in-domain.

OmniMedVQA's gold texts come from a small closed set while its distractors were invented by a language model and
are rarely gold elsewhere, so "how often is this text gold when it is shown?", counted over the training rows, answers
most test rows. Any accuracy of a trained model has to be read beside this number: what lies above it may
have come from the image, what lies below it certainly did not need one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

Row = tuple[Sequence[str], int]
"""One question as the prior sees it: the options' texts in order, and the index of the gold one."""


def exact(text: str) -> str:
    """The option as written; typographic tells (a lone trailing period, a lower-case initial) stay visible."""
    return text


def normalized(text: str) -> str:
    """Lower case, no trailing period: what is left of the shortcut once typographic tells are removed."""
    return text.strip().lower().removesuffix(".").rstrip()


class OptionPrior:
    """P(gold | shown) of every option text, counted over training rows.

    ``key`` maps an option's text to what is counted: :func:`exact` or :func:`normalized`. ``pseudo_count`` draws each
    text's share toward 1/4 by that many imagined showings, so that a text that was gold 300 times of 301 outranks one
    that was gold once of once, and a text never shown is unknown rather than wrong. Three uses:

    * ``OptionPrior(train, key).accuracy(test)``: the plain ratio, 0 where unseen (Dermoscopy of the published
      splits, normalized: 95.33);
    * ``OptionPrior(train, key, PSEUDO_COUNT).accuracy(test)``: the same, smoothed, ties to the first (95.10);
    * ``OptionPrior(train, key, PSEUDO_COUNT).expected_accuracy(test)``: ties shared. Across domains, where most texts
      are unseen and tie, only this is free of the order of the options; it is the blind transfer matrix of the
      published splits, and what tables show beside a cell.
    """

    def __init__(self, rows: Iterable[Row], key: Callable[[str], str] = exact, pseudo_count: float = 0.0):
        self.key = key
        self.pseudo_count = pseudo_count
        self.shown: Counter[str] = Counter()
        self.gold: Counter[str] = Counter()
        for options, gold in rows:
            keys = [key(option) for option in options]
            self.shown.update(keys)
            self.gold[keys[gold]] += 1

    def score(self, option: str) -> float:
        """Times gold over times shown, in 0..1, drawn toward 1/4 by the pseudo count; without one, 0 where unseen."""
        key = self.key(option)
        shown = self.shown[key] + self.pseudo_count
        return (self.gold[key] + self.pseudo_count / 4) / shown if shown else 0.0

    def predict(self, options: Sequence[str]) -> int:
        """Index of the option with the highest score; the first of equals."""
        scores = [self.score(option) for option in options]
        return scores.index(max(scores))

    def expected_hit(self, options: Sequence[str], gold: int) -> float:
        """Chance, in 0..1, that the prior answers ``gold`` when it draws among the options of highest score."""
        scores = [self.score(option) for option in options]
        best = max(scores)
        return (scores[gold] == best) / scores.count(best)

    def accuracy(self, rows: Iterable[Row]) -> float:
        """Share of ``rows`` whose gold option is predicted, ties to the first, 0-100; nan without rows."""
        return _percent([float(self.predict(options) == gold) for options, gold in rows])

    def expected_accuracy(self, rows: Iterable[Row]) -> float:
        """Mean of :meth:`expected_hit` over ``rows``, 0-100; nan without rows."""
        return _percent([self.expected_hit(options, gold) for options, gold in rows])


PSEUDO_COUNT = 2.0
"""Two imagined showings: the value behind the blind figures of the published splits."""


def _percent(shares: list[float]) -> float:
    return 100.0 * sum(shares) / len(shares) if shares else float("nan")


def chance(rows: Iterable[Row]) -> float:
    """Expected accuracy (0-100) of drawing an option at random: the mean of 1 / number of options; nan without rows."""
    return _percent([1 / len(options) for options, _ in rows])
