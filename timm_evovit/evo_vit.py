"""Any Vision Transformer of timm, evolved: `evolve` and `evo_vit`. The method is in similarity.py."""
import copy
import functools
import inspect
from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Type, Union

import timm
import torch
from timm.layers import apply_keep_indices_nlc
from timm.models import PretrainedCfg, generate_default_cfgs, parse_model_name, register_model, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, create_attention_mask
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from . import similarity
from .base import EvolvingModel, check, check_ratios, check_stages, is_number
from .hub import evo_cfg
from .slow_tokens import SlowTokens
from .tokens import as_fraction

__all__ = ['EvolvingVit', 'evolve']

EVOLUTION_ARGS = ('keep_ratio', 'stages', 'train_keep_ratio')
FORWARDS = {'forward', 'forward_features', 'forward_intermediates'}
OLD_ARGS = dict(  # of class attention, in folders that were saved when `evolve` had them
    slow_tokens='similarity', representative_token=False, tradeoff=None, selection='stage', layer_to_stage_epochs=0)


@torch.fx.wrap
def check_no_mask(attn_mask: Optional[torch.Tensor], is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError('attn_mask and is_causal must be left out by class attention and by graphs of FX.')


class EvolvingVit(EvolvingModel):
    """A Vision Transformer that groups similar tokens, to be inherited from before its class.

    Everything outside the blocks sees the complete patch grid in raster order. A loop of your own over the blocks,
    `for block in model.blocks: x = block(x)`, groups nothing.
    """
    by_similarity = True
    stage_starts: Tuple[int, ...]  # first block of each stage
    built_stages: Tuple[int, ...]  # as built: some may have been pruned since
    evolution_args: Dict[str, Any]  # as given, to be saved with the model
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
        self.evolution_args = dict(
            keep_ratio=float(keep_ratio) if is_number(keep_ratio) else self.keep_ratio,
            stages=None if stages is None else self.built_stages, train_keep_ratio=self.train_keep_ratio or None)

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
            global_pool=self.global_pool, **self._norm_args(), **self.evolution_args)

    def _norm_args(self) -> Dict[str, Any]:
        """Arguments that say where the norms are: reset_classifier changes the pooling and leaves them there."""
        fc_norm = not isinstance(self.fc_norm, nn.Identity)
        return {} if fc_norm == (self.global_pool in ('avg', 'avgmax', 'max')) else dict(fc_norm=fc_norm)

    def set_keep_ratio(self, keep_ratio: Union[float, Sequence[float]]) -> None:
        self._truncate_to_depth()  # blocks may have been pruned through the dense model
        super().set_keep_ratio(keep_ratio)
        given = float(keep_ratio) if is_number(keep_ratio) else self.keep_ratio
        self.evolution_args = {**self.evolution_args, 'keep_ratio': given}

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> List[int]:
        take_indices = super().prune_intermediate_layers(*args, **kwargs)
        self._truncate_to_depth()
        return take_indices

    def _embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Image (B, in_chans, H, W) to tokens (B, N, C), and the rotary embedding of the patches."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x)))), None

    def _run_blocks(self, tokens: List[Any], rope: Any, num_blocks: Optional[int] = None, **kwargs: Any) -> Any:
        """`similarity.run_blocks` with the first blocks, and what this model knows."""
        if isinstance(kwargs.get('attn_mask'), torch.fx.Proxy):  # FX traces also masks that are not given
            check_no_mask(kwargs.pop('attn_mask'), kwargs.pop('is_causal', False))
        mixed = rope is not None and (getattr(self, 'rope_mixed', False) or getattr(self, 'rope_is_mixed', False))
        return similarity.run_blocks(
            list(self.blocks)[:num_blocks], tokens, self._draw_schedule(tokens[0]), self.num_prefix_tokens, rope, mixed,
            grad_checkpointing=self.grad_checkpointing, **kwargs)

    def _grid_size(self, x: Any) -> Tuple[int, int]:
        return self.patch_embed.dynamic_feat_size(x.shape[-2:])

    def _run(self, x: Any, num_blocks: Optional[int] = None, **kwargs: Any) -> Tuple[Any, List[torch.Tensor], Any]:
        """Input to tokens (B, N, C), those after each block of `take_indices`, and the patches that are no padding."""
        grid_size = self._grid_size(x) if hasattr(self.patch_embed, 'dynamic_feat_size') else None
        tokens: List[Any] = [*self._embed(x)]  # a list, for `run_blocks` to empty
        return *self._run_blocks(tokens, tokens.pop(), num_blocks, grid_size=grid_size, **kwargs), None

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
            *args: Any, **kwargs: Any) -> Any:
        """Forward features that returns intermediates, as in timm: the complete patch grid after any block.

        The others are `output_dict` and those of `forward_features`.
        """
        names = self.intermediates_args
        wrong = [k for k in kwargs if k in names[:len(args)] or k not in (*names, 'output_dict')] + [*args[len(names):]]
        check(not wrong, 'further arguments', f"{', '.join(names)}, each once", wrong, TypeError)
        kwargs.update(zip(names, args))
        output_dict = kwargs.pop('output_dict', False)
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        grid_size = self._grid_size(x) if output_fmt == 'NCHW' else None
        x, intermediates, valid = self._run(x, last + 1 if stop_early else None, take_indices=take_indices, **kwargs)
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


def _of_dense_model(name: str) -> property:
    """An attribute that the dense model and its evolved view have in common."""
    return property(
        lambda self: getattr(vars(self)['_evolved_from'], name),
        lambda self, value: setattr(vars(self)['_evolved_from'], name, value))


class EvolvedVit(EvolvingVit):
    """What `evolve` makes: a view of a dense model, with its modules, parameters, buffers, hooks, some attributes."""
    dense_class: Type[nn.Module]

    @property
    def _model_args(self) -> Dict[str, Any]:
        return {**getattr(vars(self)['_evolved_from'], '_model_args', {}), **self.evolution_args}

    @_model_args.setter
    def _model_args(self, args: Dict[str, Any]) -> None:
        vars(self)['_evolved_from']._model_args = {k: v for k, v in args.items() if k not in self.evolution_args}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.dense_class,), *super().__reduce_ex__(protocol)[2:]


for _name in ('training', 'grad_checkpointing', 'num_classes', 'global_pool', 'distilled_training',
              '_is_full_backward_hook', '_traits'):
    setattr(EvolvedVit, _name, _of_dense_model(_name))


class EvolvedVisionTransformer(EvolvedVit, VisionTransformer):
    """What `evolve` makes of a VisionTransformer."""
    dense_class = VisionTransformer


class EvolvedEva(EvolvedVit, Eva):
    """What `evolve` makes of an Eva: EVA-02, DINOv3, Perception Encoder and others with rotary embeddings."""
    dense_class = Eva
    intermediates_args = ('attn_mask', 'is_causal')

    def _embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        x, rope = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(x), rope

    def _norm_args(self) -> Dict[str, Any]:
        fc_norm, norm = (not isinstance(m, nn.Identity) for m in (self.fc_norm, self.norm))
        default = (fc_norm, norm) == (self.global_pool == 'avg', self.global_pool != 'avg')
        return {} if default else dict(use_fc_norm=fc_norm, use_post_transformer_norm=norm)


class EvolvedNaFlexVit(EvolvedVit, NaFlexVit):
    """What `evolve` makes of a NaFlexVit. Padding is never grouped with patches, and has no weight."""
    dense_class = NaFlexVit
    intermediates_args = ('output_dict', 'patch_coord', 'patch_valid', 'attn_mask')

    def _current_args(self) -> Dict[str, Any]:
        return dict(in_chans=self.in_chans, global_pool=self.global_pool, **self.evolution_args)

    def _grid_size(self, x: Any) -> Tuple[int, int]:
        if isinstance(x, dict) or x.ndim != 4:
            raise ValueError("output_fmt must be 'NLC' for patches with coordinates, whose grids differ, got 'NCHW'. "
                             'find_slow_tokens takes images.')
        return self.embeds.dynamic_feat_size(x.shape[-2:])

    def _run(
            self, x: Any, num_blocks: Optional[int] = None, patch_coord: Optional[torch.Tensor] = None,
            patch_valid: Optional[torch.Tensor] = None, attn_mask: Optional[torch.Tensor] = None, **kwargs: Any) -> Any:
        if isinstance(x, dict):
            patch_coord, patch_valid = x['patch_coord'], x.get('patch_valid', patch_valid)
            attn_mask, x = x.get('attn_mask', attn_mask), x['patches']
        embeds: Dict[str, Any] = self._forward_embeds(x, patch_coord, patch_valid, attn_mask)
        rope, valid, keep = map(embeds.get, ('rope_embeds', 'patch_valid', 'keep_indices'))
        tokens = [embeds.pop('patches')]
        if self.rope_is_mixed and rope is not None:
            rope = list(rope)
            if keep is not None:
                rope = [apply_keep_indices_nlc(tokens[0], r, keep, patch_coord is not None) for r in rope]
        if attn_mask is None and valid is not None:
            kwargs['key_mask'] = create_attention_mask(
                valid, num_prefix_tokens=self.num_prefix_tokens, symmetric=False, q_len=1, dtype=tokens[0].dtype)
        return *self._run_blocks(tokens, rope, num_blocks, attn_mask=embeds['attn_mask'], **kwargs), valid

    def forward_features(  # type: ignore[override]
            self, patches: torch.Tensor, patch_coord: Optional[torch.Tensor] = None,
            patch_valid: Optional[torch.Tensor] = None, attn_mask: Optional[torch.Tensor] = None,
    ) -> Any:
        """As timm's: tokens (B, N, C) of images, or a dict of tokens and `patch_valid` of patches with coordinates."""
        x, _, valid = self._run(patches, patch_coord=patch_coord, patch_valid=patch_valid, attn_mask=attn_mask)
        x = self.norm(x)
        return x if patch_coord is None else {'patches': x, 'patch_valid': valid}


EVOLVED = {cls.dense_class: cls for cls in (EvolvedVisionTransformer, EvolvedEva, EvolvedNaFlexVit)}


@functools.cache
def evolved_class(cls: Any) -> Type[EvolvedVit]:
    """The evolved subclass of a class, whose own methods override ours. Raises TypeError if that cannot work."""
    dense_class = next((c for c in cls.__mro__ if c in EVOLVED), None)
    if dense_class is None:
        raise TypeError(f"evolve takes timm's {', '.join(c.__name__ for c in EVOLVED)}, got {cls.__name__}.")
    if cls is dense_class:
        return EVOLVED[cls]
    own = {k: v for base in cls.__mro__[cls.__mro__.index(dense_class) - 1::-1] for k, v in vars(base).items()}
    for name in sorted(FORWARDS & own.keys()):
        names = _names_used(name, own)
        others = FORWARDS - {name} if name == 'forward' else set()
        reaches = {'super', name} <= names or names & others
        if not reaches or 'blocks' in names or dense_class.__name__ in names:
            raise TypeError(
                f'{cls.__name__}.{name} must call that of {dense_class.__name__} by super(), and not use self.blocks.')
    for name in own:
        if hasattr(EVOLVED[dense_class], name) and not hasattr(dense_class, name):
            raise TypeError(f'{cls.__name__}.{name} has the name of a method that evolve adds: rename it.')
    return type(f'Evolved{cls.__name__}', (cls, EVOLVED[dense_class]), {'dense_class': cls})


def _names_used(name: str, methods: Dict[str, Any], seen: Tuple[str, ...] = ()) -> Set[str]:
    """Names that a method uses, also in functions within it and in the methods of these that it calls."""
    method = getattr(methods[name], 'fget', methods[name])  # of a property
    names: Set[str] = set()
    codes = [getattr(inspect.unwrap(method), '__code__', None)]
    for code in codes:
        names.update(getattr(code, 'co_names', ()))
        codes += [part for part in getattr(code, 'co_consts', ()) if inspect.iscode(part)]
    called = (names & methods.keys()) - {*seen, name}
    return names.union(*(_names_used(other, methods, (*seen, name)) for other in called))


def _blank(dense_class: Any) -> Any:
    return object.__new__(evolved_class(dense_class))  # the class of a sharded model has a __new__ of its own


def check_can_evolve(model: nn.Module) -> None:
    """Raise TypeError if the model would not run its blocks on groups of tokens, or the blocks cannot run on them."""
    for name in sorted(FORWARDS):
        own = getattr(type(model), name).__get__(model)
        if vars(model).get('_old_forward' if name == 'forward' and '_hf_hook' in vars(model) else name, own) != own:
            raise TypeError(f'The attribute {name} of the model replaces a method of its class: evolve it before that.')
    kinds = [kind for kind in (nn.Sequential, nn.ModuleList) if isinstance(model.blocks, kind)]
    if not kinds or type(model.blocks).forward is not kinds[0].forward:
        raise TypeError(f'blocks must be a plain nn.Sequential or nn.ModuleList, got {type(model.blocks).__name__}.')
    wanted = {'attn_mask'} if getattr(model, 'rope', None) is None else {'attn_mask', 'rope'}
    for i, block in enumerate(model.blocks):
        signature = inspect.signature(block.forward)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        if not (takes_any or wanted <= signature.parameters.keys() or isinstance(block, nn.Identity)):
            raise TypeError(
                f"blocks.{i} must take {' and '.join(sorted(wanted))} as timm's blocks do, got "
                f'{type(block).__name__}.forward{signature}.')


def evolve(
        model: nn.Module,
        keep_ratio: Union[float, Sequence[float]] = 0.6,
        stages: Optional[Sequence[int]] = None,
        train_keep_ratio: Union[None, float, Sequence[float]] = None,
) -> EvolvedVit:
    """Make a Vision Transformer of timm faster, without training: similar patches share a slow token.

    It returns another view of the same model, not a copy. Both share modules, parameters, buffers and hooks, and
    `train()`, `eval()`, gradient checkpointing, casting, moving, pruning or a new classifier of one are those of the
    other. `model` stays dense. For a model apart, as for self-distillation, take `evolve(copy.deepcopy(model))`. Of a
    model in the wrapper of `features_only=True` it returns a wrapper of the evolved one.

    Args:
        model: Built VisionTransformer, Eva or NaFlexVit, or of a subclass, such as VisionTransformerDistilled, whose
            `forward_features` calls that of timm; or one of them in the wrapper that `features_only=True` makes.
        keep_ratio: Ratio of slow tokens to patches in (0, 1], one per stage. One number is the geometric mean of a
            series, to three decimals, that falls from stage to stage.
        stages: First block of each stage, ascending. Default: every second block, from the first one on.
        train_keep_ratio: Keep ratios to train with. Each forward pass in training mode picks one of them at random, the
            same in all processes of a distributed run, so that one set of weights works at all of them.

    Raises:
        TypeError: The model or its blocks cannot evolve, or an argument is of the wrong kind.
        ValueError: An argument is out of range or of wrong length.
    """
    if isinstance(model, FeatureGetterNet):
        return copy.deepcopy(model, {id(model.model): evolve(model.model, keep_ratio, stages, train_keep_ratio)})
    if isinstance(model, EvolvingModel):
        raise TypeError(f'{type(model).__name__} evolves already; set_keep_ratio changes how many patches it keeps.')
    evolved = _blank(type(model))
    check_can_evolve(model)
    shared = {k: v for k, v in vars(model).items() if k not in {'_compiled_call_impl', '_old_forward', *FORWARDS}}
    vars(evolved).update(shared, _evolved_from=model, _compiled_call_impl=None)
    if '_hf_hook' in shared:  # accelerate replaces `forward` by one that runs the hook, then `_old_forward`
        evolved._old_forward = evolved.forward
        evolved.forward = functools.partial(model.forward.func, evolved)
    evolved._init_stages(keep_ratio, stages, train_keep_ratio)
    evolved._truncate_to_depth()
    for name, value in shared.items():
        if vars(evolved)[name] is not value:
            raise TypeError(f'The model has an attribute {name}, which evolve needs for itself: rename it.')
    cfg = getattr(model, 'pretrained_cfg', None)
    if cfg and cfg.get('architecture'):  # saved, it comes back as an `evo_vit`
        evolved.pretrained_cfg = evolved.default_cfg = dict(cfg, architecture='evo_vit')
        evolved.evolution_args['base'] = cfg['architecture']
    return evolved


default_cfgs = generate_default_cfgs({'evo_vit.untrained': evo_cfg()})


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
        **kwargs: Arguments of `evolve` and of the base; OLD_ARGS are taken at these values.

    Raises:
        TypeError, ValueError: As `evolve`, or the base does not know an argument.
        RuntimeError: There is no such base.
    """
    for name, value in OLD_ARGS.items():
        given = kwargs.pop(name, value)
        check(given is None or given == value, name, 'left out: evo_vit groups similar patches; Evo-DeiT has it', given)
    evolution_args = {k: kwargs.pop(k) for k in EVOLUTION_ARGS if k in kwargs}
    cfg = resolve_pretrained_cfg('evo_vit', pretrained_cfg)
    source, name = parse_model_name(base)
    architecture, base_args = base, None
    if source == 'hf-hub':
        _, architecture, base_args = load_model_config_from_hf(name, kwargs.get('cache_dir'))
    elif source:
        _, architecture, base_args = load_model_config_from_path(name)
    all_args = {**(base_args or {}), **kwargs}
    if isinstance(pretrained_cfg, (dict, PretrainedCfg)):  # such as a saved one: timm takes either it or a source
        base, kwargs = architecture, {**all_args, 'pretrained_cfg': replace(cfg, architecture=architecture)}
    model = evolve(timm.create_model(base, pretrained, **kwargs), **evolution_args)
    if isinstance(model, EvolvingModel):  # and not in the wrapper of features_only
        model._remember_args(**all_args)
    return model
