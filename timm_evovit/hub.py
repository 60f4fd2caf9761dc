"""Where weights come from."""
import os
from dataclasses import replace
from typing import Any, Callable, Dict, Type

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from .base import EvolvingModel

HUB_VARIABLE = 'TIMM_EVOVIT_HUB'
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


def evo_cfg(**kwargs: Any) -> Dict[str, Any]:
    """Configuration with the defaults of the paper."""
    return {
        'url': '',
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': None,
        'crop_pct': .875, 'interpolation': 'bicubic', 'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'paper_ids': 'arXiv:2108.01390',
        'paper_name': 'Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer',
        'origin_url': 'https://github.com/YifanXu74/Evo-ViT',
        **kwargs
    }


def published_cfg(name: str) -> Dict[str, Any]:
    """Configuration of the paper's weights, tag `evovit_in1k`.

    There is no default organisation: anyone could register an unclaimed name.
    """
    top1, _ = PUBLISHED[name]
    org = os.environ.get(HUB_VARIABLE, '').strip('/')
    return dict(
        hf_hub_id=f'{org}/{name}.evovit_in1k' if org else None,
        license='mit',
        notes=(f'top-1 on ImageNet-1k as the paper reports it: {top1} %',),
    )


def resolve_weights(variant: str, pretrained: bool, kwargs: Dict[str, Any], fallback_hint: str) -> PretrainedCfg:
    """The configuration that a model is built with and its weights are loaded by.

    `pretrained_cfg` and `pretrained_cfg_overlay` are taken out of `kwargs`.

    Raises:
        RuntimeError: No weights are configured. The message names those of `fallback_hint`.
    """
    cfg = resolve_pretrained_cfg(
        variant, kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None))
    if cfg.url and cfg.source is None:
        cfg = replace(cfg, hf_hub_id=None)  # a url given by the user, no tag has one; timm would prefer the Hub
    if pretrained and cfg.tag == 'evovit_in1k' and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f"No weights are configured for {variant}.evovit_in1k. Either set {HUB_VARIABLE}, before timm is imported, "
            f"to an organisation of the Hugging Face Hub that holds them; or convert the authors' file, `timm-evovit "
            f"convert {variant} --output DIR`, and create the model as 'local-dir:DIR'. Weights on the Hub: "
            f"{fallback_hint}.")
    return cfg


def build_model(
        model_cls: Type[EvolvingModel],
        variant: str,
        pretrained: bool,
        pretrained_cfg: PretrainedCfg,
        filter_fn: Callable[..., Dict[str, Any]],
        out_indices: Any,
        **kwargs: Any,
) -> nn.Module:
    """timm's `build_model_with_cfg`, with feature extraction by `forward_intermediates` and the arguments recorded."""
    model = build_model_with_cfg(
        model_cls, variant, pretrained, pretrained_cfg=pretrained_cfg, pretrained_filter_fn=filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'), **kwargs)
    if isinstance(model, EvolvingModel):
        model._remember_args(**kwargs)
    return model
