"""The command timm-evovit sweep: its figures, the data it takes, what it recommends, and how it fails."""
import ast
import functools
import json
import math
import re
import shlex
import sys
import tarfile

import pytest
import timm
import torch
from helpers import TINY, TINY_LEVIT, assert_same_weights, randomize
from PIL import Image
from programs import BENCHMARKS, TIMM_REPO, needs_timm_repo, run, write_digits
from timm.data import create_dataset, create_transform
from timm.utils import accuracy
from torch.nn import functional as F

from timm_evovit import evolve
from timm_evovit.tools import sweep
from timm_evovit.tools.cli import main

datasets = pytest.importorskip('sklearn.datasets', reason="the examples need pip install -e '.[examples]'")
MODELS = {'evo_deit_tiny': dict(TINY, depth=6), 'evo_levit_128s': TINY_LEVIT, 'vit_tiny_patch16_224': dict(TINY, depth=6)}
RATIOS = [1, 0.75, 0.5, 0.2]


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch):
    monkeypatch.setattr(sweep, 'time_in_turns', functools.partial(sweep.time_in_turns, seconds=0))


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """60 digits of ten classes under `validation`."""
    return write_digits(tmp_path_factory.mktemp('data'), per_class=30)


@functools.lru_cache(None)
def classifier(name):
    """A model with random weights that tells digits apart, rightly or wrongly."""
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, **MODELS[name])).eval()
    digits = torch.tensor(datasets.load_digits().images[:200, None], dtype=torch.float32) / 8 - 1
    size = MODELS[name]['img_size']
    digits = F.interpolate(digits, (size, size), mode='bicubic').expand(-1, 3, -1, -1)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.  # statistics are those of the digits
    with torch.no_grad():
        model.train()(digits)
        output = model.eval()(digits)
        for key, p in model.named_parameters():
            if key.startswith('head') and p.shape == (10,):
                p -= output.mean(dim=0)
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
    assert status == 0 and result['complete'] and result['images'] == 60
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
                joined = min(max(2, before - left), math.ceil(before / 2))
                grouping += math.ceil(before / 2) * (before // 2) * dim  # cosines
                grouping += joined * dim * (2 * (1 + left) + 1 + before)  # means; both steps of the restoration
            last = ratio
            blocks += 2 * block(1 + left)
        assert row['multiply_adds'] == ends + blocks + grouping


@pytest.mark.parametrize('name, ratio, expected', [  # of benchmarks/results/models.json
    ('evo_deit_small', 1, 4.599), ('evo_deit_small', 0.5, 3.034), ('evo_levit_128s', 0.5, 0.256)])
def test_multiply_adds_of_the_published_models(name, ratio, expected):
    setting = sweep.Setting(timm.create_model(name).eval(), ratio)
    sweep.time_in_turns([setting], torch.zeros(1, 3, 224, 224), rounds=0)
    assert round(setting.multiply_adds / 1e9, 3) == expected


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


def test_settings_take_turns():
    calls = []

    class Model(torch.nn.Module):
        def set_keep_ratio(self, ratio):
            self.ratio = ratio

        def forward(self, x):
            calls.append(self.ratio)
            return x

    model = Model()
    settings = [sweep.Setting(model, ratio) for ratio in (1., 0.5)]
    sweep.time_in_turns(settings, torch.zeros(4, 2), rounds=3)
    assert calls == [1.] * 3 + [0.5] * 3 + [1., 0.5, 0.5, 1., 1., 0.5]  # the first three of each: counted, warmed up, estimated
    assert [len(s.seconds) for s in settings] == [3, 3]


def test_speed_is_the_median_of_rounds():
    settings = [sweep.Setting(torch.nn.Identity(), ratio) for ratio in (1., 0.5)]
    for setting, seconds in zip(settings, ([4., 2., 2.], [1., 2., 1.])):
        setting.seconds = seconds
    rows = sweep.summarize(settings, 8, torch.zeros(2, 6, 5), torch.zeros(6))
    assert [row['images_per_second'] for row in rows] == [4, 8]
    assert [row['speed_up'] for row in rows] == [1, 2]


def test_mixed_precision(command, digits):
    status, result, *_ = command('evo_deit_tiny', digits, '--amp-dtype', 'bfloat16')
    model = classifier('evo_deit_tiny')
    model.set_keep_ratio(1)
    with torch.autocast('cpu', torch.bfloat16):
        output, target = logits(model, digits / 'validation')
    expected = accuracy(output.float(), target)[0].item()
    assert status == 0 and result['rows'][0]['top1'] == pytest.approx(expected, abs=100 / 60 + 0.01)  # other batches


# data

def test_a_part_is_a_sample_and_always_the_same(digits):
    dataset = create_dataset('', root=digits, split='validation')
    order = sweep.Pictures(dataset, None).order
    assert sorted(order) == list(range(60)) and order != sorted(order)
    assert sweep.Pictures(dataset, None, limit=20).order == order[:20]
    assert len({dataset.reader[i][1] for i in order[:20]}) > 5


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
        (some / label).mkdir(parents=True)
        for path in (digits / 'validation' / label).iterdir():
            (some / label / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'map.txt').write_text('\n'.join('0123456789'))
    status, result, *_ = command('evo_deit_tiny', some, '--class-map', tmp_path / 'map.txt')
    model = classifier('evo_deit_tiny')
    model.set_keep_ratio(1)
    output, target = logits(model, some)
    top1 = (output.argmax(1) == torch.tensor([3, 7])[target]).float().mean().item()
    assert status == 0 and result['images'] == 12 and result['rows'][0]['top1'] == pytest.approx(100 * top1)


def test_pictures_that_cannot_be_read(command, digits, tmp_path):
    _, expected, *_ = command('evo_deit_tiny', digits, output='expected')
    folder = tmp_path / 'damaged'
    for path in (digits / 'validation').rglob('*.png'):
        copy = folder / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (folder / '3' / 'text.png').write_text('no picture')
    Image.new('RGB', (50, 50), 'red').save(folder / '5' / 'cut.png')
    (folder / '5' / 'cut.png').write_bytes((folder / '5' / 'cut.png').read_bytes()[:60])
    status, result, out, err = command('evo_deit_tiny', folder)
    assert status == 1 and '60 of 62 pictures, 2 skipped' in out
    assert re.search(r'3/text.png is skipped: .+', err) and re.search(r'5/cut.png is skipped: .+', err)
    assert result['images'] == 60 and len(result['skipped']) == 2
    assert [row['top1'] for row in result['rows']] == [row['top1'] for row in expected['rows']]


# the choice

def row(keep_ratio, speed_up, lost):
    return dict(keep_ratio=keep_ratio, speed_up=speed_up, lost=lost)


def test_choice():
    rows = [row(1., 1., 0.), row(0.9, 1.05, 0.1), row(0.7, 1.3, 0.5), row(0.5, 1.5, 0.6)]
    assert sweep.choose(rows, 0.5)['keep_ratio'] == 0.7 and sweep.choose(rows, 1)['keep_ratio'] == 0.5
    assert sweep.choose(rows, 0.1)['keep_ratio'] == 0.9
    assert sweep.choose(rows, 0) is rows[0]
    assert sweep.choose([rows[0], row(0.9, 0.8, -1.)], 1) is rows[0]  # slower than the dense model


@pytest.fixture
def prefer(monkeypatch):
    """Speeds differ from run to run; choose a keep ratio in any case."""
    def prefer(ratio):
        monkeypatch.setattr(sweep, 'choose', lambda rows, max_drop: next(r for r in rows if r['keep_ratio'] == ratio))
    return prefer


@pytest.mark.parametrize('name, ratio', [
    ('evo_deit_tiny', 0.5), ('evo_levit_128s', 0.2), ('vit_tiny_patch16_224', 0.5), ('vit_tiny_patch16_224', 1)])
def test_the_line_of_python_builds_the_model(command, digits, prefer, name, ratio):
    prefer(ratio)
    _, result, out, _ = command(name, digits)
    assert result['python'] in out and result['arguments'] in out
    scope = {'timm': timm}
    exec(result['python'], scope)
    output, target = logits(scope['model'].eval(), digits / 'validation')
    assert accuracy(output, target)[0].item() == pytest.approx(result['chosen']['top1'])
    expected, _ = logits(dict(at_ratios_copies(name))[ratio], digits / 'validation')
    assert torch.equal(output, expected)


def at_ratios_copies(name):
    """As `at_ratios`, one model each."""
    dense = classifier(name)
    for ratio in RATIOS:
        if name.startswith('evo'):
            model = timm.create_model(name, keep_ratio=ratio, **MODELS[name]).eval()
            model.load_state_dict(dense.state_dict())
            yield ratio, model
        else:
            yield ratio, evolve(dense, ratio)


@needs_timm_repo
@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_the_arguments_are_those_of_validate(command, digits, prefer, tmp_path, name):
    prefer(0.5)
    _, result, *_ = command(name, digits, '--crop-pct', 1, '--mean', 0.5, 0.5, 0.5)
    assert '--mean 0.5 0.5 0.5' in result['arguments']
    run(TIMM_REPO / 'validate.py', *shlex.split(result['arguments']), '--data-dir', digits, '--device', 'cpu',
        '--results-file', tmp_path / 'validate.json', '--results-format', 'json', '-b', 16, '-j', 1, cwd=tmp_path)
    found = json.loads((tmp_path / 'validate.json').read_text())
    found = found[0] if isinstance(found, list) else found
    assert found['top1'] == pytest.approx(result['chosen']['top1'], abs=0.01)


def test_a_folder_of_timm(digits, tmp_path, prefer, capsys):
    prefer(0.5)
    model = classifier('vit_tiny_patch16_224')
    timm.models.save_for_hf(model, tmp_path / 'model', model_args=MODELS['vit_tiny_patch16_224'], safe_serialization=True)
    assert main(['sweep', f'local-dir:{tmp_path / "model"}', '--pretrained', '--data-dir', str(digits), '--output',
                 str(tmp_path / 'out'), '--rounds', '1', '-j', '0', '--keep-ratio', '0.5']) == 0
    result = json.loads((tmp_path / 'out' / 'sweep.json').read_text())
    scope = {'timm': timm}
    exec(result['python'], scope)
    words = shlex.split(result['arguments'])
    assert words[:3] == ['--model', 'evo_vit', '--pretrained']
    kwargs = {}
    for key, value in (word.split('=') for word in words[words.index('--model-kwargs') + 1:]):  # as the scripts of timm 1.0.25 read them
        try:
            kwargs[key] = ast.literal_eval(value)
        except ValueError:
            kwargs[key] = value
    x = torch.randn(2, 3, 32, 32)
    for again in (scope['model'], timm.create_model('evo_vit', pretrained=True, **kwargs)):
        assert torch.equal(again.eval()(x), evolve(model, 0.5)(x))


@pytest.mark.parametrize('use_ema', [False, True])
def test_moving_average_of_the_weights(digits, tmp_path, use_ema):
    """timm's create_model takes it if there is one, its scripts only if they are told to."""
    name = 'evo_deit_tiny'
    ema = {k: v + 0.05 for k, v in classifier(name).state_dict().items()}
    torch.save({'state_dict': classifier(name).state_dict(), 'state_dict_ema': ema}, tmp_path / 'both.pth')
    args = [*words(name), '--checkpoint', tmp_path / 'both.pth', *(['--use-ema'] if use_ema else []), '--data-dir', digits,
            '--output', tmp_path / 'out', '--rounds', 1, '-j', 0, '--limit', 8, '--keep-ratio', 0.5]
    assert main(['sweep', *map(str, args)]) == 0
    result = json.loads((tmp_path / 'out' / 'sweep.json').read_text())
    assert ('--use-ema' in result['arguments']) == use_ema
    scope = {'timm': timm}
    exec(result['python'], scope)
    assert_same_weights(scope['model'], ema if use_ema else classifier(name))


def test_few_pictures_are_said_to_be_few(command, digits, prefer):
    prefer(0.5)
    *_, out, _ = command('evo_deit_tiny', digits)
    assert 'With only 60 pictures' in out and '95 % interval' in out


def test_plot(command, digits, tmp_path, monkeypatch):
    pytest.importorskip('matplotlib', reason='the plot needs pip install matplotlib')
    command('vit_tiny_patch16_224', digits)
    assert Image.open(tmp_path / 'out' / 'sweep.png').width > 600
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['sweep.json', 'sweep.png']
    rows = json.loads((tmp_path / 'out' / 'sweep.json').read_text())['rows']
    figure = sweep.plot(json.loads((tmp_path / 'out' / 'sweep.json').read_text()))
    line = next(line for line in figure.axes[0].lines if line.get_label() == 'keep ratio')
    assert line.get_xdata().tolist() == [r['images_per_second'] for r in rows]
    assert line.get_ydata().tolist() == pytest.approx([r['top1'] for r in rows])


def test_documentation_shows_what_it_prints(command, digits, tmp_path):
    _, _, out, _ = command('vit_tiny_patch16_224', digits)
    page = tmp_path / 'page.md'
    page.write_text('<!-- table: sweep -->\n<!-- end -->\n')
    run(BENCHMARKS / 'report.py', page, '--results', tmp_path / 'out', cwd=tmp_path)
    shown = page.read_text().partition('```text\n')[2].partition('\n```')[0]
    assert shown in out and 'keep ratio' in shown and "For timm's scripts" in shown


def test_without_matplotlib(command, digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    status, result, _, err = command('evo_deit_tiny', digits)
    assert status == 0 and result['complete'] and 'needs matplotlib' in err
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
    (['--data-dir', 'damaged', '--no-labels'], 'None of the 1 pictures can be read'),
    (['--dataset', 'wds/some'], "--dataset must be torch/NAME or hfds/NAME, got 'wds/some'"),
    (['--keep-ratio', '0.5', '0'], 'keep_ratio must be in (0, 1], got 0'),
    (['--keep-ratio', '1.5'], 'keep_ratio must be in (0, 1], got 1.5'),
    (['--keep-ratio', 'nan'], 'keep_ratio must be in (0, 1], got nan'),
    (['--limit', '-1'], '--limit must be 1 or more'),
    (['-b', '-1'], 'batch_size=-1'),
    (['--checkpoint', 'missing.pth'], 'missing.pth'),
    (['--device', 'nothing'], 'nothing'),
    (['--output', 'map.txt'], 'map.txt'),
    (['--output', 'map.txt/new'], 'map.txt/new'),
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
    assert len([line for line in err.splitlines() if 'is skipped' not in line]) == 1
    assert not list(tmp_path.glob('new/out/*')) and (tmp_path / 'map.txt').is_file()


def test_weights_of_another_readout(digits, tmp_path, capsys):
    dense = timm.create_model('deit_tiny_patch16_224', **MODELS['evo_deit_tiny'])
    torch.save(dense.state_dict(), tmp_path / 'dense.pth')
    args = ['--checkpoint', tmp_path / 'dense.pth', '--data-dir', digits, '--output', tmp_path / 'out']
    assert main(['sweep', *map(str, [*words('evo_deit_tiny'), *args])]) == 1
    error = capsys.readouterr().err
    assert 'dense.pth does not fit the model' in error and 'fc_norm.weight' in error
    assert not (tmp_path / 'out').exists()


def test_weights_by_similarity(digits, tmp_path, capsys):
    model = timm.create_model('evo_deit_tiny', slow_tokens='similarity', **MODELS['evo_deit_tiny'])
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    args = ['--checkpoint', tmp_path / 'model.pth', '--data-dir', digits, '--output', tmp_path / 'out', '--rounds', 1,
            '--limit', 8, '-j', 0, '--keep-ratio', 0.5]
    assert main(['sweep', *map(str, [*words('evo_deit_tiny'), *args])]) == 1
    error = capsys.readouterr().err
    assert "The weights are of an Evo-DeiT with slow_tokens='similarity'" in error and len(error.splitlines()) == 1
    assert main(['sweep', *map(str, [*words('evo_deit_tiny'), 'slow_tokens=similarity', *args])]) == 0
    scope = {'timm': timm}
    exec(json.loads((tmp_path / 'out' / 'sweep.json').read_text())['python'], scope)
    assert_same_weights(scope['model'], model)


def test_weights_of_another_image_size(digits, tmp_path, capsys):
    """What sweep prints at the end could not load them."""
    model = timm.create_model('vit_tiny_patch16_224', **MODELS['vit_tiny_patch16_224'])
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    args = ['img_size=64', '--checkpoint', tmp_path / 'model.pth', '--data-dir', digits, '--output', tmp_path / 'out']
    assert main(['sweep', *map(str, [*words('vit_tiny_patch16_224'), *args])]) == 1
    error = capsys.readouterr().err
    assert 'model.pth does not fit the model' in error and 'size mismatch for pos_embed' in error
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('args, message', [
    (['--model-kwargs', 'depth'], "must be KEY=VALUE, got 'depth'"),
    (['--interpolation', 'smooth'], "invalid choice: 'smooth'"),
    (['--keep-ratio', 'half'], "invalid float value: 'half'")])
def test_options_that_cannot_be_parsed(capsys, args, message):
    with pytest.raises(SystemExit):
        main(['sweep', 'evo_deit_tiny', '--data-dir', 'digits', '--output', 'out', *args])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('name, message', [
    ('resnet10t', 'got ResNet'), ('no_such_model', 'no_such_model'),
    ('vit_small_patch14_dinov2', 'num_classes must be 1 or more, got 0')])
def test_models_that_are_not_measured(digits, tmp_path, capsys, name, message):
    assert main(['sweep', name, '--data-dir', str(digits), '--output', str(tmp_path / 'out')]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('label', [10, -1])
def test_a_label_that_the_model_does_not_have(label):
    model = torch.nn.Identity()
    model.set_keep_ratio = lambda ratio: None
    batch, settings = torch.zeros(2, 10), [sweep.Setting(model, 1.)]
    with pytest.raises(ValueError, match=f'label must be in 0 .. 9, got {label}'):
        sweep.sweep(settings, [(batch, torch.tensor([3, label]), ['', ''])], batch, True, 0.5, rounds=1)


@pytest.fixture
def interrupt(monkeypatch):
    """Ctrl-C while picture n is read."""
    def interrupt(n):
        read = sweep.Pictures.__getitem__

        def stop(self, i):
            if i == n:
                raise KeyboardInterrupt
            return read(self, i)

        monkeypatch.setattr(sweep.Pictures, '__getitem__', stop)
    return interrupt


def test_interrupted_it_leaves_what_it_has_measured(command, digits, tmp_path, interrupt):
    interrupt(40)
    status, result, out, err = command('evo_deit_tiny', digits)
    assert status == 130 and 'interrupted' in err and '32 of 60 pictures' in out
    assert result['images'] == 32 and not result['complete'] and len(result['rows']) == 4
    _, expected, *_ = command('evo_deit_tiny', digits, '--limit', 32, output='expected')
    assert [row['top1'] for row in result['rows']] == [row['top1'] for row in expected['rows']]
    assert {p.name for p in (tmp_path / 'out').iterdir()} <= {'sweep.json', 'sweep.png'}


def test_interrupted_at_once_it_leaves_nothing(command, digits, tmp_path, interrupt):
    interrupt(0)
    assert command('evo_deit_tiny', digits, output='new/out')[0] == 130 and not list(tmp_path.glob('new/out/*'))


def test_a_recorded_sweep_says_what_it_was_made_with(digits, tmp_path):
    run(BENCHMARKS / 'sweep.py', *words('evo_deit_tiny'), '--data-dir', digits, '-b', 2, '--rounds', 1, '--limit', 8,
        '--workers', 0, '--keep-ratio', 0.5, '--output', tmp_path / 'sweep-x.json', cwd=tmp_path)
    result = json.loads((tmp_path / 'sweep-x.json').read_text())
    assert result['complete'] and len(result['rows']) == 2 and result['images'] == 8
    assert {'date', 'machine', 'versions', 'commit', 'command'} <= set(result)
    assert result['command'].startswith('python benchmarks/sweep.py evo_deit_tiny ') and str(tmp_path) not in str(result)
