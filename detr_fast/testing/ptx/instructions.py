"""Arithmetic instructions to Python statements: what each opcode reads, computes and writes.

A handler calls `out.read(operand, kind)` for a value as a numpy type ("u4", "f4", "?" …) and
`out.write(register, kind, expression)`. Names in expressions are those of `arithmetic`, np, and m, the running `Machine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from detr_fast.testing.ptx.parser import Instruction, Operand

KINDS = {
    **{f"{letter}{8 * size}": f"{kind}{size}" for letter, kind in zip("usb", "uiu") for size in (1, 2, 4, 8)},
    "f16": "f2",
    "f32": "f4",
    "f64": "f8",
    "bf16": "u2",
    "f16x2": "u4",
    "bf16x2": "u4",
    "pred": "?",
}
FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")


class Out(Protocol):
    """What instructions are emitted into; see `translator.Emitter`."""

    site: str

    def read(self, operand: Operand, kind: str) -> str: ...

    def array(self, operand: Operand, kind: str) -> str: ...

    def write(self, register: Operand, kind: str, expression: str) -> None: ...

    def write_all(self, registers: tuple[Operand, ...], kind: str, expression: str) -> None: ...

    def line(self, text: str) -> None: ...

    def condition(self) -> str: ...

    def parameter(self, name: str, kind: str, offset: int = 0) -> str: ...

    def size(self, register: Operand) -> int: ...


Handler = Callable[[Out, Instruction, list[str]], None]


def unsigned(kind: str) -> str:
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
        if (len(parts) > 2 and parts[1] not in ("lo",)) or (kind == "pred" and sign not in "&|^"):
            raise KeyError(one.opcode)
        word = unsigned(KINDS[kind])
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
        product, word = f"np.multiply({out.read(a, kind)}, {out.read(b, kind)}, dtype={wide})", unsigned(wide)
        product = product if word == wide else f"{product}.view({word})"
        out.write(d, word, f"({product} + {out.read(c, word)})")
    elif parts[1] == "lo":
        word = unsigned(kind)
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
    kind = unsigned(KINDS[parts[-1]])
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
    "eq": "{a} == {b}",
    "ne": "{a} != {b}",
    "lt": "{a} < {b}",
    "le": "{a} <= {b}",
    "gt": "{a} > {b}",
    "ge": "{a} >= {b}",
    "lo": "{a} < {b}",
    "ls": "{a} <= {b}",
    "hi": "{a} > {b}",
    "hs": "{a} >= {b}",
    "equ": "~(({a} < {b}) | ({a} > {b}))",
    "neu": "~({a} == {b})",
    "ltu": "~({a} >= {b})",
    "leu": "~({a} > {b})",
    "gtu": "~({a} <= {b})",
    "geu": "~({a} < {b})",
    "num": "~(np.isnan({a}) | np.isnan({b}))",
    "nan": "np.isnan({a}) | np.isnan({b})",
}


def _compare(out: Out, one: Instruction, parts: list[str]) -> None:
    """setp.CMP[.and|.or|.xor][.ftz].type p[|q], a, b[, c]; of f16x2, p is the lower half's, q the upper one's."""
    kind, (d, a, b, *rest) = parts[-1], one.operands
    operation = parts[1]
    if kind in ("f16x2", "bf16x2"):
        results = _compared_halves(out, operation, kind, a, b)
        _write_predicates(out, d, results, parts, rest)
        return
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
    _write_predicates(out, d, [compared, f"(~{compared})"], parts, rest)


def _compared_halves(out: Out, operation: str, kind: str, a: Operand, b: Operand) -> list[str]:
    """A comparison of the lower halves of two registers, and one of the upper halves; "ne" is true for NaN, as "neu" is."""
    halves = [[f"{kind[:-2]}s(half({out.array(op, 'u4')}, 2, {i}))" for op in (a, b)] for i in range(2)]
    return [f"({_COMPARE[operation].format(a=left, b=right)})" for left, right in halves]


def _set(out: Out, one: Instruction, parts: list[str]) -> None:
    """set.CMP.u32.f16x2 d, a, b: all bits of each half where it compares true."""
    d, a, b = one.operands
    low, high = (f"np.where({c}, 0xFFFF, 0)" for c in _compared_halves(out, parts[1], parts[-1], a, b))
    out.write(d, "u4", f"pack16({low}, {high})")


def _write_predicates(out: Out, d: Operand, results: list[str], parts: list[str], rest: list[Operand]) -> None:
    targets = str(d).split("|")
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


ARITHMETIC: dict[str, Handler] = {
    "add": _binary("+"),
    "sub": _binary("-"),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _fma,
    "min": _extreme("smaller", "np.minimum"),
    "max": _extreme("larger", "np.maximum"),
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
    "set": _set,
    "setp": _compare,
    "selp": _select,
    "mov": _move,
    "cvt": _convert,
    "cvta": lambda out, one, parts: _move(out, one, ["mov", parts[-1]]),
}
