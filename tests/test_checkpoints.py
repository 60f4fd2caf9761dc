"""Checkpoints: the authors' key names, files, sizes other than the model's, and what does not fit."""
from argparse import Namespace

import pytest
import timm
import torch
from helpers import FAMILIES, TINY, assert_same_weights, authors_names, both_families, build, build_deit, images, tiny

from timm_evovit.checkpoints import BY_SIMILARITY

NAME = FAMILIES['deit']


def load(source, **kwargs):
    overlay = dict(source, num_classes=10)
    return timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, **{**TINY, **kwargs}).eval()


def test_authors_names_from_state_dict_and_file(tmp_path):
    model = build_deit()
    authors = authors_names(model)
    assert len(authors) == len(model.state_dict()) + 2 * 12
    torch.save({'model': authors}, tmp_path / 'authors.pth')
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'timm.pth')
    for source in (
            dict(state_dict=dict(authors)), dict(state_dict={'model': authors}), dict(state_dict=model.state_dict()),
            dict(file=str(tmp_path / 'authors.pth')), dict(file=str(tmp_path / 'timm.pth'))):
        loaded = load(source)
        assert_same_weights(loaded, model)
        assert torch.equal(loaded(images()), model(images()))


@both_families
def test_without_a_filter(family, tmp_path):
    """What `validate.py --checkpoint` and `train.py --initial-checkpoint` do: no filter, no configuration."""
    name = FAMILIES[family]
    model, path = build(name), str(tmp_path / 'authors.pth')
    weights = authors_names(model)
    assert set(weights) != set(model.state_dict())
    torch.save({'model': weights, 'args': Namespace(lr=1)}, path)
    assert_same_weights(timm.create_model(name, checkpoint_path=path, **tiny(name)), model)
    other = timm.create_model(name, **tiny(name))
    timm.models.load_checkpoint(other, path, use_ema=False)
    assert_same_weights(other, model)
    nested = torch.nn.ModuleDict({'a': timm.create_model(name, **tiny(name))})
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
    backbone = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=dict(source, num_classes=10), features_only=True,
        **{**TINY, 'num_classes': 0})
    assert [y.shape for y in backbone(images())] == [(2, 24, 4, 4)] * 3


@pytest.mark.parametrize('damage, message', [
    (lambda sd: sd.pop('blocks.3.mlp.fc1.weight'), r'Missing key.*blocks\.3\.mlp\.fc1\.weight'),
    (lambda sd: sd.pop('vs.5.v.bias'), r'qks\.5\.qk\.bias but not vs\.5\.v\.bias'),
    (lambda sd: sd.pop('norm_cls.weight'), r'Missing key.*norm_cls\.weight'),
    (lambda sd: sd.update(surplus=torch.zeros(1)), 'Unexpected key.*surplus'),
    (lambda sd: sd.update({'head_cls.weight': torch.ones(7, 24)}), r'size mismatch for head_cls\.weight'),
])
def test_what_does_not_fit_is_named(damage, message):
    authors = authors_names(build_deit())
    damage(authors)
    with pytest.raises((RuntimeError, ValueError), match=message):
        load(dict(state_dict=authors))


def test_a_count_of_epochs_tells_of_class_attention_too(caplog):
    model = build('evo_deit_tiny', assisted_cls=False, slow_tokens='similarity')
    weights = build('evo_deit_tiny', assisted_cls=False, layer_to_stage_epochs=5).state_dict()
    model.load_state_dict(weights)
    assert 'trained by class attention' in caplog.text
    caplog.clear()
    build('evo_deit_tiny', assisted_cls=False).load_state_dict(weights)
    assert not caplog.text


def test_weights_by_similarity_are_assigned_to_a_model_on_meta():
    weights = build('evo_deit_tiny', slow_tokens='similarity', pos_embed='none').state_dict()
    with torch.device('meta'):
        model = timm.create_model('evo_deit_tiny', **tiny('evo_deit_tiny', slow_tokens='similarity', pos_embed='none'))
    model.load_state_dict(weights, assign=True)
    assert_same_weights(model.to('cpu'), weights)
