"""Opens pictures as upright RGB images and fits them into the uint8 squares that encoders take.

NumPy and Pillow alone do this, since data workers have no accelerator. Scaling to [0, 1] and normalising are
left to the device.
"""

import base64
import binascii
import contextlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from omnifusion_jax.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_FILE_BYTES = 1 << 29  # 50 million uncompressed 16-bit RGBA pixels are 400 MB
# Characters of a path that a message shows in full, so that it can be looked up; of longer ones, and of URLs
# over 60 characters, it shows the beginning.
LONGEST_NAME = 256
LONGEST = 128  # squares: a longer strip is shortened before it is resized for the sake of its central square
MAX_PADDED = 1 << 14  # pixels: a square with this side takes 1 GB

# What an error means to the user; the first row that fits counts. Pillow's own text can hold memory addresses
# and is never repeated.
FAULTS = (
    (
        UnidentifiedImageError,
        DataError(
            f"not an image in a known format ({', '.join(FORMATS)}). Convert it to one of them.",
            "not_a_picture",
        ),
    ),
    (Image.DecompressionBombError, DataError("has more pixels than Pillow opens. Scale it down.", "size")),
    (PermissionError, DataError("the file may not be read. Change its permissions.", "permission")),
    (
        Exception,
        DataError(
            "truncated, damaged, or of a kind Pillow does not decode. "
            "Copy it again, or save it as JPEG or PNG.",
            "damaged",
        ),
    ),
)

ORIENTATION = 0x0112  # the EXIF tag; with values 5 to 8 the picture lies on its side

_warning_filters = threading.Lock()  # they belong to the whole process, and pictures are read in threads


def open_image(
    source: str | os.PathLike | bytes | Image.Image | np.ndarray,
    *,
    max_pixels: int = 50_000_000,
    draft: int | None = None,
) -> Image.Image:
    """Opens one picture as an upright RGB `PIL.Image.Image` that shares no memory with `source`.

    EXIF orientation is applied. Alpha is dropped, not composited, as `CLIPImageProcessor` did in transformers
    4.37, with which OmniFusion was trained. 16-bit grey is scaled from 0..65535 to 0..255, and so are 32-bit
    integers within that range; float grey is refused.

    Args:
      source: path of a JPEG, PNG, WebP, BMP, TIFF or GIF file; such a file as a data URL
        (`data:image/png;base64,...`) or as its bytes; a PIL image; or uint8[height, width], [height, width,
        3 or 4]. Other URLs are not fetched.
      max_pixels: largest width * height, checked in the header before any pixel is decoded. Pillow itself
        stops at 2 * `Image.MAX_IMAGE_PIXELS`.
      draft: a JPEG file is decoded at a half, a quarter or an eighth of its size, as long as its shorter side
        keeps so many pixels: several times faster for large files, and not the same pixels.

    Raises:
      DataError: `source` cannot be used, which includes animations and multi-page files. The message names it
        and says what to do.
    """
    with _named_faults(source):
        given = _read(source)
        image = _opened(given, max_pixels)
        if isinstance(given, Image.Image):
            image = image.copy()
        if draft is not None:  # does nothing for other formats
            short = min(image.size)
            image.draft(None, tuple(side * draft // short for side in image.size))
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def image_size(
    source: str | os.PathLike | bytes | Image.Image | np.ndarray, *, max_pixels: int = 50_000_000
) -> tuple[int, int]:
    """(width, height) of the picture that `open_image` gives, read from the header without decoding pixels.

    Raises:
      DataError: the header shows that `source` cannot be used. It does not show damage further on, integer
        grey beyond 0..65535, or an orientation that a PNG file stores after its pixels.
    """
    with _named_faults(source), contextlib.ExitStack() as files:
        return _size(_read(source, lambda path: files.enter_context(open(path, "rb"))), max_pixels)


def picture_file(
    source: str | os.PathLike | bytes | Image.Image | np.ndarray, *, max_pixels: int = 50_000_000
) -> bytes:
    """The file of a picture: its bytes as they are, or for a PIL image or an array a PNG file.

    The PNG file holds what `open_image` gives for the source, so that nothing is lost.

    Raises:
      DataError: as `image_size` does, from the header.
    """
    with _named_faults(source):
        opened = _read(source)
        if isinstance(opened, io.BytesIO):
            _size(opened, max_pixels)
            return opened.getvalue()
        written = io.BytesIO()
        _rgb(ImageOps.exif_transpose(_opened(opened, max_pixels))).save(written, "PNG")
        return written.getvalue()


def is_data_url(source: object) -> bool:
    """Whether this is a string that holds a file itself, `data:image/png;base64,...`."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def is_url(source: object) -> bool:
    """Whether this is a string that begins like a URL, `https://`, `s3://`, ...; data URLs do not count."""
    return isinstance(source, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source) is not None


def short(source: str | os.PathLike) -> str | bytes:
    """A name for messages: the path or URL itself, or its beginning and its length if it is too long to show.

    Data URLs are always shortened.
    """
    name = os.fspath(source)
    if isinstance(name, bytes):
        return name
    long_url = is_url(name) and len(name) > 60
    if not (is_data_url(name) or long_url or len(name) > LONGEST_NAME):
        return name
    return f"{name[:40]}... ({len(name):,} characters)"


def fit(
    image: Image.Image,
    size: int,
    how: str = "crop",
    shortest: int | None = None,
    fill: tuple[int, int, int] | None = (0, 0, 0),
) -> np.ndarray:
    """Resizes an RGB PIL image in one of the ways of `FITS` and cuts out its centre: uint8[size, size, 3].

    All resizing is bicubic. The result equals that of transformers' Pillow classes before rescaling: "crop"
    that of `CLIPImageProcessorPil` and `BitImageProcessorPil`, "pad" that of `LlavaImageProcessorPil` with
    `do_pad` (off by default there, though LLaVA-1.5, arXiv:2310.03744, was trained with it), "squash" that of
    `SiglipImageProcessorPil`.

    Args:
      size: pixels a side of the result.
      how: a key of `FITS`.
      shortest: pixels of the shortest edge before the centre is cut out, at least `size`, which is the
        default (DINOv2 has 256 for a size of 224).
      fill: RGB colour, 0 to 255, of what "pad" adds. LLaVA's is `tuple(int(255 * m) for m in mean)`, of the
        mean with which pictures are normalised.

    Raises:
      DataError: the picture is too long to be padded to a square.
    """
    edge = shortest or size
    assert edge >= size, f"shortest {edge} is less than size {size}: black edges"
    image, whole = FITS[how](image, edge, fill)
    return np.asarray(_centre(image, whole, size))


def _centre(image, whole, size):
    """The centre, `size` x `size`, of the image resized to `whole`, (width, height).

    Pillow can resize that part alone, to the same bytes where its edges in the image are 32-bit floats, and
    where it resizes the widths first as it does with the whole: always, if the image is not higher than wide.
    """
    corners = [(side - size) // 2 for side in whole]
    corners += [at + size for at in corners]
    box = [at * side / to for at, side, to in zip(corners, image.size * 2, whole * 2, strict=True)]
    exact = [float(np.float32(at)) * to == round(at * to) for at, to in zip(box, whole * 2, strict=True)]
    if all(exact) and image.width >= image.height:
        return image.resize((size, size), Image.Resampling.BICUBIC, box)
    return image.resize(whole, Image.Resampling.BICUBIC).crop(corners)


def _crop(image, edge, _):
    """The shortest edge becomes `edge`, and the other follows in proportion, rounded down.

    A strip longer than `LONGEST` squares first loses whole squares at both ends: resized as a whole, 1 x 3000
    pixels would take 1.4 GB at 336. This moves the centre by less than 1/200 pixel.
    """
    short = min(image.size)
    spare = tuple(max(0, side // short - LONGEST) // 2 * short for side in image.size)
    if any(spare):
        image = ImageOps.crop(image, spare)
    return image, tuple(edge * side // short for side in image.size)


def padded(size: tuple[int, int]) -> int:
    """The side in pixels of the square to which "pad" pads (width, height).

    Raises:
      DataError: it is larger than MAX_PADDED.
    """
    if max(size) > MAX_PADDED:
        raise DataError(
            f"{size[0]} x {size[1]} pixels cannot be padded to a square: "
            f"the long side may have {MAX_PADDED:,}. Scale it down or cut it.",
            "size",
        )
    return max(size)


def _pad(image, edge, fill):
    """Centres the picture in a square of colour `fill`, which becomes `edge` x `edge`.

    An odd pixel of padding goes below or to the right.
    """
    width, height = image.size
    long = padded(image.size)
    square = Image.new("RGB", (long, long), fill)
    square.paste(image, ((long - width) // 2, (long - height) // 2))
    return _squash(square, edge, fill)


def _squash(image, edge, _):
    """The whole picture becomes `edge` x `edge`, whatever its aspect."""
    # Pillow before 13 resizes the width first, at full height: 6.7 GB for a strip of 5 million pixels
    if image.height > LONGEST * max(image.width, edge):
        image = image.resize((image.width, edge), Image.Resampling.BICUBIC)
    return image, (edge, edge)


# (image, edge, fill) -> a PIL image, and the (width, height) to resize it to, `edge` x `edge` or more
FITS = {"crop": _crop, "pad": _pad, "squash": _squash}


@contextlib.contextmanager
def _named_faults(source) -> Iterator[None]:
    """Turns every error inside into a DataError that names the source."""
    try:
        yield
    except MemoryError:  # the machine's fault, not the picture's
        raise
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        if isinstance(source, (str, os.PathLike)):
            name = short(source)
        else:
            name = getattr(source, "filename", "") or "the given image"
        if not isinstance(error, DataError):
            meant = next(meant for kind, meant in FAULTS if isinstance(error, kind))
            raise meant.at(name) from error
        raise error.at(name) from error


def _opened(file, max_pixels):
    """The PIL image of a file, with only its header read and checked."""
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # above all Pillow's of too many pixels, on which max_pixels decides
        image = file if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS)
        _check(image, max_pixels)
    return image


def _size(file, max_pixels):
    """(width, height) of the upright picture in a file for Pillow, whose header is checked."""
    image = _opened(file, max_pixels)
    _check_levels(image)
    return image.size[::-1] if _lies(image) else image.size


def _lies(image):
    """Whether setting the image upright exchanges its width and height, from its header."""
    if image.format == "TIFF":  # Pillow gives the upright size
        return False
    # without EXIF data in front Pillow would decode a PNG file to look for it behind the pixels
    if image.format == "PNG" and "exif" not in image.info:
        return False
    return image.getexif().get(ORIENTATION) in range(5, 9)


def _whole(path):
    """The file in memory: Pillow opens it under a lock, where a slow disk would hold up other threads."""
    return io.BytesIO(Path(path).read_bytes())


def _read(source, opening=_whole):
    """The source as a PIL image or as a file for Pillow, which `opening` opens if the source is a path."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        _check_bytes(len(source))
        return io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(
            f"of type {type(source).__name__}. "
            "Give a path, a file's bytes, a PIL image, or a uint8 array [height, width, 3].",
            "media",
        )
    if is_data_url(source):
        return io.BytesIO(_from_data_url(source))
    if is_url(source):
        raise DataError("not fetched: download it, and give the path of the file.", "not_fetched")
    if not os.path.isfile(source):
        if os.path.exists(source):
            raise DataError("a folder or device. Give a picture file.", "missing")
        raise DataError("there is no such file. Check the name.", "missing")
    _check_bytes(os.path.getsize(source))
    return opening(source)


def _check_bytes(size):
    if not 0 < size <= MAX_FILE_BYTES:
        advice = "Scale it down." if size else "Empty: copy it again."
        raise DataError(
            f"a file of {size:,} bytes; 1 to {MAX_FILE_BYTES:,} are allowed. {advice}", "file_size"
        )


def _from_data_url(url):
    """The bytes of the file that a data URL holds."""
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise DataError(
            "a data URL without base64. Write it as data:image/png;base64,... or give the path of a file.",
            "data_url",
        )
    if len(payload) > MAX_FILE_BYTES * 4 // 3:
        raise DataError(
            f"a data URL of {len(payload):,} characters; at most {MAX_FILE_BYTES:,} bytes are allowed. "
            "Scale the picture down.",
            "file_size",
        )
    try:
        data = base64.b64decode("".join(unquote(payload).split()), validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters outside ASCII
        raise DataError(
            "its base64 is damaged or cut off. Encode the picture again, or give the path of a file.",
            "data_url",
        ) from None
    if not data:
        raise DataError(
            "a data URL with nothing in it. Encode the picture again, or give the path of a file.", "data_url"
        )
    return data


def _from_array(array):
    if array.dtype != np.uint8:
        raise DataError(
            f"an array of {array.dtype}. "
            "Give uint8, 0 to 255 (multiply floats from 0 to 1 by 255 and round).",
            "media",
        )
    if array.size == 0 or array.ndim < 2 or array.shape[2:] not in ((), (3,), (4,)):
        raise DataError(
            f"an array of shape {list(array.shape)}. "
            "Give [height, width], [height, width, 3] or [height, width, 4], none of them 0.",
            "media",
        )
    return Image.fromarray(array)


def _check(image, max_pixels):
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise DataError(
            f"{width} x {height} pixels; 1 to {max_pixels:,} (max_pixels) are allowed. "
            "Scale it, or change the limit.",
            "size",
        )
    # MPO is a camera's JPEG; the frames after its first are previews
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise DataError(
            f"an animation or a document of {frames} frames. "
            "Save the frame you mean as a picture of its own.",
            "animated",
        )


def _check_levels(image):
    if image.mode == "F":
        raise DataError(
            "its pixels are floats, which have no fixed white level. Save it with 8 or 16 bits.", "levels"
        )


def _rgb(image):
    """The image as 8-bit RGB without alpha."""
    _check_levels(image)
    if image.mode.startswith("I"):  # older Pillow versions would clip 16-bit grey to white
        grey = np.asarray(image).astype(np.int32)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(
                f"its grey values from {grey.min()} to {grey.max()} have no fixed white level. "
                "Save it with 8 or 16 bits.",
                "levels",
            )
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    image.info.pop("transparency", None)  # dropped like alpha; Pillow would try to keep it, and warn
    return image if image.mode == "RGB" else image.convert("RGB")
