r"""Three readings of one model output.

* strict     what the reward pays for: the answer block, well formed (:mod:`medr1_verl.parsing`)
* reference  the released evaluation scripts: ``<answer>\s*(\w+)\s*</answer>``, first match, exact letter; their
             script for tag-less styles falls back to the raw output where the word "answer" does not occur
* tolerant   also finds the letter in common untagged answers ("C.", "(C) CT", "The answer is C"), for models
             that never saw this project's prompt

Training must pay strictly and a baseline must not lose for its manners, so every table has all three side by side.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from medr1_verl.open_answers import normalize, token_f1
from medr1_verl.parsing import LETTERS, option_letter
from medr1_verl.reward import compute_score

_REFERENCE = re.compile(r"<answer>\s*(\w+)\s*</answer>")

# A letter that stands alone at the start: "C", "C.", "(C)", "C) CT scan", "C: CT", "**C**", "Option C".
_LEADING = re.compile(
    r"\s*[*_`\"'\[({$]{0,4}(?:option\s{1,3})?[*_`\"'\[({$]{0,4}([A-Za-z])(?=$|[\s.,:;)\]}*_`\"$]|['-](?!\w))",
    re.IGNORECASE,
)
# "the answer is C", "Answer: (C)", "correct option is **C**", "\boxed{C}", "\boxed{\text{C}}".
_STATED = re.compile(
    r"(?:\b(?:answer|option|choice)\b(?:\s{1,3}(?:is|would\s{1,3}be|should\s{1,3}be))?\s{0,3}[:=]?\s{0,3}"
    r"(?:option\s{1,3})?|\\boxed\{(?:\\text\{)?)"
    r"[*_`\"'\[({$]{0,4}([A-Za-z])(?=$|[\s.,:;)\]}*_`\"'$])",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"(?<![A-Za-z0-9])A [a-z]")
_ALONE = re.compile(r"(?<![A-Za-z0-9'-])([A-Z])(?![A-Za-z0-9'-])")


def tolerant_letter(text: str, options: Sequence[str]) -> str:
    """The option letter that ``text`` gives, tags or not; "" where none can be told.

    Looked at in this order, each time only letters that the question has: the last answer block (closed or not); what
    follows the reasoning, as a leading letter or as an option's own text; a stated answer ("the answer is C", the last
    one); the only option whose text occurs; the only capital letter that stands alone.
    """
    letters = LETTERS[: len(options)]
    body = _said(text)
    letter = _short_answer(body, options) or _stated(body, letters) or _mentioned(body, options)
    return letter if letter or "<answer>" in text else _alone(body, letters)


def _short_answer(body: str, options: Sequence[str]) -> str:
    """The letter when the body opens with one, or is an option's own text."""
    named = option_letter(body.strip(), options)
    if named:
        return named
    match = _LEADING.match(body)
    if match is None:
        return ""
    letter, rest = match[1].upper(), body[match.end() :]
    if letter not in LETTERS[: len(options)]:
        return ""
    # "A CT scan shows" opens with an article, "C CT" repeats the option: a bare space needs the option's text after it.
    if rest[:1] == " " and rest.strip() and not _same_text(rest, options[LETTERS.index(letter)]):
        return ""
    return letter


def _same_text(rest: str, option: str) -> bool:
    def key(text: str) -> str:
        return text.strip(" \t\r\n.:)*-").lower()

    return key(rest).startswith(key(option))


def _stated(body: str, letters: str) -> str:
    found = [
        match[1].upper()
        for match in _STATED.finditer(body)
        if match[1].upper() in letters and not (match[1] in "Aa" and re.match(r" [a-z]", body[match.end() :]))
    ]
    return found[-1] if found else ""


def _mentioned(body: str, options: Sequence[str]) -> str:
    """The only option whose text occurs as whole words; an option inside a longer mentioned one does not count."""
    text = f" {_words(body)} "
    found: dict[int, str] = {}
    for index, option in enumerate(options):
        words = _words(option)
        if words and f" {words} " in text:
            found[index] = words
    kept = [
        index
        for index, words in found.items()
        if not any(
            other != index and f" {words} " in f" {longer} " and words != longer for other, longer in found.items()
        )
    ]
    return LETTERS[kept[0]] if len(kept) == 1 else ""


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _alone(body: str, letters: str) -> str:
    """The only capital letter that stands alone; an "A" before a small letter is an article."""
    found = set(_ALONE.findall(body)) & set(letters)
    if "A" in found and _ARTICLE.search(body):
        found.remove("A")
    return found.pop() if len(found) == 1 else ""


def reference_letter(text: str, style: str) -> str:
    """What the released evaluation extracts from ``text``: compared with the gold letter as it is."""
    match = _REFERENCE.search(text)
    if style == "no-think" and "answer" not in text:
        return text
    return match[1] if match else ""


def read_answer(text: str, style: str, options: Sequence[str], answer: str) -> dict[str, Any]:
    """The keys of a prediction that depend on the output: the strict reading, then the other two.

    For an open question (no options) ``pred`` is the normalized answer, the tolerant reading also takes untagged text,
    and ``token_f1`` (0-1) says how near that comes.
    """
    strict = compute_score("", text, answer, {"options": list(options), "style": style})
    reference = reference_letter(text, style)
    reading = {
        "output": text,
        "pred": strict["pred"],
        "acc": strict["acc"],
        "format": strict["format"],
        "parsed": strict["parsed"],
    }
    if options:
        tolerant = strict["pred"] or tolerant_letter(text, options)
        hit = tolerant == answer
    else:
        tolerant = strict["pred"] or normalize(_said(text))
        hit = bool(tolerant) and tolerant == normalize(answer)
        reading["token_f1"] = token_f1(tolerant, answer, {})
    return reading | {
        "pred_tolerant": tolerant,
        "acc_tolerant": int(hit),
        "pred_reference": reference if len(reference) == 1 or not options else "",
        "acc_reference": int(reference == answer),
    }


def _said(text: str) -> str:
    """The last answer block, closed or not; without one, what follows the reasoning."""
    start = text.rfind("<answer>")
    if start >= 0:
        return text[start + len("<answer>") :].split("</answer>", 1)[0]
    end = text.rfind("</think>")
    return text[end + len("</think>") :] if end >= 0 else text.replace("<think>", "")


def majority(preds: Sequence[str]) -> str:
    """The letter given most often; the earliest of equals; unparsed answers ("") do not vote."""
    votes = Counter(pred for pred in preds if pred)
    return max(votes, key=lambda letter: votes[letter]) if votes else ""
