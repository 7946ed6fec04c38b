"""One PTX instruction to Python statements: what each opcode reads, computes and writes.

`emit(out, instruction)` calls `out.read(operand, kind)` for a value as a numpy type ("u4", "f4", "?" …) and
`out.write(register, kind, expression)`. Names in expressions are those of `arithmetic`, np, and m, the running `Machine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from detr_fast.testing.ptx.faults import Unsupported
from detr_fast.testing.ptx.parser import Instruction, Operand, address

KINDS = {
    **{f"{letter}{8 * size}": f"{kind}{size}" for letter, kind in zip("usb", "uiu") for size in (1, 2, 4, 8)},
    **{"f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4", "pred": "?"},
}
FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")
SPECIAL = ("tid", "ntid", "ctaid", "nctaid", "laneid", "warpid")


class Out(Protocol):
    """What instructions are emitted into; see `translator.Emitter`."""

    site: str

    def read(self, operand: Operand, kind: str) -> str: ...

    def array(self, operand: Operand, kind: str) -> str: ...

    def write(self, register: Operand, kind: str, expression: str) -> None: ...

    def write_all(self, registers: tuple[Operand, ...], kind: str, expression: str) -> None: ...

    def line(self, text: str) -> None: ...

    def condition(self) -> str: ...

    def parameter(self, name: str, kind: str) -> str: ...

    def size(self, register: Operand) -> int: ...


Handler = Callable[[Out, Instruction, list[str]], None]


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
            "compiles for sm_80; add the instruction to detr_fast/testing/ptx/instructions.py"
        ) from error


def _unsigned(kind: str) -> str:
    return "u" + kind[1:] if kind[0] == "i" else kind


def _floating(out: Out, one: Instruction, kind: str, formula: str, ftz: bool) -> None:
    """A formula of a, b, c on fp32 or fp64, or in fp64 on the halves of a register."""
    names = "abc"[: len(one.operands) - 1]
    if kind in ("f32", "f64"):
        values = {n: out.read(op, KINDS[kind]) for n, op in zip(names, one.operands[1:])}
        if ftz:
            values = {n: f"flush({v})" for n, v in values.items()}
        result = formula.format(**values)
        out.write(one.operands[0], KINDS[kind], f"flush({result})" if ftz else result)
        return
    prefix = "bf16s" if kind.startswith("b") else "f16s"
    values = {n: f"{prefix}({out.array(op, KINDS[kind].replace('f', 'u'))})" for n, op in zip(names, one.operands[1:])}
    result = f"{prefix}_back({formula.format(**values)})"
    wide = kind.endswith("x2")
    out.write(one.operands[0], "u4" if wide else "u2", f"{result}.view(u4)" if wide else result)


def _binary(sign: str) -> Handler:
    def handler(out: Out, one: Instruction, parts: list[str]) -> None:
        kind = parts[-1]
        if kind in FLOATS:
            _no_rounding_but_nearest(parts)
            _floating(out, one, kind, f"({{a}} {sign} {{b}})", "ftz" in parts)
            return
        if len(parts) > 2 and parts[1] not in ("lo",) or kind == "pred" and sign not in "&|^":
            raise KeyError(one.opcode)
        word = _unsigned(KINDS[kind])
        d, a, b = one.operands
        out.write(d, word, f"({out.read(a, word)} {sign} {out.read(b, word)})")

    return handler


def _no_rounding_but_nearest(parts: list[str]) -> None:
    wrong = {"rz", "rm", "rp", "sat", "rna"} & set(parts)
    if wrong:
        raise KeyError(".".join(sorted(wrong)))


def _multiply(out: Out, one: Instruction, parts: list[str]) -> None:
    if parts[1] == "wide":
        narrow, d, a, b = KINDS[parts[2]], *one.operands
        wide = narrow[0] + str(2 * int(narrow[1]))
        out.write(d, wide, f"np.multiply({out.read(a, narrow)}, {out.read(b, narrow)}, dtype={wide})")
    elif parts[1] == "hi":
        kind, d, a, b = KINDS[parts[2]], *one.operands
        out.write(d, kind, f"multiply_high({out.array(a, kind)}, {out.array(b, kind)})")
    else:
        _binary("*")(out, one, parts)


def _multiply_add(out: Out, one: Instruction, parts: list[str]) -> None:
    kind = KINDS[parts[2]]
    d, a, b, c = one.operands
    if parts[1] == "wide":
        wide = kind[0] + str(2 * int(kind[1]))
        product, word = f"np.multiply({out.read(a, kind)}, {out.read(b, kind)}, dtype={wide})", _unsigned(wide)
        product = product if word == wide else f"{product}.view({word})"
        out.write(d, word, f"({product} + {out.read(c, word)})")
    elif parts[1] == "lo":
        word = _unsigned(kind)
        out.write(d, word, f"({out.read(a, word)} * {out.read(b, word)} + {out.read(c, word)})")
    else:
        raise KeyError(one.opcode)


def _fma(out: Out, one: Instruction, parts: list[str]) -> None:
    _no_rounding_but_nearest(parts)
    formula = "fma({a}, {b}, {c})" if parts[-1] == "f32" else "({a} * {b} + {c})"
    _floating(out, one, parts[-1], formula, "ftz" in parts)


def _extreme(function: str, not_a_number: str) -> Handler:
    def handler(out: Out, one: Instruction, parts: list[str]) -> None:
        kind = parts[-1]
        if kind in FLOATS:
            chosen = not_a_number if "NaN" in parts else function
            _floating(out, one, kind, f"{chosen}({{a}}, {{b}})", "ftz" in parts)
        else:
            d, a, b = one.operands
            word = KINDS[kind]
            out.write(d, word, f"{not_a_number}({out.read(a, word)}, {out.read(b, word)})")

    return handler


def _divide(out: Out, one: Instruction, parts: list[str]) -> None:
    if parts[-1] in FLOATS:
        _no_rounding_but_nearest(parts)
        _floating(out, one, parts[-1], "({a} / {b})", "ftz" in parts)
    else:
        _integers("divide")(out, one, parts)


def _integers(function: str, kind: str | None = None) -> Handler:
    """All operands of one integer kind, as arrays."""

    def handler(out: Out, one: Instruction, parts: list[str]) -> None:
        word = kind or KINDS[parts[-1]]
        d, *operands = one.operands
        out.write(d, word, f"{function}({', '.join(out.array(op, word) for op in operands)})")

    return handler


def _unary(formula: str) -> Handler:
    def handler(out: Out, one: Instruction, parts: list[str]) -> None:
        if parts[-1] not in FLOATS:
            raise KeyError(one.opcode)
        _floating(out, one, parts[-1], formula, "ftz" in parts)

    return handler


def _negate(out: Out, one: Instruction, parts: list[str]) -> None:
    if parts[-1] in FLOATS:
        _floating(out, one, parts[-1], "(-{a})", "ftz" in parts)
    else:
        kind = KINDS[parts[-1]]
        out.write(one.operands[0], kind, f"(-{out.read(one.operands[1], kind)})")


def _absolute(out: Out, one: Instruction, parts: list[str]) -> None:
    if parts[-1] in FLOATS:
        _floating(out, one, parts[-1], "np.abs({a})", "ftz" in parts)
    else:
        kind = KINDS[parts[-1]]
        out.write(one.operands[0], kind, f"np.abs({out.read(one.operands[1], kind)})")


def _not(out: Out, one: Instruction, parts: list[str]) -> None:
    kind = _unsigned(KINDS[parts[-1]])
    out.write(one.operands[0], kind, f"(~{out.read(one.operands[1], kind)})")


def _shift(sign: str) -> Handler:
    def handler(out: Out, one: Instruction, parts: list[str]) -> None:
        kind = KINDS[parts[1]]
        d, a, amount = one.operands
        by = out.read(amount, "u4")
        if kind != "u4":  # numpy shifts by 32 and more as PTX does, down to the sign or to zero
            by = f"{by}.astype({kind})"
        out.write(d, kind, f"({out.read(a, kind)} {sign} {by})")

    return handler


def _bit_field(out: Out, one: Instruction, parts: list[str]) -> None:
    kind, (d, a, position, length) = KINDS[parts[1]], one.operands
    out.write(d, kind, f"extract({out.array(a, kind)}, {out.read(position, 'u4')}, {out.read(length, 'u4')})")


def _logic3(out: Out, one: Instruction, parts: list[str]) -> None:
    d, a, b, c, table = one.operands
    words = ", ".join(out.array(op, "u4") for op in (a, b, c))
    out.write(d, "u4", f"logic3({words}, {int(str(table), 0)})")


def _funnel(out: Out, one: Instruction, parts: list[str]) -> None:
    d, *operands = one.operands
    words = ", ".join(out.array(op, "u4") for op in operands)
    out.write(d, "u4", f"funnel({words}, {parts[1] == 'l'}, {parts[2] == 'clamp'})")


_COMPARE = {
    **{"eq": "{a} == {b}", "ne": "{a} != {b}", "lt": "{a} < {b}", "le": "{a} <= {b}", "gt": "{a} > {b}"},
    **{"ge": "{a} >= {b}", "lo": "{a} < {b}", "ls": "{a} <= {b}", "hi": "{a} > {b}", "hs": "{a} >= {b}"},
    **{"equ": "~(({a} < {b}) | ({a} > {b}))", "neu": "~({a} == {b})", "ltu": "~({a} >= {b})"},
    **{"leu": "~({a} > {b})", "gtu": "~({a} <= {b})", "geu": "~({a} < {b})"},
    **{"num": "~(np.isnan({a}) | np.isnan({b}))", "nan": "np.isnan({a}) | np.isnan({b})"},
}


def _compare(out: Out, one: Instruction, parts: list[str]) -> None:
    """setp.CMP[.and|.or|.xor][.ftz].type p[|q], a, b[, c]."""
    kind, (d, a, b, *rest) = parts[-1], one.operands
    operation = parts[1]
    if kind in ("f16", "bf16"):
        prefix = kind + "s"
        left, right = (f"{prefix}({out.array(op, 'u2')})" for op in (a, b))
    else:
        left, right = out.read(a, KINDS[kind]), out.read(b, KINDS[kind])
    if "ftz" in parts:
        left, right = f"flush({left})", f"flush({right})"
    formula = _COMPARE[operation]
    if operation == "ne" and kind in FLOATS:  # ordered: false for NaN, unlike numpy's
        formula = "({a} < {b}) | ({a} > {b})"
    compared = f"({formula.format(a=left, b=right)})"
    targets = str(d).split("|")
    results = [compared, f"(~{compared})"]
    if rest:
        sign = {"and": "&", "or": "|", "xor": "^"}[parts[2]]
        third = out.read(rest[0], "?")
        results = [f"({one_of} {sign} {third})" for one_of in results]
    for target, result in zip(targets, results):
        out.write(target, "?", result)


def _select(out: Out, one: Instruction, parts: list[str]) -> None:
    kind, (d, a, b, p) = KINDS[parts[1]], one.operands
    kind = "u2" if kind == "f2" else kind
    out.write(d, kind, f"np.where({out.read(p, '?')}, {out.read(a, kind)}, {out.read(b, kind)})")


def _move(out: Out, one: Instruction, parts: list[str]) -> None:
    d, source = one.operands
    kind = KINDS[parts[1]]
    kind = "u2" if kind == "f2" else kind
    if isinstance(d, tuple):
        whole = out.array(source, kind)
        for index, register in enumerate(d):
            if register != "_":
                out.write(register, f"u{int(kind[1]) // len(d)}", f"half({whole}, {len(d)}, {index})")
    elif isinstance(source, tuple):
        part = f"u{int(kind[1]) // len(source)}"
        values = [out.array(op, part) for op in source]
        if len(values) == 4:
            values = [f"pack16({values[0]}, {values[1]})", f"pack16({values[2]}, {values[3]})"]
            part = "u4"
        out.write(d, kind, f"{'pack16' if part == 'u2' else 'pack32'}({', '.join(values)})")
    else:
        out.write(d, kind, out.array(source, kind))


def _convert(out: Out, one: Instruction, parts: list[str]) -> None:
    """cvt[.rounding][.ftz].to.from."""
    modes, (to, source) = set(parts[1:-2]), parts[-2:]
    d, *operands = one.operands
    if to in ("f16x2", "bf16x2"):
        high, low = (_narrowed(out, to[:-2], f"{out.array(op, 'f4')}", modes) for op in operands)
        out.write(d, "u4", f"pack16({low}, {high})")
        return
    value = out.array(operands[0], "u2" if source == "f16" else KINDS[source])
    if source == "bf16":
        value, source = f"bf16_to_f32({value})", "f32"
    elif source == "f16":
        value = f"{value}.view(f2)"
    rounding = modes & {"rni", "rzi", "rmi", "rpi"}
    if "sat" in modes or modes & {"rm", "rp"}:
        raise KeyError(one.opcode)
    if source in FLOATS and to not in FLOATS and to != "tf32":
        kind = KINDS[to]
        out.write(d, kind, f"to_integer({value}, {rounding.pop()!r}, {kind!r})")
    elif to == "tf32":
        out.write(d, "u4", f"f32_to_tf32({value})")
    elif rounding:
        out.write(d, KINDS[to], f"ROUND[{rounding.pop()!r}]({value}).astype({KINDS[to]})")
    elif to in ("bf16", "f16"):
        out.write(d, "u2", _narrowed(out, to, f"{value}.astype(f4)", modes))
    elif to in FLOATS:
        value = f"flush({value})" if "ftz" in modes and source == "f32" else value
        result = f"{value}.astype({KINDS[to]})"
        out.write(d, KINDS[to], f"flush({result})" if "ftz" in modes and to == "f32" else result)
    else:
        narrow = KINDS[to]
        wide = narrow[0] + str(out.size(d))  # a narrow result is extended to the register
        value = f"{value}.astype({narrow})" if narrow != KINDS[source] else value
        out.write(d, wide, value if wide == narrow else f"{value}.astype({wide})")


def _narrowed(out: Out, to: str, value: str, modes: set[str]) -> str:
    if "rn" in modes:
        return f"f32_to_bf16({value})" if to == "bf16" else f"{value}.astype(f2).view(u2)"
    if "rz" in modes and to == "bf16":
        return f"f32_to_bf16_down({value})"
    raise KeyError(f"rounding {sorted(modes)} to {to}")


def _load(out: Out, one: Instruction, parts: list[str]) -> None:
    d, place = one.operands
    base, offset = address(place)
    space = parts[1].split("::")[0]
    kind = KINDS[parts[-1]].replace("f", "u")
    if space == "param":
        out.write(d, kind, out.parameter(base, kind))
        return
    if parts[1] not in ("global", "shared", "shared::cta"):
        raise KeyError(parts[1])
    registers = d if isinstance(d, tuple) else (d,)
    where = out.array(base, "u8" if space == "global" else "u4")
    size = int(kind[1])
    wide = kind[0] + str(max(size, *(out.size(r) for r in registers)))
    old = ", ".join(out.array(r, _unsigned(wide)) if r != "_" else "None" for r in registers)
    guarded = out.condition()
    before = f"({old},)" if guarded != "A" else "None"
    out.write_all(
        registers, wide, f"m.load_{space}({out.site}, {where}, {offset}, {kind!r}, {wide!r}, {len(registers)}, {guarded}, {before})"
    )


def _store(out: Out, one: Instruction, parts: list[str]) -> None:
    place, values = one.operands
    base, offset = address(place)
    space = parts[1].split("::")[0]
    if parts[1] not in ("global", "shared", "shared::cta"):
        raise KeyError(parts[1])
    kind = _unsigned(KINDS[parts[-1]].replace("f", "u"))
    registers = values if isinstance(values, tuple) else (values,)
    where = out.array(base, "u8" if space == "global" else "u4")
    stored = ", ".join(out.array(r, kind) for r in registers)
    out.line(f"m.store_{space}({out.site}, {where}, {offset}, {kind!r}, ({stored},), {out.condition()})")


def _atomic(out: Out, one: Instruction, parts: list[str]) -> None:
    """atom and red: the old value back, or nothing."""
    returns = parts[0] == "atom"
    d, place, *values = one.operands if returns else (None, *one.operands)
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
    if d is None or d == "_":
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
    assert isinstance(d, tuple) and isinstance(a, tuple) and isinstance(b, tuple) and isinstance(c, tuple)
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
    d, a, b, c, mask = one.operands
    if parts[2] not in ("bfly", "idx", "up", "down"):
        raise KeyError(one.opcode)
    target, *valid = str(d).split("|")
    call = f"m.shuffle({out.site}, {parts[2]!r}, {out.array(a, 'u4')}, {out.array(b, 'u4')}, {out.array(c, 'u4')}, A)"
    if valid:
        raise KeyError(one.opcode)
    out.write(target, "u4", call)


def _reduce_warp(out: Out, one: Instruction, parts: list[str]) -> None:
    d, a, mask = one.operands
    kind = KINDS[parts[3]]
    function = {"add": "add", "min": "minimum", "max": "maximum", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
    out.write(d, kind, f"m.reduce_warp({out.site}, np.{function[parts[2]]}, {out.array(a, kind)}, A)")


def _vote(out: Out, one: Instruction, parts: list[str]) -> None:
    d, p, mask = one.operands
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
    "add": _binary("+"),
    "sub": _binary("-"),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _fma,
    "min": _extreme("np.fmin", "np.minimum"),
    "max": _extreme("np.fmax", "np.maximum"),
    "div": _divide,
    "rem": _integers("remainder"),
    "neg": _negate,
    "abs": _absolute,
    "and": _binary("&"),
    "or": _binary("|"),
    "xor": _binary("^"),
    "not": _not,
    "shl": _shift("<<"),
    "shr": _shift(">>"),
    "bfe": _bit_field,
    "bfi": _integers("insert", "u4"),
    "lop3": _logic3,
    "prmt": _integers("permute", "u4"),
    "shf": _funnel,
    "popc": _integers("count_bits", "u4"),
    "clz": _integers("leading_zeros", "u4"),
    "brev": _integers("reverse_bits", "u4"),
    "ex2": _unary("ex2({a})"),
    "lg2": _unary("lg2({a})"),
    "rsqrt": _unary("rsqrt({a})"),
    "rcp": _unary("(1 / {a})"),
    "sqrt": _unary("np.sqrt({a})"),
    "tanh": _unary("tanh({a})"),
    "sin": _unary("sine({a})"),
    "cos": _unary("cosine({a})"),
    "setp": _compare,
    "selp": _select,
    "mov": _move,
    "cvt": _convert,
    "cvta": lambda out, one, parts: _move(out, one, ["mov", parts[-1]]),
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
