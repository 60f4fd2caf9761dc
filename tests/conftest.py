import torch

# the models are tiny: a second thread gains nothing, and costs a hundredfold where another process wants the core
torch.set_num_threads(1)
