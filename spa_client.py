#!/usr/bin/env python3
"""spa_client.py: knock at a firewall with one encrypted, authenticated packet.

It speaks fwknop's single packet authorization (SPA), reads ~/.fwknoprc and takes the options of
`fwknop`: where that command runs, this file can stand in for it, with nothing but Python 3.6 or
later. A knock is a UDP datagram to each address of the server; for it, no root is needed and no
program is started. Only what you ask for goes further: other carriers (the raw ones need root),
gpg for GPG, a web server, wget or a STUN server for our address, the command behind --exec. It
writes the files that you name, ~/.fwknoprc for --save-rc-stanza, and after a knock its options,
without keys, to ~/.fwknop.run for -l, unless --no-save-args is given.

It also hits ports in their order, as `knock` does for knockd: with KNOCK_SEQUENCE before it sends
the packet, or instead of one if there are no keys. --knock takes the command line of `knock`, as
this file does when it is started through a link of that name.

Comments cite tests/spec/fwknop.md and tests/spec/knockd.md by section. These files describe the
formats and the behaviour of fwknop and knockd.

The way of a packet:

  * The command line is read with the table of options, and ~/.fwknoprc with the table of
    directives. An option is a directive said on the command line: built-in defaults give way
    to the [default] stanza, that to the stanza named with -n, and that to the command line.
  * The two keys come from there, from key files, or from a prompt.
  * The server's name is looked up, and for each of its addresses, IPv4 and IPv6, what follows is
    done once: a server takes the same packet for a replay the second time.
  * The ports of KNOCK_SEQUENCE are hit, at one address after the other.
  * A socket is connected (UDP: nothing is sent by that).
  * The address to open for is what -a or -s say, or the socket's own address, but only if the
    server must see the same one: no NAT can be in between.
  * The message says who asks, when, and for which ports; a digest is put behind it.
  * Both are encrypted with AES-256 or by gpg, and an HMAC is put behind the cipher text.
  * The packet is checked once more for its length, and sent.
  * With --wait, --proxy or --exec the TCP port is tried until it opens, with a fresh knock every
    second or three; then its connection is relayed, or a command takes the place of this program.

Contents. Sections 1 to 10 only compute: text, bytes and time in, values out, with a warning here
and there. Sections 11 to 17 touch the machine: files, terminal, programs, network, standard output.

  1. Errors
  2. Bytes and digests
  3. AES (FIPS 197)
  4. Encryption of a packet
  5. Message and packet
  6. Carriers
  7. Values
  8. Directives
  9. Options
  10. The rc file
  11. Files and keys
  12. Programs
  13. Network
  14. Own address
  15. After the knock
  16. Output
  17. Run

Exit codes: 0 the packet was sent (or what else was asked for is done); 1 it was not, or the port
did not open; 2 wrong usage; 3 a file can't be used; 130 interrupted. fwknop knows only 0 and 1.
--exec ends with the code of its command. As `knock`: 1 for all that is wrong.
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
    Address = Tuple[int, Tuple[Any, ...]]  # a family, and what connect() takes there
else:
    try:
        import _socket as socket  # an eighth of the price of `socket`, and all that is needed
        import _struct as struct
    except ImportError:
        import socket
        import struct

VERSION = "0.1.0"
PROTOCOL_VERSION = "3.0.0"

# ======================================================================================
# 1. Errors
#
# What can go wrong, and the exit code of each. No error carries a key.
# ======================================================================================


# --- shared: errors -- the same text in spa_server.py, spa_client.py and keygen.py --


class SpaError(Exception):
    """An error that the administrator is told in one line; `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def explain(error: Exception, name: str = "") -> str:
    """Return an error as a line for the administrator, `name: reason`.

    Without a name, an OSError has that of its file, or else the line of this script.
    """
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


def complaint(error: SpaError) -> str:
    """Return an error with its hint, in one line."""
    return f"{error} ({error.hint})" if error.hint else str(error)


# ======================================================================================
# 2. Bytes and digests
#
# Base64 as fwknop writes it, the seven digests and HMAC.
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
    """Base64 of RFC 4648 section 4 without the `=` at the end (tests/spec/fwknop.md 1.1)."""
    return binascii.b2a_base64(data, newline=False).decode("ascii").rstrip("=")


def decode_base64(text: str) -> bytes:
    """The bytes behind base64 `text`, with its `=` or without; ValueError when it is none."""
    digits = text.rstrip("=")
    if len(digits) % 4 == 1 or digits.strip(
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"):
        raise ValueError("expected base64")
    return binascii.a2b_base64(digits + "=" * (-len(digits) % 4))


def encode_text(text: str) -> bytes:
    """The bytes that a word of the command line or of a file was made of."""
    return text.encode(sys.getfilesystemencoding(), "surrogateescape")


def decode_text(data: bytes) -> str:
    """The text of a file, of which encode_text() makes the same bytes again."""
    return data.decode(sys.getfilesystemencoding(), "surrogateescape")


# ======================================================================================
# 3. AES (FIPS 197)
#
# The block cipher, and how a secret becomes key and IV. It is written here because Python's
# library has none, and importing a package for six blocks costs more than encrypting them.
# ======================================================================================

# --- shared: aes -- the same text in spa_server.py and spa_client.py --


class AesTables:
    """The S-box of FIPS 197 section 5.1.1, and tables that join SubBytes and MixColumns.

    columns[i][x] is column i of the MixColumns matrix times S(x), a 32-bit word with row 0 on top:
    a round is then sixteen look-ups and xors. The time of a look-up depends on key and caches, as
    in every AES made of tables.
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

    tables = None  # type: Optional[AesTables]

    def __init__(self, key: bytes) -> None:
        if Aes.tables is None:
            Aes.tables = AesTables()  # half a millisecond: not before somebody needs it
        self.box, self.columns = Aes.tables.box, Aes.tables.columns
        self.words = self.expand(key)

    def expand(self, key: bytes) -> "List[int]":
        """Return the round keys of section 5.2, four words each."""
        words = list(struct.unpack(">%dI" % (len(key) // 4), key))
        length, constant, box = len(words), 1, self.box
        for i in range(length, 4 * (length + 7)):
            word = words[-1]
            if i % length == 0:
                word = (word << 8 | word >> 24) & 0xFFFFFFFF
            if i % length == 0 or (length > 6 and i % length == 4):
                word = (box[word >> 24] << 24 | box[word >> 16 & 255] << 16
                        | box[word >> 8 & 255] << 8 | box[word & 255])
            if i % length == 0:
                word ^= constant << 24
                constant = constant << 1 ^ (0x11B if constant & 0x80 else 0)
            words.append(words[-length] ^ word)
        return words

    def encrypt_block(self, block: bytes) -> bytes:
        """Encrypt 16 bytes: Cipher() of section 5.1."""
        a, b, c, d = struct.unpack(">4I", block)
        return struct.pack(">4I", *self.rounds(self.columns, self.box, self.words, a, b, c, d))

    @staticmethod
    def rounds(columns: "List[List[int]]", box: bytes, k: "List[int]",
               a: int, b: int, c: int, d: int) -> "Tuple[int, int, int, int]":
        """Do all rounds over the four columns a, b, c, d of the state, with the round keys `k`."""
        t0, t1, t2, t3 = columns
        a, b, c, d = a ^ k[0], b ^ k[1], c ^ k[2], d ^ k[3]
        for i in range(4, len(k) - 4, 4):
            a, b, c, d = (
                t0[a >> 24] ^ t1[b >> 16 & 255] ^ t2[c >> 8 & 255] ^ t3[d & 255] ^ k[i],
                t0[b >> 24] ^ t1[c >> 16 & 255] ^ t2[d >> 8 & 255] ^ t3[a & 255] ^ k[i + 1],
                t0[c >> 24] ^ t1[d >> 16 & 255] ^ t2[a >> 8 & 255] ^ t3[b & 255] ^ k[i + 2],
                t0[d >> 24] ^ t1[a >> 16 & 255] ^ t2[b >> 8 & 255] ^ t3[c & 255] ^ k[i + 3])

        def last(a: int, b: int, c: int, d: int) -> int:  # without MixColumns
            return (box[a >> 24] << 24 | box[b >> 16 & 255] << 16
                    | box[c >> 8 & 255] << 8 | box[d & 255])

        return (last(a, b, c, d) ^ k[-4], last(b, c, d, a) ^ k[-3],
                last(c, d, a, b) ^ k[-2], last(d, a, b, c) ^ k[-1])


def bytes_to_key(md5: "Callable[[bytes], bytes]", secret: bytes,
                 salt: bytes) -> "Tuple[bytes, bytes]":
    """Return the AES-256 key and the IV that OpenSSL's EVP_BytesToKey makes, with MD5 and count 1.

    `openssl enc -md md5` does the same. `md5` returns the digest of its argument.
    """
    first = md5(secret + salt)
    second = md5(first + secret + salt)
    return first + second, md5(second + secret + salt)


# --- end shared: aes --

# ======================================================================================
# 4. Encryption of a packet
#
# The modes of NIST SP 800-38A as fwknop uses them, and the container of `openssl enc`.
# Only encryption: this program never reads a packet.
# ======================================================================================

BLOCK = 16  # bytes of a block of AES
KEY_LIMIT = 32  # bytes of an encryption key
LEGACY_KEY_LENGTH = 16
HMAC_KEY_LIMIT = 128  # bytes of an HMAC key
SALT_LENGTH = 8
SALTED = b"Salted__"  # what `openssl enc` begins with
PREFIX = "U2FsdGVkX1"  # base64 of SALTED, as far as the salt has no part in it: not transmitted

# Encryption mode, by its name, and its number in the dump (tests/spec/fwknop.md 1.7).
GPG = "Asymmetric"
MODES = {"CBC": 2, "ECB": 1, "CFB": 3, "OFB": 5, "CTR": 6, "legacy": 8, GPG: 7}


def encrypt_blocks(mode: str, key: bytes, iv: bytes, blocks: bytes) -> bytes:
    """Encrypt whole blocks with a key of AES (SP 800-38A section 6.1 to 6.5).

    CFB feeds back all 128 bits, CTR counts the 16 bytes of the IV as one big-endian number.
    """
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


def exclusive_or(left: bytes, right: bytes) -> bytes:
    """Two blocks added bit by bit."""
    return bytes(one ^ other for one, other in zip(left, right))


def encrypt_salted(mode: str, secret: bytes, salt: bytes, plaintext: bytes) -> bytes:
    """`Salted__`, the salt and the cipher text, like `openssl enc -md md5` (fwknop.md 1.7).

    PKCS#7 padding is added in every mode, also in those that need none. Legacy mode is CBC with
    a secret of exactly 16 bytes: cut, or filled with the digit 0.
    """
    if mode == "legacy":
        secret = secret[:LEGACY_KEY_LENGTH].ljust(LEGACY_KEY_LENGTH, b"0")
    key, iv = bytes_to_key(DIGESTS["MD5"], secret, salt)
    padding = BLOCK - len(plaintext) % BLOCK
    blocks = plaintext + bytes([padding]) * padding
    return SALTED + salt + encrypt_blocks(mode, key, iv, blocks)


# ======================================================================================
# 5. Message and packet
#
# The text that asks (tests/spec/fwknop.md 1.2 to 1.6) and the packet it becomes (1.1, 1.8, 1.11).
# ======================================================================================

COMMAND, ACCESS, NAT_ACCESS, TIMEOUT_ACCESS, TIMEOUT_NAT_ACCESS, LOCAL_NAT, TIMEOUT_LOCAL_NAT = \
    range(7)
MESSAGE_TYPES = (
    "Command msg", "Access msg", "NAT access msg", "Client timeout access msg",
    "Client timeout NAT access msg", "Local NAT access msg", "Client timeout local NAT access msg")

SOURCE_ADDRESS = "0.0.0.0"  # in a message: the address the packet comes from
USER_LIMIT = 48  # bytes of a user name: 64 of base64
OPTION_USER_LIMIT = 29  # bytes that fwknop keeps of -U
TIMEOUT_LIMIT = 65536  # seconds
PACKET_LIMIT = 400  # characters: from here on servers take a packet for one of GPG (fwknop.md 1.9)
GPG_LIMIT = 1500  # characters: more is not looked at (tests/spec/fwknop.md 1.10)
FIELD_LIMIT = 192  # bytes in a field of the message: 256 of base64 (tests/spec/fwknop.md 1.10)
GPG_PREFIX = "hQ"  # base64 of what a packet for an RSA key begins with: not transmitted


class Message:
    """The fields of tests/spec/fwknop.md 1.2, without the digest and what is never sent.

    `random` is 16 digits, `timestamp` seconds since 1970, `number` one of the seven types, `text`
    "address,access" or "address,command". `nat` has to be given for types 2, 4, 5 and 6 alone, and
    `timeout` (seconds) for 3, 4 and 6; that of a command is not sent.
    """

    def __init__(self, random: str, user: str, timestamp: int, number: int, text: str,
                 nat: str = "", timeout: int = 0) -> None:
        self.random, self.user, self.timestamp, self.number = random, user, timestamp, number
        self.text, self.nat, self.timeout = text, nat, timeout


def encode_message(message: Message) -> bytes:
    """The message M of tests/spec/fwknop.md 1.1: the fields in their order with `:` in between."""
    fields = [message.random, encode_base64(encode_text(message.user)), str(message.timestamp),
              PROTOCOL_VERSION, str(message.number), encode_base64(encode_text(message.text))]
    if message.nat:
        fields.append(encode_base64(encode_text(message.nat)))
    if message.timeout and message.number != COMMAND:
        fields.append(str(message.timeout))
    return ":".join(fields).encode("ascii")


def message_digest(message: bytes, digest_type: str) -> str:
    """The digest D that stands behind the message (tests/spec/fwknop.md 1.6)."""
    return encode_base64(DIGESTS[digest_type](message))


def add_digest(message: bytes, digest_type: str) -> bytes:
    """The plain text P of tests/spec/fwknop.md 1.1."""
    return message + b":" + message_digest(message, digest_type).encode("ascii")


def seal(data: bytes, hmac_key: "Optional[bytes]", hmac_type: str) -> str:
    """The packet of fwknop.md 1.1 with this cipher text; without `hmac_key` there is no HMAC.

    The HMAC also covers the prefix, which is not transmitted. OpenPGP data for other than RSA keys
    begins otherwise, is sent whole, and not understood by fwknopd.
    """
    text, tag = encode_base64(data), ""
    if hmac_key is not None:
        tag = encode_base64(Hmac(DIGESTS[hmac_type], hmac_key)(text.encode("ascii")))
    prefix = PREFIX if text.startswith(PREFIX) else GPG_PREFIX
    return (text[len(prefix):] if text.startswith(prefix) else text) + tag


def check_length(packet: str, message: Message, digest_type: str, tag_length: int,
                 mode: str) -> None:
    """Raise SpaError for a packet that servers would not understand (fwknop.md 1.9, 1.10)."""
    if mode == GPG:
        if len(packet) > GPG_LIMIT:
            raise SpaError("the packet would be %d characters long, and servers look at most at %d"
                           % (len(packet), GPG_LIMIT), "use GPG keys of less than 4096 bits")
        if len(encode_text(message.text)) > FIELD_LIMIT:
            raise SpaError("address and what is asked for are %d characters, and servers understand"
                           " at most %d" % (len(message.text), FIELD_LIMIT))
    elif len(packet) >= PACKET_LIMIT:
        raise SpaError(
            "the packet would be %d characters long, and servers understand at most %d: address "
            "and %s are %d characters, the user name %d, the digest (%s) %d, the HMAC %d"
            % (len(packet), PACKET_LIMIT - 4, "access list" if message.number else "command",
               len(message.text), len(message.user), digest_type,
               DIGESTS[digest_type].text_size, tag_length),
            "ask for fewer ports at a time, or use a shorter digest")


# ======================================================================================
# 6. Carriers
#
# What stands around a packet on the wire when it does not travel as a plain UDP datagram or over
# TCP (tests/spec/fwknop.md 1.14): an HTTP request, or the headers of a packet made here.
# ======================================================================================

AGENT = "Fwknop/2.6.10"  # fwknopd wants it to begin so; the rest is that of fwknop's client
CARRIERS = ("udp", "udpraw", "tcp", "tcpraw", "http", "icmp")
RAW_CARRIERS = ("udpraw", "tcpraw", "icmp")
ICMP_ECHO = 8


def encode_request(target: str, host: str, agent: str) -> bytes:
    """A GET of HTTP/1.1 (RFC 9112), after which the connection is closed."""
    return encode_text(f"GET {target} HTTP/1.1\r\nUser-Agent: {agent}\r\nAccept: */*\r\nHost: {host}\r\n"
                       "Connection: close\r\n\r\n")


def put_checksum(data: bytes, place: int, pseudo: bytes = b"") -> bytes:
    """The data with the Internet checksum of RFC 1071, also over a pseudo header, at its place.

    Two zero bytes must be there. The sum is never 0, which in UDP would mean that there is none
    (RFC 768); to the others 0xFFFF is the same number.
    """
    words = pseudo + data + b"\0" * (len(data) % 2)
    total = sum(struct.unpack(">%dH" % (len(words) // 2), words))
    total = (total & 0xFFFF) + (total >> 16)
    sum_ = ~(total + (total >> 16)) & 0xFFFF
    return data[:place] + struct.pack(">H", sum_ or 0xFFFF) + data[place + 2:]


def encode_raw(carrier: str, payload: bytes, addresses: bytes,
               ports: "Tuple[int, int]", icmp: "Tuple[int, int]" = (0, 0)) -> bytes:
    """An IPv4 packet (RFC 791): ICMP (RFC 792), UDP (RFC 768) or a SYN of TCP (RFC 9293).

    `addresses` are source and destination, `icmp` type and code. An echo request has the source
    port for its identifier. The checksums are right; fwknop leaves those of UDP and TCP 0.
    """
    if carrier == "icmp":
        protocol, place = 1, 2
        number = (ports[0], 1) if icmp[0] == ICMP_ECHO else (0, 0)
        header = struct.pack(">BBHHH", *icmp, 0, *number)
    elif carrier == "udpraw":
        protocol, place = 17, 6
        header = struct.pack(">HHHH", *ports, 8 + len(payload), 0)
    else:  # sequence number 1, header of 5 words, SYN, window 32767, as fwknop has them
        protocol, place = 6, 16
        header = struct.pack(">HHIIBBHHH", *ports, 1, 0, 5 << 4, 2, 32767, 0, 0)
    segment = header + payload
    pseudo = addresses + struct.pack(">HH", protocol, len(segment)) if protocol != 1 else b""
    outer = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 255, protocol, 0)
    return put_checksum(outer + addresses, 10) + put_checksum(segment, place, pseudo)


# ======================================================================================
# 7. Values
#
# From text to the value of a directive or option. Each parse_ function raises ValueError with
# what it expected; who calls it adds where the text stood, and the text if it is no secret.
# ======================================================================================

RESOLVE = "resolve"  # in place of an address to open for: ask a server on the Internet for ours
STUN, STUN_PORT = "stun:", 3478  # the same, followed by host, or host and port, of a STUN server


def parse_text(text: str) -> str:
    """Any text but none."""
    if not text:
        raise ValueError("expected a value")
    return text


def parse_yes_no(text: str) -> bool:
    """Y or N, or how much: VERBOSE may count."""
    if text.upper() not in ("Y", "N", "YES", "NO", "0", "1", "2", "3"):
        raise ValueError("expected Y or N")
    return text[0] not in "nN0"


def is_decimal(text: str) -> bool:
    """Whether it is a number of one to nine digits, and nothing else."""
    return 0 < len(text) < 10 and not text.strip("0123456789")


def number_parser(low: int, high: int, what: str) -> "Callable[[str], int]":
    """A parse_ function for decimal numbers; `what` says in an error what they count."""
    def parse(text: str) -> int:
        if not is_decimal(text) or not low <= int(text) <= high:
            raise ValueError("expected %s, %d to %d" % (what, low, high))
        return int(text)
    return parse


parse_port = number_parser(1, 65535, "a port number")


def parse_offset(text: str) -> int:
    """Seconds from `90`, `90s`, `5m`, `2hours` or `1d`, with `-` in front or not."""
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    unit = digits.lstrip("0123456789")
    count = digits[:len(digits) - len(unit)]
    factor = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}.get(unit[:1].lower())
    if not is_decimal(count) or factor is None:
        raise ValueError("expected a time such as 90, 90s, 5m, 2h or 1d")
    return sign * int(count) * factor


def choice_parser(names: "Iterable[str]") -> "Callable[[str], str]":
    """A parse_ function for one of some names, in any case."""
    def parse(text: str) -> str:
        for name in names:
            if text.lower() == name.lower():
                return name
        raise ValueError("expected one of " + " ".join(names))
    return parse


parse_digest = choice_parser(DIGESTS)
parse_mode = choice_parser(MODES)
parse_carrier = choice_parser(CARRIERS)


def parse_printable(text: str) -> str:
    """Text in one line."""
    if not text.strip() or min(text) < " " or "\x7f" in text:
        raise ValueError("expected text without control characters")
    return text


def parse_place(text: str, port: int = 0) -> "Tuple[str, int]":
    """Host and port of `host`, `host:9`, `host,9` or `[IPv6]:9`; where none is there, this port."""
    host, mark, digits = text.rpartition("," if "," in text else ":")
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
    """Host and port of an HTTP proxy, as parse_place(), or with `http://` in front."""
    return parse_place(text[7:].rstrip("/") if text.startswith("http://") else text)


def parse_url(text: str) -> "Tuple[str, str, int, str]":
    """A URL of HTTP or HTTPS without user name: itself, host, port and path."""
    scheme, _, rest = text.partition("://")
    place, _, path = rest.partition("/")
    path = "/" + path
    if scheme not in ("http", "https") or min(path) < "!" or max(path) > "~":
        raise ValueError("expected a URL that begins with https:// or http://")
    return (text,) + parse_place(place, 443 if scheme == "https" else 80) + (path,)


def parse_access(text: str) -> str:
    """An access list, `tcp/22` or `tcp/22,udp/53`, as the server reads it (fwknop.md 1.4)."""
    for entry in text.split(","):
        protocol, slash, port = entry.partition("/")
        if protocol not in ("tcp", "udp") or not slash or len(port) > 5:
            raise ValueError("expected tcp/PORT or udp/PORT, several with commas in between")
        parse_port(port)
    return text


PING_BYTES = 56  # in an echo request of any length, as in that of `ping`
MAX_PING_BYTES = 1452  # those of a longer one come in fragments, which the server does not count


def parse_hits(text: str) -> "List[Tuple[str, int]]":
    """Protocols and ports of `7000, ssh, 8000:udp`; of `100:icmp` or `:icmp` the data bytes.

    The sequence is half a secret: no error tells it. For the server, too, there are at most 32
    (tests/spec/knockd.md 1.2).
    """
    hits = []
    for number, item in enumerate(text.split(","), 1):
        port, colon, protocol = item.lstrip(" ").partition(":")
        protocol = protocol.lower() if colon else "tcp"
        try:
            if protocol == "icmp":
                where = number_parser(0, MAX_PING_BYTES, "bytes")(port) if port else PING_BYTES
            elif protocol not in ("tcp", "udp"):
                raise ValueError
            else:
                where = parse_port(port) if is_decimal(port) else socket.getservbyname(
                    port, protocol)
        except (OSError, ValueError):
            raise ValueError("number %d of the ports: expected PORT, PORT:udp or BYTES:icmp, PORT "
                             "from 1 to 65535 or the name of a service, BYTES up to 1452"
                             % number) from None
        hits.append((protocol, where))
    if len(hits) > 32:
        raise ValueError("expected at most 32 ports")
    return hits


def parse_delay(text: str) -> "Tuple[int, int]":
    """The least and the most milliseconds of `100` or `100-300`."""
    least, dash, most = text.partition("-")
    parse = number_parser(0, 60000, "milliseconds such as 100, or a range such as 100-300")
    if parse(most if dash else least) < parse(least):
        raise ValueError("expected the lower number first")
    return parse(least), parse(most if dash else least)


def parse_address(text: str) -> str:
    """An IPv4 or IPv6 address, in the form servers expect."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        return socket.inet_ntop(family, socket.inet_pton(family, text))
    except (OSError, ValueError):
        raise ValueError("expected an IPv4 or IPv6 address") from None


def parse_spoof(text: str) -> str:
    """An address to send from."""
    if ":" in text:
        raise ValueError("expected an IPv4 address")
    return parse_address(text)


def parse_allow(text: str) -> str:
    """Whom to open for: an address, `source`, `resolve`, or `stun:` and a server to ask."""
    if text.lower() == "source":
        return SOURCE_ADDRESS
    if text.startswith(STUN):
        parse_place(text[len(STUN):], STUN_PORT)
        return text
    return RESOLVE if text.lower() == RESOLVE else parse_address(text)


def parse_user(text: str) -> str:
    """A user name that servers accept (tests/spec/fwknop.md 1.3)."""
    if not 1 <= len(encode_text(text)) <= USER_LIMIT:
        raise ValueError("expected a user name of 1 to %d characters" % USER_LIMIT)
    if min(text) < " " or max(text) > "~" or set(text) & set('"/\\[]:;|=,+*?<>'):
        raise ValueError('expected a user name in ASCII, without " / \\ [ ] : ; | = , + * ? < >')
    return text


def parse_short_user(text: str) -> str:
    """A user name from option or directive: fwknop keeps 29 characters of it."""
    return parse_user(text[:OPTION_USER_LIMIT])


# ======================================================================================
# 8. Directives
#
# One row per directive of ~/.fwknoprc, in fwknop's order. The rows in lower case at the end can be
# set by options only.
# A value stays text, with its origin, until all layers have been put on each other.
# ======================================================================================


class Given:
    """The text of one value, and where it stood: an option, or with its `line` a file.

    `words` are the option on a command line.
    """

    def __init__(self, text: str, where: str = "", line: int = 0,
                 words: "Tuple[str, ...]" = ()) -> None:
        self.text, self.where, self.line, self.words = text, where, line, words


SECRET = (encode_text, decode_base64, parse_hits)  # what these have parsed is not shown in errors


class Directive:
    """A row of the table: a name, how its text is parsed, what it is for."""

    def __init__(self, name: str, parse: "Callable[[str], Any]", default: "Optional[str]",
                 help: str) -> None:
        self.name, self.parse, self.default, self.help = name, parse, default, help

    def value(self, given: "Optional[Given]") -> "Any":
        """The value to use; SpaError when the text is bad."""
        if given is None:
            return None if self.default is None else self.parse(self.default)
        try:
            return self.parse(given.text)
        except ValueError as problem:
            why = str(problem)
            if self.parse not in SECRET:
                why += f", not '{given.text}'"
            if not given.line:
                raise UsageError(f"{given.where}: {why}") from None
            raise ConfigError(f"{given.where}:{given.line}: {self.name}: {why}") from None


def setting(name: str, parse: "Callable[[str], T]", default: str, help: str) -> "T":
    """A directive with a default; the attribute of an instance of Settings is the parsed value."""
    return Directive(name, parse, default, help)  # type: ignore[return-value]


def optional(name: str, parse: "Callable[[str], T]", help: str) -> "Optional[T]":
    """A directive without a default: None unless it is given."""
    return Directive(name, parse, None, help)  # type: ignore[return-value]


def flag(name: str, help: str) -> bool:
    """A directive that is off unless it is Y."""
    return setting(name, parse_yes_no, "N", help)


class Settings:
    """All that can be said in ~/.fwknoprc (tests/spec/fwknop.md 2.2) and on the command line."""

    digest_type = setting("DIGEST_TYPE", parse_digest, "SHA256", "digest inside the packet")
    protocol = setting("SPA_SERVER_PROTO", parse_carrier, "udp", "carrier of the packet")
    port = setting("SPA_SERVER_PORT", parse_port, "62201", "port of the server")
    source_port = optional("SPA_SOURCE_PORT", parse_port, "source port of the raw carriers")
    timeout = setting("FW_TIMEOUT", number_parser(0, TIMEOUT_LIMIT, "a number of seconds"), "0",
                      "seconds to keep open (0: the server decides)")
    allow_ip = optional("ALLOW_IP", parse_allow, "address to open for")
    time_offset = setting("TIME_OFFSET", parse_offset, "0", "add to the time in the packet")
    mode = setting("ENCRYPTION_MODE", parse_mode, "CBC", "mode of AES")
    use_gpg = flag("USE_GPG", "encrypt with GPG instead of AES")
    gpg_agent = flag("USE_GPG_AGENT", "the gpg-agent knows the passphrase")
    gpg_recipient = optional("GPG_RECIPIENT", parse_text, "the server's GPG key")
    gpg_signer = optional("GPG_SIGNER", parse_text, "our GPG key, to sign with")
    gpg_home = optional("GPG_HOMEDIR", parse_text, "directory of the GPG keys")
    gpg_exe = setting("GPG_EXE", parse_text, "gpg", "the program")
    gpg_passphrase = optional("GPG_SIGNING_PW", encode_text, "passphrase of GPG_SIGNER")
    gpg_passphrase_base64 = optional("GPG_SIGNING_PW_BASE64", decode_base64, "the same in base64")
    gpg_no_passphrase = flag("GPG_NO_SIGNING_PW", "GPG_SIGNER has none")
    user = optional("SPOOF_USER", parse_short_user, "user name in the packet")
    spoof_source = optional("SPOOF_SOURCE_IP", parse_spoof, "source address of the raw carriers")
    access = optional("ACCESS", parse_access, "ports to open, such as tcp/22,udp/53")
    server = optional("SPA_SERVER", parse_text, "the server, a name or an address")
    rand_port = flag("RAND_PORT", "a random port of the server, 10000 and up")
    key = optional("KEY", encode_text, "encryption key")
    key_base64 = optional("KEY_BASE64", decode_base64, "encryption key in base64")
    hmac_type = setting("HMAC_DIGEST_TYPE", parse_digest, "SHA256", "digest of the HMAC")
    hmac_key_base64 = optional("HMAC_KEY_BASE64", decode_base64, "HMAC key in base64")
    hmac_key = optional("HMAC_KEY", encode_text, "HMAC key")
    use_hmac = flag("USE_HMAC", "ask for an HMAC key when none is given")
    use_wget_agent = flag("USE_WGET_USER_AGENT", "let wget name itself")
    key_file = optional("KEY_FILE", parse_text, "file with lines `server: key`")
    hmac_key_file = optional("HMAC_KEY_FILE", parse_text, "file with lines `server: HMAC key`")
    nat_access = optional("NAT_ACCESS", parse_place, "host and port behind the server to open")
    user_agent = setting("HTTP_USER_AGENT", parse_printable, AGENT, "what to be called over HTTP")
    resolve_url = optional("RESOLVE_URL", parse_url, "page that says our address")
    resolve_ipv4 = flag("SERVER_RESOLVE_IPV4", "use IPv4 to the server")
    nat_local = flag("NAT_LOCAL", "the server itself is the NAT's target")
    nat_rand_port = flag("NAT_RAND_PORT", "reach it by a random port")
    nat_port = optional("NAT_PORT", parse_port, "reach it by this port instead of that of ACCESS")
    verbose = flag("VERBOSE", "print what is sent")
    resolve_http = flag("RESOLVE_IP_HTTP", "the same as RESOLVE_IP_HTTPS")
    resolve_https = flag("RESOLVE_IP_HTTPS", "let a web page say our address")
    resolve_http_only = flag("RESOLVE_HTTP_ONLY", "without encryption")
    wget = optional("WGET_CMD", parse_text, "program to ask it with")
    no_save_args = flag("NO_SAVE_ARGS", "do not write ~/.fwknop.run for -l")
    sequence = optional("KNOCK_SEQUENCE", parse_hits,
                        "hit these before the packet; without keys, instead of one")
    delay = setting("KNOCK_DELAY", parse_delay, "50",
                    "milliseconds after a hit, or a range to draw from: 100-300")

    test = flag("test", "print the packet, do not send it")
    quiet = flag("quiet", "print nothing but errors")
    wait = optional("wait", number_parser(1, 86400, "a number of seconds"),
                    "knock until the TCP port answers, at most so long")
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
    save_packet = optional("save_packet", parse_text, "write the packet to this file, too")
    save_append = flag("save_append", "append it to the file of -B")
    save_stanza = flag("save_stanza", "save the options in the rc file")
    force_stanza = flag("force_stanza", "overwrite keys there unasked")
    save_args_file = optional("save_args_file", parse_text, "file for -l instead of ~/.fwknop.run")
    fault_tag = optional("fault_tag", parse_text, "ignored (for tests of fwknop itself)")

    def __init__(self, given: "Dict[str, Given]") -> None:
        self.given = given
        for attribute, row in DIRECTIVES.items():
            setattr(self, attribute, row.value(given.get(row.name)))
        recipient = given.get("GPG_RECIPIENT")
        if self.use_gpg or (recipient is not None and not recipient.line):
            self.mode = GPG
        if self.http_proxy and "SPA_SERVER_PROTO" not in given:
            self.protocol = "http"
        if self.allow_ip is None and (self.resolve_http or self.resolve_https):
            self.allow_ip = RESOLVE
        raw = self.protocol in RAW_CARRIERS
        self.ip_version = {"4": socket.AF_INET, "6": socket.AF_INET6}.get(
            self.family, socket.AF_INET if raw or self.resolve_ipv4 else 0)
        self.verbose = self.verbose and not (self.quiet or self.relay)
        self.only_knocks = self.sequence is not None and not (
            self.mode == GPG or self.stdin or self.fd is not None
            or not given.keys().isdisjoint(PACKET_NAMES))

    def check(self) -> None:
        """Raise UsageError for values that do not go together."""
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
                (self.save_append and self.save_packet is None, "-b needs -B"),
                (self.force_stanza and not self.save_stanza,
                 "--force-stanza needs --save-rc-stanza")):
            if wrong:
                named = self.given.get("named_config")
                raise UsageError((f"[{named.text}] " if named else "") + message)
        if self.source_port and not raw:
            warn("the source port is ignored: it is for raw carriers (-P udpraw)")


DIRECTIVES = {attribute: row for attribute, row in vars(Settings).items()
              if isinstance(row, Directive)}
ROWS = {row.name: row for row in DIRECTIVES.values()}
DIRECTIVE_NAMES = [name for name in ROWS if name.isupper()]

# In one layer the first of these counts (fwknop.md 2.5); one layer hides all of those below.
KEY_SOURCES = (("KEY", "KEY_BASE64", "KEY_FILE"), ("HMAC_KEY", "HMAC_KEY_BASE64", "HMAC_KEY_FILE"),
               ("GPG_SIGNING_PW", "GPG_SIGNING_PW_BASE64"))
SECRET_NAMES = {name for name, row in ROWS.items() if row.parse in SECRET}
PACKET_NAMES = sum(KEY_SOURCES, ("USE_HMAC", "ALLOW_IP"))  # what only packets need


def merge(layers: "List[Dict[str, Given]]") -> "Dict[str, Given]":
    """One layer of values from several, the later ones on top (tests/spec/fwknop.md 2.1)."""
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
# One row per option, from which the parser and --help come. The conventions are those of
# getopt_long: options and other words in any order, `--name value`, `--name=value`, names
# shortened as long as they stay unique, `-pVALUE`, `-Tv`, and `--` to end the options.
# ======================================================================================

# Short, long, argument, the directive it sets, help. The directive gets what stands behind `=`,
# followed by the argument; a help that is missing is that of the directive.
OPTION_TABLE = """
A  access               PORTS     ACCESS
a  allow-ip             ADDRESS   ALLOW_IP
s  source-ip            -         ALLOW_IP=source       for where the packet comes from; -a is safer
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
G  get-key              FILE      KEY_FILE
-  get-hmac-key         FILE      HMAC_KEY_FILE
-  stdin                -         stdin=Y
-  fd                   NUMBER    fd
-  key-rijndael         KEY       KEY                   encryption key (others can see it in `ps`)
-  key-base64-rijndael  BASE64    KEY_BASE64
-  key-hmac             KEY       HMAC_KEY              HMAC key (others can see it in `ps`)
-  key-base64-hmac      BASE64    HMAC_KEY_BASE64
-  use-hmac             -         USE_HMAC=Y
-  hmac-digest-type     NAME      HMAC_DIGEST_TYPE
m  digest-type          NAME      DIGEST_TYPE
M  encryption-mode      NAME      ENCRYPTION_MODE
U  spoof-user           NAME      SPOOF_USER
-  time-offset-plus     TIME      TIME_OFFSET
-  time-offset-minus    TIME      TIME_OFFSET=-         subtract it
k  key-gen              -         key_gen=Y
K  key-gen-file         FILE      key_gen_file
-  key-len              BYTES     key_length
-  hmac-key-len         BYTES     hmac_key_length
T  test                 -         test=Y
q  quiet                -         quiet=Y
-  knock                -         knock=Y               as the first option: be `knock` (--knock -h)
-  knock-sequence       PORTS     KNOCK_SEQUENCE
-  knock-delay          MS        KNOCK_DELAY
-  wait                 SECONDS   wait
-  wait-port            PORT      wait_port
-  proxy                -         relay=Y
-  exec                 -         exec=Y
-  resolve-stun         HOST      ALLOW_IP=stun:        find our address with this STUN server
v  verbose              -         VERBOSE=Y
V  version              -         version=Y             print version and SHA-256 of this file
h  help                 -         help=Y                print this
-  man                  -         man=Y                 print this as a manual page
-  completion           SHELL     completion            print completions for bash, zsh or fish
S  source-port          PORT      SPA_SOURCE_PORT
Q  spoof-source         ADDRESS   SPOOF_SOURCE_IP
-  spoof-src            ADDRESS   SPOOF_SOURCE_IP       as -Q
r  rand-port            -         RAND_PORT=Y
H  http-proxy           HOST:PORT http_proxy
-  icmp-type            NUMBER    icmp_type
-  icmp-code            NUMBER    icmp_code
R  resolve-ip-https     -         ALLOW_IP=resolve      for the address that a web page says we have
-  resolve-ip-http      -         ALLOW_IP=resolve      as -R
-  resolve-http-only    -         RESOLVE_HTTP_ONLY=Y   do that without encryption
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
l  last-cmd             -         last_command=Y        take the options of the last knock as well
-  show-last            -         show_last=Y           print them; keys are never among them
E  save-args-file       FILE      save_args_file
-  no-save-args         -         NO_SAVE_ARGS=Y
-  fault-injection-tag  TAG       fault_tag
"""


# --- shared: options -- the same text in spa_server.py and spa_client.py --


class Option:
    """A row of an option table: letter, long name, argument, what it sets, help; "-" is nothing."""

    def __init__(self, row: str) -> None:
        short, long, argument, sets, self.help = (row.split(None, 4) + [""])[:5]
        self.short, self.long = short.strip("-"), long.strip("-")
        self.argument = argument.strip("-")
        self.name, _, self.text = sets.partition("=")
        self.meaning = self.argument, sets

    def format(self, help: str) -> str:
        """The option's line of --help."""
        long = "--" + self.long if self.long else ""
        names = ", ".join(["-" + self.short] * bool(self.short) + [long] * bool(long))
        indent = "" if self.short else "    "
        return "  %-35s %s" % (indent + names + " " + self.argument, help)


def find_option(options: "List[Option]", name: str) -> Option:
    """The option of a letter or long name, or of the beginning of one if only one begins so."""
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
    raise UsageError("option '{}' is ambiguous: {}".format(name, " ".join("--" + option.long for option in found)))


def parse_options(options: "List[Option]",
                  words: "List[str]") -> "Tuple[List[Tuple[Option, str, str]], List[str]]":
    """The options in `words`, each as it was named and with its argument, and the other words.

    As getopt_long does it: options may follow other words, `--name value` or `--name=value`, long
    names may be shortened, `-pVALUE`, `-Tv`, and `--` ends the options. No error shows an argument.
    """
    given, others = [], []  # type: Tuple[List[Tuple[Option, str, str]], List[str]]
    waiting = words[::-1]

    def take(option: Option, name: str, attached: "Optional[str]") -> None:
        if not option.argument and attached is not None:
            raise UsageError(f"option '{name}' doesn't allow an argument")
        if option.argument and attached is None:
            if not waiting:
                raise UsageError(f"option '{name}' requires an argument")
            attached = waiting.pop()
        given.append((option, name, option.text + (attached or "")))

    while waiting:
        word = waiting.pop()
        if word == "--":
            return given, others + waiting[::-1]
        if word.startswith("--"):
            name, equals, attached = word.partition("=")
            option = find_option(options, name)
            take(option, "--" + option.long, attached if equals else None)
        elif word.startswith("-") and word != "-":
            letters = word[1:]
            while letters:
                name, letters = "-" + letters[0], letters[1:]
                option = find_option(options, name)
                if option.argument:
                    take(option, name, letters or None)
                    break
                take(option, name, None)
        else:
            others.append(word)
    return given, others


# --- end shared: options --


OPTIONS = [Option(row) for row in OPTION_TABLE.strip().split("\n")]

# The same for --knock: the options of `knock`, and what it lacks. Behind them: host and ports.
KNOCK_OPTION_TABLE = """
u  udp                  -         udp=Y                 UDP for ports without :tcp, :udp or :icmp
d  delay                MS        KNOCK_DELAY
4  ipv4                 -         family=4              use IPv4 to the server
6  ipv6                 -         family=6              use IPv6 to the server
v  verbose              -         VERBOSE=Y             print each hit
T  test                 -         test=Y                print the hits, do not send them
q  quiet                -         quiet=Y
-  wait                 SECONDS   wait
-  wait-port            PORT      wait_port             the TCP port: --wait and --exec need it
-  exec                 -         exec=Y
-  knock                -         knock=Y               what a link named knock to this file means
V  version              -         version=Y             print version and SHA-256 of this file
h  help                 -         help=Y                print this
"""
KNOCK_OPTIONS = [Option(row) for row in KNOCK_OPTION_TABLE.strip().split("\n")]
USAGE = "-A PORTS [-s | -a ADDRESS] -D HOST [options]"
KNOCK_USAGE = "--knock [options] HOST PORT[:tcp|:udp|:icmp] ..."

# What is left out when a command line is kept: keys, and what is about this one run.
NOT_KEPT = SECRET_NAMES | {"last_command", "show_last", "quiet", "relay", "exec"}

# For each place in which to knock; the server of the stanza [gate] stands for any.
EXAMPLES = r"""
Knock from            with
  a shell             spa_client.py -n gate --wait 10 && ssh gate
                      spa_client.py -n gate --exec ssh gate
  ~/.ssh/config       ProxyCommand spa_client.py -q -n gate --proxy %h %p
  crontab             */5 * * * * spa_client.py -q -n gate
  systemd             systemd-run --user '--on-calendar=*:0/5' spa_client.py -q -n gate
  Windows             schtasks /create /sc minute /mo 5 /tn knock /tr "py spa_client.py -qn gate"
"""


def parse_command_line(words: "List[str]", options: "List[Option]" = OPTIONS,
                       ) -> "Tuple[Dict[str, Given], List[str], List[str]]":
    """What the options set, the words that belong to none, and the command behind --exec."""
    end = words.index("--exec") if "--exec" in words else len(words)
    found, others = parse_options(options, words[:end + 1])
    given = {}  # type: Dict[str, Given]
    for option, name, text in found:
        if option.text not in (RESOLVE, STUN) or option.name not in given:  # -a and -s go before -R
            said = (name, text[len(option.text):]) if option.argument else (name,)
            given[option.name] = Given(text, name, 0, said)
    return given, others, words[end + 1:]


def parse_knock_line(words: "List[str]") -> "Tuple[Dict[str, Given], List[str], List[str]]":
    """The same for a command line of `knock`, whose words are a host and ports (knockd.md 1.8).

    Unlike there, :tcp stays TCP under -u. No file is read or written.
    """
    given, others, command = parse_command_line(words, KNOCK_OPTIONS)
    if "help" in given or "version" in given:
        return given, [], command
    if len(others) < 2:
        raise UsageError("expected a host and ports", "--help says more")
    if "wait_port" not in given and ("wait" in given or command):
        raise UsageError("expected --wait-port with --" + ("wait" if "wait" in given else "exec"))
    host, ports = others[0], ",".join(others[1:]).split(",")
    if "udp" in given:
        ports = [port if ":" in port else port + ":udp" for port in ports]
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    given.setdefault("KNOCK_DELAY", Given("0"))
    given.update(no_rc_file=Given("Y"), NO_SAVE_ARGS=Given("Y"), SPA_SERVER=Given(host, "HOST"),
                 KNOCK_SEQUENCE=Given(",".join(ports), "PORT"))
    return given, [], command


def format_arguments(given: "Dict[str, Given]") -> str:
    """The command line of these options for -l, but no keys; `\\` stands before a blank in a word.

    fwknop reads and writes the same for words without blanks (tests/spec/fwknop.md 2.7).
    """
    words = ["fwknop"]
    for name, said in given.items():
        words += () if name in NOT_KEPT else said.words
    return " ".join(word.replace("\\", "\\\\").replace(" ", "\\ ") for word in words)


def split_arguments(line: str) -> "List[str]":
    """The words that format_arguments() or fwknop wrote, without the first: the program's name."""
    words = line.strip().replace("\\\\", "\0").replace("\\ ", "\1").split(" ")
    return [word.replace("\1", " ").replace("\0", "\\") for word in words[1:] if word]


def help_text(option: Option) -> str:
    """The help of an option, which may be that of its directive."""
    return option.help or ROWS[option.name].help


def format_help(as_knock: bool) -> str:
    """What --help prints."""
    usages = [KNOCK_USAGE] if as_knock else [USAGE, KNOCK_USAGE]
    lines = ["Usage: spa_client.py " + usage for usage in usages] + [""]
    for option in KNOCK_OPTIONS if as_knock else OPTIONS:
        lines.append(option.format(help_text(option)))
    return "\n".join(lines + [EXAMPLES.rstrip()] * (not as_knock))


def format_man() -> str:
    """What --man prints: a manual page in roff, see man(7), made of --help and the docstring."""
    def roff(text: str) -> str:
        text = text.replace("\\", "\\e").replace("-", "\\-")
        return "\n".join("\\&" + line if line[:1] in (".", "'") else line
                         for line in text.strip("\n").split("\n"))

    about = (__doc__ or "\n\n").split("\n\n")
    lines = [f".TH SPA_CLIENT 1 \"\" \"spa_client.py {VERSION}\"", ".SH NAME",
             roff(about[0].replace(":", " -", 1)), ".SH SYNOPSIS", ".B spa_client.py",
             roff(USAGE), ".br", ".B spa_client.py", roff(KNOCK_USAGE), ".SH DESCRIPTION",
             roff(about[1]), ".PP", roff(about[2])]
    for title, options in (("OPTIONS", OPTIONS), ("OPTIONS OF --knock", KNOCK_OPTIONS)):
        lines.append(".SH " + roff(title))
        for option in options:
            lines += [".TP", ".B " + roff(option.format("").strip()), roff(help_text(option))]
    return "\n".join(lines + [".SH EXAMPLES", ".nf", roff(EXAMPLES), ".fi", ".SH EXIT STATUS",
                              roff(about[-1].partition(": ")[2])])


# Names are read line by line, since `compgen -W` would run what is written in them, and quoted,
# since what stands on a command line is run as well.
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
    """What --completion prints for `bash`, `zsh` (which can read those of bash) or `fish`."""
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
        lines.append(" ".join(
            ["-s " + option.short] * bool(option.short) + ["-l " + option.long] * bool(option.long)
            + ["-r"] * bool(option.argument) + ["-d '{}'".format(help_text(option).replace("'", "\\'"))]))
    return "\n".join("complete -c spa_client.py " + line for line in lines)


# ======================================================================================
# 10. The rc file
#
# The text of ~/.fwknoprc, cut into stanzas and words exactly as fwknop does it
# (tests/spec/fwknop.md 2.2), so that the same file means the same to both.
# ======================================================================================

DEFAULT_STANZA = "default"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_"  # what names of directives are made of

HEADER = "[]"


def scan(text: str) -> "Iterator[Tuple[int, str, str, str]]":
    """Of each line of an rc file its number, itself, the stanza it is in, and what it says.

    That is "" for blank lines and comments, HEADER for the name of a stanza; "" is the stanza of
    the lines before the first name.
    """
    stanza = ""
    for number, line in enumerate(text.split("\n"), 1):
        says = line.strip(" \t\r")
        if says.startswith("[") and "]" in says:
            stanza, says = says[1:says.index("]")], HEADER
        yield number, line, stanza, "" if says[:1] in ("#", ";") else says


def parse_line(line: str) -> "Tuple[str, str, bool]":
    """Name and value of `NAME value` or `NAME: value`, and whether more than a comment follows.

    The value ends at the first blank, tab, `;` or `#`, also in the middle of a passphrase. Only
    that of KNOCK_SEQUENCE, which fwknop does not have, goes on up to a blank and `#`: with blanks
    behind its commas it must not lose its end.
    """
    name, _, value = line.replace("\t", " ").partition(" ")
    name, value = name[:-1] if name.endswith(":") else name, value.lstrip(" ")
    if name == "KNOCK_SEQUENCE":
        return name, value.partition(" #")[0].rstrip(" "), False
    word = value.replace(";", " ").replace("#", " ").partition(" ")[0]
    rest = value[len(word):]
    suspicious = rest[:1] in (";", "#") or rest.lstrip(" ")[:1] not in ("", ";", "#")
    return name, word, suspicious


def parse_stanza(text: str, path: str, wanted: str) -> "Optional[Dict[str, Given]]":
    """The directives of the stanza `wanted`, whatever the case of its letters; None without one.

    ConfigError names the line that is none. Of keys that may have lost their end it warns, without
    any part of them.
    """
    given = None  # type: Optional[Dict[str, Given]]
    for number, _, stanza, says in scan(text):
        if stanza.lower() != wanted.lower():
            continue
        given = {} if given is None else given
        if says in ("", HEADER):
            continue
        name, value, suspicious = parse_line(says)
        if name not in DIRECTIVE_NAMES:
            known = name.upper() in DIRECTIVE_NAMES or not name.strip(LETTERS)
            shown = f"{name}: " if known else ""  # another text may be half a key
            raise ConfigError(f"{path}:{number}: {shown}expected the name of a directive")
        if not value:
            raise ConfigError(f"{path}:{number}: {name}: expected a value")
        if suspicious and name in SECRET_NAMES:
            warn("%s:%d: %s: it ends at the first blank, ';' or '#', as in fwknop, and something "
                 "follows: keys with these characters must be given as base64"
                 % (path, number, name))
        given[name] = Given(value, path, number)
    return given


def stanza_values(given: "Dict[str, Given]") -> "Dict[str, str]":
    """What these options say, as an rc file has it, in fwknop's order (fwknop.md 2.3)."""
    if not given.keys().isdisjoint(("HMAC_DIGEST_TYPE", "HMAC_KEY", "HMAC_KEY_BASE64")):
        given = dict(given, USE_HMAC=Given("Y"))
    values = {}
    for name in DIRECTIVE_NAMES:
        if name in given:
            value, text = ROWS[name].value(given[name]), given[name].text
            if type(value) in (int, str):
                text = str(value)
            if parse_line(f"{name} {text}")[1] != text or set("\r\n") & set(text):
                raise UsageError(f"{given[name].where}: an rc file can't hold values with blanks, ';' or '#'", "give keys as base64")
            values[name] = text
    return values


def edit_stanza(text: str, stanza: str, values: "Dict[str, str]", dropped: "Set[str]") -> str:
    """The text of an rc file with these values in a stanza; all other lines stay as they are.

    A value takes the place of the old one, or stands behind the last line of the stanza, which
    is made if there is none. Lines of the directives in `dropped` are left out.
    """
    lines, place, waiting = [], 0, dict(values)  # type: List[str], int, Dict[str, str]
    for _, line, inside, says in scan(text.rstrip("\n")):
        name = parse_line(says)[0] if inside.lower() == stanza.lower() else ""
        if name in dropped:
            continue
        if name in values:
            bare = says.replace("\t", " ").replace(" ;", " #").partition(" #")[0].rstrip(" ")
            comment = says[len(bare):]
            line = "%-24s    %s%s" % (name, values[name], comment)
            waiting.pop(name, None)
        lines.append(line)
        if name:  # also that of a header, which is HEADER
            place = len(lines)
    if not place:
        lines += [""] * bool(text.strip()) + [f"[{stanza}]"]
        place = len(lines)
    lines[place:place] = ["%-24s    %s" % item for item in waiting.items()]
    return "\n".join(lines).lstrip("\n") + "\n"


# ======================================================================================
# 11. Files and keys
#
# Reading rc and key files, asking for keys, making new ones; writing what is to be kept. From here
# on the machine is touched.
# ======================================================================================


class Notes:
    """Whether to tell what is no error, and why say() failed; run() sets both anew."""

    wanted = True
    unsaid = ""


def warn(message: str) -> None:
    """Tell the administrator something that does not stop the work."""
    note("warning: " + message)


def note(message: str) -> None:
    """One line on standard error, unless -q is given."""
    if Notes.wanted:
        tell(message)


def tell(message: str) -> None:
    """One line on standard error; that nobody reads it must not stop a knock."""
    write_to(sys.stderr, f"spa_client.py: {printable(message)}\n")


# --- shared: output -- the same text in spa_server.py, spa_client.py and keygen.py --


def write_to(stream: "Any", text: str) -> str:
    """Write to standard output or standard error; return why that failed, "" if it did not.

    Python would write the rest again at exit, fail, and end with 120: so the rest is thrown away.
    """
    try:
        stream.write(text)
        stream.flush()
    except (AttributeError, OSError, ValueError) as error:
        if stream is None:
            return "it is closed"
        try:
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
    """The text with all but printable ASCII escaped: it may come from a file or an argument."""
    return "".join(letter if " " <= letter <= "~" else ascii(letter)[1:-1] for letter in text)


OPENED = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # what whoever started us has open


def read_private(path: str, pipe: bool = False) -> str:
    """The text of a file with secrets; warns if others can read it (tests/spec/fwknop.md 2.2).

    A pipe has to be expected, or a shell's `<(...)`: any other could keep us waiting.
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
                    warn(f"{path}: permissions should only be user read/write (0600)")
                if status.st_uid != os.geteuid():
                    warn(f"{path}: not owned by current effective user id")
            return decode_text(file.read())
    except (OSError, ValueError) as error:
        raise ConfigError(explain(error, f"{path}: cannot be read")) from None


def home_file(given: "Dict[str, Given]", name: str) -> "Optional[str]":
    """The path of a file in the home directory; None without one, or with --no-home-dir."""
    home = os.environ.get("HOME") or os.environ.get("USERPROFILE")
    return os.path.join(home, name) if home and "no_home_dir" not in given else None


def rc_path(given: "Dict[str, Given]") -> "Optional[str]":
    """The path of the rc file, which may not exist: that of --rc-file, or ~/.fwknoprc.

    None with --no-rc-file, or without a home directory.
    """
    if "no_rc_file" in given:
        return None
    return given["rc_file"].text if "rc_file" in given else home_file(given, ".fwknoprc")


def read_layers(given: "Dict[str, Given]") -> "List[Dict[str, Given]]":
    """The layers of the rc file for this command line: [default], and the stanza of -n."""
    path, named, new = rc_path(given), given.get("named_config"), "save_stanza" in given
    if path is None or ((new or "rc_file" not in given) and not os.path.exists(path)):
        if named is not None and not new:
            raise UsageError("-n needs an rc file, and there is none")
        return []
    text = read_private(path)
    for number, _, stanza, says in scan(text):
        if says and not stanza:
            warn("%s:%d: ignored, since it stands before the first [stanza]" % (path, number))
            break
    layers = [parse_stanza(text, path, DEFAULT_STANZA)]
    if named is not None:
        layers.append(parse_stanza(text, path, named.text))
        if layers[1] is None and not new:
            raise ConfigError(f"{path}: named configuration stanza [{named.text}] was not found")
    return [layer for layer in layers if layer is not None]


def write_private(path: str, text: str, flags: int) -> None:
    """Write a file; a new one is for its owner only. `flags` say what becomes of an old one."""
    with errors_named(path, "it must be a new file" if flags & os.O_EXCL else ""), os.fdopen(
            open_ours(path, os.O_WRONLY | os.O_CREAT | flags), "wb") as file:
        file.write(encode_text(text))
        if flags & os.O_EXCL:
            file.flush()
            os.fsync(file.fileno())


LOCK_SECONDS = 10.0  # another run needs milliseconds


def create_alone(path: str) -> int:
    """Open a new file that only its owner can read; while it exists, waits for its end."""
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
    """What may be written to a stanza of an rc file, and which directives leave it for that.

    Before other keys take the place of old ones it asks, unless `force`. An old key that would
    go before the new one, since it is given in another way, is taken out.
    """
    wanted, dropped = dict(values), set()  # type: Dict[str, str], Set[str]
    old = {parse_line(says)[0] for _, _, name, says in scan(text) if name.lower() == stanza.lower()}
    for name in values:
        for sources in KEY_SOURCES + (("GPG_RECIPIENT",), ("GPG_SIGNER",)):
            rivals = sorted(old.intersection(sources) - dropped) if name in sources else []
            if force or all(confirm(f"Variable '{rival}' found in stanza '{stanza}'. Overwrite [N/y] ? ") for rival in rivals):
                dropped.update(rivals)
            else:
                wanted.pop(name)
    return wanted, dropped - set(wanted)


def saved_text(path: str) -> str:
    """What a file says now, "" if there is none; read_layers() has warned of what there is."""
    if not os.path.exists(path):
        return ""
    with open(path, "rb") as file:
        return decode_text(file.read())


def replace_file(path: str, old: str, text: str) -> bool:
    """Put a file that only its owner can read in the place of one that says `old`.

    Whole or not at all; False if it says something else by now. The new file is the lock: nobody
    who can't write in its directory can keep us waiting.
    """
    new = path + ".updated"
    descriptor = create_alone(new)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(encode_text(text))
            if os.path.exists(path) and hasattr(os, "fchown"):
                status = os.stat(path)
                os.fchown(descriptor, status.st_uid, status.st_gid)
            file.flush()
            os.fsync(descriptor)
        same = saved_text(path) == old
        if same:
            os.replace(new, path)
        else:
            os.unlink(new)
        return same
    except BaseException:
        os.unlink(new)
        raise


def save_stanza(given: "Dict[str, Given]", force: bool) -> "Tuple[str, Dict[str, str]]":
    """Write options to a stanza of the rc file (fwknop.md 2.3); its path, and what was written.

    When somebody else has changed the file meanwhile, it begins again with what that says. It asks
    before it takes the lock.
    """
    named, path = given.get("named_config") or given.get("SPA_SERVER"), rc_path(given)
    if named is None or path is None:
        raise UsageError("--save-rc-stanza needs %s" % (
            "an rc file" if named else "-n or -D, for the name of the stanza"))
    if not named.text or set("[],\r\n") & set(named.text):
        raise UsageError(f"{named.where}: expected the name of a stanza")
    real = os.path.realpath(path)
    with errors_named(real):
        if os.path.exists(path):  # root must not write to what a link of somebody else's leads to
            os.close(open_ours(path, os.O_RDONLY))
        while True:
            text = saved_text(real)
            values, dropped = choose_values(stanza_values(given), text, named.text, force)
            if replace_file(real, text, edit_stanza(text, named.text, values, dropped)):
                return path, values


def confirm(question: str) -> bool:
    """Whether a line of standard input says yes; SpaError when there is no line."""
    say(question)
    answer = read_line(0)
    if not answer.endswith(b"\n"):
        raise SpaError("standard input ended without an answer", "--force-stanza does not ask")
    return answer[:1] in (b"y", b"Y")


def save_arguments(given: "Dict[str, Given]", path: "Optional[str]") -> None:
    """Keep the options of a knock, without keys, for -l; where it can't be written, do not."""
    try:
        if path is not None:
            write_private(path, format_arguments(given) + "\n", os.O_TRUNC)
    except SpaError as error:
        if "save_args_file" in given:
            warn(complaint(error))


def read_key_file(path: str, server: "Optional[str]") -> bytes:
    """The key of a server from lines `server: key`; the last one counts (tests/spec/fwknop.md 2.5).

    Blanks, tabs and `=` before the key are skipped, blanks after it belong to it.
    """
    if server is None:
        raise UsageError("a key file needs -D: its lines begin with the server")
    key = None
    for line in read_private(path, True).split("\n"):
        line = line.rstrip("\r").lstrip(" \t")
        if line.startswith(server + ":"):
            key = line[len(server) + 1:].lstrip(" \t=") or key
    if key is None:
        raise ConfigError(f"{path}: no key for {server} (expected a line `{server}: KEY`)")
    return encode_text(key)


def read_line(descriptor: int) -> bytes:
    """One line from an open file, and not a byte more: the next may be the other key."""
    line = byte = b""
    with errors_named("file descriptor %d" % descriptor):
        if descriptor > 2:
            os.set_inheritable(descriptor, False)  # it is not for what --exec runs
        while byte != b"\n":
            byte = os.read(descriptor, 1)
            if not byte:
                break
            line += byte
    return line


def prompt_key(prompt: str) -> bytes:
    """One line typed at the terminal, without echo."""
    try:
        import termios
    except ImportError:
        import getpass  # not there on the smallest systems, but those have termios
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


def choose_key(settings: Settings, what: str, options: str,
               given: "Tuple[Optional[bytes], ...]", path: "Optional[str]") -> bytes:
    """The first key that is given, or that of a key file, or that from --fd, --stdin or a prompt.

    The error without any tells `what` is missing, and which `options` could have given it.
    """
    for key in given:
        if key is not None:
            return key
    if path is not None:
        return read_key_file(path, settings.server)
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
    """The encryption key, or the passphrase of GPG_SIGNER, and the HMAC key (fwknop.md 2.5).

    The first is b"" for a signer without passphrase; None if none is needed: no signature, or gpg
    asks its agent. An HMAC is used when any HMAC key is given, by USE_HMAC, and by
    --hmac-digest-type; else there is no key for it.
    """
    named = settings.given.get("HMAC_DIGEST_TYPE")
    hmac_keys, hmac_file = (settings.hmac_key, settings.hmac_key_base64), settings.hmac_key_file
    wanted = (settings.use_hmac or hmac_keys != (None, None) or hmac_file is not None
              or (named is not None and not named.line))
    if settings.mode == "legacy" and wanted:
        raise UsageError("legacy encryption mode is incompatible with HMAC usage")
    key, hmac_key, keys = None, None, (settings.key, settings.key_base64)
    if settings.mode != GPG:
        key = choose_key(settings, "encryption key", "KEY_BASE64, -G or --key-rijndael", keys,
                         settings.key_file)
    elif settings.gpg_signer is not None and not settings.gpg_agent:
        key = b"" if settings.gpg_no_passphrase else choose_key(
            settings, "passphrase for signing", "--gpg-agent, --gpg-no-signing-pw",
            (settings.gpg_passphrase, settings.gpg_passphrase_base64) + keys, settings.key_file)
    if wanted:
        hmac_key = choose_key(settings, "HMAC key", "HMAC_KEY_BASE64, --get-hmac-key or --key-hmac",
                              hmac_keys, hmac_file)
    check_keys(key or b"", hmac_key, settings.mode)
    return key, hmac_key


def check_keys(key: bytes, hmac_key: "Optional[bytes]", mode: str) -> None:
    """Raise SpaError for keys of a wrong length (fwknop.md 1.7, 1.8), warn of weak ones."""
    if hmac_key is not None and not 1 <= len(hmac_key) <= HMAC_KEY_LIMIT:
        raise SpaError("the HMAC key is %d bytes long, expected 1 to %d"
                       % (len(hmac_key), HMAC_KEY_LIMIT))
    if hmac_key == key:
        raise SpaError("the encryption key and the HMAC key should not be identical")
    if mode == "legacy" and len(key) > LEGACY_KEY_LENGTH:
        warn("legacy mode uses only the first %d bytes of the key" % LEGACY_KEY_LENGTH)
    elif len(key) > KEY_LIMIT and mode != GPG:
        raise SpaError("the encryption key is %d bytes long, expected 1 to %d"
                       % (len(key), KEY_LIMIT))
    elif not key and mode != GPG:
        warn("the encryption key is empty: everybody can read this packet")


# Bytes of a new HMAC key as fwknop chooses them (fwknop.md 2.4); for SHA-3 as keygen.py does.
HMAC_KEY_LENGTHS = {"MD5": 16, "SHA1": 20, "SHA256": 64, "SHA384": 128, "SHA512": 128,
                    "SHA3_256": 64, "SHA3_512": 64}


def generate_keys(settings: Settings, given: "Dict[str, Given]") -> None:
    """Put new keys in the rc file, in a new file, or print them for one (fwknop.md 2.4)."""
    length = settings.hmac_key_length or HMAC_KEY_LENGTHS[settings.hmac_type]
    keys = {name: binascii.b2a_base64(os.urandom(size), newline=False).decode("ascii")
            for name, size in (("KEY_BASE64", settings.key_length), ("HMAC_KEY_BASE64", length))}
    lines = "\n".join("{}: {}".format(*item) for item in keys.items())
    if settings.save_stanza:
        new = {name: Given(text, "-k") for name, text in keys.items()}
        path, written = save_stanza(dict(given, **new), settings.force_stanza)
        kinds = [kind for kind, name in zip(("Rijndael", "HMAC"), keys) if name in written]
        say("[+] Wrote {} keys to rc file: {}".format(" and ".join(kinds) or "no", path))
    if settings.key_gen_file is not None:
        write_private(settings.key_gen_file, lines + "\n", os.O_EXCL)
        say(f"[+] Wrote Rijndael and HMAC keys to: {settings.key_gen_file}")
    elif not settings.save_stanza:
        say(lines)


def effective_user() -> str:
    """The name of who runs this, where there is such a thing."""
    try:
        import pwd
        return pwd.getpwuid(os.geteuid()).pw_name
    except (ImportError, KeyError):
        return ""


def find_user(settings: Settings) -> str:
    """The user name for the packet: the one set, or that of who runs this (fwknop.md 2.1)."""
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
# gpg and wget, started only when asked for, with lists of arguments that no shell sees.
# ======================================================================================


MAX_WORDS = 500  # characters of what a program says; the reason is at the end


def run_program(argv: "List[str]", given: bytes = b"") -> bytes:
    """What a program prints when it reads `given`; SpaError with its own words when it fails."""
    import subprocess
    with errors_named(argv[0]):
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        out, errors = process.communicate(given)
    if process.returncode:
        lines = errors.decode("ascii", "backslashreplace").split("\n")
        words = printable("; ".join(line.strip() for line in lines if line.strip()))
        raise SpaError(words[-MAX_WORDS:] or "%s: exit code %d" % (argv[0], process.returncode))
    return out


def encrypt_gpg(settings: Settings, plaintext: bytes, passphrase: "Optional[bytes]") -> bytes:
    """OpenPGP data for GPG_RECIPIENT, signed by GPG_SIGNER if there is one (fwknop.md 1.11).

    The passphrase is the first line that gpg reads, before the plain text; where there is none
    (b""), the empty line keeps gpg from asking. Keys are taken as the key ring has them.
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
# Looking up the server, and sending. A link is a UDP socket connected to the server: also where the
# packet then goes another way, it knows the route.
# ======================================================================================

NETWORK_SECONDS = 10.0  # for a connection over TCP, and for the answer of a web server


def open_socket(family: int, address: "Tuple[Any, ...]", direct: bool = False,
                seconds: "Optional[float]" = None) -> "socket.socket":
    """A UDP socket connected to the address, if there is a way to it (`direct`: without router).

    With `seconds` it is one of TCP, and waits at most so long; with 0 it may still be on its way.
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
    """A host name as bytes: for text getaddrinfo() needs the codec idna, which routers lack."""
    try:
        return host.encode("ascii" if max(host, default="") < "\x7f" else "idna")
    except (LookupError, UnicodeError):
        raise SpaError(f"{host}: not an ASCII name",
                       "give the form that begins with xn--") from None


MAX_ADDRESSES = 16  # of one server: who answers for its name must not make us send without end


def find_addresses(host: str, port: int, family: int) -> "List[Address]":
    """The addresses of a host, each once; SpaError when the resolver knows none."""
    name = encode_host(host)
    with errors_named(host):
        found = socket.getaddrinfo(name, port, family, socket.SOCK_DGRAM)
    addresses = {(each[0], each[4]): None for each in found}  # type: Dict[Address, None]
    return list(addresses)[:MAX_ADDRESSES]


def open_links(host: str, addresses: "List[Address]") -> "Iterator[socket.socket]":
    """Links to those of the addresses that have a route; SpaError if none has."""
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


def send_packet(settings: Settings, link: "socket.socket", packet: str) -> int:
    """Send the packet by its carrier to where the link leads; how many bytes went out."""
    payload = packet.encode("ascii")
    if settings.protocol == "udp":
        return link.send(payload)
    if settings.protocol in RAW_CARRIERS:
        return send_raw(settings, link, payload)
    if settings.protocol == "http":
        host, target = parse_place(settings.server or "")[0], "/" + packet.replace(
            "+", "-").replace("/", "_")
        host = f"[{host}]" if ":" in host else host
        if settings.http_proxy:  # without a port of its own it takes that of -p, as in fwknop
            own = settings.http_proxy[1] and "SPA_SERVER_PORT" in settings.given
            target = "http://{}{}{}".format(host, ":%d" % settings.port if own else "", target)
        payload = encode_request(target, host, settings.user_agent)
    stream = open_socket(link.family, link.getpeername(), False, NETWORK_SECONDS)
    try:
        stream.sendall(payload)
        if settings.http_proxy:  # before it answers, it may not have passed it on
            try:
                answer = stream.recv(1)
            except OSError:
                answer = b""
            if not answer:
                warn("the proxy did not answer: whether it passed the packet on is not known")
    finally:
        stream.close()
    return len(payload)


def send_raw(settings: Settings, link: "socket.socket", payload: bytes) -> int:
    """Send it with headers of our own (root can); how many bytes went out."""
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
    """A socket for echo requests, raw only where users may have no other; SpaError without one."""
    number = socket.IPPROTO_ICMPV6 if family == socket.AF_INET6 else socket.IPPROTO_ICMP
    try:
        return socket.socket(family, socket.SOCK_DGRAM, number)
    except OSError:
        with errors_named("ICMP", "it needs root, or a group in net.ipv4.ping_group_range"):
            return socket.socket(family, socket.SOCK_RAW, number)


def send_hit(link: "socket.socket", protocol: str, port: int) -> None:
    """One hit at the host of the link, as `knock` does it (tests/spec/knockd.md 1.8).

    TCP: a SYN, never sent again, since the socket is closed at once. UDP: a byte, 0. ICMP: an echo
    request with `port` bytes of data (RFC 792; RFC 4443, whose checksum is the system's affair).
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
        hit = open_socket(link.family, (peer[0], port) + peer[2:], False,
                          0 if protocol == "tcp" else None)
    except ConnectionRefusedError:
        return  # a near host has answered already
    try:
        if protocol == "udp":
            hit.send(b"\0")
    finally:
        hit.close()


def pause(least: int, most: int) -> None:
    """Wait for so many milliseconds."""
    time.sleep((least + int.from_bytes(os.urandom(7), "big") % (most - least + 1)) / 1000)


def random_port() -> int:
    """A port from 10000 up (tests/spec/fwknop.md 1.14)."""
    return 10000 + int.from_bytes(os.urandom(7), "big") % 55536


# ======================================================================================
# 14. Own address
#
# The address to open for, if it is not set: the link's own where there can be no NAT, or what a
# web page (-R) or a STUN server (RFC 8489) says. Both see where a question comes from. STUN is not
# authenticated: who can read the question can make us open for another address.
# ======================================================================================

STUN_MAGIC = b"\x21\x12\xa4\x42"
STUN_SECONDS = (0.5, 1.0, 1.5)  # how long to wait for an answer before asking again


def choose_address(settings: Settings, link: "Optional[socket.socket]") -> str:
    """The address to open for: as set, as others see us, or the link's own if there is no NAT."""
    allow_ip, family = settings.allow_ip, link.family if link is not None else 0
    if allow_ip == RESOLVE:
        return resolve_address(settings, family)
    if allow_ip is not None:
        return ask_stun(allow_ip[len(STUN):], family) if allow_ip.startswith(STUN) else allow_ip
    hidden = settings.spoof_source or settings.http_proxy
    own = own_address(link) if link is not None and not hidden else None
    if own is None:
        raise UsageError("Must use one of [-s|-R|-a] to specify IP for SPA access.")
    note(f"asking to open for {own}, our address on the way to the server")
    return own


# Networks of IPv4 that are met in many places: loopback, private (RFC 1918), link-local, shared by
# carriers (RFC 6598, 7335), those of tunnels (RFC 2544), multicast.
NOT_PUBLIC = ("0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12"
              " 192.0.0.0/24 192.168.0.0/16 198.18.0.0/15 224.0.0.0/3")


def is_public(address: bytes) -> bool:
    """Whether an IPv4 or IPv6 address, 4 or 16 bytes, is met as it is all over the Internet.

    IPv6 hands out public addresses below 2000::/3 only (RFC 4291): not so are fd00::/8 (RFC 4193)
    and IPv4 inside IPv6.
    """
    if len(address) == 16:
        return address[0] >> 5 == 1
    for network in NOT_PUBLIC.split():
        base, _, bits = network.partition("/")
        differ = int.from_bytes(exclusive_or(address, socket.inet_aton(base)), "big")
        if not differ >> 32 - int(bits):
            return False
    return True


MAPPED = b"\0" * 10 + b"\xff\xff"  # what an IPv4 address inside IPv6 begins with
NAT64 = b"\0\x64\xff\x9b"  # 64:ff9b::/32, of which IPv6 behind a translator to IPv4 is made


def own_address(link: "socket.socket") -> "Optional[str]":
    """The address under which the server must see this link, or None: NAT may be on the way.

    There is no NAT if ours is public and the server's is no NAT64 (RFC 6052), or if the server is
    near: with the same first 24 or 64 bits, and reached without a router. Neither alone will do: a
    tunnel's route has no router, and for IPv6 Linux does not obey SO_DONTROUTE. IPv4 inside IPv6
    is not looked into.
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


def check_own(text: str, where: str) -> str:
    """Our address as others told it, IPv4 if it was in IPv6; SpaError for one that is nobody's."""
    own = socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    if own[:12] == MAPPED:
        own = own[12:]
        text = socket.inet_ntop(socket.AF_INET, own)
    if (own[0] in (0, 127) or own[0] >= 224) if len(own) == 4 else (
            own[:15] == bytes(15) or own[0] == 255):
        raise SpaError(f"{where}: it says that our address is {text}, which can't be")
    return text


def resolve_address(settings: Settings, family: int) -> str:
    """Our address: the line of RESOLVE_URL that is one (fwknop.md 2.6); SpaError without any."""
    secure = "" if settings.resolve_http_only else "s"
    page = settings.resolve_url or parse_url(
        f"http{secure}://www.cipherdyne.org/cgi-bin/myip")
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
            found = parse_address(line.strip())
        except ValueError:
            continue
        return check_own(found, url)
    raise SpaError(f"{url}: no line of the answer is an address")


def fetch(page: "Tuple[str, str, int, str]", agent: str, family: int) -> bytes:
    """The body of a web page, as it came; SpaError unless it comes within NETWORK_SECONDS."""
    url, host, port, path = page
    end, answer, problem = time.monotonic() + NETWORK_SECONDS, b"", f"{url}: it has no address"
    for kind, address in find_addresses(host, port, family):
        link = None  # type: Any
        try:
            link = open_socket(kind, address, False, NETWORK_SECONDS)
            if url.startswith("https:"):
                link = start_tls(link, host)
            link.sendall(encode_request(path, url.split("/")[2], agent))
            piece = b"."
            while piece and len(answer) < 1 << 16 and not is_whole(answer):
                link.settimeout(max(0.001, end - time.monotonic()))
                piece = link.recv(4096)
                answer += piece
            break
        except (OSError, LookupError, ValueError) as error:
            problem, answer = explain(error, url), b""  # half an answer may have half an address
        finally:
            if link is not None:
                link.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n")[0].decode("ascii", "replace")
    if status.split()[1:2] != ["200"]:
        raise SpaError(f"{url}: {status}" if status else problem)
    return body


def is_whole(answer: bytes) -> bool:
    """Whether an answer is as long as its Content-Length says (RFC 9112 section 6.3).

    ValueError when that says no length; without it, only the end of the connection is the end.
    """
    head, _, body = answer.lower().partition(b"\r\n\r\n")
    length = head.partition(b"\r\ncontent-length:")[2].split(b"\r\n")[0].strip()
    if length.strip(b"0123456789") or len(length) > 9:
        raise ValueError("expected a Content-Length of at most 9 digits")
    return bool(length) and len(body) >= int(length)


def start_tls(link: "socket.socket", host: str) -> "Any":
    """The connection encrypted, after the certificate was found to be that of the host."""
    try:
        import socket as full
        import ssl
    except ImportError:
        raise SpaError("this Python has no ssl for https", "use -w, or -a") from None
    whole = full.socket(link.family, full.SOCK_STREAM, 0, link.detach())
    whole.settimeout(NETWORK_SECONDS)
    return ssl.create_default_context().wrap_socket(whole, server_hostname=host)


def decode_stun(answer: bytes, identity: bytes) -> "Optional[str]":
    """The XOR-MAPPED-ADDRESS of a Binding success response (section 5, 6, 14.2), or None.

    None also for the answer to another question than that with the 12 bytes `identity`.
    """
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


def ask_stun(place: str, family: int) -> str:
    """Our address in this family as a STUN server sees it; SpaError if none answers."""
    host, port = parse_place(place, STUN_PORT)
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
# 15. After the knock
#
# Trying the port until it opens, relaying its connection, and becoming another program. Only TCP:
# of a UDP port nobody can tell whether it is open.
# ======================================================================================

WAIT_SECONDS = 10  # without --wait
KNOCK_AGAIN = 1.0  # seconds
TRY = (0.02, 0.25)  # seconds between the first two tries, and at most
TRY_SECONDS = 3.0  # for so long a connection may be on its way
CHUNK = 1 << 18


def find_place(settings: Settings, words: "List[str]",
               command: "List[str]") -> "Optional[Tuple[str, int]]":
    """Host and TCP port to wait for after the knock, or None; UsageError for what can't work."""
    if settings.execute and not command:
        raise UsageError("--exec: expected a command behind it")
    if settings.relay:
        if (command or settings.test or settings.save_stanza or sys.stdin is None
                or sys.stdout is None):
            raise UsageError("--proxy needs standard input and output for itself: no -T, no --exec,"
                             " no --save-rc-stanza")
        if settings.nat_rand_port:
            raise UsageError("--proxy is told the port, so it can't be a random one", "--nat-port")
        try:
            host, digits = words
            return host, parse_port(digits)
        except ValueError:
            raise UsageError("--proxy: expected HOST PORT") from None
    wanted = command or settings.wait is not None or settings.wait_port is not None
    if not wanted or settings.server is None:
        return None
    if settings.test:
        raise UsageError("-T sends nothing, so there is nothing to wait for")
    ports = [entry[4:] for entry in (settings.access or "").split(",") if entry[:4] == "tcp/"]
    port = settings.wait_port or (ports and int(settings.nat_port or ports[0]))
    if not port:
        raise UsageError("there is no TCP port in -A to wait for", "--wait-port names one")
    return settings.server, port


def wait_until_open(addresses: "List[Address]", seconds: int, knock: "Callable[[], None]",
                    alone: bool = False) -> "Tuple[Optional[socket.socket], int]":
    """The connection to the first address that takes one; else None and the last error number.

    A datagram may get lost, so `knock` is called every second. Connections are tried more often
    than the kernel repeats a SYN, and older ones not given up at once: the way may be long. But a
    knock sequence has to be `alone`: a SYN in between would break it.
    """
    import select
    again = TRY_SECONDS if alone else KNOCK_AGAIN
    begin, now, knock_at, try_at, pause, error = time.monotonic(), 0.0, again, 0.0, TRY[0], 0
    waiting = {}  # type: Dict[socket.socket, float]
    try:
        while now < seconds:
            knocking = now >= knock_at
            for link, end in list(waiting.items()):
                if end < now or (knocking and alone):
                    del waiting[link]
                    link.close()
            if knocking:
                try:
                    knock()
                except SpaError:
                    pass  # the first one was sent, and this network may come back
                now = time.monotonic() - begin
                knock_at = now + again
            if now >= try_at:
                try_at, pause = now + pause, min(pause * 2, TRY[1])
                for family, address in addresses:
                    try:
                        waiting[open_socket(family, address, False, 0)] = now + TRY_SECONDS
                    except OSError as problem:
                        error = problem.errno or 0
            patience = max(min(knock_at, try_at, seconds) - now, 0)
            ready = []  # type: List[socket.socket]
            if waiting:
                _, writable, failed = select.select([], waiting, waiting, patience)
                ready = writable + failed
            else:
                time.sleep(patience)  # Windows can't select among nothing
            for link in set(ready):
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
    """Write what is read, until there is no more."""
    while True:
        rest = memoryview(read(CHUNK))
        if not rest:
            return
        while rest:
            rest = rest[write(rest):]


def relay(link: "socket.socket") -> int:
    """Copy standard input to a connection and the connection to standard output, until both end.

    The end of one direction is passed on, and the other lives on. Each has a thread that blocks:
    that works with whatever the two are, also on Windows, and who reads slowly slows the sender.
    Return the exit code, for os._exit(): the thread may still read then, and Python's own end
    crashes now and then when a thread comes back to an interpreter that is half gone.
    """
    import _thread
    sent = _thread.allocate_lock()
    sent.acquire()

    def send_input() -> None:
        try:
            copy(lambda size: os.read(0, size), link.send)
            link.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # a broken connection is told by the other direction
        sent.release()

    link.setblocking(True)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _thread.start_new_thread(send_input, ())
    try:
        copy(link.recv, lambda rest: os.write(1, rest))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader's end of file
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
    """Go on as this command (on Windows: run it, and end with its exit code); SpaError if not."""
    with errors_named("--exec: " + command[0]):
        if os.name == "nt":
            import subprocess
            raise SystemExit(subprocess.call(command))
        import signal
        for name in ("SIGPIPE", "SIGXFSZ"):  # ignored by Python, and so by what follows it
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        os.execvp(command[0], command)


# ======================================================================================
# 16. Output
#
# What is printed on standard output, in the layout that fwknop's users and scripts know
# (tests/spec/fwknop.md 2.8). Keys are not among it.
# ======================================================================================


def say(text: str) -> None:
    """Lines on standard output. A knock goes on when they can't be written; main() looks at why."""
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
      HMAC Type: {hmac}
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


def format_dump(message: Message, settings: Settings, packet: str, tag_length: int) -> str:
    """The "SPA Field Values" of fwknop's -T and -v, and for -v "Generating SPA packet"."""
    text, null, gpg = encode_message(message), "<NULL>", ""
    hmac = DIGESTS[settings.hmac_type]
    if settings.mode == GPG:
        gpg = GPG_DUMP.format(signer=settings.gpg_signer or null, recipient=settings.gpg_recipient,
                              home=settings.gpg_home or null, exe=settings.gpg_exe)
    dump = DUMP.format(
        message=message, version=PROTOCOL_VERSION, kind=MESSAGE_TYPES[message.number],
        nat=message.nat or null, digest=DIGESTS[settings.digest_type],
        hmac="%d (%s)" % (hmac.number, hmac.name) if tag_length else "0 (None)",
        encryption="2 (GPG)" if gpg else "1 (Rijndael)", number=MODES[settings.mode],
        mode=settings.mode, gpg=gpg, text=text.decode("ascii"),
        sum=message_digest(text, settings.digest_type),
        tag=packet[len(packet) - tag_length:] or null, packet=packet)
    if settings.verbose:
        raw = settings.protocol in RAW_CARRIERS
        dump += WAY_DUMP.format(
            protocol=settings.protocol, source=settings.source_port if raw else "<OS assigned>",
            port=settings.port, host=settings.server or "")
    return dump


def print_version() -> None:
    """Version, protocol, and the SHA-256 of this very file, to compare with a published one."""
    with open(__file__, "rb") as file:
        digest = binascii.hexlify(DIGESTS["SHA256"](file.read())).decode("ascii")
    say(f"spa_client.py {VERSION}, FKO protocol version {PROTOCOL_VERSION}\nSHA-256 {digest}")


def print_stanzas(given: "Dict[str, Given]") -> None:
    """The names of the stanzas, without [default] (tests/spec/fwknop.md 2.3)."""
    path = rc_path(given)
    if path is None or ("rc_file" not in given and not os.path.exists(path)):
        raise UsageError("--stanza-list needs an rc file, and there is none")
    text = read_private(path)
    say(f"The following stanzas are configured in {path} :")
    for _, _, name, says in scan(text):
        if says == HEADER and name.lower() != DEFAULT_STANZA:
            say(" - " + name)


# ======================================================================================
# 17. Run
#
# The way of a packet from the docstring, and the exit codes.
# ======================================================================================


def random_digits() -> str:
    """Sixteen decimal digits, each value as likely as any other, to 1 in 10^22 (fwknop.md 1.2)."""
    return "%016d" % (int.from_bytes(os.urandom(16), "big") % 10 ** 16)


def make_message(settings: Settings, allow_ip: str) -> Message:
    """A fresh message that asks to open for `allow_ip` (tests/spec/fwknop.md 1.4, 1.5)."""
    number, asked, nat = COMMAND, settings.command, ""
    if asked is None:
        number, asked = ACCESS, settings.access or ""
        protocol, _, port = asked.split(",")[0].partition("/")
        if settings.nat_local or settings.nat_access:
            number = LOCAL_NAT if settings.nat_local else NAT_ACCESS
            host, inner = settings.nat_access or (settings.server or "", 0)
            nat = "%s,%d" % (host, inner or int(port))
        if settings.nat_port:
            asked = "%s/%d" % (protocol, settings.nat_port)
        if settings.nat_rand_port:
            settings.nat_rand_port = False  # it is told once, however many packets are made
            say("[+] Randomly assigned port '{}' on: '{},{}'{}".format(
                settings.nat_port, allow_ip, asked,
                f" will grant access to: '{nat}'" if nat else ""))
    if settings.timeout:
        number = {ACCESS: TIMEOUT_ACCESS, NAT_ACCESS: TIMEOUT_NAT_ACCESS,
                  LOCAL_NAT: TIMEOUT_LOCAL_NAT}.get(number, number)
    return Message(random_digits(), find_user(settings), int(time.time()) + settings.time_offset,
                   number, f"{allow_ip},{asked}", nat, settings.timeout)


def draw_ports(settings: Settings) -> None:
    """Draw the ports that are to be random, once for all packets of a knock."""
    if settings.rand_port:
        settings.port = random_port()
    if settings.nat_rand_port:
        settings.nat_port = random_port()
    if settings.protocol in RAW_CARRIERS and not settings.source_port:
        settings.source_port = random_port()


class Knock:
    """Knocks at one server: keys and addresses are looked for once, each packet is a fresh one."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.first = settings, True
        self.keys = (None, None) if settings.only_knocks else find_keys(settings)
        self.chosen = {}  # type: Dict[Any, str]  # the address to open for, by that of the server
        # Where ports are hit: at the server, also when packets go through a proxy.
        self.hit_at = self.send_to = []  # type: List[Address]
        self.host, port = settings.http_proxy or (settings.server or "", 0)
        family, server = settings.ip_version, settings.server or ""
        asked = not settings.only_knocks and (
            settings.allow_ip is None or settings.allow_ip.startswith((RESOLVE, STUN)))
        if self.host and (asked or not settings.test):
            self.hit_at = self.send_to = find_addresses(self.host, port or settings.port, family)
        if settings.sequence and settings.http_proxy and not settings.test:
            self.hit_at = find_addresses(server, settings.port, family)

    def __call__(self) -> None:
        """Hit ports, and send packets; SpaError if no address of the server could be reached."""
        settings = self.settings
        if settings.sequence:
            self.at_each(settings.server or "", self.hit_at, self.hit, "was not hit")
        if settings.sequence and not settings.only_knocks:
            pause(*settings.delay)  # the packet must not be the first to be seen
        if not settings.only_knocks:
            self.at_each(self.host, self.send_to, self.send, "got no packet")
        self.first = False

    def at_each(self, host: str, addresses: "List[Address]",
                act: "Callable[[socket.socket], None]", failure: str) -> None:
        """Do this at each address of a host; SpaError if it can't be done at any."""
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
            warn(f"one address of {host} {failure}: {complaint(each)}")

    def hit(self, link: "socket.socket") -> None:
        """Hit all of KNOCK_SEQUENCE at one address."""
        hits = self.settings.sequence or []
        if "icmp" in dict(hits):
            open_ping(link.family).close()  # half a sequence is worth nothing
        for number, (protocol, port) in enumerate(hits):
            if number:
                pause(*self.settings.delay)
            if self.settings.verbose:
                say("hitting %s %s:%d" % (protocol, link.getpeername()[0], port))
            send_hit(link, protocol, port)

    def send(self, link: "socket.socket") -> None:
        """Send a packet to one address, if it got one the first time."""
        peer, settings = link.getpeername(), self.settings
        if self.first:
            self.chosen[peer] = choose_address(settings, link)
        if peer in self.chosen:
            packet, dump = self.build(self.chosen[peer])
            if settings.verbose:
                say(dump)
            sent = send_packet(settings, link, packet)
            if settings.verbose:
                say("send_spa_packet: bytes sent: %d" % sent)

    def build(self, allow_ip: str) -> "Tuple[str, str]":
        """A fresh packet that asks to open for `allow_ip`, and its dump."""
        settings, (key, hmac_key) = self.settings, self.keys
        message = make_message(settings, allow_ip)
        plaintext = add_digest(encode_message(message), settings.digest_type)
        if settings.mode == GPG:
            data = encrypt_gpg(settings, plaintext, key)
        else:
            data = encrypt_salted(settings.mode, key or b"", os.urandom(SALT_LENGTH), plaintext)
        packet = seal(data, hmac_key, settings.hmac_type)
        tag_length = 0 if hmac_key is None else DIGESTS[settings.hmac_type].text_size
        check_length(packet, message, settings.digest_type, tag_length, settings.mode)
        if settings.save_packet is not None:
            write_private(settings.save_packet, packet + "\n",
                          os.O_APPEND if settings.save_append else os.O_TRUNC)
            settings.save_append = True  # the file gets all packets of a knock
        dumped = settings.test or settings.verbose
        return packet, format_dump(message, settings, packet, tag_length) if dumped else ""

    def show(self) -> None:
        """Print the hits and a packet, and send nothing (-T)."""
        settings = self.settings
        for protocol, number in settings.sequence or ():
            say("would hit %s %s:%d" % (protocol, settings.server or "", number))
        if not settings.only_knocks:
            links = open_links(self.host, self.send_to)
            link = next(links) if self.send_to else None
            say(self.build(choose_address(settings, link))[1])
            say("test mode enabled, SPA packet not actually sent."
                + "\nsend_spa_packet: bytes sent: 0" * settings.verbose)

    def wait(self, place: "Tuple[str, int]", addresses: "List[Address]") -> "socket.socket":
        """The connection to a TCP port that is to open at this host; SpaError if it does not."""
        import errno
        begin, settings = time.monotonic(), self.settings
        seconds = settings.wait or WAIT_SECONDS
        link, error = wait_until_open(addresses, seconds, self, settings.sequence is not None)
        if link is None:
            why = {0: "nothing answers. The server rejected the knock (its log says why), opened"
                      " for another address than ours, or does not get our packets",
                   errno.ECONNREFUSED: "connections are refused. The port may be open, but no"
                                       " service listens on it"}.get(error) or os.strerror(error)
            raise SpaError("tcp/%d of %s did not open in %d seconds: %s"
                           % (place[1], place[0], seconds, why))
        if settings.wait is not None and not (
                settings.relay or settings.execute or settings.quiet):
            say("tcp/%d of %s opened after %.2f seconds"
                % (place[1], link.getpeername()[0], time.monotonic() - begin))
        return link


def knock_at_all(several: "List[Settings]", words: "List[str]", command: "List[str]",
                 sent: "Callable[[], None]") -> "Optional[socket.socket]":
    """Knock at each server; the connection to relay, which is waited for after the last knock.

    With several servers each is tried, and errors are told at once. `sent` is called after each
    packet, before anything is waited for.
    """
    places = [find_place(settings, words, command) for settings in several]
    failed, link = 0, None  # type: int, Optional[socket.socket]
    for settings, place in zip(several, places):
        if settings.relay and settings is not several[-1]:
            place = None
        try:
            addresses = find_addresses(*place, settings.ip_version) if place else []
            knock = Knock(settings)
            if settings.test:
                knock.show()
            else:
                knock()
            sent()
            if place is not None:
                link = knock.wait(place, addresses)
        except SpaError as error:
            if len(several) == 1:
                raise
            name = settings.given["named_config"].text
            tell(f"[{name}] {complaint(error)}")
            failed += 1
        if link is not None and not settings.relay:
            link.close()
    if failed:
        raise SpaError("%d of %d knocks failed" % (failed, len(several)))
    return link


def read_settings(given: "Dict[str, Given]") -> "List[Settings]":
    """The settings for each of the names behind -n, or without it for the only server."""
    named = given.get("named_config")
    names = [name.strip() for name in named.text.split(",")] if named else []
    if named and "" in names:
        raise UsageError("-n: expected the name of a stanza, or several with commas in between,"
                         f" not '{named.text}'")
    layers = [dict(given, named_config=Given(name, "-n")) for name in names] or [given]
    return [Settings(merge(read_layers(layer) + [layer])) for layer in layers]


def run(words: "List[str]", as_knock: bool) -> bool:
    """Do what a command line says, or raise SpaError; tells whether a packet was sent."""
    given, others, command = (parse_knock_line if as_knock else parse_command_line)(words)
    if "knock" in given and not as_knock:
        raise UsageError("--knock: expected before all other options")
    Notes.wanted, Notes.unsaid = "quiet" not in given, ""
    saved = given["save_args_file"].text if "save_args_file" in given else home_file(
        given, ".fwknop.run")
    if "last_command" in given or "show_last" in given:
        if saved is None:
            raise UsageError("-l needs a home directory, or -E")
        kept = split_arguments(read_private(saved))
        if "show_last" in given:
            say("Last fwknop client command line: "
                + format_arguments(parse_command_line(kept)[0]))
            return False
        given, others, command = parse_command_line(kept + words)
    if "help" in given:
        say(format_help(as_knock))
    elif "version" in given:
        print_version()
    elif "man" in given:
        say(format_man())
    elif "completion" in given:
        say(format_completion(given["completion"].text))
    elif "stanza_list" in given:
        print_stanzas(given)
    else:
        several = read_settings(given)
        first = several[0]  # in what only the command line can say they are all the same
        if others and not first.relay:
            warn("%d of the words belong to no option and are ignored" % len(others))
        if first.key_gen or first.key_gen_file is not None:
            generate_keys(first, given)
            return False
        for settings in several:
            settings.check()
            draw_ports(settings)
            settings.save_append |= settings is not first  # -B: the packets of all of them
        if first.save_stanza:
            save_stanza(given, first.force_stanza)
        keep = None if first.test or first.no_save_args else saved
        link = knock_at_all(several, others, command, lambda: save_arguments(given, keep))
        if link is not None and first.relay:
            os._exit(relay(link))
        if command:
            become(command)
        return not first.test
    return False


def main(argv: "Optional[List[str]]" = None) -> int:
    """The exit code of a command line: see the docstring of this file."""
    words = sys.argv[1:] if argv is None else argv
    as_knock = os.path.basename(sys.argv[0]) == "knock" or words[:1] == ["--knock"]
    try:
        sent = run(words, as_knock)
        if Notes.unsaid and not sent:
            raise SpaError("standard output: " + Notes.unsaid)
        return 0
    except SpaError as error:
        tell(complaint(error))
        return (1 if as_knock else 2 if isinstance(error, UsageError) else
                3 if isinstance(error, ConfigError) else 1)
    except (OSError, ValueError) as error:
        tell(explain(error))
        return 1
    except KeyboardInterrupt:
        tell("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
