"""Training as the paper does it: schedule, distributed and mixed precision training, and timm's training utilities."""
import copy
from collections import OrderedDict

import distributed
import helpers
import pytest
import timm
import torch
from helpers import FAMILIES, FEW_BLOCKS, both_families, build, layerwise_phase
from timm.utils import ModelEmaV3
from torch.nn import functional as F

from timm_evovit import find_slow_tokens


def images(family, n=4, seed=1):
    return helpers.images(n, 64 if family == 'levit' else 32, seed=seed)


def logits(model, x):
    torch.manual_seed(0)  # the same heads
    return model(x)


# Layer-to-stage schedule

def twin(family, model, **kwargs):
    """A model without a schedule that holds the same weights."""
    other = build(family, **kwargs)
    other.load_state_dict(model.state_dict(), strict=family == 'deit' or 'tradeoff' not in kwargs)
    return other


@both_families
def test_layer_wise_for_so_many_epochs(family):
    model = build(family, layer_to_stage_epochs=2)
    x = images(family)
    fixed = dict(tradeoff=0.5) if family == 'levit' else {}
    layer = twin(family, model, selection='layer', **fixed).train()
    stage = twin(family, model).train()
    expected = [logits(m, x) for m in (layer, layer, stage, stage)]
    assert not torch.allclose(expected[0], expected[2])
    for epoch, y in enumerate(expected):
        model.train()
        assert model.epochs_started == epoch + 1 and layerwise_phase(model) == (epoch < 2)
        torch.testing.assert_close(logits(model, x), y)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(x), twin(family, model).eval()(x))
    assert [len(find_slow_tokens(m, x)) for m in (model, stage)] == [len(find_slow_tokens(stage, x))] * 2


@both_families
def test_set_epoch_takes_over_from_counting(family):
    model = build(family, layer_to_stage_epochs=2).train()
    for epoch, layerwise in ((0, True), (1, True), (2, False), (1, True), (300, False)):
        model.set_epoch(epoch)
        assert layerwise_phase(model) == layerwise
        for _ in range(3):  # a loop that validates within an epoch
            assert not layerwise_phase(model.eval())
            assert layerwise_phase(model.train()) == layerwise
    build(family).set_epoch(1)  # nothing to schedule
    for epoch, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError), ('1', TypeError)):
        with pytest.raises(error, match=f'epoch must be .*{epoch}'):
            model.set_epoch(epoch)
    assert model.epochs_started == 301


@both_families
def test_the_count_goes_where_the_weights_go(family, tmp_path):
    model = build(family, layer_to_stage_epochs=2)
    ema = ModelEmaV3(model, decay=0.5)
    for _ in range(2):
        model.train()
        model.eval()
    ema.update(model)
    torch.save({'state_dict': model.state_dict(), 'state_dict_ema': ema.module.state_dict()}, tmp_path / 'last.pth.tar')
    for key in ('state_dict', 'state_dict_ema'):
        resumed = build(family, layer_to_stage_epochs=2)
        resumed.load_state_dict(torch.load(tmp_path / 'last.pth.tar')[key])
        for other in (resumed, copy.deepcopy(resumed)):
            assert other.epochs_started == 2 and not layerwise_phase(other.train())
    plain = build(family, seed=1)
    assert 'epochs_started' not in plain.state_dict()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(images(family)), model(images(family)))
    state = plain.state_dict()
    model.load_state_dict(state)
    assert model.epochs_started == 2 and 'epochs_started' not in state
    assert model.load_state_dict(OrderedDict(), strict=False).unexpected_keys == []


@both_families
def test_weights_of_a_finished_training_start_a_new_one(family):
    model = build(family, layer_to_stage_epochs=1)
    model.set_epoch(7)
    create = dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=model.state_dict(), num_classes=10))
    for epochs in (0, 1):
        tuned = build(family, layer_to_stage_epochs=epochs, num_classes=3, **create)
        if epochs:
            assert tuned.epochs_started == 0 and layerwise_phase(tuned.train())
        else:
            assert 'epochs_started' not in tuned.state_dict()


@both_families
def test_a_scheduled_model_from_the_meta_device(family):
    model = build(family, layer_to_stage_epochs=1)
    model.set_epoch(5)
    model.init_weights()
    assert model.epochs_started == 0 and layerwise_phase(model) == model.training
    meta = timm.create_model(FAMILIES[family], layer_to_stage_epochs=1, device='meta')
    assert layerwise_phase(meta.train()) and not layerwise_phase(meta.eval())


@both_families
def test_find_slow_tokens_starts_no_epoch(family):
    model = build(family, layer_to_stage_epochs=1).train()
    selections = len(find_slow_tokens(model, images(family)))
    assert model.epochs_started == 1 and layerwise_phase(model) and model.training
    assert selections == len(find_slow_tokens(build(family), images(family)))
    compiled = torch.compile(model, backend='eager')
    assert len(find_slow_tokens(compiled, images(family))) == selections
    assert model.epochs_started == 1 and layerwise_phase(model) and model.training


def test_tradeoff_waits_for_the_switch():
    model = build('levit', layer_to_stage_epochs=1)
    x = images('levit')
    assert model.tradeoff.abs().min() > 0  # would matter if it were used
    for epoch in range(2):
        model.train()
        model.zero_grad()
        model(x).square().sum().backward()
        assert (model.tradeoff.grad != 0).any() == (epoch == 1)


# More than one process

@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    torch.multiprocessing.spawn(distributed.train_rank, (str(folder),), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('case', distributed.CASES, ids='-'.join)
def test_distributed(two_processes, case, monkeypatch):
    """Both ranks end with the same parameters, those of one process that has seen the joined batches."""
    ranks = [torch.load(two_processes / f'{"-".join(case)}-{rank}.pt') for rank in range(2)]
    monkeypatch.setattr(torch, 'randperm', torch.arange)  # every second sample, in both ranks and in the joined batch
    model, training = distributed.make_task(*case)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = distributed.make_optimizer(model)
    phases = []
    for step in range(distributed.STEPS):
        training.train()
        batches = [distributed.batch(case[0], step, rank) for rank in range(2)]
        if case[0] == 'deit':
            batches = [[torch.cat(pair) for pair in zip(*batches)]]
        for x, y in batches:  # batch norms see the samples of their own rank
            (training(x, y)['loss'] / len(batches)).backward()
        phases.append(layerwise_phase(model))
        optimizer.step()
        optimizer.zero_grad()
    assert phases == ranks[0][1] == ranks[1][1] == [case[1] == 'switch'] * 2 + [False]
    for (name, p), before in zip(model.named_parameters(), start):
        assert torch.equal(ranks[0][0][name], ranks[1][0][name]), name
        torch.testing.assert_close(ranks[0][0][name], p.detach(), rtol=1e-4, atol=1e-5)
        assert not torch.equal(p, before) or name == 'tradeoff' or 'bias' in name, f'{name} has not been trained'
    if case[1] == 'switch':
        assert ranks[0][0]['epochs_started'] == ranks[1][0]['epochs_started'] == distributed.STEPS


# What timm's train.py can be asked for

@both_families
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_mixed_precision(family, dtype):
    """A batch is learned under autocast and loss scaling, with half precision where it pays."""
    model = build(
        family, representative_token=True, layer_to_stage_epochs=1, depth=FEW_BLOCKS[family]).train()
    x, y = images(family), torch.arange(4)
    scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 8, enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(32):
        model.set_epoch(step // 16)  # layer-wise, then stage-wise
        with torch.autocast('cpu', dtype):
            output = model(x)
            loss = F.cross_entropy(output, y)
        assert output.dtype == dtype
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
