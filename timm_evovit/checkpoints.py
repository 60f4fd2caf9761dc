"""Checkpoint filters: the authors' key names to timm's, and weights to the readout and image size of a model."""
import logging
import math
import re
from typing import Any, Dict

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn

_logger = logging.getLogger(__name__)
BY_SIMILARITY = 'grouped_by_similarity'  # key of the weights of an Evo-DeiT that groups similar patches
OPTIONAL = ('norm_cls.', 'head_cls', 'tradeoff')  # weights of a class token branch or learned tradeoff


def warn_by_attention(state_dict: Dict[str, Any], prefix: str = '') -> None:
    """Warn of weights, for a model that groups similar patches, that seem to be trained by class attention."""
    keys = {prefix + BY_SIMILARITY, f'{prefix}norm_cls.weight', f'{prefix}epochs_started'} & {*state_dict}
    if keys and prefix + BY_SIMILARITY not in keys:
        _logger.warning(
            "The weights have a class token branch or a count of epochs, as those of an Evo-DeiT trained by class "
            "attention: with slow_tokens='similarity' they are less accurate than with slow_tokens='attention'.")


def rename_deit(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Authors' Evo-DeiT keys to those of EvoVisionTransformer. A state dict without them is returned as it is."""
    if not any(k.startswith('qks.') for k in state_dict):
        return state_dict
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


def rename_levit(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Authors' Evo-LeViT keys to those of EvoLevit. A state dict that does not use them is returned as it is."""
    if not any(re.match(r'patch_embed\.\d', k) for k in state_dict):
        return state_dict
    names: Dict[int, str] = {}
    stage, block, indices = 0, 0, {int(k.split('.')[1]) for k in state_dict if k.startswith('blocks.')}
    for i in sorted(indices):
        if f'blocks.{i}.kv.c.weight' in state_dict:  # a downsampling attention; its MLP is the next block
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


def _weights(state_dict: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """The weights in a checkpoint."""
    state_dict = state_dict.get('model', state_dict)
    return state_dict.get('state_dict', state_dict)


def _adapt_readout(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Map norm and head between class token readout (DeiT) and averaged-patch readout with assisted class token."""
    own = model.state_dict()
    if 'norm.weight' in state_dict and 'norm.weight' not in own and 'fc_norm.weight' in own:
        _logger.warning(
            'The weights classify the class token and the model averages patches: it starts from their norm and head '
            'and needs fine-tuning.')
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
    """Make a checkpoint fit an EvoVisionTransformer: key names, readout, patch and image size."""
    state_dict = _weights(state_dict)
    if model.by_similarity:
        warn_by_attention(state_dict)
        state_dict = {BY_SIMILARITY: getattr(model, BY_SIMILARITY), **state_dict}
    state_dict = rename_deit({k: v for k, v in state_dict.items() if k != 'epochs_started'})
    own, state_dict = model.state_dict(), _adapt_readout(state_dict, model)
    state_dict = {k: v for k, v in state_dict.items() if k in own or not k.startswith(OPTIONAL)}
    return vit_checkpoint_filter_fn(state_dict, model)


def levit_checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Make a checkpoint, but not of a LeViT, fit an EvoLevit: key names, heads, learned tradeoff, image size."""
    state_dict = {k: v for k, v in _weights(state_dict).items() if k != 'epochs_started'}  # a new training starts
    if any('attention_biases' in k for k in state_dict):
        raise ValueError(
            'The checkpoint is of a LeViT: it has attention_biases. Evo-LeViT has a class token and position '
            'embeddings instead, and needs weights of its own.')
    own, state_dict = model.state_dict(), rename_levit(state_dict)
    state_dict = {k: v for k, v in state_dict.items() if k in own or not k.startswith(OPTIONAL)}
    source = getattr(model, 'pretrained_cfg', {}).get('input_size', (3, 224, 224))[1:]
    for i in range(len(model.stages)):
        key = f'stages.{i}.downsample.attn_downsample.pos_embed' if i > 0 else 'pos_embed'
        before = max(i - 1, 0)  # the embedding of a stage is on the grid before it, the first one's on its own
        grid, n = model.stages[before].grid_size, state_dict[key].shape[1] - 1 if key in state_dict else 0
        old = tuple(-(-size // model.feature_info[before]['reduction']) for size in source)
        if n != math.prod(old):  # of another size than that of the published weights, a square
            old = grid if n == math.prod(grid) else (math.isqrt(n), math.isqrt(n))
        if n and old != grid and n == math.prod(old):
            state_dict[key] = resample_abs_pos_embed(state_dict[key], list(grid), list(old))
    return state_dict
