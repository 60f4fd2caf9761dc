"""The benchmarks on tiny models, and the report that makes tables and plots of their results."""
import json
import re
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from programs import BENCHMARKS, ROOT, STANDINS, run
from torch.autograd import DeviceType

sys.path.insert(0, str(BENCHMARKS))
import gpu  # noqa: E402
import harness  # noqa: E402
import newcomer  # noqa: E402
import report  # noqa: E402
import speed  # noqa: E402

GPU = ['--device', 'cpu', '--tiny', '--rounds', '1', '--seconds', '0', '--minutes', '60', '--step-seconds', '600',
       '--output', 'gpu.json']
QUICK = ['--rounds', 2, '--warmup', 0, '--seconds', 0]


def test_rounds_take_turns():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in 'ab'}
    times = harness.time_in_turns(steps, rounds=2, warmup=1, seconds=0.)
    assert ''.join(calls) == 'baabba' and [len(t) for t in times.values()] == [2, 2]


def test_summary():
    row = harness.summarize([1., 2., 8.], baseline=[2., 3., 8.], batch_size=4)
    assert row['images_per_second'] == 2 and row['speed_up'] == 1.5
    assert (row['speed_up_min'], row['speed_up_max']) == (1, 2)


@pytest.mark.parametrize('argument, expected', [
    ('/home/me/data', 'data'), ('--output=/tmp/x/y.json', '--output=y.json'),
    ('benchmarks/x.json', 'benchmarks/x.json'), ('/a/models.py:create', 'models.py:create'),
    ('local-dir:/a/b', 'local-dir:b'), ('~/x/y', 'y'), ('0.5', '0.5')])
def test_commands_do_not_name_folders_of_the_machine(argument, expected):
    assert harness.without_folders(argument) == expected


def test_a_result_file_says_what_it_was_made_with(tmp_path):
    path = tmp_path / 'new' / 'x.json'
    results = harness.Report('x', path, argv=['--data-dir', '/secret/data'])
    results.add({'model': 'a'})
    data = json.loads(path.read_text())
    assert data['command'] == 'python benchmarks/x.py --data-dir data' and data['rows'] == [{'model': 'a'}]
    assert data['machine']['threads'] == torch.get_num_threads() and data['versions']['torch'] == torch.__version__
    assert [p.name for p in path.parent.iterdir()] == ['x.json']


def test_the_papers_multiply_adds():
    """Paper: DeiT-S 4.6 G, Evo-DeiT-S 3.0 G."""
    for name, gmacs in (('deit_small_patch16_224', 4.599), ('evo_deit_small', 3.034)):
        assert round(harness.multiply_adds(harness.create_model(name), (3, 224, 224)) / 1e9, 3) == gmacs


@pytest.mark.slow
def test_speed(tmp_path):
    output = tmp_path / 'speed.json'
    run(BENCHMARKS / 'speed.py', 'evo_deit_tiny', '--against', 'deit_tiny_patch16_224', f'{STANDINS}/models.py:create',
        '-b', 1, '--img-size', 64, *QUICK, '--output', output, cwd=tmp_path)
    dense, evolved, evo = json.loads(output.read_text())['rows']
    assert (dense['model'], evolved['model'], evo['model']) == (
        'deit_tiny_patch16_224', 'models.py:create', 'evo_deit_tiny')
    assert evolved['params'] == dense['params'] and evolved['multiply_adds'] < 0.8 * dense['multiply_adds']
    assert evo['params'] == 5_910_800 - (196 - 16) * 192  # a shorter position embedding
    assert 1.3 < dense['multiply_adds'] / evo['multiply_adds'] < 1.6
    assert dense['speed_up'] == 1 and len(evo['seconds']) == 2
    assert all(r['peak_memory'] > 3 * r['params'] for r in (dense, evolved, evo))  # weights alone are 4 bytes each
    assert str(STANDINS) not in output.read_text() and str(tmp_path) not in output.read_text()


@pytest.mark.slow
def test_speed_suite(tmp_path):
    """Training, folded batch norms, compiled in bfloat16; and token merging, with a stand-in for the package tome."""
    quick = ' '.join(map(str, QUICK))
    suite, output = tmp_path / 'suite.txt', tmp_path / 'speed.json'
    suite.write_text(
        f'# LeViT\nevo_levit_128s --against levit_128s -b 2 --img-size 96 --reparam {quick}\n\n'
        f'evo_levit_128s --against levit_128s -b 2 --img-size 96 --train --model-kwargs selection=layer {quick}\n'
        f'tome:deit_tiny_patch16_224:2 --against deit_tiny_patch16_224 -b 2 --img-size 32 --dtype bfloat16 --compile '
        f'{quick}\n')
    run(BENCHMARKS / 'speed.py', '--suite', suite, '--output', output, cwd=tmp_path, PYTHONPATH=f'{ROOT}:{STANDINS}')
    rows = json.loads(output.read_text())['rows']
    assert [(r['run'], r['mode'], r['reparam'], r['dtype'], r['compile']) for r in rows[::2]] == [
        (0, 'inference', True, 'float32', None), (1, 'train', False, 'float32', None),
        (2, 'inference', False, 'bfloat16', 'default')]
    assert rows[3]['model_kwargs'] == {'selection': 'layer'} and rows[2]['model_kwargs'] == {}
    assert rows[5]['params'] < rows[4]['params'] / 2


def test_suites_can_be_parsed():
    suites = list(BENCHMARKS.glob('suites/*.txt'))
    assert suites
    for suite in suites:
        for line in suite.read_text().splitlines():
            if line and not line.startswith('#'):
                speed.parse_args(line.split())


@pytest.mark.parametrize('argv, message', [
    (['evo_deit_nothing'], 'evo_deit_nothing: unknown to timm'),
    (['evo_deit_tiny', '--against', 'nowhere.py:create'], 'there is no file nowhere.py'),
    ([str(BENCHMARKS / 'speed.py')], 'speed.py: name the function as well'),
    (['tome:deit_tiny_patch16_224:many'], 'must be tome:NAME:R'),
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
    output, picture = tmp_path / 'dense_features.json', tmp_path / 'segmentation.png'
    run(BENCHMARKS / 'dense_features.py', '--steps', 2, '--batch-size', 2, '--images', 8, '--rounds', 1, '--output',
        output, '--picture', picture, '--similarity', 1, 0.5, cwd=tmp_path)
    dense, evo, same, half = json.loads(output.read_text())['rows']
    assert same['iou'] == dense['iou'] and half['multiply_adds'] < same['multiply_adds'] == dense['multiply_adds']
    for r in (dense, evo):
        assert r['mean_iou'] == pytest.approx(sum(r['iou'].values()) / 3) and 0 < r['iou']['background'] <= 100
    assert dense['training_speed_up'] == dense['speed_up'] == 1 and evo['speed_up'] > 0
    assert Image.open(picture).width > 600


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


@pytest.mark.slow
def test_gpu_on_the_cpu(tmp_path):
    """Every kind of step of the program for GPUs, on tiny models."""
    output = tmp_path / 'gpu.json'
    also = ['--also', f'{STANDINS}/models.py:create']
    plan = gpu.plan(gpu.parse_args(GPU + also))
    steps = 1 + next(i for i, s in enumerate(plan) if s.values[1:] == ('float16', True))
    run(BENCHMARKS / 'gpu.py', *GPU[:-1], output, *also, '--steps', steps, cwd=tmp_path)
    data = json.loads(output.read_text())
    assert not data['errors'] and len(data['checks']) == 16 and len(data['profiles']) == 6
    for row in data['checks']:
        precision = {'float32': 1e-5, 'float16': 1e-2, 'bfloat16': 1e-1}[row['dtype']]
        assert row['from_float64_on_cpu'] < precision
        assert ('from_dense_at_keep_ratio_1' in row) == ('levit' not in row['model'])
        assert row.get('from_dense_at_keep_ratio_1', 0) < precision
    assert {row['model'] for row in data['checks']} == {'evo_deit_small_patch16_224', 'evo_levit_256', 'evo_vit'}
    assert {'evo_deit_small_patch16_224', 'evo_vit', 'evo_levit_256', 'models.py:create'} < {
        row['model'] for row in data['rows']}
    assert {row['compile'] for row in data['rows']} == {None, 'default', 'reduce-overhead'}
    for row in data['profiles']:
        expected = {'grouping'} if row['model'] == 'evo_vit' else {'class attention', 'selection'}
        assert set(row['parts']) == expected | {'restoration'}
        assert all(share > 0 for share in row['parts'].values()) and sum(row['parts'].values()) < 1
        assert sum(op['share'] for op in row['operators']) <= 1.001


def test_gpu_measures_all_that_matters():
    args = gpu.parse_args(['--device', 'cpu', '--output', 'gpu.json'])
    plan = gpu.plan(args)
    timed = {(*step.values[0], *(step.settings[k] for k in ('dtype', 'compile', 'batch_size', 'train')))
             for step in plan if step.kind == 'rows' and not step.settings['model_kwargs']}
    assert len(timed) + 4 == sum(step.kind == 'rows' for step in plan)  # each once; four are layer-wise
    names = ['deit_tiny_patch16_224', 'deit_small_patch16_224', 'deit_base_patch16_224', 'deit_base_patch16_384',
             'levit_128s', 'levit_128', 'levit_192', 'levit_256', 'levit_384']
    for name, dtype in product(names, ('bfloat16', 'float32')):
        for compiled, batch_size in [*product((None, 'default'), (1, 32, 256)), ('reduce-overhead', 1)]:
            assert (name, f'evo_{name}', dtype, compiled, batch_size, False) in timed
    assert {('vit_small_patch16_224', 'evo_vit', 'bfloat16', *x, False) for x in (
        (None, 256), ('reduce-overhead', 1))} <= timed
    training = {(step.values[0][1], step.settings['compile'], step.settings['model_kwargs'].get('selection'))
                for step in plan if step.kind == 'rows' and step.settings['train']}
    assert training == set(product(
        ('evo_deit_small_patch16_224', 'evo_levit_256'), (None, 'default'), (None, 'layer')))
    assert gpu.plan(gpu.parse_args(['--device', 'cpu', '--output', 'gpu.json', '--skip', '5', '--steps', '3'])) == plan[5:8]


def test_parts_of_a_profile_on_a_gpu():
    """Time of kernels counts, once, and the scores of the class token are class attention."""
    def event(name, device_type, device_time, *shapes):
        return SimpleNamespace(name=name, device_type=device_type, device_time_total=device_time, cpu_time_total=1000.,
                               input_shapes=[list(shape) for shape in shapes])

    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    times = gpu.part_times([
        event('aten::matmul', cpu, 3., (2, 6, 197, 64), (2, 6, 64, 1)), event('aten::mul', cpu, 2., (2, 6, 197), ()),
        event('class attention', cpu, 4.), event('class attention', cuda, 4.), event('selection', cpu, 5.),
        event('aten::matmul', cpu, 70., (2, 6, 197, 64), (2, 6, 64, 197)), event('aten::mul', cpu, 80., (2, 197, 6), ()),
    ], cuda=True)
    assert times == {'class attention': 9., 'selection': 5., 'grouping': 0., 'restoration': 0.}


@pytest.mark.slow
def test_gpu_keeps_what_it_has(tmp_path):
    """Nothing starts once time is over, a step that takes too long is named."""
    output = tmp_path / 'gpu.json'
    common = [BENCHMARKS / 'gpu.py', *GPU[:-1], output, '--steps', 1]
    run(*common, '--minutes', 0, cwd=tmp_path)
    data = json.loads(output.read_text())
    assert not data['rows'] and {error['error'] for error in data['errors']} == {'not started, no time left'}
    common.remove('--tiny')  # DeiT-S in float64 takes longer than that on any machine
    run(*common, '--step-seconds', 0.2, cwd=tmp_path)
    error, = json.loads(output.read_text())['errors']
    assert error['error'] == 'TimeoutError: more than 0.2 seconds'
    assert error['what'].startswith("check ('deit_small_patch16_224', 'evo_deit_small_patch16_224') float32")


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < '2.14', reason='kernels.py is written for the compiler of PyTorch 2.14')
def test_kernels(tmp_path):
    """As many products, fused attentions and selections as a look at the models says."""
    pytest.importorskip('triton', reason='PyTorch writes kernels for a GPU with triton')
    output = tmp_path / 'kernels.json'
    run(BENCHMARKS / 'kernels.py', '--tiny', '-b', 2, '--output', output, cwd=tmp_path)
    dense, evo, vit, evolved, levit, evo_levit = json.loads(output.read_text())['rows']
    assert {r['model']: r['others'] for r in (dense, evo, vit, evolved, levit, evo_levit) if r['others']} == {
        'evo_deit_small_patch16_224': {'aten.topk': 2}, 'evo_levit_256': {'aten.topk': 3}}  # one in each stage
    assert [r['attention'] for r in (dense, evo, vit, evolved)] == [3] * 4  # one in each block
    assert dense['matmul'] == vit['matmul'] == 3 * 4 + 1 and dense['kernels'] == vit['kernels']
    assert evo['matmul'] == dense['matmul'] + 2  # class attention of the blocks in front of the last stage
    # of each of two stages: cosines, means, twice for the restoration
    assert evolved['matmul'] == vit['matmul'] + 2 * 4
    for a, b in ((dense, evo), (vit, evolved), (levit, evo_levit)):
        assert a['kernels'] < b['kernels'] == sum(
            b[kind] for kind in ('matmul', 'attention', 'convolution', 'pointwise', 'reduction', 'other'))


# what a run of speed.py could have written, in round numbers
ROWS = [
    dict(run=0, model='levit_256', baseline='levit_256', mode='inference', batch_size=32, img_size=224, dtype='float32',
         compile=None, reparam=True, device='cpu', model_kwargs={}, params=10, multiply_adds=1200, peak_memory=2e8,
         images_per_second=50., speed_up=1., speed_up_min=1., speed_up_max=1.),
    dict(run=0, model='evo_levit_256', baseline='levit_256', mode='inference', batch_size=32, img_size=224,
         dtype='float32', compile=None, reparam=True, device='cpu', model_kwargs={}, params=10, multiply_adds=800,
         peak_memory=1e8, images_per_second=70., speed_up=1.4, speed_up_min=1.3, speed_up_max=1.45),
]


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / 'results'
    speed_report = harness.Report('speed', folder / 'speed-x.json')
    speed_report.add(*ROWS)
    return folder


def test_report_fills_a_page(tmp_path, results):
    page = tmp_path / 'page.md'
    page.write_text(
        'before\n<!-- table: speed model=evo_levit_*,other -->\nold\n<!-- end -->\nbetween\n'
        '<!-- plot: speed speed.png -->\n<!-- end -->\n<!-- plot: top1 top1.png file=speed-x -->\n<!-- end -->\n')
    arguments = [str(page), '--results', str(results)]
    untouched = page.read_text()
    assert report.main([*arguments, '--check']) == 1 and page.read_text() == untouched
    assert not list(tmp_path.glob('*.png'))
    assert report.main(arguments) == 0
    text = page.read_text()
    assert '| `evo_levit_256` |  | 32 | 1.500 | **1.40** (1.30 - 1.45) | 50 / 70 | 200 / 100 |' in text
    assert 'old' not in text and text.startswith('before\n') and '\nbetween\n' in text and '](top1.png)' in text
    assert report.main([*arguments, '--check']) == 0
    for name in ('speed', 'top1'):
        assert Image.open(tmp_path / f'{name}.png').width > 600

    data = json.loads((results / 'speed-x.json').read_text())  # a figure changes: its table and both plots are old
    data['rows'][1]['speed_up'] = 1.42
    (results / 'speed-x.json').write_text(json.dumps(data))
    assert len(report.fill(page, results, check=True)) == 3
    assert report.main([*arguments, '--check']) == 1


@pytest.mark.parametrize('mark, message', [
    ('table: sped', "there is no table 'sped', but speed, dense_features"),
    ('table: speed model=nothing', 'no row of results/*.json fits'),
    ('table: speed colour=red', "no row has 'colour'"),
    ('table: speed evo_*', 'conditions are KEY=PATTERN'),
    ('plot: speed', "name a PNG file after 'speed'"),
])
def test_report_names_what_it_does_not_know(tmp_path, results, capsys, mark, message):
    page = tmp_path / 'page.md'
    page.write_text(f'<!-- {mark} -->\n<!-- end -->\n')
    with pytest.raises(SystemExit):
        report.main([str(page), '--results', str(results)])
    assert message in capsys.readouterr().err


def test_report_leaves_a_mark_empty_without_results(tmp_path, results):
    page = tmp_path / 'page.md'
    empty = '<!-- table: flops -->\n<!-- end -->\n<!-- plot: speed x.png file=speed-gpu -->\n<!-- end -->\n'
    page.write_text(empty)
    arguments = [str(page), '--results', str(results)]
    assert report.main([*arguments, '--check']) == 0 and report.main(arguments) == 0 and page.read_text() == empty
    page.write_text(empty.replace('flops -->\n', 'flops -->\nold\n'))
    assert report.main([*arguments, '--check']) == 1
    assert report.main(arguments) == 0 and page.read_text() == empty and not (tmp_path / 'x.png').exists()


def test_report_writes_counts(tmp_path, results):
    counts = harness.Report('flops', results / 'flops.json')
    counts.data['versions'].update(fvcore='1', ptflops='2', torchinfo='3')
    counts.add(*(dict(model=model, baseline='deit', counter='fvcore', fused_attn=fused, multiply_adds=n)
                 for model, fused, n in (('deit', True, 3e9), ('evo', True, 2e9), ('deit', False, 4e9), ('evo', False, 2e9))))
    models = harness.Report('models', results / 'models.json')
    models.add(*(dict(model=name, baseline='deit', parameters=2_500_000, multiply_adds=2e9, dense_multiply_adds=3e9)
                 for name in ('evo_deit_tiny_patch16_224', 'evo_levit_128s_384')))
    page = tmp_path / 'page.md'
    page.write_text('<!-- table: flops -->\n<!-- end -->\n<!-- table: models -->\n<!-- end -->\n')
    report.main([str(page), '--results', str(results)])
    lines = page.read_text().splitlines()
    assert '| fvcore | 3.000 / 2.000 | 1.500 | 4.000 / 2.000 | 2.000 |' in lines
    assert '| `evo_deit_tiny_patch16_224` | 2.50 M | 2.000 (3.000) | 72.0 (72.2) | `fb_in1k`, `evovit_in1k` |' in lines
    assert '| `evo_levit_128s_384` | 2.50 M | 2.000 (3.000) | not published |  |' in lines


def test_report_writes_what_a_newcomer_sees(tmp_path, results, monkeypatch):
    command = tmp_path / 'run'
    command.write_text(
        "#!/bin/sh\necho installed\nprintf 'model  top-1 %%\\ndeit  97.00\\nevo_deit  98.00\\n1.30 times\\n'\n"
        "echo collected\necho '===== 3 passed in 1.00s ====='\n")
    command.chmod(0o755)
    monkeypatch.setattr(newcomer, 'RUN', command)
    newcomer.main(['--output', str(results / 'newcomer.json')])
    page = tmp_path / 'page.md'
    page.write_text('<!-- table: newcomer -->\n<!-- end -->\n')
    report.main([str(page), '--results', str(results)])
    machine = harness.machine()
    first = f"$ python examples/quickstart.py    # {machine['cpu']}, {machine['cores']} cores"
    assert page.read_text().splitlines()[1:-1] == [
        '```text', first, 'model  top-1 %', 'deit  97.00', 'evo_deit  98.00', '1.30 times',
        '$ pytest', '3 passed in 1.00s', '```']
    command.write_text('#!/bin/sh\nexit 3\n')
    with pytest.raises(SystemExit, match='exit status 3'):
        newcomer.main([])


def test_report_writes_kernels(tmp_path, results):
    kernels = harness.Report('kernels', results / 'kernels.json')
    common = dict(baseline='vit', run=0, batch_size=1, matmul=3, convolution=1, attention=2, other=0)
    kernels.add(dict(common, model='vit', pointwise=4, reduction=5, kernels=15),
                dict(common, model='evo_vit', pointwise=6, reduction=7, kernels=19))
    page = tmp_path / 'page.md'
    page.write_text('<!-- table: kernels -->\n<!-- end -->\n')
    report.main([str(page), '--results', str(results)])
    assert '| `evo_vit` of `vit` | 1 | 15 / 19 | 3 / 3 | 2 / 2 | 1 / 1 | 4 / 6 | 5 / 7 | 0 / 0 |' in page.read_text()


def test_report_of_models_without_training(tmp_path, results):
    """Accuracy and speed come from two files; the plot has the mean over the models and its standard error."""
    accuracy = harness.Report('without_training', results / 'without_training.json')
    accuracy.add(*(
        dict(model=f'dense-seed{seed}', method=method, share=share, top1=top1, lost=lost, lost_error=error, kl=10 * lost,
             kl_error=error)
        for seed, method, share, top1, lost, error in (
            (0, 'dense', 1., 70., 0., 0.), (0, 'similarity 0.5', 0.5, 69., 1., 0.3), (0, 'ToMe 0.5', 0.7, 69., 1., 0.3),
            (1, 'dense', 1., 72., 0., 0.), (1, 'similarity 0.5', 0.5, 69., 3., 0.4))))
    timed = harness.Report('without_training', results / 'without_training-speed.json')
    timed.add(*(dict(model=model, method=method, share=0.4, speed_up=speed_up, speed_up_min=1.5, speed_up_max=2.5)
                for model, method, speed_up in (
                    ('deit', 'dense', 1.), ('deit', 'similarity 0.5', 2.), ('dense-seed0', 'similarity 0.5', 1.75))))
    page = tmp_path / 'page.md'
    page.write_text('<!-- table: without_training -->\n<!-- end -->\n<!-- plot: without_training x.png -->\n<!-- end -->\n')
    assert report.main([str(page), '--results', str(results)]) == 0
    lines = page.read_text().splitlines()
    assert ('| similarity 0.5 | 0.500 | 1.00 ± 0.30, 3.00 ± 0.40 | 10.0 ± 0.3, 30.0 ± 0.4 | **1.75** (1.50 - 2.50) of 2.50 '
            '| **2.00** (1.50 - 2.50) of 2.50 |') in lines
    assert '| ToMe 0.5 | 0.700 | 1.00 ± 0.30 | 10.0 ± 0.3 |  |  |' in lines  # not timed, so not in the plot
    assert Image.open(tmp_path / 'x.png').width > 600
    figure = report.without_training_plot(accuracy.data['rows'] + timed.data['rows'])
    (series,) = figure.axes[0].containers
    (speed_up, lost), (bars,) = series.lines[0].get_data(), series.lines[2]
    assert list(speed_up) == [2] and list(lost) == [2]
    assert bars.get_segments()[0][:, 1] == pytest.approx([1.75, 2.25])  # sqrt(0.3 ** 2 + 0.4 ** 2) / 2


def test_report_of_fine_tuned_models(tmp_path, results):
    tuned = harness.Report('without_training', results / 'finetuned.json')
    tuned.add(*(dict(model='dense-seed0', method=method, share=share, before=before, top1=top1, lost=71 - top1,
                     lost_error=0.2)
                for method, share, before, top1 in (('dense', 1., 70., 71.), ('similarity 0.6', 0.62, 69., 70.5))))
    page = tmp_path / 'page.md'
    page.write_text('<!-- table: finetuned -->\n<!-- end -->\n')
    assert report.main([str(page), '--results', str(results)]) == 0
    lines = page.read_text().splitlines()
    assert '| dense | 1.000 | 70.00 | 71.00 |  |' in lines
    assert '| similarity 0.6 | 0.620 | 69.00 | 70.50 | 0.50 ± 0.20 |' in lines


def test_the_documentation_is_what_the_results_say():
    assert report.main(['--check']) == 0
