"""Heads that are replaced, reset or frozen, as fine-tuning scripts do it, and the order of samples in a batch."""
import pytest
import timm
import torch
from helpers import both_families, build, build_deit, build_levit, images, images_for
from torch import nn
from torch.nn import functional as F

from timm_evovit import AssistedLoss, evolve


@pytest.mark.parametrize('classes', [1, 5, 10])
@pytest.mark.parametrize('head', ['linear', 'sequence'])
def test_a_replaced_head_answers(classes, head):
    """`model.head = nn.Linear(...)` works as for timm's deit: all logits of training have the new shape."""
    model = build_deit()
    model.head = nn.Linear(24, classes) if head == 'linear' else nn.Sequential(nn.Linear(24, classes), nn.Identity())
    x = images(5)
    assert model(x).shape == (5, classes)
    model.train()
    assert model(x).shape == (5, classes)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())  # as DistributedDataParallel expects
    if classes != 10:  # the head of the class token does not fit: the new one answers alone
        assert torch.equal(model(x), model.head(model.forward_head(model.forward_features(x), pre_logits=True)))


@pytest.mark.parametrize('names', [('head',), ('head_dist',)])
def test_levit_refuses_heads_that_do_not_fit_each_other(names):
    model = build_levit()
    for name in names:
        setattr(model, name, nn.Linear(32, 1))
    for mode in (False, True):
        with pytest.raises((RuntimeError, ValueError), match=r'\[2, 1\]'):
            model.train(mode)(images_for(model, 2))


def test_levit_with_both_heads_replaced():
    model = build_levit().train()
    model.head, model.head_dist = nn.Linear(32, 3), nn.Linear(32, 3)
    x = images_for(model, 4)
    assert model(x).shape == (4, 3)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(x).shape == (4, 3)


def test_head_init_of_train_py():
    """What train.py does for --head-init-scale and --head-init-bias."""
    model = build_deit().train()
    with torch.no_grad():
        model.get_classifier().weight.mul_(0.001)
        model.get_classifier().bias.mul_(0.001)
        nn.init.constant_(model.get_classifier().bias, 0)
    x, y = images(8), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model.eval()(x).argmax(dim=1) == y).all()


@both_families
def test_a_linear_probe_trains_what_answers(family):
    """With all but `get_classifier()` frozen no sample is answered by a head that is not trained."""
    model = build(f'evo_{family}_tiny' if family == 'deit' else 'evo_levit_128s')
    for p in model.parameters():
        p.requires_grad_(False)
    for p in model.get_classifier().parameters():
        p.requires_grad_(True)
    x = images_for(model, 6)
    model.train()
    if family == 'deit':
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        for _ in range(5):
            assert torch.equal(model(x), model.head(features))
        model.set_assisted_training()
        assert torch.equal(model(x), model.head(features))
    else:  # all four heads are the classifier
        assert all(p.requires_grad for name, p in model.named_parameters() if name.startswith('head'))
        assert not any(p.requires_grad for name, p in model.named_parameters() if not name.startswith('head'))
    loss = AssistedLoss(nn.CrossEntropyLoss())(model(x), torch.arange(6))
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('order', ['alternating', 'sorted'])
def test_the_order_of_a_batch_does_not_matter(order):
    """Both classes are learned if a sampler puts one class on even places (two classes of squares and discs)."""
    torch.manual_seed(0)
    model = timm.create_model(
        'evo_deit_tiny', img_size=32, patch_size=4, embed_dim=64, depth=6, num_heads=4, num_classes=2).train()
    grid = torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing='ij'))
    shapes = [((grid - 16).abs().amax(dim=0) < 8).float(), ((grid - 16).float().norm(dim=0) < 8).float()]
    y = torch.arange(2).repeat(16) if order == 'alternating' else torch.arange(2).repeat_interleave(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        x = torch.stack([shapes[c] for c in y])[:, None].expand(-1, 3, -1, -1) + 0.3 * torch.randn(32, 3, 32, 32)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (model.eval()(x).argmax(dim=1) == y).float().mean() > 0.9


def test_an_evolved_model_shares_its_head():
    dense = build('vit_tiny_patch16_224')
    model = evolve(dense).train()
    model.head = nn.Linear(24, 1)
    assert model(images(3)).shape == dense(images(3)).shape == (3, 1)
    assert model.get_classifier() is model.head is dense.head
    dense.reset_classifier(5, 'avg')
    assert model(images(3)).shape == (3, 5) and model.global_pool == 'avg' and model.num_classes == 5
