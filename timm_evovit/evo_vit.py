"""Any Vision Transformer of timm with slow-fast token evolution.

Paper: `Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390
"""
import copy
from dataclasses import replace
from itertools import chain
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, Union

import timm
import torch
from timm.layers import Attention
from timm.models import PretrainedCfg, generate_default_cfgs, parse_model_name, register_model, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F

from . import evolution  # FX finds wrapped functions as attributes of their module
from .base import EvolvingModel, check, check_flag, check_ratios, is_number, recast
from .evolution import EvolutionState, EvolvingSequential, Selection
from .hub import evo_cfg

__all__ = ['EvoAttention', 'EvoBlock', 'EvolvingVit', 'evolve']

EVOLUTION_ARGS = (
    'keep_ratio', 'stages', 'representative_token', 'tradeoff', 'selection', 'layer_to_stage_epochs')


class EvoAttention(Attention):
    """timm's Attention, which can also write class attention."""

    def forward(self, x: torch.Tensor, state: Optional[EvolutionState] = None) -> torch.Tensor:
        """Tokens (B, N, C), the class token first; `state` receives class attention (B, N) over all of them."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if state is not None:
            # keys first: they are copied by rows, which is several times faster on a CPU
            scores = (k @ q[:, :, :1].transpose(-2, -1)).squeeze(-1) * self.scale
            state.class_attn = evolution.class_attention(scores)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.)
        else:
            x = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        x = self.norm(x.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim))
        return self.proj_drop(self.proj(x))


class EvoBlock(Block):
    """timm's Block, which can also write the class attention of its attention layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grid = nn.Identity()  # called with the complete tokens where an evolution stage starts at this block

    def forward(self, x: torch.Tensor, state: Optional[EvolutionState] = None) -> torch.Tensor:
        """Tokens (B, N, C), the class token first; `state` receives class attention (B, N) over all of them."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), state)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


@torch.fx.wrap
def check_no_mask(attn_mask: Optional[torch.Tensor], is_causal: bool) -> None:
    """Raise ValueError if there is a mask."""
    if attn_mask is not None or is_causal:
        raise ValueError('attn_mask and is_causal are not supported: a mask cannot follow the selected tokens.')


class EvolvingVit(EvolvingModel):
    """Slow-fast token evolution of a VisionTransformer, to be inherited from before it.

    Everything outside the blocks sees the complete patch grid in raster order.
    """

    def _evolve_blocks(
            self,
            keep_ratio: Union[float, Sequence[float]],
            stages: Optional[Sequence[int]],
            tradeoff: Optional[Union[float, Sequence[float]]],
            selection: str,
            representative_token: bool,
            **kwargs: Any,
    ) -> None:
        """Check the arguments and make the blocks of the dense model, which must be of type EvoBlock, evolve."""
        depth = len(self.feature_info)  # as built; features_only may have pruned blocks since
        if stages is None:
            stages = sorted({depth // 3, 2 * depth // 3} - {0})
        starts: Any = (stages,) if is_number(stages) else stages
        check(
            isinstance(starts, Sequence) and all(is_number(s, int) for s in starts), 'stages',
            'block indices such as (4, 8)', stages, TypeError)
        check(
            all(0 < s < depth for s in starts), 'stages', f'in 1 .. {depth - 1} for a model of {depth} blocks', stages)
        check(all(a < b for a, b in zip(starts, starts[1:])), 'stages', 'in ascending order', stages)
        self.stage_starts: Tuple[int, ...] = tuple(starts)
        if tradeoff is None:
            first = self.stage_starts[0] if self.stage_starts else depth
            tradeoff = (1.,) * first + (0.5,) * (depth - first)
        weights = check_ratios('tradeoff', tradeoff, depth, 'block', zero=True)
        self.blocks: Any = EvolvingSequential(
            *self.blocks,
            tradeoff=weights[:len(self.blocks)],
            num_prefix_tokens=self.num_prefix_tokens,
            representative_token=check_flag('representative_token', representative_token),
        )
        self._init_evolution(keep_ratio, len(self.stage_starts), selection, **kwargs)
        self._truncate_to_depth()

    def _truncate_to_depth(self) -> None:
        """Drop the settings of blocks that are no longer there."""
        depth = len(self.blocks)
        self.stage_starts = tuple(s for s in self.stage_starts if s < depth)
        self.keep_ratio = self.keep_ratio[:len(self.stage_starts)]
        self._set_schedule()

    @torch.jit.unused
    def _set_schedule(self) -> None:
        self.blocks.set_schedule(*self._build_schedules(self.blocks.tradeoff, self.stage_starts, self.keep_ratio))

    @torch.jit.unused
    def _current_args(self) -> Dict[str, Any]:
        args = dict(img_size=self.patch_embed.img_size, in_chans=self.in_chans, global_pool=self.global_pool)
        fc_norm = not isinstance(self.fc_norm, nn.Identity)
        if fc_norm != (self.global_pool in ('avg', 'avgmax', 'max')):
            args['fc_norm'] = fc_norm  # reset_classifier changes the pooling and leaves the norm where it is
        return args

    @torch.jit.unused
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        self.blocks.grad_checkpointing = enable

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self._truncate_to_depth()
        return take_indices

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def forward_features(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Image (B, in_chans, H, W) to tokens (B, N, C), the patch grid complete and in raster order."""
        check_no_mask(attn_mask, is_causal)
        return self.norm(self.blocks(self._embed(x)))

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
        state = EvolutionState(take_indices=take_indices)
        x = self._embed(x)
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

    @torch.jit.unused
    def forward_selections(self, x: torch.Tensor) -> List[Tuple[Selection, Tuple[int, int]]]:
        grid_size = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        state = EvolutionState()
        self.blocks(self._embed(x), state)
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


EVOLVED: Dict[Type[nn.Module], Type[EvolvingVit]] = {
    VisionTransformer: EvolvedVisionTransformer,
    VisionTransformerDistilled: EvolvedVisionTransformerDistilled,
}


def _evolve_block(block: nn.Module, name: str) -> EvoBlock:
    if type(block) is not Block:
        raise TypeError(f"{name} must be timm's Block, got {type(block).__name__}: its class attention is not known.")
    if type(block.attn) is not Attention:
        raise TypeError(
            f"{name}.attn must be timm's Attention, got {type(block.attn).__name__}: its class attention is not known.")
    if getattr(block.attn, 'gate', None) is not None:
        raise TypeError(f'{name}.attn is gated, which EvoAttention is not.')
    block = recast(block, EvoBlock)
    block.attn = recast(block.attn, EvoAttention)
    block.grid = nn.Identity()
    return block


def evolve(
        model: nn.Module,
        keep_ratio: Union[float, Sequence[float]] = 0.5,
        stages: Optional[Sequence[int]] = None,
        representative_token: bool = True,
        *,
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
        model: Built VisionTransformer or VisionTransformerDistilled with a class token, or either in the wrapper that
            `features_only=True` makes.
        keep_ratio, stages, tradeoff, selection, layer_to_stage_epochs: As in `EvoVisionTransformer`.
        representative_token: Update placeholders by a representative token, or leave them until the stage ends.

    Raises:
        TypeError: The model, its blocks or its attention are of a kind that cannot evolve, or an argument is of the
            wrong kind.
        ValueError: The model has no class token, or an argument is out of range or of the wrong length.
    """
    args: Dict[str, Any] = dict(
        keep_ratio=keep_ratio, stages=stages, tradeoff=tradeoff, selection=selection,
        representative_token=representative_token, layer_to_stage_epochs=layer_to_stage_epochs)
    if isinstance(model, FeatureGetterNet):
        return copy.deepcopy(model, {id(model.model): evolve(model.model, **args)})
    if isinstance(model, EvolvingModel):
        raise TypeError(f'{type(model).__name__} evolves already; set_keep_ratio changes how many patches it keeps.')
    if type(model) not in EVOLVED:
        raise TypeError(
            f"evolve takes timm's VisionTransformer or VisionTransformerDistilled, got {type(model).__name__}.")
    if model.cls_token is None:
        raise ValueError('The model has no class token, and so no class attention to select tokens by.')
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    evolved = recast(copy.deepcopy(model, shared), EVOLVED[type(model)])
    evolved.blocks = nn.Sequential(*[_evolve_block(block, f'blocks.{i}') for i, block in enumerate(evolved.blocks)])
    evolved._evolve_blocks(**args, device=model.cls_token.device)
    evolved.set_grad_checkpointing(model.grad_checkpointing)
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
    if cfg.has_weights or cfg.state_dict:  # a saved evo_vit
        source, name = parse_model_name(base)
        if source:  # timm takes either weights or a source
            load = load_model_config_from_hf if source == 'hf-hub' else load_model_config_from_path
            _, base, base_args = load(name)
            kwargs = {**(base_args or {}), **kwargs}
        kwargs['pretrained_cfg'] = replace(cfg, architecture=base)
    model = evolve(timm.create_model(base, pretrained, **kwargs), **evolution_args)
    if isinstance(model, EvolvingModel):  # and not in the wrapper of features_only
        model._remember_args(**kwargs)
    return model
