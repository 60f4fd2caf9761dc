"""Checkpoints: models from files, and filters that fit weights: key names of the authors, readout and image size."""
import argparse
import logging
import math
import re
from pathlib import Path
from textwrap import shorten
from typing import Any, Dict, Optional, Tuple, Union

import timm
import torch
import yaml
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models import clean_state_dict
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn

from .base import check

_logger = logging.getLogger(__name__)
BY_SIMILARITY = 'grouped_by_similarity'  # key of the weights of an Evo-DeiT that groups like patches
BY_ATTENTION_ONLY = dict(representative_token=False, tradeoff=None, selection='stage', layer_to_stage_epochs=0)


def warn_by_attention(state_dict: Dict[str, Any], prefix: str = '') -> None:
    """Warn of weights, for a model that groups like patches, that seem to be trained by class attention."""
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
    state_dict = _adapt_readout(state_dict, model)
    if model.head_cls is None:
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith(('norm_cls.', 'head_cls.'))}
    return vit_checkpoint_filter_fn(state_dict, model)


def levit_checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Make a checkpoint, but not of a LeViT, fit an EvoLevit: key names, heads, learned tradeoff, image size."""
    state_dict = {k: v for k, v in _weights(state_dict).items() if k != 'epochs_started'}  # a new training starts
    if any('attention_biases' in k for k in state_dict):
        raise ValueError(
            'The checkpoint is of a LeViT: it has attention_biases. Evo-LeViT has a class token and position '
            'embeddings instead, and needs weights of its own.')
    state_dict = rename_levit(state_dict)
    dropped: Tuple[str, ...] = () if model.head_cls is not None else ('head_cls.', 'head_cls_dist.')
    if model.tradeoff is None:
        dropped += ('tradeoff',)
    state_dict = {k: v for k, v in state_dict.items() if not k.startswith(dropped)}
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


def read_weights(path: Union[str, Path], use_ema: bool = False) -> Dict[str, torch.Tensor]:
    """The weights, or their moving average, of a checkpoint of the authors or timm. No code in the file is run."""
    open(path, 'rb').close()
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            safe = Path(path).suffix == '.safetensors'
            content = load_file(path) if safe else torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # a damaged file can make PyTorch raise almost anything
        # the rest of PyTorch's message is how to load the file without this protection
        reason = re.search(r'GLOBAL [\w.]+', str(e)) or re.match('[^.]*', str(e))
        raise ValueError(
            f'{path} is damaged or incomplete, or holds more than the tensors, plain Python values and '
            f'argparse.Namespace of a checkpoint: {reason and reason[0] or type(e).__name__}. No code in it was run. '
            f'If it was downloaded, do so again.') from e

    keys = ('model_ema', 'state_dict_ema') if use_ema else ('model', 'state_dict')
    entries = content if isinstance(content, dict) else {}
    weights = next((entries[k] for k in keys if entries.get(k)), {} if use_ema else entries)
    if not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        found = shorten(', '.join(map(str, entries)), 100) or f'a {type(content).__name__}'
        raise ValueError(f'{path} has no dict of tensors under {" or ".join(keys)}, it holds {found}.')
    return clean_state_dict(weights)


def head_args(weights: Dict[str, torch.Tensor]) -> Dict[str, int]:
    """The argument num_classes for weights under timm's or the authors' names, none if they have no head."""
    names = ('head.weight', 'head.linear.weight', 'head.l.weight')
    sizes = [weights[k].shape[0] for k in names if k in weights and weights[k].ndim == 2]
    return {'num_classes': sizes[0]} if sizes else {}


def load_exactly(model: nn.Module, weights: Dict[str, torch.Tensor], path: Union[str, Path]) -> None:
    """Load the weights of a file without dropping or resampling any. A ValueError says what does not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:  # it names every tensor, one kind of misfit in a line
        shapes, found = r': copying .*?Size\((.*?)\).*?Size\((.*?)\)\.', []
        for line in sorted(str(e).split('\n\t')[1:], key=lambda line: 'key(s)' in line):  # shapes come first
            keys = re.findall('"(.*?)"', line) if 'key(s)' in line else ()
            found += [f'{line.split()[0].lower()} {key}' for key in keys] or [
                re.sub(shapes, r' (\1 in the file, \2 in the model)', line).rstrip('. ')]
        more = f' and {len(found) - 3} more' if len(found) > 3 else ''
        raise ValueError(
            f'{path} does not fit the model, its image size or other arguments: {"; ".join(found[:3])}{more}.') from e


def deit_args(cfg: Any, kwargs: Dict[str, Any]) -> bool:
    """Whether these weights of an Evo-DeiT are DeiT's own. If so, arguments that are not given are set for them.

    DeiT's norm and head were trained for the class token, and its weights know no selection by class attention.
    """
    if not (cfg.hf_hub_id or '').startswith('timm/deit_') or cfg.file or cfg.state_dict:
        return False
    kwargs.setdefault('global_pool', 'token')
    if all(kwargs.get(k, v) == v for k, v in BY_ATTENTION_ONLY.items()):
        kwargs.setdefault('slow_tokens', 'similarity')
    if kwargs.get('slow_tokens') == 'similarity':
        kwargs.setdefault('keep_ratio', 0.6)
    return True


def read_args(checkpoint: Union[str, Path]) -> Dict[str, Any]:
    """Arguments of timm's train.py from args.yaml beside a checkpoint, all those of the model in `model_kwargs`."""
    path = Path(checkpoint).with_name('args.yaml')
    try:
        args = yaml.safe_load(path.read_text(encoding='utf-8')) if path.is_file() else None
    except (UnicodeDecodeError, yaml.YAMLError) as e:
        raise ValueError(f'{path} cannot be read: {shorten(str(e), 200)}') from e
    if not isinstance(args, dict) or not isinstance(args.get('model'), str):
        return {}
    chans = args.get('in_chans') or (args.get('input_size') or [None])[0]
    kwargs = {'num_classes': args.get('num_classes'), 'global_pool': args.get('gp'), 'in_chans': chans}
    kwargs.update(args.get('model_kwargs') or {})
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items() if v is not None}
    if args['model'].startswith('evo_deit') and args.get('pretrained') and not args.get('pretrained_path'):
        cfg = timm.models.get_pretrained_cfg(args['model'])
        if deit_args(cfg, kwargs):
            args['crop_pct'] = args.get('crop_pct') or cfg.crop_pct
    return {**args, 'model_kwargs': kwargs}


def data_config(model: Any, args: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """timm's data configuration of a model as it is built; `args` are options of timm's scripts that replace it."""
    data = resolve_data_config(args, model=model)
    sized = model if hasattr(model, 'img_size') else getattr(model, 'patch_embed', None)
    size = getattr(sized, 'img_size', None) if getattr(sized, 'strict_img_size', True) else None
    data['input_size'] = (getattr(model, 'in_chans', data['input_size'][0]), *(size or data['input_size'][1:]))
    if data['input_size'][0] == 1:
        data.update({k: (sum(data[k]) / len(data[k]),) for k in ('mean', 'std')})
    return data


def load_model(
        name: Optional[str], /, pretrained: bool = False, checkpoint: Union[str, Path, None] = None,
        use_ema: bool = False, data: Optional[Dict[str, Any]] = None, **kwargs: Any,
) -> Tuple[Any, str, Dict[str, Any]]:
    """Create a model of timm, where there is a checkpoint with exactly its weights or their moving average.

    What is not given is taken from args.yaml of timm's train.py, where that lies beside the checkpoint; `data` are
    options of timm's scripts, such as `crop_pct`. Returns the model, its name and the arguments it was created with.
    Its `pretrained_cfg` is for pictures of its own size and channels, its `default_cfg` is left as timm has it.

    Raises:
        ValueError: There is no name, or the checkpoint is no file of weights that fit the model.
    """
    weights, trained = (read_weights(checkpoint, use_ema), read_args(checkpoint)) if checkpoint else ({}, {})
    name = name or trained.get('model', '')
    check(bool(name), 'The model', 'named, where no args.yaml beside a checkpoint does so', name)
    size = {'input_size': (3, *to_2tuple(kwargs['img_size']))} if 'img_size' in kwargs else {}
    kwargs = {**trained.get('model_kwargs', {}), **head_args(weights), **kwargs}
    model: Any = timm.create_model(name, pretrained=pretrained, **kwargs)
    if checkpoint:
        load_exactly(model, weights, checkpoint)
    model.pretrained_cfg = {**model.pretrained_cfg, **data_config(model, {**trained, **size, **(data or {})})}
    return model, name, kwargs
