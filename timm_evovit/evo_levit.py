"""Evo-LeViT - LeViT with slow-fast token evolution

Paper: `Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390
"""
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, levit
from timm.models._features import feature_take_indices
from torch import _assert, nn

from . import attention, training  # FX finds wrapped functions as attributes of their module
from .attention import EvolutionState, Schedule
from .base import check, check_flag, is_number
from .checkpoints import levit_checkpoint_filter_fn as checkpoint_filter_fn
from .checkpoints import rename_levit
from .hub import build_model, entry_point, paper_cfg, resolve_weights
from .slow_tokens import SlowTokens

__all__ = ['EvoLevit']  # entry_point will add each model to this


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, N, heads * d) to (B, heads, N, d), copied once here and not for each product that follows."""
    B, N, C = x.shape
    return x.reshape(B, N, num_heads, C // num_heads).transpose(1, 2).contiguous()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries (B, heads, M, d) over keys (B, heads, N, d) and values (B, heads, N, e).

    Returns (B, M, heads * e) and scaled dot products (B, heads, M, N). Where e differs from d,
    scaled_dot_product_attention is slower on a CPU.
    """
    scores = q * scale @ k.transpose(-2, -1)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2), scores


class EvoLevitAttention(levit.Attention):
    """LeViT's attention without attention biases, which can also give class attention."""

    def reset_parameters(self) -> None:
        """Nothing to do: all parameters belong to submodules."""

    init_non_persistent_buffers = reset_parameters

    def forward(self, x: torch.Tensor, class_attn: Optional[List[torch.Tensor]] = None) -> torch.Tensor:
        """Tokens (B, N, C), the class token first. A list `class_attn` receives class attention (B, N)."""
        q, k, v = split_heads(self.qkv(x), self.num_heads).split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        x, scores = attend(q, k, v, self.scale)
        if class_attn is not None:
            class_attn.append(attention.class_attention(scores[:, :, 0]))
        return self.proj(x)


class EvoLevitBlock(levit.LevitBlock):
    """LeViT's block, which hands `class_attn` to its attention layer."""

    def forward(self, x: torch.Tensor, class_attn: Optional[List[torch.Tensor]] = None) -> torch.Tensor:
        x = x + self.drop_path1(self.attn(x, class_attn))
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
        later reads it.
        """
        x = x + self.pos_embed
        k, v = split_heads(self.kv(x), self.num_heads).split([self.key_dim, self.val_dim], dim=3)
        q = self.q.ln(torch.cat([x[:, :1], self.q.down(x[:, 1:])], dim=1))
        x, scores = attend(split_heads(q, self.num_heads), k, v, self.scale)
        global_attn, attn = state.global_attn, None
        if state.schedule.needs_class_attention[state.layer]:
            attn = state.track(attention.class_attention(scores[:, :, 0])[:, 1:])
            attn = self.q.down(attn.unsqueeze(2)).squeeze(2)
            if global_attn is not None:
                attn = attn * (global_attn.sum(dim=1, keepdim=True) / attn.sum(dim=1, keepdim=True))
        state.global_attn = attn
        state.layer += 1
        return self.proj(x)


class EvoLevitDownsample(levit.LevitDownsample):
    """Downsampling attention and a residual MLP."""

    def forward(self, x: torch.Tensor, state: EvolutionState) -> torch.Tensor:
        x = self.attn_downsample(x, state)
        return x + self.drop_path(self.mlp(x))


class EvoLevitStage(levit.LevitStage):
    """A downsampling attention, except in the first stage, and blocks that evolve slow and fast tokens."""

    @classmethod
    def convert(cls, stage: levit.LevitStage, in_grid_size: Tuple[int, int], grid_size: Tuple[int, int]) -> None:
        """Make a stage of timm's LeViT evolve. Grids are (H, W), before it and of its blocks."""
        stage.__class__ = cls
        stage.grid_size = grid_size
        if isinstance(stage.downsample, levit.LevitDownsample):
            attn = stage.downsample.attn_downsample
            stage.downsample.__class__, attn.__class__ = EvoLevitDownsample, EvoLevitAttentionDownsample
            attn.resolution = attn.q.down.resolution = in_grid_size
            weight = attn.kv.linear.weight
            attn.pos_embed = nn.Parameter(weight.new_empty(1, 1 + in_grid_size[0] * in_grid_size[1], weight.shape[1]))
            attn.reset_parameters()
        for block in stage.blocks:
            block.__class__, block.attn.__class__ = EvoLevitBlock, EvoLevitAttention
            block.grid = nn.Identity()  # called with the complete sequence where a stage starts: a place for hooks
        for module in stage.modules():
            if isinstance(module, (levit.Attention, levit.AttentionDownsample)):
                del module.attention_biases, module.attention_bias_idxs

    def forward(self, x: torch.Tensor, state: EvolutionState) -> torch.Tensor:
        """Tokens (B, N, C), the class token first, to tokens (B, 1 + h * w, C). `state` is updated."""
        if isinstance(self.downsample, EvoLevitDownsample):
            x = self.downsample(x, state)
        return attention.run_blocks(self.blocks, x, state)


def check_levit_args(embed_dim: Sequence[int], key_dim: int, kwargs: Dict[str, Any]) -> None:
    """Raise TypeError or ValueError for arguments that are not supported or do not fit the number of stages."""
    for name, why in (('use_conv', 'tokens are selected from sequences'), ('stem_backbone', 'its grid is not known')):
        check(not kwargs.get(name), name, f'left out: {why}', kwargs.get(name))
    check(isinstance(embed_dim, Sequence), 'embed_dim', 'one width per stage, such as (128, 256)', embed_dim, TypeError)
    for name in ('depth', 'num_heads', 'attn_ratio', 'mlp_ratio'):
        fits = not isinstance(kwargs.get(name), Sequence) or len(kwargs[name]) == len(embed_dim)
        check(fits, name, f'one number or one per stage, {len(embed_dim)} by embed_dim', kwargs.get(name))
    narrowest = min(embed_dim[:-1] or embed_dim)  # downsampling attentions have embed_dim // key_dim heads
    check(0 < key_dim <= narrowest, 'key_dim', f'in 1 .. {narrowest}', key_dim)


class EvoLevit(training.PaperModel, levit.LevitDistilled):
    """LeViT with slow-fast token evolution.

    A class token and position embeddings take the place of attention biases. Class attention selects the patches that
    go through the blocks; one representative token updates the others. At the end of every stage the patch grid is
    complete. Two heads classify the averaged patches, the second for distillation; inference takes their mean.
    """
    rename_authors = staticmethod(rename_levit)
    stages: Any

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224, in_chans: int = 3, num_classes: int = 1000,
            embed_dim: Tuple[int, ...] = (192,), key_dim: int = 64, depth: Tuple[int, ...] = (12,),
            *,
            keep_ratio: Union[float, Sequence[float]] = 0.5,
            tradeoff: Union[str, float] = 'learned',
            selection: str = 'stage',
            representative_token: bool = True,
            assisted_cls: bool = True,
            layer_to_stage_epochs: int = 0,
            **kwargs: Any,
    ) -> None:
        """
        Args:
            img_size: Size of the images that forward takes, no other.
            keep_ratio: As in `EvoVisionTransformer`. Blocks 0 and 1 of the first stage always see all patches.
            tradeoff: Weight in [0, 1] of each attention's class attention in the global class attention, or 'learned',
                one scalar per attention.
            selection, representative_token, assisted_cls, layer_to_stage_epochs: As in `EvoVisionTransformer`. In the
                layer-wise epochs the tradeoff is 0.5 and not learned.
            in_chans, ..., **kwargs: Arguments of timm's Levit; of these use_conv and stem_backbone are not supported.

        Raises:
            TypeError, ValueError: An argument is of the wrong kind, out of range or of the wrong length.
        """
        check_levit_args(embed_dim, key_dim, dict(kwargs, depth=depth))
        super().__init__(img_size, in_chans, num_classes, embed_dim, key_dim, depth, **kwargs)
        self.img_size = to_2tuple(img_size)
        self.representative_token = check_flag('representative_token', representative_token)
        fixed: Any = 0.5 if tradeoff == 'learned' else tradeoff
        check(is_number(fixed) and 0 <= fixed <= 1, 'tradeoff', "'learned' or a number in [0, 1]", tradeoff)
        self.fixed_tradeoff = float(fixed)
        reductions = [info['reduction'] for info in self.feature_info]
        grids = [tuple(-(-size // reduction) for size in self.img_size) for reduction in reductions]  # rounded up
        fits = min(grids[0]) > 0 and (1, 1) not in grids[:-1]
        check(fits, 'img_size', f'larger than {reductions[-2:][0]} pixels on one side', img_size)
        for i, stage in enumerate(self.stages):
            EvoLevitStage.convert(stage, grids[max(i - 1, 0)], grids[i])
        self.stages = nn.ModuleList(self.stages)
        dd = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim[0], **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grids[0][0] * grids[0][1], embed_dim[0], **dd))
        num_attentions = sum(len(stage.blocks) + 1 for stage in self.stages) - 1
        self.tradeoff = nn.Parameter(torch.empty(num_attentions, **dd)) if tradeoff == 'learned' else None
        self.reset_parameters()
        self.keep_ratio = self._stage_ratios(keep_ratio, len(self.stages))
        self._init_training(selection, assisted_cls, layer_to_stage_epochs)
        self._reset_heads()

    def reset_parameters(self) -> None:
        """Initialize what is not in a submodule."""
        nn.init.zeros_(self.cls_token)
        trunc_normal_(self.pos_embed, std=.02)
        if self.tradeoff is not None:
            nn.init.zeros_(self.tradeoff)

    def _init_weights(self, m: nn.Module, needs_reset: bool = True) -> None:
        super()._init_weights(m, needs_reset)
        # children are visited first: their reset_parameters has overwritten these values
        if needs_reset and isinstance(m, levit.NormLinear):
            trunc_normal_(m.linear.weight, std=.02)
            nn.init.zeros_(m.linear.bias)
        elif needs_reset and isinstance(m, (EvoLevitAttention, levit.LevitMlp)):
            nn.init.zeros_((m.proj.ln if isinstance(m, EvoLevitAttention) else m.ln2).bn.weight)

    def _build_schedule(self, keep_ratio: Tuple[float, ...], training: bool) -> Schedule:
        starts, num_layers = {}, -1
        for i, stage in enumerate(self.stages):
            starts[num_layers] = 1.  # the downsampling attention, in the first stage none
            if len(stage.blocks) > (0 if i else 2):  # blocks 0 and 1 of the first stage see all patches
                starts[num_layers + (1 if i else 3)] = keep_ratio[i]
            num_layers += 1 + len(stage.blocks)
        # 0.5 stands for any tradeoff: a downsampling attention scales to the old sum, so it always reads it
        return Schedule.build([0.5] * num_layers, starts, self._selection(training))

    def _current_args(self) -> Dict[str, Any]:
        return dict(img_size=self.img_size, in_chans=self.in_chans, global_pool=self.global_pool)

    def no_weight_decay(self) -> Set[str]:
        return {n for n, _ in self.named_parameters() if n.rpartition('.')[2] in ('cls_token', 'pos_embed', 'tradeoff')}

    def group_matcher(self, coarse: bool = False) -> Dict[str, Union[str, List]]:
        fine = [(r'^stages\.(\d+)\.downsample', (0,)), (r'^stages\.(\d+)\.blocks\.(\d+)', None)]
        return dict(stem=r'^(?:stem\.|cls_token|pos_embed|tradeoff)', blocks=r'^stages\.(\d+)' if coarse else fine)

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
            head: Any = None if name.startswith('head_cls') else nn.Identity()
            if assisted or (head is not None and self.num_classes > 0):
                head = levit.NormLinear(
                    self.num_features, self.num_classes, drop=self.drop_rate, device=self.cls_token.device,
                    dtype=self.cls_token.dtype).train(self.training)
            setattr(self, name, head)

    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True) -> List[int]:
        max_index = feature_take_indices(len(self.stages), indices)[1]
        prune_head = prune_head or max_index < len(self.stages) - 1  # heads are sized for the last stage
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        self.keep_ratio = self.keep_ratio[:len(self.stages)]
        self._set_schedule()
        return take_indices

    def _embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, EvolutionState]:
        """Image (B, in_chans, H, W) to tokens (B, 1 + n, C), and what goes through the stages beside them."""
        for dim, side, size in zip((2, 3), ('height', 'width'), self.img_size):
            _assert(x.shape[dim] == size, f'Input {side} ({x.shape[dim]}) does not match model ({size}), see img_size.')
        if not self.training:
            # channels last: faster convolutions on a CPU, whose output is a sequence of tokens without a copy; batch
            # statistics, though, are less exact in this format. vmap takes permute, but no memory formats
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        x = self.stem(x).flatten(2).transpose(1, 2)
        cls_token, schedule = self.cls_token, self._draw_schedule(x)
        tradeoff: Any = [self.fixed_tradeoff] * len(schedule.stage_keep_ratio)
        if self.tradeoff is not None:
            if not (self.training and self.layerwise_epochs):
                tradeoff = self.tradeoff.sigmoid()
            if self.training:  # a gradient, of zero, even where no selection depends on a tradeoff
                cls_token = cls_token + 0. * self.tradeoff.sum()
        x = torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return x, EvolutionState(schedule, tradeoff, 1, self.representative_token, self.grad_checkpointing)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Image (B, in_chans, H, W) to tokens (B, 1 + n, C) of the last stage, the class token first."""
        x, state = self._embed(x)
        for stage in self.stages:
            x = stage(x, state)
        return x

    def forward_intermediates(
            self, x: torch.Tensor, indices: Optional[Union[int, List[int]]] = None, norm: bool = False,
            stop_early: bool = False, output_fmt: str = 'NCHW', intermediates_only: bool = False,
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
                    intermediates.append(x[:, 1:].unflatten(1, stage.grid_size).permute(0, 3, 1, 2).contiguous())
        return intermediates if intermediates_only else (x, intermediates)

    def forward_slow_tokens(self, x: torch.Tensor) -> List[SlowTokens]:
        """As the base class says. Blocks are counted through the stages, without downsampling attentions."""
        found: List[SlowTokens] = []
        first = 0
        x, state = self._embed(x)
        for stage in self.stages:
            state.slow_tokens = []
            x = stage(x, state)
            found += [s._replace(block=first + s.block).on_grid(stage.grid_size) for s in state.slow_tokens]
            first += len(stage.blocks)
        return found

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> Union[torch.Tensor, Tuple[Any, Any]]:
        """Tokens (B, 1 + n, C) to logits (B, num_classes), the mean of two heads, and see `mix_heads`.

        With `set_distilled_training(True)` training returns (logits, logits for distillation) in place of the mean.
        """
        features = x[:, 1:].mean(dim=1) if self.global_pool == 'avg' else x
        if pre_logits:
            return features
        distilled = self.distilled_training and self.training
        logits = torch.stack([self.head(features), self.head_dist(features)], dim=1)
        if self.is_assisted():
            logits_cls = torch.stack([self.head_cls(x[:, 0]), self.head_cls_dist(x[:, 0])], dim=1)
            if self.assisted_training and logits.shape == logits_cls.shape:
                if distilled:
                    return logits.unbind(1), logits_cls.unbind(1)
                return logits.mean(dim=1), logits_cls.mean(dim=1)
            logits = training.mix_heads(logits, logits_cls)
        return logits.unbind(1) if distilled else logits.mean(dim=1)


def _create_evo_levit(variant: str, pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT (https://arxiv.org/abs/2108.01390)."""
    size = variant.removeprefix('evo_')
    size = size if size in levit.model_cfgs else size.removesuffix('_384')  # of timm's name
    model_args = dict(levit.model_cfgs[size], **({'drop_path_rate': 0.1} if size == 'levit_384' else {}))
    cfg = resolve_weights(variant, pretrained, kwargs, 'none for Evo-LeViT, but evo_deit_small_patch16_224.fb_in1k')
    kwargs = {'out_indices': (0, 1, 2), **model_args, **kwargs}
    return build_model(EvoLevit, variant, pretrained, cfg, checkpoint_filter_fn, **kwargs)


_cfgs: Dict[str, Any] = {}
for _suffix, _size in ('', 224), ('_384', 384):
    for _width in '128s', '128', '192', '256', '384':
        _cfgs.update(paper_cfg(
            f'evo_levit_{_width}{_suffix}', input_size=(3, _size, _size), first_conv='stem.conv1.linear',
            classifier=('head.linear', 'head_dist.linear', 'head_cls.linear', 'head_cls_dist.linear')))
default_cfgs = generate_default_cfgs(_cfgs)
for _name in default_cfgs:
    globals()[_name] = entry_point(_create_evo_levit, _name, _name)
