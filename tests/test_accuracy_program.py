"""The programs behind docs/accuracy.md, on a few pictures of noise."""
import base64
import json
import math
import statistics
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from programs import BENCHMARKS, ROOT

SMALL = ['--img-size', '16', '--width', '16', '--heads', '2', '--depth', '3', '-b', '8', '--device', 'cpu']


@pytest.fixture(scope='module')
def programs():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import accuracy
        import accuracy_report
        return accuracy, accuracy_report
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp('pictures')
    generator = np.random.default_rng(0)
    for split, count in (('train', 12), ('validation', 8)):
        for label in 'abc':
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / split / label / f'{i}.png')
    return root


def train(accuracy, pictures, folder, *args):
    accuracy.main([
        'train', *args, *SMALL, '--data-dir', str(pictures), '--output', str(folder / 'results'),
        '--work-dir', str(folder / 'work')])
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / 'results').glob('*.json'))}


def without_clock(results):
    return {name: {k: v for k, v in r.items() if not k.endswith('seconds')} for name, r in results.items()}


def test_resumed_run_is_the_same(programs, pictures, tmp_path, monkeypatch):
    accuracy, report = programs
    args = [
        'dense', 'evo-layer-to-stage', '--epochs', '3', '--warmup-epochs', '1', '--drop-path', '0.2', '--mixup', '0.8']
    whole = train(accuracy, pictures, tmp_path / 'whole', *args)
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
            train(accuracy, pictures, tmp_path / 'parts', *args)
    assert [len(c['unfinished']) for c in report.compare(*report.load(tmp_path / 'parts' / 'results'))] == [1]
    parts = train(accuracy, pictures, tmp_path / 'parts', *args)
    assert without_clock(parts) == without_clock(whole)
    count = len(calls)
    assert train(accuracy, pictures, tmp_path / 'parts', *args) == parts and len(calls) == count  # nothing to do
    with pytest.raises(SystemExit, match='another configuration'):
        train(accuracy, pictures, tmp_path / 'parts', *args, '--lr', '0.1')


def test_all_variants_train_and_are_timed(programs, pictures, tmp_path, capsys):
    accuracy, report = programs
    deit = [name for name in accuracy.VARIANTS if 'levit' not in name] + ['evo-stage@0.7']
    epoch = ['--epochs', '1', '--warmup-epochs', '0']
    results = train(accuracy, pictures, tmp_path, *deit, *epoch, '--amp', 'bfloat16', '--no-fused-attn')
    assert len(results) == len(deit)
    for r in results.values():
        predictions = np.frombuffer(zlib.decompress(base64.b64decode(r['predictions'])), np.uint8)
        labels = np.frombuffer(zlib.decompress(base64.b64decode(r['labels'])), np.uint8)
        assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
        assert r['top1'][-1] == pytest.approx(100 * (predictions == labels).mean(), abs=1e-4)
    accuracy.main([
        'time', 'dense', 'evo-layer-to-stage', *epoch, *SMALL, '--amp', 'bfloat16', '--no-fused-attn', '--rounds', '2',
        '--steps', '1', '--output', str(tmp_path / 'results')])
    runs = [json.loads(path.read_text()) for path in (tmp_path / 'results').glob('*-seed0.json')]
    (timing,) = (tmp_path / 'results').glob('time-*.json')
    times = json.loads(timing.read_text())['seconds_per_image']
    assert {r['variant']: list(r['timed']['seconds_per_image']) for r in runs if 'timed' in r} == {
        'dense': ['dense'], 'evo-layer-to-stage': ['dense', 'evo-layer-to-stage']}
    for r in runs:
        for variant, found in r.get('timed', {}).get('seconds_per_image', {}).items():
            assert found == {what: pytest.approx(np.median(times[variant][what])) for what in ('train', 'inference')}
    levit = [name for name in accuracy.VARIANTS if 'levit' in name]
    small = [arg if arg != '16' else '32' for arg in SMALL]
    accuracy.main([
        'train', *levit, *epoch, *small, '--data-dir', str(pictures), '--output', str(tmp_path / 'results'),
        '--work-dir', str(tmp_path / 'work')])

    capsys.readouterr()
    comparisons = report.main([str(tmp_path / 'results'), '--plot', str(tmp_path / 'plot.png')])
    assert sorted(len(c['variants']) for c in comparisons) == [len(levit), len(deit)]
    assert report.table(comparisons) in capsys.readouterr().out
    assert (tmp_path / 'plot.png').stat().st_size > 10_000


def test_trained_models_evolve(programs, pictures, tmp_path, monkeypatch):
    """At keep ratio 1 an evolved model is the dense one, before and after fine-tuning with the same batches."""
    accuracy, _ = programs
    monkeypatch.syspath_prepend(BENCHMARKS)
    import without_training
    epochs = ['--epochs', '2', '--warmup-epochs', '0']
    train(accuracy, pictures, tmp_path, 'dense', *epochs)
    (checkpoint,) = (tmp_path / 'work').glob('dense-seed0-*.pt')
    args = [
        str(checkpoint), '--data-dir', str(pictures), '--work-dir', str(tmp_path / 'work'), '--rounds', '0',
        '--similarity', '1', '0.5', '--attention', '1', '--pictures', '1', '--blocks', '1']
    for name, more in (('without', []), ('finetuned', ['--finetune', '2', '--lr', '0.1'])):
        without_training.main([*args, *more, '--output', str(tmp_path / name)])
        rows = json.loads((tmp_path / name).read_text())['rows']
        assert [r['method'] for r in rows] == [
            'dense', 'similarity 1.0', 'similarity 0.5', 'attention 1.0', 'smaller pictures 1.0', 'fewer blocks 1.0']
        assert 0.4 < rows[2]['share'] < 0.8 and rows[2]['kl'] > 0
        for row in rows[:2] + rows[3:]:
            assert row['share'] == pytest.approx(1, abs=0.01)
            assert row['lost'] == row['lost_error'] == 0 and row['kl'] == pytest.approx(0, abs=1e-3)
        assert all(r['images'] == 24 and r['top1'] == pytest.approx(rows[0]['top1'] - r['lost']) for r in rows)
    state = torch.load(checkpoint, weights_only=True)
    state['report']['finished'] = False
    torch.save(state, checkpoint)
    with pytest.raises(SystemExit, match='its training is not finished'):
        without_training.main(args)


def test_divergence_and_points_lost(programs, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import without_training
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.5, 0.3]]).log()
    found = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.5, 0.3]]).log()
    compared = without_training.compare(found, dense, torch.tensor([0, 1]))
    assert (compared['top1'], compared['lost'], compared['lost_error']) == pytest.approx((50, 50, 50))
    divergence = 1000 * (0.5 * math.log(2) - 0.25 * math.log(2))  # of the first picture; that of the second is 0
    assert (compared['kl'], compared['kl_error']) == pytest.approx((divergence / 2, divergence / 2), rel=1e-5)


def test_batches(programs):
    """Same seed and epoch, same batches; an augmented picture is a window of the padded one, or its mirror image."""
    accuracy, _ = programs
    args = accuracy.parse_args(['train', 'dense', '-b', '4', '--data-dir', str(BENCHMARKS), '--device', 'cpu'])
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


def test_intervals(programs):
    """Against a printed table of Student's t, and McNemar's variance written out in counts."""
    accuracy, report = programs
    for df, quantile in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423)):
        assert report.t_quantile(df) == pytest.approx(quantile, abs=1e-4)
    low, high = report.seed_interval([1., 2., 4.])
    assert (low + high) / 2 == pytest.approx(7 / 3)
    assert (high - low) / 2 == pytest.approx(4.3027 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-4)
    assert report.seed_interval([1.]) is None

    generator = torch.Generator().manual_seed(0)
    labels, one, two = torch.randint(300, (3, 500), generator=generator)
    one[:350], two[100:400] = labels[:350], labels[100:400]
    shared = {'variant': 'x', 'num_classes': 300, 'labels': accuracy.pack(labels, 300)}
    runs = [{**shared, 'predictions': accuracy.pack(p, 300)} for p in (one, two)]
    low, high = report.image_interval(runs[:1], runs[1:])
    gained = ((one == labels) & (two != labels)).sum().item()
    lost = ((one != labels) & (two == labels)).sum().item()
    half = 1.96 * math.sqrt(gained + lost - (gained - lost) ** 2 / 500) / 500
    assert (low + high) / 2 == pytest.approx(100 * (gained - lost) / 500)
    assert (high - low) / 2 == pytest.approx(100 * half, rel=2e-3)
    with pytest.raises(ValueError, match='different pictures'):
        report.image_interval(runs[:1], [{**runs[1], 'labels': runs[0]['predictions']}])


@pytest.mark.parametrize('args, message', [
    (['train', 'evo'], 'no such variant'),
    (['train', 'dense@0.5'], 'is for Evo-ViT'),
    (['train', 'evo-stage@1.5'], 'must be in'),
    (['train', 'dense', 'levit'], 'one family at a time'),
    (['train', 'dense', 'dense'], 'each variant once'),
    (['train', 'dense', '--epochs', '0'], '--epochs must be 1 or more, got 0'),
    (['train', 'dense', '--patch-size', '5'], 'no multiple of --patch-size 5'),
    (['train', 'dense', '--mixup', '1', '-b', '3'], 'even --batch-size'),
    (['train', 'dense', '--data-dir', 'nowhere'], "'nowhere' is no folder"),
])
def test_errors(programs, args, message, capsys):
    with pytest.raises(SystemExit):
        programs[0].main(args)
    assert message in capsys.readouterr().err


def test_figures_in_the_readme(programs):
    """Those in its sentences. test_benchmarks.py compares tables and plots with the results."""
    _, report = programs
    runs, timings = report.load(BENCHMARKS / 'results' / 'accuracy')
    comparisons = report.compare(runs, timings)
    comparison = next(c for c in comparisons if c['timing'] and 'evo-similarity@0.4' in c['variants'])
    deit = comparison['variants']
    best, stage = deit['evo-similarity@0.4'], deit['evo-stage']
    low, high = best['seed_interval']
    float32 = next(t for t in timings if t['configuration']['family'] == 'deit' and not t['configuration']['amp'])
    times = [report.speed_up(timing, 'evo-similarity@0.4', what) for timing in (
        comparison['timing'], float32) for what in ('train', 'inference')]
    figures = [
        f"{-statistics.mean(best['differences']):.2f} points below the dense model", f'interval {-low:.2f} below',
        f'to {high:.2f} above', '{:.2f} times as fast in training and {:.2f} times in inference (float32: {:.2f}, {:.2f})'.format(
            *times), f"{-statistics.mean(stage['differences']):.1f} points below"]
    readme = ' '.join((ROOT / 'README.md').read_text().split())
    assert [figure for figure in figures if figure not in readme] == []
