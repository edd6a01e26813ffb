"""Tokenizer files: copied along with a model, and converted where there is only a sentencepiece model."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from omnifusion_jax.checkpoints.storage.settings import read_json
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.paths import located, remote

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
SPACE = "\u2581"  # sentencepiece's mark for a space
PROBES = (  # texts on which a converted tokenizer must agree with sentencepiece
    "This is a dialog.\n",
    "  two  spaces",
    " a\tb ",
    "\u041f\u0440\u0438\u0432\u0435\u0442, 2 + 2?",
    "\u65e5\u672c\u0001",
    "",
)


def copy_tokenizer(source: str | Path, target: str | Path):
    """Copies those of FILES that are in the directory `source` to the directory `target`."""
    source, target = located(source), located(target)
    for name in FILES:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())


def fast_tokenizer(directory: str | Path) -> Path | None:
    """A directory with tokenizer.json on this machine: this one, or one with a copy of what is in a store, or
    with a conversion of its tokenizer.model.

    None if neither file is there. Copies and conversions are cached in `$XDG_CACHE_HOME/omnifusion_jax`, by
    content.

    Raises:
      CheckpointError: tokenizer.model cannot be converted, or the cache cannot be written.
    """
    directory = located(directory)
    found = (directory / "tokenizer.json").is_file()
    if found and not remote(directory):
        return directory
    if not found and not (directory / "tokenizer.model").is_file():
        return None
    content = b"".join((directory / name).read_bytes() for name in FILES if (directory / name).is_file())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    converted = caches / "omnifusion_jax" / f"tokenizer-{hashlib.sha256(content).hexdigest()[:16]}"
    if not converted.is_dir():
        try:
            converted.parent.mkdir(parents=True, exist_ok=True)
            # Every process writes into a directory of its own, because several may start at once
            with tempfile.TemporaryDirectory(dir=converted.parent) as partial:
                copy_tokenizer(directory, partial)
                if not found:
                    near = Path(partial) if remote(directory) else directory
                    from_sentencepiece(near / "tokenizer.model").save(str(Path(partial) / "tokenizer.json"))
                with contextlib.suppress(OSError):  # another process was faster, with the same content
                    os.rename(partial, converted)
                    os.mkdir(partial)  # the TemporaryDirectory removes it on exit
        except OSError as error:
            raise CheckpointError(f"{unwritten(converted)} ({error})") from error
    if not converted.is_dir():
        raise CheckpointError(unwritten(converted))
    return converted


def unwritten(converted):
    return (
        f"{converted}: the converted tokenizer cannot be written there. "
        "Set XDG_CACHE_HOME to a folder that can be written"
    )


def token_id(directory: str | Path, token: str) -> int:
    """The id of `token` in a directory's tokenizer.json, or the id it would get if it were added."""
    tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    tokenizer.add_special_tokens([token])
    return tokenizer.token_to_id(token)


def special_id(directory: str | Path, role: str, default: str) -> int:
    """The id of the token that tokenizer_config.json names for a role such as "eos_token".

    `default` is the token's text if the file names none.
    """
    file = Path(directory) / "tokenizer_config.json"
    token = (read_json(file) if file.is_file() else {}).get(role) or default
    return token_id(directory, token["content"] if isinstance(token, dict) else token)


def from_sentencepiece(file: str | Path) -> Tokenizer:
    """The tokenizer of a sentencepiece model file, as a `tokenizers.Tokenizer`.

    The model must be of Llama's kind: byte-pair encoding with byte fallback, and a space before every text.
    (transformers 5 converts such files too, but it treats runs of spaces and a leading space differently from
    sentencepiece.)

    Raises:
      CheckpointError: the file is damaged, or is of another kind; to find out, the result is compared with
        sentencepiece on a few texts.
    """
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a sentencepiece model ({error!s:.200}). Copy or download it again."
        ) from error
    ids = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    unknown = pieces.id_to_piece(pieces.unk_id())
    model = models.BPE(ids, merges(pieces, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    special = [piece for piece, i in ids.items() if pieces.is_control(i) or pieces.is_unknown(i)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for text in PROBES:
        ours, theirs = tokenizer.encode(text).ids, pieces.encode(text)
        if ours != theirs:
            raise CheckpointError(
                f"{file}: not a byte-pair model like Llama's: {text!r} is {theirs}, converted {ours}. "
                "Provide a tokenizer.json."
            )
    return tokenizer


def merges(pieces, ids):
    """Every pair of pieces whose concatenation is a piece, in the order in which the pairs are merged.

    The pair with the likelier result comes first, as in sentencepiece; among equals, the one with the longer
    left half.
    """
    found = []
    for piece, i in ids.items():
        for n in range(len(piece) - 1, 0, -1):
            left, right = piece[:n], piece[n:]
            if left in ids and right in ids:
                found.append((-pieces.get_score(i), -len(left), -len(right), (left, right)))
    return [pair for *_, pair in sorted(found, key=lambda row: row[:3])]
