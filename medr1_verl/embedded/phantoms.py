"""Phantoms: drawn images of the 8 modalities, with questions that only the drawing answers.

A phantom is a test object made to look like a patient to an imaging device. These are drawn, not acquired: seeded
geometry plus noise, modelled on how each modality looks. They carry no medical knowledge and are no benchmark; they
are the data of the embedded run, where a model of a million parameters must be able to see the answer.

Every attribute is drawn at random, independently and uniformly, *before* the picture is drawn, and each question asks
for one attribute among all its values. So an option is the right one exactly as often as chance says, whatever the
question: the blind option prior, which solves the real data set to 95-100 %, is at chance here.

The one exception is the paper's own: within a single modality's slice, modality recognition has one right answer.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from medr1_verl.errors import UserError
from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES

SIDE = 224  # pixels; every phantom is square
LETTERS = "ABCD"

# What a modality is called in options, data set names and file names.
MODALITY_NAMES: dict[str, str] = {
    "ct": "CT",
    "mri": "MRI",
    "xray": "X-Ray",
    "ultrasound": "Ultrasound",
    "dermoscopy": "Dermoscopy",
    "fundus": "Fundus",
    "oct": "OCT",
    "microscopy": "Microscopy",
}

SIZES = ("Small", "Medium", "Large")
SEVERITIES = ("Mild", "Moderate", "Severe")
SIDES = ("Left", "Right")

Array = NDArray[np.float32]
Rng = np.random.Generator


@dataclass(frozen=True)
class Topic:
    """One question a modality has: ``options`` are all values of the drawn attribute ``attribute``.

    ``only_if`` names the diagnoses for which it can be asked (the size of a lesion that is not there cannot).
    """

    question_type: str
    question: str
    attribute: str
    options: tuple[str, ...]
    only_if: tuple[str, ...] = ()


def _topics(
    anatomy: tuple[str, tuple[str, ...]],
    diagnoses: tuple[str, ...],
    grading: tuple[str, tuple[str, ...]],
    other: tuple[str, str, tuple[str, ...]],
    graded: tuple[str, ...],
    other_only_if: tuple[str, ...] = (),
) -> tuple[Topic, ...]:
    return (
        Topic("anatomy_identification", anatomy[0], "anatomy", anatomy[1]),
        Topic("disease_diagnosis", "What is the diagnosis?", "diagnosis", diagnoses),
        Topic("lesion_grading", grading[0], "grade", grading[1], graded),
        Topic("other_biological_attributes", other[0], other[1], other[2], other_only_if),
    )


_HOW_LARGE = ("How large is the lesion?", SIZES)
_HOW_SEVERE = ("How severe is the disease?", SEVERITIES)

TOPICS: dict[str, tuple[Topic, ...]] = {
    "ct": _topics(
        anatomy=("Which region is shown?", ("Head", "Chest", "Abdomen", "Pelvis")),
        diagnoses=("Normal", "Tumor", "Cyst"),
        grading=_HOW_LARGE,
        graded=("Tumor", "Cyst"),
        other=("On which side of the image is the lesion?", "side", SIDES),
        other_only_if=("Tumor", "Cyst"),
    ),
    "mri": _topics(
        anatomy=("Which region is shown?", ("Brain", "Spine", "Knee", "Heart")),
        diagnoses=("Normal", "Tumor", "Cyst"),
        grading=_HOW_LARGE,
        graded=("Tumor", "Cyst"),
        other=("Which weighting is used?", "weighting", ("T1", "T2")),
    ),
    "xray": _topics(
        anatomy=("Which structure is marked?", ("Heart", "Lung", "Clavicle", "Diaphragm")),
        diagnoses=("Normal", "Pneumonia", "Effusion", "Cardiomegaly"),
        grading=_HOW_SEVERE,
        graded=("Pneumonia", "Effusion"),
        other=("On which side of the image is the lesion?", "side", SIDES),
        other_only_if=("Pneumonia", "Effusion"),
    ),
    "ultrasound": _topics(
        anatomy=("Which organ is shown?", ("Liver", "Kidney", "Bladder", "Heart")),
        diagnoses=("Normal", "Cyst", "Stone"),
        grading=_HOW_LARGE,
        graded=("Cyst", "Stone"),
        other=("Which probe is used?", "probe", ("Convex", "Linear")),
    ),
    "dermoscopy": _topics(
        anatomy=("Which region is shown?", ("Trunk", "Palm", "Scalp")),
        diagnoses=("Normal", "Nevus", "Melanoma"),
        grading=_HOW_LARGE,
        graded=("Nevus", "Melanoma"),
        other=("Which color is the lesion?", "color", ("Brown", "Black", "Red", "Blue")),
        other_only_if=("Nevus", "Melanoma"),
    ),
    "fundus": _topics(
        anatomy=("Which eye is shown?", SIDES),
        diagnoses=("Normal", "Retinopathy", "Glaucoma", "Drusen"),
        grading=_HOW_SEVERE,
        graded=("Retinopathy", "Drusen"),
        other=("Which filter is used?", "filter", ("Color", "Green")),
    ),
    "oct": _topics(
        anatomy=("Which region is shown?", ("Macula", "Disc")),
        diagnoses=("Normal", "Drusen", "Edema", "Detachment"),
        grading=_HOW_SEVERE,
        graded=("Drusen", "Edema", "Detachment"),
        other=("On which side of the image is the lesion?", "side", SIDES),
        other_only_if=("Drusen", "Edema", "Detachment"),
    ),
    "microscopy": _topics(
        anatomy=("Which tissue is shown?", ("Blood", "Muscle", "Fat", "Gland")),
        diagnoses=("Normal", "Tumor", "Infection"),
        grading=_HOW_SEVERE,
        graded=("Tumor", "Infection"),
        other=("Which stain is used?", "stain", ("Eosin", "Giemsa", "Silver")),
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Drawing: a canvas is a float array in 0..1, (SIDE, SIDE) or (SIDE, SIDE, 3); a mask is (SIDE, SIDE) in 0..1.
# Coordinates run from 0 to 1, x to the right and y down.
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _grid() -> tuple[Array, Array]:
    axis = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
    x, y = np.meshgrid(axis, axis)
    return np.asarray(x, dtype=np.float32), np.asarray(y, dtype=np.float32)


def _ellipse(x: float, y: float, rx: float, ry: float | None = None, tilt: float = 0.0, soft: float = 0.008) -> Array:
    """Mask of a filled ellipse; ``soft`` is the width of its edge."""
    ry = rx if ry is None else ry
    gx, gy = _grid()
    dx, dy = gx - x, gy - y
    if tilt:
        c, s = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
        dx, dy = dx * c + dy * s, dy * c - dx * s
    distance = np.sqrt((dx / rx) ** 2 + (dy / ry) ** 2)
    return np.clip((1 - distance) * (min(rx, ry) / soft) + 0.5, 0, 1).astype(np.float32)


def _ring(x: float, y: float, rx: float, ry: float, width: float, tilt: float = 0.0) -> Array:
    return _ellipse(x, y, rx, ry, tilt) - _ellipse(x, y, rx - width, ry - width, tilt)


def _blob(rng: Rng, x: float, y: float, radius: float, roughness: float, soft: float = 0.01) -> Array:
    """Mask of a filled blob whose radius varies with the angle by the fraction ``roughness``."""
    gx, gy = _grid()
    dx, dy = gx - x, gy - y
    angle = np.arctan2(dy, dx)
    edge = np.ones_like(angle)
    for harmonic in (2, 3, 5, 7):
        edge += roughness / harmonic**0.5 * rng.uniform(0.3, 1) * np.sin(harmonic * angle + rng.uniform(0, 6.28))
    return np.clip((radius * edge - np.hypot(dx, dy)) / soft + 0.5, 0, 1).astype(np.float32)


def _strokes(lines: Sequence[tuple[Sequence[tuple[float, float]], float]]) -> Array:
    """Mask of polylines, each ``(points, width)``; drawn at twice the size for smooth edges."""
    size = 2 * SIDE
    mask = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(mask)
    for points, width in lines:
        draw.line(
            [(px * size, py * size) for px, py in points], fill=255, width=max(1, round(width * size)), joint="curve"
        )
    return np.asarray(mask.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) / np.float32(255)


def _texture(rng: Rng, cells: int) -> Array:
    """Smooth noise of unit variance with about ``cells`` grains along a side."""
    noise = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    field = np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.asarray((field - field.mean()) / (field.std() + 1e-6), dtype=np.float32)


def _paint(canvas: Array, mask: Array, value: ArrayLike, opacity: float = 1.0) -> None:
    """Lay ``value`` (a grey level or three channels) over ``canvas`` where ``mask`` is."""
    weight = mask * np.float32(opacity)
    if canvas.ndim == 3:
        weight = weight[..., None]
    canvas += weight * (np.asarray(value, dtype=np.float32) - canvas)


def _blur(canvas: Array, pixels: float) -> Array:
    image = Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(pixels)), dtype=np.float32) / np.float32(255)


def _pick(rng: Rng, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]


_RADIUS = {"Small": 0.045, "Medium": 0.075, "Large": 0.115}
_LEVEL = {"Mild": 0, "Moderate": 1, "Severe": 2}


def _lesion(canvas: Array, rng: Rng, facts: dict[str, str], x: float, y: float, tumor: float, cyst: float) -> None:
    """A tumor is a rough solid blob of grey level ``tumor``; a cyst a smooth disc of ``cyst`` in a thin bright rim."""
    if facts["diagnosis"] == "Normal":
        return
    radius = _RADIUS[facts["grade"]] * rng.uniform(0.92, 1.08)
    if facts["diagnosis"] == "Tumor":
        _paint(canvas, _blob(rng, x, y, radius, 0.18), tumor)
    else:
        _paint(canvas, _ellipse(x, y, radius + 0.012), 0.8)
        _paint(canvas, _ellipse(x, y, radius), cyst)


def _side_x(facts: dict[str, str], rng: Rng, low: float, high: float) -> float:
    offset = rng.uniform(low, high)
    return 0.5 - offset if facts["side"] == "Left" else 0.5 + offset


def _draw_ct(rng: Rng, facts: dict[str, str]) -> Array:
    """An axial slice: air is black, fat dark, soft tissue grey, bone white."""
    canvas = np.full((SIDE, SIDE), 0.03, dtype=np.float32)
    region = facts["anatomy"]
    w, h = rng.uniform(0.95, 1.05, 2)
    if region == "Head":
        _paint(canvas, _ellipse(0.5, 0.5, 0.35 * w, 0.42 * h), 0.95)
        _paint(canvas, _ellipse(0.5, 0.5, 0.315 * w, 0.385 * h), 0.45)
        for sign in (-1, 1):
            _paint(canvas, _ellipse(0.5 + sign * 0.04, 0.47, 0.022, 0.10, sign * 0.25), 0.25)
        _paint(canvas, _strokes([(((0.5, 0.15), (0.5, 0.85)), 0.006)]), 0.6, 0.6)
    else:
        _paint(canvas, _ellipse(0.5, 0.52, 0.46 * w, 0.35 * h), 0.28)
        _paint(canvas, _ellipse(0.5, 0.52, 0.425 * w, 0.315 * h), 0.45)
        if region == "Chest":
            for sign in (-1, 1):
                _paint(canvas, _ellipse(0.5 + sign * 0.215, 0.51, 0.155 * w, 0.24 * h, sign * 0.15), 0.1)
            _paint(canvas, _ellipse(0.54, 0.46, 0.11, 0.13, 0.5), 0.6)
            for angle in np.linspace(0.25, 2.9, 7):
                for sign in (-1, 1):
                    x, y = 0.5 + 0.40 * w * np.cos(angle) * sign, 0.52 + 0.29 * h * np.sin(angle) * -sign
                    _paint(canvas, _ellipse(x, y, 0.03, 0.013, angle + 1.57), 0.92)
        elif region == "Abdomen":
            _paint(canvas, _blob(rng, 0.32, 0.45, 0.19, 0.10), 0.62)
            _paint(canvas, _ellipse(0.68, 0.40, 0.13, 0.09, 0.4), 0.5)
            _paint(canvas, _ellipse(0.68, 0.35, 0.09, 0.03, 0.2), 0.05)
            for sign in (-1, 1):
                _paint(canvas, _ellipse(0.5 + sign * 0.19, 0.66, 0.055, 0.085, sign * 0.4), 0.72)
        else:
            for sign in (-1, 1):
                _paint(canvas, _ellipse(0.5 + sign * 0.30, 0.50, 0.045, 0.17, sign * 0.45), 0.95)
                _paint(canvas, _ellipse(0.5 + sign * 0.24, 0.66, 0.06, 0.06), 0.9)
            _paint(canvas, _ellipse(0.5, 0.42, 0.12, 0.09), 0.55)
        spine = 0.74 if region != "Pelvis" else 0.76
        _paint(canvas, _ellipse(0.5, spine, 0.065, 0.055), 0.95)
        _paint(canvas, _ellipse(0.5, spine + 0.05, 0.02, 0.02), 0.4)
    _lesion(canvas, rng, facts, _side_x(facts, rng, 0.15, 0.21), rng.uniform(0.42, 0.56), tumor=0.85, cyst=0.02)
    return canvas + 0.03 * _texture(rng, 80) + 0.01 * _texture(rng, 8)


def _draw_mri(rng: Rng, facts: dict[str, str]) -> Array:
    """Smooth soft-tissue contrast, no bone signal; T1 and T2 differ in whether fluid is dark or bright."""
    canvas = np.full((SIDE, SIDE), 0.02, dtype=np.float32)
    t2 = facts["weighting"] == "T2"
    fluid, tissue, inner, fat = (0.95, 0.35, 0.5, 0.55) if t2 else (0.06, 0.6, 0.75, 0.95)
    region = facts["anatomy"]
    if region == "Brain":
        _paint(canvas, _ellipse(0.5, 0.5, 0.36, 0.43), fat)
        _paint(canvas, _ellipse(0.5, 0.5, 0.335, 0.405), 0.03)
        _paint(canvas, _ellipse(0.5, 0.5, 0.32, 0.39), fluid)
        _paint(canvas, _blob(rng, 0.5, 0.5, 0.325, 0.03), tissue)
        folds = np.clip(np.abs(_texture(rng, 14)) * 3, 0, 1)
        cortex = _ellipse(0.5, 0.5, 0.33, 0.40) - _ellipse(0.5, 0.5, 0.25, 0.31)
        _paint(canvas, cortex * (1 - folds), fluid, 0.8)
        _paint(canvas, _ellipse(0.5, 0.5, 0.21, 0.27, soft=0.03), inner)
        for sign in (-1, 1):
            _paint(canvas, _ellipse(0.5 + sign * 0.05, 0.46, 0.03, 0.12, sign * 0.3), fluid)
    elif region == "Spine":
        _paint(canvas, _ellipse(0.5, 0.5, 0.40, 0.60), tissue, 0.55)
        bend = rng.uniform(-0.05, 0.05)
        _paint(canvas, _strokes([([(0.62 + bend * np.sin(3 * t), t) for t in np.linspace(0, 1, 12)], 0.09)]), fluid)
        _paint(canvas, _strokes([([(0.62 + bend * np.sin(3 * t), t) for t in np.linspace(0, 1, 12)], 0.035)]), tissue)
        for t in np.linspace(0.05, 0.95, 7):
            x = 0.46 + bend * np.sin(3 * t)
            _paint(canvas, np.minimum(_ellipse(x, t, 0.11, 0.09), _ellipse(x, t, 0.2, 0.05)), inner)
            _paint(canvas, _ellipse(x, t + 0.075, 0.09, 0.014), fluid, 0.8)
    elif region == "Knee":
        _paint(canvas, _ellipse(0.5, 0.5, 0.34, 0.62), tissue, 0.6)
        shaft = _strokes([(((0.46, -0.1), (0.47, 0.32)), 0.22), (((0.5, 0.66), (0.5, 1.1)), 0.22)])
        _paint(canvas, np.maximum(shaft, _ellipse(0.47, 0.33, 0.20, 0.14)), inner)
        _paint(canvas, _ellipse(0.5, 0.63, 0.21, 0.09), inner)
        _paint(canvas, _ellipse(0.5, 0.505, 0.20, 0.035), fluid)
        _paint(canvas, _ellipse(0.75, 0.36, 0.05, 0.10, 0.2), inner)
    else:
        _paint(canvas, _ellipse(0.5, 0.5, 0.46, 0.40), tissue, 0.6)
        for sign in (-1, 1):
            _paint(canvas, _ellipse(0.5 + sign * 0.27, 0.45, 0.14, 0.22, sign * 0.2), 0.03)
        _paint(canvas, _ellipse(0.58, 0.58, 0.16, 0.15), tissue)
        _paint(canvas, _ellipse(0.58, 0.58, 0.10, 0.09), fat)
        _paint(canvas, _ellipse(0.40, 0.54, 0.08, 0.13, 0.5), fat)
    lesion = {"Tumor": 1.0 if t2 else 0.98, "Cyst": 0.0}
    _lesion(
        canvas, rng, facts, _side_x(facts, rng, 0.10, 0.18), rng.uniform(0.35, 0.6), lesion["Tumor"], lesion["Cyst"]
    )
    shading = 1 + 0.12 * _texture(rng, 3)
    return _blur(canvas, 0.9) * shading + 0.025 * _texture(rng, 112)


def _draw_xray(rng: Rng, facts: dict[str, str]) -> Array:
    """A frontal chest film: dark lungs under bright ribs, heart and diaphragm; a ring marks one structure."""
    gx, gy = _grid()
    canvas = np.full((SIDE, SIDE), 0.62, dtype=np.float32)
    canvas -= 0.45 * np.clip((np.abs(gx - 0.5) - 0.40 - 0.06 * gy) / 0.05, 0, 1)
    for sign in (-1, 1):
        lung = np.minimum(
            _ellipse(0.5 + sign * 0.20, 0.47, 0.145, 0.33, sign * -0.08, 0.03), np.clip((0.80 - gy) / 0.02, 0, 1)
        )
        _paint(canvas, lung, 0.16)
    heart = 0.20 if facts["diagnosis"] == "Cardiomegaly" else 0.105
    _paint(canvas, _ellipse(0.54, 0.66, heart * rng.uniform(0.95, 1.05), 0.15, 0.35, 0.03), 0.78)
    _paint(canvas, _strokes([(((0.5, 0.0), (0.5, 1.0)), 0.075)]), 0.82, 0.75)
    ribs = []
    for level in np.linspace(0.18, 0.72, 8):
        for sign in (-1, 1):
            arc = [
                (0.5 + sign * 0.37 * np.sin(t), level + 0.09 * (1 - np.cos(t)) - 0.05 * np.sin(2 * t))
                for t in np.linspace(0.1, 1.9, 12)
            ]
            ribs.append((arc, 0.014))
    _paint(canvas, _blur(_strokes(ribs), 0.8), 0.85, 0.34)
    for sign in (-1, 1):
        _paint(
            canvas,
            _strokes([(((0.5 + sign * 0.04, 0.15), (0.5 + sign * 0.2, 0.10), (0.5 + sign * 0.38, 0.08)), 0.026)]),
            0.9,
            0.8,
        )
        _paint(canvas, _ellipse(0.5 + sign * 0.20, 0.88, 0.24, 0.12, 0, 0.02), 0.85, 0.9)
    if facts["diagnosis"] == "Pneumonia":
        x, radius = _side_x(facts, rng, 0.19, 0.23), (0.06, 0.10, 0.15)[_LEVEL[facts["grade"]]]
        patch = _blob(rng, x, rng.uniform(0.40, 0.52), radius, 0.15, 0.05)
        _paint(canvas, patch * np.clip(0.85 + 0.2 * _texture(rng, 20), 0, 1), 0.85)
    elif facts["diagnosis"] == "Effusion":
        x = _side_x(facts, rng, 0.20, 0.22)
        top = (0.70, 0.58, 0.44)[_LEVEL[facts["grade"]]]
        meniscus = np.clip((gy - top - 0.25 * np.abs(0.5 - gx) * 0 + 0.9 * np.abs(gx - x) ** 2) / 0.02, 0, 1)
        _paint(canvas, meniscus * _ellipse(x, 0.62, 0.17, 0.42, 0, 0.02), 0.9)
    spots = {
        "Heart": (0.55, 0.66),
        "Lung": (0.5 + 0.22 * rng.choice((-1, 1)), 0.34),
        "Clavicle": (0.5 + 0.22 * rng.choice((-1, 1)), 0.10),
        "Diaphragm": (0.5 + 0.22 * rng.choice((-1, 1)), 0.84),
    }
    x, y = spots[facts["anatomy"]]
    x, y = x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02)
    _paint(canvas, _ring(x, y, 0.075, 0.075, 0.035), 0.0)
    _paint(canvas, _ring(x, y, 0.068, 0.068, 0.022), 1.0)
    return canvas + 0.02 * _texture(rng, 112)


def _draw_ultrasound(rng: Rng, facts: dict[str, str]) -> Array:
    """Speckle inside a fan (convex probe) or a rectangle (linear probe) on black; fluid is black, stones shadow."""
    gx, gy = _grid()
    tissue = np.full((SIDE, SIDE), 0.42, dtype=np.float32)
    organ = facts["anatomy"]
    if organ == "Liver":
        for _ in range(5):
            _paint(
                tissue,
                _ellipse(
                    rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.8), 0.012, rng.uniform(0.03, 0.07), rng.uniform(0, 3)
                ),
                0.1,
            )
        _paint(tissue, _strokes([([(t, 0.90 - 0.5 * (t - 0.5) ** 2) for t in np.linspace(0.1, 0.9, 14)], 0.025)]), 0.95)
    elif organ == "Kidney":
        _paint(tissue, _ellipse(0.5, 0.55, 0.25, 0.15, rng.uniform(-0.3, 0.3)), 0.2)
        _paint(tissue, _ellipse(0.5, 0.55, 0.14, 0.05, rng.uniform(-0.3, 0.3), 0.03), 0.9)
    elif organ == "Bladder":
        _paint(tissue, _ellipse(0.5, 0.55, 0.26, 0.21), 0.8)
        _paint(tissue, _ellipse(0.5, 0.55, 0.24, 0.19), 0.02)
    else:
        _paint(tissue, _ellipse(0.5, 0.58, 0.27, 0.30), 0.65)
        for sx, sy, rx, ry in (
            (-0.11, -0.11, 0.08, 0.13),
            (0.11, -0.11, 0.08, 0.13),
            (-0.10, 0.17, 0.08, 0.08),
            (0.10, 0.17, 0.08, 0.08),
        ):
            _paint(tissue, _ellipse(0.5 + sx, 0.55 + sy, rx, ry), 0.03)
    x, y = rng.uniform(0.38, 0.62), rng.uniform(0.40, 0.60)
    if facts["diagnosis"] != "Normal":
        radius = _RADIUS[facts["grade"]] * rng.uniform(0.92, 1.08)
        behind = np.clip((gy - y) / 0.02, 0, 1) * np.clip((radius * 0.95 - np.abs(gx - x)) / 0.01, 0, 1)
        if facts["diagnosis"] == "Cyst":
            _paint(tissue, behind, 0.85, 0.5)
            _paint(tissue, _ellipse(x, y, radius + 0.018), 1.0)
            _paint(tissue, _ellipse(x, y, radius), 0.0)
        else:
            _paint(tissue, behind, 0.0, 0.95)
            _paint(tissue, _ellipse(x, y, radius, radius * 0.75), 1.0)
    speckle = np.sqrt(rng.standard_normal((SIDE, SIDE)) ** 2 + rng.standard_normal((SIDE, SIDE)) ** 2).astype(
        np.float32
    )
    canvas = tissue * _blur(np.clip(speckle / 3, 0, 1), 0.7) * 2.4 * (1.1 - 0.35 * gy)
    if facts["probe"] == "Convex":
        angle, depth = np.arctan2(gx - 0.5, gy + 0.15), np.hypot(gx - 0.5, gy + 0.15)
        inside = (np.abs(angle) < 0.62) & (depth > 0.28) & (depth < 1.10)
    else:
        inside = (np.abs(gx - 0.5) < 0.30) & (gy > 0.05) & (gy < 0.95)
    return np.where(inside, canvas, 0.01).astype(np.float32)


_SKIN_COLORS = {
    "Brown": (0.47, 0.28, 0.16),
    "Black": (0.13, 0.10, 0.10),
    "Red": (0.75, 0.12, 0.16),
    "Blue": (0.20, 0.28, 0.60),
}


def _draw_dermoscopy(rng: Rng, facts: dict[str, str]) -> Array:
    """Skin under a dermatoscope: a nevus is round and even, a melanoma ragged and patchy."""
    gx, gy = _grid()
    canvas = np.ones((SIDE, SIDE, 3), dtype=np.float32) * np.array([0.90, 0.72, 0.62], dtype=np.float32)
    canvas *= rng.uniform(0.92, 1.05)
    canvas += (0.02 * _texture(rng, 40) + 0.02 * _texture(rng, 6))[..., None]
    site = facts["anatomy"]
    if site == "Palm":
        tilt = rng.uniform(-0.5, 0.5)
        phase = (gx * np.sin(tilt) + gy * np.cos(tilt)) * 2 * np.pi * 9 + 0.6 * _texture(rng, 4)
        _paint(canvas, np.clip(0.5 + np.sin(phase), 0, 1).astype(np.float32), (0.72, 0.50, 0.42), 0.6)
    if facts["diagnosis"] != "Normal":
        x, y = rng.uniform(0.42, 0.58, 2)
        radius = {"Small": 0.11, "Medium": 0.18, "Large": 0.27}[facts["grade"]] * rng.uniform(0.95, 1.05)
        color = np.array(_SKIN_COLORS[facts["color"]], dtype=np.float32)
        if facts["diagnosis"] == "Nevus":
            _paint(canvas, _blob(rng, x, y, radius, 0.03, 0.02), color)
            _paint(canvas, _ellipse(x, y, radius * 0.5, soft=0.05), color * 0.75, 0.6)
        else:
            shape = _blob(rng, x, y, radius, 0.30, 0.012)
            _paint(canvas, shape, color)
            _paint(canvas, shape * np.clip(_texture(rng, 12) * 2, 0, 1), color * 0.3 + 0.65, 0.85)
    if site == "Scalp":
        hairs = []
        for _ in range(16):
            x, y, turn = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.9, 1.5)
            bend = rng.uniform(-0.15, 0.15)
            steps = np.linspace(-0.45, 0.45, 8)
            hairs.append(([(x + t * np.cos(turn) + bend * t * t, y + t * np.sin(turn)) for t in steps], 0.011))
        _paint(canvas, _strokes(hairs), (0.10, 0.07, 0.06), 0.95)
    corner = np.clip((np.hypot(gx - 0.5, gy - 0.5) - 0.60) / 0.05, 0, 1)
    _paint(canvas, corner, (0.05, 0.04, 0.05))
    return canvas


def _draw_fundus(rng: Rng, facts: dict[str, str]) -> Array:
    """The retina in its round aperture: the optic disc lies towards the nose, so on the right of a right eye."""
    gx, gy = _grid()
    canvas = np.zeros((SIDE, SIDE, 3), dtype=np.float32) + 0.02
    aperture = _ellipse(0.5, 0.5, 0.46)
    base = np.array([0.80, 0.36, 0.14], dtype=np.float32) * rng.uniform(0.9, 1.05)
    _paint(canvas, aperture, base)
    canvas *= (1.05 - 0.9 * ((gx - 0.5) ** 2 + (gy - 0.5) ** 2) + 0.03 * _texture(rng, 10))[..., None]
    sign = 1 if facts["anatomy"] == "Right" else -1
    disc_x, disc_y = 0.5 + sign * rng.uniform(0.20, 0.24), 0.5 + rng.uniform(-0.03, 0.03)
    macula_x = 0.5 - sign * 0.08
    _paint(canvas, _ellipse(macula_x, 0.5, 0.09, soft=0.06), base * 0.5, 0.7)
    vessels = []
    for vertical in (-1, 1):
        for reach, width in ((0.55, 0.018), (0.75, 0.013), (0.30, 0.010)):
            wobble = rng.uniform(-0.03, 0.03)
            bow = rng.uniform(0.24, 0.34)
            vessels.append(
                (
                    [
                        (
                            disc_x - sign * reach * t,
                            disc_y + vertical * (bow * np.sin(2.0 * t) + wobble * np.sin(9 * t)),
                        )
                        for t in np.linspace(0, 1, 16)
                    ],
                    width,
                )
            )
        vessels.append(([(disc_x + sign * 0.2 * t, disc_y + vertical * 0.35 * t) for t in np.linspace(0, 1, 6)], 0.010))
    _paint(canvas, _strokes(vessels) * aperture, (0.45, 0.07, 0.05), 0.85)
    _paint(canvas, _ellipse(disc_x, disc_y, 0.075, 0.085), (0.98, 0.78, 0.45))
    cup = 0.065 if facts["diagnosis"] == "Glaucoma" else 0.025
    _paint(canvas, _ellipse(disc_x, disc_y, cup, cup * 1.15), (1.0, 0.98, 0.88))
    count = (6, 18, 42)[_LEVEL[facts["grade"]]]
    if facts["diagnosis"] == "Retinopathy":
        for _ in range(count):
            angle, distance = rng.uniform(0, 6.28), 0.40 * np.sqrt(rng.uniform(0.05, 1))
            spot = _ellipse(0.5 + distance * np.cos(angle), 0.5 + distance * np.sin(angle), rng.uniform(0.012, 0.026))
            _paint(canvas, spot, (0.30, 0.02, 0.02))
    elif facts["diagnosis"] == "Drusen":
        for _ in range(count):
            x, y = rng.normal(macula_x, 0.085), rng.normal(0.5, 0.085)
            _paint(canvas, _ellipse(x, y, rng.uniform(0.010, 0.022)), (1.0, 0.92, 0.35))
    if facts["filter"] == "Green":
        canvas = canvas.mean(-1, keepdims=True) * np.array([0.22, 1.05, 0.30], dtype=np.float32)
    return canvas + 0.012 * _texture(rng, 112)[..., None]


def _draw_oct(rng: Rng, facts: dict[str, str]) -> Array:
    """A cross-section of the retina: bright layers over a dark vitreous, with the foveal pit or the cup of the disc."""
    gx, gy = _grid()
    column = gx[0]
    tilt, lift = rng.uniform(-0.08, 0.08), rng.uniform(-0.03, 0.03)
    base = 0.68 + lift + tilt * (column - 0.5) + 0.008 * np.sin(7 * column + rng.uniform(0, 6))
    if facts["anatomy"] == "Macula":
        thickness = 0.26 - 0.13 * np.exp(-(((column - 0.5) / 0.10) ** 2))
    else:
        thickness = 0.24 - 0.38 * np.exp(-(((column - 0.5) / 0.09) ** 2))
    center = _side_x(facts, rng, 0.22, 0.28)
    level = _LEVEL[facts["grade"]]
    bump = np.exp(-(((column - center) / 0.11) ** 2))
    if facts["diagnosis"] == "Edema":
        thickness = thickness + (0.02, 0.06, 0.10)[level] * bump
    pigment = base.copy()
    if facts["diagnosis"] == "Drusen":
        spread = (0.05, 0.10, 0.17)[level]
        teeth = np.clip(np.sin((column - center) * 95), 0, 1) * (np.abs(column - center) < spread)
        pigment = pigment - 0.055 * teeth
    retina = pigment - 0.012
    if facts["diagnosis"] == "Detachment":
        retina = retina - (0.06, 0.11, 0.17)[level] * bump
    top = retina - thickness
    depth = (gy - top[None]) / np.maximum(retina - top, 1e-3)[None]
    canvas = np.full((SIDE, SIDE), 0.05, dtype=np.float32)
    inside = (depth >= 0) & (depth <= 1)
    layers = 0.50 + 0.22 * np.cos(depth * 2 * np.pi * 2.5) + 0.30 * (depth < 0.12)
    canvas = np.where(inside, layers, canvas).astype(np.float32)
    band = np.clip(1 - np.abs(gy - pigment[None]) / 0.022, 0, 1).astype(np.float32)
    choroid = np.clip((gy - base[None] - 0.02) / 0.01, 0, 1) * np.clip(1 - (gy - base[None]) / 0.30, 0, 1)
    _paint(canvas, (choroid * np.clip(0.7 + 0.25 * _texture(rng, 30), 0, 1)).astype(np.float32), 0.45)
    if facts["anatomy"] == "Disc":
        hole = np.clip(1 - np.abs(gx - 0.5) / 0.09, 0, 1)
        band = band * (hole == 0)
        _paint(canvas, (hole > 0) * np.clip((gy - base[None] + 0.05) / 0.05, 0, 1), 0.22)
    _paint(canvas, band, 1.0)
    if facts["diagnosis"] == "Edema":
        where = int(center * SIDE)
        middle = float(top[where] + retina[where]) / 2
        for _ in range((2, 5, 10)[level]):
            x, y = rng.normal(center, 0.035 + 0.02 * level), rng.normal(middle, 0.025 + 0.012 * level)
            _paint(canvas, _ellipse(x, y, rng.uniform(0.018, 0.030), rng.uniform(0.014, 0.024)), 0.04)
    speckle = rng.gamma(4.0, 0.25, (SIDE, SIDE)).astype(np.float32)
    return canvas * _blur(np.clip(speckle / 3, 0, 1), 0.6) * 3


_STAINS = {  # ground, tissue, nuclei
    "Eosin": ((0.97, 0.90, 0.94), (0.90, 0.52, 0.68), (0.38, 0.18, 0.52)),
    "Giemsa": ((0.88, 0.92, 0.97), (0.55, 0.62, 0.85), (0.18, 0.14, 0.48)),
    "Silver": ((0.97, 0.93, 0.80), (0.78, 0.62, 0.35), (0.16, 0.10, 0.06)),
}


def _draw_microscopy(rng: Rng, facts: dict[str, str]) -> Array:
    """A stained section or smear: the tissue is the pattern, the stain the palette, the disease what lies on top."""
    gx, gy = _grid()
    ground, flesh, nucleus = (np.array(c, dtype=np.float32) for c in _STAINS[facts["stain"]])
    canvas = np.ones((SIDE, SIDE, 3), dtype=np.float32) * ground
    tissue = facts["anatomy"]
    if tissue == "Blood":
        for _ in range(46):
            x, y, r = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.045, 0.055)
            _paint(canvas, _ellipse(x, y, r), flesh)
            _paint(canvas, _ellipse(x, y, r * 0.45, soft=0.02), ground, 0.6)
    elif tissue == "Muscle":
        tilt = rng.uniform(-0.35, 0.35)
        across = gx * np.sin(tilt) + gy * np.cos(tilt) + 0.01 * _texture(rng, 5)
        fibre = np.clip(0.75 + np.sin(across * 2 * np.pi * 6) * 2, 0, 1)
        _paint(canvas, fibre.astype(np.float32), flesh)
        _paint(
            canvas,
            np.clip(np.sin((gx * np.cos(tilt) - gy * np.sin(tilt)) * 2 * np.pi * 28), 0, 1) * fibre,
            flesh * 0.8,
            0.5,
        )
    elif tissue == "Fat":
        _paint(canvas, np.ones((SIDE, SIDE), dtype=np.float32), flesh)
        for row in range(-1, 7):
            for col in range(-1, 7):
                x = (col + 0.5 * (row % 2)) * 0.175 + rng.uniform(-0.012, 0.012)
                _paint(
                    canvas,
                    _blob(rng, x, row * 0.16 + rng.uniform(-0.012, 0.012), 0.080, 0.06),
                    np.array([0.99, 0.98, 0.99]),
                )
    else:
        _paint(canvas, np.clip(0.8 + 0.1 * _texture(rng, 20), 0, 1), flesh)
        for cx in (0.22, 0.75):
            for cy in (0.25, 0.76):
                x, y = cx + rng.uniform(-0.04, 0.04), cy + rng.uniform(-0.04, 0.04)
                _paint(canvas, _ellipse(x, y, 0.11), ground)
                for angle in np.linspace(0, 6.28, 15)[:-1]:
                    _paint(canvas, _ellipse(x + 0.145 * np.cos(angle), y + 0.145 * np.sin(angle), 0.020), nucleus)
    level = _LEVEL[facts["grade"]]
    if facts["diagnosis"] == "Tumor":
        for _ in range((3, 8, 18)[level]):
            x, y = rng.uniform(0.08, 0.92, 2)
            _paint(canvas, _blob(rng, x, y, rng.uniform(0.055, 0.075), 0.15), nucleus)
            _paint(canvas, _ellipse(x, y, 0.015), flesh, 0.7)
    elif facts["diagnosis"] == "Infection":
        for _ in range((25, 70, 170)[level]):
            x, y = rng.uniform(0, 1, 2)
            _paint(canvas, _ellipse(x, y, 0.011, 0.008, rng.uniform(0, 3)), nucleus * 0.5)
    return canvas + 0.015 * _texture(rng, 80)[..., None]


_DRAW: dict[str, Callable[[Rng, dict[str, str]], Array]] = {
    "ct": _draw_ct,
    "mri": _draw_mri,
    "xray": _draw_xray,
    "ultrasound": _draw_ultrasound,
    "dermoscopy": _draw_dermoscopy,
    "fundus": _draw_fundus,
    "oct": _draw_oct,
    "microscopy": _draw_microscopy,
}


@dataclass(frozen=True)
class Phantom:
    """One drawn image and the attributes it was drawn from.

    ``attributes`` has a value for every attribute of the modality's topics; ``pixels`` is (224, 224) or (224, 224, 3),
    uint8.
    """

    modality: str
    index: int
    attributes: dict[str, str]
    pixels: NDArray[np.uint8] = field(repr=False)

    @property
    def topics(self) -> tuple[Topic, ...]:
        """The questions this image can answer (modality recognition aside)."""
        diagnosis = self.attributes["diagnosis"]
        return tuple(t for t in TOPICS[self.modality] if not t.only_if or diagnosis in t.only_if)


def image_rng(modality: str, index: int, seed: int) -> Rng:
    """The random numbers of one image, independent of every other image's."""
    return np.random.default_rng([seed, list(MODALITIES).index(modality), index])


def draw_attributes(modality: str, rng: Rng) -> dict[str, str]:
    """A value for each attribute of ``modality``, independent and uniform."""
    attributes = {topic.attribute: _pick(rng, topic.options) for topic in TOPICS[modality]}
    attributes.setdefault("side", _pick(rng, SIDES))  # where a lesion lies matters to the drawing even if no one asks
    return attributes


def draw(modality: str, index: int, seed: int = 0) -> Phantom:
    """Phantom number ``index`` of ``modality``: the same for the same seed, however many are drawn."""
    rng = image_rng(modality, index, seed)
    attributes = draw_attributes(modality, rng)
    canvas = _DRAW[modality](rng, attributes)
    gain, offset = rng.uniform(0.92, 1.08), rng.uniform(-0.02, 0.02)
    pixels = (np.clip(canvas * gain + offset, 0, 1) * 255).astype(np.uint8)
    return Phantom(modality, index, attributes, pixels)


class _Letters:
    """Deals the place of the right option so that all letters come up equally often among questions of one size."""

    def __init__(self, rng: Rng) -> None:
        self._rng = rng
        self._decks: dict[int, list[int]] = {}

    def arrange(self, gold: str, others: Sequence[str]) -> list[str]:
        size = len(others) + 1
        deck = self._decks.setdefault(size, [])
        if not deck:
            deck.extend(int(i) for i in self._rng.permutation(size))
        options = [others[int(i)] for i in self._rng.permutation(size - 1)]
        options.insert(deck.pop(), gold)
        return options


def _raw_rows(
    phantom: Phantom, dataset: str, image_path: str, first_id: int, letters: _Letters, rng: Rng
) -> list[dict]:
    names = list(MODALITY_NAMES.values())
    own = MODALITY_NAMES[phantom.modality]
    wrong = [name for name in names if name != own]
    asked = [
        (
            "modality_recognition",
            "Which modality is this?",
            own,
            [wrong[int(i)] for i in rng.permutation(len(wrong))[:3]],
        )
    ]
    for topic in phantom.topics:
        gold = phantom.attributes[topic.attribute]
        asked.append((topic.question_type, topic.question, gold, [o for o in topic.options if o != gold]))
    rows = []
    for number, (question_type, question, gold, others) in enumerate(asked):
        options = letters.arrange(gold, others)
        rows.append(
            {
                "dataset": dataset,
                "question_id": f"{dataset}_{first_id + number:05d}",
                "question_type": QUESTION_TYPES[question_type],
                "question": question,
                "gt_answer": gold,
                "image_path": image_path,
                **{f"option_{letter}": option for letter, option in zip(LETTERS, options, strict=False)},
                "modality_type": MODALITIES[phantom.modality],
            }
        )
    return rows


def generate(
    output: Path | str, seed: int = 0, images_per_modality: int = 100, progress: bool = True
) -> dict[str, int]:
    """Draw all phantoms and write them under ``output`` in the raw OmniMedVQA layout.

    Files: ``Images/Phantom CT/phantom_ct_00000.png`` and ``QA_information/Open-access/Phantom CT.json``, the same for
    each modality. The same seed and count give the same bytes (with the same Pillow); a larger count only adds to a
    smaller one. What ``output`` held of an earlier call is replaced, anything else there is refused.

    Returns ``{"images": ..., "questions": ...}``. Raises :class:`UserError` where ``output`` cannot be used.
    """
    output = Path(output)
    if images_per_modality < 1:
        raise UserError(f"--images-per-modality must be at least 1, not {images_per_modality}")
    if seed < 0:
        raise UserError(f"--seed must not be negative, not {seed}")
    foreign = _not_ours(output)
    if foreign is not None:
        raise UserError(f"{output} holds {foreign}, which is no phantom; give an empty or new directory as --output")
    work = output.with_name(output.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / "QA_information" / "Open-access").mkdir(parents=True)
    counts = {"images": 0, "questions": 0}
    with tqdm(total=images_per_modality * len(MODALITIES), unit="image", desc="phantoms", disable=not progress) as bar:
        for order, (modality, name) in enumerate(MODALITY_NAMES.items()):
            dataset = f"Phantom {name}"
            folder = work / "Images" / dataset
            folder.mkdir(parents=True)
            rng = np.random.default_rng([seed, order, 1 << 32])
            letters = _Letters(rng)
            rows: list[dict] = []
            for index in range(images_per_modality):
                phantom = draw(modality, index, seed)
                file = folder / f"phantom_{modality}_{index:05d}.png"
                Image.fromarray(phantom.pixels).save(file, compress_level=1)
                rows += _raw_rows(phantom, dataset, f"Images/{dataset}/{file.name}", len(rows), letters, rng)
                bar.update()
            text = json.dumps(rows, indent=4) + "\n"
            (work / "QA_information" / "Open-access" / f"{dataset}.json").write_text(text, encoding="utf-8")
            counts["images"] += images_per_modality
            counts["questions"] += len(rows)
    if output.exists():
        shutil.rmtree(output)
    work.rename(output)
    return counts


def _not_ours(output: Path) -> str | None:
    """Something in ``output`` that this module did not write, or None."""
    if not output.exists():
        return None
    if not output.is_dir():
        return "a file"
    for path in sorted(output.rglob("*")):
        if path.is_file() and not path.name.lower().startswith("phantom"):
            return path.name
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m medr1_verl.embedded.phantoms", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the OmniMedVQA-like folder is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images-per-modality", type=int, default=100, metavar="N", help="default %(default)s")
    args = parser.parse_args(argv)
    counts = generate(args.output, args.seed, args.images_per_modality)
    print(f"{counts['images']} drawn images, {counts['questions']} questions: {args.output}")
    return 0


if __name__ == "__main__":
    import sys

    from medr1_verl.cli import run

    sys.exit(run(main, None, "phantoms"))
