"""What holds for every kind of model, alone, under hooks, sharding, vmap and attribution."""
import copy
import functools
import warnings

import pytest
import torch
from helpers import MODELS, all_models, assert_same_weights, build, build_deit, build_levit, images, images_for
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

from timm_evovit import evolve, find_slow_tokens


def blocks_of(model):
    return [b for s in model.stages for b in s.blocks] if hasattr(model, 'stages') else list(model.blocks)


@pytest.mark.parametrize('kind, kwargs', [
    *((kind, {}) for kind in MODELS), *((kind, dict(selection='layer')) for kind in ('deit', 'levit')),
    ('deit', dict(representative_token=True))])
@torch.no_grad()
def test_images_do_not_depend_on_the_batch(kind, kwargs):
    model = MODELS[kind](**kwargs).double()
    x = images_for(model, 5)
    together = model(x)
    torch.testing.assert_close(together, torch.cat([model(image[None]) for image in x]))
    torch.testing.assert_close(together.flip(0), model(x.flip(0)))
    x[0] = float('nan')
    y = model(x)
    assert y[0].isnan().all()
    torch.testing.assert_close(y[1:], together[1:])


@pytest.mark.parametrize('kind, kwargs', [
    *((kind, {}) for kind in MODELS), ('deit', dict(selection='layer', representative_token=True)),
    ('levit', dict(selection='layer', representative_token=False))])
def test_grad_checkpointing_changes_nothing(kind, kwargs):
    """By timm's method, and by PyTorch's wrapper around blocks."""
    gradients = []
    for how in ('not', 'set_grad_checkpointing', 'checkpoint_wrapper'):
        model, runs = MODELS[kind](**kwargs).double().train(), []
        model.set_grad_checkpointing(how == 'set_grad_checkpointing')
        own_blocks = blocks_of(model)
        for block in own_blocks:
            block.register_forward_pre_hook(lambda block, args, runs=runs: runs.append(block))
        for blocks in [s.blocks for s in model.stages] if kind == 'levit' else [model.blocks]:
            for i in range(len(blocks)) if how == 'checkpoint_wrapper' else ():
                blocks[i] = checkpoint_wrapper(blocks[i])
        torch.manual_seed(0)  # the same heads
        model(images_for(model)).square().sum().backward()
        assert [runs.count(block) for block in own_blocks] == [1 if how == 'not' else 2] * len(own_blocks)
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1:], [gradients[0]] * 2)


@all_models
@torch.no_grad()
def test_low_precision(kind):
    model = MODELS[kind]()
    x = images_for(model, 4)
    full = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert F.cosine_similarity(model(x).float().flatten(), full.flatten(), dim=0) > 0.97
    half = model.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and F.cosine_similarity(half.float().flatten(), full.flatten(), dim=0) > 0.9
    attention = find_slow_tokens(model, x.bfloat16())[0].attention
    assert attention is None if kind == 'evolved' else attention.dtype == torch.float32


@all_models
def test_nothing_is_left_behind(kind, tmp_path):
    """By inference, find_slow_tokens, and a keep ratio that is refused or taken back; copy and pickle are the same."""
    model = MODELS[kind]().train()
    model.head.eval()
    x, before = images_for(model, 2), copy.deepcopy(model)
    state = {name: (set(vars(m)), m.training) for name, m in model.named_modules()}
    find_slow_tokens(model, x)
    for bad in (0, (0.5,) * 9, 'x'):
        with pytest.raises((ValueError, TypeError)):
            model.set_keep_ratio(bad)
    assert model.keep_ratio == before.keep_ratio
    assert {name: (set(vars(m)), m.training) for name, m in model.named_modules()} == state
    model.set_keep_ratio(0.25)
    model.set_keep_ratio(before.keep_ratio)
    assert_same_weights(model, before)
    torch.save(model, tmp_path / 'model.pt')
    with torch.no_grad():
        expected = model.eval()(x)
        for other in (model, before.eval(), torch.load(tmp_path / 'model.pt', weights_only=False).eval()):
            assert type(other) is type(model) and torch.equal(other(x), expected)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == {name: s[0] for name, s in state.items()}


@all_models
@pytest.mark.parametrize('mode', [False, True])
def test_hooks_get_tensors(kind, mode):
    """Every module that is called returns one tensor. All layers are called, so that others can take their place.
    Modules outside a stage return complete tokens.
    """
    model = MODELS[kind]().train(mode)
    model.set_keep_ratio(0.5)
    outputs = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, output, name=name: outputs.update({name: output}))
    x = images_for(model, 3)
    model(x)
    assert all(torch.is_tensor(output) for output in outputs.values())
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.LayerNorm))}
    assert [name for name in layers - outputs.keys() if '_cls' not in name] == []
    if kind == 'levit':
        for i, stage in enumerate(model.stages):
            assert outputs[f'stages.{i}'].shape[:2] == (3, 1 + stage.grid_size[0] * stage.grid_size[1])
        return
    n = model.pos_embed.shape[1]
    assert outputs['norm'].shape == (3, n, 24)
    for start in model.stage_starts:
        assert outputs[f'blocks.{start}'].shape[1] < n
        assert kind == 'evolved' or outputs[f'blocks.{start}.grid'].shape == (3, n, 24)


@all_models
def test_vmap(kind):
    """Over images, and over gradients of each sample, in evaluation mode."""
    model = MODELS[kind]().double()
    x = images_for(model, 3)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.func.vmap(lambda y: model(y[None])[0])(x), expected)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(parameters, y):
        return torch.func.functional_call(model, parameters, (y[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        slope = torch.autograd.grad(model(x[i:i + 1]).square().sum(), list(model.parameters()), allow_unused=True)
        for (name, g), s in zip(found.items(), slope):
            torch.testing.assert_close(g[i], torch.zeros_like(g[i]) if s is None else s, msg=lambda m: f'{name}: {m}')


@pytest.fixture(scope='module')
def fully_shard():
    """FSDP2 of a module, in a group of one process."""
    from torch.distributed import destroy_process_group, device_mesh, fsdp, init_process_group
    if not hasattr(fsdp, 'fully_shard'):
        pytest.skip('this PyTorch has no fully_shard')
    init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield functools.partial(fsdp.fully_shard, mesh=device_mesh.init_device_mesh('cpu', (1,)))
    destroy_process_group()


@all_models
@pytest.mark.parametrize('units', ['blocks', 'stages'])
def test_fully_shard(kind, units, fully_shard):
    """Around blocks, stages of LeViT and the model: same result, gradients, no warning of views."""
    model = MODELS[kind]()
    x = images_for(model, 3)
    expected = {}
    with torch.no_grad():
        for ratio in (0.5, 0.25):
            model.set_keep_ratio(ratio)
            expected[ratio] = model(x)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*view.*')
        for part in blocks_of(model) if units == 'blocks' else getattr(model, 'stages', ()):
            fully_shard(part)
        fully_shard(model)
        for ratio, y in expected.items():
            model.set_keep_ratio(ratio)
            torch.testing.assert_close(model(x).detach(), y)
        model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_sharded_model_evolves(fully_shard):
    dense = build('vit_tiny_patch16_224')
    x = images_for(dense)
    expected = evolve(build('vit_tiny_patch16_224'), 0.5)(x)
    for part in (*dense.blocks, dense):
        fully_shard(part)
    torch.testing.assert_close(evolve(dense, 0.5)(x), expected)


@pytest.mark.slow
@all_models
def test_grad_cam(kind):
    """Of the last modules that see the complete grid, as docs/seeing.md recommends."""
    grad_cam = pytest.importorskip('pytorch_grad_cam', reason='pytorch_grad_cam is not installed')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    x = images(2, 64 if kind == 'levit' else (32, 48))
    if kind == 'levit':
        model = build_levit()
        layers = {stage: stage.grid_size for stage in model.stages[:2]}
    elif kind == 'deit':
        model = build_deit(dynamic_img_size=True)
        layers = {model.blocks[start].grid: (4, 6) for start in model.stage_starts}
    else:
        model = evolve(build('vit_tiny_patch16_224', dynamic_img_size=True), (0.7, 0.4), stages=(4, 8))
        layers = {model.blocks[3]: (4, 6)}

    def maps(layer, grid_size, label):
        def grid_of(tokens):
            return tokens[:, 1:].unflatten(1, grid_size).permute(0, 3, 1, 2)

        with grad_cam.GradCAM(model, [layer], reshape_transform=grid_of) as cam:
            return cam(input_tensor=x, targets=[ClassifierOutputTarget(label)] * 2)

    for layer, grid_size in layers.items():
        found = [maps(layer, grid_size, label) for label in range(10)]  # negative evidence makes an empty map
        assert {m.shape for m in found} == {(2, *x.shape[2:])}
        assert max(m.max() for m in found) == pytest.approx(1, abs=1e-3)
    if kind == 'evolved':  # 24 patches in 16 groups, which are no grid of 4 x 4
        with pytest.raises(RuntimeError, match='size of dim 1 .16.'):
            maps(model.blocks[4], (4, 6), 0)


def test_images_keep_their_layout_in_evaluation():
    """The stem sees channels last strides, which is what makes it fast on a CPU."""
    model, strides = build_levit(), []
    model.stem.register_forward_pre_hook(lambda m, args: strides.append(args[0].is_contiguous(
        memory_format=torch.channels_last)))
    x = images_for(model, 2)
    model(x)
    model.train()(x)
    assert strides == [True, False]
