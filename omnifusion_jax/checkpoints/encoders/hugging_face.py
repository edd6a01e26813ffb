"""Vision towers as transformers keeps them: config.json, preprocessor_config.json, and weights of one family."""

import dataclasses
from collections.abc import Callable

from omnifusion_jax.checkpoints.encoders.base import Family
from omnifusion_jax.checkpoints.storage.settings import read_json, require
from omnifusion_jax.config import HANDED_ON, EncoderConfig
from omnifusion_jax.errors import CheckpointError

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
VALUES = {
    "hidden_act": ACTIVATIONS,
    "norm_type": {"layer_norm": "layer", "rms_norm": "rms"},
}  # theirs: ours; others are numbers
BICUBIC = 3  # Pillow's number

BLOCK = {  # names that most families share
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 12),
    "hidden_act": ("activation", "gelu"),
    "layer_norm_eps": ("eps", 1e-6),
}


@dataclasses.dataclass(frozen=True)
class HuggingFace(Family):
    """A family by its model type."""

    model_types: tuple[str, ...] = ()  # of config.json; the last is written
    architecture: str = ""  # the class that is written down with it
    fixed: dict = dataclasses.field(
        default_factory=dict
    )  # settings of EncoderConfig that all of the family share
    fields: dict = dataclasses.field(
        default_factory=dict
    )  # setting of config.json: (field of EncoderConfig, default of the library)
    required: dict = dataclasses.field(
        default_factory=dict
    )  # setting of config.json: values with which it computes what ours does
    more: Callable = lambda settings, where: {}  # fields of EncoderConfig that follow from several settings
    more_json: Callable = lambda c: {}  # settings of config.json, likewise
    blank: dict = dataclasses.field(
        default_factory=dict
    )  # tensors that the library wants and never uses: name to shape, of an EncoderConfig
    resizes: bool = False  # positions follow the size of the picture, and config.json has the size that they were trained for
    fit: str = "crop"  # where there is no preprocessor_config.json

    @property
    def known_by(self):
        return f"config.json of type {' or '.join(self.model_types)}"

    def knows(self, path):
        file = path / "config.json"
        return file.is_file() and read_json(file).get("model_type") in self.model_types

    def settings(self, path):
        preprocessor = path / "preprocessor_config.json"
        preprocessor = read_json(preprocessor) if preprocessor.is_file() else None
        config = self.encoder_config(read_json(path / "config.json"), preprocessor, path / "config.json")
        return config, view(preprocessor, config.image_size, path)[2] if preprocessor else self.fit

    def encoder_config(self, hf, preprocessor=None, where="config.json") -> EncoderConfig:
        """From config.json, of the whole model or of the vision tower alone, and preprocessor_config.json where there is one.

        Raises:
          CheckpointError: a setting our vision tower or our preprocessing does not have.
        """
        require(hf, {"model_type": self.model_types}, where)
        hf = {**hf["vision_config"], **(hf.get("vision_config_dict") or {})} if "vision_config" in hf else hf
        hf = {
            name: side(value) if name in ("image_size", "patch_size") else value for name, value in hf.items()
        }
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
        trained_for = config.image_size
        apply_view(config, preprocessor, where)
        if not self.resizes and config.image_size != trained_for:
            sizes = (
                trained_for,
                {"height": trained_for, "width": trained_for},
                {"shortest_edge": trained_for},
            )
            require(preprocessor, {"crop_size": sizes, "size": sizes}, where)
        config.position_grid = trained_for // config.patch

    def encoder_json(self, c: EncoderConfig, dtype):
        """The config.json of the tower alone."""
        written = {name: getattr(c, field) for name, (field, _) in self.fields.items()}
        for name, values in VALUES.items():
            if name in written:
                written[name] = {ours: theirs for theirs, ours in values.items()}.get(
                    written[name], written[name]
                )
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

    def obstacles(self, c: EncoderConfig):
        """Why a model of this family cannot be `c`; empty where it can."""
        try:
            back = self.encoder_config(self.encoder_json(c, "float32"), preprocessor_json(c))
        except CheckpointError as error:
            return str(error)
        free, c = HANDED_ON if c.resized else (*HANDED_ON, "position_resize"), c.canonical()
        names = [field.name for field in dataclasses.fields(c) if field.name not in free]
        return ", ".join(
            f"{name} would be {getattr(back, name)}"
            for name in names
            if getattr(back, name) != getattr(c, name)
        )


def preprocessor_json(c: EncoderConfig, fit="crop"):
    """The preprocessor_config.json of an encoder whose pictures are squashed; with every other `fit`, cropped."""
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


def apply_view(c: EncoderConfig, preprocessor, where):
    """Sets how an encoder sees pictures as a preprocessor_config.json says; returns ImageConfig.fit.

    Raises:
      CheckpointError: pictures would come to a model of ours otherwise.
    """
    c.image_size, edge, fit = view(preprocessor, c.image_size, where)
    c.shortest_edge = None if edge == c.image_size else edge
    c.mean, c.std = (tuple(preprocessor.get(f"image_{name}", getattr(c, name))) for name in ("mean", "std"))
    return fit


def view(preprocessor, size, where):
    """(pixels a side, pixels of the shortest edge before the crop, fit) of a preprocessor_config.json; `size` where it says nothing.

    Raises:
      CheckpointError: pictures would come to a model of ours otherwise.
    """
    yes = (True,)
    require(
        preprocessor,
        {"do_resize": yes, "do_normalize": yes, "do_rescale": yes, "resample": (BICUBIC,)},
        where,
    )
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
            f"{where}: size {resized!r:.100} and crop_size {preprocessor.get('crop_size')!r:.100} make no square of a known size"
        )
    return crop, edge, "squash" if squashed else "crop"


def side(size):
    """448, [448, 448] and {"height": 448, "width": 448} are the same; what is no square stays as it is."""
    pair = list(size.values()) if isinstance(size, dict) and set(size) == {"height", "width"} else size
    return pair[0] if isinstance(pair, list | tuple) and len(pair) == 2 and pair[0] == pair[1] else size
