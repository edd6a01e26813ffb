"""Sources by name: a directory here, or a repository of the Hugging Face Hub."""

import re
from pathlib import Path

from omnifusion_jax.checkpoints.bundled import locate
from omnifusion_jax.errors import CheckpointError

WANTED = ["*.json", "*.jinja", "*.safetensors", "*.pt", "*.model", "arrays/*"]
UNWANTED = ["OmniMistral-v1_1-encoders-mix/*", "OmniMistral-model/*", "OmniMistral-tokenizer/*"]  # other models in OmniFusion's repository


def local(source, files=False) -> Path:
    """The directory itself, that of a bundled model, or a downloaded snapshot of the repository `org/name`; where `files` are taken, a file itself.

    Raises:
      CheckpointError: there is no such directory, and no such repository can be reached.
    """
    source = locate(source)
    if Path(source).is_dir() or (files and Path(source).is_file()):
        return Path(source)
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(f"{source}: not a directory, and not a Hugging Face id (org/name) either")
    directory = download(source, WANTED)
    if not (directory / "arrays").is_dir() and not any(directory.rglob("*.safetensors")):
        directory = download(source, [*WANTED, "*.bin"])  # older repositories; others hold the same weights twice
    return directory


def download(name, patterns):
    import huggingface_hub  # rarely needed

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=UNWANTED))
    except huggingface_hub.errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name}: its owner gives it to those who accept the licence. Accept it on its page of the Hub, then `hf auth login`."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: there is no such directory, and the Hugging Face Hub does not give a repository of that name ({type(error).__name__}). "
            f"Offline? Download it elsewhere (`hf download {name}`), and give the directory."
        ) from error
