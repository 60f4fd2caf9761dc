"""Evo-LeViT - LeViT with slow-fast token evolution

Paper: `Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390

Yifan Xu, Zhijie Zhang, Mengdan Zhang, Kekai Sheng, Ke Li, Weiming Dong, Liqing Zhang, Changsheng Xu, Xing Sun.
"""
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Type, Union

import torch
from torch import nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_act_layer, get_device_dtype, to_2tuple, trunc_normal_
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.levit import (
    Attention, AttentionDownsample, LevitBlock, LevitDistilled, LevitDownsample, LevitMlp, LevitStage, NormLinear)

from . import evolution, training  # FX finds wrapped functions as attributes of their module
from .base import EvolvingModel, check, check_flag, check_ratios
from .checkpoints import levit_checkpoint_filter_fn as checkpoint_filter_fn
from .evolution import EvolutionState, EvolvingSequential, Schedule, Selection
from .hub import published_cfg, resolve_weights

__all__ = ['EvoLevit']  # register_model will add each entrypoint fn to this


@torch.fx.wrap
def check_input_size(x: torch.Tensor, img_size: Tuple[int, int]) -> None:
    """Position embeddings and grids are those of one image size (H, W).

    Raises:
        ValueError: Image `x` (B, in_chans, H, W) is of another size.
    """
    if x.shape[2] != img_size[0] or x.shape[3] != img_size[1]:
        raise ValueError(
            f'Input of size {x.shape[2]} x {x.shape[3]} does not match the model, which was made for '
            f'{img_size[0]} x {img_size[1]}; create it with the img_size of the input.')


@torch.fx.wrap
def average_logits(logits: torch.Tensor, logits_dist: torch.Tensor) -> torch.Tensor:
    """Mean of the logits (B, num_classes) of both heads.

    Raises:
        ValueError: The heads do not fit each other, because the user has replaced one.
    """
    if logits.shape != logits_dist.shape:
        raise ValueError(
            f'The head gives logits {list(logits.shape)} and head_dist {list(logits_dist.shape)}, and Evo-LeViT averages '
            f'them. Change both, best with reset_classifier(num_classes).')
    return (logits + logits_dist) / 2


def grid_sizes(img_size: Tuple[int, int], stride: int, num_stages: int) -> List[Tuple[int, int]]:
    """Size of the patch grid in each stage: stem and downsampling round up.

    Raises:
        ValueError: A downsampling attention would have a single patch, or none, to choose from.
    """
    H, W = [-(-size // stride) for size in img_size]
    grids = [(H, W)]
    while len(grids) < num_stages:
        H, W = -(-H // 2), -(-W // 2)
        grids.append((H, W))
    if min(grids[0]) < 1 or any(grid == (1, 1) for grid in grids[:-1]):
        raise ValueError(
            f'img_size {img_size[0]} x {img_size[1]} gives grids of {" -> ".join(f"{h} x {w}" for h, w in grids)} '
            f'patches, too small for {num_stages} stages; one side must be larger than '
            f'{stride * 2 ** max(num_stages - 2, 0)} pixels.')
    return grids


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, N, heads * d) to (B, heads, N, d), copied once here and not for each product that follows."""
    B, N, C = x.shape
    return x.reshape(B, N, num_heads, C // num_heads).transpose(1, 2).contiguous()


def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries (B, heads, M, d) over keys (B, heads, N, d) and values (B, heads, N, e).

    Written out: where e differs from d, scaled_dot_product_attention is slower on a CPU.

    Returns:
        (B, M, heads * e) and scaled dot products (B, heads, M, N).
    """
    scores = q * scale @ k.transpose(-2, -1)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2), scores


class WithoutBiases(nn.Module):
    """timm's attention of LeViT without its attention biases, to be inherited from before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.attention_biases, self.attention_bias_idxs

    def reset_parameters(self) -> None:
        pass  # of the biases

    def init_non_persistent_buffers(self) -> None:
        pass


class EvoLevitAttention(WithoutBiases, Attention):
    """LeViT's attention without attention biases, which can also write class attention."""

    def forward(self, x: torch.Tensor, state: Optional[EvolutionState] = None) -> torch.Tensor:
        """
        Args:
            x: Tokens (B, N, C), the class token first.
            state: Receives class attention over all tokens, (B, N).
        """
        q, k, v = split_heads(self.qkv(x), self.num_heads).split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        x, scores = attend(q, k, v, self.scale)
        if state is not None:
            state.class_attn = evolution.class_attention(scores[:, :, 0])
        return self.proj(x)


class EvoLevitBlock(LevitBlock):
    """Residual attention and residual MLP, which can also write the class attention of its attention layer."""

    def __init__(self, dim: int, key_dim: int, **kwargs: Any) -> None:
        super().__init__(dim, key_dim, resolution=1, **kwargs)
        self.attn = EvoLevitAttention(
            dim, key_dim, kwargs['num_heads'], kwargs['attn_ratio'], resolution=1, act_layer=kwargs['attn_act_layer'],
            device=kwargs['device'], dtype=kwargs['dtype'])
        self.grid = nn.Identity()  # called with the complete tokens where an evolution stage starts at this block

    def forward(self, x: torch.Tensor, state: Optional[EvolutionState] = None) -> torch.Tensor:
        """
        Args:
            x: Tokens (B, N, C), the class token first.
            state: Receives class attention over all tokens, (B, N).
        """
        x = x + self.drop_path1(self.attn(x, state))
        return x + self.drop_path2(self.mlp(x))


class EvoLevitAttentionDownsample(WithoutBiases, AttentionDownsample):
    """Attention from the class token and every second patch to all tokens, which adds its own position embedding."""

    def __init__(self, in_dim: int, out_dim: int, key_dim: int, tradeoff: float, **kwargs: Any) -> None:
        super().__init__(in_dim, out_dim, key_dim, **kwargs)
        self.tradeoff = tradeoff
        self.needs_class_attention = False  # a later selection reads the global class attention
        H, W = self.resolution
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + H * W, in_dim, device=kwargs['device'], dtype=kwargs['dtype']))

    def reset_parameters(self) -> None:
        if hasattr(self, 'pos_embed'):  # also called by the constructor of timm's class
            trunc_normal_(self.pos_embed, std=.02)

    def forward(self, x: torch.Tensor, state: Optional[EvolutionState] = None) -> torch.Tensor:
        """
        Args:
            x: Tokens (B, 1 + H * W, C).
            state: Global class attention (B, H * W), replaced by that of the smaller grid, whose sum is the same, or by
                None if nothing later reads it; and tradeoffs, of which the first is used up.

        Returns:
            Tokens (B, 1 + h * w, C) of the smaller grid.
        """
        x = x + self.pos_embed
        k, v = split_heads(self.kv(x), self.num_heads).split([self.key_dim, self.val_dim], dim=3)
        q = self.q.ln(torch.cat([x[:, :1], self.q.down(x[:, 1:])], dim=1))
        x, scores = attend(split_heads(q, self.num_heads), k, v, self.scale)
        if state is not None:
            tradeoff, global_attn = state.tradeoff, state.global_attn
            if self.needs_class_attention:
                class_attn = evolution.class_attention(scores[:, :, 0])[:, 1:]
                if global_attn is None:
                    global_attn = self.q.down(class_attn.unsqueeze(2)).squeeze(2)
                else:
                    total = global_attn.sum(dim=1, keepdim=True)
                    global_attn = evolution.update_global_attn(
                        global_attn, class_attn, self.tradeoff, None if tradeoff is None else tradeoff[0])
                    global_attn = self.q.down(global_attn.unsqueeze(2)).squeeze(2)
                    global_attn = global_attn * (total / global_attn.sum(dim=1, keepdim=True))
                state.global_attn = global_attn
            else:
                state.global_attn = None
            if tradeoff is not None:
                state.tradeoff = tradeoff[1:]
        return self.proj(x)


class EvoLevitDownsample(LevitDownsample):
    """Downsampling attention and a residual MLP."""

    def __init__(self, in_dim: int, out_dim: int, key_dim: int, tradeoff: float, **kwargs: Any) -> None:
        super().__init__(in_dim, out_dim, key_dim, **kwargs)
        names = ('num_heads', 'attn_ratio', 'resolution', 'device', 'dtype')
        self.attn_downsample = EvoLevitAttentionDownsample(
            in_dim, out_dim, key_dim, tradeoff, act_layer=kwargs['attn_act_layer'], **{n: kwargs[n] for n in names})

    def forward(self, x: torch.Tensor, state: Optional[EvolutionState] = None) -> torch.Tensor:
        x = self.attn_downsample(x, state)
        return x + self.drop_path(self.mlp(x))


class EvoLevitStage(LevitStage):
    """A downsampling attention, except in the first stage, and blocks that evolve slow and fast tokens."""

    def __init__(
            self,
            in_dim: int,
            out_dim: int,
            key_dim: int,
            depth: int,
            in_grid_size: Optional[Tuple[int, int]],
            grid_size: Tuple[int, int],
            tradeoff: float,
            representative_token: bool,
            num_heads: int,
            attn_ratio: float,
            mlp_ratio: float,
            **kwargs: Any,
    ) -> None:
        """
        Args:
            in_grid_size: Grid to downsample, None where the stage does not.
            grid_size: Grid of the blocks.
            tradeoff: Weight of an attention's class attention in the global one, unless forward is given others.
            num_heads, attn_ratio, mlp_ratio: Of the blocks.
            **kwargs: act_layer, attn_act_layer, drop_path, device, dtype.
        """
        super().__init__(out_dim, out_dim, key_dim, depth=0, **kwargs)
        self.grid_size = grid_size
        self.downsample = None
        if in_grid_size is not None:
            self.downsample = EvoLevitDownsample(
                in_dim, out_dim, key_dim, tradeoff, num_heads=in_dim // key_dim, attn_ratio=4., resolution=in_grid_size,
                **kwargs)
        self.blocks = EvolvingSequential(
            *[
                EvoLevitBlock(
                    out_dim, key_dim, num_heads=num_heads, attn_ratio=attn_ratio, mlp_ratio=mlp_ratio, **kwargs)
                for _ in range(depth)
            ],
            tradeoff=[tradeoff] * depth,
            representative_token=representative_token,
        )

    @torch.jit.ignore
    def set_schedule(self, schedule: Schedule, layerwise: Optional[Schedule]) -> None:
        """Set the schedules of all attentions, the downsampling one first."""
        first = int(self.downsample is not None)
        if self.downsample is not None:  # a selection follows in both or in none
            self.downsample.attn_downsample.needs_class_attention = schedule.needs_class_attention[0]
        self.blocks.set_schedule(schedule.part(first), None if layerwise is None else layerwise.part(first))

    def forward(self, x: torch.Tensor, state: Optional[EvolutionState] = None) -> torch.Tensor:
        """
        Args:
            x: Tokens (B, N, C), the class token first.
            state: Global class attention and tradeoffs so far, and selections. Updated.

        Returns:
            Tokens (B, 1 + h * w, C).
        """
        if state is None:
            state = EvolutionState()
        if self.downsample is not None:
            x = self.downsample(x, state)
        return self.blocks(x, state)


class EvoLevit(EvolvingModel, LevitDistilled):
    """LeViT with slow-fast token evolution.

    A class token and position embeddings take the place of attention biases. Class attention tells informative patches
    from placeholders. Informative patches go through the blocks, placeholders are updated by one representative token;
    at the end of every stage the patch grid is complete. Two heads classify the averaged patches, the second is meant
    for distillation, and inference takes the mean of their logits.
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            embed_dim: Tuple[int, ...] = (192,),
            key_dim: int = 64,
            depth: Tuple[int, ...] = (12,),
            num_heads: Union[int, Tuple[int, ...]] = (3,),
            attn_ratio: Union[float, Tuple[float, ...]] = 2.,
            mlp_ratio: Union[float, Tuple[float, ...]] = 2.,
            *,
            act_layer: str = 'hard_swish',
            attn_act_layer: Optional[str] = None,
            use_conv: bool = False,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
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
            img_size: Input image size; forward takes no other.
            in_chans: Number of image input channels.
            num_classes: Number of classes for classification heads.
            embed_dim: Width of each stage.
            key_dim: Width of queries and keys in each head.
            depth: Number of blocks in each stage.
            num_heads: Number of heads in each stage.
            attn_ratio: Ratio of value to key width.
            mlp_ratio: Ratio of hidden width to width in the MLPs.
            act_layer: Activation in stem and MLPs.
            attn_act_layer: Activation in attention, the same by default.
            use_conv: Not supported, token selection works on sequences.
            drop_path_rate: Stochastic depth rate, the same everywhere.
            keep_ratio: Ratio of informative patches in (0, 1], one for all stages or one per stage. Blocks 0 and 1
                of the first stage always see all patches.
            tradeoff: Weight in [0, 1] of each attention's class attention in the global class attention, or 'learned',
                one scalar per attention.
            selection: When informative patches are selected anew, at each 'stage' or before each 'layer' of it.
            representative_token: Update placeholders by a representative token, or leave them as they are until the
                stage ends.
            assisted_cls: With 'avg' pooling, classify the class token as well while training, by two heads of its own
                (paper section 'Assisted CLS token loss').
            layer_to_stage_epochs: Select layer-wise in so many epochs of training, with a tradeoff of 0.5 that is not
                learned, then stage-wise (paper section 'Layer-to-stage training schedule'; 200 of 300 epochs there).
            **kwargs: Arguments of timm's Levit.

        Raises:
            TypeError, ValueError: An argument is of the wrong kind, out of range or of the wrong length.
        """
        dd = {'device': device, 'dtype': dtype}
        check(not use_conv, 'use_conv', 'False: tokens are selected from sequences, not from maps', use_conv)
        backbone = kwargs.get('stem_backbone')
        check(backbone is None, 'stem_backbone', "None: the grid is known for the stems of stem_type, 's16' and 's8'", backbone)
        check(
            isinstance(embed_dim, Sequence) and not isinstance(embed_dim, str), 'embed_dim',
            'one width per stage, such as (128, 256, 384)', embed_dim, TypeError)
        num_stages = len(embed_dim)
        per_stage = dict(depth=depth, num_heads=num_heads, attn_ratio=attn_ratio, mlp_ratio=mlp_ratio)
        for name, value in per_stage.items():
            values = tuple(value) if isinstance(value, Sequence) else (value,) * num_stages
            check(len(values) == num_stages, name, f'one number or one per stage, {num_stages} by embed_dim', value)
            per_stage[name] = values
        narrowest = min(embed_dim[:-1] or embed_dim)
        check(
            0 < key_dim <= narrowest, 'key_dim',
            f'in 1 .. {narrowest} for downsampling attentions of embed_dim // key_dim heads', key_dim)
        check_flag('representative_token', representative_token)
        fixed_tradeoff = 0.5
        if tradeoff != 'learned':
            check(not isinstance(tradeoff, str), 'tradeoff', "'learned' or a number in [0, 1]", tradeoff)
            fixed_tradeoff, = check_ratios('tradeoff', tradeoff, 1, 'model', zero=True)

        # everything but the stages is timm's: none of its blocks are asked for, its downsampling is replaced
        super().__init__(
            in_chans=in_chans, num_classes=num_classes, embed_dim=embed_dim, key_dim=key_dim, depth=(0,) * num_stages,
            num_heads=per_stage['num_heads'], act_layer=act_layer, **kwargs, **dd)
        self.img_size = to_2tuple(img_size)
        grids = grid_sizes(self.img_size, self.feature_info[0]['reduction'], num_stages)
        self.stages = nn.ModuleList([
            EvoLevitStage(
                embed_dim[max(i - 1, 0)],
                embed_dim[i],
                key_dim,
                in_grid_size=grids[i - 1] if i > 0 else None,
                grid_size=grids[i],
                tradeoff=fixed_tradeoff,
                representative_token=representative_token,
                act_layer=get_act_layer(act_layer),
                attn_act_layer=get_act_layer(attn_act_layer or act_layer),
                drop_path=drop_path_rate,
                **{name: values[i] for name, values in per_stage.items()},
                **dd,
            )
            for i in range(num_stages)
        ])
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim[0], **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grids[0][0] * grids[0][1], embed_dim[0], **dd))
        num_attentions = sum(per_stage['depth']) + num_stages - 1
        self.tradeoff = nn.Parameter(torch.empty(num_attentions, **dd)) if tradeoff == 'learned' else None
        self.fixed_tradeoff = fixed_tradeoff

        self._init_evolution(keep_ratio, num_stages, selection, assisted_cls, layer_to_stage_epochs, device)
        self._reset_cls_heads()
        self.init_weights(needs_reset=True)

    def reset_parameters(self) -> None:
        """Initialize what is not in a submodule."""
        if hasattr(self, 'cls_token'):  # also called by the constructor of timm's class
            nn.init.zeros_(self.cls_token)
            trunc_normal_(self.pos_embed, std=.02)
            if self.tradeoff is not None:
                nn.init.zeros_(self.tradeoff)

    def _init_weights(self, m: nn.Module, needs_reset: bool = True) -> None:
        super()._init_weights(m, needs_reset)
        if not needs_reset:
            return
        # children come first: what reset_parameters of a linear or a norm layer has undone is done here again
        if isinstance(m, NormLinear):
            trunc_normal_(m.linear.weight, std=.02)
            nn.init.zeros_(m.linear.bias)
        elif isinstance(m, EvoLevitAttention):
            nn.init.zeros_(m.proj.ln.bn.weight)
        elif isinstance(m, LevitMlp):
            nn.init.zeros_(m.ln2.bn.weight)

    @torch.jit.ignore
    def _set_schedule(self) -> None:
        """One schedule of all attentions, the downsampling ones included, is cut into those of the stages."""
        starts: List[int] = []
        ratios: List[float] = []
        tradeoff: List[float] = []
        bounds: List[Tuple[int, int]] = []
        for i, stage in enumerate(self.stages):
            first, num_blocks = len(tradeoff), len(stage.blocks)
            dense = 2  # blocks 0 and 1 of the first stage see all patches
            if i > 0:
                dense = 0
                starts.append(first)
                ratios.append(1.)
                tradeoff.append(0.)  # never replaces the global class attention: its sum always remains
            if num_blocks > dense:
                starts.append(len(tradeoff) + dense)
                ratios.append(self.keep_ratio[i])
            tradeoff += [self.fixed_tradeoff] * num_blocks
            bounds.append((first, len(tradeoff)))
        schedule, layerwise = self._build_schedules(tradeoff, starts, ratios)
        for stage, (first, end) in zip(self.stages, bounds):
            stage.set_schedule(
                schedule.part(first, end), None if layerwise is None else layerwise.part(first, end))

    @torch.jit.ignore
    def _current_args(self) -> Dict[str, Any]:
        return dict(img_size=self.img_size, in_chans=self.in_chans, global_pool=self.global_pool)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        for stage in self.stages:
            stage.blocks.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return {n for n, _ in self.named_parameters() if n.rpartition('.')[2] in ('cls_token', 'pos_embed', 'tradeoff')}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Union[str, List]]:
        return dict(super().group_matcher(coarse), stem=r'^(?:stem\.|cls_token|pos_embed|tradeoff)')

    @torch.jit.ignore
    def get_classifier(self) -> nn.ModuleList:
        """All heads, as one module."""
        heads = [self.head, self.head_dist, self.head_cls, self.head_cls_dist]
        return nn.ModuleList([head for head in heads if head is not None])

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self._reset_cls_heads()

    def _reset_cls_heads(self) -> None:
        """Give the class token two heads where it has something to assist: averaged patches, and classes."""
        self.head_cls: Optional[nn.Module] = None
        self.head_cls_dist: Optional[nn.Module] = None
        if self.assisted_cls and self.num_classes > 0 and self.global_pool == 'avg':
            args = dict(drop=self.drop_rate, **get_device_dtype(self))
            self.head_cls = NormLinear(self.num_features, self.num_classes, **args).train(self.training)
            self.head_cls_dist = NormLinear(self.num_features, self.num_classes, **args).train(self.training)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        max_index = feature_take_indices(len(self.stages), indices)[1]
        # heads are sized for the last stage, they go with it
        prune_head = prune_head or max_index < len(self.stages) - 1
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        self.keep_ratio = self.keep_ratio[:len(self.stages)]
        self._set_schedule()
        return take_indices

    def _embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, EvolutionState]:
        """Image (B, in_chans, H, W) to tokens (B, 1 + n, C), and what goes through the stages beside them."""
        check_input_size(x, self.img_size)
        if not self.training:
            # channels last: faster convolutions on a CPU, whose output is a sequence of tokens without a copy; batch
            # statistics, though, are less exact in this format. vmap knows no memory formats, but it knows permute
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
        return x, EvolutionState(tradeoff)

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
        """Forward features that returns intermediates, the complete patch grid after any stage.

        Args:
            x: Input image tensor (B, in_chans, H, W).
            indices: Take last n stages if int, all if None, select matching indices if sequence.
            norm: Apply norm layer to compatible intermediates, of which there are none.
            stop_early: Stop iterating over stages when last desired intermediate hit.
            output_fmt: Shape of intermediate feature outputs, 'NCHW' (B, C, h, w).
            intermediates_only: Only return intermediate features.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates: List[torch.Tensor] = []
        x, state = self._embed(x)
        for i, stage in enumerate(self.stages):
            if i <= max_index or not stop_early:
                x = stage(x, state)
                if i in take_indices:
                    H, W = stage.grid_size
                    intermediates.append(
                        x[:, 1:].reshape(x.shape[0], H, W, x.shape[2]).permute(0, 3, 1, 2).contiguous())
        if intermediates_only:
            return intermediates
        return x, intermediates

    @torch.jit.ignore
    def forward_selections(self, x: torch.Tensor) -> List[Tuple[Selection, Tuple[int, int]]]:
        """Image (B, in_chans, H, W) to the token selections made in it, each with its grid size.

        Blocks are counted through the stages, without downsampling attentions.
        """
        found: List[Tuple[Selection, Tuple[int, int]]] = []
        first = 0
        x, state = self._embed(x)
        for stage in self.stages:
            x = stage(x, state)
            found += [(s._replace(block=first + s.block), stage.grid_size) for s in state.selections[len(found):]]
            first += len(stage.blocks)
        return found

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> Union[torch.Tensor, Tuple[Any, Any]]:
        """Tokens (B, 1 + n, C) to logits (B, num_classes).

        In training mode with an assisted class token, a random half of the samples is answered by the averaged-patch
        heads and the rest by the class token heads, see `timm_evovit.training`. With `set_distilled_training(True)` each
        of the logits is a pair (logits, logits for distillation) instead of their mean.
        """
        features = x[:, 1:].mean(dim=1) if self.global_pool == 'avg' else x
        if pre_logits:
            return features
        logits, logits_dist = self.head(features), self.head_dist(features)
        distilled = self.distilled_training and self.training and not torch.jit.is_scripting()
        if self.head_cls is not None and self.is_assisted():
            logits_cls, logits_cls_dist = self.head_cls(x[:, 0]), self.head_cls_dist(x[:, 0])
            if self.assisted_training and not torch.jit.is_scripting():
                if distilled:
                    return (logits, logits_dist), (logits_cls, logits_cls_dist)
                return average_logits(logits, logits_dist), average_logits(logits_cls, logits_cls_dist)
            if distilled:
                mixed = training.mix_heads(
                    torch.stack([logits, logits_dist], dim=1), torch.stack([logits_cls, logits_cls_dist], dim=1))
                return mixed[:, 0], mixed[:, 1]
            return training.mix_heads(average_logits(logits, logits_dist), average_logits(logits_cls, logits_cls_dist))
        if distilled:
            return logits, logits_dist
        return average_logits(logits, logits_dist)


def _create_evo_levit(
        variant: str,
        pretrained: bool = False,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> EvoLevit:
    out_indices = kwargs.pop('out_indices', (0, 1, 2))
    cfg = resolve_weights(
        variant, pretrained, pretrained_cfg, pretrained_cfg_overlay,
        'which no Evo-LeViT has but Evo-DeiT has: evo_deit_small_patch16_224.fb_in1k, for one')
    model = build_model_with_cfg(
        EvoLevit,
        variant,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=partial(checkpoint_filter_fn, strict=kwargs.get('pretrained_strict', True)),
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )
    if isinstance(model, EvoLevit):
        model._remember_args(**kwargs)
    return model


def _cfg(url: str = '', **kwargs: Any) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': None,
        'crop_pct': .875, 'interpolation': 'bicubic', 'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1.linear',
        'classifier': ('head.linear', 'head_dist.linear', 'head_cls.linear', 'head_cls_dist.linear'),
        'paper_ids': 'arXiv:2108.01390',
        'paper_name': 'Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer',
        'origin_url': 'https://github.com/YifanXu74/Evo-ViT',
        **kwargs
    }


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
    """Evo-LeViT-128S @ 224x224 from paper (https://arxiv.org/abs/2108.01390)."""
    model_args = dict(embed_dim=(128, 256, 384), key_dim=16, num_heads=(4, 6, 8), depth=(2, 3, 4))
    return _create_evo_levit('evo_levit_128s', pretrained, **dict(model_args, **kwargs))


@register_model
def evo_levit_128(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-128 @ 224x224 from paper (https://arxiv.org/abs/2108.01390)."""
    model_args = dict(embed_dim=(128, 256, 384), key_dim=16, num_heads=(4, 8, 12), depth=(4, 4, 4))
    return _create_evo_levit('evo_levit_128', pretrained, **dict(model_args, **kwargs))


@register_model
def evo_levit_192(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-192 @ 224x224 from paper (https://arxiv.org/abs/2108.01390)."""
    model_args = dict(embed_dim=(192, 288, 384), key_dim=32, num_heads=(3, 5, 6), depth=(4, 4, 4))
    return _create_evo_levit('evo_levit_192', pretrained, **dict(model_args, **kwargs))


@register_model
def evo_levit_256(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-256 @ 224x224 from paper (https://arxiv.org/abs/2108.01390)."""
    model_args = dict(embed_dim=(256, 384, 512), key_dim=32, num_heads=(4, 6, 8), depth=(4, 4, 4))
    return _create_evo_levit('evo_levit_256', pretrained, **dict(model_args, **kwargs))


@register_model
def evo_levit_384(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-384 @ 224x224 from paper (https://arxiv.org/abs/2108.01390)."""
    model_args = dict(embed_dim=(384, 512, 768), key_dim=32, num_heads=(6, 9, 12), depth=(4, 4, 4), drop_path_rate=0.1)
    return _create_evo_levit('evo_levit_384', pretrained, **dict(model_args, **kwargs))


@register_model
def evo_levit_128s_384(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-128S @ 384x384, not in the paper."""
    model_args = dict(embed_dim=(128, 256, 384), key_dim=16, num_heads=(4, 6, 8), depth=(2, 3, 4))
    return _create_evo_levit('evo_levit_128s_384', pretrained, **dict(model_args, **kwargs))


@register_model
def evo_levit_128_384(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-128 @ 384x384, not in the paper."""
    model_args = dict(embed_dim=(128, 256, 384), key_dim=16, num_heads=(4, 8, 12), depth=(4, 4, 4))
    return _create_evo_levit('evo_levit_128_384', pretrained, **dict(model_args, **kwargs))


@register_model
def evo_levit_192_384(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-192 @ 384x384, not in the paper."""
    model_args = dict(embed_dim=(192, 288, 384), key_dim=32, num_heads=(3, 5, 6), depth=(4, 4, 4))
    return _create_evo_levit('evo_levit_192_384', pretrained, **dict(model_args, **kwargs))


@register_model
def evo_levit_256_384(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-256 @ 384x384 from paper (https://arxiv.org/abs/2108.01390)."""
    model_args = dict(embed_dim=(256, 384, 512), key_dim=32, num_heads=(4, 6, 8), depth=(4, 4, 4))
    return _create_evo_levit('evo_levit_256_384', pretrained, **dict(model_args, **kwargs))


@register_model
def evo_levit_384_384(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-384 @ 384x384 from paper (https://arxiv.org/abs/2108.01390)."""
    model_args = dict(embed_dim=(384, 512, 768), key_dim=32, num_heads=(6, 9, 12), depth=(4, 4, 4), drop_path_rate=0.1)
    return _create_evo_levit('evo_levit_384_384', pretrained, **dict(model_args, **kwargs))
