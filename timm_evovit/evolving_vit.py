"""What Vision Transformers that group like tokens share: stages, feature extraction. The method is in similarity.py."""
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.models._features import feature_take_indices
from torch import nn

from . import similarity
from .base import EvolvingModel, check_ratios, check_stages, is_number
from .slow_tokens import SlowTokens
from .tokens import as_fraction


@torch.fx.wrap
def check_no_mask(attn_mask: Optional[torch.Tensor], is_causal: bool) -> None:
    """Raise ValueError if there is a mask."""
    if attn_mask is not None or is_causal:
        raise ValueError('attn_mask and is_causal must be left out by class attention and by graphs of FX.')


class EvolvingVit(EvolvingModel):
    """A Vision Transformer that groups like tokens, to be inherited from before its class.

    Everything outside the blocks sees the complete patch grid in raster order. A loop of your own over the blocks,
    `for block in model.blocks: x = block(x)`, groups nothing.
    """
    by_similarity = True
    stage_starts: Tuple[int, ...]  # first block of each stage
    built_stages: Tuple[int, ...]  # as built: some may have been pruned since
    intermediates_args: Tuple[str, ...] = ('output_dict', 'attn_mask', 'is_causal')  # the 8th and later ones, in timm

    def _init_stages(
            self, keep_ratio: Union[float, Sequence[float]], stages: Optional[Sequence[int]],
            train_keep_ratio: Union[None, float, Sequence[float]], first: int = 0) -> None:
        """Check and keep the arguments. Stages start at block `first` at the earliest."""
        depth = len(self.feature_info)  # as built; features_only may have pruned blocks since
        self.built_stages = check_stages(range(0, depth, 2) if stages is None else stages, depth, first)
        self.stage_starts = self.built_stages
        self.keep_ratio = self._stage_ratios(keep_ratio, len(self.stage_starts))
        self.train_keep_ratio = () if train_keep_ratio is None else check_ratios(
            'train_keep_ratio', train_keep_ratio, None, 'draw')

    def _stage_ratios(self, keep_ratio: Union[float, Sequence[float]], num_stages: int) -> Tuple[float, ...]:
        ratios = super()._stage_ratios(keep_ratio, num_stages)
        if self.by_similarity and is_number(keep_ratio) and ratios:
            ratios = similarity.falling_ratios(ratios[0], self.built_stages)[:num_stages]
        return ratios

    def _truncate_to_depth(self) -> None:
        """Drop the settings of blocks that are no longer there."""
        depth = len(self.blocks)
        self.stage_starts = tuple(s for s in self.stage_starts if s < depth)
        self.keep_ratio = self.keep_ratio[:len(self.stage_starts)]
        self._set_schedule()

    def _build_schedule(self, keep_ratio: Tuple[float, ...], training: bool) -> Any:
        """Keep ratio of each stage, numerator and denominator, by its first block."""
        return {start: as_fraction(ratio) for start, ratio in zip(self.stage_starts, keep_ratio)}

    def _current_args(self) -> Dict[str, Any]:
        return dict(
            img_size=self.patch_embed.img_size, patch_size=self.patch_embed.patch_size, in_chans=self.in_chans,
            global_pool=self.global_pool, **self._norm_args())

    def _norm_args(self) -> Dict[str, Any]:
        """Arguments that say where the norms are: reset_classifier changes the pooling and leaves them there."""
        fc_norm = not isinstance(self.fc_norm, nn.Identity)
        return {} if fc_norm == (self.global_pool in ('avg', 'avgmax', 'max')) else dict(fc_norm=fc_norm)

    def set_keep_ratio(self, keep_ratio: Union[float, Sequence[float]]) -> None:
        self._truncate_to_depth()  # blocks may have been pruned through the dense model
        super().set_keep_ratio(keep_ratio)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> List[int]:
        take_indices = super().prune_intermediate_layers(*args, **kwargs)
        self._truncate_to_depth()
        return take_indices

    def _embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Image (B, in_chans, H, W) to tokens (B, N, C), and the rotary embedding of the patches."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x)))), None

    def _run_blocks(self, x: Any, rope: Any, num_blocks: Optional[int] = None, **kwargs: Any) -> Tuple[Any, List[Any]]:
        """`similarity.run_blocks` with the first blocks, and what this model knows."""
        if isinstance(kwargs.get('is_causal'), torch.fx.Proxy):  # FX traces also masks that are not given
            check_no_mask(kwargs.pop('attn_mask'), kwargs.pop('is_causal'))
        mixed = rope is not None and (getattr(self, 'rope_mixed', False) or getattr(self, 'rope_is_mixed', False))
        return similarity.run_blocks(
            list(self.blocks)[:num_blocks], x, self._draw_schedule(x), self.num_prefix_tokens, rope, mixed,
            grad_checkpointing=self.grad_checkpointing, **kwargs)

    def _grid_size(self, x: Any) -> Tuple[int, int]:
        return self.patch_embed.dynamic_feat_size(x.shape[-2:])

    def _run(self, x: Any, num_blocks: Optional[int] = None, **kwargs: Any) -> Tuple[Any, List[torch.Tensor], Any]:
        """Input to tokens (B, N, C), those after each block of `take_indices`, and the patches that are no padding."""
        grid_size = self._grid_size(x) if hasattr(self.patch_embed, 'dynamic_feat_size') else None
        x, rope = self._embed(x)
        return *self._run_blocks(x, rope, num_blocks, grid_size=grid_size, **kwargs), None

    def forward_features(
            self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False) -> Any:
        """Image (B, in_chans, H, W) to tokens (B, N, C), the patch grid complete and in raster order.

        Where tokens are grouped `attn_mask` must be a mask of keys, (B or 1, heads or 1, 1, N); at keep ratio 1 it and
        `is_causal` are as in timm.
        """
        return self.norm(self._run(x, attn_mask=attn_mask, is_causal=is_causal)[0])

    def forward_intermediates(
            self, x: Any, indices: Optional[Union[int, List[int]]] = None, return_prefix_tokens: bool = False,
            norm: bool = False, stop_early: bool = False, output_fmt: str = 'NCHW', intermediates_only: bool = False,
            *args: Any, **kwargs: Any,
    ) -> Any:
        """Forward features that returns intermediates, as in timm: the complete patch grid after any block.

        The others are `output_dict` and those of `forward_features`.
        """
        kwargs.update(zip(self.intermediates_args, args, strict=len(args) > len(self.intermediates_args)))
        output_dict = kwargs.pop('output_dict', False)
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        grid_size = self._grid_size(x) if output_fmt == 'NCHW' else None
        num_blocks = max_index + 1 if stop_early else None
        x, intermediates, valid = self._run(x, num_blocks, take_indices=take_indices, **kwargs)
        if valid is not None and not output_dict and self.training and self.patch_drop is not None:
            raise ValueError('output_dict must be True with patch dropout, which changes patch_valid, got False.')
        if norm:
            intermediates = [self.norm(y) for y in intermediates]
        P = self.num_prefix_tokens
        prefix_tokens = [y[:, :P] for y in intermediates]
        intermediates = [y[:, P:] for y in intermediates]
        if grid_size is not None:
            intermediates = [y.unflatten(1, grid_size).permute(0, 3, 1, 2).contiguous() for y in intermediates]
        return_prefix_tokens = return_prefix_tokens and P > 0
        if output_dict:
            output: Dict[str, Any] = {'image_intermediates': intermediates}
            if return_prefix_tokens:
                output['image_intermediates_prefix'] = prefix_tokens
            if not intermediates_only:
                output['image_features'] = self.norm(x)
            return output if valid is None else {**output, 'patch_valid': valid}
        found: Any = list(zip(intermediates, prefix_tokens)) if return_prefix_tokens else intermediates
        return found if intermediates_only else (self.norm(x), found)

    def forward_slow_tokens(self, x: torch.Tensor) -> List[SlowTokens]:
        found: List[SlowTokens] = []
        self._run(x, slow_tokens=found)
        return [s.on_grid(self._grid_size(x)) for s in found]
