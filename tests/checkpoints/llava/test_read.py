"""LLaVA checkpoints: read, generated from, and what is refused."""

import json
import re

import llava_models as lm
import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from llava_models import agree, requests

import omnifusion_jax as of
from omnifusion_jax.checkpoints.llava import processor
from omnifusion_jax.checkpoints.llava.export import export_llava
from omnifusion_jax.checkpoints.llava.settings import model_config
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.checkpoints.storage.weights import open_tensors, write_safetensors
from omnifusion_jax.errors import CheckpointError


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A LLaVA and a LLaVA-NeXT, saved: {model type: (directory, model, processor)}."""
    made = {}
    for kind, decoder in (("llava", "llama"), ("llava_next", "mistral")):
        directory = tmp_path_factory.mktemp(kind)
        made[kind] = (
            directory,
            *lm.build(directory, kind, decoder, "llava-1.5" if kind == "llava" else "llava-next-mistral"),
        )
    return made


@pytest.fixture
def source(built, tmp_path):
    """A copy of the LLaVA, to be spoiled."""
    return copy(built["llava"][0], tmp_path / "source")


def copy(directory, target):
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def change(file, **values):
    """Sets fields of a JSON file; None removes one."""
    found = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def change_pictures(directory, **values):
    """The same for the settings of the image processor."""
    file = directory / "processor_config.json"
    change(file, image_processor=json.loads(file.read_text())["image_processor"] | values)


# --- the same tokens


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_tokens_are_those_of_transformers(built, kind):
    directory, model, processor = built[kind]
    agree(of.load(directory), model, processor)


def test_other_features_and_a_linear_projector(tmp_path):
    """The class token is kept, the layer is another, and the decoder is Mistral with a window.

    The projector has no activation, and its second layer is an identity.
    """
    settings = {
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "projector_hidden_act": "linear",
    }
    model, processor = lm.build(tmp_path, decoder="mistral", **settings)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.copy_(torch.eye(48))
        model.model.multi_modal_projector.linear_2.bias.zero_()
    model.save_pretrained(tmp_path)
    ours = of.load(tmp_path)
    encoder = ours.config.image.encoders[0]
    assert (encoder.keep_class_token, encoder.feature_layer, ours.config.image.adapter.kind) == (
        True,
        -1,
        "linear",
    )
    agree(ours, model, processor, beams=(1,))
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias[7] = 1.0
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"multi_modal_projector.linear_2 is an identity"):
        load_checkpoint(tmp_path)


def test_siglip_has_no_class_token(tmp_path):
    vision = hf.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=24,
        patch_size=8,
    )
    pixels = {"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    settings = {
        "vision": vision,
        "pictures": hf.SiglipImageProcessorPil,
        "pixels": pixels,
        "vision_feature_select_strategy": "full",
    }
    model, processor = lm.build(tmp_path / "siglip", **settings)
    ours = of.load(tmp_path / "siglip")
    assert (
        ours.config.image.fit == "squash"
        and not ours.config.image.encoders[0].class_token
        and ours.config.image.rows == 9
    )
    agree(ours, model, processor, beams=(1,))
    export_llava(load_checkpoint(tmp_path / "siglip"), tmp_path / "exported")
    exported = hf.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "exported", attn_implementation="eager"
    )
    agree(ours, exported, hf.AutoProcessor.from_pretrained(tmp_path / "exported"), beams=(1,))
    change(tmp_path / "siglip/config.json", vision_feature_select_strategy="default")
    with pytest.raises(
        CheckpointError, match="'default' leaves out a patch where there is no class token; 'full' does not"
    ):
        load_checkpoint(tmp_path / "siglip")


@pytest.mark.parametrize(
    ("fit", "pictures", "pixels"),
    [
        ("crop", None, {"size": {"shortest_edge": 32}}),
        ("squash", None, {"size": {"height": 24, "width": 24}}),
        (
            "pad",
            hf.LlavaImageProcessorPil,
            {"do_pad": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
        ),
    ],
)
def test_pictures_are_prepared_as_the_processor_says(tmp_path, fit, pictures, pixels):
    model, processor = lm.build(tmp_path, pictures=pictures, pixels=pixels)
    ours = of.load(tmp_path)
    assert ours.config.image.fit == fit
    agree(ours, model, processor, requests()[:6], beams=(1,))


def test_a_processor_that_says_nothing_of_padding_does_not_pad():
    """As transformers' own, whose do_pad is false by default."""
    assert hf.LlavaImageProcessorPil().do_pad is False
    config = tiny.config()
    processor.apply_pictures(
        config,
        {"image_processor_type": "LlavaImageProcessor", "size": {"shortest_edge": 24}, "crop_size": 24},
        "here",
    )
    assert config.image.fit == "crop"


# --- files


def renamed(directory, forms):
    """Writes the weights under other names."""
    tensors = {name: np.array(a) for name, a in open_tensors(directory).items()}
    for pattern, new in forms:
        tensors = {re.sub(pattern, new, name): a for name, a in tensors.items()}
    write_safetensors(directory / "model.safetensors", tensors)
    return tensors


PUBLIC = ((r"^vision_tower\.", "vision_tower.vision_model."),)
IN_MEMORY = (
    (r"^language_model\.lm_head", "lm_head"),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("forms", [(), PUBLIC, IN_MEMORY], ids=["saved", "public", "in-memory"])
def test_all_forms_of_names_load(built, tmp_path, kind, forms):
    directory = copy(built[kind][0], tmp_path / "renamed")
    assert any(name.startswith("model.") for name in renamed(directory, forms)) == (forms == IN_MEMORY)
    same(load_checkpoint(directory).arrays, load_checkpoint(built[kind][0]).arrays)


def same(found, expected):
    assert found.keys() == expected.keys()
    for path, a in expected.items():
        np.testing.assert_array_equal(found[path], a, err_msg=path)


def test_shards_and_bin_files(built, source):
    expected = load_checkpoint(built["llava"][0]).arrays
    (source / "model.safetensors").unlink()
    built["llava"][1].save_pretrained(source, max_shard_size="40KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    same(load_checkpoint(source).arrays, expected)
    tensors = {name: torch.tensor(np.array(a)) for name, a in open_tensors(source).items()}
    for file in source.glob("model*"):
        file.unlink()
    names = list(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: tensors[name] for name in part}, source / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    same(load_checkpoint(source).arrays, expected)


def test_the_config_says_what_the_files_say(built):
    config = load_checkpoint(built["llava_next"][0]).config
    assert (
        config.image.grids == ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        and config.image.fit == "tiles"
        and config.image.newline
    )
    assert config.decoder == lm.DECODERS["mistral"] and config.special == ("newline",)
    config = load_checkpoint(built["llava"][0]).config
    assert config.decoder == lm.DECODERS["llama"] and config.special == () and config.decoder.vocab == 328
    assert (config.layout, config.image.adapter.kind, config.image.adapter.mlp) == ("template", "mlp", 48)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_a_native_copy_is_whole(built, tmp_path, kind):
    found = load_checkpoint(built[kind][0])
    assert found.parts == (
        "image/encoders/0",
        "image/adapter",
        *(() if kind == "llava" else ("special",)),
        "decoder",
    )
    save_native(tmp_path / "native", found.config, found.arrays, found.tokenizer)
    again = load_checkpoint(tmp_path / "native")
    assert again.config == found.config and again.missing == ()
    same(again.arrays, found.arrays)
    assert of.load(tmp_path / "native").config == found.config


def test_published_config_files_leave_much_out(source):
    """Vicuna's text_config of llava-1.5-7b-hf, no vision_config, old names of processors."""
    text = {
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    }
    hf_config = {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": text,
        "torch_dtype": "float16",
    }
    pictures = {
        "crop_size": 336,
        "size": 336,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "resample": 3,
        "do_center_crop": True,
    }
    (source / "processor_config.json").unlink()
    (source / "preprocessor_config.json").write_text(json.dumps(pictures))
    config, _ = model_config(hf_config, source)
    assert config.image.encoders == (of.config.EncoderConfig(),) and config.image.fit == "crop"
    assert (config.decoder.vocab, config.decoder.kv_heads, config.decoder.mlp, config.decoder.window) == (
        32064,
        32,
        11008,
        None,
    )


@pytest.mark.parametrize(
    "place", ["chat_template.json", "processor_config.json", "tokenizer_config.json", "named"]
)
def test_the_template_may_stand_in_several_files(source, place):
    text = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    with pytest.raises(
        CheckpointError, match=r"no chat template, .* \(model.template\).*Write one to .*chat_template.jinja"
    ):
        load_checkpoint(source)
    if place == "named":
        change(
            source / "tokenizer_config.json",
            chat_template=[{"name": "tools", "template": "x"}, {"name": "default", "template": text}],
        )
    elif place == "chat_template.json":
        (source / place).write_text(json.dumps({"chat_template": text}))
    else:
        change(source / place, chat_template=text)
    assert load_checkpoint(source).config.template == text


# --- refusals


def test_tensors_that_do_not_fit_are_all_named(source):
    tensors = {name: np.array(a) for name, a in open_tensors(source).items()}
    tensors["multi_modal_projector.linear_2.weight"] = tensors["multi_modal_projector.linear_2.weight"][
        :, :-1
    ]
    tensors["image_newline"] = tensors.pop("language_model.model.norm.weight")
    write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(source)
    for line in (
        "3 tensors do not fit",
        (
            "multi_modal_projector.linear_2.weight -> image/adapter/linear/kernel: "
            "has shape [48, 47], [48, 48] is needed"
        ),
        "image_newline -> nowhere",
        "language_model.model.norm.weight -> decoder/norm/scale: missing",
    ):
        assert line in str(caught.value)
    tensors["model.vision_tower.pre_layrnorm.bias"] = tensors["vision_tower.pre_layrnorm.bias"]
    write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(
        CheckpointError,
        match=r"stands there under another name too, vision_tower.vision_model.pre_layrnorm.bias",
    ):
        load_checkpoint(source)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"vision_feature_layer": [-2, -5]},
            r"vision_feature_layer is \[-2, -5\]: features of several layers side by side are not supported",
        ),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy is 'cls'"),
        (
            {"projector_hidden_act": "relu"},
            "projector_hidden_act is 'relu', supported is 'gelu' or 'gelu_pytorch_tanh' or 'linear'",
        ),
        (
            {"projector_hidden_act": "linear"},
            r"projector_hidden_act 'linear' is supported where multi_modal_projector.linear_2 is an identity",
        ),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantized"),
        (
            {"image_token_index": 5},
            "<image> is token 320 of the tokenizer, image_token_index of config.json is 5",
        ),
        (
            {"vision_config": {"model_type": "dinov2"}},
            "vision_config: model_type is 'dinov2', supported is 'clip_vision_model' or 'siglip_",
        ),
        ({"text_config": {"model_type": "gemma"}}, "text_config: model_type is 'gemma'"),
    ],
)
def test_settings_we_do_not_have(source, values, said):
    change(source / "config.json", **values)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(source)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"num_additional_image_tokens": 0},
            r"num_additional_image_tokens 0 and .* make 8 tokens a picture, .* config.json gives 9",
        ),
        ({"vision_feature_select_strategy": "full"}, "'full' make 10 tokens a picture"),
        ({"patch_size": 12}, "patch_size 12"),
    ],
)
def test_token_counts_that_contradict_each_other(source, values, said):
    change(source / "processor_config.json", **values)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(source)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"crop_size": {"height": 30, "width": 30}},
            "pictures come to 24 and then 30 pixels, the vision tower takes 24 a side",
        ),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"size": {"height": 24, "width": 32}}, "size .*'width': 32.* make no square"),
        ({"do_resize": False}, "do_resize is False"),
        ({"resample": 2}, "resample is 2"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type is 'ViTImageProcessor'"),
    ],
)
def test_pictures_that_ours_cannot_prepare(source, values, said):
    change_pictures(source, **values)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(source)


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        (
            "config.json",
            {"image_grid_pinpoints": [[24, 48]]},
            r"image_grid_pinpoints are \[\[24, 48\]\] in config.json, \[\[24, 48\], \[48, 24\]",
        ),
        (
            "config.json",
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy 'full' puts the class token into the grid",
        ),
        ("config.json", {"use_image_newline_parameter": False}, "use_image_newline_parameter is False"),
    ],
)
def test_settings_of_tiles_we_do_not_have(built, tmp_path, file, values, said):
    source = copy(built["llava_next"][0], tmp_path / "source")
    change(source / file, **values)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(source)


def test_tiles_are_not_cut_from_something_larger(built, tmp_path):
    source = copy(built["llava_next"][0], tmp_path / "source")
    change_pictures(source, size={"shortest_edge": 32})
    with pytest.raises(
        CheckpointError, match="pictures come to 32 and then 24 pixels, the vision tower takes 24 a side"
    ):
        load_checkpoint(source)


def test_grids_that_are_no_multiples(built, tmp_path):
    source = copy(built["llava_next"][0], tmp_path / "source")
    change(source / "config.json", image_grid_pinpoints=[[30, 24]])
    change_pictures(source, image_grid_pinpoints=[[30, 24]])
    with pytest.raises(
        CheckpointError,
        match=r"image_grid_pinpoints \[\[30, 24\]\] are not multiples of the vision tower's 24 pixels",
    ):
        load_checkpoint(source)


def test_what_is_missing_is_named(source):
    with pytest.raises(
        CheckpointError, match="the format llava says itself what vision would; leave out --vision"
    ):
        load_checkpoint(source, vision="omnifusion-tiny-encoder")
    change(source / "generation_config.json", eos_token_id=[2, 7])
    with pytest.raises(
        CheckpointError,
        match=r"eos_token_id is \[2, 7\]; an answer ends with the tokenizer's one eos_token only",
    ):
        load_checkpoint(source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer.json nor tokenizer.model is there"):
        load_checkpoint(source)
    (source / "processor_config.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"neither preprocessor_config.json nor processor_config.json says how pictures are prepared",
    ):
        load_checkpoint(source)
