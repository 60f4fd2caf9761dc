"""Checkpoint filters: the authors' key names to timm's, and weights to the readout and image size of a model."""
import logging
import math
import re
from typing import Any, Dict, Tuple

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn

_logger = logging.getLogger(__name__)


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


def _rename_levit(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Authors' Evo-LeViT keys to those of EvoLevit.

    The flat list of blocks is cut where a downsampling attention stands, which is the block with keys and values of its
    own; its MLP is the block behind it.
    """
    names: Dict[int, str] = {}
    stage, block, indices = 0, 0, {int(k.split('.')[1]) for k in state_dict if k.startswith('blocks.')}
    for i in sorted(indices):
        if f'blocks.{i}.kv.c.weight' in state_dict:
            stage, block = stage + 1, 0
            names[i] = f'stages.{stage}.downsample.attn_downsample'
        elif names.get(i - 1, '').endswith('.attn_downsample'):
            names[i] = f'stages.{stage}.downsample'
        else:
            names[i] = f'stages.{stage}.blocks.{block}'
            block += 1

    out, tradeoff = {}, {}
    for key, value in state_dict.items():
        if key.startswith('stage_blocks.'):
            continue  # the blocks once more
        if match := re.match(r'blocks\.(\d+)\.(.+)$', key):
            i, key = int(match[1]), match[2]
            if key.endswith('learn_tradeoff'):
                tradeoff[i] = value
                continue
            key = re.sub(r'^m1\.m\.', 'attn.', key)
            key = re.sub(r'^(?:m2\.)?m\.([02])\.', lambda m: f'mlp.ln{1 + int(m[1]) // 2}.', key)
            key = re.sub(r'\b(q|proj)\.1\.', r'\1.ln.', key)
            key = f'{names[i]}.{key}'
        key = re.sub(r'^patch_embed\.([0246])\.', lambda m: f'stem.conv{1 + int(m[1]) // 2}.', key)
        key = re.sub(r'\bposs$', 'pos_embed', key)
        key = re.sub(r'\b[cl]\.(weight|bias)$', r'linear.\1', key)
        out[key] = value
    if tradeoff:
        out['tradeoff'] = torch.cat([tradeoff[i].reshape(1) for i in sorted(tradeoff)])
    return out


def rename_authors(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The authors' key names to timm's; a state dict that does not use them is returned as it is.

    Raises:
        ValueError: A part of what becomes one tensor is missing.
    """
    if any(k.startswith('qks.') for k in state_dict):
        return _rename_deit(state_dict)
    if any(re.match(r'patch_embed\.\d', k) for k in state_dict):
        return _rename_levit(state_dict)
    return state_dict


def _weights(state_dict: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """The weights in a checkpoint, without the epochs that they were trained for: a new training starts from none."""
    state_dict = state_dict.get('model', state_dict)
    state_dict = state_dict.get('state_dict', state_dict)
    return {k: v for k, v in state_dict.items() if k != 'epochs_started'}


def _adapt_readout(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Map norm and head between class token readout (DeiT) and averaged-patch readout (paper).

    With DeiT's weights both branches of a model that averages patches start from DeiT's norm and head. With the paper's
    weights a model with class token readout gets the assisted class token branch.
    """
    own = model.state_dict()
    if 'norm.weight' in state_dict and 'norm.weight' not in own and 'fc_norm.weight' in own:
        _logger.warning(
            'The weights classify the class token and the model averages patches: it starts from their norm and head, '
            'and is a classifier only after fine-tuning.')
        sources = {'fc_norm.': 'norm.', 'norm_cls.': 'norm.', 'head.': 'head.', 'head_cls.': 'head.'}
    elif model.global_pool == 'token' and 'norm_cls.weight' in state_dict and 'norm.weight' not in state_dict:
        sources = {'norm.': 'norm_cls.', 'head.': 'head_cls.'}
    else:
        return state_dict
    parts = ('norm.', 'fc_norm.', 'norm_cls.', 'head.', 'head_cls.')
    out = {k: v for k, v in state_dict.items() if not k.startswith(parts)}
    for new, old in sources.items():
        out.update((new + k[len(old):], v) for k, v in state_dict.items() if k.startswith(old))
    return out


def deit_checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Make a checkpoint fit an EvoVisionTransformer.

    Takes the authors' key names as well as timm's, and DeiT's weights, drops the class token branch where the model has
    none, and resamples patch and position embeddings to the model's patch and image size.
    """
    state_dict = _adapt_readout(rename_authors(_weights(state_dict)), model)
    if model.head_cls is None:
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith(('norm_cls.', 'head_cls.'))}
    return vit_checkpoint_filter_fn(state_dict, model)


def _resample_pos_embed(pos_embed: torch.Tensor, old_size: Tuple[int, int], new_size: Tuple[int, int]) -> torch.Tensor:
    """Resample (1, 1 + n, C) from the grid `old_size`. If n does not fit it, from `new_size`, else from a square."""
    n = pos_embed.shape[1] - 1
    if n != old_size[0] * old_size[1]:
        old_size = new_size if n == new_size[0] * new_size[1] else (math.isqrt(n), math.isqrt(n))
    if old_size == new_size or n != old_size[0] * old_size[1]:
        return pos_embed
    return resample_abs_pos_embed(pos_embed, list(new_size), list(old_size))


def levit_checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Make a checkpoint fit an EvoLevit.

    Takes the authors' key names as well as timm's, drops the class token heads and the learned tradeoff where the model
    has none, and resamples position embeddings to the model's image size.

    Raises:
        ValueError: The weights are those of a LeViT.
    """
    state_dict = _weights(state_dict)
    if any('attention_biases' in k for k in state_dict):
        raise ValueError(
            'The checkpoint is of a LeViT, it has attention_biases and no class token. Evo-LeViT has position '
            'embeddings and a class token instead, and selects by the attention of that: it needs weights of its own.')
    state_dict = rename_authors(state_dict)
    dropped: Tuple[str, ...] = () if model.head_cls is not None else ('head_cls.', 'head_cls_dist.')
    if model.tradeoff is None:
        dropped += ('tradeoff',)
    state_dict = {k: v for k, v in state_dict.items() if not k.startswith(dropped)}
    source = getattr(model, 'pretrained_cfg', {}).get('input_size', (3, 224, 224))
    for i in range(len(model.stages)):
        key = f'stages.{i}.downsample.attn_downsample.pos_embed' if i > 0 else 'pos_embed'
        if key in state_dict:
            before = max(i - 1, 0)  # the embedding of a stage is on the grid before it, the first one's on its own
            old_size = tuple(-(-size // model.feature_info[before]['reduction']) for size in source[1:])
            state_dict[key] = _resample_pos_embed(state_dict[key], old_size, model.stages[before].grid_size)
    return state_dict
