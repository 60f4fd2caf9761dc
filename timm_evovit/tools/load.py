"""Models with weights from files, which must fit exactly."""
import argparse
import re
from pathlib import Path
from textwrap import shorten
from typing import Any, Dict, Optional, Union

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from timm.models import clean_state_dict
from torch import nn

from ..base import check


def read_weights(path: Union[str, Path], use_ema: bool = False) -> Dict[str, torch.Tensor]:
    """The weights, or their moving average, of a checkpoint of the authors or timm. No code in the file is run."""
    open(path, 'rb').close()
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            safe = Path(path).suffix == '.safetensors'
            content = load_file(path) if safe else torch.load(path, 'cpu', weights_only=True)
    except Exception as e:  # of almost any kind. The rest of PyTorch's message is how to load without this protection
        reason = re.search(r'GLOBAL [\w.]+', str(e)) or re.match('[^.]*', str(e))
        raise ValueError(
            f'{path} is damaged, or holds more than the tensors, plain Python values and argparse.Namespace of a '
            f'checkpoint: {reason and reason[0] or type(e).__name__}. No code in it was run.') from e
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
    except RuntimeError as e:  # it names every tensor
        lines = sorted(str(e).split('\n\t')[1:], key=lambda line: 'key(s)' in line)  # shapes come first
        misfits = shorten(' '.join(lines), 300)
        raise ValueError(f'{path} does not fit the model, its size or other --model-kwargs: {misfits}') from e


def data_config(model: Any, args: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """timm's data configuration of a model as it is built; `args` are options of timm's scripts that replace it."""
    for name, values in ((k, v) for k, v in (args or {}).items() if k in ('mean', 'std') and v is not None):
        check(len(values) in (1, getattr(model, 'in_chans', 3)), f'--{name}', 'one value or one per channel', values)
    data = resolve_data_config(args, model=model)
    sized = model if hasattr(model, 'img_size') else getattr(model, 'patch_embed', None)
    size = getattr(sized, 'img_size', None) if getattr(sized, 'strict_img_size', True) else None
    data['input_size'] = (getattr(model, 'in_chans', data['input_size'][0]), *(size or data['input_size'][1:]))
    if data['input_size'][0] == 1:
        data.update({k: (sum(data[k]) / len(data[k]),) for k in ('mean', 'std')})
    return data


def load_model(
        name: str, /, pretrained: bool = False, checkpoint: Union[str, Path, None] = None, use_ema: bool = False,
        data: Optional[Dict[str, Any]] = None, **kwargs: Any,
) -> Any:
    """Create a model of timm. A checkpoint, or its moving average, is loaded if one is given: all keys must match.

    `data` are options of timm's scripts, such as `crop_pct`. The model's `pretrained_cfg` is for pictures of its own
    size and channels. Raises ValueError if the checkpoint is no file of weights that fit the model.
    """
    check(not Path(name).is_file(), 'The model', 'a name, weights are given by --checkpoint', name)
    check(not kwargs.get('features_only'), 'features_only', 'left out', True)
    check(bool(checkpoint) or not use_ema, '--use-ema', 'left out without a --checkpoint', use_ema)
    weights = read_weights(checkpoint, use_ema) if checkpoint else {}
    size = {'input_size': (3, *to_2tuple(kwargs['img_size']))} if 'img_size' in kwargs else {}
    model: Any = timm.create_model(name, pretrained=pretrained, **{**head_args(weights), **kwargs})
    if checkpoint:
        load_exactly(model, weights, checkpoint)
    model.pretrained_cfg = {**model.pretrained_cfg, **data_config(model, {**size, **(data or {})})}
    return model
