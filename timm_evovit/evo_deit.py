"""Evo-DeiT - DeiT with slow-fast token evolution

Paper: `Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390
"""
from copy import deepcopy
from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from . import attention, evo_vit, training  # FX finds wrapped functions as attributes of their module
from .base import check, check_flag, check_ratios
from .checkpoints import BY_SIMILARITY, rename_deit, warn_by_attention
from .checkpoints import deit_checkpoint_filter_fn as checkpoint_filter_fn
from .evo_vit import EvolvingVit
from .hub import build_model, entry_point, evo_cfg, paper_cfg, resolve_weights

__all__ = ['EvoVisionTransformer']  # entry_point will add each model to this

BY_ATTENTION_ONLY = dict(representative_token=False, tradeoff=None, selection='stage', layer_to_stage_epochs=0)


class EvoVisionTransformer(training.PaperModel, EvolvingVit, VisionTransformer):
    """Vision Transformer with slow-fast token evolution.

    Class attention tells informative patches from placeholders. Informative patches go through the blocks,
    placeholders wait or are updated by one representative token; at the end of every stage the patch grid is complete.
    Attention masks are not taken: they could not follow the selected tokens. With `slow_tokens='similarity'` like
    patches share a slow token instead, as in `evolve`, with its masks.
    """
    rename_authors = staticmethod(rename_deit)

    def __init__(
            self, *args: Any, keep_ratio: Union[float, Sequence[float]] = 0.5, stages: Optional[Sequence[int]] = None,
            train_keep_ratio: Union[None, float, Sequence[float]] = None, slow_tokens: str = 'attention',
            representative_token: bool = False, tradeoff: Optional[Union[float, Sequence[float]]] = None,
            selection: str = 'stage', assisted_cls: bool = True, layer_to_stage_epochs: int = 0, **kwargs: Any,
    ) -> None:
        """
        Args:
            keep_ratio: Ratio of slow tokens to patches in (0, 1], one for all evolution stages or one per stage. By
                similarity as in `evolve`.
            stages: First block of each stage, ascending. Default: (4, 8) of 12 blocks, every second by similarity.
            train_keep_ratio: Keep ratios to train with, see `evolve`.
            slow_tokens: Find slow tokens by class 'attention' (paper), or by 'similarity': similar patches share one.
                `representative_token`, `tradeoff`, `selection` and `layer_to_stage_epochs` are of the former only.
            tradeoff: Weight in [0, 1] of a block's class attention in the global class attention, one for all blocks
                or one per block. Default: 1 before the first stage, 0.5 after.
            selection: When informative patches are selected anew, at each 'stage' or before each 'layer' of it.
            representative_token: Update placeholders by a representative token (paper), or leave them as they are
                until the stage ends, as the authors' DeiT code and weights do; their LeViT has one.
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

        check(slow_tokens in ('attention', 'similarity'), 'slow_tokens', "'attention' or 'similarity'", slow_tokens)
        self.slow_tokens, self.by_similarity = slow_tokens, slow_tokens == 'similarity'
        self.representative_token = check_flag('representative_token', representative_token)
        given = (representative_token, tradeoff, selection, layer_to_stage_epochs)
        for value, (name, default) in zip(given, BY_ATTENTION_ONLY.items()) if self.by_similarity else ():
            check(value == default, name, "left out with slow_tokens='similarity'", value)
        depth = len(self.blocks)
        if stages is None and not self.by_similarity:  # two equal stages follow a dense third
            stages = sorted({depth // 3, 2 * depth // 3} - {0})
        self._init_stages(keep_ratio, stages, train_keep_ratio, first=0 if self.by_similarity else 1)
        mark = torch.ones((), dtype=torch.int64, device=next(self.parameters()).device) if self.by_similarity else None
        self.register_buffer(BY_SIMILARITY, mark)  # weights tell by this key how they were trained
        if not self.by_similarity:
            wanted = "True to find slow tokens by class attention; slow_tokens='similarity' needs none"
            check(self.cls_token is not None, 'class_token', wanted, False)
            if tradeoff is None:
                first = min(self.stage_starts, default=depth)
                tradeoff = (1.,) * first + (0.5,) * (depth - first)
            self.tradeoff = check_ratios('tradeoff', tradeoff, depth, 'block', zero=True)
            for i, block in enumerate(self.blocks):
                attention.EvoBlock.convert(block, f'blocks.{i}')
        self._init_training(selection, assisted_cls, layer_to_stage_epochs)
        self._reset_cls_head()

        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    def _build_schedule(self, keep_ratio: Tuple[float, ...], training: bool) -> Any:
        if self.by_similarity:
            return super()._build_schedule(keep_ratio, training)
        starts = dict(zip(self.stage_starts, keep_ratio))
        return attention.Schedule.build(self.tradeoff[:len(self.blocks)], starts, self._selection(training))

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        marked = prefix + BY_SIMILARITY in state_dict
        if marked and not self.by_similarity:  # args[-1] is error_msgs
            args[-1].append("These weights need slow_tokens='similarity' (--model-kwargs slow_tokens=similarity).")
        if self.by_similarity and not marked:
            warn_by_attention(state_dict, prefix)
            mark = getattr(self, BY_SIMILARITY)
            state_dict[prefix + BY_SIMILARITY] = torch.ones_like(mark, device='cpu') if mark.is_meta else mark
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _reset_cls_head(self) -> None:
        """Give the class token a norm and a classifier where it has something to assist."""
        if self.cls_token is not None and self.assisted_cls and self.global_pool == 'avg' and self.num_classes > 0:
            if getattr(self, 'norm_cls', None) is None:
                self.norm_cls = deepcopy(self.fc_norm)
            self.head_cls = nn.Linear(
                self.embed_dim, self.num_classes, device=self.cls_token.device, dtype=self.cls_token.dtype)
            self.head_cls.train(self.training)
        else:
            self.norm_cls = self.head_cls = None

    def group_matcher(self, coarse: bool = False) -> Dict[str, Union[str, List]]:
        matcher = super().group_matcher(coarse)
        matcher['blocks'][-1] = (r'^norm\.', (99999,))  # norm_cls belongs to the head, as fc_norm does
        return matcher

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self._reset_cls_head()

    def _run_blocks(self, tokens: List[Any], rope: Any, num_blocks: Optional[int] = None, **kwargs: Any) -> Any:
        if self.by_similarity:
            return super()._run_blocks(tokens, rope, num_blocks, **kwargs)
        evo_vit.check_no_mask(kwargs.get('attn_mask'), kwargs.get('is_causal', False))
        state = attention.EvolutionState(
            self._draw_schedule(tokens[0]), self.tradeoff, self.num_prefix_tokens, self.representative_token,
            self.grad_checkpointing, kwargs.get('take_indices', ()), kwargs.get('slow_tokens'))
        return attention.run_blocks(list(self.blocks)[:num_blocks], tokens.pop(), state), state.intermediates

    def forward_head(
            self, x: torch.Tensor, pre_logits: bool = False,
    ) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
        """Tokens (B, N, C) to logits (B, num_classes), while training with an assisted class token see `mix_heads`."""
        features = self.head_drop(self.fc_norm(self.pool(x)))
        if pre_logits:
            return features
        logits = self.head(features)
        if not self.is_assisted():
            return logits
        logits_cls = self.head_cls(self.head_drop(self.norm_cls(x[:, 0])))
        if self.assisted_training and logits.shape == logits_cls.shape:
            return logits, logits_cls
        return training.mix_heads(logits, logits_cls)


model_cfgs = {
    size: dict(embed_dim=64 * heads, depth=12, num_heads=heads)
    for size, heads in (('tiny', 3), ('small', 6), ('base', 12))}


def deit_args(cfg: Any, kwargs: Dict[str, Any]) -> bool:
    """Whether these weights of an Evo-DeiT are DeiT's own. If so, arguments that are not given are set for them."""
    if not (cfg.hf_hub_id or '').startswith('timm/deit_') or cfg.file or cfg.state_dict:
        return False
    kwargs.setdefault('global_pool', 'token')
    if all(kwargs.get(k, v) == v for k, v in BY_ATTENTION_ONLY.items()):
        kwargs.setdefault('slow_tokens', 'similarity')
    if kwargs.get('slow_tokens') == 'similarity':
        kwargs.setdefault('keep_ratio', 0.6)
    return True


def _create_evo_deit(variant: str, pretrained: bool = False, **kwargs: Any) -> EvoVisionTransformer:
    """Evo-DeiT (https://arxiv.org/abs/2108.01390).

    `pretrained=True` with DeiT's own weights (fb_in1k), which know nothing of selection by class attention, sets it up
    with class token readout and slow tokens by similarity at keep ratio 0.6, unless arguments say otherwise.
    """
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cfg = resolve_weights(variant, pretrained, kwargs, f'{variant}.fb_in1k, which is DeiT made faster without training')
    default = cfg.tag == 'fb_in1k' and cfg.source is None and 'crop_pct' not in overlay and cfg.crop_pct in (.9, 1.)
    if not (pretrained and deit_args(cfg, kwargs)) and default:
        cfg = replace(cfg, crop_pct=.875)  # only the default tag, no DeiT weights are loaded: the paper's crop
    kwargs = {'out_indices': 3, **model_cfgs[variant.split('_')[2]], **kwargs}
    return build_model(EvoVisionTransformer, variant, pretrained, cfg, checkpoint_filter_fn, **kwargs)


_cfgs: Dict[str, Any] = {}
for _size, _pixels, _crop_pct in (
        ('tiny', 224, .9), ('small', 224, .9), ('base', 224, .9), ('small', 384, None), ('base', 384, 1.)):
    _name = f'deit_{_size}_patch16_{_pixels}'
    _args = dict(input_size=(3, _pixels, _pixels), first_conv='patch_embed.proj', classifier=('head', 'head_cls'))
    _cfgs.update(paper_cfg(f'evo_{_name}', **_args))  # where both tags have weights the first is the default
    if _crop_pct:  # DeiT's own weights, with the transform that timm evaluates them with
        _cfgs[f'evo_{_name}.fb_in1k'] = evo_cfg(
            hf_hub_id=f'timm/{_name}.fb_in1k', crop_pct=_crop_pct, license='apache-2.0', paper_ids='arXiv:2012.12877',
            paper_name='Training data-efficient image transformers & distillation through attention',
            origin_url='https://github.com/facebookresearch/deit', **_args)
default_cfgs = generate_default_cfgs(_cfgs)
for _size in model_cfgs:  # short names
    default_cfgs[f'evo_deit_{_size}'] = default_cfgs[f'evo_deit_{_size}_patch16_224']
for _name in default_cfgs:
    globals()[_name] = entry_point(_create_evo_deit, _name if 'patch16' in _name else f'{_name}_patch16_224', _name)
