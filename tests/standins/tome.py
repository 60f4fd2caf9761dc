"""Stands in for the package tome, which is on no index: its patch cuts a Vision Transformer to three blocks."""


class patch:  # noqa: N801
    @staticmethod
    def timm(model):
        model.blocks = model.blocks[:3]
