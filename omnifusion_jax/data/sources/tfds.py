"""Data sets of TensorFlow Datasets, read by `tfds.data_source`, which needs no TensorFlow."""

import contextlib
import dataclasses
import hashlib
from pathlib import Path

from omnifusion_jax.data.dialogues import FORMS, Dialogue, from_record
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import SOURCES

SPLIT = "train"
FEATURES = "features.json"  # is in the folder of every version of a data set
PICTURES = ("image", "images")
END = 1 << 18  # bytes of a shard: ArrayRecord keeps the places of its records there


@SOURCES.row("tfds")
class TfdsSource:
    """A split of a data set: `NAME[/CONFIG][:VERSION][#SPLIT]`, or `FOLDER[#SPLIT]` with its features.json.

    SPLIT may be a part of one, `train[:10%]`. Names are looked for in the folder `images`, if it is given, or
    else where TFDS keeps its data (TFDS_DATA_DIR). Of the features those are read that LLaVA's records have:

        id             Text or a number
        image, images  Image, or Sequence(Image): their files as they are, not decoded
        conversations  Sequence({"from": Text, "value": Text}), or
        messages       Sequence({"role": Text, "content": Text})

    The `fingerprint` covers the features, the split and the size and end of every shard, which tells where
    its records are, but not all of their bytes.

    Raises:
      DataError: TFDS is not installed; the data set is not there, has no such split, other features or files
        that are not read at random. A broken record raises it when asked for.
    """

    def __init__(self, path: str | Path, images: str | Path = "", side: int = 0):
        name, _, split = str(path).partition("#")
        self.folder, self.split = located(name, images), split
        self.open()

    def open(self):
        tfds = installed()
        with named(self.folder):
            builder = tfds.builder_from_directory(str(self.folder))
            self.features = read_features(tfds, builder.info.features, self.folder)
            self.split = chosen(self.split, tuple(builder.info.splits), self.folder)
        with named(f"{self.folder}#{self.split}"):
            parts = builder.info.splits[self.split].file_instructions
            if not parts:
                raise DataError(f"{self.folder}#{self.split} holds no dialogues")
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self.records = builder.as_data_source(self.split, deserialize_method=raw)
            self.fingerprint = fingerprint(self.folder, self.split, parts)

    def __getstate__(self):  # for worker processes, which open the files themselves
        return {"folder": self.folder, "split": self.split, "fingerprint": self.fingerprint}

    def __setstate__(self, state):
        self.folder, self.split = state["folder"], state["split"]
        self.open()
        if self.fingerprint != state["fingerprint"]:
            raise DataError(f"{self.folder} was changed while it was being read")

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i: int) -> Dialogue:
        where = self.where(i)
        try:
            data = self.records[i]
        except RuntimeError:  # of ArrayRecord: its checksum is wrong, or it cannot be read
            raise DataError(f"{where}: the record is damaged. Build the data set again", "damaged") from None
        as_written = {name: AsWritten() for name in PICTURES if name in self.features}
        try:
            found = self.features.deserialize_example_np(data, decoders=as_written)
            record = plain(found)
        except UnicodeDecodeError:
            raise DataError(f"{where}: a text in it is not UTF-8", "not_utf8") from None
        except Exception as error:  # of the protocol buffer, or of shapes
            raise DataError(f"{where}: not an example with these features ({error})", "damaged") from None
        dialogue = from_record(record, where, "")
        return dataclasses.replace(dialogue, parted=bool(found.get("parted", False)))

    def where(self, i: int) -> str:
        """The place of a record, for messages."""
        return f"{self.folder}#{self.split}[{i}]"


class AsWritten:
    """A decoder, for TFDS, that leaves the file of a picture as it is, also in a Sequence.

    `tfds.decode.SkipDecoding` of 4.9.10 does not do so for a Sequence.
    """

    def setup(self, *, feature):
        pass

    def decode_example_np(self, file):
        return file

    decode_batch_example_np = decode_example_np


def installed():
    """The module tensorflow_datasets. Raises DataError if it is not installed."""
    try:
        import tensorflow_datasets
    except ImportError:
        raise DataError(
            "TensorFlow Datasets is not installed (TensorFlow is not needed): "
            "pip install 'omnifusion-jax[tfds]'"
        ) from None
    return tensorflow_datasets


@contextlib.contextmanager
def named(what):
    """Turns the errors of TFDS inside into a DataError that says what is read."""
    try:
        yield
    except DataError:
        raise
    except NotImplementedError:
        raise DataError(
            f"{what} is not of array_record files, which alone are read at random. Build it again with "
            "--file_format=array_record"
        ) from None
    except Exception as error:  # of files that are missing or damaged, and of splits
        raise DataError(f"{what} cannot be read: {error}") from None


def chosen(split: str, splits: tuple[str, ...], folder: Path) -> str:
    """The split that is meant, of those there are. Raises DataError if there is none of that name."""
    split = split or (splits[0] if len(splits) == 1 else SPLIT)
    if split.partition("[")[0] not in splits:
        there = ", ".join(splits) or "none"
        raise DataError(
            f"{folder} has no split {split!r}; there are: {there}. It is written tfds:{folder}#SPLIT"
        )
    return split


def located(name: str, folder: str | Path) -> Path:
    """The folder of a data set's version. Raises DataError if it is not there."""
    if (Path(name) / FEATURES).is_file():
        return Path(name)
    if Path(name).is_absolute() or Path(name).is_dir():
        raise DataError(f"{name} has no {FEATURES}: give the folder of a version, such as NAME/1.0.0")
    tfds = installed()
    try:
        found = Path(tfds.builder(name, data_dir=str(folder) or None).data_path)
    except Exception as error:  # names, configs and versions that TFDS does not know
        raise DataError(f"tfds:{name}: {str(error).splitlines()[0] if str(error) else error!r}") from None
    if not (found / FEATURES).is_file():
        raise DataError(
            f"tfds:{name} is not in {found}: build it with tfds build {name} --file_format=array_record, "
            "or give the folder that holds it as data.images"
        )
    return found


def read_features(tfds, features, folder):
    """The FeaturesDict of those that are read. Raises DataError if they are others than it should have."""
    kinds = tfds.features
    is_text = lambda feature: isinstance(feature, kinds.Text)
    scalar = lambda feature: isinstance(feature, kinds.Tensor) and feature.shape == ()  # Text is one too
    picture = lambda feature: isinstance(feature, kinds.Image) and feature.np_dtype.kind == "u"
    pictures = lambda feature: (
        picture(feature) or (isinstance(feature, kinds.Sequence) and picture(feature.feature))
    )
    turns = lambda keys: (
        lambda feature: (
            isinstance(feature, kinds.Sequence)
            and isinstance(feature.feature, kinds.FeaturesDict)
            and all(key in feature.feature and is_text(feature.feature[key]) for key in keys)
        )
    )
    wanted = {"id": (scalar, "Text or a number"), "parted": (scalar, "bool")}
    wanted |= {name: (pictures, "Image or Sequence(Image)") for name in PICTURES}
    for name, *keys in FORMS:
        spelt = ", ".join(f'"{key}": Text' for key in keys)
        wanted[name] = (turns(keys), f"Sequence({{{spelt}}})")
    known = {name: feature for name, feature in features.items() if name in wanted}
    if not any(name in known for name, *_ in FORMS):
        raise DataError(
            f"{folder} has neither 'conversations' nor 'messages' among its features, "
            f"only {', '.join(features)}"
        )
    for name, feature in known.items():
        fits, spelt = wanted[name]
        if not fits(feature):
            found = " ".join(repr(feature).split())
            raise DataError(f"{folder}: its feature {name!r} is {found}, not {spelt}")
    return kinds.FeaturesDict(known)


def plain(found: dict) -> dict:
    """An example as a record of a JSON file has it: TFDS gives a Sequence of dicts as a dict of arrays."""
    record = {}
    for name, *keys in FORMS:
        if name in found:
            columns = [[cell.decode() for cell in found[name][key]] for key in keys]
            record[name] = [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
    if len(record) == 2:  # as tfds_files writes it: one of them is empty
        record = {name: turns for name, turns in record.items() if turns} or record
    for name in PICTURES:
        if name in found:
            record[name] = found[name] if isinstance(found[name], bytes) else list(found[name])
    if "id" in found:
        record["id"] = found["id"].decode() if isinstance(found["id"], bytes) else found["id"]
    return record


def fingerprint(folder: Path, split: str, parts) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update((folder / FEATURES).read_bytes())
    digest.update(split.encode())
    for part in parts:
        file = Path(part.filename)
        size = file.stat().st_size
        digest.update(repr((file.name, size, part.skip, part.take)).encode())
        with open(file, "rb") as shard:
            shard.seek(max(0, size - END))
            digest.update(shard.read())
    return digest.hexdigest()
