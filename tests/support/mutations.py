"""Damages the pack's files in 200 and more ways, and loads them under a hard limit of memory.

As a program: `mutations.py PACK FILE SCRATCH COUNT [HALF...]` prints a JSON list, one entry [kind, outcome, words] for
each mutated copy of FILE, an inversion or (with the suffix .ledits-store.safetensors) an attention store; outcome is
"refused", "loaded" or "failed". On Linux every load may map no more than twice the
file's size (1 MiB for smaller files): allocations beyond it fail, and show as "failed". Before that FILE itself is loaded
under the same limit, and each HALF, a float16 file whose record alone takes twice its size, under 1 MiB more.
"""
import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

FLOOR = 1 << 20


class Parts:
    """A safetensors file taken apart: header (a dict), data; `bytes()` puts it together."""

    def __init__(self, raw):
        (length,) = struct.unpack("<Q", raw[:8])
        self.header, self.data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])

    @property
    def tensors(self):
        return {k: v for k, v in self.header.items() if k != "__metadata__"}

    def signed(self):
        """With the checksum of the data as they are, and of the words unless the file is of version 1."""
        digest, held = hashlib.sha256(), self.header["__metadata__"]
        if held.get("version") != "1":
            for key in sorted(held.keys() - {"sha256"}):
                digest.update(f"[{json.dumps(key)}, {json.dumps(held[key])}]\n".encode())
        for name, item in sorted(self.tensors.items()):
            digest.update(f"{name} {item['dtype']} {item['shape']}\n".encode())
            digest.update(self.data[slice(*item["data_offsets"])])
        self.header["__metadata__"]["sha256"] = digest.hexdigest()
        return self

    def numbers(self, name, values):
        """Overwrite the first numbers of a float32 tensor."""
        at = self.tensors[name]["data_offsets"][0]
        self.data[at : at + 4 * len(values)] = struct.pack(f"<{len(values)}f", *values)
        return self

    def bytes(self, header=None):
        raw = json.dumps(self.header).encode() if header is None else header
        return struct.pack("<Q", len(raw)) + raw + bytes(self.data)


# --- one damage, by hand --------------------------------------------------------------------------------------------

def change(raw, edit, sign=True):
    """The bytes of a file after `edit(parts)`, with a checksum that fits unless told otherwise."""
    parts = Parts(raw)
    edit(parts)
    return (parts.signed() if sign else parts).bytes()


def item(name, key, value):
    """An edit of what the header says of a tensor."""
    return lambda parts: parts.header[name].__setitem__(key, value)


def word(key, value):
    """An edit of the header's words."""
    return lambda parts: parts.header["__metadata__"].__setitem__(key, value)


# --- many damages, by chance ----------------------------------------------------------------------------------------

ODD = [-1, 0, 1, 2**31, 2**63, 2**64 - 1, 10**400, 1.5, True, None, "1", "../../x", [], [[1]], {}, "\u0000", "9" * 5000]


def flips(raw, rng):
    out = bytearray(raw)
    for _ in range(rng.randint(1, 8)):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def header_flips(raw, rng):
    out = bytearray(raw)
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(rng.randint(1, 4)):
        out[rng.randrange(end)] = rng.randrange(256)
    return bytes(out)


def cut(raw, rng):
    return raw[: rng.choice([0, 4, 7, 8, 9, rng.randrange(len(raw)), len(raw) - 1])]


def longer(raw, rng):
    at = rng.choice([8, 100, len(raw) // 2, len(raw)])
    return raw[:at] + rng.randbytes(rng.randint(1, 64)) + raw[at:]


def lengths(raw, rng):
    n = rng.choice([0, 1, 2, 2**16, 2**16 + 1, 10**8, 2**31, 2**63, 2**64 - 1, rng.randrange(len(raw))])
    return struct.pack("<Q", n) + raw[8:]


def offsets(raw, rng):
    parts = Parts(raw)
    item = parts.tensors[rng.choice(sorted(parts.tensors))]
    k = rng.randrange(2)
    item["data_offsets"][k] = rng.choice([*ODD, item["data_offsets"][k] - 4, item["data_offsets"][k] + 4])
    return parts.bytes()


def shapes(raw, rng):
    parts = Parts(raw)
    item = parts.tensors[rng.choice(sorted(parts.tensors))]
    old = item["shape"]
    item["shape"] = rng.choice([[*old, rng.choice(ODD)], old[:-1], [rng.choice(ODD), *old[1:]], old[::-1], ODD[-1], None])
    with contextlib.suppress(TypeError):
        parts.signed()
    return parts.bytes()


def dtypes(raw, rng):
    parts = Parts(raw)
    item = parts.tensors[rng.choice(sorted(parts.tensors))]
    item["dtype"] = rng.choice(["F16", "F64", "BF16", "I32", "U8", "BOOL", "f32", "", 5, None, []])
    return parts.signed().bytes()


def names(raw, rng):
    parts = Parts(raw)
    old = rng.choice(sorted(parts.tensors))
    if rng.random() < 0.5:
        new = rng.choice(["../../etc/x", "/abs", "overrides.../x", "overrides.negative", "overrides.new", "", "x" * 9999])
        parts.header[new] = parts.header.pop(old)
    else:  # left out, or there twice
        parts.header = {k: v for k, v in parts.header.items() if k != old or rng.random() < 0.3}
        parts.header["again"] = copy.deepcopy(rng.choice([*parts.tensors.values()]))
    return parts.signed().bytes()


def metadata(raw, rng):
    parts = Parts(raw)
    words = parts.header["__metadata__"]
    key = rng.choice(sorted(words))
    if rng.random() < 0.3:
        del words[key]
    else:
        words[key] = rng.choice([*ODD, "2", "-1", "NaN", "[" * 9000, '{"a": NaN}', '{"name": "os.system"}', "x" * 600, "\n"])
    return parts.bytes()


def words(raw, rng):
    """One letter or digit of the words is another, so that the JSON stays one."""
    parts = Parts(raw)
    held = parts.header["__metadata__"]
    key = rng.choice(sorted(held))
    places = [i for i, letter in enumerate(held[key]) if letter.isalnum()]
    if places:
        at = rng.choice(places)
        other = rng.choice("0123456789" if held[key][at].isdigit() else "abcdefgxyz")
        held[key] = held[key][:at] + other + held[key][at + 1 :]
    return parts.bytes()


def numbers(raw, rng):
    parts = Parts(raw)
    values = [[float("nan")], [float("inf")], [-1.0], [1e30, 1e30], [0.0, 1.0, 2.0]]
    return parts.numbers(rng.choice(sorted(parts.tensors)), rng.choice(values)).signed().bytes()


def bombs(raw, rng):
    parts = Parts(raw)
    text, some = json.dumps(parts.header), sorted(parts.tensors)[0]
    header = rng.choice([
        "[" * 60000, '{"a":' * 10000, "{" + '"a":[],' * 8000 + '"b":[]}', "[" + "{}," * 20000 + "{}]", "9" * 60000,
        text[:-1] + f', "{some}": ' + json.dumps(parts.header[some]) + "}", text + text, '{"__metadata__": {}}',
        '{"__metadata__": 5}', "{}", "null", '{"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
        json.dumps(parts.header | {f"t{k}": parts.header[some] for k in range(400)}),
    ])
    return parts.bytes(header.encode() + b" " * rng.choice([0, 0, 8, 70000]))


KINDS = [flips, header_flips, cut, longer, lengths, offsets, shapes, dtypes, names, metadata, numbers, bombs]


def mutations(raw, count, seed=20):
    """`count` pairs (kind, bytes), the same for the same seed, every kind equally often."""
    rng = random.Random(seed)
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        yield kind.__name__, kind(raw, rng)


def unsigned(raw, count, seed):
    """As `mutations`, of those kinds alone that leave the checksum as it was, or spoil it."""
    rng = random.Random(seed)
    kinds = [flips, header_flips, cut, longer, lengths, offsets, metadata, words, bombs]
    for i in range(count):
        kind = kinds[i % len(kinds)]
        damaged = kind(raw, rng)
        if damaged != raw:
            yield kind.__name__, damaged


@contextlib.contextmanager
def limited(size):
    """May map `size` more bytes than now. Without effect outside of Linux."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _of_inversions():
    from pack.files import inversion_file

    return lambda path: {"latents": inversion_file.load(path, lambda plain: plain).latents}


def _of_stores():
    from pack.files import store_file

    return lambda path: store_file.load(path).tensors()


def check_204(file, scratch, *halves):
    """Load 204 damaged copies of a file in a process of its own: none may crash, hang or take memory, most are refused."""
    # glibc would keep freed blocks for the next load, which could then allocate unseen
    command = [sys.executable, __file__, str(Path(__file__).resolve().parents[2]), file, scratch, "204", *halves]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout)
    assert len(results) == 204 and {kind for kind, _, _ in results} == {kind.__name__ for kind in KINDS}
    assert [r for r in results if r[1] == "failed" or "memory" in r[2]] == []
    for kind, outcome, words in results:
        if outcome == "refused":
            assert words.endswith(".") and len(words) < 400 and words.isprintable(), words
        elif words != "same numbers":
            assert kind in ("numbers", "names", "shapes", "dtypes")  # those that come with a right checksum
    assert sum(outcome == "refused" for _, outcome, _ in results) > 150


def main(pack, file, scratch, count, *halves):
    spec = importlib.util.spec_from_file_location(
        "pack", Path(pack) / "__init__.py", submodule_search_locations=[pack]
    )
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import torch

    load = _of_stores() if file.endswith(".ledits-store.safetensors") else _of_inversions()
    torch.set_num_threads(1)
    raw, scratch = Path(file).read_bytes(), Path(scratch)
    scratch.write_bytes(raw)
    exact = load(scratch)  # and everything is imported
    with limited(2 * len(raw)):
        load(scratch)
    for half in halves:
        with limited(2 * Path(half).stat().st_size + FLOOR):
            load(half)
    out = []
    for kind, damaged in mutations(raw, int(count)):
        scratch.write_bytes(damaged)
        size = len(damaged)
        del damaged
        try:
            with limited(max(2 * size, FLOOR)):
                back = load(scratch)
            same = back.keys() == exact.keys() and all(torch.equal(back[name], exact[name]) for name in exact)
            out.append([kind, "loaded", f"{'same' if same else 'other'} numbers"])
            del back
        except ValueError as error:
            out.append([kind, "refused", str(error)])
        except BaseException as error:
            out.append([kind, "failed", f"{type(error).__name__}: {error}"])
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
