"""Evo-LeViT - LeViT with slow-fast token evolution

Paper: `Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390
"""
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, levit, register_model
from timm.models._features import feature_take_indices
from torch import _assert, nn

from . import evolution, training  # FX finds wrapped functions as attributes of their module
from .base import EvolvingModel, check, check_flag, check_ratios, check_slow_tokens, recast
from .checkpoints import levit_checkpoint_filter_fn as checkpoint_filter_fn
from .evolution import AttentionContext, EvolutionState, EvolvingSequential, Schedule, Selection
from .hub import build_model, evo_cfg, published_cfg, resolve_weights

__all__ = ['EvoLevit']  # register_model will add each entrypoint fn to this


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, N, heads * d) to (B, heads, N, d), copied once here and not for each product that follows."""
    B, N, C = x.shape
    return x.reshape(B, N, num_heads, C // num_heads).transpose(1, 2).contiguous()


def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        bias: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries (B, heads, M, d) over keys (B, heads, N, d) and values (B, heads, N, e).

    Written out: where e differs from d, scaled_dot_product_attention is slower on a CPU.

    Returns:
        (B, M, heads * e) and scaled dot products (B, heads, M, N).
    """
    scores = q * scale @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2), scores


class EvoLevitAttention(levit.Attention):
    """LeViT's attention without attention biases, which can also write class attention."""

    def reset_parameters(self) -> None:
        """Nothing to do: all parameters belong to submodules."""

    init_non_persistent_buffers = reset_parameters

    def forward(self, x: torch.Tensor, context: Optional[AttentionContext] = None) -> torch.Tensor:
        """Tokens (B, N, C), the class token first; `context` receives class attention (B, N) over all of them."""
        q, k, v = split_heads(self.qkv(x), self.num_heads).split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        x, scores = attend(q, k, v, self.scale, None if context is None else context.bias)
        if context is not None and context.needs_class_attn:
            context.class_attn = evolution.class_attention(scores[:, :, 0])
        return self.proj(x)


class EvoLevitBlock(levit.LevitBlock):
    """LeViT's block, which hands `context` to its attention layer."""

    def forward(self, x: torch.Tensor, context: Optional[AttentionContext] = None) -> torch.Tensor:
        x = x + self.drop_path1(self.attn(x, context))
        return x + self.drop_path2(self.mlp(x))


class EvoLevitAttentionDownsample(levit.AttentionDownsample):
    """Attention from the class token and every second patch to all tokens, which adds its own position embedding."""

    def reset_parameters(self) -> None:
        trunc_normal_(self.pos_embed, std=.02)

    def init_non_persistent_buffers(self) -> None:
        """Nothing to do: there are no attention biases."""

    def forward(self, x: torch.Tensor, state: EvolutionState) -> torch.Tensor:
        """Tokens (B, 1 + H * W, C) to tokens (B, 1 + h * w, C) of the smaller grid.

        In `state` the global class attention becomes that of the smaller grid, with the same sum, or None if nothing
        later reads it, and the first tradeoff is used up.
        """
        x = x + self.pos_embed
        k, v = split_heads(self.kv(x), self.num_heads).split([self.key_dim, self.val_dim], dim=3)
        q = self.q.ln(torch.cat([x[:, :1], self.q.down(x[:, 1:])], dim=1))
        x, scores = attend(split_heads(q, self.num_heads), k, v, self.scale)
        global_attn, tradeoff = state.global_attn, state.tradeoff
        state.global_attn = None
        if self.needs_class_attention:
            attn = evolution.class_attention(scores[:, :, 0])[:, 1:]
            if global_attn is not None:
                attn = evolution.update_global_attn(
                    global_attn, attn, self.tradeoff, None if tradeoff is None else tradeoff[0])
            attn = self.q.down(attn.unsqueeze(2)).squeeze(2)
            if global_attn is not None:
                attn = attn * (global_attn.sum(dim=1, keepdim=True) / attn.sum(dim=1, keepdim=True))
            state.global_attn = attn
        if tradeoff is not None:
            state.tradeoff = tradeoff[1:]
        return self.proj(x)


class EvoLevitDownsample(levit.LevitDownsample):
    """Downsampling attention and a residual MLP."""

    def forward(self, x: torch.Tensor, state: EvolutionState) -> torch.Tensor:
        x = self.attn_downsample(x, state)
        return x + self.drop_path(self.mlp(x))


class EvoLevitStage(levit.LevitStage):
    """A downsampling attention, except in the first stage, and blocks that evolve slow and fast tokens."""

    @classmethod
    def build(
            cls,
            stage: levit.LevitStage,
            in_grid_size: Tuple[int, int],
            grid_size: Tuple[int, int],
            tradeoff: float,
            representative_token: bool,
    ) -> 'EvoLevitStage':
        """Make a stage of timm's LeViT evolve. Grids are (H, W), before it and of its blocks."""
        stage = recast(stage, cls)
        stage.grid_size = grid_size
        if isinstance(stage.downsample, levit.LevitDownsample):
            stage.downsample = recast(stage.downsample, EvoLevitDownsample)
            attn = recast(stage.downsample.attn_downsample, EvoLevitAttentionDownsample)
            stage.downsample.attn_downsample = attn
            attn.resolution = attn.q.down.resolution = in_grid_size
            attn.tradeoff = tradeoff
            attn.needs_class_attention = False  # a later selection reads the global class attention
            weight = attn.kv.linear.weight
            attn.pos_embed = nn.Parameter(weight.new_empty(1, 1 + in_grid_size[0] * in_grid_size[1], weight.shape[1]))
            attn.reset_parameters()
        else:
            stage.downsample = None
        blocks = [recast(block, EvoLevitBlock) for block in stage.blocks]
        for block in blocks:
            block.attn = recast(block.attn, EvoLevitAttention)
        stage.blocks = EvolvingSequential(
            *blocks, tradeoff=[tradeoff] * len(blocks), representative_token=representative_token)
        for module in stage.modules():
            if isinstance(module, (levit.Attention, levit.AttentionDownsample)):
                del module.attention_biases, module.attention_bias_idxs
        return stage

    def set_schedule(self, schedule: Schedule, training_schedule: Schedule) -> None:
        """Set the schedules of all attentions, the downsampling one first."""
        first = 0
        if self.downsample is not None:
            first = 1
            # the same in both schedules: a selection follows in both or in none
            self.downsample.attn_downsample.needs_class_attention = schedule.needs_class_attention[0]
        self.blocks.set_schedule(schedule.part(first), training_schedule.part(first))

    def forward(self, x: torch.Tensor, state: Optional[EvolutionState] = None) -> torch.Tensor:
        """Tokens (B, N, C), the class token first, to tokens (B, 1 + h * w, C). `state` is updated."""
        if state is None:
            state = EvolutionState()
        if self.downsample is not None:
            x = self.downsample(x, state)
        return self.blocks(x, state)


def check_levit_args(embed_dim: Sequence[int], key_dim: int, kwargs: Dict[str, Any]) -> None:
    """Raise TypeError or ValueError for arguments that are not supported or do not fit the number of stages."""
    use_conv, backbone = kwargs.get('use_conv', False), kwargs.get('stem_backbone')
    check(not use_conv, 'use_conv', 'False: tokens are selected from sequences, not from maps', use_conv)
    check(backbone is None, 'stem_backbone', "None: only the grids of stem_type 's16' and 's8' are known", backbone)
    several = isinstance(embed_dim, Sequence) and not isinstance(embed_dim, str)
    check(several, 'embed_dim', 'one width per stage, such as (128, 256, 384)', embed_dim, TypeError)
    for name in ('depth', 'num_heads', 'attn_ratio', 'mlp_ratio'):
        value = kwargs.get(name)
        fits = not isinstance(value, Sequence) or len(value) == len(embed_dim)
        check(fits, name, f'one number or one per stage, {len(embed_dim)} by embed_dim', value)
    narrowest = min(embed_dim[:-1] or embed_dim)
    wanted = f'in 1 .. {narrowest} for downsampling attentions of embed_dim // key_dim heads'
    check(0 < key_dim <= narrowest, 'key_dim', wanted, key_dim)


def grid_sizes(img_size: Tuple[int, int], reductions: List[int]) -> List[Any]:
    """Size of the patch grid in each stage: stem and downsampling round up."""
    grids = [tuple(-(-size // reduction) for size in img_size) for reduction in reductions]
    if min(grids[0]) < 1 or (1, 1) in grids[:-1]:
        raise ValueError(
            f'img_size {img_size} gives grids of {grids} patches. A downsampling attention needs more than one patch: '
            f'one side must be larger than {reductions[-2:][0]} pixels.')
    return grids


class EvoLevit(EvolvingModel, levit.LevitDistilled):
    """LeViT with slow-fast token evolution.

    A class token and position embeddings take the place of attention biases. Class attention selects the patches that
    go through the blocks; one representative token updates the others. At the end of every stage the patch grid is
    complete. Two heads classify the averaged patches, the second for distillation; inference takes their mean.
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            embed_dim: Tuple[int, ...] = (192,),
            key_dim: int = 64,
            depth: Tuple[int, ...] = (12,),
            *,
            keep_ratio: Union[float, Sequence[float]] = 0.5,
            tradeoff: Union[str, float] = 'learned',
            slow_tokens: str = 'attention',
            selection: str = 'stage',
            representative_token: Optional[bool] = None,
            assisted_cls: bool = True,
            layer_to_stage_epochs: int = 0,
            **kwargs: Any,
    ) -> None:
        """
        Args:
            img_size, in_chans, num_classes, embed_dim, key_dim, depth: As in timm's Levit, but forward takes images of
                this size only.
            keep_ratio: Ratio of slow tokens to patches in (0, 1], one for all stages or one per stage. Blocks 0 and 1
                of the first stage always see all patches.
            tradeoff: Weight in [0, 1] of each attention's class attention in the global class attention, or 'learned',
                one scalar per attention. By similarity the scalars are there, so that weights fit, but not used.
            slow_tokens, selection, assisted_cls, layer_to_stage_epochs: As in `EvoVisionTransformer`, but each stage
                groups the patches of its own grid. In the layer-wise epochs the tradeoff is 0.5 and not learned.
            representative_token: As in `EvoVisionTransformer`. Default: True where class attention finds slow tokens.
            **kwargs: Arguments of timm's Levit; of these use_conv and stem_backbone are not supported.

        Raises:
            TypeError, ValueError: An argument is of the wrong kind, out of range or of the wrong length.
        """
        check_levit_args(embed_dim, key_dim, dict(kwargs, depth=depth))
        check_slow_tokens(slow_tokens, representative_token=representative_token, tradeoff=tradeoff)
        if representative_token is None:
            representative_token = slow_tokens == 'attention'
        check_flag('representative_token', representative_token)
        super().__init__(img_size, in_chans, num_classes, embed_dim, key_dim, depth, **kwargs)
        self.img_size = to_2tuple(img_size)
        self.fixed_tradeoff = 0.5
        if tradeoff != 'learned':
            check(not isinstance(tradeoff, str), 'tradeoff', "'learned' or a number in [0, 1]", tradeoff)
            self.fixed_tradeoff, = check_ratios('tradeoff', tradeoff, 1, 'model', zero=True)
        grids = grid_sizes(self.img_size, [info['reduction'] for info in self.feature_info])
        self.stages: Any = nn.ModuleList([
            EvoLevitStage.build(stage, grids[max(i - 1, 0)], grids[i], self.fixed_tradeoff, representative_token)
            for i, stage in enumerate(self.stages)
        ])
        dd = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim[0], **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grids[0][0] * grids[0][1], embed_dim[0], **dd))
        num_attentions = sum(len(stage.blocks) + 1 for stage in self.stages) - 1
        self.tradeoff = nn.Parameter(torch.empty(num_attentions, **dd)) if tradeoff == 'learned' else None
        self.reset_parameters()
        self._init_evolution(keep_ratio, len(self.stages), slow_tokens, selection, assisted_cls, layer_to_stage_epochs)
        self._reset_heads()

    def reset_parameters(self) -> None:
        """Initialize what is not in a submodule."""
        nn.init.zeros_(self.cls_token)
        trunc_normal_(self.pos_embed, std=.02)
        if self.tradeoff is not None:
            nn.init.zeros_(self.tradeoff)

    def _init_weights(self, m: nn.Module, needs_reset: bool = True) -> None:
        super()._init_weights(m, needs_reset)
        if not needs_reset:
            return
        # children are visited first: their reset_parameters has overwritten these values
        if isinstance(m, levit.NormLinear):
            trunc_normal_(m.linear.weight, std=.02)
            nn.init.zeros_(m.linear.bias)
        elif isinstance(m, EvoLevitAttention):
            nn.init.zeros_(m.proj.ln.bn.weight)
        elif isinstance(m, levit.LevitMlp):
            nn.init.zeros_(m.ln2.bn.weight)

    def _set_schedule(self) -> None:
        """One schedule of all attentions, the downsampling ones included, is cut into those of the stages."""
        starts: Dict[int, float] = {}
        tradeoff: List[float] = []
        bounds = [0]
        for i, stage in enumerate(self.stages):
            if i > 0:  # weight 0: the downsampling attention scales to the old sum, so it always reads it
                starts[len(tradeoff)] = 1.
                tradeoff.append(0.)
            first = len(tradeoff) + (2 if i == 0 else 0)  # blocks 0 and 1 of the first stage see all patches
            tradeoff += [self.fixed_tradeoff] * len(stage.blocks)
            if first < len(tradeoff):
                starts[first] = self.keep_ratio[i]
            bounds.append(len(tradeoff))
        schedules = self._build_schedules(tradeoff, starts)
        for stage, start, end in zip(self.stages, bounds, bounds[1:]):
            stage.set_schedule(*(schedule.part(start, end) for schedule in schedules))

    def _current_args(self) -> Dict[str, Any]:
        return dict(img_size=self.img_size, in_chans=self.in_chans, global_pool=self.global_pool)

    @torch.jit.unused
    def no_weight_decay(self) -> Set[str]:
        return {n for n, _ in self.named_parameters() if n.rpartition('.')[2] in ('cls_token', 'pos_embed', 'tradeoff')}

    @torch.jit.unused
    def group_matcher(self, coarse: bool = False) -> Dict[str, Union[str, List]]:
        return dict(
            stem=r'^(?:stem\.|cls_token|pos_embed|tradeoff)',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.downsample', (0,)), (r'^stages\.(\d+)\.blocks\.(\d+)', None)],
        )

    @torch.jit.unused
    def get_classifier(self) -> nn.ModuleList:
        """All heads, as one module."""
        heads = (self.head, self.head_dist, self.head_cls, self.head_cls_dist)
        return nn.ModuleList(head for head in heads if head is not None)

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self._reset_heads()

    def _reset_heads(self) -> None:
        """Two heads for the averaged patches, and two for the class token where it assists."""
        assisted = self.assisted_cls and self.num_classes > 0 and self.global_pool == 'avg'
        for name in ('head', 'head_dist', 'head_cls', 'head_cls_dist'):
            head: Optional[nn.Module] = None if name.startswith('head_cls') else nn.Identity()
            if assisted or (head is not None and self.num_classes > 0):
                head = levit.NormLinear(
                    self.num_features, self.num_classes, drop=self.drop_rate, device=self.cls_token.device,
                    dtype=self.cls_token.dtype).train(self.training)
            setattr(self, name, head)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        max_index = feature_take_indices(len(self.stages), indices)[1]
        prune_head = prune_head or max_index < len(self.stages) - 1  # heads are sized for the last stage
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        self.keep_ratio = self.keep_ratio[:len(self.stages)]
        self._set_schedule()
        return take_indices

    def _embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, EvolutionState]:
        """Image (B, in_chans, H, W) to tokens (B, 1 + n, C), and what goes through the stages beside them."""
        height, width = self.img_size
        _assert(x.shape[2] == height, f'Input height ({x.shape[2]}) does not match model ({height}), see img_size.')
        _assert(x.shape[3] == width, f'Input width ({x.shape[3]}) does not match model ({width}), see img_size.')
        if not self.training:
            # channels last: faster convolutions on a CPU, whose output is a sequence of tokens without a copy; batch
            # statistics, though, are less exact in this format. vmap takes permute, but no memory formats
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        x = self.stem(x).flatten(2).transpose(1, 2)
        cls_token = self.cls_token
        tradeoff: Optional[torch.Tensor] = None
        if self.tradeoff is not None:
            if not (self.training and self.layerwise_epochs):
                tradeoff = self.tradeoff.sigmoid()
            if self.training:  # a gradient, of zero, even where no selection depends on a tradeoff
                cls_token = cls_token + 0. * self.tradeoff.sum()
        x = torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return x, EvolutionState(self.grad_checkpointing, tradeoff)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Image (B, in_chans, H, W) to tokens (B, 1 + n, C) of the last stage, the class token first."""
        x, state = self._embed(x)
        for stage in self.stages:
            x = stage(x, state)
        return x

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates, as in timm: the complete grid (B, C, h, w) after any stage."""
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates: List[torch.Tensor] = []
        x, state = self._embed(x)
        for i, stage in enumerate(self.stages):
            if i <= max_index or not stop_early:
                x = stage(x, state)
                if i in take_indices:
                    H, W = stage.grid_size
                    intermediates.append(x[:, 1:].unflatten(1, (H, W)).permute(0, 3, 1, 2).contiguous())
        if intermediates_only:
            return intermediates
        return x, intermediates

    def forward_selections(self, x: torch.Tensor) -> List[Tuple[Selection, Tuple[int, int]]]:
        """As the base class says. Blocks are counted through the stages, without downsampling attentions."""
        found: List[Tuple[Selection, Tuple[int, int]]] = []
        first = 0
        x, state = self._embed(x)
        for stage in self.stages:
            x = stage(x, state)
            found += [(s._replace(block=first + s.block), stage.grid_size) for s in state.selections[len(found):]]
            first += len(stage.blocks)
        return found

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> Union[torch.Tensor, Tuple[Any, Any]]:
        """Tokens (B, 1 + n, C) to logits (B, num_classes), the mean of two heads.

        With an assisted class token, training answers a random half of the samples by the class token heads. With
        `set_distilled_training(True)` it returns (logits, logits for distillation) in place of the mean.
        """
        features = x[:, 1:].mean(dim=1) if self.global_pool == 'avg' else x
        if pre_logits:
            return features
        distilled = self.distilled_training and self.training
        logits = training.stack_heads(self.head(features), self.head_dist(features))
        if self.head_cls is not None and self.is_assisted():
            logits_cls = training.stack_heads(self.head_cls(x[:, 0]), self.head_cls_dist(x[:, 0]))
            if self.assisted_training and not torch.jit.is_scripting():
                if distilled:
                    return logits.unbind(1), logits_cls.unbind(1)
                return logits.mean(dim=1), logits_cls.mean(dim=1)
            logits = training.mix_heads(logits, logits_cls)
        if distilled and not torch.jit.is_scripting():
            return logits.unbind(1)
        return logits.mean(dim=1)


def _create_evo_levit(variant: str, pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    size = variant.removeprefix('evo_')  # timm's name of the model, at 384 pixels with another ending
    size = size if size in levit.model_cfgs else size.removesuffix('_384')
    model_args = dict(levit.model_cfgs[size], **({'drop_path_rate': 0.1} if size == 'levit_384' else {}))
    cfg = resolve_weights(
        variant, pretrained, kwargs,
        'none for Evo-LeViT, but for Evo-DeiT, such as evo_deit_small_patch16_224.fb_in1k')
    kwargs = {'out_indices': (0, 1, 2), **model_args, **kwargs}
    return build_model(EvoLevit, variant, pretrained, cfg, checkpoint_filter_fn, **kwargs)


_cfg = partial(
    evo_cfg, first_conv='stem.conv1.linear',
    classifier=('head.linear', 'head_dist.linear', 'head_cls.linear', 'head_cls_dist.linear'))

default_cfgs = generate_default_cfgs({
    'evo_levit_128s.evovit_in1k': _cfg(**published_cfg('evo_levit_128s')),
    'evo_levit_128.evovit_in1k': _cfg(**published_cfg('evo_levit_128')),
    'evo_levit_192.evovit_in1k': _cfg(**published_cfg('evo_levit_192')),
    'evo_levit_256.evovit_in1k': _cfg(**published_cfg('evo_levit_256')),
    'evo_levit_384.evovit_in1k': _cfg(**published_cfg('evo_levit_384')),
    'evo_levit_128s_384.untrained': _cfg(input_size=(3, 384, 384)),
    'evo_levit_128_384.untrained': _cfg(input_size=(3, 384, 384)),
    'evo_levit_192_384.untrained': _cfg(input_size=(3, 384, 384)),
    'evo_levit_256_384.evovit_in1k': _cfg(input_size=(3, 384, 384), **published_cfg('evo_levit_256_384')),
    'evo_levit_384_384.evovit_in1k': _cfg(input_size=(3, 384, 384), **published_cfg('evo_levit_384_384')),
})


@register_model
def evo_levit_128s(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    return _create_evo_levit('evo_levit_128s', pretrained, **kwargs)


@register_model
def evo_levit_128(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    return _create_evo_levit('evo_levit_128', pretrained, **kwargs)


@register_model
def evo_levit_192(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    return _create_evo_levit('evo_levit_192', pretrained, **kwargs)


@register_model
def evo_levit_256(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    return _create_evo_levit('evo_levit_256', pretrained, **kwargs)


@register_model
def evo_levit_384(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    return _create_evo_levit('evo_levit_384', pretrained, **kwargs)


@register_model
def evo_levit_128s_384(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    return _create_evo_levit('evo_levit_128s_384', pretrained, **kwargs)


@register_model
def evo_levit_128_384(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    return _create_evo_levit('evo_levit_128_384', pretrained, **kwargs)


@register_model
def evo_levit_192_384(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    return _create_evo_levit('evo_levit_192_384', pretrained, **kwargs)


@register_model
def evo_levit_256_384(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    return _create_evo_levit('evo_levit_256_384', pretrained, **kwargs)


@register_model
def evo_levit_384_384(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    return _create_evo_levit('evo_levit_384_384', pretrained, **kwargs)
