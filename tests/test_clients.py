"""Other libraries and parts of timm that take models as they are: compilation, attention maps, LoRA, OpenVINO."""
import copy

import pytest
import torch
from helpers import FEW_BLOCKS, build, images_for
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract

from timm_evovit import evolve, find_slow_tokens

KINDS = {
    'deit': lambda seed=0: build('evo_deit_tiny', seed),
    'levit': lambda seed=0: build('evo_levit_128s', seed),
    'evolved': lambda seed=0: evolve(build('vit_base_patch16_224', seed, depth=6)),
}
every_kind = pytest.mark.parametrize('kind', KINDS)


# Compilation

@pytest.mark.slow
@every_kind
def test_compiled(kind):
    """Gradients; compiled code follows a change of the keep ratio, also back to what it was."""
    torch._dynamo.reset()
    model = evolve(build('vit_base_patch16_224', depth=3)) if kind == 'evolved' else build(kind, depth=FEW_BLOCKS[kind])
    x = images_for(model.train())
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    gradients, outputs = [], []
    for m in (model, compiled):
        torch.manual_seed(0)  # the same heads
        gradients.append(torch.autograd.grad(m(x).square().mean(), list(model.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    model.eval()
    with torch.no_grad():
        for keep_ratio in (0.5, 1, 0.5):
            compiled.set_keep_ratio(keep_ratio)
            outputs.append(compiled(x))
            torch.testing.assert_close(outputs[-1], model(x))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)


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
    first, second = find_slow_tokens(model, x)
    maps, dense_maps = [list(AttentionExtract(m, method=method)(x).values()) for m in (model, dense)]
    assert [tuple(m.shape) for m in maps] == [(3, 3, 17, 17)] * 2 + [(3, 3, 9, 9)] * 4
    torch.testing.assert_close(maps[:2], dense_maps[:2])
    torch.testing.assert_close(maps[1][:, :, 0, 1:].mean(dim=1), first.attention.flatten(1))
    assert first.block == 2 and second.block == 4


@pytest.mark.parametrize('kind, method, tokens', [
    ('evolved', 'fx', (15, 15, 10, 10, 7, 7)), ('evolved', 'hook', (15, 15, 10, 10, 7, 7)),
    ('levit', 'fx', (17, 17, 10, 10, 4, 4, 2, 2))])  # timm's LeViT has no module to hook
@torch.no_grad()
def test_attention_extract_of_slow_tokens(kind, method, tokens, unfused):
    """With class and representative token, and with the sizes of groups in it."""
    model = KINDS[kind]()
    maps = AttentionExtract(model, method=method)(images_for(model)).values()
    for m, n in zip(maps, tokens, strict=True):
        assert m.shape[2:] == (n, n)
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
    with torch.enable_grad():
        tuned.train()(x).square().sum().backward()
    trained = {k: p.grad for k, p in tuned.named_parameters() if 'lora_B' in k}
    assert len(trained) >= 6 and all(g.abs().sum() > 0 for g in trained.values())
    merged = loaded.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-4)
    assert {type(m) for m in merged.modules()} == {type(m) for m in model.modules()}
    merged.set_keep_ratio(0.25)
    assert all(t.mask.float().mean() < 0.5 for t in find_slow_tokens(merged, x)[:1])


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
