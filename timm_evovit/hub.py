"""Where weights come from, and the arguments that are saved beside them."""
import os
from dataclasses import replace
from typing import Any, Callable, Dict, Optional, Type

import timm.models
from timm.models import PretrainedCfg, build_model_with_cfg, register_model, resolve_pretrained_cfg
from torch import nn

NOT_MODEL_ARGS = (
    'device', 'dtype', 'cache_dir', 'num_classes', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_model_args',
    'pretrained_strict', 'weight_init')
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


class SavedArgs(nn.Module):
    """A model that knows its arguments. It adds `_current_args`, which timm's own methods may have changed since."""

    @property
    def model_args(self) -> Dict[str, Any]:
        """Arguments for `timm.create_model`, which has made this model, to build it as it is now.

        timm's `push_to_hf_hub` and `save_for_hf` write them into config.json if they are given them.
        """
        args = {**getattr(self, '_model_args', {}), **self._current_args()}
        args = {k: v.item() if hasattr(v, 'item') else v for k, v in args.items()}  # numpy's cannot be saved
        return {k: v for k, v in args.items() if k not in NOT_MODEL_ARGS and not k.endswith('_rate')}

    def _remember_args(self, **args: Any) -> None:
        """Record arguments in the attribute in which newer versions of timm record and look for them."""
        args = {k: v for k, v in args.items() if k not in NOT_MODEL_ARGS}
        self._model_args = {**getattr(self, '_model_args', {}), **args}

    def push_to_hf_hub(self, repo_id: str, *, model_args: Optional[Dict[str, Any]] = None, **kwargs: Any) -> Any:
        """Upload with timm's function of this name, `model_args` included; those given replace the model's own."""
        return timm.models.push_to_hf_hub(self, repo_id, model_args={**self.model_args, **(model_args or {})}, **kwargs)


def evo_cfg(**kwargs: Any) -> Dict[str, Any]:
    """Configuration that models of the paper share. Everything else is timm's default, such as a crop of 0.875."""
    return {
        'fixed_input_size': True, 'paper_ids': 'arXiv:2108.01390',
        'paper_name': 'Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer',
        'origin_url': 'https://github.com/YifanXu74/Evo-ViT', **kwargs}


def paper_cfg(name: str, **kwargs: Any) -> Dict[str, Any]:
    """Configuration of a model by its name and tag, which is `evovit_in1k` where the paper's weights are published."""
    if name not in PUBLISHED:
        return {f'{name}.untrained': evo_cfg(**kwargs)}
    org = os.environ.get(HUB_VARIABLE, '').strip('/')  # no default: anyone could register an unclaimed name
    return {f'{name}.evovit_in1k': evo_cfg(
        hf_hub_id=f'{org}/{name}.evovit_in1k' if org else None, license='mit',
        notes=(f'top-1 on ImageNet-1k as the paper reports it: {PUBLISHED[name][0]} %',), **kwargs)}


def resolve_weights(variant: str, pretrained: bool, kwargs: Dict[str, Any], fallback_hint: str) -> PretrainedCfg:
    """The configuration of a model and its weights. Takes `pretrained_cfg` and its overlay out of `kwargs`."""
    given = (kwargs.pop(k, None) for k in ('pretrained_cfg', 'pretrained_cfg_overlay'))
    cfg = resolve_pretrained_cfg(variant, *given)
    if cfg.url and cfg.source is None:
        cfg = replace(cfg, hf_hub_id=None)  # a url given by the user, no tag has one; timm would prefer the Hub
    if pretrained and cfg.tag == 'evovit_in1k' and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f"No weights are configured for {variant}.evovit_in1k. Set {HUB_VARIABLE} before timm is imported to an "
            f"organisation of the Hub that holds them, or run `timm-evovit convert {variant} --output DIR` and create "
            f"the model as 'local-dir:DIR'. Weights on the Hub: {fallback_hint}.")
    return cfg


def entry_point(create: Callable[..., nn.Module], variant: str, name: str) -> Any:
    """Register the entry point `name(pretrained=False, **kwargs)` of timm, which creates this variant."""
    def create_model(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(variant, pretrained, **kwargs)

    create_model.__name__ = create_model.__qualname__ = name
    create_model.__module__, create_model.__doc__ = create.__module__, create.__doc__
    return register_model(create_model)


def build_model(
        model_cls: Type[nn.Module], variant: str, pretrained: bool, pretrained_cfg: PretrainedCfg,
        filter_fn: Callable[..., Dict[str, Any]], out_indices: Any, **kwargs: Any) -> nn.Module:
    """timm's `build_model_with_cfg`, with feature extraction by `forward_intermediates` and the arguments recorded."""
    model = build_model_with_cfg(
        model_cls, variant, pretrained, pretrained_cfg=pretrained_cfg, pretrained_filter_fn=filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'), **kwargs)
    if hasattr(model, '_remember_args'):  # not in the wrapper of features_only
        model._remember_args(**kwargs)
    return model
