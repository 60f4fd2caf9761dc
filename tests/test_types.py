"""Types of the public names, as mypy shows them to a user of the installed package."""
import os
import re
import site
import subprocess
import sys
from pathlib import Path

import pytest

import timm_evovit

SCRIPTS = Path(__file__).parent / 'typing'


@pytest.mark.slow
def test_a_users_script_has_types_and_mistakes_are_found(tmp_path):
    """By a strict mypy outside the checkout, with the real types of torch and timm. A package that is all Any would
    leave both scripts without errors.
    """
    pytest.importorskip('mypy', reason="needs pip install '.[test]'")
    package, env = Path(timm_evovit.__file__).parents[1], dict(os.environ)
    if str(package) not in site.getsitepackages():  # mypy knows nothing of the import hook of an editable install
        env['MYPYPATH'] = str(package)
    done = subprocess.run(
        [sys.executable, '-m', 'mypy', '--config-file', '', '--strict', '--follow-imports', 'silent',
         *map(str, sorted(SCRIPTS.glob('*.py')))], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert not done.stderr, done.stderr
    wanted = [
        ('wrong_script.py', str(number), comment[1])
        for number, line in enumerate((SCRIPTS / 'wrong_script.py').read_text().splitlines(), 1)
        if (comment := re.search(r'  # (\S+)$', line))]
    assert wanted and re.findall(r'(\w+\.py):(\d+): error: .*\[([\w-]+)\]', done.stdout) == wanted, done.stdout
