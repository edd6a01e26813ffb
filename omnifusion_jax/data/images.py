"""Pictures: a file, a PIL image or an array becomes an RGB image, and that becomes the uint8 square a vision tower takes.

NumPy and Pillow only: data workers need no accelerator. Scaling to [0, 1] and normalising are left to the device.
"""

import base64
import binascii
import contextlib
import io
import os
import re
import threading
import warnings
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from omnifusion_jax.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_FILE_BYTES = 1 << 29  # 50 million uncompressed 16-bit RGBA pixels are 400 MB
LONGEST_NAME = 256  # of a path that a message repeats whole: it can be looked up; of what is longer, and of URLs, 60 characters are shown
LONGEST = 128  # squares in a row: no more of a strip is resized around the one that stays
MAX_PADDED = 1 << 14  # a square of so many pixels a side takes 1 GB

# What a Pillow error means to the user; the first row that fits. Pillow's own text can hold memory addresses and is never repeated.
FAULTS = (
    (
        UnidentifiedImageError,
        f"not an image in a known format ({', '.join(FORMATS)}). Convert it to one of them.",
    ),
    (Image.DecompressionBombError, "has more pixels than Pillow opens. Scale it down."),
    (PermissionError, "the file may not be read. Change its permissions."),
    (
        Exception,
        "truncated, damaged, or of a kind Pillow does not decode. Copy it again, or save it as JPEG or PNG.",
    ),
)

ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 lie on their side

_warning_filters = threading.Lock()  # they belong to the whole process, and pictures are read in threads


def open_image(source, *, max_pixels=50_000_000):
    """Opens one picture as an upright RGB `PIL.Image.Image` that shares no memory with `source`.

    Args:
      source: path of a JPEG, PNG, WebP, BMP, TIFF or GIF file; such a file as a data URL (`data:image/png;base64,...`); a PIL image; or
        uint8[height, width], [height, width, 3 or 4]. Other URLs are not fetched.
      max_pixels: largest width * height, read from the header before any pixel is decoded. Pillow itself stops at 2 * `Image.MAX_IMAGE_PIXELS`.

    EXIF orientation is applied. Alpha is dropped, not composited, as `CLIPImageProcessor` did in transformers 4.37, which OmniFusion was trained
    with. 16-bit grey is scaled from 0..65535 to 0..255, 32-bit integers as well if they stay in that range; float grey is refused.

    Raises:
      DataError: whatever is wrong with `source`; the message names it and says what to do. Animations and multi-page files are refused too.
    """
    with _named_faults(source):
        return _rgb(ImageOps.exif_transpose(_opened(_read(source), max_pixels)))


def image_size(source, *, max_pixels=50_000_000):
    """(width, height) of the upright picture that `open_image` makes of `source`, from the header of its file: no pixel is decoded.

    Raises DataError for whatever the header shows to be wrong. Not seen are damage further on, levels of grey that have no scale, and an orientation
    that a PNG file gives after its pixels.
    """
    with _named_faults(source), contextlib.ExitStack() as files:
        opened = _read(source, lambda path: files.enter_context(open(path, "rb")))
        image = _opened(opened, max_pixels)
        _check_levels(image)
        return image.size[::-1] if _lies(image) else image.size


def is_data_url(source):
    """Whether this is a string that holds a file itself, `data:image/png;base64,...`."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def is_url(source):
    """Whether this is a string that begins as a URL, `https://`, `s3://`, ...; data URLs are not meant."""
    return isinstance(source, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source) is not None


def short(source):
    """A name for messages: a path as it is; a URL, a data URL or what is too long for a path by its beginning, and how long it is."""
    name = os.fspath(source)
    if isinstance(name, bytes) or not (
        is_data_url(name) or (is_url(name) and len(name) > 60) or len(name) > LONGEST_NAME
    ):
        return name
    return f"{name[:40]}... ({len(name):,} characters)"


def fit(image, size, how="crop", shortest=None, fill=(0, 0, 0)):
    """uint8[size, size, 3] of an RGB PIL image: by `how`, a key of `FITS`, at least a square of `shortest` pixels, and of that the centre.

    Args:
      shortest: the shortest edge before the centre is cut out, at least `size`, which it is by default (DINOv2: 256 for 224).
      fill: RGB, 0 to 255, of what "pad" adds. LLaVA's is `tuple(int(255 * m) for m in mean)` of the mean that pictures are normalised with.

    All resizing is bicubic. Equals what transformers' Pillow classes give before rescaling: "crop" `CLIPImageProcessorPil` and
    `BitImageProcessorPil`, "pad" `LlavaImageProcessorPil` with `do_pad` (off by default there, though LLaVA-1.5, arXiv:2310.03744, was trained
    with it), "squash" `SiglipImageProcessorPil`.

    Raises:
      DataError: a picture too long to be padded to a square.
    """
    edge = shortest or size
    assert edge >= size, f"shortest {edge} is less than size {size}: black edges"
    whole = FITS[how](image, edge, fill)
    left, top = ((side - size) // 2 for side in whole.size)
    return np.array(whole.crop((left, top, left + size, top + size)))


def _crop(image, edge, _):
    """Shortest edge to `edge`, the long edge rounded down.

    Of a strip longer than `LONGEST` squares whole squares are left out at both ends first (resized entire, 1 x 3000 would take 1.4 GB at 336), which
    moves the centre by less than 1/200 pixel.
    """
    short = min(image.size)
    spare = tuple(max(0, side // short - LONGEST) // 2 * short for side in image.size)
    if any(spare):
        image = ImageOps.crop(image, spare)
    return image.resize(tuple(edge * side // short for side in image.size), Image.Resampling.BICUBIC)


def padded(size):
    """Pixels a side of the square that "pad" makes of (width, height). Raises DataError where it would be too large."""
    if max(size) > MAX_PADDED:
        what = f"{size[0]} x {size[1]} pixels cannot be padded to a square: the long side may have {MAX_PADDED:,}"
        raise DataError(f"{what}. Scale it down or cut it.")
    return max(size)


def _pad(image, edge, fill):
    """The middle of a square of `fill`, an odd pixel more below or to the right, and that to `edge` x `edge`."""
    (width, height), long = image.size, padded(image.size)
    square = Image.new("RGB", (long, long), fill)
    square.paste(image, ((long - width) // 2, (long - height) // 2))
    return _squash(square, edge, fill)


def _squash(image, edge, _):
    """All of it to `edge` x `edge`, the aspect not kept."""
    if image.height > LONGEST * max(
        image.width, edge
    ):  # Pillow before 13 would begin with the width, at full height: 6.7 GB for 5 million pixels
        image = image.resize((image.width, edge), Image.Resampling.BICUBIC)
    return image.resize((edge, edge), Image.Resampling.BICUBIC)


FITS = {
    "crop": _crop,
    "pad": _pad,
    "squash": _squash,
}  # (image, edge, fill) -> a PIL image of `edge` x `edge` or larger on one side


@contextlib.contextmanager
def _named_faults(source):
    """Turns every failure inside into a DataError that names the source."""
    try:
        yield
    except MemoryError:  # the machine's fault, not the picture's
        raise
    except Exception as error:  # decoders meet hostile bytes and raise nearly anything
        name = (
            short(source)
            if isinstance(source, (str, os.PathLike))
            else getattr(source, "filename", "") or "the given image"
        )
        text = (
            error
            if isinstance(error, DataError)
            else next(text for kind, text in FAULTS if isinstance(error, kind))
        )
        raise DataError(f"{name}: {text}") from error


def _opened(file, max_pixels):
    """A PIL image of a file, of which only the header has been read, and checked."""
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # above all Pillow's own of many pixels: max_pixels decides
        image = file if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS)
        _check(image, max_pixels)
    return image


def _lies(image):
    """Whether width and height of an image whose header has been read change places when it is set upright."""
    if image.format == "TIFF":  # Pillow gives its upright size
        return False
    if (
        image.format == "PNG" and "exif" not in image.info
    ):  # Pillow would decode the picture to look for it behind the pixels
        return False
    return image.getexif().get(ORIENTATION) in range(5, 9)


def _whole(path):
    """The file in memory. Pillow opens pictures behind a lock, where a slow disk must not hold up other threads."""
    return io.BytesIO(Path(path).read_bytes())


def _read(source, opening=_whole):
    """A PIL image, or a file: what `opening` makes of a path."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(
            f"of type {type(source).__name__}. Give a path, a PIL image, or a uint8 array [height, width, 3]."
        )
    if is_data_url(source):
        return io.BytesIO(_from_data_url(source))
    if is_url(source):
        raise DataError("not fetched: download it, and give the path of the file.")
    if not os.path.isfile(source):
        raise DataError(
            "a folder or device. Give a picture file."
            if os.path.exists(source)
            else "there is no such file. Check the name."
        )
    if not 0 < (size := os.path.getsize(source)) <= MAX_FILE_BYTES:
        raise DataError(
            f"a file of {size:,} bytes; 1 to {MAX_FILE_BYTES:,} are allowed. "
            + ("Scale it down." if size else "Empty: copy it again.")
        )
    return opening(source)


def _from_data_url(url):
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise DataError(
            "a data URL without base64. Write it as data:image/png;base64,... or give the path of a file."
        )
    if len(payload) > MAX_FILE_BYTES * 4 // 3:
        raise DataError(
            f"a data URL of {len(payload):,} characters; at most {MAX_FILE_BYTES:,} bytes are allowed. Scale the picture down."
        )
    try:
        data = base64.b64decode("".join(unquote(payload).split()), validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters outside ASCII
        raise DataError(
            "its base64 is damaged or cut off. Encode the picture again, or give the path of a file."
        ) from None
    if not data:
        raise DataError(
            "a data URL with nothing in it. Encode the picture again, or give the path of a file."
        )
    return data


def _from_array(array):
    if array.dtype != np.uint8:
        raise DataError(
            f"an array of {array.dtype}. Give uint8, 0 to 255 (multiply floats from 0 to 1 by 255 and round)."
        )
    if array.size == 0 or array.ndim < 2 or array.shape[2:] not in ((), (3,), (4,)):
        raise DataError(
            f"an array of shape {list(array.shape)}. Give [height, width], [height, width, 3] or [height, width, 4], none of them 0."
        )
    return Image.fromarray(array)


def _check(image, max_pixels):
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise DataError(
            f"{width} x {height} pixels; 1 to {max_pixels:,} (max_pixels) are allowed. Scale it, or change the limit."
        )
    frames = (
        1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    )  # MPO: a camera's JPEG with previews behind the picture
    if frames > 1:
        raise DataError(
            f"an animation or a document of {frames} frames. Save the frame you mean as a picture of its own."
        )


def _check_levels(image):
    if image.mode == "F":
        raise DataError("its pixels are floats, which have no fixed white level. Save it with 8 or 16 bits.")


def _rgb(image):
    _check_levels(image)
    if image.mode.startswith("I"):  # older Pillow versions would clip 16-bit grey to white
        grey = np.asarray(image).astype(np.int32)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(
                f"its grey values from {grey.min()} to {grey.max()} have no fixed white level. Save it with 8 or 16 bits."
            )
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    image.info.pop("transparency", None)  # dropped like any alpha; Pillow would try to keep it, and warn
    return image.convert("RGB")
