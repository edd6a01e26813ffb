"""A tokenizer's files: copied with a model, and made readable where only the sentencepiece model is there."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from omnifusion_jax.checkpoints.storage.settings import read_json
from omnifusion_jax.errors import CheckpointError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
SPACE = "\u2581"  # sentencepiece's mark for a space
PROBES = (
    "This is a dialog.\n",
    "  two  spaces",
    " a\tb ",
    "\u041f\u0440\u0438\u0432\u0435\u0442, 2 + 2?",
    "\u65e5\u672c\u0001",
    "",
)


def copy_tokenizer(source, target):
    for name in FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def fast_tokenizer(directory) -> Path | None:
    """A directory with tokenizer.json: this one, or a cached conversion of its tokenizer.model. None where neither is there.

    Conversions are kept in `$XDG_CACHE_HOME/omnifusion_jax`, by content.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        return directory
    if not (directory / "tokenizer.model").is_file():
        return None
    content = b"".join((directory / name).read_bytes() for name in FILES if (directory / name).is_file())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    converted = caches / "omnifusion_jax" / f"tokenizer-{hashlib.sha256(content).hexdigest()[:16]}"
    if not converted.is_dir():
        converted.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=converted.parent
        ) as partial:  # its own: several processes may start at once
            copy_tokenizer(directory, partial)
            from_sentencepiece(directory / "tokenizer.model").save(str(Path(partial) / "tokenizer.json"))
            with contextlib.suppress(OSError):  # another one was faster, with the same content
                os.rename(partial, converted)
                os.mkdir(partial)  # what the context removes
    if not converted.is_dir():
        raise CheckpointError(
            f"{converted}: the converted tokenizer cannot be written there. Set XDG_CACHE_HOME to a folder that can be written."
        )
    return converted


def token_id(directory, token):
    """The id of `token` in a directory's tokenizer.json, or that it gets when it is added."""
    tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    tokenizer.add_special_tokens([token])
    return tokenizer.token_to_id(token)


def special_id(directory, role, default):
    """The id of the token that tokenizer_config.json gives for a role such as "eos_token"; `default` is its text where it says none."""
    file = Path(directory) / "tokenizer_config.json"
    token = (read_json(file) if file.is_file() else {}).get(role) or default
    return token_id(directory, token["content"] if isinstance(token, dict) else token)


def from_sentencepiece(file) -> Tokenizer:
    """The same tokenizer as a `tokenizers.Tokenizer`: byte-pair encoding with byte fallback, and a space before every text, as Llama has it.

    (transformers 5 converts such files too, but treats runs of spaces and a space at the start unlike sentencepiece.)

    Raises:
      CheckpointError: the file is damaged, or not of that kind: the result is compared with sentencepiece on a few texts.
    """
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a sentencepiece model ({error!s:.200}). Copy or download it again."
        ) from error
    ids = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    unknown = pieces.id_to_piece(pieces.unk_id())
    tokenizer = Tokenizer(
        models.BPE(ids, merges(pieces, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(piece, normalized=False, special=True)
            for piece, i in ids.items()
            if pieces.is_control(i) or pieces.is_unknown(i)
        ]
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for text in PROBES:
        if (ours := tokenizer.encode(text).ids) != (theirs := pieces.encode(text)):
            raise CheckpointError(
                f"{file}: not a byte-pair model like Llama's: {text!r} is {theirs}, converted {ours}. Provide a tokenizer.json."
            )
    return tokenizer


def merges(pieces, ids):
    """Every pair of pieces that joins to a piece: the likelier result first, as sentencepiece joins, and among equals the longer left half."""
    found = []
    for piece, i in ids.items():
        halves = [(piece[:n], piece[n:]) for n in range(len(piece) - 1, 0, -1)]
        found += [
            (-pieces.get_score(i), -len(a), -len(b), (a, b)) for a, b in halves if a in ids and b in ids
        ]
    return [pair for *_, pair in sorted(found, key=lambda row: row[:3])]
