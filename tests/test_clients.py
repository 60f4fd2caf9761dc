"""Other libraries and parts of timm that take models as they are: checkpoints of wrapped models, attention maps,
compilation, LoRA, OpenVINO."""
import copy

import pytest
import timm
import torch
from helpers import FAMILIES, assert_same_weights, both_families, build, images, images_for, tiny
from timm.layers import set_fused_attn
from timm.models import clean_state_dict
from timm.utils import AttentionExtract

from timm_evovit import EvoLevit, EvoVisionTransformer, evolve, informative_tokens
from timm_evovit.evo_vit import EvolvedVisionTransformer

KINDS = {
    'deit': lambda seed=0: build('evo_deit_tiny', seed),
    'levit': lambda seed=0: build('evo_levit_128s', seed),
    'evolved': lambda seed=0: evolve(build('vit_base_patch16_224', seed, depth=6)),
}
TYPES = {'deit': EvoVisionTransformer, 'levit': EvoLevit, 'evolved': EvolvedVisionTransformer}
every_kind = pytest.mark.parametrize('kind', KINDS)


# Checkpoints of wrapped models

@both_families
@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module.', 'module._orig_mod.', '_orig_mod.module.'])
def test_prefixes_of_wrapped_models(family, prefix, tmp_path):
    """torch.compile and DistributedDataParallel put them before the names; with and without a checkpoint filter."""
    if list(clean_state_dict({f'{prefix}weight': None})) != ['weight']:
        pytest.skip(f'this timm does not take {prefix} from the names of any model')
    name, model, path = FAMILIES[family], build(FAMILIES[family]), str(tmp_path / 'last.pth.tar')
    torch.save({'state_dict': {prefix + k: v for k, v in model.state_dict().items()}}, path)
    other = timm.create_model(name, **tiny(name))
    timm.models.load_checkpoint(other, path, use_ema=False)
    assert_same_weights(other, model)
    overlay = dict(file=path, num_classes=10)
    assert_same_weights(
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **tiny(name)), model)


@both_families
def test_a_file_with_other_classes_and_size(family, tmp_path):
    name, model, path = FAMILIES[family], build(FAMILIES[family]), str(tmp_path / 'model.pth')
    torch.save(model.state_dict(), path)
    size = 2 * (model.patch_embed.img_size[0] if family == 'deit' else model.img_size[0])
    other = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=10),
        **tiny(name, num_classes=3, img_size=size)).eval()
    assert other(images(2, size)).shape == (2, 3)
    adapted = ('pos_embed', 'head')
    ours, theirs = ({k: v for k, v in m.state_dict().items() if not any(a in k for a in adapted)}
                    for m in (other, model))
    assert_same_weights(ours, theirs)


# Compilation

@pytest.mark.slow
@every_kind
@torch.no_grad()
def test_keep_ratio_of_a_compiled_model(kind):
    """Compiled code follows a change, also back to what it was."""
    torch._dynamo.reset()
    model = KINDS[kind]()
    x = images_for(model)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    outputs = []
    for keep_ratio in (0.5, 0.25, 1, 0.5):
        compiled.set_keep_ratio(keep_ratio)
        outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], model(x))
    assert torch.equal(outputs[0], outputs[3])
    assert not any(torch.allclose(outputs[0], y, rtol=1e-3, atol=1e-3) for y in outputs[1:3])


# Attention maps

@pytest.fixture
def unfused():
    """Attention that has a softmax to look at."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.mark.parametrize('method', ['fx', 'hook'])
@torch.no_grad()
def test_attention_extract(method, unfused):
    """The map of the block before a selection holds the attention that the selection goes by."""
    dense, model = (build(name, depth=6, global_pool='token') for name in ('deit_tiny_patch16_224', 'evo_deit_tiny'))
    model.load_state_dict(dense.state_dict())
    x = images_for(model)
    first, second = informative_tokens(model, x)
    maps, dense_maps = [list(AttentionExtract(m, method=method)(x).values()) for m in (model, dense)]
    assert [tuple(m.shape) for m in maps] == [(3, 3, 17, 17)] * 2 + [(3, 3, 9, 9)] * 4
    torch.testing.assert_close(maps[:2], dense_maps[:2])
    torch.testing.assert_close(maps[1][:, :, 0, 1:].mean(dim=1), first.attention.flatten(1))
    assert first.block == 2 and second.block == 4


@pytest.mark.parametrize('method', ['fx', 'hook'])
@torch.no_grad()
def test_attention_extract_of_an_evolved_model(method, unfused):
    """Attention of slow tokens, with the sizes of groups in it."""
    model = KINDS['evolved']()
    maps = list(AttentionExtract(model, method=method)(images_for(model)).values())
    assert len(maps) == 6 and maps[0].shape == (3, 3, 15, 15) and maps[-1].shape[2] < 15
    torch.testing.assert_close([m.sum(dim=3) for m in maps], [torch.ones(m.shape[:3]) for m in maps])


@torch.no_grad()
def test_attention_extract_of_levit():
    """timm's LeViT has no module to hook."""
    model = build(FAMILIES['levit'])
    maps = AttentionExtract(model, method='fx')(images_for(model))
    assert len(maps) == 8
    for m, tokens in zip(maps.values(), (17, 17, 10, 10, 4, 4, 2, 2), strict=True):  # + class and representative token
        assert m.shape[2:] == (tokens, tokens)
        torch.testing.assert_close(m.sum(dim=3), torch.ones(m.shape[:3]))


# LoRA

@every_kind
@torch.no_grad()
def test_lora(kind, tmp_path):
    """Saved, loaded into a model with the same weights, and merged."""
    peft = pytest.importorskip('peft', reason='peft is not installed')
    model = KINDS[kind]()
    x = images_for(model)
    expected = model(x)
    config = peft.LoraConfig(target_modules=['qkv.linear' if kind == 'levit' else 'qkv'], r=4)
    tuned = peft.get_peft_model(copy.deepcopy(model), config).eval()
    torch.testing.assert_close(tuned(x), expected)  # as initialised, LoRA changes nothing
    for key, p in tuned.named_parameters():
        if 'lora_B' in key:
            p.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    y = tuned(x)
    assert not torch.allclose(y, expected, rtol=1e-2, atol=1e-2)
    tuned.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert torch.equal(loaded(x), y)
    merged = loaded.merge_and_unload()
    assert type(merged) is TYPES[kind]
    torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-4)
    assert {type(m) for m in merged.modules()} == {type(m) for m in model.modules()}
    merged.set_keep_ratio(0.25)
    assert all(t.mask.float().mean() < 0.5 for t in informative_tokens(merged, x)[:1])


@every_kind
def test_lora_trains_in_every_block(kind):
    peft = pytest.importorskip('peft', reason='peft is not installed')
    config = peft.LoraConfig(target_modules=['qkv.linear' if kind == 'levit' else 'qkv'], r=4)
    tuned = peft.get_peft_model(KINDS[kind](), config).train()
    tuned(images_for(tuned.base_model.model, 4)).square().sum().backward()
    trained = {k: p.grad for k, p in tuned.named_parameters() if 'lora_B' in k}
    assert len(trained) >= 6 and all(g.abs().sum() > 0 for g in trained.values())


# OpenVINO

@pytest.mark.slow
@every_kind
def test_openvino(kind):
    openvino = pytest.importorskip('openvino', reason='openvino is not installed')
    model = KINDS[kind]()
    converted = openvino.convert_model(model, example_input=images_for(model, 2))
    compiled = openvino.compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for batch in (2, 1, 5):
        x = images_for(model, batch, seed=batch)
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), expected, rtol=1e-3, atol=1e-3)
