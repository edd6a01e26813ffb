"""OmniLMM-12B learns from your dialogues.

python -m omnifusion_jax.convert --source=openbmb/OmniLMM-12B --output=omnilmm-12b
python -m omnifusion_jax.train --config=configs/omnilmm.py:frozen --config.data.path=dialogues.json \\
    --config.data.images=images --workdir=runs/omnilmm

Of its own training only the alignment is published (configs/dpo.py has it). Variants and settings are those
of its smaller sibling, see configs/minicpmv.py.
"""

import dataclasses

from omnifusion_jax.models.presets import preset
from omnifusion_jax.shipped import minicpmv

VARIANTS = minicpmv.VARIANTS


def get_config(name=""):
    return dataclasses.replace(
        minicpmv.get_config(name), model=preset("omnilmm-12b"), init_from="omnilmm-12b"
    )
