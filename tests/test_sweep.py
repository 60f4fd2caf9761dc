"""The command timm-evovit sweep: its figures, the data it takes, what it recommends, and how it fails."""
import copy
import functools
import json
import math
import os
import re
import shlex
import shutil
import sys
import tarfile

import pytest
import timm
import torch
from helpers import TINY, TINY_LEVIT, randomize
from PIL import Image
from programs import TIMM_REPO, run, write_digits
from timm.data import create_dataset, create_transform
from timm.layers import to_2tuple
from timm.utils import accuracy
from torch.nn import functional as F

import timm_evovit
from timm_evovit import evolve
from timm_evovit.tools import sweep
from timm_evovit.tools.cli import main

datasets = pytest.importorskip('sklearn.datasets', reason="the examples need pip install -e '.[examples]'")
MODELS = {
    'evo_deit_tiny': dict(TINY, depth=6, global_pool='token'), 'evo_levit_128s': TINY_LEVIT,
    'vit_tiny_patch16_224': dict(TINY, depth=6)}
RATIOS = [1, 0.75, 0.5, 0.2]


@pytest.fixture(autouse=True)
def seconds_of_a_fast_and_even_machine(monkeypatch):
    def time_in_turns(steps, rounds, *args):
        for step in steps.values():
            step()
        return {keep_ratio: [keep_ratio] * rounds for keep_ratio in steps}

    monkeypatch.setattr(sweep, 'time_in_turns', time_in_turns)


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """60 digits of ten classes under `validation`."""
    return write_digits(tmp_path_factory.mktemp('data'), per_class=30)


@functools.lru_cache(None)
def classifier(name, **kwargs):
    """A model with random weights, and heads by least squares, that tells half of the digits apart."""
    torch.manual_seed(0)
    kwargs, data = {**MODELS[name], **kwargs}, datasets.load_digits()
    model = randomize(timm.create_model(name, **kwargs))
    digits = torch.tensor(data.images[:, None], dtype=torch.float32) / 8 - 1
    digits = F.interpolate(digits, to_2tuple(kwargs['img_size']), mode='bicubic').expand(-1, model.in_chans, -1, -1)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.  # statistics are those of the digits
    with torch.no_grad():
        model.train()(digits)
        features = model.eval().forward_head(model.forward_features(digits), pre_logits=True)
        for head in {model.head, getattr(model, 'head_dist', model.head)}:
            x = F.pad(head.bn(features) if hasattr(head, 'bn') else features, [0, 1], value=1.)
            solution = torch.linalg.lstsq(x, F.one_hot(torch.tensor(data.target)).float()).solution
            head = getattr(head, 'linear', head)
            head.weight.copy_(solution[:-1].T)
            head.bias.copy_(solution[-1])
    return model


def words(name):
    """The model on the command line."""
    return [name, '--model-kwargs', *(f'{k}={v}' for k, v in MODELS[name].items())]


@pytest.fixture
def command(tmp_path, capsys):
    """Run the command with weights that `build` draws; returns exit status, sweep.json, output and error output."""
    def command(name, data_dir, *args, output='out'):
        torch.save(classifier(name).state_dict(), tmp_path / 'model.pth')
        args = [*words(name), '--checkpoint', tmp_path / 'model.pth', '--data-dir', data_dir, '--output',
                tmp_path / output, '--rounds', 1, '-j', 0, '-b', 16, '--keep-ratio', *RATIOS, *args]
        status = main(['sweep', *map(str, args)])
        result = tmp_path / output / 'sweep.json'
        return status, json.loads(result.read_text()) if result.is_file() else None, *capsys.readouterr()
    return command


def logits(model, root, **kwargs):
    """Logits and labels of all pictures in a folder, in order."""
    size = getattr(model, 'img_size', None) or model.patch_embed.img_size
    config = {k: model.pretrained_cfg[k] for k in ('mean', 'std', 'interpolation', 'crop_pct')}
    dataset = create_dataset('', root=root, transform=create_transform((3, *size), **config), **kwargs)
    images, target = zip(*(dataset[i] for i in range(len(dataset))))
    with torch.no_grad():
        return model(torch.stack(images)), torch.tensor(target)


def at_ratios(name):
    """Keep ratio 1, which is the dense model, first."""
    model = classifier(name)
    if not name.startswith('evo'):
        model = evolve(model)
    for ratio in RATIOS:
        model.set_keep_ratio(ratio)
        yield ratio, model


# figures

@pytest.mark.parametrize('name', MODELS)
def test_accuracy_is_that_of_a_plain_loop(command, digits, name):
    status, result, *_ = command(name, digits)
    assert status == 0 and result['images'] == 60
    dense, rows = None, result['rows']
    for row, (ratio, model) in zip(rows, at_ratios(name), strict=True):
        output, target = logits(model, digits / 'validation')
        dense = output if dense is None else dense
        top1, top5 = accuracy(output, target, topk=(1, 5))
        assert row['keep_ratio'] == ratio
        assert row['top1'] == pytest.approx(top1.item()) and row['top5'] == pytest.approx(top5.item())
        assert row['agreement'] == pytest.approx(100 * (output.argmax(1) == dense.argmax(1)).float().mean().item())
        assert row['lost'] == pytest.approx(rows[0]['top1'] - top1.item(), abs=1e-5)
        if row is not rows[0]:
            low, high = row['lost_interval']
            assert low <= row['lost'] <= high
    assert rows[-1]['agreement'] < 100 and len({row['top1'] for row in rows}) > 1  # there was something to compare


def test_multiply_adds_by_hand(command, digits):
    _, result, *_ = command('vit_tiny_patch16_224', digits)
    dim, patches = 24, 16

    def block(tokens):  # qkv, projection and MLP; scores and values
        return tokens * dim * dim * (3 + 1 + 2 * 2) + 2 * tokens * tokens * dim

    ends = patches * dim * 3 * 8 * 8 + dim * 10
    assert result['rows'][0]['multiply_adds'] == ends + 6 * block(1 + patches)
    for row in result['rows'][1:]:
        depths = [(start + 1) ** 1.2 for start in (0, 2, 4)]
        grouping, left, last = 0, patches, 1.
        blocks = 0
        for depth in depths:
            ratio = round(row['keep_ratio'] ** (3 * depth / sum(depths)), 3)
            while last > ratio:  # each round halves the number of tokens at most
                before, left, last = left, max(1, int(ratio * patches), left // 2), last / 2
                grouping += math.ceil(before / 2) * (before // 2) * dim  # cosines
            last = ratio
            blocks += 2 * block(1 + left)
        assert row['multiply_adds'] == ends + blocks + grouping


@pytest.mark.parametrize('name, ratio, expected', [  # of the README
    ('evo_deit_small', 1, 4.599), ('evo_deit_small', 0.5, 3.034), ('evo_levit_128s', 0.5, 0.256)])
def test_multiply_adds_of_the_published_models(name, ratio, expected):
    model = timm.create_model(name, keep_ratio=ratio).eval()
    assert round(sweep.multiply_adds(model, torch.zeros(1, 3, 224, 224)) / 1e9, 3) == expected


def test_multiply_adds_of_attention_pooling():
    """As in SigLIP: one learned query, which is a view of a parameter, and an MLP."""
    n, dim = 16, 24
    model = timm.create_model('vit_base_patch16_siglip_224', **TINY, depth=1)
    block = n * dim * dim * (3 + 1 + 2 * 2) + 2 * n * n * dim
    pool = dim * dim * (1 + 2 * n + 1 + 2 * 2) + 2 * n * dim
    with torch.inference_mode():
        found = sweep.multiply_adds(model.eval(), torch.zeros(1, 3, 32, 32))
    assert found == n * dim * 3 * 8 * 8 + block + pool + dim * 10


@pytest.mark.parametrize('n, lose, gain', [(30, 0.1, 0.05), (100, 0.03, 0.01), (100, 0.01, 0.), (60, 0.2, 0.2)])
def test_interval_of_a_difference_covers_it(n, lose, gain):
    """Summed over all outcomes of n pairs, the interval holds the true difference in 95 % of the cases or a little more."""
    covered = 0.
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            low, high = sweep.interval_of_difference(lost, gained, n)
            if low <= lose - gain <= high:
                covered += (math.comb(n, lost) * math.comb(n - lost, gained) * lose ** lost * gain ** gained
                            * (1 - lose - gain) ** (n - lost - gained))
    assert 0.94 < covered <= 1


@pytest.mark.parametrize('n, p', [(30, 0.1), (100, 0.03), (100, 0.5), (1000, 0.002)])
def test_interval_of_a_ratio_covers_it(n, p):
    covered = sum(math.comb(n, k) * p ** k * (1 - p) ** (n - k) for k in range(n + 1)
                  if sweep.interval_of_ratio(k, n)[0] <= p <= sweep.interval_of_ratio(k, n)[1])
    assert 0.94 < covered <= 1


class Scales(torch.nn.Module):
    """A model whose logits are its images."""
    def set_keep_ratio(self, keep_ratio):
        self.keep_ratio = keep_ratio

    def forward(self, x):
        return x


def test_speed_is_the_median_of_rounds(monkeypatch):
    monkeypatch.setattr(sweep, 'time_in_turns', lambda *args: {1.: [4., 2., 2.], 0.5: [1., 2., 1.]})
    batch = torch.zeros(8, 6)
    rows = sweep.sweep(Scales(), [1., 0.5], [(batch, torch.zeros(8))], batch, False, 3)
    assert [row['images_per_second'] for row in rows] == [4, 8]
    assert [row['speed_up'] for row in rows] == [1, 2] and rows[1]['speed_up_range'] == [1, 4]


def test_the_keep_ratios_of_the_training(digits, tmp_path):
    args = [*words('vit_tiny_patch16_224'), 'base=vit_tiny_patch16_224', 'train_keep_ratio=(0.4,0.8)', '--rounds', '1', '-j',
            '0', '--data-dir', str(digits), '--output', str(tmp_path)]
    assert main(['sweep', 'evo_vit', *args[1:]]) == 0
    assert [r['keep_ratio'] for r in json.loads((tmp_path / 'sweep.json').read_text())['rows']] == [1, 0.8, 0.4]


def test_mixed_precision(monkeypatch):
    kinds, model = [], classifier('evo_deit_tiny')
    model.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    batch = torch.zeros(1, 3, 32, 32)
    sweep.sweep(model, [1.], [(batch, torch.zeros(1))], batch, True, 1, torch.bfloat16)
    assert {*kinds} == {torch.bfloat16}


# data

def test_a_part_is_a_sample_and_always_the_same(command, digits):
    whole, *parts = (command('evo_deit_tiny', digits, '--limit', n, output=f'{n}-{i}')[1] for i, n in enumerate((60, 20, 20)))
    assert [part['rows'] for part in parts[1:]] == [parts[0]['rows']] and parts[0]['images'] == 20
    assert whole['images'] == 60 and whole['rows'][0]['top1'] != parts[0]['rows'][0]['top1']


def test_without_labels(command, digits, tmp_path):
    flat = tmp_path / 'flat'
    flat.mkdir()
    for i, path in enumerate(sorted((digits / 'validation').rglob('*.png'))):
        (flat / f'{i:02d}.png').write_bytes(path.read_bytes())
    status, result, out, _ = command('evo_deit_tiny', flat, '--no-labels', '--max-drop', 100)
    _, labelled, *_ = command('evo_deit_tiny', digits, output='labelled')
    assert status == 0 and 'top-1' not in out and 'top1' not in result['rows'][0]
    assert [r['agreement'] for r in result['rows']] == [r['agreement'] for r in labelled['rows']]
    assert [r['lost'] for r in result['rows']] == [pytest.approx(100 - r['agreement']) for r in result['rows']]


@pytest.mark.parametrize('kind', ['tar', 'torch', 'split'])
def test_other_kinds_of_data(command, digits, tmp_path, kind):
    _, expected, *_ = command('evo_deit_tiny', digits, output='expected')
    place, options = digits / 'validation', []
    if kind == 'tar':
        place = tmp_path / 'digits.tar'
        with tarfile.open(place, 'w') as tar:
            tar.add(digits / 'validation', 'validation')
    elif kind == 'torch':
        place, options = digits, ['--dataset', 'torch/image_folder']
    _, result, *_ = command('evo_deit_tiny', place, *options)
    for key in ('top1', 'top5', 'agreement', 'lost'):
        assert [row[key] for row in result['rows']] == [row[key] for row in expected['rows']]


def test_a_class_map_gives_the_numbers(command, digits, tmp_path):
    some = tmp_path / 'some'
    for label in '37':
        shutil.copytree(digits / 'validation' / label, some / label)
    (tmp_path / 'map.txt').write_text('\n'.join('0123456789'))
    status, result, *_ = command('evo_deit_tiny', some, '--class-map', tmp_path / 'map.txt')
    model = classifier('evo_deit_tiny')
    model.set_keep_ratio(1)
    output, target = logits(model, some)
    top1 = (output.argmax(1) == torch.tensor([3, 7])[target]).float().mean().item()
    assert status == 0 and result['images'] == 12 and result['rows'][0]['top1'] == pytest.approx(100 * top1)


def test_a_picture_that_cannot_be_read_is_named(command, digits, tmp_path, caplog):
    """timm takes the next one."""
    folder = shutil.copytree(digits / 'validation', tmp_path / 'damaged')
    (folder / '3' / 'text.png').write_text('no picture')
    status, result, *_ = command('evo_deit_tiny', folder)
    assert status == 0 and result['images'] == 61 and 'Skipped sample' in caplog.text and 'text.png' in caplog.text


# the choice, and what is printed

def row(keep_ratio, lost, low, high, speed_up=None):
    return dict(keep_ratio=keep_ratio, speed_up=speed_up or 2 - keep_ratio, lost=lost, lost_interval=[low, high])


@pytest.mark.parametrize('rows, max_drop, chosen', [
    ([row(0.9, 0.1, -0.1, 0.3), row(0.7, 0.2, -0.2, 0.6), row(0.5, 0.6, 0.2, 1.1)], 1., 0.7),
    ([row(0.9, 0.1, -0.1, 0.3), row(0.7, 0.2, -0.2, 0.6), row(0.5, 0.6, 0.2, 1.1)], 0.3, 0.9),
    ([row(0.9, -1., -1.5, -0.5, speed_up=0.9), row(0.7, 2., 1.2, 2.8)], 1., 1.),  # slower; too much is lost
    ([row(0.7, 1.2, 0.9, 1.5)], 1., 1.),  # so many pictures would show it if nothing were lost
    ([row(0.7, -0.5, -0.9, -0.1)], 0., 0.7), ([], 1., 1.)])
def test_choice(rows, max_drop, chosen):
    dense = row(1., 0., None, None)
    assert sweep.choose([dense, *rows], max_drop)['keep_ratio'] == chosen


def test_too_few_pictures(command, digits):
    """Little can be lost at keep ratio 0.99, but 60 pictures cannot show it."""
    status, result, out, _ = command('evo_deit_tiny', digits, '--keep-ratio', 0.99)
    assert status == 0 and result['chosen'] == result['rows'][0] and 'with these 60 pictures' in out


@pytest.mark.parametrize('name', MODELS)
def test_what_it_prints_gives_the_accuracy_of_the_table(command, digits, tmp_path, name):
    """The line of Python with the model that it was given, and the arguments of timm's validate.py."""
    _, result, out, _ = command(name, digits, '--max-drop', 100)
    python, arguments = re.findall(r'^(?:In Python|For timm.s scripts): +(.*)$', out, re.MULTILINE)
    chosen, scope = result['chosen'], dict(model=copy.deepcopy(classifier(name)), timm_evovit=timm_evovit)
    exec(python, scope)
    output, target = logits(scope['model'], digits / 'validation')
    assert chosen['keep_ratio'] == RATIOS[-1] and chosen['top1'] > 5
    assert accuracy(output, target)[0].item() == pytest.approx(chosen['top1'])
    if 'TIMM_REPO' in os.environ:
        run(TIMM_REPO / 'validate.py', *shlex.split(arguments),
            '--data-dir', digits, '--device', 'cpu', '--results-file', tmp_path / 'validate.json', '--results-format',
            'json', '-b', 16, '-j', 1, cwd=tmp_path)
        found = json.loads((tmp_path / 'validate.json').read_text())
        found = found[0] if isinstance(found, list) else found
        assert found['top1'] == pytest.approx(chosen['top1'], abs=1.7)  # its prefetcher rounds


def test_what_timms_scripts_take_as_options(command, digits):
    args = '--max-drop', 100, '--crop-pct', 0.9, '--interpolation', 'bilinear', '--mean', 0.4, 0.5, 0.6
    _, result, out, _ = command('evo_deit_tiny', digits, *args)
    assert '--gp token --crop-pct 0.9 --interpolation bilinear --mean 0.4 0.5 0.6 --model-kwargs' in out
    words = sweep.describe({**result, 'model_kwargs': {'in_chans': 3, 'global_pool': 'token', 'depth': 6}})
    assert words.endswith('--mean 0.4 0.5 0.6 --model-kwargs depth=6 keep_ratio=0.2')


def test_plot(command, digits, tmp_path):
    pytest.importorskip('matplotlib', reason='the plot needs pip install matplotlib')
    _, result, *_ = command('vit_tiny_patch16_224', digits, '--max-drop', 100)
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['sweep.json', 'sweep.png']
    axis, = sweep.plot(result).axes
    assert axis.lines[0].get_xdata().tolist() == [r['images_per_second'] for r in result['rows']]
    assert axis.lines[0].get_ydata().tolist() == pytest.approx([r['top1'] for r in result['rows']])
    assert {text.get_text(): text.xy[0] for text in axis.texts} == {
        f'{r["keep_ratio"]:g}': r['images_per_second'] for r in result['rows']}


def test_without_matplotlib(command, digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    status, result, _, err = command('evo_deit_tiny', digits)
    assert status == 0 and result['rows'] and 'needs matplotlib' in err
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['sweep.json']


# failures

@pytest.mark.parametrize('args, message', [
    (['--data-dir', 'nowhere'], "--data-dir must be a folder or tar file, got 'nowhere'"),
    (['--data-dir', 'empty'], 'Found 0 images'),
    (['--data-dir', 'flat'], 'flat has folders of 0 classes'),
    (['--data-dir', 'splits', '--split', 'test'], "splits has no split 'test'"),
    (['--data-dir', 'two'], 'two has folders of 2 classes, the model has 10'),
    (['--data-dir', 'two', '--class-map', 'map.txt'], 'two has folders of 12 classes, the model has 10'),
    (['--data-dir', 'two', '--class-map', 'nomap.txt'], 'nomap.txt'),
    (['--data-dir', 'damaged', '--no-labels'], 'Failed to load'),
    (['--dataset', 'wds/some'], "--dataset must be torch/NAME or hfds/NAME, got 'wds/some'"),
    (['--keep-ratio', '0.5', '0'], 'keep_ratio must be in (0, 1], got 0'),
    (['--limit', '0'], '--limit must be 1 or more, got 0'),
    (['--mean', '0.5', '0.4'], '--mean must be one value or one per channel, got [0.5, 0.4]'),
    (['--max-drop', 'nan'], '--max-drop must be 0 or more, got nan'),
    (['--model-kwargs', 'features_only=True'], 'features_only must be left out, got True'),
    (['--checkpoint', 'missing.pth'], 'missing.pth'),
    (['--output', 'map.txt'], 'map.txt'),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_bad_input(command, digits, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    for folder in ('empty', 'flat', 'two/3', 'two/7', 'splits/train/3', 'damaged'):
        (tmp_path / folder).mkdir(parents=True)
    for path in ('flat/1.png', 'two/3/1.png', 'two/7/1.png', 'splits/train/3/1.png'):
        Image.new('L', (8, 8)).save(tmp_path / path)
    (tmp_path / 'damaged' / '1.png').write_text('no picture')
    (tmp_path / 'map.txt').write_text('\n'.join(map(str, range(12))))
    status, result, _, err = command('evo_deit_tiny', digits, *args, output='new/out')
    assert status == 1 and result is None and message in err and 'Traceback' not in err
    assert len([line for line in err.splitlines() if line.startswith('timm-evovit')]) == 1
    assert not list(tmp_path.glob('new/out/*')) and (tmp_path / 'map.txt').is_file()


def test_model_kwargs_without_a_value(capsys):
    with pytest.raises(SystemExit):
        main(['sweep', 'evo_deit_tiny', '--data-dir', 'digits', '--output', 'out', '--model-kwargs', 'depth'])
    assert "must be KEY=VALUE, got 'depth'" in capsys.readouterr().err


@pytest.mark.parametrize('name, message', [
    ('resnet10t', 'got ResNet'), ('no_such_model', 'no_such_model'),
    ('vit_small_patch14_dinov2', 'num_classes must be 1 or more, got 0')])
def test_models_that_are_not_measured(digits, tmp_path, capsys, name, message):
    assert main(['sweep', name, '--data-dir', str(digits), '--output', str(tmp_path / 'out')]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('label', [10, -1])
def test_a_label_that_the_model_does_not_have(label):
    batch = torch.zeros(2, 10)
    with pytest.raises(ValueError, match=f'label must be in 0 .. 9, got {label}'):
        sweep.sweep(Scales(), [1.], [(batch, torch.tensor([3, label]))], batch, True, 1)
