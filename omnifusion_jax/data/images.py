"""Pictures: a file, a PIL image or an array becomes an RGB image, and that becomes the uint8 square a vision tower takes.

NumPy and Pillow only: data workers need no accelerator. Scaling to [0, 1] and normalising are left to the device.
"""

import contextlib
import functools
import io
import os
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from omnifusion_jax.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_FILE_BYTES = 1 << 29  # 50 million uncompressed 16-bit RGBA pixels are 400 MB
LONGEST = 128  # squares in a row: no more of a strip is resized around the one that stays

# What a Pillow error means to the user; the first row that fits. Pillow's own text can hold memory addresses and is never repeated.
FAULTS = (
    (UnidentifiedImageError, f"not an image in a known format ({', '.join(FORMATS)}). Convert it to one of them."),
    (Image.DecompressionBombError, "has more pixels than Pillow opens. Scale it down."),
    (PermissionError, "the file may not be read. Change its permissions."),
    (Exception, "truncated, damaged, or of a kind Pillow does not decode. Copy it again, or save it as JPEG or PNG."),
)

_warning_filters = threading.Lock()  # they belong to the whole process, and pictures are read in threads


def open_image(source, *, max_pixels=50_000_000):
    """Opens one picture as an upright RGB `PIL.Image.Image` that shares no memory with `source`.

    Args:
      source: path of a JPEG, PNG, WebP, BMP, TIFF or GIF file, a PIL image, or uint8[height, width], [height, width, 3 or 4].
      max_pixels: largest width * height, read from the header before a pixel is decoded. Pillow itself stops at
        2 * `PIL.Image.MAX_IMAGE_PIXELS`, 179 million unless changed.

    EXIF orientation is applied. Alpha is dropped, not composited (as `CLIPImageProcessor` did in transformers 4.37, which OmniFusion was
    trained with). 16-bit grey is scaled from 0..65535 to 0..255; grey without a fixed white level (float, 32-bit) is refused.

    Raises:
      DataError: whatever is wrong with `source`; the message names it and says what to do. Animations and files of several pages are refused.
    """
    with _faults_of(_name(source)):
        image = _opened(source)
        _check(image, max_pixels)
        return _rgb(ImageOps.exif_transpose(image))


def preprocess(image, size):
    """uint8[size, size, 3] of an RGB PIL image: shortest edge to `size` (bicubic, the long edge rounded down), then the centre.

    Equals transformers' `CLIPImageProcessorPil` before rescaling. Of a strip longer than `LONGEST` squares whole squares are left out at both
    ends first (resized entire, 1 x 3000 would take 1.4 GB at 336), which moves the result by less than 1/200 pixel.
    """
    short = min(image.size)
    spare = tuple(max(0, edge // short - LONGEST) // 2 * short for edge in image.size)
    if any(spare):
        image = ImageOps.crop(image, spare)
    width, height = (size * edge // short for edge in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + size, top + size)))


@contextlib.contextmanager
def _faults_of(name):
    """Turns every failure inside into a DataError that begins with `name`."""
    try:
        yield
    except MemoryError:  # the machine's fault, not the picture's
        raise
    except Exception as error:  # decoders meet hostile bytes and raise nearly anything
        text = str(error) if isinstance(error, DataError) else next(text for kind, text in FAULTS if isinstance(error, kind))
        raise DataError(f"{name}: {text}") from error


def _name(source):
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else getattr(source, "filename", "") or "the given image"


@functools.singledispatch
def _opened(source):
    raise DataError(f"of type {type(source).__name__}. Give a path, a PIL image, or a uint8 array [height, width, 3].")


@_opened.register
def _(source: Image.Image):
    return source


@_opened.register(str)
@_opened.register(os.PathLike)
def _(source):
    if not os.path.exists(source):
        raise DataError("there is no such file. Check the name, and the folder it is relative to.")
    if not os.path.isfile(source):
        raise DataError("a folder or a device, not a file. Give the path of one picture.")
    if not 0 < (size := os.path.getsize(source)) <= MAX_FILE_BYTES:
        raise DataError(
            "the file is empty. Copy it again." if size == 0 else f"a file of {size:,} bytes; {MAX_FILE_BYTES:,} is the limit. Scale it down."
        )
    data = Path(source).read_bytes()  # outside the lock below: a slow disk must not hold up other threads
    with _quiet():
        return Image.open(io.BytesIO(data), formats=FORMATS)


@_opened.register
def _(source: np.ndarray):
    if source.dtype != np.uint8:
        raise DataError(f"an array of {source.dtype}. Give uint8, 0 to 255 (multiply floats from 0 to 1 by 255 and round).")
    if source.size == 0 or (source.ndim != 2 and (source.ndim != 3 or source.shape[2] not in (3, 4))):
        raise DataError(f"an array of shape {list(source.shape)}. Give [height, width, 3], [height, width, 4] or [height, width], none of them 0.")
    return Image.fromarray(source)


@contextlib.contextmanager
def _quiet():
    """Silences Pillow's remarks on headers, above all its warning of many pixels: `max_pixels` decides."""
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check(image, max_pixels):
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise DataError(f"{width} x {height} pixels; 1 to {max_pixels:,} (max_pixels) are allowed. Scale it, or change the limit.")
    with _quiet():
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a camera's JPEG with previews behind the picture
    if frames > 1:
        raise DataError(f"an animation or a document of {frames} frames. Save the frame you mean as a picture of its own.")


def _rgb(image):
    if image.mode == "F":
        raise DataError("its pixels are floats (mode F), which have no fixed white level. Save it with 8 or 16 bits.")
    if image.mode.startswith("I"):
        image = _grey8(image)
    image.info.pop("transparency", None)  # dropped like any alpha; Pillow would try to keep it, and warn
    return image.convert("RGB")


def _grey8(image):
    """16-bit grey to 8 bits, rounded; older Pillow versions clip it to white instead."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise DataError(f"grey values from {grey.min()} to {grey.max()} have no fixed white level. Save it with 8 or 16 bits.")
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8))
