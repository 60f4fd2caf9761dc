"""Models from files: weights that fit exactly, and args.yaml of timm's train.py beside them."""
import argparse
import re
from pathlib import Path
from textwrap import shorten
from typing import Any, Dict, Optional, Tuple, Union

import timm
import torch
import yaml
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from timm.models import clean_state_dict
from torch import nn

from ..base import check
from ..evo_deit import deit_args


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
        lines = sorted(str(e).split('\n\t')[1:], key=lambda line: 'key(s)' in line)  # shapes come first
        misfits = shorten(' '.join(lines), 300)
        raise ValueError(f'{path} does not fit the model, its image size or other arguments: {misfits}') from e


def read_args(checkpoint: Union[str, Path]) -> Dict[str, Any]:
    """Read args.yaml of timm's train.py beside a checkpoint. Arguments of the model are in `model_kwargs`."""
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
    """Create a model of timm. A checkpoint, or its moving average, is loaded if one is given: all keys must match.

    What is not given is taken from args.yaml of timm's train.py, where that lies beside the checkpoint; `data` are
    options of timm's scripts, such as `crop_pct`. Returns the model, its name and the arguments it was created with.
    Its `pretrained_cfg` is for pictures of its own size and channels, its `default_cfg` is left as timm has it.

    Raises:
        ValueError: There is no name, or the checkpoint is no file of weights that fit the model.
    """
    weights, trained = (read_weights(checkpoint, use_ema), read_args(checkpoint)) if checkpoint else ({}, {})
    name = name or trained.get('model', '')
    known = bool(name) and not Path(name).is_file()
    check(known, 'The model', 'a name, unless args.yaml beside a --checkpoint, a file of weights, has it', name)
    size = {'input_size': (3, *to_2tuple(kwargs['img_size']))} if 'img_size' in kwargs else {}
    kwargs = {**trained.get('model_kwargs', {}), **head_args(weights), **kwargs}
    model: Any = timm.create_model(name, pretrained=pretrained, **kwargs)
    if checkpoint:
        load_exactly(model, weights, checkpoint)
    model.pretrained_cfg = {**model.pretrained_cfg, **data_config(model, {**trained, **size, **(data or {})})}
    return model, name, kwargs
