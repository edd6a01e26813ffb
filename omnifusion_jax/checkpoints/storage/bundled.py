"""The models that come with the package, by name."""

from pathlib import Path

ASSETS = Path(__file__).parents[2] / "assets"
BUNDLED = ("omnifusion-tiny", "omnifusion-tiny-encoder", "omnifusion-tiny-decoder")

# The encoder of this model was frozen in training, so the model does not store it a second time.
VISION = {"omnifusion-tiny": "omnifusion-tiny-encoder"}


def locate(source: str | Path) -> str | Path:
    """The directory of a bundled model. Any other source is returned unchanged."""
    return ASSETS / source if source in BUNDLED else source
