"""Sources by name: a local directory, a repository of the Hugging Face Hub, or a folder of one."""

import re
from pathlib import Path

from omnifusion_jax.checkpoints.storage.bundled import BUNDLED, locate
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.paths import located, remote

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::(\w[\w.-]*(?:/\w[\w.-]*)*))?")  # org/name, org/name:folder
SETTINGS = ["*.json", "*.jinja", "*.model"]
WANTED = [*SETTINGS, "*.safetensors", "*.pt", "arrays/*"]

# OmniFusion's repository holds three models. Its plain id means release 1.1, for which the files of the
# others are left out; the others are named by their folder.
OTHERS = ["OmniMistral-v1_1-encoders-mix/*", "OmniMistral-model/*", "OmniMistral-tokenizer/*"]
BESIDE = {  # files that belong to a folder and lie outside it: release 1.0
    "OmniMistral-model": ["OmniMistral-tokenizer/*", "projection", "special_embeddings.pt"]
}


def local(source: str | Path, files: bool = False, weights: bool = True) -> Path:
    """The directory of a source, which is downloaded where it names a repository.

    A source is a directory, also in a store (gs://bucket/folder), the name of a bundled model, `org/name` for
    a repository of the Hugging Face Hub, or `org/name:folder` for one folder of a repository; then only that
    folder is downloaded.
    With `files`, a source may also be a file, which is returned as it is. Without `weights`, only settings
    and tokenizers are downloaded.

    Raises:
      CheckpointError: there is no such directory, and the repository or its folder cannot be reached.
    """
    source = locate(source)
    if remote(place := located(source)):
        if not place.is_dir():
            raise CheckpointError(f"{source}: there is no such folder")
        return place
    if Path(source).is_dir() or (files and Path(source).is_file()):
        return Path(source)
    hub_id = HUB_ID.fullmatch(str(source))
    if Path(source).exists() or not hub_id:
        raise CheckpointError(
            f"{source}: not a directory, and not a Hugging Face id (org/name or org/name:folder) either; "
            f"{', '.join(BUNDLED)} come with the package"
        )
    name, folder = hub_id.groups()
    wanted, unwanted = patterns(folder, WANTED if weights else SETTINGS)
    snapshot = download(name, wanted, unwanted)
    if weights and not holds_weights(snapshot, folder, unwanted):
        # Only older repositories need their .bin files: others hold the same weights in both forms.
        wanted, _ = patterns(folder, [*WANTED, "*.bin"])
        snapshot = download(name, wanted, unwanted)
    if folder and not (snapshot / folder).is_dir():
        raise CheckpointError(f"{source}: the repository {name} has no folder {folder} with files of a model")
    return snapshot / (folder or "")


def patterns(folder, wanted):
    """(patterns to download, patterns to leave out) for huggingface_hub, whose `*` also matches a slash."""
    if folder is None:
        return wanted, OTHERS
    inside = [f"{folder}/{pattern}" for pattern in wanted]
    return [*inside, *BESIDE.get(folder, ())], []


def holds_weights(snapshot, folder, unwanted):
    """Whether a snapshot has the weights asked for. Earlier downloads may have left other models in it."""
    from huggingface_hub.utils import filter_repo_objects  # rarely needed

    top = snapshot / (folder or "")
    names = [file.relative_to(snapshot).as_posix() for file in top.rglob("*.safetensors")]
    return (top / "arrays").is_dir() or any(filter_repo_objects(names, ignore_patterns=unwanted))


def download(name, wanted, unwanted):
    import huggingface_hub  # rarely needed

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
    except huggingface_hub.errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name}: its owner gives it to those who accept the licence. "
            "Accept it on its page of the Hub, then `hf auth login`."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: there is no such directory, "
            f"and the Hugging Face Hub does not give a repository of that name ({type(error).__name__}). "
            f"Offline? Download it elsewhere (`hf download {name}`), and give the directory."
        ) from error
