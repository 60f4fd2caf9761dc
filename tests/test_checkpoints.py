"""Checkpoints: the authors' key names, files, sizes other than the model's, and what does not fit."""
from argparse import Namespace

import pytest
import test_evo_levit
import timm
import torch
from test_evo_deit import NAME, SMALL, build, images


def as_authors_name_it(state_dict):
    """timm's naming to that of the authors, written out the other way round than the package does it."""
    out = {}
    for key, value in state_dict.items():
        parts = key.split('.')
        if parts[0] == 'blocks':
            i, rest = parts[1], '.'.join(parts[2:])
            if rest.startswith('attn.qkv.'):
                third = len(value) // 3
                out[f'qks.{i}.qk.{parts[-1]}'], out[f'vs.{i}.v.{parts[-1]}'] = value[:2 * third], value[2 * third:]
                continue
            if rest.startswith('attn.proj.'):
                key = f'projs.{i}.{parts[-1]}'
            elif rest.startswith('norm1.'):
                key = f'norms.{i}.{parts[-1]}'
        elif parts[0] == 'fc_norm':
            key = f'norm.{parts[-1]}'
        out[key] = value
    return out


def load(source, **kwargs):
    overlay = dict(source, num_classes=10)
    return timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **kwargs}).eval()


def test_authors_names_from_state_dict_and_file(tmp_path):
    model = build()
    authors = as_authors_name_it(model.state_dict())
    assert len(authors) == len(model.state_dict()) + 2 * 12
    torch.save({'model': authors}, tmp_path / 'authors.pth')
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'timm.pth')
    for source in (
            dict(state_dict=dict(authors)), dict(state_dict={'model': authors}), dict(state_dict=model.state_dict()),
            dict(file=str(tmp_path / 'authors.pth')), dict(file=str(tmp_path / 'timm.pth'))):
        loaded = load(source)
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
        assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize('family', ['deit', 'levit'])
def test_without_a_filter(family, tmp_path):
    """What `validate.py --checkpoint` and `train.py --initial-checkpoint` do: no filter, no configuration."""
    model, authors, name, kwargs = (
        (build(), as_authors_name_it, NAME, SMALL) if family == 'deit' else
        (test_evo_levit.build(), test_evo_levit.authors_names, test_evo_levit.NAME, test_evo_levit.SMALL))
    weights = authors(model.state_dict() if family == 'deit' else model)
    torch.save({'model': weights, 'args': Namespace(lr=1)}, tmp_path / 'authors.pth')
    expected = model.state_dict()
    assert set(weights) != set(expected)
    loaded = timm.create_model(name, checkpoint_path=str(tmp_path / 'authors.pth'), **kwargs)
    other = timm.create_model(name, **kwargs)
    timm.models.load_checkpoint(other, str(tmp_path / 'authors.pth'), use_ema=False)
    nested = torch.nn.ModuleDict({'a': timm.create_model(name, **kwargs)})
    nested.load_state_dict({f'a.{k}': v for k, v in weights.items()})
    for m in (loaded, other, nested['a']):
        assert all(torch.equal(v, expected[k]) for k, v in m.state_dict().items())
    weights.pop('cls_token')
    with pytest.raises(RuntimeError, match='Missing key.*cls_token'):
        other.load_state_dict(weights)


def test_sizes_are_adapted():
    model = build()
    source = dict(state_dict=as_authors_name_it(model.state_dict()))
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
    model = build()
    source = dict(state_dict=as_authors_name_it(model.state_dict()))
    plain = load(source, assisted_cls=False)
    assert torch.equal(plain(images()), model(images()))
    assert not [k for k in plain.state_dict() if 'cls.' in k]
    backbone = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=dict(source, num_classes=10), features_only=True,
        **{**SMALL, 'num_classes': 0})
    assert [y.shape for y in backbone(images())] == [(2, 24, 4, 4)] * 3


@pytest.mark.parametrize('damage, message', [
    (lambda sd: sd.pop('blocks.3.mlp.fc1.weight'), r'Missing key.*blocks\.3\.mlp\.fc1\.weight'),
    (lambda sd: sd.pop('vs.5.v.bias'), r'qks\.5\.qk\.bias but not vs\.5\.v\.bias'),
    (lambda sd: sd.pop('norm_cls.weight'), r'Missing key.*norm_cls\.weight'),
    (lambda sd: sd.update(surplus=torch.zeros(1)), 'Unexpected key.*surplus'),
    (lambda sd: sd.update({'blocks.0.norm2.weight': torch.ones(25)}),
     r'size mismatch for blocks\.0\.norm2\.weight'),
    (lambda sd: sd.pop('head.weight'), r'Missing key.*head\.weight'),
    (lambda sd: sd.update({'head_cls.weight': torch.ones(7, 24)}), r'size mismatch for head_cls\.weight'),
    (lambda sd: sd.update({'patch_embed.proj.bias': torch.ones(7)}), r'size mismatch for patch_embed\.proj\.bias'),
])
def test_what_does_not_fit_is_named(damage, message):
    authors = as_authors_name_it(build().state_dict())
    damage(authors)
    with pytest.raises((RuntimeError, ValueError), match=message):
        load(dict(state_dict=authors))


def test_what_does_not_fit_is_left_where_that_is_asked_for():
    authors = as_authors_name_it(build().state_dict())
    del authors['blocks.3.mlp.fc1.weight']
    authors['surplus'] = torch.zeros(1)
    model = load(dict(state_dict=authors), pretrained_strict=False)
    own, theirs = model.state_dict(), build().state_dict()
    differing = [k for k in own if not torch.equal(own[k], theirs[k])]
    assert differing == ['blocks.3.mlp.fc1.weight']


def test_a_checkpoint_of_another_model_is_refused():
    resnet = timm.create_model('resnet18').state_dict()
    with pytest.raises(RuntimeError, match='(?s)EvoVisionTransformer.*Missing key.*cls_token.*Unexpected key.*conv1.weight'):
        load(dict(state_dict=resnet))
    with pytest.raises(RuntimeError, match='blocks.6.norm1.weight'):
        load(dict(state_dict=build(depth=6).state_dict()))
