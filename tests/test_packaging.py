"""What is built and installed: source distribution, wheel, metadata, types."""
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import Distribution, packages_distributions

import pytest
from programs import ROOT, run_python

MODULES = {'timm_evovit', 'timm_evovit_autoload'}  # top-level names that the wheel installs
BUILD = 'import sys; from setuptools import build_meta; build_meta.{}(sys.argv[1])'


def source_files():
    """Files of the source tree: those that git tracks, or all of them in an unpacked source distribution."""
    if (ROOT / '.git').exists() and shutil.which('git'):
        names = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return sorted(name for name in names.split('\0') if name and (ROOT / name).is_file())
    made = re.compile(r'(^|/)(__pycache__|\.\w+_cache|\.hypothesis|build|dist|output|venv|[^/]+\.egg-info)/')
    names = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob('*') if path.is_file())
    return sorted(name for name in names if not made.search(name) and name not in ('PKG-INFO', 'setup.cfg.orig'))


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    """Source distribution, unpacked."""
    tree, out = tmp_path_factory.mktemp('tree'), tmp_path_factory.mktemp('sdist')
    for name in source_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    run_python('-c', BUILD.format('build_sdist'), out, cwd=tree)
    archive, = out.iterdir()
    shutil.unpack_archive(archive, out, filter='data')
    return out / archive.name.removesuffix('.tar.gz')


@pytest.fixture(scope='module')
def wheel(sdist, tmp_path_factory):
    """Wheel that is built from the source distribution, unpacked."""
    out = tmp_path_factory.mktemp('wheel')
    run_python('-c', BUILD.format('build_wheel'), out, cwd=sdist)
    archive, = out.iterdir()
    shutil.unpack_archive(archive, out / 'unpacked', 'zip')
    return out / 'unpacked'


@pytest.fixture(scope='module')
def metadata(wheel):
    return Distribution.at(next(wheel.glob('*.dist-info')))


def test_sdist_holds_the_whole_tree(sdist):
    missing = [name for name in source_files() if not (sdist / name).is_file()]
    assert [name for name in missing if not name.startswith('.git')] == []
    assert not list(sdist.rglob('*.pyc'))


def test_wheel_holds_the_package_only(wheel, sdist):
    installed = {path.name.removesuffix('.py') for path in wheel.iterdir() if path.suffix != '.dist-info'}
    assert installed == MODULES
    assert (wheel / 'timm_evovit' / 'py.typed').is_file()
    sources = {p.relative_to(sdist) for p in (sdist / 'timm_evovit').rglob('*') if p.is_file()}
    assert {p.relative_to(wheel) for p in (wheel / 'timm_evovit').rglob('*') if p.is_file()} == sources


@pytest.mark.slow
def test_wheel_works(wheel, tmp_path):
    """Its own entry points are found, since they come first on the path."""
    out, _ = run_python('-c', textwrap.dedent('''
        import timm
        model = timm.create_model('evo_deit_small', device='meta')
        import timm_evovit
        print(type(model).__name__, timm_evovit.__file__)
    '''), cwd=tmp_path, PYTHONPATH=str(wheel))
    assert out.split() == ['EvoVisionTransformer', str(wheel / 'timm_evovit' / '__init__.py')]


@pytest.mark.slow
def test_a_users_script_has_types_and_mistakes_are_found(wheel, tmp_path):
    """By a strict mypy, with the real types of torch and timm. A package that is all Any would have no mistakes."""
    pytest.importorskip('mypy', reason="needs pip install '.[test]'")
    script = ROOT / 'tests' / 'typing' / 'user_script.py'
    out, err = run_python('-m', 'mypy', '--config-file', '', '--strict', '--follow-imports', 'silent', script,
                          cwd=tmp_path, fails=True, PYTHONPATH=str(wheel))
    lines = enumerate(script.read_text().splitlines(), 1)
    wanted = [(str(number), comment[1]) for number, line in lines if (comment := re.search(r'  # (\S+)$', line))]
    assert re.findall(r'\.py:(\d+): error: .*\[([\w-]+)\]', out) == wanted and not err, out + err


def test_description_has_no_relative_links(metadata):
    """A package index has no files that they could lead to."""
    fields = metadata.metadata
    text = fields.get_payload() or fields['Description']
    assert fields['Description-Content-Type'] == 'text/markdown' and 'evo_deit_small' in text
    links = re.findall(r'\]\(([^)]*)\)|(?:src|href)="([^"]*)"', text)
    assert [link for pair in links for link in pair if link and not link.startswith('https://')] == []


def test_requires_what_it_imports(metadata, wheel):
    """Extras where a function imports it."""
    required, optional = set(), set()
    for requirement in metadata.requires:
        name = re.match(r'[\w.-]+', requirement)[0].lower().replace('_', '-')
        (optional if 'extra ==' in requirement else required).add(name)
    distributions = packages_distributions()
    for path in wheel.rglob('*.py'):
        for in_function, name in re.findall(r'^( *)(?:import|from) (\w+)', path.read_text(), re.MULTILINE):
            if name in sys.stdlib_module_names or name in MODULES:
                continue
            names = {d.lower().replace('_', '-') for d in distributions.get(name, [name])}
            assert names & (required | optional if in_function else required), f'{path.name} imports {name}'
