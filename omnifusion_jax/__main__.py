"""python -m omnifusion_jax

Says which commands there are.
"""

import ast
from pathlib import Path


def commands() -> list[str]:
    """How each command is called. Their files are read, not imported: they define flags of the same names."""
    texts = (file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py")))
    usages = ((ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0] for text in texts)
    return [usage for usage in usages if usage.startswith("python -m omnifusion_jax.")]


if __name__ == "__main__":
    print(*commands(), "--help after a command says what it does, and lists its flags", sep="\n")
