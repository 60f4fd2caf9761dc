"""What the tests share: small models, comparisons, and the authors' key names."""
import functools
import math
import re

import pytest
import timm
import torch

from timm_evovit import evolve

TINY = dict(num_classes=10, img_size=32, patch_size=8, embed_dim=24, num_heads=3, mlp_ratio=2)
TINY_LEVIT = dict(num_classes=10, img_size=64, embed_dim=(16, 24, 32), key_dim=4, num_heads=(2, 3, 4), depth=(4, 2, 2))
FAMILIES = {'deit': 'evo_deit_tiny', 'levit': 'evo_levit_128s'}
FEW_BLOCKS = {'deit': 4, 'levit': (3, 1, 1)}  # with selections in them, for what takes long
both_families = pytest.mark.parametrize('family', FAMILIES)


# Models and images

def tiny(name, **kwargs):
    """Arguments of a small model of that name."""
    return {**(TINY_LEVIT if 'levit' in name else TINY), **kwargs}


def layerwise_phase(model):
    """Whether tokens are selected before every block at the moment, as in the first epochs of layer-to-stage training."""
    return model.training and model.layerwise_epochs


def randomize(model):
    """Draw weights and statistics that make attention far from uniform, so that tokens differ in rank."""
    levit = hasattr(model, 'stem')
    with torch.no_grad():
        for key, p in model.named_parameters():
            if 'pos_embed' in key or 'token' in key or key.endswith('latent'):
                p.normal_(std=0.2 if levit else 0.5)
            elif p.ndim > 1:
                scale = 1 if levit else 2 if key.endswith('qkv.weight') else 0.5
                p.normal_(std=scale / math.sqrt(p[0].numel()))
            elif key.endswith('weight'):
                p.uniform_(0.4, 1) if levit else p.uniform_(0.5, 1.5)
                p.mul_(2 if key.endswith('qkv.bn.weight') else 1)
            elif 'gamma' not in key:
                p.normal_(std=0.4 if levit else 0.2)
        for key, b in model.named_buffers():
            if key.endswith('running_mean'):
                b.normal_(std=0.3)
            elif key.endswith('running_var'):
                b.uniform_(0.5, 2)
    return model


def build(name, seed=0, **kwargs):
    """A small model of that name, or of a family, in evaluation mode, see `randomize`."""
    name = FAMILIES.get(name, name)
    torch.manual_seed(seed)
    return randomize(timm.create_model(name, **tiny(name, **kwargs))).eval()


build_deit = functools.partial(build, FAMILIES['deit'])
build_levit = functools.partial(build, FAMILIES['levit'])
MODELS = {
    'deit': build_deit, 'levit': build_levit,
    'evolved': lambda **kwargs: evolve(build('vit_tiny_patch16_224', **kwargs)),
}
all_models = pytest.mark.parametrize('kind', MODELS)


def load(source, name=FAMILIES['deit'], **kwargs):
    """A small model with the weights of a source, such as dict(file=...), of ten classes, as timm loads them."""
    overlay = dict(source, num_classes=10)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **tiny(name, **kwargs)).eval()


def images(n=2, size=32, chans=3, seed=1):
    """Images (n, chans, H, W); size is a side or (H, W)."""
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(n, chans, *size, generator=torch.Generator().manual_seed(seed))


def images_for(model, n=3, seed=1):
    """Images (n, in_chans, H, W) of the size, channels and dtype that the model takes."""
    size = model.patch_embed.img_size if hasattr(model, 'patch_embed') else getattr(model, 'img_size', (32, 32))
    return images(n, tuple(size), getattr(model, 'in_chans', 3), seed).to(next(model.parameters()).dtype)


def own_indices(tokens):
    """Raster indices of the informative patches of every image, ascending."""
    return [mask.flatten().nonzero().flatten().tolist() for mask in tokens.mask]


# Comparisons

def assert_same_weights(model, other):
    """Both are models or state dicts."""
    a, b = (m.state_dict() if isinstance(m, torch.nn.Module) else m for m in (model, other))
    assert set(a) == set(b)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


# Checkpoints of the authors

def deit_names(state_dict):
    """State dict of an Evo-DeiT under the authors' names."""
    out = {}
    for key, value in state_dict.items():
        key = re.sub(r'^fc_norm\.', 'norm.', key)
        key = re.sub(r'^blocks\.(\d+)\.norm1\.', r'norms.\1.', key)
        key = re.sub(r'^blocks\.(\d+)\.attn\.proj\.', r'projs.\1.', key)
        if match := re.match(r'blocks\.(\d+)\.attn\.qkv\.(.+)', key):
            third = len(value) // 3
            out['qks.{}.qk.{}'.format(*match.groups())] = value[:2 * third]
            out['vs.{}.v.{}'.format(*match.groups())] = value[2 * third:]
        else:
            out[key] = value
    return out


def levit_names(model):
    """State dict of an Evo-LeViT under the authors' names, which lists blocks twice."""
    names, flat = {}, 0
    for i, stage in enumerate(model.stages):
        if i > 0:
            names[f'stages.{i}.downsample.attn_downsample.'] = f'blocks.{flat}.'
            names[f'stages.{i}.downsample.mlp.'] = f'blocks.{flat + 1}.m.'
            flat += 2
        for b in range(len(stage.blocks)):
            names[f'stages.{i}.blocks.{b}.attn.'] = f'blocks.{flat}.m1.m.'
            names[f'stages.{i}.blocks.{b}.mlp.'] = f'blocks.{flat}.m2.m.'
            flat += 1
    out = {}
    for key, value in model.state_dict().items():
        if key == 'tradeoff':
            attentions = [theirs for own, theirs in names.items() if 'attn' in own]
            out.update((name + 'learn_tradeoff', v[None]) for name, v in zip(attentions, value, strict=True))
            continue
        for own, theirs in names.items():
            if key.startswith(own):
                key = theirs + key[len(own):].replace('ln1', '0').replace('ln2', '2')
                key = key.replace('proj.ln', 'proj.1').replace('q.ln', 'q.1')
        key = re.sub(r'^stem\.conv(\d)', lambda m: f'patch_embed.{2 * int(m[1]) - 2}', key)
        key = key.replace('linear.', 'l.' if key.startswith('head') else 'c.').replace('pos_embed', 'poss')
        out[key] = value
    copies = {f'stage_{k}': v for k, v in out.items() if k.startswith('blocks.0.')}
    copies.update({f'stage_blocks.4.m.0.{k[12:]}': v for k, v in out.items() if k.startswith('blocks.1.m1.')})
    return {**out, **copies}


def authors_names(model):
    """State dict under the authors' names, written out the other way round than the package does it."""
    return levit_names(model) if hasattr(model, 'stem') else deit_names(model.state_dict())
