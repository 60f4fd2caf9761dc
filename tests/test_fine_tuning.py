"""Heads that are replaced, reset or frozen, as fine-tuning scripts do it."""
import pytest
import torch
from helpers import both_families, build, build_deit, build_levit, images, images_for
from torch import nn

from timm_evovit import AssistedLoss


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
        expected = model.head(model.forward_head(model.forward_features(x), pre_logits=True))
        assert torch.equal(model(x), expected)
        model.set_assisted_training()
        assert torch.equal(model(x), expected)


def test_levit_with_heads_replaced():
    model = build_levit().train()
    model.head = nn.Linear(32, 3)
    for mode in (False, True):  # it does not fit the other one
        with pytest.raises((RuntimeError, ValueError), match=r'\[4, 3\]'):
            model.train(mode)(images_for(model, 4))
    model.head_dist = nn.Linear(32, 3)
    x = images_for(model, 4)
    assert model(x).shape == (4, 3)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(x).shape == (4, 3)


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
