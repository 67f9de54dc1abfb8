"""DICOM files, where pydicom is installed (``pip install medr1-verl[dicom]``).

The stored values go through the modality rescale and then the file's own window or VOI table; without one the visible
range of the data is used. MONOCHROME1 is inverted. Of a multi-frame image the middle frame is taken. Only pixels leave
this module: no tag of the header does.
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
        from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

        # pixel_array converts YBR to RGB
        values = pixel_array(dataset, index=frames // 2 if frames > 1 else None)
        if values.ndim == 3:
            return Image.fromarray(values if values.dtype == np.uint8 else visible(values)).convert("RGB")
        values = apply_modality_lut(values, dataset)
        if "WindowCenter" in dataset or "VOILUTSequence" in dataset:
            values = apply_voi_lut(values, dataset)
            grey = _full_range(values)
        else:
            grey = visible(values)
    except RejectedError:
        raise
    except Exception as error:
        raise RejectedError("unreadable_image", f"DICOM pixels cannot be decoded: {str(error)[:150]}") from None
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey
    return Image.fromarray(grey)


def _full_range(values: np.ndarray) -> np.ndarray:
    """Windowed values -> uint8. Both ends of a window are nearly always reached; then no percentile may cut them."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.clip(np.rint((values - low) * (255.0 / (high - low))), 0, 255).astype(np.uint8)
