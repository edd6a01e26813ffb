"""Vision towers as transformers stores them: config.json, preprocessor_config.json, and weights."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from omnifusion_jax.checkpoints.encoders.base import Family
from omnifusion_jax.checkpoints.storage.settings import read_json, require, section
from omnifusion_jax.config import HANDED_ON, EncoderConfig
from omnifusion_jax.errors import CheckpointError

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# Settings whose values are words, theirs: ours. The values of other settings are numbers or truth values.
VALUES = {"hidden_act": ACTIVATIONS, "norm_type": {"layer_norm": "layer", "rms_norm": "rms"}}
BICUBIC = 3  # Pillow's number

BLOCK = {  # the `fields` that most families share
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 12),
    "hidden_act": ("activation", "gelu"),
    "layer_norm_eps": ("eps", 1e-6),
}


@dataclasses.dataclass(frozen=True)
class HuggingFace(Family):
    """A family that is known by its model type."""

    model_types: tuple[str, ...] = ()  # of config.json; the last one is written
    architecture: str = ""  # the class that is written into config.json

    # Fields of EncoderConfig that the whole family shares, with their values.
    fixed: dict = dataclasses.field(default_factory=dict)
    # By setting of config.json: (field of EncoderConfig, default of the library).
    fields: dict = dataclasses.field(default_factory=dict)
    # By setting of config.json: the values with which the model computes what ours does.
    required: dict = dataclasses.field(default_factory=dict)
    # `more` gives fields of EncoderConfig that follow from several settings of config.json,
    # `more_json` settings that follow from several fields.
    more: Callable = lambda settings, where: {}
    more_json: Callable = lambda c: {}
    # Tensors that the library wants and never uses: functions from EncoderConfig to their shapes, by name.
    blank: dict = dataclasses.field(default_factory=dict)
    # Whether positions are resized to the picture; config.json then has the size that they were trained for.
    resizes: bool = False
    fit: str = "crop"  # how pictures are fitted where there is no preprocessor_config.json

    @property
    def known_by(self):
        return f"config.json of type {' or '.join(self.model_types)}"

    def knows(self, path):
        file = path / "config.json"
        return file.is_file() and read_json(file).get("model_type") in self.model_types

    def settings(self, path):
        file = path / "preprocessor_config.json"
        preprocessor = read_json(file) if file.is_file() else None
        config = self.encoder_config(read_json(path / "config.json"), preprocessor, path / "config.json")
        if not preprocessor:
            return config, self.fit
        _, _, fit = view(preprocessor, config.image_size, path)
        return config, fit

    def encoder_config(
        self, hf: dict, preprocessor: dict | None = None, where: str | Path = "config.json"
    ) -> EncoderConfig:
        """The config that config.json and preprocessor_config.json describe.

        Args:
          hf: config.json, of the whole model or of the vision tower alone.
          preprocessor: preprocessor_config.json, where there is one.
          where: the file, for errors.

        Raises:
          CheckpointError: our encoder or our preprocessing does not support a setting.
        """
        require(hf, {"model_type": self.model_types}, where)
        if "vision_config" in hf:
            hf = section(hf, "vision_config", where) | section(hf, "vision_config_dict", where)
        squares = ("image_size", "patch_size")
        hf = {name: side(value) if name in squares else value for name, value in hf.items()}
        choices = {name: tuple(values) for name, values in VALUES.items()}
        require(hf, {"num_channels": (3,), **choices, **self.required}, where)
        config = EncoderConfig(**self.fixed)
        for name, (field, default) in self.fields.items():
            value, kind = hf.get(name, default), type(default)
            if not isinstance(value, (int, float) if kind is float else kind):
                raise CheckpointError(f"{where}: {name} is {value!r:.100}, not of type {kind.__name__}")
            setattr(config, field, VALUES.get(name, {}).get(value, value))
        for field, value in self.more(hf, where).items():
            setattr(config, field, value)
        if preprocessor:
            self.prepare(config, preprocessor, f"{where} (model) and preprocessor_config.json")
        config.validate()
        return config.canonical()

    def prepare(self, config, preprocessor, where):
        """Sets how the encoder sees pictures. A family that does not resize positions has one size only."""
        trained_for = config.image_size
        apply_view(config, preprocessor, where)
        if not self.resizes and config.image_size != trained_for:
            square = {"height": trained_for, "width": trained_for}
            sizes = (trained_for, square, {"shortest_edge": trained_for})
            require(preprocessor, {"crop_size": sizes, "size": sizes}, where)
        config.position_grid = trained_for // config.patch

    def encoder_json(self, c: EncoderConfig, dtype: str) -> dict:
        """The config.json of the tower alone."""
        written = {name: getattr(c, field) for name, (field, _) in self.fields.items()}
        for name, values in VALUES.items():
            if name in written:
                by_ours = {ours: theirs for theirs, ours in values.items()}
                written[name] = by_ours.get(written[name], written[name])
        written["image_size"] = c.position_grid * c.patch if c.resized else c.image_size
        about = {
            "architectures": [self.architecture],
            "model_type": self.model_types[-1],
            "num_channels": 3,
            "torch_dtype": dtype,
        }
        return {
            **about,
            **{name: values[0] for name, values in self.required.items()},
            **written,
            **self.more_json(c),
        }

    def obstacles(self, c: EncoderConfig) -> str:
        """Why a model of this family cannot compute what `c` says; empty where it can."""
        try:
            back = self.encoder_config(self.encoder_json(c, "float32"), preprocessor_json(c))
        except CheckpointError as error:
            return str(error)
        free = HANDED_ON if c.resized else (*HANDED_ON, "position_resize")
        c = c.canonical()
        names = [field.name for field in dataclasses.fields(c) if field.name not in free]
        lost = [name for name in names if getattr(back, name) != getattr(c, name)]
        return ", ".join(f"{name} would be {getattr(back, name)}" for name in lost)


def preprocessor_json(c: EncoderConfig, fit: str = "crop") -> dict:
    """The preprocessor_config.json of an encoder.

    Its pictures are squashed where `fit` is "squash", and cropped with every other `fit`.
    """
    size, edge = c.view
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": edge, "width": edge} if fit == "squash" else {"shortest_edge": edge},
        "resample": BICUBIC,
        "do_center_crop": fit != "squash" or edge != size,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(c.mean),
        "image_std": list(c.std),
    }


def apply_view(c: EncoderConfig, preprocessor: dict, where: str | Path) -> str:
    """Sets in `c` how an encoder sees pictures, from preprocessor_config.json, and returns ImageConfig.fit.

    Raises:
      CheckpointError: our preprocessing would give other pictures.
    """
    c.image_size, edge, fit = view(preprocessor, c.image_size, where)
    c.shortest_edge = None if edge == c.image_size else edge
    c.mean, c.std = (tuple(preprocessor.get(f"image_{name}", getattr(c, name))) for name in ("mean", "std"))
    return fit


def view(preprocessor: dict, size: int, where: str | Path) -> tuple[int, int, str]:
    """(pixels a side, pixels of the shortest edge before the crop, fit) of a preprocessor_config.json.

    `size` stands for both numbers where the file says nothing.

    Raises:
      CheckpointError: our preprocessing would give other pictures.
    """
    yes = (True,)
    needed = {"do_resize": yes, "do_normalize": yes, "do_rescale": yes, "resample": (BICUBIC,)}
    require(preprocessor, needed, where)
    if abs(preprocessor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-4:
        raise CheckpointError(
            f"{where}: rescale_factor is {preprocessor['rescale_factor']}, supported is 1/255"
        )
    crops = preprocessor.get("do_center_crop", "crop_size" in preprocessor)
    resized = preprocessor.get("size", preprocessor.get("crop_size", size))
    squashed = isinstance(resized, dict) and "height" in resized
    if not squashed:
        require({"do_center_crop": crops}, {"do_center_crop": yes}, where)
    edge = resized.get("shortest_edge") if isinstance(resized, dict) and not squashed else side(resized)
    crop = side(preprocessor.get("crop_size", size)) if crops else edge
    if not isinstance(edge, int) or not isinstance(crop, int):
        raise CheckpointError(
            f"{where}: size {resized!r:.100} and crop_size {preprocessor.get('crop_size')!r:.100} "
            "make no square of a known size"
        )
    return crop, edge, "squash" if squashed else "crop"


def side(size):
    """The side of a square: 448 for 448, [448, 448] and {"height": 448, "width": 448}.

    Anything else is returned unchanged.
    """
    named = isinstance(size, dict) and set(size) == {"height", "width"}
    pair = list(size.values()) if named else size
    square = isinstance(pair, list | tuple) and len(pair) == 2 and pair[0] == pair[1]
    return pair[0] if square else size
