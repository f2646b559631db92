"""The contract's rules for JSON once more, written as plainly as possible: byte by byte, slow, with nothing shared."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal


class RefusedError(Exception):
    """The model does not take the line."""


def rune(data: bytes, at: int) -> tuple[int, int]:
    """Returns the code point at a place and its length; (-1, 1) for a byte that begins no valid UTF-8 (RFC 3629)."""
    first = data[at]
    if first < 0x80:
        return first, 1
    for length, low, high, mask in ((2, 0xC2, 0xDF, 0x1F), (3, 0xE0, 0xEF, 0x0F), (4, 0xF0, 0xF4, 0x07)):
        if low <= first <= high:
            tail = data[at + 1 : at + length]
            if len(tail) != length - 1 or any(byte & 0xC0 != 0x80 for byte in tail):
                return -1, 1
            value = first & mask
            for byte in tail:
                value = value << 6 | byte & 0x3F
            least = {2: 0x80, 3: 0x800, 4: 0x10000}[length]
            if value < least or value > 0x10FFFF or 0xD800 <= value <= 0xDFFF:
                return -1, 1
            return value, length
    return -1, 1


def model_string(data: bytes) -> bytes:
    """Returns bytes that may be no UTF-8 as a JSON string."""
    out, at = b'"', 0
    names = {0x22: b'\\"', 0x5C: b"\\\\", 8: b"\\b", 12: b"\\f", 10: b"\\n", 13: b"\\r", 9: b"\\t"}
    while at < len(data):
        value, length = rune(data, at)
        if value == -1:
            out += b"\\ufffd"
        elif value in names:
            out += names[value]
        elif value < 0x20 or value in (0x3C, 0x3E, 0x26, 0x2028, 0x2029):
            out += b"\\u" + format(value, "04x").encode()
        else:
            out += data[at : at + length]
        at += length
    return out + b'"'


def shortest(exact: Decimal) -> str:
    """Returns the fewest digits that read back as this double and, among those, the nearest to it, or the even one."""
    for precision in range(1, 18):
        near = []
        for rounding in (ROUND_FLOOR, ROUND_CEILING):
            candidate = Context(prec=precision, rounding=rounding).plus(exact)
            if float(candidate) == float(exact):
                odd = candidate.as_tuple().digits[-1] % 2
                near.append((abs(candidate - exact), odd, f"{candidate.normalize():e}"))
        if near:
            return min(near)[2]
    raise AssertionError("17 digits are always enough")


def model_number(value: float) -> bytes:
    """Returns a double's shortest digits, plain or with an exponent."""
    if value == 0:
        return b"-0" if str(value).startswith("-") else b"0"
    text = shortest(Decimal(abs(value)))
    mantissa, _, power = text.partition("e")
    digits, exponent = mantissa.replace(".", ""), int(power)
    sign = b"-" if value < 0 else b""
    if 1e-6 <= abs(value) < 1e21:
        if exponent < 0:
            return sign + (b"0." + b"0" * (-exponent - 1) + digits.encode())
        digits = digits.ljust(exponent + 1, "0")
        whole, fraction = digits[: exponent + 1], digits[exponent + 1 :]
        return sign + (whole + ("." + fraction if fraction else "")).encode()
    mantissa = digits[0] + ("." + digits[1:] if digits[1:] else "")
    return sign + f"{mantissa}e{'-' if exponent < 0 else '+'}{abs(exponent)}".encode()


class Parser:
    """Returns a value as nested tuples: ("s", text), ("n", literal), ("a", items), ("o", pairs), ("w", word)."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def document(self) -> tuple[str, object]:
        value = self.value(0)
        self.space()
        if self.at != len(self.data):
            raise RefusedError
        return value

    def peek(self) -> bytes:
        return self.data[self.at : self.at + 1]

    def take(self, wanted: bytes) -> None:
        if not self.data.startswith(wanted, self.at):
            raise RefusedError
        self.at += len(wanted)

    def space(self) -> None:
        while self.peek() in (b" ", b"\t", b"\r", b"\n"):
            self.at += 1

    def value(self, depth: int) -> tuple[str, object]:
        self.space()
        char = self.peek()
        if char in (b"{", b"["):
            if depth >= 10_000:
                raise RefusedError
            return self.members(depth) if char == b"{" else self.items(depth)
        if char == b'"':
            return "s", self.string()
        if char and char in b"-0123456789":
            return "n", self.number()
        for word in (b"true", b"false", b"null"):
            if self.data.startswith(word, self.at):
                self.at += len(word)
                return "w", word
        raise RefusedError

    def items(self, depth: int) -> tuple[str, object]:
        self.take(b"[")
        items: list[object] = []
        self.space()
        while self.peek() != b"]":
            if items:
                self.take(b",")
            items.append(self.value(depth + 1))
            self.space()
        self.take(b"]")
        return "a", items

    def members(self, depth: int) -> tuple[str, object]:
        self.take(b"{")
        pairs: list[object] = []
        self.space()
        while self.peek() != b"}":
            if pairs:
                self.take(b",")
                self.space()
            key = self.string()
            self.space()
            self.take(b":")
            pairs.append((key, self.value(depth + 1)))
            self.space()
        self.take(b"}")
        return "o", pairs

    def digits(self) -> None:
        if not self.peek() or self.peek() not in b"0123456789":
            raise RefusedError
        while self.peek() and self.peek() in b"0123456789":
            self.at += 1

    def number(self) -> str:
        start = self.at
        if self.peek() == b"-":
            self.at += 1
        if self.peek() == b"0":
            self.at += 1
        else:
            self.digits()
        if self.peek() == b".":
            self.at += 1
            self.digits()
        if self.peek() in (b"e", b"E"):
            self.at += 1
            if self.peek() in (b"+", b"-"):
                self.at += 1
            self.digits()
        return self.data[start : self.at].decode()

    def string(self) -> str:
        self.take(b'"')
        out = ""
        while True:
            char = self.peek()
            if char == b'"':
                self.at += 1
                return out
            if not char or char < b" ":
                raise RefusedError
            if char == b"\\":
                out += self.escape()
                continue
            value, length = rune(self.data, self.at)
            out += "\ufffd" if value == -1 else chr(value)
            self.at += length

    def escape(self) -> str:
        names = {b'"': '"', b"\\": "\\", b"/": "/", b"b": "\b", b"f": "\f", b"n": "\n", b"r": "\r", b"t": "\t"}
        self.at += 1
        char = self.peek()
        if char in names:
            self.at += 1
            return names[char]
        first = self.unit()
        if 0xD800 <= first < 0xDC00 and self.data.startswith(b"\\u", self.at):
            before = self.at
            self.at += 1
            second = self.unit()
            if 0xDC00 <= second < 0xE000:
                return chr(0x10000 + (first - 0xD800) * 0x400 + second - 0xDC00)
            self.at = before
        return "\ufffd" if 0xD800 <= first < 0xE000 else chr(first)

    def unit(self) -> int:
        self.take(b"u")
        hexadecimal = self.data[self.at : self.at + 4]
        if len(hexadecimal) != 4 or any(byte not in b"0123456789abcdefABCDEF" for byte in hexadecimal):
            raise RefusedError
        self.at += 4
        return int(hexadecimal, 16)


def model_echo(value: object) -> bytes:
    """Returns a parsed value printed anew. Raises `RefusedError` for a number out of range."""
    assert isinstance(value, tuple)
    kind, content = value
    if kind == "n":
        number = float(content)
        if number in (float("inf"), float("-inf")):
            raise RefusedError
        return model_number(number)
    if kind == "s":
        return model_string(content.encode())
    if kind == "a":
        return b"[" + b",".join(map(model_echo, content)) + b"]"
    if kind == "o":
        printed = {key.encode(): model_echo(member) for key, member in content}
        return b"{" + b",".join(model_string(key) + b":" + printed[key] for key in sorted(printed)) + b"}"
    assert isinstance(content, bytes)
    return content
