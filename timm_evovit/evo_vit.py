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
from timm.models._features import FeatureGetterNet
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, create_attention_mask
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .base import EvolvingModel, check
from .evolving_vit import EvolvingVit
from .hub import evo_cfg

__all__ = ['EvolvingVit', 'evolve']

EVOLUTION_ARGS = ('keep_ratio', 'stages', 'train_keep_ratio')
OLD_ARGS = dict(  # of class attention, in folders that were saved when `evolve` had them
    slow_tokens='similarity', representative_token=False, tradeoff=None, selection='stage', layer_to_stage_epochs=0)


def _of_dense_model(name: str) -> property:
    """An attribute that the dense model and its evolved view have in common."""
    return property(
        lambda self: getattr(vars(self)['_evolved_from'], name),
        lambda self, value: setattr(vars(self)['_evolved_from'], name, value))


class EvolvedVit(EvolvingVit):
    """What `evolve` makes: another view of a dense model.

    It has the modules, parameters, buffers and hooks of the dense model, not copies of them, and these attributes.
    """
    dense_class: Type[nn.Module]
    training = _of_dense_model('training')
    grad_checkpointing = _of_dense_model('grad_checkpointing')
    num_classes = _of_dense_model('num_classes')
    global_pool = _of_dense_model('global_pool')
    distilled_training = _of_dense_model('distilled_training')
    _is_full_backward_hook = _of_dense_model('_is_full_backward_hook')
    _traits = _of_dense_model('_traits')

    @property
    def _model_args(self) -> Dict[str, Any]:
        return {**getattr(vars(self)['_evolved_from'], '_model_args', {}), **vars(self)['_evolution_args']}

    @_model_args.setter
    def _model_args(self, args: Dict[str, Any]) -> None:
        own = {k: args[k] for k in ('base', *EVOLUTION_ARGS) if k in args}
        self.__dict__['_evolution_args'] = own
        vars(self)['_evolved_from']._model_args = {k: v for k, v in args.items() if k not in own}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.dense_class,), *super().__reduce_ex__(protocol)[2:]


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
        return dict(in_chans=self.in_chans, global_pool=self.global_pool)

    def _grid_size(self, x: Any) -> Tuple[int, int]:
        if isinstance(x, dict):
            raise ValueError("output_fmt must be 'NLC' for patches with coordinates, whose grids differ, got 'NCHW'. "
                             'find_slow_tokens takes images.')
        return self.embeds.dynamic_feat_size(x.shape[-2:])

    def _run(
            self, x: Any, num_blocks: Optional[int] = None, patch_coord: Optional[torch.Tensor] = None,
            patch_valid: Optional[torch.Tensor] = None, attn_mask: Optional[torch.Tensor] = None, **kwargs: Any,
    ) -> Tuple[torch.Tensor, List[torch.Tensor], Optional[torch.Tensor]]:
        if isinstance(x, dict):
            patch_coord, patch_valid = x['patch_coord'], x.get('patch_valid', patch_valid)
            attn_mask, x = x.get('attn_mask', attn_mask), x['patches']
        embeds: Dict[str, Any] = self._forward_embeds(x, patch_coord, patch_valid, attn_mask)
        x, rope, valid, keep = (embeds.get(k) for k in ('patches', 'rope_embeds', 'patch_valid', 'keep_indices'))
        if self.rope_is_mixed and rope is not None:
            rope = list(rope)
            if keep is not None:
                rope = [apply_keep_indices_nlc(x, r, keep, pos_embed_has_batch=patch_coord is not None) for r in rope]
        if attn_mask is None and valid is not None:
            kwargs['key_mask'] = create_attention_mask(
                valid, num_prefix_tokens=self.num_prefix_tokens, symmetric=False, q_len=1, dtype=x.dtype)
        return *self._run_blocks(x, rope, num_blocks, attn_mask=embeds['attn_mask'], **kwargs), valid

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
    for name in sorted({'forward', 'forward_features', 'forward_intermediates'} & {*own}):
        names = _names_used(name, own)
        others = {'forward_features', 'forward_intermediates'} if name == 'forward' else set()
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
    cls = evolved_class(dense_class)
    return object.__new__(cls)  # the class of a sharded model has a __new__ of its own


def check_can_evolve(model: nn.Module) -> None:
    """Raise TypeError if the model would not run its blocks on groups of tokens, or the blocks cannot run on them."""
    for name in ('forward', 'forward_features', 'forward_intermediates'):
        if name in vars(model):
            raise TypeError(
                f'The model has an attribute {name} that replaces the method of {type(model).__name__}, as hooks of '
                f'accelerate do: evolve the model before.')
    kinds = [kind for kind in (nn.Sequential, nn.ModuleList) if isinstance(model.blocks, kind)]
    if not kinds or type(model.blocks).forward is not kinds[0].forward:
        raise TypeError(
            'blocks must be an nn.Sequential or nn.ModuleList without a forward of its own, got '
            f'{type(model.blocks).__name__}.')
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
    """Make a Vision Transformer of timm faster, without training: like patches share a slow token.

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
    vars(evolved).update(vars(model), _evolved_from=model, _evolution_args={}, _compiled_call_impl=None)
    evolved._init_stages(keep_ratio, stages, train_keep_ratio)
    evolved._truncate_to_depth()
    for name, value in vars(model).items():
        if vars(evolved)[name] is not value and name != '_compiled_call_impl':
            raise TypeError(f'The model has an attribute {name}, which evolve needs for itself: rename it.')
    cfg = getattr(model, 'pretrained_cfg', None)
    if cfg and cfg.get('architecture'):  # saved, it comes back as an `evo_vit`
        evolved.pretrained_cfg = evolved.default_cfg = dict(cfg, architecture='evo_vit')
        evolved.__dict__['_evolution_args'] = dict(
            base=cfg['architecture'], keep_ratio=keep_ratio, stages=stages, train_keep_ratio=train_keep_ratio)
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
        check(given is None or given == value, name, 'left out: evo_vit groups like patches; Evo-DeiT has it', given)
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
    return model
