"""The benchmarks on tiny models, and the report that makes tables and plots of their results."""
import json
import re
import sys

import pytest
import timm
import torch
from PIL import Image
from programs import BENCHMARKS, ROOT, run

sys.path.insert(0, str(BENCHMARKS))
import deploy  # noqa: E402
import harness  # noqa: E402
import report  # noqa: E402
import service  # noqa: E402
import speed  # noqa: E402

QUICK = ['--rounds', 2, '--warmup', 0, '--seconds', 0]


def test_rounds_take_turns():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in 'ab'}
    times = harness.time_in_turns(steps, rounds=2, warmup=1, seconds=0.)
    assert ''.join(calls) == 'baabba' and [len(t) for t in times.values()] == [2, 2]


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


def test_summary():
    row = harness.summarize([1., 2., 8.], baseline=[2., 3., 8.], batch_size=4)
    assert row['images_per_second'] == 2 and row['speed_up'] == 1.5
    assert (row['speed_up_min'], row['speed_up_max']) == (1, 2)


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


def test_the_papers_multiply_adds():
    """Paper: DeiT-S 4.6 G, Evo-DeiT-S 3.0 G."""
    for name, gmacs in (('deit_small_patch16_224', 4.599), ('evo_deit_small', 3.034)):
        assert round(harness.multiply_adds(timm.create_model(name), (3, 224, 224)) / 1e9, 3) == gmacs


@pytest.mark.slow
def test_speed(tmp_path):
    output = tmp_path / 'speed.json'
    run(BENCHMARKS / 'speed.py', 'evo_deit_tiny', '--against', 'deit_tiny_patch16_224', '-b', 1, '--img-size', 64, *QUICK,
        '--output', output, cwd=tmp_path)
    dense, evo = json.loads(output.read_text())['rows']
    assert (dense['model'], evo['model']) == ('deit_tiny_patch16_224', 'evo_deit_tiny')
    assert evo['params'] == 5_910_800 - (196 - 16) * 192  # a shorter position embedding
    assert 1.3 < dense['multiply_adds'] / evo['multiply_adds'] < 1.6
    assert dense['speed_up'] == 1 and len(evo['seconds']) == 2
    assert all(r['peak_memory'] > 3 * r['params'] for r in (dense, evo))  # weights alone are 4 bytes each
    assert str(tmp_path) not in output.read_text()


@pytest.mark.slow
def test_speed_suite(tmp_path):
    """Training, folded batch norms, compiled in bfloat16."""
    quick = ' '.join(map(str, QUICK))
    suite, output = tmp_path / 'suite.txt', tmp_path / 'speed.json'
    suite.write_text(
        f'# LeViT\nevo_levit_128s --against levit_128s -b 2 --img-size 96 --reparam {quick}\n\n'
        f'evo_levit_128s --against levit_128s -b 2 --img-size 96 --train --model-kwargs selection=layer {quick}\n'
        f'deit_tiny_patch16_224 -b 2 --img-size 32 --dtype bfloat16 --compile {quick}\n')
    run(BENCHMARKS / 'speed.py', '--suite', suite, '--output', output, cwd=tmp_path)
    rows = json.loads(output.read_text())['rows']
    assert [(r['run'], r['mode'], r['reparam'], r['dtype'], r['compile']) for r in rows[::2]] == [
        (0, 'inference', True, 'float32', None), (1, 'train', False, 'float32', None),
        (2, 'inference', False, 'bfloat16', 'default')]
    assert rows[3]['model_kwargs'] == {'selection': 'layer'} and rows[2]['model_kwargs'] == {}


def test_pairs_that_stay_the_same():
    groups = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 2, 3, 3]])  # patches 0 and 1, 2 and 3; 3 and 4
    assert deploy.same_pairs(groups, groups) == 100
    assert deploy.same_pairs(torch.tensor([[5, 5, 5, 1, 2], [0, 0, 2, 3, 3]]), groups) == pytest.approx(200 / 3)


def test_suites_can_be_parsed():
    for name in ('cpu', 'evolved', 'gpu'):
        for line in (BENCHMARKS / f'suites/{name}.txt').read_text().splitlines():
            if not line.startswith('#'):
                args = speed.parse_args(line.split())
                assert args.against and (args.device == 'cuda') == (name == 'gpu')


@pytest.mark.parametrize('argv, message', [
    (['evo_deit_nothing'], 'evo_deit_nothing: unknown to timm'),
    (['evo_deit_tiny', '--against', 'nowhere.onnx'], 'there is no file nowhere.onnx'),
    (['evo_levit_128s', '--reparam', '--train'], '--reparam is for inference'),
    (['evo_levit_128s', '--against', 'evo_levit_128s', '--model-kwargs', 'selection=layer'], 'in --against as well'),
    ([], 'give one or more models, or a --suite'),
])
def test_speed_names_what_it_does_not_know(capsys, argv, message):
    with pytest.raises(SystemExit):
        speed.parse_args(argv)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_dense_features(tmp_path):
    pytest.importorskip('skimage', reason="the benchmark needs pip install -e '.[examples]'")
    output = tmp_path / 'dense_features.json'
    run(BENCHMARKS / 'dense_features.py', '--steps', 2, '--images', 8, '--rounds', 1, '--output',
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


# what a run of speed.py could have written, in round numbers
DENSE = dict(
    run=0, model='levit_256', baseline='levit_256', mode='inference', batch_size=32, img_size=224, dtype='float32',
    compile=None, reparam=True, device='cpu', model_kwargs={}, params=2, multiply_adds=1.2e9, peak_memory=2e8,
    images_per_second=50., speed_up=1., speed_up_min=1., speed_up_max=1.)
ROWS = [DENSE, dict(
    DENSE, model='evo_levit_256', params=2_500_000, multiply_adds=8e8, peak_memory=1e8, images_per_second=70.,
    speed_up=1.4, speed_up_min=1.3, speed_up_max=1.45)]


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
    lines = filled('speed-x', ROWS, 'table: speed model=evo_levit_256,other compile=None')
    assert lines[2] == '| `evo_levit_256` |  | 32 | 1.500 | **1.40** (1.30 - 1.45) | 50 / 70 | 200 / 100 |'
    assert 'old' not in lines and 'torch' in lines[-1]
    assert filled('speed-x', ROWS, 'table: models file=speed')[2:] == [
        '| `evo_levit_256` | 2.50 M | 0.800 (1.200) | 78.8 (81.6) | `evovit_in1k` |']
    onnx = {**ROWS[1], 'model': 'model.onnx', 'params': None, 'multiply_adds': None}
    assert filled('speed-x', [*ROWS, onnx], 'table: speed')[3].startswith('| `model.onnx` |  | 32 |  | **1.40**')
    filled('speed-x', [*ROWS, onnx], 'plot: speed x.png file=speed-x')
    assert Image.open(tmp_path / 'x.png').width > 600
    with pytest.raises(ValueError, match='has no rows of .*nothing'):
        filled('speed-x', ROWS, 'table: speed model=nothing')


def test_report_of_models_without_training(filled):
    """Accuracy and speed come from two files; the plot has the mean over the models and its standard error."""
    accuracy = [
        dict(model=f'dense-seed{seed}', method=method, share=share, top1=top1, lost=lost, lost_error=error, kl=10 * lost,
             kl_error=error)
        for seed, method, share, top1, lost, error in (
            (0, 'dense', 1., 70., 0., 0.), (0, 'similarity 0.5', 0.5, 69., 1., 0.3), (0, 'ToMe 0.5', 0.7, 69., 1., 0.3),
            (1, 'dense', 1., 72., 0., 0.), (1, 'similarity 0.5', 0.5, 69., 3., 0.4))]
    timed = [dict(model=model, method=method, share=0.4, speed_up=speed_up, speed_up_min=1.5, speed_up_max=2.5)
             for model, method, speed_up in (
                 ('deit', 'dense', 1.), ('deit', 'similarity 0.5', 2.), ('dense-seed0', 'similarity 0.5', 1.75))]
    filled('without_training', accuracy, 'table: without_training')
    lines = filled('without_training-speed', timed, 'table: without_training')
    assert ('| similarity 0.5 | 0.500 | 1.00 ± 0.30, 3.00 ± 0.40 | 10.0 ± 0.3, 30.0 ± 0.4 | **1.75** (1.50 - 2.50) of 2.50 '
            '| **2.00** (1.50 - 2.50) of 2.50 |') in lines
    assert '| ToMe 0.5 | 0.700 | 1.00 ± 0.30 | 10.0 ± 0.3 |  |  |' in lines  # not timed, so not in the plot
    (series,) = report.without_training_plot(accuracy + timed).axes[0].containers
    (speed_up, lost), (bars,) = series.lines[0].get_data(), series.lines[2]
    assert list(speed_up) == [2] and list(lost) == [2]
    assert bars.get_segments()[0][:, 1] == pytest.approx([1.75, 2.25])  # sqrt(0.3 ** 2 + 0.4 ** 2) / 2


def test_report_of_fine_tuned_models(filled):
    lines = filled('finetuned', [
        dict(model='dense-seed0', method=method, share=share, before=before, top1=top1, lost=71 - top1, lost_error=0.2)
        for method, share, before, top1 in (('dense', 1., 70., 71.), ('similarity 0.6', 0.62, 69., 70.5))], 'table: finetuned')
    assert lines[2:4] == ['| dense | 1.000 | 70.00 | 71.00 |  |', '| similarity 0.6 | 0.620 | 69.00 | 70.50 | 0.50 ± 0.20 |']


@pytest.mark.parametrize('page', [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))], ids=lambda page: page.stem)
def test_tables_are_what_the_results_say(page):
    assert report.fill(page) == page.read_text()
    assert not [file for _, file, _ in report.PLOT.findall(page.read_text()) if not (page.parent / file).is_file()]
