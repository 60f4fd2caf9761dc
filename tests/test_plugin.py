"""How timm finds the models, each way in a process of its own, and what a plugin that fails costs."""
import textwrap
import zipfile
from importlib.metadata import entry_points

import pytest
import timm
import torch
from programs import run_python

from timm_evovit import evolve

CREATE = "m = timm.create_model('evo_deit_small', device='meta'); print(type(m).__name__, len(m.blocks))"


@pytest.mark.parametrize('code', ['import timm', *(pytest.param(code, marks=pytest.mark.slow) for code in (
    'from timm.models.vision_transformer import VisionTransformer; import timm',
    'import timm_evovit, timm',
    'import timm_evovit_autoload, timm; timm_evovit_autoload.autoload()',
    'import torch; torch.load("model.pt", weights_only=False); import timm',  # unpickling is the first to ask for timm
))])
def test_found_whatever_is_imported_first(code, tmp_path):
    torch.save(evolve(timm.create_model('vit_tiny_patch16_224', img_size=32, depth=3)), tmp_path / 'model.pt')
    out, err = run_python('-c', f'{code}; {CREATE}', cwd=tmp_path)
    assert out.split() == ['EvoVisionTransformer', '12']
    assert 'Overwriting' not in err and 'Warning' not in err


def test_listed_by_name_and_module():
    names = timm.list_models('evo_deit*')
    assert 'evo_deit_small' in names and set(names) == set(timm.list_models(module='evo_deit'))
    if hasattr(timm.models, 'list_modules'):
        assert {'evo_deit', 'evo_levit'} <= set(timm.models.list_modules())


@pytest.mark.slow
def test_without_autoload_the_import_registers(tmp_path):
    out, err = run_python('-c', textwrap.dedent('''
        import timm
        print(timm.list_models('evo_*'))
        import timm_evovit
        print(timm.is_model('evo_deit_small'))
    '''), cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert out.split() == ['[]', 'True'] and 'Warning' not in err


def test_torch_alone_stays_alone(tmp_path):
    out, _ = run_python(
        '-c', 'import sys, torch; print({"timm", "timm_evovit", "torchvision"} & {*sys.modules})', cwd=tmp_path)
    assert out.strip() == 'set()'


# What fails

@pytest.mark.slow
@pytest.mark.parametrize('plugin', ['timm_evovit', 'other_plugin'])
def test_a_plugin_that_cannot_be_imported_costs_warnings(plugin, tmp_path):
    """torch and timm work as if it were not installed; each of its entry points warns once."""
    (tmp_path / f'{plugin}.py').write_text('raise RuntimeError("as broken as can be")')
    info = tmp_path / 'other_plugin-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: other-plugin\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text('[timm.models]\nother = other_plugin\n' if plugin == 'other_plugin' else '')
    out, _ = run_python('-c', textwrap.dedent(f'''
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            import torch, timm
        print(timm.is_model('resnet18'), timm.is_model('evo_deit_small'), torch.ones(2).sum().item())
        ours = [str(w.message) for w in caught if 'as broken as can be' in str(w.message)]
        print(len(ours), len(set(ours)), all('{plugin}' in message for message in ours))
    '''), cwd=tmp_path, PYTHONPATH=str(tmp_path))
    count = 1 if plugin == 'other_plugin' else len(
        [e for e in entry_points(group='timm.models') if e.module.startswith('timm_evovit')])
    assert out.splitlines() == [f'True {count == 1} 2.0', f'{count} {count} True']


AUTOLOAD, = entry_points(group='torch.backends', name='timm_evovit')


def test_plugins_that_cannot_be_listed_cost_a_warning(monkeypatch):
    def fail(group):
        raise ImportError('as broken as can be')

    autoload = AUTOLOAD.load()
    monkeypatch.setitem(autoload.__globals__, 'entry_points', fail)
    with pytest.warns(UserWarning, match='ImportError.*as broken as can be'):
        autoload()


@pytest.mark.parametrize('models, expected', [
    ({'timm/models.py': 'import timm.other', 'timm/other.py': ''}, ['complete']),
    ({'timm/models.py': 'raise ImportError'}, ['ImportError']), ({'timm/models/': ''}, []), ({}, ['ModuleNotFoundError'])])
def test_timm_in_a_zip_file(models, expected, tmp_path):
    """One loader serves all of its modules. Plugins are loaded once, after timm.models, not after what that imports,
    and an import that fails is timm's own error.
    """
    with zipfile.ZipFile(tmp_path / 'timm.zip', 'w') as file:
        for name, text in {'timm/__init__.py': '', **models}.items():
            file.writestr(name, text)
    out, _ = run_python('-c', textwrap.dedent(f'''
        import importlib, sys, types
        sys.path.insert(0, 'timm.zip')
        module = importlib.import_module({AUTOLOAD.module!r})
        state = lambda: print('complete' if hasattr(sys.modules['timm.models'], 'timm') else 'too early')
        module.entry_points = lambda group: [types.SimpleNamespace(name='plugin', value='module', load=state)]
        module.{AUTOLOAD.attr}()
        module.{AUTOLOAD.attr}()  # as where an installation is registered twice
        try:
            import timm.models
        except Exception as e:
            print(type(e).__name__)
    '''), cwd=tmp_path)
    assert out.split() == expected
