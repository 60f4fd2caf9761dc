#!/usr/bin/env python3
"""Draw docs/method.png and docs/class_attention.png: one stage by similarity, and one by class attention.

    python docs/draw_method.py

Groups are of similar colour and place, and class attention is made up: no model has looked at the photograph. It is
Chelsea by Stefan van der Walt, public domain (CC0), from scikit-image.
"""
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from PIL import Image  # noqa: E402
from skimage.data import chelsea  # noqa: E402
from skimage.transform import resize  # noqa: E402

from timm_evovit.similarity import TokenGroups  # noqa: E402

GRID, PIXELS, CELL = 6, 32, 3.6  # patches on a side, pixels of one, its size in a drawing of 110 x 36
INK, SLOW, FAST = '#24292f', '#0969da', '#bc4c00'


def photo():
    """Patches (36, 32, 32, 3) of the face, their groups (36,), and a made-up class attention (36,)."""
    image = resize(chelsea()[0:300, 75:375], (GRID * PIXELS, GRID * PIXELS), anti_aliasing=True)
    patches = image.reshape(GRID, PIXELS, GRID, PIXELS, 3).swapaxes(1, 2).reshape(-1, PIXELS, PIXELS, 3)
    y, x = (np.mgrid[:GRID, :GRID] + 0.5).reshape(2, -1)
    features = np.stack([*patches.mean(axis=(1, 2)).T, patches.std(axis=(1, 2, 3)), x, y], axis=1)
    tokens = torch.from_numpy((features - features.mean(axis=0)) / features.std(axis=0))[None]
    groups = TokenGroups(tokens, 0, grid_size=(GRID, GRID))
    groups.join(groups.join(tokens, (1, 2), None), (5, 12), None)
    centres = ((2.0, 2.0), (4.6, 2.1), (3.5, 4.1), (1.6, 0.6))  # eyes, nose, ear
    attention = sum(np.exp(-((x - a) ** 2 + (y - b) ** 2) / 1.6) for a, b in centres)
    return patches, groups.slow_tokens(0).groups[0].numpy(), attention


def draw(name, titles, captions, patches, divided, groups, edges, tokens):
    """Four parts: patches, divided ones, tokens before and after the blocks, updated patches.

    `edges` are colours of what was updated, one per patch. A token is an image, and the colour of its edge.
    """
    figure = plt.figure(figsize=(11, 3.6), facecolor='white')
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 110), ylim=(0, 36))
    axis.axis('off')

    def square(image, x, y, size, edge=None):
        axis.imshow(image.clip(0, 1), extent=(x, x + size, y, y + size), zorder=2, interpolation='bilinear')
        if edge:
            axis.add_patch(Rectangle((x, y), size, size, fill=False, ec=edge, lw=2, zorder=4))

    def grid(left, images, groups, edges=(None,) * GRID ** 2):
        """With a white line between patches of different groups."""
        for i, (image, edge) in enumerate(zip(images, edges)):
            x, y = left + i % GRID * CELL, 29.6 - (i // GRID + 1) * CELL
            square(image, x, y, CELL)
            if edge:
                square(image, x + 0.15, y + 0.15, CELL - 0.3, edge)
            if i % GRID and groups[i] != groups[i - 1]:
                axis.plot((x, x), (y, y + CELL), color='white', lw=2, zorder=3)
            if i >= GRID and groups[i] != groups[i - GRID]:
                axis.plot((x, x + CELL), (y + CELL, y + CELL), color='white', lw=2, zorder=3)

    left = [1.5 + 28.4 * i for i in range(4)]
    grid(left[0], patches, range(GRID ** 2))
    grid(left[1], divided, groups)
    grid(left[3], patches, range(GRID ** 2), edges)
    step = 2 * GRID * CELL / len(tokens)  # in two rows
    for i, (image, edge) in enumerate(tokens):
        row, column = divmod(i, len(tokens) // 2)
        for top, color in ((29.6, None), (13.4, edge)):
            square(image, left[2] + (column + 0.05) * step, top - (row + 0.95) * step, 0.9 * step, color)
    middle = left[2] + GRID * CELL / 2
    box = dict(boxstyle='square,pad=0.7', fc='white', ec=INK, lw=2)
    blocks = 'the blocks' if name == 'class_attention' else 'unchanged blocks'
    axis.text(middle, 19, blocks, ha='center', va='center', size=13, bbox=box)
    arrows = [((x + GRID * CELL + 1, 18.8), (x + 27.6, 18.8)) for x in left[:3]]
    for start, end in (*arrows, ((middle, 24.2), (middle, 21.3)), ((middle, 16.9), (middle, 14))):
        axis.annotate('', end, start, arrowprops=dict(arrowstyle='-|>', color=INK, lw=2, mutation_scale=18))
    for x, title, caption in zip(left, titles, captions):
        axis.text(x + GRID * CELL / 2, 33, title, ha='center', va='center', size=14, weight='bold', color=INK)
        axis.text(x + GRID * CELL / 2, 6.6, caption, ha='center', va='top', size=12, color=INK, linespacing=1.3)
    path = Path(__file__).with_name(f'{name}.png')
    figure.savefig(path, dpi=130)
    Image.open(path).convert('RGB').quantize(256).save(path, optimize=True)


def main():
    patches, groups, attention = photo()
    black, orange = np.full((1, 1, 3), 0.14), np.array([[matplotlib.colors.to_rgb(FAST)]])
    flat = patches.mean(axis=(1, 2), keepdims=True) + 0 * patches
    means = [flat[groups == g].mean(axis=0) for g in range(groups.max() + 1)]
    draw(
        'method', ('36 patches', '1  group similar ones', '2  run fewer tokens', '3  update all patches'),
        ('a photograph', f'{len(means)} groups, one token\neach: the mean',
         'one per group, and\nthe class token, black', 'each by what the blocks\nadded to its group'),
        patches, [means[g] for g in groups], groups, [SLOW] * len(patches),
        [(image, SLOW) for image in (black, *means)])

    selected = attention >= np.median(attention)
    draw(
        'class_attention', ('36 patches', '1  select by attention', '2  run fewer tokens', '3  update all patches'),
        ('a photograph', f'the {selected.sum()} that the class\ntoken attends to most',
         'black: the class token\norange: mean of the rest', 'orange: by what the blocks\nadded to that mean'),
        patches, [p if s else 0.2 * p + 0.75 for p, s in zip(patches, selected)], range(GRID ** 2),
        [SLOW if s else FAST for s in selected],
        [(image, SLOW) for image in (black, *patches[selected])] + [(orange, FAST)])


if __name__ == '__main__':
    main()
