"""The programs behind docs/accuracy.md and docs/evolve.md, on a few pictures of noise."""
import json
import math
import statistics
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from programs import BENCHMARKS, ROOT

sys.path.insert(0, str(BENCHMARKS))
import accuracy  # noqa: E402
import report  # noqa: E402
import without_training  # noqa: E402

SMALL = ['--img-size', '32', '--device', 'cpu']


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for key, value in dict(batch_size=8, patch_size=8, width=32, depth=3, heads=2, warmup_epochs=0).items():
        monkeypatch.setitem(accuracy.SETTINGS, key, value)


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
    names = deit + levit + [f'evo-elastic@{ratio}' for ratio in ('0.3', '0.5', '0.7', '1')]  # evaluated at each ratio
    assert len(results) == len(names)
    for r in results.values():
        assert r['top1'][-1] == pytest.approx(accuracy.right(r).mean(), abs=1e-4)
        assert len(accuracy.right(r)) == 24
    accuracy.main(['time', 'dense', 'evo-layer-to-stage', '--epochs', '1', *SMALL, '--amp', 'bfloat16', '--no-fused-attn',
                   '--rounds', '1', '--output', str(tmp_path / 'results')])
    capsys.readouterr()
    report.main(['--accuracy', str(tmp_path / 'results')])
    out = capsys.readouterr().out
    assert all(f'| {name} | 0 |' in out for name in names) and out.count('**DeiT') == 2 and '**LeViT' in out


def test_trained_models_evolve(pictures, tmp_path):
    """At keep ratio 1 an evolved model is the dense one, before and after fine-tuning with the same batches."""
    train(pictures, tmp_path, 'dense', '--epochs', '2')
    (checkpoint,) = (tmp_path / 'work').glob('dense-seed0-*.pt')
    args = [
        str(checkpoint), '--data-dir', str(pictures), '--rounds', '0', '--similarity', '1', '0.5', '--attention', '1',
        '--pictures', '1', '--blocks', '1']
    for name, more in (('without', []), ('finetuned', ['--finetune', '2'])):
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


def test_intervals():
    """Over seeds against a printed table of Student's t, over images against McNemar's variance written out in counts."""
    configuration = {**accuracy.SETTINGS, 'family': 'deit', 'img_size': 32, 'epochs': 1, 'amp': '', 'no_fused_attn': False}

    def run(variant, seed, labels, predictions):
        return {**configuration, 'variant': variant, 'seed': seed, 'finished': True, 'num_classes': 300, 'top1': [0],
                'labels': accuracy.pack(labels, 300), 'predictions': accuracy.pack(predictions, 300)}

    zeros = torch.zeros(100, dtype=torch.long)
    runs = [run('dense', seed, zeros, zeros + 299) for seed in range(3)]  # none of them is right
    ((_, evo),) = report.compare([
        *runs, *(run('evo-stage', seed, zeros, (torch.arange(100) >= count) * 299) for seed, count in enumerate((1, 2, 4)))
    ]).values()
    low, high = evo['over_seeds']
    assert ((low + high) / 2, (high - low) / 2) == pytest.approx((7 / 3, 4.3027 * math.sqrt(7 / 3) / math.sqrt(3)), rel=1e-4)
    assert evo['gained'] == pytest.approx(7 / 3)

    generator = torch.Generator().manual_seed(0)
    labels, one, two = torch.randint(300, (3, 500), generator=generator)
    one[:350], two[100:400] = labels[:350], labels[100:400]
    rows = [run('dense', 0, labels, two), run('evo-stage', 0, labels, one)]
    ((_, evo),) = report.compare(rows).values()
    low, high = evo['over_images']
    gained = ((one == labels) & (two != labels)).sum().item()
    lost = ((one != labels) & (two == labels)).sum().item()
    half = 1.96 * math.sqrt(gained + lost - (gained - lost) ** 2 / 500) / 500
    assert 'over_seeds' not in evo
    assert (low + high) / 2 == pytest.approx(100 * (gained - lost) / 500)
    assert (high - low) / 2 == pytest.approx(100 * half, rel=4e-3)
    rows[0]['labels'] = rows[0]['predictions']
    with pytest.raises(ValueError, match='different pictures'):
        report.compare(rows)


@pytest.mark.parametrize('args, message', [
    (['train', 'evo'], 'evo: there are dense, '),
    (['train', 'dense@0.5'], '@RATIO for Evo-ViT'),
    (['train', 'dense', 'levit'], 'one family, DeiT or LeViT, at a time'),
    (['train', 'dense', '--img-size', '33'], '--img-size must be a multiple of 8, got 33'),
    (['train', 'dense', '--data-dir', 'nowhere'], "'nowhere' is no folder"),
])
def test_errors(args, message, capsys):
    with pytest.raises(SystemExit):
        accuracy.main(args)
    assert message in capsys.readouterr().err


def test_figures_in_the_readme():
    """Those in its sentences. test_benchmarks.py compares tables with the results."""
    rows = report.read('accuracy family=deit img_size=32 epochs=25', report.RESULTS)
    (found,) = report.compare(rows).values()
    variants = {v['variant']: v for v in found}
    top1 = {name: f"{statistics.mean(v['top1']):.2f} %" for name, v in variants.items()}
    speed = {name: f"{variants[name]['inference']['speed_up']:.2f}" for name in ('evo-elastic', 'evo-elastic@0.3')}
    lost = -variants['evo-stage']['gained']
    figures = [
        f"{top1['evo-elastic@1']} at keep ratio 1", f"{top1['evo-elastic']} at 0.4", f"{top1['evo-elastic@0.3']} at 0.3",
        f"{speed['evo-elastic']} and {speed['evo-elastic@0.3']} times as fast as the dense model",
        f"half of the blocks has {top1['dense-4-blocks']}", f"smaller pictures {top1['dense-24-pixels']}",
        f"the dense model of the same seed, which has {variants['dense']['top1'][0]:.2f} %", f'{lost:.1f} points are lost']
    readme = ' '.join((ROOT / 'README.md').read_text().split())
    assert [figure for figure in figures if figure not in readme] == []
