"""Checkpoints: the authors' key names, files, sizes other than the model's, and what does not fit."""
from argparse import Namespace

import pytest
import timm
import torch
import yaml
from helpers import FAMILIES, TINY, assert_same_weights, authors_names, build, build_deit, images, load, tiny

from timm_evovit import evolve
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


TRAINED = dict(  # what train.py writes into args.yaml, lists in place of tuples
    model=NAME, num_classes=None, gp='token', in_chans=None, input_size=[1, 32, 48], img_size=None, crop_pct=0.8, mean=[0.3],
    std=None, interpolation='', pretrained=False, pretrained_path=None,
    model_kwargs=dict(img_size=[32, 48], patch_size=8, embed_dim=24, num_heads=3, depth=6))


@pytest.mark.parametrize('change, given, expected', [
    ({}, {}, dict(crop_pct=0.8, slow_tokens='attention', keep_ratio=(0.7, 0.7))),
    ({}, dict(name=f'{NAME}_patch16_224', data=dict(crop_pct=1.), keep_ratio=0.3),
     dict(crop_pct=1., slow_tokens='attention', keep_ratio=(0.3, 0.3))),
    (dict(pretrained=True, crop_pct=None, keep_ratio=None), {},  # as `evolve` has it
     dict(crop_pct=0.9, slow_tokens='similarity', keep_ratio=evolve(timm.create_model('vit_tiny_patch16_224', depth=6)).keep_ratio)),
    (dict(pretrained=True, crop_pct=None, pretrained_path='x.pth'), {},
     dict(crop_pct=0.875, slow_tokens='attention', keep_ratio=(0.7, 0.7)))])
def test_arguments_of_train_py(tmp_path, change, given, expected):
    """They are read from args.yaml beside the checkpoint, also what DeiT's own weights had set up; what is given wins."""
    args = {**TRAINED, **change}
    args['model_kwargs'] = {**args['model_kwargs'], 'keep_ratio': args.pop('keep_ratio', 0.7)}
    kwargs = {**args['model_kwargs'], 'in_chans': 1, 'global_pool': 'token', 'num_classes': 10}
    model = timm.create_model(NAME, slow_tokens=expected['slow_tokens'], **kwargs)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(args))
    given = dict(given)
    loaded, name, found = load_model(given.pop('name', None), checkpoint=tmp_path / 'last.pth.tar', **given)
    assert_same_weights(loaded, model)
    assert name.startswith(NAME) and found['depth'] == 6 and loaded.global_pool == 'token'
    data = timm.data.resolve_model_data_config(loaded)
    assert data['input_size'] == (1, 32, 48) and data['mean'] == (0.3,) and len(data['std']) == 1
    found = dict(crop_pct=data['crop_pct'], slow_tokens=loaded.slow_tokens, keep_ratio=loaded.keep_ratio)
    assert found == expected


def test_size_of_a_dynamic_model(tmp_path):
    """It takes any, so train.py's --img-size is that of the pictures."""
    kwargs = dict(TINY, dynamic_img_size=True, depth=2)
    torch.save(timm.create_model('vit_tiny_patch16_224', **kwargs).state_dict(), tmp_path / 'a.pth')
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(dict(model='vit_tiny_patch16_224', img_size=96, model_kwargs=kwargs)))
    for given, size in ({}, 96), (dict(img_size=32), 32):
        model = load_model(None, checkpoint=tmp_path / 'a.pth', **given)[0]
        assert model.pretrained_cfg['input_size'] == (3, size, size)


@pytest.mark.parametrize('saved, kwargs, given, messages', [
    ('deit_tiny_patch16_224', {}, {}, ['Missing key(s) in state_dict: "fc_norm.weight", "fc_norm.bias", "norm_cls.weight"']),
    (NAME, dict(img_size=64), {}, ['size mismatch for pos_embed', 'Size([1, 65, 24]) from checkpoint', 'model is torch.Size([1, 17, 24]).']),
    (NAME, {}, dict(num_classes=12), ['size mismatch for head.weight', 'size mismatch for head.bias']),
    (NAME, dict(depth=7), {}, ['Unexpected key(s) in state_dict: "blocks.6.norm1.weight"', '[...]']),
    (NAME, dict(slow_tokens='similarity'), {}, ["The weights are of an Evo-DeiT with slow_tokens='similarity'"])])
def test_files_that_do_not_fit(saved, kwargs, given, messages, tmp_path):
    """One line with the first of the keys: nothing is dropped or resampled, since timm's scripts could not load it."""
    model = build(saved, **{'depth': 6, **kwargs})
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    with pytest.raises((RuntimeError, ValueError)) as error:
        load_model(NAME, checkpoint=tmp_path / 'model.pth', **{**TINY, 'depth': 6, **given})
    assert all(message in str(error.value) for message in ('model.pth does not fit the model', *messages))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('text, message', [
    ('model: [', 'args.yaml cannot be read'), ('- 3', 'The model must be a name'), ('lr: 3', 'The model must be a name')])
def test_args_yaml_of_something_else(tmp_path, text, message):
    torch.save(build_deit().state_dict(), tmp_path / 'a.pth')
    (tmp_path / 'args.yaml').write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model(None, checkpoint=tmp_path / 'a.pth')
