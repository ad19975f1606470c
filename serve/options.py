"""The options of a property of a JSON Schema, and which values of a field they are."""
import re

from distil.values import value_name


def loose(name):
    """a name without case, `-`, `_` and blanks."""
    return re.sub(r'[\s_-]+', '', name).casefold()


def resolve(part, root):
    """a part of a schema without references at its top: the target and what stands beside the reference."""
    for _ in range(20):
        if not isinstance(part, dict):
            return {}
        inner = part.get('allOf')
        if isinstance(part.get('$ref'), str):
            target = root
            for key in part['$ref'].removeprefix('#').split('/')[1:]:
                target = target[key.replace('~1', '/').replace('~0', '~')] if isinstance(target, dict) else {}
            part = {**target, **{key: value for key, value in part.items() if key != '$ref'}}
        elif isinstance(inner, list) and len(inner) == 1 and isinstance(inner[0], dict):
            part = {**inner[0], **{key: value for key, value in part.items() if key != 'allOf'}}
        else:
            return part
    raise ValueError('its references go in a circle')


def read_options(part, root):
    """(options or None if the part names none, set of its types, True if it may be null)."""
    part = resolve(part, root)
    types = part.get('type', [])
    types = set(types) if isinstance(types, list) else {types}
    options = part['enum'] if isinstance(part.get('enum'), list) else None
    options = [part['const']] if 'const' in part else options
    for one in part.get('anyOf') or part.get('oneOf') or []:
        inner_options, inner_types, nullable = read_options(one, root)
        types |= inner_types | ({'null'} if nullable else set())
        if inner_options is not None:
            options = (options or []) + inner_options
    nullable = 'null' in types or options is not None and None in options
    return options, types - {'null'}, nullable


def match_options(options, leaf):
    """{number of a value: the caller's word for it} of those of a leaf's values that are among the
    options."""
    names, option_names = leaf.names, [value_name(option) for option in options]
    found = {n: options[option_names.index(name)] for n, name in enumerate(names) if name in option_names}
    if len({*map(loose, names)}) == len(names):                 # else two values differ in case alone
        for n, name in enumerate(names):
            alike = [option for option in options if loose(value_name(option)) == loose(name)]
            if n not in found and len(alike) == 1 and alike[0] not in found.values():
                found[n] = alike[0]
    return found


def match_yes_and_no(options, types, leaf, yes):
    """the same for true and false, or options that say yes and no, about a leaf with two values, one of
    which means yes."""
    yes = next((n for n, value in enumerate(leaf.values) if value_name(value) == value_name(yes)), None)
    if len(leaf) != 2 or yes is None:
        return {}
    if options is None:
        return {yes: True, 1 - yes: False} if types == {'boolean'} else {}
    lower = {value_name(option).lower(): option for option in options}
    pair = next((pair for pair in (('yes', 'no'), ('true', 'false')) if {*pair} <= {*lower}), None)
    return {yes: lower[pair[0]], 1 - yes: lower[pair[1]]} if pair and len(lower) == 2 else {}


def find_name(name, names):
    """the one of some names that a caller's name means, or None: the same, else the only one that is alike."""
    same = [other for other in names if other == name] or [other for other in names if loose(other) == loose(name)]
    return same[0] if len(same) == 1 else None


def alternatives(part, root):
    """the parts of which one applies, each without references and anyOf at its top."""
    part = resolve(part, root)
    inner = part.get('anyOf') or part.get('oneOf')
    return [one for part in inner for one in alternatives(part, root)] if isinstance(inner, list) else [part]
