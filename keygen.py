#!/usr/bin/env python3
"""Make the keys of one user, and the two stanzas that hold them: the client's and the server's.

  keygen.py
      two keys, as `fwknop --key-gen` prints them
  keygen.py work --server gate.example --access tcp/22
      the stanza [work] for ~/.fwknoprc and the one for access.conf, to be pasted
  keygen.py work ... --rc-file ~/.fwknoprc --access-file /etc/fwknop/access.conf
      the same, appended to these files; --qr: also as a QR code; --expires 8h: a pass that ends
  keygen.py --rotate work --access-file ... --rc-file ...
  keygen.py --retire work --access-file ...
      new keys, while the old ones go on working; then the end of the old ones
  keygen.py --openspa work --server gate.example --access tcp/22
      RSA keys in /etc/fwknop and in work.ospa, an OpenSPA client's file; the lines for the server

The way of a key: os.urandom makes it, base64 makes it text, and a stanza carries it to standard
output or into a file. Only its owner can read a new file; keygen.py warns of an old one that others
can read. It takes no key from a command line, and shows none in an error.

The server's stanza has REQUIRE_SOURCE_ADDRESS Y: a packet must name the address to open for. So it
opens for nobody else, even if an attacker captures it and sends it first. spa_client.py finds its
address by itself; fwknop needs -a ADDRESS, or -R, which asks a web site. --any-source gives that
protection up, for a client that cannot know its address.

--rotate and --retire find a stanza by the line [NAME] in an rc file, and by the comment `# NAME`
above SOURCE in access.conf. They leave all other lines alone. After each, the server must read
access.conf again (SIGHUP, or spa_server.py -R).

Contents. Sections 1 to 4 only compute; 5 and 6 touch files and standard output.
  1. Keys and stanzas
  2. QR code (ISO/IEC 18004:2015)
  3. RSA keys and the OSPA file
  4. Changes to a file's text
  5. Files and standard output
  6. Command line

Exit codes: 0 done; 1 a file or standard output can't be used; 2 a wrong option; 3 the text of a
file does not allow the change; 130 interrupted.
"""

import argparse
import binascii
import contextlib
import hashlib
import ipaddress
import math
import os
import stat
import sys
import time
from functools import lru_cache
from typing import Any, Callable, Dict, Iterator, List, NoReturn, Optional, Sequence, Tuple

VERSION = "0.1.0"


# ======================================================================================
# 1. Keys and stanzas
#
# A parser for each kind of value in a stanza; then the keys, and both stanzas in fwknop's formats.
# The error of a parser never shows the text, which may be a misplaced key. The limits are those of
# fwknop's client and server, so that both can use the stanzas.
# ======================================================================================

# --- shared: errors -- the same text in spa_server.py, spa_client.py and keygen.py --


class SpaError(Exception):
    """An error for the administrator, in one line; `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def explain(error: Exception, name: str = "") -> str:
    """Return an error as `name: reason`; an unnamed OSError has its file or line number."""
    if not isinstance(error, OSError):
        return f"{name}: {error}" if name else str(error)
    line, trace = 0, error.__traceback__
    while trace is not None:
        line, trace = trace.tb_lineno, trace.tb_next
    where = name or error.filename or f"line {line}"
    return f"{where}: {error.strerror or error}"


# --- end shared: errors --


class UsageError(SpaError, argparse.ArgumentTypeError):  # argparse puts the option before it
    """A wrong option, found before a key is made or a file written: exit code 2."""


class ConfigError(SpaError):
    """A file whose text does not allow the change, and stays as it is: exit code 3."""


LETTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def name_parser(kind: str, limit: int, signs: str) -> Callable[[str], str]:
    """Return a parser of names that are safe as they are, for fwknop and in a shell."""
    def parse(text: str) -> str:
        if not 1 <= len(text) <= limit or text[0] in "-." or set(text) - LETTERS.union(signs):
            raise UsageError(f"expected {kind}, 1 to {limit} letters, digits or any of {signs}")
        return text
    return parse


def parse_name(text: str) -> str:
    """Parse the name of a stanza, fit for `[name]` and for `# name`."""
    if text.lower() == "default":
        raise UsageError("expected another name: [default] holds the defaults of all stanzas")
    return name_parser("a name", 64, "._-@")(text)


def choice_parser(choices: str) -> Callable[[str], str]:
    """Return a parser of choices such as `bash|zsh|fish`, in any case."""
    def parse(text: str) -> str:
        if text.lower() not in choices.split("|"):
            raise UsageError(f"expected one of {choices.replace('|', ' ')}")
        return text.lower()
    return parse


def number_parser(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of decimal numbers from low to high."""
    def parse(text: str) -> int:
        if not (0 < len(text) < 10 and set(text) <= set("0123456789") and low <= int(text) <= high):
            raise UsageError(f"expected a number, {low} to {high}")
        return int(text)
    return parse


def parse_expires(text: str, now: Callable[[], float] = time.time) -> int:
    """Parse `8h` from now, or the day `2026-12-31`, whose midnight is meant, into epoch seconds."""
    factor = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:].lower())
    if factor:
        return int(now()) + factor * number_parser(1, 99999)(text[:-1])
    with contextlib.suppress(UsageError, ValueError, OverflowError):
        year, month, day = (number_parser(1, 9999)(part) for part in text.split("-"))
        end = int(time.mktime((year, month, day, 0, 0, 0, 0, 0, -1)))
        if time.localtime(end)[:3] == (year, month, day) and end > now():
            return end
    raise UsageError("expected a time such as 30m, 8h or 2d, or a day to come such as 2026-12-31")


def parse_access(text: str) -> str:
    """Parse a list such as `tcp/22, udp/53`, each entry once; drop blanks and leading zeros.

    A repeated entry is an error because fwknopd counts matches: with `OPEN_PORTS tcp/22,tcp/22` it
    rejects a request for tcp/22 and accepts one for tcp/22,tcp/9999. A list of more than 60
    characters may not fit into fwknop's packet: a user name of 29 characters, a source address of
    15 and an HMAC of SHA-512 leave 223 bytes of plain text.
    """
    entries: List[str] = []
    for item in (part.strip(" ") for part in text.split(",")):
        if item[:4] not in ("tcp/", "udp/"):
            raise UsageError("expected tcp/PORT or udp/PORT, several with commas in between")
        entries.append(f"{item[:4]}{number_parser(1, 65535)(item[4:])}")
    if len(set(entries)) < len(entries):
        raise UsageError("expected each port only once")
    if len(",".join(entries)) > 60:
        raise UsageError("expected at most 60 characters: a packet has no room")
    return ",".join(entries)


def parse_source(text: str) -> str:
    """Parse `ANY`, or networks with commas between (fwknopd itself knows only IPv4)."""
    if text.upper() == "ANY":
        return "ANY"
    try:
        if "%" in text:
            raise ValueError
        return ",".join(str(ipaddress.ip_network(item, strict=False)) for item in text.split(","))
    except ValueError:
        raise UsageError("expected ANY, or networks like 192.0.2.0/24 with commas") from None


def parse_path(text: str) -> str:
    """Parse a path; replace a `~` that the shell left by the home directory."""
    if not text:
        raise UsageError("expected a path")
    return os.path.expanduser(text)


# The lengths of `fwknop --key-gen`. It has none for SHA-3: 64 bytes are as long as the longest
# digest (more adds no strength, RFC 2104 section 3). They fit into one block of both SHA-3 digests
# (136 and 72 bytes), so HMAC does not hash the key first.
HMAC_KEY_BYTES = {"md5": 16, "sha1": 20, "sha256": 64, "sha384": 128, "sha512": 128,
                  "sha3_256": 64, "sha3_512": 64}
Keys = Dict[str, str]  # KEY_BASE64 and HMAC_KEY_BASE64, the secrets of a client and a server
DIRECTIVE = "{:<24}    {}"  # the columns of `fwknop --save-rc-stanza`


def make_keys(options: argparse.Namespace, digest: str, random: Callable[[int], bytes]) -> Keys:
    """Return fresh keys of the lengths in the options, or else of those for the HMAC's digest."""
    sizes = {"KEY_BASE64": options.key_len or 32,
             "HMAC_KEY_BASE64": options.hmac_key_len or HMAC_KEY_BYTES[digest]}
    return {name: binascii.b2a_base64(random(size), newline=False).decode("ascii")
            for name, size in sizes.items()}


def key_lines(keys: Keys) -> str:
    """Return both keys as `fwknop --key-gen` prints them; both files take these lines."""
    return "".join(f"{name}: {key}\n" for name, key in keys.items())


def make_stanzas(options: argparse.Namespace, digest: str, keys: Keys) -> Tuple[str, str]:
    """Return the client's stanza for ~/.fwknoprc, and the server's for access.conf."""
    rows = (  # name in the client's stanza, name in the server's, value
        ("", "SOURCE", options.source or "ANY"),
        ("# ends", "# ends", options.expires and options.ends),
        ("", "ACCESS_EXPIRE_EPOCH", options.expires),
        ("SPA_SERVER_PORT", "", options.port),
        ("ALLOW_IP", "", "source" if options.any_source else ""),
        ("SPOOF_USER", "REQUIRE_USERNAME", options.username),
        ("", "OPENSPA_CLIENTS", f"{options.openspa_dir}/openspa" if options.openspa else ""),
        ("ACCESS", "OPEN_PORTS", options.access),
        ("SPA_SERVER", "", options.server),
        ("KEY_BASE64", "KEY_BASE64", keys.get("KEY_BASE64")),
        ("HMAC_DIGEST_TYPE", "HMAC_DIGEST_TYPE", digest.upper()),
        ("HMAC_KEY_BASE64", "HMAC_KEY_BASE64", keys.get("HMAC_KEY_BASE64")),
        ("USE_HMAC", "", "Y"),
        ("", "FW_ACCESS_TIMEOUT", options.timeout or 30),
        ("ONE_CONNECTION", "ONE_CONNECTION", "Y" if options.one_connection else ""),
        ("", "REQUIRE_SOURCE_ADDRESS", "N" if options.any_source else "Y"),
        ("", "ANSWER", "Y" if options.answer else ""))
    client, server = ("".join(DIRECTIVE.format(row[side], row[2]) + "\n"
                              for row in rows if row[side] and row[2]) for side in (0, 1))
    return f"[{options.name}]\n{client}", f"# {options.name}\n{server}"


# ======================================================================================
# 2. QR code (ISO/IEC 18004:2015)
#
# The picture that phone apps read: byte mode, and the 15 smallest of the 40 versions (sizes). A
# side has 17 + 4 * version modules; version 15 holds 520 bytes.
# ======================================================================================

Symbol = List[bytearray]  # rows of modules: 0 light, 1 dark, 2 not drawn yet
FREE = 2
# Table 1: the codewords (bytes) of version 1, 2 ... 15.
CODEWORDS = (26, 44, 70, 100, 134, 172, 196, 242, 292, 346, 404, 466, 532, 581, 655)
# Tables 12 and 9: a level's indicator; then, a digit of base 36 for version 1, 2 ... 15, the error
# correction codewords of a block, and the blocks. L survives 7 % of damage, M 15, Q 25, H 30.
LEVELS = {
    "L": (1, "7afkqikouikoqum", "111112222444446"),
    "M": (0, "agqiogimmqummoo", "11122444555899a"),
    "Q": (3, "dmiqioimkosqoku", "11224466888acgc"),
    "H": (2, "hsmgmsqqososmoo", "1124445688bbggi"),
}
# Table 10: a mask inverts the data modules of row i and column j for which this is 0.
MASKS: Tuple[Callable[[int, int], int], ...] = (
    lambda i, j: (i + j) % 2, lambda i, j: i % 2, lambda i, j: j % 3, lambda i, j: (i + j) % 3,
    lambda i, j: (i // 2 + j // 3) % 2, lambda i, j: i * j % 2 + i * j % 3,
    lambda i, j: (i * j % 2 + i * j % 3) % 2, lambda i, j: ((i + j) % 2 + i * j % 3) % 2)
# Figure 25: row and column of each bit of the format information, the lowest first; two copies.
FORMAT_MODULES = tuple(zip(
    [(i, 8) for i in (0, 1, 2, 3, 4, 5, 7, 8)] + [(8, j) for j in (7, 5, 4, 3, 2, 1, 0)],
    [(8, j) for j in range(-1, -9, -1)] + [(i, 8) for i in range(-7, 0)]))


@lru_cache(maxsize=None)
def multiply(left: int, right: int) -> int:
    """Return a product in GF(2^8) modulo x^8 + x^4 + x^3 + x^2 + 1 (7.5.2)."""
    product = 0
    for bit in range(7, -1, -1):
        product = product << 1 ^ (product >> 7) * 0x11D ^ (right >> bit & 1) * left
    return product


def error_correction(block: bytes, count: int) -> bytes:
    """Return the Reed-Solomon codewords of a block, the remainder of a division by g(x) (7.5.2)."""
    generator, root = [1], 1  # annex A: g(x) is the product of all (x - 2^i), i < count
    for _ in range(count):
        generator = [high ^ multiply(root, low)
                     for high, low in zip(generator + [0], [0] + generator)]
        root = multiply(root, 2)
    rest = bytes(count)
    for codeword in block:
        factor = codeword ^ rest[0]
        rest = bytes(old ^ multiply(factor, part)
                     for old, part in zip(rest[1:] + b"\0", generator[1:]))
    return rest


def bch_code(value: int, generator: int) -> int:
    """Return `value` and its check bits (annexes C and D)."""
    bits = generator.bit_length() - 1
    rest = value << bits
    while rest >> bits:
        rest ^= generator << rest.bit_length() - bits - 1
    return value << bits | rest


def encode_data(text: bytes, level: str) -> Tuple[int, bytes]:
    """Return the smallest version that holds `text`, and its codewords in their final order.

    Mode 0100, the length, the text and 0000 make whole bytes together (7.4). These are cut into
    blocks, the longer ones last, and interleaved (7.6). Raise ValueError if no version holds them.
    """
    for version, total, *table in zip(range(1, 16), CODEWORDS, *LEVELS[level][1:]):
        size, count = (int(digit, 36) for digit in table)
        width = 1 if version < 10 else 2  # bytes of the length (table 3)
        room = total - size * count
        if len(text) + width + 1 <= room:
            break
    else:
        raise ValueError("expected a text that fits into version 15")
    head = (0b0100 << 8 * width | len(text)) << 8 * len(text) | int.from_bytes(text, "big")
    data = ((head << 4).to_bytes(len(text) + width + 1, "big") + b"\xEC\x11" * room)[:room]
    cuts = [room // count * i + max(0, i - count + room % count) for i in range(count + 1)]
    blocks = [data[start:end] for start, end in zip(cuts, cuts[1:])]
    checks = [error_correction(block, size) for block in blocks]
    return version, bytes(each[i] for part in (blocks, checks) for i in range(len(part[-1]))
                          for each in part if i < len(each))


def draw_patterns(version: int) -> Symbol:
    """Return a symbol with its function patterns (6.3), FREE elsewhere."""
    size = 17 + 4 * version
    rows = [bytearray([FREE]) * size for _ in range(size)]
    # Annex E: alignment patterns are centred on 6, on size - 7, and in even steps between.
    step = -(-(size - 13) // (version // 7 * 2 + 2)) * 2
    centres = [6, *range(size - 7, 6, -step)] if version > 1 else []
    # The rings of a pattern from its centre: a finder's, with the separator, and an alignment's.
    for rings, around in (("11010", [(3, 3), (3, size - 4), (size - 4, 3)]),
                          ("101", [(i, j) for i in centres for j in centres])):
        for row, column in around:
            if rows[row][column] == FREE:  # else a finder is there
                for i in range(max(row - len(rings) + 1, 0), min(row + len(rings), size)):
                    for j in range(max(column - len(rings) + 1, 0), min(column + len(rings), size)):
                        rows[i][j] = int(rings[max(abs(i - row), abs(j - column))])
    for at in range(8, size - 8):
        rows[6][at] = rows[at][6] = 1 - at % 2  # timing
    for bit in range(18) if version > 6 else ():  # version information (7.10)
        i, j = bit // 3, bit % 3 - 11
        rows[i][j] = rows[j][i] = bch_code(version, 0x1F25) >> bit & 1
    return rows


def draw_symbol(version: int, data: bytes, level: str, mask: int) -> Symbol:
    """Return the whole symbol of these codewords in one of the masks."""
    rows = draw_patterns(version)
    code = bch_code(LEVELS[level][0] << 3 | mask, 0x537) ^ 0x5412  # format information (7.9)
    for bit, modules in enumerate(FORMAT_MODULES):
        for i, j in modules:
            rows[i][j] = code >> bit & 1
    rows[-8][8] = 1
    bits = (codeword >> bit & 1 for codeword in data for bit in range(7, -1, -1))
    columns = [j for j in range(len(rows) - 1, -1, -1) if j != 6]
    for at in range(0, len(columns), 2):  # two columns upwards, the next two downwards (7.7.3)
        for i in range(len(rows)) if at % 4 else range(len(rows) - 1, -1, -1):
            for j in columns[at:at + 2]:
                if rows[i][j] == FREE:
                    rows[i][j] = next(bits, 0) ^ (MASKS[mask](i, j) == 0)
    return rows


def penalty(rows: Symbol) -> int:
    """Return the penalty for patterns that may confuse a scanner (7.8.3)."""
    score, modules = 0, len(rows) ** 2
    for line in ["".join(map(str, line)) for line in [*rows, *zip(*rows)]]:
        runs = line.replace("01", "0 1").replace("10", "1 0").split()
        score += sum(len(run) - 2 for run in runs if len(run) >= 5)
        score += 40 * (line.count("10111010000") + line.count("00001011101"))
    for above, below in zip(rows, rows[1:]):
        score += 3 * sum(sum(square) in (0, 4)
                         for square in zip(above, above[1:], below, below[1:]))
    return score + 10 * (abs(20 * sum(map(sum, rows)) - 10 * modules) // modules)


def qr_symbol(text: bytes, level: str, masks: Sequence[int] = range(8)) -> Symbol:
    """Return the smallest symbol that holds `text`, in the mask with the least penalty."""
    version, data = encode_data(text, level)
    return min((draw_symbol(version, data, level, mask) for mask in masks), key=penalty)


def terminal_text(rows: Symbol, blocks: bool) -> str:
    """Return a symbol and its quiet zone (6.3.8) for a terminal, with all colours set.

    With `blocks` a character is two modules above each other, else two characters are a module.
    """
    edge = [bytes(len(rows) + 8)] * 4
    field = [*edge, *(bytes(4) + row + bytes(4) for row in rows), *edge, edge[0]]
    if blocks:
        lines = ["\033[38;5;16;48;5;231m" + "".join(
            " \u2584\u2580\u2588"[2 * upper + lower] for upper, lower in zip(*pair))
            for pair in zip(field[::2], field[1::2])]
    else:
        lines = ["".join("\033[30;40m##" if module else "\033[97;107m  " for module in row)
                 for row in field[:-1]]
    return "".join(line + "\033[0m\n" for line in lines)


# ======================================================================================
# 3. RSA keys and the OSPA file
#
# The keys of an OpenSPA client and its server, and the client's file (tests/spec/openspa.md 1.10).
# ======================================================================================

MILLER_RABIN_ROUNDS = 8  # FIPS 186-5 table B.1: 5 for primes of 1,024 bits, 4 for 1,536 and 2,048
RSA_ALGORITHM = b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00"  # RFC 3279 2.3.1


def is_prime(number: int, random: Callable[[int], bytes]) -> bool:
    """Say whether an odd number above 3 is prime (Miller-Rabin test, FIPS 186-5 B.3.1)."""
    twos = ((number - 1) & (1 - number)).bit_length() - 1  # of number - 1; on average 2
    for _ in range(MILLER_RABIN_ROUNDS):
        base = 2 + int.from_bytes(random(number.bit_length() // 8 + 8), "big") % (number - 3)
        power = pow(base, (number - 1) >> twos, number)
        if power != 1 and all(pow(power, 1 << i, number) != number - 1 for i in range(twos)):
            return False
    return True


def make_prime(bits: int, random: Callable[[int], bytes]) -> int:
    """Return a random prime with both top bits set; two such have a product of 2 * bits bits."""
    for _ in range(10 * bits):  # so many are all composite once in 10^12 times
        number = int.from_bytes(random(bits // 8), "big") | 3 << (bits - 2) | 1
        if all(number % divisor for divisor in range(3, 5000, 2)) and is_prime(number, random):
            return number
    raise SpaError("found no prime: the random numbers of this system are not random")


def encode_der(tag: int, body: bytes) -> bytes:
    """Return a DER item, its length in the shortest form (X.690 section 10.1)."""
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes([tag]) + (size if len(body) < 128 else bytes([0x80 | len(size)]) + size) + body


def encode_pem(label: str, data: bytes) -> str:
    """Return a DER sequence of `data` as PEM (RFC 7468), 64 characters a line."""
    text = binascii.b2a_base64(encode_der(0x30, data), newline=False).decode("ascii")
    lines = "".join(text[at:at + 64] + "\n" for at in range(0, len(text), 64))
    return f"-----BEGIN {label}-----\n{lines}-----END {label}-----\n"


def make_rsa_key(bits: int, random: Callable[[int], bytes]) -> str:
    """Return a new private key (FIPS 186-5 A.1.1 and A.1.3) in PKCS#1's form (RFC 8017 A.1.2)."""
    p, q, d, e = 0, 0, 0, 65537
    while abs(p - q) >> (bits // 2 - 100) == 0 or d >> bits // 2 == 0:  # too close, or too small
        p, q = make_prime(bits // 2, random), make_prime(bits // 2, random)
        order = (p - 1) * (q - 1) // math.gcd(p - 1, q - 1)
        # e is a prime, so by Fermat e * d = 1 modulo `order`; but d = 0 if e divides that.
        d = (order * (-pow(order, e - 2, e) % e) + 1) // e
    numbers = (0, p * q, e, d, p, q, d % (p - 1), d % (q - 1), pow(q, p - 2, p))
    return encode_pem("RSA PRIVATE KEY", b"".join(
        encode_der(0x02, each.to_bytes(each.bit_length() // 8 + 1, "big")) for each in numbers))


def public_pem(private: str) -> str:
    """Return the public key (RFC 5280 section 4.1) in a private one: n and e begin its numbers."""
    with contextlib.suppress(IndexError, ValueError):  # no PEM, no base64
        data = binascii.a2b_base64(private.split("-----")[2])
        numbers = data[7:16 + int.from_bytes(data[9:11], "big")]
        if data[4:9] == b"\2\1\0\2\x82" and numbers[-5:] == b"\2\3\1\0\1":  # n is long, e 65537
            bits = encode_der(0x03, b"\0" + encode_der(0x30, numbers))
            return encode_pem("PUBLIC KEY", RSA_ALGORITHM + bits)
    raise ConfigError("expected an RSA PRIVATE KEY of at least 2048 bits in PEM, not encrypted")


def make_adk_secret(random: Callable[[int], bytes]) -> str:
    """Return 4 random bytes as 7 characters of base32 (tests/spec/openspa.md 1.9)."""
    bits = int.from_bytes(random(4), "big") << 3
    return "".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[bits >> i & 31] for i in range(30, -1, -5))


def make_ospa(options: argparse.Namespace, settings: Dict[str, str], *keys: str) -> str:
    """Return an OSPA file with the client's private and public key, and the server's public key."""
    private, public, server = (key.strip().replace("\n", "\n" + " " * 8) for key in keys)
    return f"""version: "0.2"
clientUUID: "{options.username}"
serverHost: "{options.server}"
serverPort: {settings['OPENSPA_PORT'] or 22211}
adk:
  secret: "{settings['OPENSPA_ADK_SECRET']}"
crypto:
  cipherSuitePriority:
    - CipherSuite_RSA_SHA256_AES256CBC
  rsa:
    client:
      privateKey: |
        {private}
      publicKey: |
        {public}
    server:
      publicKey: |
        {server}
"""


# ======================================================================================
# 4. Changes to a file's text
#
# Each function takes the text of a file and returns another, or raises ConfigError. The mark of a
# stanza is a line of its own: `[name]`, `# name`, or `# old name` for one with replaced keys.
# ======================================================================================

BLANK = " \t\r\xef\xbb\xbf"  # the last three are a byte order mark, read as Latin-1


def find_marks(lines: List[str], mark: str) -> List[int]:
    """Return the indexes of the lines that are `mark`, but for case and blanks."""
    def plain(line: str) -> List[str]:
        line = line.strip(BLANK).lower()
        if line[:1] == "[":
            line = line[:line.find("]") + 1]  # a remark may follow
        return [line[:1], *line[1:].split()]
    return [at for at, line in enumerate(lines) if plain(line) == plain(mark)]


def split_line(line: str) -> Tuple[str, str, str]:
    """Return a directive's name, its value to a blank, ; or #, and the rest; "" for a comment."""
    name, _, rest = line.strip(BLANK).replace("\t", " ").partition(" ")
    value = rest.strip().split(" ")[0].split(";")[0].split("#")[0]
    return ("", "", "") if name[:1] in "#;" else (
        name.rstrip(":"), value, rest.strip()[len(value):])


def add_stanza(text: str, stanza: str) -> str:
    """Return the text with a stanza at its end; raise ConfigError if it has the mark already."""
    mark = stanza.partition("\n")[0]
    for at in find_marks(text.split("\n"), mark):
        raise ConfigError(f"has a stanza {mark} already, in line {at + 1}")
    return text + ("" if not text else "\n" if text.endswith("\n") else "\n\n") + stanza


def add_settings(text: str, settings: Dict[str, str]) -> str:
    """Return fwknopd.conf with all settings, which then are its own: all clients share its ADK."""
    found = {name: value for name, value, _ in map(split_line, text.split("\n"))}
    for name, value in settings.items():
        settings[name] = found.get(name, value)
        if value not in ("", settings[name]) and name != "OPENSPA_ADK_SECRET":
            raise ConfigError(f"has another {name} already")
    new = "".join(DIRECTIVE.format(*each) + "\n" for each in settings.items()
                  if each[1] and each[0] not in found)
    return add_stanza(text, new) if new else text


def find_stanza(lines: List[str], mark: str) -> Tuple[int, int]:
    """Return the index of a stanza's mark, and the index after its last directive.

    Later comments belong to the next stanza, which begins with `[name]`, SOURCE or %include.
    """
    marks = find_marks(lines, mark)
    if len(marks) != 1:
        raise ConfigError(f"expected one line {mark}, found {len(marks) or 'none'}")
    end, inside = marks[0], mark[0] == "["
    for at in range(end + 1, len(lines)):
        name = split_line(lines[at])[0]
        begins = name == "SOURCE" or name[:1] in ("[", "%")
        if name and begins == inside:  # the next stanza, or a directive before any SOURCE
            break
        if name:
            end, inside = at, True
    if not inside:
        raise ConfigError(f"expected SOURCE to follow {mark} of line {end + 1}")
    return marks[0], end + 1


def replace_keys(stanza: List[str], make: Callable[[str], Keys]) -> List[str]:
    """Return the lines of a stanza with the keys that `make` returns for its HMAC's digest."""
    new, split = list(stanza), [split_line(line) for line in stanza]
    where = f"in the stanza {stanza[0].strip()}"
    digest = {name: value for name, value, _ in split}.get("HMAC_DIGEST_TYPE", "sha256").lower()
    if digest not in HMAC_KEY_BYTES:
        raise ConfigError(f"expected HMAC_DIGEST_TYPE {', '.join(HMAC_KEY_BYTES)} {where}")
    for name, key in make(digest).items():
        raw = name.replace("_BASE64", "")
        found = [at for at, (directive, _, _) in enumerate(split) if directive in (name, raw)]
        if len(found) != 1:
            raise ConfigError(f"expected one {name} (or {raw}) {where}")
        directive, _, rest = split[found[0]]  # the rest of a raw key's line may belong to the key
        new[found[0]] = DIRECTIVE.format(name, key) + (rest if directive == name else "")
    return new


def rotate_stanza(text: str, mark: str, make: Callable[[str], Keys]) -> str:
    """Return the text with new keys in a stanza; access.conf keeps the old stanza below it."""
    lines, old_mark = text.split("\n"), f"# old {mark[2:]}"
    begin, end = find_stanza(lines, mark)
    stanza = replace_keys(lines[begin:end], make)
    if mark[0] == "#":
        for at in find_marks(lines, old_mark):
            raise ConfigError(f"has {old_mark} in line {at + 1}: --retire {mark[2:]} when all its "
                              "clients have the new keys")
        stanza += ["", old_mark, f"# (until keygen.py --retire {mark[2:]})", *lines[begin + 1:end]]
    return "\n".join(lines[:begin] + stanza + lines[end:])


def retire_stanza(text: str, mark: str) -> str:
    """Return the text without a stanza and the blank line above it."""
    lines = text.split("\n")
    begin, end = find_stanza(lines, mark)
    if begin > 0 and not lines[begin - 1].strip():
        begin -= 1
    return "\n".join(lines[:begin] + lines[end:])


# ======================================================================================
# 5. Files and standard output
#
# Give a file its new text so that a crash leaves the old one or the new one. The files change last,
# after everything else has succeeded.
# ======================================================================================

POSIX = hasattr(os, "geteuid")  # else Windows, without modes, flock and open directories
LOCK_TRIES = 500  # ten seconds: another run takes milliseconds, but any reader can lock for ever


# --- shared: output -- the same text in spa_server.py, spa_client.py and keygen.py --


def write_to(stream: "Any", text: str) -> str:
    """Write to standard output or standard error; return why that failed, "" if it did not."""
    try:
        stream.write(text)
        stream.flush()
    except (AttributeError, OSError, ValueError) as error:
        if stream is None:
            return "it is closed"
        try:  # throw the rest away: Python would write it again at exit, fail, and end with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):
            pass  # the stream is no file
        return getattr(error, "strerror", None) or str(error)
    return ""


# --- end shared: output --


def tell(text: str) -> None:
    """Print a line on standard error; a failure to do so must not leave work half done."""
    write_to(sys.stderr, text + "\n")


def warn_of_readers(name: str, mode: int) -> None:
    """Warn of a regular file with keys that not only its owner can read."""
    if POSIX and stat.S_ISREG(mode) and mode & 0o077:
        tell(f"keygen.py: warning: {name} is open to others (mode {stat.S_IMODE(mode):04o}): "
             "chmod 600")


def write_out(text: str) -> None:
    """Write to standard output; raise SpaError if it fails, so that no key is lost unnoticed."""
    if not text:
        return
    with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or a test's buffer
        if "KEY_BASE64" in text or "ADK_SECRET" in text:
            warn_of_readers("standard output", os.fstat(sys.stdout.fileno()).st_mode)
    why = write_to(sys.stdout, text)
    if why:
        raise SpaError(f"standard output: {why}")


@contextlib.contextmanager
def errors_named(path: str) -> Iterator[None]:
    """Turn the errors of the system or of a change into a SpaError that names the file."""
    try:
        yield
    except OSError as error:
        raise SpaError(explain(error, path)) from error
    except SpaError as error:
        raise type(error)(f"{path}: {error}") from error


def real_path(path: str, links: int = 40) -> str:
    """Return the real path; raise SpaError if it leads through another user's link.

    That user could lead us to a file that only we can write. A path with more `links` in a row than
    the kernel follows is a loop, and cannot be opened.
    """
    way, prefix = os.path.join(os.getcwd(), path), ""
    for part in way.split("/") if POSIX else ():
        prefix = os.path.join(prefix or "/", part)
        if os.path.islink(prefix):
            if os.lstat(prefix).st_uid not in (0, os.geteuid()):
                raise SpaError(f"{path}: {prefix} is a link of another user's, and is not followed")
            if links:
                real_path(os.path.join(os.path.dirname(prefix), os.readlink(prefix)), links - 1)
    return os.path.realpath(path)


def lock_directory(path: str, stack: contextlib.ExitStack) -> int:
    """Open a directory and lock it until the stack's end, so that only this run changes its files.

    Without locks (Windows, some network file systems) another run's change is only noticed.
    """
    import fcntl
    with errors_named(path):
        fd = os.open(path, os.O_RDONLY)
        stack.callback(os.close, fd)
        link = f"/proc/self/fd/{fd}"
        if os.path.islink(link) and os.readlink(link) != path:
            raise SpaError("somebody else put another directory in its place")
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # NFS locks only what is open for writing
                return fd
        raise SpaError("another program keeps it locked")


def read_file(name: str, directory: Optional[int], create: bool
              ) -> Tuple[bytes, Optional[os.stat_result]]:
    """Return the bytes of a regular file, and its status; without `directory` a path is its name.

    If it is missing and `create` allows that, return b"" and None. A file with a second name in
    another user's directory is an error: like a link, it may lead to one that only we can write.
    """
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(name, os.O_RDONLY | flags, dir_fd=directory)
    except FileNotFoundError:
        if create:
            return b"", None
        raise
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise SpaError("not a regular file")
    with open(fd, "rb") as stream:
        if directory is not None and status.st_nlink > 1 and (
                os.fstat(directory).st_uid not in (0, os.geteuid())):
            raise SpaError("has another name elsewhere, in a directory of another user's")
        return stream.read(), status


def write_copy(name: str, directory: Optional[int], old: Optional[os.stat_result], text: bytes,
               stack: contextlib.ExitStack) -> str:
    """Write a file's new text to a copy beside it, which the stack removes; return its name.

    Appending could leave half a line with a key, and then no server would start. A new file gets
    mode 0600; an `old` one keeps mode and owner.
    """
    def discard() -> None:
        with contextlib.suppress(OSError):  # it was renamed if everything succeeded
            os.unlink(copy, dir_fd=directory)

    copy = f"{name}.{os.getpid()}.new"
    fd = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
    stack.callback(discard)
    with open(fd, "wb") as stream:
        if POSIX:
            new = os.fstat(fd)
            if old and (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
                os.fchown(fd, old.st_uid, old.st_gid)
            os.fchmod(fd, stat.S_IMODE(old.st_mode) if old else 0o600)  # whatever the umask is
        stream.write(text)
        stream.flush()
        os.fsync(fd)
    return copy


def change_files(changes: Sequence[Tuple[str, Callable[[str], str], str]], done: str,
                 create: bool = False, more: Callable[[], str] = lambda: "") -> None:
    """Change the files that have a path, once all new texts are on the disk and the rest is out.

    The rest is the text for each missing path, below a line that says where it belongs, and
    `more()`. A crash after that can leave only the first file changed. A file that another program
    changes meanwhile is left as it is. `create` allows missing files; `done` begins the line about
    each.
    """
    printed = [where + change("") for path, change, where in changes if where and not path]
    files, ready = [(real_path(path), change) for path, change, _ in changes if path], []
    with contextlib.ExitStack() as stack:
        locked = {directory: lock_directory(directory, stack) for directory in
                  sorted({os.path.dirname(path) for path, _ in files}) if POSIX}
        for path, change in files:
            directory, name = os.path.split(path) if POSIX else ("", path)
            fd = locked.get(directory)
            with errors_named(path):
                old, status = read_file(name, fd, create)
                new = change(old.decode("latin-1")).encode("latin-1")  # each byte as it is
                warn_of_readers(path, status.st_mode if status else 0)
                if new != old:
                    ready.append((path, name, fd, old, write_copy(name, fd, status, new, stack)))
        write_out("\n".join(filter(None, [*printed, more()])))
        for path, name, fd, old, copy in ready:
            with errors_named(path):
                if read_file(name, fd, create)[0] != old:
                    raise SpaError("was changed by somebody else meanwhile, and left as it is")
                os.replace(copy, name, src_dir_fd=fd, dst_dir_fd=fd)
        for fd in locked.values():
            with contextlib.suppress(OSError):  # some file systems can't sync directories
                os.fsync(fd)  # without it a power cut can undo the new names
    for path, *_ in ready:
        tell(f"[+] {done}: {path}")


# ======================================================================================
# 6. Command line
#
# Check every option, then make keys and write.
# ======================================================================================

# Names, value ("" if there is none, "a|b" for a choice), parser, help. From this table come the
# command line, --help, --man and --completion.
OPTIONS: Tuple[Tuple[str, str, Callable[[str], object], str], ...] = (
    ("-h --help", "", str, "print this and exit"),
    ("-V --version", "", str, "print the version and this file's SHA-256"),
    ("--completion", "bash|zsh|fish", str, "print completions of these options for a shell"),
    ("--man", "", str, "print the manual page, for `man -l -`"),
    ("--rotate", "NAME", parse_name,
     "put new keys into the stanzas of that name; access.conf keeps the old ones beside them"),
    ("--retire", "NAME", parse_name, "remove the stanza of the old keys from the access file"),
    ("--openspa", "NAME", parse_name, "make an OpenSPA client's keys and its file, NAME.ospa"),
    ("--openspa-dir", "PATH", parse_path, "directory of OpenSPA's keys (default: /etc/fwknop)"),
    ("--config-file", "PATH", parse_path, "append the server's settings for OpenSPA to this file"),
    ("--rsa-bits", "2048|3072|4096", str, "length of a new RSA key (default: 2048)"),
    ("--adk", "", str, "have an ADK secret: that in the --config-file, or a new one"),
    ("--qr", "", str, "also print the keys as a QR code for phone apps"),
    ("--key-len", "BYTES", number_parser(1, 32), "length of the encryption key (default: 32)"),
    ("--hmac-key-len", "BYTES", number_parser(1, 128),
     "length of the HMAC key (default: by digest)"),
    ("--hmac-digest-type", "|".join(HMAC_KEY_BYTES), str, "digest of the HMAC (default: sha256)"),
    ("--rc-file", "PATH", parse_path,
     "append the client's stanza to this file; with --rotate, change it there"),
    ("--access-file", "PATH", parse_path,
     "the same for the server's stanza; with --retire, remove it there"),
    ("--server", "HOST",
     name_parser("a host name (xn--... if not ASCII) or an address", 253, "._-:%"),
     "the server's name or address; a stanza needs it"),
    ("--access", "LIST", parse_access, "ports to open, like tcp/22,udp/53; a stanza needs it"),
    ("--port", "PORT", number_parser(1, 65535), "port of the server (default: 62201 or 22211)"),
    ("--source", "NETWORKS", parse_source, "where packets may come from (default: ANY)"),
    ("--timeout", "SECONDS", number_parser(1, 8388608), "time that a port is open (default: 30)"),
    ("--expires", "TIME", parse_expires, "a pass: it ends in 30m, 8h, 2d, or as 2026-12-31 begins"),
    ("--username", "USER", name_parser("a user name", 29, "._-@"),  # fwknop cuts longer ones
     "the user name in the packet, which the server then requires"),
    ("--one-connection", "", str, "end a grant with its first connection, which takes nftables"),
    ("--any-source", "", str, "let the server open for the packet's source address"),
    ("--answer", "", str, "let spa_server.py answer packets; fwknopd has no such directive"),
)
OPENSPA_ONLY = "--openspa-dir --config-file --rsa-bits --adk"
# The options that these may be combined with, those that they need first; a NAME takes all others.
TAKES = {"--openspa": f"--server --access --access-file {OPENSPA_ONLY} --port --source --timeout"
                      " --expires",
         "--rotate": "--access-file --rc-file --qr --key-len --hmac-key-len",
         "--retire": "--access-file"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError without the quoted text: the user typed it, and it may be a key."""
        raise UsageError(message.partition(" '")[0].partition(' "')[0])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; options that are not given are None or False."""
    title, _, text = str(__doc__).partition("\n\n")
    parser = Parser(usage="keygen.py [NAME] [options]", description=title, add_help=False,
                    epilog="examples:\n" + text.partition("Contents.")[0], allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", metavar="NAME", type=parse_name,
                        help="name of the stanzas; without it only two keys are printed")
    for names, value, parse, help in OPTIONS:
        if value:
            parser.add_argument(*names.split(), metavar=value, help=help,
                                type=choice_parser(value) if "|" in value else parse)
        else:
            parser.add_argument(*names.split(), action="store_true", help=help)
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise UsageError for options that do not go together."""
    given = {"--" + field.replace("_", "-") for field, value in vars(options).items() if value}
    named = sorted(given.intersection(("--rc-file", "--access-file", "--config-file")))
    files = [options.rc_file, options.access_file, options.config_file]
    if len({os.path.realpath(path) for path in files if path}) < len(named):
        raise UsageError(f"{' and '.join(named)} have to be two files")
    for task, others in TAKES.items():
        if task in given:
            if not given <= {task, *others.split()}:
                raise UsageError(f"{task} takes {others} and nothing else")
            needed = others.split()[:1 if task == "--openspa" else 2]
            if not given.intersection(needed):
                raise UsageError(f"{task} needs {' or '.join(needed)}")
            return
    if given.intersection(OPENSPA_ONLY.split()):
        raise UsageError(f"{OPENSPA_ONLY} need --openspa")
    if options.name:
        if not given >= {"--server", "--access"}:
            raise UsageError("a stanza needs --server and --access")
    elif not given <= {"--qr", "--key-len", "--hmac-key-len", "--hmac-digest-type"}:
        raise UsageError("a stanza needs a NAME")


def picture(keys: Keys) -> str:
    """Return the QR code that phone apps import (tests/spec/fwknop.md 4.1), for this console."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    blocks = b"?" not in "\u2580\u2584\u2588".encode(encoding, "replace")
    rows = qr_symbol(" ".join(f"{name}:{key}" for name, key in keys.items()).encode("ascii"), "L")
    text = ("# KEY_BASE64 and HMAC_KEY_BASE64 for a phone. Whoever sees this picture has the keys\n"
            + terminal_text(rows, blocks))
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no terminal
        size, side = os.get_terminal_size(sys.stdout.fileno()), len(rows) + 8
        columns, lines = (side, side // 2 + 2) if blocks else (2 * side, side + 1)
        if 0 < size.columns < columns or 0 < size.lines < lines:  # 0: it is not known
            text += (f"# The picture needs {columns} columns and {lines} lines; this terminal has"
                     f" {size.columns} and {size.lines}. Enlarge it, or take a smaller font\n")
    return text


def give_keys(options: argparse.Namespace, random: Callable[[int], bytes]) -> None:
    """Print the keys, or both stanzas; append these to the files that were named."""
    name, digest = options.name, options.hmac_digest_type or "sha256"
    keys = make_keys(options, digest, random)
    if not name:
        return write_out(key_lines(keys) + (picture(keys) if options.qr else ""))
    client, server = make_stanzas(options, digest, keys)
    resolve = "" if options.any_source else " -R"  # fwknop can't find its address by itself
    return change_files([
        (options.rc_file, lambda text: add_stanza(text, client),
         "# For spa_client.py --import, or ~/.fwknoprc (Windows: %USERPROFILE%\\.fwknoprc)\n"
         f"# To knock: spa_client.py -n {name}, or fwknop -n {name}{resolve}\n"),
        (options.access_file, lambda text: add_stanza(text, server),
         "# For access.conf of the server; then spa_server.py -R there\n")],
        f"Wrote the stanza of {name} to", True, lambda: picture(keys) if options.qr else "")


def give_openspa(options: argparse.Namespace, random: Callable[[int], bytes]) -> None:
    """Write an OpenSPA client's files, and the server's key; print or append the server's lines."""
    directory = options.openspa_dir = real_path(options.openspa_dir or "/etc/fwknop")
    if set(directory) - LETTERS.union("/._-"):
        raise UsageError("--openspa-dir: expected a path of letters, digits or any of /._-")
    key, clients = f"{directory}/openspa.pem", f"{directory}/openspa"
    uuid = random(16).hex()  # of version 4, RFC 4122 section 4.4
    uuid = f"{uuid[:8]}-{uuid[8:12]}-4{uuid[13:16]}-a{uuid[17:20]}-{uuid[20:]}"
    options.name, options.username = options.openspa, uuid
    options.access = options.access or "tcp/22"  # OpenSPA's own client asks for it
    settings = {"OPENSPA_PRIVATE_KEY": key, "OPENSPA_PORT": str(options.port or ""),
                "OPENSPA_ADK_SECRET": make_adk_secret(random) if options.adk else ""}
    stanza = make_stanzas(options, "", {})[1]
    bits, server_public = int(options.rsa_bits or 2048), [""]
    private = make_rsa_key(bits, random)

    def server_key(old: str) -> str:
        server = old or make_rsa_key(bits, random)
        server_public[0] = public_pem(server)
        return server

    def ospa(old: str) -> str:
        if old:
            raise ConfigError("exists already, and is not overwritten")
        return make_ospa(options, settings, private, public_pem(private), *server_public)

    os.makedirs(clients, 0o700, exist_ok=True)
    change_files([
        (key, server_key, ""),
        (options.config_file, lambda text: add_settings(text, settings),
         "# For fwknopd.conf of the server\n"),
        (f"{clients}/{uuid}.pem", lambda _: public_pem(private), ""),
        (f"{options.name}.ospa", ospa, ""),
        (options.access_file, lambda text: add_stanza(text, stanza),
         "# For access.conf of the server, which then has to read both (-R)\n"
         f"# (to knock: spa_client.py --ospa {options.name}.ospa -A {options.access})\n")],
        f"Wrote what {options.name} needs to", True)


def rotate(options: argparse.Namespace, random: Callable[[int], bytes]) -> None:
    """Put new keys into the named files, and print them if one file is not named.

    access.conf comes first: after a crash in between, the client's old keys still work.
    """
    name, keys = options.rotate, {}  # type: str, Keys

    def make_once(digest: str) -> Keys:
        if not keys:
            keys.update(make_keys(options, digest, random))
        return keys

    def more() -> str:
        then = "" if options.access_file else ", access.conf: then spa_server.py -R"
        other = "" if options.rc_file and options.access_file else (
            f"# The new keys of {name}, for its stanza in the other file{then}\n" + key_lines(keys))
        return other + (picture(keys) if options.qr else "")

    change_files([
        (options.access_file, lambda text: rotate_stanza(text, f"# {name}", make_once), ""),
        (options.rc_file, lambda text: rotate_stanza(text, f"[{name}]", make_once), "")],
        f"Wrote the new keys of {name} to", more=more)


def completion(shell: str) -> str:
    """Return the completions of these options for a shell; zsh takes those of bash."""
    rows = [(name, value, help) for names, value, _, help in OPTIONS for name in names.split()]
    if shell == "fish":
        lines = []
        for name, value, help in rows:
            kind, text = "l" if name[:2] == "--" else "s", help.replace("'", "\\'")
            choices = f" -x -a '{value.replace('|', ' ')}'" if "|" in value else ""
            lines.append(f"complete -c keygen.py -{kind} {name.strip('-')} -d '{text}'"
                         f"{choices or (' -r' if value else '')}\n")
        return "".join(lines)
    begin = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"{begin}complete -o default -W '{' '.join(row[0] for row in rows)}' keygen.py\n"


def man_page() -> str:
    """Return the manual page: the docstring of this file, and the options."""
    title, examples, text = str(__doc__).split("\n\n", 2)
    rows = "".join(f"@TP\n@B {names} {value}\n{help}\n" for names, value, _, help in OPTIONS)
    page = (f"@TH KEYGEN.PY 1\n@SH NAME\nkeygen.py - {title}\n@SH DESCRIPTION\n@ad l\n"
            f"@nf\n{examples}\n@fi\n@PP\n{text.split('Contents.')[0]}@SH OPTIONS\n{rows}"
            f"@SH EXIT STATUS\n{text.split('Exit codes: ')[1]}")
    for plain, roff in (("\\", "\\e"), ("-", "\\-"), ("\n\n", "\n@PP\n"), ("\n@", "\n.")):
        page = page.replace(plain, roff)
    return "." + page[1:]


def run(argv: Optional[Sequence[str]], random: Callable[[int], bytes]) -> None:
    """Do the task of a command line; raise SpaError."""
    parser, names = make_parser(), " ".join(row[0] for row in OPTIONS).split()
    for word in sys.argv[1:] if argv is None else argv:  # an editor may put another dash for `-`
        name = word.lstrip("-\u2010\u2011\u2012\u2013\u2014\u2015\u2212").partition("=")[0]
        if word[:1] > "~" and {"-" + name, "--" + name}.intersection(names):
            raise UsageError(f"'{word.partition('=')[0]}': is that dash a hyphen?")
    options, unknown = parser.parse_known_args(argv)
    if unknown:  # show the name alone: a secret that was meant for `fwknop` may follow it
        name = unknown[0].partition("=")[0] if unknown[0][:2] == "--" else unknown[0][:2]
        raise UsageError(f"unknown option {name}" if name[:1] == "-" else "expected one NAME")
    if options.help:
        write_out(parser.format_help())
    elif options.version:
        with open(__file__, "rb") as stream:
            sha256 = hashlib.sha256(stream.read()).hexdigest()
        write_out(f"keygen.py {VERSION}\nsha256 {sha256}\n")
    elif options.man:
        write_out(man_page())
    elif options.completion:
        write_out(completion(options.completion))
    else:
        change(options, random)


def change(options: argparse.Namespace, random: Callable[[int], bytes]) -> None:
    """Make the keys, and print or write what was asked for."""
    check_options(options)
    if min(options.key_len or 16, options.hmac_key_len or 16) < 16:
        tell("keygen.py: warning: a key of less than 16 bytes can be guessed")
    options.ends = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(options.expires))
    if options.rotate:
        rotate(options, random)
    elif options.retire:
        change_files([(options.access_file,
                       lambda text: retire_stanza(text, f"# old {options.retire}"), "")],
                     f"Removed the old keys of {options.retire} from")
    elif options.openspa:
        give_openspa(options, random)
    else:
        give_keys(options, random)
    if options.expires:
        tell(f"[+] The pass ends at {options.ends}")
    if options.access_file or options.config_file:
        tell("[+] Now have the server read its files again: spa_server.py -R")


def main(argv: Optional[Sequence[str]] = None,
         random: Callable[[int], bytes] = os.urandom) -> int:
    """Run the command line and return the exit code; only here errors become one."""
    try:
        run(argv, random)
    except (SpaError, OSError) as error:
        tell(f"keygen.py: {explain(error)}")
        return 2 if isinstance(error, UsageError) else 3 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
