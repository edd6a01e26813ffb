"""Tiles are transformers' own to the bit, and their features stand where LLaVA-NeXT puts them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from omnifusion_jax.data.images import open_image
from omnifusion_jax.data.tiles import GRIDS, NEWLINE, best_grid, most, order, tiles

REAL = Path(__file__).parents[2].parent / "shared/data/real_dialogues/images"
REAL_FILES = sorted(REAL.glob("*"))[::6] or [
    pytest.param(None, marks=pytest.mark.skip(reason=f"no pictures in {REAL}"))
]

SIDES = st.one_of(st.integers(1, 400), st.integers(1, 4000))
GRID_LISTS = st.one_of(
    st.just(GRIDS),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6).map(tuple),
)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pinpoints(grids, tile):
    return [[rows * tile, columns * tile] for rows, columns in grids]


# --- the grid


def test_the_default_is_llava_next():
    processor = pytest.importorskip("transformers").LlavaNextImageProcessorPil()
    assert processor.image_grid_pinpoints == pinpoints(GRIDS, 336)
    assert most(GRIDS) == 5


@pytest.mark.parametrize(
    ("size_hw", "grid"),
    [
        ((480, 640), (2, 2)),
        ((100, 100), (1, 2)),
        ((336, 672), (1, 2)),
        ((672, 336), (2, 1)),
        ((1000, 300), (3, 1)),
        ((2, 900), (1, 3)),
        ((1, 3000), (1, 2)),
        ((3000, 1), (1, 2)),
    ],
)
def test_the_grid_that_keeps_most_pixels(size_hw, grid):
    assert best_grid(size_hw, GRIDS, 336) == grid


@settings(max_examples=300)
@given(SIDES, SIDES, GRID_LISTS, st.sampled_from([14, 336, 384]))
@example(1, 3000, GRIDS, 336)
@example(3000, 1, GRIDS, 14)
def test_the_grid_equals_transformers(height, width, grids, tile):
    utils = pytest.importorskip("transformers.image_processing_utils")
    rows, columns = best_grid((height, width), grids, tile)
    assert (rows * tile, columns * tile) == utils.select_best_resolution(
        (height, width), pinpoints(grids, tile)
    )


# --- the pixels


@pytest.fixture(scope="module")
def theirs():
    """The tiles transformers makes of an RGB image before it rescales and normalises them."""
    processor = pytest.importorskip("transformers").LlavaNextImageProcessorPil(
        do_rescale=False, do_normalize=False
    )

    def pixels(image, size, grids):
        sizes = {
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "image_grid_pinpoints": pinpoints(grids, size),
        }
        return processor(image, return_tensors="np", **sizes)["pixel_values"][0].transpose(0, 2, 3, 1)

    return pixels


@settings(max_examples=60)
@given(
    st.integers(1, 300), st.integers(1, 300), GRID_LISTS, st.sampled_from([14, 27, 48]), st.integers(0, 1000)
)
@example(1, 3000, GRIDS, 48, 0)
@example(3000, 1, GRIDS, 48, 0)
@example(1, 1, GRIDS, 48, 0)
@example(97, 48, GRIDS, 48, 0)
@example(95, 48, GRIDS, 48, 0)
def test_tiles_equal_transformers(theirs, width, height, grids, size, seed):
    image = noise(width, height, seed)
    made = tiles(image, size, grids)
    rows, columns = best_grid((height, width), grids, size)
    assert (made.dtype, made.shape) == (np.uint8, (1 + rows * columns, size, size, 3))
    assert len(made) <= most(grids)
    np.testing.assert_array_equal(made, theirs(image, size, grids))


@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: path.name if path else "none")
def test_real_pictures_equal_transformers(theirs, path):
    image = open_image(path)
    np.testing.assert_array_equal(tiles(image, 336), theirs(image, 336, GRIDS))


@pytest.mark.parametrize(("size", "shown"), [((1, 5_000_000), [336, 0]), ((5_000_000, 1), [336, 336])])
def test_an_endless_strip_stays_small(size, shown):
    made = tiles(Image.new("RGB", size, (255, 255, 255)), 336)
    assert made.shape == (3, 336, 336, 3)
    assert [int((tile > 0).sum()) // 3 for tile in made] == [
        336 * 336,
        *shown,
    ]  # a line one pixel thin, in the middle of black


# --- the order of the features


@pytest.fixture(scope="module")
def modeling():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers.models.llava_next.modeling_llava_next")


def packed(modeling, size_hw, grids, side, newline):
    """LLaVA-NeXT's own packing, of features that are their own numbers."""
    torch = modeling.torch
    tile = 14 * side
    rows, columns = best_grid(size_hw, grids, tile)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tile, patch_size=14),
        image_grid_pinpoints=pinpoints(grids, tile),
    )
    features = torch.arange((1 + rows * columns) * side**2).reshape(1 + rows * columns, side**2, 1)
    made, _ = modeling.LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [features],
        [size_hw],
        "default",
        torch.tensor([NEWLINE]) if newline else None,
    )
    return made[0][:, 0].numpy()


STRIPS = [(1, 3000), (3000, 1), (1, 30), (30, 1), (7, 200), (1, 1)]
WHOLE = [(861, 328), (1056, 220)]  # of 24 patches a side 63 lines and 15 columns, but for a rounding error


def with_extremes(test):
    for size_hw in STRIPS + WHOLE:
        for side in (2, 5, 24):
            test = example(*size_hw, GRIDS, side)(test)
    return test


@pytest.mark.parametrize("newline", [True, False])
@with_extremes
@settings(max_examples=100)
@given(SIDES, SIDES, GRID_LISTS, st.sampled_from([1, 2, 3, 5, 24]))
def test_the_unpadded_order_equals_transformers(modeling, newline, height, width, grids, side):
    steps = order((height, width), grids, 14 * side, side, newline=newline, unpad=True)
    assert steps.dtype == np.int32
    np.testing.assert_array_equal(steps, packed(modeling, (height, width), grids, side, newline))


@settings(max_examples=50)
@given(SIDES, SIDES, GRID_LISTS, st.sampled_from([1, 2, 3, 5]))
def test_the_padded_order_with_newlines_equals_transformers(modeling, height, width, grids, side):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "unpad_image", lambda tensor, original_size: tensor)
        expected = packed(modeling, (height, width), grids, side, newline=True)
    np.testing.assert_array_equal(order((height, width), grids, 14 * side, side, newline=True), expected)


@with_extremes
@settings(max_examples=100)
@given(SIDES, SIDES, GRID_LISTS, st.sampled_from([1, 2, 3, 5, 24]))
def test_as_many_as_the_processor_expects(height, width, grids, side):
    kind = pytest.importorskip("transformers").LlavaNextProcessor
    tile = 14 * side
    processor = kind.__new__(kind)  # without a tokenizer, which counting does not need
    processor.patch_size, processor.num_additional_image_tokens = 14, 0
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=pinpoints(grids, tile))
    expected = processor._get_number_of_features(height, width, tile, tile)
    assert len(order((height, width), grids, tile, side, newline=True, unpad=True)) == expected


def test_an_order_by_hand():
    size_hw, grids = (
        (1, 4),
        ((2, 2),),
    )  # 4 x 4 patches, of which a line is picture; as many go on either side, hence two stay
    assert order(size_hw, grids, 28, 2).tolist() == list(range(20))
    assert order(size_hw, grids, 28, 2, newline=True).tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        8,
        9,
        -1,
        6,
        7,
        10,
        11,
        -1,
        12,
        13,
        16,
        17,
        -1,
        14,
        15,
        18,
        19,
        -1,
    ]
    assert order(size_hw, grids, 28, 2, unpad=True).tolist() == [0, 1, 2, 3, 6, 7, 10, 11, 12, 13, 16, 17]
    assert order(size_hw, grids, 28, 2, newline=True, unpad=True).tolist() == [
        0,
        1,
        2,
        3,
        6,
        7,
        10,
        11,
        -1,
        12,
        13,
        16,
        17,
        -1,
    ]


def test_a_strip_of_which_no_patch_stays():
    whole = list(range(4))
    assert order((1, 3000), GRIDS, 28, 2, newline=True, unpad=True).tolist() == whole
    assert order((3000, 1), GRIDS, 28, 2, newline=True, unpad=True).tolist() == whole + [NEWLINE] * 2
    assert order((3000, 1), GRIDS, 28, 2, unpad=True).tolist() == whole


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_tiles_in_order_give_the_picture_again(grid):
    """What stands at a place of the order is what the picture shows there."""
    side, patch = 4, 5
    size = side * patch
    shades = (
        np.random.default_rng(0)
        .permutation(grid[0] * grid[1] * side**2)
        .astype(np.uint8)
        .reshape(grid[0] * side, grid[1] * side)
    )
    image = Image.fromarray(shades.repeat(patch, 0).repeat(patch, 1)).convert("RGB")
    seen = tiles(image, size, (grid,))[
        :, patch // 2 :: patch, patch // 2 :: patch, 0
    ].ravel()  # a feature: the shade of its patch
    steps = order((image.height, image.width), (grid,), size, side, newline=True, unpad=True)[side**2 :]
    np.testing.assert_array_equal(seen[steps[steps != NEWLINE]], shades.ravel())
    assert np.flatnonzero(steps == NEWLINE).tolist() == [
        (i + 1) * (grid[1] * side + 1) - 1 for i in range(grid[0] * side)
    ]
