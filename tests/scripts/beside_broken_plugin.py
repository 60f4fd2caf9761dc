"""Import timm beside a plugin that fails: it costs one warning."""
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import timm
message, = [str(w.message) for w in caught if 'plugin' in str(w.message)]
assert 'broken' in message and 'as broken as can be' in message, message
print(timm.is_model('resnet18'), timm.is_model('evo_deit_small'))
