"""Convert the authors' checkpoints to folders that timm, the Hugging Face Hub and transformers load."""
import json
import shutil
from pathlib import Path
from typing import Any, Dict, Optional, Union

import timm
import torch
from timm.models import save_for_hf
from timm.models._hub import generate_readme

from ..base import check
from ..checkpoints import OPTIONAL
from ..hub import PUBLISHED
from .load import head_args, load_exactly, read_weights


def _download(name: str) -> Path:
    """Download the authors' checkpoint of a model to PyTorch's download folder, unless it is there."""
    check(name in PUBLISHED, 'A published model', f'one of {", ".join(PUBLISHED)}', name)
    path = Path(torch.hub.get_dir(), 'checkpoints', f'{name}.evovit_in1k.pth')
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import gdown
        gdown.download(id=PUBLISHED[name][1], output=str(path), resume=True, use_cookies=False)
        return path.resolve(strict=True)  # gdown before version 6 prints why there is no file
    except Exception as e:
        page = f'https://drive.google.com/file/d/{PUBLISHED[name][1]}/view'
        raise RuntimeError(f'{path} was not downloaded: {e}\nThe download needs gdown (pip install gdown). Run the '
                           f'command again, or pass the file of {page}, from a browser.') from e


def convert(
        name: str, checkpoint: Optional[Union[str, Path]], output: Union[str, Path], use_ema: bool = False,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> str:
    """Convert a checkpoint of the authors or timm, by default the published one, to a folder. Returns what it drops."""
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f'{output} exists and is not an empty folder, remove it or name another.')
    model_kwargs = model_kwargs or {}
    check(not Path(name).is_file(), 'The first argument', 'the name of a model, before the file of weights', name)
    model: Any = timm.create_model(name, device='meta', **model_kwargs)  # before a download: wrong ones fail here
    check(hasattr(model, 'rename_authors'), 'The model to be converted', 'an Evo-DeiT or Evo-LeViT', name)
    variant = model.pretrained_cfg['architecture']
    path = Path(checkpoint) if checkpoint is not None else _download(variant)
    weights = read_weights(path, use_ema)
    kwargs = {'pretrained_cfg': 'evovit_in1k' if variant in PUBLISHED else None, **head_args(weights), **model_kwargs}
    model = timm.create_model(variant, **kwargs)
    renamed, own, cfg = model.rename_authors(weights), model.state_dict(), model.pretrained_cfg
    dropped = [k for k in renamed if k not in own and k.startswith(OPTIONAL)]
    load_exactly(model, {k: v for k, v in renamed.items() if k not in dropped}, path)

    if checkpoint is not None or use_ema or model_kwargs:
        cfg.pop('notes', None)  # they describe the published weights
    for key in () if renamed is not weights else ('tag', 'license', 'origin_url'):
        cfg.pop(key, None)
    card = {
        'license': cfg.get('license', 'unknown'),
        'description': f'{variant}, converted by timm-evovit, which timm needs to load it. Not evaluated.',
        'details': {'Weights': [path.name, *cfg.get('notes', ())]}}
    try:
        save_for_hf(model, str(output), model_args=model.model_args, safe_serialization=True)
        config = json.loads((output / 'config.json').read_text(encoding='utf-8'))
        config['model_args'].pop('num_classes', None)  # transformers would pass it to timm twice
        (output / 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')
        (output / 'README.md').write_text(generate_readme(card, output.name), encoding='utf-8')
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    left_out = f'; dropped, as the model has none: {", ".join(dropped)}' if dropped else ''
    return f'{path.name}: {len(weights)} tensors\n{output}: {len(own)} tensors{left_out}'
