"""How texts name the eight modalities: one list for the reward's modality part and for the study of reasoning."""

from __future__ import annotations

import re

# "CT" is upper case only: "ct" is also an ending that tokenizers and typists leave alone.
_NAMES: dict[str, str] = {
    "ct": r"\bCTs?\b|(?i:\bcomputed\s+tomograph|\bcomputeri[sz]ed\s+tomograph|\bcat[- ]scan)",
    "mri": r"\bMRIs?\b|\bMR\s+(?:image|scan)|(?i:\bmagnetic[- ]resonance|\bmri\b)",
    "xray": r"(?i:\bx[- ]?rays?\b|\bradiograph|\bmammogra)",
    "ultrasound": r"(?i:\bultrasound|\bultrasonogra|\bsonogra|\bechocardiogra)",
    "dermoscopy": r"(?i:\bdermoscop|\bdermatoscop)",
    "fundus": r"(?i:\bfundus\b|\bfundoscop)",
    "oct": r"\bOCT\b|(?i:\boptical\s+coherence\s+tomograph)",
    "microscopy": r"(?i:\bmicroscop|\bmicrograph|\bphotomicrograph|\bhistolog|\bhistopatholog)",
}
_NAMED = re.compile("|".join(f"(?P<{slug}>{pattern})" for slug, pattern in _NAMES.items()))


def modalities_named(text: str) -> set[str]:
    """Slugs of the modalities that the text names."""
    return {str(match.lastgroup) for match in _NAMED.finditer(text)}
