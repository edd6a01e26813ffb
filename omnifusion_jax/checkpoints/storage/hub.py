"""Sources by name: a directory here, or a repository of the Hugging Face Hub, or a folder in one."""

import re
from pathlib import Path

from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.errors import CheckpointError

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::(\w[\w.-]*(?:/\w[\w.-]*)*))?")  # org/name, org/name:folder
WANTED = ["*.json", "*.jinja", "*.safetensors", "*.pt", "*.model", "arrays/*"]

# OmniFusion's repository holds three models. Its plain id is release 1.1; others are named by their folder.
OTHERS = ["OmniMistral-v1_1-encoders-mix/*", "OmniMistral-model/*", "OmniMistral-tokenizer/*"]
BESIDE = {  # what belongs to a folder and is not in it: release 1.0
    "OmniMistral-model": ["OmniMistral-tokenizer/*", "projection", "special_embeddings.pt"],
}


def local(source, files=False) -> Path:
    """The directory of a source: itself, that of a bundled model, or in a downloaded snapshot of `org/name`.

    Of `org/name:folder` nothing but that folder is downloaded. Where `files` are taken, a file is itself.

    Raises:
      CheckpointError: there is no such directory, and no such repository or folder can be reached.
    """
    source = locate(source)
    if Path(source).is_dir() or (files and Path(source).is_file()):
        return Path(source)
    hub_id = HUB_ID.fullmatch(str(source))
    if Path(source).exists() or not hub_id:
        raise CheckpointError(
            f"{source}: not a directory, and not a Hugging Face id (org/name or org/name:folder) either"
        )
    name, folder = hub_id.groups()
    wanted, unwanted = patterns(folder)
    snapshot = download(name, wanted, unwanted)
    if not holds_weights(snapshot, folder, unwanted):
        wanted, _ = patterns(folder, ["*.bin"])  # older repositories; others hold the same weights twice
        snapshot = download(name, wanted, unwanted)
    if folder and not (snapshot / folder).is_dir():
        raise CheckpointError(f"{source}: the repository {name} has no folder {folder} with files of a model")
    return snapshot / (folder or "")


def patterns(folder, more=()):
    """(what is wanted of a repository, what is not), for huggingface_hub, whose `*` goes through folders."""
    if folder is None:
        return [*WANTED, *more], OTHERS
    return [*(f"{folder}/{pattern}" for pattern in (*WANTED, *more)), *BESIDE.get(folder, ())], []


def holds_weights(snapshot, folder, unwanted):
    """Whether a snapshot has the weights that were asked for; others may lie in it from an earlier time."""
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
            f"{name}: its owner gives it to those who accept the licence. Accept it on its page of the Hub, then `hf auth login`."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: there is no such directory, and the Hugging Face Hub does not give a repository of that name ({type(error).__name__}). "
            f"Offline? Download it elsewhere (`hf download {name}`), and give the directory."
        ) from error
