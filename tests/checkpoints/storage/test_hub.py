"""Models by hub id, in a local copy of how OmniFusion's repository is laid out."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from parity.files import random_file
from parity.two_encoders import build

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders.vision_towers import VISION_FAMILIES
from omnifusion_jax.checkpoints.inspect import inspect
from omnifusion_jax.checkpoints.load import load_checkpoint, load_decoder, load_tokenizer
from omnifusion_jax.config import TrainConfig
from omnifusion_jax.errors import CheckpointError, ConfigError
from omnifusion_jax.models.presets import preset

ID = "AIRI-Institute/OmniFusion"
BINS = [
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model-00002-of-00002.bin",
    "pytorch_model.bin.index.json",
]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
DECODER = ["config.json", "generation_config.json"]
TRAINED = ["projection.pt", "special_embeddings.pt"]


def under(folder, names):
    return {f"{folder}/{name}" for name in names}


FIRST = (
    under("OmniMistral-model", DECODER + BINS)
    | under("OmniMistral-tokenizer", TOKENIZER)
    | {"projection", "special_embeddings.pt"}
)
SECOND = under("OmniMistral-v1_1/tuned-model", [*DECODER, "model.safetensors"]) | under(
    "OmniMistral-v1_1/tokenizer", TOKENIZER
)
SECOND |= under("OmniMistral-v1_1", TRAINED)
MIX = {name.replace("v1_1", "v1_1-encoders-mix") for name in SECOND}


def in_bins(directory):
    """Weights as transformers 4 kept them without safetensors: two .bin files and their index."""
    model = transformers.MistralForCausalLM.from_pretrained(directory)
    names = list(model.state_dict())
    for file, part in zip(BINS, (names[:9], names[9:]), strict=False):
        torch.save({name: model.state_dict()[name].clone() for name in part}, directory / file)
    files = {name: BINS[name not in names[:9]] for name in names}
    (directory / BINS[2]).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (directory / "model.safetensors").unlink()


def marked(directory, value):
    """Makes a model known by its first special vector."""
    special = torch.load(directory / "special_embeddings.pt", weights_only=True)
    torch.save(
        {name: torch.full_like(vector, value) for name, vector in special.items()},
        directory / "special_embeddings.pt",
    )


@pytest.fixture(scope="module")
def repository(built, tmp_path_factory):
    """The published repository, with tiny models, and the vision towers beside it."""
    top = tmp_path_factory.mktemp("hub") / "repository"
    mix = top / "OmniMistral-v1_1-encoders-mix"
    with pytest.MonkeyPatch.context() as patch:
        build(mix, patch, ("clip", "dino"))
    for tower in ("z-clip", "a-dino"):
        shutil.move(mix / tower, top.with_name(tower))
    shutil.copytree(built[0], top / "OmniMistral-v1_1")
    shutil.move(top / "OmniMistral-v1_1/my-clip", top.with_name("clip"))
    shutil.copytree(built[0] / "tuned-model", top / "OmniMistral-model")
    shutil.copytree(built[0] / "tokenizer", top / "OmniMistral-tokenizer")
    shutil.copyfile(built[0] / "projection.pt", top / "projection")
    shutil.copyfile(built[0] / "special_embeddings.pt", top / "special_embeddings.pt")
    in_bins(top / "OmniMistral-model")
    for directory, value in ((top, 1.0), (top / "OmniMistral-v1_1", 1.125), (mix, 2.0)):
        marked(directory, value)
    for other in ("README.md", "models.py", "LICENSE", "images/arch.png"):
        (top / other).parent.mkdir(exist_ok=True)
        (top / other).touch()
    return top


@pytest.fixture
def snapshot(repository, tmp_path, monkeypatch):
    """What has been downloaded: one directory to which every download adds, as in the library's cache."""

    def download(name, allow_patterns=None, ignore_patterns=None):
        if name != ID:
            raise LocalEntryNotFoundError(f"{name} cannot be reached")
        files = [file.relative_to(repository).as_posix() for file in repository.rglob("*") if file.is_file()]
        for file in filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / "snapshot" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / file, tmp_path / "snapshot" / file)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return tmp_path / "snapshot"


def there(directory):
    return {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}


def mark(checkpoint):
    return float(np.asarray(checkpoint.arrays["special/user"])[0])


def test_the_plain_id_is_release_1_1(repository, snapshot):
    found = load_checkpoint(ID, vision=repository.with_name("clip"))
    assert mark(found) == 1.125 and found.config.image.adapter.kind == "transformer"
    assert there(snapshot) == SECOND | {"special_embeddings.pt"}  # the last is small, and of release 1.0


def test_release_1_0_by_its_folder(repository, snapshot, built):
    found = load_checkpoint(f"{ID}:OmniMistral-model", vision=repository.with_name("clip"))
    assert mark(found) == 1.0 and found.format == "omnifusion" and found.missing == ()
    assert there(snapshot) == FIRST
    np.testing.assert_array_equal(
        np.asarray(found.arrays["image/adapter/linear/kernel"]).astype(np.float32),
        built[1].adapter.linear.weight.detach().float().numpy().T,
    )
    assert load_decoder(f"{ID}:OmniMistral-model")[0] == found.config.decoder
    assert (
        inspect(f"{ID}:OmniMistral-model", vision=repository.with_name("clip"))[0] == "omnifusion"
    )  # not its decoder alone


def test_the_two_encoder_release_by_its_folder(repository, snapshot):
    towers = {"vision": repository.with_name("z-clip"), "vision2": repository.with_name("a-dino")}
    found = load_checkpoint(f"{ID}:OmniMistral-v1_1-encoders-mix", **towers)
    assert mark(found) == 2.0 and found.config.image.adapter.kind == "sum"
    assert there(snapshot) == MIX


def test_for_a_tokenizer_alone_no_weights_are_downloaded(snapshot):
    config = TrainConfig(parts_from={"decoder": f"{ID}:OmniMistral-v1_1/tokenizer"})
    assert load_tokenizer(config) == snapshot / "OmniMistral-v1_1/tokenizer"
    config = TrainConfig(parts_from={"decoder": f"{ID}:OmniMistral-v1_1/tuned-model"})
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(config)
    tokenizer = under("OmniMistral-v1_1/tokenizer", TOKENIZER)
    expected = tokenizer | under("OmniMistral-v1_1/tuned-model", DECODER)
    assert there(snapshot) == expected


def test_what_was_downloaded_before_changes_nothing(repository, snapshot):
    """Release 1.1 has .bin files here; safetensors of another model must not be taken for its weights."""
    weights = repository / "OmniMistral-v1_1/tuned-model/model.safetensors"
    kept = weights.read_bytes()
    in_bins(weights.parent)
    try:
        load_checkpoint(
            f"{ID}:OmniMistral-v1_1-encoders-mix",
            vision=repository.with_name("z-clip"),
            vision2=repository.with_name("a-dino"),
        )
        load_checkpoint(f"{ID}:OmniMistral-model", vision=repository.with_name("clip"))
        assert mark(load_checkpoint(ID, vision=repository.with_name("clip"))) == 1.125
        assert under("OmniMistral-v1_1/tuned-model", BINS) < there(snapshot)
    finally:
        weights.write_bytes(kept)
        for name in BINS:
            (weights.parent / name).unlink()


def test_names_that_are_not_there(snapshot):
    said = r"OmniFusion:OmniMistral-v2: the repository AIRI-Institute/OmniFusion has no folder OmniMistral-v2"
    with pytest.raises(CheckpointError, match=said):
        snapshot.mkdir()
        load_checkpoint(f"{ID}:OmniMistral-v2")
    with pytest.raises(
        CheckpointError,
        match="nobody/nothing: there is no such directory, and the Hugging Face Hub does not give",
    ):
        load_checkpoint("nobody/nothing:folder")
    for name in (f"{ID}:../elsewhere", f"{ID}:", f"{ID}:a//b", "runs/a/b"):
        with pytest.raises(CheckpointError, match="not a directory, and not a Hugging Face id"):
            load_checkpoint(name)


def test_the_published_names_in_a_directory(repository, tmp_path):
    clip = repository.with_name("clip")
    for name in ("OmniMistral-model", "OmniMistral-tokenizer"):
        shutil.copytree(repository / name, tmp_path / name)
    for name in ("projection", "special_embeddings.pt"):
        shutil.copyfile(repository / name, tmp_path / name)
    assert (
        mark(load_checkpoint(tmp_path, vision=clip))
        == mark(load_checkpoint(tmp_path / "OmniMistral-model", vision=clip))
        == 1.0
    )
    with pytest.raises(CheckpointError, match=r"no vision models, as in the published release\. Pass vision"):
        load_checkpoint(tmp_path / "OmniMistral-model")
    shutil.copytree(clip, tmp_path / "clip")
    assert load_checkpoint(tmp_path / "OmniMistral-model").missing == ()
    shutil.rmtree(tmp_path / "OmniMistral-tokenizer")
    with pytest.raises(
        CheckpointError, match=r"OmniMistral-tokenizer: neither tokenizer\.json nor tokenizer\.model"
    ):
        load_checkpoint(tmp_path)


def test_published_sizes_are_published_models(tmp_path, repository):
    """Files of full size that are one hole: only names and shapes are looked at."""
    c = preset("omnifusion-1.1")
    sizes = language_models.decoder_json(c.decoder, "bfloat16")
    clip = VISION_FAMILIES["clip"].encoder_json(c.image.encoders[0], "bfloat16")
    with torch.device("meta"):
        decoder = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes))
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**clip))
        layer = torch.nn.TransformerEncoderLayer(1024, 4, batch_first=True)
        linear = torch.nn.Linear(1024, 4096)
    adapter = {f"transformer_layer.{name}": t for name, t in layer.state_dict().items()}
    adapter |= {f"linear.{name}": t for name, t in linear.state_dict().items()}
    empty = lambda name: False
    special = {name: torch.empty(4096, device="meta") for name in ("USER", "BOT", "SOI", "EOI")}
    for folder, settings, tensors in (
        ("OmniMistral-model", sizes, decoder.state_dict()),
        ("clip", clip, tower.state_dict()),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(settings))
        random_file(tmp_path / folder / "model.safetensors", tensors, empty)
    random_file(tmp_path / "projection.safetensors", adapter, empty)
    random_file(tmp_path / "special_embeddings.safetensors", special, empty)
    tiny.make_tokenizer(tmp_path / "OmniMistral-tokenizer")
    found = load_checkpoint(tmp_path)
    assert found.config == dataclasses.replace(
        preset("omnifusion-1.0"), layout="original", filled_from=found.config.filled_from
    )
    assert sum(a.size for a in found.arrays.values()) == 7_241_732_096 + 303_507_456 + 12_598_272 + 4 * 4096
    for old, new in (("OmniMistral-model", "tuned-model"), ("OmniMistral-tokenizer", "tokenizer")):
        (tmp_path / old).rename(tmp_path / new)
    assert load_checkpoint(tmp_path).config.preset == "omnifusion-1.1"
