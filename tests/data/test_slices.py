"""Slices of pictures: published cases, published rules on drawn sizes, pixels, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

from omnifusion_jax.config import EncoderConfig, ImageConfig, adapter
from omnifusion_jax.data.pictures import Pictures
from omnifusion_jax.data.slices import SliceProcessor, in_patches, plan
from omnifusion_jax.errors import ConfigError, DataError

# (width, height) of a picture: that of the whole one in the model, (columns, rows), that of a slice
PUBLISHED = {
    (448, 448): ((448, 448), None, None),
    (200, 100): ((630, 322), None, None),
    (640, 480): ((518, 392), (2, 1), (364, 546)),
    (672, 672): ((448, 448), (2, 2), (448, 448)),
    (1024, 768): ((518, 392), (2, 2), (518, 392)),
    (896, 448): ((630, 322), (2, 1), (448, 448)),
    (1344, 1344): ((448, 448), (3, 3), (448, 448)),
    (1920, 1080): ((602, 336), (4, 2), (420, 476)),
    (400, 4000): ((140, 1414), (1, 9), (420, 476)),
    (3000, 500): ((1092, 182), (7, 1), (420, 476)),
    (100, 1000): ((140, 1414), None, None),
}
TOKENS = {1: 64, 3: 192, 5: 320, 8: 512, 9: 576, 10: 640}  # of so many pictures


def small(**settings):
    """Slices of about 8 x 8 patches of 2 pixels."""
    encoder = EncoderConfig(
        image_size=16, patch=2, width=8, layers=1, heads=2, mlp=8, class_token=False,
        position_resize="bicubic_antialias", budget=96,
    )  # fmt: skip
    joins = adapter("resampler", heads=2, queries=4, adaptive=True)
    return ImageConfig((encoder,), joins, fit="slices", **settings)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_cases(size):
    whole, grid, cell = PUBLISHED[size]
    found = plan(size, 448, 14, 9)
    assert found.whole == whole
    assert found.grid[::-1] == (grid or (0, 0)) and found.slice == (cell or (0, 0))
    processor = SliceProcessor(448, 14, 1152, 9, 64)
    prepared = processor.outline(Image.new("L", size))
    count = 1 + (math.prod(grid) if grid else 0)
    assert len(prepared.order) == TOKENS[count] and prepared.parts == count
    assert processor.room == 10 and processor.positions == 640


def reference(width, height, scale, patch, most):
    """The rules as published, one after the other: (size of the whole, (columns, rows), size of a slice)."""

    def divided(length, by):
        return max(round(length / by) * by, by)

    def best(w, h, upscale):
        if w * h > scale * scale or upscale:
            r = w / h
            h = int(scale / math.sqrt(r))
            w = int(h * r)
        return divided(w, patch), divided(h, patch)

    multiple = min(math.ceil(width * height / (scale * scale)), most)
    if multiple <= 1:
        return best(width, height, True), None, None
    tried, error = None, math.inf
    for n in (multiple - 1, multiple, multiple + 1):
        if n == 1 or n > most:
            continue
        for m in range(1, n + 1):
            if n % m == 0:
                off = abs(math.log(width / height) - math.log(m / (n // m)))
                if off < error:
                    tried, error = (m, n // m), off
    wide, tall = divided(width, tried[0]), divided(height, tried[1])
    return best(width, height, False), tried, best(wide / tried[0], tall / tried[1], True)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 9))
@example(1000, 1, 9)
@example(217, 4096, 9)
def test_plans_follow_the_published_rules(width, height, most):
    whole, grid, cell = reference(width, height, 448, 14, most)
    found = plan((width, height), 448, 14, most)
    assert (found.whole, found.grid[::-1], found.slice) == (whole, grid or (0, 0), cell or (0, 0))


@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_pixels_are_those_of_the_resized_picture(width, height, seed):
    """Each patch of each slice lies where its number in the grid says."""
    assume(max(width, height) < 40 * min(width, height))
    c = small()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    prepared = Pictures.of(c)(pixels)
    whole, grid, cell = reference(width, height, 16, 2, 9)
    columns, rows = grid or (0, 0)
    assert prepared.grid == (rows, columns) and len(prepared.views[0]) == 1 + rows * columns

    def resized(size):
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))

    pictures = [resized(whole)]
    if grid:
        large = resized((cell[0] * columns, cell[1] * rows))
        for row in range(rows):
            for column in range(columns):
                y, x = row * cell[1], column * cell[0]
                pictures.append(large[y : y + cell[1], x : x + cell[0]])
    for found, picture in zip(prepared.views[0], pictures, strict=True):
        down, across = picture.shape[0] // 2, picture.shape[1] // 2
        marks = found[:, -1].tolist()
        assert marks == ([1] * (across - 1) + [2]) * down + [0] * (96 - down * across)
        for i in range(down * across):
            y, x = 2 * (i // across), 2 * (i % across)
            np.testing.assert_array_equal(found[i, :-1].reshape(2, 2, 3), picture[y : y + 2, x : x + 2])
        assert not found[down * across :].any()


def test_the_header_tells_as_much_as_the_picture():
    processor = Pictures.of(small())
    picture = np.zeros((30, 16, 3), np.uint8)
    whole, header = processor(picture), processor.outline(picture)
    np.testing.assert_array_equal(whole.order, header.order)
    assert whole.grid == header.grid == (2, 1) and whole.rows == header.rows
    assert len(whole.views[0]) == len(header.views[0])
    one = Pictures.of(small(slices=1))
    assert one(picture).grid == (0, 0) and one.room == 1 and one.positions == 4


def test_strips_are_refused():
    """A side is a patch at least, so that a long strip has more patches than its pixels would make."""
    processor = Pictures.of(small())
    with pytest.raises(
        DataError, match=r"240 x 1 pixels make a slice of \d+ patches, and 96 \(encoder.budget\)"
    ):
        processor.outline(np.zeros((1, 240, 3), np.uint8))
    with pytest.raises(DataError, match="Cut it"):
        processor(np.zeros((240, 1, 3), np.uint8))


@pytest.mark.parametrize("read", ["__call__", "outline"])
def test_pictures_of_too_many_pixels_are_refused(read):
    processor, picture = Pictures.of(small(), max_pixels=99), np.zeros((10, 10, 3), np.uint8)
    with pytest.raises(DataError, match=r"10 x 10 pixels; 1 to 99 \(max_pixels\) are allowed"):
        getattr(processor, read)(picture)


def test_no_picture_of_a_usual_shape_is_refused_by_minicpm_v():
    """Of pictures up to 60 times as long as wide none has a slice of more than 1152 patches."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        area, aspect = rng.uniform(7, 16), rng.uniform(0, math.log(60))
        width, height = (max(1, int(math.exp((area + sign * aspect) / 2))) for sign in (1, -1))
        if width > 60 * height:
            continue
        found = plan((width, height), 448, 14, 9)
        assert max(w * h for w, h in (found.whole, found.slice)) <= 1152 * 14**2, (width, height)


def test_what_does_not_go_together():
    small().validate(8)
    with pytest.raises(ConfigError, match=r"image.fit=slices goes with one encoder"):
        ImageConfig(fit="slices").validate(4096)
    c = small()
    c.fit = "crop"
    with pytest.raises(ConfigError, match=r"image.fit=slices goes with one encoder"):
        c.validate(8)
    c = small()
    c.adapter = adapter("resampler", heads=2, queries=4)
    with pytest.raises(ConfigError, match=r"needs adapter.adaptive"):
        c.validate(8)
    c = small()
    c.encoders[0].class_token = True
    with pytest.raises(ConfigError, match=r"encoder.budget needs patches alone"):
        c.validate(8)
    with pytest.raises(ConfigError, match=r"image.slices is 0"):
        small(slices=0).validate(8)
    with pytest.raises(ConfigError, match=r"data\.draft shrinks pictures"):
        Pictures.of(small(), draft=True)


def test_the_marks_of_a_picture():
    found = in_patches(np.ones((4, 6, 3), np.uint8), 2, 8)
    assert found[:, -1].tolist() == [1, 1, 2, 1, 1, 2, 0, 0]
