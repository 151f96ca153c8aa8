"""Writes the C++ that puts device code into the extension module, and defines each kernel that a launcher names.

    python embed.py OUT IMAGES TARGETS OBJECT...

IMAGES: folder with STEM.TARGET.cubin and STEM.compute_NN.ptx of every source. TARGETS: words like sm_90a. OBJECTs: what
the compiler of the host made, STEM.cu.o and STEM.cpp.o. A kernel is a symbol that objects of .cu name and no object
defines (host.h); it has to be in every image of one of those sources.
"""

import re
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

NAMESPACE = "_ZN4mimo"
PTX, CUBIN = "compute_", "sm_"


class Section(NamedTuple):
    name: str
    kind: int
    offset: int
    size: int
    link: int


class Symbol(NamedTuple):
    name: str
    kind: int  # STT_*
    defined: bool


def sections(data: bytes) -> list[Section]:
    """Of an ELF file of 64 bits, little endian: objects of the host and machine code for GPUs alike."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not an ELF file of 64 bits, little endian")
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", data, 0x3A)
    rows = [struct.unpack_from("<IIQQQQIIQQ", data, start + i * size) for i in range(count)]
    names = rows[names_at][4]
    return [Section(_text(data, names + row[0]), row[1], row[4], row[5], row[6]) for row in rows]


def symbols(data: bytes) -> list[Symbol]:
    found = sections(data)
    table = next((section for section in found if section.kind == 2), None)  # SHT_SYMTAB
    if table is None:
        return []
    names, listed = found[table.link].offset, []
    for at in range(table.offset, table.offset + table.size, 24):
        name, info, _, section, _, _ = struct.unpack_from("<IBBHQQ", data, at)
        listed.append(Symbol(_text(data, names + name), info & 15, section != 0))
    return listed


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def image_path(folder: Path, source: str, target: str) -> Path:
    return folder / f"{source}.{target}.{'ptx' if target.startswith(PTX) else 'cubin'}"


def kernels_in(image: Path) -> set[str]:
    """Names of the kernels in an image."""
    if image.suffix == ".ptx":
        return set(re.findall(r"\.entry\s+(\w+)", image.read_text()))
    # A section each; functions among the symbols are also the compiler's own, which differ from one GPU to the other.
    found = sections(image.read_bytes())
    return {section.name.removeprefix(".text.") for section in found if section.name.startswith(".text.")}


def find_kernels(objects: dict[str, bytes], folder: Path, targets: list[str]) -> dict[str, str]:
    """Kernel -> the first source that names it and has it in every image; ValueError when there is none. objects: by
    their file names."""
    listed = {name: symbols(data) for name, data in objects.items()}
    defined = {symbol.name for table in listed.values() for symbol in table if symbol.defined}
    inside, found, missing = {}, {}, {}
    for source in sources_of(objects):
        images = [image_path(folder, source, target) for target in targets]
        inside[source] = set.intersection(*map(kernels_in, images))
        if hidden := sorted(name for name in inside[source] if "_GLOBAL__N_" in name):
            raise ValueError(
                f"{source}.cu has a kernel in an anonymous namespace: {hidden[0]}; the host cannot name it"
            )
        for name in (symbol.name for symbol in listed[f"{source}.cu.o"] if symbol.name.startswith(NAMESPACE)):
            if name in inside[source]:
                found.setdefault(name, source)
            elif name not in defined:
                missing.setdefault(name, source)
    for name in missing.keys() - found.keys():
        raise ValueError(f"{missing[name]}.cu names {name}, which no device code for {', '.join(targets)} defines")
    return dict(sorted(found.items()))


def sources_of(objects: Iterable[str]) -> list[str]:
    return sorted(name.removesuffix(".cu.o") for name in objects if name.endswith(".cu.o"))


def quoted(text: object) -> str:
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def table(objects: dict[str, bytes], folder: Path, targets: list[str]) -> str:
    """The C++."""
    sources = sources_of(objects)
    lines = [
        "// Written by embed.py.",
        '#include "driver.h"',
        "namespace mimo::driver {",
        f"static_assert({len(targets)} <= kMostTargets);",
        f"extern const int kTargets = {len(targets)}, kSources = {len(sources)};",
    ]
    kernels = find_kernels(objects, folder, targets)
    for source in sources:
        for target in targets:
            name, path = f"mimo_image_{source}_{target}", image_path(folder, source, target).resolve()
            # 64 bytes: as an ELF file lies in a page. Text is ended by a zero.
            lines += [
                f'asm(".pushsection .rodata.{name},\\"a\\",@progbits\\n.balign 64\\n{name}:\\n"',
                f'    ".incbin " {quoted(quoted(path))} "\\n{name}_end:\\n.byte 0\\n.popsection\\n");',
                f'extern "C" __attribute__((visibility("hidden"))) const char {name}[], {name}_end[];',
            ]
        images = ", ".join(
            f'{{"{target}", mimo_image_{source}_{target}, mimo_image_{source}_{target}_end}}' for target in targets
        )
        lines += [
            f"static const Image images_{source}[] = {{{images}}};",
            f'static Source source_{source} = {{"{source}.cu", images_{source}, {{}}}};',
        ]
    lines.append(f"Source* const kAllSources[] = {{{', '.join(f'&source_{source}' for source in sources)}}};")
    for number, (kernel, source) in enumerate(kernels.items()):
        lines += [
            f'extern Kernel kernel_{number} __asm__("{kernel}") __attribute__((visibility("hidden")));',
            f'Kernel kernel_{number} = {{"{kernel}", &source_{source}, {{}}}};',
        ]
    return "\n".join([*lines, "}  // namespace mimo::driver", ""])


def main(out: str, folder: str, targets: str, *objects: str) -> None:
    contents = {Path(path).name: Path(path).read_bytes() for path in objects}
    try:
        text = table(contents, Path(folder), targets.split())
    except ValueError as error:
        sys.exit(f"embed.py: {error}")
    Path(out).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
