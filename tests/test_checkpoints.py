"""Checkpoints: the authors' key names, files, sizes other than the model's, and what does not fit."""
from argparse import Namespace

import pytest
import timm
import torch
from helpers import FAMILIES, TINY, assert_same_weights, authors_names, build, build_deit, images, load, tiny

from timm_evovit.checkpoints import BY_SIMILARITY
from timm_evovit.tools.load import load_model

NAME = FAMILIES['deit']


@pytest.mark.parametrize('family, kwargs, some', [
    ('deit', {}, 'qks.3.qk.weight vs.3.v.bias norms.3.weight projs.3.bias norm.weight norm_cls.weight'),
    ('levit', {}, 'blocks.0.m1.m.learn_tradeoff blocks.1.m2.m.2.bn.running_var patch_embed.6.c.weight head_dist.l.bias'),
    ('levit', dict(depth=(2, 3, 1)), 'blocks.2.poss blocks.2.q.1.c.weight blocks.3.m.0.c.weight blocks.4.m1.m.qkv.c.weight'),
])
def test_authors_names(family, kwargs, some, tmp_path):
    """With timm's filter of checkpoints, and without, as `validate.py --checkpoint` and `train.py --initial-checkpoint`."""
    name, path = FAMILIES[family], str(tmp_path / 'authors.pth')
    model, kwargs = build(name, **kwargs), tiny(name, **kwargs)
    weights = authors_names(model)
    assert set(some.split()) <= set(weights)
    torch.save({'model': weights, 'args': Namespace(lr=1)}, path)
    for source in (dict(state_dict=dict(weights)), dict(state_dict={'model': weights}), dict(file=path),
                   dict(state_dict=model.state_dict())):
        assert_same_weights(load(source, name, **kwargs), model)
    assert_same_weights(timm.create_model(name, checkpoint_path=path, **kwargs), model)
    other = timm.create_model(name, **kwargs)
    timm.models.load_checkpoint(other, path, use_ema=False)
    assert_same_weights(other, model)
    nested = torch.nn.ModuleDict({'a': timm.create_model(name, **kwargs)})
    nested.load_state_dict({f'a.{k}': v for k, v in weights.items()})
    assert_same_weights(nested['a'], model)
    del weights['cls_token']
    with pytest.raises(RuntimeError, match='Missing key.*cls_token'):
        other.load_state_dict(weights)


WAYS = {  # to load a file into a model
    'state dict': lambda model, path: model.load_state_dict(torch.load(path)['state_dict']),
    '--initial-checkpoint': timm.models.load_checkpoint,
    '--resume': lambda model, path: timm.models.resume_checkpoint(
        model, path, torch.optim.SGD(model.parameters(), momentum=0.9)),
    '--pretrained-path': lambda model, path: load(
        dict(file=path), slow_tokens=model.slow_tokens, global_pool=model.global_pool),
}


@pytest.mark.parametrize('way', WAYS)
def test_weights_tell_how_they_were_trained(way, tmp_path, caplog):
    path = str(tmp_path / 'model.pth')

    def save(model):
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        torch.save(dict(state_dict=model.state_dict(), optimizer=optimizer.state_dict(), epoch=3), path)
        return model.state_dict()

    def loaded(**kwargs):
        caplog.clear()
        model = build_deit(seed=1, **kwargs)
        model = WAYS[way](model, path) if way == '--pretrained-path' else (WAYS[way](model, path), model)[1]
        return {k: v for k, v in model.state_dict().items() if k != BY_SIMILARITY}

    weights = save(build_deit(slow_tokens='similarity'))
    with pytest.raises(RuntimeError, match="slow_tokens='similarity'"):
        loaded()
    del weights[BY_SIMILARITY]
    assert_same_weights(loaded(slow_tokens='similarity'), weights)
    assert not caplog.records

    weights = save(build_deit())  # or of a version without the mark
    assert_same_weights(loaded(), weights)
    assert not caplog.records
    assert_same_weights(loaded(slow_tokens='similarity'), weights)
    assert "less accurate than with slow_tokens='attention'" in caplog.text

    weights = save(build('deit_tiny_patch16_224'))
    for slow_tokens in ('attention', 'similarity'):
        assert_same_weights(loaded(slow_tokens=slow_tokens, global_pool='token'), weights)
        assert not caplog.records


def test_sizes_are_adapted():
    model = build_deit()
    source = dict(state_dict=authors_names(model))
    larger = load(source, img_size=48)
    assert larger.pos_embed.shape == (1, 37, 24) and larger(images(2, (48, 48))).shape == (2, 10)
    assert torch.equal(larger.pos_embed[:, :1], model.pos_embed[:, :1])
    fine = load(source, patch_size=4)
    assert fine(images()).shape == (2, 10)
    grey = load(source, in_chans=1)
    torch.testing.assert_close(grey.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True))
    other = load(source, num_classes=7)
    assert other(images()).shape == (2, 7) and other.head_cls.out_features == 7
    assert torch.equal(other.fc_norm.weight, model.fc_norm.weight)
    assert torch.equal(other.norm_cls.weight, model.norm_cls.weight)


def test_the_class_token_branch_is_dropped_where_there_is_none():
    model = build_deit()
    source = dict(state_dict=authors_names(model))
    plain = load(source, assisted_cls=False)
    assert torch.equal(plain(images()), model(images()))
    assert not [k for k in plain.state_dict() if 'cls.' in k]
    backbone = load(source, features_only=True, num_classes=0)
    assert [y.shape for y in backbone(images())] == [(2, 24, 4, 4)] * 3


@pytest.mark.parametrize('family, damage, message', [
    ('deit', lambda sd: sd.pop('blocks.3.mlp.fc1.weight'), r'Missing key.*blocks\.3\.mlp\.fc1\.weight'),
    ('deit', lambda sd: sd.pop('vs.5.v.bias'), r'qks\.5\.qk\.bias but not vs\.5\.v\.bias'),
    ('deit', lambda sd: sd.pop('norm_cls.weight'), r'Missing key.*norm_cls\.weight'),
    ('deit', lambda sd: sd.update(surplus=torch.zeros(1)), 'Unexpected key.*surplus'),
    ('deit', lambda sd: sd.update({'head_cls.weight': torch.ones(7, 24)}), r'size mismatch for head_cls\.weight'),
    ('levit', lambda sd: sd.update(poss=torch.zeros(1, 13, 16)), 'size mismatch for pos_embed'),
    ('levit', lambda sd: sd.pop('poss'), 'Missing key.*pos_embed'),
    ('levit', lambda sd: [sd.pop(k) for k in [*sd] if k.endswith('learn_tradeoff')], 'Missing key.*tradeoff'),
    ('levit', lambda sd: sd.update(attention_biases=torch.zeros(1)), 'attention_biases.*class token'),  # timm's LeViT
])
def test_what_does_not_fit_is_named(family, damage, message):
    authors = authors_names(build(family))
    damage(authors)
    with pytest.raises((RuntimeError, ValueError), match=message):
        load(dict(state_dict=authors), FAMILIES[family])


def test_weights_by_similarity_are_assigned_to_a_model_on_meta():
    weights = build('evo_deit_tiny', slow_tokens='similarity', pos_embed='none').state_dict()
    with torch.device('meta'):
        model = timm.create_model('evo_deit_tiny', **tiny('evo_deit_tiny', slow_tokens='similarity', pos_embed='none'))
    model.load_state_dict(weights, assign=True)
    assert_same_weights(model.to('cpu'), weights)


def test_data_configuration_of_a_checkpoint(tmp_path):
    """It is of the model as it is built, and of what is given; a dynamic model takes pictures of any size."""
    kwargs = dict(img_size=(32, 48), patch_size=8, embed_dim=24, num_heads=3, depth=2, in_chans=1)
    for name, more in (NAME, {}), ('vit_tiny_patch16_224', dict(dynamic_img_size=True)):
        model = timm.create_model(name, num_classes=10, **kwargs, **more)
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
        loaded = load_model(
            name, checkpoint=tmp_path / 'last.pth.tar', data=dict(crop_pct=0.8, mean=(0.3,)), **kwargs, **more)
        assert_same_weights(loaded, model)
        data = timm.data.resolve_model_data_config(loaded)
        assert loaded.num_classes == 10 and data['crop_pct'] == 0.8 and data['mean'] == (0.3,) and len(data['std']) == 1
        assert data['input_size'] == (1, 32, 48)


@pytest.mark.parametrize('saved, kwargs, given, messages', [
    ('deit_tiny_patch16_224', {}, {}, ['Missing key(s) in state_dict: "fc_norm.weight", "fc_norm.bias", "norm_cls.weight"']),
    (NAME, dict(img_size=64), {}, ['size mismatch for pos_embed', 'Size([1, 65, 24]) from checkpoint', 'model is torch.Size([1, 17, 24]).']),
    (NAME, {}, dict(num_classes=12), ['size mismatch for head.weight', 'size mismatch for head.bias']),
    (NAME, dict(depth=7), {}, ['Unexpected key(s) in state_dict: "blocks.6.norm1.weight"', '[...]']),
    (NAME, dict(slow_tokens='similarity'), {}, ["These weights need slow_tokens='similarity'"])])
def test_files_that_do_not_fit(saved, kwargs, given, messages, tmp_path):
    """One line with the first of the keys: nothing is dropped or resampled, since timm's scripts could not load it."""
    model = build(saved, **{'depth': 6, **kwargs})
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    with pytest.raises((RuntimeError, ValueError)) as error:
        load_model(NAME, checkpoint=tmp_path / 'model.pth', **{**TINY, 'depth': 6, **given})
    assert all(message in str(error.value) for message in ('model.pth does not fit the model', *messages))
    assert len(str(error.value).splitlines()) == 1
