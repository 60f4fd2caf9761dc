"""The command timm-evovit."""
