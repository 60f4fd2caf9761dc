"""timm's own scripts, unmodified, and the examples.

train.py and validate.py are in timm's repository, not in its package: set TIMM_REPO to a checkout of it.
"""
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

EXAMPLES = Path(__file__).parent.parent / 'examples'
RECIPES = sorted((EXAMPLES / 'recipes').glob('*.yaml'))
REPO = Path(os.environ.get('TIMM_REPO', '')).resolve()
needs_timm_repo = pytest.mark.skipif(
    'TIMM_REPO' not in os.environ, reason="timm's scripts are only in its repository, set TIMM_REPO to a checkout")
TRAIN_PY = {  # arguments of train.py that a recipe may set
    'aa', 'amp', 'aug_repeats', 'batch_size', 'clip_grad', 'clip_mode', 'cutmix', 'drop_path', 'epochs',
    'kd_distill_type', 'kd_model_name', 'kd_token_distill_type', 'lr_base', 'lr_base_scale', 'lr_base_size', 'min_lr',
    'mixup', 'model', 'model_ema', 'model_ema_decay', 'model_kwargs', 'opt', 'recount', 'remode', 'reprob', 'sched',
    'smoothing', 'task_loss_weight', 'train_interpolation', 'warmup_epochs', 'warmup_lr', 'weight_decay'}
SMALL = ['img_size=32', 'patch_size=4', 'embed_dim=48', 'num_heads=3', 'depth=6']
LEARN = [  # what makes such a model learn something in four epochs
    '--opt', 'adamw', '--lr', 1e-3, '-b', 16, '--scale', 0.8, 1, '--hflip', 0, '--warmup-epochs', 0]


def run(script, *args, cwd, **env):
    done = subprocess.run(
        [sys.executable, str(script), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=1500,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **env})  # as many tests run at once as there are cores
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
@pytest.mark.parametrize('extra', [
    (), ('selection=layer', 'representative_token=True', 'keep_ratio=0.7'), ('layer_to_stage_epochs=2',)])
def test_train_validate_resume(digits, tmp_path, extra):
    common = [
        '--model', 'evo_deit_tiny_patch16_224', '--model-kwargs', *SMALL, 'weight_init=jax', *extra, '--data-dir', digits,
        '--num-classes', 10, '--img-size', 32, '--device', 'cpu', '--workers', 1]
    train = [*common, *LEARN, '--output', tmp_path, '--experiment', 'run']
    log = run(REPO / 'train.py', *train, '--epochs', 4, cwd=tmp_path)
    assert 'evo_deit_tiny_patch16_224 created' in log
    checkpoint = tmp_path / 'run' / 'last.pth.tar'
    with open(tmp_path / 'run' / 'summary.csv') as f:
        rows = list(csv.DictReader(f))
    assert [row['epoch'] for row in rows] == ['0', '1', '2', '3']
    assert float(rows[3]['train_loss']) < float(rows[0]['train_loss']) - 0.1
    log = run(REPO / 'validate.py', *common, '--checkpoint', checkpoint, cwd=tmp_path)
    top1 = float(re.search(r'\* Acc@1 ([\d.]+)', log).group(1))
    assert top1 == pytest.approx(float(rows[3]['eval_top1']), abs=0.01)
    log = run(REPO / 'train.py', *train[:-1], 'resumed', '--epochs', 5, '--resume', checkpoint, cwd=tmp_path)
    assert "Loaded checkpoint" in log and 'Train: 4' in log and 'Train: 3' not in log
    if 'layer_to_stage_epochs=2' in extra:
        states = [torch.load(tmp_path / run / 'last.pth.tar', weights_only=False) for run in ('run', 'resumed')]
        assert [state['state_dict']['epochs_started'].item() for state in states] == [4, 5]


@needs_timm_repo
def test_train_with_everything_on(digits, tmp_path):
    """Mixed precision, accumulation, checkpointing, EMA, layer decay and mixup; then fine-tuning what came out."""
    common = [
        '--model', 'evo_deit_tiny_patch16_224', '--data-dir', digits, '-b', 32, '--device', 'cpu', '--workers', 1,
        '--lr', 1e-3, '--opt', 'adamw', '--warmup-epochs', 0, '--epochs', 2, '--output', tmp_path]
    run(REPO / 'train.py', *common, '--model-kwargs', *SMALL, 'layer_to_stage_epochs=1', '--num-classes', 10,
        '--img-size', 32, '--amp', '--amp-dtype', 'bfloat16', '--grad-accum-steps', 2, '--grad-checkpointing',
        '--channels-last', '--model-ema', '--model-ema-decay', 0.9, '--layer-decay', 0.8, '--mixup', 0.8, '--cutmix', 1.0,
        '--clip-grad', 1.0, '--experiment', 'run', cwd=tmp_path)
    checkpoint = tmp_path / 'run' / 'last.pth.tar'
    state = torch.load(checkpoint, weights_only=False)
    assert state['state_dict']['epochs_started'] == state['state_dict_ema']['epochs_started'] == 2
    few = tmp_path / 'few'
    for split in ('train', 'validation'):
        for label in '012':
            shutil.copytree(digits / split / label, few / split / label)
    common[common.index('--data-dir') + 1] = few
    common[common.index('--lr') + 1] = 1e-9  # to see what it starts from, which is timm's choice of the two: the EMA
    run(REPO / 'train.py', *common, '--model-kwargs', *SMALL, 'img_size=48', '--num-classes', 3, '--img-size', 48,
        '--pretrained', '--pretrained-path', checkpoint, '--torchcompile', 'aot_eager', '--experiment', 'tuned',
        cwd=tmp_path)
    tuned = torch.load(tmp_path / 'tuned' / 'last.pth.tar', weights_only=False)['state_dict']
    assert tuned['pos_embed'].shape[1] == 12 * 12 + 1
    assert len(tuned['head.weight']) == len(tuned['head_cls.weight']) == 3
    blocks = [key for key in tuned if key.startswith(('patch_embed', 'blocks', 'fc_norm', 'norm_cls'))]
    assert len(blocks) > 6 * 12
    for key in blocks:
        torch.testing.assert_close(tuned[key], state['state_dict_ema'][key], rtol=1e-4, atol=1e-6, msg=key)


@needs_timm_repo
def test_files_of_the_authors(digits, tmp_path):
    """And converted ones, wherever the scripts take a file."""
    from test_checkpoints import as_authors_name_it
    from timm_evovit.tools.cli import main
    common = ['--data-dir', digits, '--device', 'cpu', '--workers', 1, '--num-classes', 10, '--img-size', 32]
    model = ['--model', 'evo_deit_tiny_patch16_224', '--model-kwargs', *SMALL, 'weight_init=jax']
    train = [*LEARN, '--epochs', 1, '--output', tmp_path]
    run(REPO / 'train.py', *common, *model, *train, '--epochs', 4, '--experiment', 'run', cwd=tmp_path)
    checkpoint, authors = tmp_path / 'run' / 'last.pth.tar', tmp_path / 'authors.pth'
    state = torch.load(checkpoint, weights_only=False)
    torch.save({'model': as_authors_name_it(state['state_dict']), 'args': state['args']}, authors)
    output = tmp_path / 'out'
    assert main(['convert', 'evo_deit_tiny', str(authors), '--output', str(output), '--model-kwargs', *SMALL]) == 0
    converted = output / 'model.safetensors'

    top1 = []
    for args in (*([*model, '--checkpoint', file] for file in (checkpoint, authors, converted)),
                 ['--model', f'local-dir:{output}', '--pretrained']):
        log = run(REPO / 'validate.py', *common, *args, cwd=tmp_path)
        top1.append(float(re.search(r'\* Acc@1 ([\d.]+)', log).group(1)))
    assert len(set(top1)) == 1 and top1[0] > 15  # one in ten by chance
    for i, file in enumerate((authors, converted)):
        run(REPO / 'train.py', *common, *model, *train, '--lr', 1e-9, '--initial-checkpoint', file, '--experiment',
            f'initial{i}', cwd=tmp_path)
        with open(tmp_path / f'initial{i}' / 'summary.csv') as f:
            assert float(list(csv.DictReader(f))[-1]['eval_top1']) == pytest.approx(top1[0], abs=0.5)
        log = run(REPO / 'train.py', *common, *model, *train, '--lr', 1e-3, '--pretrained', '--pretrained-path', file,
                  '--experiment', f'pretrained{i}', cwd=tmp_path)
        assert f'Loading pretrained weights from file ({file})' in log


@needs_timm_repo
def test_train_distils(digits, tmp_path):
    """LeViT's recipe: hard labels of a teacher, adaptive clipping; the batch norms fold in validate.py."""
    timm.models.save_for_hf(timm.create_model('resnet10t', num_classes=10), tmp_path / 'teacher')
    kwargs = [
        '--model-kwargs', 'img_size=64', 'embed_dim=(16,24,32)', 'key_dim=8', 'num_heads=(2,3,4)', 'depth=(3,1,1)']
    common = [
        '--model', 'evo_levit_128s', '--data-dir', digits, '-b', 64, '--device', 'cpu', '--workers', 1,
        '--num-classes', 10, '--img-size', 64]
    run(REPO / 'train.py', *common, *kwargs, 'layer_to_stage_epochs=1', '--lr', 1e-3, '--opt', 'adamw', '--epochs', 2,
        '--warmup-epochs', 0, '--clip-grad', 0.01, '--clip-mode', 'agc', '--kd-model-name',
        f'local-dir:{tmp_path / "teacher"}', '--kd-distill-type', 'token', '--kd-token-distill-type', 'hard',
        '--task-loss-weight', 0.5, '--output', tmp_path, '--experiment', 'run', cwd=tmp_path)
    checkpoint = tmp_path / 'run' / 'last.pth.tar'
    top1 = [
        float(re.search(r'\* Acc@1 ([\d.]+)', run(
            REPO / 'validate.py', *common, *extra, *kwargs, '--checkpoint', checkpoint, cwd=tmp_path)).group(1))
        for extra in ((), ('--reparam',))]
    assert top1[0] == pytest.approx(top1[1], abs=0.3)


def test_every_model_has_a_recipe():
    assert {path.stem for path in RECIPES} == set(timm.list_models('evo_*')) - {
        'evo_deit_tiny', 'evo_deit_small', 'evo_deit_base'}


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipes(path):
    """The figures of the paper's recipe, and the learning rate that the comment promises."""
    recipe = yaml.safe_load(path.read_text())
    levit = 'levit' in path.stem
    assert recipe['model'] == path.stem and recipe['model_kwargs'] == {'layer_to_stage_epochs': 200}
    assert recipe['weight_decay'] == (0.025 if levit else 0.05) and recipe['epochs'] == 300
    assert recipe['drop_path'] == (0.1 if re.search('small|base|levit_384', path.stem) else 0)
    assert (recipe.get('kd_model_name') == 'regnety_160.deit_in1k') == levit == (recipe.get('clip_mode') == 'agc')
    gpus, per_gpu, total, rate = re.search(
        r'# (\d+) x (\d+) images per step, learning rate 5e-4 \* (\d+) / 512 = ([\d.]+)\.', path.read_text()).groups()
    assert int(per_gpu) == recipe['batch_size'] and int(gpus) * int(per_gpu) == int(total)
    assert recipe['lr_base'] * int(total) / recipe['lr_base_size'] == pytest.approx(float(rate))
    assert set(recipe) <= TRAIN_PY, 'not an argument of train.py'


@needs_timm_repo
def test_recipes_parse(tmp_path):
    """By the parser of train.py itself, which takes any key of a file; so the keys are compared with its own."""
    code = (
        'import json, sys, train\n'
        'known, parsed = vars(train.parser.parse_args([])), []\n'
        'for path in sys.argv[1:]:\n'
        "    sys.argv = ['train.py', '--config', path]\n"
        '    parsed.append(vars(train._parse_args()[0]))\n'
        '    assert set(parsed[-1]) == set(known), set(parsed[-1]) - set(known)\n'
        'print(json.dumps([sorted(known), parsed]))\n')
    done = subprocess.run(
        [sys.executable, '-c', code, *map(str, RECIPES)], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(REPO)})
    assert done.returncode == 0, done.stderr
    known, parsed = json.loads(done.stdout.splitlines()[-1])
    assert TRAIN_PY <= set(known)
    for path, args in zip(RECIPES, parsed):
        for key, value in yaml.safe_load(path.read_text()).items():
            assert args[key] == value and type(args[key]) is type(value)


@pytest.mark.parametrize('family, selections', [('evo_deit', 2), ('evo_levit', 3)])
def test_quickstart(tmp_path, family, selections):
    """One epoch of it; what a whole run reaches is in the README."""
    pytest.importorskip('sklearn', reason="the examples need pip install -e '.[examples]'")
    from PIL import Image
    log = run(
        EXAMPLES / 'quickstart.py', '--model', family, '--epochs', 1, '--batch-size', 128, '--output', tmp_path / 'out',
        cwd=tmp_path)
    result = json.loads((tmp_path / 'out' / 'result.json').read_text())
    assert len(result['models']) == 2 and result['validation_images'] == 360
    for name, r in result['models'].items():
        assert f"{r['top1']:.2f}" in log and name in log
        assert 0 <= r['top1'] <= 100 and r['images_per_second'] > 0
        model = timm.create_model(f'local-dir:{tmp_path / "out" / name}', pretrained=True)
        assert model.num_classes == 10 and tuple(model.pretrained_cfg['mean']) == (0.5, 0.5, 0.5)
    picture = Image.open(tmp_path / 'out' / 'informative_tokens.png').convert('RGB')
    assert picture.width > 600 and len(picture.getcolors(1 << 24)) > 100

    log = run(
        EXAMPLES / 'export_onnx.py', '--quickstart', tmp_path / 'out', '--rounds', 1, '--seconds', 0, '--output',
        tmp_path / 'onnx', cwd=tmp_path)
    exported = json.loads((tmp_path / 'onnx' / 'result.json').read_text())
    assert list(exported['checks']) == list(result['models'])
    assert log.count(f'the same tokens in {3 * selections} selections') == 1
    assert all(c['error'] < 1e-4 and c['differing'] == 0 for c in exported['checks'].values())
    top1 = {(r['runtime'], r['model']): r['top1'] for r in exported['runs']}
    for name, r in result['models'].items():
        assert top1['PyTorch', name] == pytest.approx(r['top1']) == pytest.approx(top1['ONNX Runtime', name])
        assert 0 <= top1['ONNX Runtime, int8', name] <= 100


def test_keep_ratio(tmp_path):
    """One epoch of it."""
    pytest.importorskip('sklearn', reason="the examples need pip install -e '.[examples]'")
    from PIL import Image
    log = run(
        EXAMPLES / 'keep_ratio.py', '--epochs', 1, '--batch-size', 128, '--rounds', 1, '--output', tmp_path, cwd=tmp_path)
    curves = json.loads((tmp_path / 'result.json').read_text())['curves']
    assert len(curves) == 2 and all(label in log for label in curves)
    first, second = curves.values()
    assert first[0]['keep_ratio'] == 1 and first[0]['top1'] == second[0]['top1']
    assert len({p['top1'] for p in first}) > 1 and all(p['speed_up'] > 0 for p in first + second)
    assert Image.open(tmp_path / 'keep_ratio.png').width > 600


def test_dense_features(tmp_path):
    """Two steps of it."""
    pytest.importorskip('skimage', reason="the examples need pip install -e '.[examples]'")
    from PIL import Image
    log = run(EXAMPLES / 'dense_features.py', '--steps', 2, '--batch-size', 2, '--output', tmp_path, cwd=tmp_path)
    models = json.loads((tmp_path / 'result.json').read_text())['models']
    assert list(models) == ['deit', 'evo_deit'] and all(name in log for name in models)
    for r in models.values():
        assert r['mean_iou'] == pytest.approx(sum(r['iou'].values()) / 3) and 0 < r['iou']['background'] <= 100
    assert models['deit']['training_speed_up'] == 1 and models['evo_deit']['inference_speed_up'] > 0
    assert Image.open(tmp_path / 'segmentation.png').width > 600


@needs_timm_repo
@pytest.mark.parametrize('name', ['evo_deit_tiny', 'evo_levit_128s'])
def test_onnx_export(name, tmp_path):
    """timm's script has no --model-kwargs, so the models have their own size; it compares the file with PyTorch."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    for extra in ((), ('--reparam',)):
        run(
            REPO / 'onnx_export.py', tmp_path / 'model.onnx', '--model', name, '--checkpoint',
            tmp_path / 'model.pth', '--num-classes', 1000, '--check-forward', '-b', 2, *extra, cwd=tmp_path)
        (tmp_path / 'model.onnx').unlink()


def test_reproduce(tmp_path):
    """One epoch of one seed."""
    pytest.importorskip('skimage', reason="the examples need pip install -e '.[examples]'")
    from PIL import Image
    log = run(
        EXAMPLES / 'reproduce.py', '--data', 'photographs', '--seeds', 1, '--epochs', 1, '--batch-size', 128,
        '--output', tmp_path / 'out', cwd=tmp_path)
    folders = [sorted((tmp_path / 'out' / 'photographs' / split).iterdir()) for split in ('train', 'validation')]
    assert [len(f) for f in folders] == [10, 10] and all(len(list(f.iterdir())) == 100 for f in folders[0])
    by_variant = json.loads((tmp_path / 'out' / 'result.json').read_text())['results']['photographs']
    assert len(by_variant) == 5 and all(len(seeds) == 1 and name in log for name, seeds in by_variant.items())
    assert by_variant['dense'][0]['speed_up'] == by_variant['dense'][0]['training_speed_up'] == 1
    assert len({r['top1'] for seeds in by_variant.values() for r in seeds}) > 1
    assert Image.open(tmp_path / 'out' / 'accuracy_speed.png').width > 600


def test_benchmark(tmp_path):
    from PIL import Image
    path, other = tmp_path / 'figures.json', tmp_path / 'others.py'
    other.write_text(
        'import timm_evovit\n\n'
        'def create():\n'
        "    return timm_evovit.evolve_model('deit_tiny_patch16_224', img_size=64)\n")
    log = run(
        EXAMPLES / 'benchmark.py', 'evo_deit_tiny', '--against', 'deit_tiny_patch16_224', f'{other}:create', '-b', 1,
        '--img-size', 64, '--rounds', 3, '--warmup', 0, '--seconds', 0, '--json', path, '--plot', tmp_path / 'plot.png',
        cwd=tmp_path)
    report = json.loads(path.read_text())
    assert list(report['models']) == ['deit_tiny_patch16_224', f'{other}:create', 'evo_deit_tiny']
    dense, evolved, evo = report['models'].values()
    assert evolved['params'] == dense['params'] and evolved['gmacs'] < 0.8 * dense['gmacs']
    assert f'{other}:create: no top-1 is published' in log and log.count('no top-1') == 1
    assert Image.open(tmp_path / 'plot.png').width > 600
    assert dense['speed_up'] == 1 and len(evo['seconds']) == 3 and 'evo_deit_tiny' in log
    assert evo['params'] == 5_910_800 - (196 - 16) * 192  # a shorter position embedding
    assert 1.3 < evo['gmacs_ratio'] < 1.6
    assert all(r['peak_memory'] > 3 * r['params'] for r in report['models'].values())  # weights alone are 4 bytes each


def test_benchmark_compiles_casts_and_merges(tmp_path):
    """With a stand-in for the package tome, which is on no index."""
    path = tmp_path / 'figures.json'
    (tmp_path / 'tome').mkdir()
    (tmp_path / 'tome' / '__init__.py').write_text(
        'class patch:\n'
        '    @staticmethod\n'
        '    def timm(model):\n'
        '        model.blocks = model.blocks[:3]\n')
    run(
        EXAMPLES / 'benchmark.py', 'evo_deit_tiny', '--against', 'deit_tiny_patch16_224', 'tome:deit_tiny_patch16_224:2',
        '-b', 2, '--img-size', 32, '--rounds', 1, '--warmup', 1, '--seconds', 0, '--json', path, '--compile',
        '--dtype', 'bfloat16', cwd=tmp_path, PYTHONPATH=str(tmp_path))
    report = json.loads(path.read_text())
    dense, merged, evo = report['models'].values()
    assert merged['gmacs'] < evo['gmacs'] < dense['gmacs'] and merged['params'] < dense['params'] / 2
    assert report['settings']['dtype'] == 'bfloat16' and report['settings']['compile'] == 'default'


@pytest.mark.parametrize('extra', ['--reparam', '--train'])
def test_benchmark_folds_and_trains(tmp_path, extra):
    path = tmp_path / 'figures.json'
    run(
        EXAMPLES / 'benchmark.py', 'evo_levit_128s', '--against', 'levit_128s', '-b', 2, '--img-size', 96, '--rounds', 2,
        '--warmup', 0, '--seconds', 0, '--json', path, extra, cwd=tmp_path)
    report = json.loads(path.read_text())
    assert report['settings']['reparam'] == (extra == '--reparam') and report['settings']['train'] == (extra == '--train')
    assert [len(r['seconds']) for r in report['models'].values()] == [2, 2]


@pytest.fixture
def benchmark():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import benchmark
    finally:
        sys.path.remove(str(EXAMPLES))
    return benchmark


def test_benchmark_counts_the_papers_multiply_adds(benchmark):
    """method: DeiT-S 4.599 G, Evo-DeiT-S 3.034 G."""
    args = benchmark.parse_args(['evo_deit_small', '--against', 'deit_small_patch16_224'])
    counted = [benchmark.multiply_adds(benchmark.create(name, args), args) for name in args.models]
    assert [round(c / 1e9, 3) for c in counted] == [4.599, 3.034]


def test_benchmark_gives_arguments_to_the_models_alone(benchmark, tmp_path):
    path = tmp_path / 'others.py'
    path.write_text('import timm\n\ndef create(**kwargs):\n    return timm.create_model("evo_deit_tiny", **kwargs)\n')
    names = [f'{path}:create', 'evo_deit_tiny']
    args = benchmark.parse_args([
        *names, '--against', 'deit_tiny_patch16_224', '--img-size', '64', '--model-kwargs', 'selection=layer', 'keep_ratio=0.7'])
    dense, other, evo = [benchmark.create(name, args) for name in args.models]
    assert dense.patch_embed.img_size == evo.patch_embed.img_size == (64, 64) and other.patch_embed.img_size == (224, 224)
    assert evo.selection == other.selection == 'layer' and evo.keep_ratio == other.keep_ratio == (0.7, 0.7)


@pytest.mark.parametrize('argv, message', [
    (['evo_deit_nothing'], 'evo_deit_nothing: unknown to timm'),
    (['evo_deit_tiny', '--against', 'nowhere.py:create'], 'there is no file nowhere.py'),
    ([str(EXAMPLES / 'benchmark.py')], 'benchmark.py: name the function as well'),
    (['tome:deit_tiny_patch16_224:many'], "number of tokens to merge in every block, got 'many'"),
    (['evo_levit_128s', '--reparam', '--train'], '--reparam is for inference'),
    (['evo_levit_128s', '--against', 'evo_levit_128s', '--model-kwargs', 'selection=layer'], 'is in --against as well'),
])
def test_benchmark_names_what_it_does_not_know(benchmark, capsys, argv, message):
    with pytest.raises(SystemExit):
        benchmark.parse_args(argv)
    assert message in capsys.readouterr().err
