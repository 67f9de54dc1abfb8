"""Image file -> clean picture: any mode or format in, 8-bit grey or RGB of the right size out, no metadata.

Rules, in the order in which they apply:

1. Size limits are read from the header, before anything is decoded.
2. EXIF orientation is applied. Of several frames or pages the first is taken (DICOM: the middle one).
3. Transparent pixels are shown on white, as ``qwen_vl_utils`` shows them; a file that is transparent all over has its
   alpha ignored, since nothing would be left of it.
4. 16-bit, 32-bit and float data are scaled so that their 0.1 to 99.9 percentiles fill the 8-bit range.
5. The picture is fitted into N x N with Lanczos on the fully decoded image, aspect ratio kept. It is never enlarged,
   except that a side below 28 px (the minimum of Qwen2-VL) is brought to 28.
6. An RGB picture with three equal channels is kept as grey.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import (  # noqa: F401  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from medr1_verl.convert.question import RejectedError

MIN_SIDE = 28  # Qwen2-VL: one visual token covers 28 x 28 px
MAX_RATIO = 200  # qwen_vl_utils.smart_resize refuses anything longer
MIN_SOURCE_SIDE = 8  # below this, enlarging to 28 px shows blocks, not an image
MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 1 << 30

# Pillow would also hand EPS to Ghostscript and open formats that no medical data set uses.
_WANTED = ("PNG", "JPEG", "MPO", "TIFF", "BMP", "DIB", "WEBP", "GIF", "PPM", "JPEG2000")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)  # a Pillow build may lack WebP or JPEG 2000

SIGNATURE_SIDE = 16
SIGNATURE_FIT = 384


@dataclass
class Picture:
    """A converted image: ``pixels`` uint8 (h, w) or (h, w, 3); ``signature`` a 16 x 16 grey thumbnail (256 bytes)."""

    pixels: np.ndarray
    signature: bytes
    source_size: tuple[int, int]


# -------------------------------------------------------------------------------------------------- resampling


def _pillow_lanczos(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS)


def _simd_lanczos():
    """Lanczos-3 with SIMD (cykooz.resizer, about four times as fast as Pillow), or None where it is not to be had.

    Columns first, then rows, each rounded to 8 bits, is Pillow's order too: the two agree to 70 dB and better, where
    the library's own order of passes would give 55 dB. It reads Pillow's memory directly, so it is tried once against
    Pillow before it is trusted.
    """
    try:
        import cykooz_resizer
    except ImportError:
        return None
    resizer = cykooz_resizer.Resizer()
    algorithm = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.lanczos3)
    options = cykooz_resizer.ResizeOptions(resize_alg=algorithm)

    def lanczos(image: Image.Image, size: tuple[int, int]) -> Image.Image:
        for target in ((size[0], image.height), size):
            if target != image.size:
                resized = Image.new(image.mode, target, None)  # None: not filled first
                resizer.resize_pil(image, resized, options)
                image = resized
        return image

    ramp = np.add.outer(np.arange(60), 2 * np.arange(90)).astype(np.uint8)
    for pixels in (ramp, np.stack([ramp, ramp.T.copy().reshape(60, 90), 255 - ramp], axis=2)):
        image = Image.fromarray(pixels)
        try:
            difference = np.asarray(lanczos(image, (31, 20)), int) - np.asarray(_pillow_lanczos(image, (31, 20)), int)
        except Exception:  # any fault of an optional accelerator means: do without it
            return None
        if np.abs(difference).max() > 2:
            return None
    return lanczos


_FAST = _simd_lanczos()
lanczos = _FAST or _pillow_lanczos
RESAMPLER = "lanczos/simd" if _FAST else "lanczos/pillow"


def fitted_size(width: int, height: int, limit: int) -> tuple[int, int]:
    """Size of a ``width`` x ``height`` image inside ``limit`` x ``limit`` (0: no limit), sides in pixels.

    The 28 px minimum wins over the limit: a 2000 x 20 strip becomes 2800 x 28, which is 100 visual tokens.
    """
    scale = min(1.0, limit / max(width, height)) if limit else 1.0
    if min(width, height) * scale < MIN_SIDE:
        scale = MIN_SIDE / min(width, height)
    return max(MIN_SIDE, round(width * scale)), max(MIN_SIDE, round(height * scale))


# ------------------------------------------------------------------------------------------ decoding and modes


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ``image_too_large`` or ``image_too_small`` for a size in pixels."""
    if width * height > max_pixels:
        raise RejectedError("image_too_large", f"{width} x {height} px; at most {max_pixels:,} pixels are decoded")
    if min(width, height) < MIN_SOURCE_SIDE:
        raise RejectedError("image_too_small", f"{width} x {height} px; a side needs at least {MIN_SOURCE_SIDE}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise RejectedError("image_too_small", f"{width} x {height} px; Qwen2-VL takes no ratio above {MAX_RATIO}")


def visible(values: np.ndarray) -> np.ndarray:
    """Any numeric array -> uint8 of the same shape: its 0.1 to 99.9 percentiles fill 0 to 255.

    NaN and infinities become the lowest value. Raises ``unreadable_image`` where nothing is finite.
    """
    values = np.asarray(values)
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        if not finite.any():
            raise RejectedError("unreadable_image", "not one pixel has a finite value")
        if not finite.all():
            values = np.where(finite, values, values[finite].min())
    low, high = np.percentile(values, (0.1, 99.9))
    if high <= low:
        low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float64) - low) * (255.0 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    grey = image.mode in ("LA", "La")
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    low, high = alpha.getextrema()
    base = image.convert("RGB")
    if high != 0 and low != 255:  # 0 everywhere: ignore it; 255 everywhere: nothing to do
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(base, mask=alpha)
        base = white
    return base.convert("L") if grey else base


def to_8bit(image: Image.Image) -> Image.Image:
    """``image`` in mode L or RGB, whatever mode it came in."""
    mode = image.mode
    if mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        return _on_white(image)
    if mode == "1":
        return image.convert("L")
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = np.asarray(image)
        if getattr(image, "tag_v2", {}).get(262) == 0 and mode != "F":  # TIFF WhiteIsZero, which Pillow leaves as it is
            values = values.max() - values
        return Image.fromarray(visible(values))
    return image.convert("RGB")  # P, CMYK, YCbCr, LAB, HSV


def _unknown_format(data: bytes) -> str:
    return f"no image format that is read here: begins with {data[:8]!r}" if data else "the file is empty"


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Image file -> upright picture in mode L or RGB at its own size; raises :class:`RejectedError`."""
    if data[128:132] == b"DICM":
        from medr1_verl.convert.dicom import decode_dicom

        return decode_dicom(data, max_pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.UnidentifiedImageError:
            raise RejectedError("unreadable_image", _unknown_format(data)) from None
        check_size(*image.size, max_pixels)
        image.load()
        orientation = 1
        with contextlib.suppress(Exception):  # damaged EXIF says nothing about the pixels
            orientation = image.getexif().get(0x0112, 1)
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        deep_colour = data.startswith(b"\x89PNG") and data[24:26] in (b"\x10\x02", b"\x10\x06")
        image = to_8bit(image)
        if deep_colour and max(high for _, high in image.getextrema()) < 128:  # type: ignore[misc]
            # Pillow keeps the upper 8 of 16 bits per colour, which leaves 12-bit data nearly black
            image = Image.fromarray(visible(np.asarray(image)))
        return image


def _one_channel_if_grey(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) with three equal channels as (h, w): nothing is lost, and the PNG takes little more than half.

    Every reader in verl's way (qwen_vl_utils, the Hugging Face processors) converts to RGB by itself.
    """
    if pixels.ndim == 3:
        for step in (29, 1):  # a sparse look first: most colour pictures show their colour there
            red, green, blue = (pixels[::step, ::step, channel] for channel in range(3))
            if not (np.array_equal(red, green) and np.array_equal(red, blue)):
                return pixels
        return pixels[:, :, 0]
    return pixels


def convert_image(data: bytes, limit: int, max_pixels: int = MAX_PIXELS) -> Picture:
    """Image file -> :class:`Picture` fitted into ``limit`` x ``limit``; raises :class:`RejectedError`."""
    image = decode(data, max_pixels)
    source_size = image.size
    fitted = lanczos(image, fitted_size(*image.size, limit))
    # The signature must not depend on --image-size, or the split would.
    reference = fitted if limit == SIGNATURE_FIT else lanczos(image, fitted_size(*image.size, SIGNATURE_FIT))
    grey = reference if reference.mode == "L" else reference.convert("L")
    thumbnail = grey.resize((SIGNATURE_SIDE, SIGNATURE_SIDE), Image.Resampling.BOX)
    return Picture(_one_channel_if_grey(np.asarray(fitted)), thumbnail.tobytes(), source_size)


def lossy(pixels: np.ndarray, quality: int) -> tuple[bytes, float]:
    """JPEG file of ``pixels`` without chroma subsampling, and its PSNR against them in dB (100 where all are equal)."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling=0)
    error = np.asarray(Image.open(stream), np.float32) - pixels
    mean_square = float(np.mean(error * error))
    return stream.getvalue(), round(10 * np.log10(255.0**2 / mean_square), 2) if mean_square > 6.5e-6 else 100.0


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Size in pixels from the header alone; the same refusals as :func:`convert_image`, but for broken pixel data."""
    if data[128:132] == b"DICM":
        from medr1_verl.convert.dicom import dicom_size

        size = dicom_size(data)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                size = Image.open(io.BytesIO(data), formats=FORMATS).size
            except Image.UnidentifiedImageError:
                raise RejectedError("unreadable_image", _unknown_format(data)) from None
    check_size(size[0], size[1], max_pixels)
    return size
