"""The 8 modalities and 5 question types of Med-R1, and the raw OmniMedVQA spellings they go by.

Slugs are used everywhere inside the project: in ``data_source``, file names and tables.
"""

from __future__ import annotations

# Raw ``modality_type`` strings exactly as OmniMedVQA writes them (the missing parenthesis is theirs).
MODALITIES: dict[str, str] = {
    "ct": "CT(Computed Tomography)",
    "mri": "MR (Mag-netic Resonance Imaging)",
    "xray": "X-Ray",
    "ultrasound": "ultrasound",
    "dermoscopy": "Dermoscopy",
    "fundus": "Fundus Photography",
    "oct": "OCT (Optical Coherence Tomography",
    "microscopy": "Microscopy Images",
}

QUESTION_TYPES: dict[str, str] = {
    "modality_recognition": "Modality Recognition",
    "anatomy_identification": "Anatomy Identification",
    "disease_diagnosis": "Disease Diagnosis",
    "lesion_grading": "Lesion Grading",
    "other_biological_attributes": "Other Biological Attributes",
}


def _key(text: str) -> str:
    return "".join(ch for ch in text.casefold() if ch.isalnum())


_MODALITY_BY_KEY = {_key(raw): slug for slug, raw in MODALITIES.items()} | {slug: slug for slug in MODALITIES}
_QUESTION_TYPE_BY_KEY = {_key(raw): slug for slug, raw in QUESTION_TYPES.items()}


def modality_slug(raw: object) -> str | None:
    """Slug of a raw ``modality_type``, or None. Case, spaces and punctuation do not matter."""
    return _MODALITY_BY_KEY.get(_key(raw)) if isinstance(raw, str) else None


def question_type_slug(raw: object) -> str | None:
    """Slug of a raw ``question_type``, or None. Case, spaces and punctuation do not matter."""
    return _QUESTION_TYPE_BY_KEY.get(_key(raw)) if isinstance(raw, str) else None
