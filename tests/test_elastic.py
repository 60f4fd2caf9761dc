"""`train_keep_ratio`: in training mode each forward pass draws a keep ratio, in evaluation there is that of the model."""
import pytest
import timm
import torch
from distributed import in_two_processes
from helpers import TINY, build, images_for
from torch._dynamo.testing import CompileCounter

from timm_evovit import evolve

RATIOS = (0.2, 0.5, 1.0)
KINDS = {
    'attention': lambda **kwargs: build('evo_deit_tiny', global_pool='token', depth=6, **kwargs),
    'similarity': lambda **kwargs: build(
        'evo_deit_tiny', global_pool='token', slow_tokens='similarity', depth=6, **kwargs),
    'evolved': lambda **kwargs: evolve(build('vit_base_patch16_224', depth=6), **kwargs),
    'eva': lambda **kwargs: evolve(build('eva02_tiny_patch14_224', depth=6), **kwargs),
}
every_kind = pytest.mark.parametrize('kind', KINDS)


@every_kind
def test_each_pass_draws_a_ratio(kind):
    """All of them, each as a model that is trained at this ratio; evaluation is at that of the model."""
    model, fixed = KINDS[kind](keep_ratio=0.4, train_keep_ratio=RATIOS).train(), KINDS[kind]().train()
    x = images_for(model)
    expected = []
    for ratio in RATIOS:
        fixed.set_keep_ratio(ratio)
        expected.append(fixed(x))
    found = [model(x) for _ in range(30)]
    drawn = [[torch.allclose(y, of, atol=1e-6) for of in expected].index(True) for y in found]
    assert {*drawn} == {0, 1, 2}
    fixed.set_keep_ratio(0.4)
    torch.testing.assert_close(model.eval()(x), fixed.eval()(x))
    model.set_keep_ratio(1)
    fixed.set_keep_ratio(1)
    torch.testing.assert_close(model(x), fixed(x))
    torch.manual_seed(0)
    again = [model.train()(x) for _ in range(5)]
    torch.manual_seed(0)
    assert all(torch.equal(model(x), y) for y in again)


@every_kind
def test_recomputed_blocks_have_the_ratio_that_was_drawn(kind):
    gradients = []
    for recompute in (False, True):
        model = KINDS[kind](train_keep_ratio=RATIOS).train()
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(0)
        loss = sum(model(images_for(model)).square().mean() for _ in range(4))
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('kind', ['attention', 'evolved'])
def test_a_graph_for_each_ratio_at_most(kind):
    torch._dynamo.reset()
    model = KINDS[kind](train_keep_ratio=RATIOS).train()
    counter, x, counts = CompileCounter(), images_for(model), []
    compiled = torch.compile(model, backend=counter)
    for passes in (1, 20, 20):
        for seed in range(passes):
            torch.manual_seed(seed)
            y = compiled(x)
            torch.manual_seed(seed)
            torch.testing.assert_close(y, model(x))
        counts.append(counter.frame_count)
    assert counts[0] < counts[1] == counts[2] <= counts[0] + len(RATIOS) - 1


def test_graphs_have_the_ratio_of_the_model():
    model = KINDS['evolved'](keep_ratio=0.4, train_keep_ratio=RATIOS).train()
    x = images_for(model)
    expected = KINDS['evolved'](keep_ratio=0.4).train()(x)
    for graph in (torch.fx.symbolic_trace(model), torch.export.export(model, (x,)).module()):
        for _ in range(3):
            torch.testing.assert_close(graph(x), expected)


def draws(rank):
    """Outputs of 20 passes on one of two processes, each with a seed of its own, as timm's train.py has it."""
    model = KINDS['evolved'](train_keep_ratio=RATIOS).train()
    torch.manual_seed(rank)
    return torch.stack([model(images_for(model)) for _ in range(20)])


def test_all_processes_draw_the_same():
    first, second = in_two_processes(draws)
    torch.testing.assert_close(first, second)
    assert len({y.sum().item() for y in first}) == len(RATIOS)


def test_saved_with_the_model(tmp_path):
    for name, kwargs in (('evo_deit_tiny', {}), ('evo_vit', dict(base='deit_tiny_patch16_224'))):
        model = timm.create_model(name, train_keep_ratio=[0.5, 1], **kwargs, **TINY)
        timm.models.save_for_hf(model, tmp_path / name, model_args=model.model_args)
        assert timm.create_model(f'local-dir:{tmp_path / name}').train_keep_ratio == (0.5, 1.)


@pytest.mark.parametrize('ratios, error', [
    ((), ValueError), ('0.5', TypeError), ((0.5, '1'), TypeError), ((0.5, 0), ValueError), (1.5, ValueError)])
def test_wrong_ratios(ratios, error):
    with pytest.raises(error, match='train_keep_ratio must be .*' + ('1.5' if ratios == 1.5 else '')):
        timm.create_model('evo_vit', base='deit_tiny_patch16_224', train_keep_ratio=ratios, **TINY)
