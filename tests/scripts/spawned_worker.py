"""Count the models in a worker process of a data loader."""
import torch


class Names(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        import timm
        return len(timm.list_models('evo_deit*'))


if __name__ == '__main__':
    loader = torch.utils.data.DataLoader(Names(), num_workers=1, multiprocessing_context='spawn')
    print(int(next(iter(loader))))
