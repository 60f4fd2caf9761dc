"""The authors' state dicts to timm's naming."""
import re
from typing import Any, Dict, List

import torch
from torch import nn
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn

__all__ = ['deit_checkpoint_filter_fn']


def _rename_deit(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Authors' Evo-DeiT keys to those of EvoVisionTransformer; query and key rows come before the value rows."""
    out = {}
    for key, value in state_dict.items():
        key = re.sub(r'^norms\.(\d+)\.', r'blocks.\1.norm1.', key)
        key = re.sub(r'^projs\.(\d+)\.', r'blocks.\1.attn.proj.', key)
        key = re.sub(r'^norm\.', 'fc_norm.', key)
        if match := re.match(r'qks\.(\d+)\.qk\.(weight|bias)$', key):
            i, name = match.groups()
            v = f'vs.{i}.v.{name}'
            if v not in state_dict:
                raise ValueError(f'The checkpoint holds {key} but not {v}.')
            key, value = f'blocks.{i}.attn.qkv.{name}', torch.cat([value, state_dict[v]])
        elif re.match(r'vs\.\d+\.v\.', key):
            continue
        out[key] = value
    return out


def _listed(names: List[str], limit: int = 8) -> str:
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more


def check_state_dict(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> None:
    """Compare a filtered checkpoint with the model that it is meant for.

    What timm adapts afterwards may differ: the first convolution (in_chans) and the classifiers (num_classes).

    Raises:
        ValueError: Keys or shapes do not fit, with the names of those.
    """
    own = model.state_dict()
    adapted = ('head', 'patch_embed.proj', 'stem.conv1')
    missing = [k for k in own if k not in state_dict and not k.startswith('head')]
    unexpected = [k for k in state_dict if k not in own and not k.startswith('head')]
    wrong = [
        f'{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}'
        for k, v in state_dict.items()
        if k in own and v.shape != own[k].shape and not k.startswith(adapted)
    ]
    faults = [
        f'{what} {_listed(names)}'
        for what, names in (('missing:', missing), ('unexpected:', unexpected), ('wrong shape:', wrong)) if names
    ]
    if faults:
        raise ValueError(f'The checkpoint does not fit {type(model).__name__}; ' + '; '.join(faults) + '.')


def deit_checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Make a checkpoint fit an EvoVisionTransformer.

    Takes the authors' key names as well as timm's, drops the class token branch where the model has none, and resamples
    patch and position embeddings to the model's patch and image size.

    Raises:
        ValueError: Keys or shapes do not fit.
    """
    state_dict = state_dict.get('model', state_dict)
    state_dict = state_dict.get('state_dict', state_dict)
    if any(k.startswith('qks.') for k in state_dict):
        state_dict = _rename_deit(state_dict)
    if model.head_cls is None:
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith(('norm_cls.', 'head_cls.'))}
    state_dict = vit_checkpoint_filter_fn(state_dict, model)
    check_state_dict(state_dict, model)
    return state_dict
