"""Pictures by name, as MiniCPM-V's data for fine-tuning list them, and other media alike.

"image": {"<image_00>": "a.jpg", "<image_01>": "b.jpg"}
"Is <image_01> like <image_00>?"        ->  "Is <image> like <image>?" with b.jpg and a.jpg
"""

import re
from collections.abc import Mapping

from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import MODALITIES


def in_order_of_names(turns: tuple, listed: Mapping[str, tuple], where: str) -> tuple[tuple, dict]:
    """(turns with plain marks in place of names, listed media in the order of their names in the text).

    Media whose names nowhere stand in the text keep their order.

    Args:
      turns: (role, text or list of parts) each; only texts may have names.
      listed: the media items of a record by stream; one object, {name: item}, lists them by name.
    Raises: DataError, which names `where`, unless the text has each of the listed names once and no other.
    """
    listed = dict(listed)
    for stream, items in listed.items():
        mark = MODALITIES[stream].mark
        name = re.compile(re.escape(mark[:-1]) + r"_\d+" + re.escape(mark[-1]))  # <image_00> for <image>
        found = [one for _, text in turns if isinstance(text, str) for one in name.findall(text)]
        named = items_by_name(items, name)
        if found and sorted(found) != sorted(named):
            known = ", ".join(named) or "none by name"
            raise DataError(
                f'{where}: the text has {", ".join(found)}, and "{stream}" lists {known}. '
                "Let the text have each name once, and list a file for each",
                "marks",
            )
        if named:
            listed[stream] = tuple(named[one] for one in found or named)
            turns = tuple(
                (role, name.sub(mark, text) if isinstance(text, str) else text) for role, text in turns
            )
    return turns, listed


def items_by_name(items: tuple, name: re.Pattern) -> Mapping:
    """The one object that lists media by name; an empty one where they are listed otherwise."""
    one = items[0] if len(items) == 1 else None
    by_name = isinstance(one, Mapping) and all(isinstance(key, str) and name.fullmatch(key) for key in one)
    return one if by_name else {}
