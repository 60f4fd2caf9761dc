#!/usr/bin/env python3
"""Draw docs/method.png: one evolution stage of Evo-ViT. The patches are chosen by hand, no model has looked at them.

    python docs/draw_method.py

The photograph is Chelsea by Stefan van der Walt, public domain (CC0), from scikit-image.
"""
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import numpy as np  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch, Rectangle  # noqa: E402
from skimage.data import chelsea  # noqa: E402
from skimage.transform import resize  # noqa: E402

GRID, PIXELS = 6, 32
KEEP = 18  # half of 36 patches
INK, SLOW, FAST, PALE = '#24292f', '#0969da', '#bc4c00', '#eceff2'


def photo():
    """Patches (36, 32, 32, 3) of the face, and a made-up class attention (36,)."""
    image = resize(chelsea()[0:300, 75:375], (GRID * PIXELS, GRID * PIXELS), anti_aliasing=True)
    patches = image.reshape(GRID, PIXELS, GRID, PIXELS, 3).swapaxes(1, 2).reshape(-1, PIXELS, PIXELS, 3)
    y, x = np.mgrid[:GRID, :GRID] + 0.5
    centres = ((2.0, 2.0), (4.6, 2.1), (3.5, 4.1), (1.6, 0.6))  # eyes, nose, ear
    attention = sum(np.exp(-((x - a) ** 2 + (y - b) ** 2) / 1.6) for a, b in centres)
    return patches, attention.ravel()


def main():
    figure = plt.figure(figsize=(11, 3.6), facecolor='white')
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 110), ylim=(1, 37))
    axis.axis('off')

    def patch(image, x, y, size, edge=None, fade=0.):
        image = (1 - fade) * image + fade * np.array([0.93, 0.94, 0.95])
        axis.imshow(image.clip(0, 1), extent=(x, x + size, y, y + size), zorder=2, interpolation='bilinear')
        if edge:
            axis.add_patch(Rectangle((x, y), size, size, fill=False, ec=edge, lw=1, zorder=3))

    def grid(x, y, size, draw):
        for i in range(GRID ** 2):
            draw(i, x + i % GRID * size, y + (GRID - 1 - i // GRID) * size, 0.94 * size)

    def arrow(start, end, color=INK, bend=0.):
        axis.annotate('', end, start, zorder=4, arrowprops=dict(
            arrowstyle='-|>', color=color, lw=1.6, mutation_scale=13, connectionstyle=f'arc3,rad={bend}'))

    def text(x, y, words, color=INK, size=9.5, va='center', **kwargs):
        axis.text(x, y, words, color=color, fontsize=size, ha='center', va=va, linespacing=1.35, **kwargs)

    def box(x, y, width, height, color):
        axis.add_patch(FancyBboxPatch(
            (x, y), width, height, boxstyle='round,pad=0,rounding_size=0.8', fc='white', ec=color, lw=1.5, zorder=2))

    patches, attention = photo()
    order = np.argsort(-attention, kind='stable')
    kept, rest = np.sort(order[:KEEP]), np.sort(order[KEEP:])

    text(11.5, 34.6, 'all patches', weight='bold')
    grid(2.5, 13.5, 3, lambda i, x, y, s: patch(patches[i], x, y, s))
    text(11.5, 9.3, 'complete grid\nin raster order')
    arrow((21.5, 22.5), (25.5, 22.5))

    text(35.5, 34.6, '1  class attention selects', weight='bold')
    grid(26.5, 13.5, 3, lambda i, x, y, s: patch(
        patches[i], x, y, s, SLOW if i in kept else None, 0. if i in kept else 0.82))
    text(35.5, 9.3, 'once per stage: informative patches\n(blue) and placeholders', size=9.5)

    text(61.2, 34.6, '2  blocks run on fewer tokens', weight='bold')
    arrow((45.5, 26.5), (50.5, 29.5), SLOW)
    axis.add_patch(Rectangle((51, 29.4), 1.9, 1.9, fc=INK, zorder=2))
    text(51.95, 27.8, 'class\ntoken', size=7, va='top')
    for j, i in enumerate(kept[:5]):
        patch(patches[i], 53.7 + 2.1 * j, 29.4, 1.9, SLOW)
    text(65.4, 30.2, '...', SLOW, 12)
    axis.add_patch(Rectangle((67, 29.4), 1.9, 1.9, fc=FAST, zorder=2))
    text(67.95, 27.8, 'representative\ntoken', FAST, 7, va='top')
    arrow((69.6, 30.35), (72.2, 30.35), SLOW)
    box(72.6, 27.3, 7.6, 5.6, SLOW)
    text(76.4, 30.1, 'unchanged\nblocks', SLOW, 8.5, zorder=3)
    arrow((80.5, 30.35), (87.6, 26.6), SLOW)

    arrow((45.5, 18.5), (50.5, 16.6), FAST)
    for j, i in enumerate(rest[:5]):
        patch(patches[i], 51 + 2.1 * j, 15.6, 1.9, FAST, 0.55)
    text(62.7, 16.4, '...', FAST, 12)
    arrow((64, 18), (67.6, 22.9), FAST, 0.15)
    text(57.6, 20.6, 'weighted mean', FAST, 8)
    box(68.2, 13.0, 15.2, 7, FAST)
    text(75.8, 16.5, '+ what the blocks added\nto the representative\ntoken', FAST, 7.5, zorder=3)
    arrow((76.4, 26.6), (76.4, 20.2), FAST)
    arrow((64.3, 16.5), (67.9, 16.5), FAST)
    arrow((83.8, 16.8), (87.6, 18.8), FAST)
    text(63, 9.3, 'slow update of informative patches (blue),\nfast update of placeholders (orange)')

    text(97.5, 34.6, '3  all patches again', weight='bold')
    grid(88.5, 13.5, 3, lambda i, x, y, s: patch(patches[i], x, y, s, SLOW if i in kept else FAST))
    text(97.5, 9.3, 'nothing was dropped; the next\nstage may choose others')
    text(55, 3.6, 'Drawing, patches chosen by hand. Evo-DeiT leaves out the representative token by default, as its '
         "authors' code does: placeholders then wait unchanged.\n"
         'By similarity, as in evolve, step 1 puts similar patches into groups. Each group is one token, and '
         'its patches receive what the blocks added to it.', '#57606a', 8)
    figure.savefig(Path(__file__).with_name('method.png'), dpi=130, facecolor='white')


if __name__ == '__main__':
    main()
