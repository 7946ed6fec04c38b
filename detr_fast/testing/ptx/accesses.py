"""Instructions that touch memory or concern whole warps, to calls of the machine m; and `emit`, for any instruction."""

from __future__ import annotations

from detr_fast.testing.ptx.faults import Unsupported
from detr_fast.testing.ptx.instructions import ARITHMETIC, KINDS, Handler, Out, unsigned
from detr_fast.testing.ptx.parser import Instruction, address


def emit(out: Out, one: Instruction) -> None:
    """Append what `one` does; raises `Unsupported` with its text where it is not known."""
    parts = one.parts
    handler = HANDLERS.get(parts[0])
    try:
        if handler is None:
            raise KeyError(parts[0])
        handler(out, one, parts)
    except (KeyError, ValueError, IndexError) as error:
        raise Unsupported(
            f"the emulator does not know '{one.text}' (PTX line {one.line}, {one.source}): {error!r}. It runs what Triton "
            "compiles for sm_80; add the instruction to detr_fast/testing/ptx"
        ) from error


def _load(out: Out, one: Instruction, parts: list[str]) -> None:
    d, place = one.operands
    base, offset = address(place)
    space = parts[1].split("::")[0]
    kind = KINDS[parts[-1]].replace("f", "u")
    if space == "param":
        out.write(d, kind, out.parameter(base, kind, offset))
        return
    if parts[1] not in ("global", "shared", "shared::cta"):
        raise KeyError(parts[1])
    registers = d if isinstance(d, tuple) else (d,)
    where = out.array(base, "u8" if space == "global" else "u4")
    size = int(kind[1])
    wide = kind[0] + str(max(size, *(out.size(r) for r in registers)))
    old = ", ".join(out.array(r, unsigned(wide)) if r != "_" else "None" for r in registers)
    guarded = out.condition()
    before = f"({old},)" if guarded != "A" else "None"
    out.write_all(
        registers,
        wide,
        f"m.load_{space}({out.site}, {where}, {offset}, {kind!r}, {wide!r}, {len(registers)}, {guarded}, {before})",
    )


def _store(out: Out, one: Instruction, parts: list[str]) -> None:
    place, values = one.operands
    base, offset = address(place)
    space = parts[1].split("::")[0]
    if parts[1] not in ("global", "shared", "shared::cta"):
        raise KeyError(parts[1])
    kind = unsigned(KINDS[parts[-1]].replace("f", "u"))
    registers = values if isinstance(values, tuple) else (values,)
    where = out.array(base, "u8" if space == "global" else "u4")
    stored = ", ".join(out.array(r, kind) for r in registers)
    out.line(f"m.store_{space}({out.site}, {where}, {offset}, {kind!r}, ({stored},), {out.condition()})")


def _atomic(out: Out, one: Instruction, parts: list[str]) -> None:
    """atom and red: the old value back, or nothing."""
    returns = parts[0] == "atom"
    d, place, *values = one.operands if returns else ("_", *one.operands)
    base, offset = address(place)
    space = next(part.split("::")[0] for part in parts if part.split("::")[0] in ("global", "shared"))
    operation = next(p for p in parts if p in ("add", "min", "max", "exch", "cas", "and", "or", "xor"))
    kind = KINDS[parts[-1]]
    lanes = [v if isinstance(v, tuple) else (v,) for v in values]
    if len(lanes[0]) != 1 or parts[-1] in ("f16", "bf16", "f16x2", "bf16x2"):
        raise KeyError(one.opcode)
    where = out.array(base, "u8" if space == "global" else "u4")
    operands = ", ".join(out.array(v[0], kind) for v in lanes)
    guarded = out.condition()
    call = f"m.atomic({out.site}, {space!r}, {where}, {offset}, {operation!r}, {kind!r}, ({operands},), {guarded}, {{old}})"
    if d == "_":
        out.line(call.format(old="None"))
    else:
        register = d[0] if isinstance(d, tuple) else d
        out.write(register, kind, call.format(old=out.array(register, kind) if guarded != "A" else "None"))


def _copy_async(out: Out, one: Instruction, parts: list[str]) -> None:
    """cp.async.{ca,cg}.shared.global, .commit_group and .wait_group."""
    if parts[2] == "commit_group":
        out.line(f"m.commit_group({out.site}, A)")
    elif parts[2] in ("wait_group", "wait_all"):
        out.line(f"m.wait_group({out.site}, {int(str(one.operands[0]), 0) if one.operands else 0}, A)")
    elif parts[2] in ("ca", "cg"):
        to, source, size, *rest = one.operands
        (base, offset), (from_base, from_offset) = address(to), address(source)
        bytes_read = out.array(rest[0], "u4") if rest else "None"
        out.line(
            f"m.copy_async({out.site}, {out.array(base, 'u4')}, {offset}, {out.array(from_base, 'u8')}, {from_offset}, "
            f"{int(str(size), 0)}, {bytes_read}, {out.condition()})"
        )
    else:
        raise KeyError(one.opcode)


def _matrix_multiply(out: Out, one: Instruction, parts: list[str]) -> None:
    """mma.sync.aligned.mMnNkK.row.col.d.a.b.c with fp32 accumulators."""
    shape, (to, left, right, accumulator) = parts[3], parts[-4:]
    known = {("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16"), ("m16n8k8", "tf32"), ("m16n8k8", "bf16")}
    if (shape, left) not in known or left != right or (to, accumulator) != ("f32", "f32"):
        raise KeyError(one.opcode)
    d, a, b, c = one.operands
    if not isinstance(d, tuple):
        raise KeyError(one.opcode)
    left_words, right_words = (", ".join(out.array(r, "u4") for r in registers) for registers in (a, b))
    sums = ", ".join(out.array(r, "f4") for r in c)
    out.write_all(d, "f4", f"m.mma({out.site}, {left!r}, ({left_words},), ({right_words},), ({sums},), A)")


def _load_matrix(out: Out, one: Instruction, parts: list[str]) -> None:
    d, place = one.operands
    base, offset = address(place)
    registers = d if isinstance(d, tuple) else (d,)
    if "m8n8" not in parts or parts[-1] != "b16":
        raise KeyError(one.opcode)
    call = f"m.load_matrix({out.site}, {out.array(base, 'u4')}, {offset}, {len(registers)}, {'trans' in parts}, A)"
    out.write_all(registers, "u4", call)


def _shuffle(out: Out, one: Instruction, parts: list[str]) -> None:
    d, a, b, c, _mask = one.operands
    if parts[2] not in ("bfly", "idx", "up", "down"):
        raise KeyError(one.opcode)
    target, *valid = str(d).split("|")
    call = f"m.shuffle({out.site}, {parts[2]!r}, {out.array(a, 'u4')}, {out.array(b, 'u4')}, {out.array(c, 'u4')}, A)"
    if valid:
        raise KeyError(one.opcode)
    out.write(target, "u4", call)


def _reduce_warp(out: Out, one: Instruction, parts: list[str]) -> None:
    d, a, _mask = one.operands
    kind = KINDS[parts[3]]
    function = {
        "add": "add",
        "min": "minimum",
        "max": "maximum",
        "and": "bitwise_and",
        "or": "bitwise_or",
        "xor": "bitwise_xor",
    }
    out.write(d, kind, f"m.reduce_warp({out.site}, np.{function[parts[2]]}, {out.array(a, kind)}, A)")


def _vote(out: Out, one: Instruction, parts: list[str]) -> None:
    d, p, _mask = one.operands
    kind = "u4" if parts[2] == "ballot" else "?"
    if parts[2] not in ("ballot", "any", "all"):
        raise KeyError(one.opcode)
    out.write(d, kind, f"m.vote({out.site}, {parts[2]!r}, {out.array(p, '?')}, A)")


def _barrier_warp(out: Out, one: Instruction, parts: list[str]) -> None:
    if parts[1:] != ["warp", "sync"]:
        raise KeyError(one.opcode)
    out.line(f"m.warp_barrier({out.site}, A)")


def _nothing(out: Out, one: Instruction, parts: list[str]) -> None:
    """Fences order a thread's own accesses and are no barriers; cache hints change nothing."""


HANDLERS: dict[str, Handler] = {
    **ARITHMETIC,
    "ld": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "cp": _copy_async,
    "mma": _matrix_multiply,
    "ldmatrix": _load_matrix,
    "shfl": _shuffle,
    "redux": _reduce_warp,
    "vote": _vote,
    "bar": _barrier_warp,
    "barrier": _barrier_warp,
    "membar": _nothing,
    "fence": _nothing,
    "createpolicy": _nothing,
    "prefetch": _nothing,
}
