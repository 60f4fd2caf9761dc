"""Convert the authors' checkpoints to folders that timm, the Hugging Face Hub and transformers load."""
import argparse
import hashlib
import json
import re
import tempfile
from pathlib import Path
from textwrap import shorten
from typing import Any, Dict, List, Optional, Union

import timm
import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict, list_models, save_for_hf, split_model_name_tag
from timm.models._hub import generate_readme

from ..checkpoints import rename_authors
from ..hub import PUBLISHED

DROPPED = {  # tensors that a model may lack: why, and the beginnings of their keys
    'copies of tensors under blocks': ('stage_blocks.',),
    'assisted_cls=False, no class token branch': ('norm_cls.', 'head_cls'),
    'the tradeoff is a fixed number': ('tradeoff',),
    'count of the epochs of training': ('epochs_started',),
}


def read_weights(path: Union[str, Path], use_ema: bool = False) -> Dict[str, torch.Tensor]:
    """Read the weights from a file of `torch.save` or safetensors. No code in the file is run.

    Args:
        path: Checkpoint of the authors' code or of timm, or a state dict.
        use_ema: Take the moving average of the weights.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, holds types that are not read, or no weights.
    """
    with open(path, 'rb') as f:
        start = f.read(100)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            safe = Path(path).suffix == '.safetensors'
            content = load_file(path) if safe else torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # a damaged file can make PyTorch raise almost anything
        # PyTorch's message goes on with how to load the file without this protection
        if refused := re.search(r'GLOBAL .*?(?=\.\s|\.?$)', str(e), re.MULTILINE):
            raise ValueError(
                f'{path} is refused, no code in it was run: {refused[0]}. Only tensors, plain Python values and '
                f'argparse.Namespace are read from a checkpoint.') from e
        reason = str(e).partition('. ')[0] if ' ' in str(e) else type(e).__name__
        if start.lstrip().startswith(b'<'):
            reason = 'it is a web page, as Google Drive sends one in place of a file that was downloaded too often'
        raise ValueError(
            f'{path} is not a checkpoint, or damaged or incomplete: {reason}. If it was downloaded, remove it and try '
            f'again.') from e

    keys = ('model_ema', 'state_dict_ema') if use_ema else ('model', 'state_dict', '')
    entries = content if isinstance(content, dict) else {}
    for key in keys:
        weights = entries.get(key) if key else content
        if isinstance(weights, dict) and weights and all(
                isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
            return clean_state_dict(weights)
    found = shorten(', '.join(map(str, entries)), 100) or f'a {type(content).__name__}'
    raise ValueError(f'{path} has no dict of tensors under {" or ".join(keys[:2])}, it holds {found}.')


def count_classes(weights: Dict[str, torch.Tensor]) -> Optional[int]:
    """Number of classes of a state dict under timm's or the authors' names, None if it has no head."""
    names = ('head.weight', 'head.linear.weight', 'head.l.weight')
    return next((weights[k].shape[0] for k in names if k in weights and weights[k].ndim == 2), None)


def _download(name: str) -> Path:
    """Download the authors' checkpoint of a model to PyTorch's download folder, unless it is there."""
    if name not in PUBLISHED:
        raise ValueError(f'No checkpoint of {name} was published, only {", ".join(PUBLISHED)}.')
    file_id = PUBLISHED[name][1]
    path = Path(torch.hub.get_dir(), 'checkpoints', f'{name}.evovit_in1k.pth')
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import gdown
        # public files need no cookies, and gdown would store them in the home folder
        if gdown.download(id=file_id, output=str(path), resume=True, use_cookies=False) is None:
            raise RuntimeError('gdown returned no file')  # gdown before version 6 prints the reason
    except Exception as e:
        raise RuntimeError(
            f'{path} was not downloaded: {e}\nThe download needs gdown (pip install gdown). Run the command again to '
            f'resume it, or pass the file of https://drive.google.com/file/d/{file_id}/view, downloaded in a browser.'
        ) from e
    return path


def load_exactly(model: torch.nn.Module, weights: Dict[str, torch.Tensor], path: Union[str, Path]) -> None:
    """Load the weights of a file without dropping or resampling any. A ValueError says what does not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:  # it names every tensor
        raise ValueError(
            f'{path} does not fit the model. It may be of another model, readout (global_pool) or image size: '
            f'{shorten(str(e), 500)}') from e


def _load(model: torch.nn.Module, weights: Dict[str, torch.Tensor], path: Path) -> List[str]:
    """Load weights under any names into the model, and report the tensors that were joined or dropped."""
    copies = {k: v for k, v in weights.items() if k.startswith('stage_blocks.')}  # of the authors' LeViT
    renamed = {**rename_authors(weights), **copies}
    lines = []
    if joined := len(weights) - len(renamed):
        lines.append(f'  {joined} joined with others, such as a value with its query and key, to one tensor')
    own = model.state_dict()
    for why, starts in DROPPED.items():
        if keys := [k for k in renamed if k.startswith(starts) and k not in own]:
            lines.append(f'  {len(keys)} dropped, {why}: {shorten(", ".join(keys), 100)}')
            renamed = {k: v for k, v in renamed.items() if k not in keys}
    load_exactly(model, renamed, path)
    return lines


def convert(
        name: str,
        checkpoint: Optional[Union[str, Path]],
        output: Union[str, Path],
        use_ema: bool = False,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> str:
    """Convert a checkpoint to model.safetensors, config.json and a model card.

    Args:
        name: Name of an Evo-ViT in timm.
        checkpoint: File of the authors' code or of timm's train.py, None to download the published one.
        output: Folder to write, new or empty.
        use_ema: Take the moving average of the weights.
        model_kwargs: Arguments of the model, if they differ from the published ones.

    Returns:
        Report on what became of every tensor.

    Raises:
        OSError: A file cannot be read or written.
        RuntimeError, ValueError: The download failed, or the file is refused, damaged or of another model.
    """
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f'{output} exists and is not an empty folder, remove it or name another.')
    names = list_models(module=['evo_deit', 'evo_levit'])
    if split_model_name_tag(name)[0] not in names:
        raise ValueError(f'{name} cannot be converted, only {", ".join(names)}.')
    kwargs = dict(model_kwargs or {})
    # before a download: wrong arguments fail here, and the download needs the full name
    model: Any = timm.create_model(name, device='meta', **kwargs)
    variant = model.pretrained_cfg['architecture']
    path = Path(checkpoint) if checkpoint is not None else _download(variant)
    weights = read_weights(path, use_ema)
    if classes := count_classes(weights):
        kwargs.setdefault('num_classes', classes)
    model = timm.create_model(variant, pretrained_cfg='evovit_in1k' if variant in PUBLISHED else None, **kwargs)
    lines = _load(model, weights, path)

    cfg, authors = model.pretrained_cfg, rename_authors(weights) is not weights
    if checkpoint is not None or use_ema or model_kwargs:
        cfg.pop('notes', None)  # they describe the published weights
    for key in () if authors else ('tag', 'license', 'origin_url'):
        cfg.pop(key, None)
    source = f'{path.name} (moving average)' if use_ema else path.name
    card = {
        'license': 'mit' if authors else 'unknown',
        'description': f'{variant}, converted by timm-evovit. To load it, timm needs timm-evovit. Not evaluated.',
        'details': {
            'Papers': [f"{cfg['paper_name']}: https://arxiv.org/abs/{cfg['paper_ids'].partition(':')[2]}"],
            'Weights': [f'{source}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}', *cfg.get('notes', ())],
        },
    }
    _write(model, card, output)
    return '\n'.join([f'{source}: {len(weights)} tensors', *lines, f'{output}: {len(model.state_dict())} tensors'])


def _write(model: Any, card: Dict[str, Any], output: Path) -> None:
    """Write the folder beside its place and move it there when it is complete."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{output.name}.', dir=output.parent) as folder:
            partial = Path(folder, output.name)
            save_for_hf(model, str(partial), model_args=model.model_args, safe_serialization=True)
            config = json.loads((partial / 'config.json').read_text(encoding='utf-8'))
            config['model_args'].pop('num_classes', None)  # transformers would pass it to timm twice
            (partial / 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')
            (partial / 'README.md').write_text(generate_readme(card, output.name), encoding='utf-8')
            if output.exists():
                output.rmdir()  # it is empty; renaming does not replace it on every system
            partial.rename(output)
    except (OSError, SafetensorError) as e:
        raise OSError(f'{output} could not be written, nothing was left there: {e}') from e


def upload(folder: Union[str, Path], repo_id: str) -> None:
    """Upload a converted folder to the Hugging Face Hub, where an existing model card is kept."""
    try:
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        keep = ['README.md'] if api.file_exists(repo_id, 'README.md') else None
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=keep, commit_message='Add model')
    except Exception as e:  # of several HTTP libraries
        raise OSError(
            f'{repo_id} was not uploaded: {e}\n{folder} is complete, try again: hf upload {repo_id} {folder} .') from e
