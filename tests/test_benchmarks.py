"""The benchmarks on tiny models and few pictures, and the report that makes tables and plots of their results."""
import json
import math
import re
import shlex
import statistics
import sys

import pytest
import timm
import torch
from PIL import Image
from programs import BENCHMARKS, ROOT, run, write_digits

sys.path.insert(0, str(BENCHMARKS))
import accuracy  # noqa: E402
import deploy  # noqa: E402
import harness  # noqa: E402
import report  # noqa: E402
import service  # noqa: E402
import speed  # noqa: E402
import without_training  # noqa: E402

SMALL = ['--img-size', '32', '--device', 'cpu']  # of accuracy.py


def test_rounds_take_turns_and_are_summed_up():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in 'ab'}
    times = harness.time_in_turns(steps, rounds=2, warmup=1, seconds=0.)
    assert ''.join(calls) == 'baabba' and [len(t) for t in times.values()] == [2, 2]
    row = harness.summarize([1., 2., 8.], baseline=[2., 3., 8.], batch_size=4)
    assert row['images_per_second'] == 2 and row['speed_up'] == 1.5
    assert (row['speed_up_min'], row['speed_up_max']) == (1, 2)


def test_a_round_counts_by_the_median_of_its_calls(monkeypatch):
    """One that something else has stopped for a while changes nothing."""
    clock, slow = [0.], iter([1., 50., 1.])
    monkeypatch.setattr(harness.sweep.time, 'perf_counter', lambda: clock[0])
    steps = {'a': lambda: clock.append(clock.pop() + next(slow)), 'b': lambda: clock.append(clock.pop() + 3.)}
    assert harness.time_in_turns(steps, rounds=1, warmup=0, seconds=30.) == {'a': [1.], 'b': [3.]}


def test_the_blocks_alone():
    """They get the tokens that they get in the model."""
    model = timm.create_model('evo_vit', base='vit_tiny_patch16_224', img_size=64, depth=4).eval()
    x, expected = torch.randn(2, 3, 64, 64), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, output: expected.append(output))
    found = speed.blocks_alone(model, x)()
    assert len(found) == 4 and found[-1].shape[1] < 1 + 16
    assert all(torch.equal(a, b) for a, b in zip(found, expected[:4]))


@pytest.mark.slow
def test_service(monkeypatch):
    monkeypatch.setattr(service, 'SETTINGS', ((2, 1, 1, 0), (1, 1, 2, 1)))
    args = ('evo_vit', '--model-kwargs', 'base=vit_tiny_patch16_224', '--against', 'vit_tiny_patch16_224', '-b', '1',
            '--img-size', '64', '--rounds', '1', '--seconds', '0')
    rows = service.main(args)['rows']
    assert [(r['processes'], r['threads'], r['callers'], r['busy']) for r in rows] == list(service.SETTINGS)
    assert all(r['images_per_second'] / r['dense_images_per_second'] == pytest.approx(r['speed_up']) for r in rows)


def test_a_result_file_says_what_it_was_made_with(tmp_path):
    """And names no folder of the machine."""
    path = tmp_path / 'new' / 'x.json'
    argv = ['/me/data', '--output=/tmp/x/y.json', 'benchmarks/x.json', '/a/models.py:create', 'local-dir:/a/b', '~/x/y', '0.5']
    results = harness.Report('x', path, argv=argv)
    results.add({'model': 'a'})
    data = json.loads(path.read_text())
    assert data['command'] == (
        "python benchmarks/x.py data --output=y.json benchmarks/x.json models.py:create local-dir:b y 0.5")
    assert data['rows'] == [{'model': 'a'}]
    assert data['machine']['threads'] == torch.get_num_threads() and data['versions']['torch'] == torch.__version__
    assert [p.name for p in path.parent.iterdir()] == ['x.json']


@pytest.mark.slow
def test_speed_suite(tmp_path):
    """Inference, folded batch norms, training, compiled in bfloat16. Single runs are in the commands of the docs."""
    quick = '--rounds 2 --warmup 0 --seconds 0'
    suite, output = tmp_path / 'suite.txt', tmp_path / 'speed.json'
    suite.write_text(
        f'evo_deit_tiny --against deit_tiny_patch16_224 -b 1 --img-size 64 {quick}\n\n'
        f'# LeViT\nevo_levit_128s --against levit_128s -b 2 --img-size 96 --reparam {quick}\n'
        f'evo_levit_128s --against levit_128s -b 2 --img-size 96 --train --model-kwargs selection=layer {quick}\n'
        f'deit_tiny_patch16_224 -b 2 --img-size 32 --dtype bfloat16 --compile {quick}\n')
    run(BENCHMARKS / 'speed.py', '--suite', suite, '--output', output, cwd=tmp_path)
    rows = json.loads(output.read_text())['rows']
    assert [(r['run'], r['mode'], r['reparam'], r['dtype'], r['compile']) for r in rows[::2]] == [
        (0, 'inference', False, 'float32', None), (1, 'inference', True, 'float32', None),
        (2, 'train', False, 'float32', None), (3, 'inference', False, 'bfloat16', 'default')]
    assert rows[5]['model_kwargs'] == {'selection': 'layer'} and rows[4]['model_kwargs'] == {}
    dense, evo = rows[:2]
    assert (dense['model'], evo['model']) == ('deit_tiny_patch16_224', 'evo_deit_tiny')
    assert evo['params'] == 5_910_800 - (196 - 16) * 192  # a shorter position embedding
    assert 1.3 < dense['multiply_adds'] / evo['multiply_adds'] < 1.6
    assert dense['speed_up'] == 1 and len(evo['seconds']) == 2
    assert all(r['peak_memory'] > 3 * r['params'] for r in (dense, evo))  # weights alone are 4 bytes each
    assert str(tmp_path) not in output.read_text()


def test_pairs_that_stay_the_same():
    groups = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 2, 3, 3]])  # patches 0 and 1, 2 and 3; 3 and 4
    assert deploy.same_pairs(groups, groups) == 100
    assert deploy.same_pairs(torch.tensor([[5, 5, 5, 1, 2], [0, 0, 2, 3, 3]]), groups) == pytest.approx(200 / 3)


def test_suites_can_be_parsed():
    for name in ('cpu', 'evolved', 'gpu', 'one-picture', 'stages'):
        for line in (BENCHMARKS / f'suites/{name}.txt').read_text().splitlines():
            if not line.startswith('#'):
                args = speed.parse_args(shlex.split(line))
                assert args.against and (args.device == 'cuda') == (name == 'gpu')


@pytest.mark.parametrize('program, argv, message', [
    (speed, ['evo_deit_nothing'], 'evo_deit_nothing: unknown to timm'),
    (speed, ['evo_deit_tiny', '--against', 'nowhere.onnx'], 'there is no file nowhere.onnx'),
    (speed, ['evo_levit_128s', '--reparam', '--train'], '--reparam is for inference'),
    (speed, ['evo_deit_tiny', '--blocks', '--train'], '--blocks is for inference without --compile'),
    (speed, ['levit_128', '--against', 'levit_128', '--model-kwargs', 'depth=(1,1,1)'], 'in --against as well'),
    (speed, [], 'give one or more models, or a --suite'),
    (accuracy, ['train', 'evo'], 'evo: there are dense, '),
    (accuracy, ['train', 'dense@0.5'], '@RATIO for Evo-ViT'),
    (accuracy, ['train', 'dense', 'levit'], 'one family, DeiT or LeViT, at a time'),
])
def test_wrong_arguments(capsys, program, argv, message):
    with pytest.raises(SystemExit):
        program.parse_args(argv)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_segmentation(tmp_path):
    pytest.importorskip('skimage', reason="the benchmark needs pip install -e '.[examples]'")
    output = tmp_path / 'segmentation.json'
    run(BENCHMARKS / 'segmentation.py', '--steps', 2, '--images', 8, '--rounds', 1, '--output',
        output, '--similarity', 1, 0.5, cwd=tmp_path)
    dense, evo, same, half = json.loads(output.read_text())['rows']
    assert same['iou'] == dense['iou'] and half['multiply_adds'] < same['multiply_adds'] == dense['multiply_adds']
    for r in (dense, evo):
        assert r['mean_iou'] == pytest.approx(sum(r['iou'].values()) / 3) and 0 < r['iou']['background'] <= 100
    assert dense['speed_up'] == 1 and evo['speed_up'] > 0


@pytest.mark.slow
def test_every_architecture_evolves_or_is_refused_with_the_reason(tmp_path):
    output = tmp_path / 'families.json'
    run(BENCHMARKS / 'families.py', '--output', output, cwd=tmp_path)
    rows = json.loads(output.read_text())['rows']
    assert {'DINOv2', 'DINOv3', 'EVA-02', 'NaFlexViT', 'Perception Encoder', 'SigLIP', 'ViT'} <= {row['model'] for row in rows}
    for row in rows:
        assert row['evolve'] == row['architectures'] - len(row['refused'])
        assert all(re.match(r'evolve takes .*, got (Beit|VisionTransformerRelPos)\.', r) for r in row['refused'].values())
    recorded = json.loads((ROOT / 'benchmarks/results/families.json').read_text())
    if recorded['versions']['timm'] == timm.__version__:
        assert rows == recorded['rows']


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of pictures for accuracy.py, whose models and batches are small."""
    for key, value in dict(batch_size=8, patch_size=8, width=32, depth=3, heads=2, warmup_epochs=0).items():
        monkeypatch.setitem(accuracy.SETTINGS, key, value)
    return write_digits(tmp_path / 'pictures', per_class=6)


def train(pictures, folder, *args):
    accuracy.main([
        'train', *args, *SMALL, '--data-dir', str(pictures), '--output', str(folder / 'results'),
        '--work-dir', str(folder / 'work')])
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / 'results').glob('*-seed*.json'))}


def test_resumed_run_is_the_same(pictures, tmp_path, monkeypatch):
    args = ['dense', 'evo-layer-to-stage', '--epochs', '3']
    whole = train(pictures, tmp_path / 'whole', *args)
    assert set(whole) == {'dense-seed0', 'evo-layer-to-stage-seed0'}
    assert all(r['finished'] and len(r['top1']) == 3 for r in whole.values())

    evaluate, calls = accuracy.evaluate, []

    def interrupted(*inputs):
        calls.append(inputs)
        if len(calls) in (2, 6):  # the second epoch of either
            raise KeyboardInterrupt
        return evaluate(*inputs)

    monkeypatch.setattr(accuracy, 'evaluate', interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(pictures, tmp_path / 'parts', *args)
    parts = train(pictures, tmp_path / 'parts', *args)
    assert parts == {name: {**r, 'command': parts[name]['command']} for name, r in whole.items()}
    count = len(calls)
    assert train(pictures, tmp_path / 'parts', *args) == parts and len(calls) == count  # nothing to do
    with pytest.raises(SystemExit, match='another configuration'):
        train(pictures, tmp_path / 'parts', *args[:-1], '4')


def test_all_variants_train_and_are_timed(pictures, tmp_path, capsys):
    levit = [name for name in accuracy.VARIANTS if 'levit' in name]
    deit = [name for name in accuracy.VARIANTS if 'levit' not in name] + ['evo-stage@0.7']
    for variants in (deit, levit):
        results = train(pictures, tmp_path, *variants, '--epochs', '1', '--amp', 'bfloat16', '--no-fused-attn')
    names = deit + levit + [f'{v}@{ratio}' for v in deit if 'elastic' in v for ratio in ('0.3', '0.5', '0.7', '1')]
    assert len(results) == len(names)
    assert all(r['top1'][-1] == pytest.approx(5 * r['right'].count('1')) and len(r['right']) == 20 for r in results.values())
    accuracy.main(['time', 'dense', 'evo-layer-to-stage', '--epochs', '1', *SMALL, '--amp', 'bfloat16', '--no-fused-attn',
                   '--rounds', '1', '--output', str(tmp_path / 'results')])
    capsys.readouterr()
    report.main(['--accuracy', str(tmp_path / 'results')])
    out = capsys.readouterr().out
    assert all(f'| {name} | 0 |' in out for name in names) and out.count('**DeiT') == out.count('**LeViT') == 1
    assert '| **1.00** (1.00 - 1.00) | **1.00** (1.00 - 1.00) |' in out  # the dense model's


def test_trained_models_evolve(pictures, tmp_path):
    """At keep ratio 1 an evolved model is the dense one, before and after fine-tuning with the same batches.

    With the dense model as a teacher it stays nearly that, since it has nothing to learn but its augmented pictures.
    """
    train(pictures, tmp_path, 'dense', '--epochs', '2')
    (checkpoint,) = (tmp_path / 'work').glob('dense-seed0-*.pt')
    args = [
        str(checkpoint), '--data-dir', str(pictures), '--rounds', '0', '--similarity', '1', '0.5', '--attention', '1',
        '--pictures', '1', '--blocks', '1']
    methods = ['dense', 'similarity 1.0', 'similarity 0.5', 'attention 1.0', 'smaller pictures 1.0', 'fewer blocks 1.0']
    taught = ['similarity 1.0, self-distilled', 'similarity 0.5, self-distilled']
    taught += [f'elastic {ratio}, self-distilled' for ratio in (0.3, 0.4, 0.5, 0.7, 1.0)]
    for name, more in (('without', []), ('finetuned', ['--finetune', '2'])):
        without_training.main([*args, *more, '--output', str(tmp_path / name)])
        rows = json.loads((tmp_path / name).read_text())['rows']
        assert [r['method'] for r in rows] == methods + (taught if more else [])
        found = {r['method']: r for r in rows}
        assert 0.4 < found['similarity 0.5']['share'] < 0.8 and found['similarity 0.5']['kl'] > 0
        for row in (found[method] for method in methods if method != 'similarity 0.5'):
            assert row['share'] == pytest.approx(1, abs=0.01)
            assert row['kl'] == pytest.approx(rows[0]['kl'], rel=1e-3, abs=1e-3) and row['lost'] == rows[0]['lost']
        assert (rows[0]['kl'] > 1) == bool(more) and (more or rows[0]['lost'] == rows[0]['lost_error'] == 0)
        assert all(r['images'] == 20 and r['top1'] + r['lost'] == pytest.approx(rows[0]['top1'] + rows[0]['lost']) for r in rows)
    shares = [found[method]['share'] for method in taught[2:]]
    assert sorted(shares) == shares and found[taught[0]]['kl'] < 0.1 * rows[0]['kl']
    state = torch.load(checkpoint, weights_only=True)
    state['report']['finished'] = False
    torch.save(state, checkpoint)
    with pytest.raises(SystemExit, match='its training is not finished'):
        without_training.main(args)


def test_divergence_and_points_lost():
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.5, 0.3]]).log()
    found = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.5, 0.3]]).log()
    compared = without_training.compare(found, dense, torch.tensor([0, 1]))
    assert (compared['top1'], compared['lost'], compared['lost_error']) == pytest.approx((50, 50, 50))
    divergence = 1000 * (0.5 * math.log(2) - 0.25 * math.log(2))  # of the first picture; that of the second is 0
    assert (compared['kl'], compared['kl_error']) == pytest.approx((divergence / 2, divergence / 2), rel=1e-5)


def test_batches():
    """Same seed and epoch, same batches; an augmented picture is a window of the padded one, or its mirror image."""
    args = accuracy.parse_args(['train', 'dense', '--data-dir', str(BENCHMARKS), *SMALL])
    args.batch_size = 4
    images = torch.randint(1, 256, (9, 6, 5, 3), dtype=torch.uint8)
    labels = torch.arange(9)
    first, again, other = (list(accuracy.batches(images, labels, epoch, 3, args)) for epoch in (0, 0, 1))
    assert len(first) == 2 and all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again))
    assert not torch.equal(first[0][1], other[0][1])
    for x, y in first:
        for picture, label in zip(x, y):
            padded = torch.zeros(14, 13, 3, dtype=torch.uint8)
            padded[4:10, 4:9] = images[label]
            windows = [padded[i:i + 6, j:j + 5] for i in range(9) for j in range(9)]
            assert any(torch.equal(picture, w) or torch.equal(picture, w.flip(1)) for w in windows)


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """A function that writes rows to a result file and gives the lines of a page with a mark."""
    monkeypatch.setattr(report, 'RESULTS', tmp_path / 'results')

    def fill(file, rows, mark):
        harness.Report(file.partition('-')[0], tmp_path / 'results' / f'{file}.json').add(*rows)
        page = tmp_path / 'page.md'
        page.write_text(f'before\n<!-- {mark} -->\nold\n<!-- end -->\nafter\n')
        report.main([str(page)])
        first, *lines, last = page.read_text().splitlines()
        assert (first, lines[0], last) == ('before', f'<!-- {mark} -->', 'after')
        return lines[1:-1]

    return fill


def test_report_of_speed(filled, tmp_path):
    dense = dict(  # what a run of speed.py could have written, in round numbers
        run=0, model='levit_256', baseline='levit_256', mode='inference', batch_size=32, img_size=224, dtype='float32',
        compile=None, reparam=True, device='cpu', model_kwargs={}, params=2, multiply_adds=1.2e9, peak_memory=2e8,
        images_per_second=50., speed_up=1., speed_up_min=1., speed_up_max=1.)
    rows = [dense, dict(
        dense, model='evo_levit_256', params=2_500_000, multiply_adds=8e8, peak_memory=1e8, images_per_second=70.,
        speed_up=1.4, speed_up_min=1.3, speed_up_max=1.45)]
    lines = filled('speed-x', rows, 'table: speed model=evo_levit_256,other compile=None')
    assert lines[2] == '| `evo_levit_256` | 32 | 1.500 | **1.40** (1.30 - 1.45) | 50 / 70 | 200 / 100 |'
    assert 'old' not in lines and 'torch' in lines[-1]
    assert filled('speed-x', rows, 'table: models file=speed')[2:] == [
        '| `evo_levit_256` | 2.50 M | 0.800 (1.200) | 78.8 (81.6) | `evovit_in1k` |']
    onnx = {**rows[1], 'model': 'model.onnx', 'params': None, 'multiply_adds': None}
    assert filled('speed-x', [*rows, onnx], 'table: speed')[3].startswith('| `model.onnx` | 32 |  | **1.40**')
    filled('speed-x', [*rows, onnx], 'plot: speed x.png file=speed-x')
    assert Image.open(tmp_path / 'x.png').width > 600
    with pytest.raises(ValueError, match='has no rows of .*nothing'):
        filled('speed-x', rows, 'table: speed model=nothing')


def test_report_of_models_without_training(filled):
    """Accuracy and speed come from two files; the plot has the mean over the models and its standard error."""
    trained = [
        dict(model=f'dense-seed{seed}', method=method, share=share, top1=top1, lost=lost, lost_error=error, kl=10 * lost,
             kl_error=error)
        for seed, method, share, top1, lost, error in (
            (0, 'dense', 1., 70., 0., 0.), (0, 'similarity 0.5', 0.5, 69., 1., 0.3), (0, 'ToMe 0.5', 0.7, 69., 1., 0.3),
            (1, 'dense', 1., 72., 0., 0.), (1, 'similarity 0.5', 0.5, 69., 3., 0.4))]
    timed = [dict(model=model, method=method, share=0.4, speed_up=speed_up, speed_up_min=1.5, speed_up_max=2.5)
             for model, method, speed_up in (
                 ('deit', 'dense', 1.), ('deit', 'similarity 0.5', 2.), ('dense-seed0', 'similarity 0.5', 1.75))]
    filled('without_training', trained, 'table: without_training')
    lines = filled('without_training-speed', timed, 'table: without_training')
    assert ('| similarity 0.5 | 0.500 | 1.00 ± 0.30, 3.00 ± 0.40 | 10.0 ± 0.3, 30.0 ± 0.4 | **1.75** (1.50 - 2.50) of 2.50 '
            '| **2.00** (1.50 - 2.50) of 2.50 |') in lines
    assert '| ToMe 0.5 | 0.700 | 1.00 ± 0.30 | 10.0 ± 0.3 |  |  |' in lines  # not timed, so not in the plot
    (series,) = report.without_training_plot(trained + timed).axes[0].containers
    (speed_up, lost), (bars,) = series.lines[0].get_data(), series.lines[2]
    assert list(speed_up) == [2] and list(lost) == [2]
    assert bars.get_segments()[0][:, 1] == pytest.approx([1.75, 2.25])  # sqrt(0.3 ** 2 + 0.4 ** 2) / 2


def test_intervals():
    """Over seeds against a printed table of Student's t, over images against McNemar's variance written out in counts."""
    configuration = {**accuracy.SETTINGS, 'family': 'deit', 'img_size': 32, 'epochs': 1, 'amp': '', 'no_fused_attn': False}

    def run(variant, seed, right):
        return {**configuration, 'variant': variant, 'seed': seed, 'finished': True, 'top1': [0],
                'right': ''.join(map(str, right.int().tolist()))}

    runs = [run('dense', seed, torch.zeros(100)) for seed in range(3)]
    ((_, evo),) = report.compare([
        *runs, *(run('evo-stage', seed, torch.arange(100) < count) for seed, count in enumerate((1, 2, 4)))]).values()
    low, high = evo['over_seeds']
    assert ((low + high) / 2, (high - low) / 2) == pytest.approx((7 / 3, 4.3027 * math.sqrt(7 / 3) / math.sqrt(3)), rel=1e-4)
    assert evo['gained'] == pytest.approx(7 / 3)

    generator = torch.Generator().manual_seed(0)
    labels, one, two = torch.randint(300, (3, 500), generator=generator)
    one[:350], two[100:400] = labels[:350], labels[100:400]
    ((_, evo),) = report.compare([run('dense', 0, labels == two), run('evo-stage', 0, labels == one)]).values()
    low, high = evo['over_images']
    gained = ((one == labels) & (two != labels)).sum().item()
    lost = ((one != labels) & (two == labels)).sum().item()
    half = 1.96 * math.sqrt(gained + lost - (gained - lost) ** 2 / 500) / 500
    assert 'over_seeds' not in evo
    assert (low + high) / 2 == pytest.approx(100 * (gained - lost) / 500)
    assert (high - low) / 2 == pytest.approx(100 * half, rel=4e-3)


@pytest.mark.parametrize('page', [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))], ids=lambda page: page.stem)
def test_tables_are_what_the_results_say(page):
    assert report.fill(page) == page.read_text()
    assert not [file for _, file, _ in report.PLOT.findall(page.read_text()) if not (page.parent / file).is_file()]


def test_figures_in_the_readme():
    """Those in its sentences."""
    rows = report.read('accuracy family=deit img_size=32 epochs=25', report.RESULTS)
    (found,) = report.compare(rows).values()
    variants = {v['variant']: v for v in found}
    top1 = {name: f"{statistics.mean(v['top1']):.2f} %" for name, v in variants.items()}
    speed = {name: f"{v['inference']['speed_up']:.2f}" for name, v in variants.items() if 'inference' in v}
    figures = [
        f"dense model has {top1['dense']}", f"{top1['evo-elastic@1']} at keep ratio 1", f"{top1['evo-elastic']} at 0.4",
        f"{top1['evo-elastic@0.3']} at 0.3", f"{speed['evo-elastic']} and {speed['evo-elastic@0.3']} times that of the dense",
        f"for 0.3 alone it has {top1['evo-similarity@0.3']}", f"{-variants['evo-stage']['gained']:.1f} points are lost",
        f"for 0.2 alone {top1['evo-similarity@0.2']} at {speed['evo-similarity@0.2']} times",
        f"half of the blocks have {top1['dense-4-blocks']} at {speed['dense-4-blocks']} times",
        f"smaller pictures {top1['dense-24-pixels']} at {speed['dense-24-pixels']} times",
        'With average readout similarity at 0.4 is {:.1f} points below its dense twin'.format(
            statistics.mean(variants['dense-avg']['top1']) - statistics.mean(variants['evo-similarity-avg']['top1']))]
    readme = ' '.join((ROOT / 'README.md').read_text().split())
    assert [figure for figure in figures if figure not in readme] == []
