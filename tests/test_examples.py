"""The examples, from end to end on little data. What whole runs reach is in the documentation."""
import json
import re
import shutil

import onnxruntime
import pytest
import timm
import torch
from helpers import TINY_LEVIT, build_levit
from PIL import Image
from programs import EXAMPLES, run, write_digits

SMALL = ['patch_size=8', 'embed_dim=48', 'num_heads=3', 'depth=6']


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('digits'), per_class=10)


@pytest.mark.slow
@pytest.mark.parametrize('family', ['evo_deit', 'evo_levit'])
def test_quickstart(tmp_path, family):
    pytest.importorskip('sklearn', reason="the examples need pip install -e '.[examples]'")
    log = run(EXAMPLES / 'quickstart.py', '--model', family, '--epochs', 1, '--output', tmp_path, cwd=tmp_path)
    assert len(list(tmp_path.glob('digits/train/*/*.png'))) == 1437
    rows = re.findall(r'^(\w+) +([\d.]+) +(\d+) +([\d.]+)$', log, re.MULTILINE)
    assert len(rows) == 2 and rows[1][0].startswith(family)
    for name, top1, images_per_second, seconds in rows:
        assert 0 <= float(top1) <= 100 and int(images_per_second) > 0 and float(seconds) > 0
        model = timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True)
        assert model.num_classes == 10 and tuple(model.pretrained_cfg['mean']) == (0.5, 0.5, 0.5)
    picture = Image.open(tmp_path / 'slow_tokens.png').convert('RGB')
    assert picture.width > 600 and len(picture.getcolors(1 << 24)) > 100


@pytest.mark.slow
@pytest.mark.parametrize('name', ['evo_deit_tiny', 'deit_tiny_patch16_224'])
def test_finetune(digits, tmp_path, name):
    """From a checkpoint with other classes and another size, grey; the folder that it leaves is exported."""
    kwargs = [*SMALL, 'img_size=32', 'in_chans=1']
    dense = timm.create_model(name, num_classes=12, **{k: int(v) for k, v in (word.split('=') for word in kwargs)})
    torch.save({'state_dict': dense.state_dict()}, tmp_path / 'last.pth.tar')
    log = run(EXAMPLES / 'finetune.py', '--data-dir', digits, '--model', name, '--checkpoint', tmp_path / 'last.pth.tar',
              '--model-kwargs', *kwargs, '--img-size', 48, '--epochs', 2, '--lr', 1e-9, '--batch-size', 16, '--workers', 0,
              '--keep-ratio', 0.7, '--output', tmp_path, cwd=tmp_path)
    tops = [float(top1) for top1 in re.findall(r'epoch \d: loss [\d.]+, top-1 ([\d.]+) %', log)]
    assert len(tops) == 2 and f'best top-1 {max(tops):.2f} %' in log
    folder = f'local-dir:{tmp_path / "model"}'
    model = timm.create_model(folder, pretrained=True)
    assert model.keep_ratio == ((0.7, 0.7) if name.startswith('evo') else (0.912, 0.709, 0.53))
    assert model.num_classes == 10 and model.patch_embed.img_size == (48, 48) and model.in_chans == 1
    assert model.pretrained_cfg['label_names'] == [str(i) for i in range(10)]
    torch.testing.assert_close(model.state_dict()['blocks.5.mlp.fc2.weight'], dense.state_dict()['blocks.5.mlp.fc2.weight'])
    state = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['state_dict']
    for key, value in model.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0)
    if not name.startswith('evo'):
        run(EXAMPLES / 'export_onnx.py', folder, '--pretrained', '--output', tmp_path / 'm.onnx', cwd=tmp_path)
        meta = onnxruntime.InferenceSession(tmp_path / 'm.onnx').get_modelmeta().custom_metadata_map
        assert json.loads(meta['input_size']) == [1, 48, 48] and json.loads(meta['label_names']) == [str(i) for i in range(10)]


def test_finetune_needs_the_same_classes(digits, tmp_path):
    (tmp_path / 'validation').symlink_to(digits / 'validation')
    shutil.copytree(digits / 'train' / '0', tmp_path / 'train' / '0')
    log = run(EXAMPLES / 'finetune.py', '--data-dir', tmp_path, '--model', 'evo_deit_tiny', cwd=tmp_path, fails=True)
    assert 'train and validation must have the same classes' in log
    (tmp_path / 'train' / 'train').symlink_to(digits / 'train' / '0')
    (tmp_path / 'train' / 'validation').symlink_to(digits / 'validation' / '0')
    log = run(EXAMPLES / 'finetune.py', '--data-dir', tmp_path / 'train', '--model', 'evo_deit_tiny', cwd=tmp_path, fails=True)
    assert 'a folder of pictures per class' in log


def test_finetune_cannot_resize_a_levit(digits, tmp_path):
    timm.models.save_for_hf(build_levit(num_classes=10), tmp_path / 'levit', model_args=TINY_LEVIT)
    log = run(EXAMPLES / 'finetune.py', '--data-dir', digits, '--model', f'local-dir:{tmp_path / "levit"}', '--pretrained',
              '--img-size', 96, cwd=tmp_path, fails=True)
    assert '--img-size must be left out' in log and 'Traceback' not in log


@pytest.mark.slow
@pytest.mark.parametrize('name, kwargs', [
    ('evo_deit_tiny', ['img_size=32', *SMALL]),
    ('evo_levit_128s', ['img_size=96', 'embed_dim=(16,24,32)', 'key_dim=8', 'num_heads=(2,3,4)', 'depth=(3,1,1)']),
])
def test_export_onnx(digits, tmp_path, name, kwargs):
    """The files give the logits of PyTorch, in 8 bits with ranges of pictures about so; the dense model is beside them."""
    file = tmp_path / 'onnx' / 'model.onnx'
    log = run(EXAMPLES / 'export_onnx.py', name, '--model-kwargs', 'num_classes=10', *kwargs, '--int8', '--calibrate', digits,
              '--num-pictures', 5, '--output', file, cwd=tmp_path)
    errors = [float(e) for e in re.findall(r'(?:onnx|ratio 1): .* ms per picture, logits within (\S+) of PyTorch', log)]
    # without VNNI a processor adds products in 16 bits: they overflow, and errors of up to 0.55 were seen, else 0.3
    assert len(errors) == 4 and max(errors[:2]) < 1e-4 < min(errors[2:]) and max(errors[2:]) < 0.8
    size = int(kwargs[0].partition('=')[2])
    for path in (file, file.with_suffix('.int8.onnx')):
        session = onnxruntime.InferenceSession(path)
        assert session.get_inputs()[0].shape[1:] == [3, size, size]
        assert session.run(None, {'images': torch.zeros(3, 3, size, size).numpy()})[0].shape == (3, 10)


@pytest.mark.slow
@pytest.mark.parametrize('args, right', [
    (['base=vit_small_patch16_dinov3', 'depth=2', 'embed_dim=48', 'num_heads=3'], True),
    (['base=vit_tiny_patch16_224', 'img_size=96', 'depth=2'], False)])  # OpenVINO resamples its position embeddings otherwise
def test_export_to_openvino(digits, tmp_path, args, right):
    """With dynamic height and width. Logits that differ at another size than the model's are found."""
    for package in ('openvino', 'nncf'):
        pytest.importorskip(package, reason=f'{package} is not installed')
    log = run(EXAMPLES / 'export_onnx.py', 'evo_vit', '--model-kwargs', *args, 'dynamic_img_size=True', '--int8', '--calibrate',
              digits, '--num-pictures', 2, '--batch-size', 1, '--output', 'm.xml', cwd=tmp_path, fails=not right)
    errors = [float(e) for e in re.findall(r'logits within (\S+) of PyTorch', log)]
    assert len(errors) == 4 and (max(errors[:2]) < 1e-4) == right and ('m.xml: its logits are not those' in log) != right
    assert (tmp_path / 'm.int8.xml').exists()


@pytest.mark.slow
@pytest.mark.parametrize('name, args, indices, shapes', [
    ('evo_deit_tiny', ['--out-indices', 3, 11], [3, 11], ['(2, 192, 14, 14)'] * 2),
    ('evo_levit_128s', [], [0, 1, 2], ['(2, 128, 14, 14)', '(2, 256, 7, 7)', '(2, 384, 4, 4)']),
])
def test_dense_features(tmp_path, name, args, indices, shapes):
    log = run(EXAMPLES / 'dense_features.py', '--model', name, *args, '--steps', 1, '--batch-size', 2, cwd=tmp_path)
    assert [f'feature map {i}: {shape}' for i, shape in zip(indices, shapes)] == log.splitlines()[:-1]
    assert 'step 0: loss 0.' in log.splitlines()[-1]


@pytest.mark.parametrize('args, message', [
    (['export_onnx.py', 'evo_deit_tiny', '--output', 'm.pt'], '--output must end with .onnx or .xml, got m.pt'),
    (['export_onnx.py', 'evo_deit_tiny', '--calibrate', '.'], '--calibrate is for --int8'),
    (['export_onnx.py', 'evo_deit_tiny', '--int8', '--output', 'm.xml'],
     '--int8 for OpenVINO needs pictures: --calibrate DIR'),
    (['export_onnx.py', 'evo_deit_tiny', '--int8', '--calibrate', 'nowhere'],
     '--calibrate nowhere: there is no such folder'),
    (['export_onnx.py', 'evo_deit_tiny', '--batch-size', 0], '--batch-size must be 1 or more, got 0'),
    (['finetune.py', '--data-dir', '.', '--epochs', 0], '--epochs must be 1 or more, got 0'),
    (['finetune.py', '--data-dir', '.', '--batch-size', -1], '--batch-size must be 1 or more, got -1'),
    (['finetune.py', '--data-dir', '.', '--lr', 'nan'], '--lr must be 0 or more, got nan'),
    (['dense_features.py', '--num-classes', 1], '--num-classes must be 2 or more, got 1'),
    (['dense_features.py', '--model', 'nosuch'], 'Unknown model (nosuch)'),
    (['export_onnx.py', 'evo_deit_tiny', '--use-ema'], '--use-ema must be left out without a --checkpoint, got True'),
    (['quickstart.py', '--epochs', 0], '--epochs must be 1 or more, got 0'),
    (['dense_features.py', '--model', 'evo_levit_128s', '--out-indices', 3],
     '--out-indices: feature index 3 is out of range (0 to 2)'),
])
def test_wrong_arguments(tmp_path, args, message):
    log = run(EXAMPLES / args[0], *args[1:], cwd=tmp_path, fails=True)
    assert message in log and 'Traceback' not in log and not [*tmp_path.iterdir()]
