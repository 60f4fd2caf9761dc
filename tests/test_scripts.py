"""timm's own scripts, unmodified, and the examples.

train.py and validate.py are in timm's repository, not in its package: set TIMM_REPO to a checkout of it.
"""
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / 'examples'
needs_timm_repo = pytest.mark.skipif(
    'TIMM_REPO' not in os.environ, reason="timm's scripts are only in its repository, set TIMM_REPO to a checkout")
SMALL = ['img_size=32', 'patch_size=4', 'embed_dim=48', 'num_heads=3', 'depth=6']


def run(script, *args, cwd):
    done = subprocess.run(
        [sys.executable, str(script), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=1500,
        env={**os.environ, 'OMP_NUM_THREADS': '1'})  # as many tests run at once as there are cores
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    pytest.importorskip('sklearn', reason="the examples need pip install -e '.[examples]'")
    sys.path.insert(0, str(EXAMPLES))
    try:
        from quickstart import write_digits
    finally:
        sys.path.remove(str(EXAMPLES))
    root = write_digits(tmp_path_factory.mktemp('digits'))
    assert sum(1 for _ in root.glob('train/*/*.png')) == 1437 and sum(1 for _ in root.glob('validation/*/*.png')) == 360
    return root


@needs_timm_repo
@pytest.mark.parametrize('extra', [(), ('selection=layer', 'representative_token=True', 'keep_ratio=0.7')])
def test_train_validate_resume(digits, tmp_path, extra):
    repo = Path(os.environ['TIMM_REPO'])
    common = [
        '--model', 'evo_deit_tiny_patch16_224', '--model-kwargs', *SMALL, *extra, '--data-dir', digits,
        '--num-classes', 10, '--img-size', 32, '-b', 64, '--device', 'cpu', '--workers', 1]
    train = [*common, '--lr', 1e-3, '--warmup-epochs', 0, '--output', tmp_path, '--experiment', 'run']
    log = run(repo / 'train.py', *train, '--epochs', 2, cwd=tmp_path)
    assert 'evo_deit_tiny_patch16_224 created' in log
    checkpoint = tmp_path / 'run' / 'last.pth.tar'
    with open(tmp_path / 'run' / 'summary.csv') as f:
        rows = list(csv.DictReader(f))
    assert [row['epoch'] for row in rows] == ['0', '1'] and float(rows[1]['train_loss']) < float(rows[0]['train_loss'])
    log = run(repo / 'validate.py', *common, '--checkpoint', checkpoint, cwd=tmp_path)
    top1 = float(re.search(r'\* Acc@1 ([\d.]+)', log).group(1))
    assert top1 == pytest.approx(float(rows[1]['eval_top1']), abs=0.01)
    log = run(repo / 'train.py', *train[:-1], 'resumed', '--epochs', 3, '--resume', checkpoint, cwd=tmp_path)
    assert "Loaded checkpoint" in log and 'Train: 2' in log and 'Train: 1' not in log


def test_quickstart(tmp_path):
    """One epoch of it; what a whole run reaches is in the README."""
    pytest.importorskip('sklearn', reason="the examples need pip install -e '.[examples]'")
    from PIL import Image
    log = run(EXAMPLES / 'quickstart.py', '--epochs', 1, '--batch-size', 128, '--output', tmp_path / 'out', cwd=tmp_path)
    result = json.loads((tmp_path / 'out' / 'result.json').read_text())
    assert len(result['models']) == 2 and result['validation_images'] == 360
    for name, r in result['models'].items():
        assert f"{r['top1']:.2f}" in log and name in log
        assert 0 <= r['top1'] <= 100 and r['images_per_second'] > 0
        assert (tmp_path / 'out' / f'{name}.pth').exists()
    picture = Image.open(tmp_path / 'out' / 'informative_tokens.png').convert('RGB')
    assert picture.width > 600 and len(picture.getcolors(1 << 24)) > 100


def test_benchmark(tmp_path):
    path = tmp_path / 'figures.json'
    log = run(
        EXAMPLES / 'benchmark.py', 'deit_tiny_patch16_224', 'evo_deit_tiny', '-b', 1, '--img-size', 64, '--rounds', 3,
        '--warmup', 0, '--seconds', 0, '--json', path, cwd=tmp_path)
    report = json.loads(path.read_text())
    dense, evo = report['models'].values()
    assert dense['speed_up'] == 1 and len(evo['seconds']) == 3 and 'evo_deit_tiny' in log
    assert evo['params'] == 5_910_800 - (196 - 16) * 192  # a shorter position embedding
    assert 1.3 < evo['gmacs_ratio'] < 1.6


def test_benchmark_counts_the_papers_multiply_adds():
    """method: DeiT-S 4.599 G, Evo-DeiT-S 3.034 G."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import benchmark
    finally:
        sys.path.remove(str(EXAMPLES))
    args = benchmark.parse_args(['deit_small_patch16_224', 'evo_deit_small'])
    assert [round(benchmark.multiply_adds(name, args) / 1e9, 3) for name in args.models] == [4.599, 3.034]
