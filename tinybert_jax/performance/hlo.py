"""Reads the text of a compiled XLA program: what it sends between devices, and to and from memory.

All figures are of one device and one run of the program; what a loop holds counts once a round.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16}
_SHAPE = re.compile(r"\b(pred|bf16|f8e4m3fn|f8e5m2|[suf]\d+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:?=?\{"n":"(\d+)"')
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^}\]]*)')
_COPIES = ("copy", "transpose", "bitcast", "pad", "concatenate", "slice", "dynamic", "reshape")
_MOVES = {"parameter", "constant", "tuple", "get-tuple-element", "broadcast", "fusion"}
_NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "domain"),
}


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # opcode, operands and attributes

    @property
    def scope(self) -> str:
        """The named scopes around it, "teacher: attention, backward"; "rest" outside all."""
        path = re.search(r'op_name="([^"]*)"', self.text)
        return scope_of(path[1] if path else "")


class Collective(NamedTuple):
    """What devices send each other for one instruction."""

    kind: str  # one of COLLECTIVES
    scope: str
    num_calls: int
    num_bytes: int  # of the results of all calls


class Kernel(NamedTuple):
    """What one instruction of a program costs each time it runs."""

    instruction: Instruction
    num_runs: int
    kind: str  # product, copy (changes of layout too) or rest
    num_bytes: int  # from and to memory
    flops: int  # of products; 0 for a kernel that XLA did not write


class Program(NamedTuple):
    """The computations of a program, by name."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    def collectives(self) -> list[Collective]:
        """Every collective, also those inside fusions."""
        found = []
        for times, _, instruction in self._walk(self.entry, 1, into_fusions=True):
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                sizes = [num_bytes(part) for part in _parts(instruction.type)]
                if kind != instruction.opcode and kind in ("all-gather", "collective-permute"):
                    sizes = sizes[len(instruction.operands) :][: len(instruction.operands)]
                found.append(Collective(kind, instruction.scope, times, times * sum(sizes)))
        return found

    def memory_traffic(self) -> int:
        """Bytes read from and written to memory, without on-chip memory.

        A slice counts as itself, not as the array that it is taken from, and an array that is
        updated in place as the new part.
        """
        return sum(kernel.num_runs * kernel.num_bytes for kernel in self.kernels())

    def kernels(self) -> Iterator[Kernel]:
        """All that runs, without what only names, takes apart or calls."""
        for times, computation, own in self._walk(self.entry, 1, into_fusions=False):
            if own.opcode in _NO_TRAFFIC or own.opcode.endswith("-done"):
                continue
            traffic, flops = self._traffic(computation, own), self._flops(computation, own)
            kind = "copy" if self._only_moves(own) else self._kind(own)
            kind = "product" if flops else kind
            yield Kernel(own, times, kind, traffic, flops)

    def estimated_cycles(self) -> int:
        """The cycles that the compiler of TPUs expects; 0 in other programs.

        It tells none for collectives, waits for memory and Pallas kernels.
        """
        total = 0
        for times, _, instruction in self._walk(self.entry, 1, into_fusions=False):
            cycles = re.search(r'estimated_cycles"?:"?(\d+)', instruction.text)
            total += times * int(cycles[1]) if cycles else 0
        return total

    def cycles_by_kind(self) -> dict[str, int]:
        """`estimated_cycles` of products, of copies (changes of layout too) and of the rest."""
        sums = {"product": 0, "copy": 0, "rest": 0}
        for times, _, instruction in self._walk(self.entry, 1, into_fusions=False):
            cycles = re.search(r'estimated_cycles"?:"?(\d+)', instruction.text)
            sums[self._kind(instruction)] += times * int(cycles[1]) if cycles else 0
        return sums

    def reduced_bytes(self) -> dict[str, int]:
        """Bytes of the results of all-reduces, by their dtype."""
        sums: dict[str, int] = {}
        for times, _, instruction in self._walk(self.entry, 1, into_fusions=True):
            if instruction.opcode.removesuffix("-start") == "all-reduce":
                for dtype, dims, _ in _SHAPE.findall(instruction.type):
                    size = times * num_bytes(f"{dtype}[{dims}]")
                    sums[dtype] = sums.get(dtype, 0) + size
        return sums

    def _kind(self, instruction: Instruction) -> str:
        called = self._called(instruction) if instruction.opcode == "fusion" else []
        body = [own for name in called for _, _, own in self._walk(name, 1, into_fusions=True)]
        if any(own.opcode in ("convolution", "dot") for own in (instruction, *body)):
            return "product"
        word = instruction.name if called else instruction.opcode
        return "copy" if word.startswith(_COPIES) else "rest"

    def _only_moves(self, instruction: Instruction) -> bool:
        """Whether a fusion computes nothing; on GPUs its name does not tell."""
        called = self._called(instruction) if instruction.opcode == "fusion" else []
        body = [
            own.opcode for name in called for _, _, own in self._walk(name, 1, into_fusions=True)
        ]
        return bool(body) and all(word in _MOVES or word.startswith(_COPIES) for word in body)

    def _flops(self, computation: str, instruction: Instruction) -> int:
        """FLOPs of the products in an instruction, also of those that cuBLAS computes."""
        if instruction.opcode == "fusion":
            called = self._called(instruction)
            return sum(self._flops(name, own) for name in called for own in self.computations[name])
        found = _CONTRACTED.search(instruction.text)
        if found is None or not instruction.operands:
            return 0
        dims = _dims(self._types(computation).get(instruction.operands[0], ""))
        if not dims:  # an operand of another computation
            return 0
        summed = [dims[int(i)] for i in re.findall(r"\d+", found[1])]
        return 2 * math.prod(summed) * math.prod(_dims(instruction.type))

    def _walk(
        self, name: str, times: int, *, into_fusions: bool
    ) -> Iterator[tuple[int, str, Instruction]]:
        """(number of runs, computation, instruction) of all that run."""
        for instruction in self.computations.get(name, ()):
            yield times, name, instruction
            opcode = instruction.opcode
            rounds = self._rounds(instruction) if opcode == "while" else 1
            if opcode in ("while", "call", "conditional") or (
                into_fusions and (opcode in ("fusion", "async-start"))
            ):
                for called in self._called(instruction):
                    yield from self._walk(called, times * rounds, into_fusions=into_fusions)

    def _called(self, instruction: Instruction) -> list[str]:
        names = _CALLED.findall(instruction.text)
        for branches in _BRANCHES.findall(instruction.text):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        return [name for name in dict.fromkeys(names) if name in self.computations]

    def _rounds(self, loop: Instruction) -> int:
        """The number of rounds of a loop: the compiler's, else the bound that its condition has."""
        known = _TRIPS.search(loop.text)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
        bounds = [1]
        if condition:
            for _, _, instruction in self._walk(condition[1], 1, into_fusions=True):
                bounds += map(int, re.findall(r"^constant\((\d+)\)", instruction.text))
        return max(bounds)

    def _types(self, computation: str) -> dict[str, str]:
        return {own.name: own.type for own in self.computations[computation]}

    def _traffic(self, computation: str, instruction: Instruction) -> int:
        opcode = instruction.opcode
        if opcode in _NO_TRAFFIC or opcode.endswith("-done"):
            return 0
        parts = _parts(instruction.type)
        if opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            return num_bytes(parts[0])  # between memory and the chip
        types = self._types(computation)
        operands = [types.get(name, "") for name in instruction.operands]
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * num_bytes(instruction.type, in_memory=True)
        if opcode == "dynamic-update-slice":
            return 2 * num_bytes(operands[1], in_memory=True)
        if opcode == "fusion":
            return self._fusion_traffic(instruction, operands)
        return sum(num_bytes(part, in_memory=True) for part in (instruction.type, *operands))

    def _fusion_traffic(self, fusion: Instruction, operands: Sequence[str]) -> int:
        called = self._called(fusion)
        body = self.computations[called[0]] if called else ()
        types = {own.name: own.type for own in body}
        total = num_bytes(fusion.type, in_memory=True)
        updates = [own for own in body if own.opcode == "dynamic-update-slice"]
        in_place = {own.operands[0] for own in updates}
        for own in updates:  # the result is the array itself, of which one part is written
            whole, part = (num_bytes(types.get(name, "")) for name in own.operands[:2])
            if whole and num_bytes(fusion.type, in_memory=True) >= whole:
                total += part - whole
        for parameter in (own for own in body if own.opcode == "parameter"):
            index = int(re.findall(r"\((\d+)\)", parameter.text)[0])
            if index >= len(operands) or parameter.name in in_place:
                continue
            users = [own for own in body if parameter.name in own.operands]
            size = num_bytes(operands[index], in_memory=True)
            if users and all(own.opcode in ("dynamic-slice", "slice", "gather") for own in users):
                size = min(size, sum(num_bytes(own.type) for own in users))
            total += size
        return max(total, 0)


def read(text: str) -> Program:
    """The program whose text is `compiled.as_text()`."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            name, lines = begins[2], []
            entry = name if begins[1] else entry
        elif line.startswith("}"):
            computations[name] = tuple(lines)
        else:
            found = _INSTRUCTION.match(line)
            if found:
                lines.append(_instruction(found[1], found[2]))
    return Program(computations, entry)


def scope_of(path: str) -> str:
    """For the path jit(train_step)/vmap(transpose(jvp(~head)))/mul: "head, backward"."""
    scopes = re.findall(r"~([^/()]+)", path)
    if not scopes:
        return "rest"
    return ": ".join(dict.fromkeys(scopes)) + (", backward" if "transpose(" in path else "")


def num_bytes(type_text: str, *, in_memory: bool = False) -> int:
    """The size of all arrays of a type; `in_memory`: without those that lie on the chip."""
    total = 0
    for dtype, dims, layout in _SHAPE.findall(type_text):
        if in_memory and re.search(r"S\([1-9]", layout):
            continue
        bits = _ITEM_BITS.get(dtype) or int(dtype[1:])
        total += math.prod(map(int, dims.split(","))) * bits // 8 if dims else bits // 8
    return total


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    text = rest[end:].strip()
    opcode = text.split("(", 1)[0]
    arguments = text[len(opcode) :]
    arguments = arguments[1 : _closing(arguments)] if arguments else ""
    operands = () if opcode in ("parameter", "constant") else _names(arguments)
    return Instruction(name, rest[:end], opcode, operands, text)


def _names(arguments: str) -> tuple[str, ...]:
    """The names in the operands of an instruction, with or without their types before them."""
    if "%" in arguments:
        return tuple(re.findall(r"%([\w.\-]+)", arguments))
    return tuple(part.split()[-1] for part in arguments.split(",") if part.strip())


def _closing(text: str) -> int:
    """The index of the parenthesis that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i
    return len(text) - 1


def _dims(type_text: str) -> list[int]:
    """The shape of the first array of a type."""
    found = _SHAPE.search(type_text)
    return [int(size) for size in found[2].split(",")] if found and found[2] else []


def _parts(type_text: str) -> list[str]:
    """The elements of a tuple type; the type itself where it is none."""
    if not type_text.startswith("("):
        return [type_text]
    parts, depth, begin = [], 0, 1
    for i, letter in enumerate(type_text):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or not depth:
            parts.append(type_text[begin:i].strip())
            begin = i + 1
    return parts
