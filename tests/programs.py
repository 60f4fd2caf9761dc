"""Running the repository's programs and timm's scripts in processes of their own, and the images that they take."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES, BENCHMARKS = ROOT / 'examples', ROOT / 'benchmarks'
TIMM_REPO = Path(os.environ.get('TIMM_REPO', '')).resolve()
needs_timm_repo = pytest.mark.skipif(
    'TIMM_REPO' not in os.environ, reason="timm's scripts are only in its repository, set TIMM_REPO to a checkout")


def run_python(*args, cwd, fails=False, **env):
    """Standard output and error of a Python process; it must end without an error, or with one.

    PYTHONPATH is put in front of what there is.
    """
    if 'PYTHONPATH' in env:
        env['PYTHONPATH'] = os.pathsep.join(filter(None, (env['PYTHONPATH'], os.environ.get('PYTHONPATH'))))
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=1500,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **env})  # as many tests run at once as there are cores
    assert (done.returncode != 0) == fails, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout, done.stderr


def run(script, *args, **kwargs):
    """Output of a program, standard error last."""
    return ''.join(run_python(script, *args, **kwargs))


def write_digits(root, per_class=None):
    """scikit-learn's digits as root/{train,validation}/{0..9}/*.png, every fifth for validation."""
    datasets = pytest.importorskip('sklearn.datasets', reason="the examples need pip install -e '.[examples]'")
    digits = datasets.load_digits()
    for label in range(10):
        for i, j in enumerate(np.flatnonzero(digits.target == label)[:per_class]):
            path = root / ('train' if i % 5 else 'validation') / str(label) / f'{j:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[j] * (255 / 16)).astype(np.uint8)).save(path)
    return root
