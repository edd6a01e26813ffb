"""Configs with other settings, for tests."""

import copy

from ml_collections.config_flags import config_path


def changed(config, values):
    """A copy of a config with {path: value} set in it.

    For example {"optimizer.clip": None, "model.image.encoders[0].eps": 1e-6}.
    """
    config = copy.deepcopy(config)
    for path, value in values.items():
        config_path.set_value(path, config, value)
    return config
