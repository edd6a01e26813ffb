"""The config of an encoder: a vision transformer."""

import dataclasses

from omnifusion_jax.config.base import check, one_of
from omnifusion_jax.tables import ENCODERS

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and standard deviation


@dataclasses.dataclass(unsafe_hash=True)  # modules carry it as static data
class EncoderConfig:
    """A vision transformer.

    The defaults are CLIP's; fields say what SigLIP, DINOv2 and InternViT do differently.
    """

    kind: str = "vit"  # a row of tables.ENCODERS
    image_size: int = 336  # pixels a side
    # image.fit=crop: pixels of the shortest edge before the centre is cut out; None: image_size
    shortest_edge: int | None = None
    patch: int = 14  # pixels a side of a patch
    # most patches of a picture, which may then have any shape, of about image_size**2 pixels; None: pictures
    # are squares
    budget: int | None = None
    width: int = 1024  # of an embedding
    layers: int = 24  # blocks
    heads: int = 16  # of attention
    mlp: int = 4096  # hidden width of the feed-forward part
    activation: str = "quick_gelu"  # or gelu, gelu_tanh, swiglu
    norm: str = "layer"  # or rms
    norm_order: str = "pre"  # of a block: norms before attention and feed-forward part; "post": after them
    eps: float = 1e-5  # of norms
    class_token: bool = True  # a trained token before the patches
    registers: int = 0  # tokens after the class token, without a position (arXiv 2309.16588)
    patch_bias: bool = False  # of the map from pixels
    qkv_bias: bool = True  # of queries, keys and values
    key_bias: bool = True  # of keys; false: only queries and values have one, as in EVA-02 and Whisper
    qk_norm: bool = False  # an RMS norm of queries and keys over all heads at once
    layer_scale: bool = False  # a trained factor for every channel of what a block adds
    pre_norm: bool = True  # a norm before the first block
    post_norm: bool = True  # a norm after the last block
    # patches a side that the positions were trained for; None: those of image_size
    position_grid: int | None = None
    # base of the wavelengths of rotary positions by row and column; None: there are none
    rope_theta: float | None = None
    rope_grid: int | None = None  # patches a side that rotary positions count in; None: those of image_size
    # how trained positions are resized to the patches of image_size: a row of nn/resize.py
    position_resize: str = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN  # of red, green and blue in [0, 1]: subtracted from pixels
    std: tuple[float, float, float] = CLIP_STD  # of red, green and blue: pixels are then divided by it
    # hidden state that is handed on: 0 is the input of the first block, -1 the output of the last
    feature_layer: int = -2
    feature_norm: bool = False  # the post norm is applied to the features too
    keep_class_token: bool = False  # the class token is a feature row too

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch

    @property
    def patches(self) -> int:
        """Patches of an image; of one of any shape there may be fewer."""
        return self.budget or self.side**2

    @property
    def resized(self) -> bool:
        """Whether positions are resized from a grid of another size."""
        return self.grid != self.side

    @property
    def grid(self) -> int:
        """Patches a side of the position table."""
        return self.position_grid or self.side

    @property
    def positions(self) -> int:
        """Rows of the position table."""
        return self.class_token + self.grid**2

    @property
    def rows(self) -> int:
        """Feature rows of an image."""
        return self.patches + self.keep_class_token

    @property
    def view(self) -> tuple[int, int]:
        """How a picture is prepared: (pixels a side, pixels of the shortest edge before the crop)."""
        return self.image_size, self.shortest_edge or self.image_size

    def canonical(self):
        """A copy with None in each field that has the value which None stands for."""
        edge = None if self.shortest_edge == self.image_size else self.shortest_edge
        grid = self.position_grid if self.resized else None
        return dataclasses.replace(self, shortest_edge=edge, position_grid=grid)

    def validate(self):
        ENCODERS[self.kind]
        one_of("encoder.activation", self.activation, ("quick_gelu", "gelu", "gelu_tanh", "swiglu"))
        one_of("encoder.norm", self.norm, ("layer", "rms"))
        one_of("encoder.norm_order", self.norm_order, ("pre", "post"))
        rotates = self.rope_theta is None or self.width // self.heads % 4 == 0
        check(
            rotates,
            "encoder.rope_theta needs heads of a width that 4 divides: pairs for rows and for columns",
        )
        resizes = ("bicubic", "bicubic_antialias", "bicubic_offset")
        one_of("encoder.position_resize", self.position_resize, resizes)
        check(
            self.image_size >= self.patch,
            f"encoder.image_size {self.image_size} is less than encoder.patch {self.patch}",
        )
        check(
            self.width % self.heads == 0,
            f"encoder.width {self.width} is not a multiple of encoder.heads {self.heads}",
        )
        low, high = -self.layers - 1, self.layers
        check(
            low <= self.feature_layer <= high,
            f"encoder.feature_layer {self.feature_layer} is outside {low}..{high}",
        )
        check(
            self.class_token or not self.keep_class_token,
            "encoder.keep_class_token needs encoder.class_token",
        )
        plain = not (self.class_token or self.registers or self.rope_theta)
        check(
            self.budget is None or (plain and self.position_resize == "bicubic_antialias"),
            "encoder.budget needs patches alone, without a class token, registers or rotary positions, and "
            "encoder.position_resize=bicubic_antialias",
        )
        check(self.post_norm or not self.feature_norm, "encoder.feature_norm needs encoder.post_norm")
        check(
            self.view[1] >= self.image_size,
            f"encoder.shortest_edge {self.shortest_edge} is less than encoder.image_size {self.image_size}",
        )


# The fields of an EncoderConfig that say which of its features a model takes
HANDED_ON = ("feature_layer", "feature_norm", "keep_class_token")
