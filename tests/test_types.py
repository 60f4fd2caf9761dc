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


@pytest.fixture(scope='module')
def mypy(tmp_path_factory):
    """Output of a strict mypy on a script outside the checkout, with the real types of torch and timm."""
    pytest.importorskip('mypy', reason="needs pip install '.[test]'")
    cwd = tmp_path_factory.mktemp('mypy')
    package = Path(timm_evovit.__file__).parents[1]
    env = dict(os.environ)
    if str(package) not in site.getsitepackages():  # mypy knows nothing of the import hook of an editable install
        env['MYPYPATH'] = str(package)

    def run(script):
        done = subprocess.run(
            [sys.executable, '-m', 'mypy', '--config-file', '', '--strict', '--follow-imports', 'silent', str(script)],
            cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
        assert not done.stderr, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_a_users_script_has_types(mypy):
    assert mypy(SCRIPTS / 'user_script.py').startswith('Success')


@pytest.mark.slow
def test_mistakes_are_found(mypy):
    """A package that is all Any would pass the test above."""
    script = SCRIPTS / 'wrong_script.py'
    wanted = {
        number: comment[1] for number, line in enumerate(script.read_text().splitlines(), 1)
        if (comment := re.search(r'  # (\S+)$', line))}
    found = re.findall(r'wrong_script\.py:(\d+): error: .*\[([\w-]+)\]', mypy(script))
    assert {int(number): code for number, code in found} == wanted
