"""Any Vision Transformer of timm with slow-fast token evolution.

Paper: `Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390
"""
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, TypeVar, Union

import timm
import torch
from torch import nn
from torch.nn import functional as F
from timm.layers import Attention
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer

from . import evolution

__all__ = [
    'EvoAttention', 'EvoBlock', 'Evolving', 'EvolvedVisionTransformer', 'EvolvedVisionTransformerDistilled', 'evolve',
    'evolve_model',
]

M = TypeVar('M', bound=nn.Module)


class EvoAttention(Attention):
    """timm's Attention, which can also return class attention."""

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
        x, q, k = self._attend(x)
        return x, evolution.class_attention(evolution.class_scores(q, k, self.scale))

    def _attend(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output (B, N, C), queries and keys (B, heads, N, d)."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.)
        else:
            x = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        x = self.norm(x.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim))
        return self.proj_drop(self.proj(x)), q, k


class EvoBlock(Block):
    """timm's Block, which can also return the class attention of its attention layer."""

    def forward(self, x: torch.Tensor, class_attention: bool = False):  # TorchScript infers the return type
        """
        Args:
            x: Tokens (B, N, C), the class token first.
            class_attention: Return class attention over all tokens, (B, N), beside the tokens.
        """
        if torch.jit.is_scripting() or not class_attention:
            return self._residual(x, self.attn(self.norm1(x)))
        attn, row = self.attn(self.norm1(x), class_attention=True)
        return self._residual(x, attn), row

    def forward_class_attention(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The same, with class attention, for TorchScript."""
        attn, row = self.attn.forward_class_attention(self.norm1(x))
        return self._residual(x, attn), row

    def _residual(self, x: torch.Tensor, attn: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(attn))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


@torch.fx.wrap
def check_no_mask(attn_mask: Optional[torch.Tensor], is_causal: bool) -> None:
    """
    Raises:
        ValueError: There is a mask.
    """
    if attn_mask is not None or is_causal:
        raise ValueError('attn_mask and is_causal are not supported: a mask cannot follow the selected tokens.')


class Evolving(nn.Module):
    """Slow-fast token evolution of a VisionTransformer, to be inherited from before it.

    The complete patch grid is there, in raster order, wherever anything outside the blocks looks.
    """
    layerwise_phase: bool = False  # select layer-wise for now, whatever `selection` says

    def _init_evolution(
            self,
            keep_ratio: Union[float, Sequence[float]],
            stages: Optional[Sequence[int]],
            tradeoff: Optional[Union[float, Sequence[float]]],
            selection: str,
            representative_token: bool,
    ) -> None:
        """Check the arguments and make the blocks of the dense model, which must be of type EvoBlock, evolve."""
        depth = len(self.feature_info)  # as built; features_only may have pruned blocks since
        if stages is None:
            stages = sorted({depth // 3, 2 * depth // 3} - {0})
        self.stages = evolution.check_stages(stages, depth)
        if tradeoff is None:
            first = self.stages[0] if self.stages else depth
            tradeoff = (1.,) * first + (0.5,) * (depth - first)
        self.tradeoff = evolution.check_tradeoff(tradeoff, depth)
        self.selection = evolution.check_selection(selection)
        self.keep_ratio = evolution.check_keep_ratio(keep_ratio, len(self.stages))
        evolution.check_flag('representative_token', representative_token)
        self._cut()
        self.blocks = evolution.EvolvingSequential(
            *self.blocks,
            schedule=self._schedule(),
            tradeoff=self.tradeoff,
            num_prefix_tokens=self.num_prefix_tokens,
            representative_token=representative_token,
        )

    def _cut(self) -> None:
        """Forget what is said of blocks that are no longer there."""
        depth = len(self.blocks)
        self.stages = tuple(s for s in self.stages if s < depth)
        self.keep_ratio = self.keep_ratio[:len(self.stages)]
        self.tradeoff = self.tradeoff[:depth]

    def _schedule(self) -> evolution.Schedule:
        selection = 'layer' if self.layerwise_phase else self.selection
        return evolution.Schedule.build(self.tradeoff, self.stages, self.keep_ratio, selection)

    @torch.jit.ignore
    def _set_schedule(self) -> None:
        self.blocks.set_schedule(self._schedule())

    @torch.jit.ignore
    def set_keep_ratio(self, keep_ratio: Union[float, Sequence[float]]) -> None:
        """Change the ratio of informative patches, weights untouched. At 1 the model is its dense twin.

        Args:
            keep_ratio: Ratio in (0, 1], one for all evolution stages or one per stage.

        Raises:
            TypeError, ValueError: As at construction; the model is then unchanged.
        """
        self.keep_ratio = evolution.check_keep_ratio(keep_ratio, len(self.stages))
        self._set_schedule()

    @torch.jit.ignore
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
        self._cut()
        self._set_schedule()
        return take_indices

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def forward_features(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Image (B, in_chans, H, W) to tokens (B, N, C), the patch grid complete and in raster order.

        Raises:
            ValueError: There is a mask.
        """
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
        """Forward features that returns intermediates, the complete patch grid after any block.

        Args:
            x: Input image tensor (B, in_chans, H, W).
            indices: Take last n blocks if int, all if None, select matching indices if sequence.
            return_prefix_tokens: Return both prefix and spatial intermediate tokens.
            norm: Apply norm layer to all intermediates.
            stop_early: Stop iterating over blocks when last desired intermediate hit.
            output_fmt: Shape of intermediate feature outputs, 'NCHW' (B, C, h, w) or 'NLC' (B, h * w, C).
            intermediates_only: Only return intermediate features.
            output_dict: Return a dictionary with 'image_features', 'image_intermediates' and, if asked for,
                'image_intermediates_prefix'.
            attn_mask, is_causal: Not supported, a mask could not follow the selected tokens.

        Raises:
            ValueError: There is a mask.
        """
        check_no_mask(attn_mask, is_causal)
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)

        height, width = x.shape[-2:]
        x = self._embed(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            x, intermediates = self.blocks.forward_intermediates(x, take_indices)
        else:
            x, intermediates = self.blocks[:max_index + 1].forward_intermediates(x, take_indices)
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

    @torch.jit.ignore
    def forward_selections(self, x: torch.Tensor) -> List[Tuple[evolution.Selection, Tuple[int, int]]]:
        """Image (B, in_chans, H, W) to the token selections made in it, each with its grid size."""
        grid_size = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        return [(s, grid_size) for s in self.blocks.evolve(self._embed(x), None, None, [])[3]]

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))


class EvolvedVisionTransformer(Evolving, VisionTransformer):
    """What `evolve` makes of a VisionTransformer."""


class EvolvedVisionTransformerDistilled(Evolving, VisionTransformerDistilled):
    """What `evolve` makes of a VisionTransformerDistilled."""


_evolved = {
    VisionTransformer: EvolvedVisionTransformer,
    VisionTransformerDistilled: EvolvedVisionTransformerDistilled,
}


def _share(module: nn.Module, cls: Type[M]) -> M:
    """A module of class `cls` that has all that `module` has: the same parameters and buffers, the same in its modules."""
    shared = cls.__new__(cls)
    shared.__dict__.update((k, v.copy() if isinstance(v, dict) else v) for k, v in module.__dict__.items())
    shared._modules.update((k, _share(m, type(m))) for k, m in module._modules.items() if m is not None)
    return shared


def _evolving_block(block: nn.Module, name: str) -> EvoBlock:
    if type(block) is not Block:
        raise TypeError(f"{name} must be timm's Block, got {type(block).__name__}: its class attention is not known.")
    if type(block.attn) is not Attention:
        raise TypeError(
            f"{name}.attn must be timm's Attention, got {type(block.attn).__name__}: its class attention is not known.")
    if getattr(block.attn, 'gate', None) is not None:
        raise TypeError(f'{name}.attn is gated, which EvoAttention is not.')
    evolving = _share(block, EvoBlock)
    evolving.attn = _share(block.attn, EvoAttention)
    return evolving


def evolve(
        model: nn.Module,
        keep_ratio: Union[float, Sequence[float]] = 0.5,
        stages: Optional[Sequence[int]] = None,
        representative_token: bool = True,
        *,
        tradeoff: Optional[Union[float, Sequence[float]]] = None,
        selection: str = 'stage',
) -> nn.Module:
    """Make a Vision Transformer of timm faster by slow-fast token evolution, without training.

    The evolving model and the one given hold the same parameters and buffers, under the same names: training, casting
    or moving one does that to the weights of both. Its readout stays what it is. The one given stays dense, and in the
    mode, training or evaluation, that it is in. `set_keep_ratio` of the evolving model trades accuracy for speed; it is
    `evolved.model.set_keep_ratio` behind `features_only=True`.

    Args:
        model: Built VisionTransformer or VisionTransformerDistilled with a class token, or either in the wrapper that
            `features_only=True` makes.
        keep_ratio: Ratio of informative patches in (0, 1], one for all evolution stages or one per stage.
        stages: First block of each evolution stage, ascending. Default: a first third of the blocks sees all tokens,
            then two equal stages.
        representative_token: Update placeholders by a representative token, or leave them until the stage ends.
        tradeoff: Weight in [0, 1] of a block's class attention in the global class attention, one for all blocks or
            one per block. Default: 1 before the first stage, 0.5 after.
        selection: When informative patches are selected anew, at each 'stage' or before each 'layer' of it.

    Raises:
        TypeError: The model, its blocks or its attention are of a kind that cannot evolve, or an argument is of the
            wrong kind.
        ValueError: The model has no class token, or an argument is out of range or of the wrong length.
    """
    if isinstance(model, FeatureGetterNet):
        features = _share(model, FeatureGetterNet)
        features.model = evolve(
            model.model, keep_ratio, stages, representative_token, tradeoff=tradeoff, selection=selection)
        return features
    if isinstance(model, Evolving):
        raise TypeError(f'{type(model).__name__} evolves already; set_keep_ratio changes how many patches it keeps.')
    if type(model) not in _evolved:
        raise TypeError(
            f"evolve takes timm's VisionTransformer or VisionTransformerDistilled, got {type(model).__name__}.")
    if model.cls_token is None:
        raise ValueError('The model has no class token, and so no class attention to select tokens by.')
    evolved = _share(model, _evolved[type(model)])
    evolved.blocks = nn.Sequential(*(_evolving_block(b, f'blocks.{i}') for i, b in enumerate(model.blocks)))
    evolved._init_evolution(keep_ratio, stages, tradeoff, selection, representative_token)
    evolved.set_grad_checkpointing(model.grad_checkpointing)
    return evolved


def evolve_model(
        model_name: str,
        pretrained: bool = False,
        *,
        keep_ratio: Union[float, Sequence[float]] = 0.5,
        stages: Optional[Sequence[int]] = None,
        representative_token: bool = True,
        tradeoff: Optional[Union[float, Sequence[float]]] = None,
        selection: str = 'stage',
        **kwargs: Any,
) -> nn.Module:
    """`timm.create_model` and `evolve` in one call.

    Args:
        model_name: Vision Transformer, by any name that timm takes.
        pretrained: Load pretrained weights.
        keep_ratio, stages, representative_token, tradeoff, selection: Arguments of `evolve`.
        **kwargs: Arguments of `timm.create_model`.

    Raises:
        TypeError, ValueError: As `evolve`.
    """
    model = timm.create_model(model_name, pretrained, **kwargs)
    return evolve(model, keep_ratio, stages, representative_token, tradeoff=tradeoff, selection=selection)
