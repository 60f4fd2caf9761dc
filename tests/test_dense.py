"""Dense prediction on features_only maps, in other libraries."""
import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

DEIT = dict(img_size=64, patch_size=8, embed_dim=24, num_heads=3, depth=6)
LEVIT = dict(img_size=128, embed_dim=(16, 24, 32), key_dim=4, num_heads=(2, 3, 4), depth=(3, 2, 2))


class Pyramid(nn.Module):
    """The maps of a backbone, each with as many channels."""

    def __init__(self, name, **kwargs):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, **kwargs)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 16)
        self.out_channels = 16

    def forward(self, x):
        return self.fpn({str(i): y for i, y in enumerate(self.body(x))})


@pytest.mark.parametrize('name, kwargs, levels', [
    ('evo_deit_tiny', dict(DEIT, out_indices=(5,)), 1), ('evo_levit_128s', LEVIT, 3)])
def test_torchvision_detector(name, kwargs, levels):
    size = kwargs['img_size']
    detector = FasterRCNN(
        Pyramid(name, **kwargs), num_classes=2, min_size=size, max_size=size, fixed_size=(size, size),
        rpn_anchor_generator=AnchorGenerator(tuple((16 * 2 ** i,) for i in range(levels)), ((1.0,),) * levels),
        box_roi_pool=MultiScaleRoIAlign([str(i) for i in range(levels)], 4, 2))
    images = list(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    targets = [dict(boxes=torch.tensor([[4., 4., 40., 36.]]), labels=torch.tensor([1])) for _ in images]
    sum(detector(images, targets).values()).backward()
    body = detector.backbone.body
    assert [n for n, p in body.named_parameters() if p.grad is None] == []
    assert next(body.parameters()).grad.abs().sum() > 0
    found = detector.eval()(images)
    assert len(found) == 2 and all(f['boxes'].shape[1] == 4 for f in found)


def test_segmentation_models_pytorch():
    """As a plain vision transformer. (Its encoders take no LeViT, timm's neither: no stride below 16.)"""
    smp = pytest.importorskip('segmentation_models_pytorch', reason='segmentation_models_pytorch is not installed')
    model = smp.DPT(
        'tu-evo_deit_tiny', encoder_weights=None, encoder_depth=3, decoder_intermediate_channels=(8, 8, 8),
        decoder_fusion_channels=8, dynamic_img_size=True, patch_size=8, img_size=64, embed_dim=24, num_heads=3)
    x = torch.randn(2, 3, 64, 96)
    assert model.eval()(x).shape == (2, 1, 64, 96)
    model.train()(x).square().mean().backward()
    assert sum(p.grad.abs().sum() for p in model.encoder.model.blocks[-1].attn.parameters()) > 0
