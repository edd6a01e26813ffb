"""Tokenizer files: copied along with a model, and converted where there is only a sentencepiece model."""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from omnifusion_jax.checkpoints.storage.settings import read_json
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.paths import located, remote

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
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
      CheckpointError: tokenizer.model cannot be converted, added tokens cannot have their ids, or the cache
        cannot be written.
    """
    directory = located(directory)
    found = (directory / "tokenizer.json").is_file()
    if found and not remote(directory):
        return directory
    if not found and not (directory / "tokenizer.model").is_file():
        return None
    content = b"".join((directory / name).read_bytes() for name in FILES if (directory / name).is_file())

    def write(partial):
        copy_tokenizer(directory, partial)
        if not found:
            near = partial if remote(directory) else directory
            converted = from_sentencepiece(near / "tokenizer.model")
            add_numbered(converted, added_tokens(near), directory)
            converted.save(str(partial / "tokenizer.json"))

    return cached(content, write)


def cached(content: bytes, write: Callable[[Path], None]) -> Path:
    """The directory that `write` fills, kept in the cache by the `content` that it follows from.

    Raises:
      CheckpointError: it cannot be written.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made = caches / "omnifusion_jax" / f"tokenizer-{hashlib.sha256(content).hexdigest()[:16]}"
    if not made.is_dir():
        try:
            made.parent.mkdir(parents=True, exist_ok=True)
            # Every process writes into a directory of its own, because several may start at once
            with tempfile.TemporaryDirectory(dir=made.parent) as partial:
                write(Path(partial))
                with contextlib.suppress(OSError):  # another process was faster, with the same content
                    os.rename(partial, made)
                    os.mkdir(partial)  # the TemporaryDirectory removes it on exit
        except OSError as error:
            raise CheckpointError(f"{unwritten(made)} ({error})") from error
    if not made.is_dir():
        raise CheckpointError(unwritten(made))
    return made


def unwritten(made):
    return (
        f"{made}: the converted tokenizer cannot be written there. "
        "Set XDG_CACHE_HOME to a folder that can be written"
    )


def with_tokens(directory: Path, tokens: Sequence[str]) -> Path:
    """A directory whose tokenizer never splits `tokens`, in which those that it lacks are added in order.

    Those that files beside tokenizer.json add come first, with the ids that they have there. It is
    `directory` itself if nothing lacks, or else a copy in the cache.

    Raises:
      CheckpointError: added tokens cannot have their ids, or the cache cannot be written.
    """
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    before = backend.to_str()
    add_numbered(backend, added_tokens(directory), directory)
    add_tokens(backend, [token for token in tokens if splits(backend, token)])
    if backend.to_str() == before:
        return directory
    written = backend.to_str(pretty=True).encode()

    def write(partial):
        copy_tokenizer(directory, partial)
        (partial / "tokenizer.json").write_bytes(written)

    names = (
        (directory / "tokenizer_config.json").read_bytes()
        if (directory / "tokenizer_config.json").is_file()
        else b""
    )
    return cached(written + names, write)


def splits(backend: Tokenizer, token: str) -> bool:
    """Whether a tokenizer cuts `token` into several somewhere, or does not know it."""
    found = backend.encode(f"a{token}b{token}{token}", add_special_tokens=False).ids
    return found.count(backend.token_to_id(token)) < 3


def add_tokens(backend: Tokenizer, tokens: Iterable[str]):
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])


def add_numbered(backend: Tokenizer, ids: Mapping[str, int], where: Path):
    """Adds those tokens that a tokenizer lacks. Raises CheckpointError unless each then has its id."""
    add_tokens(backend, [token for token in sorted(ids, key=ids.get) if splits(backend, token)])
    for token, i in ids.items():
        found = backend.token_to_id(token)
        if found != i:
            raise CheckpointError(
                f"{where}: added_tokens.json or tokenizer_config.json gives {token!r} the id {i}, and the "
                f"tokenizer has {found} for it. Provide a tokenizer.json that has all tokens"
            )


def added_tokens(directory: Path) -> dict[str, int]:
    """The ids of tokens that files beside the tokenizer's own add to it."""
    file, config = directory / "added_tokens.json", directory / "tokenizer_config.json"
    ids = read_json(file) if file.is_file() else {}
    listed = read_json(config).get("added_tokens_decoder") if config.is_file() else None
    return ids | {token["content"]: int(i) for i, token in (listed or {}).items()}


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
    User-defined pieces are whole words: text is cut at them, the longest first, before anything is merged.
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
    whole = user_defined(pieces)
    settings = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True, "ignore_merges": bool(whole)}
    tokenizer = Tokenizer(models.BPE(ids, merges(pieces, ids), **settings))
    if whole:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, whole))), "isolated")
    special = [piece for piece, i in ids.items() if pieces.is_control(i) or pieces.is_unknown(i)]
    add_tokens(tokenizer, special)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for text in (*PROBES, *(f"a{piece}b {piece}{piece}" for piece in whole)):
        ours, theirs = tokenizer.encode(text).ids, pieces.encode(text)
        if ours != theirs:
            raise CheckpointError(
                f"{file}: not a byte-pair model like Llama's: {text!r} is {theirs}, converted {ours}. "
                "Provide a tokenizer.json."
            )
    return tokenizer


def user_defined(pieces) -> list[str]:
    """The user-defined pieces, such as `<image>` in MiniCPM's model, the longest first."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(pieces.serialized_model_proto())
    found = [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]
    return sorted(found, key=len, reverse=True)


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
