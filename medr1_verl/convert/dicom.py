"""DICOM files, where pydicom is installed (``pip install medr1-verl[dicom]``).

The stored values go through the modality rescale and then the file's own (first) window or VOI table, whose whole range
becomes 0 to 255, so that a picture looks as it does in a viewer; without one the visible range of the data is used.
MONOCHROME1 is inverted. Of a multi-frame image the middle frame is taken, with the rescale and window that an enhanced
file keeps per frame or for all frames. Only pixels leave this module: no tag of the header does.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from medr1_verl.convert.question import RejectedError


def _read(data: bytes, header_only: bool) -> Any:
    try:
        import pydicom
    except ImportError:
        raise RejectedError("unreadable_image", "a DICOM file needs pydicom: pip install 'medr1-verl[dicom]'") from None
    try:
        return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=header_only)
    except Exception as error:
        raise RejectedError("unreadable_image", f"not a readable DICOM file: {str(error)[:150]}") from None


def dicom_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header."""
    dataset = _read(data, header_only=True)
    try:
        return int(dataset.Columns), int(dataset.Rows)
    except (AttributeError, TypeError, ValueError):
        raise RejectedError("unreadable_image", "a DICOM file without an image") from None


def decode_dicom(data: bytes, max_pixels: int) -> Image.Image:
    """DICOM file -> picture in mode L or RGB at its own size; raises :class:`RejectedError`."""
    from medr1_verl.convert.images import check_size, visible

    check_size(*dicom_size(data), max_pixels)
    dataset = _read(data, header_only=False)
    frames = int(dataset.get("NumberOfFrames") or 1)
    try:
        from pydicom.pixels import apply_modality_lut, apply_voi, pixel_array

        # pixel_array converts YBR to RGB
        values = pixel_array(dataset, index=frames // 2 if frames > 1 else None)
        if values.ndim == 3:
            return Image.fromarray(values if values.dtype == np.uint8 else visible(values)).convert("RGB")
        _hoist_functional_groups(dataset, frames // 2)
        values = apply_modality_lut(values, dataset)
        if "VOILUTSequence" in dataset:
            bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
            grey = _to_8bit(apply_voi(values, dataset) / (2**bits - 1))
        elif "WindowCenter" in dataset and "WindowWidth" in dataset:
            center, width = (float(np.ravel(v)[0]) for v in (dataset.WindowCenter, dataset.WindowWidth))
            grey = window(values, center, width, str(dataset.get("VOILUTFunction") or "LINEAR"))
        else:
            grey = visible(values)
    except RejectedError:
        raise
    except Exception as error:
        raise RejectedError("unreadable_image", f"DICOM pixels cannot be decoded: {str(error)[:150]}") from None
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey
    return Image.fromarray(grey)


def _hoist_functional_groups(dataset: Any, frame: int) -> None:
    """Put the rescale and the window that an enhanced multi-frame file has for ``frame``, or for all, on top."""
    for group, index in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        items = dataset.get(group) or []
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for element in items[index].get(name, [])[:1] if index < len(items) else []:
                dataset.update(element)


def window(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """``values`` through a DICOM window (PS3.3 C.11.2): its lower end and below becomes 0, its upper end 255; uint8."""
    values = np.asarray(values, np.float64)
    if function == "SIGMOID":
        return _to_8bit(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -500, 500))))
    if function == "LINEAR_EXACT":
        return _to_8bit((values - center) / width + 0.5)
    return _to_8bit((values - (center - 0.5)) / max(width - 1, 1e-9) + 0.5)


def _to_8bit(shares: np.ndarray) -> np.ndarray:
    """0..1 as 0..255, uint8."""
    return np.clip(np.rint(np.asarray(shares) * 255.0), 0, 255).astype(np.uint8)
