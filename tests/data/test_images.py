"""Every kind of picture opens to the pixels Pillow means by it, and every bad one is refused by name.

The crop is transformers' own.
"""

import base64
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from omnifusion_jax.data.images import FITS, fit, image_size, is_data_url, is_url, open_image, padded, short
from omnifusion_jax.errors import DataError

REAL = Path(__file__).parents[2].parent / "shared/data/real_dialogues/images"
REAL_FILES = sorted(REAL.glob("*")) or [
    pytest.param(None, marks=pytest.mark.skip(reason=f"no pictures in {REAL}"))
]
GRADIENT = (
    np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
)  # 257 apart: level i of 65535 is level i of 255

pytestmark = [
    pytest.mark.filterwarnings("error::UserWarning"),
    pytest.mark.filterwarnings("error::RuntimeWarning"),
]


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def png(width, height, depth):
    """A valid PNG of black pixels, `depth` bits of grey each, written by hand."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + (width * depth + 7) // 8) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def refused(source, *words, **options):
    with pytest.raises(DataError) as caught:
        open_image(source, **options)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert " at 0x" not in text  # Pillow's own messages hold addresses
    return text


# --- pictures that open


def with_transparency(image, value):
    image.info["transparency"] = value
    return image


PICTURES = {
    "rgb.jpg": lambda: Image.fromarray(noise(31, 17)),
    "cmyk.jpg": lambda: Image.fromarray(noise(31, 17, 4), "RGBA").convert("RGB").convert("CMYK"),
    "grey.jpg": lambda: Image.fromarray(noise(31, 17, 1)),
    "rgba.png": lambda: Image.fromarray(noise(31, 17, 4)),
    "grey_alpha.png": lambda: Image.fromarray(noise(31, 17, 4)).convert("LA"),
    "palette.png": lambda: Image.fromarray(noise(31, 17)).quantize(200),
    "palette_one_clear.png": lambda: with_transparency(Image.fromarray(noise(31, 17)).quantize(16), 3),
    "palette_many_clear.png": lambda: with_transparency(
        Image.fromarray(noise(31, 17)).quantize(16), bytes(range(0, 160, 10))
    ),
    "rgb_one_clear.png": lambda: with_transparency(Image.fromarray(noise(31, 17)), (1, 2, 3)),
    "bits.png": lambda: Image.fromarray(noise(31, 17, 1)).convert("1"),
    "rgb.webp": lambda: Image.fromarray(noise(31, 17)),
    "rgba.webp": lambda: Image.fromarray(noise(31, 17, 4)),
    "rgb.bmp": lambda: Image.fromarray(noise(31, 17)),
    "rgb.tiff": lambda: Image.fromarray(noise(31, 17)),
    "still.gif": lambda: Image.fromarray(noise(31, 17)).quantize(64),
}


@pytest.mark.parametrize("name", PICTURES)
def test_opens_as_pillow_converts(tmp_path, name):
    path = saved(tmp_path / name, PICTURES[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow, on the palette with many clear colours
        expected = np.asarray(Image.open(path).convert("RGB"))
    for source in (path, str(path), Image.open(path)):
        image = open_image(source)
        assert (image.mode, image.size) == ("RGB", (31, 17))
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_a_wrong_suffix_does_not_matter(tmp_path):
    path = saved(tmp_path / "photo.jpg", Image.fromarray(noise(8, 6)), format="PNG")
    np.testing.assert_array_equal(np.asarray(open_image(path)), noise(8, 6))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays(channels):
    array = noise(8, 6, channels)
    expected = (array[..., :3] if channels > 1 else array[..., None].repeat(3, -1)).copy()
    images = [open_image(array), open_image(np.asfortranarray(array))]
    array[:] = 0  # no memory is shared
    for image in images:
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_three_rows_are_rows():
    assert open_image(noise(5, 3)).size == (
        5,
        3,
    )  # [3, 5, 3] is height, width, channels whatever the first axis looks like


SIXTEEN_BIT = {
    "sixteen.png": lambda: Image.fromarray(GRADIENT),
    "little_endian.tiff": lambda: Image.fromarray(GRADIENT),
    "big_endian.tiff": lambda: Image.frombytes("I;16B", (256, 4), GRADIENT.astype(">u2").tobytes()),
    "thirty_two.tiff": lambda: Image.fromarray(GRADIENT.astype(np.int32)),
}


@pytest.mark.parametrize("name", SIXTEEN_BIT)
def test_sixteen_bit_grey_keeps_its_gradient(tmp_path, name):
    path = saved(tmp_path / name, SIXTEEN_BIT[name]())
    assert Image.open(path).mode.startswith("I")
    expected = np.arange(256, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    for source in (path, SIXTEEN_BIT[name]()):
        np.testing.assert_array_equal(np.asarray(open_image(source)), expected)


def test_sixteen_bit_grey_is_rounded(tmp_path):
    path = saved(
        tmp_path / "g.png", Image.fromarray(np.array([[128, 129, 385, 386, 65406, 65407]], np.uint16))
    )
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 1, 1, 2, 254, 255]


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, lambda a: np.rot90(a))],
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation_is_applied_once(tmp_path, orientation, undo, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = open_image(saved(tmp_path / f"stored.{suffix}", Image.fromarray(noise(31, 17))))
    image = open_image(saved(tmp_path / f"turned.{suffix}", Image.fromarray(noise(31, 17)), exif=exif))
    np.testing.assert_array_equal(np.asarray(image), undo(np.asarray(stored)))
    np.testing.assert_array_equal(np.asarray(open_image(image)), np.asarray(image))


def test_orientation_of_sixteen_bit_grey(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "xray.png", Image.fromarray(GRADIENT), exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(path))[:, 0, 0], np.arange(256))


def test_a_camera_jpeg_with_previews_is_its_first_picture(tmp_path):
    first, preview = Image.fromarray(noise(31, 17)), Image.fromarray(noise(8, 4))
    path = saved(tmp_path / "phone.jpg", first, format="MPO", save_all=True, append_images=[preview])
    assert Image.open(path).n_frames == 2
    assert open_image(path).size == (31, 17)


def test_the_source_image_is_left_alone():
    source = with_transparency(Image.fromarray(noise(8, 6)), (1, 2, 3))
    open_image(source).putpixel((0, 0), (9, 9, 9))
    assert source.info["transparency"] == (1, 2, 3)
    np.testing.assert_array_equal(np.asarray(source), noise(8, 6))


# --- pictures that are refused


@pytest.mark.parametrize("as_type", [str, Path])
def test_files_that_are_no_pictures(tmp_path, as_type):
    text, empty = tmp_path / "text.jpg", tmp_path / "empty.png"
    text.write_text("not a picture at all")
    empty.touch()
    refused(as_type(text), str(text), "not an image in a known format (JPEG, PNG, ")
    refused(as_type(empty), str(empty), "mpty")
    refused(as_type(tmp_path / "nowhere.jpg"), "nowhere.jpg", "no such file")
    refused(as_type(tmp_path), str(tmp_path), "folder")


@pytest.mark.parametrize("path", ["", "a\0b.jpg", "x" * 256, "c:/cat.jpg"])
def test_paths_that_cannot_be(path):
    refused(path, f"{path}: there is no such file")


@pytest.mark.parametrize("url", ["https://example.org/cat.jpg", "HTTP://example.org/", "s3://bucket/cat.jpg"])
def test_urls_are_not_fetched(url):
    assert is_url(url) and not is_data_url(url)
    assert refused(url) == f"{url}: not fetched: download it, and give the path of the file."


def test_no_message_repeats_a_long_name():
    signed = "https://example.org/cat.jpg?signature=" + "f" * 1000
    assert (
        refused(signed)
        == f"{signed[:40]}... (1,038 characters): not fetched: download it, and give the path of the file."
    )
    assert refused("x" * 5000) == f"{'x' * 40}... (5,000 characters): there is no such file. Check the name."
    assert short("s3://" + "x" * 55) == "s3://" + "x" * 55  # 60 characters
    deep = "/".join(["folder"] * 30) + "/cat.jpg"
    assert short(deep) == short(Path(deep)) == deep  # what can be looked up is said whole
    assert short(data_url(b"x" * 9)) == "data:image/png;base64,eHh4eHh4eHh4... (34 characters)"


# --- data URLs


def data_url(content, kind="image/png;base64"):
    return f"data:{kind}," + base64.b64encode(content).decode()


def test_a_data_url_is_a_picture(tmp_path):
    content = saved(tmp_path / "p.png", Image.fromarray(noise(31, 17))).read_bytes()
    plain = data_url(content)
    folded = plain[:100] + "\n " + plain[100:]
    for url in (
        plain,
        folded,
        data_url(content, "image/jpeg;name=cat;base64"),
        plain.replace("+", "%2B"),
        plain.replace("data:", "DATA:", 1),
    ):
        assert is_data_url(url) and not is_url(url)
        np.testing.assert_array_equal(np.asarray(open_image(url)), noise(31, 17))
        assert image_size(url) == (31, 17)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (
            data_url(noise(31, 17).tobytes())[:-1] + "*",
            "its base64 is damaged or cut off. Encode the picture again",
        ),
        (data_url(noise(31, 17).tobytes())[:-1], "its base64 is damaged"),
        (data_url(b"") + "\u0431" * 80, "its base64 is damaged"),
        (data_url(b"I am not a picture." * 20), "not an image in a known format"),
        (data_url(b"I am not a picture." * 20, "text/plain;base64"), "not an image in a known format"),
        (data_url(noise(31, 17).tobytes(), "image/png"), "a data URL without base64"),
        ("data:image/png;base64" + "x" * 80, "a data URL without base64"),
        (data_url(b"", f"image/png;{'x' * 80};base64"), "a data URL with nothing in it"),
        (data_url(png(10, 9, 1) + bytes(300)), "10 x 9 pixels; 1 to 80 (max_pixels) are allowed"),
    ],
)
def test_data_urls_that_hold_no_picture(url, words):
    text = refused(url, words, f"{url[:40]}... ({len(url):,} characters): ", max_pixels=80)
    assert url[:60] not in text


def test_a_huge_data_url(monkeypatch):
    monkeypatch.setattr("omnifusion_jax.data.images.MAX_FILE_BYTES", 99)
    refused(
        data_url(bytes(102)),
        "a data URL of 136 characters; at most 99 bytes are allowed. Scale the picture down",
    )
    refused(data_url(bytes(99)), "not an image")


# --- sizes from the header


@pytest.fixture
def no_pixels(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a pixel was decoded"))


def test_a_size_is_read_without_a_pixel(tmp_path, request):
    paths = [saved(tmp_path / name, make()) for name, make in PICTURES.items()]
    paths.append(
        saved(
            tmp_path / "phone.jpg",
            Image.fromarray(noise(31, 17)),
            format="MPO",
            save_all=True,
            append_images=[Image.new("RGB", (9, 9))],
        )
    )
    request.getfixturevalue("no_pixels")
    for path in paths:
        assert image_size(path) == (31, 17), path
    assert image_size(noise(8, 6)) == image_size(Image.new("L", (8, 6))) == (8, 6)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_a_size_is_that_of_the_upright_picture(tmp_path, suffix):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path / f"{orientation}.{suffix}", Image.new("RGB", (31, 17)), exif=exif)
        assert image_size(path) == open_image(path).size == ((31, 17) if orientation < 5 else (17, 31))


def test_what_a_header_shows_to_be_wrong(tmp_path, no_pixels):
    def unsized(source, words, **options):
        with pytest.raises(DataError, match=words):
            image_size(source, **options)

    (tmp_path / "text.jpg").write_text("not a picture at all")
    (tmp_path / "bomb.png").write_bytes(png(20_000, 20_000, depth=1))
    (tmp_path / "large.png").write_bytes(png(20, 10, depth=8))
    unsized(tmp_path / "gone.jpg", "gone.jpg: there is no such file")
    unsized(tmp_path / "text.jpg", "text.jpg: not an image in a known format")
    unsized(tmp_path / "bomb.png", "more pixels than Pillow opens")
    unsized(tmp_path / "large.png", r"20 x 10 pixels; 1 to 199 \(max_pixels\)", max_pixels=199)
    unsized(saved(tmp_path / "f.tiff", Image.fromarray(GRADIENT.astype(np.float32))), "floats")
    frames = [Image.fromarray(noise(16, 8, seed=i)) for i in range(3)]
    unsized(saved(tmp_path / "moving.tiff", frames[0], save_all=True, append_images=frames[1:]), "3 frames")


def test_formats_outside_the_list(tmp_path):
    refused(saved(tmp_path / "picture.ppm", Image.fromarray(noise(8, 6))), "picture.ppm", "known format")
    eps = tmp_path / "picture.jpg"
    eps.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    refused(eps, "known format")


def test_a_huge_file(tmp_path, monkeypatch):
    monkeypatch.setattr("omnifusion_jax.data.images.MAX_FILE_BYTES", 100)
    refused(saved(tmp_path / "big.png", Image.fromarray(noise(31, 17))), "big.png", "100")
    refused(bytes(101), "a file of 101 bytes; 1 to 100 are allowed. Scale it down")
    refused(bytes(100), "not an image")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff", "gif"])
@pytest.mark.filterwarnings("default")  # Pillow remarks on what it can still read of a TIFF directory
def test_truncated(tmp_path, suffix):
    path = saved(
        tmp_path / f"cut.{suffix}",
        Image.fromarray(noise(100, 80)).quantize(64).convert("P" if suffix == "gif" else "RGB"),
    )
    data = path.read_bytes()
    for kept in (3, 20, 60, 200, len(data) // 2, len(data) - 50):
        path.write_bytes(data[:kept])
        refused(path, str(path))
    refused(path, "truncated")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@settings(max_examples=60)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"]), st.integers(0, 2**32 - 1))
def test_damaged_bytes_open_or_are_refused(tmp_path_factory, kind, seed):
    path = saved(tmp_path_factory.mktemp("damaged") / "picture", Image.fromarray(noise(24, 16)), format=kind)
    random, data = np.random.default_rng(seed), bytearray(path.read_bytes())
    for _ in range(4):
        data[random.integers(0, min(200, len(data)))] = random.integers(0, 256)
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert open_image(path, max_pixels=10_000).mode == "RGB"
        except DataError as error:
            assert str(error).startswith(str(path))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_several_frames(tmp_path, suffix):
    frames = [Image.fromarray(noise(16, 8, seed=i)) for i in range(3)]
    path = saved(tmp_path / f"moving.{suffix}", frames[0], save_all=True, append_images=frames[1:])
    for source in (path, Image.open(path)):
        refused(source, "3 frames", "Save the frame")
    refused(path, str(path))


# 64 million pixels pass Pillow in silence, 90 million with a warning, 400 million raise its own error
@pytest.mark.parametrize("size", [(8000, 8000), (10_000, 9000), (20_000, 20_000)])
def test_a_bomb_is_refused_from_its_header(tmp_path, monkeypatch, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size, depth=1))
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a pixel was decoded"))
    limit, start = Image.MAX_IMAGE_PIXELS, time.monotonic()
    refused(path, "bomb.png", "pixels", "cale it")
    assert time.monotonic() - start < 1
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_pixel_limit_is_inclusive_and_holds_for_every_source(tmp_path):
    array = noise(20, 10)
    for source in (array, Image.fromarray(array), saved(tmp_path / "p.png", Image.fromarray(array))):
        assert open_image(source, max_pixels=200).size == (20, 10)
        refused(source, "20 x 10 pixels", "199", max_pixels=199)


def test_a_raised_limit_opens_what_pillow_only_warns_of(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png(10_000, 9000, depth=1))
    assert open_image(path, max_pixels=100_000_000).size == (10_000, 9000)


def test_warning_filters_survive_threads(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(10_000, 9000, depth=1))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: refused(path, "pixels"), range(64)))
    assert warnings.filters == before


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (noise(8, 6) / 255.0, ("float64", "uint8")),
        (noise(8, 6).astype(np.int64), ("int64", "uint8")),
        (GRADIENT, ("uint16", "uint8")),
        (noise(8, 6) > 3, ("bool", "uint8")),
        (noise(8, 6).transpose(2, 0, 1), ("[3, 6, 8]", "[height, width, 3]")),
        (noise(8, 6)[None], ("[1, 6, 8, 3]",)),
        (noise(8, 6)[..., :1], ("[6, 8, 1]",)),
        (noise(8, 6)[0, 0], ("[3]",)),
        (np.zeros((), np.uint8), ("[]",)),
        (np.zeros((0, 5, 3), np.uint8), ("[0, 5, 3]",)),
        (np.zeros((5, 0), np.uint8), ("[5, 0]",)),
    ],
)
def test_arrays_of_the_wrong_kind(array, words):
    refused(array, "the given image", *words)


@pytest.mark.parametrize("source", [None, 3, [[1, 2]], object()])
def test_anything_else(source):
    refused(source, type(source).__name__, "Give a path")


def test_pil_images_without_pixels():
    refused(Image.new("RGB", (0, 5)), "0 x 5")


def test_grey_without_a_white_level(tmp_path):
    refused(
        saved(tmp_path / "f.tiff", Image.fromarray(GRADIENT.astype(np.float32))),
        "f.tiff",
        "floats",
        "8 or 16 bits",
    )
    refused(
        saved(tmp_path / "i.tiff", Image.fromarray(GRADIENT.astype(np.int32) * 2)),
        "i.tiff",
        "131070",
        "8 or 16 bits",
    )
    refused(Image.fromarray(GRADIENT.astype(np.int32) - 1), "-1", "8 or 16 bits")


# --- the square


FILL = (122, 116, 104)  # of CLIP's mean, as LLaVA rounds it


@pytest.fixture(scope="module")
def theirs():
    """By kind of `fit`, the pixels transformers makes of an RGB image before it rescales and normalises."""
    transformers = pytest.importorskip("transformers")
    raw = {"do_rescale": False, "do_normalize": False}
    mean = transformers.image_utils.OPENAI_CLIP_MEAN
    made = {
        "crop": transformers.CLIPImageProcessorPil(**raw),
        "pad": transformers.LlavaImageProcessorPil(do_pad=True, image_mean=mean, **raw),
        "squash": transformers.SiglipImageProcessorPil(**raw),
    }

    def pixels(image, size, how="crop", shortest=None):
        square = {"height": size, "width": size}
        sizes = (
            {"size": square}
            if how == "squash"
            else {"size": {"shortest_edge": shortest or size}, "crop_size": square}
        )
        return made[how](image, return_tensors="np", **sizes)["pixel_values"][0].transpose(1, 2, 0)

    return pixels


@settings(max_examples=25)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from([(48, None), (336, None), (224, 256), (48, 61)]),
    st.integers(0, 1000),
)
@example(1, 400, (48, None), 0)
@example(400, 3, (336, None), 0)
@example(1, 1, (336, None), 0)
@example(336, 336, (336, None), 0)
@example(337, 400, (336, None), 0)
@example(300, 290, (224, 256), 0)
@example(640, 480, (336, None), 0)  # the part that is kept can be resized alone
@example(400, 300, (224, 256), 0)
@example(300, 350, (336, None), 0)  # and here it cannot: Pillow would resize the heights first
@example(350, 251, (48, None), 0)
def test_crop_equals_transformers(theirs, width, height, sizes, seed):
    image = Image.fromarray(noise(width, height, seed=seed))
    square = fit(image, sizes[0], shortest=sizes[1])
    assert (square.dtype, square.shape) == (np.uint8, (sizes[0], sizes[0], 3))
    np.testing.assert_array_equal(square, theirs(image, *sizes[:1], shortest=sizes[1]))


@settings(max_examples=25)
@given(
    st.sampled_from(["pad", "squash"]),
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from([48, 61]),
    st.integers(0, 1000),
)
@example("pad", 100, 99, 48, 0)
@example("pad", 99, 100, 48, 0)
@example("pad", 1, 3000, 48, 0)
@example("squash", 400, 1, 336, 0)
@example("squash", 1, 9000, 61, 0)
@example("squash", 30_000, 1, 61, 0)
def test_pad_and_squash_equal_transformers(theirs, how, width, height, size, seed):
    image = Image.fromarray(noise(width, height, seed=seed))
    square = fit(image, size, how, fill=FILL)
    assert (square.dtype, square.shape) == (np.uint8, (size, size, 3))
    np.testing.assert_array_equal(square, theirs(image, size, how))


@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: path.name if path else "none")
@pytest.mark.parametrize("how", FITS)
@pytest.mark.parametrize("size", [48, 336])
def test_real_pictures_equal_transformers(theirs, path, how, size):
    image = open_image(path)
    np.testing.assert_array_equal(fit(image, size, how, fill=FILL), theirs(image, size, how))


def test_dinov2_cuts_224_from_256(theirs):
    transformers = pytest.importorskip("transformers")
    bit = transformers.BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size=224, do_rescale=False, do_normalize=False
    )
    image = Image.fromarray(noise(401, 300))
    np.testing.assert_array_equal(
        fit(image, 224, shortest=256), bit(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    )
    np.testing.assert_array_equal(
        fit(image, 224, "pad", shortest=256, fill=FILL), theirs(image, 224, "pad", shortest=256)
    )


def test_what_is_padded_lies_in_the_middle():
    assert (
        fit(Image.new("RGB", (1, 4), (9, 8, 7)), 4, "pad", fill=FILL).tolist()
        == [[list(FILL), [9, 8, 7], list(FILL), list(FILL)]] * 4
    )
    assert fit(Image.new("RGB", (3, 2), (9, 8, 7)), 3, "pad").tolist() == [[[9, 8, 7]] * 3] * 2 + [
        [[0, 0, 0]] * 3
    ]


def test_only_pad_and_squash_keep_the_ends():
    image = Image.new("RGB", (30, 10))
    image.paste((255, 255, 255), (10, 0, 20, 10))
    assert [int((fit(image, 30, how) > 127).sum()) // 3 for how in FITS] == [30 * 30, 10 * 10, 10 * 30]


def test_a_line_of_pixels():
    line = Image.fromarray(noise(3000, 1))
    resized = np.asarray(
        line.resize((336 * 3000, 1), Image.Resampling.BICUBIC)
    )  # one row of what would be 336
    middle = resized[:, 336 * 1499 + 168 : 336 * 1500 + 168].repeat(336, 0)
    np.testing.assert_array_equal(fit(line, 336), middle)
    upright = fit(line.transpose(Image.Transpose.TRANSPOSE), 336)
    np.testing.assert_array_equal(upright, middle.transpose(1, 0, 2))


@pytest.mark.parametrize("size", [(7, 2000), (2001, 7), (5000, 13)])
def test_a_long_strip_is_close(theirs, size):
    image = Image.fromarray(noise(*size))  # whose edges the rounded long side moves by a fraction of a pixel
    assert np.abs(fit(image, 48).astype(int) - theirs(image, 48)).max() <= 2


@pytest.mark.parametrize("size", [(1, 5_000_000), (5_000_000, 1)])
def test_an_endless_strip_stays_small(size):
    strip = Image.new("RGB", size, FILL)
    for how in ("crop", "squash"):
        np.testing.assert_array_equal(fit(strip, 336, how), np.broadcast_to(np.uint8(FILL), (336, 336, 3)))
    with pytest.raises(
        DataError,
        match=f"{size[0]} x {size[1]} pixels cannot be padded to a square: the long side may have 16,384",
    ):
        fit(strip, 336, "pad")


def test_the_longest_strip_that_is_padded():
    assert padded((16_384, 1)) == padded((1, 16_384)) == 16_384


def test_a_strip_shrinks_before_it_grows(monkeypatch):
    """Whatever Pillow's own order is: none of the pictures in between is larger than both ends."""
    asked, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *rest: asked.append(size) or resize(image, size, *rest)
    )
    strip = Image.fromarray(noise(3, 100_000))
    stepwise = fit(strip, 64, "squash")
    assert asked == [(3, 64), (64, 64)]
    assert (
        np.abs(stepwise.astype(int) - np.asarray(resize(strip, (64, 64), Image.Resampling.BICUBIC))).max()
        <= 2
    )  # by rounding in between


def test_a_draft_of_a_large_file_is_smaller_and_looks_the_same(tmp_path):
    """The shorter side keeps what was asked for; a file that is small, or no JPEG, is read as ever."""
    y, x = np.mgrid[:900, :1200]
    pixels = np.stack([x * 255 // 1200, y * 255 // 900, (x + y) % 256], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    whole, half = (open_image(tmp_path / "a.jpg", draft=draft) for draft in (None, 336))
    assert (whole.size, half.size) == ((1200, 900), (600, 450))
    assert open_image(tmp_path / "a.jpg", draft=600).size == (1200, 900)
    assert open_image(tmp_path / "a.jpg", draft=100).size == (150, 113)
    assert open_image(tmp_path / "a.png", draft=100).size == (1200, 900)
    assert open_image(pixels, draft=100).size == (1200, 900)
    difference = np.abs(fit(whole, 336).astype(int)[..., :2] - fit(half, 336).astype(int)[..., :2])
    assert difference.mean() < 2
    with pytest.raises(DataError, match="are allowed"):  # by the header, before anything is shrunk
        open_image(tmp_path / "a.jpg", draft=100, max_pixels=10**6)
