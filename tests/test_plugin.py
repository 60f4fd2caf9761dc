"""How timm finds the models, each way in a process of its own."""
import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points, version

import pytest

import timm_evovit


def run(code, tmp_path, **env):
    """Standard output and error of a Python process that runs `code` outside the checkout."""
    script = tmp_path / 'script.py'
    script.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


CREATE = "m = create_model('evo_deit_small', device='meta'); print(type(m).__name__, len(m.blocks))"


@pytest.mark.parametrize('code', [
    f'import timm; from timm import create_model; {CREATE}',
    f'from timm.models import create_model; {CREATE}',
    f'import torch; from timm.models import create_model; {CREATE}',
    f'from timm.models.vision_transformer import VisionTransformer; from timm import create_model; {CREATE}',
    f'import timm_evovit; from timm import create_model; {CREATE}',
    f'import timm, timm_evovit; from timm import create_model; {CREATE}',
    f'from timm_evovit import EvoVisionTransformer; from timm import create_model; {CREATE}',
    f'from timm_evovit import evolve; from timm import create_model; {CREATE}',
    f'import timm_evovit.evo_vit; from timm import create_model; {CREATE}',
    f'import torch, timm_evovit.hub; from timm import create_model; {CREATE}',
    f'import torch, timm_evovit.training; from timm import create_model; {CREATE}',
    f'import timm_evovit.evo_levit; from timm import create_model; {CREATE}',
    f'import timm_evovit_autoload, timm; timm_evovit_autoload.autoload(); from timm import create_model; {CREATE}',
])
def test_found_whatever_is_imported_first(code, tmp_path):
    out, err = run(code, tmp_path)
    assert out.split() == ['EvoVisionTransformer', '12']
    assert 'Overwriting' not in err and 'Warning' not in err


def test_a_pickle_may_be_the_first_to_ask(tmp_path):
    out, err = run('''
        import subprocess, sys, torch
        if len(sys.argv) == 1:
            import timm, timm_evovit
            model = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=3, num_classes=2)
            torch.save(timm_evovit.evolve(model), 'model.pt')
            sys.exit(subprocess.run([sys.executable, __file__, 'load']).returncode)
        model = torch.load('model.pt', weights_only=False)
        import timm, timm_evovit.evo_vit
        assert type(model) is timm_evovit.evo_vit.EvolvedVisionTransformer
        assert timm_evovit.evo_vit.__spec__.origin.endswith('evo_vit.py')
        print(timm.is_model('evo_deit_small'), timm.is_model('evo_levit_256'))
    ''', tmp_path)
    assert out.split() == ['True', 'True'] and 'Warning' not in err


def test_listed_by_name_and_module(tmp_path):
    out, _ = run('''
        import timm
        names = timm.list_models('evo_deit*')
        assert set(names) == set(timm.list_models(module='evo_deit')), names
        assert 'evo_deit' in timm.models.list_modules() if hasattr(timm.models, 'list_modules') else True
        print(*names)
    ''', tmp_path)
    assert set(out.split()) == {
        'evo_deit_tiny', 'evo_deit_small', 'evo_deit_base',
        'evo_deit_tiny_patch16_224', 'evo_deit_small_patch16_224', 'evo_deit_base_patch16_224',
        'evo_deit_small_patch16_384', 'evo_deit_base_patch16_384'}


def test_found_in_a_spawned_loader_worker(tmp_path):
    out, _ = run('''
        import torch

        class Names(torch.utils.data.Dataset):
            def __len__(self):
                return 1

            def __getitem__(self, index):
                import timm
                return len(timm.list_models('evo_deit*'))

        if __name__ == '__main__':
            loader = torch.utils.data.DataLoader(Names(), num_workers=1, multiprocessing_context='spawn')
            print(int(next(iter(loader))))
    ''', tmp_path)
    assert out.strip() == '8'


def test_without_autoload_the_import_registers(tmp_path):
    out, err = run('''
        import timm
        print(len(timm.list_models('evo_*')) == 0)
        import timm_evovit
        print(timm.is_model('evo_deit_small'))
    ''', tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert out.split() == ['True', 'True'] and 'Warning' not in err
    out, _ = run('''
        import timm_evovit
        import timm
        print(timm.is_model('evo_deit_small'))
    ''', tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert out.strip() == 'True'


def test_torch_alone_stays_alone(tmp_path):
    out, _ = run('''
        import sys
        import torch
        print([m for m in ('timm', 'timm.models', 'timm_evovit.evo_deit', 'torchvision') if m in sys.modules])
    ''', tmp_path)
    assert out.strip() == '[]'


def test_a_broken_plugin_costs_one_warning(tmp_path):
    (tmp_path / 'broken_plugin.py').write_text('raise RuntimeError("as broken as can be")')
    info = tmp_path / 'broken_plugin-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text('[timm.models]\nbroken = broken_plugin\n')
    out, err = run('''
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            import timm
        ours = [str(w.message) for w in caught if 'plugin' in str(w.message)]
        assert len(ours) == 1 and 'broken' in ours[0] and 'as broken as can be' in ours[0], ours
        print(timm.is_model('resnet18'), timm.is_model('evo_deit_small'))
    ''', tmp_path, PYTHONPATH=str(tmp_path))
    assert out.split() == ['True', 'True']


def test_an_import_of_timm_that_fails_is_timms_own_error(tmp_path):
    fake = tmp_path / 'timm'
    fake.mkdir()
    (fake / '__init__.py').write_text('import torch\nfrom . import models')
    (fake / 'models.py').write_text('raise ImportError("timm itself is broken")')
    out, err = run('''
        try:
            import timm
        except ImportError as e:
            print(e)
    ''', tmp_path)
    assert out.strip() == 'timm itself is broken' and 'plugin' not in err


def test_installed_metadata():
    assert version('timm-evovit') == timm_evovit.__version__
    names = {e.name for e in entry_points(group='torch.backends')}
    assert 'timm_evovit' in names
    assert 'evo_deit' in {e.name for e in entry_points(group='timm.models')}
