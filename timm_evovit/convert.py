"""The authors' checkpoints to a folder that timm, the Hugging Face Hub and transformers load.

Nothing in a checkpoint is run: only tensors, plain Python values and `argparse.Namespace` are read from it.
"""
import argparse
import codecs
import errno
import hashlib
import json
import os
import pickle
import pickletools
import re
import shutil
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import timm
import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from timm.models import clean_state_dict, is_model, list_models, save_for_hf, split_model_name_tag
from timm.models._hub import generate_readme

from .checkpoints import deit_checkpoint_filter_fn, levit_checkpoint_filter_fn, listed, rename_authors
from .evo_deit import EvoVisionTransformer
from .evo_levit import EvoLevit
from .hub import DRIVE_FILE, PUBLISHED

__all__ = [
    'Conversion', 'DamagedFile', 'convert', 'count_classes', 'download', 'read_checkpoint', 'select_weights', 'upload',
]

CITATION = """@inproceedings{xu2022evo,
  title={Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer},
  author={Xu, Yifan and Zhang, Zhijie and Zhang, Mengdan and Sheng, Kekai and Li, Ke and Dong, Weiming and Zhang, Liqing
    and Xu, Changsheng and Sun, Xing},
  booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
  year={2022}
}"""
FILTERS = {EvoVisionTransformer: deit_checkpoint_filter_fn, EvoLevit: levit_checkpoint_filter_fn}
DROPPED = {  # beginnings of keys that a model may have no place for, and why it has none
    'stage_blocks.': 'copies of tensors under blocks',
    'norm_cls.': 'assisted_cls=False, no class token branch',
    'head_cls': 'assisted_cls=False, no class token branch',
    'tradeoff': 'the tradeoff is a fixed number',
    'epochs_started': 'epochs that the weights were trained for, a new training starts from none',
}


class DamagedFile(ValueError):
    """Not a checkpoint, or not all of one."""


class Conversion(NamedTuple):
    """What was converted."""
    model: nn.Module
    output: Path  # folder with model.safetensors, config.json and README.md
    card: Dict[str, Any]  # model card as timm's push_to_hf_hub takes it
    source: str  # file and the entry that the weights are from
    found: int  # number of tensors in it
    written: int  # number of tensors in model.safetensors
    joined: int  # number of tensors that were joined to others
    dropped: Dict[str, List[str]]  # keys that were left out, by reason

    def report(self) -> str:
        """Every tensor accounted for, one line each kind."""
        lines = [f'{self.source}: {self.found} tensors']
        if self.joined:
            lines.append(f'  {self.joined} joined to others: value rows to query and key rows, or tradeoffs to one tensor')
        lines += [f'  {len(keys)} dropped, {why}: {listed(keys, 4)}' for why, keys in self.dropped.items()]
        if not self.dropped:
            lines.append('  none dropped')
        lines.append(f'{self.output}: {self.written} tensors, as many as the model has')
        return '\n'.join(lines)


def read_checkpoint(path: Union[str, Path]) -> Any:
    """Read what `torch.save` or safetensors wrote, and run nothing of it.

    Raises:
        OSError: The file cannot be read.
        DamagedFile: It is no checkpoint, or not a complete one.
        ValueError: It holds a type that is not read.
    """
    with open(path, 'rb') as f:
        start = f.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    size = os.path.getsize(path)
    if start[:1] == b'<':
        title = re.search(rb'<title>(.*?)</title>', start, re.IGNORECASE | re.DOTALL)
        title = f', "{title[1].decode(errors="replace").strip()}"' if title else ''
        raise DamagedFile(
            f'{path} is a web page{title} and not a checkpoint. Google Drive sends one when a file was downloaded too '
            f'often: try again in a day, or download it in a browser.')
    if Path(path).suffix == '.safetensors':
        try:
            return load_file(path)
        except SafetensorError as e:
            raise DamagedFile(f'{path} is not a safetensors file, or damaged: {e}') from e
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except MemoryError:
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.errno != errno.EINVAL:  # which is a position behind the end of the file
            raise
        if names := _foreign_types(path, e):
            raise ValueError(
                f'{path} holds {names}. Only tensors, plain Python values and argparse.Namespace are read from a '
                f'checkpoint, anything else could run code.') from e
        # what PyTorch says of it recommends to load it without these checks
        raise DamagedFile(
            f'{path} is not a PyTorch checkpoint, or damaged, or only the first part of one ({size} bytes): '
            f'download it again.') from e


def _foreign_types(path: Union[str, Path], error: Exception) -> str:
    """Names of the types in a checkpoint for which it was refused, if that was the reason."""
    if not isinstance(error, pickle.UnpicklingError):
        return ''
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # only what torch.save writes today can be searched
        names = []
    return ', '.join(sorted(names) or re.findall(r'GLOBAL (\S+)', str(error)) or _pickled_types(path))


def _pickled_types(path: Union[str, Path]) -> List[str]:
    """Names of the types in a pickle of protocol 4 or later, which PyTorch refuses without a word about them."""
    names, strings = [], []
    with open(path, 'rb') as f:
        try:
            for operation, argument, _ in pickletools.genops(f):
                if operation.name == 'STACK_GLOBAL':
                    names.append('.'.join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
        except ValueError:
            pass  # no pickle, or the end of one
    return names


def select_weights(checkpoint: Any, use_ema: bool, path: Union[str, Path]) -> Tuple[str, Dict[str, torch.Tensor]]:
    """Find the weights in a checkpoint.

    Args:
        checkpoint: What was read from the file.
        use_ema: Take the moving average of the weights.
        path: The file, to be named in errors.

    Returns:
        Name of the entry, '' for a file that holds nothing but weights, and the weights.

    Raises:
        ValueError: There are none.
    """
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}, a checkpoint is a dict.')
    entries = ('model_ema', 'state_dict_ema') if use_ema else ('model', 'state_dict')
    entry = next((e for e in entries if isinstance(checkpoint.get(e), dict)), '')
    weights = checkpoint[entry] if entry else checkpoint
    other = [str(k) for k, v in weights.items() if not isinstance(v, torch.Tensor)]
    if not entry and (use_ema or other or not weights):
        raise ValueError(f'{path} has no weights under {entries[0]!r}, it holds {listed(list(map(str, checkpoint)))}.')
    if other:
        raise ValueError(f'{entry!r} in {path} must hold tensors only, these are none: {listed(other)}.')
    return entry, clean_state_dict(weights)


def download(name: str) -> Path:
    """Download the authors' checkpoint of a model, or go on with a download, or find that it is there.

    Args:
        name: Model, one of `PUBLISHED`.

    Returns:
        The file, in PyTorch's download folder.

    Raises:
        ValueError: No checkpoint of the model was published.
        RuntimeError: gdown is missing, or the download failed.
    """
    if name not in PUBLISHED:
        raise ValueError(f'No checkpoint of {name} was published, there is one of {", ".join(PUBLISHED)}.')
    file_id = PUBLISHED[name][1]
    url = DRIVE_FILE.format(file_id)
    path = Path(torch.hub.get_dir(), 'checkpoints', f'{name}.evovit_in1k.pth')
    if path.is_file():
        return path
    try:
        import gdown
    except ImportError as e:
        raise RuntimeError(
            f"The download needs gdown: pip install gdown. Or download {url} in a browser and name "
            f'the file.') from e
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # without cookies gdown leaves no file in the home folder, and public files need none
        done = gdown.download(id=file_id, output=str(path), resume=True, use_cookies=False)
    except Exception as e:
        raise RuntimeError(
            f'{url} was not downloaded to {path}: {e}\nWhat has arrived is kept, the next try goes on from there. Or '
            f'download it in a browser and name the file.') from e
    if done is None:  # gdown before version 6 prints what is wrong
        raise RuntimeError(f'{url} was not downloaded to {path}. Download it in a browser and name the file.')
    return path


def _check_copies(weights: Dict[str, torch.Tensor]) -> List[str]:
    """Keys under `stage_blocks`, each of which must be a copy of a tensor under `blocks`.

    Raises:
        ValueError: One is not.
    """
    copies = [k for k in weights if k.startswith('stage_blocks.')]
    originals: Dict[Tuple[str, torch.Size], List[torch.Tensor]] = {}
    for key, value in weights.items():
        if key.startswith('blocks.'):
            originals.setdefault((key.rpartition('.')[2], value.shape), []).append(value)
    for key in copies:
        value = weights[key]
        if not any(torch.equal(value, v) for v in originals.get((key.rpartition('.')[2], value.shape), [])):
            raise ValueError(f'{key} was expected to be a copy of a tensor under blocks, and is not.')
    return copies


def _variant(name: str, model_kwargs: Dict[str, Any]) -> str:
    """The full name of a model.

    Raises:
        ValueError: There is no such model, it is not one of ours, or does not take the arguments.
    """
    name = split_model_name_tag(name)[0]
    if not is_model(name):
        raise ValueError(f'There is no model {name!r}, there are {", ".join(list_models("evo_*"))}.')
    try:
        model = timm.create_model(name, device='meta', **model_kwargs)
    except TypeError as e:
        raise ValueError(f'{name}: {e}') from e
    if type(model) not in FILTERS:
        raise ValueError(f'{name} is a {type(model).__name__}, convert takes {", ".join(list_models("evo_*"))}.')
    return model.pretrained_cfg['architecture']


def count_classes(weights: Dict[str, torch.Tensor]) -> Optional[int]:
    """Number of classes that weights under any naming tell apart, None if they have no head."""
    names = ('head.weight', 'head.linear.weight', 'head.l.weight')
    head = next((weights[k] for k in names if k in weights), None)
    return None if head is None or head.ndim != 2 else head.shape[0]


def _build(variant: str, weights: Dict[str, torch.Tensor], model_kwargs: Dict[str, Any]) -> nn.Module:
    """The model that weights are of, with as many classes as they have."""
    if classes := count_classes(weights):
        model_kwargs = {'num_classes': classes, **model_kwargs}
    return timm.create_model(variant, pretrained_cfg='evovit_in1k' if variant in PUBLISHED else None, **model_kwargs)


def _load(model: nn.Module, weights: Dict[str, torch.Tensor]) -> Tuple[int, Dict[str, List[str]]]:
    """Load weights under any naming into the model, with nothing adapted and nothing lost.

    Returns:
        Number of tensors that were joined to others, and keys that were left out, by reason.

    Raises:
        ValueError: They are not those of the model.
    """
    copies = _check_copies(weights)
    renamed = rename_authors(weights)
    converted = FILTERS[type(model)](dict(weights), model)
    adapted = [
        f'{k} {tuple(v.shape)} instead of {tuple(converted[k].shape)}'
        for k, v in renamed.items() if k in converted and v.shape != converted[k].shape
    ] + [f'{k} is missing' for k in converted if k not in renamed]
    if adapted:
        raise ValueError(f'The checkpoint is of another {type(model).__name__}: {listed(adapted)}.')
    try:
        model.load_state_dict(converted)
    except RuntimeError as e:
        raise ValueError(str(e)) from e

    left_out = copies + [k for k in renamed if k not in converted]
    dropped: Dict[str, List[str]] = {}
    for key in left_out:
        why = next(why for start, why in DROPPED.items() if key.startswith(start))
        dropped.setdefault(why, []).append(key)
    everything = {**weights, **renamed}
    lost = sum(v.numel() for v in weights.values()) - sum(v.numel() for v in converted.values()) - sum(
        everything[k].numel() for k in left_out)
    if lost:
        raise ValueError(f'{abs(lost)} numbers of the checkpoint are {"not" if lost > 0 else "twice"} in the model.')
    return len(weights) - len(copies) - len(renamed), dropped


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _card(model: nn.Module, source: str, digest: str, authors: bool) -> Dict[str, Any]:
    """Model card for timm's `generate_readme`; only of the authors' weights is the licence known."""
    cfg = model.pretrained_cfg
    name = cfg['architecture']
    params = sum(p.numel() for p in model.parameters()) / 1e6
    return {
        'license': 'mit' if authors else 'unknown',
        'description': f"Evo-ViT, slow-fast token evolution: {name}, converted by timm-evovit from a checkpoint of "
                       + ("the authors' implementation." if authors else 'timm.'),
        'details': {
            'Model Type': 'Image classification / feature backbone',
            'Model Stats': [
                f'Params (M), those of the class token branch included: {params:.2f}',
                f"Image size: {' x '.join(map(str, model.model_args['img_size']))}",
                f'Classes: {model.num_classes}',
            ],
            'Papers': [f"{cfg['paper_name']}: https://arxiv.org/abs/{cfg['paper_ids'].partition(':')[2]}"],
            'Original': cfg['origin_url'],
            'Weights': [f'{source}, sha256 {digest}', *cfg.get('notes', ()), 'not evaluated by the conversion'],
        },
        'usage': "```python\n# with timm-evovit installed\nimport timm\n\n"
                 "model = timm.create_model('local-dir:FOLDER', pretrained=True)  # or 'hf-hub:ORGANISATION/NAME'\n```",
        'citation': CITATION,
    }


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f'{output} exists and is not an empty folder, remove it or name another.')


def _write(model: nn.Module, card: Dict[str, Any], output: Path) -> int:
    """Write the folder beside its place and move it there when it is complete."""
    expected = model.state_dict()
    partial = output.with_name(f'.{output.name}.{os.getpid()}.partial')
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_for_hf(model, partial, model_args=model.model_args, safe_serialization=True)
        config_path = partial / 'config.json'
        config = json.loads(config_path.read_text(encoding='utf-8'))
        # timm reads it one level higher, and transformers would give it to timm twice
        config['model_args'].pop('num_classes', None)
        config_path.write_text(json.dumps(config, indent=2), encoding='utf-8')
        (partial / 'README.md').write_text(generate_readme(card, output.name), encoding='utf-8')
        written = load_file(partial / 'model.safetensors')
        if written.keys() != expected.keys() or not all(
                torch.allclose(v, expected[k], rtol=0, atol=0, equal_nan=True) for k, v in written.items()):
            raise OSError('what was written reads back as something else')
        if output.exists():
            output.rmdir()  # an empty folder; replaced by renaming on some systems only
        partial.rename(output)
    except (OSError, SafetensorError) as e:
        size = sum(v.numel() * v.element_size() for v in expected.values())
        raise OSError(
            f'{output} could not be written, {size / 1e6:.0f} MB are needed in {output.parent}: {e}. Nothing was left '
            f'there.') from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(written)


def convert(
        name: str,
        checkpoint: Optional[Union[str, Path]],
        output: Union[str, Path],
        use_ema: bool = False,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> Conversion:
    """Convert a checkpoint to model.safetensors, config.json and a model card.

    Args:
        name: Model, one of timm's names of an Evo-ViT.
        checkpoint: File of the authors' code or of timm's train.py, None to download the published one.
        output: Folder to write, which must not exist or be empty.
        use_ema: Take the moving average of the weights.
        model_kwargs: Arguments of the model that the weights are of, where they are not the published ones.

    Raises:
        OSError: A file cannot be read or written.
        RuntimeError: The download failed.
        ValueError: The checkpoint is damaged, of another model, or holds a type that is not read.
    """
    output = Path(os.path.abspath(output))
    _check_output(output)
    model_kwargs = dict(model_kwargs or {})
    variant = _variant(name, model_kwargs)
    path = Path(checkpoint) if checkpoint is not None else download(variant)
    try:
        content = read_checkpoint(path)
    except DamagedFile:
        if checkpoint is None:
            path.unlink()  # or it would be found again
        raise
    entry, weights = select_weights(content, use_ema, path)
    model = _build(variant, weights, model_kwargs)
    joined, dropped = _load(model, weights)
    authors = rename_authors(weights) is not weights
    if use_ema or model_kwargs or model.num_classes != 1000 or not authors:
        model.pretrained_cfg.pop('notes', None)  # of the published weights

    source = f'{path.name} ({entry})' if entry else path.name
    card = _card(model, source, _sha256(path), authors)
    written = _write(model, card, output)
    return Conversion(model, output, card, source, len(weights), written, joined, dropped)


def upload(conversion: Conversion, repo_id: str) -> None:
    """Upload what was converted to the Hugging Face Hub, with the token that is stored on this machine.

    Args:
        conversion: What `convert` returned.
        repo_id: Repository, 'organisation/name'; created if it does not exist.

    Raises:
        OSError: The Hub could not be reached or does not allow it.
    """
    try:
        conversion.model.push_to_hf_hub(repo_id, model_card=conversion.card, safe_serialization=True)
        HfApi().upload_file(  # the one that transformers reads too
            path_or_fileobj=conversion.output / 'config.json', path_in_repo='config.json', repo_id=repo_id,
            commit_message='Configuration for timm and transformers')
    except Exception as e:  # of several HTTP libraries
        raise OSError(
            f'{repo_id} was not uploaded: {e}\n{conversion.output} is complete, to try again: '
            f"timm.create_model('local-dir:{conversion.output}', pretrained=True).push_to_hf_hub('{repo_id}')") from e
