"""What a run learns: the rows of `tables.OBJECTIVES`.

An objective of your own is a class as `base.Objective` describes it, an instance of which is put into the table in a file
that your config file imports.
"""

from omnifusion_jax.objectives import answers, patches

__all__ = ["answers", "patches"]
