"""A model for `models.py:create`."""
import timm

import timm_evovit


def create(**kwargs):
    return timm_evovit.evolve(timm.create_model('deit_tiny_patch16_224', **{'img_size': 64, **kwargs}))
