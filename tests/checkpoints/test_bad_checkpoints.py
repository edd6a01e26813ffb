"""Sources that cannot be converted: each says what is wrong, where, and what to do."""

import json

import pytest
import tiny
import torch
from parity import torch_models

from omnifusion_jax.checkpoints.load import load_checkpoint, load_decoder, load_encoder
from omnifusion_jax.checkpoints.storage import hub
from omnifusion_jax.errors import CheckpointError

C = tiny.config(layout="original")


def refused(call, *words):
    with pytest.raises(CheckpointError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


def test_another_family_than_it_is(source):
    refused(
        lambda: load_checkpoint(source, format="native"),
        f"{source}: of the format omnifusion, not native, which has arrays/",
        "--format",
    )
    assert load_checkpoint(source, format="omnifusion").format == "omnifusion"


def test_a_decoder_of_another_width(source):
    """Adapter and special vectors belong to the decoder that they were trained with."""
    c = tiny.config().decoder
    c.width = 32
    torch_models.language(c).to(torch.bfloat16).save_pretrained(source / "tuned-model")
    wrong = "linear.weight -> image/adapter/linear/kernel: has shape [48, 32], [32, 32] is needed"
    refused(lambda: load_checkpoint(source), "projection.pt: ", wrong)


def test_a_vision_file_for_another_image_size(source, tmp_path):
    settings = json.loads((source / "my-clip/config.json").read_text())
    (source / "my-clip/config.json").write_text(json.dumps(settings | {"image_size": 32}))
    refused(
        lambda: load_checkpoint(source),
        "position_embedding.weight -> image/encoders/0/position: has shape [10, 32], [17, 32] is needed",
    )


def test_a_vision_tower_for_another_image_size_than_the_adapters(source, tmp_path):
    """The adapter's weights fit any number of rows; the pickled module says how many it was made for."""
    c = tiny.config().image.encoders[0]
    c.image_size = 32
    torch_models.vision(c).save_pretrained(tmp_path / "larger")
    refused(
        lambda: load_checkpoint(source, vision=str(tmp_path / "larger")),
        "made for 9 rows a picture",
        "larger gives 16",
        "Give the tower",
    )


def test_pictures_prepared_for_another_image_size(source):
    crop = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
    }
    (source / "my-clip/preprocessor_config.json").write_text(json.dumps(crop))
    refused(lambda: load_checkpoint(source), "preprocessor_config.json", "crop_size", "24")


@pytest.mark.parametrize("where", ["config.json", "quantize_config.json"])
@pytest.mark.parametrize("method", ["bitsandbytes", "fp8"])
def test_quantized_weights(source, method, where):
    directory, settings = source / "tuned-model", {"quant_method": method, "bits": 4, "group_size": 128}
    if where == "config.json":
        settings = json.loads((directory / where).read_text()) | {"quantization_config": settings}
    (directory / where).write_text(json.dumps(settings))
    words = [
        f"tuned-model/{where}: the weights are quantized ({method}, 4 bits), which is not supported",
        "Take the plain checkpoint",
    ]
    refused(lambda: load_checkpoint(source), *words)
    refused(lambda: load_decoder(directory), *words)


@pytest.mark.parametrize("name", ["quantization_config", "text_config", "vision_config"])
@pytest.mark.parametrize("value", [["gptq"], [], "", False])
def test_settings_that_are_no_objects(source, name, value):
    file = source / "tuned-model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    refused(lambda: load_checkpoint(source), f"tuned-model/config.json: {name} is {value!r}, not an object")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w')",)


def test_a_bin_with_a_hidden_eval(source, tmp_path):
    (source / "tuned-model/model.safetensors").unlink()
    torch.save(
        {"model.norm.weight": torch.ones(3), "lm_head.weight": Evil(tmp_path / "ran")},
        source / "tuned-model/pytorch_model.bin",
    )
    refused(lambda: load_checkpoint(source), "pytorch_model.bin", "eval", "nothing was run")
    assert not (tmp_path / "ran").exists()


def test_a_path_that_is_a_file(source):
    file = source / "projection.pt"
    refused(lambda: load_checkpoint(file), f"{file}: not a directory")
    refused(lambda: load_decoder(file), f"{file}: not a directory")
    refused(lambda: load_encoder(source / "omnifusion.json"), "omnifusion.json")


def test_a_hub_id_without_network(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused(
        lambda: hub.local("AIRI-Institute/OmniFusion"),
        "does not give a repository of that name",
        "Offline?",
        "hf download AIRI-Institute/OmniFusion",
    )


def test_a_vision_tower_that_is_none(source):
    refused(
        lambda: load_checkpoint(source, vision=str(source / "tuned-model")),
        "no vision model of a known family",
        "clip: config.json of type",
    )
