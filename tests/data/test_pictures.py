"""What every encoder gets of a picture, and what is known of it from its header alone."""

import numpy as np
import pytest
import tiny
from PIL import Image

from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.config import CLIP_MEAN, IMAGENET_MEAN, EncoderConfig, ImageConfig, ModelConfig, adapter
from omnifusion_jax.data.images import fit, open_image
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.pictures import ImageProcessor
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import ConfigError, DataError


def clip_and_dinov2(fit, **second):
    settings = {"image_size": 28, "patch": 14, "mean": IMAGENET_MEAN, **second}
    encoders = EncoderConfig(image_size=28, patch=14, mean=CLIP_MEAN), EncoderConfig(**settings)
    return ImageConfig(encoders, adapter("concat"), fit=fit)


def test_padding_is_the_mean_of_the_encoder_that_looks():
    """Pictures twice as high as wide get columns of padding left and right.

    LLaVA truncates 255 * mean: CLIP's is 122.77, 116.75, 104.09, ImageNet's 123.68, 116.28, 103.53.
    """
    upright = np.full((56, 28, 3), 200, np.uint8)
    c = clip_and_dinov2("pad")
    views = ImageProcessor.of(c)(upright).views
    assert [view.shape for view in views] == [(1, 28, 28, 3)] * 2 and ImageProcessor.of(c).tile(0).shapes == (
        (28, 28, 3),
    ) * 2
    for view, mean in zip(views, ([122, 116, 104], [123, 116, 103]), strict=True):
        np.testing.assert_array_equal(view[0, :, [0, 1, 2, 25, 26, 27]], np.broadcast_to(mean, (6, 28, 3)))
        assert (view[0, :, 12:16] == 200).all()


@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_encoders_of_one_size_share_pixels_that_are_not_padded(fit):
    (view,) = ImageProcessor.of(clip_and_dinov2(fit)).views
    assert (view.size, view.edge, view.fill) == (28, 28, None)
    (pixels,) = ImageProcessor.of(clip_and_dinov2(fit))(np.full((56, 28, 3), 200, np.uint8)).views
    assert pixels.shape == (1, 28, 28, 3) and (pixels == 200).all()


def test_encoders_with_one_mean_share_padded_pixels():
    assert [view[:3] for view in clip_and_dinov2("pad", mean=CLIP_MEAN).views] == [(28, 28, (122, 116, 104))]


def test_an_encoder_cuts_its_centre_out_of_its_own_edge():
    """DINOv2's way: a frame of one pixel in 32 is gone when 28 of 32 are kept, and thin when all is."""
    framed = np.zeros((64, 64, 3), np.uint8)
    framed[8:-8, 8:-8] = 255
    whole, centre = ImageProcessor.of(clip_and_dinov2("crop", shortest_edge=56))(framed).views
    assert whole[0, 0].max() == 0 and centre[0].min() == 255


# --- without pixels

FITS = {
    "crop": {},
    "pad": {"fit": "pad"},
    "tiles": {"fit": "tiles"},
    "newlines": {"fit": "tiles", "newline": True, "unpad": True},
    "grids that are not the same on their side": {"fit": "tiles", "grids": ((1, 2), (3, 1))},
}


def small(**settings):
    return ImageConfig((EncoderConfig(image_size=24, patch=8),), **settings)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(60, 40), (20, 90), (1, 300), (300, 1)])
def test_an_outline_takes_the_same_places(tmp_path, fit, size):
    """A sample laid out from headers differs from the real one in its pixels alone."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", size).save(tmp_path / "p.jpg", exif=exif)
    whole = Prepare.of(
        Tokenizer(locate("omnifusion-tiny-decoder")), ModelConfig(image=small(**FITS[fit])), 400
    )
    talk = tiny.dialogue((("user", "What is it?"), ("assistant", "A cat.")), tmp_path / "p.jpg")
    sample, outline = whole(talk), whole.outlined()(talk)
    for name in ("tokens", "kind", "index", "weights", "items", "media_positions"):
        np.testing.assert_array_equal(getattr(outline, name), getattr(sample, name), err_msg=name)
    assert [len(view) for view in outline.media["image"]] == [len(view) for view in sample.media["image"]]
    assert all(view.nbytes == 0 for view in outline.media["image"]) and all(
        view.nbytes for view in sample.media["image"]
    )


def test_an_outline_knows_the_limit_of_pixels():
    with pytest.raises(DataError, match=r"10 x 8 pixels; 1 to 79 \(max_pixels\)"):
        ImageProcessor.of(ImageConfig(), max_pixels=79).outline(np.zeros((8, 10, 3), np.uint8))


def test_an_outline_knows_what_cannot_be_padded():
    strip, processor = Image.new("L", (16_385, 1)), ImageProcessor.of(ImageConfig(fit="pad"))
    for look in (processor, processor.outline):
        with pytest.raises(
            DataError, match="16385 x 1 pixels cannot be padded to a square: the long side may have 16,384"
        ):
            look(strip)
    assert ImageProcessor.of(ImageConfig()).outline(strip).views[0].shape == (1, 0, 0, 3)


@pytest.mark.parametrize("newline", [False, True])
def test_a_picture_takes_no_more_places_than_are_kept_for_it(newline):
    """3 x 3 patches a tile: of the five grids 2 x 2 takes most, 9 + 36, and 6 ends of lines."""
    processor = ImageProcessor.of(small(fit="tiles", newline=newline))
    taken = [
        len(processor.outline(Image.new("L", size)).order)
        for size in ((48, 48), (24, 48), (48, 24), (24, 72), (72, 24))
    ]
    assert processor.positions == max(taken) == (51 if newline else 45) and processor.room == 5
    assert ImageProcessor.of(small()).positions == 9 and ImageProcessor.of(small()).room == 1


def test_a_draft_keeps_what_every_encoder_needs(tmp_path):
    """The second encoder looks at the largest edge, 112 pixels: a quarter of the file is too little."""
    path = tmp_path / "a.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).resize((320, 240)).save(path)
    c = clip_and_dinov2("crop", shortest_edge=112)
    views = ImageProcessor.of(c, draft=True)(path).views
    expected = [fit(open_image(path, draft=112), 28, shortest=edge) for edge in (28, 112)]
    whole = [fit(open_image(path), 28, shortest=edge) for edge in (28, 112)]
    for view, drafted, plain in zip(views, expected, whole, strict=True):
        np.testing.assert_array_equal(view[0], drafted)
        assert (view[0] != plain).any()
    with pytest.raises(ConfigError, match=r"data\.draft shrinks pictures, image\.fit=tiles shows them large"):
        ImageProcessor.of(small(fit="tiles"), draft=True)


def test_the_limit_of_pixels_is_the_processor_s_own():
    with pytest.raises(DataError, match=r"10 x 8 pixels; 1 to 79 \(max_pixels\)"):
        ImageProcessor.of(ImageConfig(), max_pixels=79)(np.zeros((8, 10, 3), np.uint8))
