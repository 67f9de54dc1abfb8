"""What the published split files leave out: data set, modality and question type of a row, from its path and text.

Used only where neither the raw question nor a sibling split file says it. The gold texts of OmniMedVQA come from a
small closed set, so the rules read them rather than guess: on the files they could be tried on (5 modalities,
2 question types; 54,111 rows) they give exactly the published counts per data set and question type. A row they say
nothing about is rejected, not filed somewhere.
"""

from __future__ import annotations

import re

from medr1_verl.convert.check import normalize_option

_AI, _DD, _LG = "anatomy_identification", "disease_diagnosis", "lesion_grading"
_MR, _OBA = "modality_recognition", "other_biological_attributes"

# Open-access data sets: modalities, and the question types they have besides modality recognition (all have that).
_DATASETS: dict[str, tuple[str, str]] = {
    "ACRIMA": ("fundus", _DD),
    "ALL Challenge": ("microscopy", _DD),
    "Adam Challenge": ("fundus", _DD),
    "BioMediTech": ("microscopy", f"{_AI} {_OBA}"),
    "Blood Cell": ("microscopy", _AI),
    "BreakHis": ("microscopy", _DD),
    "COVIDx CXR-4": ("xray", f"{_AI} {_DD}"),
    "CRC100k": ("microscopy", f"{_AI} {_DD}"),
    "Chest CT Scan": ("ct", f"{_DD} {_LG} {_OBA}"),
    "Chest X-Ray PA": ("xray", f"{_AI} {_DD}"),
    "CoronaHack": ("xray", f"{_AI} {_DD}"),
    "Covid CT": ("ct", f"{_AI} {_DD}"),
    "Covid-19 tianchi": ("xray", f"{_AI} {_DD}"),
    "Covid19 heywhale": ("xray", f"{_AI} {_DD}"),
    "DRIMDB": ("fundus", _LG),
    "DeepDRiD": ("fundus", ""),
    "Diabetic Retinopathy": ("fundus", _LG),
    "Fitzpatrick 17k": ("dermoscopy", _DD),
    "HuSHeM": ("microscopy", f"{_AI} {_OBA}"),
    "ISBI2016": ("dermoscopy", f"{_AI} {_DD}"),
    "ISIC2018": ("dermoscopy", f"{_AI} {_DD}"),
    "ISIC2019": ("dermoscopy", _DD),
    "ISIC2020": ("dermoscopy", _DD),
    "JSIEC": ("fundus", _DD),
    "Knee Osteoarthritis": ("xray", ""),
    "MAlig Lymph": ("microscopy", f"{_AI} {_DD}"),
    "MHSMA": ("microscopy", _DD),
    "MIAS": ("xray", f"{_AI} {_DD}"),
    "Monkeypox Skin Image 2022": ("dermoscopy", _DD),
    "Mura": ("xray", f"{_AI} {_DD}"),
    "NLM- Malaria Data": ("microscopy", _DD),
    "OCT & X-Ray 2017": ("oct xray", f"{_AI} {_DD}"),
    "OLIVES": ("fundus", _AI),
    "PAD-UFES-20": ("dermoscopy", _DD),
    "PALM2019": ("fundus", _DD),
    "Pulmonary Chest MC": ("xray", f"{_AI} {_DD}"),
    "Pulmonary Chest Shenzhen": ("xray", f"{_AI} {_DD}"),
    "RUS CHN": ("xray", _AI),
    "RadImageNet": ("ct mri ultrasound", f"{_AI} {_DD} {_OBA}"),
    "Retinal OCT-C8": ("oct", f"{_DD} {_OBA}"),
    "SARS-CoV-2 CT-scan": ("ct", f"{_AI} {_DD}"),
    "Yangxi": ("fundus", _OBA),
}

# RadImageNet's file names begin with the examination: abd019279.png is an abdominal CT, mrabd... an abdominal MRI.
_RADIMAGENET = (
    (re.compile(r"us[a-z]?\d|usn|usf|thyroid"), "ultrasound"),
    (re.compile(r"mr|ankle|brain|foot|hip|knee|shoulder|spine"), "mri"),
    (re.compile(r"abd|lung"), "ct"),
)
_OCT_CLASSES = re.compile(r"/(?:CNV|DME|DRUSEN)(?:/|-)|/(?:CNV|DME|DRUSEN|NORMAL)-\d")

_MODALITY_NAME = re.compile(
    r"(?:the imaging modality used for this image is )?"
    r"(?:(?:chest |color |colour |retinal |fundus |phase-contrast |fluorescence |light )*"
    r"(?:ct|mri|mr|oct|x[-_ ]?ray|ultrasound|ultrasonography|sonography|mammography|mammogram|dermoscop\w*|"
    r"dermatoscop\w*|fundus|microscopy|histopathology|photography|computed tomography|magnetic resonance imaging|"
    r"optical coherence tomography|fundus photography)"
    r"(?: \((?:ct|mri|oct)\))?(?: scan| imaging| image| photography)?"
    r"|.*histolog\w* image|retinal (?:photography|imaging))"
)
_ANATOMY = re.compile(
    r"(?:the )?(?:chest|lungs?|skin|breast|breast tissue|chest region|musculoskeletal system|"
    r"(?:right|left) eye|.*\bjoint)(?: \(.*\))?|.*\b(?:oculus|eye)\b.*"
)
_ATTRIBUTES = re.compile(
    r"attribut|characteri|feature|can you describe|tell me|indications|(?:observed|identify) (?:about|regarding)|"
    r"shape|orientation|axis",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"\b(?:is|are|causes|shows|displays|appears)\b")
_STAGED = re.compile(r"\bt\d n\d m\d\b")


def dataset_of(image: str) -> str | None:
    """``Images/<data set>/...`` -> its name."""
    parts = image.split("/")
    return parts[1] if len(parts) > 2 and parts[0] == "Images" else None


def modality_of(image: str) -> str | None:
    """Modality slug from the path of an open-access image, None for a data set that is not known."""
    dataset = dataset_of(image)
    modalities = _DATASETS[dataset][0].split() if dataset in _DATASETS else []
    if len(modalities) == 1:
        return modalities[0]
    name = image.rsplit("/", 1)[-1].lower()
    if dataset == "RadImageNet":
        return next((slug for pattern, slug in _RADIMAGENET if pattern.match(name)), None)
    if dataset == "OCT & X-Ray 2017":
        return "oct" if _OCT_CLASSES.search(image) else "xray"
    return None


def question_type_of(image: str, modality: str | None, question: str, gold: str) -> str | None:
    """Question type slug from data set, question stem and gold text; None where they do not settle it."""
    dataset = dataset_of(image)
    if dataset not in _DATASETS:
        return None
    text = normalize_option(gold)
    if _MODALITY_NAME.fullmatch(text):
        return _MR
    types = _DATASETS[dataset][1].split()
    if dataset == "RadImageNet":
        return _AI if modality == "ultrasound" else _DD
    if dataset == "Chest CT Scan":
        if text.startswith("stage"):
            return _LG
        return _DD if text in ("no", "yes") or _STAGED.search(text) else _OBA
    if dataset == "Retinal OCT-C8":
        # a sentence describes the finding; only "Macular hole (MH)" is gold for both kinds of question
        described = _SENTENCE.search(text) or (text == "macular hole (mh)" and _ATTRIBUTES.search(question))
        return _OBA if described else _DD
    if len(types) == 1:
        return types[0]
    if types == [_AI, _DD] and dataset not in ("CRC100k", "MAlig Lymph"):
        return _AI if _ANATOMY.fullmatch(text) else _DD
    if types == [_AI, _OBA]:
        return _OBA if _ATTRIBUTES.search(question) else _AI
    return None
