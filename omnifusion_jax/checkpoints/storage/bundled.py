"""The models that come with the package, by name."""

from pathlib import Path

ASSETS = Path(__file__).parents[2] / "assets"
BUNDLED = ("omnifusion-tiny", "omnifusion-tiny-encoder", "omnifusion-tiny-decoder")
VISION = {"omnifusion-tiny": "omnifusion-tiny-encoder"}  # whose encoder was frozen, and is not stored twice


def locate(source):
    """The directory of a bundled model; any other source as it is."""
    return ASSETS / source if source in BUNDLED else source
