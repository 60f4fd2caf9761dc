"""What is built and installed: source distribution, wheel, metadata, and the entry point when something is broken."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from importlib.metadata import Distribution, distribution, entry_points, packages_distributions
from pathlib import Path

import pytest

import timm_evovit

ROOT = Path(__file__).parents[1]
MODULES = {'timm_evovit', 'timm_evovit_autoload'}  # top-level names that the wheel installs
BUILD = 'import sys; from setuptools import build_meta; build_meta.{}(sys.argv[1])'


def python(*args, cwd, path=None, **env):
    """Standard output of Python with `args`, with `path` before all others that modules are looked for in."""
    if path is not None:
        env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(path), os.environ.get('PYTHONPATH')]))
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True,
        timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    python('-c', BUILD.format('build_sdist'), out, cwd=tree)
    archive, = out.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter='data')
    return out / archive.name.removesuffix('.tar.gz')


@pytest.fixture(scope='module')
def wheel(sdist, tmp_path_factory):
    """Wheel that is built from the source distribution, unpacked."""
    out = tmp_path_factory.mktemp('wheel')
    python('-c', BUILD.format('build_wheel'), out, cwd=sdist)
    archive, = out.iterdir()
    with zipfile.ZipFile(archive) as files:
        files.extractall(out / 'unpacked')
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
    assert 'timm_evovit' in installed <= MODULES
    assert (wheel / 'timm_evovit' / 'py.typed').is_file()
    sources = {p.relative_to(sdist) for p in (sdist / 'timm_evovit').rglob('*') if p.is_file()}
    assert {p.relative_to(wheel) for p in (wheel / 'timm_evovit').rglob('*') if p.is_file()} == sources


@pytest.mark.slow
def test_wheel_works(wheel, tmp_path):
    """Its own entry points are found, since they come first on the path."""
    out = python('-c', textwrap.dedent('''
        import timm
        model = timm.create_model('evo_deit_small', device='meta')
        import timm_evovit
        print(type(model).__name__, timm_evovit.__file__)
    '''), cwd=tmp_path, path=wheel)
    assert out.split() == ['EvoVisionTransformer', str(wheel / 'timm_evovit' / '__init__.py')]


def test_metadata(metadata, wheel):
    fields = metadata.metadata
    assert fields['Name'] == 'timm-evovit' and fields['Version'] == timm_evovit.__version__
    assert fields['Requires-Python'] == '>=3.10'
    assert 'Typing :: Typed' in fields.get_all('Classifier')
    assert {'convert', 'examples', 'export', 'test'} <= set(fields.get_all('Provides-Extra'))
    groups = {e.group for e in metadata.entry_points}
    assert groups == {'console_scripts', 'timm.models', 'torch.backends'}
    for entry_point in metadata.entry_points:
        module = wheel.joinpath(*entry_point.module.split('.'))
        assert module.with_suffix('.py').is_file() or (module / '__init__.py').is_file(), entry_point


def test_description_has_no_relative_links(metadata):
    """A package index has no files that they could lead to."""
    fields = metadata.metadata
    text = fields.get_payload() or fields['Description']
    assert fields['Description-Content-Type'] == 'text/markdown' and 'evo_deit_small' in text
    links = re.findall(r'\]\(([^)]*)\)|(?:src|href)="([^"]*)"', text)
    assert [link for pair in links for link in pair if link and not link.startswith('https://')] == []


def imports(path):
    """Names of top-level packages that a file imports: when it is imported, and later, in a function."""
    tree = ast.parse(path.read_text())
    later = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        yield from ((name.partition('.')[0], id(node) in later) for name in names)


def test_requires_what_it_imports(metadata, wheel):
    required, optional = set(), set()
    for requirement in metadata.requires:
        name = re.match(r'[\w.-]+', requirement)[0].lower().replace('_', '-')
        (optional if 'extra ==' in requirement else required).add(name)
    distributions = packages_distributions()
    for path in wheel.rglob('*.py'):
        for name, in_function in imports(path):
            if name in sys.stdlib_module_names or name in MODULES:
                continue
            names = {d.lower().replace('_', '-') for d in distributions.get(name, [name])}
            assert names & (required | optional if in_function else required), f'{path.name} imports {name}'


def test_what_is_tested_is_what_is_installed():
    """After a plain `pip install .`: no file was edited or left behind by an earlier build since."""
    installed = distribution('timm-evovit')
    if json.loads(installed.read_text('direct_url.json') or '{}').get('dir_info', {}).get('editable'):
        pytest.skip('timm-evovit is installed as editable, so its files are those of a checkout')
    files = {f.as_posix(): f.read_text() for f in installed.files if f.parts[0] == 'timm_evovit' and f.suffix == '.py'}
    package = Path(timm_evovit.__file__).parent
    for tree in (package, ROOT / 'timm_evovit'):
        here = {p.relative_to(tree.parent).as_posix(): p.read_text() for p in tree.rglob('*.py')}
        assert here == files, f'{tree} is not what is installed: pip install again'


def autoload_entry_point():
    entry_point, = entry_points(group='torch.backends', name='timm_evovit')
    return entry_point


FAILURES = {
    'error': 'raise RuntimeError("as broken as can be")',
    'missing dependency': 'import as_broken_as_can_be',
    'syntax': 'as broken as can be',
    'exit': 'raise SystemExit("as broken as can be")',
    'other': 'class Stop(BaseException): pass\nraise Stop("as broken as can be")',
}


@pytest.mark.slow
@pytest.mark.parametrize('failure, code', [
    ('error', 'import torch, timm'),
    ('error', 'from timm.models import resnet'),
    ('missing dependency', 'import timm'),
    ('syntax', 'import timm'),
    ('exit', 'import timm'),
    ('other', 'import timm'),
])
def test_a_package_that_cannot_be_imported_costs_warnings(failure, code, tmp_path):
    """torch and timm work as if it were not installed; each of its entry points warns once."""
    (tmp_path / 'timm_evovit').mkdir()
    (tmp_path / 'timm_evovit' / '__init__.py').write_text(FAILURES[failure])
    out = python('-c', textwrap.dedent(f'''
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            {code}
        import timm, torch
        print(timm.is_model('resnet18'), timm.is_model('evo_deit_small'), torch.ones(2).sum().item())
        ours = [str(w.message) for w in caught if 'timm_evovit' in str(w.message)]
        print(len(ours), len(set(ours)))
    '''), cwd=tmp_path, path=tmp_path)
    works, warned = out.splitlines()
    assert works == 'True False 2.0'
    plugins = [e for e in entry_points(group='timm.models') if e.module.startswith('timm_evovit')]
    assert warned == f'{len(plugins)} {len(plugins)}'


@pytest.mark.parametrize('error', ['RuntimeError', 'SystemExit', 'Stop'])
@pytest.mark.parametrize('broken', [
    'import timm.models; importlib.metadata.entry_points = fail',
    'sys.meta_path = Broken(sys.meta_path)',
])
def test_nothing_that_fails_in_the_entry_point_reaches_torch(broken, error, tmp_path):
    """A list of plugins that cannot be read; a list of import hooks that takes no other."""
    (tmp_path / 'timm').mkdir()  # an empty one: these processes need neither torch nor a model
    (tmp_path / 'timm' / '__init__.py').touch()
    (tmp_path / 'timm' / 'models.py').touch()
    out = python('-c', textwrap.dedent(f'''
        import importlib, importlib.metadata, sys, warnings

        class Stop(BaseException):
            pass

        def fail(*args, **kwargs):
            raise {error}('as broken as can be')

        class Broken(list):
            insert = append = __setitem__ = fail

        {broken}
        module = importlib.import_module({autoload_entry_point().module!r})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            module.{autoload_entry_point().attr}()
        print(*(str(w.message) for w in caught), sep=chr(10))
    '''), cwd=tmp_path, path=tmp_path)
    warned, = out.splitlines()
    assert error in warned and 'as broken as can be' in warned


@pytest.mark.parametrize('models, expected', [
    ({'timm/models.py': 'import timm.other', 'timm/other.py': ''}, ['complete']),
    ({'timm/models/': ''}, []), ({}, ['ModuleNotFoundError'])])
def test_timm_in_a_zip_file(models, expected, tmp_path):
    """One loader serves all of its modules. Plugins are loaded once, after timm.models, not after what that imports."""
    with zipfile.ZipFile(tmp_path / 'timm.zip', 'w') as file:
        for name, text in {'timm/__init__.py': '', **models}.items():
            file.writestr(name, text)
    out = python('-c', textwrap.dedent(f'''
        import importlib, sys, types
        sys.path.insert(0, 'timm.zip')
        module = importlib.import_module({autoload_entry_point().module!r})
        state = lambda: print('complete' if hasattr(sys.modules['timm.models'], 'timm') else 'too early')
        module.entry_points = lambda group: [types.SimpleNamespace(name='plugin', value='module', load=state)]
        module.{autoload_entry_point().attr}()
        module.{autoload_entry_point().attr}()  # as where an installation is registered twice
        try:
            import timm.models
        except Exception as e:
            print(type(e).__name__)
    '''), cwd=tmp_path)
    assert out.split() == expected


@pytest.mark.slow
def test_a_warning_that_is_an_error_does_not_reach_torch(tmp_path):
    (tmp_path / 'timm_evovit').mkdir()
    (tmp_path / 'timm_evovit' / '__init__.py').write_text(FAILURES['error'])
    out = python('-W', 'error::UserWarning', '-c', 'import torch, timm.models; print(timm.is_model("resnet18"))',
                 cwd=tmp_path, path=tmp_path)
    assert out.strip() == 'True'


@pytest.mark.slow
def test_a_checkout_that_was_moved(tmp_path):
    """Code that is gone cannot guard itself: what CONTRIBUTING.md says of editable installs."""
    info = tmp_path / 'moved_plugin-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: moved-plugin\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text('[torch.backends]\nmoved = moved_plugin:autoload\n')
    out = python('-c', textwrap.dedent('''
        try:
            import torch
        except RuntimeError as e:
            print('moved' in str(e))
    '''), cwd=tmp_path, path=tmp_path)
    assert out.strip() == 'True'
    python('-c', 'import torch', cwd=tmp_path, path=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
