"""Draw which patches a model calls informative, or which share a slow token."""
import glob
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image

from ..base import InformativeTokens, eval_mode, informative_tokens

PANEL, GAP, LINE = 224, 8, 18  # pixels: smallest height of a panel, space between panels, height of a line of text


def find_images(names: Iterable[str], output: Path) -> List[Path]:
    """Find images by file, folder (at any depth) or glob pattern, except in the folder `output` of the drawings."""
    extensions = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths: List[Path] = []
    for name in names:
        if Path(name).is_dir():
            files = [path for path, _ in find_images_and_targets(name, extensions)[0]]
        else:
            files = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        found = [p for p in map(Path, files) if p.is_file() and output.resolve() not in (
            p.parent.resolve(), p.resolve().parent)]
        if not found:
            raise FileNotFoundError(f'{name}: no image found; files in the output folder {output} are left out.')
        paths += found
    return list(dict.fromkeys(paths))


def open_image(path: Path, mode: str = 'RGB') -> Image.Image:
    """Open a picture upright, otherwise as timm does. `mode` is 'RGB' or 'L'."""
    with Image.open(path) as file:
        return ImageOps.exif_transpose(file).convert(mode)


def data_config(model: nn.Module, args: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """timm's data configuration for the size and the number of channels that the model is built for.

    `args` are arguments of timm's scripts that replace the model's own configuration.
    """
    data = resolve_model_data_config(model, args)
    img_size = getattr(model, 'img_size', None) or getattr(model.patch_embed, 'img_size', None)
    data['input_size'] = (model.in_chans, *(img_size or data['input_size'][1:]))
    if model.in_chans == 1:
        data.update({k: (sum(data[k]) / len(data[k]),) for k in ('mean', 'std')})
    return data


def draw(pixels: torch.Tensor, tokens: Sequence[InformativeTokens], attention: bool, caption: str) -> Image.Image:
    """Draw a picture and, for each stage, the picture with uninformative patches faded, or with its groups of patches.

    Patches that share a slow token by similarity are painted in their mean colour, with a line around each group.

    Args:
        pixels: What the model saw, (3, H, W) in [0, 1].
        tokens: Stages of this one image; masks, groups and attention are (1, h, w).
        attention: Add the class attention behind each selection as a heat map.
        caption: Line below.
    """
    height, width = (round(n * max(PANEL / pixels.shape[1], 1)) for n in pixels.shape[1:])

    def enlarge(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x[None].float(), (height, width), mode='nearest-exact')[0]

    pixels = enlarge(pixels)
    panels = {'picture': pixels}
    for t in tokens:
        informative = enlarge(t.mask) > 0
        if t.attention is None:
            group = enlarge(t.groups)[0].long()
            sums = pixels.new_zeros(3, int(group.max()) + 1).index_add(1, group.flatten(), pixels.flatten(1))
            means = (sums / group.flatten().bincount())[:, group]
            lines = F.pad(group, [0, 1, 0, 1], value=-1)
            edge = (lines[:-1, :-1] != lines[1:, :-1]) | (lines[:-1, :-1] != lines[:-1, 1:])
            panels[f'groups from block {t.block}'] = torch.where(informative, pixels, means).masked_fill(edge, 1.)
            continue
        panels[f'informative from block {t.block}'] = torch.where(informative, pixels, 0.2 * pixels + 0.5)
        if attention:
            low, high = t.attention.aminmax()
            heat = enlarge((t.attention - low) / (high - low).clamp_min(1e-12))
            colours = torch.cat([(3 * heat - i).clamp(0, 1) for i in range(3)])  # black, red, yellow, white
            panels[f'attention before block {t.block}'] = 0.25 * pixels + 0.75 * colours
    font = ImageFont.load_default(13)
    strip = torch.cat([F.pad(panel, [GAP, 0], value=1.) for panel in panels.values()], dim=-1)
    right = max(GAP, round(font.getlength(caption)) + 2 * GAP - strip.shape[-1])
    out = to_pil_image(F.pad(strip, [0, right, GAP + LINE, GAP + LINE], value=1.))
    pen = ImageDraw.Draw(out)
    for i, label in enumerate(panels):
        pen.text((GAP + i * (width + GAP), GAP), label, fill='black', font=font)
    pen.text((GAP, out.height - LINE - GAP // 2), caption, fill='black', font=font)
    return out


def sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Contact sheet: pictures one below the other."""
    width = max(image.width for image in images)
    rows = [np.asarray(ImageOps.expand(image, (0, 0, width - image.width, 0), 'white')) for image in images]
    return Image.fromarray(np.vstack(rows))


@torch.no_grad()
def visualize(
        model: nn.Module, paths: Iterable[Path], attention: bool = False, classes: bool = True,
) -> Iterator[Tuple[Path, Union[Image.Image, Exception]]]:
    """Draw what an evolving model looks at in image files, and yield each file with its drawing or with the error.

    `classes` adds the five most probable classes to the caption if the model has the thousand classes of ImageNet.
    """
    data = data_config(model)
    transform = create_transform(**data)
    weight = next(model.parameters())
    mean, std = (torch.tensor(data[k], device=weight.device).view(-1, 1, 1) for k in ('mean', 'std'))
    labels = ImageNetInfo() if classes and model.num_classes == 1000 else None
    for path in paths:
        try:
            x = transform(open_image(path, 'L' if model.in_chans == 1 else 'RGB')).to(weight.device)
        except Exception as e:  # decoders raise errors of every kind
            yield path, e
            continue
        batch = x.unsqueeze(0).to(weight.dtype)
        caption = str(Path(*path.parts[-2:]))  # of images with the same name, the folder tells them apart
        if labels is not None:
            with eval_mode(model):
                top = model(batch)[0].float().softmax(dim=-1).topk(5)
            for p, c in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                caption += f'   {labels.index_to_description(c).split(",")[0]} {p:.1%}'
        pixels = (x * std + mean).clamp(0, 1).expand(3, -1, -1)
        yield path, draw(pixels, informative_tokens(model, batch), attention, caption)
