"""State dicts as the authors name them."""


def as_authors_name_it(state_dict):
    """timm's naming to that of the authors, written out the other way round than the package does it."""
    out = {}
    for key, value in state_dict.items():
        parts = key.split('.')
        if parts[0] == 'blocks':
            i, rest = parts[1], '.'.join(parts[2:])
            if rest.startswith('attn.qkv.'):
                third = len(value) // 3
                out[f'qks.{i}.qk.{parts[-1]}'], out[f'vs.{i}.v.{parts[-1]}'] = value[:2 * third], value[2 * third:]
                continue
            if rest.startswith('attn.proj.'):
                key = f'projs.{i}.{parts[-1]}'
            elif rest.startswith('norm1.'):
                key = f'norms.{i}.{parts[-1]}'
        elif parts[0] == 'fc_norm':
            key = f'norm.{parts[-1]}'
        out[key] = value
    return out
