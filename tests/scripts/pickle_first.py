"""Save an evolved model, then load it in a process in which unpickling is the first to import timm and the plugin."""
import subprocess
import sys

import torch

if len(sys.argv) == 1:
    import timm

    import timm_evovit
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=3, num_classes=2)
    torch.save(timm_evovit.evolve(model), 'model.pt')
    sys.exit(subprocess.run([sys.executable, __file__, 'load']).returncode)

model = torch.load('model.pt', weights_only=False)
import timm  # noqa: E402

import timm_evovit.evo_vit  # noqa: E402

assert type(model) is timm_evovit.evo_vit.EvolvedVisionTransformer
assert timm_evovit.evo_vit.__spec__.origin.endswith('evo_vit.py')
print(timm.is_model('evo_deit_small'), timm.is_model('evo_levit_256'))
