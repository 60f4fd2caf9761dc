"""Any Vision Transformer of timm with slow-fast token evolution, https://arxiv.org/abs/2108.01390."""
import copy
import warnings
from dataclasses import replace
from itertools import chain
from numbers import Integral
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, Union

import timm
import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import PretrainedCfg, generate_default_cfgs, parse_model_name, register_model, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn
from torch.nn import functional as F

from . import evolution  # FX finds wrapped functions as attributes of their module
from .base import EvolvingModel, check, check_flag, check_ratios, check_slow_tokens, is_number, recast
from .evolution import AttentionContext, EvolutionState, EvolvingSequential, Selection
from .hub import evo_cfg

__all__ = ['EvolvingVit', 'evolve']

EVOLUTION_ARGS = (
    'keep_ratio', 'stages', 'slow_tokens', 'representative_token', 'tradeoff', 'selection', 'layer_to_stage_epochs')


class EvolvingAttention(nn.Module):
    """What timm's attention layers share, and class attention; to be inherited from before one of them."""

    def project(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (B, N, C) to queries (B, heads, N, d), keys and values, of which there may be fewer heads."""
        if self.qkv is None:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        elif self.q_bias is None:
            q, k, v = self.qkv(x).chunk(3, dim=2)
        else:
            bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
            q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, dim=2)
        heads = (-1, self.head_dim)
        q, k, v = q.unflatten(2, heads), k.unflatten(2, heads), v.unflatten(2, heads)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: torch.Tensor, context: Optional[AttentionContext] = None) -> torch.Tensor:
        """Tokens (B, N, C), the class token first; `context` receives class attention (B, N) over all of them."""
        B, N, _ = x.shape
        q, k, v = self.project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        bias: Optional[torch.Tensor] = None
        if context is not None:
            bias, rope = context.bias, context.rope
            if rope is not None:
                # contiguous first: their products with sines and cosines are faster on a CPU
                q = apply_rot_embed_cat(q.contiguous(), rope, self.rotate_half).type_as(v)
                k = apply_rot_embed_cat(k.contiguous(), rope, self.rotate_half).type_as(v)
        if self.num_kv_groups > 1:
            k, v = k.repeat_interleave(self.num_kv_groups, dim=1), v.repeat_interleave(self.num_kv_groups, dim=1)
        if context is not None and context.needs_class_attn:
            # keys first: they are copied by rows, which is several times faster on a CPU
            class_scores = (k @ q[:, :, :1].transpose(-2, -1)).squeeze(-1) * self.scale
            context.class_attn = evolution.class_attention(class_scores)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=self.attn_drop.p if self.training else 0.)
        else:
            scores = q * self.scale @ k.transpose(-2, -1)
            if bias is not None:
                scores = scores + bias
            out = self.attn_drop(scores.softmax(dim=-1)) @ v
        out = self.norm(out.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class EvoAttention(EvolvingAttention, Attention):
    """timm's Attention, which can also write class attention."""


class EvoEvaAttention(EvolvingAttention, EvaAttention):
    """timm's EvaAttention, which can also write class attention, that of rotated queries and keys."""


class EvoAttentionRope(EvolvingAttention, AttentionRope):
    """timm's AttentionRope, which can also write class attention, that of rotated queries and keys."""


class EvoBlock(Block):
    """timm's Block, which hands `context` to its attention layer."""

    def forward(self, x: torch.Tensor, context: Optional[AttentionContext] = None) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), context)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class EvoEvaBlock(EvaBlock):
    """timm's EvaBlock, which hands `context` to its attention layer."""

    def forward(self, x: torch.Tensor, context: Optional[AttentionContext] = None) -> torch.Tensor:
        update = self.attn(self.norm1(x), context)
        x = x + self.drop_path1(update if self.gamma_1 is None else self.gamma_1 * update)
        update = self.mlp(self.norm2(x))
        return x + self.drop_path2(update if self.gamma_2 is None else self.gamma_2 * update)


class EvoResPostBlock(ResPostBlock):
    """timm's ResPostBlock, which hands `context` to its attention layer."""

    def forward(self, x: torch.Tensor, context: Optional[AttentionContext] = None) -> torch.Tensor:
        x = x + self.drop_path1(self.norm1(self.attn(x, context)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class EvoEvaBlockPostNorm(EvaBlockPostNorm):
    """timm's EvaBlockPostNorm, which hands `context` to its attention layer."""

    forward = EvoResPostBlock.forward


def default_stages(depth: int, slow_tokens: str) -> Sequence[int]:
    """First block of each stage.

    By attention, two equal stages follow a dense third. By similarity, four stages start evenly from a twelfth to three
    quarters of the depth: at blocks 1, 3, 6, 9 of 12. There are fewer where they would be shorter than two blocks.
    """
    if slow_tokens == 'attention':
        return sorted({depth // 3, 2 * depth // 3} - {0})
    starts = [max(1 + 2 * i, depth * (3 + 8 * i) // 36) for i in range(4)]
    return [start for start in starts if start <= depth * 4 // 5]


@torch.fx.wrap
def check_no_mask(attn_mask: Optional[torch.Tensor], is_causal: bool) -> None:
    """Raise ValueError if there is a mask."""
    if attn_mask is not None or is_causal:
        raise ValueError('attn_mask and is_causal are not supported: a mask cannot follow the selected tokens.')


EVOLVING: Dict[Type[nn.Module], Any] = {
    Attention: EvoAttention,
    EvaAttention: EvoEvaAttention,
    AttentionRope: EvoAttentionRope,
    Block: EvoBlock,
    ResPostBlock: EvoResPostBlock,
    EvaBlock: EvoEvaBlock,
    EvaBlockPostNorm: EvoEvaBlockPostNorm,
}


def evolve_block(block: nn.Module, name: str) -> nn.Module:
    """Make a block, and its attention layer, take an `AttentionContext`.

    Raises:
        TypeError: They are of a kind that cannot, such as blocks with attention and MLP in parallel.
    """
    kinds = [cls.__name__ for cls in EVOLVING]
    if type(block) not in EVOLVING:
        raise TypeError(f'{name} must be one of the blocks {", ".join(kinds[3:])} of timm, got {type(block).__name__}.')
    if type(block.attn) not in EVOLVING:
        raise TypeError(f'{name}.attn must be timm\'s {", ".join(kinds[:3])}, got {type(block.attn).__name__}.')
    block = recast(block, EVOLVING[type(block)])
    block.attn = recast(block.attn, EVOLVING[type(block.attn)])
    head_dim = block.attn.proj.in_features // block.attn.num_heads
    defaults = dict(  # of attributes that some layers, or older versions of timm, lack
        gate=None, q_bias=None, num_kv_groups=1, rotate_half=False, head_dim=head_dim)
    for key, default in defaults.items():
        if not hasattr(block.attn, key):
            setattr(block.attn, key, default)
    return block


class EvolvingVit(EvolvingModel):
    """Slow-fast token evolution of a Vision Transformer, to be inherited from before its class.

    Everything outside the blocks sees the complete patch grid in raster order.
    """
    is_named = True  # False for what `evolve` returns: the config of a wrapper around it names the dense base

    def _evolve_blocks(
            self,
            keep_ratio: Union[float, Sequence[float]],
            stages: Optional[Sequence[int]],
            slow_tokens: str,
            representative_token: bool,
            tradeoff: Optional[Union[float, Sequence[float]]],
            **kwargs: Any,
    ) -> None:
        """Check the arguments and make the blocks of the dense model evolve."""
        depth = len(self.feature_info)  # as built; features_only may have pruned blocks since
        check_slow_tokens(slow_tokens, representative_token=representative_token, tradeoff=tradeoff)
        if slow_tokens == 'attention' and self.cls_token is None:
            raise ValueError(
                'The model has no class token, and so no class attention to find slow tokens by. '
                "slow_tokens='similarity' needs none.")
        if stages is None:
            stages = default_stages(depth, slow_tokens)
        starts: Any = (stages,) if is_number(stages) else stages
        check(
            isinstance(starts, Sequence) and all(is_number(s, Integral) for s in starts), 'stages',
            'block indices such as (4, 8)', stages, TypeError)
        check(
            all(0 < s < depth for s in starts), 'stages', f'in 1 .. {depth - 1} for a model of {depth} blocks', stages)
        check(all(a < b for a, b in zip(starts, starts[1:])), 'stages', 'in ascending order', stages)
        self.stage_starts: Tuple[int, ...] = tuple(map(int, starts))
        self.built_stages = self.stage_starts
        if tradeoff is None:
            first = min(self.stage_starts, default=depth)
            tradeoff = (1.,) * first + (0.5,) * (depth - first)
        weights = check_ratios('tradeoff', tradeoff, depth, 'block', zero=True)
        self.blocks: Any = EvolvingSequential(
            *[evolve_block(block, f'blocks.{i}') for i, block in enumerate(self.blocks)],
            tradeoff=weights[:len(self.blocks)],
            num_prefix_tokens=self.num_prefix_tokens,
            representative_token=check_flag('representative_token', representative_token),
        )
        self._init_evolution(keep_ratio, len(starts), slow_tokens, **kwargs)
        self._truncate_to_depth()

    def _stage_ratios(self, keep_ratio: Union[float, Sequence[float]], num_stages: int) -> Tuple[float, ...]:
        ratios = super()._stage_ratios(keep_ratio, num_stages)
        if self.slow_tokens == 'similarity' and is_number(keep_ratio):
            # the same factor for every block down to a stage; the geometric mean over the stages is `keep_ratio`. These
            # are the stages as built: some may have been pruned since
            depths = [start + 1 for start in self.built_stages]
            exponents = [len(depths) * depth / sum(depths) for depth in depths]
            ratios = tuple(max(round(r ** exponent, 3), 0.001) for r, exponent in zip(ratios, exponents))
        return ratios

    def _truncate_to_depth(self) -> None:
        """Drop the settings of blocks that are no longer there."""
        depth = len(self.blocks)
        self.stage_starts = tuple(s for s in self.stage_starts if s < depth)
        self.keep_ratio = self.keep_ratio[:len(self.stage_starts)]
        self._set_schedule()

    def _set_schedule(self) -> None:
        starts = dict(zip(self.stage_starts, self.keep_ratio))
        self.blocks.set_schedule(*self._build_schedules(self.blocks.tradeoff, starts))

    def _current_args(self) -> Dict[str, Any]:
        embed = self.patch_embed
        args = dict(img_size=embed.img_size, patch_size=embed.patch_size)
        return dict(args, in_chans=self.in_chans, global_pool=self.global_pool, **self._norm_args())

    def _norm_args(self) -> Dict[str, Any]:
        """Arguments that say where the norms are: reset_classifier changes the pooling and leaves them there."""
        fc_norm = not isinstance(self.fc_norm, nn.Identity)
        return {} if fc_norm == (self.global_pool in ('avg', 'avgmax', 'max')) else dict(fc_norm=fc_norm)

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if prefix.endswith('timm_model.') and not self.is_named:
            warnings.warn(
                "transformers saves this model as its dense base: the wrapper's config does not know that it evolves. "
                f"A wrapper of TimmWrapperConfig(architecture='evo_vit', model_args={self.model_args}) comes back "
                'evolving.', stacklevel=2)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> List[int]:
        take_indices = super().prune_intermediate_layers(*args, **kwargs)
        self._truncate_to_depth()
        return take_indices

    def _embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, EvolutionState]:
        """Image (B, in_chans, H, W) to tokens (B, N, C), and what goes through the blocks beside them."""
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        return x, EvolutionState(self.grad_checkpointing)

    def forward_features(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Image (B, in_chans, H, W) to tokens (B, N, C), the patch grid complete and in raster order."""
        check_no_mask(attn_mask, is_causal)
        x, state = self._embed(x)
        return self.norm(self.blocks(x, state))

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]], Dict[str, Any]]:
        """Forward features that returns intermediates, as in timm: the complete patch grid after any block."""
        check_no_mask(attn_mask, is_causal)
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)

        height, width = x.shape[-2:]
        x, state = self._embed(x)
        state.take_indices = take_indices
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            x = self.blocks(x, state)
        else:
            x = self.blocks[:max_index + 1](x, state)
        intermediates = state.intermediates
        if norm:
            intermediates = [self.norm(y) for y in intermediates]
        prefix_tokens = [y[:, :self.num_prefix_tokens] for y in intermediates]
        intermediates = [y[:, self.num_prefix_tokens:] for y in intermediates]
        if output_fmt == 'NCHW':
            H, W = self.patch_embed.dynamic_feat_size((height, width))
            intermediates = [y.unflatten(1, (H, W)).permute(0, 3, 1, 2).contiguous() for y in intermediates]

        if output_dict:
            output: Dict[str, Any] = {'image_intermediates': intermediates}
            if return_prefix_tokens:
                output['image_intermediates_prefix'] = prefix_tokens
            if not intermediates_only:
                output['image_features'] = self.norm(x)
            return output
        if return_prefix_tokens and not torch.jit.is_scripting():
            intermediates = list(zip(intermediates, prefix_tokens))
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates

    def forward_selections(self, x: torch.Tensor) -> List[Tuple[Selection, Tuple[int, int]]]:
        grid_size = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        x, state = self._embed(x)
        self.blocks(x, state)
        return [(s, grid_size) for s in state.selections]

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))


class EvolvedVisionTransformer(EvolvingVit, VisionTransformer):
    """What `evolve` makes of a VisionTransformer."""


class EvolvedVisionTransformerDistilled(EvolvingVit, VisionTransformerDistilled):
    """What `evolve` makes of a VisionTransformerDistilled."""


class EvolvedEva(EvolvingVit, Eva):
    """What `evolve` makes of an Eva: EVA-02, DINOv3, Perception Encoder and others with rotary embeddings."""

    def _embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, EvolutionState]:
        x, rope = self._pos_embed(self.patch_embed(x))
        if rope is not None:
            n, d = rope.shape[-2:]
            if self.rope_mixed:  # (blocks, heads, n, d), after patch dropout (blocks, B, heads, n, d)
                rope = rope.reshape(rope.shape[0], -1, rope.shape[-3], n, d)
            else:  # (n, d), after patch dropout (B, 1, n, d)
                rope = rope.reshape(1, -1, 1, n, d)
            prefix = [0, 0, self.num_prefix_tokens, 0]  # tokens that are not rotated
            sin, cos = rope.chunk(2, dim=-1)
            rope = torch.cat([F.pad(sin, prefix), F.pad(cos, prefix, value=1.)], dim=-1)
        return self.norm_pre(x), EvolutionState(self.grad_checkpointing, None, rope, self.rope_mixed)

    def _norm_args(self) -> Dict[str, Any]:
        fc_norm, norm = (not isinstance(m, nn.Identity) for m in (self.fc_norm, self.norm))
        if (fc_norm, norm) == (self.global_pool == 'avg', self.global_pool != 'avg'):
            return {}
        return dict(use_fc_norm=fc_norm, use_post_transformer_norm=norm)


EVOLVED: Dict[Type[nn.Module], Type[EvolvingVit]] = {
    VisionTransformer: EvolvedVisionTransformer,
    VisionTransformerDistilled: EvolvedVisionTransformerDistilled,
    Eva: EvolvedEva,
}


def evolve(
        model: nn.Module,
        keep_ratio: Union[float, Sequence[float]] = 0.6,
        stages: Optional[Sequence[int]] = None,
        slow_tokens: str = 'similarity',
        *,
        representative_token: Optional[bool] = None,
        tradeoff: Optional[Union[float, Sequence[float]]] = None,
        selection: str = 'stage',
        layer_to_stage_epochs: int = 0,
) -> EvolvingVit:
    """Make a Vision Transformer of timm faster by slow-fast token evolution, without training.

    The evolving model and the one given hold the same parameters and buffers, under the same names: training, casting
    or moving one does that to the weights of both. Its readout stays what it is. The one given stays dense, and in the
    mode, training or evaluation, that it is in. A model in the wrapper of `features_only=True` comes back in a wrapper:
    `set_keep_ratio` is then that of `evolved.model`.

    Args:
        model: Built VisionTransformer, VisionTransformerDistilled or Eva, or one in the wrapper that
            `features_only=True` makes.
        keep_ratio, stages, slow_tokens, tradeoff, selection, layer_to_stage_epochs: As in `EvoVisionTransformer`.
        representative_token: As in `EvoVisionTransformer`. Default: True where class attention finds slow tokens.

    Raises:
        TypeError: The model, its blocks or its attention cannot evolve, or an argument is of the wrong kind.
        ValueError: There is no class token to find slow tokens by, or an argument is out of range or of wrong length.
    """
    if representative_token is None:
        representative_token = slow_tokens == 'attention'
    args: Dict[str, Any] = dict(
        keep_ratio=keep_ratio, stages=stages, slow_tokens=slow_tokens, representative_token=representative_token,
        tradeoff=tradeoff, selection=selection, layer_to_stage_epochs=layer_to_stage_epochs)
    if isinstance(model, FeatureGetterNet):
        return copy.deepcopy(model, {id(model.model): evolve(model.model, **args)})
    if isinstance(model, EvolvingModel):
        raise TypeError(f'{type(model).__name__} evolves already; set_keep_ratio changes how many patches it keeps.')
    if type(model) not in EVOLVED:
        raise TypeError(
            f"evolve takes timm's {', '.join(cls.__name__ for cls in EVOLVED)}, got {type(model).__name__}.")
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    evolved = recast(copy.deepcopy(model, shared), EVOLVED[type(model)])
    evolved.is_named = False
    evolved._evolve_blocks(**args)
    cfg = getattr(model, 'pretrained_cfg', None)
    if cfg is not None:  # saved, it comes back as an `evo_vit`
        evolved.pretrained_cfg = evolved.default_cfg = dict(cfg, architecture='evo_vit')
        evolved._remember_args(base=cfg['architecture'], **args)
    return evolved


default_cfgs = generate_default_cfgs({'evo_vit.untrained': evo_cfg(fixed_input_size=True)})


@register_model
def evo_vit(
        pretrained: bool = False,
        base: str = 'vit_small_patch16_224',
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
        **kwargs: Any,
) -> EvolvingVit:
    """Any Vision Transformer of timm by name, evolved.

    Args:
        pretrained: Load the weights of the base.
        base: Vision Transformer, by any name that timm takes.
        pretrained_cfg: Configuration of saved weights, in place of that of the base.
        **kwargs: Arguments of `evolve` and of the base.

    Raises:
        TypeError, ValueError: As `evolve`, or the base does not know an argument.
        RuntimeError: There is no such base.
    """
    evolution_args = {k: kwargs.pop(k) for k in EVOLUTION_ARGS if k in kwargs}
    cfg = resolve_pretrained_cfg('evo_vit', pretrained_cfg)
    source, name = parse_model_name(base)
    architecture, base_args = base, None
    if source == 'hf-hub':
        _, architecture, base_args = load_model_config_from_hf(name, kwargs.get('cache_dir'))
    elif source:
        _, architecture, base_args = load_model_config_from_path(name)
    all_args = {**(base_args or {}), **kwargs}
    if cfg.has_weights or cfg.state_dict:  # a saved evo_vit: timm takes either a pretrained_cfg or a source
        base, kwargs = architecture, {**all_args, 'pretrained_cfg': replace(cfg, architecture=architecture)}
    model = evolve(timm.create_model(base, pretrained, **kwargs), **evolution_args)
    if isinstance(model, EvolvingModel):  # and not in the wrapper of features_only
        model._remember_args(**all_args)
        model.is_named = True
    return model
