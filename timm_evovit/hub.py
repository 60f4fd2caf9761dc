"""Where weights come from, and what a model takes along when it goes to the Hugging Face Hub."""
import os
from dataclasses import replace
from typing import Any, Dict, Optional, Union

import torch
from torch import nn
import timm.models
from timm.models import PretrainedCfg, resolve_pretrained_cfg

from .checkpoints import rename_authors

__all__ = ['DRIVE_FILE', 'HUB_VARIABLE', 'HubModel', 'PUBLISHED', 'build_args', 'published', 'resolve_weights']

HUB_VARIABLE = 'TIMM_EVOVIT_HUB'
DRIVE_FILE = 'https://drive.google.com/file/d/{}/view'
PUBLISHED = {  # the authors' checkpoints: ImageNet-1k top-1 in the paper, file on Google Drive
    'evo_deit_tiny_patch16_224': (72.0, '1AL4uHGHvCoFXkrtHRgf4XmurgRs5-qab'),
    'evo_deit_small_patch16_224': (79.4, '1AiD1J-z9klr72-zczkJzX1HHVlxO7iin'),
    'evo_deit_base_patch16_224': (81.3, '15EmMKb4L5IjHqnMYQHVNYZGRRGdByTsz'),
    'evo_deit_base_patch16_384': (82.0, '1MBSH4Fx8Bq9cgGhktvYAb23EFioiv2y2'),
    'evo_levit_128s': (73.0, '1urqO1OqpMK8_Y3E7hQilLkCT9hsTv7ST'),
    'evo_levit_128': (74.4, '1rvMe1Iz_9d6meAbbov25pblCeQ7Q0tt2'),
    'evo_levit_192': (76.8, '1tWcgm3Z3WSaY4awycLwY4Jc1j_dIIOxn'),
    'evo_levit_256': (78.8, '1CG-MLsPhKzs1CI613sQoW0Q7fPUuLBOP'),
    'evo_levit_384': (80.7, '1cFmHWSCHeTaS4o5zL_qAc2tkWUugxvQh'),
    'evo_levit_256_384': (81.1, '1MHHljQCzz-L6Sj18vq7QrQHhn4YvWjn8'),
    'evo_levit_384_384': (82.2, '1YzLPOLMLSymLzIdMqYol1HI7MwO35_7j'),
}


def published(name: str) -> Dict[str, Any]:
    """What a tag `evovit_in1k` says of the paper's weights of a model.

    They are on the Hub only where somebody has put them, so it is the user who names the organisation: a name written
    down here that nobody owns could be claimed by anyone.
    """
    top1, _ = PUBLISHED[name]
    org = os.environ.get(HUB_VARIABLE, '').strip('/')
    return dict(
        hf_hub_id=f'{org}/{name}.evovit_in1k' if org else None,
        license='mit',
        notes=(f'top-1 on ImageNet-1k as the paper reports it: {top1} %',),
    )


def resolve_weights(
        variant: str,
        pretrained: bool,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]],
        pretrained_cfg_overlay: Optional[Dict[str, Any]],
        instead: str,
) -> PretrainedCfg:
    """The configuration that a model is built with and its weights are loaded by.

    Args:
        variant: Name of the model.
        pretrained: Weights are asked for.
        pretrained_cfg: Tag or configuration, as given to timm.
        pretrained_cfg_overlay: What replaces parts of it.
        instead: Weights on the Hub to propose where there are none.

    Raises:
        RuntimeError: The paper's weights are asked for and nobody has said where they are.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    if cfg.url and cfg.source is None:
        cfg = replace(cfg, hf_hub_id=None)  # no tag has a url, so this one was handed over; timm would prefer the Hub
    if pretrained and cfg.tag == 'evovit_in1k' and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f"Nobody has said where the weights {variant}.evovit_in1k are. Three ways: set {HUB_VARIABLE}, before timm "
            f"is imported, to an organisation of the Hugging Face Hub that holds them; or convert the authors' file, "
            f"`timm-evovit convert {variant} --output DIR`, and create the model as 'local-dir:DIR'; or use weights "
            f"that are on the Hub, {instead}.")
    return cfg


def build_args(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Those arguments of an entry point that say what model it is, and not where, or what it is built for.

    The number of classes is not among them: timm saves it in a place of its own.
    """
    other = (
        'device', 'dtype', 'cache_dir', 'num_classes', 'pretrained_model_args', 'pretrained_strict', 'weight_init')
    return {k: v for k, v in kwargs.items() if k not in other and not k.endswith('_rate')}


class HubModel(nn.Module):
    """A model that finds its way back from the Hub, to be inherited from.

    `_model_args` holds the arguments it was built with. The name is timm's: its later versions look there when they
    save a model, so that their own `push_to_hf_hub` needs to be told nothing.
    """

    @property
    @torch.jit.unused
    def model_args(self) -> Dict[str, Any]:
        """Arguments that make `timm.create_model` build this model as it is now.

        For timm's `push_to_hf_hub` and `save_for_hf`, which write them into config.json.
        """
        return {**build_args(getattr(self, '_model_args', {})), **self._current_args()}

    @torch.jit.ignore
    def _current_args(self) -> Dict[str, Any]:
        """Arguments that timm's own methods may have changed since; the model's part."""
        raise NotImplementedError

    @torch.jit.ignore
    def _remember_args(self, **args: Any) -> None:
        """Take down arguments that the model is, or is from now on, as if built with."""
        self._model_args = {**getattr(self, '_model_args', {}), **build_args(args)}

    @torch.jit.ignore
    def push_to_hf_hub(self, repo_id: str, *, model_args: Optional[Dict[str, Any]] = None, **kwargs: Any) -> Any:
        """Upload with timm's function of this name, `model_args` included.

        Args:
            repo_id: Repository on the Hub, 'organisation/name'.
            model_args: Arguments that take the place of the model's own.
            **kwargs: Arguments of timm's function.
        """
        return timm.models.push_to_hf_hub(self, repo_id, model_args={**self.model_args, **(model_args or {})}, **kwargs)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        # the authors' files load like timm's own where no filter comes first: `validate.py --checkpoint`
        own = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
        renamed = rename_authors(own)
        if renamed is not own:
            for key in own:
                del state_dict[prefix + key]
            state_dict.update((prefix + k, v) for k, v in renamed.items())
        super()._load_from_state_dict(state_dict, prefix, *args)
