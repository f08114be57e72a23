#!/usr/bin/env python3
"""spa_client.py: knock at a firewall with one encrypted, authenticated packet.

It speaks fwknop's single packet authorization (SPA), reads ~/.fwknoprc and takes the options of
`fwknop`: it can take that command's place, and needs nothing but Python 3.6 or later. A knock is
one UDP datagram to each address of the server. It needs no root and starts no program. Only your
options make it do more: other carriers (the raw ones need root), gpg for GPG, a web server, wget
or a STUN server that knows our address, the command of --exec. It writes the files that you name,
and ~/.fwknoprc for --save-rc-stanza and --import. After a knock it keeps its options, but no
keys, in ~/.fwknop.run for -l; --no-save-args prevents that.

It also knocks on ports in their order, as `knock` does for knockd: before the packet if
KNOCK_SEQUENCE is set, and instead of the packet if there are no keys. --knock takes the command
line of `knock`; so does a link of that name to this file. With --ospa it knocks by OpenSPA instead.

Comments cite tests/spec/fwknop.md, knockd.md and openspa.md by section. These files describe the
formats and the behaviour of fwknop, knockd and OpenSPA.

The way of a packet, with the sections that it leads through:

  * The client reads the command line with the table of options (9), and ~/.fwknoprc (10) with the
    table of directives (8). An option is a directive on the command line. The command line
    overrides the stanza of -n, that overrides [default], and that the built-in defaults.
  * It takes the two keys from there, from key files, or from a prompt (11).
  * It looks the server's name up (13) and does the following for each address, IPv4 and IPv6. Each
    address gets a packet of its own: the server rejects a second copy as a replay.
  * It knocks on the ports of KNOCK_SEQUENCE, at one address after the other (13).
  * It connects a UDP socket (13), which sends nothing yet.
  * It chooses the address to open for (14): that of -a or -s, or else the socket's own. The own
    one serves only if no NAT can be on the way, so that the server sees the same one.
  * It writes the message (4): for whom, when, which ports. A digest follows the message.
  * It encrypts both with AES-256 (3) or gpg (12), and appends an HMAC of the cipher text (4).
  * It checks the length of the packet, and sends it by its carrier (6, 13).
  * With --answer it prints the server's answer to the packet, if the stanza there has ANSWER (16).
  * With --wait, --proxy or --exec it tries the TCP port until it opens, and knocks anew every
    second or three, unless the server answers why not. Then it relays that connection, or becomes
    the command (16).

Contents. Sections 1 to 10 only compute: text, bytes and time in, values out; some warn. Sections
11 to 18 touch the machine: files, terminal, programs, network, standard output.

  1. Errors
  2. Bytes and digests
  3. AES (FIPS 197) and its modes
  4. Message and packet
  5. RSA (RFC 8017) and the OpenSPA packet
  6. Carriers
  7. Values
  8. Directives
  9. Options
  10. The rc file
  11. Files and keys
  12. Programs
  13. Network
  14. Own address
  15. OpenSPA
  16. After the knock
  17. Output
  18. Run

Exit codes: 0 the packet was sent, or another task is done; 1 it was not sent, the server refused
(--answer), or the port did not open; 2 wrong usage; 3 a file can't be used; 130 interrupted. fwknop
has only 0 and 1. --exec ends with the code of its command. --knock ends with 1 for every error.
"""

import binascii
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    import struct
    from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple, TypeVar

    T = TypeVar("T")
    Address = Tuple[int, Tuple[Any, ...]]  # a family, and the argument of connect()
else:
    try:
        import _socket as socket  # costs an eighth of the import of `socket`, and has all we need
        import _struct as struct
    except ImportError:
        import socket
        import struct

VERSION = "0.1.0"
PROTOCOL_VERSION = "3.0.0"

# ======================================================================================
# 1. Errors
#
# Errors that the user can do something about. No error carries a key.
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


class UsageError(SpaError):
    """A command line that can't be obeyed: exit code 2."""


class ConfigError(SpaError):
    """A file, or a line of it, that can't be used; the text begins with its name: exit code 3."""


class errors_named:
    """A context that turns an OSError or ValueError into the SpaError `name: reason`."""

    def __init__(self, name: str, hint: str = "") -> None:
        self.name, self.hint = name, hint

    def __enter__(self) -> None:
        """Do nothing before the block."""

    def __exit__(self, kind: object, error: "Optional[BaseException]", trace: object) -> None:
        """Let errors of other kinds pass as they are."""
        if isinstance(error, (OSError, ValueError)):
            raise SpaError(explain(error, self.name), self.hint) from None


def with_hint(error: SpaError) -> str:
    """Return an error with its hint, in one line."""
    return f"{error} ({error.hint})" if error.hint else str(error)


# ======================================================================================
# 2. Bytes and digests
#
# Base64 as fwknop writes it, its seven digests, and HMAC.
# ======================================================================================


# --- shared: digests -- the same text in spa_server.py and spa_client.py --


class Digest:
    """One of the digests of tests/spec/fwknop.md 1.6; sizes in bytes, `block` for HMAC."""

    def __init__(self, name: str, number: int, size: int, block: int, modules: str) -> None:
        self.name, self.number, self.size, self.block = name, number, size, block
        self.modules, self.text_size = modules, (size * 8 + 5) // 6  # as base64

    def constructor(self) -> "Callable[[bytes], Any]":
        """Return the function that starts this digest over some bytes.

        Python's own small modules import ten times faster than hashlib with its OpenSSL, which
        serves Pythons without them. In FIPS mode hashlib has MD5 only with usedforsecurity=False,
        and before Python 3.9 it does not know that argument.
        """
        name = self.name.lower()
        for module in self.modules.split():
            try:
                return getattr(__import__(module), name)  # type: ignore[no-any-return]
            except (ImportError, AttributeError):
                continue
        try:
            import hashlib
            plain = getattr(hashlib, name)
            plain(b"", usedforsecurity=False)
        except (ImportError, AttributeError):
            raise SpaError(f"this Python has no {self.name}") from None
        except TypeError:
            return plain  # type: ignore[no-any-return]
        return lambda data: plain(data, usedforsecurity=False)

    def __call__(self, data: bytes) -> bytes:
        """Return the digest of `data`."""
        return self.constructor()(data).digest()  # type: ignore[no-any-return]


DIGESTS = {digest.name: digest for digest in (
    Digest("MD5", 1, 16, 64, "_md5"),
    Digest("SHA1", 2, 20, 64, "_sha1"),
    Digest("SHA256", 3, 32, 64, "_sha256 _sha2"),
    Digest("SHA384", 4, 48, 128, "_sha512 _sha2"),
    Digest("SHA512", 5, 64, 128, "_sha512 _sha2"),
    Digest("SHA3_256", 6, 32, 136, "_sha3"),
    Digest("SHA3_512", 7, 64, 72, "_sha3"),
)}


class Hmac:
    """HMAC (RFC 2104) with a fixed key and beginning: a call only copies two prepared hashes."""

    def __init__(self, digest: Digest, key: bytes, beginning: bytes = b"") -> None:
        start = digest.constructor()
        key = (start(key).digest() if len(key) > digest.block else key).ljust(digest.block, b"\0")
        self.inner = start(bytes(byte ^ 0x36 for byte in key) + beginning)
        self.outer = start(bytes(byte ^ 0x5C for byte in key))

    def __call__(self, data: bytes) -> bytes:
        """Return the HMAC of beginning and `data`."""
        inner, outer = self.inner.copy(), self.outer.copy()
        inner.update(data)
        outer.update(inner.digest())
        return outer.digest()  # type: ignore[no-any-return]


# --- end shared: digests --


def encode_base64(data: bytes) -> str:
    """Return base64 (RFC 4648 section 4) without the `=` at its end (tests/spec/fwknop.md 1.1)."""
    return binascii.b2a_base64(data, newline=False).decode("ascii").rstrip("=")


def decode_base64(text: str) -> bytes:
    """Return the bytes of base64, with or without the `=` at its end; raise ValueError."""
    digits = text.rstrip("=")
    if len(digits) % 4 == 1 or digits.strip(
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"):
        raise ValueError("expected base64")
    return binascii.a2b_base64(digits + "=" * (-len(digits) % 4))


def encode_text(text: str) -> bytes:
    """Return the bytes that an argument or a file's text was decoded from."""
    return text.encode(sys.getfilesystemencoding(), "surrogateescape")


def decode_text(data: bytes) -> str:
    """Return the text of a file without a byte order mark; encode_text() makes bytes of it."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # PowerShell's `>` writes UTF-16
        return data.decode("utf-16", "replace")
    data = data[3:] if data.startswith(b"\xef\xbb\xbf") else data
    return data.decode(sys.getfilesystemencoding(), "surrogateescape")


# ======================================================================================
# 3. AES (FIPS 197) and its modes
#
# The block cipher is written here because Python's library has no AES, and to import a package
# costs more than to encrypt the six blocks of a packet. The modes are those of NIST SP 800-38A as
# fwknop uses them, in the container of `openssl enc`.
# ======================================================================================

# --- shared: aes -- the same text in spa_server.py and spa_client.py --


class AesTables:
    """The S-box of FIPS 197 section 5.1.1, and tables that join SubBytes and MixColumns.

    columns[i][x] is column i of the MixColumns matrix times S(x), a 32-bit word with row 0 on top:
    a round is sixteen look-ups and xors. Their time depends on key and caches, as with all tables.
    """

    def __init__(self) -> None:
        # 3 generates the multiplicative group of GF(2^8): powers[k] is 3^k, and 1/3^k is 3^-k.
        self.powers = [1]
        for _ in range(254):
            doubled = self.powers[-1] << 1 ^ (0x11B if self.powers[-1] & 0x80 else 0)
            self.powers.append(self.powers[-1] ^ doubled)
        self.logs = {power: k for k, power in enumerate(self.powers)}
        sbox = bytearray(b"\x63" * 256)
        for k, power in enumerate(self.powers):
            bits = self.powers[-k % 255] * 0x101  # 1/x twice, side by side: a shift right rotates
            sbox[power] = (bits ^ bits >> 4 ^ bits >> 5 ^ bits >> 6 ^ bits >> 7) & 0xFF ^ 0x63
        self.box = bytes(sbox)
        self.columns = self.multiply(self.box, (2, 1, 1, 3))
        self.inverse = b"", []  # type: Tuple[bytes, List[bytes]]

    def invert(self) -> "Tuple[bytes, List[bytes]]":
        """Return the inverse of the S-box, and each byte's products with InvMixColumns' factors."""
        if not self.inverse[0]:
            every = bytes(range(256))
            self.inverse = bytes(self.box.index(value) for value in every), [
                bytes(self.multiply(every, (factor,))[0]) for factor in (14, 11, 13, 9)]
        return self.inverse

    def multiply(self, box: bytes, factors: "Tuple[int, ...]") -> "List[List[int]]":
        """Multiply each byte of `box` by `factors` to a word; return these in four rotations."""
        words = [0] * 256
        for position, value in enumerate(box):
            for factor in factors if value else ():
                product = self.powers[(self.logs[value] + self.logs[factor]) % 255]
                words[position] = words[position] << 8 | product
        return [[(word << 32 | word) >> turn & 0xFFFFFFFF for word in words]
                for turn in (0, 8, 16, 24)]


class Aes:
    """The block cipher of FIPS 197 for one key of 16, 24 or 32 bytes."""

    made = None  # type: Optional[AesTables]
    order = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]  # a block's bytes, by rows

    def __init__(self, key: bytes) -> None:
        # Tables take half a millisecond each way: none is made before somebody needs it.
        self.tables = Aes.made = Aes.made or AesTables()
        self.words = self.expand(key)

    def expand(self, key: bytes) -> "List[int]":
        """Return the round keys of section 5.2, four words each."""
        words = list(struct.unpack(f">{len(key) // 4}I", key))
        length, constant, box = len(words), 1, self.tables.box
        for i in range(length, 4 * (length + 7)):
            word = words[-1]
            if i % length == 0:
                word = (word << 8 | word >> 24) & 0xFFFFFFFF
            if i % length == 0 or (length > 6 and i % length == 4):
                word = int.from_bytes(struct.pack(">I", word).translate(box), "big")
            if i % length == 0:
                word ^= constant << 24
                constant = constant << 1 ^ (0x11B if constant & 0x80 else 0)
            words.append(words[-length] ^ word)
        return words

    def encrypt_block(self, block: bytes) -> bytes:
        """Encrypt 16 bytes: Cipher() of section 5.1. A word is a column of the state."""
        (t0, t1, t2, t3), k = self.tables.columns, self.words
        a, b, c, d = (word ^ key for word, key in zip(struct.unpack(">4I", block), k))
        for i in range(4, len(k) - 4, 4):
            a, b, c, d = (
                t0[a >> 24] ^ t1[b >> 16 & 255] ^ t2[c >> 8 & 255] ^ t3[d & 255] ^ k[i],
                t0[b >> 24] ^ t1[c >> 16 & 255] ^ t2[d >> 8 & 255] ^ t3[a & 255] ^ k[i + 1],
                t0[c >> 24] ^ t1[d >> 16 & 255] ^ t2[a >> 8 & 255] ^ t3[b & 255] ^ k[i + 2],
                t0[d >> 24] ^ t1[a >> 16 & 255] ^ t2[b >> 8 & 255] ^ t3[c & 255] ^ k[i + 3])
        last = struct.pack(">4I", a, b, c, d).translate(self.tables.box)  # no MixColumns
        return exclusive_or(bytes([last[5 * i % 16] for i in range(16)]),  # ShiftRows
                            struct.pack(">4I", *k[-4:]))

    def decrypt_blocks(self, text: bytes) -> bytes:
        """Decrypt whole blocks, at least one: InvCipher() of section 5.3, for all blocks at once.

        The state has one row after the other (section 3.4), in a row one column after the other,
        and in a column its byte of each block. That takes half the time of block by block.
        """
        size, row, blocks = len(text), len(text) // 4, len(text) // 16  # bytes, bytes, their number
        box, factors = self.tables.invert()
        words = struct.pack(f">{len(self.words)}I", *self.words)
        once = bytes([words[i + index] for i in range(0, len(words), 16) for index in self.order])
        state, keys = b"".join([text[i::16] for i in self.order]), bytearray(len(words) * blocks)
        for i in range(blocks):
            keys[i::blocks] = once  # all round keys as states: each byte once for each block
        for start in range(len(keys) - size, -1, -size):
            state = exclusive_or(state, bytes(keys[start:start + size]))  # AddRoundKey
            if 0 < start < len(keys) - size:  # InvMixColumns: 14 times a row, 11 times the next...
                rows = state + state
                a, b, c, d = [int.from_bytes(rows[i * row:i * row + size].translate(factor), "big")
                              for i, factor in enumerate(factors)]
                state = (a ^ b ^ c ^ d).to_bytes(size, "big")
            if start:  # InvShiftRows, which turns row i by i columns, and InvSubBytes
                state = b"".join([state[end - i * blocks:end] + state[end - row:end - i * blocks]
                                  for i, end in enumerate(range(row, size + 1, row))])
                state = state.translate(box)
        return b"".join([state[i + j::row] for i in range(blocks) for j in range(0, row, blocks)])


def exclusive_or(left: bytes, right: bytes) -> bytes:
    """Return the exclusive or of `left` and as many bytes of `right`."""
    number = int.from_bytes(left, "big") ^ int.from_bytes(right[:len(left)], "big")
    return number.to_bytes(len(left), "big")


def bytes_to_key(md5: "Callable[[bytes], bytes]", secret: bytes,
                 salt: bytes) -> "Tuple[bytes, bytes]":
    """Return the AES-256 key and IV of `openssl enc -md md5`: EVP_BytesToKey with count 1."""
    first = md5(secret + salt)
    second = md5(first + secret + salt)
    return first + second, md5(second + secret + salt)


# --- end shared: aes --

BLOCK = 16  # bytes of a block of AES
KEY_LIMIT = 32  # bytes of an encryption key
LEGACY_KEY_LENGTH = 16
HMAC_KEY_LIMIT = 128  # bytes of an HMAC key
SALT_LENGTH = 8
SALTED = b"Salted__"  # the first bytes of `openssl enc`
PREFIX = "U2FsdGVkX1"  # base64 of SALTED, up to the digit that the salt takes part in: not sent

# The encryption modes, with their numbers in the dump (tests/spec/fwknop.md 1.7).
GPG = "Asymmetric"
MODES = {"CBC": 2, "ECB": 1, "CFB": 3, "OFB": 5, "CTR": 6, "legacy": 8, GPG: 7}


def encrypt_blocks(mode: str, key: bytes, iv: bytes, blocks: bytes) -> bytes:
    """Encrypt whole blocks with a key of AES (SP 800-38A section 6.1 to 6.5; CFB is CFB128)."""
    encrypt, register, out = Aes(key).encrypt_block, iv, b""
    for position in range(0, len(blocks), BLOCK):
        block = blocks[position:position + BLOCK]
        if mode in ("ECB", "CBC", "legacy"):
            register = encrypt(block if mode == "ECB" else exclusive_or(block, register))
            out += register
            continue
        stream = encrypt(register)
        out += exclusive_or(block, stream)
        if mode == "CTR":
            count = (int.from_bytes(register, "big") + 1) % (1 << 8 * BLOCK)
            register = count.to_bytes(BLOCK, "big")
        else:
            register = stream if mode == "OFB" else out[-BLOCK:]
    return out


def encrypt_salted(mode: str, secret: bytes, salt: bytes, plaintext: bytes) -> bytes:
    """Return `Salted__`, salt and cipher text, as `openssl enc -md md5` does (fwknop.md 1.7).

    Every mode gets PKCS#7 padding, even those that need none. Legacy mode is CBC with a secret of
    exactly 16 bytes: a longer one is cut, a shorter one filled up with the digit 0.
    """
    if mode == "legacy":
        secret = secret[:LEGACY_KEY_LENGTH].ljust(LEGACY_KEY_LENGTH, b"0")
    key, iv = bytes_to_key(DIGESTS["MD5"], secret, salt)
    padding = BLOCK - len(plaintext) % BLOCK
    blocks = plaintext + bytes([padding]) * padding
    return SALTED + salt + encrypt_blocks(mode, key, iv, blocks)


# ======================================================================================
# 4. Message and packet
#
# The message (tests/spec/fwknop.md 1.2 to 1.6), the packet made of it (1.1, 1.8, 1.11), and the
# answer to that packet (tests/spec/answer.md).
# ======================================================================================

COMMAND, ACCESS, NAT_ACCESS, TIMEOUT_ACCESS, TIMEOUT_NAT_ACCESS, LOCAL_NAT, TIMEOUT_LOCAL_NAT = \
    range(7)
MESSAGE_TYPES = (
    "Command msg", "Access msg", "NAT access msg", "Client timeout access msg",
    "Client timeout NAT access msg", "Local NAT access msg", "Client timeout local NAT access msg")

SOURCE_ADDRESS = "0.0.0.0"  # in a message: the address that the packet comes from
USER_LIMIT = 48  # bytes of a user name: 64 of base64 (tests/spec/fwknop.md 1.3)
OPTION_USER_LIMIT = 29  # characters that fwknop keeps of -U and SPOOF_USER
TIMEOUT_LIMIT = 65536  # seconds, fwknop's limit
PACKET_LIMIT = 400  # characters: servers take a packet of this length for GPG (fwknop.md 1.9)
GPG_LIMIT = 1500  # characters: servers ignore longer packets (tests/spec/fwknop.md 1.10)
FIELD_LIMIT = 192  # bytes in a field of the message: 256 of base64 (tests/spec/fwknop.md 1.10)
ANSWER_TAG = 32  # bytes of the HMAC at the end of an answer
GPG_PREFIX = "hQ"  # base64 of the first bytes of a packet for an RSA key: not sent


class Message:
    """The fields of tests/spec/fwknop.md 1.2, without the digest and fields that are never sent.

    `random` is 16 digits, `timestamp` seconds since 1970, `number` one of the seven types, `text`
    "address,access" or "address,command". Only types 2, 4, 5 and 6 have a `nat`, only 3, 4 and 6 a
    `timeout` (seconds); that of a command is not sent.
    """

    def __init__(self, random: str, user: str, timestamp: int, number: int, text: str,
                 nat: str = "", timeout: int = 0) -> None:
        self.random, self.user, self.timestamp, self.number = random, user, timestamp, number
        self.text, self.nat, self.timeout = text, nat, timeout


def encode_message(message: Message, digest_type: str) -> bytes:
    """Return the plain text P of fwknop.md 1.1: the fields in order, and their digest (1.6)."""
    fields = [message.random, encode_base64(encode_text(message.user)), str(message.timestamp),
              PROTOCOL_VERSION, str(message.number), encode_base64(encode_text(message.text))]
    if message.nat:
        fields.append(encode_base64(encode_text(message.nat)))
    if message.timeout and message.number != COMMAND:
        fields.append(str(message.timeout))
    text = ":".join(fields).encode("ascii")
    return text + b":" + encode_base64(DIGESTS[digest_type](text)).encode("ascii")


def seal(data: bytes, hmac_key: "Optional[bytes]", hmac_type: str) -> str:
    """Return the packet of fwknop.md 1.1 with this cipher text; without a key it has no HMAC.

    The HMAC covers the prefix too, although it is not sent. OpenPGP data for keys other than RSA
    begins differently, and is sent whole; fwknopd does not understand it.
    """
    text, tag = encode_base64(data), ""
    if hmac_key is not None:
        tag = encode_base64(Hmac(DIGESTS[hmac_type], hmac_key)(text.encode("ascii")))
    prefix = PREFIX if text.startswith(PREFIX) else GPG_PREFIX
    return (text[len(prefix):] if text.startswith(prefix) else text) + tag


class Question:
    """A packet that was sent, with the keys of the answer to it (tests/spec/answer.md)."""

    def __init__(self, packet: bytes, key: bytes, hmac_key: bytes) -> None:
        sha256 = DIGESTS["SHA256"]
        digest, self.limit = sha256(packet), len(packet)
        self.key = Hmac(sha256, key)(b"spa answer encryption" + digest)
        self.tag = Hmac(sha256, Hmac(sha256, hmac_key)(b"spa answer authentication" + digest))

    def decode(self, datagram: bytes) -> "Tuple[bool, str]":
        """Return whether the server did as asked, and its text; raise ValueError for a stray."""
        body, tag = datagram[:-ANSWER_TAG], datagram[-ANSWER_TAG:]
        if (len(datagram) > self.limit or len(body) < 10 or body[0] != 1
                or any(exclusive_or(self.tag(body), tag))):  # takes the same time for every tag
            raise ValueError("expected an answer to this packet")
        text = encrypt_blocks("CTR", self.key, body[1:9] + bytes(8), body[9:])  # which decrypts
        return text[0] == 0, text[1:].decode("ascii", "replace")


def check_length(packet: str, message: Message, digest_type: str, tag_length: int,
                 mode: str) -> None:
    """Raise SpaError for a packet that servers would not understand (fwknop.md 1.9, 1.10)."""
    asked = "access list" if message.number != COMMAND else "command"
    if mode == GPG:
        if len(packet) > GPG_LIMIT:
            raise SpaError(f"the packet would be {len(packet)} characters long, and servers look at"
                           f" most at {GPG_LIMIT}", "use GPG keys of less than 4096 bits")
        if len(encode_text(message.text)) > FIELD_LIMIT:
            raise SpaError(f"address and {asked} are {len(message.text)} characters, and servers"
                           f" understand at most {FIELD_LIMIT}")
    elif len(packet) >= PACKET_LIMIT:
        raise SpaError(
            f"the packet would be {len(packet)} characters long, and servers understand at most"
            f" {PACKET_LIMIT - 4}: address and {asked} are {len(message.text)} characters, the user"
            f" name {len(message.user)}, the digest ({digest_type})"
            f" {DIGESTS[digest_type].text_size}, the HMAC {tag_length}",
            "ask for fewer ports at a time, or use a shorter digest")


# ======================================================================================
# 5. RSA (RFC 8017) and the OpenSPA packet
#
# PKCS#1 v1.5 with SHA-256, and keys in PEM; Python's pow() does the work. Containers, fields and
# encryption of OpenSPA v2 (tests/spec/openspa.md 1.2 to 1.6, 1.9).
# ======================================================================================

# --- shared: rsa -- the same text in spa_server.py and spa_client.py --

RSA_ALGORITHM = b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00"  # RFC 3279 2.3.1
SHA256_INFO = b"\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20"
RSA_BITS = (1024, 4096)
MAX_PEM = 16384  # characters; a private key of 4,096 bits has 3,300


def read_pem(text: str) -> "Tuple[str, bytes]":
    """Return label and contents of the one PEM block in a text (RFC 7468 section 3), or raise
    ValueError. Lines around it are comments."""
    lines = [line.strip() for line in text.split("\n")]
    begins = [line[11:-5] for line in lines if line[:11] == "-----BEGIN " and line[-5:] == "-----"]
    if len(text) > MAX_PEM or len(begins) != 1 or f"-----END {begins[0]}-----" not in lines:
        raise ValueError("expected one PEM block")
    first = lines.index(f"-----BEGIN {begins[0]}-----")
    body = "".join(lines[first + 1:lines.index(f"-----END {begins[0]}-----")])
    try:
        data = binascii.a2b_base64(body.encode("ascii"))
    except ValueError:
        data = b""
    if not data or binascii.b2a_base64(data).rstrip(b"\n") != body.encode("ascii", "replace"):
        raise ValueError("expected base64 in the PEM block (an encrypted key can't be read)")
    return begins[0], data


def read_der(data: bytes, tag: int) -> "Tuple[bytes, bytes]":
    """Return the contents of the item of this tag that DER begins with, and the rest (X.690 section
    10.1: the length has its shortest form), or raise ValueError."""
    length, start = (data[1] if len(data) > 1 else 0), 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(data[2:start], "big")
        if not 3 <= start <= 4 or length < 0x80 or length >> 8 * (start - 3) == 0:
            raise ValueError("expected DER with short lengths")
    if data[:1] != bytes([tag]) or len(data) < start + length:
        raise ValueError("expected an RSA key in DER")
    return data[start:start + length], data[start + length:]


def read_integers(data: bytes) -> "List[int]":
    """Return the integers, none of them negative, in a DER sequence that is all of `data`."""
    body, rest = read_der(data, 0x30)
    numbers = []
    while body:
        value, body = read_der(body, 0x02)
        if not value or value[0] & 0x80 or (len(value) > 1 and not value[0] and value[1] < 0x80):
            raise ValueError("expected numbers in DER")
        numbers.append(int.from_bytes(value, "big"))
    if rest:
        raise ValueError("expected nothing behind the key")
    return numbers


class RsaKey:
    """An RSA key for PKCS#1 v1.5 (RFC 8017). Without `primes` it is a public key."""

    def __init__(self, modulus: int, exponent: int, primes: "Tuple[int, ...]",
                 random_bytes: "Callable[[int], bytes]") -> None:
        self.modulus, self.exponent, self.primes = modulus, exponent, primes
        self.random_bytes = random_bytes
        self.size = (modulus.bit_length() + 7) // 8
        self.blinding = (0, 0)  # a random number to the exponent, and the inverse of the number
        if not RSA_BITS[0] <= modulus.bit_length() <= RSA_BITS[1] or modulus.bit_length() % 8:
            raise ValueError(f"expected a modulus of {RSA_BITS[0]} to {RSA_BITS[1]} bits, not of "
                             f"{modulus.bit_length()}")
        if not modulus & 1 or not exponent & 1 or not 65537 <= exponent < 1 << 32:
            raise ValueError("expected an odd modulus, and an odd exponent of 65537 or more")
        if primes:
            p, q, dp, dq, inverse = primes
            if (p * q != modulus or min(p, q) < 3 or exponent * dp % (p - 1) != 1
                    or exponent * dq % (q - 1) != 1 or inverse * q % p != 1):
                raise ValueError("expected a private key whose numbers belong together")

    @classmethod
    def parse(cls, text: str, private: bool,
              random_bytes: "Callable[[int], bytes]" = os.urandom) -> "RsaKey":
        """Read a key from PEM, or raise ValueError: a private one of PKCS#1 (RFC 8017 A.1.2) or
        PKCS#8 (RFC 5208), a public one of PKCS#1 (A.1.1) or SubjectPublicKeyInfo (RFC 5280 4.1)."""
        label, data = read_pem(text)
        if label not in (("RSA PRIVATE KEY", "PRIVATE KEY") if private else
                         ("RSA PUBLIC KEY", "PUBLIC KEY")):
            raise ValueError(f"expected a {'private' if private else 'public'} key, not {label}")
        if not label.startswith("RSA"):
            body, rest = read_der(data, 0x30)
            if private:
                version, body = read_der(body, 0x02)
                rest += version.strip(b"\0")
            if body[:len(RSA_ALGORITHM)] != RSA_ALGORITHM:
                raise ValueError("expected a key for RSA")
            data, more = read_der(body[len(RSA_ALGORITHM):], 0x04 if private else 0x03)
            if rest or more or not (private or data[:1] == b"\0"):
                raise ValueError("expected nothing behind the key")
            data = data if private else data[1:]
        numbers = read_integers(data)
        if len(numbers) != (9 if private else 2) or (private and numbers[0]):
            raise ValueError(f"expected the {9 if private else 2} numbers of an RSA key")
        modulus, exponent, *others = numbers[1 if private else 0:]
        return cls(modulus, exponent, tuple(others[1:]), random_bytes)

    def blind(self) -> "Tuple[int, int]":
        """Return another blinding. Its square serves the next time, and costs two products."""
        forward, back = self.blinding
        while not back:
            number = int.from_bytes(self.random_bytes(self.size + 8), "big") % self.modulus
            rest, value, factor, other = self.modulus, number, 0, 1  # Euclid's, extended
            while value:
                rest, (quotient, value) = value, divmod(rest, value)
                factor, other = other, factor - quotient * other
            if rest == 1:
                forward, back = pow(number, self.exponent, self.modulus), factor % self.modulus
        self.blinding = forward * forward % self.modulus, back * back % self.modulus
        return forward, back

    def apply_private(self, value: int) -> int:
        """Return RSADP and RSASP1 (section 5.1.2) of a value, by the two primes.

        The value is blinded, so that times tell nothing about the key. The result is checked: one
        that a fault has changed would give away a prime.
        """
        p, q, dp, dq, inverse = self.primes
        forward, back = self.blind()
        blinded = value * forward % self.modulus
        low = pow(blinded % q, dq, q)
        result = low + (pow(blinded % p, dp, p) - low) * inverse % p * q
        if pow(result, self.exponent, self.modulus) != blinded:
            raise ArithmeticError("this machine has calculated wrongly")
        return result * back % self.modulus

    def padded_digest(self, message: bytes) -> bytes:
        """Return EMSA-PKCS1-v1_5 of a message with SHA-256 (section 9.2)."""
        info = SHA256_INFO + DIGESTS["SHA256"](message)
        return b"\0\1" + b"\xff" * (self.size - len(info) - 3) + b"\0" + info

    def sign(self, message: bytes) -> bytes:
        """Return the signature of a message (section 8.2.1)."""
        number = self.apply_private(int.from_bytes(self.padded_digest(message), "big"))
        return number.to_bytes(self.size, "big")

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Return whether a signature is right (section 8.2.2): by comparison, nothing is parsed."""
        number = int.from_bytes(signature, "big")
        if len(signature) != self.size or number >= self.modulus:
            return False
        made = pow(number, self.exponent, self.modulus).to_bytes(self.size, "big")
        return made == self.padded_digest(message)

    def encrypt(self, message: bytes) -> bytes:
        """Return a message encrypted (section 7.2.1)."""
        length, padding = self.size - len(message) - 3, b""
        while len(padding) < length:
            padding += self.random_bytes(length).replace(b"\0", b"")
        number = int.from_bytes(b"\0\2" + padding[:length] + b"\0" + message, "big")
        return pow(number, self.exponent, self.modulus).to_bytes(self.size, "big")

    def decrypt(self, block: bytes, size: int) -> bytes:
        """Return the message of `size` bytes in a block (section 7.2.2).

        If the padding is wrong it is random bytes, and the packet fails later, at its signature:
        nobody learns from a quick answer which blocks have right padding.
        """
        instead, number = self.random_bytes(size), int.from_bytes(block, "big")
        in_range = len(block) == self.size and number < self.modulus
        padded = self.apply_private(number % self.modulus).to_bytes(self.size, "big")
        right = (padded[:2] == b"\0\2" and padded[-size - 1] == 0) & (
            padded.find(b"\0", 2) == self.size - size - 1) & in_range
        return padded[-size:] if right else instead


# --- end shared: rsa --

# --- shared: openspa -- the same text in spa_server.py and spa_client.py --

OSPA_PORT, OSPA_MAX = 22211, 1444  # bytes of a datagram at most (tests/spec/openspa.md 1.1)
# The header of eight bytes (1.2): control (type, version 2), transaction, cipher suite 1, 0, proof.
OSPA_HEADER = ">4BI"
OSPA_REQUEST, OSPA_ANSWER, OSPA_SUITE = 0x20, 0xA0, 1
OSPA_PROTOCOLS = (1, 4, 6, 17, 58)  # ICMP, IPv4, TCP, UDP, ICMPv6
ADK_SECONDS = 60


class OspaFields:
    """The signed fields (1.5). Addresses are packed. A request has no duration; an answer has
    neither time nor UUID nor the client's address."""

    def __init__(self, protocol: int, ports: "Tuple[int, int]", target: bytes,
                 client: bytes = b"", timestamp: int = 0, uuid: bytes = b"",
                 seconds: int = 0) -> None:
        self.protocol, self.ports, self.target, self.client = protocol, ports, target, client
        self.timestamp, self.uuid, self.seconds = timestamp, uuid, seconds

    def encode(self) -> bytes:
        """Return the packet container, its items in the order of the reference."""
        ports = [(kind, struct.pack(">H", port)) for kind, port in zip((2, 3), self.ports)]
        target = [(6 if len(self.target) == 4 else 7, self.target)]
        protocol = [(1, bytes([self.protocol]))]
        if not self.uuid:
            seconds = [(8, self.seconds.to_bytes(3, "big"))]
            return encode_tlv([(3, encode_tlv(protocol + target + ports + seconds))])
        client = [(4 if len(self.client) == 4 else 5, self.client)]
        return encode_tlv([(1, struct.pack(">Q", self.timestamp)), (2, self.uuid),
                           (3, encode_tlv(protocol + ports + client + target))])


def decode_ospa(data: bytes, is_answer: bool) -> OspaFields:
    """Return the fields of a request or an answer, or raise ValueError.

    Items may come in any order, and unknown ones beside them; each known one must have its size.
    """
    items = decode_tlv(data)
    rules, sizes = decode_tlv(items.get(3, b"")), {1: 1, 2: 2, 3: 2, 4: 4, 5: 16, 6: 4, 7: 16, 8: 3}
    protocol, first, last, seconds = [int.from_bytes(rules.get(kind, b""), "big")
                                      for kind in (1, 2, 3, 8)]
    client, target = [rules.get(four, b"") + rules.get(six, b"") for four, six in ((4, 5), (6, 7))]
    uuid, timestamp = items.get(2, b""), items.get(1, b"")
    if (any(len(rules[kind]) != sizes[kind] for kind in rules if kind in sizes)
            or not {1, 2, 3}.union((8,) if is_answer else ()) <= set(rules)
            or any(host[:12] == bytes(10) + b"\xff\xff" for host in (client, target))
            or len(target) not in (4, 16) or protocol not in OSPA_PROTOCOLS or first > last):
        raise ValueError("expected protocol, ports and addresses")
    if not is_answer and (len(client) not in (4, 16) or len(uuid) != 16 or len(timestamp) != 8):
        raise ValueError("expected a client's address, its UUID and the time")
    return OspaFields(protocol, (first, last), target, client, int.from_bytes(timestamp, "big"),
                      uuid, seconds)


def encode_tlv(items: "List[Tuple[int, bytes]]") -> bytes:
    """Return a container: type, length, value of each item (1.3). A value of more than 255 bytes
    goes into several items; a zero byte parts two values of the same type."""
    data, before = b"", 0
    for kind, value in items:
        data += b"\0" if kind == before else b""
        for start in range(0, max(len(value), 1), 255):
            part = value[start:start + 255]
            data += bytes([kind, len(part)]) + part
        before = kind
    return data


def decode_tlv(data: bytes) -> "Dict[int, bytes]":
    """Return the first value of each type in a container, or raise ValueError.

    One byte that is left at the end means nothing, as in the reference.
    """
    items, before, is_full, keep = {}, 0, False, False  # type: Dict[int, bytes], int, bool, bool
    if len(data) == 1 and data != b"\0":
        raise ValueError("expected an item")
    while len(data) > 1:
        kind, size = data[0], data[1]
        if not kind:
            before, data = 0, data[1:]
            continue
        value = data[2:2 + size]
        if len(value) < size or (kind == before and not (is_full and size)):
            raise ValueError("expected whole items")
        keep = keep if kind == before else kind not in items
        if keep:
            items[kind] = items.get(kind, b"") + value
        before, is_full, data = kind, size == 255, data[2 + size:]
    return items


def seal_ospa(header: bytes, packet: bytes, signer: "RsaKey", receiver: "RsaKey", session: bytes,
              nonce: bytes) -> bytes:
    """Return the datagram of a packet (1.4): signed, then encrypted by AES with the key of a
    session (IV, then key: 48 random bytes), which is encrypted to the receiver."""
    inner = encode_tlv([(1, packet), (3, nonce), (2, signer.sign(header + packet))])
    inner += bytes([16 - len(inner) % 16]) * (16 - len(inner) % 16)  # PKCS #7
    aes, block, text = Aes(session[16:]), session[:16], b""
    for start in range(0, len(inner), 16):
        block = aes.encrypt_block(exclusive_or(block, inner[start:start + 16]))
        text += block
    return header + encode_tlv([(1, text), (2, receiver.encrypt(session))])


def unseal_ospa(datagram: bytes, key: "RsaKey") -> "Tuple[bytes, bytes, bytes]":
    """Return header, packet and signature of a datagram, decrypted with our key, or raise
    ValueError (1.4). The signature is over header and packet, and is not verified here."""
    outer = decode_tlv(datagram[8:])
    text = outer.get(1, b"")
    if len(text) % 16 or not text:
        raise ValueError("expected whole blocks")
    session = key.decrypt(outer.get(2, b""), 48)
    plain = exclusive_or(Aes(session[16:]).decrypt_blocks(text), session[:16] + text)
    if not 1 <= plain[-1] <= 16 or plain[-plain[-1]:] != plain[-1:] * plain[-1]:
        raise ValueError("expected padding")
    inner = decode_tlv(plain[:-plain[-1]])
    if len(inner.get(3, b"")) < 3:
        raise ValueError("expected a nonce")
    return datagram[:8], inner.get(1, b""), inner.get(2, b"")


def adk_proof(secret: bytes, seconds: float) -> int:
    """Return the ADK proof by a 4-byte secret (1.9): HOTP of a minute, 9 digits (RFC 4226 5.3)."""
    tag = Hmac(DIGESTS["SHA1"], secret)(struct.pack(">Q", int(seconds) // ADK_SECONDS))
    offset = tag[-1] & 15
    return (int.from_bytes(tag[offset:offset + 4], "big") & 0x7FFFFFFF) % 10 ** 9


# --- end shared: openspa --


# ======================================================================================
# 6. Carriers
#
# The bytes around a packet that does not travel as a plain UDP datagram or over TCP: an HTTP
# request, or the IP headers of the raw carriers (tests/spec/fwknop.md 1.14).
# ======================================================================================

AGENT = "Fwknop/2.6.10"  # fwknopd wants this beginning; fwknop's client sends all of it
CARRIERS = ("udp", "udpraw", "tcp", "tcpraw", "http", "icmp")
RAW_CARRIERS = ("udpraw", "tcpraw", "icmp")
ICMP_ECHO = 8


def encode_request(target: str, host: str, agent: str) -> bytes:
    """Return a GET of HTTP/1.1 (RFC 9112) that asks the server to close the connection."""
    return encode_text(f"GET {target} HTTP/1.1\r\nUser-Agent: {agent}\r\nAccept: */*\r\n"
                       f"Host: {host}\r\nConnection: close\r\n\r\n")


def put_checksum(data: bytes, offset: int, pseudo: bytes = b"") -> bytes:
    """Return the data with the Internet checksum of RFC 1071 at `offset`, where two zeros stand.

    The sum covers the pseudo header too. It is never 0, which in UDP means "no checksum"
    (RFC 768); the other protocols take 0xFFFF for the same number.
    """
    padded = pseudo + data + b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(padded) // 2}H", padded))
    total = (total & 0xFFFF) + (total >> 16)
    sum_ = ~(total + (total >> 16)) & 0xFFFF
    return data[:offset] + struct.pack(">H", sum_ or 0xFFFF) + data[offset + 2:]


def encode_raw(carrier: str, payload: bytes, addresses: bytes,
               ports: "Tuple[int, int]", icmp: "Tuple[int, int]" = (0, 0)) -> bytes:
    """Return an IPv4 packet (RFC 791): ICMP (RFC 792), UDP (RFC 768) or a SYN of TCP (RFC 9293).

    `addresses` are source and destination, `icmp` type and code. The source port is the identifier
    of an echo request. All checksums are right; fwknop leaves 0 in those of UDP and TCP.
    """
    if carrier == "icmp":
        protocol, offset = 1, 2
        number = (ports[0], 1) if icmp[0] == ICMP_ECHO else (0, 0)
        header = struct.pack(">BBHHH", *icmp, 0, *number)
    elif carrier == "udpraw":
        protocol, offset = 17, 6
        header = struct.pack(">HHHH", *ports, 8 + len(payload), 0)
    else:  # sequence number 1, header of 5 words, SYN, window 32767, as fwknop has them
        protocol, offset = 6, 16
        header = struct.pack(">HHIIBBHHH", *ports, 1, 0, 5 << 4, 2, 32767, 0, 0)
    segment = header + payload
    pseudo = addresses + struct.pack(">HH", protocol, len(segment)) if protocol != 1 else b""
    outer = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 255, protocol, 0)
    return put_checksum(outer + addresses, 10) + put_checksum(segment, offset, pseudo)


# ======================================================================================
# 7. Values
#
# From text to the value of a directive or option. A parse_ function that gets something else
# raises ValueError("expected ..."). The caller adds file and line, and the text if it is no secret.
# ======================================================================================

RESOLVE = "resolve"  # instead of an address to open for: ask a web page for ours
STUN, STUN_PORT = "stun:", 3478  # the same with `stun:HOST` or `stun:HOST:PORT`: ask this server


def parse_text(text: str) -> str:
    """Return any text that is not empty."""
    if not text:
        raise ValueError("expected a value")
    return text


def parse_server(text: str) -> str:
    """Return a host name or an address: no resolver knows it with a port, or as a URL."""
    if "/" in text or (text.count(":") == 1 and is_decimal(text.partition(":")[2])):
        raise ValueError("expected a name or an address, without port or path")
    return parse_text(text)


def parse_yes_no(text: str) -> bool:
    """Parse Y or N."""
    if text.lower() not in ("y", "yes", "n", "no", "0", "false", "off", "disable", "disabled"):
        raise ValueError("expected Y or N" + (" (RESOLVE_URL takes it)" if "://" in text else ""))
    return text[0] in "yY"


def is_decimal(text: str) -> bool:
    """Return whether the text is one to nine digits, and nothing else."""
    return 0 < len(text) < 10 and not text.strip("0123456789")


SECONDS = "a number of seconds"
MILLISECONDS = "milliseconds such as 100, or a range such as 100-300"
UNITS = {SECONDS: ("", "s", "sec", "secs", "second", "seconds"), MILLISECONDS: ("", "ms")}


def number_parser(low: int, high: int, what: str) -> "Callable[[str], int]":
    """Return a parse_ function for decimal numbers of `what`; its unit and a comma may follow."""
    def parse(text: str) -> int:
        word = text.lstrip("+0123456789")
        digits = text[text.startswith("+"):len(text) - len(word)]
        right = is_decimal(digits) and word.rstrip(",").lower() in UNITS.get(what, ("",))
        if not right or not low <= int(digits) <= high:
            raise ValueError(f"expected {what}, {low} to {high}")
        return int(digits)
    return parse


parse_port = number_parser(1, 65535, "a port number")


def parse_offset(text: str) -> int:
    """Parse `90`, `90s`, `5m`, `2hours` or `1d`, perhaps with a sign, into seconds."""
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    digits = digits.lstrip("+")  # also behind the sign that an option stands for
    unit = digits.lstrip("0123456789")
    count = digits[:len(digits) - len(unit)]
    factor = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}.get(unit[:1].lower())
    if not is_decimal(count) or factor is None:
        raise ValueError("expected a time such as 90, 90s, 5m, 2h or 1d")
    return sign * int(count) * factor


def choice_parser(names: "Iterable[str]") -> "Callable[[str], str]":
    """Return a parse_ function for one of some names, in any case."""
    def parse(text: str) -> str:
        for name in names:
            if text.lower() == name.lower():
                return name
        raise ValueError("expected one of " + " ".join(names))
    return parse


parse_digest = choice_parser(DIGESTS)


def parse_printable(text: str) -> str:
    """Return text that is one line."""
    if not text.strip() or min(text) < " " or "\x7f" in text:
        raise ValueError("expected text without control characters")
    return text


def parse_peer(text: str, port: int = 0) -> "Tuple[str, int]":
    """Parse `host`, `host:9`, `host,9` or `[IPv6]:9`; `port` stands in for one that is missing."""
    host, mark, digits = (each.strip(" ") for each in text.rpartition("," if "," in text else ":"))
    if not mark or (mark == ":" and ":" in host and not host.endswith("]")):
        host, mark = text, ""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if ":" in host:
        parse_address(host)
    elif not 1 <= len(host) <= 70 or host.lower().strip("abcdefghijklmnopqrstuvwxyz0123456789.-_"):
        raise ValueError("expected a host, or host:port")
    return host, parse_port(digits) if mark else port


def parse_proxy(text: str) -> "Tuple[str, int]":
    """Parse the host and port of an HTTP proxy, with or without `http://` in front."""
    return parse_peer(text[7:].rstrip("/") if text.startswith("http://") else text)


def parse_url(text: str) -> "Tuple[str, str, int, str]":
    """Parse a URL of HTTP or HTTPS without user name: itself, host, port and path."""
    text = text if "://" in text or "." not in text else "http://" + text  # as fwknop and wget
    scheme, _, rest = text.partition("://")
    peer, _, path = rest.partition("/")
    path = "/" + path
    if scheme not in ("http", "https") or min(path) < "!" or max(path) > "~":
        raise ValueError("expected a URL that begins with https:// or http://")
    return (text,) + parse_peer(peer, 443 if scheme == "https" else 80) + (path,)


def parse_access(text: str) -> str:
    """Parse `tcp/22, udp/53` as servers do (fwknop.md 1.4), or `tcp/8000-8010`; drop blanks."""
    entries = [entry.strip(" ") for entry in text.split(",")]
    for entry in entries:
        protocol, slash, port = entry.partition("/")
        first, dash, last = port.partition("-")
        if (protocol not in ("tcp", "udp") or not slash or "+" in port
                or max(len(first), len(last)) > 5):
            raise ValueError("expected tcp/PORT or udp/PORT, several with commas in between")
        if parse_port(last if dash else first) < parse_port(first):
            raise ValueError("expected the lower port first")
    return ",".join(entries)


PING_BYTES = 56  # data bytes of an echo request of any length; `ping` sends as many
MAX_PING_BYTES = 1452  # a longer request is fragmented, and the server does not count fragments
MAX_STEPS = 32  # the server's limit as well (tests/spec/knockd.md 1.2)


def parse_sequence(text: str) -> "List[Tuple[str, int]]":
    """Parse `7000, ssh, 8000:udp, 100:icmp` into protocols and ports, or data bytes for ICMP.

    No error shows the text, because the sequence is half a secret.
    """
    steps = []
    for number, item in enumerate(text.split(","), 1):
        port, colon, protocol = item.lstrip(" ").partition(":")
        protocol = protocol.lower() if colon else "tcp"
        try:
            if protocol == "icmp":
                value = number_parser(0, MAX_PING_BYTES, "bytes")(port) if port else PING_BYTES
            elif protocol not in ("tcp", "udp"):
                raise ValueError
            else:
                value = parse_port(port) if is_decimal(port) else socket.getservbyname(
                    port, protocol)
        except (OSError, ValueError):
            raise ValueError(f"number {number} of the ports: expected PORT, PORT:udp or BYTES:icmp,"
                             " PORT from 1 to 65535 or the name of a service, BYTES up to"
                             f" {MAX_PING_BYTES}") from None
        steps.append((protocol, value))
    if len(steps) > MAX_STEPS:
        raise ValueError(f"expected at most {MAX_STEPS} ports")
    return steps


def parse_delay(text: str) -> "Tuple[int, int]":
    """Parse `100` or `100-300` into the least and the most milliseconds."""
    least, dash, most = text.partition("-")
    parse = number_parser(0, 60000, MILLISECONDS)
    if parse(most if dash else least) < parse(least):
        raise ValueError("expected the lower number first")
    return parse(least), parse(most if dash else least)


def parse_address(text: str) -> str:
    """Parse an IPv4 or IPv6 address, and return it as servers write it."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        return socket.inet_ntop(family, socket.inet_pton(family, text))
    except (OSError, ValueError):
        raise ValueError("expected an IPv4 or IPv6 address") from None


def parse_spoof(text: str) -> str:
    """Parse an address to send from; the raw carriers know only IPv4."""
    if ":" in text:
        raise ValueError("expected an IPv4 address")
    return parse_address(text)


def parse_allow(text: str) -> str:
    """Parse the address to open for: one, `source`, `resolve`, or `stun:` and a server to ask."""
    if text.lower() == "source":
        return SOURCE_ADDRESS
    if text.startswith(STUN):
        parse_peer(text[len(STUN):], STUN_PORT)
        return text
    return RESOLVE if text.lower() == RESOLVE else parse_address(text)


def parse_user(text: str) -> str:
    """Parse a user name that servers accept (tests/spec/fwknop.md 1.3)."""
    if not 1 <= len(encode_text(text)) <= USER_LIMIT:
        raise ValueError(f"expected a user name of 1 to {USER_LIMIT} characters")
    if min(text) < " " or max(text) > "~" or set(text) & set('"/\\[]:;|=,+*?<>'):
        raise ValueError('expected a user name in ASCII, without " / \\ [ ] : ; | = , + * ? < >')
    return text


# ======================================================================================
# 8. Directives
#
# One row per directive of ~/.fwknoprc, in fwknop's order. Only options set the rows at the end,
# which have names in lower case. A value stays text, with its origin, until all layers are merged.
# A new directive is a row here; a new option is a row of OPTION_TABLE (section 9).
# ======================================================================================


class Given:
    """The text of one value, and where it stood: an option with its arguments, or a file's line."""

    def __init__(self, text: str, where: str = "", line: int = 0,
                 arguments: "Tuple[str, ...]" = ()) -> None:
        self.text, self.where, self.line, self.arguments = text, where, line, arguments


SECRET = (encode_text, decode_base64, parse_sequence)  # errors never show the text of these


class Directive:
    """A row of the table: its name, the parser of its text, its default and its help."""

    def __init__(self, name: str, parse: "Callable[[str], Any]", default: "Optional[str]",
                 help: str) -> None:
        self.name, self.parse, self.default, self.help = name, parse, default, help

    def value(self, given: "Optional[Given]") -> "Any":
        """Return the value to use, the default if none is given; raise SpaError for bad text."""
        if given is None:
            return None if self.default is None else self.parse(self.default)
        where = f"{given.where}:{given.line}: {self.name}" if given.line else given.where
        doubt = doubt_key(self.name, given.text) if self.parse in SECRET else ""
        try:
            value = self.parse(given.text)
        except ValueError as problem:
            shown = doubt if self.parse in SECRET else f"not '{given.text}'"
            raise (ConfigError if given.line else UsageError)(
                f"{where}: {problem}" + (f", {shown}" if shown else "")) from None
        if doubt:
            warn(f"{where}: {doubt}")
        return value


def setting(name: str, parse: "Callable[[str], T]", default: str, help: str) -> "T":
    """Return a directive with a default; an instance of Settings has the parsed value instead."""
    return Directive(name, parse, default, help)  # type: ignore[return-value]


def optional(name: str, parse: "Callable[[str], T]", help: str) -> "Optional[T]":
    """Return a directive without a default: its value is None unless it is given."""
    return Directive(name, parse, None, help)  # type: ignore[return-value]


def flag(name: str, help: str) -> bool:
    """Return a directive that is off unless it is Y."""
    return setting(name, parse_yes_no, "N", help)


class Settings:
    """Every directive of ~/.fwknoprc, as fwknop numbers them, and of the command line."""

    digest_type = setting("DIGEST_TYPE", parse_digest, "SHA256", "digest inside the packet")
    protocol = setting("SPA_SERVER_PROTO", choice_parser(CARRIERS), "udp", "carrier of the packet")
    port = setting("SPA_SERVER_PORT", parse_port, "62201", "port of the server")
    source_port = optional("SPA_SOURCE_PORT", parse_port, "source port of the raw carriers")
    timeout = setting("FW_TIMEOUT", number_parser(0, TIMEOUT_LIMIT, SECONDS), "0",
                      "seconds to keep open (0: the server decides)")
    allow_ip = optional("ALLOW_IP", parse_allow, "address to open for")
    time_offset = setting("TIME_OFFSET", parse_offset, "0", "add to the time in the packet")
    mode = setting("ENCRYPTION_MODE", choice_parser(MODES), "CBC", "mode of AES")
    use_gpg = flag("USE_GPG", "encrypt with GPG instead of AES")
    gpg_agent = flag("USE_GPG_AGENT", "the gpg-agent knows the passphrase")
    gpg_no_passphrase = flag("GPG_NO_SIGNING_PW", "GPG_SIGNER has no passphrase")
    gpg_recipient = optional("GPG_RECIPIENT", parse_text, "the server's GPG key")
    gpg_signer = optional("GPG_SIGNER", parse_text, "our GPG key, to sign with")
    gpg_home = optional("GPG_HOMEDIR", parse_text, "directory of the GPG keys")
    gpg_exe = setting("GPG_EXE", parse_text, "gpg", "the program gpg")
    user = optional("SPOOF_USER", lambda text: parse_user(text[:OPTION_USER_LIMIT]),
                    "user name in the packet")
    spoof_source = optional("SPOOF_SOURCE_IP", parse_spoof, "source address of the raw carriers")
    access = optional("ACCESS", parse_access, "ports to open, such as tcp/22,udp/53")
    server = optional("SPA_SERVER", parse_server, "the server, a name or an address")
    rand_port = flag("RAND_PORT", "a random port of the server, 10000 and up")
    key = optional("KEY", encode_text, "encryption key")
    key_base64 = optional("KEY_BASE64", decode_base64, "encryption key in base64")
    gpg_passphrase = optional("GPG_SIGNING_PW", encode_text, "passphrase of GPG_SIGNER")
    gpg_passphrase_base64 = optional("GPG_SIGNING_PW_BASE64", decode_base64, "the same in base64")
    hmac_type = setting("HMAC_DIGEST_TYPE", parse_digest, "SHA256", "digest of the HMAC")
    hmac_key_base64 = optional("HMAC_KEY_BASE64", decode_base64, "HMAC key in base64")
    hmac_key = optional("HMAC_KEY", encode_text, "HMAC key")
    use_hmac = flag("USE_HMAC", "ask for an HMAC key when none is given")
    use_wget_agent = flag("USE_WGET_USER_AGENT", "let wget name itself")
    key_file = optional("KEY_FILE", parse_text, "file with lines `server: key`")
    hmac_key_file = optional("HMAC_KEY_FILE", parse_text, "file with lines `server: HMAC key`")
    nat_access = optional("NAT_ACCESS", parse_peer, "host and port to open behind the server")
    user_agent = setting("HTTP_USER_AGENT", parse_printable, AGENT, "name of the client over HTTP")
    resolve_url = optional("RESOLVE_URL", parse_url, "page that tells our address")
    resolve_ipv4 = flag("SERVER_RESOLVE_IPV4", "use IPv4 to the server")
    nat_local = flag("NAT_LOCAL", "the server itself is the NAT's target")
    nat_rand_port = flag("NAT_RAND_PORT", "reach the target by a random port")
    nat_port = optional("NAT_PORT", parse_port, "reach the target by this port, not that of ACCESS")
    verbose = setting("VERBOSE", lambda text: text in tuple("1234") or parse_yes_no(text), "N",
                      "print what is sent")
    resolve_http = flag("RESOLVE_IP_HTTP", "the same as RESOLVE_IP_HTTPS")
    resolve_https = flag("RESOLVE_IP_HTTPS", "let a web page tell our address")
    resolve_http_only = flag("RESOLVE_HTTP_ONLY", "ask that page without encryption")
    wget = optional("WGET_CMD", parse_text, "program to ask that page with")
    no_save_args = flag("NO_SAVE_ARGS", "do not write ~/.fwknop.run for -l")
    sequence = optional("KNOCK_SEQUENCE", parse_sequence,
                        "ports to knock on before the packet, or without keys instead")
    delay = setting("KNOCK_DELAY", parse_delay, "50",
                    "milliseconds after each port, or a range to draw from: 100-300")
    one_connection = flag("ONE_CONNECTION", "the server's stanza has ONE_CONNECTION Y: do not try "
                          "the port, which would use it up")
    ospa_file = optional("OSPA_FILE", parse_text, "knock by OpenSPA, with this OSPA file")

    test = flag("test", "print the packet, do not send it")
    quiet = flag("quiet", "print nothing but errors")
    answer = optional("answer", number_parser(1, 3600, SECONDS),
                      "print the server's answer, or fail after 3 seconds or so many")
    diagnose = flag("check", "knock once, and say what is wrong with it and what is right")
    wait = optional("wait", number_parser(1, 86400, SECONDS),
                    "knock until the TCP port answers, at most this long")
    wait_port = optional("wait_port", parse_port, "the TCP port to try (the first one of -A)")
    relay = flag("relay", "HOST PORT: wait, then relay stdin and stdout")
    execute = flag("exec", "COMMAND ...: wait, then become this command")
    family = setting("family", parse_text, "0", "IP version to the server")
    stdin = flag("stdin", "read missing keys from standard input")
    fd = optional("fd", number_parser(0, 1 << 20, "a file descriptor"),
                  "read missing keys from this file descriptor")
    key_gen = flag("key_gen", "print new keys")
    key_gen_file = optional("key_gen_file", parse_text, "write new keys to this new file")
    key_length = setting("key_length", number_parser(1, KEY_LIMIT, "a number of bytes"), "32",
                         "bytes of a new encryption key")
    hmac_key_length = optional("hmac_key_length", number_parser(
        1, HMAC_KEY_LIMIT, "a number of bytes"), "bytes of a new HMAC key")
    command = optional("command", parse_printable, "a command to run on the server instead of -A")
    http_proxy = optional("http_proxy", parse_proxy, "HTTP proxy; as -P http")
    icmp_type = setting("icmp_type", number_parser(0, 40, "a type of ICMP"), "0", "for -P icmp")
    icmp_code = setting("icmp_code", number_parser(0, 15, "a code of ICMP"), "0", "for -P icmp")
    save_packet = optional("save_packet", parse_text, "also write the packet to this file")
    save_append = flag("save_append", "append the packet to the file of -B")
    save_stanza = flag("save_stanza", "save the options in the rc file")
    force_stanza = flag("force_stanza", "overwrite keys there without asking")
    save_args_file = optional("save_args_file", parse_text, "file for -l instead of ~/.fwknop.run")
    fault_tag = optional("fault_tag", parse_text, "ignored (for tests of fwknop itself)")

    def __init__(self, given: "Dict[str, Given]", label: str = "") -> None:
        self.given, self.ospa = given, None  # type: Dict[str, Given], Optional[Dict[str, Any]]
        self.label = label  # begins the lines about this one of several servers
        for attribute, row in DIRECTIVES.items():
            setattr(self, attribute, row.value(given.get(row.name)))
        recipient = given.get("GPG_RECIPIENT")
        if self.use_gpg or (recipient is not None and not recipient.line):
            self.mode = GPG  # the option --gpg-recipient-key is enough
        if self.http_proxy and "SPA_SERVER_PROTO" not in given:
            self.protocol = "http"
        if self.allow_ip is None and (self.resolve_http or self.resolve_https):
            self.allow_ip = RESOLVE
        raw = self.protocol in RAW_CARRIERS
        self.ip_version = {"4": socket.AF_INET, "6": socket.AF_INET6}.get(
            self.family, socket.AF_INET if raw or self.resolve_ipv4 else 0)
        self.verbose = self.verbose and not (self.quiet or self.relay)
        # Without a key, or another sign of a packet, KNOCK_SEQUENCE takes the packet's place.
        self.only_knocks = self.sequence is not None and not (
            self.mode == GPG or self.stdin or self.fd is not None
            or not given.keys().isdisjoint(PACKET_NAMES))

    def unanswered(self) -> str:
        """Return what no answer comes to, "" if one may come (tests/spec/answer.md)."""
        keyed = self.given.keys() & {*KEY_SOURCES[1], "USE_HMAC", "HMAC_DIGEST_TYPE"}
        return next((what for wrong, what in (
            (self.test, "-T, which sends nothing"),
            (self.only_knocks, "port knocks"),
            (self.protocol != "udp", f"packets over {self.protocol}"),
            (self.rand_port, "packets to random ports"),
            (not self.ospa_file and (self.mode == GPG or not keyed),
             "packets without KEY and HMAC_KEY")) if wrong), "")

    def check(self, hint: "Callable[[], str]") -> None:
        """Raise UsageError for values that do not go together; texts of fwknop begin upper-case."""
        raw = self.protocol in RAW_CARRIERS
        nat = self.nat_access or self.nat_local or self.nat_port or self.nat_rand_port
        for wrong, message in (
                (self.access is None and self.command is None and not self.only_knocks,
                 "no ports to open given (-A tcp/22, or -n and a stanza; --help says more)"),
                (self.server is None and not self.test,
                 "Must use --destination unless --test mode is used"),
                (self.http_proxy and self.protocol != "http",
                 "Cannot set --http-proxy with a non-HTTP protocol."),
                (self.http_proxy and self.server is None, "--http-proxy needs -D"),
                (self.spoof_source and not raw,
                 "Must set -P <udpraw|tcpraw|icmp> with a spoofed source IP"),
                (raw and self.family == "6", "the raw carriers know only IPv4"),
                (self.mode == GPG and self.gpg_recipient is None,
                 "Must specify --gpg-recipient-key when GPG is used."),
                (self.command is not None and nat, "a server command knows no NAT"),
                (self.nat_local and not self.nat_access and self.server is None,
                 "--nat-local needs -D or -N"),
                ((self.nat_port or self.nat_rand_port) and "," in (self.access or ""),
                 "NAT for multiple ports/protocols not yet supported."),
                (self.ospa_file and (nat or self.command is not None or self.protocol != "udp"
                                     or self.save_packet or self.timeout or self.rand_port),
                 "OpenSPA knows no -B, -C, -f, -r, NAT, or carrier other than udp"),
                ("-" in (self.access or "") and not self.ospa_file,
                 "-A: expected single ports; only --ospa knows ranges"),
                (self.diagnose and (self.test or self.relay or self.execute or self.save_stanza),
                 "--check knocks by itself: no -T, --proxy, --exec, --save-rc-stanza"),
                (self.answer is not None and self.unanswered(),
                 f"--answer: none comes to {self.unanswered()}"),
                (self.save_append and self.save_packet is None, "-b needs -B")):
            if wrong:
                named = self.given.get("named_config")
                raise UsageError(f"[{named.text}] {message}" if named else message, hint())
        if self.source_port and not raw:
            warn("the source port is ignored: only raw carriers have one (-P udpraw)")
        if self.verbose and self.allow_ip == SOURCE_ADDRESS and not self.test:
            note("[-] WARNING: Should use -a or -R to harden SPA against potential MITM attacks")


# --- shared: hints -- the same text in spa_server.py and spa_client.py --

NAME_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"


def find_mistake(line: str, knows: "Callable[[str], object]") -> "Tuple[str, str]":
    """Return the directive that a line was meant to set, and what is wrong; "" if it is unclear.

    Of the rest of the line it shows `>`, `=` and `:` at most: the rest may be a part of a key.
    """
    plain = "".join(each if each.upper() in NAME_CHARACTERS else " " for each in line)
    name = (plain.split() or ["?"])[0]
    before, _, after = line.partition(name)
    odd = before.strip(" \t") or after[:1].strip(" \t;#")
    if not odd or not knows(name.upper()):
        return "", ""
    shown = f"'{odd}'" if not odd.strip(">=: ") else (
        "a no-break space or the like" if odd > "~" else "another character")
    where = "nothing before" if before.strip(" \t") else "a blank after"
    return name.upper(), f"expected {where} it, not {shown}"


SLIPS = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0))  # so many letters of one name for others


def near_name(name: str, names: "Iterable[str]") -> str:
    """Return which of `names` this one was meant to be, with one slip in it; "" for none."""
    name = name.upper().replace("-", "_")
    for known in names:
        swapped = sorted(name) == sorted(known)
        for at in range(len(name) + 1 if abs(len(name) - len(known)) < 3 else 0):
            if name[:at] == known[:at] and (
                    (swapped and name[at + 2:] == known[at + 2:])
                    or any(name[at + one:] == known[at + other:] for one, other in SLIPS)):
                return known
    return ""


def doubt_key(name: str, text: str) -> str:
    """Return what is odd about the value of a key's directive, without it; "" if nothing is."""
    digits, whole = text.rstrip("="), len(text) % 4 == 0
    if name.endswith("_BASE64"):
        cut = len(digits) % 4 == 1 or (digits != text and not whole)
        return f"{len(text)} characters, is one missing?" if cut else ""
    encoded = digits.replace("+", "").replace("/", "").isalnum() and digits != text and whole
    return f"that looks like {name}_BASE64" if encoded and len(text) > 20 else ""


# --- end shared: hints --


DIRECTIVES = {attribute: row for attribute, row in vars(Settings).items()
              if isinstance(row, Directive)}
ROWS = {row.name: row for row in DIRECTIVES.values()}
DIRECTIVE_NAMES = [name for name in ROWS if name.isupper()]

# The first of these that a layer has counts, and hides all of them in lower layers (fwknop.md 2.5).
KEY_SOURCES = (("KEY", "KEY_BASE64", "KEY_FILE"), ("HMAC_KEY", "HMAC_KEY_BASE64", "HMAC_KEY_FILE"),
               ("GPG_SIGNING_PW", "GPG_SIGNING_PW_BASE64"))
RUNS = ("GPG_EXE", "GPG_HOMEDIR", "WGET_CMD")  # they name a program, or where gpg.conf names one
SERVER_NAMES = ("SOURCE", "OPEN_PORTS", "FW_ACCESS_TIMEOUT", "REQUIRE_SOURCE_ADDRESS")
SECRET_NAMES = {name for name, row in ROWS.items() if row.parse in SECRET}
PACKET_NAMES = sum(KEY_SOURCES, ("USE_HMAC", "ALLOW_IP", "OSPA_FILE"))  # only packets need them


def merge(layers: "List[Dict[str, Given]]") -> "Dict[str, Given]":
    """Merge layers of values into one; later layers override earlier ones (fwknop.md 2.1)."""
    merged = {}  # type: Dict[str, Given]
    for layer in layers:
        for sources in KEY_SOURCES:
            if not layer.keys().isdisjoint(sources):
                for name in sources:
                    merged.pop(name, None)
        merged.update(layer)
    return merged


# ======================================================================================
# 9. Options
#
# One row per option; the parser, --help, --man and --completion come from the table. The
# conventions are those of getopt_long: options and operands in any order, `--name value`,
# `--name=value`, unique beginnings of names, `-pVALUE`, `-Tv`, and `--` to end the options.
# ======================================================================================

# Short name, long name, argument, the directive that the option sets, help. The value is the text
# after `=`, and the argument after it. An option without a help has that of its directive.
OPTION_TABLE = """
A  access               PORTS     ACCESS
a  allow-ip             ADDRESS   ALLOW_IP
s  source-ip            -         ALLOW_IP=source       open for the packet's source; -a is safer
D  destination          HOST      SPA_SERVER
p  server-port          PORT      SPA_SERVER_PORT
P  server-proto         CARRIER   SPA_SERVER_PROTO
4  -                    -         family=4              use IPv4 to the server
6  -                    -         family=6              use IPv6 to the server
-  server-resolve-ipv4  -         SERVER_RESOLVE_IPV4=Y as -4
f  fw-timeout           SECONDS   FW_TIMEOUT
n  named-config         NAME      named_config          use this stanza too; a,b: at both servers
-  rc-file              FILE      rc_file               read this file instead of ~/.fwknoprc
-  no-rc-file           -         no_rc_file=Y          read no rc file
-  no-home-dir          -         no_home_dir=Y         do not look for a home directory
-  stanza-list          -         stanza_list=Y         list the stanzas of the rc file
-  import               -         import=Y              add pasted stanzas (stdin) to the rc file
G  get-key              FILE      KEY_FILE
-  get-hmac-key         FILE      HMAC_KEY_FILE
-  stdin                -         stdin=Y
-  fd                   NUMBER    fd
-  key-rijndael         KEY       KEY                   encryption key (others can see it in `ps`)
-  key-base64-rijndael  BASE64    KEY_BASE64
-  key-hmac             KEY       HMAC_KEY              HMAC key (others can see it in `ps`)
-  key-base64-hmac      BASE64    HMAC_KEY_BASE64
-  hmac-key-base64      BASE64    HMAC_KEY_BASE64       as --key-base64-hmac
-  use-hmac             -         USE_HMAC=Y
-  hmac-digest-type     NAME      HMAC_DIGEST_TYPE
m  digest-type          NAME      DIGEST_TYPE
M  encryption-mode      NAME      ENCRYPTION_MODE
U  spoof-user           NAME      SPOOF_USER
-  time-offset-plus     TIME      TIME_OFFSET=+         add this to the time in the packet
-  time-offset-minus    TIME      TIME_OFFSET=-         subtract this from the time
k  key-gen              -         key_gen=Y
K  key-gen-file         FILE      key_gen_file
-  key-len              BYTES     key_length
-  hmac-key-len         BYTES     hmac_key_length
T  test                 -         test=Y
q  quiet                -         quiet=Y
-  knock                -         knock=Y               as the first option: be `knock` (--knock -h)
-  knock-sequence       PORTS     KNOCK_SEQUENCE
-  knock-delay          MS        KNOCK_DELAY
-  answer               [SECONDS] answer=3
-  check                -         check=Y
-  wait                 SECONDS   wait
-  wait-port            PORT      wait_port
-  proxy                -         relay=Y
-  exec                 -         exec=Y
-  print-ssh-config     NAME      print_ssh_config      print what makes `ssh NAME` knock by itself
-  one-connection       -         ONE_CONNECTION=Y      do not try the port: that would use it up
-  ospa                 FILE      OSPA_FILE
-  resolve-stun         HOST      ALLOW_IP=stun:        find our address with this STUN server
v  verbose              -         VERBOSE=Y
V  version              -         version=Y             print version and SHA-256 of this file
h  help                 -         help=Y                print this
-  man                  -         man=Y                 print this as a manual page
-  completion           SHELL     completion            print completions for bash, zsh or fish
-  print-launcher       -         print_launcher=Y      print what starts the compiled form
S  source-port          PORT      SPA_SOURCE_PORT
Q  spoof-source         ADDRESS   SPOOF_SOURCE_IP
-  spoof-src            ADDRESS   SPOOF_SOURCE_IP       as -Q
r  rand-port            -         RAND_PORT=Y
H  http-proxy           HOST:PORT http_proxy
-  icmp-type            NUMBER    icmp_type
-  icmp-code            NUMBER    icmp_code
R  resolve-ip-https     -         ALLOW_IP=resolve      let a web page tell our address
-  resolve-ip-http      -         ALLOW_IP=resolve      as -R
-  resolve-http-only    -         RESOLVE_HTTP_ONLY=Y   as -R, without encryption
-  resolve-url          URL       RESOLVE_URL
w  wget-cmd             PATH      WGET_CMD
u  user-agent           NAME      HTTP_USER_AGENT
-  use-wget-user-agent  -         USE_WGET_USER_AGENT=Y
N  nat-access           HOST:PORT NAT_ACCESS
-  nat-local            -         NAT_LOCAL=Y
-  nat-port             PORT      NAT_PORT
-  nat-rand-port        -         NAT_RAND_PORT=Y
C  server-cmd           COMMAND   command
g  gpg-encryption       -         USE_GPG=Y
-  gpg-recipient-key    KEY       GPG_RECIPIENT         the server's GPG key; as -g
-  gpg-signer-key       KEY       GPG_SIGNER
-  gpg-home-dir         DIRECTORY GPG_HOMEDIR
-  gpg-exe              PATH      GPG_EXE
-  gpg-agent            -         USE_GPG_AGENT=Y
-  gpg-no-signing-pw    -         GPG_NO_SIGNING_PW=Y
B  save-packet          FILE      save_packet
b  save-packet-append   -         save_append=Y
-  save-rc-stanza       -         save_stanza=Y
-  force-stanza         -         force_stanza=Y
l  last-cmd             -         last_command=Y        use the options of the last knock as well
-  show-last            -         show_last=Y           print these options; no key is among them
E  save-args-file       FILE      save_args_file
-  no-save-args         -         NO_SAVE_ARGS=Y
-  fault-injection-tag  TAG       fault_tag
"""


# --- shared: options -- the same text in spa_server.py and spa_client.py --


class Option:
    """A row of an option table: letter, long name, argument, what it sets, help; "-" is nothing.

    An argument in brackets may be left out; then the option has the value after `=`.
    """

    def __init__(self, row: str) -> None:
        short, long, argument, sets, self.help = (row.split(None, 4) + [""])[:5]
        self.short, self.long = short.strip("-"), long.strip("-")
        self.argument = argument.strip("-")
        self.name, _, self.text = sets.partition("=")
        self.default, self.text = (self.text, "") if argument[0] == "[" else ("", self.text)
        self.meaning = self.argument, sets

    def format(self, help: str) -> str:
        """Return the option's line of --help."""
        names = [f"-{self.short}"] if self.short else []
        names += [f"--{self.long}"] if self.long else []
        indent = "" if self.short else "    "
        left = f"{indent}{', '.join(names)} {self.argument}"
        return f"  {left:<35} {help}"


def roff(text: str) -> str:
    """Return a text for a manual page (man(7))."""
    text = text.strip("\n").replace("\\", "\\e").replace("-", "\\-")
    return ("\n" + text).replace("\n.", "\n\\&.").replace("\n'", "\n\\&'")[1:]


def roff_section(title: str, rows: "Iterable[Tuple[str, str]]") -> "List[str]":
    """Return the lines of a section of a manual page that explains names."""
    lines = [".SH " + roff(title)]
    for name, text in rows:
        lines += [".TP", ".B " + roff(name), roff(text)]
    return lines


def find_option(options: "List[Option]", name: str) -> Option:
    """Return the option of a letter, a long name, or the beginning of just one long name."""
    if not name.startswith("--"):
        for option in options:
            if option.short == name[1]:
                return option
        raise UsageError(f"invalid option -- '{name[1]}'", "--help lists them")
    found = [option for option in options if name[2:] and option.long.startswith(name[2:])]
    for option in found:
        if option.long == name[2:] or all(other.meaning == option.meaning for other in found):
            return option
    if not found:
        raise UsageError(f"unrecognized option '{name}'", "--help lists them")
    names = " ".join("--" + option.long for option in found)
    raise UsageError(f"option '{name}' is ambiguous: {names}")


def parse_options(options: "List[Option]",
                  arguments: "List[str]") -> "Tuple[List[Tuple[Option, str, str]], List[str]]":
    """Return the options in `arguments`, each with its name and value, and the other arguments.

    As getopt_long does: options may follow other arguments, `--name value` or `--name=value`, long
    names may be shortened, `-pVALUE`, `-Tv`, and `--` ends the options. What begins with `-` is no
    argument of an option that can do without. No error shows a value.
    """
    given, others = [], []  # type: Tuple[List[Tuple[Option, str, str]], List[str]]
    waiting = arguments[::-1]

    def add(option: Option, name: str, value: "Optional[str]") -> None:
        """Add an option; without a `value` its argument is the next one."""
        if not option.argument and value is not None:
            raise UsageError(f"option '{name}' doesn't allow an argument")
        if option.argument and value is None:
            if waiting and not (option.default and waiting[-1].startswith("-")):
                value = waiting.pop()
            elif not option.default:
                raise UsageError(f"option '{name}' requires an argument")
        given.append((option, name, option.text + (option.default if value is None else value)))

    while waiting:
        argument = waiting.pop()
        if argument == "--":
            return given, others + waiting[::-1]
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            option = find_option(options, name)
            add(option, "--" + option.long, value if equals else None)
        elif argument.startswith("-") and argument != "-":
            letters = argument[1:]
            while letters:
                name, letters = "-" + letters[0], letters[1:]
                option = find_option(options, name)
                value, letters = (letters, "") if option.argument else ("", letters)
                add(option, name, value or None)
        else:
            text = os.fsencode(argument).decode("utf-8", "replace").partition("=")[0]
            name = text.lstrip("-\u2010\u2011\u2012\u2013\u2014\u2015\u2212")
            if text[:1] > "~" and name and any(name in (each.short, each.long) for each in options):
                raise UsageError(f"'{text}': is that dash a hyphen?")
            others.append(argument)
    return given, others


# --- end shared: options --


OPTIONS = [Option(row) for row in OPTION_TABLE.strip().split("\n")]

# The same for --knock: the options of `knock`, and ours. Host and ports follow them.
KNOCK_OPTION_TABLE = """
u  udp                  -         udp=Y                 UDP for ports without :tcp, :udp or :icmp
d  delay                MS        KNOCK_DELAY
4  ipv4                 -         family=4              use IPv4 to the server
6  ipv6                 -         family=6              use IPv6 to the server
v  verbose              -         VERBOSE=Y             print each knock
T  test                 -         test=Y                print the knocks, do not send them
q  quiet                -         quiet=Y
-  wait                 SECONDS   wait
-  wait-port            PORT      wait_port             the TCP port: --wait and --exec need it
-  exec                 -         exec=Y
-  knock                -         knock=Y               as a link named knock to this file
V  version              -         version=Y             print version and SHA-256 of this file
h  help                 -         help=Y                print this
"""
KNOCK_OPTIONS = [Option(row) for row in KNOCK_OPTION_TABLE.strip().split("\n")]
USAGE = "-A PORTS [-s | -a ADDRESS] -D HOST [options]"
KNOCK_USAGE = "--knock [options] HOST PORT[:tcp|:udp|:icmp] ..."

# Options that are not kept for -l: keys, and those that matter for one run only.
NOT_KEPT = SECRET_NAMES | {"last_command", "show_last", "quiet", "relay", "exec", "check"}

# One line for each program that a user may knock from; [gate] is a stanza with some server.
EXAMPLES = r"""
Knock from            with
  a shell             spa_client.py -n gate --wait 10 && ssh gate
                      spa_client.py -n gate --exec ssh gate
  ~/.ssh/config       ProxyCommand spa_client.py -q -n gate --proxy %h %p
  crontab             */5 * * * * spa_client.py -q -n gate
  systemd             systemd-run --user '--on-calendar=*:0/5' spa_client.py -q -n gate
  Windows             schtasks /create /sc minute /mo 5 /tn knock /tr "py spa_client.py -qn gate"
"""


def parse_command_line(arguments: "List[str]", options: "List[Option]" = OPTIONS,
                       ) -> "Tuple[Dict[str, Given], List[str], List[str]]":
    """Return the values of the options, the operands, and the command after --exec."""
    end = arguments.index("--exec") if "--exec" in arguments else len(arguments)
    found, operands = parse_options(options, arguments[:end + 1])
    given = {}  # type: Dict[str, Given]
    for option, name, text in found:
        if option.name == "VERBOSE" and "VERBOSE" in given:  # -v -v: as fwknop saves it
            text = str(min(4, 1 + int(given["VERBOSE"].text.replace("Y", "1"))))
        if option.text not in (RESOLVE, STUN) or option.name not in given:  # -a and -s go before -R
            typed = (name, text[len(option.text):]) if option.argument else (name,)
            given[option.name] = Given(text, name, 0, typed)
    return given, operands, arguments[end + 1:]


def parse_knock_line(arguments: "List[str]") -> "Tuple[Dict[str, Given], List[str], List[str]]":
    """Return the same for a command line of `knock`: its operands are directives (knockd.md 1.8).

    Unlike there, :tcp stays TCP under -u. --knock reads and writes no file.
    """
    given, operands, command = parse_command_line(arguments, KNOCK_OPTIONS)
    if "help" in given or "version" in given:
        return given, [], command
    if len(operands) < 2:
        raise UsageError("expected a host and ports", "--help says more")
    if "wait_port" not in given and ("wait" in given or command):
        raise UsageError(f"expected --wait-port with --{'wait' if 'wait' in given else 'exec'}")
    host, ports = operands[0], ",".join(operands[1:]).split(",")
    if "udp" in given:
        ports = [port if ":" in port else port + ":udp" for port in ports]
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    given.setdefault("KNOCK_DELAY", Given("0"))
    given.update(no_rc_file=Given("Y"), NO_SAVE_ARGS=Given("Y"), SPA_SERVER=Given(host, "HOST"),
                 KNOCK_SEQUENCE=Given(",".join(ports), "PORT"))
    return given, [], command


def format_arguments(given: "Dict[str, Given]") -> str:
    """Return the command line of these options for -l, without keys; a blank is `\\ ` there.

    fwknop reads and writes the same as long as no argument has blanks (tests/spec/fwknop.md 2.7).
    """
    arguments = ["fwknop"]
    for name, each in given.items():
        arguments += () if name in NOT_KEPT else each.arguments
    return " ".join(each.replace("\\", "\\\\").replace(" ", "\\ ") for each in arguments)


def split_arguments(line: str) -> "List[str]":
    """Return the arguments that format_arguments() or fwknop wrote, without the program's name."""
    arguments = line.strip().replace("\\\\", "\0").replace("\\ ", "\1").split(" ")
    return [each.replace("\1", " ").replace("\0", "\\") for each in arguments[1:] if each]


def help_text(option: Option) -> str:
    """Return the help of an option, or else that of its directive."""
    return option.help or ROWS[option.name].help


def format_help(as_knock: bool) -> str:
    """Return the text of --help."""
    usages = [KNOCK_USAGE] if as_knock else [USAGE, KNOCK_USAGE]
    lines = ["Usage: spa_client.py " + usage for usage in usages] + [""]
    lines += [option.format(help_text(option))
              for option in (KNOCK_OPTIONS if as_knock else OPTIONS)]
    return "\n".join(lines if as_knock else [*lines, EXAMPLES.rstrip()])


def format_man() -> str:
    """Return the manual page in roff (man(7)), made of the docstring and the options."""
    about = (__doc__ or "\n\n").split("\n\n")
    lines = [f'.TH SPA_CLIENT 1 "" "spa_client.py {VERSION}"', ".SH NAME",
             roff(about[0].replace(":", " -", 1)), ".SH SYNOPSIS", ".B spa_client.py",
             roff(USAGE), ".br", ".B spa_client.py", roff(KNOCK_USAGE), ".SH DESCRIPTION",
             roff(about[1]), ".PP", roff(about[2])]
    for title, options in (("OPTIONS", OPTIONS), ("OPTIONS OF --knock", KNOCK_OPTIONS)):
        lines += roff_section(title, ((option.format("").strip(), help_text(option))
                                      for option in options))
    return "\n".join(lines + [".SH EXAMPLES", ".nf", roff(EXAMPLES), ".fi", ".SH EXIT STATUS",
                              roff(about[-1].partition(": ")[2])])


# The names of stanzas are read line by line, because `compgen -W` would run commands in them. They
# are quoted, because the shell would run commands on the completed line as well.
BASH_COMPLETION = r"""_spa_client() {
    local name quoted
    if [[ $3 == -n || $3 == --named-config ]]; then
        while read -r _ name; do
            printf -v quoted %%q "$name"
            [[ $name == "$2"* || $quoted == "$2"* ]] && COMPREPLY+=("$quoted")
        done < <("$1" --stanza-list 2>/dev/null | grep '^ - ')
    elif [[ $2 == -* ]]; then
        COMPREPLY=($(compgen -W "%s" -- "$2"))
    fi
}
complete -o default -F _spa_client spa_client.py"""


def format_completion(shell: str) -> str:
    """Return the completions for `bash`, `zsh` (which can read those of bash) or `fish`."""
    if shell in ("bash", "zsh"):
        names = ["-" + option.short for option in OPTIONS if option.short]
        names += ["--" + option.long for option in OPTIONS if option.long]
        begin = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
        return begin + BASH_COMPLETION % " ".join(names)
    if shell != "fish":
        raise UsageError(f"--completion: expected bash, zsh or fish, not '{shell}'")
    lines = ["-s n -l named-config -x -a"
             " \"(spa_client.py --stanza-list 2>/dev/null | string replace -fr '^ - ' '')\""]
    for option in OPTIONS:
        parts = ["-s " + option.short if option.short else "",
                 "-l " + option.long if option.long else "",
                 "-r" if option.argument and not option.default else "",
                 "-d '" + help_text(option).replace("'", "\\'") + "'"]
        lines.append(" ".join(part for part in parts if part))
    return "\n".join("complete -c spa_client.py " + line for line in lines)


# ======================================================================================
# 10. The rc file
#
# The text of ~/.fwknoprc, cut into stanzas, names and values exactly as fwknop cuts it
# (tests/spec/fwknop.md 2.2), so that one file means the same to both programs.
# ======================================================================================

DEFAULT_STANZA = "default"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_"  # names that errors may show; others may be half a key
HEADER = "[]"
NO_DIRECTIVE = "expected the name of a directive"


def scan(text: str) -> "Iterator[Tuple[int, str, str, str]]":
    """Yield of each line of an rc file its number, the line, its stanza, and its content.

    The content is "" for a comment, and HEADER for a stanza's name; before that the stanza is "".
    """
    stanza = ""
    for number, line in enumerate(text.split("\n"), 1):
        content = line.strip(" \t\r")
        if content.startswith("[") and "]" in content:
            stanza, content = content[1:content.index("]")], HEADER
        yield number, line, stanza, "" if content[:1] in ("#", ";") else content


def parse_line(line: str) -> "Tuple[str, str, bool]":
    """Parse `NAME value` or `NAME: value`, and return whether the value may have lost its end.

    The value ends at the first blank, tab, `;` or `#`, even in the middle of a passphrase. Only
    KNOCK_SEQUENCE, which fwknop does not have, goes on up to a blank and `#`: it may have blanks
    after its commas. So may ACCESS and NAT_ACCESS.
    """
    name, _, value = line.replace("\t", " ").partition(" ")
    name, value = name[:-1] if name.endswith(":") else name, value.lstrip(" ")
    if name == "KNOCK_SEQUENCE":
        return name, value.partition(" #")[0].rstrip(" "), False
    if name in ("ACCESS", "NAT_ACCESS"):
        value = ",".join(each.strip(" ") for each in value.split(","))
    first = value.replace(";", " ").replace("#", " ").partition(" ")[0]
    rest = value[len(first):]
    suspicious = rest[:1] in (";", "#") or rest.lstrip(" ")[:1] not in ("", ";", "#")
    return name, first, suspicious


def explain_line(content: str) -> str:
    """Return what is wrong with a line that is no directive of a stanza; show no part of a key."""
    name, mistake = find_mistake(content, DIRECTIVE_NAMES.__contains__)
    first = name or parse_line(content)[0]
    shown = f"{first}: " if first.upper() in DIRECTIVE_NAMES or not first.strip(LETTERS) else ""
    return shown + (mistake or (
        "expected a line [NAME] first" if first in DIRECTIVE_NAMES else
        "this belongs in access.conf on the server" if first in SERVER_NAMES else
        "expected nothing before [NAME]" if content[0] in ">\xa0" and "[" in content else
        NO_DIRECTIVE))


def parse_stanza(text: str, path: str, wanted: str) -> "Optional[Dict[str, Given]]":
    """Return the directives of the stanza `wanted`, in any case; None if there is no such stanza.

    Raise ConfigError for a line that is no directive. Only warn of a name that nobody knows, unless
    it is a slip; and of a key that may have lost its end, but show no part of the key.
    """
    given = None  # type: Optional[Dict[str, Given]]
    for number, _, stanza, content in scan(text):
        if stanza.lower() != wanted.lower():
            continue
        given = {} if given is None else given
        if content in ("", HEADER):
            continue
        name, value, suspicious = parse_line(content)
        if name not in DIRECTIVE_NAMES:
            problem = explain_line(content)
            if problem != f"{name}: {NO_DIRECTIVE}" or near_name(name, DIRECTIVE_NAMES):
                raise ConfigError(f"{path}:{number}: {problem}")
            warn(f"{path}:{number}: {name} is ignored: this client has no such directive")
            continue
        if value in ("", "=", ":", "\xa0"):  # a no-break space
            why = f"expected a value, not '{value}'" if value else "expected a value"
            raise ConfigError(f"{path}:{number}: {name}: {why}")
        if suspicious and name in SECRET_NAMES:
            warn(f"{path}:{number}: {name}: it ends at the first blank, ';' or '#', as in fwknop,"
                 " and something follows: give keys with these characters as base64")
        given[name] = Given(value, path, number)
    return given


def stanza_names(text: str) -> "List[str]":
    """Return the names of the stanzas in an rc file, without [default]."""
    return [name for _, _, name, content in scan(text)
            if content == HEADER and name.lower() != DEFAULT_STANZA]


def add_pasted(text: str, pasted: str) -> "Tuple[str, List[str]]":
    """Return the text of an rc file with all stanzas of another text, and the options to use them.

    Raise ConfigError for anything but new stanzas and comments, and for a directive of RUNS: a user
    may trust the sender with a door, but not with his host.
    """
    used = []
    for number, line, name, content in scan(pasted):
        where, header = f"standard input:{number}", line.strip(" \t\r")[1:-1].upper()
        if content and not name:
            raise ConfigError(f"{where}: {explain_line(content)}", "a stanza begins with [NAME]")
        if content != HEADER:
            continue
        if header == "DEFAULT" or header[0] in "-." or header.strip(NAME_CHARACTERS + ".-@"):
            raise ConfigError(f"{where}: expected [NAME] alone, of letters, digits and . _ - @")
        given = parse_stanza(pasted, "standard input", name) or {}
        Settings(given)  # which checks the values
        if not given or not given.keys().isdisjoint(RUNS):
            raise ConfigError(f"{where}: expected directives, but not " + " ".join(RUNS))
        if header in map(str.upper, stanza_names(text)):
            raise ConfigError(f"{where}: [{name}] is there already",
                              "nothing was changed: rename it, or delete the old one")
        values = {each: value.text for each, value in given.items()}
        text = edit_stanza(text, name, values, set())
        used.append(f"-n {name}" + (" --wait 10" if "tcp/" in values.get("ACCESS", "") else ""))
    if not used:
        raise ConfigError("standard input: expected a stanza, which begins with [NAME]")
    return text, used


def stanza_values(given: "Dict[str, Given]") -> "Dict[str, str]":
    """Return the values of these options for an rc file, in fwknop's order (fwknop.md 2.3)."""
    if not given.keys().isdisjoint(("HMAC_DIGEST_TYPE", "HMAC_KEY", "HMAC_KEY_BASE64")):
        given = dict(given, USE_HMAC=Given("Y"))
    if "GPG_RECIPIENT" in given:  # in a file it does not suffice
        given = dict(given, USE_GPG=Given("Y"))
    values = {}
    for name in DIRECTIVE_NAMES:
        if name in given:
            value, text = ROWS[name].value(given[name]), given[name].text
            if type(value) in (int, str):
                text = str(value)
            if parse_line(f"{name} {text}")[1] != text or set("\r\n") & set(text):
                raise UsageError(f"{given[name].where}: an rc file can't hold values with blanks,"
                                 " ';' or '#'", "give keys as base64")
            values[name] = text
    return values


def edit_stanza(text: str, stanza: str, values: "Dict[str, str]", dropped: "Set[str]") -> str:
    """Return the text of an rc file with these values in a stanza, and other lines as they are.

    A new value replaces the old one, or follows the last line of the stanza. A missing stanza is
    added at the end. Lines of the directives in `dropped` are left out.
    """
    lines, end, waiting = [], 0, dict(values)  # type: List[str], int, Dict[str, str]
    for _, line, inside, content in scan(text.rstrip("\n")):
        name = parse_line(content)[0] if inside.lower() == stanza.lower() else ""
        if name in dropped:
            continue
        if name in values:
            bare = content.replace("\t", " ").replace(" ;", " #").partition(" #")[0].rstrip(" ")
            line = f"{name:<24}    {values[name]}{content[len(bare):]}"  # with its comment
            waiting.pop(name, None)
        lines.append(line)
        if name:  # or HEADER, for the line with the stanza's name
            end = len(lines)
    if not end:
        lines += ["", f"[{stanza}]"] if text.strip() else [f"[{stanza}]"]
        end = len(lines)
    lines[end:end] = [f"{name:<24}    {value}" for name, value in waiting.items()]
    return "\n".join(lines).lstrip("\n") + "\n"


# ======================================================================================
# 11. Files and keys
#
# Read rc and key files, ask for keys, make new ones; write what is kept. From here on the code
# touches the machine.
# ======================================================================================


class Notes:
    """The state of the output: its level, why say() failed, what --check found; see run()."""

    wanted = True
    unsaid = ""
    found = None  # type: Optional[Dict[str, int]]  # ranks of the lines of --check


WRONG, ODD, FACT = range(3)  # ranks: it did not open; worth a look; nothing to do
MARKS = ("[!] ", "[-] ", "[+] ")


def keep(rank: int, line: str) -> bool:
    """Keep a line for --check, and return whether that is wanted."""
    if Notes.found is not None:
        Notes.found[line] = min(rank, Notes.found.get(line, FACT))
    return Notes.found is not None


def warn(message: str) -> None:
    """Print a warning on standard error, unless -q is given; the work goes on."""
    if not keep(ODD, message):
        note("warning: " + message)


def note(message: str) -> None:
    """Print a line on standard error, unless -q is given."""
    if Notes.wanted:
        tell(message)


def tell(message: str) -> None:
    """Print a line on standard error; a failure to do so must not stop a knock."""
    write_to(sys.stderr, f"spa_client.py: {printable(message)}\n")


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


# --- shared: files -- the same text in spa_server.py and spa_client.py --


def open_ours(path: "str", flags: "int", mode: "int" = 0o600) -> "int":
    """Open a file; raise OSError if another user could have led root to this file.

    That user could put a link of his own on the way, or a second name of root's file in his own
    directory. Each part of the path is opened in turn: nobody can put a link there after the check.
    """
    import errno
    import stat
    if not hasattr(os, "O_PATH") or os.geteuid() or path.startswith(("/dev/", "/proc/")):
        return os.open(path, flags, mode)
    names = os.path.join(os.getcwd(), path).split("/")[::-1]  # pop() gives the next
    directory, links = os.open("/", os.O_PATH), 0
    try:
        while True:
            name = names.pop() or "."
            try:
                how = os.O_PATH if names else flags & ~os.O_TRUNC
                found = os.open(name, how | os.O_NOFOLLOW, mode, dir_fd=directory)
            except OSError as error:
                if error.errno != errno.ELOOP or flags & os.O_NOFOLLOW:
                    raise
                found = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
            status = os.fstat(found)
            if stat.S_ISLNK(status.st_mode):
                names += os.readlink("", dir_fd=found).split("/")[::-1]
                os.close(found)
                links += 1
                if status.st_uid or links > 40:  # as many as Linux follows (path_resolution(7))
                    raise OSError(errno.EPERM, "a link of another user's, which is not followed"
                                  if status.st_uid else os.strerror(errno.ELOOP))
                if not names[-1]:  # the link begins with a slash
                    found, directory = directory, os.open("/", os.O_PATH)
                    os.close(found)
            elif names:
                found, directory = directory, found
                os.close(found)
            elif (stat.S_ISREG(status.st_mode) and status.st_nlink > 1
                  and os.fstat(directory).st_uid and flags & (os.O_WRONLY | os.O_RDWR)):
                os.close(found)
                raise OSError(errno.EPERM, "has another name, in a directory of another user's")
            else:
                if flags & os.O_TRUNC:
                    os.ftruncate(found, 0)
                return found
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(directory)


# --- end shared: files --


def printable(text: str) -> str:
    """Return the text with all but printable ASCII escaped, because a stranger may have made it."""
    return "".join(letter if " " <= letter <= "~" else ascii(letter)[1:-1] for letter in text)


OPENED = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # files that our caller has opened


def read_private(path: str, pipe: bool = False) -> str:
    """Return the text of a file with secrets; warn if others can read it (fwknop.md 2.2).

    It may be a pipe only if `pipe` says so, or as a shell's `<(...)`: others could keep us waiting.
    """
    pipe = pipe or path.startswith(OPENED)
    flags = getattr(os, "O_BINARY", 0) | (0 if pipe else getattr(os, "O_NONBLOCK", 0))
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | flags), "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mode >> 12 not in ((0o10, 0o1) if pipe else (0o10,)):  # S_IFREG, S_IFIFO
                raise ConfigError(f"{path}: expected a file")
            if hasattr(os, "geteuid"):
                if status.st_mode & 0o077:
                    warn(f"{path}: permissions should only be user read/write (0600, -rw-------)")
                if status.st_uid != os.geteuid():
                    warn(f"{path}: not owned by current effective user id")
            return decode_text(file.read())
    except (OSError, ValueError) as error:
        raise ConfigError(explain(error, f"{path}: cannot be read")) from None


def home_file(given: "Dict[str, Given]", name: str) -> "Optional[str]":
    """Return the path of a file in the home directory, or None without one (--no-home-dir)."""
    home = os.environ.get("HOME") or os.environ.get("USERPROFILE")
    return os.path.join(home, name) if home and "no_home_dir" not in given else None


def rc_path(given: "Dict[str, Given]") -> "Optional[str]":
    """Return the path of the rc file, which may not exist, or None for --no-rc-file or no home."""
    if "no_rc_file" in given:
        return None
    return given["rc_file"].text if "rc_file" in given else home_file(given, ".fwknoprc")


def hint_at_stanzas(given: "Dict[str, Given]", operands: "List[str]") -> str:
    """Return the stanzas that -n could name, "" if it is given; an operand may be meant as one."""
    path = None if "named_config" in given else rc_path(given)
    names = stanza_names(saved_text(path)) if path else []
    meant = [name for name in names if name in operands]
    return (f"did you mean -n {meant[0]}?" if meant else
            f"-n takes one of: {', '.join(names)}" if names else "")


def read_layers(given: "Dict[str, Given]") -> "List[Dict[str, Given]]":
    """Return the layers of the rc file for this command line: [default], and the stanza of -n."""
    path, named, new = rc_path(given), given.get("named_config"), "save_stanza" in given
    if path is None or ((new or "rc_file" not in given) and not os.path.exists(path)):
        if named is not None and not new:
            raise UsageError("-n needs an rc file, and there is none: " + (
                path or "HOME is not set, or --no-rc-file is given"))
        return []
    try:
        text = read_private(path)
    except ConfigError as error:
        error.hint = "" if os.path.exists(path) else "--save-rc-stanza with -n, -D and -A makes it"
        raise
    for number, _, stanza, content in scan(text):
        if content and not stanza:
            warn(f"{path}:{number}: ignored, since it stands before the first [stanza]: "
                 + explain_line(content))
            break
    layers = [parse_stanza(text, path, DEFAULT_STANZA)]
    if named is not None:
        layers.append(parse_stanza(text, path, named.text))
        if layers[1] is None and not new:
            names = ", ".join(stanza_names(text))
            raise ConfigError(f"{path}: Named configuration stanza: [{named.text}] was not found",
                              f"there are: {names}" if names else "there is none")
    return [layer for layer in layers if layer is not None]


def write_private(path: str, text: str, flags: int) -> None:
    """Write a file; only its owner can read a new one. `flags` tell what happens to an old one."""
    with errors_named(path, "it must be a new file" if flags & os.O_EXCL else ""), os.fdopen(
            open_ours(path, os.O_WRONLY | os.O_CREAT | flags), "wb") as file:
        file.write(encode_text(text))
        if flags & os.O_EXCL:
            file.flush()
            os.fsync(file.fileno())


LOCK_SECONDS = 10.0  # another run holds the lock for milliseconds


def create_alone(path: str) -> int:
    """Open a new file that only its owner can read; wait while the file of another run exists."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            if time.monotonic() > end:
                raise SpaError(f"{path}: another run is writing it",
                               "if there is none, remove it") from None
            time.sleep(0.02)


def choose_values(values: "Dict[str, str]", text: str, stanza: str,
                  force: bool) -> "Tuple[Dict[str, str], Set[str]]":
    """Return the values to write to a stanza of an rc file, and the old directives to drop.

    Ask before a new key replaces an old one, unless `force`. An old key of another kind is dropped,
    because it could hide the new one.
    """
    wanted, dropped = dict(values), set()  # type: Dict[str, str], Set[str]
    old = {parse_line(content)[0] for _, _, name, content in scan(text)
           if name.lower() == stanza.lower()}
    for name in values:
        for sources in KEY_SOURCES + (("GPG_RECIPIENT",), ("GPG_SIGNER",)):
            rivals = sorted(old.intersection(sources) - dropped) if name in sources else []
            if force or all(confirm(f"Variable '{rival}' found in stanza '{stanza}'."
                                    " Overwrite [N/y] ? ") for rival in rivals):
                dropped.update(rivals)
            else:
                wanted.pop(name)
    return wanted, dropped - set(wanted)


def saved_text(path: str) -> str:
    """Return the text of the rc file, "" if there is none; read_layers() has warned of its mode."""
    try:
        with os.fdopen(open_ours(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb") as file:
            return decode_text(file.read())
    except FileNotFoundError:
        return ""


def replace_file(path: str, old: str, text: str) -> bool:
    """Replace a file whose text is `old`, whole or not at all; return False if it has changed.

    Only the owner can read the new file. It is the lock as well: only those who can write in its
    directory can keep us waiting.
    """
    new = path + ".updated"
    descriptor, done = create_alone(new), False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(encode_text(text))
            if os.path.exists(path) and hasattr(os, "fchown"):
                status = os.stat(path)
                os.fchown(descriptor, status.st_uid, status.st_gid)
            file.flush()
            os.fsync(descriptor)
        if saved_text(path) == old:
            os.replace(new, path)
            done = True
        return done
    finally:
        if not done:
            os.unlink(new)


def save_stanza(given: "Dict[str, Given]", force: bool) -> "Tuple[str, Dict[str, str]]":
    """Write options to a stanza of the rc file (fwknop.md 2.3); return its path and the values."""
    named, path = given.get("named_config") or given.get("SPA_SERVER"), rc_path(given)
    if named is None or path is None:
        missing = "an rc file" if named else "-n or -D, for the name of the stanza"
        raise UsageError(f"--save-rc-stanza needs {missing}")
    if not named.text or set("[],\r\n") & set(named.text):
        raise UsageError(f"{named.where}: expected the name of a stanza")
    stanza = named.text

    def edit(text: str) -> "Tuple[str, Dict[str, str]]":
        values, dropped = choose_values(stanza_values(given), text, stanza, force)
        return edit_stanza(text, stanza, values, dropped), values

    return path, change_rc_file(path, edit)


def change_rc_file(path: str, edit: "Callable[[str], Tuple[str, T]]") -> "T":
    """Give the rc file the text that `edit` makes of the old one; return what else it returns."""
    real = os.path.realpath(path)
    with errors_named(real):
        while True:  # begin again if another program changes the file meanwhile
            text = saved_text(path)  # not `real`: root must not follow another user's link
            new, result = edit(text)  # asks its questions before replace_file() locks
            if replace_file(real, text, new):
                return result


def import_stanzas(given: "Dict[str, Given]", operands: "List[str]") -> None:
    """Add the stanzas on standard input to the rc file, all of them or none; say how to knock."""
    path = rc_path(given)
    if path is None:
        raise UsageError("--import needs an rc file, and a home directory or --rc-file for it")
    if operands:
        raise UsageError("--import reads standard input", "--import < FILE")
    if os.isatty(0):
        note("paste the stanza, then press Ctrl-D (on Windows Ctrl-Z and Enter)")
    with open(0, "rb", closefd=False) as stream:
        pasted = decode_text(stream.read())
    used = change_rc_file(path, lambda text: add_pasted(text, pasted))
    rc_file = f"--rc-file {path} " if "rc_file" in given else ""
    say(f"[+] Wrote to {path}. To knock:" + "".join(
        f"\n  spa_client.py {rc_file}{options}" for options in used))


def confirm(question: str) -> bool:
    """Return whether a line of standard input says yes; raise SpaError if there is no line."""
    say(question)
    answer = read_line(0)
    if not answer.endswith(b"\n"):
        raise SpaError("standard input ended without an answer", "--force-stanza does not ask")
    return answer[:1] in (b"y", b"Y")


def save_arguments(given: "Dict[str, Given]", path: "Optional[str]") -> None:
    """Keep the options of a knock for -l, without keys; warn of a failure only with -E."""
    try:
        if path is not None:
            write_private(path, format_arguments(given) + "\n", os.O_TRUNC)
    except SpaError as error:
        if "save_args_file" in given:
            warn("Could not open args file: " + with_hint(error))


def read_key_file(path: str, server: "Optional[str]") -> bytes:
    """Return the key of a server from lines `server: key`; the last one counts (fwknop.md 2.5).

    Blanks, tabs and `=` before the key are skipped; blanks after it belong to it.
    """
    if server is None:
        raise UsageError("a key file needs -D: its lines begin with the server")
    key = None
    for line in read_private(path, True).split("\n"):
        line = line.rstrip("\r").lstrip(" \t")
        if line.startswith(server + ":"):
            key = line[len(server) + 1:].lstrip(" \t=") or key
    if key is None:
        raise ConfigError(f"Could not get key for IP: {server} from: {path}",
                          f"expected a line `{server}: KEY`")
    return encode_text(key)


def read_line(descriptor: int) -> bytes:
    """Return one line of an open file, and read no byte more: the next may be the other key."""
    line = byte = b""
    with errors_named(f"file descriptor {descriptor}"):
        if descriptor > 2:
            os.set_inheritable(descriptor, False)  # the command of --exec must not get it
        while byte != b"\n":
            byte = os.read(descriptor, 1)
            if not byte:
                break
            line += byte
    return line


def prompt_key(prompt: str) -> bytes:
    """Return a line that is typed at the terminal, without echo."""
    try:
        import termios
    except ImportError:
        import getpass  # only Windows comes here: small systems have no getpass, but termios
        return encode_text(getpass.getpass(prompt))
    before = termios.tcgetattr(0)
    silent = before[:]
    silent[3] &= ~termios.ECHO
    os.write(2, prompt.encode("ascii"))
    try:
        termios.tcsetattr(0, termios.TCSAFLUSH, silent)
        return read_line(0).rstrip(b"\r\n")
    finally:
        termios.tcsetattr(0, termios.TCSAFLUSH, before)
        os.write(2, b"\n")


def choose_key(settings: Settings, what: str, options: str, *given: "Any") -> bytes:
    """Return the first key or key file that is given, or the key of --fd, --stdin or a prompt.

    Without any, the error names the missing key (`what`) and the `options` that can give it.
    """
    for key in given:
        if key is not None:
            return key if isinstance(key, bytes) else read_key_file(key, settings.server)
    if settings.fd is not None or settings.stdin:
        key = read_line(settings.fd or 0).rstrip(b"\r\n")
    elif os.isatty(0):
        key = prompt_key(f"Enter {what}: ")
    else:
        raise UsageError(f"no {what} given", f"give {options}, or --stdin")
    if not key:
        raise SpaError(f"expected the {what}, got an empty line")
    return key


def find_keys(settings: Settings) -> "Tuple[Optional[bytes], Optional[bytes]]":
    """Return the encryption key, or the passphrase of GPG_SIGNER, and the HMAC key (fwknop.md 2.5).

    The passphrase is b"" for a signer without one, and None if gpg needs none: it does not sign, or
    asks its agent. The HMAC key is None unless one is given, or USE_HMAC or --hmac-digest-type is.
    """
    named = settings.given.get("HMAC_DIGEST_TYPE")
    keys = (settings.key, settings.key_base64, settings.key_file)
    hmac_keys = (settings.hmac_key, settings.hmac_key_base64, settings.hmac_key_file)
    wanted = (settings.use_hmac or hmac_keys != (None, None, None)
              or (named is not None and not named.line))
    if settings.mode == "legacy" and wanted:
        raise UsageError("Legacy encryption mode is incompatible with HMAC usage")
    key, hmac_key = None, None
    if settings.mode != GPG:
        key = choose_key(settings, "encryption key", "KEY_BASE64, -G or --key-rijndael", *keys)
    elif settings.gpg_signer is not None and not settings.gpg_agent:
        key = b"" if settings.gpg_no_passphrase else choose_key(
            settings, "passphrase for signing", "--gpg-agent, --gpg-no-signing-pw",
            settings.gpg_passphrase, settings.gpg_passphrase_base64, *keys)
    if wanted:
        hmac_key = choose_key(settings, "HMAC key", "HMAC_KEY_BASE64, --get-hmac-key or --key-hmac",
                              *hmac_keys)
    check_keys(key or b"", hmac_key, settings.mode)
    return key, hmac_key


def check_keys(key: bytes, hmac_key: "Optional[bytes]", mode: str) -> None:
    """Raise SpaError for keys of a wrong length (fwknop.md 1.7, 1.8), warn of weak ones."""
    if hmac_key is not None and not 1 <= len(hmac_key) <= HMAC_KEY_LIMIT:
        raise SpaError(f"the HMAC key is {len(hmac_key)} bytes long,"
                       f" expected 1 to {HMAC_KEY_LIMIT}")
    if hmac_key == key:
        raise SpaError("the encryption key and the HMAC key should not be identical")
    if mode == "legacy" and len(key) > LEGACY_KEY_LENGTH:
        warn(f"legacy mode uses only the first {LEGACY_KEY_LENGTH} bytes of the key")
    elif len(key) > KEY_LIMIT and mode != GPG:
        raise SpaError(f"the encryption key is {len(key)} bytes long, expected 1 to {KEY_LIMIT}")
    elif not key and mode != GPG:
        warn("the encryption key is empty: everybody can read this packet")


# Bytes of a new HMAC key as fwknop chooses them (fwknop.md 2.4); for SHA-3 as keygen.py does.
HMAC_KEY_LENGTHS = {"MD5": 16, "SHA1": 20, "SHA256": 64, "SHA384": 128, "SHA512": 128,
                    "SHA3_256": 64, "SHA3_512": 64}


def generate_keys(settings: Settings, given: "Dict[str, Given]") -> None:
    """Put new keys into the rc file or a new file, or print them (fwknop.md 2.4)."""
    length = settings.hmac_key_length or HMAC_KEY_LENGTHS[settings.hmac_type]
    keys = {name: binascii.b2a_base64(os.urandom(size), newline=False).decode("ascii")
            for name, size in (("KEY_BASE64", settings.key_length), ("HMAC_KEY_BASE64", length))}
    lines = "\n".join(f"{name}: {text}" for name, text in keys.items())
    if settings.save_stanza:
        new = {name: Given(text, "-k") for name, text in keys.items()}
        path, written = save_stanza(dict(given, **new), settings.force_stanza)
        kinds = [kind for kind, name in zip(("Rijndael", "HMAC"), keys) if name in written]
        say(f"[+] Wrote {' and '.join(kinds) or 'no'} keys to rc file: {path}")
    if settings.key_gen_file is not None:
        write_private(settings.key_gen_file, lines + "\n", os.O_EXCL)
        say(f"[+] Wrote Rijndael and HMAC keys to: {settings.key_gen_file}")
    elif not settings.save_stanza:
        say(lines)


def effective_user() -> str:
    """Return the name of the user who runs this, "" on systems without such names."""
    try:
        import pwd
        return pwd.getpwuid(os.geteuid()).pw_name
    except (ImportError, KeyError):
        return ""


def find_user(settings: Settings) -> str:
    """Return the user name for the packet: the one set, or that of our user (fwknop.md 2.1)."""
    if settings.user is not None:
        return settings.user
    name = os.environ.get("SPOOF_USER") or os.environ.get("LOGNAME")
    if not name:
        try:
            name = os.getlogin()
        except (OSError, AttributeError):
            name = effective_user() or os.environ.get("USER") or "NO_USER"
    try:
        return parse_user(name)
    except ValueError as problem:
        raise SpaError(f"{problem}, not '{name}'", "-U sets it") from None


# ======================================================================================
# 12. Programs
#
# gpg and wget. They start only on request, with lists of arguments that no shell sees.
# ======================================================================================


MAX_OUTPUT = 500  # characters of a program's output in an error; the reason is at its end


def run_program(argv: "List[str]", given: bytes = b"") -> bytes:
    """Return the output of a program that reads `given`; raise SpaError with its error output."""
    import subprocess
    with errors_named(argv[0]):
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        out, errors = process.communicate(given)
    if process.returncode:
        lines = errors.decode("ascii", "backslashreplace").split("\n")
        text = printable("; ".join(line.strip() for line in lines if line.strip()))
        raise SpaError(text[-MAX_OUTPUT:] or f"{argv[0]}: exit code {process.returncode}")
    return out


def encrypt_gpg(settings: Settings, plaintext: bytes, passphrase: "Optional[bytes]") -> bytes:
    """Return OpenPGP data for GPG_RECIPIENT, signed by GPG_SIGNER if that is set (fwknop.md 1.11).

    gpg trusts every key of the key ring. It reads the passphrase as the first line, before the
    plain text; for a key without one (b"") the empty line keeps it from asking.
    """
    argv = [settings.gpg_exe, "--batch", "--no-tty", "--no-armor", "--trust-model", "always",
            "--no-auto-key-locate", "--no-encrypt-to"]
    if settings.gpg_home is not None:
        argv += ["--homedir", settings.gpg_home]
    if passphrase is not None:
        if b"\n" in passphrase:
            raise SpaError("gpg can't be given a passphrase of more than one line")
        argv += ["--pinentry-mode", "loopback", "--passphrase-fd", "0"]
        plaintext = passphrase + b"\n" + plaintext
    if settings.gpg_signer is not None:
        argv += ["--sign", "--local-user", settings.gpg_signer]
    argv += ["--encrypt", "--recipient", settings.gpg_recipient or ""]
    cipher = run_program(argv, plaintext)
    if not cipher:
        raise SpaError(f"{settings.gpg_exe}: it printed nothing")
    return cipher


# ======================================================================================
# 13. Network
#
# Look the server up, knock on its ports, and send. A link is a UDP socket connected to the server.
# It knows the route and our own address, even if the packet then takes another carrier.
# ======================================================================================

NETWORK_SECONDS = 10.0  # for a TCP connection (its SYN is repeated after 1, 3, 7) or a web page


def open_socket(family: int, address: "Tuple[Any, ...]", direct: bool = False,
                seconds: "Optional[float]" = None) -> "socket.socket":
    """Return a UDP socket connected to the address; `direct` forbids a router on the way.

    With `seconds` it is a TCP socket that waits at most this long; with 0 it is still connecting.
    """
    link = socket.socket(family, socket.SOCK_DGRAM if seconds is None else socket.SOCK_STREAM)
    try:
        link.settimeout(seconds)
        if direct:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)
        link.connect(address)
    except BlockingIOError:
        pass
    except BaseException:
        link.close()
        raise
    return link


def encode_host(host: str) -> bytes:
    """Return a host name as bytes: for text getaddrinfo() needs the codec idna; routers lack it."""
    try:
        return host.encode("ascii" if max(host, default="") < "\x7f" else "idna")
    except (LookupError, UnicodeError):
        raise SpaError(f"{host}: not an ASCII name",
                       "give the form that begins with xn--") from None


MAX_ADDRESSES = 16  # of one server: a forged DNS answer must not make us send without end


def find_addresses(host: str, port: int, family: int) -> "List[Address]":
    """Return the addresses of a host, each once; raise SpaError if the resolver knows none."""
    with errors_named(host):
        found = socket.getaddrinfo(encode_host(host), port, family, socket.SOCK_DGRAM)
    addresses = {(each[0], each[4]): None for each in found}  # type: Dict[Address, None]
    return list(addresses)[:MAX_ADDRESSES]


def open_links(host: str, addresses: "List[Address]") -> "Iterator[socket.socket]":
    """Yield a link to each address that has a route; raise SpaError if none has."""
    problem = f"{host}: it has no address"
    for family, address in addresses:
        try:
            link = open_socket(family, address)
        except OSError as error:
            problem = problem and explain(error, host)
            continue
        problem = ""
        try:
            yield link
        finally:
            link.close()
    if problem:
        raise SpaError(problem)


def encode_http(settings: Settings, packet: str) -> bytes:
    """Return the request that carries a packet over HTTP, to a proxy if there is one."""
    host, target = parse_peer(settings.server or "")[0], "/" + packet.replace(
        "+", "-").replace("/", "_")
    host = f"[{host}]" if ":" in host else host
    if settings.http_proxy:  # as fwknop: a proxy without a port of its own takes that of -p
        own = settings.http_proxy[1] and "SPA_SERVER_PORT" in settings.given
        target = f"http://{host}:{settings.port}{target}" if own else f"http://{host}{target}"
    return encode_request(target, host, settings.user_agent)


def send_packet(settings: Settings, link: "socket.socket", packet: str) -> int:
    """Send the packet by its carrier to the link's peer; return the number of bytes sent."""
    payload = packet.encode("ascii")
    if settings.protocol == "udp":
        return link.send(payload)
    if settings.protocol in RAW_CARRIERS:
        return send_raw(settings, link, payload)
    if settings.protocol == "http":
        payload = encode_http(settings, packet)
    stream = open_socket(link.family, link.getpeername(), False, NETWORK_SECONDS)
    try:
        stream.sendall(payload)
        if settings.http_proxy:  # until it answers, it may not have passed the packet on
            try:
                answer = stream.recv(1)
            except OSError:
                answer = b""
            if not answer:
                warn("the proxy did not answer: it may not have passed the packet on")
    finally:
        stream.close()
    return len(payload)


def send_raw(settings: Settings, link: "socket.socket", payload: bytes) -> int:
    """Send the payload in an IP packet of our own, which takes root; return its length."""
    source, peer = settings.spoof_source or link.getsockname()[0], link.getpeername()[0]
    datagram = encode_raw(
        settings.protocol, payload, socket.inet_aton(source) + socket.inet_aton(peer),
        (settings.source_port or 0, settings.port), (settings.icmp_type, settings.icmp_code))
    with errors_named(settings.server or "", "it needs root"):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    try:
        raw.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
        return raw.sendto(datagram, (peer, 0))
    finally:
        raw.close()


def open_ping(family: int) -> "socket.socket":
    """Return a socket for echo requests, a raw one if the system allows users no other."""
    number = socket.IPPROTO_ICMPV6 if family == socket.AF_INET6 else socket.IPPROTO_ICMP
    try:
        return socket.socket(family, socket.SOCK_DGRAM, number)
    except OSError:
        with errors_named("ICMP", "it needs root, or a group in net.ipv4.ping_group_range"):
            return socket.socket(family, socket.SOCK_RAW, number)


def send_knock_packet(link: "socket.socket", protocol: str, port: int) -> None:
    """Knock once at the link's peer, as `knock` does it (tests/spec/knockd.md 1.8).

    TCP: one SYN, which is not sent again because the socket is closed at once. UDP: one zero byte.
    ICMP: an echo request with `port` data bytes (RFC 792; RFC 4443, where the kernel sums up).
    """
    peer = link.getpeername()
    if protocol == "icmp":
        kind = 128 if link.family == socket.AF_INET6 else ICMP_ECHO
        request = struct.pack(">BBHHH", kind, 0, 0, os.getpid() & 0xFFFF, 1) + bytes(port)
        ping = open_ping(link.family)
        try:
            ping.sendto(put_checksum(request, 2), (peer[0], 0) + peer[2:])
        finally:
            ping.close()
        return
    try:
        knock = open_socket(link.family, (peer[0], port) + peer[2:], False,
                            0 if protocol == "tcp" else None)
    except ConnectionRefusedError:
        return  # a near host has answered already
    try:
        if protocol == "udp":
            knock.send(b"\0")
    finally:
        knock.close()


def pause(least: int, most: int) -> None:
    """Wait for a random number of milliseconds in this range."""
    time.sleep((least + int.from_bytes(os.urandom(7), "big") % (most - least + 1)) / 1000)


def random_port() -> int:
    """Return a port from 10000 up (tests/spec/fwknop.md 1.14)."""
    return 10000 + int.from_bytes(os.urandom(7), "big") % 55536


# ======================================================================================
# 14. Own address
#
# The address to open for, if none is set: the link's own if there can be no NAT, or the one that a
# web page (-R) or a STUN server (RFC 8489) tells; both see the source of our question. STUN is not
# authenticated: an attacker who can read the question can make us open for another address.
# ======================================================================================

STUN_MAGIC = b"\x21\x12\xa4\x42"
STUN_SECONDS = (0.5, 1.0, 1.5)  # to wait for an answer to each question; RFC 8489 begins so too


def choose_address(settings: Settings, link: "Optional[socket.socket]") -> str:
    """Return the address to open for: as set, as others see us, or our own if there is no NAT."""
    allow_ip, family = settings.allow_ip, link.family if link is not None else 0
    if settings.ospa and link is not None and allow_ip in (None, SOURCE_ADDRESS):
        return str(link.getsockname()[0])  # no answer comes if it is wrong
    if allow_ip == RESOLVE:
        return resolve_address(settings, family, link)
    if allow_ip is not None:
        return ask_stun(allow_ip[len(STUN):], family) if allow_ip.startswith(STUN) else allow_ip
    hidden = settings.spoof_source or settings.http_proxy
    own = own_address(link) if link is not None and not hidden else None
    if own is None:
        raise UsageError("Must use one of [-s|-R|-a] to specify IP for SPA access.")
    note(f"asking to open for {own}, our address on the way to the server")
    return own


# Networks of IPv4 that exist in many places: loopback, private (RFC 1918), link-local, shared by
# carriers (RFC 6598, 7335), used by tunnels (RFC 2544), multicast.
NOT_PUBLIC = ("0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12"
              " 192.0.0.0/24 192.168.0.0/16 198.18.0.0/15 224.0.0.0/3")


def judge_address(settings: Settings, link: "socket.socket", asked: str) -> "Tuple[int, str]":
    """Return rank and line of --check about the address that a packet on this link opens for."""
    own, hidden = str(link.getsockname()[0]), own_address(link) is None
    rank, why = FACT, ", and there is no NAT"
    if asked == SOURCE_ADDRESS:
        asked, why = "the sender", ": all behind a NAT, if there is one" if hidden else why
    elif asked == own and hidden:
        rank, why = ODD, ": if a NAT is in between, use -R or -s"
    elif (settings.allow_ip or "").startswith((RESOLVE, STUN)):
        why = why if asked == own else ", since a NAT is in between"
    elif asked != own:
        rank, why = (FACT, ": -R would ask whether that is right") if (
            hidden or (":" in asked) != (":" in own)) else (
                ODD, ", which is not ours: see ALLOW_IP or -a")
    return rank, f"{link.getpeername()[0]}: reached from {own}; it opens for {asked}{why}"


def is_public(address: bytes) -> bool:
    """Return whether an address of 4 or 16 bytes is the same all over the Internet.

    For IPv6 that is 2000::/3 (RFC 4291), without fd00::/8 (RFC 4193) and IPv4 inside IPv6.
    """
    if len(address) == 16:
        return address[0] >> 5 == 1
    for network in NOT_PUBLIC.split():
        base, _, bits = network.partition("/")
        differ = int.from_bytes(exclusive_or(address, socket.inet_aton(base)), "big")
        if not differ >> 32 - int(bits):
            return False
    return True


MAPPED = b"\0" * 10 + b"\xff\xff"  # the beginning of an IPv4 address inside IPv6 (RFC 4291)
NAT64 = b"\0\x64\xff\x9b"  # 64:ff9b::/32: IPv4 hosts behind a translator (RFC 6052)


def own_address(link: "socket.socket") -> "Optional[str]":
    """Return the address that the server must see for this link, or None if NAT may be on the way.

    There is no NAT if our address is public and the server's is no NAT64, or if the server is near:
    the first 24 or 64 bits are the same, and the route has no router. It takes both: a tunnel's
    route has no router either, and Linux ignores SO_DONTROUTE for IPv6. IPv4 in IPv6 gives None.
    """
    names = [str(name[0]).partition("%")[0] for name in (link.getsockname(), link.getpeername())]
    own, server = (socket.inet_pton(link.family, name) for name in names)
    if server.startswith((MAPPED, NAT64)):
        return None
    if is_public(own):
        return names[0]
    near = 8 if link.family == socket.AF_INET6 else 3
    if is_public(server) or own[:near] != server[:near]:
        return None
    try:
        open_socket(link.family, link.getpeername(), True).close()
    except OSError:
        return None
    return names[0]


def check_own(text: str, where: str, link: "Optional[socket.socket]" = None) -> str:
    """Return our address as others tell it, IPv4 instead of IPv4 in IPv6; raise SpaError.

    Only a server that this `link` reaches by a loopback address can see us by one.
    """
    own = socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    if own[:12] == MAPPED:
        own = own[12:]
        text = socket.inet_ntop(socket.AF_INET, own)
    near = link is not None and all(each.startswith("127.") or each == "::1"
                                    for each in (text, str(link.getpeername()[0])))
    # Nobody has an address in 0.0.0.0/8, 127.0.0.0/8, from 224.0.0.0 on, ::, ::1 or ff00::/8.
    if not near and ((own[0] in (0, 127) or own[0] >= 224) if len(own) == 4 else (
            own[:15] == bytes(15) or own[0] == 255)):
        raise SpaError(f"{where}: it says that our address is {text}, which can't be")
    return text


def resolve_address(settings: Settings, family: int, link: "Optional[socket.socket]") -> str:
    """Return our address: the first line of RESOLVE_URL that is one (fwknop.md 2.6)."""
    secure = "" if settings.resolve_http_only else "s"
    page = settings.resolve_url or parse_url(f"http{secure}://www.cipherdyne.org/cgi-bin/myip")
    url = page[0]
    if url.startswith("https:") and not secure:
        raise UsageError("https is not supported for --resolve-http-only.")
    if url.startswith("http:") and secure:
        warn(f"IP resolution URL '{url}' should begin with 'https://' in -R mode.")
    if settings.wget is not None:
        named = [] if settings.use_wget_agent else ["-U", settings.user_agent]
        answer = run_program([settings.wget] + named + [
            "--secure-protocol=auto", "--quiet", "-O", "-", url])
    else:
        answer = fetch(page, settings.user_agent, family)
    for line in answer.decode("ascii", "replace").splitlines():
        try:
            found = parse_address(line.partition(",")[0].strip())
        except ValueError:
            continue
        return check_own(found, url, link)
    raise SpaError(f"{url}: no line of the answer is an address")


def fetch(page: "Tuple[str, str, int, str]", agent: str, family: int, hops: int = 3) -> bytes:
    """Return the body of a web page; raise SpaError if a page takes longer than NETWORK_SECONDS.

    It may lead to another one, as pages of HTTP lead to HTTPS: `hops` times, and never back.
    """
    url, host, port, path = page
    end, answer, problem = time.monotonic() + NETWORK_SECONDS, b"", f"{url}: it has no address"
    for kind, address in find_addresses(host, port, family):
        link = None  # type: Any
        try:
            link = open_socket(kind, address, False, NETWORK_SECONDS)
            if url.startswith("https:"):
                link = start_tls(link, host)
            link.sendall(encode_request(path, url.split("/")[2], agent))
            piece = b"."  # 64 KiB are enough: a page that tells an address is short
            while piece and len(answer) < 1 << 16 and not is_whole(answer):
                link.settimeout(max(0.001, end - time.monotonic()))
                piece = link.recv(4096)
                answer += piece
            break
        except (OSError, LookupError, ValueError) as error:
            problem, answer = explain(error, url), b""  # half an answer may hold half an address
        finally:
            if link is not None:
                link.close()
    head, _, body = answer.replace(b"\r\n", b"\n").partition(b"\n\n")
    status, *lines = head.decode("ascii", "replace").split("\n")
    code = (status.split() + ["", ""])[1]
    if code == "200":
        return body
    places = [line[9:].strip() for line in lines if line.lower().startswith("location:")]
    if not (hops and places and code.startswith("3")):
        raise SpaError(f"{url}: {status}" if status else problem)
    site = "" if "://" in places[0] else "/".join(url.split("/")[:3] + [""])
    place = site + places[0].lstrip("/")
    try:
        page = parse_url(place)
    except ValueError as error:
        raise SpaError(f"{url}: it leads to {place}: {error}") from None
    if url.startswith("https:") and not place.startswith("https:"):
        raise SpaError(f"{url}: it leads to {place}, without encryption")
    return fetch(page, agent, family, hops - 1)


def is_whole(answer: bytes) -> bool:
    """Return whether an answer is as long as its Content-Length (RFC 9112 section 6.3).

    Raise ValueError for a bad Content-Length. Without one, the answer ends with the connection.
    """
    head, _, body = answer.lower().partition(b"\r\n\r\n")
    length = head.partition(b"\r\ncontent-length:")[2].split(b"\r\n")[0].strip()
    if length.strip(b"0123456789") or len(length) > 9:
        raise ValueError("expected a Content-Length of at most 9 digits")
    return bool(length) and len(body) >= int(length)


def start_tls(link: "socket.socket", host: str) -> "Any":
    """Return the connection under TLS, once the host's certificate has been verified."""
    try:
        import socket as full
        import ssl
    except ImportError:
        raise SpaError("this Python has no ssl for https", "use -w, or -a") from None
    whole = full.socket(link.family, full.SOCK_STREAM, 0, link.detach())
    whole.settimeout(NETWORK_SECONDS)
    return ssl.create_default_context().wrap_socket(whole, server_hostname=host)


def decode_stun(answer: bytes, identity: bytes) -> "Optional[str]":
    """Return XOR-MAPPED-ADDRESS (section 14.2) of the answer to question `identity`, or None."""
    if answer[:2] != b"\x01\x01" or answer[4:20] != STUN_MAGIC + identity:
        return None
    position = 20
    while position + 4 <= len(answer):
        kind, length = struct.unpack_from(">HH", answer, position)
        value = answer[position + 4:position + 4 + length]
        position += 4 + (length + 3) // 4 * 4
        family = {(b"\1", 8): socket.AF_INET, (b"\2", 20): socket.AF_INET6}.get(
            (value[1:2], len(value)))
        if kind == 0x0020 and family:
            own = exclusive_or(value[4:], STUN_MAGIC + identity)
            if any(own):  # 0.0.0.0 would mean something else in a packet
                return socket.inet_ntop(family, own)
    return None


def ask_stun(server: str, family: int) -> str:
    """Return our address in this family as a STUN server sees it; raise SpaError."""
    host, port = parse_peer(server, STUN_PORT)
    problem = f"STUN server {host}: no answer"
    for link in open_links(host, find_addresses(host, port, family)):
        identity = os.urandom(12)
        try:
            for seconds in STUN_SECONDS:
                link.send(b"\0\1\0\0" + STUN_MAGIC + identity)
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    link.settimeout(max(end - time.monotonic(), 0.001))
                    try:
                        own = decode_stun(link.recv(2048), identity)
                    except socket.timeout:
                        break
                    if own is not None:
                        return check_own(own, "STUN server " + host)
        except OSError as error:
            problem = explain(error, f"STUN server {host}")
    raise SpaError(problem, "-a or -s need none")


# ======================================================================================
# 15. OpenSPA
#
# The OSPA file, the request and the answer (tests/spec/openspa.md 1.8, 1.10); packets: section 5.
# ======================================================================================

OSPA_TRIES, OSPA_SECONDS = 3, 1.0  # the same bytes are sent so often, so many seconds apart
BASE32 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"


def parse_uuid(text: str) -> str:
    """Parse a UUID, also in braces, after `urn:uuid:` or without hyphens, to its usual form."""
    digits = text.lower().replace("urn:uuid:", "").strip("{}").replace("-", "")
    if len(digits) != 32 or digits.strip("0123456789abcdef"):
        raise ValueError("expected a UUID")
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def parse_adk(text: str) -> bytes:
    """Parse an ADK secret, 4 bytes as 7 characters of base32; empty text means none (1.9)."""
    number = sum(BASE32.find(letter) << 5 * place for place, letter in enumerate(text[::-1]))
    if text and (len(text) != 7 or text.strip(BASE32) or number & 7):
        raise ValueError("expected 7 characters of base32 that are 4 bytes")
    return (number >> 3).to_bytes(4, "big") if text else b""


ADK, PRIVATE, PUBLIC, SERVER_KEY = ("adk.secret", "crypto.rsa.client.privateKey",
                                    "crypto.rsa.client.publicKey", "crypto.rsa.server.publicKey")
OSPA_KEYS = {
    "version": choice_parser(["0.2"]), "clientUUID": parse_uuid, "serverHost": parse_text,
    "serverPort": parse_port, ADK: parse_adk,
    "crypto.cipherSuitePriority": choice_parser(["[CipherSuite_RSA_SHA256_AES256CBC]"]),
    PRIVATE: lambda text: RsaKey.parse(text, True),
    PUBLIC: lambda text: RsaKey.parse(text, False),
    SERVER_KEY: lambda text: RsaKey.parse(text, False),
}  # type: Dict[str, Callable[[str], Any]]


def parse_value(lines: "List[str]") -> str:
    """Return the scalar, block or `[list]` after a key and below it; OSPA needs no other YAML."""
    bare = [(" " + line).partition(" #")[0].strip() for line in lines]  # without comments
    if bare[0] in ("|", "|-", "|+"):
        return "\n".join(lines[1:])
    value = " ".join(bare).strip()
    listed = value.startswith("- ") or value[:1] + value[-1:] == "[]"
    value = value[1:len(value) - (value[0] == "[")].strip() if listed else value
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    value = value[1:-1] if quoted else value
    if (value.strip("{}") if quoted else value).strip(BASE32 + BASE32.lower() + "0189.-_:%"):
        raise ValueError("expected one plain or quoted word, a list of one, or lines below `|`")
    return f"[{value}]" if listed else value


def parse_ospa(text: str, path: str) -> "Dict[str, Any]":
    """Return the values of an OSPA file, or raise ConfigError, which shows no text of the file."""
    rows = [(number, len(line) - len(line.lstrip(" ")), line.rstrip().lstrip(" "))
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()[:1] not in ("", "#")][::-1]  # pop() gives the next
    levels, values, where = [(0, "")], {}, path  # type: List[Tuple[int, str]], Dict[str, Any], str
    try:
        while rows:
            number, indent, line = rows.pop()
            while indent < levels[-1][0]:
                levels.pop()
            name, colon, rest = (line + " ").partition(": ")
            key, where, lines = levels[-1][1] + name, f"{path}:{number}", [rest.strip()]
            is_map = any(known.startswith(key + ".") for known in OSPA_KEYS)
            if (not colon or "." in name or indent != levels[-1][0] or key in values
                    or not (key in OSPA_KEYS or (is_map and not parse_value(lines)))):
                raise ValueError(f"expected {levels[-1][0]} blanks and a key of OSPA 0.2, once")
            if is_map:  # the next line may be its first
                levels.append((max(indent + 1, rows[-1][1] if rows else 0), key + "."))
            while rows and not is_map and rows[-1][1] >= indent + (rows[-1][2][:2] != "- "):
                lines.append(rows.pop()[2])
            where += f": {key}"
            values[key] = None if is_map else OSPA_KEYS[key](parse_value(lines))
        where, missing = path, sorted(set(OSPA_KEYS) - set(values) - {ADK, PUBLIC})
        if missing:
            raise ValueError("expected " + " ".join(missing))
    except ValueError as problem:
        raise ConfigError(f"{where}: {problem}") from None
    return values


def use_ospa(settings: Settings) -> None:
    """Read the OSPA file, if any; its server and port hold where the settings have none."""
    if settings.ospa_file is None:
        return
    settings.ospa = ospa = parse_ospa(read_private(settings.ospa_file), settings.ospa_file)
    settings.server = settings.server or ospa["serverHost"]
    settings.port = settings.port if "SPA_SERVER_PORT" in settings.given else ospa["serverPort"]


class OspaRequest:
    """A sealed request that a target opens `access` (`tcp/22`, `udp/5000-5010`) to a client."""

    def __init__(self, settings: Settings, access: str, client: str, target: str) -> None:
        ospa, seconds = settings.ospa or {}, time.time() + settings.time_offset
        self.keys, self.uuid = (ospa[PRIVATE], ospa[SERVER_KEY]), ospa["clientUUID"]
        self.access, self.client = access, client
        first, _, last = access[4:].partition("-")
        hosts = [socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET,
                                  host.partition("%")[0]) for host in (target, client)]
        self.fields = OspaFields(
            6 if access[:3] == "tcp" else 17, (int(first), int(last or first)), hosts[0], hosts[1],
            int(seconds), binascii.unhexlify(self.uuid.replace("-", "")))
        proof = adk_proof(ospa[ADK], seconds) if ospa.get(ADK) else 0
        self.header = struct.pack(OSPA_HEADER, OSPA_REQUEST, os.urandom(1)[0], OSPA_SUITE, 0, proof)
        self.datagram = seal_ospa(self.header, self.fields.encode(), *self.keys, os.urandom(48),
                                  os.urandom(3))
        self.dump = (f"OpenSPA request of {self.uuid} at {self.fields.timestamp}: open {access} of"
                     f" {target} for {client}\n{binascii.hexlify(self.datagram).decode('ascii')}")

    def decode_answer(self, datagram: bytes) -> int:
        """Return for how many seconds an answer says that it is open; else raise ValueError."""
        header = struct.pack(OSPA_HEADER, OSPA_ANSWER, self.header[1], OSPA_SUITE, 0, 0)
        if datagram[:8] != header or len(datagram) > OSPA_MAX:  # RSA comes later: it is slow
            raise ValueError("expected an answer to this request")
        _, packet, signature = unseal_ospa(datagram, self.keys[0])
        answer, asked = decode_ospa(packet, True), self.fields
        told = answer.protocol, answer.ports, answer.target  # 1 of 256 old answers has our header
        if not self.keys[1].verify(header + packet, signature) or not answer.seconds or told != (
                asked.protocol, asked.ports, asked.target):
            raise ValueError("expected the server's signature, and what this request asks for")
        return answer.seconds

    def ask(self, link: "socket.socket", tries: int) -> int:
        """Send the request until an answer comes; return its seconds, 0 if none comes."""
        for _ in range(tries):
            end, is_sent = time.monotonic() + OSPA_SECONDS, False
            while time.monotonic() < end:
                link.settimeout(max(end - time.monotonic(), 0.001))
                try:
                    is_sent = is_sent or link.send(self.datagram) > 0
                    return self.decode_answer(link.recv(OSPA_MAX + 1))
                except socket.timeout:
                    break
                except (ConnectionRefusedError, ConnectionResetError, ValueError):
                    pass  # "port unreachable" (on Windows a reset) or a stray: anybody can send it
        return 0


# ======================================================================================
# 16. After the knock
#
# Hear the server's answer, try the port until it opens, relay its connection, or become another
# program. Only TCP: a client can't tell whether a UDP port is open.
# ======================================================================================

WAIT_SECONDS = 10  # without --wait
SYN_SECONDS = 0.9  # systems send a SYN again after a second: an earlier answer is for the first one
KNOCK_AGAIN = 1.0  # seconds: as the kernel, which repeats a SYN that got no answer for so long
OPEN_ALREADY = "answers without a knock: nothing hides it, or an earlier knock still holds"
TRY = (0.02, 0.25)  # seconds between the first two tries; they double up to the second number
TRY_SECONDS = 3.0  # for one connection: then its SYN was repeated once, and would be again
CHUNK = 1 << 18  # bytes to read at once


def find_wait_peer(settings: Settings, operands: "List[str]",
                   command: "List[str]") -> "Optional[Tuple[str, int]]":
    """Return host and TCP port to wait for after the knock, or None; raise UsageError."""
    if settings.execute and not command:
        raise UsageError("--exec: expected a command after it")
    if settings.relay:
        if (command or settings.test or settings.save_stanza or sys.stdin is None
                or sys.stdout is None):
            raise UsageError("--proxy needs standard input and output for itself: no -T, no --exec,"
                             " no --save-rc-stanza")
        if settings.nat_rand_port:
            raise UsageError("--proxy names the port, so it can't be a random one", "--nat-port")
        try:
            host, digits = operands
            return host, parse_port(digits)
        except ValueError:
            raise UsageError("--proxy: expected HOST PORT") from None
    wanted = command or settings.wait is not None or settings.wait_port is not None
    if not wanted or settings.server is None:
        return None
    if settings.test:
        raise UsageError("-T sends nothing, so there is nothing to wait for")
    port = find_port(settings)
    if not port:
        raise UsageError("there is no TCP port in -A to wait for", "--wait-port names one")
    if settings.one_connection:
        if not command:
            note(f"tcp/{port} is not tried: that would use up its only connection")
        return None
    return settings.server, port


def find_port(settings: Settings) -> int:
    """Return the TCP port that a knock opens, as seen from here, or 0."""
    ports = [entry[4:] for entry in (settings.access or "").split(",") if entry[:4] == "tcp/"]
    return settings.wait_port or (int(settings.nat_port or ports[0].split("-")[0]) if ports else 0)


def wait_ready(reading: "Iterable[socket.socket]", connecting: "Iterable[socket.socket]",
               patience: float) -> "Set[socket.socket]":
    """Return the sockets that got a datagram or ended connecting, after so many seconds at most."""
    import select
    if not reading and not connecting:
        time.sleep(patience)  # Windows can't select() without sockets
        return set()
    readable, writable, failed = select.select(reading, connecting, connecting, patience)
    return {*readable, *writable, *failed}


class Answers:
    """The answers to one knock, and the sockets on which they may come (tests/spec/answer.md)."""

    def __init__(self, report: "Callable[[str], None]") -> None:
        self.report = report  # takes a line that says what was opened
        self.links = {}  # type: Dict[socket.socket, Question]
        self.told = {}  # type: Dict[str, Tuple[bool, str]]  # by address of the server

    def expect(self, link: "socket.socket", question: Question) -> None:
        """Keep the link that sent a packet, also when its owner closes it; drop very old ones."""
        kept = socket.socket(link.family, socket.SOCK_DGRAM, 0, link.detach())
        kept.settimeout(0)
        self.links[kept] = question
        if len(self.links) > 2 * MAX_ADDRESSES:
            self.drop(next(iter(self.links)))

    def drop(self, link: "socket.socket") -> None:
        """Close a link, and hear it no more."""
        del self.links[link]
        link.close()

    def hear(self, link: "socket.socket") -> None:
        """Take one datagram; only the answer to the link's packet counts."""
        host = str(link.getpeername()[0])
        try:
            is_done, text = self.links[link].decode(link.recv(PACKET_LIMIT))
        except (OSError, ValueError):
            return  # "port unreachable" or a stray: anybody can send them
        self.drop(link)
        if not self.told.get(host, (False, ""))[0]:
            self.told[host] = is_done, printable(text)
            if is_done:
                self.report(f"{host}: {printable(text)}")

    def gather(self, seconds: float) -> None:
        """Hear answers until all came, or so long; after a good one the others have to hurry."""
        end = time.monotonic() + seconds
        while self.links and time.monotonic() < end:
            for link in wait_ready(self.links, (), max(end - time.monotonic(), 0)):
                self.hear(link)
            if any(is_done for is_done, _ in self.told.values()):
                end = min(end, time.monotonic() + TRY[1])

    def refusals(self, unanimous: bool) -> "List[str]":
        """Return the reasons of addresses that refused; if `unanimous`, only if all that told."""
        reasons = [f"{host}: {text}" for host, (is_done, text) in self.told.items() if not is_done]
        return [] if unanimous and len(reasons) < len(self.told) else reasons


def our_clock() -> str:
    """Return the time of this host, for people to compare."""
    return f"ours says {time.asctime(time.gmtime())} UTC"


def wait_until_open(addresses: "List[Address]", seconds: int, knock: "Callable[[], None]",
                    answers: Answers, alone: bool = False,
                    early: "Iterable[socket.socket]" = ()) -> "Tuple[Optional[socket.socket], int]":
    """Return the connection to the first address that takes one, or None and the last errno.

    A datagram may get lost, so `knock` is called every second, unless the server has refused. New
    connections start more often than the kernel repeats a SYN, and older ones, `early` ones too,
    go on for a while: the way may be long. A knock sequence has to be `alone`: a SYN in between
    would break it.
    """
    again = TRY_SECONDS if alone else KNOCK_AGAIN
    begin, now, knock_at, try_at, gap, error = time.monotonic(), 0.0, again, 0.0, TRY[0], 0
    waiting = dict.fromkeys(early, TRY_SECONDS)
    try:
        while now < seconds:
            knocking = now >= knock_at
            if (knocking or not answers.links) and answers.refusals(unanimous=True) and not alone:
                break
            for link, end in list(waiting.items()):
                if end < now or (knocking and alone):
                    del waiting[link]
                    link.close()
            if knocking:
                try:
                    knock()
                except SpaError:
                    pass  # the first knock was sent, and this network may come back
                now = time.monotonic() - begin
                knock_at = now + again
            if now >= try_at:
                try_at, gap = now + gap, min(gap * 2, TRY[1])
                for family, address in addresses:
                    try:
                        waiting[open_socket(family, address, False, 0)] = now + TRY_SECONDS
                    except OSError as problem:
                        error = problem.errno or 0
            patience = max(min(knock_at, try_at, seconds) - now, 0)
            ready = wait_ready(answers.links, waiting, patience)
            for link in [each for each in (*answers.links, *waiting) if each in ready]:
                if link in answers.links:
                    answers.hear(link)
                    continue
                del waiting[link]
                error = link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not error:
                    return link, 0
                link.close()
            now = time.monotonic() - begin
        return None, error
    finally:
        for link in waiting:
            link.close()


def copy(read: "Callable[[int], bytes]", write: "Callable[[memoryview], int]") -> None:
    """Copy from `read` to `write` until there is no more."""
    while True:
        rest = memoryview(read(CHUNK))
        if not rest:
            return
        while rest:
            rest = rest[write(rest):]


def relay(link: "socket.socket") -> int:
    """Copy standard input to a connection and the connection to standard output, until both end.

    The end of one direction is passed on, and the other goes on. Each has a thread that blocks, so
    a slow reader slows the sender; that works for any kind of file, also on Windows. Return the
    exit code for os._exit(): the thread may still be reading, and Python's own exit crashes now and
    then when a thread returns to an interpreter that is half gone.
    """
    import _thread
    sent = _thread.allocate_lock()
    sent.acquire()

    def send_input() -> None:
        try:
            copy(lambda size: os.read(0, size), link.send)
            link.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the other direction reports a broken connection
        sent.release()

    link.setblocking(True)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _thread.start_new_thread(send_input, ())
    try:
        copy(link.recv, lambda rest: os.write(1, rest))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gives the reader its end of file
        sent.acquire()
    except BrokenPipeError:
        pass  # nobody reads any more
    except OSError as error:
        tell(explain(error, "the connection broke"))
        return 1
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    return 0


def become(command: "List[str]") -> None:
    """Become this command (on Windows: run it, and end with its exit code); raise SpaError."""
    with errors_named("--exec: " + command[0]):
        if os.name == "nt":
            import subprocess
            raise SystemExit(subprocess.call(command))
        import signal
        for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them, and the command would inherit it
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        os.execvp(command[0], command)


# ======================================================================================
# 17. Output
#
# Text for standard output, in the layout that fwknop's users and scripts know
# (tests/spec/fwknop.md 2.8). It never holds a key.
# ======================================================================================


def say(text: str) -> None:
    """Print lines on standard output. A knock goes on if that fails; main() then tells why."""
    lines = "\n".join(printable(line) for line in text.split("\n")) + "\n"
    Notes.unsaid = Notes.unsaid or write_to(sys.stdout, lines)


DUMP = """SPA Field Values:
=================
   Random Value: {message.random}
       Username: {message.user}
      Timestamp: {message.timestamp}
    FKO Version: {version}
   Message Type: {message.number} ({kind})
 Message String: {message.text}
     Nat Access: {nat}
    Server Auth: <NULL>
 Client Timeout: {message.timeout}
    Digest Type: {digest.number} ({digest.name})
      HMAC Type: {hmac_type}
Encryption Type: {encryption}
Encryption Mode: {number} ({mode})
{gpg}   Encoded Data: {text}
SPA Data Digest: {sum}
           HMAC: {tag}
 Final SPA Data: {packet}
"""
GPG_DUMP = """     GPG signer: {signer}
  GPG recipient: {recipient}
   GPG home dir: {home}
        GPG exe: {exe}
"""
WAY_DUMP = """
Generating SPA packet:
            protocol: {protocol}
         source port: {source}
    destination port: {port}
             IP/host: {host}"""


def format_dump(message: Message, plaintext: bytes, settings: Settings, packet: str,
                tag_length: int) -> str:
    """Return the "SPA Field Values" of fwknop's -T and -v, and for -v "Generating SPA packet"."""
    text, _, own_digest = plaintext.decode("ascii").rpartition(":")
    digest, null, gpg = DIGESTS[settings.hmac_type], "<NULL>", ""
    if settings.mode == GPG:
        gpg = GPG_DUMP.format(signer=settings.gpg_signer or null, recipient=settings.gpg_recipient,
                              home=settings.gpg_home or null, exe=settings.gpg_exe)
    dump = DUMP.format(
        message=message, version=PROTOCOL_VERSION, kind=MESSAGE_TYPES[message.number],
        nat=message.nat or null, digest=DIGESTS[settings.digest_type],
        hmac_type=f"{digest.number} ({digest.name})" if tag_length else "0 (None)",
        encryption="2 (GPG)" if gpg else "1 (Rijndael)", number=MODES[settings.mode],
        mode=settings.mode, gpg=gpg, text=text, sum=own_digest,
        tag=packet[len(packet) - tag_length:] or null, packet=packet)
    if settings.verbose:
        dump += WAY_DUMP.format(
            protocol=settings.protocol, source=settings.source_port or "<OS assigned>",
            port=settings.port, host=settings.server or "")
    return dump


def print_found(found: "Dict[str, int]", path: "Optional[str]", quiet: bool) -> None:
    """Print what --check found, worst first; raise SpaError if there is anything to do."""
    if path is not None and os.path.exists(path):
        found[f"{path}: mode {os.stat(path).st_mode & 0o777:o}"] = FACT
    found[f"the clock: {our_clock()}"] = FACT
    findings = [line for line in found if found[line] < FACT]
    for line in sorted(findings if quiet else found, key=lambda line: found[line]):
        say(MARKS[found[line]] + line)
    if findings:
        raise SpaError(f"lines that need a look: {len(findings)}")


# --- shared: launcher -- the same text in spa_server.py and spa_client.py --

LAUNCHER = """#!{python} -IS
# This starts the compiled form of {name}. To install it, say as root, and again after an update:
#   mkdir -p /usr/local/lib/spa && cp {script} /usr/local/lib/spa/{name}.py
#   {python} -m py_compile /usr/local/lib/spa/{name}.py
#   chmod -R a+rX,go-w /usr/local/lib/spa
#   {python} {script} --print-launcher > {path} && chmod 755 {path}
import sys
sys.path.insert(0, "/usr/local/lib/spa")
from {name} import main
sys.exit(main())"""


def launcher(path: str) -> str:
    """Return a program to install as `path`, which imports the compiled form of this script."""
    return LAUNCHER.format(python=sys.executable or "/usr/bin/python3", path=path,
                           script=os.path.realpath(__file__), name=os.path.basename(path))


# --- end shared: launcher --


def print_version() -> None:
    """Print version, protocol, and the SHA-256 of this file, to compare with a published one."""
    with open(__file__, "rb") as file:
        digest = binascii.hexlify(DIGESTS["SHA256"](file.read())).decode("ascii")
    say(f"spa_client.py {VERSION}, FKO protocol version {PROTOCOL_VERSION}\nSHA-256 {digest}")


def print_stanzas(given: "Dict[str, Given]") -> None:
    """Print the names of the stanzas, without [default] (tests/spec/fwknop.md 2.3)."""
    path = rc_path(given)
    if path is None or ("rc_file" not in given and not os.path.exists(path)):
        raise UsageError("--stanza-list needs an rc file, and there is none")
    names = stanza_names(read_private(path))
    say("\n - ".join([f"The following stanzas are configured in {path} :", *names]))


def print_ssh_config(given: "Dict[str, Given]") -> None:
    """Print the lines of ~/.ssh/config with which `ssh NAME` knocks by the stanza NAME."""
    def quote(text: str) -> str:  # for a shell; ssh itself replaces % and a letter
        text = text.replace("%", "%%")
        if os.name == "nt":
            return f'"{text}"'
        plain = not text.upper().strip(NAME_CHARACTERS + "./-")
        return text if plain else "'" + text.replace("'", "'\\''") + "'"

    name = given["print_ssh_config"].text
    if name[:1] in ("", "-") or name.upper().strip(NAME_CHARACTERS + ".-"):
        raise UsageError("--print-ssh-config: expected a name of letters, digits and . _ -")
    settings = read_settings(dict(given, named_config=Given(name, "-n")))[0]
    use_ospa(settings)
    port = find_port(settings)
    if settings.server is None or not port or settings.nat_rand_port:
        raise ConfigError(f"[{name}]: expected SPA_SERVER, and a TCP port in ACCESS")
    if settings.server[:1] == "-" or settings.server.upper().strip(NAME_CHARACTERS + ".:%-"):
        raise ConfigError(f"[{name}]: SPA_SERVER: expected a name or an address for ssh, which "
                          "gives it to a shell")
    files = [sys.executable or "python3", os.path.abspath(__file__)]
    files += ["--rc-file", os.path.abspath(given["rc_file"].text)] if "rc_file" in given else []
    say(f"Host {name}\n    HostName {settings.server.replace('%', '%%')}\n    Port {port}\n"
        f"    ProxyCommand {' '.join(map(quote, files))} -q -n {name} --proxy %h %p")


# ======================================================================================
# 18. Run
#
# The steps of the docstring in their order, and the exit codes.
# ======================================================================================


def random_digits() -> str:
    """Return 16 decimal digits, each value as likely as any other to 1 in 10^22 (fwknop.md 1.2)."""
    return f"{int.from_bytes(os.urandom(16), 'big') % 10 ** 16:016}"


def make_message(settings: Settings, allow_ip: str) -> Message:
    """Return a fresh message that asks to open for `allow_ip` (tests/spec/fwknop.md 1.4, 1.5)."""
    number, asked, nat = COMMAND, settings.command, ""
    if asked is None:
        number, asked = ACCESS, settings.access or ""
        protocol, _, port = asked.split(",")[0].partition("/")
        if settings.nat_local or settings.nat_access:
            number = LOCAL_NAT if settings.nat_local else NAT_ACCESS
            host, inner = settings.nat_access or (settings.server or "", 0)
            nat = f"{host},{inner or int(port)}"
        if settings.nat_port:
            asked = f"{protocol}/{settings.nat_port}"
    if settings.timeout:
        number = {ACCESS: TIMEOUT_ACCESS, NAT_ACCESS: TIMEOUT_NAT_ACCESS,
                  LOCAL_NAT: TIMEOUT_LOCAL_NAT}.get(number, number)
    return Message(random_digits(), find_user(settings), int(time.time()) + settings.time_offset,
                   number, f"{allow_ip},{asked}", nat, settings.timeout)


def draw_ports(settings: Settings) -> None:
    """Draw the random ports, once for all packets of a knock."""
    if settings.rand_port:
        settings.port = random_port()
    if settings.nat_rand_port:
        settings.nat_port = random_port()
    if settings.protocol in RAW_CARRIERS and not settings.source_port:
        settings.source_port = random_port()


class Knock:
    """A knock at one server. It finds keys and addresses once; each packet is a fresh one."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.first = settings, True
        self.keys = (None, None)  # type: Tuple[Optional[bytes], Optional[bytes]]
        self.tag_length = 0  # characters of the HMAC in a packet
        self.host, port = settings.http_proxy or (settings.server or "", 0)
        self.port = port or settings.port
        self.knock_at = self.send_to = []  # type: List[Address]
        self.chosen = {}  # type: Dict[Any, str]  # peer of a link -> address to open for
        self.listens, self.answers = settings.answer is not None, Answers(self.report)
        self.early = {}  # type: Dict[socket.socket, float]  # see begin()

    def prepare(self) -> None:
        """Find the keys, or ask for them, and look the addresses up."""
        settings, family = self.settings, self.settings.ip_version
        if not (settings.only_knocks or settings.ospa):
            self.keys = find_keys(settings)
        if self.keys[1] is not None:
            self.tag_length = DIGESTS[settings.hmac_type].text_size
        asked = not settings.only_knocks and (
            settings.allow_ip is None or settings.allow_ip.startswith((RESOLVE, STUN)))
        if self.host and (asked or settings.ospa or not settings.test):
            self.knock_at = self.send_to = find_addresses(self.host, self.port, family)
        keep(FACT, f"{self.host}: the addresses are " + ", ".join(
            str(address[0]) for _, address in self.send_to))
        if settings.sequence and settings.http_proxy and not settings.test:  # not at the proxy
            self.knock_at = find_addresses(settings.server or "", settings.port, family)

    def report(self, line: str) -> None:
        """Print what was opened, unless standard output or silence is for somebody else."""
        settings, line = self.settings, self.settings.label + line
        if not keep(ODD if OPEN_ALREADY in line else FACT, line) and not (
                settings.relay or settings.execute or settings.quiet):
            say(line)

    def send(self) -> None:
        """Knock on ports, and send packets; raise SpaError if no address could be reached."""
        settings = self.settings
        if settings.sequence:
            self.at_each(settings.server or "", self.knock_at, self.send_sequence, "got no knock")
        if settings.sequence and not settings.only_knocks:
            pause(*settings.delay)  # the packet must not overtake the last knock
        if not settings.only_knocks:
            self.at_each(self.host, self.send_to, self.send_fresh, "got no packet")
        self.first = False

    def at_each(self, host: str, addresses: "List[Address]",
                act: "Callable[[socket.socket], None]", failure: str) -> None:
        """Do this at each address of a host; raise SpaError if it fails at all of them."""
        problems, done = [], False  # type: List[SpaError], bool
        for link in open_links(host, addresses):
            try:
                act(link)
                done = True
            except OSError as error:
                problems.append(SpaError(explain(error, host)))
            except SpaError as problem:
                problems.append(problem)
        if problems and not done:
            raise problems[-1]
        for each in problems if self.first else ():
            warn(f"one address of {host} {failure}: {with_hint(each)}")

    def send_sequence(self, link: "socket.socket") -> None:
        """Knock on all ports of KNOCK_SEQUENCE at one address."""
        steps = self.settings.sequence or []
        if "icmp" in dict(steps):
            open_ping(link.family).close()  # fail before half a sequence is sent
        for number, (protocol, port) in enumerate(steps):
            if number:
                pause(*self.settings.delay)
            if self.settings.verbose:
                say(f"hitting {protocol} {link.getpeername()[0]}:{port}")
            send_knock_packet(link, protocol, port)

    def send_fresh(self, link: "socket.socket") -> None:
        """Send a fresh packet to one address, unless it could get none the first time."""
        peer, settings = link.getpeername(), self.settings
        if self.first:
            self.chosen[peer] = choose_address(settings, link)
            if Notes.found is not None:
                keep(*judge_address(settings, link, self.chosen[peer]))
        if peer in self.chosen:
            packet, dump = self.build(self.chosen[peer], link)
            if settings.verbose:
                say(dump)
            sent = self.deliver(link, packet)
            keep(FACT, f"a packet of {sent} bytes went to {peer[0]}")
            if settings.verbose:
                say(f"send_spa_packet: bytes sent: {sent}")

    def deliver(self, link: "socket.socket", packet: str) -> int:
        """Send a packet to one address, and return the number of bytes sent."""
        sent, (key, hmac_key) = send_packet(self.settings, link, packet), self.keys
        if self.listens and not self.settings.unanswered() and key and hmac_key:
            self.answers.expect(link, Question(packet.encode("ascii"), key, hmac_key))
        return sent

    def build(self, allow_ip: str, link: "Any") -> "Tuple[str, str]":
        """Return a fresh packet and its dump; print a random NAT port once, write -B's file."""
        settings, (key, hmac_key) = self.settings, self.keys
        message = make_message(settings, allow_ip)
        if settings.nat_rand_port:
            settings.nat_rand_port = False
            inside = f" will grant access to: '{message.nat}'" if message.nat else ""
            say(f"[+] Randomly assigned port '{settings.nat_port}' on: '{message.text}'{inside}")
        plaintext = encode_message(message, settings.digest_type)
        if settings.mode == GPG:
            data = encrypt_gpg(settings, plaintext, key)
        else:
            data = encrypt_salted(settings.mode, key or b"", os.urandom(SALT_LENGTH), plaintext)
        packet = seal(data, hmac_key, settings.hmac_type)
        check_length(packet, message, settings.digest_type, self.tag_length, settings.mode)
        if settings.save_packet is not None:
            write_private(settings.save_packet, packet + "\n",
                          os.O_APPEND if settings.save_append else os.O_TRUNC)
            settings.save_append = True  # the packet for the next address follows it
        return packet, format_dump(message, plaintext, settings, packet, self.tag_length) if (
            settings.test or settings.verbose) else ""

    def show(self) -> None:
        """Print the sequence and a packet, and send nothing (-T)."""
        settings = self.settings
        for protocol, number in settings.sequence or ():
            say(f"would hit {protocol} {settings.server or ''}:{number}")
        if not settings.only_knocks:
            links = open_links(self.host, self.send_to)
            link = next(links) if self.send_to else None
            packet, dump = self.build(choose_address(settings, link), link)
            is_http, request = settings.protocol == "http", ""
            if is_http and settings.verbose and settings.server:
                request = "\n" + decode_text(encode_http(settings, packet)).replace("\r", "")
            say(f"{dump}{request}\n{'T' if is_http else 't'}est mode enabled, "  # as in fwknop
                "SPA packet not actually sent.")
            if settings.verbose:  # fwknop decodes its packet for the last dump; ours has no need
                body = packet[:len(packet) - self.tag_length]
                say("send_spa_packet: bytes sent: 0\n\nDump of the Decoded Data\n"
                    + dump[:-len(dump.partition(packet)[2])].replace(packet, body) + "\n")

    def silence(self, host: str, why: str = "it does not know these keys; its stanza has no ANSWER"
                " Y, and may have opened all the same") -> SpaError:
        """Return the error that no answer came."""
        return SpaError(f"{host}: no answer", f"perhaps udp/{self.port} can't be reached, or no"
                        f" server runs there; {why}; or a clock is wrong: {our_clock()}")

    def confirm(self) -> None:
        """Hear the answers; raise SpaError unless the server did as asked at one address."""
        self.answers.gather(self.settings.answer or 0)
        if not self.answers.told:
            raise self.silence(self.host)
        for refusal in self.answers.refusals(unanimous=True):
            raise SpaError(refusal)
        for refusal in self.answers.refusals(unanimous=False):
            warn(refusal)

    def begin(self, addresses: "List[Address]") -> None:
        """Begin connections before the knock: one that succeeds at once needed none.

        Their SYNs are at most 20 ms ahead of the knock; before a sequence, which no SYN may cross,
        they have 250 ms to be answered.
        """
        self.begun, alone = time.monotonic(), bool(self.settings.sequence)
        for family, address in addresses:
            try:
                self.early[open_socket(family, address, False, 0)] = TRY_SECONDS
            except OSError:
                pass  # it is tried again after the knock
        ready = wait_ready((), self.early, TRY[alone]) if addresses else set()
        for link in self.early.keys() - ready if alone else ():
            del self.early[link]
            link.close()

    def wait(self, peer: "Tuple[str, int]", addresses: "List[Address]") -> "socket.socket":
        """Return the connection to this host and TCP port; raise SpaError if it does not open."""
        begin, settings = time.monotonic(), self.settings
        seconds = settings.wait or WAIT_SECONDS
        link, error = wait_until_open(addresses, seconds, self.send, self.answers,
                                      bool(settings.sequence), self.early)
        now = time.monotonic()
        early = link is not None and link in self.early and now - self.begun < SYN_SECONDS
        if link is not None and settings.wait is not None:
            self.early.pop(link, None)  # it is the caller's now
            self.answers.gather(settings.answer or TRY[early])  # the server opens, then it answers
        if not self.answers.told and not settings.unanswered():
            keep(ODD if early or link is None else FACT,
                 settings.label + with_hint(self.silence(self.host)))
        if link is None:
            raise SpaError((self.answers.refusals(unanimous=True) or [
                f"tcp/{peer[1]} of {peer[0]} did not open in {seconds} seconds:"
                f" {self.explain(error, addresses)}"])[0])
        for refusal in self.answers.refusals(unanimous=False):
            warn(refusal)
        if settings.wait is not None:
            self.report(f"tcp/{peer[1]} of {link.getpeername()[0]} " + (
                OPEN_ALREADY if early else f"opened after {now - begin:.2f} seconds"))
        return link

    def explain(self, error: int, addresses: "List[Address]") -> str:
        """Return why none of these addresses took a connection; `error` is an errno or 0."""
        import errno
        knocked = {"IPv6" if ":" in (peer[0] if own == SOURCE_ADDRESS else own) else "IPv4"
                   for peer, own in self.chosen.items()}
        waited = {"IPv6" if ":" in address[0] else "IPv4" for _, address in addresses}
        if knocked and knocked.isdisjoint(waited) and not self.settings.http_proxy:
            return (f"the knock was for {knocked.pop()}, and the wait went by {waited.pop()}, for"
                    " which it may be closed: -4, -6 or -a choose")
        if error:
            return os.strerror(error) if error != errno.ECONNREFUSED else (
                "connections are refused. The port may be open, but no service listens on it")
        for is_done, text in self.answers.told.values():
            if is_done:
                return (f"nothing answers, but the server says: {text}. Another firewall drops it,"
                        " or it opened for another address than ours")
        return ("nothing answers. The server rejected the knock (its log says why), opened for"
                " another address than ours, does not get our packets, or a clock is wrong: "
                + our_clock())

    def close(self) -> None:
        """Close what still waits for an answer."""
        for link in [*self.early, *self.answers.links]:
            link.close()


class OspaKnock(Knock):
    """A knock by OpenSPA: the server answers for how long it is open."""

    again = 0.0  # when it may be closed again

    def build(self, allow_ip: str, link: "Any") -> "Tuple[str, str]":
        """Make a fresh request for each entry of -A, and return their dump."""
        self.requests = [OspaRequest(self.settings, access, allow_ip, link.getpeername()[0])
                         for access in (self.settings.access or "").split(",")]
        return "", "\n".join(request.dump for request in self.requests)

    def deliver(self, link: "socket.socket", packet: str) -> int:
        """Send the requests, and say for how long it is open; raise SpaError without an answer."""
        host = str(link.getpeername()[0])
        for request in self.requests:
            seconds = request.ask(link, self.settings.answer or OSPA_TRIES)
            if not seconds:
                raise self.silence(host, f"it does not know the key of {request.uuid}, or"
                                   f" allow {request.access} for {request.client} (NAT? -R, -a)")
            self.again = time.monotonic() + seconds
            self.answers.told[host] = True, f"opened {request.access} for {seconds} seconds"
            if self.first:
                self.answers.report(f"{host}: {self.answers.told[host][1]}")
        return sum(len(request.datagram) for request in self.requests)

    def send(self) -> None:
        """Knock, unless it is open: an answer leaves no doubt."""
        if time.monotonic() >= self.again:
            super().send()


def knock_at_all(several: "List[Settings]", operands: "List[str]", command: "List[str]",
                 sent: "Callable[[], None]") -> "Optional[socket.socket]":
    """Knock at each server; return the connection to relay, for which only the last knock waits.

    With several servers an error is printed at once, and the next server has its turn. `sent` is
    called after each knock, before the wait for its port.
    """
    peers = [find_wait_peer(settings, operands, command) for settings in several]
    failed, link = 0, None  # type: int, Optional[socket.socket]
    for settings, peer in zip(several, peers):
        if settings.relay and settings is not several[-1]:
            peer = None
        knock = (OspaKnock if settings.ospa else Knock)(settings)
        try:
            addresses = find_addresses(*peer, settings.ip_version) if peer else []
            knock.prepare()
            knock.listens |= peer is not None
            if settings.test:
                knock.show()
            else:
                early = settings.wait is not None and not (settings.relay or settings.execute)
                knock.begin(addresses if early else [])
                knock.send()
            sent()
            if peer is not None:
                link = knock.wait(peer, addresses)
            elif knock.listens and not settings.unanswered():
                knock.confirm()
        except SpaError as error:
            line = settings.label + with_hint(error)
            if not keep(WRONG, line):
                if len(several) == 1:
                    raise
                tell(line)
                failed += 1
        finally:
            knock.close()
        if link is not None and not settings.relay:
            link.close()
    if failed:
        raise SpaError(f"{failed} of {len(several)} knocks failed")
    return link


def read_settings(given: "Dict[str, Given]") -> "List[Settings]":
    """Return the settings for each stanza of -n, or without -n those for the only server."""
    named = given.get("named_config")
    names = [name.strip() for name in named.text.split(",")] if named else []
    if named and "" in names:
        raise UsageError("-n: expected the name of a stanza, or several with commas in between,"
                         f" not '{named.text}'")
    layers = [dict(given, named_config=Given(name, "-n")) for name in names] or [given]
    return [Settings(merge(read_layers(layer) + [layer]), f"[{name}] " if names[1:] else "")
            for name, layer in zip(names or [""], layers)]


def do_locally(given: "Dict[str, Given]", operands: "List[str]", as_knock: bool) -> bool:
    """Do what an option asks for without a packet, and return True; False if none does."""
    tasks: "Dict[str, Callable[[], None]]" = {
        "help": lambda: say(format_help(as_knock)), "version": print_version,
        "man": lambda: say(format_man()),
        "completion": lambda: say(format_completion(given["completion"].text)),
        "print_launcher": lambda: say(launcher("/usr/local/bin/spa_client")),
        "stanza_list": lambda: print_stanzas(given),
        "print_ssh_config": lambda: print_ssh_config(given),
        "import": lambda: import_stanzas(given, operands)}
    asked = [do for name, do in tasks.items() if name in given]
    for do in asked[:1]:
        do()
    return bool(asked)


def run(arguments: "List[str]", as_knock: bool) -> bool:
    """Do the task of a command line, or raise SpaError; return whether a packet was sent."""
    given, operands, command = (parse_knock_line if as_knock else parse_command_line)(arguments)
    if "knock" in given and not as_knock:
        raise UsageError("--knock: expected before all other options")
    Notes.wanted, Notes.unsaid = given.keys().isdisjoint(("quiet", "check")), ""
    Notes.found = {} if "check" in given else None
    saved = given["save_args_file"].text if "save_args_file" in given else home_file(
        given, ".fwknop.run")
    if "last_command" in given or "show_last" in given:
        if saved is None:
            raise UsageError("-l needs a home directory, or -E")
        try:
            kept = split_arguments(read_private(saved))
        except ConfigError as error:
            raise ConfigError(f"Could not open args file: {error}", error.hint) from None
        if "show_last" in given:
            say("Last fwknop client command line: " + format_arguments(parse_command_line(kept)[0]))
            return False
        given, operands, command = parse_command_line(kept + arguments)
        if "VERBOSE" in given:
            say("Executing: " + format_arguments(parse_command_line(kept)[0]))
    if not do_locally(given, operands, as_knock):
        several = read_settings(given)
        first = several[0]  # values that only the command line sets are the same in all of them
        if operands and not first.relay:
            warn(with_hint(SpaError(f"{len(operands)} of the arguments belong to no option and are"
                                    " ignored", hint_at_stanzas(given, operands))))
        if first.key_gen or first.key_gen_file is not None:
            generate_keys(first, given)
            return False
        for settings in several:
            use_ospa(settings)
            settings.check(lambda: hint_at_stanzas(given, operands))
            draw_ports(settings)
            settings.save_append |= settings is not first  # -B keeps the packets of all
            if settings.diagnose:
                settings.answer = settings.answer or 3
                settings.wait = settings.wait or (3 if find_port(settings) else None)
        if first.save_stanza:
            for name, value in save_stanza(given, first.force_stanza)[1].items():
                if first.verbose:
                    say(f"add_single_var_to_rc() : Updating param ({DIRECTIVE_NAMES.index(name)}) "
                        f"{name} to {'a new key' if name in SECRET_NAMES else value}")
        keeps = not first.test or ("save_args_file" in given and "last_command" not in given)
        path = None if not keeps or first.no_save_args or first.diagnose else saved
        link = knock_at_all(several, operands, command, lambda: save_arguments(given, path))
        if Notes.found is not None:
            print_found(Notes.found, rc_path(given), first.quiet)
        if link is not None and first.relay:
            os._exit(relay(link))
        if command:
            become(command)
        return not first.test
    return False


def main(argv: "Optional[List[str]]" = None) -> int:
    """Run a command line and return the exit code; only here errors become one."""
    arguments = sys.argv[1:] if argv is None else argv
    as_knock = os.path.basename(sys.argv[0]) == "knock" or arguments[:1] == ["--knock"]
    try:
        sent = run(arguments, as_knock)
        if Notes.unsaid and not sent:
            raise SpaError("standard output: " + Notes.unsaid)
        return 0
    except SpaError as error:
        tell(with_hint(error))
        return (1 if as_knock else 2 if isinstance(error, UsageError) else
                3 if isinstance(error, ConfigError) else 1)
    except (OSError, ValueError, ArithmeticError) as error:
        tell(explain(error))
        return 1
    except KeyboardInterrupt:
        tell("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
