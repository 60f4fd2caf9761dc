"""Evo-LeViT - LeViT with slow-fast token evolution

Paper: `Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390

Yifan Xu, Zhijie Zhang, Mengdan Zhang, Kekai Sheng, Ke Li, Weiming Dong, Liqing Zhang, Changsheng Xu, Xing Sun.
"""
from collections import OrderedDict
from functools import partial
from numbers import Real
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Type, Union

import torch
from torch import nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, get_act_layer, to_2tuple, to_ntuple, trunc_normal_
from timm.models import PretrainedCfg, build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.levit import Levit, LevitMlp, LinearNorm, NormLinear

from . import evolution, training
from .checkpoints import levit_checkpoint_filter_fn as checkpoint_filter_fn
from .hub import HubModel, published, resolve_weights

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


def check_tradeoff(value: Union[str, float]) -> Optional[float]:
    """`tradeoff` as a number, or None if it is learned.

    Raises:
        TypeError, ValueError: Neither 'learned' nor a number in [0, 1].
    """
    if isinstance(value, str) and value == 'learned':
        return None
    message = f"tradeoff must be 'learned' or a number in [0, 1], got {value!r}."
    if isinstance(value, bool) or not isinstance(value, (str, Real)):
        raise TypeError(message)
    if isinstance(value, str) or not 0 <= value <= 1:
        raise ValueError(message)
    return float(value)


def per_stage(name: str, value: Any, num_stages: int) -> Tuple[Any, ...]:
    """One value for each stage, given so or as one for all.

    Raises:
        ValueError: There are more of them, or fewer.
    """
    values = to_ntuple(num_stages)(value)
    if len(values) != num_stages:
        raise ValueError(f'{name} must be one number or one per stage, {num_stages} by embed_dim, got {value!r}.')
    return tuple(values)


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


def subsample(x: torch.Tensor, grid_size: Tuple[int, int]) -> torch.Tensor:
    """Every second patch of (B, H * W, C) in both directions."""
    B, _, C = x.shape
    H, W = grid_size
    return x.reshape(B, H, W, C)[:, ::2, ::2].flatten(1, 2)


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


class EvoLevitAttention(nn.Module):
    """LeViT's attention without attention biases, which can also return class attention."""

    def __init__(
            self,
            dim: int,
            key_dim: int,
            num_heads: int,
            attn_ratio: float,
            act_layer: Type[nn.Module],
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.scale = key_dim ** -0.5
        self.key_dim = key_dim
        self.val_dim = int(attn_ratio * key_dim)

        self.qkv = LinearNorm(dim, num_heads * (2 * key_dim + self.val_dim), **dd)
        self.proj = nn.Sequential(OrderedDict([
            ('act', act_layer()),
            ('ln', LinearNorm(num_heads * self.val_dim, dim, bn_weight_init=0, **dd)),
        ]))

    def forward(self, x: torch.Tensor, class_attention: bool = False):  # TorchScript infers the return type
        """
        Args:
            x: Tokens (B, N, C), the class token first.
            class_attention: Return class attention over all tokens, (B, N), beside the output (B, N, C).
        """
        if class_attention and not torch.jit.is_scripting():
            return self.forward_class_attention(x)
        return self._attend(x)[0]

    def forward_class_attention(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The same, with class attention, for TorchScript."""
        x, scores = self._attend(x)
        return x, evolution.class_attention(scores[:, :, 0])

    def _attend(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Output (B, N, C) and scaled dot products (B, heads, N, N)."""
        q, k, v = split_heads(self.qkv(x), self.num_heads).split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        x, scores = attend(q, k, v, self.scale)
        return self.proj(x), scores


class EvoLevitAttentionDownsample(nn.Module):
    """Attention from the class token and every second patch to all tokens, which adds its own position embedding."""

    def __init__(
            self,
            in_dim: int,
            out_dim: int,
            key_dim: int,
            num_heads: int,
            attn_ratio: float,
            grid_size: Tuple[int, int],
            act_layer: Type[nn.Module],
            tradeoff: float,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.scale = key_dim ** -0.5
        self.key_dim = key_dim
        self.val_dim = int(attn_ratio * key_dim)
        self.grid_size = grid_size
        self.tradeoff = tradeoff
        self.live = False  # a later selection reads the global class attention

        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid_size[0] * grid_size[1], in_dim, **dd))
        self.kv = LinearNorm(in_dim, num_heads * (key_dim + self.val_dim), **dd)
        self.q = nn.Sequential(OrderedDict([('ln', LinearNorm(in_dim, num_heads * key_dim, **dd))]))
        self.proj = nn.Sequential(OrderedDict([
            ('act', act_layer()),
            ('ln', LinearNorm(num_heads * self.val_dim, out_dim, **dd)),
        ]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.pos_embed, std=.02)

    def forward(
            self,
            x: torch.Tensor,
            attention: Optional[torch.Tensor],
            tradeoff: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """
        Args:
            x: Tokens (B, 1 + H * W, C).
            attention: Global class attention (B, H * W), if any.
            tradeoff: Scalar that takes the place of the fixed tradeoff, if given.

        Returns:
            Tokens and global class attention of the smaller grid, the latter None if nothing later reads it.
        """
        x = x + self.pos_embed
        k, v = split_heads(self.kv(x), self.num_heads).split([self.key_dim, self.val_dim], dim=3)
        q = self.q(torch.cat([x[:, :1], subsample(x[:, 1:], self.grid_size)], dim=1))
        q = split_heads(q, self.num_heads)
        x, scores = attend(q, k, v, self.scale)
        x = self.proj(x)
        if not self.live:
            return x, None

        row = evolution.class_attention(scores[:, :, 0])[:, 1:]
        if attention is None:
            return x, subsample(row.unsqueeze(2), self.grid_size).squeeze(2)
        total = attention.sum(dim=1, keepdim=True)
        attention = evolution.mix(attention, row, self.tradeoff, tradeoff)
        attention = subsample(attention.unsqueeze(2), self.grid_size).squeeze(2)
        return x, attention * (total / attention.sum(dim=1, keepdim=True))


class EvoLevitDownsample(nn.Module):
    """Downsampling attention and a residual MLP."""

    def __init__(
            self,
            in_dim: int,
            out_dim: int,
            key_dim: int,
            grid_size: Tuple[int, int],
            act_layer: Type[nn.Module],
            attn_act_layer: Type[nn.Module],
            drop_path: float,
            tradeoff: float,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.attn_downsample = EvoLevitAttentionDownsample(
            in_dim,
            out_dim,
            key_dim,
            num_heads=in_dim // key_dim,
            attn_ratio=4.,
            grid_size=grid_size,
            act_layer=attn_act_layer,
            tradeoff=tradeoff,
            **dd,
        )
        self.mlp = LevitMlp(out_dim, 2 * out_dim, act_layer=act_layer, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(
            self,
            x: torch.Tensor,
            attention: Optional[torch.Tensor],
            tradeoff: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        x, attention = self.attn_downsample(x, attention, tradeoff)
        return x + self.drop_path(self.mlp(x)), attention


class EvoLevitBlock(nn.Module):
    """Residual attention and residual MLP, which can also return the class attention of its attention layer."""

    def __init__(
            self,
            dim: int,
            key_dim: int,
            num_heads: int,
            attn_ratio: float,
            mlp_ratio: float,
            act_layer: Type[nn.Module],
            attn_act_layer: Type[nn.Module],
            drop_path: float,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.attn = EvoLevitAttention(dim, key_dim, num_heads, attn_ratio, attn_act_layer, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.mlp = LevitMlp(dim, int(dim * mlp_ratio), act_layer=act_layer, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, class_attention: bool = False):  # TorchScript infers the return type
        """
        Args:
            x: Tokens (B, N, C), the class token first.
            class_attention: Return class attention over all tokens, (B, N), beside the tokens.
        """
        if torch.jit.is_scripting() or not class_attention:
            return self._residual(x, self.attn(x))
        attn, row = self.attn(x, class_attention=True)
        return self._residual(x, attn), row

    def forward_class_attention(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The same, with class attention, for TorchScript."""
        attn, row = self.attn.forward_class_attention(x)
        return self._residual(x, attn), row

    def _residual(self, x: torch.Tensor, attn: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(attn)
        return x + self.drop_path2(self.mlp(x))


class EvoLevitStage(nn.Module):
    """A downsampling attention, except in the first stage, and blocks that evolve slow and fast tokens."""

    def __init__(
            self,
            in_dim: int,
            out_dim: int,
            key_dim: int,
            depth: int,
            num_heads: int,
            attn_ratio: float,
            mlp_ratio: float,
            act_layer: Type[nn.Module],
            attn_act_layer: Type[nn.Module],
            in_grid_size: Optional[Tuple[int, int]],
            grid_size: Tuple[int, int],
            drop_path: float,
            schedule: evolution.Schedule,
            tradeoff: float,
            representative_token: bool,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_grid_size: Grid to downsample, None where the stage does not.
            grid_size: Grid of the blocks.
            schedule: One entry per attention, the downsampling one first.
            tradeoff: Weight of an attention's class attention in the global one, unless forward is given others.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grid_size = grid_size
        self.num_attentions = len(schedule.live)
        self.downsample = None if in_grid_size is None else EvoLevitDownsample(
            in_dim, out_dim, key_dim, in_grid_size, act_layer, attn_act_layer, drop_path, tradeoff, **dd)
        blocks = [
            EvoLevitBlock(
                out_dim, key_dim, num_heads, attn_ratio, mlp_ratio, act_layer, attn_act_layer, drop_path, **dd)
            for _ in range(depth)
        ]
        self.blocks = evolution.EvolvingSequential(
            *blocks,
            schedule=schedule,
            tradeoff=[tradeoff] * depth,
            representative_token=representative_token,
        )
        self.set_schedule(schedule)

    @torch.jit.ignore
    def set_schedule(self, schedule: evolution.Schedule) -> None:
        """Replace the schedule, weights untouched."""
        if self.downsample is not None:
            self.downsample.attn_downsample.live = schedule.live[0]
            schedule = evolution.Schedule(schedule.keep[1:], schedule.live[1:])
        self.blocks.set_schedule(schedule)

    def forward(
            self,
            x: torch.Tensor,
            attention: Optional[torch.Tensor],
            tradeoff: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], List[evolution.Selection]]:
        """
        Args:
            x: Tokens (B, N, C), the class token first.
            attention: Global class attention (B, n), if any.
            tradeoff: Weights, one per attention, that take the place of the fixed one, if given.

        Returns:
            Tokens, global class attention or None if nothing later reads it, and the selections made.
        """
        if self.downsample is not None:
            x, attention = self.downsample(x, attention, None if tradeoff is None else tradeoff[0])
            tradeoff = None if tradeoff is None else tradeoff[1:]
        x, attention, _, selections = self.blocks.evolve(x, attention, tradeoff, [])
        return x, attention, selections


class EvoLevit(HubModel, training.LayerToStage, Levit):
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
        if use_conv:
            raise ValueError('use_conv=True is not supported: tokens are selected from sequences, not from maps.')
        if kwargs.get('stem_backbone') is not None:
            raise ValueError(
                'stem_backbone is not supported: the grid is known for the stems of stem_type only, s16 and s8.')
        if isinstance(embed_dim, str) or not isinstance(embed_dim, Sequence):
            raise TypeError(f'embed_dim must be one width per stage, such as (128, 256, 384), got {embed_dim!r}.')
        num_stages = len(embed_dim)
        depth, num_heads, attn_ratio, mlp_ratio = (
            per_stage(name, value, num_stages) for name, value in (
                ('depth', depth), ('num_heads', num_heads), ('attn_ratio', attn_ratio), ('mlp_ratio', mlp_ratio)))
        narrowest = min(embed_dim[:-1] or embed_dim)
        if not 0 < key_dim <= narrowest:
            raise ValueError(
                f'key_dim must be 1 .. {narrowest} for downsampling attentions of embed_dim // key_dim heads, got '
                f'{key_dim!r}.')
        evolution.check_flag('representative_token', representative_token)
        keep_ratio = evolution.check_keep_ratio(keep_ratio, num_stages)
        fixed_tradeoff = check_tradeoff(tradeoff)
        # everything but the stages is timm's: none of its blocks are asked for, its downsampling is replaced
        super().__init__(
            in_chans=in_chans, num_classes=num_classes, embed_dim=embed_dim, key_dim=key_dim, depth=(0,) * num_stages,
            act_layer=act_layer, num_heads=num_heads, **kwargs, **dd)
        self.img_size = to_2tuple(img_size)
        self.keep_ratio = keep_ratio
        self.selection = evolution.check_selection(selection)
        self.fixed_tradeoff = 0.5 if fixed_tradeoff is None else fixed_tradeoff

        grids = grid_sizes(self.img_size, self.feature_info[0]['reduction'], num_stages)
        self.stages = nn.ModuleList([
            EvoLevitStage(
                embed_dim[max(i - 1, 0)],
                embed_dim[i],
                key_dim,
                depth=depth[i],
                num_heads=num_heads[i],
                attn_ratio=attn_ratio[i],
                mlp_ratio=mlp_ratio[i],
                act_layer=get_act_layer(act_layer),
                attn_act_layer=get_act_layer(attn_act_layer or act_layer),
                in_grid_size=grids[i - 1] if i > 0 else None,
                grid_size=grids[i],
                drop_path=drop_path_rate,
                schedule=schedule,
                tradeoff=self.fixed_tradeoff,
                representative_token=representative_token,
                **dd,
            )
            for i, schedule in enumerate(self._schedules(depth))
        ])
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim[0], **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grids[0][0] * grids[0][1], embed_dim[0], **dd))
        num_attentions = sum(depth) + num_stages - 1
        self.tradeoff = nn.Parameter(torch.empty(num_attentions, **dd)) if fixed_tradeoff is None else None

        self.assisted_cls = evolution.check_flag('assisted_cls', assisted_cls)
        self.distilled_training = False  # must set this True to train w/ separate logits for distillation
        self.assisted_training = False  # must set this True to train w/ the logits of both branches
        self.reset_classifier(num_classes)
        self._init_layer_to_stage(layer_to_stage_epochs, selection, device)
        self.reset_parameters()

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
        # children come first: what reset_parameters of a linear or a norm layer has undone is done here again
        if isinstance(m, NormLinear):
            trunc_normal_(m.linear.weight, std=.02)
            nn.init.zeros_(m.linear.bias)
        elif isinstance(m, EvoLevitAttention):
            nn.init.zeros_(m.proj.ln.bn.weight)
        elif isinstance(m, LevitMlp):
            nn.init.zeros_(m.ln2.bn.weight)

    def _schedules(self, depth: Sequence[int]) -> List[evolution.Schedule]:
        """The schedule of each stage, cut out of that of all attentions, the downsampling ones included."""
        starts, ratios, tradeoff, bounds = [], [], [], []
        for i, num_blocks in enumerate(depth):
            bounds.append(len(tradeoff))
            dense = 2  # blocks 0 and 1 of the first stage see all patches
            if i > 0:
                dense = 0
                starts.append(len(tradeoff))
                ratios.append(1.)
                tradeoff.append(0.)  # never replaces the global class attention: its sum always remains
            if num_blocks > dense:
                starts.append(len(tradeoff) + dense)
                ratios.append(self.keep_ratio[i])
            tradeoff += [self.fixed_tradeoff] * num_blocks
        selection = 'layer' if self.layerwise_phase else self.selection
        keep, live = evolution.Schedule.build(tradeoff, starts, ratios, selection)
        ends = bounds[1:] + [len(tradeoff)]
        return [evolution.Schedule(keep[a:b], live[a:b]) for a, b in zip(bounds, ends)]

    @torch.jit.ignore
    def _set_schedule(self) -> None:
        for stage, schedule in zip(self.stages, self._schedules([len(stage.blocks) for stage in self.stages])):
            stage.set_schedule(schedule)

    @torch.jit.ignore
    def set_keep_ratio(self, keep_ratio: Union[float, Sequence[float]]) -> None:
        """Change the ratio of informative patches, weights untouched. At 1 the model is its dense twin.

        Args:
            keep_ratio: Ratio in (0, 1], one for all stages or one per stage.

        Raises:
            TypeError, ValueError: As at construction; the model is then unchanged.
        """
        self.keep_ratio = evolution.check_keep_ratio(keep_ratio, len(self.stages))
        self._set_schedule()
        self._remember_args(keep_ratio=self.keep_ratio)

    @torch.jit.ignore
    def _current_args(self) -> Dict[str, Any]:
        return dict(img_size=self.img_size, in_chans=self.in_chans, global_pool=self.global_pool)

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Return (logits, logits for distillation) in training mode, instead of their mean."""
        self.distilled_training = enable

    @torch.jit.ignore
    def set_assisted_training(self, enable: bool = True) -> None:
        """Return (averaged-patch output, class token output) in training mode, for `AssistedLoss`.

        With `set_distilled_training(True)` as well, each of both is a pair (logits, logits for distillation).
        """
        self.assisted_training = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return {n for n, _ in self.named_parameters() if n.rpartition('.')[2] in ('cls_token', 'pos_embed', 'tradeoff')}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Union[str, List]]:
        return dict(
            stem=r'^(?:stem\.|cls_token|pos_embed|tradeoff)',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
            ],
        )

    @torch.jit.ignore
    def get_classifier(self) -> Tuple[nn.Module, ...]:
        heads = (self.head, self.head_dist)
        return heads if self.head_cls is None else heads + (self.head_cls, self.head_cls_dist)

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        if global_pool is not None:
            assert global_pool in ('', 'avg'), 'Only avg pooling (or none) is supported.'
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = self._classifier()
        self.head_dist = self._classifier()
        # the class token assists averaged patches: without a mean, or a classifier, there is nothing to assist
        assisted = self.assisted_cls and num_classes > 0 and self.global_pool == 'avg'
        self.head_cls = self._classifier() if assisted else None
        self.head_cls_dist = self._classifier() if assisted else None

    def _classifier(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        head = NormLinear(
            self.num_features, self.num_classes, drop=self.drop_rate,
            device=self.cls_token.device, dtype=self.cls_token.dtype)
        return head.train(self.training)

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

    def _evolve(
            self,
            x: torch.Tensor,
            indices: List[int],
            max_index: int,
    ) -> Tuple[torch.Tensor, List[torch.Tensor], List[List[evolution.Selection]]]:
        """Image (B, in_chans, H, W) to tokens (B, 1 + n, C) after stage `max_index`, the feature maps (B, C, h, w) of
        the stages `indices`, and the selections of each stage."""
        check_input_size(x, self.img_size)
        if not self.training:
            # faster convolutions on a CPU, whose output is a sequence of tokens without a copy; batch statistics,
            # though, are less exact in this format
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x).flatten(2).transpose(1, 2)
        cls_token = self.cls_token
        tradeoff: Optional[torch.Tensor] = None
        if self.tradeoff is not None:
            if not self.layerwise_phase:
                tradeoff = self.tradeoff.sigmoid()
            if self.training:  # a gradient, of zero, even where no selection depends on a tradeoff
                cls_token = cls_token + 0. * self.tradeoff.sum()
        x = torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed

        attention: Optional[torch.Tensor] = None
        intermediates: List[torch.Tensor] = []
        selections: List[List[evolution.Selection]] = []
        for i, stage in enumerate(self.stages):
            if i <= max_index:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x, attention, selected = checkpoint(stage, x, attention, tradeoff)
                else:
                    x, attention, selected = stage(x, attention, tradeoff)
                if tradeoff is not None:
                    tradeoff = tradeoff[stage.num_attentions:]
                selections.append(selected)
                if i in indices:
                    H, W = stage.grid_size
                    intermediates.append(
                        x[:, 1:].reshape(x.shape[0], H, W, x.shape[2]).permute(0, 3, 1, 2).contiguous())
        return x, intermediates, selections

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Image (B, in_chans, H, W) to tokens (B, 1 + n, C) of the last stage, the class token first."""
        return self._evolve(x, [], len(self.stages))[0]

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
        x, intermediates, _ = self._evolve(x, take_indices, max_index if stop_early else len(self.stages))
        if intermediates_only:
            return intermediates
        return x, intermediates

    @torch.jit.ignore
    def forward_selections(self, x: torch.Tensor) -> List[Tuple[evolution.Selection, Tuple[int, int]]]:
        """Image (B, in_chans, H, W) to the token selections made in it, each with its grid size.

        Blocks are counted through the stages, without downsampling attentions.
        """
        found, first = [], 0
        for stage, selections in zip(self.stages, self._evolve(x, [], len(self.stages))[2]):
            found += [(s._replace(block=first + s.block), stage.grid_size) for s in selections]
            first += len(stage.blocks)
        return found

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> Union[torch.Tensor, Tuple[Any, Any]]:
        """Tokens (B, 1 + n, C) to logits (B, num_classes).

        In training mode with an assisted class token, even samples of the batch are answered by the averaged-patch
        heads and odd samples by the class token heads, see `timm_evovit.training`.
        """
        features = x[:, 1:].mean(dim=1) if self.global_pool == 'avg' else x
        if pre_logits:
            return features
        logits, logits_dist = self.head(features), self.head_dist(features)
        if not self.training:
            return (logits + logits_dist) / 2
        if self.head_cls is not None:
            logits_cls, logits_cls_dist = self.head_cls(x[:, 0]), self.head_cls_dist(x[:, 0])
            if self.assisted_training and not torch.jit.is_scripting():
                if self.distilled_training:
                    return (logits, logits_dist), (logits_cls, logits_cls_dist)
                return (logits + logits_dist) / 2, (logits_cls + logits_cls_dist) / 2
            logits = training.alternate_heads(logits, logits_cls)
            logits_dist = training.alternate_heads(logits_dist, logits_cls_dist)
        if self.distilled_training and not torch.jit.is_scripting():
            return logits, logits_dist
        return (logits + logits_dist) / 2


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
    'evo_levit_128s.evovit_in1k': _cfg(**published('evo_levit_128s')),
    'evo_levit_128.evovit_in1k': _cfg(**published('evo_levit_128')),
    'evo_levit_192.evovit_in1k': _cfg(**published('evo_levit_192')),
    'evo_levit_256.evovit_in1k': _cfg(**published('evo_levit_256')),
    'evo_levit_384.evovit_in1k': _cfg(**published('evo_levit_384')),
    'evo_levit_128s_384.untrained': _cfg(input_size=(3, 384, 384)),
    'evo_levit_128_384.untrained': _cfg(input_size=(3, 384, 384)),
    'evo_levit_192_384.untrained': _cfg(input_size=(3, 384, 384)),
    'evo_levit_256_384.evovit_in1k': _cfg(input_size=(3, 384, 384), **published('evo_levit_256_384')),
    'evo_levit_384_384.evovit_in1k': _cfg(input_size=(3, 384, 384), **published('evo_levit_384_384')),
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
