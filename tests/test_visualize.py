"""The command timm-evovit visualize: the files it finds, how it opens and draws them."""
import numpy as np
import pytest
import torch
from helpers import build
from PIL import Image

from timm_evovit.slow_tokens import SlowTokens
from timm_evovit.tools.cli import main
from timm_evovit.tools.visualize import draw, find_images, visualize

GAP, TOP, SIDE = 8, 26, 224  # space around a panel, where its picture begins, its smaller side
TINY = ['--model-kwargs', 'img_size=32', 'patch_size=8', 'embed_dim=24', 'num_heads=3', 'mlp_ratio=2', 'depth=6']


def ramp(height=40, width=60):
    """An RGB picture whose pixels are all different."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 4, y * 6, 255 - x * 4], axis=-1).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    """A folder of images, with one in a folder in it."""
    folder = tmp_path / 'photos'
    (folder / 'deep').mkdir(parents=True)
    for name in ('b.png', 'a.jpg', 'deep/c.GIF'):
        ramp().save(folder / name)
    (folder / 'notes.txt').write_text('no image')
    return folder


# finding files

def found(folder, name, output='drawings'):
    return [p.relative_to(folder).as_posix() for p in find_images(str(folder / name), folder / output)]


def test_finds_files_and_folders(photos):
    assert found(photos, '') == ['a.jpg', 'b.png', 'deep/c.GIF']
    assert found(photos, 'b.png') == ['b.png'] and found(photos, 'notes.txt') == ['notes.txt']  # who names it means it
    (photos / 'empty.png').mkdir()
    for name in ('none.png', 'empty.png'):
        with pytest.raises(ValueError, match=f"IMAGE must be an image file or a folder of images .*{name}'"):
            found(photos, name)


def test_drawings_are_not_images(photos):
    """A second run draws the same images, and no drawing can overwrite one."""
    assert found(photos, '', output='deep') == ['a.jpg', 'b.png']
    for name, message in (('b.png', 'outside --output'), ('', '--output must be another folder')):
        with pytest.raises(ValueError, match=message):
            found(photos, name, output='')


# drawing

def panels(pixels, mask, groups, attention):
    """Panels (SIDE, SIDE, 3): the picture, and one stage."""
    tokens = SlowTokens(4, torch.tensor([mask]), torch.tensor([groups]), attention)
    drawn = np.asarray(draw(pixels, [tokens], '')).astype(int)
    return [drawn[TOP:TOP + SIDE, GAP + i * (SIDE + GAP):(i + 1) * (SIDE + GAP)] for i in range(2)]


@pytest.mark.parametrize('by_attention', [True, False])
@pytest.mark.parametrize('chans', [1, 3])
def test_draws_tokens(by_attention, chans):
    """Patches alone as they are, those not selected blue, groups in their mean colour, a line around each token."""
    pixels = torch.rand(chans, 8, 8).expand(3, -1, -1)
    attention = torch.rand(1, 2, 2) if by_attention else None
    picture, drawn = panels(pixels, [[True, False], [False, True]], [[0, 1], [1, 2]], attention)
    big = np.kron(pixels.permute(1, 2, 0).numpy(), np.ones((28, 28, 1)))
    assert abs(picture - 255 * big).max() < 1.01
    shared = torch.cat([pixels[:, :4, 4:].flatten(1), pixels[:, 4:, :4].flatten(1)], dim=1).mean(dim=1).numpy()
    blue = 0.6 * big.mean(axis=2, keepdims=True) + 0.4 * np.array([0.2, 0.2, 1])
    expected = 255 * np.where(np.kron(np.eye(2), np.ones((112, 112)))[..., None] > 0, big, blue if by_attention else shared)
    lines = np.zeros((SIDE, SIDE), dtype=bool)
    lines[111] = lines[:, 111] = lines[-1] = lines[:, -1] = True
    assert (drawn[lines] == 255).all() and abs(drawn - expected)[~lines].max() < 1.01  # a byte is cut off


def test_a_long_caption_fits():
    assert draw(torch.rand(3, 8, 8), [], 'a line that is longer than the picture ' * 5).width > 1000


@pytest.mark.parametrize('name, kwargs, selections, width', [
    ('evo_deit_tiny', {}, 2, SIDE), ('evo_levit_128s', {}, 3, SIDE),
    ('evo_deit_tiny', dict(dtype=torch.bfloat16), 2, SIDE),
    ('evo_deit_tiny', dict(img_size=(32, 48), in_chans=1), 2, SIDE * 3 // 2),
    ('evo_deit_tiny', dict(img_size=(48, 32)), 2, SIDE),
], ids=['deit', 'levit', 'bfloat16', 'grey, wide', 'high'])
def test_draws_files(photos, name, kwargs, selections, width):
    model = build(name, **kwargs).train()
    paths = [photos / 'a.jpg', photos / 'b.png']
    drawings = dict(visualize(model, paths))
    assert model.training and list(drawings) == paths
    for drawing in drawings.values():
        assert drawing.width == (1 + selections) * (width + GAP) + GAP


def test_turned_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    ramp().save(tmp_path / 'turned.png', exif=exif)
    Image.fromarray(np.rot90(np.asarray(ramp()), -1)).save(tmp_path / 'upright.png')
    model = build('evo_deit_tiny', depth=6)
    (_, turned), (_, upright) = visualize(model, [tmp_path / 'turned.png', tmp_path / 'upright.png'])
    assert np.array_equal(np.asarray(turned)[:TOP + SIDE], np.asarray(upright)[:TOP + SIDE])  # without the names below


# the command

@pytest.fixture
def run(tmp_path, capsys):
    """Run the command; returns exit status, names of the drawings and the error output."""
    def run(images, *args, output='out'):
        status = main(['visualize', *map(str, images), '--output', str(tmp_path / output), *map(str, args)])
        drawn = sorted(p.name for p in (tmp_path / output).iterdir()) if (tmp_path / output).exists() else []
        return status, drawn, capsys.readouterr().err
    return run


def test_command(photos, run, tmp_path):
    model = build('evo_deit_tiny', depth=6)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    (tmp_path / 'other').mkdir()
    images = (photos, photos / 'deep' / 'b.png', tmp_path / 'other' / 'b.png')
    for image in images[1:]:
        ramp(60, 40).save(image)
    status, drawn, err = run(
        images, '--model', 'evo_deit_tiny', '--checkpoint', tmp_path / 'model.pth', *TINY)
    assert status == 0 and 'random' not in err and drawn == ['a.png', 'b-2.png', 'b-3.png', 'b.png', 'c.png']
    (_, expected), = visualize(model, [photos / 'b.png'])
    assert np.array_equal(Image.open(tmp_path / 'out' / 'b.png'), expected)


@pytest.mark.parametrize('name, args', [
    ('vit_tiny_patch16_224', TINY), ('naflexvit_base_patch16_gap', ['--model-kwargs', 'embed_dim=24', 'num_heads=3', 'depth=6']), ('evo_deit_tiny', [*TINY, 'slow_tokens=similarity'])])
def test_models_by_similarity(photos, run, tmp_path, name, args):
    status, drawn, err = run([photos / 'b.png'], '--model', name, *args)
    assert status == 0 and drawn == ['b.png'] and 'the weights are random' in err
    if 'naflex' not in name:  # that one takes pictures of 384 pixels; groups from blocks 0, 2 and 4
        assert Image.open(tmp_path / 'out' / 'b.png').width == 4 * (SIDE + GAP) + GAP


def test_an_image_that_cannot_be_read_or_found(photos, run):
    (photos / 'bad.png').write_bytes(b'no picture')
    (photos / 'cut.png').write_bytes((photos / 'b.png').read_bytes()[:60])
    status, drawn, err = run([photos, photos / 'b.png'], '--model', 'evo_deit_tiny', *TINY)
    assert status == 1 and drawn == ['a.png', 'b.png', 'c.png']  # each once
    assert 'bad.png is skipped: ' in err and 'cut.png is skipped: ' in err
    status, drawn, err = run([photos, photos / 'none.png'], '--model', 'evo_deit_tiny', *TINY, output='none')
    assert (status, drawn) == (1, []) and "none.png'" in err
