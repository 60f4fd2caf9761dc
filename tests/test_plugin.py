"""How timm finds the models, each way in a process of its own."""
from importlib.metadata import entry_points, version

import pytest
from helpers import SCRIPTS, run_python

import timm_evovit

CREATE = "m = timm.create_model('evo_deit_small', device='meta'); print(type(m).__name__, len(m.blocks))"


@pytest.mark.slow
@pytest.mark.parametrize('code', [
    'import timm',
    'from timm.models import create_model; import timm',
    'import torch; from timm.models import create_model; import timm',
    'from timm.models.vision_transformer import VisionTransformer; import timm',
    'import timm_evovit, timm',
    'import timm, timm_evovit',
    'from timm_evovit import EvoVisionTransformer; import timm',
    'from timm_evovit import evolve; import timm',
    'import timm_evovit.evo_vit, timm',
    'import torch, timm_evovit.hub, timm',
    'import torch, timm_evovit.training, timm',
    'import timm_evovit.evo_levit, timm',
    'import timm_evovit_autoload, timm; timm_evovit_autoload.autoload()',
])
def test_found_whatever_is_imported_first(code, tmp_path):
    out, err = run_python('-c', f'{code}; {CREATE}', cwd=tmp_path)
    assert out.split() == ['EvoVisionTransformer', '12']
    assert 'Overwriting' not in err and 'Warning' not in err


def test_found_by_an_ordinary_import(tmp_path):
    out, _ = run_python('-c', f'import timm; {CREATE}', cwd=tmp_path)
    assert out.split() == ['EvoVisionTransformer', '12']


@pytest.mark.slow
def test_a_pickle_may_be_the_first_to_ask(tmp_path):
    out, err = run_python(SCRIPTS / 'pickle_first.py', cwd=tmp_path)
    assert out.split() == ['True', 'True'] and 'Warning' not in err


def test_listed_by_name_and_module():
    import timm
    names = timm.list_models('evo_deit*')
    assert set(names) == set(timm.list_models(module='evo_deit')) == {
        'evo_deit_tiny', 'evo_deit_small', 'evo_deit_base',
        'evo_deit_tiny_patch16_224', 'evo_deit_small_patch16_224', 'evo_deit_base_patch16_224',
        'evo_deit_small_patch16_384', 'evo_deit_base_patch16_384'}
    if hasattr(timm.models, 'list_modules'):
        assert {'evo_deit', 'evo_levit'} <= set(timm.models.list_modules())


@pytest.mark.slow
def test_found_in_a_spawned_loader_worker(tmp_path):
    assert run_python(SCRIPTS / 'spawned_worker.py', cwd=tmp_path)[0].strip() == '8'


@pytest.mark.slow
@pytest.mark.parametrize('code, expected', [
    ("import timm; print(timm.list_models('evo_*')); import timm_evovit; print(timm.is_model('evo_deit_small'))",
     ['[]', 'True']),
    ("import timm_evovit, timm; print(timm.is_model('evo_deit_small'))", ['True']),
])
def test_without_autoload_the_import_registers(code, expected, tmp_path):
    out, err = run_python('-c', code, cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert out.split() == expected and 'Warning' not in err


def test_torch_alone_stays_alone(tmp_path):
    out, _ = run_python(
        '-c', 'import sys, torch; print({"timm", "timm_evovit", "torchvision"} & {*sys.modules})', cwd=tmp_path)
    assert out.strip() == 'set()'


@pytest.mark.slow
def test_a_broken_plugin_costs_one_warning(tmp_path):
    (tmp_path / 'broken_plugin.py').write_text('raise RuntimeError("as broken as can be")')
    info = tmp_path / 'broken_plugin-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text('[timm.models]\nbroken = broken_plugin\n')
    out, _ = run_python(SCRIPTS / 'beside_broken_plugin.py', cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert out.split() == ['True', 'True']


@pytest.mark.slow
def test_an_import_of_timm_that_fails_is_timms_own_error(tmp_path):
    fake = tmp_path / 'timm'
    fake.mkdir()
    (fake / '__init__.py').write_text('import torch\nfrom . import models')
    (fake / 'models.py').write_text('raise ImportError("timm itself is broken")')
    out, err = run_python(SCRIPTS / 'broken_timm.py', cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert out.strip() == 'timm itself is broken' and 'plugin' not in err


def test_installed_metadata():
    assert version('timm-evovit') == timm_evovit.__version__
    assert 'timm_evovit' in {e.name for e in entry_points(group='torch.backends')}
    assert {'evo_deit', 'evo_levit'} <= {e.name for e in entry_points(group='timm.models')}
