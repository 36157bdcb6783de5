"""Ways to damage a clone file: each takes the bytes of a good file and a random generator, and returns other bytes.

Most leave the digest wrong, as an accident would; those in `FORGED` recompute it, so that the checks after it are
tested too.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from pnc.foundation.tensor_files import DIGEST_KEY, METADATA_KEY, canonical_json

Mutation = Callable[[bytes, Random], bytes]

_EDGES: Sequence[Any] = (
    *(None, True, False, 0, 1, -1, 2, 255, 1 << 31, 1 << 53, 1 << 62, 1 << 63, -(1 << 63), 10**30, 0.5, -0.0, 1e308),
    *("", "x", "0", "\x00", "\ud800", "a" * 5000, "F64", "thin", "full", "input", "../../x", "é", "\n"),
    *([], {}, [0], [1 << 40] * 3, [[]], {"a": {}}, [None], [-1, -1], ["a", "a"], [1.5], [1, 4096, 4096]),
)
_NUMBERS = (0, 1, 7, 8, 100, 1 << 21, (1 << 21) + 1, 1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


# --------------------------------------------------------------------------------------------------------- raw bytes
def flip_bits(data: bytes, random: Random) -> bytes:
    """Flip one to eight bits anywhere."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 8)):
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def truncate(data: bytes, random: Random) -> bytes:
    """Cut off the end, or append bytes."""
    if random.random() < 0.8:
        return data[: random.randrange(len(data))]
    return data + random.randbytes(random.randint(1, 1000))


def change_length(data: bytes, random: Random) -> bytes:
    """Change the length of the header."""
    near = max(0, int.from_bytes(data[:8], "little") + random.randint(-9, 9))
    number = random.choice((near, random.choice(_NUMBERS), random.getrandbits(64), random.getrandbits(16)))
    return number.to_bytes(8, "little") + data[8:]


def move_bytes(data: bytes, random: Random) -> bytes:
    """Overwrite, remove, insert or exchange ranges of bytes."""
    size = random.randint(1, 64)
    a, b = sorted(random.sample(range(len(data)), 2))
    way = random.randrange(4)
    if way == 0:
        return data[:a] + random.randbytes(size) + data[a + size :]
    if way == 1:
        return data[:a] + data[b:]
    if way == 2:
        return data[:a] + data[b : b + size] + data[a:]
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


# ------------------------------------------------------------------------------------------------------------ header
def change_header(data: bytes, random: Random) -> bytes:
    """Change one field of the header."""
    header, body = _parted(data)
    return _joined(with_one_changed(header, random), body)


def name_huge_sizes(data: bytes, random: Random) -> bytes:
    """Give a tensor a huge shape, with offsets that fit it or with its old ones."""
    header, body = _parted(data)
    name = random.choice(_names(header))
    shape = [random.choice((0, 1, 1 << 20, 1 << 31, 1 << 40, 1 << 62)) for _ in range(random.randint(1, 10))]
    header[name]["shape"] = shape
    if random.random() < 0.7:
        n_bytes = 4
        for size in shape:
            n_bytes *= size
        header[name]["data_offsets"][1] = header[name]["data_offsets"][0] + n_bytes
    return _joined(header, body)


def swap_tensors(data: bytes, random: Random) -> bytes:
    """Exchange two tensors: their entries, or their offsets; or use one entry twice."""
    header, body = _parted(data)
    a, b = random.sample(_names(header), 2)
    way = random.randrange(3)
    if way == 0:
        header[a], header[b] = header[b], header[a]
    elif way == 1:
        places = header[a]["data_offsets"], header[b]["data_offsets"]
        header[b]["data_offsets"], header[a]["data_offsets"] = places
    else:
        header[a] = copy.deepcopy(header[b])
    return _joined(header, body)


def repeat_key(data: bytes, random: Random) -> bytes:
    """Repeat the key of a tensor or of the metadata."""
    header, body = _parted(data)
    key = random.choice(list(header))
    text = canonical_json(header)
    return _framed(text[:-1] + f",{json.dumps(key)}:{json.dumps(header[random.choice(list(header))])}}}", body)


def nest_deeply(data: bytes, random: Random) -> bytes:
    """Nest lists or objects deeply, in the header or in the metadata."""
    header, body = _parted(data)
    depth = int(10 ** random.uniform(1, 5.5))
    opening, closing = random.choice((("[", "]"), ('{"a":', "}")))
    text = opening * depth + "1" + closing * random.choice((depth, depth, 0))
    if random.random() < 0.5:
        return _framed(text, body)
    facts = canonical_json(json.loads(header["__metadata__"][METADATA_KEY]))
    header["__metadata__"][METADATA_KEY] = random.choice((text, facts[:-1] + f',"recipe":{text}}}'))
    return _joined(header, body)


# ---------------------------------------------------------------------------------------------------------- metadata
def change_metadata(data: bytes, random: Random) -> bytes:
    """Change one field of the metadata."""
    header, body = _parted(data)
    facts = with_one_changed(json.loads(header["__metadata__"][METADATA_KEY]), random)
    header["__metadata__"][METADATA_KEY] = json.dumps(facts)
    return _joined(header, body)


def forge_metadata(data: bytes, random: Random) -> bytes:
    """Change one to three fields of the metadata, and recompute the digest."""
    header, body = _parted(data)
    facts = json.loads(header["__metadata__"][METADATA_KEY])
    for _ in range(random.randint(1, 3)):
        facts = with_one_changed(facts, random)
    header["__metadata__"][METADATA_KEY] = json.dumps(facts)
    return _sealed(header, body)


def forge_tensors(data: bytes, random: Random) -> bytes:
    """Remove a tensor, rename it, or give it another type or shape of the same size; recompute the digest."""
    header, body = _parted(data)
    name = random.choice(_names(header))
    entry = header[name]
    way = random.randrange(4)
    if way == 0:
        start, stop = header.pop(name)["data_offsets"]
        body = body[:start] + body[stop:]
        for other in _names(header):
            if header[other]["data_offsets"][0] >= stop:
                header[other]["data_offsets"] = [place - (stop - start) for place in header[other]["data_offsets"]]
    elif way == 1:
        new = random.choice(
            (
                name + "x",
                "masks",
                "deltas.codes",
                "deltas.rank",
                "body.x",
                "head.weight",
                "head.own.weight",
                "calibration.gain",
                "",
            )
        )
        header[new] = header.pop(name)
    elif way == 2:
        entry["dtype"] = random.choice(("I32", "F32", "U8", "F16", "BF16", "BOOL"))
        size = {"I32": 4, "F32": 4, "U8": 1, "F16": 2, "BF16": 2, "BOOL": 1}[entry["dtype"]]
        entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // size]
    else:
        random.shuffle(entry["shape"])
        entry["shape"] = random.choice((entry["shape"], [*entry["shape"], 1], [1, *entry["shape"]]))
    return _sealed(header, body)


def forge_structure(data: bytes, random: Random) -> bytes:
    """Change one to three fields of the structure of the part, in a file that has one; recompute the digest."""
    header, body = _parted(data)
    facts = json.loads(header["__metadata__"][METADATA_KEY])
    for _ in range(random.randint(1, 3)):
        part = with_one_changed(facts.get("part", facts), random)
        facts = {**facts, "part": part} if "part" in facts else part
    header["__metadata__"][METADATA_KEY] = json.dumps(facts)
    return _sealed(header, body)


MUTATIONS: Mapping[str, Mutation] = {
    "bit flips": flip_bits,
    "truncation": truncate,
    "length field": change_length,
    "bytes moved": move_bytes,
    "header field": change_header,
    "huge sizes": name_huge_sizes,
    "tensors swapped": swap_tensors,
    "key twice": repeat_key,
    "deep JSON": nest_deeply,
    "metadata field": change_metadata,
    "metadata forged": forge_metadata,
    "tensors forged": forge_tensors,
    "structure forged": forge_structure,
}
FORGED = frozenset({"metadata forged", "tensors forged", "structure forged"})
"""Those that recompute the digest."""


# ------------------------------------------------------------------------------------------------------------- parts
def _parted(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:end])
    return header, data[end:]


def _joined(header: Any, body: bytes) -> bytes:
    return _framed(json.dumps(header), body)


def _framed(text: str, body: bytes) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw + body


def _sealed(header: dict[str, Any], body: bytes) -> bytes:
    """Build a file with a correct digest; metadata that is no longer an object holds none."""
    facts = json.loads(header["__metadata__"][METADATA_KEY])
    if isinstance(facts, dict):
        said = {key: value for key, value in facts.items() if key != DIGEST_KEY}
        listed = []
        for name in sorted(_names(header)):
            entry = header[name]
            values = hashlib.sha256(body[slice(*entry["data_offsets"])]).hexdigest()
            listed.append([name, entry["dtype"], entry["shape"], values])
        facts[DIGEST_KEY] = hashlib.sha256(canonical_json([said, listed]).encode()).hexdigest()
        header["__metadata__"][METADATA_KEY] = canonical_json(facts)
    return _joined(header, body)


def _names(header: Mapping[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def with_one_changed(value: Any, random: Random) -> Any:
    """A copy changed at one place: an edge case, a similar value, a value from elsewhere, a removal, or a new key."""
    whole = copy.deepcopy(value)
    places = [(parent, key) for parent, key in _places(whole)]
    if not places:
        return random.choice(_EDGES)
    parent, key = random.choice(places)
    way = random.random()
    if way < 0.45:
        parent[key] = copy.deepcopy(random.choice(_EDGES))
    elif way < 0.65:
        parent[key] = _nudged(parent[key], random)
    elif way < 0.8:
        other, place = random.choice(places)
        parent[key] = copy.deepcopy(other[place])
    elif way < 0.9:
        del parent[key]
    elif isinstance(parent, dict):
        parent[f"{key}{random.choice(('', ' ', 'x'))}"] = copy.deepcopy(random.choice(_EDGES))
    else:
        parent.insert(key, copy.deepcopy(random.choice(_EDGES)))
    return whole


def _nudged(value: Any, random: Random) -> Any:
    """A similar value."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, 2 * value, -value))
    if isinstance(value, float):
        return random.choice((value / 2, -value, int(value)))
    if isinstance(value, str) and value:
        place = random.randrange(len(value))
        return value[:place] + random.choice("0aZ_. ") + value[place + 1 :]
    return value[1:] if isinstance(value, list) else None


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place within nested lists and objects: (parent, key or index)."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [place for key in keys for place in [(value, key), *_places(value[key])]]
