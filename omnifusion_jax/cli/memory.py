"""What a loaded model takes, as a line for people to read."""

from omnifusion_jax.models.answering import weighed


def memory(model) -> str:
    """The name of an inference.model.Model and the megabytes of its parameters, by part."""
    parts = weighed(model.module)
    shares = ", ".join(f"{part} {size / 1e6:,.1f}" for part, size in parts.items())
    return f"{model.name}: {sum(parts.values()) / 1e6:,.1f} MB ({shares})"
