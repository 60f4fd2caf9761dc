import torch

torch.set_num_threads(1)  # the models are tiny, threads would only wait for each other
