"""Image file -> picture: modes, orientation, transparency, sizes, fidelity, metadata."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from medr1_verl.convert import images, png
from medr1_verl.convert.images import convert_image, fitted_size, visible
from medr1_verl.convert.png import bare_png, encode_png
from medr1_verl.convert.question import RejectedError

RAMP = np.add.outer(np.arange(64), np.arange(96)).astype(np.uint8)


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 5, smooth.shape), 0, 255).astype(np.uint8))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 10 * np.log10(255**2 / error) if error else 100.0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("1", "L"), ("L", "L"), ("LA", "L"), ("P", "L"), ("RGB", "L"), ("RGBA", "L"), ("I;16", "L")],
)
def test_png_modes(mode, expected):
    # the ramp is grey in every mode, and three equal channels are stored as one
    ramp = Image.fromarray(RAMP)
    other = {"I;16": Image.fromarray(RAMP.astype(np.uint16) * 16), "P": ramp.quantize(256)}
    pixels = convert_image(file_of(other.get(mode) or ramp.convert("RGB").convert(mode)), 384).pixels
    assert pixels.dtype == np.uint8
    assert pixels.shape == (64, 96) + ((3,) if expected == "RGB" else ())
    if mode != "1":
        assert np.corrcoef(pixels.ravel(), RAMP.ravel())[0, 1] > 0.99


def test_colour_stays_colour():
    pixels = np.asarray(photo(60, 50))
    assert np.array_equal(convert_image(file_of(Image.fromarray(pixels)), 384).pixels, pixels)
    almost_grey = np.repeat(RAMP[:, :, None], 3, axis=2)
    almost_grey[17, 31, 2] ^= 1
    assert convert_image(file_of(Image.fromarray(almost_grey)), 384).pixels.shape == (64, 96, 3)


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("TIFF", Image.fromarray(RAMP.astype(np.float32) / 1000 - 0.05)),
        ("TIFF", Image.fromarray(RAMP.astype(np.int32) * 100000 - 7)),
        ("TIFF", Image.fromarray(RAMP.astype(np.uint16) + 1000)),
        ("TIFF", Image.fromarray(RAMP).convert("CMYK")),
        ("JPEG", Image.fromarray(RAMP).convert("CMYK")),
        ("BMP", Image.fromarray(RAMP).convert("RGB")),
        ("GIF", Image.fromarray(RAMP)),
        ("WEBP", Image.fromarray(RAMP).convert("RGB")),
        ("PPM", Image.fromarray(RAMP)),
    ],
)
def test_other_formats_show_the_ramp(kind, image):
    pixels = convert_image(file_of(image, kind), 384).pixels
    grey = np.asarray(Image.fromarray(pixels).convert("L"), int)
    assert np.corrcoef(grey.ravel(), RAMP.ravel())[0, 1] > 0.98
    assert grey.max() - grey.min() > 100  # visible


def test_deep_data_fill_the_range_whatever_a_hot_pixel_does():
    values = (RAMP.astype(np.uint16) + 1000).repeat(4, 0).repeat(4, 1)
    values[0, 0] = 65535
    shown = visible(values)
    assert np.percentile(shown, 99) > 240
    assert np.percentile(shown, 1) < 15


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full((9, 9), 700, np.uint16), 0),  # nothing to see is black, not noise
        (np.where(np.eye(9) > 0, np.nan, 1.0), 0),
    ],
)
def test_flat_data(values, expected):
    assert (visible(values) == expected).all()


def test_no_finite_value_is_unreadable():
    with pytest.raises(RejectedError):
        visible(np.full((9, 9), np.nan))


def test_tiff_white_is_zero_16_bit_is_inverted():
    image = Image.fromarray(RAMP.astype(np.uint16) * 100)
    plain = convert_image(file_of(image, "TIFF"), 384).pixels
    inverted = convert_image(file_of(image, "TIFF", tiffinfo={262: 0}), 384).pixels
    assert np.abs(255 - inverted.astype(int) - plain).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    image = photo(90, 60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(image, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(convert_image(data, 384).pixels, expected)


def test_12_bit_data_in_a_16_bit_colour_png_are_visible():
    rgb = np.repeat(RAMP[:, :, None], 3, axis=2).astype(">u2") * 16  # at most 2,544 of 65,535
    rgb[:, :, 0] //= 2
    rows = b"".join(b"\x00" + line.tobytes() for line in rgb)
    header = struct.pack(">IIBBBBB", 96, 64, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    assert convert_image(data, 384).pixels.max() > 240


def test_damaged_exif_costs_nothing():
    data = file_of(photo(40, 40), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12broken")
    assert convert_image(data, 384).pixels.shape == (40, 40, 3)


def test_a_clean_png_is_kept_as_it_is_but_for_its_chunks():
    info = PngImagePlugin.PngInfo()
    info.add_text("PatientName", "Doe^Jane")
    image = photo(60, 50)
    data = file_of(image, "PNG", pnginfo=info, optimize=True)
    kept = bare_png(data, convert_image(data, 384).pixels)
    assert kept is not None
    assert b"Doe" not in kept
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(kept))), np.asarray(image))
    for other in (image.quantize(8), image.convert("RGBA"), Image.fromarray(RAMP.astype(np.uint16) * 99)):
        data = file_of(other)
        assert bare_png(data, convert_image(data, 384).pixels) is None
    data = file_of(image)
    assert bare_png(data, convert_image(data, 28).pixels) is None


def test_transparency_is_shown_on_white():
    image = Image.new("RGBA", (40, 40), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 40))
    pixels = convert_image(file_of(image), 384).pixels
    assert tuple(pixels[5, 5]) == (255, 255, 255)
    assert tuple(pixels[5, 35]) == (200, 0, 0)


def test_all_transparent_is_shown_all_the_same():
    image = Image.merge("LA", (Image.fromarray(RAMP), Image.new("L", (96, 64), 0)))
    assert np.array_equal(convert_image(file_of(image), 384).pixels, RAMP)


def test_the_extension_does_not_matter_and_metadata_stays_behind():
    info = PngImagePlugin.PngInfo()
    info.add_text("PatientName", "Doe^Jane")
    exif = Image.Exif()
    exif[0x010E] = "Doe^Jane"
    for data in (file_of(photo(50, 50), "PNG", pnginfo=info, exif=exif), file_of(photo(50, 50), "JPEG", exif=exif)):
        assert b"Doe" in data
        stored = encode_png(convert_image(data, 384).pixels)
        assert b"Doe" not in stored
        assert Image.open(io.BytesIO(stored)).info == {}


@pytest.mark.parametrize(
    ("width", "height", "limit", "expected", "why"),
    [
        (1000, 500, 384, (384, 192), "the longer side decides"),
        (300, 200, 384, (300, 200), "never enlarged"),
        (5000, 4000, 0, (5000, 4000), "0 keeps the size"),
        (20, 20, 384, (28, 28), "but for the model's minimum side"),
        (10, 40, 0, (28, 112), "also without a limit"),
        (2000, 20, 384, (2800, 28), "the minimum wins over the limit"),
        (112, 112, 28, (28, 28), "the smallest limit"),
        (1001, 333, 384, (384, 128), "rounded to the nearest pixel"),
    ],
)
def test_sizes(width, height, limit, expected, why):
    assert fitted_size(width, height, limit) == expected, why


@pytest.mark.parametrize(
    ("size", "reason"),
    [((5, 5), "image_too_small"), ((7, 300), "image_too_small"), ((4000, 19), "image_too_small")],
)
def test_too_small(size, reason):
    with pytest.raises(RejectedError) as caught:
        convert_image(file_of(Image.new("L", size)), 384)
    assert caught.value.reason == reason


def test_size_is_read_before_anything_is_decoded():
    data = bytearray(file_of(Image.new("L", (300, 300))))
    data[16:24] = (60000).to_bytes(4, "big") * 2  # the header now promises 3.6 billion pixels
    with pytest.raises(RejectedError) as caught:
        convert_image(bytes(data), 384)
    assert caught.value.reason in ("image_too_large", "unreadable_image")


@pytest.mark.parametrize("size", [(1024, 768), (2048, 1536), (512, 512), (700, 90)])
@pytest.mark.parametrize("limit", [384, 112])
def test_fidelity_to_a_full_decode_with_pillows_lanczos(size, limit):
    data = file_of(photo(*size), "JPEG", quality=92)
    full = Image.open(io.BytesIO(data))
    pixels = convert_image(data, limit).pixels
    reference = np.asarray(full.resize(fitted_size(*size, limit), Image.Resampling.LANCZOS))
    assert psnr(pixels, reference) >= 60


@pytest.mark.parametrize("shape", [(28, 28), (1, 1), (300, 200), (64, 96, 3), (28, 900, 3)])
def test_png_is_lossless_and_plain(shape):
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    image = Image.open(io.BytesIO(encode_png(pixels)))
    assert image.mode == ("L" if len(shape) == 2 else "RGB")
    assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("deflate", [png.deflate, png.zlib_runs], ids=["as installed", "without isal"])
def test_size_is_within_a_tenth_of_pillows_default(deflate, monkeypatch):
    monkeypatch.setattr(png, "deflate", deflate)
    pictures = [np.asarray(photo(384, 288, seed)) for seed in range(3)]
    pictures += [np.asarray(photo(384, 384).convert("L")), np.asarray(photo(224, 224).resize((112, 112)))]
    for pixels in pictures:
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels)))), pixels)
    ours, pillow = (sum(len(make(pixels)) for pixels in pictures) for make in (encode_png, pillows_default))
    assert ours <= 1.1 * pillow


def pillows_default(pixels: np.ndarray) -> bytes:
    return file_of(Image.fromarray(pixels))


def test_lossy_says_what_it_costs():
    pixels = np.asarray(photo(200, 150))
    best, best_psnr = images.lossy(pixels, 95)
    worst, worst_psnr = images.lossy(pixels, 40)
    assert len(worst) < len(best) < len(encode_png(pixels))
    assert 20 < worst_psnr < best_psnr < 60


def test_dicom(shared_dir):
    pytest.importorskip("pydicom")
    shapes = {"CT_small.dcm": (128, 128), "MR_small.dcm": (64, 64), "color-pl.dcm": (240, 320, 3)}
    for name, shape in shapes.items():
        data = (shared_dir / "data" / "dicom_raw" / name).read_bytes()
        pixels = convert_image(data, 384).pixels
        assert pixels.ndim == len(shape), name
        assert pixels.std() > 20, name
        assert b"CompressedSamples" not in encode_png(pixels)


def dicom_file(values: np.ndarray, **tags) -> bytes:
    """A DICOM file of ``values``, uint16 or int16 of shape (h, w) or (frames, h, w)."""
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.PatientName, dataset.PatientID = "Doe^Jane", "secret-1"
    dataset.Rows, dataset.Columns = values.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    if values.ndim == 3:
        dataset.NumberOfFrames = len(values)
    dataset.PixelData = values.astype(values.dtype.newbyteorder("<")).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


HOUNSFIELD = np.tile(np.arange(-1024, 1024, 32, dtype=np.int16), (64, 1))


@pytest.mark.parametrize(
    ("tags", "expected", "why"),
    [
        ({"WindowCenter": 40, "WindowWidth": 400}, (-160, 240), "linear: from center - width/2 to center + width/2"),
        ({"WindowCenter": [40, -600], "WindowWidth": [400, 1500]}, (-160, 240), "of several windows the first"),
        (
            {"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "LINEAR_EXACT"},
            (-160, 240),
            "the same without the half steps",
        ),
        ({"WindowCenter": 3000, "WindowWidth": 8000}, (-1000, 7000), "a window wider than the data is not narrowed"),
        (
            {"WindowCenter": 100, "WindowWidth": 400, "RescaleSlope": 2, "RescaleIntercept": -1000},
            (450, 650),
            "the window is in units after the rescale: (x + 1000) / 2",
        ),
    ],
)
def test_dicom_window(tags, expected, why):
    low, high = expected
    pixels = convert_image(dicom_file(HOUNSFIELD, **tags), 384).pixels
    wanted = np.clip((HOUNSFIELD - float(low)) / (high - low) * 255, 0, 255)
    assert np.abs(pixels - wanted).max() <= 1, why


def test_dicom_inversion_frames_and_tags():
    tags = {"WindowCenter": 0, "WindowWidth": 2000}
    plain = convert_image(dicom_file(HOUNSFIELD, **tags), 384).pixels
    inverted = convert_image(dicom_file(HOUNSFIELD, PhotometricInterpretation="MONOCHROME1", **tags), 384).pixels
    assert np.array_equal(inverted, 255 - plain)
    frames = np.stack([HOUNSFIELD * 0, HOUNSFIELD, HOUNSFIELD * 0 + 9])
    data = dicom_file(frames, **tags)
    assert np.array_equal(convert_image(data, 384).pixels, plain)  # the middle one
    assert b"Doe" in data
    stored = encode_png(convert_image(data, 384).pixels)
    assert b"Doe" not in stored
    assert b"secret" not in stored


def test_dicom_window_per_frame():
    pydicom = pytest.importorskip("pydicom")

    def group(**tags):
        item, inner = pydicom.Dataset(), pydicom.Dataset()
        for name, value in tags.items():
            setattr(inner, name, value)
        name = "FrameVOILUTSequence" if "WindowCenter" in tags else "PixelValueTransformationSequence"
        setattr(item, name, pydicom.Sequence([inner]))
        return item

    data = dicom_file(
        np.stack([HOUNSFIELD] * 3),
        SharedFunctionalGroupsSequence=pydicom.Sequence(
            [group(RescaleSlope=1, RescaleIntercept=100, RescaleType="HU")]
        ),
        PerFrameFunctionalGroupsSequence=pydicom.Sequence(
            [group(WindowCenter=center, WindowWidth=400) for center in (-500, 100, 900)]
        ),
    )
    expected = convert_image(dicom_file(HOUNSFIELD, WindowCenter=0, WindowWidth=400), 384).pixels
    assert np.array_equal(convert_image(data, 384).pixels, expected)


def test_dicom_voi_table():
    pydicom = pytest.importorskip("pydicom")
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [256, 0, 8], np.arange(255, -1, -1, dtype="<u2").tobytes()
    values = np.tile(np.arange(64, dtype=np.uint16) * 4, (64, 1))
    pixels = convert_image(dicom_file(values, VOILUTSequence=pydicom.Sequence([table])), 384).pixels
    assert np.array_equal(pixels, 255 - values)
