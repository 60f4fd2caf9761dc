"""Pictures of informative tokens."""
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_evo_deit import build as build_deit
from test_evo_levit import build as build_levit
from timm.data import ImageNetInfo

from timm_evovit.visualize import (
    InformativeTokens, _top5, draw, find_images, informative_tokens, open_image, sheet, visualize)

GAP, TOP = 8, 26  # where the first panel begins


def ramp(size=(40, 60)):
    """An RGB picture whose pixels are all different."""
    y, x = np.mgrid[:size[0], :size[1]]
    return Image.fromarray(np.stack([x * 4, y * 6, 255 - x * 4], axis=-1).astype(np.uint8))


def test_finds_files_folders_and_patterns(tmp_path):
    (tmp_path / 'deep').mkdir()
    for name in ('b.png', 'a.jpg', 'deep/c.GIF', 'deep/d.bmp'):
        ramp().save(tmp_path / name)
    (tmp_path / 'notes.txt').write_text('no image')
    names = [p.relative_to(tmp_path).as_posix() for p in find_images([tmp_path])]
    assert sorted(names) == ['a.jpg', 'b.png', 'deep/c.GIF', 'deep/d.bmp']
    named = find_images([tmp_path / 'deep' / '*.bmp', tmp_path / 'b.png', tmp_path])
    assert [p.name for p in named][:2] == ['d.bmp', 'b.png'] and len(named) == 4
    assert find_images([tmp_path / 'notes.txt'])[0].name == 'notes.txt'  # who names a file means it
    for nothing in (tmp_path / 'x*.png', tmp_path / 'none.png'):
        assert find_images([nothing]) == [nothing]  # to be missed when it is opened
    (tmp_path / 'folder.png').mkdir()
    with pytest.raises(FileNotFoundError, match='folder.png: no image there'):
        find_images([tmp_path / 'folder.png'])
    assert find_images([tmp_path], leave_out=tmp_path / 'deep') == [tmp_path / 'a.jpg', tmp_path / 'b.png']


@pytest.mark.parametrize('mode, suffix', [
    ('RGB', 'png'), ('L', 'png'), ('1', 'png'), ('P', 'png'), ('CMYK', 'jpg'), ('RGBA', 'png'), ('LA', 'png'),
    ('I;16', 'png'), ('F', 'tiff'), ('YCbCr', 'jpg'),
])
def test_opens_every_mode(tmp_path, mode, suffix):
    path = tmp_path / f'image.{suffix}'
    if mode == 'I;16':
        Image.fromarray((np.asarray(ramp().convert('L')).astype(np.uint16) * 200)).save(path)
    else:
        ramp().convert(mode).save(path)
    image = open_image(path)
    assert image.mode == 'RGB' and image.size == (60, 40)
    if mode not in ('1', 'P'):
        expected = np.asarray(ramp().convert('L'), dtype=float)
        assert np.corrcoef(np.asarray(image.convert('L'), dtype=float).ravel(), expected.ravel())[0, 1] > 0.98
        assert np.asarray(image).std() > 10
    if mode == 'I;16':
        assert np.array_equal(image.convert('L'), np.round(np.asarray(ramp().convert('L')) * 200. / 257).astype(np.uint8))
    assert open_image(path, 'L').mode == 'L'


def test_numbers_that_are_none(tmp_path):
    values = np.linspace(2, 3, 12, dtype=np.float32).reshape(3, 4)
    values[0, 1] = np.nan
    values[2, 3] = np.inf
    Image.fromarray(values).save(tmp_path / 'image.tiff')
    grey = np.asarray(open_image(tmp_path / 'image.tiff', 'L'))
    assert grey[0, 1] == grey[2, 3] == grey.min() == 0 and grey.max() == 255


def test_transparent_is_white_and_turned_is_upright(tmp_path):
    image = ramp().convert('RGBA')
    image.putalpha(Image.fromarray(np.tile(np.where(np.arange(60) < 30, 0, 255).astype(np.uint8), (40, 1))))
    image.save(tmp_path / 'alpha.png')
    opened = np.asarray(open_image(tmp_path / 'alpha.png'))
    assert (opened[:, :30] == 255).all() and np.array_equal(opened[:, 30:], np.asarray(ramp())[:, 30:])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    ramp().save(tmp_path / 'turned.png', exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / 'turned.png')), np.rot90(np.asarray(ramp()), -1))


def test_fades_what_is_not_informative():
    pixels = torch.rand(3, 8, 8)
    mask = torch.tensor([[True, False], [False, True]])
    tokens = InformativeTokens(4, mask, torch.tensor([[0.5, 0.1], [0.2, 0.4]]))
    drawn = np.asarray(draw(pixels, [tokens])).astype(int)
    side = 224
    picture = drawn[TOP:TOP + side, GAP:GAP + side]
    faded = drawn[TOP:TOP + side, 2 * GAP + side:2 * GAP + 2 * side]
    half = side // 2
    for i in range(2):
        for j in range(2):
            patch = np.s_[i * half:(i + 1) * half, j * half:(j + 1) * half]
            if mask[i, j]:
                assert np.array_equal(faded[patch], picture[patch])
            else:
                assert 0.5 * 255 - 1 <= faded[patch].min() and faded[patch].max() <= 0.7 * 255 + 1
                assert not np.array_equal(faded[patch], picture[patch])
    heat = np.asarray(draw(pixels, [tokens], attention=True)).astype(int)[:, 3 * GAP + 2 * side:]
    quarters = heat[TOP:TOP + side, :side].reshape(2, half, 2, half, 3).mean(axis=(1, 3, 4))
    assert quarters.argmax() == 0 and quarters[0, 1] < quarters[1, 0] < quarters[1, 1] < quarters[0, 0]
    high, wide = draw(pixels, [tokens], caption='a line').size, draw(pixels, [tokens]).size
    assert high[1] > wide[1] and sheet([Image.new('RGB', (3, 4)), Image.new('RGB', (5, 6))]).size == (5, 10)


@pytest.mark.parametrize('model', [
    build_deit(depth=6), build_levit(), build_deit(depth=6, img_size=(32, 48), in_chans=1),
    build_deit(depth=6).bfloat16(),
], ids=['deit', 'levit', 'grey, not square', 'bfloat16'])
def test_draws_files_and_goes_on_after_bad_ones(tmp_path, monkeypatch, model):
    def bad_decoder():
        raise RuntimeError('as the one of AVIF does')

    ramp().save(tmp_path / 'a.png')
    (tmp_path / 'bad.png').write_bytes(b'no picture')
    whole = (tmp_path / 'a.png').read_bytes()
    (tmp_path / 'cut.png').write_bytes(whole[:len(whole) // 2])
    ramp((400, 30)).save(tmp_path / 'z.jpg')
    ramp((1, 20000)).save(tmp_path / 'thread.png')  # scaled by its short side it would be gigabytes
    monkeypatch.setattr('timm_evovit.visualize.open_image', lambda path, mode: (
        bad_decoder() if path.name == 'bad.png' else open_image(path, mode)))
    model.train()
    drawn = dict(visualize(model, find_images([tmp_path]), attention=True))
    assert model.training and [p.name for p in drawn] == ['a.png', 'bad.png', 'cut.png', 'thread.png', 'z.jpg']
    assert [isinstance(d, OSError) for d in drawn.values()] == [False, True, True, False, False]
    assert drawn[tmp_path / 'a.png'].size == drawn[tmp_path / 'z.jpg'].size
    panels = 1 + 2 * (3 if hasattr(model, 'img_size') else 2)
    assert drawn[tmp_path / 'a.png'].width >= panels * (224 + GAP)


def test_names_imagenet_classes_only_where_there_are_a_thousand(tmp_path):
    ramp().save(tmp_path / 'a.png')
    few, many = build_deit(depth=3), build_deit(depth=3, num_classes=1000)
    captions = []
    for model, kwargs in ((few, {}), (many, {}), (many, dict(classes=False))):
        with mock.patch('timm_evovit.visualize.draw', lambda pixels, tokens, attention, caption: captions.append(caption)):
            list(visualize(model, [tmp_path / 'a.png'], **kwargs))
    assert captions[0] == captions[2] == 'a.png' and captions[1].startswith('a.png   ')
    assert captions[1].count('%') == 5
    logits = torch.full((1000,), -100.)
    logits[[281, 207, 949, 0, 999]] = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
    assert _top5(logits, ImageNetInfo()) == (
        'tabby 40.0%   golden retriever 30.0%   strawberry 15.0%   tench 10.0%   toilet tissue 5.0%')
    tokens = informative_tokens(few, torch.zeros(1, 3, 32, 32))
    one = [InformativeTokens(t.block, t.mask[0], t.attention[0]) for t in tokens[:1]]
    assert draw(torch.rand(3, 8, 8), one, caption='a line that is longer than both panels ' * 5).width > 1000


class Runs:
    def __reduce__(self):
        return print, ('this was run',)


def test_command(tmp_path, capsys):
    from timm_evovit.cli import main
    small = ['img_size=32', 'patch_size=8', 'embed_dim=24', 'num_heads=3', 'mlp_ratio=2', 'depth=6']
    model = build_deit(depth=6)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    for name in ('a/x.png', 'b/x.png', 'y.jpg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        ramp().save(tmp_path / name)
    common = ['--model', 'evo_deit_tiny', '--checkpoint', str(tmp_path / 'model.pth'), '--num-classes', '10']
    tail = ['--sheet', '--model-kwargs', *small]
    images = [str(tmp_path / 'a'), str(tmp_path / 'b'), str(tmp_path / '*.jpg')]
    assert main(['visualize', *images, *common, '--output', str(tmp_path / 'out'), *tail]) == 0
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['sheet.png', 'x-2.png', 'x.png', 'y.png']
    (_, expected), = visualize(model, [tmp_path / 'y.jpg'])
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'out' / 'y.png')), np.asarray(expected))
    capsys.readouterr()

    timm.models.save_for_hf(model, tmp_path / 'folder', model_args=model.model_args, safe_serialization=True)
    for name, file in ((f'local-dir:{tmp_path / "folder"}', 'model.pth'), ('evo_deit_tiny', 'folder/model.safetensors')):
        command = ['visualize', str(tmp_path / 'y.jpg'), '--model', name, '--num-classes', '10', '--checkpoint']
        assert main([*command, str(tmp_path / file), '--output', str(tmp_path / 'again'), *tail]) == 0
        assert np.array_equal(np.asarray(Image.open(tmp_path / 'again' / 'y.png')), np.asarray(expected))
    for file, content, message in (
            ('code.pth', {'model': Runs()}, 'anything else could run code'), ('half.safetensors', None, 'damaged')):
        torch.save(content, tmp_path / file)
        assert main([*command, str(tmp_path / file), '--output', str(tmp_path / 'none'), *tail]) == 1
        assert message in capsys.readouterr().err and not (tmp_path / 'none').exists()

    ten = ['--model', 'evo_deit_tiny', '--checkpoint', str(tmp_path / 'model.pth')]  # says itself how many classes it has
    assert main(['visualize', str(tmp_path / 'y.jpg'), *ten, '--output', str(tmp_path / 'again'), *tail]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'again' / 'y.png')), np.asarray(expected))
    before = (tmp_path / 'y.jpg').read_bytes()
    assert main(['visualize', str(tmp_path / 'y.jpg'), *ten, '--output', str(tmp_path), *tail]) == 1
    assert f'y.jpg is in {tmp_path}' in capsys.readouterr().err and (tmp_path / 'y.jpg').read_bytes() == before

    (tmp_path / 'a' / 'bad.png').write_bytes(b'no picture')
    assert main(['visualize', *images, *common, '--output', str(tmp_path / 'out2'), *tail]) == 1
    assert 'bad.png is skipped' in capsys.readouterr().err and len(list((tmp_path / 'out2').iterdir())) == 4
    assert main(['visualize', 'nowhere*', *images, *common, '--output', str(tmp_path / 'out3'), *tail]) == 1
    assert 'nowhere* is skipped' in capsys.readouterr().err and len(list((tmp_path / 'out3').iterdir())) == 4
    assert main([
        'visualize', str(tmp_path / 'y.jpg'), '--model', 'vit_tiny_patch16_224', '--output', str(tmp_path / 'out4'),
        '--attention', '--model-kwargs', *small]) == 0
    assert 'the weights are random' in capsys.readouterr().err
    assert Image.open(tmp_path / 'out4' / 'y.png').width == 5 * 224 + 6 * GAP  # two selections of the default stages
    for model_kwargs, message in (('global_pool=foo', 'timm-evovit: '), ('keep_ratio=2', 'keep_ratio must lie in')):
        assert main(['visualize', *images, *common, '--output', str(tmp_path / 'out5'), *tail, model_kwargs]) == 1
        assert message in capsys.readouterr().err
    assert main(['visualize', *images, '--model', 'resnet10t', '--output', str(tmp_path / 'out3')]) == 1
    assert 'got ResNet' in capsys.readouterr().err
