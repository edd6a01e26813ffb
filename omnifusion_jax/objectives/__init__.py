"""What a run learns: the rows of `tables.OBJECTIVES`.

To add one, write a class as `base.Objective` describes it, and put an instance of it into the table, in a
file that your config file imports.
"""

from omnifusion_jax.objectives import answers, patches, preference

__all__ = ["answers", "patches", "preference"]
