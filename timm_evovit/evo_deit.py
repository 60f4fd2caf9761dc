"""Evo-DeiT - DeiT with slow-fast token evolution

Paper: `Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390

Yifan Xu, Zhijie Zhang, Mengdan Zhang, Kekai Sheng, Ke Li, Weiming Dong, Liqing Zhang, Changsheng Xu, Xing Sun.
"""
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from . import training
from .checkpoints import deit_checkpoint_filter_fn as checkpoint_filter_fn
from .evo_vit import EvolvingVit
from .hub import build_model, evo_cfg, published_cfg, resolve_weights

__all__ = ['EvoVisionTransformer']  # register_model will add each entrypoint fn to this


class EvoVisionTransformer(EvolvingVit, VisionTransformer):
    """Vision Transformer with slow-fast token evolution.

    Class attention tells informative patches from placeholders. Informative patches go through the blocks,
    placeholders wait or are updated by one representative token; at the end of every stage the patch grid is complete.
    Attention masks are not taken: they could not follow the selected tokens.
    """

    def __init__(
            self,
            *args: Any,
            keep_ratio: Union[float, Sequence[float]] = 0.5,
            stages: Optional[Sequence[int]] = None,
            slow_tokens: str = 'attention',
            representative_token: bool = False,
            tradeoff: Optional[Union[float, Sequence[float]]] = None,
            selection: str = 'stage',
            assisted_cls: bool = True,
            layer_to_stage_epochs: int = 0,
            **kwargs: Any,
    ) -> None:
        """
        Args:
            keep_ratio: Ratio of slow tokens to patches in (0, 1], one for all evolution stages or one per stage. By
                similarity, one is the geometric mean of a series, to three decimals, that falls by the same factor from
                block to block.
            stages: First block of each evolution stage, ascending. Default for 12 blocks: (4, 8), by similarity
                (1, 3, 6, 9).
            slow_tokens: Find slow tokens by class 'attention' (paper) or by 'similarity', where like patches share one.
                `representative_token`, `tradeoff`, `selection` and `layer_to_stage_epochs` are of the former only.
            tradeoff: Weight in [0, 1] of a block's class attention in the global class attention, one for all blocks
                or one per block. Default: 1 before the first stage, 0.5 after.
            selection: When informative patches are selected anew, at each 'stage' or before each 'layer' of it.
            representative_token: Update placeholders by a representative token (paper), or leave them as they are
                until the stage ends. False by default, as in the authors' DeiT code and weights; their LeViT has one.
            assisted_cls: With 'avg' pooling, classify the class token as well while training, with a norm and head
                of its own (paper section 'Assisted CLS token loss').
            layer_to_stage_epochs: Select layer-wise in so many epochs of training, then stage-wise (paper section
                'Layer-to-stage training schedule'; 200 of 300 epochs there).
            *args, **kwargs: Arguments of timm's VisionTransformer. `global_pool` is 'avg' by default, as in the paper.

        Raises:
            TypeError, ValueError: An argument is of the wrong kind, out of range or of the wrong length.
        """
        weight_init = kwargs.pop('weight_init', '')
        if len(args) < 5:
            kwargs.setdefault('global_pool', 'avg')
        super().__init__(*args, weight_init='skip', **kwargs)

        self._evolve_blocks(
            keep_ratio, stages, slow_tokens, representative_token, tradeoff,
            selection=selection, assisted_cls=assisted_cls, layer_to_stage_epochs=layer_to_stage_epochs)
        self._reset_cls_head()

        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    def _reset_cls_head(self) -> None:
        """Give the class token a norm and a classifier where it has something to assist."""
        if self.cls_token is not None and self.assisted_cls and self.global_pool == 'avg' and self.num_classes > 0:
            if getattr(self, 'norm_cls', None) is None:
                self.norm_cls = deepcopy(self.fc_norm)
            self.head_cls = nn.Linear(
                self.embed_dim, self.num_classes, device=self.cls_token.device, dtype=self.cls_token.dtype)
            self.head_cls.train(self.training)
        else:
            self.norm_cls = None
            self.head_cls = None

    @torch.jit.unused
    def group_matcher(self, coarse: bool = False) -> Dict[str, Union[str, List]]:
        matcher = super().group_matcher(coarse)
        matcher['blocks'][-1] = (r'^norm\.', (99999,))  # norm_cls belongs to the head, as fc_norm does
        return matcher

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self._reset_cls_head()

    def forward_head(
            self,
            x: torch.Tensor,
            pre_logits: bool = False,
    ) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
        """Tokens (B, N, C) to logits (B, num_classes).

        In training mode with an assisted class token, each sample is answered by one of two heads, see `mix_heads`.
        """
        features = self.head_drop(self.fc_norm(self.pool(x)))
        if pre_logits:
            return features
        logits = self.head(features)
        if self.head_cls is None or not self.is_assisted():
            return logits
        logits_cls = self.head_cls(self.head_drop(self.norm_cls(x[:, 0])))
        if self.assisted_training and not torch.jit.is_scripting():
            return logits, logits_cls
        return training.mix_heads(logits, logits_cls)


model_cfgs = dict(
    tiny=dict(embed_dim=192, depth=12, num_heads=3),
    small=dict(embed_dim=384, depth=12, num_heads=6),
    base=dict(embed_dim=768, depth=12, num_heads=12),
)


def _create_evo_deit(variant: str, pretrained: bool = False, **kwargs: Any) -> EvoVisionTransformer:
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cfg = resolve_weights(
        variant, pretrained, kwargs, f'{variant}.fb_in1k, which is DeiT made faster without training')
    deit = default_cfgs[variant].cfgs.get('fb_in1k')
    if pretrained and (cfg.hf_hub_id or '').partition('@')[0] in _deit_weights and not (cfg.file or cfg.state_dict):
        kwargs.setdefault('global_pool', 'token')  # what DeiT's norm and head were trained for
    elif (deit is not None and cfg.tag == 'fb_in1k' and cfg.source is None and cfg.crop_pct == deit.crop_pct
          and 'crop_pct' not in overlay):
        # `fb_in1k` is only the default tag, no DeiT weights are loaded: the paper's crop
        cfg = replace(cfg, crop_pct=_cfg()['crop_pct'])
    kwargs = {'out_indices': 3, **model_cfgs[variant.split('_')[2]], **kwargs}
    return build_model(EvoVisionTransformer, variant, pretrained, cfg, checkpoint_filter_fn, **kwargs)


_cfg = partial(evo_cfg, first_conv='patch_embed.proj', classifier=('head', 'head_cls'))


_deit_cfg = partial(  # DeiT's own weights, with the transform that timm evaluates them with
    _cfg, crop_pct=.9, license='apache-2.0', paper_ids='arXiv:2012.12877',
    paper_name='Training data-efficient image transformers & distillation through attention',
    origin_url='https://github.com/facebookresearch/deit')

# where both tags have weights the first is the default
default_cfgs = generate_default_cfgs({
    'evo_deit_tiny_patch16_224.evovit_in1k': _cfg(**published_cfg('evo_deit_tiny_patch16_224')),
    'evo_deit_tiny_patch16_224.fb_in1k': _deit_cfg(hf_hub_id='timm/deit_tiny_patch16_224.fb_in1k'),
    'evo_deit_small_patch16_224.evovit_in1k': _cfg(**published_cfg('evo_deit_small_patch16_224')),
    'evo_deit_small_patch16_224.fb_in1k': _deit_cfg(hf_hub_id='timm/deit_small_patch16_224.fb_in1k'),
    'evo_deit_base_patch16_224.evovit_in1k': _cfg(**published_cfg('evo_deit_base_patch16_224')),
    'evo_deit_base_patch16_224.fb_in1k': _deit_cfg(hf_hub_id='timm/deit_base_patch16_224.fb_in1k'),
    'evo_deit_small_patch16_384.untrained': _cfg(input_size=(3, 384, 384)),
    'evo_deit_base_patch16_384.evovit_in1k': _cfg(
        input_size=(3, 384, 384), **published_cfg('evo_deit_base_patch16_384')),
    'evo_deit_base_patch16_384.fb_in1k': _deit_cfg(
        hf_hub_id='timm/deit_base_patch16_384.fb_in1k', input_size=(3, 384, 384), crop_pct=1.0),
})
_deit_weights = {cfg.cfgs['fb_in1k'].hf_hub_id for cfg in default_cfgs.values() if 'fb_in1k' in cfg.cfgs}
for _short in ('evo_deit_tiny', 'evo_deit_small', 'evo_deit_base'):
    default_cfgs[_short] = default_cfgs[f'{_short}_patch16_224']


@register_model
def evo_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> EvoVisionTransformer:
    """Evo-DeiT-Ti @ 224x224 from paper (https://arxiv.org/abs/2108.01390)."""
    return _create_evo_deit('evo_deit_tiny_patch16_224', pretrained, **kwargs)


@register_model
def evo_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> EvoVisionTransformer:
    """Evo-DeiT-S @ 224x224 from paper (https://arxiv.org/abs/2108.01390)."""
    return _create_evo_deit('evo_deit_small_patch16_224', pretrained, **kwargs)


@register_model
def evo_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> EvoVisionTransformer:
    """Evo-DeiT-B @ 224x224 from paper (https://arxiv.org/abs/2108.01390)."""
    return _create_evo_deit('evo_deit_base_patch16_224', pretrained, **kwargs)


@register_model
def evo_deit_small_patch16_384(pretrained: bool = False, **kwargs: Any) -> EvoVisionTransformer:
    """Evo-DeiT-S @ 384x384, not in the paper."""
    return _create_evo_deit('evo_deit_small_patch16_384', pretrained, **kwargs)


@register_model
def evo_deit_base_patch16_384(pretrained: bool = False, **kwargs: Any) -> EvoVisionTransformer:
    """Evo-DeiT-B @ 384x384 from paper (https://arxiv.org/abs/2108.01390)."""
    return _create_evo_deit('evo_deit_base_patch16_384', pretrained, **kwargs)


@register_model
def evo_deit_tiny(pretrained: bool = False, **kwargs: Any) -> EvoVisionTransformer:
    """Short name of evo_deit_tiny_patch16_224."""
    return evo_deit_tiny_patch16_224(pretrained, **kwargs)


@register_model
def evo_deit_small(pretrained: bool = False, **kwargs: Any) -> EvoVisionTransformer:
    """Short name of evo_deit_small_patch16_224."""
    return evo_deit_small_patch16_224(pretrained, **kwargs)


@register_model
def evo_deit_base(pretrained: bool = False, **kwargs: Any) -> EvoVisionTransformer:
    """Short name of evo_deit_base_patch16_224."""
    return evo_deit_base_patch16_224(pretrained, **kwargs)
