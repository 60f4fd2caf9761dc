"""Import a timm that fails by itself."""
try:
    import timm  # noqa: F401
except ImportError as e:
    print(e)
