#!/usr/bin/env python3
"""Hide ports, and open them for a while to clients that prove in one packet that they hold a key.

This is a server for fwknop's single packet authorization (SPA), OpenSPA's knocks by public key, and
port knocking. It reads fwknopd.conf, access.conf and knockd.conf, understands the fwknop clients,
and drives nftables or iptables. It needs nothing but Python's standard library, and nft or
iptables. Comments cite tests/spec/fwknop.md, knockd.md, openspa.md and answer.md by section: the
formats and the behaviour of fwknop, knockd and OpenSPA, and our own answers.

The life of a packet, in the order of Gate.receive() and Gate.let_in() in section 29:

  capture    packet or UDP socket behind a kernel filter, TCP socket, file  sections 6, 18
  check      length and alphabet, before any key is touched                 section 4
  unlock     whose is it? HMAC first, then decrypt, then decode             sections 3, 4, 9, 15
  fresh      too old? seen before? from before this memory began?           section 16
  remember   on file before a door opens: a crash must not allow a replay   section 16
  judge      user, address, ports, expiry: what may this packet open?       sections 11, 27, 29
  open       the firewall gets the grant, and ends it by itself             sections 24, 19 to 21
  or run     commands instead of opening, or beside it, if a stanza says so section 25
  answer     once and encrypted, where a stanza says so: opened, or why not sections 3, 18, 29
  close      by the kernel when its time has come; by this server too       section 24

A packet for GPG waits at `unlock` while gpg runs beside the loop. When gpg has answered, the packet
starts again. A packet that may be a knock goes to KnockListener.take_knock() in section 28 instead.
The right next port advances its sequence (section 8); the last one opens or runs as above. OpenSPA
requests go to OspaGate.receive() in section 30; RSA (section 12) proves their keys.

Until a packet's key is proven, 18 functions of 199 lines have run, all of them together. The list
is for a packet socket and a stanza with HMAC, and ends with a line in the log:

  Server.drain, PacketCapture.receive, decode_ip, decode_header, Gate.receive, check_payload,
  Gate.authentic_stanzas, find_prefix, find_authentic, Gate.tell_near, Throttle.allows, socket_text,
  Log.write, Outlet.write, StreamOutlet.send, StreamOutlet.write_part, Tally.reject, Gate.is_full

The kernel drops junk of another form (payload_filter() in section 6); a NotSpa rejects what it
missed. A UDP or TCP socket has its own receive() (section 18). When packets come faster than they
can be tried, Crowd chooses by their sources (section 31). HTTP adds Gate.unwrap(), a SOURCE other
than ANY adds admitting(), Stanza.admits() and Gate.no_stanza(). If a stanza has no HMAC, decryption
proves the key: unlock() and all that it calls. A knock sequence has no key: decode_knock(),
KnockListener.take_knock() and all that they call. OpenSPA adds OspaGate.receive() and admit(),
unseal_ospa(), decode_ospa(), read_client_key() and RsaKey: its signature comes last.

Changes on this host: the firewall (sections 20 and 21: tables `inet spa` and `inet spa_nat`, rules
with a comment `spa_server.py:...`, chains FWKNOP_*), files in FWKNOP_RUN_DIR, METRICS_FILE, and by
--init the two files in /etc/fwknop. To undo them: -K, then --fw-flush, then --unguard. When the
server is killed, the kernel ends the grants; a guard stays until a server runs, --unguard or the
end of its trial.

Contents. Sections 1 to 13 compute: bytes, text and time go in, values come out; they read the
configuration and touch nothing else, apart from the user database, PATH, an optional import of
`cryptography`, and the mark on a line of one-time sequences that was used (section 8).

  1. Words and errors
  2. AES (FIPS 197)
  3. Encryption and HMAC of an SPA packet
  4. The SPA packet
  5. Directives
  6. Captured packets
  7. fwknopd.conf
  8. Knock sequences
  9. access.conf
  10. knockd.conf
  11. Judgement
  12. RSA (RFC 8017)
  13. The OpenSPA packet

From here on the machine is touched.

  14. Log and programs
  15. GPG
  16. Replay memory
  17. Netlink
  18. Capture
  19. Firewall
  20. nftables
  21. iptables
  22. Choice of a firewall, and leftovers
  23. The host's rules
  24. Grants
  25. Commands
  26. Configuration
  27. Access
  28. Knock listener
  29. Gate
  30. OpenSPA gate
  31. Server
  32. Process
  33. First configuration
  34. Units
  35. Check
  36. Command line

Exit codes: 0 done or stopped by a signal; 1 failed; 2 wrong command line; 3 unusable configuration.
"""

import array
import binascii
import collections
import contextlib
import errno
import heapq
import ipaddress
import os
import select
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from _operator import _compare_digest as compare_digest  # hmac's, which small Pythons lack
from functools import lru_cache, partial
from typing import (Any, Callable, Dict, FrozenSet, Generic, Iterable, Iterator, List, Mapping,
                    NamedTuple, Optional, Set, Tuple, Type, TypeVar, Union, overload)

try:
    import fcntl
except ImportError:  # on Windows, where main() says what this needs
    pass

VERSION = "0.1.0"


# ======================================================================================
# 1. Words and errors
#
# Stanza, directive, packet and digest are fwknop's words. A datagram is what came in; the class
# Packet has its verified fields. A door is a source, a destination, a protocol and a port; a grant
# is a door that is open until some time. The guard is our rules that close GUARD_PORTS to everybody
# without a grant. A cycle is a command that opens and one that closes again; a switch is the
# process that runs the second if this server is dead. A notice is a command that runs beside a
# grant. A void stanza has an error and opens nothing.
# ======================================================================================

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
Port = Tuple[str, int]  # ("tcp" or "udp", 1 to 65535)
T = TypeVar("T")

PROTOCOL_NUMBERS = {"tcp": 6, "udp": 17}


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


class ConfigError(SpaError):
    """A file or a directive that can't be used. Its text begins with file and line."""


class UsageError(SpaError):
    """A command line that can't be understood."""


class CommandError(SpaError):
    """A failure of a program, whose last line is `said`, or of the kernel: errno `number`."""

    def __init__(self, message: str, number: int = 0, said: str = "", hint: str = "") -> None:
        super().__init__(message, hint)
        self.number, self.said = number, said


class PacketRejected(Exception):
    """A packet's rejection. The server counts by the constant `reason`, and logs `template`. If it
    answers the packet, it sends `told`, or else the text of the log."""

    signer, plain = "", b""  # of a GPG message, if a stanza trusts it but for its signer: to log

    def __init__(self, reason: str, text: str, template: str = "[{source}] {stanza}{text}",
                 told: str = "") -> None:
        super().__init__(text)
        self.reason, self.template, self.told = reason, template, told or text
        self.stanza_number = 0  # of the stanza that rejected the packet


class WrongKey(PacketRejected):
    """The rejection by a stanza whose keys did not make the packet; those of another may have."""


class NotFresh(PacketRejected):
    """The rejection of a packet that is too old, too new, or a repetition: for every stanza. The
    server answers only if there is a text `told`."""

    def __init__(self, *arguments: str, told: str = "", timestamp: int = 0) -> None:
        super().__init__(*arguments)
        self.told, self.timestamp = told, timestamp  # the packet's, if that is what is wrong


class TooFast(PacketRejected):
    """The rejection of a packet before decryption, because too many like it came before."""


class Datagram(NamedTuple):
    """A datagram that came in. Addresses are packed: 4 bytes or 16."""

    payload: bytes  # empty in a knock packet, perhaps a step of a sequence
    source: bytes
    source_port: int  # 0 in a knock packet
    destination: bytes
    destination_port: int  # of an ICMP echo request, the number of its data bytes
    protocol: int = 17  # IP's number of UDP, TCP or ICMP; ICMP has no ports
    flags: int = 0  # TCP's, of a knock packet


# The kinds of doors. A connection may come in, or pass through this host; NAT may change its
# destination, or its source: to a given address, or to that of the interface it leaves by. The
# first connection that comes in through ONCE closes it.
INPUT, ONCE, FORWARD = "access", "once", "FORWARD"
DNAT, SNAT, MASQUERADE = "DNAT", "SNAT", "MASQUERADE"


class Door(NamedTuple):
    """A door that a grant opens: from a network to an address (None: to any) and a port."""

    source: Network
    destination: Optional[Address]
    protocol: str  # "*" with port 0 is everything
    port: int
    kind: str = INPUT
    target: Optional[Address] = None  # where DNAT leads to, or the source that SNAT gives
    target_port: int = 0

    def __str__(self) -> str:
        """Return the door as fwknopd's log writes it."""
        source = self.source.network_address if self.source.num_addresses == 1 else self.source
        destination = self.destination or ("0.0.0.0/0" if self.source.version == 4 else "::/0")
        return f"{source} -> {destination} {self.protocol}/{self.port or '*'}"

    @property
    def match(self) -> "Door":
        """Return the door without its target. Of doors that differ only there, one can be open."""
        return self._replace(target=None, target_port=0)

    def overlaps(self, other: "Door") -> bool:
        """Tell whether a connection could take either of the two doors."""
        return (self.source.overlaps(other.source)
                and (None in (self.destination, other.destination)
                     or self.destination == other.destination)
                and (0 in (self.port, other.port)
                     or (self.protocol, self.port) == (other.protocol, other.port)))

    @property
    def rule_name(self) -> str:
        """Return the name that fwknopd's log gives the rule: `access`, `FORWARD ALL`, `SNAT`."""
        kind = {MASQUERADE: SNAT, ONCE: INPUT}.get(self.kind, self.kind)
        return kind if self.port else f"{kind} ALL"

    def entrance(self, doors: List["Door"]) -> Tuple[str, "Door"]:
        """Return the rule's name, and the door that fwknopd's log line has in place of this one:
        with NAT the door that DNAT opens, whose target is this door's port."""
        front = [door for door in doors if door.kind == DNAT != self.kind and
                 (door.protocol, door.target_port) == (self.protocol, self.port)]
        if not front:
            return self.rule_name, self
        return "local NAT" if self.rule_name == INPUT else self.rule_name, front[0]

    def describe(self) -> str:
        """Return the door with its kind, unless that is access, and with its target."""
        text = str(self) if self.kind == INPUT else f"{self.kind} {self}"
        return f"{text} to {self.target_text()}" if self.target else text

    def target_text(self) -> str:
        """Return the target as iptables writes it: `10.66.0.2:22`, `[fd66::2]:22`, an address."""
        if not self.target_port:
            return str(self.target)
        host = f"[{self.target}]" if self.source.version == 6 else str(self.target)
        return f"{host}:{self.target_port}"


class Grant(NamedTuple):
    """An open door."""

    door: Door
    expires: int  # epoch seconds
    ends: float  # the same time on the monotonic clock
    stanza_number: int = 0  # of the stanza that opened it; 0 is unknown, -1 another program
    early: bool = False  # whether the server closes it before the kernel would end it


# ======================================================================================
# 2. AES (FIPS 197)
#
# The block cipher alone, from the standard. Modes are in section 3. Where anybody can make the
# server decrypt, `cryptography` takes its place (section 3, fastest_cipher).
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

# ======================================================================================
# 3. Encryption and HMAC of an SPA packet
#
# Digests, HMAC types, keys and encryption modes (tests/spec/fwknop.md 1.6 to 1.8). The server
# decrypts packets, and encrypts only its answers (tests/spec/answer.md).
# ======================================================================================

SALTED_PREFIX = b"U2FsdGVkX1"  # base64 of "Salted__": no client sends it, but the HMAC covers it
ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
ALPHABET_AND_PADDING = ALPHABET + b"="
MAX_KEY_BYTES, LEGACY_KEY_BYTES, MAX_HMAC_KEY_BYTES = 32, 16, 128
MAX_PASSPHRASE_BYTES = 255  # gpg's
PLACEHOLDER = "__CHANGEME__"  # stands for a key in fwknop's sample files
MODES = {"CBC": 2, "ECB": 1, "CFB": 3, "OFB": 5, "CTR": 6, "LEGACY": 8}  # and fwknop's numbers
ASYMMETRIC = "Asymmetric"  # the mode that is GPG
NOT_DECRYPTED = "Error creating fko context: Decryption failed or decrypted data is invalid"


class Secret(bytes):
    """Bytes that neither a message nor a traceback shows."""

    def __repr__(self) -> str:
        return "<secret>"

    __str__ = __repr__


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


def expect(right: bool, what: str) -> None:
    """Raise ValueError that `what` was expected, unless the value is `right`."""
    if not right:
        raise ValueError(f"expected {what}")


def encode_base64(data: bytes) -> bytes:
    """Return base64 (RFC 4648) without '=', as all SPA packets have it."""
    return binascii.b2a_base64(data, newline=False).rstrip(b"=")


def decode_base64(text: bytes) -> bytes:
    """Return the bytes of a base64 text without '='; ValueError for another character or length."""
    if len(text) % 4 == 1 or text.translate(None, ALPHABET):
        raise ValueError("expected base64")
    return binascii.a2b_base64(text + b"=" * (-len(text) % 4))


class LibraryAes:
    """The same as Aes, by `cryptography`.

    Its import takes 6 MB and 80 ms, longer than our AES needs for 500 packets. With an HMAC
    the server decrypts only genuine packets, so the import pays only for a stanza without one.
    """

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        cipher = Cipher(algorithms.AES(key), modes.ECB())
        self.encrypt_block = cipher.encryptor().update
        self.decrypt_blocks = cipher.decryptor().update


def fastest_cipher() -> Any:
    """Return LibraryAes if it works here, else Aes."""
    try:
        LibraryAes(bytes(16))
    except Exception:  # a broken installation may raise anything; ours does the same work
        return Aes
    return LibraryAes


def decrypt(cipher: Any, mode: str, iv: bytes, text: bytes) -> bytes:
    """Decrypt `text` in `mode`, padding included (NIST SP 800-38A section 6).

    CTR encrypts as it decrypts, and its last block may be a part; the others need whole blocks.
    """
    if mode in ("CFB", "OFB", "CTR"):
        plain, given = b"", iv
        for start in range(0, len(text), 16):
            block, output = text[start:start + 16], cipher.encrypt_block(given)
            plain += exclusive_or(block, output)
            counter = (int.from_bytes(given, "big") + 1) % (1 << 128)  # appendix B.1
            given = {"CFB": block, "OFB": output, "CTR": counter.to_bytes(16, "big")}[mode]
        return plain
    plain = cipher.decrypt_blocks(text)
    return plain if mode == "ECB" else exclusive_or(plain, iv + text)


def strip_padding(plain: bytes, optional: bool = False) -> bytes:
    """Return `plain` without its PKCS #7 padding (RFC 5652 section 6.3); ValueError without one. If
    it is `optional`, the last block may end in another byte than a padding does."""
    # fwknopd lets wrong padding pass. Here every byte counts: else an attacker could change the
    # padding of a captured packet without HMAC, and send it again as a new one.
    length = plain[-1]
    if optional and length > 16:
        return plain
    expect(1 <= length <= 16 and plain[-length:] == bytes([length]) * length, "padding")
    return plain[:-length]


# The first use of a key. With many stanzas this is most of what junk costs, so Hmac.__call__ stands
# here without its call. All are computed: the time does not tell which one was right.
def find_authentic(locks: List[Tuple[Hmac, List[T]]], payload: bytes, length: int) -> List[T]:
    """Return the owners of each HMAC that fits the packet, whose tag has `length` characters."""
    found, encode = [], binascii.b2a_base64  # type: List[T], Callable[..., bytes]
    body, tag = payload[:-length], payload[-length:] + b"=" * (-length % 4) + b"\n"
    for hmac, owners in locks:
        inner, outer = hmac.inner.copy(), hmac.outer.copy()
        inner.update(body)
        outer.update(inner.digest())
        if compare_digest(encode(outer.digest()), tag):
            found += owners
    return found


class Keys:
    """The HMAC of a stanza, by what the client left off the base64 of a packet: its prefix."""

    prefixes: Tuple[bytes, ...] = (SALTED_PREFIX,)
    signed = ""  # the log line about the signer of the last packet
    respelt = True  # whether one plaintext has many spellings: then it is remembered as well
    accepts_bare = False  # whether another stanza accepts these packets without their tag
    mode = ASYMMETRIC

    def __init__(self, hmac_type: Digest, hmac_key: bytes) -> None:
        self.has_hmac, self.tag_length = bool(hmac_key), hmac_type.text_size if hmac_key else 0
        self.lock = hmac_type.name, hmac_key  # the same in all stanzas that share an HMAC key
        self.hmacs = {prefix: Hmac(hmac_type, hmac_key, prefix) for prefix in self.prefixes}
        self.malformed = PacketRejected if hmac_key else WrongKey  # it may have another's tag

    def mark_genuine(self) -> None:
        """Take a packet that proved genuine and new off the rate limit, where one holds (GPG)."""

    def body(self, payload: bytes) -> bytes:
        """Return a packet without its tag, or, without HMAC, without the '=' that may follow it."""
        return payload[:-self.tag_length] if self.has_hmac else payload.rstrip(b"=")


class PacketKeys(Keys):
    """The keys of one stanza, prepared to unlock its packets fast."""

    def __init__(self, key: bytes, mode: str, hmac_key: bytes, hmac_type: Digest) -> None:
        super().__init__(hmac_type, hmac_key)
        self.secret, self.mode, self.respelt = key, mode, mode == "LEGACY"
        if mode == "LEGACY":  # cut the key, or fill it up with the digit zero (fwknop.md 1.7)
            self.secret = Secret(key[:LEGACY_KEY_BYTES].ljust(LEGACY_KEY_BYTES, b"0"))
        self.cipher = Aes if hmac_key else fastest_cipher()

    def decrypt(self, ciphertext: bytes) -> bytes:
        """Return the plaintext of "Salted__", salt and encrypted blocks; WrongKey if it is none."""
        if len(ciphertext) % 16 or len(ciphertext) < 48:
            raise self.malformed("malformed", invalid_data("ENCRYPT_CIPHERLEN_VALIDFAIL"))
        key, iv = bytes_to_key(DIGESTS["MD5"], self.secret, ciphertext[8:16])
        cipher = self.cipher(key)
        # A plaintext begins with sixteen digits: without an HMAC, one block tells junk.
        for end in (32, len(ciphertext))[self.has_hmac:]:
            plain = decrypt(cipher, self.mode, iv, ciphertext[16:end])
            if not ciphertext.startswith(b"Salted__") or not plain[:16].isdigit():
                raise WrongKey("wrong key", NOT_DECRYPTED)
        try:
            return strip_padding(plain, self.mode == "LEGACY")  # libfko 2.0.3 sends some without
        except ValueError:  # fwknopd checks no padding, and finds characters that no field has
            raise WrongKey("wrong key", invalid_data("DECODE_NON_ASCII")) from None


def seal_answer(packet: bytes, key: bytes, hmac_key: bytes, done: bool, text: str,
                nonce: bytes) -> bytes:
    """Return the answer to a packet that these keys have made; `nonce` is 8 random bytes.

    It is not longer than the packet. Its own two keys are made for this packet alone, so that
    nobody can take it for a packet, or for the answer to another one (tests/spec/answer.md 1).
    """
    sha256, most = DIGESTS["SHA256"], len(packet) - len(nonce) - 2 - 32  # version, status; tag
    digest = sha256(packet)
    encryption_key = Hmac(sha256, key)(b"spa answer encryption" + digest)
    compute_tag = Hmac(sha256, Hmac(sha256, hmac_key)(b"spa answer authentication" + digest))
    text = "".join(c if " " <= c <= "~" else "?" for c in text)
    text = text if len(text) <= most else text[:most - 3] + "..."
    plain = bytes([not done]) + text.encode()
    answer = b"\1" + nonce + decrypt(Aes(encryption_key), "CTR", nonce + bytes(8), plain)
    return answer + compute_tag(answer)


# ======================================================================================
# 4. The SPA packet
#
# Fields and their rules (tests/spec/fwknop.md 1.2 to 1.6, 1.9), for all seven message types.
# fwknopd's C parser accepts some texts that no client sends. This one does not: numbers are digits
# only, and an address has no leading zeros. IPv6 addresses are our extension.
# ======================================================================================

MIN_PAYLOAD, MAX_PAYLOAD = 140, 1500  # tests/spec/fwknop.md 1.10
GPG_LENGTH = 400  # from here on a packet is GPG's (tests/spec/fwknop.md 1.9)
GPG_PREFIX = b"hQ"  # no client sends it before its GPG packet, but the HMAC covers it
# An OpenPGP message begins with the packet of a session key: tag octet, length, version 3 (RFC 4880
# sections 4.2 and 5.1). For RSA keys of 2048 bits and more gpg writes the old format with a length
# of two octets, 85 0x xx 03; no client sends the first two characters of that, `hQ`. It sends all
# other messages whole, and they begin with `h` or `w`: `hF4D` is 84 5E 03, Curve25519's with a
# length of one octet; `w` is the new format, C1. A text without its `hQ` begins with the rest of
# the length. There, `h` would mean 2,112 octets or more; 1,500 characters hold 1,125.
GPG_WHOLE = (b"h", b"w")  # a packet of AES begins with 8, 9, + or /

COMMAND, ACCESS, NAT, ACCESS_TIMEOUT, NAT_TIMEOUT, LOCAL_NAT, LOCAL_NAT_TIMEOUT = range(7)
MESSAGE_TYPES = (
    "Command msg", "Access msg", "NAT access msg", "Client timeout access msg",
    "Client timeout NAT access msg", "Local NAT access msg", "Client timeout local NAT access msg")
NAT_TYPES = (NAT, NAT_TIMEOUT, LOCAL_NAT, LOCAL_NAT_TIMEOUT)
LOCAL_NAT_TYPES = (LOCAL_NAT, LOCAL_NAT_TIMEOUT)
TIMEOUT_TYPES = (ACCESS_TIMEOUT, NAT_TIMEOUT, LOCAL_NAT_TIMEOUT)

MAX_TIMEOUT = 65536  # seconds (tests/spec/fwknop.md 1.2)
PRINTABLE = bytes(range(0x20, 0x7F))
USER_CHARACTERS = PRINTABLE.translate(None, b'"/\\[]:;|=,+*?<>').decode()  # fwknop.md 1.3
NAT_EXCLUDED = " /?\"'\\`"  # fwknop.md 1.5


class Packet(NamedTuple):
    """The fields of an SPA packet, in the order of the wire (tests/spec/fwknop.md 1.2)."""

    random: str
    user: str
    timestamp: int  # epoch seconds of the client's clock
    version: str
    type: int
    message: str
    nat: Optional[Tuple[str, int]]
    server_auth: Optional[str]
    timeout: int  # seconds that the client asks for; 0 if it does not
    digest_type: str
    address: Optional[Address]  # None: the packet's source
    ports: Tuple[Port, ...]
    command: str
    plain: bytes  # all of them as they came, and their digest

    def dump(self, payload: bytes, keys: Keys) -> List[str]:
        """Return the fields as fwknop prints them, for VERBOSE; server_auth is a password."""
        null, hidden, body = "<NULL>", "(not shown)", keys.body(payload)
        text, _, digest = self.plain.decode("ascii").rpartition(":")
        hmac_type = f"{DIGESTS[keys.lock[0]].number} ({keys.lock[0]})"
        mode = keys.mode.replace("LEGACY", "legacy")
        fields = (
            ("Random Value", self.random), ("Username", self.user), ("Timestamp", self.timestamp),
            ("FKO Version", self.version),
            ("Message Type", f"{self.type} ({MESSAGE_TYPES[self.type]})"),
            ("Message String", self.message),
            ("Nat Access", ",".join(map(str, self.nat)) if self.nat else null),
            ("Server Auth", hidden if self.server_auth else null),
            ("Client Timeout", self.timeout),
            ("Digest Type", f"{DIGESTS[self.digest_type].number} ({self.digest_type})"),
            ("HMAC Type", hmac_type if keys.has_hmac else "0 (None)"),
            ("Encryption Type", "2 (GPG)" if mode == ASYMMETRIC else "1 (Rijndael)"),
            ("Encryption Mode", f"{MODES.get(keys.mode, 7)} ({mode})"),
            ("Encoded Data", hidden if self.server_auth else text), ("SPA Data Digest", digest),
            ("HMAC", payload[len(body):].decode("ascii") if keys.has_hmac else null),
            ("Final SPA Data", body.decode("ascii")))
        return ["SPA Field Values:", "=" * 17] + [f"{name:>15}: {value}" for name, value in fields]


def invalid_data(name: str) -> str:
    """Return the log text for fwknop's name of an error (fwknop.md Appendix A)."""
    return "Error creating fko context: Args contain invalid data: FKO_ERROR_INVALID_DATA_" + name


def check_field(right: bool, name: str) -> None:
    """Reject the packet as malformed, with fwknop's name of the error, unless `right`."""
    if not right:
        raise PacketRejected("malformed", invalid_data(name))


ERROR_CODES = {**dict(enumerate((  # our log names the first four
    "Data is not a valid SPA message format", "Not enough data to be a valid SPA message",
    "Data is not an SPA message", "SPA via HTTP request, but ENABLE_SPA_OVER_HTTP is not set",
    "Error creating FKO context for incoming data.", "Unable to retrieve digest from the SPA data.",
    "Error trying to access the digest.cache file", "Detected SPA message replay",
    "SPA message timestamp is outside the allowable window",
    "SPA message did not pass access checks",
    "An error occurred while executing an SPA command message", "Unsupported SPA message operation",
    "Undefined/unknown fwknopd Error", "General SPA message processing error"), 4096)),
    8192: "An error occurred while tring to add a firewall rule",  # sic
    8193: "An error occurred while tring to delete a firewall rule",
    8194: "Unknown/unclassified firewall rule processing error"}


class NotSpa(PacketRejected):
    """The rejection of a datagram that is no SPA packet, with fwknopd's number for the reason."""

    def __init__(self, reason: str, number: int) -> None:
        super().__init__(reason, f"preprocess_spa_data() returned error {number}: "
                         f"'{ERROR_CODES[number]}' for incoming packet.")


def check_payload(payload: bytes) -> None:
    """Reject a payload that no client sends, by length and characters (fwknop.md 1.9, 1.10)."""
    if not MIN_PAYLOAD <= len(payload) <= MAX_PAYLOAD:
        raise NotSpa("length", 4097)
    if payload.translate(None, ALPHABET_AND_PADDING):
        raise NotSpa("not an SPA packet", 4098)
    if payload.startswith(SALTED_PREFIX) or (
            len(payload) > GPG_LENGTH and payload.startswith(GPG_PREFIX)):
        raise NotSpa("not an SPA packet", 4096)


def decode_request(request: bytes, any_agent: bool) -> Tuple[bytes, Optional[str]]:
    """Return the SPA packet in an HTTP request, and the last address of its X-Forwarded-For if any.

    `GET /PACKET ...`, or as to a proxy `GET http://HOST/PACKET ...`, with `-` for `+` and `_` for
    `/` (tests/spec/fwknop.md 1.14). The proxy that sent the request saw the last address of the
    list itself. It copied the others from what it got, and a client may have made them up.
    """
    header, end, _ = request.replace(b"\r\n", b"\n").partition(b"\n\n")
    line, *lines = header.split(b"\n")
    target = (line.split(None, 2) + [b""])[1]
    if target[:7].lower() == b"http://":
        target = b"/" + target[7:].partition(b"/")[2]
    fields = {name.lower(): value.strip()
              for name, _, value in (each.partition(b":") for each in lines)}
    agent = fields.get(b"user-agent", b"")
    forwarded = fields.get(b"x-forwarded-for") if end else None  # the rest might name another
    if not target.startswith(b"/") or not (any_agent or agent.startswith(b"Fwknop")):
        raise NotSpa("not an SPA packet", 4098)
    return (target[1:].replace(b"-", b"+").replace(b"_", b"/"),
            None if forwarded is None else forwarded.rpartition(b",")[2].strip().decode("latin-1"))


def parse_forwarded(text: str) -> Address:
    """Parse an address of X-Forwarded-For; some proxies write the client's port behind it."""
    host, _, port = text.rpartition(":")
    if is_port(port) and (":" not in host or host.endswith("]")):
        text = host
    return parse_address(text[1:-1] if text.startswith("[") and text.endswith("]") else text)


def find_prefix(payload: bytes) -> bytes:
    """Return what the client left off the base64 text of a packet (see GPG_WHOLE)."""
    if payload.startswith(GPG_WHOLE):
        return b""
    return GPG_PREFIX if len(payload) >= GPG_LENGTH else SALTED_PREFIX


def is_gpg(payload: bytes) -> bool:
    """Tell whether it is a GPG packet: by its length, or by its beginning if it is short."""
    return find_prefix(payload) != SALTED_PREFIX


def wrong_type(payload: bytes) -> WrongKey:
    """Return the rejection of a packet when no stanza has keys for its kind of encryption."""
    number, size = 2 if is_gpg(payload) else 1, len(payload)
    if number == 2 and size < GPG_LENGTH:  # to fwknopd this is AES, which no client sends so
        return WrongKey("encryption type", "Error creating fko context: Args contain invalid data: "
                        f"{size} characters, which begin as a GPG packet does")
    return WrongKey("encryption type", "No stanza encryption mode match for encryption type: "
                    f"{number}. ({size} characters; from {GPG_LENGTH} on it is a GPG packet)")


def unlock(payload: bytes, keys: Union[PacketKeys, "GpgKeys"]) -> Tuple[Packet, List[bytes]]:
    """Decrypt and decode an authentic payload; return the packet, and texts to remember it by.

    The last text is the one that a real client sends, so that its digest is the one in fwknopd's
    digest.cache. An attacker who changes spare bits of a captured packet (fwknop.md 1.13) gets the
    same text. With OpenPGP he can do more: write the lengths of a captured message in other ways,
    or put packets before it that mean nothing. In legacy mode he can leave out a block of padding.
    So the plaintext, which only a key holder can make, is a text as well. So is the packet without
    its tag, if another stanza accepts that.
    """
    body, prefix = keys.body(payload), find_prefix(payload)
    try:
        ciphertext = decode_base64(prefix + body)
    except ValueError:
        raise keys.malformed("malformed", invalid_data("ENCRYPT_CIPHERLEN_DECODEFAIL")) from None
    plain = keys.decrypt(ciphertext)
    bare = encode_base64(ciphertext)[len(prefix):]
    texts = [plain] if keys.respelt else []
    texts += [bare] if keys.accepts_bare else []
    return decode_packet(plain), texts + [bare + payload[len(body):].strip(b"=")]


def decode_packet(plain: bytes) -> Packet:
    """Decode the fields of RAND:USER:TIMESTAMP:VERSION:TYPE:MSG[:NAT][:AUTH][:TIMEOUT]:DIGEST."""
    if not plain[:16].isdigit() or plain[16:17] != b":":
        raise WrongKey("wrong key", NOT_DECRYPTED)
    check_field(not plain.translate(None, PRINTABLE), "DECODE_NON_ASCII")
    fields = plain.split(b":")
    check_field(len(fields) >= 7, "DECODE_LT_MIN_FIELDS")
    digest_type = find_digest(plain[:-len(fields[-1]) - 1], fields[-1])
    random, user, timestamp, version, kind, message = fields[:6]
    check_field(timestamp != b"", "DECODE_TIMESTAMP_MISSING")
    check_field(len(timestamp) <= 12, "DECODE_TIMESTAMP_TOOBIG")
    check_field(timestamp.isdigit(), "DECODE_TIMESTAMP_DECODEFAIL")
    check_field(version != b"", "DECODE_VERSION_MISSING")
    check_field(len(version) <= 8, "DECODE_VERSION_TOOBIG")
    check_field(kind != b"", "DECODE_MSGTYPE_MISSING")
    check_field(len(kind) <= 2, "DECODE_MSGTYPE_TOOBIG")
    check_field(kind.isdigit() and int(kind) <= LOCAL_NAT_TIMEOUT, "DECODE_MSGTYPE_DECODEFAIL")
    message_type = int(kind)
    nat, server_auth, timeout = decode_extra(message_type, fields[6:-1])
    text = decode_text(message, 256, "DECODE_MESSAGE")
    address, ports, command = decode_message(message_type, text)
    name = decode_text(user, 64, "DECODE_USERNAME")
    check_field(set(name) <= set(USER_CHARACTERS), "DECODE_USERNAME_VALIDFAIL")  # fwknop.md 1.3
    return Packet(random.decode(), name, int(timestamp), version.decode(), message_type, text, nat,
                  server_auth, timeout, digest_type, address, ports, command, plain)


def find_digest(message: bytes, text: bytes) -> str:
    """Return the name of the digest of `message` that `text` is, by its length (fwknop.md 1.6)."""
    candidates = [digest for digest in DIGESTS.values() if digest.text_size == len(text)]
    if not candidates:
        raise PacketRejected("malformed", "Error creating fko context: Invalid digest type")
    for digest in candidates:  # SHA-2 before the SHA-3 of the same length
        if encode_base64(digest(message)) == text:
            return digest.name
    raise PacketRejected("malformed", "Error creating fko context: "
                         "The computed digest did not match the digest in the spa data")


def decode_text(field: bytes, longest: int, name: str) -> str:
    """Decode a base64 field of at most `longest` characters; `name` begins its errors."""
    check_field(field != b"", name + "_MISSING")
    check_field(len(field) <= longest, name + "_TOOBIG")
    try:
        return decode_base64(field).decode("latin-1")
    except ValueError:
        raise PacketRejected("malformed", invalid_data(name + "_DECODEFAIL")) from None


def decode_extra(message_type: int,
                 extra: List[bytes]) -> Tuple[Optional[Tuple[str, int]], Optional[str], int]:
    """Decode NAT, SERVER_AUTH and TIMEOUT, as far as the type has them (fwknop.md 1.2)."""
    with_nat, with_timeout = message_type in NAT_TYPES, message_type in TIMEOUT_TYPES
    check_field(len(extra) <= 1 + with_nat + with_timeout, "DECODE_WRONG_NUM_FIELDS")
    check_field(len(extra) >= with_nat, "DECODE_NATACCESS_MISSING")
    check_field(len(extra) >= with_nat + with_timeout, "DECODE_TIMEOUT_MISSING")
    timeout = extra.pop() if with_timeout else b"0"
    check_field(timeout.isdigit(), "DECODE_TIMEOUT_VALIDFAIL")
    check_field(len(timeout) <= 16 and int(timeout) <= MAX_TIMEOUT, "DECODE_TIMEOUT_DECODEFAIL")
    nat = decode_nat(extra.pop(0)) if with_nat else None
    return nat, decode_text(extra[0], 256, "DECODE_SRVAUTH") if extra else None, int(timeout)


def decode_nat(field: bytes) -> Tuple[str, int]:
    """Decode `host,port` (tests/spec/fwknop.md 1.5). The host may be a name, or empty."""
    host, comma, port = decode_text(field, 256, "DECODE_NATACCESS").partition(",")
    check_field(bool(comma) and len(host) <= 70 and not set(host) & set(NAT_EXCLUDED)
                and is_port(port), "DECODE_NATACCESS_VALIDFAIL")
    return host, int(port)


def decode_message(message_type: int, text: str) -> Tuple[Optional[Address], Tuple[Port, ...], str]:
    """Decode `IP,proto/port[,...]` or `IP,command` to address, ports, command (fwknop.md 1.4)."""
    ip_text, comma, rest = text.partition(",")
    is_command = message_type == COMMAND
    name = "DECODE_MESSAGE_VALIDFAIL" if is_command else "DECODE_ACCESS_VALIDFAIL"
    check_field(bool(comma and rest), name)
    try:
        address = parse_address(ip_text)
        ports = [] if is_command else [parse_port(item) for item in rest.split(",")]
    except ValueError:
        raise PacketRejected("malformed", invalid_data(name)) from None
    return (None if address.is_unspecified else address, tuple(dict.fromkeys(ports)),
            rest if is_command else "")


def port_list(ports: Iterable[Port]) -> str:
    """Return ports as text, sorted: `tcp/22, udp/53`."""
    return ", ".join(f"{protocol}/{number}" for protocol, number in sorted(ports))


def is_port(text: str) -> bool:
    """Tell whether `text` is a port number: up to five digits, 1 to 65535."""
    return 0 < len(text) <= 5 and not text.strip("0123456789") and 1 <= int(text) <= 65535


def parse_port(text: str) -> Port:
    """Parse `tcp/22` or `udp/53` to (protocol, port)."""
    protocol, _, port = text.partition("/")
    expect(protocol in PROTOCOL_NUMBERS and is_port(port), "tcp/PORT or udp/PORT, PORT 1 to 65535")
    return protocol, int(port)


def parse_address(text: str) -> Address:
    """Parse an IPv4 or IPv6 address; an IPv4-mapped one (::ffff:1.2.3.4) becomes IPv4."""
    octets = text.split(".")
    try:
        # inet_aton() reads 010 as eight, Python before 3.9.5 as ten: nobody can tell what is meant.
        if "%" in text or (len(octets) == 4 and any(len(o) > 1 and o[0] == "0" for o in octets)):
            raise ValueError
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("expected an IP address, without leading zeros or scope") from None
    return getattr(address, "ipv4_mapped", None) or address


# ======================================================================================
# 5. Directives
#
# One row per directive of a file: a typed attribute that knows its name, parser, default and
# help. Reading, the dump and the README's tables walk the rows. A directive that the
# server ignores, because it can't widen access, has a row as well.
# ======================================================================================

class Directive(Generic[T]):
    """A row: `settings.attribute` is its value, parsed from a file's text or from the default."""

    secret = False  # whether no dump and no message may show the value

    def __init__(self, names: str, parse: Callable[[str], T], default: str, help: str) -> None:
        self.names = names.split()  # dumps and errors write the first one
        self.name, self.parse, self.default, self.help = self.names[0], parse, default, help
        self.is_path = parse in (parse_path, parse_home)

    def __set_name__(self, owner: type, attribute: str) -> None:
        """Note the attribute's name."""
        self.attribute = attribute

    @overload
    def __get__(self, settings: None, owner: type) -> "Directive[T]": ...

    @overload
    def __get__(self, settings: "Settings", owner: type) -> T: ...

    def __get__(self, settings: Optional["Settings"], owner: type) -> Union["Directive[T]", T]:
        """Return the row of a class. An instance's __dict__ has the values, and goes first."""
        if settings is None:
            return self
        raise AttributeError(f"{self.name} has no value before set_defaults()")


class Flag(Directive[bool]):
    """A row that is Y or N: only the first letter counts, and whatever says no is N in fwknopd."""

    def __init__(self, names: str, help: str, default: str = "N") -> None:
        super().__init__(names, self.parse_flag, default, help)

    @staticmethod
    def parse_flag(text: str) -> bool:
        """Parse Y or N; a word for yes is refused, since fwknopd takes it for N."""
        no = text.lower() in ("0", "false", "off", "disable", "disabled")
        return choice("Y", "N")("N" if no else text[:1]) == "Y"


class NoDefault(Directive[Optional[T]]):
    """A row whose default is None."""

    def __init__(self, names: str, parse: Callable[[str], T], help: str,
                 secret: bool = False) -> None:
        super().__init__(names, lambda text: parse(text) if text else None, "", help)
        self.secret, self.is_path = secret, parse in (parse_path, parse_home)


class Ignored(Directive[str]):
    """Directives of fwknopd that change nothing here; a file that sets one causes a warning."""

    def __init__(self, names: str, why: str, parse: Callable[[str], str] = str) -> None:
        super().__init__(names, parse, "", why)


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


BYTE_ORDER_MARK = "\xef\xbb\xbf"  # of UTF-8, read as Latin-1; Windows puts it before a text
CLIENT_NAMES = frozenset("ACCESS ALLOW_IP SPA_SERVER SPA_SERVER_PORT SPOOF_USER USE_HMAC".split())
INCLUDES = ("%include", "%include_folder", "%include_keys")


class Line(NamedTuple):
    """One directive as a file has it, or (number 0) as an option of the command line set it."""

    file: str
    number: int
    name: str
    value: str
    characters: str = NAME_CHARACTERS  # of names that errors may show; others may be part of a key

    def error(self, text: object) -> SpaError:
        """Return the error `text`, with file, number and name of this line before it."""
        if not self.number:
            return UsageError(f"{self.file}: {text}")
        name = self.name.rstrip(";:")
        named = (name[:1].isalpha() and not name.strip(self.characters)) or name in INCLUDES
        shown = self.name.rstrip(";") + ": " if named else ""
        return ConfigError(f"{self.file}:{self.number}: {shown}{text}")

    def misread(self, text: object) -> SpaError:
        """Return the error `text`, or what is wrong with the line's name if that is clear."""
        name, mistake = find_mistake(f"{self.name} {self.value}", file_of)
        if self.name.startswith("["):
            mistake = "a stanza with a [name] is the client's, and belongs in its ~/.fwknoprc"
        elif self.name.lower().lstrip("%")[:7] == "include" and self.name not in INCLUDES:
            mistake = f"expected {', '.join(INCLUDES[:2])} or {INCLUDES[2]}, in small letters"
        return self._replace(name=name or self.name).error(mistake or text)


def file_of(name: str) -> str:
    """Return the file that a directive belongs in, "" if it is unknown."""
    if name in CLIENT_NAMES:
        return "the client's ~/.fwknoprc"
    return "fwknopd.conf" if ServerSettings.row(name) else "access.conf" if Stanza.row(name) else ""


class Settings:
    """The directives of one file or stanza. Subclasses are tables of rows."""

    file = "access.conf"  # the usual name
    skips = False  # whether a name that nobody knows is a warning only, as in fwknopd
    expands = False  # whether `$NAME` at the start of a value stands for another directive's value
    directory = ""  # where relative paths begin; "": the process's, as in fwknopd

    def __init__(self) -> None:
        self.texts: Dict[str, str] = {}  # values that a file or an option set, by the row's name
        self.lines: Dict[str, Line] = {}  # the lines that set them

    @classmethod
    @lru_cache(maxsize=None)
    def rows(cls) -> Tuple[Directive[Any], ...]:
        """Return the rows in the order of the table."""
        return tuple(row for row in vars(cls).values() if isinstance(row, Directive))

    @classmethod
    def row(cls, name: str) -> Optional[Directive[Any]]:
        """Return the row of a directive; NAME_* in a row stands for all names that begin so."""
        return next((row for row in cls.rows() for known in row.names if name == known
                     or (known.endswith("_*") and name.startswith(known[:-1]))), None)

    def set_line(self, line: Line) -> List[str]:
        """Set the directive of a line, or raise ConfigError; return warnings."""
        row = self.row(line.name)
        if row is None:
            return [self.skip(line)]
        value = line.value if row.secret else line.value.rstrip()
        doubt = doubt_key(row.name, value.strip()) if isinstance(row, Key) else ""
        try:
            value = self.expand(value)
            if row.is_path and value[:1] not in ("", "/", "~"):
                is_name = row.name.endswith("_EXE") and "/" not in value
                # In this directory another user may have put a program of that name.
                value = (is_name and find_program(value)) or os.path.join(
                    "/usr/sbin" if is_name else self.directory or os.getcwd(), value)
            self.__dict__[row.attribute] = row.parse(value)
        except ValueError as error:
            shown = doubt if row.secret else f"not '{value}'"
            raise line.error(f"{error}, {shown}" if shown else error) from None
        self.texts[row.name], self.lines[row.name] = value, line
        warning = f" is ignored: {row.help}" if isinstance(row, Ignored) else doubt and ": " + doubt
        return [f"{line.file}:{line.number}: {line.name}{warning}"] if warning else []

    def skip(self, line: Line) -> str:
        """Return the warning that a line is ignored; ConfigError if it can have a meaning here."""
        name, file = line.name, file_of(line.name)
        # Slips in access.conf's names count as well: RESTRICT_PORT was meant to close something.
        tables = (type(self), Stanza) if self.skips else (type(self),)
        near = near_name(name, [
            known for table in tables for row in table.rows() for known in row.names])
        if file or near or not self.skips or name.strip(KNOCKD_CHARACTERS) or len(name) > 32:
            raise line.misread(f"this belongs in {file}" if file else "unknown directive" + (
                f", expected {near}" if near else ""))
        return f"{line.file}:{line.number}: {name} is ignored: " + (
            "GUARD_PORTS and NFT_ACCEPT_CHAINS say where nftables closes and opens"
            if "NFT" in name.upper() else "this server has no such directive; delete the line")

    def set_defaults(self) -> None:
        """Give each unset directive its default. Call this after the last file is read."""
        self.__dict__ = {**self.defaults(), **self.__dict__}  # update() would double its size
        for row in self.rows() if self.expands else ():  # the rest begin with $FWKNOP_RUN_DIR
            if row.attribute not in self.__dict__:
                self.__dict__[row.attribute] = row.parse(self.expand(row.default))

    @classmethod
    @lru_cache(maxsize=None)
    def defaults(cls) -> Dict[str, Any]:
        """Parse the defaults that begin with no other directive: once, for 1,000 stanzas too."""
        return {row.attribute: row.parse(row.default) for row in cls.rows()
                if not row.default.startswith("$")}

    def is_set(self, row: Directive[Any]) -> bool:
        """Tell whether a file or an option set this directive."""
        return row.name in self.texts

    def require(self, *rules: Tuple[object, Directive[Any], str]) -> None:
        """Raise ConfigError for the first rule that does not hold: what was expected of a row."""
        for right, row, what in rules:
            if not right:
                raise self.error(row, f"expected {what}")

    def only_one(self, first: Directive[Any], second: Directive[Any]) -> Any:
        """Return the value of whichever is set of two directives that exclude each other."""
        both = self.is_set(first) and self.is_set(second)
        self.require((not both, second, f"only one of {first.name} and {second.name}"))
        return getattr(self, (second if self.is_set(second) else first).attribute)

    def error(self, row: Directive[Any], text: str) -> SpaError:
        """Return the error `text`, with the line that set `row` before it."""
        line = self.lines.get(row.name)
        return line.error(text) if line else ConfigError(f"{row.name}: {text}")

    def expand(self, value: str) -> str:
        """Replace a directive that `value` begins with, as in $FWKNOP_RUN_DIR/x, by its value."""
        if not value.startswith("$") or not self.expands:
            return value
        name, slash, rest = value[1:].partition("/")
        row = self.row(name)
        if row is None:
            raise ValueError("expected the name of a directive after the dollar sign")
        value = row.parse(self.expand(self.texts.get(row.name, row.default)))
        return f"{value}{slash}{rest}"

    def dump(self) -> List[Tuple[Directive[Any], str]]:
        """Return each directive and its value as fwknopd prints it, without secrets."""
        return [(row, f"<see the {self.file} file>" if row.secret and self.is_set(row) else
                 self.texts.get(row.name, self.expand(row.default) or "<not set>"))
                for row in self.rows() if not isinstance(row, Ignored)]


MAX_KEY_FILE = 1 << 20  # bytes: far more than keys need, and no burden for the memory


def read_file(path: str, untrusted: bool = False) -> str:
    """Read a file as Latin-1 text, so that each byte is one character.

    If a user may own it (`untrusted`), it must be regular (its owner could make it a pipe), and at
    most MAX_KEY_FILE bytes long.
    """
    try:
        with open(path, encoding="latin-1", newline="\n", opener=lambda name, flags: os.open(
                name, flags | (os.O_NONBLOCK if untrusted else 0))) as file:
            if untrusted and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{path}: expected a regular file")
            text = file.read(MAX_KEY_FILE + 1 if untrusted else -1)
    except OSError as error:
        raise ConfigError(explain(error, path)) from None
    if untrusted and len(text) > MAX_KEY_FILE:
        raise ConfigError(f"{path}: expected at most {MAX_KEY_FILE} bytes")
    return text


def numbered_lines(path: str, untrusted: bool = False) -> Iterator[Tuple[int, str]]:
    """Return the lines of a file with their numbers, without a byte order mark."""
    text = read_file(path, untrusted)
    return enumerate(text[3 if text.startswith(BYTE_ORDER_MARK) else 0:].split("\n"), 1)


def read_lines(path: str, colon: bool, untrusted: bool = False) -> Iterator[Line]:
    """Yield the directives of a file; `untrusted` says whether a user may own it."""
    for number, raw in numbered_lines(path, untrusted):
        line = parse_line(path, number, raw, colon)
        if line:
            yield line


def parse_line(path: str, number: int, raw: str, colon: bool) -> Optional[Line]:
    """Parse a directive: a name, blanks, and a value up to a semicolon or the line's end.

    Only a comment may follow the semicolon: to ignore the rest of a list such as RESTRICT_PORTS
    would open more. It is `# x` or, behind a blank, `// x`, since base64 has slashes. `colon` says
    whether a colon may follow the name (access.conf). A value keeps its last blanks, for keys.
    """
    text = raw.partition("\r")[0].lstrip(" \t")
    if not text or text[0] in "#;":
        return None
    name = text.replace("\t", " ").partition(" ")[0]
    value, _, rest = text[len(name):].lstrip(" \t\v\f").partition(";")
    line = Line(path, number, name.rstrip(":") if colon else name, value)
    is_ignored = not colon and isinstance(ServerSettings.row(name), Ignored)  # and so may be empty
    if not (is_ignored or value.strip(" \t")) or "\0" in text:
        raise line.misread("expected a value" + (" without zero bytes" if "\0" in text else ""))
    if rest.replace("\t", " ").replace(" //", "#").lstrip(" ;")[:1] not in ("", "#"):
        raise line.error("expected nothing, or a # and a comment, behind the semicolon")
    return line


def permission_warnings(path: str) -> List[str]:
    """Return fwknopd's warnings about a file that others can read, or that somebody else owns."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    texts, named, user = [], f"[-] file: {path}", os.geteuid()
    if stat.S_IMODE(status.st_mode) & 0o077:
        texts.append(f"{named} permissions should only be user read/write (0600, -rw-------)")
    if status.st_uid not in (0, user):
        texts.append(f"{named} (owner: {status.st_uid}) not owned by current effective user id: "
                     f"{user}")
    return texts + folder_warnings(os.path.dirname(path) or ".", stat.S_ISVTX)


def folder_warnings(folder: str, harmless: int = 0) -> List[str]:
    """Return a warning for a directory in which others can write, and so have root run commands."""
    try:
        mode = stat.S_IMODE(os.stat(folder).st_mode)
    except OSError:
        return []
    if not mode & 0o022 or mode & harmless:  # sticky: others can't replace a file there
        return []
    return [f"[-] folder: {folder} is writable by others (mode {mode:04o}): they say what is "
            "opened, and what root runs"]


def folder_files(folder: str) -> List[str]:
    """Return the *.conf of a folder, sorted by name; ValueError when there is no such folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(explain(error, folder)) from None
    return [os.path.join(folder, name) for name in names if name.endswith(".conf")]


def drop_comment(text: str) -> str:
    """Return a value without the comment at its end: `# x`, `// x` or `(x)`."""
    value, _, comment = text.partition("#")[0].partition("//")[0].partition("(")
    expect(not comment.partition(")")[2].strip(" \t;,"), "nothing behind the parenthesis")
    return value


def list_items(text: str) -> List[str]:
    """Return the items of a comma list without the comments behind them."""
    items = text.split(",")
    expect(not any("#" in item or "//" in item for item in items[:-1]),
           "no comma in the comment: fwknopd and knockd read on behind it")
    return [drop_comment(item).strip(" \t") for item in items]


def integer(least: int, most: int, unit: str = "a number") -> Callable[[str], int]:
    """Return a parser of decimal numbers from `least` to `most`; a comment may follow one.

    fwknopd and knockd read digits alone: `30s` is 30, as it says, but `20m` 20, and refused here.
    """
    def parse(text: str) -> int:
        text = drop_comment(text[text.startswith("+"):]).rstrip(" \t;,")
        word = text.lstrip("0123456789")
        digits = text[:len(text) - len(word)]
        expect(0 < len(digits) <= 12 and least <= int(digits) <= most
               and word.strip(" \t").lower() in (SECOND_WORDS if unit == "seconds" else ("",)),
               f"{unit}, {least} to {most}")
        return int(digits)
    return parse


SECOND_WORDS = ("", "s", "sec", "secs", "second", "seconds")


def choice(*names: str) -> Callable[[str], str]:
    """Return a parser of one of these names, in upper or lower case."""
    def parse(text: str) -> str:
        found = [name for name in names if text.lower() == name.lower()]
        expect(bool(found), f"{', '.join(names[:-1])} or {names[-1]}")
        return found[0]
    return parse


def parse_path(text: str) -> str:
    """Parse a path; set_line() has put the directory before a relative one."""
    expect(text.startswith("/"), "a path that does not begin with ~")
    return text


def parse_home(text: str) -> str:
    """Parse a path, perhaps one below the home of this user (~/)."""
    return parse_path(os.path.expanduser(text))


def parse_ports(text: str) -> FrozenSet[Port]:
    """Parse a comma list of ports: `tcp/22, udp/53`. Naming one twice changes nothing."""
    return frozenset(parse_port(item.lower().replace("/ ", "/"))
                     for item in list_items(text) if text)


def parse_time(text: str) -> int:
    """Parse `30`, `10m`, `1h` or `2d` to seconds."""
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:], 0)
    digits = text[:-1] if unit else text
    expect(0 < len(digits) <= 7 and not digits.strip("0123456789")
           and 0 < int(digits) * (unit or 1) <= 8388608,
           "a time like 30, 10m, 1h or 2d, up to 97 days")
    return int(digits) * (unit or 1)


class Networks:
    """The addresses of a SOURCE or DESTINATION; an `ANY` in the list is all of both families."""

    def __init__(self, text: str) -> None:
        self.masks: Dict[int, List[Tuple[int, int]]] = {4: [], 16: []}
        self.networks: List[Network] = []
        items = list_items(text)
        self.everything = "ANY" in map(str.upper, items)
        for item in [item for item in items if item.upper() != "ANY"]:
            try:
                parse_address(item.partition("/")[0])
                network = ipaddress.ip_network(item, strict=False)
            except ValueError:
                raise ValueError("expected ANY, or IP addresses and networks with commas "
                                 "(Fatal error parsing IP to int)") from None
            self.networks.append(network)
            pair = int(network.netmask), int(network.network_address)
            self.masks[network.max_prefixlen // 8].append(pair)

    def __contains__(self, packed: bytes) -> bool:
        """Tell whether the address of 4 or 16 bytes is one of them."""
        if self.everything:
            return True
        number = int.from_bytes(packed, "big")
        return any(number & mask == value for mask, value in self.masks[len(packed)])


# ======================================================================================
# 6. Captured packets
#
# Packet sockets and capture files bring IP packets. This section takes the datagram out of one,
# and reads PCAP_FILTER, a part of pcap-filter(7), which chooses the packets. A filter becomes a
# tree of comparisons: the server evaluates it, or compiles it to classic BPF for the kernel.
# ======================================================================================

TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58  # protocol numbers of IP, https://www.iana.org/protocols
SCTP, IPV6_FRAGMENT = 132, 44
IPV4 = struct.Struct(">BxHxxHxBxx4s4s")  # RFC 791 section 3.1, without options
PORTS = struct.Struct(">HHH")  # and for UDP the length (RFC 768)
IPV6_EXTENSIONS = (0, 43, 60)  # hop-by-hop options, routing, destination options
MAX_EXTENSIONS = 8  # twice as many as RFC 8200 section 4.1 wants in one packet
ECHO_REQUESTS = ((ICMP, 8), (ICMP6, 128))  # protocol and type (RFC 792, RFC 4443 section 4.1)


def decode_header(packet: bytes) -> Optional[Tuple[int, int, int, int, bytes, bytes]]:
    """Return protocol, start and end of the data, fragment, source, destination; None if broken."""
    if len(packet) < 28:
        return None
    if packet[0] >> 4 == 6:  # RFC 8200 sections 3 and 4
        protocol, start = packet[6], 40
        for _ in range(MAX_EXTENSIONS):
            if protocol not in IPV6_EXTENSIONS or len(packet) < start + 8:
                break
            protocol, start = packet[start], start + 8 * (packet[start + 1] + 1)
        end = 40 + int.from_bytes(packet[4:6], "big")
        return protocol, start, end, 0, packet[8:24], packet[24:40]
    first, end, fragment, protocol, source, destination = IPV4.unpack_from(packet)
    start = (first & 15) * 4
    if first >> 4 != 4 or start < 20:
        return None
    return protocol, start, end, fragment & 0x3FFF, source, destination  # MF flag and offset


def decode_ip(packet: bytes) -> Optional[Datagram]:
    """Return the datagram in an IP packet; None for fragments, cut packets, other protocols."""
    header = decode_header(packet)
    if header is None:
        return None
    protocol, start, end, fragment, source, destination = header
    body = packet[start:end]  # whatever its checksum: fwknop's raw packets have none
    if fragment or len(body) < 8 or len(body) != end - start:
        return None
    source_port, destination_port, length = PORTS.unpack_from(body)
    if protocol == UDP and 8 <= length <= len(body):
        return Datagram(body[8:length], source, source_port, destination, destination_port)
    if protocol == (ICMP if len(source) == 4 else ICMP6):  # fwknopd logs port 0, too (RFC 792)
        return Datagram(body[8:], source, 0, destination, 0, protocol)
    start = (body[12] >> 4) * 4 if len(body) >= 20 else 0  # RFC 9293 section 3.1
    if protocol == TCP and 20 <= start < len(body):  # with payload, a SYN as well
        return Datagram(body[start:], source, source_port, destination, destination_port, TCP)
    return None


def decode_knock(packet: bytes) -> Optional[Datagram]:
    """Return the knock packet that an IP packet may be: TCP, UDP or echo request, any content."""
    header = decode_header(packet)
    if header is None:
        return None
    protocol, start, end, fragment, source, destination = header
    if fragment & 0x1FFF or len(packet) < start + (20 if protocol == TCP else 8):
        return None
    port = packet[start + 2] << 8 | packet[start + 3]
    if protocol == TCP:
        return Datagram(b"", source, 0, destination, port, TCP, packet[start + 13])  # the flags
    if protocol == UDP:
        return Datagram(b"", source, 0, destination, port)
    if (protocol, packet[start]) in ECHO_REQUESTS and end >= start + 8 and not fragment:
        return Datagram(b"", source, 0, destination, end - start - 8, ICMP)  # its size counts
    return None


# Length of a frame's header, and the offsets of EtherType and direction, if it has them.
LinkType = Tuple[int, Optional[int], Optional[int]]
# By number (https://www.tcpdump.org/linktypes.html): BSD loopback, Ethernet, Linux cooked, raw IP.
LINK_TYPES: Dict[int, LinkType] = {
    0: (4, None, None), 108: (4, None, None), 1: (14, 12, None), 113: (16, 14, 1), 276: (20, 0, 10),
    **dict.fromkeys((12, 14, 101, 228, 229), (0, None, None))}
PACKET_OUTGOING = 4  # of linux/if_packet.h
VLAN_TAGS = (b"\x81\x00", b"\x88\xa8", b"\x91\x00")  # IEEE 802.1Q, 802.1ad, older switches
MAX_TAGS = 4  # 802.1ad has two


def decode_frame(frame: bytes, link: LinkType, any_direction: bool) -> bytes:
    """Return the IP packet in a frame; nothing for other frames, or if this host sent it."""
    start, offset, direction = link
    if (direction is not None and not any_direction
            and frame[direction:direction + 1] == bytes([PACKET_OUTGOING])):
        return b""
    if offset is not None:
        for _ in range(MAX_TAGS):
            if frame[offset:offset + 2] not in VLAN_TAGS:
                break
            offset, start = start + 2, start + 4
        if frame[offset:offset + 2] not in (b"\x08\x00", b"\x86\xdd"):  # EtherTypes of IP
            return b""
    return frame[start:]


IPV4_HEADER, PAYLOAD = 1, 2


class Comparison(NamedTuple):
    """A test that `size` bytes at `offset`, under `mask`, are a number from `least` to `most`."""

    offset: int
    size: int  # 0 stands for the length of the payload
    least: int
    most: int
    mask: int = 0xFFFFFFFF
    behind: int = 0  # where the offset counts from: 0, IPV4_HEADER (its end) or PAYLOAD


class Junction(NamedTuple):
    """Comparisons and junctions under `and`, `or` or `not`."""

    operator: str
    parts: Tuple[Any, ...]


Filter = Union[Comparison, Junction]

IS_IPV4, IS_IPV6 = (Comparison(0, 1, version, version, 0xF0) for version in (0x40, 0x60))
FILTER_PROTOCOLS = {"udp": UDP, "tcp": TCP, "icmp": ICMP, "icmp6": ICMP6, "ip": 4, "ip6": 6}
FILTER_SYMBOLS = {"(": "(", ")": ")", "!": "not", "&&": "and", "||": "or"}
MAX_FILTER_WORDS = 400  # the parser and matches() call themselves: Python allows 1,000 deep
FILTER_LANGUAGE = ("udp, tcp, icmp, icmp6, ip, ip6, [udp|tcp] [src|dst] port N, portrange M-N, "
                   "[ip|ip6] [src|dst] host ADDRESS, net NETWORK, with and, or, not, ( )")


def both(test: Callable[[int], Filter], direction: str, source: int, destination: int) -> Filter:
    """Return a test of source and destination: of one (`src`, `dst`), both (`and`), or either."""
    if direction in ("src", "dst"):
        return test(source if direction == "src" else destination)
    return Junction(direction or "or", (test(source), test(destination)))


def protocol_filter(name: str) -> Filter:
    """Match packets of a protocol, and IPv6 fragments of it, as tcpdump does."""
    number = FILTER_PROTOCOLS[name]
    four = Junction("and", (IS_IPV4, Comparison(9, 1, number, number)))
    fragment = Junction("and", (Comparison(6, 1, IPV6_FRAGMENT, IPV6_FRAGMENT),
                                Comparison(40, 1, number, number)))
    six = Junction("and", (IS_IPV6, Junction("or", (Comparison(6, 1, number, number), fragment))))
    single: Dict[str, Filter] = {"ip": IS_IPV4, "ip6": IS_IPV6, "icmp": four, "icmp6": six}
    return single.get(name, Junction("or", (four, six)))


def field_is_one_of(offset: int, size: int, values: Iterable[int], behind: int = 0) -> Filter:
    """Match packets in which a field has one of these values."""
    return Junction("or", tuple(Comparison(offset, size, value, value, behind=behind)
                                for value in sorted(values)))


def transport_filter(four: Iterable[int], six: Iterable[int],
                     test: Callable[[int, int], Filter]) -> Filter:
    """Match packets of these protocols, in IPv4 and IPv6, whose transport header passes a test.

    `test` makes that test, for the header's offset and Comparison's `behind`. Later fragments have
    no such header, and in IPv6 this does not look behind extension headers.
    """
    return Junction("or", (
        Junction("and", (IS_IPV4, field_is_one_of(9, 1, four), Comparison(6, 2, 0, 0, 0x1FFF),
                         test(0, IPV4_HEADER))),
        Junction("and", (IS_IPV6, field_is_one_of(6, 1, six), test(40, 0)))))


def port_filter(protocol: str, direction: str, low: int, high: int) -> Filter:
    """Match packets with a port from `low` to `high`."""
    numbers = (FILTER_PROTOCOLS[protocol],) if protocol else (TCP, UDP, SCTP)
    return transport_filter(numbers, numbers, lambda start, behind: both(
        lambda at: Comparison(at, 2, low, high, behind=behind), direction, start, start + 2))


def network_filter(direction: str, network: Network) -> Filter:
    """Match packets with an address of a network, by comparisons of four bytes."""
    numbers = f">{network.max_prefixlen // 32}I"
    masks = struct.unpack(numbers, network.netmask.packed)
    values = struct.unpack(numbers, network.network_address.packed)

    def test(offset: int) -> Filter:
        return Junction("and", tuple(
            Comparison(offset + 4 * index, 4, value, value, mask)
            for index, (value, mask) in enumerate(zip(values, masks)) if mask))

    if network.version == 4:
        return Junction("and", (IS_IPV4, both(test, direction, 12, 16)))
    return Junction("and", (IS_IPV6, both(test, direction, 8, 24)))


class FilterParser:
    """A parser of PCAP_FILTER; any error is a ValueError. `and` and `or` bind alike."""

    def __init__(self, text: str) -> None:
        for symbol, name in FILTER_SYMBOLS.items():
            text = text.replace(symbol, f" {name} ")
        self.tokens = text.split()[::-1]  # those to come, the next one last
        self.last: Optional[Tuple[str, str, str]] = None  # of a primitive: `port 1 or 2` repeats it

    def next_if(self, *tokens: str) -> str:
        """Consume and return the next token if it is one of these, else return nothing."""
        return self.tokens.pop() if self.tokens and self.tokens[-1] in tokens else ""

    def expression(self) -> Filter:
        """Parse terms, joined from left to right."""
        tree = self.term()
        while self.tokens[-1:] in (["and"], ["or"]):
            tree = Junction(self.tokens.pop(), (tree, self.term()))
        return tree

    def term(self) -> Filter:
        """Parse a primitive, an expression in parentheses, or `not` of either."""
        if self.next_if("not"):
            return Junction("not", (self.term(),))
        if self.next_if("("):
            tree = self.expression()
            expect(self.next_if(")") != "", FILTER_LANGUAGE)
            return tree
        protocol = self.next_if(*FILTER_PROTOCOLS)
        direction = self.next_if("src", "dst")
        other = "dst" if direction == "src" else "src"
        if direction and self.tokens[-2:] in ([other, "and"], [other, "or"]):
            direction, _ = self.tokens.pop(), self.tokens.pop()
        kind = self.next_if("port", "portrange", "host", "net")
        if protocol and not direction and not kind:
            self.last = None
            return protocol_filter(protocol)
        if direction or kind:
            self.last = protocol, direction, kind or "host"
        if not self.last or not self.tokens:
            raise ValueError(f"expected {FILTER_LANGUAGE}")
        return self.primitive(*self.last, self.tokens.pop())

    @staticmethod
    def primitive(protocol: str, direction: str, kind: str, value: str) -> Filter:
        """Return the test of one port, range, host or network."""
        low, dash, high = value.partition("-")
        if kind.startswith("port"):
            expect(protocol in ("", "udp", "tcp") and bool(dash) == (kind == "portrange")
                   and is_port(low) and is_port(high if dash else low), FILTER_LANGUAGE)
            return port_filter(protocol, direction, *sorted((int(low), int(high or low))))
        try:
            parse_address(value.partition("/")[0])
            network = ipaddress.ip_network(value)
        except ValueError:
            raise ValueError(f"expected {FILTER_LANGUAGE}") from None
        family = "ip" if network.version == 4 else "ip6"
        expect((kind == "net" or "/" not in value) and protocol in ("", family), FILTER_LANGUAGE)
        return network_filter(direction, network)


def parse_packet_filter(text: str) -> Filter:
    """Parse a PCAP_FILTER to a tree."""
    parser = FilterParser(text)
    expect(len(parser.tokens) <= MAX_FILTER_WORDS, f"at most {MAX_FILTER_WORDS} words")
    tree = parser.expression()
    expect(not parser.tokens, FILTER_LANGUAGE)
    expect(len(compile_filter(tree)) <= MAX_INSTRUCTIONS * SOCK_FILTER.size, "a shorter filter")
    return tree


def matches(tree: Filter, packet: bytes) -> bool:
    """Tell whether a filter lets an IP packet pass; IndexError if it looks behind the end."""
    if isinstance(tree, Junction):
        if tree.operator == "not":
            return not matches(tree.parts[0], packet)
        join = all if tree.operator == "and" else any
        return join(matches(part, packet) for part in tree.parts)
    start = tree.offset + ((packet[0] & 15) * 4 if tree.behind else 0)
    if start + tree.size > len(packet):
        raise IndexError("expected a longer packet")
    value = int.from_bytes(packet[start:start + tree.size], "big") & tree.mask
    return tree.least <= value <= tree.most


def payload_filter(http: bool) -> Filter:
    """Match a payload that may be an SPA packet by its length and some bytes, or begins with GET.

    Of 10^12 payloads of random bytes, one passes. Most of those that somebody may have to find in
    the log still do: with the prefix that a client should leave off, or one wrong character.
    """
    ascii = [Comparison(offset, 4, 0, 0, 0x80808080, PAYLOAD) for offset in range(4, 136, 16)]
    base64 = [Junction("or", (Comparison(offset, 1, 0x41, 0x5A, 0xDF, PAYLOAD),  # A-Z and a-z
                              Comparison(offset, 1, 0x2F, 0x39, behind=PAYLOAD),  # / and 0-9
                              Comparison(offset, 1, 0x2B, 0x2B, behind=PAYLOAD)))  # +
              for offset in (25, 60, 95, 130)]
    beginning = Junction("or", (  # of AES; GPG; with its prefix still; tests write A over it
        field_is_one_of(0, 1, b"89+/hwUA", PAYLOAD),
        Comparison(0, 0, GPG_LENGTH, MAX_PAYLOAD, behind=PAYLOAD)))
    packet = Junction("and", (Comparison(0, 0, MIN_PAYLOAD, MAX_PAYLOAD, behind=PAYLOAD),
                              beginning, *ascii, *base64))
    get = Comparison(0, 4, 0x47455420, 0x47455420, 0xDFDFDFFF, PAYLOAD)
    return Junction("or", (get, packet)) if http else packet


SOCK_FILTER = struct.Struct("=HBBI")  # struct sock_filter {u16 code, u8 jt, u8 jf, u32 k}
MAX_INSTRUCTIONS = 3900  # the kernel accepts 4096; open_packet_captures() adds some
LONGEST_JUMP = 250  # of 255: the two plain jumps that branch() may add come in between
LOAD = {1: 0x30, 2: 0x28, 4: 0x20}  # byte, half and word (linux/bpf_common.h)
LOAD_BEHIND = {1: 0x50, 2: 0x48, 4: 0x40}  # the same, behind the index
LOAD_LENGTH, LOAD_INDEX, LOAD_IPV4_LENGTH, TO_INDEX, FROM_INDEX = 0x80, 0x01, 0xB1, 0x07, 0x87
MASK, ADD, ADD_INDEX, SUBTRACT_INDEX, SHIFT_RIGHT = 0x54, 0x04, 0x0C, 0x1C, 0x74
JUMP, JUMP_IF_EQUAL, JUMP_IF_GREATER, JUMP_IF_NOT_LESS, RETURN = 0x05, 0x15, 0x25, 0x35, 0x06
PACKET_TYPE = 0xFFFFF000 + 4  # SKF_AD_OFF + SKF_AD_PKTTYPE
NOT_OUTGOING = Junction("not", (Comparison(PACKET_TYPE, 4, PACKET_OUTGOING, PACKET_OUTGOING),))
ACCEPT_ALL = 0x40000  # bytes to keep: more than any packet has


class FilterProgram:
    """A filter for a packet socket of type SOCK_DGRAM, which sees IP headers on every link.

    All jumps go forward, so the program grows from its end: the instructions that a test leads to
    are there before the test. An address counts the instructions from there to the end.
    """

    def __init__(self, tree: Filter, payload: Optional[Filter] = None) -> None:
        self.code: List[bytes] = []  # last one first
        reject = self.add((RETURN, 0))
        accept = self.add((RETURN, ACCEPT_ALL))
        self.test(tree, self.find_payload(payload, accept, reject) if payload else accept, reject)

    def add(self, *instructions: Tuple[int, int]) -> int:
        """Put instructions (code, k) without a branch in front; return the first one's address."""
        for code, k in reversed(instructions):
            self.code.append(SOCK_FILTER.pack(code, 0, 0, k))
        return len(self.code)

    def find_payload(self, tree: Filter, accept: int, reject: int) -> int:
        """Put the test of a UDP, TCP or ICMP payload in front; return its address.

        Fragments and other protocols are rejected, as by decode_ip(). IPv6 packets with extension
        headers are accepted: no program without loops gets behind these.
        """
        payload = self.test(tree, accept, reject)
        tcp = self.add((LOAD_BEHIND[1], 12), (MASK, 0xF0), (SHIFT_RIGHT, 2), (ADD_INDEX, 0),
                       (TO_INDEX, 0))
        other = self.add((FROM_INDEX, 0), (ADD, 8), (TO_INDEX, 0), (JUMP, tcp - payload))
        self.branch(JUMP_IF_EQUAL, TCP, tcp, reject)
        for number in (UDP, ICMP, ICMP6):
            self.branch(JUMP_IF_EQUAL, number, other, len(self.code))
        transport = len(self.code)
        for number in IPV6_EXTENSIONS:
            self.branch(JUMP_IF_EQUAL, number, accept, len(self.code))
        six = self.add((LOAD_INDEX, 40), (LOAD[1], 6))
        self.add((LOAD_IPV4_LENGTH, 0), (LOAD[1], 9), (JUMP, six - transport))
        four = self.test(Comparison(6, 2, 0, 0, 0x3FFF), len(self.code), reject)
        return self.test(IS_IPV4, four, self.test(IS_IPV6, six, reject))

    def branch(self, code: int, k: int, when_true: int, when_false: int) -> None:
        """Put a conditional jump in front. Its 8 bits reach a far address through a plain jump."""
        targets = [when_true, when_false]
        for i in (0, 1):
            if len(self.code) - targets[i] > LONGEST_JUMP:
                targets[i] = self.add((JUMP, len(self.code) - targets[i]))
        jumps = [len(self.code) - target for target in targets]
        self.code.append(SOCK_FILTER.pack(code, jumps[0], jumps[1], k))

    def test(self, tree: Filter, when_true: int, when_false: int) -> int:
        """Put the test of `tree` in front, and the jumps after it; return its address."""
        if isinstance(tree, Junction):
            if tree.operator == "not":
                return self.test(tree.parts[0], when_false, when_true)
            for part in reversed(tree.parts):
                if tree.operator == "and":
                    when_true = self.test(part, when_true, when_false)
                else:
                    when_false = self.test(part, when_true, when_false)
            return when_true if tree.operator == "and" else when_false
        if tree.least == tree.most:
            self.branch(JUMP_IF_EQUAL, tree.least, when_true, when_false)
        else:
            self.branch(JUMP_IF_GREATER, tree.most, when_false, when_true)
            self.branch(JUMP_IF_NOT_LESS, tree.least, len(self.code), when_false)
        if tree.mask != 0xFFFFFFFF:
            self.add((MASK, tree.mask))
        if not tree.size:
            return self.add((LOAD_LENGTH, 0), (SUBTRACT_INDEX, 0))
        self.add(((LOAD_BEHIND if tree.behind else LOAD)[tree.size], tree.offset))
        return self.add((LOAD_IPV4_LENGTH, 0)) if tree.behind == IPV4_HEADER else len(self.code)


def compile_filter(tree: Filter, any_direction: bool = False,
                   payload: Optional[Filter] = None) -> bytes:
    """Compile a filter, which rejects packets that this host sends, unless `any_direction`."""
    tree = tree if any_direction else Junction("and", (NOT_OUTGOING, tree))
    return b"".join(reversed(FilterProgram(tree, payload).code))


def compile_udp_filter(payload: Filter) -> bytes:
    """Compile the filter of a UDP socket, which sees the UDP header and the payload."""
    return SOCK_FILTER.pack(LOAD_INDEX, 0, 0, 8) + compile_filter(payload, any_direction=True)


# ======================================================================================
# 7. fwknopd.conf
#
# How this server listens, remembers and drives the firewall (tests/spec/fwknop.md 3.2).
# ======================================================================================


def parse_interface(text: str) -> str:
    """Parse the name of a network interface, or `any`."""
    expect(0 < len(text) < 16 and not set(text) & set(",/ \t\"'"),  # IFNAMSIZ of linux/if.h
           "the name of one interface, or `any`")
    return text


class IptablesChain(NamedTuple):
    """The chain for access rules of one kind, and the position of the jump to it."""

    target: str
    table: str
    from_chain: str
    position: int
    chain: str


def parse_iptables_chain(text: str) -> IptablesChain:
    """Parse an IPT_*_ACCESS directive (tests/spec/fwknop.md 3.2); the last position is ignored."""
    fields = [field.strip() for field in text.split(",")]
    expect(len(fields) == 6 and all(map(is_plain_name, fields)) and fields[3].isdigit(),
           "`target, table, from-chain, position, to-chain, position`")
    expect(fields[2] != fields[4] and len(fields[4]) <= 28,  # the longest name that iptables takes
           "a chain of our own of at most 28 characters")
    return IptablesChain(fields[0], fields[1], fields[2], max(1, int(fields[3])), fields[4])


class NftChain(NamedTuple):
    """A chain of the host's nftables firewall: `family table chain`."""

    family: str
    table: str
    chain: str


def parse_nft_chains(text: str) -> Tuple[NftChain, ...]:
    """Parse a comma list of nftables chains: `inet filter input, ip6 filter input`."""
    chains = []
    for names in [item.split() for item in text.split(",") if text]:
        expect(len(names) == 3 and names[0] in NFT_FAMILIES and all(map(is_plain_name, names)),
               "`inet|ip|ip6 TABLE CHAIN`, with commas between")
        chains.append(NftChain(*names))
    return tuple(chains)


def may_be_host(address: Address) -> bool:
    """Return whether a host can have this address: not 0.0.0.0/8, multicast, 240.0.0.0/4, `::`."""
    reserved = address.version == 4 and (address.packed[0] == 0 or address.packed[0] >= 240)
    return not (reserved or address.is_unspecified or address.is_multicast)


def parse_nat_address(text: str) -> Address:
    """Parse an address that NAT can put in the place of a destination or a source."""
    address = parse_address(drop_comment(text).rstrip())
    expect(may_be_host(address), "the IP address of a host")
    return address


def parse_nat_target(text: str) -> Tuple[Address, int]:
    """Parse the `IP PORT` of a FORCE_NAT directive."""
    fields = drop_comment(text).split()
    expect(len(fields) == 2 and is_port(fields[1]), "`IP PORT`")
    return parse_nat_address(fields[0]), int(fields[1])


def is_plain_name(text: str) -> bool:
    """Return whether `text` is a name to a firewall: of PLAIN_CHARACTERS, and no option."""
    return bool(text) and text[0] != "-" and not text.strip(PLAIN_CHARACTERS)


NFT_FAMILIES = {"inet": 1, "ip": 2, "ip6": 10}  # NFPROTO_ of linux/netfilter.h
PLAIN_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-."
FACILITIES = {"LOG_DAEMON": 3,  # RFC 3164 section 4.1.1
              **{f"LOG_LOCAL{number}": 16 + number for number in range(8)}}


def parse_adk_secret(text: str) -> bytes:
    """Parse an ADK secret: 4 bytes as 7 characters of base32 (tests/spec/openspa.md 1.9)."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
    number = 0
    expect(len(text) == 7 and not text.strip(digits), "7 characters, A to Z and 2 to 7")
    for character in text:
        number = number << 5 | digits.index(character)
    return Secret((number >> 3).to_bytes(4, "big"))


class ServerSettings(Settings):
    """fwknopd.conf: how this server listens, remembers and drives the firewall."""

    file, skips, expands = "fwknopd.conf", True, True
    overridden: Set[str] = set()  # directives that the command line sets; no file is judged by them

    verbose = Directive("VERBOSE", integer(0, 99), "0",
                        "1: log packets and the firewall's commands, too; 2: and the settings")
    interface = Directive("PCAP_INTF", parse_interface, "any", "interface to listen on, or `any`")
    packet_filter = Directive("PCAP_FILTER", parse_packet_filter, "udp port 62201",
                              "packets to look at, in tcpdump's language; see Carriers")
    any_direction = Flag("ENABLE_PCAP_ANY_DIRECTION", "look at packets that this host sends, too")
    promiscuous = Flag("ENABLE_PCAP_PROMISC", "look at packets for other hosts on PCAP_INTF, too")
    capture_file = NoDefault("PCAP_FILE", parse_path, "judge a file of `tcpdump -w`, and end")
    packet_limit = Directive("PACKET_LIMIT", integer(0, 10 ** 9), "0",
                             "end after so many packets that look like SPA; 0: go on")
    udp_server = Flag("ENABLE_UDP_SERVER", "listen on a UDP socket instead")
    udp_port = Directive("UDPSERV_PORT", integer(1, 65535), "62201", "port of that socket")
    tcp_server = Flag("ENABLE_TCP_SERVER", "listen on a TCP socket as well")
    tcp_port = Directive("TCPSERV_PORT", integer(1, 65535), "62201", "port of that one")
    http = Flag("ENABLE_SPA_OVER_HTTP", "accept packets in HTTP requests, if TCP is looked at")
    any_agent = Flag("ALLOW_ANY_USER_AGENT", "from every User-Agent, not only from Fwknop")
    forwarded_for = Flag("ENABLE_X_FORWARDED_FOR", "the last X-Forwarded-For address is the source")
    aging = Flag("ENABLE_SPA_PACKET_AGING", "reject packets by their age", "Y")
    max_packet_age = Directive("MAX_SPA_PACKET_AGE", integer(1, 100000, "seconds"), "120",
                               "by how many seconds a client's clock may differ")
    digest_persistence = Flag("ENABLE_DIGEST_PERSISTENCE",
                              "keep the replay memory in DIGEST_FILE, not only in the process", "Y")
    firewall = Directive("FIREWALL_TYPE", choice("auto", "nft", "iptables", "none"), "auto",
                         "auto, nft, iptables or none")
    guard_ports = Directive("GUARD_PORTS", parse_ports, "",
                            "ports that are closed to everybody without a grant: tcp/22, udp/1194")
    nft_accept_chains = Directive("NFT_ACCEPT_CHAINS", parse_nft_chains, "",
                                  "chains of the host's nftables for grants: inet filter input")
    nft_forward_chains = Directive("NFT_FORWARD_CHAINS", parse_nft_chains, "",
                                   "the same for what NAT forwards: inet filter forward")
    firewall_program = NoDefault("FIREWALL_EXE", parse_path,
                                 "iptables or nft, else from PATH; decides FIREWALL_TYPE auto")
    input_access = Directive("IPT_INPUT_ACCESS", parse_iptables_chain,
                             "ACCEPT, filter, INPUT, 1, FWKNOP_INPUT, 1",
                             "target, table, from-chain, position, chain, position")
    output_access = Directive("IPT_OUTPUT_ACCESS", parse_iptables_chain,
                              "ACCEPT, filter, OUTPUT, 1, FWKNOP_OUTPUT, 1", "the same for answers")
    forward_access = Directive("IPT_FORWARD_ACCESS", parse_iptables_chain,
                               "ACCEPT, filter, FORWARD, 1, FWKNOP_FORWARD, 1",
                               "the same for what NAT forwards")
    dnat_access = Directive("IPT_DNAT_ACCESS", parse_iptables_chain,
                            "DNAT, nat, PREROUTING, 1, FWKNOP_PREROUTING, 1",
                            "the same for destination NAT")
    snat_access = Directive("IPT_SNAT_ACCESS", parse_iptables_chain,
                            "SNAT, nat, POSTROUTING, 1, FWKNOP_POSTROUTING, 1",
                            "the same for source NAT to a given address")
    masquerade_access = Directive("IPT_MASQUERADE_ACCESS", parse_iptables_chain,
                                  "MASQUERADE, nat, POSTROUTING, 1, FWKNOP_MASQUERADE, 1",
                                  "the same for source NAT to the outgoing interface's address")
    forwarding = Flag("ENABLE_IPT_FORWARDING", "NAT to other hosts (message types 2 and 4)")
    local_nat = Flag("ENABLE_IPT_LOCAL_NAT", "NAT to ports of this host (message types 5 and 6)")
    snat = Flag("ENABLE_IPT_SNAT",
                "give forwarded connections this host's address, so that answers come back to it")
    snat_address = NoDefault("SNAT_TRANSLATE_IP",
                             lambda text: None if text == PLACEHOLDER else parse_nat_address(text),
                             "that address; without it the outgoing interface's")
    nat_dns = Flag("ENABLE_NAT_DNS", "look up a host that a client wants NAT to by its name", "Y")
    enable_output = Flag("ENABLE_IPT_OUTPUT", "let answers out with rules of their own (iptables)")
    destination_rule = Flag("ENABLE_DESTINATION_RULE", "open only the address a packet was sent to")
    rule_prepend = Flag("ENABLE_RULE_PREPEND", "put access rules first in their chain (iptables)")
    flush_at_start = Flag("FLUSH_IPT_AT_INIT", "close all grants at start; N: go on with them")
    flush_at_stop = Flag("FLUSH_IPT_AT_EXIT",
                         "close all grants at a clean stop; N: the kernel ends them", "Y")
    command_seconds = Directive("CMD_EXEC_TIMEOUT",
                                lambda text: integer(0, 86400, "seconds")(text) or 86400, "60",
                                "how long a command may run until it is ended; 0: a day")
    sudo_program = Directive("SUDO_EXE", parse_path, "/usr/bin/sudo",
                             "program through which ENABLE_CMD_SUDO_EXEC runs commands")
    metrics_file = NoDefault("METRICS_FILE", parse_path,
                             "write counters for Prometheus to this file every 15 seconds")
    syslog_identity = Directive("SYSLOG_IDENTITY", str, "fwknopd", "name in syslog")
    syslog_facility = Directive("SYSLOG_FACILITY", choice(*FACILITIES), "LOG_DAEMON",
                                "LOG_DAEMON, LOG_LOCAL0 to LOG_LOCAL7")
    run_directory = Directive("FWKNOP_RUN_DIR", parse_path, "/run/fwknop", "where state is kept")
    conf_directory = Directive("FWKNOP_CONF_DIR", parse_path, "/etc/fwknop", "where files are read")
    access_file = Directive("ACCESS_FILE", parse_path, "$FWKNOP_CONF_DIR/access.conf", "stanzas")
    access_folder = NoDefault("ACCESS_FOLDER", parse_path,
                              "its *.conf, sorted by name, are read instead of ACCESS_FILE")
    pid_file = Directive("FWKNOP_PID_FILE", parse_path, "$FWKNOP_RUN_DIR/fwknopd.pid",
                         "pid of the running server, which holds a lock on it")
    digest_file = Directive("DIGEST_FILE", parse_path, "$FWKNOP_RUN_DIR/digest.cache",
                            "packets that were seen")
    ospa_port = Directive("OPENSPA_PORT", integer(1, 65535), "22211",
                          "UDP port for OpenSPA requests, where a stanza has OPENSPA_CLIENTS")
    ospa_key_file = NoDefault("OPENSPA_PRIVATE_KEY", parse_path,
                              "file with this server's private RSA key (keygen.py --openspa)")
    ospa_adk = NoDefault("OPENSPA_ADK_SECRET", parse_adk_secret,
                         "7 characters: reject requests without a proof of it, before RSA",
                         secret=True)
    knockd_file = NoDefault("KNOCKD_CONF", parse_path, "a knockd.conf whose doors are served, too")
    gpg_home = Directive("GPG_HOME_DIR", parse_home, "~/.gnupg",
                         "keys of gpg, where a stanza names no others")
    gpg_program = NoDefault("GPG_EXE", parse_path, "gpg to run; without it the one in PATH")

    ticks = Ignored("PCAP_DISPATCH_COUNT PCAP_LOOP_SLEEP RULES_CHECK_THRESHOLD "
                    "UDPSERV_SELECT_TIMEOUT", "nothing here waits for a tick")
    exit_at_down = Ignored("EXIT_AT_INTF_DOWN", "an interface that is gone is waited for")
    sniff_bytes = Ignored("MAX_SNIFF_BYTES", "the longest packet is 1500 bytes")
    comment_check = Ignored("ENABLE_IPT_COMMENT_CHECK", "the match is always needed")
    locale = Ignored("LOCALE FAULT_INJECTION_TAG", "nothing here depends on it")
    legacy = Ignored("ALLOW_LEGACY_ACCESS_REQUESTS", "fwknopd 2.6 has none: ports must be named")
    no_nat = Ignored("DISABLE_NAT", "NAT is off unless ENABLE_IPT_FORWARDING or _LOCAL_NAT is Y")
    other_builds = Ignored("DIGEST_DB_FILE ENABLE_EXTERNAL_CMDS ENABLE_EXT_CMD_PREFIX "
                           "EXTERNAL_CMD_* EXT_CMD_PREFIX ENABLE_NFQ_CAPTURE NFQ_* FIREWD_* "
                           "ENABLE_FIREWD_* FLUSH_FIREWD_* IPFW_* FLUSH_IPFW_* PF_*",
                           "it belongs to another build of fwknopd")

    @property
    def packet_port(self) -> int:
        """Return the UDP port of packets: that of PCAP_FILTER if it is used, or UDPSERV_PORT."""
        named = self.texts.get("PCAP_FILTER", "").partition("port ")[2].partition(" ")[0]
        return self.udp_port if self.udp_server or not is_port(named) else int(named)

    @property
    def nat(self) -> bool:
        """Return whether NAT of any kind is enabled."""
        return self.forwarding or self.local_nat

    def warnings(self) -> List[str]:
        """Return what the administrator may not expect of these settings."""
        folder = folder_warnings(self.access_folder) if self.access_folder else []
        return folder + [text for applies, text in (
            (not self.aging and not self.capture_file,
             "ENABLE_SPA_PACKET_AGING N: packets of any age are accepted, the replay memory is "
             "never pruned, and packets older than it, or forgotten, are accepted again"),
            (not self.digest_persistence,
             "ENABLE_DIGEST_PERSISTENCE N: packets are remembered only while this process lives. "
             "Those made before it started are rejected; one of a client whose clock is ahead "
             "opens again, to whoever sends it if it names no address (REQUIRE_SOURCE_ADDRESS Y "
             "and the client's -a prevent that)" if self.aging else
             "ENABLE_DIGEST_PERSISTENCE N: a restart forgets which packets were seen"),
            (self.access_folder and self.is_set(ServerSettings.access_file),
             f"ACCESS_FILE {self.access_file} is not read: there is an ACCESS_FOLDER"),
            (self.http and self.forwarded_for,
             "ENABLE_X_FORWARDED_FOR Y: a client that reaches the port past your proxy can give "
             "any address as the source"),
            (self.promiscuous and self.interface == "any",
             "ENABLE_PCAP_PROMISC Y needs one interface as PCAP_INTF")) if applies]


def read_server_settings(path: str, settings: ServerSettings,
                         skipping: "Optional[Log]" = None) -> List[str]:
    """Set the lines of a fwknopd.conf; return warnings. Log errors in `skipping`, and go on."""
    warnings = permission_warnings(path)
    try:
        for number, raw in numbered_lines(path):
            try:
                line = parse_line(path, number, raw, colon=False)
                if line and line.name not in settings.overridden:
                    warnings += settings.set_line(line)
            except ConfigError as error:
                if not skipping:
                    raise
                skipping.warning(f"{error}; going on without this line")
    except ConfigError as error:
        if not skipping:
            raise
        skipping.warning(f"{error}; going on without this file")
    return warnings


# ======================================================================================
# 8. Knock sequences
#
# Ports that a client has to hit in order and in time (tests/spec/knockd.md 1.2, 1.3). An attacker
# on the path sees the sequence and can repeat it: it hides a service only from scanners.
# ======================================================================================

Step = Tuple[int, int]  # protocol and port; of ICMP the number of data bytes, or ANY_SIZE
ANY_SIZE = -1
STEP_PROTOCOLS = {"tcp": TCP, "udp": UDP, "icmp": ICMP}
MAX_FILTER_PORTS, MAX_FILTER_FLAGS = 300, 32  # 2,201 instructions; the kernel takes 4096
MAX_STEPS = 32  # as in knockd
MAX_ECHO = 1452  # data bytes of an ICMPv6 echo request in a packet of 1500 bytes
TCP_FLAGS = {"fin": 1, "syn": 2, "rst": 4, "psh": 8, "ack": 16, "urg": 32}  # RFC 9293 section 3.1
MAX_ATTEMPTS, LEAST_ATTEMPTS = 65536, 4096  # of all sequences (14 MB); of each, at least
MOST_SPARED = 16  # attempts to spare for one knock packet: that takes 30 us
SPARED_SHARE = 8  # spare attempts only while at most an eighth has done a second step


def parse_steps(text: str) -> Tuple[Step, ...]:
    """Parse `7000, 8000:udp, 100:icmp`: the last step is an echo request with 100 data bytes.

    `:icmp` matches any size. knockd reads a number up to where it ends, so a comment may follow;
    it needs a blank, because `7000#8000` may be half a sequence.
    """
    steps = []
    text = text.replace(";", "#")
    ports, _, comment = text.replace("//", "#").replace("(", "#").partition("#")
    expect(not comment or ports[-1:] in ("", " ", "\t"), "a blank before a comment's #, ;, // or (")
    for item in list_items(text):
        port, colon, protocol = (part.strip(" \t").lower() for part in item.partition(":"))
        port = port[port.startswith("+"):]
        number = STEP_PROTOCOLS.get(protocol if colon else "tcp")
        sized = number == ICMP and (port in ("", "0") or (is_port(port) and int(port) <= MAX_ECHO))
        expect(sized or (number in (TCP, UDP) and is_port(port)),
               "ports such as `7000, 8000:udp, 100:icmp`, without quotes")
        steps.append((number or 0, int(port) if port else ANY_SIZE))
    expect(len(steps) <= MAX_STEPS, f"at most {MAX_STEPS} ports")
    return tuple(steps)


def parse_flags(text: str) -> Tuple[int, int]:
    """Parse `syn,!ack`; return the TCP flags to look at, and those of them that must be set."""
    mask = value = 0
    for item in text.split(",") if text else ():
        bit = TCP_FLAGS.get(item.lstrip("!").lower(), 0)
        expect(bool(bit) and not item.startswith("!!"),
               "fin, syn, rst, psh, ack, urg or ! and one of them, with commas between, no blanks")
        mask, value = mask | bit, value & ~bit if item.startswith("!") else value | bit
    return mask, value


class Sequence:
    """Steps that open something, and the attempt of each source that has begun them.

    `seconds` is the time from the first step to the last. TCP segments without the right `flags`
    are ignored. A wrong step ends an attempt, and is then tried as a first one. Wrong is another
    port of this sequence; with `strict` any other port of its protocols, even if it is a step of
    another sequence. A repeated step is ignored, because hosts resend SYNs; with `exact` it ends
    the attempt. In a flood the oldest attempts end; those with a second step are mostly spared.
    """

    def __init__(self, steps: Tuple[Step, ...], seconds: float, flags: Tuple[int, int] = (0, 0),
                 strict: bool = False, exact: bool = False, target: bytes = b"",
                 file: "Optional[OneTimeFile]" = None) -> None:
        self.steps, self.file = file.steps if file else steps, file
        self.seconds, self.flags = seconds, flags
        self.strict, self.exact, self.target = strict, exact, target
        self.most = MAX_ATTEMPTS
        self.cooldown, self.deaf_until = 0, 0.0  # seconds to ignore everybody after it was complete
        # By source: the number of steps done, and the time at which it is over; the oldest first.
        self.attempts: "collections.OrderedDict[bytes, Tuple[int, float]]" = (
            collections.OrderedDict())
        self.further = 0  # attempts that have done a second step

    def warnings(self, alone: bool) -> List[str]:
        """Return what is wrong in its file; and, if it opens `alone`, that it hides little."""
        texts = self.file.warnings if self.file else []
        if not alone or not self.steps:
            return texts
        if len(self.steps) == 1:
            return texts + ["one port is no secret: a scan of all ports opens it"]
        for direction in (1, -1):  # in which a scan tries all ports one after the other
            gaps = [(after[1] - before[1]) * direction if after[0] == before[0] else 0
                    for before, after in zip(self.steps, self.steps[1:])]
            if all(gap == 1 or (gap > 1 and not self.strict) for gap in gaps):
                return texts + ["a scan of all ports opens it: let its ports rise and fall"
                                + ("" if self.strict else ", or make it strict (knockd.conf: the "
                                   "line `Strict` below [options])")]
        return texts

    @property
    def key(self) -> Tuple[Any, ...]:
        """Return what a reload must not change, so that the steps done before it still count."""
        return (self.steps, self.seconds, self.flags, self.strict, self.exact, self.target,
                self.file and self.file.path)

    def all_steps(self) -> List[Step]:
        """Return the steps, or those of all lines of a file: each of them becomes the next one."""
        lines = self.file.lines if self.file else []
        return [step for line in lines for step in line.steps] or list(self.steps)

    def mark_used(self, test: bool = False) -> bool:
        """Mark its file's next line, if any, before a door opens; return False after the last."""
        if self.file is None:
            return True
        self.file.mark_used(test)
        self.steps = self.file.steps
        self.attempts.clear()
        self.further = 0
        return bool(self.steps)

    def is_step(self, index: int, step: Step) -> bool:
        """Return whether this is the step at an index, which may be beyond the last step."""
        return index < len(self.steps) and self.steps[index] in (step, (step[0], ANY_SIZE))

    def concerns(self, knock: Datagram) -> bool:
        """Return whether a knock packet is a first step, or its source has an attempt."""
        return (knock.source in self.attempts
                or self.is_step(0, (knock.protocol, knock.destination_port)))

    def is_wrong(self, step: Step) -> bool:
        """Return whether a step that is not the next one ends an attempt."""
        return any(step[0] == protocol and (self.strict or port in (step[1], ANY_SIZE))
                   for protocol, port in self.steps)

    def follow(self, knock: Datagram, now: float) -> int:
        """Return how many steps a knock packet's source has now done; 0 if it does not count."""
        if now < self.deaf_until or (
                knock.protocol == TCP and (knock.flags & self.flags[0]) != self.flags[1]):
            return 0
        step, source = (knock.protocol, knock.destination_port), knock.source
        done, due = self.attempts.get(source, (0, 0.0))
        if now < due:
            if self.is_step(done, step):
                return self.advance(source, done + 1, due)
            if (not self.exact and self.is_step(done - 1, step)) or not self.is_wrong(step):
                return 0
            self.forget(source)
        if not self.is_step(0, step):
            return 0
        self.forget(source)  # an attempt whose time is over: the new one is the newest
        return self.advance(source, 1, now + self.seconds)

    def advance(self, source: bytes, done: int, due: float) -> int:
        """Note that a source has done so many steps, and return that; end attempts if too many."""
        if done == len(self.steps):
            self.forget(source)
            return done
        self.attempts[source] = done, due
        self.further += done == 2
        seen = 0
        while len(self.attempts) > self.most:
            oldest, attempt = self.attempts.popitem(last=False)
            seen += 1
            if attempt[0] > 1 and seen <= MOST_SPARED and self.further * SPARED_SHARE <= self.most:
                self.attempts[oldest] = attempt  # spared: the newest now
            else:
                self.further -= attempt[0] > 1
        return done

    def forget(self, source: bytes) -> None:
        """End the attempt of a source, if there is one."""
        self.further -= self.attempts.pop(source, (0, 0.0))[0] > 1

    def next_due(self) -> float:
        """Return when expire() has work: late for a spared attempt, which follow() finds over."""
        return next((due for _, due in self.attempts.values()), float("inf"))

    def expire(self, now: float) -> List[Tuple[bytes, int]]:
        """Forget the attempts whose time is over; return each one's source and steps done."""
        over = []
        while self.attempts and self.next_due() <= now:
            source, (done, _) = self.attempts.popitem(last=False)
            self.further -= done > 1
            over.append((source, done))
        return over


def make_sequence(owner: "Union[Stanza, KnockdDoor]", strict: bool, exact: bool,
                  target: bytes = b"") -> Sequence:
    """Return the sequence of a stanza or a door; ConfigError if its file can't be read."""
    try:
        file = read_one_time_file(owner.knock_file) if owner.knock_file else None
    except ConfigError as error:
        raise owner.error(type(owner).knock_file, str(error)) from None
    return Sequence(owner.knock_steps or (), owner.knock_seconds, owner.knock_flags, strict, exact,
                    target, file)


def sequence_filter(sequences: List[Sequence]) -> Filter:
    """Return the filter of these sequences' steps, by ports and flags unless these are too many."""
    wanted: Dict[Tuple[int, Tuple[int, int]], Set[int]] = {}
    few = len({sequence.flags for sequence in sequences}) <= MAX_FILTER_FLAGS
    for sequence in sequences:  # if one is strict, its protocols pass whole
        for protocol, port in sequence.all_steps():
            key = protocol, sequence.flags if protocol == TCP and few else (0, 0)
            wanted.setdefault(key, set()).add(ANY_SIZE if sequence.strict else port)
    many = sum(map(len, wanted.values())) > MAX_FILTER_PORTS
    return Junction("or", tuple(
        step_filter(protocol, flags, set() if many or ANY_SIZE in ports else ports)
        for (protocol, flags), ports in wanted.items()))


def step_filter(protocol: int, flags: Tuple[int, int], ports: Set[int]) -> Filter:
    """Return a filter for steps of a protocol to these ports, or to every port if none is given."""
    def test(start: int, behind: int) -> Filter:
        if protocol == ICMP:  # echo requests
            return field_is_one_of(start, 1, (8, 128), behind)
        tests = [field_is_one_of(start + 2, 2, ports, behind)] if ports else []
        tests += [Comparison(start + 13, 1, value, value, mask, behind)] if mask else []
        return Junction("and", tuple(tests))

    mask, value = flags
    return transport_filter((protocol,), (ICMP6 if protocol == ICMP else protocol,), test)


class OneTimeLine(NamedTuple):
    """A line of a one-time file that is not used yet; `offset` is where it begins in the file."""

    offset: int
    text: str
    steps: Tuple[Step, ...]


class OneTimeFile:
    """A file of sequences that open once each: `#` marks a used line; if all are, none opens."""

    def __init__(self, path: str, lines: List[OneTimeLine], warnings: List[str]) -> None:
        self.path, self.warnings = path, warnings
        self.lines = lines  # the next one last

    @property
    def steps(self) -> Tuple[Step, ...]:
        """Return the steps of the next line; none if all lines are used."""
        return self.lines[-1].steps if self.lines else ()

    def mark_used(self, test: bool = False) -> None:
        """Mark the next line, on disk, or raise SpaError; a `test` only checks that it works."""
        line = self.lines[-1]
        raw = line.text.encode("latin-1")
        try:
            with open(open_ours(self.path, os.O_RDWR), "r+b", buffering=0) as file:
                if os.pread(file.fileno(), len(raw), line.offset) != raw:
                    raise SpaError(f"{self.path}: somebody changed it; nothing is opened until it "
                                   "is read again")
                if not test:
                    os.pwrite(file.fileno(), b"#", line.offset)
                    os.fsync(file.fileno())
        except OSError as error:
            raise SpaError(explain(error, self.path)) from None
        self.lines.pop()


def read_one_time_file(path: str) -> OneTimeFile:
    """Return the unused lines of a file, and warnings; raise ConfigError if it can't be read."""
    lines, warnings, offset = [], permission_warnings(path), 0
    content = read_file(path, untrusted=True)  # so a regular file: mark_used() writes to it
    for number, text in enumerate(content.split("\n"), 1):
        listed = text.strip(" \t\r" + BYTE_ORDER_MARK)
        try:
            if listed and not listed.startswith("#"):
                lines.append(OneTimeLine(offset, text, parse_steps(listed)))
        except ValueError as error:
            warnings.append(f"{path}:{number}: {error}; this line opens nothing")
        offset += len(text) + 1
    if not lines:
        warnings.append(f"{path}: no sequence is left; this opens nothing")
    return OneTimeFile(path, lines[::-1], warnings)


# ======================================================================================
# 9. access.conf
#
# A stanza says which clients may open which ports, and for how long (tests/spec/fwknop.md 3.3).
# fwknopd.conf has a say in NAT and destinations only. Section 29 tries the stanzas in their order.
# ======================================================================================


class Key(Directive[Secret]):
    """A key of 1 to `longest` bytes; NAME_BASE64 takes it in base64 with or without '='."""

    secret = True

    def __init__(self, name: str, longest: int, help: str) -> None:
        super().__init__(name, self.parse_key, "", help)
        self.longest = longest

    def parse_key(self, text: str) -> Secret:
        """Parse a key; refuse the placeholder of a sample file, also one in base64."""
        key, placeholder = text.encode("latin-1"), PLACEHOLDER.encode()
        if self.name.endswith("_BASE64") and key.strip() != placeholder:
            key = decode_base64(key.strip().rstrip(b"="))
        expect(key.strip() != placeholder, "a key instead of " + PLACEHOLDER)
        expect(not text or 0 < len(key) <= self.longest,
               f"a key of 1 to {self.longest} bytes, not {len(key)}")
        return Secret(key)


def parse_user(text: str) -> str:
    """Parse a user name that a packet can carry (tests/spec/fwknop.md 1.3)."""
    expect(len(text) <= 48 and set(text) <= set(USER_CHARACTERS),
           "up to 48 characters as they are allowed in an SPA packet")
    return text


def parse_permission(text: str) -> str:
    """Parse the Y of an old directive, which changes nothing; N would have kept clients from it."""
    expect(text[:1] in ("", "Y", "y"), "Y: here, OPEN_PORTS and MAX_FW_TIMEOUT limit clients")
    return text


def key_ids(*lengths: int) -> Callable[[str], FrozenSet[str]]:
    """Return a parser of comma lists of key ids that have so many hex digits."""
    def parse(text: str) -> FrozenSet[str]:
        ids = [item.replace(" ", "").upper() for item in list_items(text.rstrip(",")) if text]
        expect(all(len(each) in lengths and not each.strip("0123456789ABCDEF") for each in ids),
               " or ".join(map(str, lengths)) + " hex digits, with commas between the keys")
        return frozenset(ids)
    return parse


def parse_date(text: str) -> int:
    """Parse MM/DD/YYYY; return the epoch seconds at which that day begins, in local time."""
    try:
        month, day, year = [integer(1, 9999)(part) for part in drop_comment(text).split("/")]
        year += 2000 if year < 100 else 0  # as fwknopd reads it
        seconds = int(time.mktime((year, month, day, 0, 0, 0, 0, 0, -1)))
        expect(time.localtime(seconds)[:3] == (year, month, day), "one that exists")
    except (ValueError, OverflowError):
        raise ValueError("invalid date value, expected MM/DD/YYYY") from None
    return seconds


class Account(NamedTuple):
    """The user and the groups that a command runs as."""

    user: str
    group: str
    uid: int
    gid: int
    groups: Tuple[int, ...]


def parse_account(text: str) -> Account:
    """Parse the name of a user of this host; return the account with all groups of that user."""
    import grp
    import pwd
    try:
        _, _, uid, gid, *_ = pwd.getpwnam(text)
        group = grp.getgrgid(gid).gr_name
    except KeyError:
        raise ValueError("expected a user of this host") from None
    return Account(text, group, uid, gid, tuple(os.getgrouplist(text, gid)))


def find_group(text: str) -> Optional[int]:
    """Return the number of the group of this name, None if this host has none."""
    import grp
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        return None


def parse_group(text: str, or_user: bool = False) -> int:
    """Parse the name of a group of this host, `or_user` of a user, whose main group is meant."""
    number = find_group(text)
    if number is None and or_user:
        with contextlib.suppress(ValueError):
            number = parse_account(text).gid
    if number is None:
        raise ValueError("expected a group of this host")
    return number


def parse_template(text: str) -> Tuple[str, ...]:
    """Split an administrator's command at blanks, before variables can bring others in."""
    argv = text.encode("latin-1").split()  # as bytes: 0xA0 is no blank
    expect(len(argv) <= MAX_ARGUMENTS, f"at most {MAX_ARGUMENTS} words "
           "(Error converting cmd str to argv)")
    expect(not argv or find_program(os.fsdecode(argv[0])) is not None, "a program that can be run")
    template = tuple(argument.decode("latin-1") for argument in argv)
    for argument in template:
        fill_in(argument, dict.fromkeys(CYCLE_VARIABLES, ""))
    return template


def fill_in(argument: str, values: Dict[str, Any]) -> str:
    """Replace variables such as $IP by their values; the longest name wins (fwknop.md 3.8)."""
    filled, *parts = argument.split("$")
    for part in parts:
        name = max((name for name in CYCLE_VARIABLES if part.startswith(name)), key=len, default="")
        expect(name != "", "only $" + ", $".join(CYCLE_VARIABLES) + " after a dollar sign")
        filled += str(values[name]) + part[len(name):]
    return filled


SHELL_SIGNS = frozenset("| || & && > >> < 2>&1".split())
MAX_ARGUMENTS = 30  # of a command, with its program: "words" in fwknop.md 3.8
CYCLE_VARIABLES = ("IP", "SRC", "PKT_SRC", "DST", "PORT", "PROTO", "TIMEOUT", "CLIENT_TIMEOUT")


class Stanza(Settings):
    """A stanza of access.conf: its keys and its knock sequence, and what these may open."""

    source = Directive("SOURCE", Networks, "ANY", "ANY, or the addresses and networks of clients")
    destination = Directive("DESTINATION", Networks, "ANY", "addresses that clients may send to")
    open_ports = Directive("OPEN_PORTS", parse_ports, "",
                           "ports that may be opened: tcp/22, udp/53; without it every port")
    restrict_ports = Directive("RESTRICT_PORTS", parse_ports, "", "ports that may not be opened")
    key = Key("KEY", MAX_KEY_BYTES, "encryption key, raw, up to 32 bytes")
    key_base64 = Key("KEY_BASE64", MAX_KEY_BYTES, "encryption key in base64")
    hmac_key = Key("HMAC_KEY", MAX_HMAC_KEY_BYTES, "HMAC key, raw, up to 128 bytes")
    hmac_key_base64 = Key("HMAC_KEY_BASE64", MAX_HMAC_KEY_BYTES, "HMAC key in base64")
    hmac_type = Directive("HMAC_DIGEST_TYPE", lambda text: DIGESTS[choice(*DIGESTS)(text)],
                          "SHA256", "MD5, SHA1, SHA256, SHA384, SHA512, SHA3_256 or SHA3_512")
    mode = Directive("ENCRYPTION_MODE", choice(*MODES, ASYMMETRIC), "CBC",
                     "CBC, ECB, CFB, OFB, CTR or legacy; Asymmetric: GPG only")
    answer = Flag("ANSWER", "answer a packet over UDP, once and encrypted: what was opened, or why "
                  "not; needs KEY and HMAC_KEY")
    grant_seconds = Directive("FW_ACCESS_TIMEOUT", integer(0, 8388608, "seconds"), "30",
                             "how long to open; 0: only for as long as the client asks")
    max_seconds = Directive("MAX_FW_TIMEOUT", integer(1, 8388608, "seconds"), "300",
                            "the longest time that a client may ask for")
    prefix4 = Directive("ACCESS_PREFIX4", integer(8, 32, "a prefix length"), "32",
                        "open to the whole network around an IPv4 address; 24 for carrier NAT")
    prefix6 = Directive("ACCESS_PREFIX6", integer(32, 128, "a prefix length"), "128",
                        "the same for IPv6, for example 56")
    one_connection = Flag("ONE_CONNECTION", "the first connection that comes in ends the grant, so "
                          "that nobody else behind the same NAT gets in; nftables only")
    require_source = Flag("REQUIRE_SOURCE_ADDRESS REQUIRE_SOURCE",
                          "the packet must name the address to open to")
    same_address = NoDefault("REQUIRE_SAME_ADDRESS", Flag.parse_flag,
                             "open only to the address that the packet came from; without it: Y "
                             "with OPENSPA_CLIENTS, else N")
    require_username = Directive("REQUIRE_USERNAME", parse_user, "",
                                 "user the packet must name; with OpenSPA its UUID")
    openspa_clients = NoDefault("OPENSPA_CLIENTS", parse_path,
                                "directory of OpenSPA clients' public keys, each file named by the "
                                "client's UUID; read for each request")
    expire_date = NoDefault("ACCESS_EXPIRE", parse_date, "void from this day on, MM/DD/YYYY")
    expire_epoch = NoDefault("ACCESS_EXPIRE_EPOCH", integer(0, 10 ** 11, "seconds"),
                             "the same as epoch seconds; 0: never")
    gpg_home = NoDefault("GPG_HOME_DIR", parse_home, "keys of gpg; without it fwknopd.conf's")
    gpg_program = NoDefault("GPG_EXE", parse_path, "the same for the program gpg")
    gpg_decrypt_id = Directive("GPG_DECRYPT_ID", lambda text: text.partition(" #")[0].rstrip(), "",
                               "secret key packets are encrypted to")
    gpg_passphrase = Key("GPG_DECRYPT_PW", MAX_PASSPHRASE_BYTES, "its passphrase")
    gpg_no_passphrase = Flag("GPG_ALLOW_NO_PW", "it has no passphrase")
    gpg_remote_ids = Directive("GPG_REMOTE_ID", key_ids(8, 16, 40), "",
                               "keys that may sign: ids of 8, 16 or 40 hex digits, with commas")
    gpg_fingerprints = Directive("GPG_FINGERPRINT_ID", key_ids(40), "",
                                 "the same by whole fingerprints; with both, both must fit")
    gpg_require_sig = Flag("GPG_REQUIRE_SIG", "no effect, as in fwknopd; see GPG_DISABLE_SIG", "Y")
    gpg_disable_sig = Flag("GPG_DISABLE_SIG", "do not ask who signed")
    gpg_any_trust = Flag("GPG_IGNORE_SIG_VERIFY_ERROR", "signers may be untrusted or expired")
    enable_commands = Flag("ENABLE_CMD_EXEC", "run the commands of command messages")
    command_user = NoDefault("CMD_EXEC_USER", parse_account,
                             "user that this stanza's commands run as; without it the server's")
    command_group = NoDefault("CMD_EXEC_GROUP", partial(parse_group, or_user=True),
                              "their only group; without it all of that user's")
    enable_sudo = Flag("ENABLE_CMD_SUDO_EXEC", "run the commands of command messages through sudo")
    sudo_user = NoDefault("CMD_SUDO_EXEC_USER", parse_account, "sudo's -u")
    sudo_group = NoDefault("CMD_SUDO_EXEC_GROUP", parse_group, "sudo's -g")
    cycle_open = Directive("CMD_CYCLE_OPEN", parse_template, "", "command in place of the firewall")
    cycle_close = Directive("CMD_CYCLE_CLOSE",
                            lambda text: () if text == "NONE" else parse_template(text), "",
                            "command that closes again, or NONE")
    cycle_seconds = NoDefault("CMD_CYCLE_TIMER", integer(1, 8388608, "seconds"),
                              "how long to open, unless the client asks for a time")
    on_open = Directive("ON_OPEN", parse_template, "",
                        "command to run beside the firewall, once it has opened a port")
    on_close = Directive("ON_CLOSE", parse_template, "", "the same, once that grant has ended")

    knock_steps = NoDefault("KNOCK_SEQUENCE", parse_steps,
                            "knocks that open OPEN_PORTS: 7000, 8000:udp, 100:icmp", secret=True)
    knock_file = NoDefault("KNOCK_ONE_TIME_FILE", parse_path,
                           "file with such sequences, each of which opens once")
    knock_seconds = Directive("KNOCK_TIMEOUT", integer(1, 86400, "seconds"), "25",
                              "time from the first port to the last, and then for the packet")
    knock_flags = Directive("KNOCK_TCPFLAGS", parse_flags, "syn,!ack",
                            "TCP segments that count: fin, syn, rst, psh, ack, urg, ! for without")
    knock_strict = Flag("KNOCK_STRICT", "any other port starts it over: scans do not open", "Y")
    knock_exact = Flag("KNOCK_STRICT_DUPLICATES", "a port that is hit again does so as well")
    require_knock = Flag("REQUIRE_KNOCK", "the sequence alone opens nothing: a packet must follow")

    force_nat = NoDefault("FORCE_NAT", parse_nat_target, "`IP PORT` that NAT always leads to")
    force_snat = NoDefault("FORCE_SNAT", parse_nat_address, "source of forwarded connections")
    force_masquerade = Flag("FORCE_MASQUERADE", "the same with the outgoing interface's address")
    forward_all = Flag("FORWARD_ALL", "with NAT, forward every protocol and port")
    disable_dnat = Flag("DISABLE_DNAT", "with NAT, forward only what is sent to the inner host")

    of_tools = Ignored("keytype hkeytype DATA_COLLECT_MODE GPG_PATH GPG_PREFIX_ADD GPG_NO_OPTIONS "
                       "GPG_NO_REQUIRE_PREFIX ENABLE_FORWARD_ACCESS ENABLE_OUTPUT_ACCESS "
                       "DISABLE_FW_TIMEOUT",
                       "tools and older releases of fwknop write it, and nothing reads it")
    permissions = Ignored("PERMIT_CLIENT_PORTS PERMIT_CLIENT_TIMEOUT",
                          "as in fwknopd 2.6, clients may", parse_permission)
    sudo_program = Ignored("SUDO_EXE", "as in fwknopd, it has an effect in fwknopd.conf only")

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.keys: Optional[PacketKeys] = None  # validate() makes them
        self.gpg: Optional[GpgKeys] = None  # load_gpg() does, when the server starts
        self.has_key_file = False  # whether %include_keys names one, which a user may own
        self.sequence: Optional[Sequence] = None
        self.void = ""  # why it opens nothing
        self.takes_packets = True  # not only knock sequences
        self.expires: Optional[int] = None
        self.for_all = False  # whether SOURCE and DESTINATION are ANY
        self.wrong_hmac = WrongKey("wrong HMAC", invalid_data("HMAC_COMPAREFAIL"))
        self.wrong_hmac.stanza_number = number

    def validate(self) -> List[str]:
        """Check the stanza as a whole, make its keys and its sequence, and return warnings."""
        key, hmac_key = self.secrets()
        gpg = bool(self.gpg_decrypt_id)
        self.takes_packets = bool(key) or gpg
        self.check_needs()
        texts = self.validate_knock()
        self.require(
            (self.takes_packets or self.openspa_clients or (self.sequence and not hmac_key),
             Stanza.source, "a KEY or KEY_BASE64 in this stanza, or GPG_DECRYPT_ID, "
             "OPENSPA_CLIENTS or KNOCK_SEQUENCE"),
            (not hmac_key or not compare_digest(key, hmac_key), Stanza.source,
             "an HMAC key that is not the encryption key"),
            (not gpg or self.gpg_passphrase or self.gpg_no_passphrase, Stanza.gpg_decrypt_id,
             "GPG_DECRYPT_PW as well, or GPG_ALLOW_NO_PW Y"),
            (not gpg or self.gpg_disable_sig or self.gpg_remote_ids or self.gpg_fingerprints,
             Stanza.gpg_decrypt_id,
             "GPG_REMOTE_ID or GPG_FINGERPRINT_ID as well: who may sign; or GPG_DISABLE_SIG Y"),
            (gpg or not key or self.mode != ASYMMETRIC, Stanza.mode,
             "GPG_DECRYPT_ID, or the mode of KEY"),
            (not self.answer or (key and hmac_key and self.mode != ASYMMETRIC), Stanza.answer,
             "KEY and HMAC_KEY with it, or their _BASE64: they encrypt and sign the answer"))
        if key and self.mode != ASYMMETRIC:
            self.keys = PacketKeys(key, self.mode, hmac_key, self.hmac_type)
        self.for_all = self.source.everything and self.destination.everything
        self.expires = min((end for end in (self.expire_epoch or None, self.expire_date)
                            if end is not None), default=None)
        return [f"(stanza #{self.number}) {text}" for text in texts + self.warnings(key, hmac_key)]

    def check_needs(self) -> None:
        """Raise ConfigError for a directive that stands without another one that it needs."""
        has = self.is_set
        needs: Tuple[Tuple[str, object, Tuple[Directive[Any], ...]], ...] = (
            ("ENABLE_CMD_SUDO_EXEC", has(Stanza.enable_sudo) or not self.enable_commands,
             (Stanza.sudo_user, Stanza.sudo_group)),
            ("CMD_CYCLE_OPEN", has(Stanza.cycle_open), (Stanza.cycle_close, Stanza.cycle_seconds)),
            ("CMD_CYCLE_CLOSE", has(Stanza.cycle_close), (Stanza.cycle_open,)),
            ("CMD_CYCLE_TIMER", self.cycle_seconds or not self.cycle_close, (Stanza.cycle_open,)),
            ("no CMD_CYCLE_OPEN", not has(Stanza.cycle_open), (Stanza.on_open, Stanza.on_close)),
            ("KNOCK_SEQUENCE", has(Stanza.knock_steps) or has(Stanza.knock_file),
             (Stanza.knock_seconds, Stanza.knock_flags, Stanza.knock_strict, Stanza.knock_exact,
              Stanza.require_knock)),
            ("no ONE_CONNECTION", not self.one_connection,
             (Stanza.cycle_open, Stanza.force_nat, Stanza.force_snat, Stanza.force_masquerade,
              Stanza.forward_all, Stanza.disable_dnat)))
        for needed, condition, rows in needs:
            for row in rows:
                self.require((condition or not has(row), row, needed + " with it"))

    def validate_knock(self) -> List[str]:
        """Check and make the stanza's sequence, if it has one, and return warnings."""
        if not self.only_one(Stanza.knock_steps, Stanza.knock_file):
            return []
        packet = self.require_knock  # follows the sequence, and says what to open
        self.require(
            (self.takes_packets or self.openspa_clients or not packet, Stanza.require_knock,
             "a KEY as well, for the packet to follow"),
            (packet or self.open_ports, Stanza.knock_file if self.knock_file else
             Stanza.knock_steps, "OPEN_PORTS with it"),
            (packet or self.open_ports.isdisjoint(self.restrict_ports), Stanza.restrict_ports,
             "none of OPEN_PORTS, all of which the sequence opens"),
            (packet or not self.require_username, Stanza.require_username,
             "REQUIRE_KNOCK Y with it, since a sequence names no user"),
            (packet or self.grant_seconds or self.cycle_seconds, Stanza.grant_seconds,
             "more than 0, since a sequence asks for no time"))
        self.sequence = make_sequence(self, self.knock_strict, self.knock_exact)
        return self.sequence.warnings(alone=not packet)

    def warnings(self, key: Secret, hmac_key: Secret) -> List[str]:
        """Return what the administrator may not expect of this stanza."""
        gpg, group = bool(self.gpg_decrypt_id), self.texts.get("CMD_EXEC_GROUP", "")
        words = self.cycle_open + self.cycle_close + self.on_open + self.on_close
        return [text for applies, text in (
            (gpg and not hmac_key,
             "no HMAC_KEY: anybody can make this server start gpg, and while somebody does, knocks "
             "are rejected; keygen.py makes a key"),
            (gpg and self.gpg_disable_sig,
             "GPG_DISABLE_SIG Y: " + (
                 "only the HMAC tells who made a packet" if hmac_key else "without HMAC_KEY, "
                 "everybody who has the public key of GPG_DECRYPT_ID can open all that this "
                 "stanza allows")),
            (gpg and not self.gpg_require_sig,
             "GPG_REQUIRE_SIG N has no effect, as in fwknopd: GPG_DISABLE_SIG has"),
            (key and self.mode == ASYMMETRIC,
             "ENCRYPTION_MODE Asymmetric: the KEY of this stanza opens nothing"),
            (group and not self.command_user, "CMD_EXEC_GROUP has no effect without CMD_EXEC_USER"),
            (SHELL_SIGNS.intersection(words) or set("'\"`").intersection("".join(words)),
             "CMD_CYCLE_* and ON_*: no shell reads them, so that quotes and signs such as > and && "
             "reach the program as they are; let it run a script"),
            (group and find_group(group) is None,
             f"CMD_EXEC_GROUP: there is no group {group}; the main group of that user is taken"),
            (self.enable_commands and not (self.command_user or self.enable_sudo),
             "ENABLE_CMD_EXEC Y without CMD_EXEC_USER: holders of its keys run commands as root"),
            (self.keys and not hmac_key,
             "no HMAC_KEY: anybody can make this server decrypt, and fwknop's packets without HMAC "
             "can be forged in part; keygen.py makes both keys"),
            (self.mode == "LEGACY" and len(key) > LEGACY_KEY_BYTES,
             "Warning: truncating encryption key in legacy mode to 16 bytes"),
            (self.expires is not None and time.time() >= self.expires,
             "has expired (ACCESS_EXPIRE): delete it, or let it end later"),
            (not self.open_ports, "no OPEN_PORTS: every port may be opened"),
            (self.takes_packets and not self.require_source,
             "Warning: REQUIRE_SOURCE_ADDRESS not enabled for access stanza source: "
             f"'{self.texts.get('SOURCE', 'ANY')}'")) if applies]

    def make_void(self, error: SpaError) -> None:
        """Make the stanza open nothing, because of this error."""
        self.void = self.void or str(error)
        self.keys = self.gpg = self.sequence = None

    def secrets(self) -> Tuple[Secret, Secret]:
        """Return the encryption key and the HMAC key, in whichever form they are given."""
        return (self.only_one(Stanza.key, Stanza.key_base64),
                self.only_one(Stanza.hmac_key, Stanza.hmac_key_base64))

    @property
    def account(self) -> Optional[Account]:
        """Return the account that runs this stanza's commands; None is the server's own."""
        user, gid = self.command_user, self.command_group
        if user is None or gid is None:
            return user
        return user._replace(group=self.texts["CMD_EXEC_GROUP"], gid=gid, groups=(gid,))

    def admits(self, datagram: Datagram) -> bool:
        """Return whether SOURCE and DESTINATION let this datagram try the stanza's keys."""
        return datagram.source in self.source and datagram.destination in self.destination


MOST_FILES_DEEP = 3  # access.conf, a file in it, and a file in that one, as in fwknopd
# The user may own a key file: it can't widen its stanza, nor name a program for root to run.
KEY_FILE_NAMES = frozenset((
    "KEY KEY_BASE64 HMAC_KEY HMAC_KEY_BASE64 HMAC_DIGEST_TYPE GPG_DECRYPT_ID GPG_DECRYPT_PW "
    "GPG_ALLOW_NO_PW GPG_REQUIRE_SIG GPG_DISABLE_SIG GPG_IGNORE_SIG_VERIFY_ERROR GPG_REMOTE_ID "
    "GPG_FINGERPRINT_ID").split())


class AccessFiles:
    """The stanzas of access.conf and of the files it includes, in the order of SOURCE lines."""

    def __init__(self, directory: str = "") -> None:
        self.directory = directory  # where relative paths begin
        self.stanzas: List[Stanza] = []
        self.warnings: List[str] = []

    def read(self, path: str, depth: int = 1) -> None:
        """Read a file at this depth of %include lines. A stanza goes on after an %include."""
        self.warnings += permission_warnings(path)
        stanza: Optional[Stanza] = None
        for line in read_lines(path, colon=True):
            if line.name in ("%include", "%include_folder"):
                self.include(line, depth)
                continue
            if line.name == Stanza.source.name:
                stanza = Stanza(len(self.stanzas) + 1)
                stanza.directory = self.directory
                self.stanzas.append(stanza)
            if stanza is None:
                raise line.misread("expected a SOURCE line first: it begins a stanza")
            if line.name == "%include_keys":
                self.include_keys(line, stanza)
            else:
                self.warnings += stanza.set_line(line)

    def include(self, line: Line, depth: int) -> None:
        """Read the file that an %include line names, or the *.conf of a folder."""
        if depth == MOST_FILES_DEEP:
            raise line.error(f"Refusing to go deeper than {depth} levels. "
                             f"Lost in Limbo: '{line.file}'")
        path = os.path.join(self.directory, line.value.rstrip())
        try:
            paths = [path] if line.name == "%include" else folder_files(path)
            self.warnings += folder_warnings(path) if line.name != "%include" else []
        except ValueError as error:
            raise line.error(error) from None
        for each in paths:
            check_included(each, line)
            self.read(each, depth + 1)

    def include_keys(self, line: Line, stanza: Stanza) -> None:
        """Set the keys of the stanza from the file that an %include_keys line names."""
        stanza.has_key_file = True
        path = os.path.join(self.directory, line.value.rstrip())
        try:
            check_included(path, line)
            self.warnings += [f"Including key file: '{path}'"] + permission_warnings(path)
            for each in read_lines(path, colon=True, untrusted=True):
                if each.name not in KEY_FILE_NAMES:
                    raise each.error("expected only keys here, and the rest beside %include_keys")
                self.warnings += stanza.set_line(each)
        except SpaError as error:
            stanza.make_void(error)


def check_included(path: str, line: Line) -> None:
    """Raise ConfigError at the %include line if its file is missing."""
    if not os.path.isfile(path):
        raise line.error(f"Access file: '{path}' was not found.")


def read_stanzas(*paths: str, directory: str = "") -> Tuple[List[Stanza], List[str]]:
    """Return the stanzas of these files and of the files they include, and warnings."""
    files = AccessFiles(directory)
    for path in paths:
        files.read(path)
    if not files.stanzas:
        raise ConfigError(", ".join(paths) + ": expected a stanza, which begins with SOURCE")
    for stanza in files.stanzas:
        stanza.set_defaults()
        try:
            files.warnings += [] if stanza.void else stanza.validate()
        except SpaError as error:
            if not stanza.has_key_file:  # a user may own the file, and lock out only himself
                raise
            stanza.make_void(error)
    return files.stanzas, files.warnings + mark_shared_keys(files.stanzas)


def mark_shared_keys(stanzas: List[Stanza]) -> List[str]:
    """Mark keys that another stanza has with less around them; return a warning of lost HMACs."""
    keyed = [(stanza, stanza.keys) for stanza in stanzas if stanza.keys]
    bare = {keys.secret for _, keys in keyed if not keys.has_hmac}
    protected = {keys.secret for _, keys in keyed if keys.has_hmac}
    legacy = {keys.secret for _, keys in keyed if keys.respelt}
    for _, keys in keyed:  # packets open without their tag, or a block of padding, too
        keys.accepts_bare = keys.has_hmac and keys.secret in bare
        keys.respelt = keys.secret in legacy
    return [f"(stanza #{stanza.number}) another stanza has this key with an HMAC: its packets open "
            "here without their tag, so that the HMAC protects nothing; keygen.py makes another key"
            for stanza, keys in keyed if not keys.has_hmac and keys.secret in protected]


def only_guarded(settings: ServerSettings) -> bool:
    """Return whether a grant changes nothing for ports outside of GUARD_PORTS."""
    return bool(settings.guard_ports) and not (settings.nft_accept_chains
                                               or settings.is_set(ServerSettings.input_access))


def port_warnings(settings: ServerSettings, stanzas: List[Stanza]) -> List[str]:
    """Warn about ports that nothing closes: only the guard could, and GUARD_PORTS lacks them."""
    texts = []  # with NAT, a port that is not closed can still lead elsewhere after a knock
    only_guard = only_guarded(settings) and not settings.nat
    for stanza in stanzas if only_guard else ():
        ports = stanza.open_ports - settings.guard_ports
        if ports and not stanza.cycle_open:
            texts.append(f"(stanza #{stanza.number}) {port_list(ports)} is not in GUARD_PORTS: "
                         "a knock changes nothing for it")
        elif not (stanza.open_ports or stanza.cycle_open or stanza.enable_commands):
            texts.append(f"(stanza #{stanza.number}) a knock changes nothing for ports that are "
                         "not in GUARD_PORTS")
    return texts


def check_nat(settings: ServerSettings, stanzas: List[Stanza]) -> None:
    """Raise ConfigError for NAT in a stanza without a directive that it needs (fwknop.md 3.3)."""
    settings.require((not settings.snat or settings.texts.get("SNAT_TRANSLATE_IP") != PLACEHOLDER,
                      ServerSettings.snat_address, "an IP address instead of " + PLACEHOLDER))
    for stanza in stanzas:
        forced = stanza.force_nat or stanza.forward_all
        for row, possible, needed in (
                (Stanza.force_nat, settings.nat,
                 "either ENABLE_IPT_FORWARDING or ENABLE_IPT_LOCAL_NAT in fwknopd.conf"),
                (Stanza.forward_all, settings.forwarding, "ENABLE_IPT_FORWARDING in fwknopd.conf"),
                (Stanza.force_snat, forced, "either FORCE_NAT or FORWARD_ALL"),
                (Stanza.force_masquerade, forced, "either FORCE_NAT or FORWARD_ALL"),
                (Stanza.force_snat, settings.snat, "ENABLE_IPT_SNAT in fwknopd.conf"),
                (Stanza.force_masquerade, settings.snat, "ENABLE_IPT_SNAT in fwknopd.conf")):
            if getattr(stanza, row.attribute) and not possible:
                raise stanza.error(row, "requires " + needed)


# ======================================================================================
# 10. knockd.conf
#
# Doors of knockd (tests/spec/knockd.md 1.2): sequences that run commands, and use no firewall.
# Names may have any case. A comment has its own line, but may also follow a number.
# ======================================================================================

IP_VARIABLE = "%IP%"
LONGEST_IP = 39  # characters of an IPv6 address
MAX_COMMAND = 4095  # bytes, with addresses in it (knockd.md 1.2)
KNOCKD_CHARACTERS = NAME_CHARACTERS + NAME_CHARACTERS.lower()  # of names; no line has a key


def parse_shell(text: str) -> str:
    """Parse a command for /bin/sh that is short enough with any address for %IP%."""
    longest = len(text) + text.count(IP_VARIABLE) * (LONGEST_IP - len(IP_VARIABLE))
    expect(longest <= MAX_COMMAND, f"at most {MAX_COMMAND} bytes")
    return text


def parse_interfaces(text: str) -> Tuple[str, ...]:
    """Parse a comma list of network interfaces; with `any` in it, that alone."""
    names = tuple(dict.fromkeys(parse_interface(name.strip()) for name in text.split(",")))
    return ("any",) if "any" in names else names


class KnockdSettings(Settings):
    """A section of knockd.conf, with lines `name = value`."""

    file = "knockd.conf"

    @classmethod
    def row(cls, name: str) -> Optional[Directive[Any]]:
        """Return the row of a name in upper or lower case."""
        return next((row for row in cls.rows() if name.lower() in map(str.lower, row.names)), None)


class Bare(Directive[bool]):
    """A directive without a value: its name stands alone."""

    def __init__(self, name: str, help: str) -> None:
        super().__init__(name, bool, "", help)


class KnockdOptions(KnockdSettings):
    """The section [options], which holds for all doors."""

    use_syslog = Bare("UseSyslog", "log to syslog")
    log_file = NoDefault("LogFile", str, "log to this file")
    pid_file = Directive("PidFile", str, "/var/run/knockd.pid", "pid of the running server")
    interfaces = Directive("Interface", parse_interfaces, "any",
                           "interfaces to listen on, with commas between, or any")
    exact = Bare("StrictDuplicates", "a port that is hit again starts the sequence over")
    strict = Bare("Strict", "so does every other port: scans do not open")


class KnockdDoor(KnockdSettings):
    """Any other section: a sequence, and the commands that it runs."""

    knock_steps = NoDefault("Sequence", parse_steps, "ports: 7000,8000:udp,9000", secret=True)
    knock_file = NoDefault("One_Time_Sequences", str, "file of such sequences that open once each")
    knock_seconds = Directive("Seq_Timeout Timeout", integer(1, 8388608, "seconds"), "25",
                              "time from the first port to the last")
    cooldown = Directive("Seq_Cooldown", integer(0, 86400, "seconds"), "0",
                         "time for which nobody can knock again after it (of a fork of knockd)")
    knock_flags = Directive("TCPFlags", parse_flags, "",
                            "TCP segments that count: fin, syn, rst, psh, ack, urg, ! for without")
    target = NoDefault("Target", lambda text: parse_address(text).packed,
                       "address that has to be hit; without it any of this host's")
    start = Directive("Start_Command Command", parse_shell, "",
                      "shell command to run when all were hit; %IP% is the client's address")
    start6 = NoDefault("Start_Command_6 Command_6", parse_shell, "instead, for an IPv6 address")
    stop_seconds = Directive("Cmd_Timeout", integer(0, 8388608, "seconds"), "10",
                             "time from the end of that command to Stop_Command")
    stop = Directive("Stop_Command", parse_shell, "", "shell command to run then")
    stop6 = NoDefault("Stop_Command_6", parse_shell, "instead, for an IPv6 address")

    def __init__(self, line: Line, name: str, number: int) -> None:
        super().__init__()
        self.line, self.name = line, name  # of the section
        self.number = -number  # so that it differs from the numbers of stanzas
        self.sequence = Sequence((), 0)

    def set_line(self, line: Line) -> List[str]:
        """Set a line as in other files, except that TCP flags add up."""
        flags = self.texts.get(KnockdDoor.knock_flags.name)
        if flags and self.row(line.name) is KnockdDoor.knock_flags:
            line = line._replace(value=flags + "," + line.value)
        return super().set_line(line)

    def validate(self, options: KnockdOptions) -> List[str]:
        """Check and make the door's sequence, and return warnings."""
        if bool(self.knock_steps) == bool(self.knock_file):
            raise self.line.error("expected Sequence or One_Time_Sequences, and only one of them")
        self.sequence = make_sequence(self, options.strict, options.exact, self.target or b"")
        self.sequence.cooldown = self.cooldown
        return self.sequence.warnings(alone=True)

    def commands(self, address: Address) -> List[str]:
        """Return the commands that open and close for a client: no closing without an opening."""
        start, stop = self.start, self.stop
        if address.version == 6:  # an empty command replaces the other one, too
            start = self.texts.get(KnockdDoor.start6.name, start)
            stop = self.texts.get(KnockdDoor.stop6.name, stop)
        return [text.replace(IP_VARIABLE, str(address)) for text in (start, stop if start else "")]


class KnockdFile(NamedTuple):
    """A knockd.conf."""

    options: KnockdOptions
    doors: List[KnockdDoor]
    warnings: List[str]

    def dump(self) -> Iterator[str]:
        """Yield the lines that were set, in the file's own syntax. Sequences are secrets."""
        sections: List[Tuple[str, KnockdSettings]] = [("options", self.options)]
        for name, section in sections + [(door.name, door) for door in self.doors]:
            yield f"[{name}]"
            yield from (f"\t{row.name}" + ("" if isinstance(row, Bare) else f" = {text}")
                        for row, text in section.dump() if section.is_set(row))


def read_knockd(path: str) -> KnockdFile:
    """Read a knockd.conf; ConfigError names the line that can't be understood."""
    made = KnockdFile(KnockdOptions(), [], permission_warnings(path))
    section: Optional[KnockdSettings] = None
    for number, raw in numbered_lines(path):
        text = raw.strip(" \t\r\v\f")
        if not text or text.startswith("#"):
            continue
        name, equals, value = (part.strip(" \t") for part in text.partition("="))
        line = Line(path, number, name, value, KNOCKD_CHARACTERS)
        if text.startswith("["):
            name = text[1:-1]
            if not text.endswith("]") or not name:
                raise line.error("expected a section: its name between [ and ]")
            section = made.options
            if name != "options":
                section = KnockdDoor(line, name, len(made.doors) + 1)
                made.doors.append(section)
        elif isinstance(KnockdOptions.row(name), Bare):
            if equals or section is None:
                raise line.error(f"expected {name} alone, in a section")
            made.options.set_line(line._replace(value="Y"))
        elif section is None:
            raise line.error("expected a section first: [options], or a door's [name]")
        elif "\0" in text or not (value or (equals and "command" in name.lower())):
            raise line.error("expected `name = value`; only a command may be empty")
        elif section is not made.options and KnockdOptions.row(name) is not None:
            raise line.error("expected in the section [options]")
        else:
            section.set_line(line)
    made.options.set_defaults()
    named: Dict[str, str] = {}  # the doors that a warning is about: one line for all of them
    for door in made.doors:
        door.set_defaults()
        for text in door.validate(made.options):
            named[text] = named.get(text, "") + f"[{door.name}]"
    made.warnings.extend(f"{names} {text}" for text, names in named.items())
    return made


# ======================================================================================
# 11. Judgement
#
# Decide what a request may open: pure functions of request, stanza, settings, time and this host's
# addresses, in the order of tests/spec/fwknop.md 3.4, and what --open and --close mean. Freshness
# and replay are in section 16.
# ======================================================================================


class Request(NamedTuple):
    """The wish of a client, by an SPA packet or by a complete knock sequence."""

    datagram: Datagram  # the packet's, or the last one of the sequence
    address: Optional[Address]  # to open to; None: the packet names none
    ports: Tuple[Port, ...]
    user: Optional[str] = None  # None: a sequence, which names nobody
    version: str = ""
    type: int = ACCESS
    timeout: int = 0  # seconds; 0: as the stanza says
    nat: Optional[Tuple[str, int]] = None
    command: str = ""

    @property
    def who(self) -> str:
        """Return the name of the asker, for the log and --fw-list."""
        return "a knock sequence" if self.user is None else f"user '{escape_user(self.user)}'"

    @classmethod
    def of_packet(cls, packet: Packet, datagram: Datagram) -> "Request":
        """Return the request that a packet makes."""
        return cls(datagram, packet.address, packet.ports, packet.user, packet.version,
                   packet.type, packet.timeout, packet.nat, packet.command)


class Verdict(NamedTuple):
    """The rights of a request: doors for some seconds; a command message has no doors."""

    doors: List[Door]
    seconds: int
    by_commands: bool = False  # whether the stanza's commands open, or the client's command runs


class Lookup(NamedTuple):
    """Judgement waits for the address, of this IP version, of the NAT host with this name."""

    name: str
    version: int


OwnAddress = Callable[[Address], Optional[bool]]  # is_own_address() in section 17


def judge(request: Request, stanza: Stanza, settings: ServerSettings,
          is_own_address: OwnAddress, now: float) -> Union[Verdict, Lookup]:
    """Return what a request may do by this stanza; PacketRejected when that is nothing. Return a
    Lookup if that depends on its NAT host: judge again with the address for the name."""
    check_policy(request, stanza, now)
    with_nat = wants_nat(request, stanza, settings)
    if request.type == COMMAND:
        if not stanza.enable_commands or stanza.cycle_open:
            raise PacketRejected("command", "SPA Command messages are not allowed in the current "
                                 "configuration.")
        return Verdict([], 0, True)
    wanted = set(request.ports)
    unknown = wanted - stanza.open_ports if stanza.open_ports else set()
    for denied, where in ((unknown, "not in OPEN_PORTS"),
                          (wanted & stanza.restrict_ports, "in RESTRICT_PORTS")):
        if denied:
            raise PacketRejected("ports", "One or more requested protocol/ports was denied per "
                                 f"access.conf. ({port_list(request.ports)})",
                                 told=f"{port_list(denied)} is {where}")
    seconds = grant_seconds(request.timeout, stanza, now)
    address = request.address or parse_address(socket_text(request.datagram.source))
    prefix = stanza.prefix4 if address.version == 4 else stanza.prefix6
    network = ipaddress.ip_network((address.packed, prefix), strict=False)
    destination: Optional[Address] = None
    if settings.destination_rule:
        destination = parse_address(socket_text(request.datagram.destination))
        if destination.version != address.version:
            raise PacketRejected("family", f"The packet was sent to {destination}, which {address} "
                                 "can't connect to.")
    kind = ONCE if stanza.one_connection else INPUT
    doors = [Door(network, destination, protocol, port, kind) for protocol, port in request.ports]
    if stanza.cycle_open or not with_nat:
        return Verdict(doors, seconds, bool(stanza.cycle_open))
    host: Union[Address, Lookup, None]
    host, port = stanza.force_nat or (None, 0)  # with FORWARD_ALL nobody need name a host
    if request.nat and not stanza.force_nat:
        host = nat_host(request.nat[0], request, address, settings, is_own_address)
        port = request.nat[1]
    if isinstance(host, Lookup):
        return host
    return Verdict(nat_doors(request, stanza, doors, settings, is_own_address, host, port), seconds)


def check_policy(request: Request, stanza: Stanza, now: float) -> None:
    """Reject by the rules for every message type: expiry, the address named, the user."""
    if stanza.expires is not None and now >= stanza.expires:
        raise PacketRejected("expired stanza", "Access stanza has expired.")
    if request.address is None and stanza.require_source:
        raise PacketRejected("no address", "Got 0.0.0.0 when valid source IP was required.")
    same = bool(stanza.openspa_clients) if stanza.same_address is None else stanza.same_address
    if same and request.address not in (None, parse_address(socket_text(request.datagram.source))):
        raise PacketRejected("other address", f"The packet is for {request.address}, and did not "
                             "come from there (REQUIRE_SAME_ADDRESS).")
    if stanza.require_username and request.user not in (None, stanza.require_username):
        raise PacketRejected("user", f"Username in SPA data ({request.user}) does not match "
                             f"required username: {stanza.require_username}",
                             told=f"user {request.user} is not allowed")


def grant_seconds(wanted: int, stanza: Stanza, now: float) -> int:
    """Return for how long to open: as the client wants or the stanza says, within its limits."""
    seconds = min(wanted, stanza.max_seconds) or stanza.cycle_seconds or stanza.grant_seconds
    if not seconds:
        raise PacketRejected("no time", "FW_ACCESS_TIMEOUT is 0 and the client asked for no time.")
    if stanza.expires is not None:
        seconds = max(1, min(seconds, int(stanza.expires - now)))
    return seconds


def no_nat(request: Request, why: str = "") -> PacketRejected:
    """Return the rejection of a packet whose NAT can't be, in fwknop's words."""
    why = f" ({why})" if why else ""
    return PacketRejected("NAT", f"SPA packet from {socket_text(request.datagram.source)} requested"
                          f" NAT access, but is not enabled/supported{why}", "{stanza}{text}")


def wants_nat(request: Request, stanza: Stanza, settings: ServerSettings) -> bool:
    """Return whether packet or stanza want NAT; reject NAT that fwknopd.conf does not enable."""
    if request.type in NAT_TYPES:
        if not (settings.local_nat if request.type in LOCAL_NAT_TYPES else settings.forwarding):
            raise no_nat(request)
        if stanza.one_connection:
            raise no_nat(request, "with ONE_CONNECTION")
        return True
    # FORWARD_ALL alone does not want it: such a stanza opens ports of this host, too.
    forced_source = stanza.force_snat or stanza.force_masquerade
    return bool(stanza.force_nat or (stanza.forward_all and forced_source))


def nat_doors(request: Request, stanza: Stanza, access: List[Door], settings: ServerSettings,
              is_own_address: OwnAddress, address: Optional[Address], port: int) -> List[Door]:
    """Return the doors of a packet with NAT for the `access` doors it asks for (fwknop.md 3.6).

    Order: accept, then DNAT, then SNAT or MASQUERADE. Every port leads to `address` and `port`.
    """
    version = access[0].source.version
    if address is not None and address.version != version:
        raise no_nat(request, f"{address} is not IPv{version}")
    own = address is not None and bool(is_own_address(address))
    if own and any((door.protocol, port) in stanza.restrict_ports for door in access):
        raise no_nat(request, f"port {port} is in RESTRICT_PORTS")
    new = stanza.force_snat or (None if stanza.force_masquerade else settings.snat_address)
    if new is not None and new.version != version:
        new = None  # SNAT has no address of this version: masquerade the client
    everything = stanza.forward_all and not own
    if everything:
        access, port = [access[0]._replace(protocol="*", port=0)], 0
    through, onward, back = [], [], []
    for door in access:
        inner = door._replace(destination=None if everything else address, port=port)
        if own:
            through.append(inner if door.destination else inner._replace(destination=None))
        else:
            through.append(inner._replace(kind=FORWARD))
        if settings.snat and not own:
            back.append(inner._replace(kind=SNAT if new else MASQUERADE, target=new))
        if address is not None and not stanza.disable_dnat:
            onward.append(door._replace(kind=DNAT, target=address, target_port=port))
    return list(dict.fromkeys(through + onward + back))


def nat_host(host: str, request: Request, client: Address, settings: ServerSettings,
             is_own_address: OwnAddress) -> Union[Address, Lookup]:
    """Return the address that NAT may lead a client to, by the `host` of its packet.

    Forwarding leads to other hosts only; otherwise it would lead around this host's firewall. Local
    NAT leads to this host only: to the address named if it is one of ours, else to the address that
    the packet was sent to. The client may know this host by a name, or by a router's address.
    """
    local = request.type in LOCAL_NAT_TYPES
    address: Optional[Address] = None
    try:
        address = parse_address(host)
    except ValueError:
        if host and not all(map(is_plain_name, host.rstrip(".").split("."))):
            raise no_nat(request, "Invalid Hostname in NAT SPA message") from None
        if host and not settings.nat_dns:
            raise PacketRejected("NAT", "Received Hostname in NAT SPA message, but hostname is "
                                 "disabled.", "{stanza}{text}") from None
    if address is not None and (address.is_link_local or not may_be_host(address)):
        raise no_nat(request, f"{address} is not the address of one host")
    if address is not None and address.is_loopback and not (local and client.is_loopback):
        raise no_nat(request, f"{address} is a loopback address, which no other host reaches")
    if local and (address is None or is_own_address(address) is False):
        address = parse_address(socket_text(request.datagram.destination))
    if address is None:
        if not host:
            raise no_nat(request, "it names no host")
        return Lookup(host, client.version)
    own = is_own_address(address)
    if own is None:
        raise no_nat(request, f"{address} is not the address of one host")
    if own != local:
        raise no_nat(request, f"{address} is {'no' if local else 'an'} address of this host")
    return address


def parse_hand(ports: str, address: str, lasting: str) -> Tuple[List[Door], int]:
    """Parse ports, address and time of --open to doors and seconds; raise ValueError."""
    host = parse_address(address)
    expect(may_be_host(host), "the IP address of a host")
    source = ipaddress.ip_network(str(host))
    return [Door(source, None, *port) for port in sorted(parse_ports(ports))], parse_time(lasting)


def is_meant(who: str, source: Network, opener: str) -> bool:
    """Tell whether --close WHO means what this opener has opened for `source`. WHO is a stanza
    (`#2`), an address, a network, a user, or an opener that has no user."""
    if source.prefixlen == 0:  # open to everybody
        return False
    try:
        parse_address(who.partition("/")[0])
        return source.overlaps(ipaddress.ip_network(who, strict=False))
    except ValueError:
        return (opener.startswith(f"stanza {who}, ") or who == opener
                or opener.endswith(f", user '{escape_user(who)}'"))


def escape_user(user: str) -> str:
    """Return a user's name for quotes in the log: it may try to look like our text."""
    return user.replace("'", "\\x27")


def socket_text(packed: bytes) -> str:
    """Return a packed address of 4 or 16 bytes as text."""
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


class Command(NamedTuple):
    """A program with its arguments, and the account it runs as; None is the server's own."""

    argv: Tuple[bytes, ...]
    account: Optional[Account]
    inherits: bool = False  # whether it has the environment and directory of the server

    def __str__(self) -> str:
        """Return the arguments as fwknopd's log shows them."""
        return b" ".join(self.argv).decode("latin-1")

    @property
    def runner(self) -> str:
        """Return the account that it runs as, for the log."""
        if self.account is None:
            return ""
        user, group, uid, gid, _ = self.account
        return f" setuid/setgid user/group to {user}/{group} (UID={uid},GID={gid})"


NO_COMMAND = Command((), None)


def client_command(command: str, stanza: Stanza, sudo: str) -> Command:
    """Return a command message's run: words between blanks, no shell or quotes (fwknop.md 3.8)."""
    words, prefix = command.encode("latin-1").split(), [sudo]
    if (not 0 < len(words) <= MAX_ARGUMENTS or "\0" in command
            or (words[0].startswith(b"-") and not stanza.enable_sudo)):
        raise PacketRejected("command", "Error converting cmd str to argv: a command has 1 to "
                             f"{MAX_ARGUMENTS} words without zero bytes, and begins with a "
                             "program.")
    for option, row in (("-u", Stanza.sudo_user), ("-g", Stanza.sudo_group)):
        prefix += [option, stanza.texts[row.name]] if stanza.is_set(row) else []
    if stanza.enable_sudo:  # behind `--`, it takes no word for an option or a variable
        words = [os.fsencode(word) for word in prefix + ["--"]] + words
    return Command(tuple(words), stanza.account)


def door_commands(stanza: Stanza, templates: Iterable[Tuple[str, ...]], door: Door,
                  datagram: Datagram, seconds: int, now: float) -> List[Command]:
    """Return the stanza's commands for a door; that of an empty template, or NONE, has no argv."""
    # Of a packet, only parsed addresses and numbers get into the commands.
    source = door.source if door.source.num_addresses > 1 else door.source.network_address
    values = {"IP": source, "SRC": source, "PKT_SRC": socket_text(datagram.source),
              "DST": socket_text(datagram.destination), "PORT": door.port,
              "PROTO": PROTOCOL_NUMBERS.get(door.protocol, 0), "TIMEOUT": int(now) + seconds,
              "CLIENT_TIMEOUT": seconds}
    return [Command(tuple(fill_in(word, values).encode("latin-1") for word in words),
                    stanza.account) for words in templates]


# ======================================================================================
# 12. RSA (RFC 8017)
#
# PKCS#1 v1.5 with SHA-256, and keys in PEM, for OpenSPA alone. Python's pow() does the work.
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


# ======================================================================================
# 13. The OpenSPA packet
#
# Containers, fields and encryption of OpenSPA v2 (tests/spec/openspa.md 1.2 to 1.6, 1.9).
# ======================================================================================

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
# 14. Log and programs
#
# The clocks, the log, and run_program() for the firewall and for gpg's list of keys. Apart from it,
# only GpgRun and launch() start programs. No program gets our stderr, which may be full. No secret
# reaches a line of the log or a command line.
# ======================================================================================

ERROR, WARNING, NOTICE, INFO, DEBUG = 3, 4, 5, 6, 7  # severities of RFC 5424 section 6.2.1
SYSLOG = "/dev/log"
PROGRAM_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
FOR_EVER = float("inf")
PROGRAM_SECONDS = 30.0  # limit of a program while no knock waits: iptables may wait for its lock
# So many lines of a kind strangers can cause at once: enough to see what they do. Then it is one a
# second: at most 86,400 lines or about 10 MB a day.
BURST = 20
STEP_BURST = 1000  # the same for further steps, which take a part of the sequence: 100 kB
MORE_KNOCKS = "more knocks came without a line in the log"


class Shown(Dict[int, str]):
    """A table for str.translate() that shows all but printable ASCII as `\\xNN`."""

    def __missing__(self, number: int) -> str:
        """Return how the log shows such a character."""
        return f"\\x{number:02x}"


SHOWN = Shown((number, chr(number)) for number in range(0x20, 0x7F))


def read_proc(name: str) -> str:
    """Return the text of a file in /proc; "" if this kernel does not have the file."""
    try:
        with open("/proc/" + name, errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


class Clocks(NamedTuple):
    """The sources of the time. `boot_id` differs after each boot, when `monotonic` begins anew."""

    wall: Callable[[], float] = time.time  # epoch seconds
    monotonic: Callable[[], float] = time.monotonic
    boot_id: Callable[[], str] = (
        lambda: read_proc("sys/kernel/random/boot_id") or f"unknown-{os.getppid()}")


CLOCKS = Clocks()  # this machine's


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


def say(text: str) -> None:
    """Print what was asked for; raise SpaError if it could not be written."""
    why = write_to(sys.stdout, text + "\n")
    if why:
        raise SpaError(f"standard output: {why}")


class Outlet:
    """A destination of log lines. While it takes no more, lines are dropped, and knocks go on."""

    def __init__(self) -> None:
        self.dropped = self.reported = 0  # lines: those that no line of the log counts yet, others

    def write(self, severity: int, text: str) -> None:
        """Write a line or drop it; first tell how many lines were dropped."""
        if self.dropped and self.send(
                WARNING, f"{self.dropped} lines of the log were dropped: nothing took them"):
            self.reported, self.dropped = self.reported + self.dropped, 0
        if self.dropped or not self.send(severity, text):
            self.dropped += 1

    def send(self, severity: int, text: str) -> bool:
        """Write a line if that is possible without waiting; return whether it was."""
        raise NotImplementedError


class StreamOutlet(Outlet):
    """A stream; each line begins with `<N>`, its severity, if that is systemd's journal.

    O_NONBLOCK would hold for all programs that share the open file. So a pipe or a terminal is
    opened once more. A socket can't be opened so: a line is written only when poll() says that it
    can. A pipe that is ready takes PIPE_BUF bytes at once (pipe(7)).
    """

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream, self.prefixed = stream, is_journal(stream)
        self.own, self.poll = -1, select.poll()
        self.rest = b""  # the end of a line of which a terminal took only the beginning
        try:
            self.number = stream.fileno()
            self.waits = not stat.S_ISREG(os.fstat(self.number).st_mode)
        except (OSError, ValueError):  # the stream is no file
            self.waits = False
        if self.waits:
            self.poll.register(self.number, select.POLLOUT)
            with contextlib.suppress(OSError):
                self.own = os.open(f"/proc/self/fd/{self.number}",
                                   os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)

    def send(self, severity: int, text: str) -> bool:
        """Write to the stream."""
        line = f"<{severity}>{text}" if self.prefixed else text
        try:
            if not self.waits:
                self.stream.write(line + "\n")
                self.stream.flush()
                return True
            self.rest = self.rest[self.write_part(self.rest):]
            whole = line[:select.PIPE_BUF - 1].encode() + b"\n"
            written = 0 if self.rest else self.write_part(whole)
            if written:
                self.rest = whole[written:]
            return written > 0
        except (OSError, ValueError):
            return False

    def write_part(self, text: bytes) -> int:
        """Write as much as possible without waiting; return how many bytes that was."""
        if not text or not self.poll.poll(0):
            return 0
        return os.write(self.number if self.own < 0 else self.own, text)


class SyslogOutlet(Outlet):
    """Syslog, in the C library's format (RFC 3164 section 4); the C library itself would wait."""

    def __init__(self, name: str, facility: str, with_pid: bool, path: str = SYSLOG) -> None:
        super().__init__()
        self.name, self.facility, self.with_pid = name, FACILITIES[facility], with_pid
        self.path = path
        self.socket: Optional[socket.socket] = None

    def connect(self) -> socket.socket:
        """Connect to the daemon that serves syslog now: by datagrams, or else by a stream."""
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            opened = socket.socket(socket.AF_UNIX, kind)
            opened.setblocking(False)
            try:
                opened.connect(self.path)
                break
            except OSError as error:
                opened.close()
                if error.errno != errno.EPROTOTYPE or kind == socket.SOCK_STREAM:
                    raise
        return opened

    def send(self, severity: int, text: str) -> bool:
        """Send to syslog; try twice, since the daemon may have started anew after the last line."""
        pid = f"[{os.getpid()}]" if self.with_pid else ""
        now = time.strftime("%b %e %H:%M:%S")
        line = f"<{self.facility << 3 | severity}>{now} {self.name}{pid}: {text}"
        for _ in range(2):
            try:
                self.socket = self.socket or self.connect()
                kind = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
                message = line.encode() + (b"\0" if kind == socket.SOCK_STREAM else b"")
                if self.socket.send(message, socket.MSG_DONTWAIT) == len(message):
                    return True
            except BlockingIOError:
                return False
            except OSError:
                pass
            self.close()  # a stream may have taken half a line: the next line needs a new one
        return False

    def close(self) -> None:
        """Close the socket; the next line opens another."""
        if self.socket:
            self.socket.close()
            self.socket = None


class FileOutlet(Outlet):
    """A file, opened for each line so that it can be moved away; lines begin with knockd's date."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def open(self) -> int:
        """Open the file to append to, or a FIFO that somebody reads."""
        return open_ours(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)

    def send(self, severity: int, text: str) -> bool:
        """Write to the file."""
        line = f"[{time.strftime('%Y-%m-%d %H:%M')}] {text}\n"
        try:
            with open(self.open(), "wb", buffering=0) as file:
                return file.write(line.encode()) == len(line)
        except OSError:
            return False


class Log:
    """Lines to stderr, to syslog, and to a file."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        # What failed, what the administrator should know, what the server does, more with VERBOSE.
        self.error, self.warning = partial(self.write, ERROR), partial(self.write, WARNING)
        self.info, self.debug = partial(self.write, INFO), partial(self.write, DEBUG)
        self.level, self.monotonic = INFO, monotonic
        self.stream: Optional[StreamOutlet] = None
        self.stream_level = DEBUG  # ERROR on the way into the background: syslog gets the rest
        self.syslog: Optional[SyslogOutlet] = None
        self.file: Optional[FileOutlet] = None
        self.usual = INFO  # the severity that syslog gets for usual lines
        self.held: Optional[List[Tuple[int, str]]] = None  # lines that wait, while hold() is on
        self.rejections = Throttle(self, "more packets were rejected without a line in the log")
        self.matches = Throttle(self, "more packets had an access source match")
        self.denials = Throttle(self, "more times a packet did not pass a stanza", STEP_BURST)
        self.first_steps = Throttle(self, MORE_KNOCKS)
        self.further_steps = Throttle(self, MORE_KNOCKS, STEP_BURST)

    def open_stream(self, stream: Any) -> None:
        """Write lines to a stream; None, as sys.stderr may be, is no stream."""
        if stream is not None:
            self.stream = StreamOutlet(stream)

    def close_stream(self) -> None:
        """Write no more lines to the stream."""
        if self.stream is not None and self.stream.own >= 0:
            os.close(self.stream.own)
        self.stream = None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Write the lines of the `with` at its end: a door that opens does not wait for them."""
        lines: List[Tuple[int, str]] = []
        self.held = lines
        try:
            yield
        finally:
            self.held = None
            for line in lines:
                self.write(*line)

    def write(self, severity: int, text: str) -> None:
        """Write one line, or none. Control characters, which a packet may bring, are shown."""
        if severity > self.level or not text:
            return
        if self.held is not None:
            self.held.append((severity, text))
            return
        text = text.translate(SHOWN)
        if self.stream is not None and severity <= self.stream_level:
            self.stream.write(severity, text)
        if self.syslog is not None:
            self.syslog.write(self.usual if severity == INFO else severity, text)
        if self.file is not None:
            self.file.write(severity, text)


class Throttle:
    """A limit to the rate of log lines that strangers can cause: they must not fill the disk."""

    def __init__(self, log: Log, text: str, burst: int = BURST) -> None:
        self.log, self.text, self.burst = log, text, burst
        self.quiet_until, self.held_back = log.monotonic() - burst, 0

    def allows(self) -> bool:
        """Return whether the next line may be written, and count it."""
        now = self.log.monotonic()
        if now < self.quiet_until:
            self.held_back += 1
            return False
        # As if the burst had been saved up, a line a second, since quiet_until.
        self.quiet_until = max(self.quiet_until, now - self.burst + 1) + 1
        if self.held_back:
            self.log.info(f"{self.held_back} {self.text}")
            self.held_back = 0
        return True


def is_journal(stream: Any) -> bool:
    """Return whether a stream goes to systemd's journal (JOURNAL_STREAM of systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def find_program(name: str) -> Optional[str]:
    """Return the path of an executable: `name` if it has a slash, else one in PATH or the sbins."""
    directories = os.environ.get("PATH", "").split(":") + ["/usr/sbin", "/sbin"]
    for directory in [""] if "/" in name else directories:
        path = os.path.join(directory, name)
        if path.startswith("/") and os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


class Program(subprocess.Popen):  # type: ignore[type-arg]
    """A program whose end is seen at once: Popen looks once, and then sleeps for a millisecond."""

    def wait(self, timeout: Optional[float] = None) -> int:
        """Wait for the end, which mostly comes less than 0.1 ms after that of the output."""
        for _ in range(20):
            if self.poll() is None:
                time.sleep(0.00005)
        return super().wait(timeout)


def run_program(arguments: List[str], text: str = "", seconds: float = PROGRAM_SECONDS,
                started: Callable[[int], None] = lambda pid: None) -> str:
    """Return the output of a program that reads `text`; raise CommandError if it fails. `started`
    gets its process id while it runs."""
    try:
        with Program(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE, env=PROGRAM_ENVIRONMENT,
                     start_new_session=True) as process:
            started(process.pid)
            try:
                output, errors = process.communicate(text.encode(), seconds)
            except subprocess.TimeoutExpired:  # its work may have been done
                end_group(process, signal.SIGKILL)  # and all that it started
                raise CommandError(f"{arguments[0]}: killed after {seconds:.1f} seconds") from None
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise CommandError(explain(error, arguments[0])) from None
    if process.returncode:
        said = errors.decode("utf-8", "replace").replace("\u2018", "'").replace("\u2019", "'")
        lines = [each for each in said.splitlines() if each.strip() and each[0] != "#"]
        lines = lines or ["no reason given"]  # iptables' warnings begin with #
        raise CommandError(f"{' '.join(arguments)} failed: {lines[0]}", said=lines[-1])
    return output.decode("utf-8", "replace")  # type: ignore[no-any-return]


# ======================================================================================
# 15. GPG
#
# gpg decrypts packets and checks their signature (tests/spec/fwknop.md 1.11). The server reads
# gpg's status lines (GnuPG's doc/DETAILS), never its prose. gpg does not read the gpg.conf of its
# home, so this section alone says what counts: integrity, the key, one signature, its signer. gpg
# runs beside the server's loop; judgement of the packet begins anew when gpg has answered.
# ======================================================================================

GPG_OPTIONS = ["--no-options", "--batch", "--no-tty", "--pinentry-mode", "loopback",
               "--disable-dirmngr", "--skip-hidden-recipients", "--max-output", "4096"]
GPG_SECONDS = 5  # limit of a run: 15 ms are usual, longer ones wait for gpg's agent
GPG_AT_ONCE = 4  # runs for packets with HMAC, and as many for others: if one hangs, three go on
GPG_WAITING = 64  # packets of either kind that run or wait: the last one waits for 16 runs
# Runs without HMAC: 5 at once, then one a second or fewer, so that gpg has a tenth of the time.
# Runs with HMAC from which nothing came may exceed that by 60: so many honest clients may have a
# wrong clock or an expired key. Sent again, such a packet is known and costs no run.
GPG_BURST = 5
GPG_HMAC_SECONDS = 60
GPG_KNOWN = 16  # answers kept for the stanzas that ask the same: twice those that can come at once
GPG_OUTPUT = 65536  # bytes that a pipe holds (pipe(7)): gpg then stands still until its time ends

EXPIRED = ("EXPSIG", "EXPKEYSIG")
SIGNATURES = ("GOODSIG", "REVKEYSIG", "BADSIG", "ERRSIG") + EXPIRED
TRUSTED = ("TRUST_MARGINAL", "TRUST_FULLY", "TRUST_ULTIMATE")
SIGNED = "Incoming SPA data signed by '{}' (fingerprint '{}')."

GpgStatus = Dict[str, List[List[str]]]  # for each keyword the arguments of its lines
GpgQuestion = Tuple[Tuple[str, ...], bytes, bytes]  # command, passphrase and message


class GpgAnswer(NamedTuple):
    """The result of a run of gpg."""

    plain: bytes
    status: GpgStatus
    succeeded: bool  # gpg ended without an error


def parse_gpg_status(text: bytes) -> GpgStatus:
    """Parse the lines `[GNUPG:] KEYWORD ARGUMENT...`, and ignore all others."""
    status: GpgStatus = {}
    for line in text.decode("latin-1").split("\n"):
        fields = line.split(" ")
        if fields[0] == "[GNUPG:]" and len(fields) > 1:
            status.setdefault(fields[1], []).append(fields[2:])
    return status


def check_decrypted(answer: GpgAnswer, fingerprints: FrozenSet[str]) -> None:
    """Raise WrongKey unless one whole text was decrypted with one of these keys, and is intact."""
    status = answer.status
    # Empty for a message that is encrypted with a passphrase, on which gpg tries ours.
    used = {arguments[0] for arguments in status.get("DECRYPTION_KEY", []) if arguments}
    for right, problem in (
            ("NODATA" not in status, "No data"),
            ("NO_SECKEY" not in status or used, "No secret key"),
            (used, "the key can't be used (is GPG_DECRYPT_PW right?)"),
            (used <= fingerprints, "decrypted with a key that is not GPG_DECRYPT_ID"),
            ("GOODMDC" in status and "DECRYPTION_OKAY" in status
             and not {"BADMDC", "DECRYPTION_FAILED", "ERROR", "FAILURE"} & set(status), "Bad data"),
            (len(status.get("PLAINTEXT", [])) == 1, "expected one text")):  # none in the clear
        if not right:
            raise not_decrypted(problem)


def not_decrypted(problem: str) -> WrongKey:
    """Return the rejection of a message that gpg can't decrypt for this stanza."""
    return WrongKey("gpg decryption", "Error creating fko context: Decryption operation "
                    f"failed - GPG ERROR: {problem}")


def check_signature(answer: GpgAnswer, stanza: Stanza) -> str:
    """Return the fingerprint of the signer; raise PacketRejected unless the stanza trusts it."""
    status = answer.status
    kinds = [kind for kind in SIGNATURES for _ in status.get(kind, [])]
    if not kinds and "NEWSIG" not in status:
        raise PacketRejected("gpg signature", "Error creating fko context: Missing GPG signature")
    valid = [arguments for arguments in status.get("VALIDSIG", []) if len(arguments) > 9]
    trust = [keyword for keyword in status if keyword.startswith("TRUST_")] or ["TRUST_UNDEFINED"]
    kind = kinds[0] if len(kinds) == len(status.get("NEWSIG", [])) == 1 else ""
    for right, problem in (
            (kind, "expected one signature"),
            (kind == "GOODSIG" or (stanza.gpg_any_trust and kind in EXPIRED), kind),
            (len(valid) == 1 and valid[0][8] in ("00", "01"),
             "expected the signature of a document"),
            (stanza.gpg_any_trust or (len(trust) == 1 and trust[0] in TRUSTED), " ".join(trust))):
        if not right:
            raise PacketRejected("gpg signature", "Error creating fko context: Bad GPG signature - "
                                 f"GPG ERROR: {problem}")
    signer, primary = valid[0][0], valid[0][9]  # the key that signed may be a subkey
    for wanted, text in (
            (stanza.gpg_fingerprints, f"signed by: {signer}, but that fingerprint is not in the "
             "GPG_FINGERPRINT_ID list."),
            (stanza.gpg_remote_ids, f"signed by ID: {signer[-8:]}, but that ID is not in the "
             "GPG_REMOTE_ID list.")):
        if wanted and not any(key.endswith(each) for key in (signer, primary) for each in wanted):
            rejection = PacketRejected("gpg signer", f"Incoming SPA packet {text}")
            rejection.signer, rejection.plain = signer, answer.plain
            raise rejection
    return signer


class GpgNeeded(Exception):
    """A packet has to wait for gpg; judgement begins again when `run` has an answer."""

    def __init__(self, run: "GpgRun") -> None:
        super().__init__()
        self.run = run


class Gpg:
    """The runs of gpg for all stanzas, limited in time, output and number. Genuine packets with
    HMAC do not count, and packets without HMAC can't use up the number of the others."""

    def __init__(self, clocks: Clocks = CLOCKS) -> None:
        self.clocks = clocks
        # Oldest first: an answer, or a rejection for none, and what its run added to busy_until.
        self.answers: Dict[GpgQuestion, Tuple[Union[GpgAnswer, PacketRejected], float]] = {}
        self.busy_until = clocks.monotonic() - GPG_BURST
        self.cost = 0.0  # of the answer that ask() returned last

    def ask(self, question: GpgQuestion, has_hmac: bool) -> GpgAnswer:
        """Return gpg's answer to a message, or raise: GpgNeeded if gpg has to run first, TooFast if
        packets that open nothing keep this machine busy, PacketRejected if there is no answer."""
        answer, self.cost = self.answers.get(question, (None, 0.0))
        if answer is None:
            excess = GPG_HMAC_SECONDS if has_hmac else 0
            if self.clocks.monotonic() + excess < self.busy_until:
                raise TooFast("gpg too fast", (
                    "GPG packets that open nothing come too fast; this one is not decrypted"
                    if has_hmac else
                    "GPG packets without HMAC come too fast; this one is not decrypted"))
            raise GpgNeeded(GpgRun(self, question, has_hmac))
        if isinstance(answer, PacketRejected):
            # A copy, since the gate notes the stanza in it, and Python the frames.
            raise PacketRejected(answer.reason, str(answer))
        return answer

    def charge(self) -> None:
        """Count a run, as if one run a second had been saved up since busy_until."""
        self.busy_until = max(self.busy_until, self.clocks.monotonic() - GPG_BURST + 1) + 1

    def keep(self, question: GpgQuestion, answer: Union[GpgAnswer, PacketRejected],
             seconds: float) -> None:
        """Keep an answer, and count its seconds tenfold: gpg may have a tenth of the time."""
        cost = max(1.0, 10 * seconds)
        self.busy_until += cost - 1
        while len(self.answers) >= GPG_KNOWN:
            del self.answers[next(iter(self.answers))]
        self.answers[question] = answer, cost


class GpgRun:
    """A run of gpg that decrypts one message; its packet waits until the run has ended.

    The passphrase goes through a pipe, so nobody else sees it. The server fills the pipes before
    the run and reads them after it: this needs no loop, and limits gpg's output. Reading does not
    block, because an agent that gpg started may hold a pipe open.
    """

    def __init__(self, gpg: Gpg, question: GpgQuestion, has_hmac: bool) -> None:
        self.gpg, self.question, self.has_hmac = gpg, question, has_hmac
        self.process: Optional["subprocess.Popen[bytes]"] = None
        self.ends: List[Any] = []  # of the pipes that gpg writes plaintext and status to
        self.began = self.due = FOR_EVER
        self.entry: Optional["Entry"] = None  # the packet that waits

    def start(self) -> None:
        """Start gpg; an error becomes its answer."""
        command, passphrase, message = self.question
        self.began = self.gpg.clocks.monotonic()
        self.due = time.monotonic() + GPG_SECONDS
        ends: List[int] = []
        try:
            for data in (message, passphrase + b"\n"):  # an empty pipe takes 4096 bytes at once
                reader, writer = os.pipe()
                ends.append(reader)
                os.write(writer, data)
                os.close(writer)
            for _ in range(2):
                reader, writer = os.pipe()
                ends.append(writer)
                os.set_blocking(reader, False)
                self.ends.append(open(reader, "rb", buffering=0))
            text, secret, plain, status = ends
            self.process = subprocess.Popen(
                [*command, "--passphrase-fd", str(secret), "--status-fd", str(status),
                 "--decrypt"], stdin=text, stdout=plain, stderr=subprocess.DEVNULL,
                pass_fds=(secret, status), env=PROGRAM_ENVIRONMENT)
        except OSError as error:
            self.answer(PacketRejected("gpg failed", explain(error, command[0])))
        finally:
            for end in ends:
                os.close(end)

    def has_ended(self) -> bool:
        """Return whether there is an answer; kill a gpg that takes too long."""
        process = self.process
        if process is not None and process.poll() is not None:
            plain, status = [end.read(GPG_OUTPUT) or b"" for end in self.ends]  # None if empty
            self.answer(GpgAnswer(plain, parse_gpg_status(status), process.returncode == 0))
        elif process is not None and time.monotonic() >= self.due:
            self.kill()
            self.answer(PacketRejected("gpg failed", f"gpg took more than {GPG_SECONDS} seconds"))
        return self.began != FOR_EVER and not self.ends

    def answer(self, answer: Union[GpgAnswer, PacketRejected]) -> None:
        """Keep the answer for the packet's next judgement, and close the pipes."""
        self.gpg.keep(self.question, answer, self.gpg.clocks.monotonic() - self.began)
        while self.ends:
            self.ends.pop().close()

    def kill(self) -> None:
        """Kill gpg, and wait for its end."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class GpgKeys(Keys):
    """The keys that unlock the GPG packets of one stanza: `fingerprints` and their `command`."""

    prefixes = (GPG_PREFIX, b"")

    def __init__(self, stanza: Stanza, gpg: Gpg, command: List[str],
                 fingerprints: FrozenSet[str]) -> None:
        super().__init__(stanza.hmac_type, stanza.secrets()[1])
        self.stanza, self.gpg, self.command = stanza, gpg, command
        self.fingerprints = fingerprints
        self.key_ids = [binascii.unhexlify(each[-16:]) for each in fingerprints]

    def mark_genuine(self) -> None:
        """Take back the cost of the run, if the packet came with an HMAC."""
        if self.has_hmac:
            self.gpg.busy_until -= self.gpg.cost

    def decrypt(self, message: bytes) -> bytes:
        """Return the plaintext of an OpenPGP message; raise PacketRejected if anything is wrong."""
        # A message names its key (RFC 4880 section 5.1). Junk does not name ours: it costs no run.
        if not any(key_id in message for key_id in self.key_ids):
            raise not_decrypted("No secret key")
        question = tuple(self.command), self.stanza.gpg_passphrase, message
        answer = self.gpg.ask(question, self.has_hmac)
        check_decrypted(answer, self.fingerprints)
        if not self.stanza.gpg_disable_sig:
            signer = check_signature(answer, self.stanza)
            self.signed = SIGNED.format(signer[-8:], signer)
        if not answer.succeeded:
            raise PacketRejected("gpg failed", "gpg ended with an error")
        return answer.plain


def run_gpg_listing(stanza: Stanza, command: List[str]) -> FrozenSet[str]:
    """Run gpg to list the fingerprints of the one secret key GPG_DECRYPT_ID and of its subkeys."""
    row = Stanza.gpg_decrypt_id
    question = ["--with-colons", "--list-secret-keys", "--", stanza.gpg_decrypt_id]
    try:
        listing = run_program(command + question, seconds=GPG_SECONDS)
    except CommandError as error:
        raise stanza.error(row, f"expected a secret key: {error.said or error}") from None
    records = [line.split(":") for line in listing.split("\n")]
    count = sum(fields[0] == "sec" for fields in records)
    if count != 1:
        raise stanza.error(row, f"expected the id of one secret key, not of {count}")
    return frozenset(fields[9] for fields in records if fields[0] == "fpr")


def load_gpg(settings: ServerSettings, stanzas: List[Stanza], clocks: Clocks = CLOCKS) -> None:
    """Run gpg to find the keys of each GPG stanza. A stanza without gpg or secret key is void until
    a reload finds them: a keyring changes outside our files, and must lock out nobody else."""
    gpg = Gpg(clocks)
    for stanza in stanzas:
        if not stanza.gpg_decrypt_id or stanza.void:
            continue
        named = stanza.gpg_program or settings.gpg_program or "gpg"
        program = find_program(named)
        try:
            if program is None:
                raise stanza.error(Stanza.gpg_decrypt_id, f"there is no program {named} to decrypt")
            command = [program, "--homedir", stanza.gpg_home or settings.gpg_home, *GPG_OPTIONS]
            if stanza.gpg_disable_sig:
                command.append("--skip-verify")
            stanza.gpg = GpgKeys(stanza, gpg, command, run_gpg_listing(stanza, command))
        except SpaError as error:
            stanza.make_void(error)


# ======================================================================================
# 16. Replay memory
#
# The server remembers a packet as long as it could be fresh. It pays for no fsync: instead it also
# rejects packets made before this memory began (a new boot, a lost file). Times within a boot are
# monotonic: a wall clock that jumps makes the server neither forget packets nor lock clients out.
# A full disk locks nobody out either: the process remembers, and empties the file, which is no
# record any more. The next start then begins a new memory.
# ======================================================================================

DIGEST_HEADER = "# <digest> <proto> <src_ip> <src_port> <dst_ip> <dst_port> <time>\n"
REFUSED_KNOWN = 20000  # refused packets that are known by their digest: 3 MB
CLOCK_SECONDS = 3600  # a client's clock may be off by so much, and the answer says by how much
ANSWERED_KNOWN = 20000  # accepted packets that are known for so long: 8 MB
REWRITE_AFTER = 1000  # forgotten packets that may still stand in the file: 100 kB
REWRITE_SECONDS = 60  # between attempts to write the file: each that fails logs an error
# Failures of a disk that was set up right. They stop no start; a wrong path or owner does.
DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def digest_of(text: bytes) -> str:
    """Return the digest by which a packet is remembered."""
    return encode_base64(DIGESTS["SHA256"](text)).decode()


def file_state(path: str) -> Tuple[int, int, int]:
    """Return device, inode and size of a file, which change when somebody else touches it."""
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        return status.st_dev, status.st_ino, status.st_size
    return 0, 0, 0


def empty_file(path: str) -> None:
    """Put an empty file in place of another one, or empty that one if its directory can't change.
    Both may fail on a read-only file system."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
    with contextlib.suppress(OSError):
        os.unlink(path)
    with contextlib.suppress(OSError):
        os.close(os.open(path, flags, 0o600))


class ReplayMemory:
    """The packets that were seen, in fwknopd's digest.cache (tests/spec/fwknop.md 3.5).

    The second line of the file says when the memory began: `# began MONOTONIC BOOT_ID FORGOTTEN`.
    FORGOTTEN is an epoch second: packets up to that timestamp may have been forgotten, so they are
    rejected. Unless the clock jumped, all of those are too old anyway.

    Whoever captured a packet must not get an answer to it, now or later. So the server does not
    answer a packet that came before; would_know() tells whether this memory would know it. Refused
    packets are on file, too (`# refused DIGEST TIMESTAMP REASON`). More numbers follow in the
    second line: SILENT is to refused packets what FORGOTTEN is to accepted ones. WHOLE is a
    monotonic time: since then the memory misses no packet (tests/spec/answer.md 3). Then WIDEST.
    """

    def __init__(self, path: str, max_age: Optional[int], log: Log, clocks: Clocks = CLOCKS
                 ) -> None:
        self.path, self.log, self.clocks = path, log, clocks  # "": this process alone remembers
        self.boot_id = clocks.boot_id()
        # By digest, oldest first: the packet's line in the file, and its time, monotonic.
        self.seen: Dict[str, Tuple[str, float]] = {}
        self.refused: Dict[str, Tuple[int, str]] = {}  # timestamp (or 0) and reason, by digest
        self.began, self.forgotten = clocks.monotonic(), 0
        # A packet that came before this memory may have had a clock that is ahead.
        self.whole, self.silent = self.began, int(clocks.wall()) + CLOCK_SECONDS
        self.answers = False  # whether accepted packets are to be known for longer
        self.lines_in_file = 0
        self.file: Optional[int] = None
        self.written = (0, 0, 0)  # device, inode and size of the file as this process wrote it
        self.rewrite_due = 0.0  # when the next attempt to write the file anew may be made
        self.widest = 0.0  # seconds: so far ahead of its arrival may a packet's timestamp be
        self.set_age(max_age)

    def set_age(self, max_age: Optional[int], ahead: float = 0) -> None:
        """Judge packets by this MAX_SPA_PACKET_AGE now; None lets all pass, however far `ahead`."""
        self.max_age, widest = max_age, max_age or ahead
        if widest > self.widest:
            self.widest = max(widest, 2 * self.widest)  # not for each packet a bit
            self.close()  # the next packet writes the file anew, with this, before it opens

    def open_file(self) -> None:
        """Read the file, if there is to be one, and write it anew."""
        if not self.path:
            return
        try:
            self.load(self.path)
            self.log.debug(f"Using Digest Cache: '{self.path}' (entry count = {len(self.seen)})")
            self.rewrite()
        except OSError as error:
            if error.errno not in DISK_FAILURES:
                raise SpaError(explain(error, self.path)) from None
            # The server before may have failed, too, and accepted packets that the file lacks.
            self.began = self.clocks.monotonic() + 1
            self.give_up_file(error)

    def load(self, path: str) -> None:
        """Read the packets of a file, if it exists, and follow no link."""
        try:
            with open(open_itself(path, os.O_RDONLY), encoding="ascii", errors="replace") as file:
                lines = file.read().split("\n")
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise OSError(error.errno, error.strerror, path) from None
            self.log.error(f"{explain(error)}; a new memory begins")
            lines = [""]
        if lines == [""]:  # misses packets (see give_up_file()), perhaps of this second
            self.began += 1
        wall, now = self.clocks.wall(), self.clocks.monotonic()
        unread = 0
        for line in lines:
            fields = line.split()
            if fields[:2] == ["#", "began"]:
                self.load_beginning(fields)
            elif (fields[:2] == ["#", "refused"] and len(fields) > 4 and fields[3].isdigit()
                  and len(fields[3]) < 12):
                self.enter_refused(fields[2], int(fields[3]), " ".join(fields[4:]))
            elif (len(fields) == 7 and fields[6].isdigit() and len(fields[6]) < 12
                  and not line.startswith("#")):
                age = min(max(0.0, wall - int(fields[6])), now)
                self.seen[fields[0]] = line, now - age
            elif fields and not line.startswith("#"):
                unread += 1
        if unread:
            self.log.warning(f"Skipping invalid digest file entry in {path}: {unread} lines")

    def load_beginning(self, fields: List[str]) -> None:
        """Continue the memory of `# began MONOTONIC BOOT_ID FORGOTTEN`, if it is of this boot."""
        try:
            expect(max(map(len, fields)) <= 36, "times")  # an identity of a boot has 36
            began, boot_id, forgotten = float(fields[2]), fields[3], int(fields[4])
            silent, whole, widest = (int(fields[5]), float(fields[6]), float(fields[7])) if (
                len(fields) > 7) else (self.silent, self.whole, 0.0)  # by an earlier version
        except (ValueError, IndexError):
            return
        self.forgotten, self.widest = forgotten, max(self.widest, widest)
        if boot_id == self.boot_id and 0 <= began <= self.began + 1:
            self.began, self.silent, self.whole = began, silent, whole

    def check_unseen(self, datagram: Datagram) -> None:
        """Raise NotFresh if this very packet came before: it need not be decrypted again."""
        digest = digest_of(datagram.payload.rstrip(b"="))
        if digest in self.refused:
            _, reason = self.refused[digest]
            raise NotFresh(reason, "SPA data time difference is too great (sent again)."
                           if reason in ("stale", "from the future") else
                           f"SPA packet was refused before ({reason}).")
        self.check_unknown(digest, datagram)

    def refuse(self, payload: bytes, reason: str, timestamp: int = 0) -> None:
        """Remember a genuine packet that opened nothing, and why.

        Otherwise anyone who captured it could make this server decrypt it again and again. A packet
        from the future stays refused when its time has come: its client then makes a new one. One
        with a `timestamp` may be answered now; it is on file before that.
        """
        digest = digest_of(payload.rstrip(b"="))
        if digest in self.seen or digest in self.refused:
            return
        self.enter_refused(digest, timestamp, reason)
        if timestamp:
            self.record(f"# refused {digest} {timestamp} {reason}\n")

    def enter_refused(self, digest: str, timestamp: int, reason: str) -> None:
        """Put a refused packet into the memory, which then forgets the oldest of too many."""
        self.refused[digest] = timestamp, reason
        while len(self.refused) > REFUSED_KNOWN:
            self.silent = max(self.silent, self.refused.pop(next(iter(self.refused)))[0])

    def would_know(self, timestamp: int) -> bool:
        """Return whether this memory has every packet with this timestamp that ever came here from
        a client whose clock was off by up to CLOCK_SECONDS."""
        whole = self.clocks.wall() - (self.clocks.monotonic() - self.whole)
        return timestamp > max(self.forgotten, self.silent, whole + CLOCK_SECONDS)

    def check_fresh(self, timestamp: int) -> None:
        """Raise NotFresh if a packet is too old or too new, by this host's clock."""
        if self.max_age is None:  # prune() has to know it if there is a limit later
            self.set_age(None, timestamp + 1 - self.clocks.wall())
            return
        age = self.clocks.wall() - timestamp
        if abs(age) > self.max_age:
            reason, why = (("stale", "The packet is old, or the client's clock is behind.")
                           if age > 0 else ("from the future", "The client's clock is ahead."))
            told = ""
            if abs(age) <= CLOCK_SECONDS and self.would_know(timestamp):
                told = f"the clock is {int(abs(age))} s {'behind' if age > 0 else 'ahead'}"
            raise NotFresh(reason, f"SPA data time difference is too great ({int(abs(age))} "
                           f"seconds). {why}", told=told, timestamp=timestamp)
        began = self.clocks.wall() - (self.clocks.monotonic() - self.began)
        if timestamp < int(began):
            seconds = int(max(1, began - timestamp))
            raise NotFresh("before memory", f"SPA packet was made {seconds} seconds before this "
                           "replay memory began; a new one will do.")
        if timestamp <= self.forgotten:
            seconds = int(max(1, self.forgotten + 1 - self.clocks.wall()))
            raise NotFresh("forgotten", "SPA packet may have been seen and forgotten, since this "
                           f"host's clock was set back; a new one will do in {seconds} seconds.")

    def remember(self, canonical: bytes, datagram: Datagram) -> None:
        """Put a packet into memory and file before it opens anything; raise NotFresh if known."""
        digest = digest_of(canonical)
        self.check_unknown(digest, datagram)
        line = (f"{digest} {datagram.protocol} {socket_text(datagram.source)} "
                f"{datagram.source_port} {socket_text(datagram.destination)} "
                f"{datagram.destination_port} {int(self.clocks.wall())}")
        self.seen[digest] = line, self.clocks.monotonic()
        self.prune()
        self.record(line + "\n")

    def record(self, line: str) -> None:
        """Add a line to the file. Write the file anew if somebody moved or changed it, if most of
        its packets are forgotten, or REWRITE_SECONDS after it could not be written."""
        path = self.path
        if not path:
            return
        try:
            if self.file is not None and self.written != file_state(path):
                self.log.warning(f"{path}: somebody moved, deleted or changed it; writing it anew")
                self.close()
            if self.file is not None:
                self.append(self.file, line.encode())
            known = len(self.seen) + len(self.refused)
            if (self.lines_in_file > known + REWRITE_AFTER if self.file is not None else
                    self.clocks.monotonic() >= self.rewrite_due):
                self.rewrite()
                if self.rewrite_due:
                    self.log.info(f"{path}: packets are written to it again")
                self.rewrite_due = 0.0
        except OSError as error:
            self.give_up_file(error)

    def check_unknown(self, digest: str, datagram: Datagram) -> None:
        """Raise NotFresh if the memory has this digest."""
        if digest in self.seen:
            _, protocol, source, _, _, port, created = self.seen[digest][0].split()
            came = time.strftime("%m/%d/%y %H:%M:%S", time.localtime(int(created)))
            raise NotFresh("replay", (
                f"Replay detected from source IP: {socket_text(datagram.source)}, "
                f"Destination proto/port: {datagram.protocol}/{datagram.destination_port}, "
                f"Original source IP: {source}, Original dst proto/port: {protocol}/{port}, "
                f"Entry created: {came}"), "{text}")

    def append(self, file: int, text: bytes) -> None:
        """Write all of the text to the end of the file, or raise OSError."""
        if os.write(file, text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        device, inode, size = self.written
        self.written = device, inode, size + len(text)
        self.lines_in_file += 1

    def give_up_file(self, error: OSError) -> None:
        """Remember packets in this process alone, and empty the file before the packet that it
        misses opens anything: the next start must not take the file for a record."""
        self.close()
        self.rewrite_due = self.clocks.monotonic() + REWRITE_SECONDS
        self.log.error(f"{explain(error, self.path)}; only this process remembers packets, and the "
                       "next start will reject those that were made before it")
        empty_file(self.path)

    def prune(self) -> None:
        """Forget packets that no clock which is off by MAX_SPA_PACKET_AGE takes for fresh."""
        if self.max_age is None:
            return
        while self.seen:
            keep = self.widest + self.max_age + 1
            if self.answers and len(self.seen) <= ANSWERED_KNOWN:
                keep = max(keep, CLOCK_SECONDS + self.max_age)
            now, wall = self.clocks.monotonic() - keep, self.clocks.wall() - keep
            digest, (line, came) = next(iter(self.seen.items()))
            created = int(line.split()[-1])
            if came >= now or created >= wall:  # a clock set back makes old packets fresh again
                break
            self.forgotten = max(self.forgotten, created + int(self.widest))
            del self.seen[digest]

    def rewrite(self) -> None:
        """Write all that is remembered to a new file, and keep this open to append to."""
        temporary = self.path + ".new"
        began = (f"# began {self.began:.3f} {self.boot_id} {self.forgotten} {self.silent} "
                 f"{self.whole:.3f} {self.widest:.0f}\n")
        refused = "".join(f"# refused {digest} {timestamp} {reason}\n" for digest, (
            timestamp, reason) in self.refused.items() if timestamp)
        text = DIGEST_HEADER + began + refused + "".join(
            line + "\n" for line, _ in self.seen.values())
        os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
        if os.path.lexists(temporary):
            os.unlink(temporary)
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        try:
            self.append(file, text.encode("latin-1", "replace"))
            os.rename(temporary, self.path)
        except OSError:
            os.close(file)
            os.unlink(temporary)  # the disk needs its room
            raise
        self.close()
        self.file, self.written = file, file_state(self.path)
        self.lines_in_file = len(self.seen) + len(self.refused)

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


def open_memory(settings: ServerSettings, log: Log, clocks: Clocks = CLOCKS) -> ReplayMemory:
    """Return the replay memory that the settings ask for, with its file opened."""
    path, persistent = settings.digest_file, settings.digest_persistence
    if not persistent:
        try:  # a later start must not read it: it misses the packets seen meanwhile
            rotate_digest_cache(path)
        except OSError as error:
            log.error(explain(error))
    memory = ReplayMemory(path if persistent else "",
                          settings.max_packet_age if settings.aging else None, log, clocks)
    # A file beside DIGEST_FILE records that a server has run here since the boot, or ever, if the
    # directory survives boots. It stays when DIGEST_FILE is lost.
    with contextlib.suppress(OSError):  # it is there, or can't be made
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        os.close(os.open(path + "-began", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        if persistent and not os.path.lexists(path):  # so nothing came since the boot
            memory.whole = -CLOCK_SECONDS
            memory.silent = int(clocks.wall() - clocks.monotonic())
    memory.open_file()
    return memory


def rotate_digest_cache(path: str) -> None:
    """Rename the file, if it exists, to its name with `-old` behind."""
    if os.path.exists(path):
        os.rename(path, path + "-old")


def open_itself(path: str, flags: int) -> int:
    """Open a file; raise OSError if a link is in its place, or what another user has put into a
    directory for all: a FIFO would make us wait for ever."""
    try:
        file = open_ours(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        text = "expected a file, not a symbolic link" if error.errno == errno.ELOOP else ""
        raise OSError(error.errno, text or error.strerror, path) from None
    if os.fstat(file).st_uid in (os.geteuid(), os.stat(os.path.dirname(path) or ".").st_uid):
        return file
    os.close(file)
    raise OSError(errno.EPERM, "it is another user's", path)


# ======================================================================================
# 17. Netlink
#
# Messages to the kernel's nf_tables (linux/netlink.h, linux/netfilter/nfnetlink.h and
# nf_tables.h). They add and delete a set element in 15 us; to start nft takes 3 ms. An attribute
# is {u16 length, u16 type} and a value, padded to 4 bytes; the numbers in values are big-endian.
# ======================================================================================

NLM_REQUEST, NLM_ACK, NLM_DUMP, NLM_CREATE = 0x1, 0x4, 0x300, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
BATCH_BEGIN, BATCH_END = 0x10, 0x11
NFT = 10 << 8  # NFNL_SUBSYS_NFTABLES
NEW_TABLE, GET_TABLE, DELETE_TABLE = NFT, NFT | 1, NFT | 2
GET_CHAIN, DELETE_CHAIN, GET_RULE, DELETE_RULE = NFT | 4, NFT | 5, NFT | 7, NFT | 8
GET_SET, DELETE_SET = NFT | 10, NFT | 11
NEW_ELEMENT, GET_ELEMENT, DELETE_ELEMENT = NFT | 12, NFT | 13, NFT | 14
NEW_GENERATION, GET_GENERATION = NFT | 15, NFT | 16
NESTED = 0x8000
TABLE_NAME, TABLE_FLAGS, TABLE_OWNER_PORT, GENERATION_NUMBER = 1, 2, 7, 1
TABLE_DORMANT, TABLE_OWNER, TABLE_PERSIST = 1, 2, 4  # flags
CHAIN_NAME, CHAIN_HOOK = 3, 4
RULE_TABLE, RULE_CHAIN, RULE_HANDLE, RULE_EXPRESSIONS, RULE_USERDATA = 1, 2, 3, 4, 7
EXPRESSION_NAME, EXPRESSION_DATA, MATCH_NAME, MATCH_INFO = 1, 2, 1, 3
IMMEDIATE_DATA, DATA_VERDICT, VERDICT_CHAIN = 2, 2, 2
LIST_TABLE, LIST_SET, LIST_ELEMENTS, LIST_ITEM = 1, 2, 3, 1
ELEMENT_KEY, ELEMENT_DATA, ELEMENT_TIMEOUT, ELEMENT_EXPIRATION, DATA_VALUE = 1, 2, 4, 5, 1
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
GROUP_LINK, GROUP_NFTABLES = 1, 7
NEW_ROUTE, GET_ROUTE, ROUTE_DESTINATION, ROUTE_MATCHED = 24, 26, 1, 0x2000  # linux/rtnetlink.h
ROUTE_TO_OTHERS, ROUTE_BROADCAST, ROUTE_BY_KERNEL = 1, 3, 2


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute with its padding."""
    return struct.pack("=HH", len(value) + 4, kind) + value + b"\0" * (-len(value) % 4)


def name_attribute(kind: int, name: str) -> bytes:
    """Return an attribute that holds a name, with the zero byte that ends it."""
    return attribute(kind, name.encode() + b"\0")


def attribute_list(data: bytes) -> Iterator[Tuple[int, bytes]]:
    """Return type and value of each attribute in `data`; raise CommandError if one is cut."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if not 4 <= length <= len(data):
            raise CommandError("netlink: an attribute is cut")
        yield kind & 0x3FFF, data[4:length]
        data = data[(length + 3) & ~3:]


class Attributes(Dict[int, bytes]):
    """Attributes by their type."""

    def __missing__(self, kind: int) -> bytes:
        """Raise CommandError for one that is missing."""
        raise CommandError(f"netlink: attribute {kind} is missing")


def attributes(data: bytes) -> Dict[int, bytes]:
    """Return the attributes in `data` by type; the last one of a type counts."""
    return Attributes(attribute_list(data))


def netlink_messages(data: bytes) -> Iterator[Tuple[int, int, bytes]]:
    """Return type, port id and body of each message of the kernel; CommandError if one is cut."""
    while data:
        length, kind, _, _, port = struct.unpack_from("=IHHII", data.ljust(16, b"\0"))
        if not 20 <= length <= len(data):  # with struct nfgenmsg, or an error's number
            raise CommandError("netlink: a message is cut")
        yield kind, port, data[16:length]
        data = data[(length + 3) & ~3:]


def text_of(value: bytes) -> str:
    """Return the text that ends at the first zero byte."""
    return value.partition(b"\0")[0].decode("latin-1")


class Netlink:
    """A socket to nf_tables. Its methods raise CommandError with the kernel's error number.

    The socket may own tables: then nobody else can change these, not even by another socket of this
    process, and a flush of all tables spares them.
    """

    def __init__(self, opened: socket.socket) -> None:
        self.socket = opened
        self.port: int = opened.getsockname()[0]

    @classmethod
    def open(cls) -> "Netlink":
        """Open a socket to nf_tables; raise CommandError if the kernel has none."""
        return cls(open_netlink_socket())

    def close(self) -> None:
        """Close the socket. Its persistent tables stay, without an owner."""
        self.socket.close()

    __del__ = close  # with the backend: a reload replaces it, a check drops it

    def message(self, kind: int, flags: int, family: int, body: bytes, resource: int = 0) -> bytes:
        """Return a message: struct nlmsghdr, struct nfgenmsg, and the attributes `body`."""
        header = struct.pack("=IHHII", len(body) + 20, kind, flags | NLM_REQUEST, 1, 0)
        return header + struct.pack(">BBH", family, 0, resource) + body

    def commit(self, messages: List[Tuple[int, int, bytes]]) -> None:
        """Let the kernel do all messages (type, family, attributes) in one transaction, or none."""
        flags = [NLM_CREATE if kind == NEW_ELEMENT else 0 for kind, _, _ in messages]
        flags[-1] |= NLM_ACK
        batch = [self.message(kind, flag, family, body)
                 for flag, (kind, family, body) in zip(flags, messages)]
        begin, end = [self.message(kind, 0, 0, b"", NFT >> 8) for kind in (BATCH_BEGIN, BATCH_END)]
        numbers = [-struct.unpack_from("=i", body)[0] for kind, body in self.answers(
            begin + b"".join(batch) + end) if kind == NLMSG_ERROR]
        failed = next(filter(None, numbers), 0 if numbers else errno.EIO)
        if failed:
            raise self.error(failed)

    def answers(self, messages: bytes) -> Iterator[Tuple[int, bytes]]:
        """Send messages; return type and body of each answer."""
        drain_socket(self.socket)  # of earlier answers that nobody read
        try:
            self.socket.sendto(messages, (0, 0))  # the kernel answers before this returns
            while True:  # and adds to a list whenever a part is read
                data = self.socket.recv(65536, socket.MSG_DONTWAIT)
                for kind, _, body in netlink_messages(data):
                    yield kind, body
        except BlockingIOError:
            return
        except OSError as error:
            raise self.error(error.errno or errno.EIO) from None

    @staticmethod
    def error(number: int) -> CommandError:
        """Return the CommandError of an error number of the kernel's."""
        return CommandError(f"nftables: {os.strerror(min(number, 4096))}", number=number)

    def dump(self, kind: int, family: int, body: bytes) -> List[Dict[int, bytes]]:
        """Ask the kernel for a list; return the attributes of each entry."""
        found: List[Dict[int, bytes]] = []
        for answer, part in self.answers(self.message(kind, NLM_DUMP, family, body)):
            if answer == NLMSG_DONE:
                return found
            if answer == NLMSG_ERROR:
                raise self.error(-struct.unpack_from("=i", part)[0])
            found.append(attributes(part[4:]))
        raise self.error(errno.EAGAIN)

    def generation(self) -> bytes:
        """Return the number of the last change, as nf_tables announces it too; empty if unknown."""
        for kind, body in self.answers(self.message(GET_GENERATION, 0, 0, b"")):
            if kind == NEW_GENERATION:
                return attributes(body[4:]).get(GENERATION_NUMBER, b"")
        return b""

    def elements(self, family: int, body: bytes) -> List[bytes]:
        """Return the elements that a set has now; none if the set is missing."""
        try:
            return [item for answer in self.dump(GET_ELEMENT, family, body)
                    for _, item in attribute_list(answer.get(LIST_ELEMENTS, b""))]
        except CommandError as error:
            if error.number != errno.ENOENT:
                raise
            return []

    def rules(self, chain: NftChain) -> List[Tuple[int, str]]:
        """Return handle and user data of a chain's rules; an error or none if it is missing."""
        question = name_attribute(RULE_TABLE, chain.table) + name_attribute(RULE_CHAIN, chain.chain)
        found = self.dump(GET_RULE, NFT_FAMILIES[chain.family], question)
        return [(int.from_bytes(rule[RULE_HANDLE], "big"),
                 rule.get(RULE_USERDATA, b"").decode("latin-1")) for rule in found
                if attributes(question).items() <= rule.items()]  # old kernels list all chains

    def release(self) -> None:
        """Give up the tables that this socket owns; another socket takes its place."""
        self.close()  # there is no other way
        self.socket = open_netlink_socket()
        self.port = self.socket.getsockname()[0]

    def set_table(self, chain: NftChain, flags: int) -> None:
        """Make a chain's table, or change its flags. Only a new table can be made persistent."""
        self.commit([(NEW_TABLE, NFT_FAMILIES[chain.family], name_attribute(TABLE_NAME, chain.table)
                      + attribute(TABLE_FLAGS, struct.pack(">I", flags)))])

    def table_numbers(self, chain: NftChain) -> Tuple[int, int]:
        """Return the flags of a chain's table and its owner's port; each is 0 if there is none."""
        for table in self.dump(GET_TABLE, NFT_FAMILIES[chain.family], b""):
            if text_of(table.get(TABLE_NAME, b"")) == chain.table:
                return (int.from_bytes(table.get(TABLE_FLAGS, b""), "big"),
                        int.from_bytes(table.get(TABLE_OWNER_PORT, b""), "big"))
        return 0, 0


def is_own_address(address: Address) -> Optional[bool]:
    """Return whether the kernel would deliver packets to `address` at this host.

    None: a broadcast address, or the address of a network that this host is in; Linux 5.14 and
    later route to the latter as to any host's. An address without a route is another host's.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    question = (struct.pack("=8BI", family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, ROUTE_MATCHED)
                + attribute(ROUTE_DESTINATION, address.packed))
    header = struct.pack("=IHHII", len(question) + 16, GET_ROUTE, NLM_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as asked:
        asked.sendto(header + question, (0, 0))
        answer = asked.recv(65536, socket.MSG_DONTWAIT)  # the kernel answers within sendto()
    for kind, _, body in netlink_messages(answer):
        if kind == NEW_ROUTE and len(body) >= 12:  # struct rtmsg, and attributes
            _, prefix, _, _, _, maker, _, route = body[:8]
            network = (family == socket.AF_INET and prefix < 31 and maker == ROUTE_BY_KERNEL
                       and attributes(body[12:]).get(ROUTE_DESTINATION) == address.packed)
            return None if network or route == ROUTE_BROADCAST else route != ROUTE_TO_OTHERS
    return False


def open_netlink_socket() -> socket.socket:
    """Open a socket to nf_tables, at a port that the kernel chooses; raise CommandError."""
    try:
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        opened.bind((0, 0))
    except OSError as error:
        raise CommandError(explain(error, "netlink")) from None
    return opened


def open_netlink_events(protocol: int, group: int) -> Optional[socket.socket]:
    """Open a socket that becomes readable when the kernel changes something; None without one."""
    try:
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    except (OSError, AttributeError):
        return None
    try:
        events.bind((0, 1 << group - 1))  # the kernel tells only root about nftables
    except OSError:
        events.close()
        return None
    events.setblocking(False)
    return events


def drain_socket(events: Optional[socket.socket]) -> None:
    """Read all that waits in a socket, and throw it away."""
    with contextlib.suppress(OSError):  # nothing waits, or the kernel dropped messages
        while events is not None:
            events.recv(65536, socket.MSG_DONTWAIT)


# ======================================================================================
# 18. Capture
#
# The server gets datagrams from a packet socket if it has CAP_NET_RAW: then no port listens, and
# the host's firewall may drop the packets. Else it opens UDP sockets. TCP sockets can be added to
# either. A capture file replaces all of these. Answers leave from UDP sockets at the same ports.
# ======================================================================================

ETH_P_ALL, ETH_P_IP, ETH_P_IPV6 = 0x0003, 0x0800, 0x86DD
SO_ATTACH_FILTER, SO_RCVBUFFORCE, SO_MEMINFO, IP_PKTINFO = 26, 33, 55, 8
SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC = 263, 1, 1
RECEIVE_BUFFER = 4 << 20  # holds 6,500 small packets: 65 ms of a flood of 100,000 a second
MAX_PACKET = 4096  # the kernel cuts a longer one, and what is left is no datagram


class Capture:
    """A socket and how to read a Datagram from it."""

    batch_seconds = 0.02  # of datagrams, before others have their turn
    is_fair = False  # whether Crowd chooses from datagrams that come faster than they can be tried
    waiting: Optional[List[Datagram]] = None  # those, while they do, oldest first
    tries = 0  # how many could be tried in a batch
    room = 2 * RECEIVE_BUFFER  # of the socket for packets, as the kernel counts it

    def __init__(self, opened: socket.socket, name: str, buffer: int = RECEIVE_BUFFER) -> None:
        self.socket, self.name = opened, name
        opened.setblocking(False)
        try:
            opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer)
        except OSError:  # that takes CAP_NET_ADMIN
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        if buffer == RECEIVE_BUFFER:  # without CAP_NET_ADMIN it gets less
            self.room = opened.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)

    def fileno(self) -> int:
        """Return the descriptor that a selector waits for."""
        return self.socket.fileno()

    @property
    def due(self) -> float:
        """When to call receive() even if there is nothing to read, on the monotonic clock."""
        return FOR_EVER if self.waiting is None else 0.0

    def receive(self) -> Optional[Datagram]:
        """Return the next datagram; None if it is not one; raise BlockingIOError if none waits."""
        raise NotImplementedError

    def lost(self) -> float:
        """Return how many packets the kernel dropped because the socket's buffer was full."""
        try:  # SK_MEMINFO_DROPS, the ninth number (linux/sock_diag.h)
            return float(struct.unpack(
                "=32xI", self.socket.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[0])
        except (OSError, struct.error, AttributeError):  # before Linux 4.12; a file has no socket
            return float("nan")

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class PacketCapture(Capture):
    """A packet socket, on one interface or on all.

    For all interfaces, IPv4 and IPv6 have a socket each: it sees a packet once, after bridges,
    bonds and VLANs, and no packet that this host sends. A socket on a named interface sees all of
    its packets, so that an interface inside a bridge works as well. The kernel removes VLAN tags.
    """

    is_fair = True
    decode: Callable[[bytes], Any] = staticmethod(decode_ip)

    def __init__(self, opened: socket.socket, index: int, name: str) -> None:
        super().__init__(opened, name)
        self.index = index  # of the interface

    def receive(self) -> Any:
        """Return the next datagram or knock packet."""
        return self.decode(self.socket.recv(MAX_PACKET))


class KnockCapture(PacketCapture):
    """A packet socket for the steps of some sequences; others may have one on this interface."""

    is_fair = False  # the order of knock packets counts
    decode = staticmethod(decode_knock)
    sequences: Iterable[Sequence] = ()  # open_knock_captures() sets them


def attach_filter(opened: socket.socket, code: bytes) -> None:
    """Give a socket a filter, in place of the one that it may have."""
    instructions = array.array("B", code)
    program = struct.pack("HL", len(code) // SOCK_FILTER.size, instructions.buffer_info()[0])
    opened.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def open_packet_socket(interface: str, protocol: int, code: bytes, promiscuous: bool
                       ) -> Tuple[socket.socket, int]:
    """Open a packet socket with a filter, on an interface or all (""); return it, and its index."""
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(protocol))
    try:
        attach_filter(opened, code)
        index = socket.if_nametoindex(interface) if interface else 0
        if interface:
            opened.bind((interface, protocol))
        if interface and promiscuous:  # struct packet_mreq
            request = struct.pack("iHH8s", index, PACKET_MR_PROMISC, 0, b"")
            opened.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, request)
    except OSError:
        opened.close()
        raise
    drain_socket(opened)  # of packets that came before the filter was there
    return opened, index


def open_port_socket(family: int, kind: int, port: int) -> socket.socket:
    """Open a UDP or TCP socket at a port of all addresses of one family."""
    opened = socket.socket(family, kind)
    try:
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.setsockopt(*(
            (socket.SOL_SOCKET, socket.SO_REUSEADDR) if kind == socket.SOCK_STREAM else
            (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO) if family == socket.AF_INET6 else
            (socket.IPPROTO_IP, IP_PKTINFO)), 1)
        opened.bind(("", port))
        if kind == socket.SOCK_STREAM:
            opened.listen(1024)  # or as many as the kernel allows: the server may be busy
    except OSError:
        opened.close()
        raise
    return opened


class UdpCapture(Capture):
    """A UDP socket of one family. The packet info option brings the destination address."""

    protocol, kind, is_fair = "UDP", socket.SOCK_DGRAM, True

    def __init__(self, opened: socket.socket, port: int) -> None:
        super().__init__(opened, f"UDP port {port}")
        self.family, self.port = opened.family, port

    def receive(self) -> Optional[Datagram]:
        """Return the next datagram."""
        payload, control, _, peer = self.socket.recvmsg(MAX_PAYLOAD + 1, 64)
        if not control:
            return None
        # in_pktinfo: {index, local, address}; in6_pktinfo: {address, index}
        information = control[0][2]
        destination = information[8:12] if self.family == socket.AF_INET else information[:16]
        source = socket.inet_pton(self.family, peer[0].partition("%")[0])
        return Datagram(payload, source, peer[1], destination, self.port)


MAX_REQUEST = MAX_PAYLOAD + 4096  # bytes of an HTTP request: the packet and the other lines
MAX_CONNECTIONS = 32  # of one family; a process may have 1024 descriptors or more
MAX_PER_NETWORK = 4  # of one IPv4 address or IPv6 /64; a client is gone as soon as it has sent
# For the first byte, and then for all others. A client sends at once; TCP repeats a lost segment
# after 1 and 3 seconds (RFC 6298), and sooner once it has measured the connection.
FIRST_SECONDS, REST_SECONDS = 5.0, 2.0
ACCEPT_PAUSE = 1.0  # seconds until the next try when there was no descriptor for a connection


class TcpCapture(Capture):
    """A TCP socket of one family. A connection brings one packet; the server closes it silently.

    The packet ends with the connection, with the header of an HTTP request, or when its time is
    over. Too many connections push out the oldest one of their network, or else the oldest of all:
    a client sends at once, so a connection that waits is less likely a client's.
    """

    protocol, kind = "TCP", socket.SOCK_STREAM

    def __init__(self, opened: socket.socket, port: int, clocks: Clocks = CLOCKS) -> None:
        super().__init__(opened, f"TCP port {port}", 2 * MAX_REQUEST)
        self.family, self.port, self.clocks = opened.family, port, clocks
        # What has come by each socket so far, and until when the server waits; the oldest first.
        self.connections: Dict[socket.socket, Tuple[Datagram, float]] = {}
        self.pause_end = FOR_EVER  # when to accept again, after there was no descriptor
        self.selector = selectors.EpollSelector()
        self.selector.register(opened, selectors.EVENT_READ)

    def fileno(self) -> int:
        """Return a descriptor that is readable when the socket or a connection is."""
        return self.selector.fileno()

    @property
    def due(self) -> float:
        """When the time of the first connection is over, or that of a pause."""
        return min([end for _, end in self.connections.values()] + [self.pause_end])

    def receive(self) -> Optional[Datagram]:
        """Return the datagram of a connection that is complete. Reading goes before accepting."""
        now = self.clocks.monotonic()
        if now >= self.pause_end:
            self.end_pause()
        for opened, (_, end) in self.connections.items():
            if now >= end:
                return self.close_connection(opened, reset=True)
        ready: List[Any] = [key.fileobj for key, _ in self.selector.select(0)]
        for opened in ready:
            if opened in self.connections:
                return self.read(opened, now)
        if not ready:
            raise BlockingIOError
        return self.accept(now)

    def accept(self, now: float) -> Optional[Datagram]:
        """Accept a connection and read it, or return the datagram of one that it pushes out."""
        try:
            opened, peer = self.socket.accept()
            here = opened.getsockname()
        except OSError as error:  # the client has gone, or there is no descriptor left
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.selector.unregister(self.socket)  # it stays readable: the loop would spin
                self.pause_end = now + ACCEPT_PAUSE
            return None
        opened.setblocking(False)
        source, destination = (socket.inet_pton(self.family, name[0].partition("%")[0])
                               for name in (peer, here))
        datagram = Datagram(b"", source, peer[1], destination, self.port, TCP)
        self.connections[opened] = datagram, now + FIRST_SECONDS
        self.selector.register(opened, selectors.EVENT_READ)
        neighbours = [each for each, (datagram, _) in self.connections.items()
                      if datagram.source[:8] == source[:8]]
        for crowd, most in ((neighbours, MAX_PER_NETWORK),
                            (list(self.connections), MAX_CONNECTIONS)):
            if len(crowd) > most:
                return self.close_connection(crowd[0], reset=True)
        return self.read(opened, now)

    def end_pause(self) -> None:
        """Accept connections again."""
        if self.pause_end != FOR_EVER:
            self.pause_end = FOR_EVER
            self.selector.register(self.socket, selectors.EVENT_READ)

    def read(self, opened: socket.socket, now: float) -> Optional[Datagram]:
        """Read from a connection; if it is complete, close it and return its datagram."""
        datagram, end = self.connections[opened]
        try:
            new = opened.recv(MAX_REQUEST + 1 - len(datagram.payload))
        except BlockingIOError:
            return None
        except OSError:  # reset
            new = b""
        text = datagram.payload + new
        self.connections[opened] = datagram._replace(payload=text), min(end, now + REST_SECONDS)
        whole = len(text) > MAX_PAYLOAD
        if text[:4].upper() == b"GET ":
            whole = b"\n\r\n" in text or b"\n\n" in text or len(text) > MAX_REQUEST
        return self.close_connection(opened) if whole or not new else None

    def close_connection(self, opened: socket.socket, reset: bool = False) -> Optional[Datagram]:
        """Close a connection; return its datagram, if it brought any byte."""
        datagram, _ = self.connections.pop(opened)
        self.selector.unregister(opened)
        if reset:  # the client did not end it: keep no TIME_WAIT. struct linger {int on, seconds}
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        opened.close()
        self.end_pause()
        return datagram if datagram.payload else None

    def close(self) -> None:
        """Close the socket and all connections."""
        for opened in list(self.connections):
            self.close_connection(opened)
        self.selector.close()
        self.socket.close()


PCAP_ORDERS = {b"\xa1\xb2\xc3\xd4": ">", b"\xd4\xc3\xb2\xa1": "<",  # times in microseconds
               b"\xa1\xb2\x3c\x4d": ">", b"\x4d\x3c\xb2\xa1": "<"}  # or in nanoseconds
PCAPNG = b"\x0a\x0d\x0d\x0a"
MAX_FRAME = 1 << 18  # tcpdump writes no longer ones


class FileCapture(Capture):
    """A file of `tcpdump -w` (draft-ietf-opsawg-pcap), read once; EOFError at its end."""

    def __init__(self, file: Any, order: str, link: LinkType, always: int, tree: Filter,
                 any_direction: bool) -> None:
        self.file, self.name, self.order, self.link = file, file.name, order, link
        self.always, self.tree, self.any_direction = always, tree, any_direction
        self.packets, self.passed, self.cut = 0, 0, 0

    def fileno(self) -> int:
        """Return a descriptor that is always readable."""
        return self.always

    def receive(self) -> Optional[Datagram]:
        """Return the datagram of the next record; raise EOFError if there is none."""
        if not self.file.peek(1):
            raise EOFError(f"End of {self.name}: {self.packets} packets, {self.passed} of them "
                           f"pass PCAP_FILTER, {self.cut} are cut short")
        header = self.file.read(16)  # seconds, fraction, length, original length; then the frame
        length, whole = struct.unpack(self.order + "8xII", header) if len(header) == 16 else (1, 1)
        frame = self.file.read(min(length, MAX_FRAME))
        if len(frame) != length:
            raise SpaError(f"{self.name}: broken after {self.packets} packets")
        self.packets += 1
        self.cut += length < whole
        packet = decode_frame(frame, self.link, self.any_direction)
        try:
            passes = length >= whole and matches(self.tree, packet)
        except IndexError:
            passes = False
        self.passed += passes
        return decode_ip(packet) if passes else None

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        os.close(self.always)


def open_capture_file(path: str, tree: Filter, any_direction: bool) -> FileCapture:
    """Open a capture file and read its header; raise SpaError if the format is unknown."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise SpaError(f"{path}: expected a regular file")
    try:
        file = open(path, "rb")
    except OSError as error:
        raise SpaError(explain(error)) from None
    head = file.read(24)
    order = PCAP_ORDERS.get(head[:4], "")
    if not order or len(head) < 24:
        file.close()
        raise SpaError(f"{path}: expected a capture file in the pcap format",
                       "tcpdump -r FILE -w NEW or editcap -F pcap FILE NEW make one of pcapng"
                       if head[:4] == PCAPNG else "")
    number = struct.unpack(order + "20xI", head)[0] & 0xFFFF  # the rest is about checksums
    if number not in LINK_TYPES:
        file.close()
        known = ", ".join(map(str, sorted(LINK_TYPES)))
        raise SpaError(f"{path}: frames of link type {number}; expected one of {known}")
    # Nobody can write to this pipe, so it always counts as readable; a file does not.
    always, writer = os.pipe()
    os.close(writer)
    return FileCapture(file, order, LINK_TYPES[number], always, tree, any_direction)


def open_captures(settings: ServerSettings, log: Log, current: Iterable[Capture],
                  captures: List[Capture]) -> None:
    """Open what the settings say to listen on or to read, and add it to `captures`. Sockets of
    `current` that fit are kept. Raise SpaError if there is no way to listen."""
    if settings.capture_file:
        captures.append(open_capture_file(settings.capture_file, settings.packet_filter,
                                          settings.any_direction))
        return
    on_udp = settings.udp_server
    if not on_udp:
        try:
            captures += open_packet_captures(settings, log)
        except (PermissionError, AttributeError):
            log.warning("No CAP_NET_RAW or no packet sockets here: listening on UDP port "
                        f"{settings.udp_port} instead")
            on_udp = True
    if on_udp:
        code = (SOCK_FILTER.pack(RETURN, 0, 0, ACCEPT_ALL) if settings.verbose else
                compile_udp_filter(payload_filter(http=False)))
        open_port_captures(UdpCapture, settings.udp_port, captures, current, code)
    if settings.tcp_server:
        open_port_captures(TcpCapture, settings.tcp_port, captures, current)


def capture_lines(settings: ServerSettings, captures: Iterable[Capture]) -> List[str]:
    """Return the lines that fwknopd logs when it listens."""
    row, lines = ServerSettings.packet_filter, []
    kinds = {type(each) for each in captures}
    if FileCapture in kinds:
        lines.append(f"Reading pcap file: {settings.capture_file}")
    if PacketCapture in kinds:
        lines.append(f"Sniffing interface: {settings.interface}")
    if lines:
        lines.append(f"PCAP filter is: '{settings.texts.get(row.name, row.default)}'")
    names = sorted({each.name for each in captures if isinstance(each, KnockCapture)})
    if names:
        lines.append("Listening for knock sequences: " + ", ".join(names))
    return lines + [f"Kicking off {kind.protocol} server to listen on port {port}."
                    for kind, port in ((UdpCapture, settings.udp_port),
                                       (TcpCapture, settings.tcp_port)) if kind in kinds]


def close_captures(captures: Iterable[Capture], current: Iterable[Capture]) -> None:
    """Close the captures that are not among `current`."""
    for capture in captures:
        if capture not in current:
            capture.close()


def open_port_captures(kind: "Type[Union[UdpCapture, TcpCapture]]", port: int,
                       captures: List[Capture], current: Iterable[Capture],
                       code: bytes = b"") -> None:
    """Open sockets of both families and add them to `captures`; a host may lack one family."""
    kept = {(type(each), each.family, each.port): each for each in current
            if isinstance(each, (UdpCapture, TcpCapture))}
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            captures.append(kept.get((kind, family, port))
                            or kind(open_port_socket(family, kind.kind, port), port))
            if code:
                attach_filter(captures[-1].socket, code)
        except OSError as error:
            missing = error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
            served = any(isinstance(each, kind) for each in captures)
            if not missing or (family == socket.AF_INET6 and not served):
                raise SpaError(explain(error, f"{kind.protocol} port {port}")) from None


class AnswerSockets:
    """UDP sockets that answers leave from: those of UDP captures, or others that take nothing in.

    The port has to be bound. Otherwise the kernel itself answers with "port unreachable", and the
    client gives up.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.sockets: Dict[Tuple[int, int], socket.socket] = {}  # by port, and an address's bytes
        self.own: List[socket.socket] = []  # those of them that are no capture's

    def open(self, ports: Iterable[int], captures: Iterable[Capture]) -> None:
        """Open a socket of each family at these ports; go on without one where that fails."""
        self.close()
        failed = set()  # both families fail alike
        for port in sorted(ports):
            for size, family in ((4, socket.AF_INET), (16, socket.AF_INET6)):
                same = [each.socket for each in captures if isinstance(each, UdpCapture)
                        and (each.family, each.port) == (family, port)]
                try:
                    opened = same[0] if same else open_port_socket(family, socket.SOCK_DGRAM, port)
                    self.sockets[port, size] = opened
                    if not same:
                        self.own.append(opened)
                        attach_filter(opened, SOCK_FILTER.pack(RETURN, 0, 0, 0))
                except OSError as error:
                    if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                        failed.add(explain(error, f"UDP port {port}"))
        for text in sorted(failed):
            self.log.warning(text + "; its clients get no answer")

    def send(self, answer: bytes, datagram: Datagram) -> None:
        """Send an answer to where a datagram came from, from the address that it was sent to."""
        sender = self.sockets.get((datagram.destination_port, len(datagram.source)))
        if sender is None or datagram.protocol != UDP:
            return
        if len(datagram.source) == 4:  # struct in_pktinfo {index, local, address}
            control = socket.IPPROTO_IP, IP_PKTINFO, bytes(4) + datagram.destination + bytes(4)
        else:  # struct in6_pktinfo {address, index}
            control = socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, datagram.destination + bytes(4)
        try:
            sender.sendmsg([answer], [control], socket.MSG_DONTWAIT,  # the loop must not wait
                           (socket_text(datagram.source), datagram.source_port))
        except OSError as error:
            self.log.debug("no answer: " + explain(error))

    def close(self) -> None:
        """Close the sockets that only answer."""
        for each in self.own:
            each.close()
        self.sockets, self.own = {}, []


def open_packet_captures(settings: ServerSettings, log: Log) -> List[PacketCapture]:
    """Open the packet sockets of PCAP_INTF; return none while that interface does not exist."""
    tree, payload = settings.packet_filter, payload_filter(settings.http)
    if settings.tcp_server:  # packets to it would come twice
        served = parse_packet_filter(f"tcp dst port {settings.tcp_port}")
        tree = Junction("and", (tree, Junction("not", (served,))))
    return open_on_interface(PacketCapture, settings.interface,
                             compile_filter(tree, settings.any_direction,
                                            None if settings.verbose else payload), log,
                             settings.any_direction, settings.promiscuous)


def open_on_interface(kind: Callable[..., T], name: str, code: bytes, log: Log,
                      any_direction: bool = False, promiscuous: bool = False) -> List[T]:
    """Open packet sockets with a filter, on an interface or "any"; none while it is missing."""
    interface = "" if name == "any" else name
    # Only a socket for all protocols sees outgoing packets.
    protocols = (ETH_P_ALL,) if interface or any_direction else (ETH_P_IP, ETH_P_IPV6)
    try:
        return [kind(*open_packet_socket(interface, protocol, code, promiscuous), name)
                for protocol in protocols]
    except PermissionError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.ENXIO, None):
            raise SpaError(explain(error, name)) from None
        log.warning(f"Interface {name} does not exist; it is waited for, and until then no knock "
                    "is heard")
        return []


Listening = Tuple[Tuple[str, ...], List[Sequence]]  # interfaces, and the sequences to hear there


def open_knock_captures(listenings: Iterable[Listening], four_only: bool, log: Log,
                        captures: List[Capture]) -> None:
    """Add packet sockets for knock sequences to `captures`; raise SpaError without CAP_NET_RAW."""
    try:
        for interfaces, sequences in listenings:
            tree = sequence_filter(sequences)
            if four_only:
                tree = Junction("and", (IS_IPV4, tree))
            for name in interfaces if sequences else ():
                for capture in open_on_interface(KnockCapture, name, compile_filter(tree), log):
                    capture.sequences = sequences
                    captures.append(capture)
    except (PermissionError, AttributeError):
        raise SpaError("knock sequences need packet sockets, and so CAP_NET_RAW") from None


# ======================================================================================
# 19. Firewall
#
# The base of all backends, the trial of a guard, and what a guard has to know of the host.
# ======================================================================================

PATIENCE = 5.0  # seconds that one change may keep the loop waiting, all its programs together
LEAST_SECONDS = 0.05  # less time is not enough for a program to start and do something
POLL_SECONDS = 30.0  # between two looks at a firewall whose changes netlink announces
GRANTS_AT_ONCE = 100  # grants in one transaction: a netlink message has its limit
CHANGES_AT_ONCE = 500  # deletions in one netlink message, which are shorter


class Trial(NamedTuple):
    """A guard's trial: if no knock opens a guarded port before its end, the guard opens again."""

    expires: float  # epoch seconds
    ends: float  # the same on the monotonic clock

    def __str__(self) -> str:
        """Return when it ends, for people."""
        return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.expires))


TRIAL_OVER = Trial(FOR_EVER, FOR_EVER)  # it ended open: the guard's rules stand without their drop


class Firewall:
    """A backend. This one has no grants and logs why: --test, FIREWALL_TYPE none, or only commands.

    Every method but describe() may raise CommandError. The kernel is the register of grants.
    """

    keeps = False  # whether grants() tells what is open
    quickly_intact = False  # whether intact() takes no longer for many grants
    poll_seconds = POLL_SECONDS
    guard_poll_seconds = FOR_EVER  # between two looks at a guard whose changes nobody announces
    guard_tables: FrozenSet[Tuple[int, bytes]] = frozenset()  # the guard's in nf_tables
    tables_heard: Optional[FrozenSet[Tuple[int, bytes]]] = None  # whose changes matter; None: all
    netlink: Optional[Netlink] = None  # set if the backend itself changes nf_tables
    own_ports: "collections.deque[int]" = collections.deque(maxlen=100)  # see changes_through()
    settled: Optional[bool] = None  # all is as a look found it right; None: intact() can't tell
    grants_at_once = GRANTS_AT_ONCE  # in one add()
    guard_ports: FrozenSet[Port] = frozenset()
    trial: Optional[Trial] = None  # None: the guard stays
    chains: Iterable[Any] = ()  # that grants go to
    identity: Tuple[Any, ...] = ()  # backends with the same identity share their rules
    due = FOR_EVER  # when the time of its programs is up, on the monotonic clock
    failed = 0  # how many times it failed while the server ran

    def __init__(self, why: str, log: Log, clocks: Clocks = CLOCKS) -> None:
        self.why, self.log, self.clocks = why, log, clocks

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Limit the time of all programs that run inside of the `with`; count a failure."""
        before, self.due = self.due, min(self.due, self.clocks.monotonic() + seconds)
        try:
            yield
        except CommandError:
            self.failed += 1
            raise
        finally:
            self.due = before

    def seconds_left(self) -> float:
        """Return how long the next program may run; raise CommandError when no time is left."""
        # Half of the time that is left: if the program is killed, its work is read back.
        left: float = min(PROGRAM_SECONDS, (self.due - self.clocks.monotonic()) / 2)
        if left < LEAST_SECONDS:
            raise CommandError("the firewall has taken too long")
        return left

    def describe(self, door: Optional[Door] = None) -> str:
        """Return the chains that this door, or access, goes to, for the log."""
        return ""

    def chains_for(self, door: Door) -> List[Any]:
        """Return the chains that this door goes to; none if it can't be opened here."""
        return [None]

    def normalise(self, door: Door) -> Optional[Door]:
        """Return the door as this backend can store it: addresses that its rules do not match
        become any. None if there is nothing to store, since the host's firewall decides."""
        return door

    def prepare(self) -> None:
        """Make the chains, sets and rules that are missing; grants stay as they are."""

    def prepare_guard(self) -> None:
        """Make the guard alone, or repair it; grants stay as they are."""
        self.log.info(self.why)

    def check_guard(self) -> None:
        """Raise CommandError if this host lets us make no guard; change nothing."""
        self.grants()

    def intact(self) -> bool:
        """Return whether the rules that prepare() makes stand, and no others among them."""
        return True  # others compute the rules: if read back, they could have somebody's change

    def succeed(self, old: "Firewall") -> None:
        """Take over from another backend; call this before prepare()."""
        self.trial = old.trial

    def trial_left(self) -> float:
        """Return for how many seconds a trial goes on; FOR_EVER if none does."""
        running = self.trial if self.guard_ports else None
        return running.ends - self.clocks.monotonic() if running else FOR_EVER

    def mend_guard(self) -> bool:
        """Repair the guard if somebody changed it; return whether anything was wrong."""
        return False

    def add(self, grants: List[Grant], replaced: List[Grant]) -> None:
        """Add `grants`, all or none, in place of `replaced`."""
        self.log.info(self.why)

    def remove(self, grants: List[Grant]) -> None:
        """Remove grants, also those that are gone already."""

    def grants(self) -> List[Grant]:
        """Return the grants that the kernel has."""
        return []

    def listing(self) -> str:
        """Return the tables that grants go to, as the firewall's program prints them."""
        return ""

    def flush(self) -> None:
        """Remove all grants, those of another fwknopd as well; the guard stays."""

    def withdraw(self) -> None:
        """Remove our chains, sets and rules from the host's firewall; the guard stays."""

    def guarded(self) -> bool:
        """Return whether a guard closes, whoever made it."""
        return False

    def unguard(self) -> None:
        """Remove the guard."""


COMMENT = "spa_server.py"  # begins the comment of our rules


def tag(rule: str) -> str:
    """Return the comment of a rule of ours, which changes with the rule's text."""
    # Comments are compared: every version of a firewall's program prints rules in its own way.
    # A checksum is enough: whoever can change rules can do anything.
    return f"{COMMENT}:{binascii.crc32(rule.encode()):08x}"


def tag_in(text: str) -> str:
    """Return our comment in a rule as the firewall has it; nothing for somebody else's rule."""
    _, found, rest = text.partition(COMMENT + ":")
    return found + rest[:8]


def guard_text(firewall: Firewall) -> str:
    """Return what the guard closes, and for how long, for the log."""
    ports = port_list(firewall.guard_ports)
    if firewall.trial is None:
        return "Closed to everybody without a grant: " + ports
    if firewall.trial is TRIAL_OVER:
        return ("Trial: no knock opened a guarded port in time. Open to everybody until a new "
                "start: " + ports)
    return (f"Trial: closed until {firewall.trial}, then open again unless a knock has opened one "
            f"of these: {ports}")


def blocks(items: List[T], size: int) -> List[Tuple[List[T]]]:
    """Return `items` in lists of at most `size`, for do_all()."""
    return [(items[start:start + size],) for start in range(0, len(items), size)]


def do_all(do: Callable[..., None], items: Iterable[Tuple[Any, ...]]) -> None:
    """Call `do` with each item, also after one that failed; then raise the first CommandError."""
    failed: Optional[CommandError] = None
    for item in items:
        try:
            do(*item)
        except CommandError as error:
            failed = failed or error
    if failed:
        raise failed


def established_connections(ports: FrozenSet[Port]) -> List[Tuple[Address, int, int]]:
    """Return peer, its port and ours of the TCP connections to guarded ports (proc(5)).

    If the kernel did not track connections before the guard was made, it takes these for new
    ones, and the guard would cut off the administrator who has just made it. At most 500, since
    each becomes a rule that other packets have to pass.
    """
    found = []
    rows = [line.split() for name in ("net/tcp", "net/tcp6")
            for line in read_proc(name).splitlines()[1:]]
    for _, local, remote, state, *_ in rows:
        port, (address, peer_port) = int(local.split(":")[1], 16), remote.split(":")
        if state == "01" and ("tcp", port) in ports:
            packed = b"".join(struct.pack("=I", int(address[start:start + 8], 16))
                              for start in range(0, len(address), 8))
            found.append((parse_address(socket_text(packed)), int(peer_port, 16), port))
    return [each for each in found if not each[0].is_loopback][:500]


# ======================================================================================
# 20. nftables
#
# A grant is an element with a timeout in a set. With NFT_ACCEPT_CHAINS the sets and one rule stand
# in tables and chains of the host's firewall. With GUARD_PORTS they stand in a table of our own,
# whose rules close these ports to everybody without a grant: the guard. nft makes them once;
# netlink adds and removes elements. NAT has another table of our own, with maps from each client to
# where its connections lead.
# ======================================================================================

LAST_MOMENT = 0.05  # seconds: the kernel counts in ticks of up to 10 ms, and ends elements late
LOOKS = 5  # at a set, until no element of it ends while others are deleted
GUARD_TABLE = NftChain("inet", "spa", "guard")  # the table, and in it the chain that comes first
TRIAL_SET = "trial"  # in that table: the ports that a guard on trial still closes
DROP = "counter drop"  # the guard's last rule
TRIAL_DROP = f"meta l4proto . th dport @{TRIAL_SET} {DROP}"
NAT_TABLE = NftChain("inet", "spa_nat", "prerouting")
NAT_KINDS = (DNAT, SNAT, MASQUERADE)
ONCE_LABEL = 127  # the last connection label, which nobody else is likely to use
OWNER_HINT = "kill PID ends that server, kill -USR2 PID has it close all that is open"

# The chains of our own tables and their hooks. The guard's for prerouting comes after connection
# tracking (-200) and before destination NAT (-100), those of NAT just before the host's own.
OWN_CHAINS = {
    GUARD_TABLE: {"closed": "",
                  "guard": "{ type filter hook prerouting priority -110; policy accept; }",
                  "input": "{ type filter hook input priority -110; policy accept; }"},
    NAT_TABLE: {"prerouting": "{ type nat hook prerouting priority -101; policy accept; }",
                "postrouting": "{ type nat hook postrouting priority 99; policy accept; }"}}


def nft_family(version: int) -> str:
    """Return nft's name of an IP version."""
    return "ip" if version == 4 else "ip6"


class SetType(NamedTuple):
    """The type of a set or map: the doors that it holds, and the bytes of its elements."""

    version: int  # of IP
    prefix: int  # its length, of the source
    has_destination: bool
    kind: str = INPUT
    has_ports: bool = True  # protocol and port

    @property
    def name(self) -> str:
        """`spa4`, `spa6_56`, `spa4_to`, `spa4_24_once`, `spa4_dnat`, `spa4_forward_all`."""
        whole = 32 if self.version == 4 else 128
        parts = [f"spa{self.version}", "" if self.prefix == whole else str(self.prefix),
                 "to" if self.has_destination else "",
                 "" if self.kind == INPUT else self.kind.lower(), "" if self.has_ports else "all"]
        return "_".join(filter(None, parts))

    @property
    def has_target_port(self) -> bool:
        """Return whether a map's values have a port: where the key has none, every port stays."""
        return self.kind == DNAT and self.has_ports

    def creation(self, chain: NftChain) -> str:
        """Return the line that adds the set, or in the table for NAT the map, if it is missing."""
        address, what = f"ipv{self.version}_addr", "set"
        fields = " . ".join([address, address] if self.has_destination else [address])
        if self.has_ports:
            fields += " . inet_proto . inet_service"
        if chain == NAT_TABLE and self.kind != MASQUERADE:
            what = "map"
            fields += f" : {address} . inet_service" if self.has_target_port else f" : {address}"
        flags = "dynamic, timeout" if self.kind == ONCE else "timeout"
        return (f"add {what} {chain.family} {chain.table} {self.name} "
                f"{{ type {fields}; flags {flags}; }}")

    def match(self, lookup: str = "") -> str:
        """Return the match of a rule: packets in the set, or with lookup `map ` their value."""
        return f"{self.fields} {lookup}@{self.name}"

    @property
    def fields(self) -> str:
        """The fields of a packet that the set has."""
        header = nft_family(self.version)
        mask = ipaddress.ip_network(("0.0.0.0" if self.version == 4 else "::", self.prefix)).netmask
        whole = self.prefix == mask.max_prefixlen
        fields = [f"{header} saddr" if whole else f"{header} saddr & {mask}"]
        if self.has_destination:
            fields.append(f"{header} daddr")
        if self.has_ports:
            fields += ["meta l4proto", "th dport"]
        return " . ".join(fields)

    def nat_rule(self) -> str:
        """Return chain and rule in NAT's table. DNAT leaves alone what is only routed here."""
        if self.kind == MASQUERADE:
            return f"postrouting {self.match()} masquerade"
        where = "prerouting fib daddr type local" if self.kind == DNAT else "postrouting"
        return f"{where} {self.kind.lower()} {nft_family(self.version)} to {self.match('map ')}"

    def key(self, door: Door) -> bytes:
        """Return the key of a door's element: each field is filled up to 4 bytes."""
        key = door.source.network_address.packed
        if door.destination:
            key += door.destination.packed
        if self.has_ports:
            key += struct.pack(">B3xH2x", PROTOCOL_NUMBERS[door.protocol], door.port)
        return key

    def value(self, door: Door) -> bytes:
        """Return the value of a door's element in a map: its target."""
        if door.target is None:
            return b""
        port = struct.pack(">H2x", door.target_port) if self.has_target_port else b""
        return door.target.packed + port

    def door(self, key: bytes, value: bytes = b"") -> Optional[Door]:
        """Return the door of an element; None if we did not make the element."""
        size = 4 if self.version == 4 else 16
        addresses = 2 * size if self.has_destination else size
        if (len(key) != addresses + (8 if self.has_ports else 0)
                or len(value) not in (0, size + (4 if self.has_target_port else 0))):
            return None
        number, port = struct.unpack(">B3xH2x", key[addresses:]) if self.has_ports else (0, 0)
        protocol = {6: "tcp", 17: "udp"}.get(number) if self.has_ports else "*"
        if protocol is None:
            return None
        source = ipaddress.ip_network((key[:size], self.prefix), strict=False)
        destination = ipaddress.ip_address(key[size:addresses]) if self.has_destination else None
        target = ipaddress.ip_address(value[:size]) if value else None
        target_port = int.from_bytes(value[size:size + 2], "big")
        return Door(source, destination, protocol, port, self.kind, target, target_port)


def parse_set_name(name: str) -> Optional[SetType]:
    """Return the type of the set or map with this name; None if it is not ours."""
    head, *parts = name.split("_")
    if head not in ("spa4", "spa6"):
        return None
    prefix = parts[0] if parts and parts[0].isdecimal() else {"spa4": "32", "spa6": "128"}[head]
    kind = next((kind for kind in (ONCE, FORWARD) + NAT_KINDS if kind.lower() in parts), INPUT)
    set_type = SetType(int(head[3]), int(prefix), "to" in parts, kind, "all" not in parts)
    return set_type if set_type.name == name else None


def set_type_of(door: Door) -> SetType:
    """Return the type of the set that a door belongs to."""
    return SetType(door.source.version, door.source.prefixlen, door.destination is not None,
                   door.kind, bool(door.port))


class NftFirewall(Firewall):
    """Grants as elements of nftables sets."""

    quickly_intact = True
    keeps = True
    netlink: Netlink

    def __init__(self, program: str, accept: Tuple[NftChain, ...], guard_ports: FrozenSet[Port],
                 set_types: List[SetType], netlink: Netlink, log: Log,
                 forward: Tuple[NftChain, ...] = (), clocks: Clocks = CLOCKS) -> None:
        self.program, self.netlink, self.log = program, netlink, log
        self.accept, self.guard_ports = accept, guard_ports
        self.set_types, self.forward, self.clocks = set_types, forward, clocks
        self.host_chains = list(dict.fromkeys(accept + forward))
        # The guard's table and NAT's stand here for all their chains. The guard comes first.
        self.chains = self.host_chains[:]
        if any(set_type.kind in NAT_KINDS for set_type in set_types):
            self.chains.insert(0, NAT_TABLE)
        if guard_ports:
            self.chains.insert(0, GUARD_TABLE)
            self.guard_tables = frozenset([(NFT_FAMILIES["inet"], b"spa\0")])
        self.sets = [(chain, each) for chain in self.chains for each in self.set_types_in(chain)]
        self.identity = ("nft", program, self.chains)
        self.rules: Dict[NftChain, Dict[NftChain, List[str]]] = {}  # wanted, of each of `chains`

    def succeed(self, old: Firewall) -> None:
        """Go on with the old socket, which may own the guard's table."""
        super().succeed(old)
        if isinstance(old, NftFirewall):
            self.netlink.close()
            self.netlink = old.netlink

    def describe(self, door: Optional[Door] = None) -> str:
        """Return the chains that this door, or access, goes to."""
        chains = self.chains_for(door) if door is not None else [
            chain for chain in self.chains if chain == GUARD_TABLE or chain in self.accept]
        if door is not None and door.kind in (SNAT, MASQUERADE):
            chains = [chain._replace(chain="postrouting") for chain in chains]
        return ", ".join(map(" ".join, chains))

    def normalise(self, door: Door) -> Optional[Door]:
        """Return the door; None if it is forwarded, and the settings name no chain for that."""
        return door if door.kind != FORWARD or self.forward else None

    def set_types_in(self, chain: NftChain) -> List[SetType]:
        """Return the types of the sets that a chain, or a table of our own, has."""
        version = {"ip": 4, "ip6": 6}.get(chain.family)  # None: the family inet has both
        kinds = {GUARD_TABLE: (INPUT, ONCE, DNAT), NAT_TABLE: NAT_KINDS}.get(chain) or [
            kind for kind, chains in ((INPUT, self.accept), (ONCE, self.accept),
                                      (FORWARD, self.forward)) if chain in chains]
        return [each for each in self.set_types
                if each.kind in kinds and version in (None, each.version)]

    def prepare(self) -> None:
        """Make sets and rules anew. The guard comes first, in a transaction of its own: if a chain
        of the host's is missing, the guard stands nevertheless."""
        do_all(self.prepare_chain, [(chain,) for chain in self.chains])

    def wanted_rules(self, chain: NftChain) -> Dict[NftChain, List[str]]:
        """Return the rules that a chain, or each chain of our own table, has to have, in order."""
        set_types = self.set_types_in(chain)
        if chain not in OWN_CHAINS:
            return {chain: nft_accept_rules(set_types)}
        rules = [rule.partition(" ")[::2] for rule in (
            nft_guard_rules(self.guard_ports, set_types, self.trial) if chain == GUARD_TABLE else
            map(SetType.nat_rule, set_types))]
        return {chain._replace(chain=name): [rule for where, rule in rules if where == name]
                for name in OWN_CHAINS[chain]}

    def prepare_guard(self) -> None:
        """Make the guard's table alone."""
        self.rules.pop(GUARD_TABLE, None)  # after a trial they are others
        self.prepare_chain(GUARD_TABLE)

    def check_guard(self) -> None:
        """Let the kernel judge the guard's rules in a new table, which nft -c never keeps."""
        explain_owner(GUARD_TABLE)
        chains = [f"chain inet check {name} {hook}"
                  for name, hook in OWN_CHAINS[GUARD_TABLE].items()]
        rules = [f"rule inet check {rule}" for rule in nft_guard_rules(self.guard_ports, [], None)]
        self.run([f"add {each}" for each in ["table inet check", *chains, *rules]], "-c")

    def prepare_chain(self, chain: NftChain) -> None:
        """Make a table of our own, or sets and rules in a chain of the host's."""
        if chain not in self.rules:
            self.rules[chain] = self.wanted_rules(chain)
        lines = [each.creation(chain) for each in self.set_types_in(chain)]
        rules = [f'rule {" ".join(where)} {rule} comment "{tag(rule)}"'
                 for where, rules in self.rules[chain].items() for rule in rules]
        if chain not in OWN_CHAINS:
            lines += ["insert " + rule for rule in rules[::-1]]  # each goes before the last one
            try:
                self.run(self.rule_removal(chain) + lines)
            except CommandError as error:
                explain_failure(self.program, chain, chain in self.accept)
                raise CommandError(f"{error} (chain {' '.join(chain)})") from None
            return
        if chain == GUARD_TABLE and self.trial_left() < FOR_EVER:
            lines += trial_lines(self.guard_ports, self.trial_left())
        table = f"{chain.family} {chain.table}"
        for name, hook in OWN_CHAINS[chain].items():
            lines += [f"add chain {table} {name} {hook}", f"flush chain {table} {name}"]
        lines += ["add " + rule for rule in rules]
        try:
            self.fill_table(chain, lines)
        except CommandError:  # perhaps somebody's chain or set has the name of one of ours
            explain_owner(chain)
            self.run([f"delete table {table}", f"add table {table}"] + lines)

    def fill_table(self, chain: NftChain, lines: List[str]) -> None:
        """Let nft do all of `lines` in a table of our own, or nothing."""
        # On Linux 6.9 and later our socket then owns the guard's table, which outlives the server
        # (persistent) and which nft can't change. On an older kernel nobody owns it.
        persistent = 0
        if chain == GUARD_TABLE:
            self.netlink.release()
            with contextlib.suppress(CommandError):  # an older kernel, or a table made by one
                self.netlink.set_table(chain, TABLE_PERSIST)
            persistent = self.netlink.table_numbers(chain)[0] & TABLE_PERSIST
        if persistent:  # an nft that does not know `persist` refuses to add the table
            self.run(lines)
            self.netlink.set_table(chain, TABLE_OWNER | TABLE_PERSIST)
        else:
            self.run([f"add table {chain.family} {chain.table}"] + lines)

    def run(self, lines: List[str], *options: str) -> None:
        """Let nft do all of `lines`, or nothing, in the time that is left."""
        if lines:
            run_program([self.program, *options, "-f", "-"], "\n".join(lines) + "\n",
                        self.seconds_left())
            self.log.debug(f"nft '{'; '.join(lines)}'")

    def rule_removal(self, chain: NftChain) -> List[str]:
        """Return the lines that delete our rules in a chain of the host's."""
        return [f"delete rule {' '.join(chain)} handle {handle}"
                for handle, _ in self.our_rules(chain)]

    def our_rules(self, chain: NftChain) -> List[Tuple[int, str]]:
        """Return handle and tag of our rules; in the guard of all, as others could open ports."""
        return [(handle, tag_in(comment)) for handle, comment in self.netlink.rules(chain)
                if chain[:2] == GUARD_TABLE[:2] or COMMENT in comment]

    def intact(self) -> bool:
        """Return whether our tables are awake and all our rules stand."""
        return all(map(self.stands, self.chains))

    def mend_guard(self) -> bool:
        """Repair the guard if somebody changed it; return whether anything was wrong."""
        if not self.guard_ports or self.stands(GUARD_TABLE):
            return False
        self.prepare_chain(GUARD_TABLE)
        return True

    def stands(self, chain: NftChain) -> bool:
        """Return whether a chain, or a table of our own, has the wanted rules."""
        try:
            # As fill_table() leaves it: neither asleep, nor persistent and not owned.
            flags = self.netlink.table_numbers(chain)[0] if chain in OWN_CHAINS else 0
            if chain == GUARD_TABLE and 0 < self.trial_left() < FOR_EVER and len(
                    self.netlink.elements(*name_set(chain, TRIAL_SET))) < len(self.guard_ports):
                return False
            return flags in (0, TABLE_OWNER | TABLE_PERSIST) and all(
                [name for _, name in self.our_rules(where)] == list(map(tag, rules))
                for where, rules in self.rules[chain].items())
        except CommandError:
            return False

    def chains_for(self, door: Door) -> List[NftChain]:
        """Return the chains that have a set for this door."""
        wanted = set_type_of(door)
        return [chain for chain, set_type in self.sets if set_type == wanted]

    def add(self, grants: List[Grant], replaced: List[Grant]) -> None:
        """Add `grants` in one transaction, in place of `replaced`."""
        now = self.clocks.monotonic()
        before = {grant.door.match: grant.door for grant in replaced}
        messages = []
        for grant in grants:
            door, chains = grant.door, self.chains_for(grant.door)
            if not chains:
                raise CommandError(f"no nftables chain for IPv{door.source.version}")
            old, seconds = before.get(door.match, door), max(0.001, grant.ends - now)
            for chain in chains:
                # This sets the time on every kernel, whether or not the element was there. In a
                # map the element is first added with its old target, which `replaced` has.
                messages += [element_message(NEW_ELEMENT, chain, old),
                             element_message(DELETE_ELEMENT, chain, old),
                             element_message(NEW_ELEMENT, chain, door, seconds)]
        self.netlink.commit(messages)

    def remove(self, grants: List[Grant]) -> None:
        """Delete the elements of `grants`. The kernel itself ends those whose time has come."""
        now = self.clocks.monotonic()
        matches = {grant.door.match for grant in grants if grant.early or grant.ends > now}
        wanted = set(map(set_type_of, matches))
        do_all(self.delete, [(chain, set_type, matches) for chain, set_type in self.sets
                             if set_type in wanted])

    def delete(self, chain: NftChain, set_type: SetType, matches: Set[Door]) -> None:
        """Delete those elements of a set that are there, GRANTS_AT_ONCE in a transaction."""
        for looks_left in reversed(range(LOOKS)):
            there = [element_message(DELETE_ELEMENT, chain, door)
                     for door, _ in self.read_set(chain, set_type) if door.match in matches]
            try:
                for (block,) in blocks(there, GRANTS_AT_ONCE):
                    self.netlink.commit(block)
                return
            except CommandError as error:
                # A missing element aborts the transaction: if one has ended, look again.
                if error.number != errno.ENOENT or not looks_left:
                    raise

    def grants(self) -> List[Grant]:
        """Return the grants that every chain has. NAT's maps alone tell where doors lead."""
        found: Dict[Door, List[Tuple[Door, float]]] = {}
        for chain, set_type in self.sets:
            for door, seconds in self.read_set(chain, set_type):
                found.setdefault(door.match, []).append((door, seconds))
        now, wall = self.clocks.monotonic(), self.clocks.wall()
        grants = []
        for match, elements in found.items():
            seconds = min(seconds for _, seconds in elements)
            # In its last moment an element is none: the server may have logged its end already.
            if len(elements) == len(self.chains_for(match)) and LAST_MOMENT < seconds < FOR_EVER:
                grants.append(Grant(elements[-1][0], int(wall + seconds + 0.999), now + seconds))
        return grants

    def read_set(self, chain: NftChain, set_type: SetType) -> List[Tuple[Door, float]]:
        """Return the doors in a set, and their seconds left: FOR_EVER if nothing ends them."""
        doors = []
        for item in self.netlink.elements(*name_set(chain, set_type.name)):
            element = attributes(item)
            door = set_type.door(*[attributes(element.get(part, b"")).get(DATA_VALUE, b"")
                                   for part in (ELEMENT_KEY, ELEMENT_DATA)])
            left = element.get(ELEMENT_EXPIRATION)
            seconds = int.from_bytes(left[:8], "big") / 1000 if left else FOR_EVER
            if door is not None and seconds > 0:
                doors.append((door, seconds))
        return doors

    def listing(self) -> str:
        """Return the tables that our sets are in, as nft prints them."""
        tables = dict.fromkeys((chain.family, chain.table) for chain in self.chains)
        there = run_program([self.program, "list", "tables"]).splitlines()
        return "\n".join(run_program([self.program, "list", "table", family, table])
                         for family, table in tables if f"table {family} {table}" in there)

    def flush(self) -> None:
        """Empty all sets; the guard stays."""
        def empty(chain: NftChain, set_type: SetType) -> None:
            try:  # a message that names no element deletes all
                self.netlink.commit([(DELETE_ELEMENT, *name_set(chain, set_type.name))])
            except CommandError as error:
                if error.number != errno.ENOENT:  # the set is missing
                    raise

        do_all(empty, self.sets)

    def withdraw(self) -> None:
        """Remove NAT's table, and our rules and sets in the host's chains; the guard stays."""
        table = f"table {NAT_TABLE.family} {NAT_TABLE.table}"
        batches = [["add " + table, "delete " + table]] if NAT_TABLE in self.chains else []
        rules = {chain: self.rule_removal(chain) for chain in self.host_chains}
        batches += rules.values()
        # Chains of one table share its sets, so all rules go first.
        sets = {f"delete set {chain.family} {chain.table} {set_type.name}"
                for chain, set_type in self.sets if rules.get(chain)}
        batches += [[line] for line in sorted(sets)]
        do_all(self.run, [(lines,) for lines in batches])

    def guarded(self) -> bool:
        """Return whether the guard's table drops, whoever made it; False if nobody can tell."""
        with contextlib.suppress(CommandError):
            names = [name for _, name in self.our_rules(GUARD_TABLE._replace(chain="closed"))]
            return tag(DROP) in names or (tag(TRIAL_DROP) in names and bool(
                self.netlink.elements(*name_set(GUARD_TABLE, TRIAL_SET))))
        return False

    def unguard(self) -> None:
        """Remove the guard's table."""
        self.netlink.release()
        self.run([f"delete table {GUARD_TABLE.family} {GUARD_TABLE.table}"])


def nft_accept_rules(set_types: List[SetType]) -> List[str]:
    """Return the rules that accept what is in these sets.

    The first packet of a connection deletes an element of ONCE. A label lets the connection's next
    packets pass until it is established, and the first one pass a second chain.
    """
    once = [f"ct state new {each.match()} delete @{each.name} {{ {each.fields} }} "
            f"ct label set {ONCE_LABEL} accept" for each in set_types if each.kind == ONCE]
    once += [f"ct state new ct label {ONCE_LABEL} accept"] if once else []
    return once + [each.match() + " accept" for each in set_types if each.kind != ONCE]


def nft_guard_rules(guarded: FrozenSet[Port], set_types: List[SetType], trial: Optional[Trial]
                    ) -> List[str]:
    """Return the guard's rules: before destination NAT they drop packets without a grant.

    Only packets to this host: others are routed, and not ours to guard. Before the route is known,
    nft sees the routing table `local` alone. Other tables (policy routing, VRF) may deliver here
    as well: the hook for input drops that. NAT's packets have passed the guard when they come
    there. Established connections and loopback pass. The guard also accepts what NAT leads on,
    port for port: so no port is open here for a moment longer than it leads elsewhere.
    """
    ports = ", ".join(f"{protocol} . {port}" for protocol, port in sorted(guarded))
    rules = []
    for chain, passing in (("guard", "fib daddr type unicast"), ("input", "ct status dnat")):
        rules += [f"{chain} {rule}" for rule in (
            'iifname "lo" accept', "ct state established accept", f"{passing} accept",
            f"meta l4proto . th dport {{ {ports} }} goto closed")]
    rules += [f"closed {nft_family(peer.version)} saddr {peer} tcp sport {peer_port} "
              f"tcp dport {port} tcp flags & (syn | ack) != syn accept"
              for peer, peer_port, port in established_connections(guarded)]
    rules += [f"closed {rule}" for rule in nft_accept_rules(set_types)]
    if trial is not TRIAL_OVER:
        rules.append("closed " + (TRIAL_DROP if trial else DROP))
    return rules


def trial_lines(guarded: FrozenSet[Port], seconds_left: float) -> List[str]:
    """Return the lines that make the set with the ports that a guard on trial still closes."""
    name = f"{GUARD_TABLE.family} {GUARD_TABLE.table} {TRIAL_SET}"
    # Whole seconds: older programs know no milliseconds. An element that is there keeps its time.
    ports = ", ".join(f"{protocol} . {port} timeout {int(seconds_left) + 1}s"
                      for protocol, port in sorted(guarded))
    lines = [f"add set {name} {{ type inet_proto . inet_service; flags timeout; }}",
             f"flush set {name}"]
    return lines + [f"add element {name} {{ {ports} }}"] if seconds_left > 0 else lines


def explain_failure(program: str, chain: NftChain, accepts: bool) -> None:
    """Raise the CommandError of a chain that is missing, or whose owner alone can change it."""
    directive, name = "NFT_ACCEPT_CHAINS" if accepts else "NFT_FORWARD_CHAINS", " ".join(chain)
    try:
        run_program([program, "list", "chain"] + list(chain))
    except CommandError as error:
        if "No such file or directory" in str(error):
            raise CommandError(f"{directive}: there is no chain {name}",
                               hint="start after the service that makes it") from None
    explain_owner(chain)


def table_owner(chain: NftChain) -> str:
    """Return name and pid of the program that alone can change a table; nothing if all can."""
    flags = port = 0
    with contextlib.suppress(CommandError):  # a kernel without nf_tables
        flags, port = Netlink.open().table_numbers(chain)
    if not flags & TABLE_OWNER:
        return ""
    # Only the first netlink socket of a program has the pid as its port.
    rows = [line.split() for line in read_proc("net/netlink").splitlines()]
    sockets = [f"socket:[{row[9]}]" for row in rows
               if row[1:3] == [str(NETLINK_NETFILTER), str(port)]]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        directory = f"/proc/{pid}/fd/"
        with contextlib.suppress(OSError):  # the process has ended, or is another user's
            if any(os.readlink(directory + number) in sockets for number in os.listdir(directory)):
                return f"{read_proc(pid + '/comm')} (pid={pid})"
    return "another program"


def explain_owner(chain: NftChain) -> None:
    """Raise the CommandError of a table that another program keeps for itself, if one does."""
    owner = table_owner(chain)
    if owner:
        raise CommandError(f"table {chain.family} {chain.table} belongs to {owner}, "
                           "and nobody else can change it",
                           hint=OWNER_HINT if chain in OWN_CHAINS else
                           "let that open the port, and use GUARD_PORTS to close it")


def name_set(chain: NftChain, name: str) -> Tuple[int, bytes]:
    """Return the family and the attributes that name a set in a chain's table."""
    return NFT_FAMILIES[chain.family], (name_attribute(LIST_TABLE, chain.table)
                                        + name_attribute(LIST_SET, name))


def element_message(kind: int, chain: NftChain, door: Door, seconds: float = 0.0
                    ) -> Tuple[int, int, bytes]:
    """Return a message about a door's element of a set or map, which has a time or none."""
    set_type = set_type_of(door)
    element = attribute(NESTED | ELEMENT_KEY, attribute(DATA_VALUE, set_type.key(door)))
    if door.target and chain == NAT_TABLE:
        element += attribute(NESTED | ELEMENT_DATA, attribute(DATA_VALUE, set_type.value(door)))
    if seconds:
        element += attribute(ELEMENT_TIMEOUT, struct.pack(">Q", int(seconds * 1000)))
    items = attribute(NESTED | LIST_ELEMENTS, attribute(NESTED | LIST_ITEM, element))
    family, names = name_set(chain, set_type.name)
    return kind, family, names + items


# ======================================================================================
# 21. iptables
#
# A grant is a rule with fwknop's matches, chain and comment (tests/spec/fwknop.md 3.6), so that
# `iptables -S`, fwknopd and scripts understand it. A time match ends it in the kernel. In guard
# mode the chains are in the mangle table, which comes before destination NAT. Each kind of door
# has its chain. Rules for FORWARD do not match the inner address, those for SNAT not the client.
# ======================================================================================

MARK = "_exp_"  # and epoch seconds: fwknop's comment of a rule
CHAIN_PREFIX = "FWKNOP_"  # of the chains of fwknopd and of ours, unless a directive names others
GUARD_PREFIX = CHAIN_PREFIX + "GUARD"  # of the guard's chains, all in the table mangle
GUARDED_CHAIN, PROBE_CHAIN = "FWKNOP_GUARDED", "FWKNOP_PROBE"
GUARD_CHAINS = {"PREROUTING": "FWKNOP_GUARD", "INPUT": "FWKNOP_GUARD_INPUT"}  # jumped to from there
LAST_DATE = 2145916800  # 2038-01-01; xt_time's dates end in that year
GUARD_PASS = "-m conntrack --ctstate NEW"  # in the guard's rules for what NAT leads on
LINES_AT_ONCE = 1000  # grants in one iptables-restore: it ends in time on a slow machine too
SEARCHES = 10  # deletions by the rule's text: iptables-nft takes 15 ms for each in 5,000 rules
TARGET_OPTIONS = {DNAT: "--to-destination", SNAT: "--to-source"}
LEGACY_POLL_SECONDS = 5.0  # between two looks at the older iptables: nobody announces its changes
GUARD_POLL_SECONDS = 1.0  # between two looks whether the guard there is jumped to


class GrantChain(NamedTuple):
    """A chain that grants go to, and how their rules look there."""

    table: str
    name: str
    target: str
    outgoing: bool = False
    first: bool = False  # whether a new rule goes before the others
    kind: str = INPUT
    match: str = ""  # of all its rules
    from_chain: str = ""  # has the jump to this chain as its rule `position`, except to the guard's
    position: int = 1

    @property
    def is_primary(self) -> bool:
        """Return whether its rules are grants by themselves, not parts of another chain's."""
        return not (self.outgoing or self.match)


class Iptables:
    """The programs of one IP version, and the changes that they make."""

    def __init__(self, program: str, seconds_left: Callable[[], float] = lambda: PROGRAM_SECONDS,
                 changing: Callable[[int], None] = lambda port: None, family: int = 0) -> None:
        self.program, self.restore, self.family = program, program + "-restore", family
        self.seconds_left = seconds_left  # for the next program to run
        self.changing = changing  # gets the netlink port, a program's process id, before changes
        self.dated = True  # whether rules can end by themselves

    def run(self, arguments: List[str], text: str = "",
            started: Callable[[int], None] = lambda pid: None) -> str:
        """Run one of the programs, which waits for the xtables lock for most of its time."""
        seconds = self.seconds_left()
        waiting = ["-w", str(int(max(1, seconds - 0.2)))]
        return run_program(arguments + waiting, text, seconds, started)

    def list(self, table: str, *chain: str) -> List[str]:
        """Return the rules of a table, or of one chain in it, as `iptables -S` prints them."""
        return self.run([self.program, "-t", table, "-S"] + list(chain)).splitlines()

    def commit(self, changes: Dict[str, List[str]]) -> None:
        """Make the changes of each table, all of a table or none."""
        text = "".join("\n".join([f"*{table}", *lines, "COMMIT\n"])
                       for table, lines in changes.items() if lines)
        if text:
            self.run([self.restore, "-n"], text, self.changing)

    def delete(self, table: str, wanted: Callable[[str], bool]) -> None:
        """Delete the rules of a table that are `wanted`; many of nf_tables by their handles.

        iptables-nft would search its chain for each of them. The rules that it prints are those
        with these handles if the handles are the same before and after; CommandError if not.
        """
        netlink = Netlink.open() if self.family else None
        here = name_attribute(RULE_TABLE, table)

        def handles() -> List[Tuple[str, bytes]]:
            found = netlink.dump(GET_RULE, self.family, here) if netlink else []
            return sorted(((text_of(rule[RULE_CHAIN]), rule[RULE_HANDLE]) for rule in found
                           if text_of(rule[RULE_TABLE]) == table), key=lambda each: each[0])

        before = handles()
        lines = sorted((line for line in self.list(table) if line.startswith("-A ")),
                       key=lambda line: line.split(" ")[1])
        doomed = [number for number, line in enumerate(lines) if wanted(line)]
        if not netlink or len(doomed) <= SEARCHES:
            self.commit({table: ["-D" + lines[number][2:] for number in doomed]})
            return
        if before != handles() or [chain for chain, _ in before] != [
                line.split(" ")[1] for line in lines]:
            raise CommandError(f"somebody else changes the table {table}")
        self.changing(netlink.port)
        do_all(netlink.commit, blocks([
            (DELETE_RULE, self.family, here + name_attribute(RULE_CHAIN, before[number][0])
             + attribute(RULE_HANDLE, before[number][1])) for number in doomed], CHANGES_AT_ONCE))

    def remove_chains(self, table: str, from_chain: str, names: List[str]) -> None:
        """Remove chains, and the jumps to the first of them."""
        lines = self.list(table)
        present = [name for name in names if f"-N {name}" in lines]
        self.commit({table: ["-D" + line[2:] for line in jumps_to(names[0], from_chain, lines)]
                     + [f"-F {name}" for name in present]
                     + [f"-X {name}" for name in present]})

    def probe_time_match(self, table: str) -> bool:
        """Return whether the kernel has the time match; a chain that is gone at once shows it."""
        def probe(match: str) -> None:
            self.commit({table: [f":{PROBE_CHAIN} - [0:0]",
                                 f"-A {PROBE_CHAIN} {match}-j RETURN",
                                 f"-F {PROBE_CHAIN}", f"-X {PROBE_CHAIN}"]})
        try:
            probe("-m time --datestop 2000-01-01T00:00:00 ")
        except CommandError:
            probe("")  # fails as well if the match is not the reason
            self.dated = False
        return self.dated

    def ends_grants(self) -> bool:
        """Return whether the kernel ends grants by the time match; yes, if nobody can tell."""
        with contextlib.suppress(CommandError):
            self.probe_time_match("filter")
        return self.dated

    def rule(self, chain: GrantChain, grant: Grant) -> str:
        """Return the rule of a grant, as `iptables -S` prints it, without `-A CHAIN`."""
        door = grant.door
        peer, here = ("-d", "-s") if chain.outgoing else ("-s", "-d")
        sides = {peer: str(door.source)} if door.source.prefixlen else {}
        if door.destination is not None:
            sides[here] = f"{door.destination}/{door.destination.max_prefixlen}"
        parts = [f"{side} {sides[side]}" for side in ("-s", "-d") if side in sides]
        if door.port:
            port = "--sport" if chain.outgoing else "--dport"
            parts.append(f"-p {door.protocol} -m {door.protocol} {port} {door.port}")
        if chain.match:
            parts.append(chain.match)
        if self.dated:
            parts.append(match_until(grant.expires))
        parts.append(f"-m comment --comment {MARK}{grant.expires} -j {chain.target}")
        if door.target and chain.is_primary:
            parts.append(f"{TARGET_OPTIONS[door.kind]} {door.target_text()}")
        return " ".join(parts)


def parse_rule(line: str, chain: GrantChain) -> Optional[Tuple[Door, int]]:
    """Return door and expiry of a printed rule; None if it is no grant of this chain."""
    parts = line.split()
    if (parts[:2] != ["-A", chain.name] or "!" in parts
            or ("--ctstate" in parts) != bool(chain.match)):
        return None
    values = {option: value.strip('"') for option, value in zip(parts, parts[1:])}
    peer, here, port = ("-d", "-s", "--sport") if chain.outgoing else ("-s", "-d", "--dport")
    other, _, expires = values.get("--comment", "").partition(MARK)
    if other or not expires.isdigit():
        return None
    try:
        destination = ipaddress.ip_network(values[here]).network_address if here in values else None
        if peer not in values and chain.kind in (SNAT, MASQUERADE) and destination:
            values[peer] = str(any_source(destination.version))
        protocol, number = "*", 0
        if chain.kind == INPUT or "-p" in values:
            protocol, number = parse_port(f"{values.get('-p')}/{values.get(port)}")
        door = Door(ipaddress.ip_network(values[peer]), destination, protocol, number, chain.kind)
        if chain.kind in TARGET_OPTIONS and chain.is_primary:
            host, port = values[TARGET_OPTIONS[chain.kind]], "0"
            if chain.kind == DNAT and number:
                host, _, port = host.rpartition(":")
            door = door._replace(target=ipaddress.ip_address(host.strip("[]")),
                                 target_port=int(port))
        return door, int(expires)
    except (ValueError, KeyError):
        return None


def match_until(expires: float) -> str:
    """Return the match that ends a rule at this time: the kernel counts the date's second in."""
    last = time.gmtime(min(expires - 1, LAST_DATE))
    return "-m time --datestop " + time.strftime("%Y-%m-%dT%H:%M:%S", last)


def any_source(version: int) -> Network:
    """Return all addresses of an IP version."""
    return ipaddress.ip_network("0.0.0.0/0" if version == 4 else "::/0")


def jumps_to(name: str, from_chain: str, lines: List[str]) -> List[str]:
    """Return the lines of `iptables -S` that jump to a chain from another, whatever they match."""
    return [line for line in lines
            if line.startswith(f"-A {from_chain} ") and line.endswith(f" -j {name}")]


def iptables_guard_rules(guarded: FrozenSet[Port], trial: Optional[Trial], version: int
                         ) -> Dict[str, List[str]]:
    """Return the rules of the guard's chains: guarded ports go to a chain that ends in DROP."""
    # For IPv6 the match calls this host's own addresses UNICAST as well.
    routed = ("-m addrtype --dst-type UNICAST" if version == 4 else
              "! -d ff00::/8 -m addrtype ! --dst-type LOCAL,ANYCAST")
    older = [f"-s {peer} -p tcp -m tcp --sport {peer_port} --dport {port} ! --syn"
             for peer, peer_port, port in established_connections(guarded)
             if peer.version == version]
    rules = {GUARDED_CHAIN: [] if trial is TRIAL_OVER else [
        f"{match_until(trial.expires)} -j DROP" if trial else "-j DROP"]}
    # Two chains lead there, for the same reasons as in nft_guard_rules().
    for hook, passing in (("PREROUTING", routed), ("INPUT", "-m conntrack --ctstate DNAT")):
        matches = ["-i lo", "-m conntrack --ctstate ESTABLISHED", passing] + older
        rules[GUARD_CHAINS[hook]] = [f"{match} -j RETURN" for match in matches] + [
            f"-p {protocol} -m {protocol} --dport {port} -j {GUARDED_CHAIN}"
            for protocol, port in sorted(guarded)]
    return rules


class IptablesFirewall(Firewall):
    """Grants as rules of iptables and ip6tables."""

    keeps = True
    settled: Optional[bool] = False
    grants_at_once = LINES_AT_ONCE

    def __init__(self, programs: Dict[int, str], legacy: bool, access: List[GrantChain],
                 guard_ports: FrozenSet[Port], log: Log, clocks: Clocks = CLOCKS) -> None:
        self.access, self.guard_ports, self.log, self.clocks = access, guard_ports, log, clocks
        self.chains: List[GrantChain] = []
        if guard_ports:
            guarded = GrantChain("mangle", GUARDED_CHAIN, "RETURN", first=True)
            self.chains.append(guarded)
            if any(chain.kind == DNAT for chain in access):
                self.chains.append(guarded._replace(kind=DNAT, match=GUARD_PASS))
        self.chains += access
        self.tables = list(dict.fromkeys(chain.table for chain in self.chains))  # the guard's first
        self.programs = {
            version: Iptables(program, self.seconds_left, self.changes_through,
                              0 if legacy else NFT_FAMILIES[nft_family(version)])
            for version, program in programs.items()}
        self.identity = ("iptables", programs[4], self.chains)
        self.rules: Dict[int, Dict[str, List[str]]] = {}  # of the guard's chains, once prepared
        self.listed: Dict[Tuple[int, str], List[str]] = {}  # what intact() found right
        self.legacy = legacy
        self.poll_seconds = LEGACY_POLL_SECONDS if legacy else POLL_SECONDS
        self.tables_heard = frozenset((program.family, f"{table}\0".encode())
                                      for program in self.programs.values() if not legacy
                                      for table in self.tables)
        if guard_ports:
            self.guard_poll_seconds = GUARD_POLL_SECONDS if legacy else FOR_EVER
            self.guard_tables = frozenset(each for each in self.tables_heard
                                          if each[1] == b"mangle\0")

    def describe(self, door: Optional[Door] = None) -> str:
        """Return the chains that this door, or access, goes to."""
        return ", ".join(chain.name for chain in self.chains
                         if chain.kind == (door.kind if door else INPUT) and chain.is_primary)

    def prepare(self) -> None:
        """Make the chains and jumps that are missing, the guard's first; grants stay."""
        do_all(self.prepare_table, [(version, table) for table in self.tables
                                    for version in self.programs])
        for program in self.programs.values():
            if not program.probe_time_match(self.tables[0]):
                self.log.warning(f"{program.program} has no time match: what is open when this "
                                 "server is killed stays open; nftables would close it")

    def prepare_guard(self) -> None:
        """Make the guard's chains alone."""
        self.rules, self.listed = {}, {}  # after a trial they are others
        do_all(self.prepare_table, [(version, "mangle") for version in self.programs])

    def trial_left(self) -> float:
        """Return for how many seconds a trial goes on, by the wall clock as in the time match."""
        running = self.trial if self.guard_ports else None
        return running.expires - self.clocks.wall() if running else FOR_EVER

    def prepare_table(self, version: int, table: str) -> None:
        """Make what is missing in one table, and warn where the host's firewall drops nothing."""
        program = self.programs[version]
        lines = program.list(table)
        changes = self.missing(version, table, lines)
        access = [chain for chain in self.access if chain.table == table]
        drops = self.guard_ports or any(line.endswith(("-j DROP", "-j REJECT"))
                                        or "-j REJECT " in line for line in lines)
        for chain in access:
            if chain.kind == INPUT and not drops and f"-P {chain.from_chain} ACCEPT" in lines:
                self.log.warning(f"{chain.from_chain} drops nothing ({program.program}): "
                                 "without GUARD_PORTS no port is hidden")
        program.commit({table: changes})
        for line in ["-N " + each[1:-8] if each[0] == ":" else each for each in changes]:
            self.log.debug(f"{os.path.basename(program.program)} -t {table} {line}")
        for chain in access if version == 4 else []:  # once, not for IPv6 again
            self.log.debug(f"'{table}' table '{chain.name}' chain exists")
            if any(each[:2] == "-I" and each.endswith(f" -j {chain.name}") for each in changes):
                self.log.info(f"Added jump rule from chain: {chain.from_chain} "
                              f"to chain: {chain.name}")

    def missing(self, version: int, table: str, lines: List[str]) -> List[str]:
        """Return the changes that a table needs, by its lines; none where it is as it should be."""
        changes = self.guard_changes(version, lines) if (
            table == "mangle" and self.guard_ports) else []
        for chain in [each for each in self.access if each.table == table]:
            if f"-N {chain.name}" not in lines:
                changes.append(f":{chain.name} - [0:0]")
            jump = f"-j {chain.name}"
            if not chain.name.startswith(CHAIN_PREFIX):  # its name does not say whose it is
                jump = f"-m comment --comment {COMMENT} {jump}"
            if chain.kind == DNAT:  # not for what is only routed here
                jump = f"-m addrtype --dst-type LOCAL {jump}"
            present = jumps_to(chain.name, chain.from_chain, lines)
            wanted = f"-A {chain.from_chain} {jump}"
            if wanted not in [line.replace('"', "") for line in present]:
                rules = sum(line.startswith(f"-A {chain.from_chain} ") for line in lines)
                changes.append(f"-I {chain.from_chain} {min(chain.position, rules + 1)} {jump}")
            changes += ["-D" + line[2:] for line in present  # an older one
                        if chain.kind == DNAT and line.replace('"', "") != wanted]
        return changes

    def guard_changes(self, version: int, lines: List[str]) -> List[str]:
        """Return the changes that the guard needs. A chain that somebody changed is written anew,
        with the grants that it has."""
        if version not in self.rules:
            self.rules[version] = iptables_guard_rules(self.guard_ports, self.trial, version)
        changes = []
        for name, rules in self.rules[version].items():
            parts: Tuple[List[str], List[str]] = ([], [])  # others, grants
            for line in lines:
                if line.startswith(f"-A {name} "):
                    parts[line.startswith(f"-A {GUARDED_CHAIN} -s ") and MARK in line].append(line)
            others, grants = parts
            if f"-N {name}" not in lines or list(map(tag, rules)) != list(map(tag_in, others)):
                changes += [f":{name} - [0:0]"] + grants
                changes += [f"-A {name} -m comment --comment {tag(rule)} {rule}" for rule in rules]
        return changes + [f"-I {hook} 1 -j {name}" for hook, name in GUARD_CHAINS.items()
                          if f"-A {hook} -j {name}" not in lines]

    def mend_guard(self) -> bool:
        """Repair the guard if somebody changed it; return whether anything was wrong."""
        mended = []

        def mend(version: int, program: Iptables) -> None:
            # This runs every second for legacy tables, which thousands of grants make slow to read.
            # A flush takes the jump as well, so this reads the jump alone.
            jump = f"-A PREROUTING -j {GUARD_CHAINS['PREROUTING']}"
            if self.legacy and jump in program.list("mangle", "PREROUTING"):
                return
            changes = self.guard_changes(version, program.list("mangle"))
            program.commit({"mangle": changes})
            mended.extend(changes)

        do_all(mend, self.programs.items() if self.guard_ports else ())
        return bool(mended)

    def intact(self) -> bool:
        """Return whether no table needs a change."""
        before, self.listed = self.listed, {}
        with contextlib.suppress(CommandError):
            listed = {(version, table): program.list(table) for table in self.tables
                      for version, program in self.programs.items()}
            if listed == before or not any(self.missing(*key, lines)
                                           for key, lines in listed.items()):
                self.listed = listed
        self.settled = bool(self.settled) and self.listed == before
        return bool(self.listed)

    def changes_through(self, port: int) -> None:
        """Note the netlink port that will announce changes which we make."""
        self.own_ports.append(port)
        self.settled = False

    def chains_for(self, door: Door) -> List[GrantChain]:
        """Return the chains for doors of this kind, if there is a program for the IP version."""
        return [chain for chain in self.chains if chain.kind == door.kind
                and door.source.version in self.programs and self.normalise(door) == door]

    def normalise(self, door: Door) -> Optional[Door]:
        """Return the door with the addresses of its rule in fwknopd (tests/spec/fwknop.md 3.6)."""
        if door.kind == FORWARD:
            return door._replace(destination=None)
        if door.kind in (SNAT, MASQUERADE) and door.port:
            return door._replace(source=any_source(door.source.version))
        return door

    def change(self, added: List[Grant], deleted: List[Grant]) -> None:
        """Add and delete the rules of grants, those of a table all or none."""
        changes: Dict[Iptables, Dict[str, List[str]]] = {}
        for grant, new in [(each, True) for each in added] + [(each, False) for each in deleted]:
            for program, table, line in self.rule_changes(grant, new):
                changes.setdefault(program, {}).setdefault(table, []).append(line)
        do_all(Iptables.commit, changes.items())

    def rule_changes(self, grant: Grant, is_new: bool) -> Iterator[Tuple[Iptables, str, str]]:
        """Return program, table and line of each rule that a grant adds or deletes."""
        program = self.programs[grant.door.source.version]
        for chain in self.chains_for(grant.door):
            adding = f"-I {chain.name} 1" if chain.first else f"-A {chain.name}"
            yield program, chain.table, (f"{adding if is_new else '-D ' + chain.name} "
                                         f"{program.rule(chain, grant)}")

    def add(self, grants: List[Grant], replaced: List[Grant]) -> None:
        """Add the rules of `grants` in all tables or none, and delete those of `replaced`."""
        if not all(self.chains_for(grant.door) for grant in grants):
            raise CommandError("no program or chain to open it with")
        try:
            self.change(grants, replaced)
        except CommandError:  # a program that was killed may have done all of its work
            there = {(chain, door.match, expires) for chain, door, expires in self.grant_rules()}
            if there >= {(chain, grant.door.match, grant.expires) for grant in grants
                         for chain in self.chains_for(grant.door)}:
                return
            mine = {(grant.door.match, grant.expires) for grant in grants}
            self.delete_rules(lambda door, expires: (door.match, expires) in mine)
            raise

    def remove(self, grants: List[Grant]) -> None:
        """Delete the rules of `grants`, also if somebody deleted or changed one of them."""
        def remove_through(version: int) -> None:
            found = [grant for grant in grants if grant.door.source.version == version]
            if len(found) <= (LINES_AT_ONCE if self.legacy else SEARCHES):
                with contextlib.suppress(CommandError):
                    self.change([], found)
                    return
            matches = {grant.door.match for grant in found}
            self.delete_rules(lambda door, expires: door.match in matches, [version])

        do_all(remove_through, [(version,) for version in self.programs])

    def parse(self, table: str, line: str) -> Iterator[Tuple[GrantChain, Door, int]]:
        """Return chain, door and expiry of the grant in a line of `iptables -S`, if it has one."""
        for chain in self.chains:
            parsed = parse_rule(line, chain) if chain.table == table else None
            if parsed:
                yield (chain,) + parsed

    def grant_rules(self) -> List[Tuple[GrantChain, Door, int]]:
        """Return chain, door and expiry of every rule that is a grant, or a part of one."""
        return [rule for program in self.programs.values() for table in self.tables
                for line in program.list(table) for rule in self.parse(table, line)]

    def delete_rules(self, wanted: Callable[[Door, int], bool], versions: Iterable[int] = ()
                     ) -> None:
        """Delete rules that `wanted(door, expires)` selects, of these IP versions or else all."""
        def delete_in(version: int, table: str) -> None:
            self.programs[version].delete(table, lambda line: any(
                wanted(door, expires) for _, door, expires in self.parse(table, line)))

        do_all(delete_in, [(version, table) for version in versions or self.programs
                           for table in self.tables])

    def grants(self) -> List[Grant]:
        """Return the grants that the kernel has, also those that the time match has ended."""
        wall, now = self.clocks.wall(), self.clocks.monotonic()
        found: Dict[Door, int] = {}
        for chain, door, expires in self.grant_rules():
            if chain.is_primary:
                found[door] = min(expires, found.get(door, expires))
        return [Grant(door, expires, now + expires - wall) for door, expires in found.items()]

    def listing(self) -> str:
        """Return the tables that our chains are in, as iptables prints them."""
        return "\n".join(run_program([program.program, "-w", "-t", table, "-L", "-n", "-v",
                                      "--line-numbers"])
                         for program in self.programs.values() for table in self.tables)

    def flush(self) -> None:
        """Delete the rules of all grants, those of another fwknopd as well; the guard stays."""
        self.delete_rules(lambda door, expires: True)

    def withdraw(self) -> None:
        """Remove our chains from the host's tables; the guard stays."""
        do_all(Iptables.remove_chains, [(program, chain.table, chain.from_chain, [chain.name])
                                        for program in self.programs.values()
                                        for chain in self.access])

    def guarded(self) -> bool:
        """Return whether the guard's chain drops, whoever made it; False if nobody can tell."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.clocks.wall()))
        with contextlib.suppress(CommandError):
            return any(line.startswith(f"-A {GUARDED_CHAIN} ") and line.endswith("-j DROP")
                       and now <= (line.partition("--datestop ")[2] or now)
                       for program in self.programs.values() for line in program.list("mangle"))
        return False

    def unguard(self) -> None:
        """Remove the guard's chains."""
        do_all(Iptables.remove_chains, [
            (program, "mangle", hook, [GUARD_CHAINS[hook]] + more)
            for program in self.programs.values()
            for hook, more in (("INPUT", []), ("PREROUTING", [GUARDED_CHAIN]))])


# ======================================================================================
# 22. Choice of a firewall, and leftovers
#
# Which backend the settings mean, and what any backend has left in the kernel. All that we make
# carries a mark, its name or a rule's comment, so this program finds it without a configuration.
# ======================================================================================


def choose_firewall(settings: ServerSettings, stanzas: Optional[List[Stanza]], test: bool,
                    log: Log, clocks: Clocks = CLOCKS) -> Firewall:
    """Return the firewall that FIREWALL_TYPE and the other settings mean; ConfigError without one.

    If the stanzas are None, nobody could read them: nftables then has the sets that stand.
    FIREWALL_TYPE auto means the program FIREWALL_EXE. Without that it means nftables if
    NFT_ACCEPT_CHAINS or GUARD_PORTS ask for it, nft is there and IPT_INPUT_ACCESS is not set; else
    iptables. If the kernel does not end the grants of iptables, which a trial shows, it means
    nftables where that does all that is set.
    """
    if settings.firewall == "none" and settings.guard_ports:
        raise settings.error(ServerSettings.guard_ports,
                             "nothing guards them with FIREWALL_TYPE none")
    for stanza in stanzas or () if settings.firewall == "none" else ():
        for row in (Stanza.on_open, Stanza.on_close):
            stanza.require((not stanza.is_set(row), row, "a firewall, not FIREWALL_TYPE none"))
    if test or settings.firewall == "none":
        return Firewall("--test mode enabled, skipping firewall manipulation." if test else
                        "FIREWALL_TYPE none: nothing is opened", log, clocks)
    if not settings.guard_ports and stanzas is not None and all(
            stanza.cycle_open for stanza in stanzas):
        return Firewall("every stanza opens by CMD_CYCLE_OPEN", log, clocks)
    nft, iptables = firewall_programs(settings)
    if not nft and not iptables:
        raise ConfigError("there is no nft and no iptables program", install_hint())
    kind = settings.firewall
    if kind == "auto":
        own, chain_named = settings.firewall_program, settings.is_set(ServerSettings.input_access)
        wants_nft = (os.path.basename(own) == "nft" if own else not chain_named and (
            settings.nft_accept_chains or (settings.guard_ports and nft)))
        kind = "nft" if wants_nft else "iptables"
        if kind == "iptables" and nft and iptables and nft_suffices(settings) and not (
                Iptables(iptables).ends_grants()):
            kind = "nft"
            log.warning(f"{iptables} has no time match, so that it would leave doors open if this "
                        "server is killed; using nftables")
    for text in idle_directives(settings, kind):
        log.warning(text)
    if kind == "iptables":
        for stanza in stanzas or ():
            stanza.require((not stanza.one_connection, Stanza.one_connection,
                            "nftables: iptables can't end a grant when a connection uses it"))
        return iptables_firewall(settings, iptables, log, clocks)
    if not settings.guard_ports and not settings.nft_accept_chains:
        raise ConfigError("GUARD_PORTS: expected it, or NFT_ACCEPT_CHAINS, with nftables",
                          "GUARD_PORTS tcp/22 closes a port by a table of our own; "
                          "NFT_ACCEPT_CHAINS inet filter input (OpenWrt: inet fw4 input_wan) "
                          "opens what yours drops")
    if not nft:
        raise ConfigError("FIREWALL_TYPE: there is no nft program", install_hint())
    set_types = (standing_set_types() if stanzas is None else
                 {each for stanza in stanzas for each in stanza_set_types(settings, stanza)})
    set_types |= {SetType(4, 32, False), SetType(6, 128, False)}  # for --open
    return NftFirewall(nft, settings.nft_accept_chains, settings.guard_ports, sorted(set_types),
                       Netlink.open(), log, settings.nft_forward_chains if settings.nat else (),
                       clocks)


def start_trial(firewall: Firewall, seconds: int) -> None:
    """Let the kernel end the guard that `firewall` will make; ConfigError if it can't."""
    if not firewall.guard_ports:
        raise ConfigError("--trial: there is no guard to try",
                          "set GUARD_PORTS tcp/22, and leave --test out")
    for program in firewall.programs.values() if isinstance(firewall, IptablesFirewall) else ():
        if not program.probe_time_match("mangle"):
            raise ConfigError(f"--trial: {program.program} has no time match to end the guard with",
                              "install xt_time, or nftables")
    wall = firewall.clocks.wall()
    expires = int(wall + seconds + 0.999999)
    firewall.trial = Trial(expires, firewall.clocks.monotonic() + expires - wall)


def install_hint() -> str:
    """Return the command that installs nftables on this system."""
    known = ("apt install", "dnf install", "yum install", "zypper install", "apk add",
             "opkg install")
    return next((each for each in known if find_program(each.split()[0])), "install") + " nftables"


def nft_suffices(settings: ServerSettings) -> bool:
    """Return whether nftables can do all that is set, also what is set for iptables."""
    chains = [row for row in ServerSettings.rows() if row.name.startswith("IPT_")]
    return bool((settings.guard_ports or settings.nft_accept_chains)
                and not any(map(settings.is_set, chains)) and not settings.enable_output
                and (settings.nft_forward_chains or not settings.nat))


def idle_directives(settings: ServerSettings, kind: str) -> List[str]:
    """Return a warning for each directive that is set, and means nothing for this firewall."""
    rows: List[Tuple[Directive[Any], bool, str]] = [
        (ServerSettings.nft_accept_chains, kind == "nft", "with iptables"),
        (ServerSettings.nft_forward_chains, kind == "nft", "with iptables"),
        (ServerSettings.enable_output, kind == "iptables", "with nftables"),
        (ServerSettings.rule_prepend, kind == "iptables", "with nftables")]
    rows += [(row, settings.nat, "without ENABLE_IPT_FORWARDING") for row in (
        ServerSettings.snat, ServerSettings.snat_address, ServerSettings.nft_forward_chains)]
    return [f"{row.name} has no effect {where}" for row, used, where in rows
            if not used and getattr(settings, row.attribute)]


def stanza_set_types(settings: ServerSettings, stanza: Stanza) -> Iterator[SetType]:
    """Return the types of the sets for all doors that a stanza may open."""
    to = settings.destination_rule
    for version, prefix in ((4, stanza.prefix4), (6, stanza.prefix6)):
        yield SetType(version, prefix, to, ONCE if stanza.one_connection else INPUT)
        ports_or_all = (True, False) if stanza.forward_all else (True,)
        for ports in ports_or_all if settings.nat else ():
            yield SetType(version, prefix, to, DNAT, ports)
            for kind in (FORWARD, SNAT, MASQUERADE) if settings.snat else (FORWARD,):
                yield SetType(version, prefix, ports, kind, ports)


def standing_set_types() -> Set[SetType]:
    """Return the types of all sets of ours that nftables has."""
    names = [text_of(each[LIST_SET]) for number in NFT_FAMILIES.values()
             for each in Netlink.open().dump(GET_SET, number, b"")]
    return {set_type for set_type in map(parse_set_name, names) if set_type}


def firewall_programs(settings: ServerSettings) -> Tuple[Optional[str], Optional[str]]:
    """Return the paths of nft and iptables, None for a missing one; FIREWALL_EXE may be either."""
    own = settings.firewall_program or ""
    kind = os.path.basename(own)
    if own and ((kind != "nft" and "iptables" not in kind) or not find_program(own)):
        raise settings.error(ServerSettings.firewall_program, "expected an nft or iptables program")
    iptables = own if "iptables" in kind else find_program("iptables")
    if iptables and not find_program(iptables + "-restore"):
        iptables = None
    return own if kind == "nft" else find_program("nft"), iptables


def iptables_firewall(settings: ServerSettings, program: Optional[str], log: Log,
                      clocks: Clocks) -> IptablesFirewall:
    """Return the iptables firewall of the settings; this asks the program for its version."""
    if not program:
        raise ConfigError("FIREWALL_TYPE: there is no iptables program",
                          "on nftables, set GUARD_PORTS or NFT_ACCEPT_CHAINS")
    programs = {4: program}
    if os.path.exists("/proc/net/if_inet6"):
        directory, name = os.path.split(program)
        six = find_program(os.path.join(directory, name.replace("iptables", "ip6tables")))
        if six:
            programs[6] = six
        elif settings.guard_ports:
            raise ConfigError("GUARD_PORTS: there is no ip6tables to guard IPv6 with",
                              "install it, or nftables")
        else:
            log.warning("No ip6tables: nothing is opened for IPv6")
    access = []
    if not settings.guard_ports or settings.is_set(ServerSettings.input_access):
        access.append((INPUT, settings.input_access))
        if settings.enable_output:
            access.append((INPUT, settings.output_access))
    if settings.nat:
        access += [(FORWARD, settings.forward_access), (DNAT, settings.dnat_access)]
        if settings.snat:
            access += [(SNAT, settings.snat_access), (MASQUERADE, settings.masquerade_access)]
    return IptablesFirewall(programs, is_legacy(program), [
        GrantChain(row.table, row.chain, row.target, first=settings.rule_prepend, kind=kind,
                   outgoing=kind == INPUT and row.from_chain == "OUTPUT",
                   from_chain=row.from_chain, position=row.position) for kind, row in access],
        settings.guard_ports, log, clocks)


GRANTS, REST, GUARD = "grants", "rest", "guard"  # parts of ours; the rest is chains, sets, jumps
NOTHING_THERE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT)  # no nf_tables, or no such table
# What is left of ours in one table: a text about each piece, and a function to remove all.
Leftover = Tuple[List[str], Callable[[], None]]


class Rule(NamedTuple):
    """A rule of any backend: its chain, the one it leads to, its comment, and how to delete it."""

    chain: str
    target: str
    comment: str
    handle: Any


def our_part(firewall: str, table: str, chains: List[str], named: Set[str], rules: List[Rule],
             part: str) -> Tuple[List[Rule], List[str], List[str]]:
    """Find a part of ours in a table: rules to delete, chains to delete, and texts about both.

    A chain is ours by its name, by the comment of a jump to it, or if it has nothing but grants:
    the chains of a real fwknopd are among them.
    `chains` lacks those that the kernel begins with; `named` are those of the settings.
    """
    def marked(rule: Rule) -> bool:
        return rule.comment.partition(":")[0] == COMMENT

    with_others = {rule.chain for rule in rules if not rule.comment.startswith(MARK)}
    ours = {chain for chain in chains if chain.startswith(CHAIN_PREFIX) or chain in named}
    ours |= {rule.target for rule in rules if marked(rule)} & set(chains)
    ours |= {rule.chain for rule in rules if rule.chain not in with_others} & set(chains)
    guards = {chain for chain in ours if table == "mangle" and chain.startswith(GUARD_PREFIX)}
    gone = sorted({GRANTS: set(), REST: ours - guards, GUARD: guards}[part])
    found = [rule for rule in rules if rule.chain not in gone and (
        rule.target in gone or (part != GUARD and rule.comment.startswith(MARK))
        or (part == REST and marked(rule) and rule.chain not in guards))]
    counts = collections.Counter(rule.chain for rule in found)
    return found, gone, ([f"{count} of the rules in chain {firewall} {table} {chain}"
                          for chain, count in counts.items()]
                         + [f"chain {firewall} {table} {chain}" for chain in gone])


def nft_expressions(rule: Dict[int, bytes]) -> Iterator[Tuple[str, Dict[int, bytes]]]:
    """Return name and attributes of each expression of a rule that the kernel listed."""
    for _, item in attribute_list(rule.get(RULE_EXPRESSIONS, b"")):
        expression = attributes(item)
        yield (text_of(expression.get(EXPRESSION_NAME, b"")),
               attributes(expression.get(EXPRESSION_DATA, b"")))


def nft_rule(rule: Dict[int, bytes]) -> Rule:
    """Return a rule that the kernel listed; its target is the chain that a jump leads to."""
    # nft keeps a comment in the user data, and iptables-nft in a match of that name.
    data = rule.get(RULE_USERDATA, b"")
    comment, target = data[2:] if data[:1] == b"\0" else b"", b""
    for name, content in nft_expressions(rule):
        if name == "immediate":
            target = content.get(IMMEDIATE_DATA, b"")
            for kind in (DATA_VERDICT, VERDICT_CHAIN):
                target = attributes(target).get(kind, b"")
        elif name == "match" and content.get(MATCH_NAME) == b"comment\0":
            comment = content.get(MATCH_INFO, b"")
    return Rule(text_of(rule[RULE_CHAIN]), text_of(target), text_of(comment), rule[RULE_HANDLE])


def nft_leftovers(netlink: Netlink, named: Set[Tuple[str, str]], part: str) -> Iterator[Leftover]:
    """Find a part of ours in nf_tables, whatever program made it; to remove it needs no program."""
    for family, number in NFT_FAMILIES.items():
        dumps = {kind: netlink.dump(kind, number, b"")
                 for kind in (GET_TABLE, GET_CHAIN, GET_RULE, GET_SET)}
        for table in [each[TABLE_NAME] for each in dumps[GET_TABLE]]:
            listed = {kind: [each for each in dump if each[TABLE_NAME] == table]
                      for kind, dump in dumps.items()}
            texts, messages = nft_removal(netlink, family, table, listed, named, part)
            if messages:
                yield texts, partial(do_all, netlink.commit, blocks(messages, CHANGES_AT_ONCE))


def nft_removal(netlink: Netlink, family: str, table: bytes,
                listed: Dict[int, List[Dict[int, bytes]]], named: Set[Tuple[str, str]],
                part: str) -> Tuple[List[str], List[Tuple[int, int, bytes]]]:
    """Return texts about a part of ours in one table, and the messages that remove it."""
    number, here, name = NFT_FAMILIES[family], attribute(TABLE_NAME, table), text_of(table)
    own = {GUARD_TABLE[:2]: GUARD, NAT_TABLE[:2]: REST}.get((family, name))
    if own == part:
        return [f"table {family} {name}"], [(DELETE_TABLE, number, here)]
    rules, chains, texts = our_part(
        family, name,
        [text_of(each[CHAIN_NAME]) for each in listed[GET_CHAIN] if CHAIN_HOOK not in each],
        {chain for each, chain in named if each == name and family != "inet"},
        [nft_rule(each) for each in listed[GET_RULE] if not own], part)
    messages = [(DELETE_RULE, number, here + name_attribute(RULE_CHAIN, rule.chain)
                 + attribute(RULE_HANDLE, rule.handle)) for rule in rules]
    # Chains may jump to each other: first this deletes all their rules.
    for kind, where in ((DELETE_RULE, RULE_CHAIN), (DELETE_CHAIN, CHAIN_NAME)):
        messages += [(kind, number, here + name_attribute(where, chain)) for chain in chains]
    for each in listed[GET_SET] if part != GUARD else ():
        set_name = text_of(each[LIST_SET])
        if not parse_set_name(set_name):
            continue
        body = here + attribute(LIST_SET, each[LIST_SET])
        if not own and part == REST:
            messages.append((DELETE_SET, number, body))
            texts.append(f"set {family} {name} {set_name}")
            continue
        doors = netlink.elements(number, body)
        if doors:  # a message that names no element deletes all
            messages.append((DELETE_ELEMENT, number, body))
            texts.append(f"{len(doors)} doors of set {family} {name} {set_name}")
    return texts, messages


def is_legacy(program: str) -> bool:
    """Run an iptables program to ask whether it is the one from before nf_tables."""
    return "nf_tables" not in run_program([program, "-V"])


def find_iptables(settings: ServerSettings, name: str, legacy: bool) -> Optional[str]:
    """Return the older iptables or ip6tables, or the newer one, from FIREWALL_EXE or PATH."""
    own = (settings.firewall_program or "").replace("iptables", name)
    for each in (own, f"{name}-legacy" if legacy else f"{name}-nft", name):
        program = find_program(each) if "tables" in os.path.basename(each) else None
        with contextlib.suppress(CommandError):  # another one may work
            if program and is_legacy(program) == legacy:
                return program
    return None


def legacy_tables(settings: ServerSettings, only: str = "", log: Optional[Log] = None
                  ) -> Iterator[Tuple[Iptables, str]]:
    """Find the tables of the older iptables and ip6tables that stand, or `only` that of a name."""
    for name in ("iptables", "ip6tables"):
        # /proc lists them. To ask a program for any other table would make the table.
        listed = read_proc(f"net/{name.replace('tables', '_tables')}_names").split()
        tables = [table for table in listed if only in ("", table)]
        program = find_iptables(settings, name, legacy=True) if tables else None
        if program:
            yield from ((Iptables(program), table) for table in tables)
        elif tables and log:
            log.warning(f"No program shows the tables of an older {name}: nobody looked at "
                        + ", ".join(tables))


def legacy_leftovers(settings: ServerSettings, named: Set[Tuple[str, str]], part: str,
                     log: Log) -> Iterator[Leftover]:
    """Find a part of ours in tables of the older iptables."""
    for firewall, table in legacy_tables(settings, "mangle" if part == GUARD else "", log):
        lines = firewall.list(table)
        rules, chains, texts = our_part(
            os.path.basename(firewall.program), table,
            [line[3:] for line in lines if line.startswith("-N ")],
            {chain for each, chain in named if each == table},
            [iptables_rule(line) for line in lines if line.startswith("-A ")], part)
        if texts:
            yield texts, partial(firewall.commit, {table: [
                "-D" + rule.handle[2:] for rule in rules] + [
                    option + chain for option in ("-F ", "-X ") for chain in chains]})


def iptables_rule(line: str) -> Rule:
    """Return a rule that `iptables -S` printed."""
    parts = line.split()
    values = dict(zip(parts, parts[1:]))
    return Rule(parts[1], values.get("-j", values.get("-g", "")),
                values.get("--comment", "").strip('"'), line)


def leftovers(part: str, settings: ServerSettings, log: Log,
              netlink: Optional[Netlink] = None) -> List[Leftover]:
    """Find a part of ours in the kernel, whichever backend made it."""
    values = [getattr(settings, row.attribute) for row in ServerSettings.rows()]
    named = {(each.table, each.chain) for each in values if isinstance(each, IptablesChain)}
    found = []
    try:
        found = list(nft_leftovers(netlink or Netlink.open(), named, part))
    except CommandError as error:
        if error.number and error.number not in NOTHING_THERE:  # 0: the kernel has no netlink
            raise
    return found + list(legacy_leftovers(settings, named, part, log))


def remove_leftovers(part: str, settings: ServerSettings, log: Log,
                     netlink: Optional[Netlink] = None) -> List[str]:
    """Remove what leftovers() finds, and return texts about it. Log what can't be removed."""
    removed = []
    for texts, remove in leftovers(part, settings, log, netlink):
        try:
            remove()
            removed += texts
        except CommandError as error:
            log.error(f"{error}; left: {', '.join(texts)}")
    return removed


def flush_leftovers(settings: ServerSettings, firewall: Firewall, log: Log) -> None:
    """Remove the grants of earlier settings, and their table for NAT if `firewall` has none."""
    netlink = firewall.netlink  # it may own a table, which nobody else can change
    try:
        remove_leftovers(GRANTS, settings, log, netlink)
        if NAT_TABLE not in firewall.chains:
            (netlink or Netlink.open()).commit([(
                DELETE_TABLE, NFT_FAMILIES[NAT_TABLE.family],
                name_attribute(TABLE_NAME, NAT_TABLE.table))])
    except CommandError as error:
        if error.number not in NOTHING_THERE:
            log.warning(f"{error}; what earlier settings opened may be left")


# ======================================================================================
# 23. The host's rules
#
# Which rules of the host get in the way: this program only reads them. It follows a packet through
# the host's chains, and takes a test that it does not know for one that some packets pass.
# ======================================================================================

def is_untracked(rule: Dict[int, bytes]) -> bool:
    """Return whether a rule that the kernel listed turns connection tracking off."""
    return any(name == "notrack" or (name == "target" and (  # struct xt_ct_target_info
        target.get(MATCH_NAME) == b"NOTRACK\0" or (
            target.get(MATCH_NAME) == b"CT\0"
            and int.from_bytes(target.get(MATCH_INFO, b"")[:2], sys.byteorder) & 1)))
               for name, target in nft_expressions(rule))


HostTest = Tuple[str, List[str], bool]  # a field, its values, and whether it must have none of them
HostRule = Tuple[List[HostTest], str, str]  # tests, verdict, and the chain that a jump leads to
UNKNOWN = ("?", [""], False)  # a test that a packet may pass or not
# The fields of a packet, by the names that nft and iptables give them.
HOST_FIELDS = {name: field for field, names in (
    ("interface", "-i|iif|iifname"), ("state", "--ctstate|--state|ct state"),
    ("protocol", "-p|meta l4proto|ip protocol|ip6 nexthdr"), ("status", "ct status"),
    ("port", "--dport|--dports|th dport"), ("destination", "--dst-type|fib daddr type"))
               for name in names.split("|")}
HOST_TEST = rf"( !)? ({'|'.join(HOST_FIELDS)})( !=)? ({{[^}}]*}}|\S+)"
HOST_ENDS = (r" (-j|-g|jump|goto) (\S+).*"
             r"| (accept|drop|reject|return|queue|redirect|dnat(?= to| ip))\b.*")
HOST_EFFECTLESS = r" (counter packets \d+ bytes \d+|counter|-m \w+|log( level \w+)?)"
VERDICTS = {"accept": "accept", "drop": "drop", "reject": "drop", "return": "return",
            "dnat": "dnat", "redirect": "dnat", "queue": "queue", "nfqueue": "queue"}
HOST_HOOKS = {"filter": "INPUT", "nat": "PREROUTING"}  # of iptables' tables that matter here
SSH = frozenset([("tcp", 22)])  # stands for every port, where a stanza names none


class HostChain(NamedTuple):
    """A chain of the host that all packets to this host come through, or its NAT for them."""

    where: str  # `inet filter input`, `iptables-legacy filter INPUT`
    versions: Tuple[int, ...]  # of IP
    policy: str
    name: str
    rules: Dict[str, List[HostRule]]  # of this chain, and of those that it leads to
    interface: str = ""  # that packets from elsewhere come by, if that is known

    def verdicts(self, port: Port, state: str = "new") -> Set[str]:
        """Return what may become of a packet from elsewhere: accept, drop or dnat."""
        found = chain_verdicts(self.rules, self.name, {
            "protocol": port[0], "port": str(port[1]), "state": state, "destination": "local",
            "status": "", "interface": self.interface.lower()})
        return {self.policy if each == "next" else each for each in found}


def chain_verdicts(rules: Dict[str, List[HostRule]], name: str, packet: Dict[str, str]) -> Set[str]:
    """Return how a packet may leave a chain; `next` goes on behind it. A jump back ends there."""
    found: Set[str] = set()
    for tests, verdict, target in rules.get(name, ()):
        held = [holds(*test, packet) for test in tests]
        if False in held:
            continue
        met = {verdict} if verdict != "jump" else chain_verdicts(
            {**rules, name: []}, target, packet)
        found |= met - {"next"}
        if None not in held and "next" not in met:
            break
    else:
        found.add("next")
    return {"next" if each == "return" else each for each in found}


def holds(field: str, values: List[str], negated: bool, packet: Dict[str, str]) -> Optional[bool]:
    """Tell whether a packet passes a test; None if that depends on more than is known of it."""
    if field == "interface":
        known = packet[field]
        found = [value == known if value == "lo" or (
            known and value[:1] not in "@." and value[-1:] not in "*+") else None
                 for value in values]
    elif field not in packet:
        return None
    elif field == "port":
        pairs = [value.replace(":", "-").partition("-") for value in values]
        found = [int(low) <= int(packet[field]) <= int(high or low)
                 if low and (low + high).isdecimal() else None for low, _, high in pairs]
    else:
        found = [None if value[:1] in "@." else value == packet[field] for value in values]
    return not negated if True in found else None if None in found else negated


def host_rules(text: str, chains: Iterable[str]) -> List[HostRule]:
    """Return a rule as nft or iptables prints it; more than one if it has a map of verdicts. What
    is not understood becomes a test that a packet may pass or not."""
    import re
    if any(ours in text for ours in (MARK, COMMENT, " " + CHAIN_PREFIX)):
        return []  # a grant, or a jump to them
    text = re.sub(r' (comment|prefix) "[^"]*"| --(comment|log-prefix) ("[^"]*"|\S+)', "",
                  " " + text)
    mapped = re.match("(.*) vmap {(.*)}", text)
    if mapped:
        return [rule for each in mapped.group(2).split(",")
                for rule in host_rules(mapped.group(1) + each.replace(" :", ""), chains)]
    if " vmap " in text:  # a named one, whose verdicts stand elsewhere
        return [([UNKNOWN], "accept", "")]
    text = re.sub(r"(?<! with) (tcp|udp|icmp|icmpv6|esp|ah) (dport|sport|flags|type|code|spi)",
                  r" meta l4proto \1 th \2", text)
    tests = [(HOST_FIELDS[name], values.strip("{}").replace(" ", "").replace('"', "").lower()
              .split(","), bool(before or after))
             for before, name, after, values in re.findall(HOST_TEST, text)]
    text = re.sub(HOST_TEST, "", text)
    found = re.search(HOST_ENDS, text)
    if not found:
        return []
    how, target, name = found.groups()
    verdict = VERDICTS.get((name or target).lower(), "next")
    if verdict == "queue" or re.sub(HOST_EFFECTLESS, "", text[:found.start()]).strip():
        tests.append(UNKNOWN)
    if target not in chains:
        return [(tests, "accept" if verdict == "queue" else verdict, "")]
    return [(tests, "jump", target)] + ([(tests, "return", "")] if how in ("-g", "goto") else [])


def iptables_host_chain(firewall: Iptables, table: str, legacy: bool) -> HostChain:
    """Return the chain of a table of iptables that packets to this host come through."""
    lines, hook = firewall.list(table), HOST_HOOKS[table]
    rules: Dict[str, List[HostRule]] = {
        line.split()[1]: [] for line in lines if line.startswith(("-N ", "-P "))}
    for _, name, text in [(line + " ").split(" ", 2) for line in lines if line.startswith("-A ")]:
        rules[name] += host_rules(text, rules)
    owner = " of ufw" if any(each.startswith("ufw-") for each in rules) else ""
    version = 6 if "ip6" in os.path.basename(firewall.program) else 4
    return HostChain(f"{iptables_family(version, legacy)} {table} {hook}{owner}", (version,),
                     "drop" if f"-P {hook} DROP" in lines else "accept", hook, rules)


def iptables_family(version: int, legacy: bool) -> str:
    """Return what the tables of iptables are called here: the newer one's are also nft's."""
    return nft_family(version) + ("tables-legacy" if legacy else "")


def nft_host_chains(text: str) -> Iterator[HostChain]:
    """Find the chains in the output of `nft list ruleset`, but for those of our own tables."""
    tables: Dict[str, Dict[str, List[str]]] = {}
    table = chain = ""
    for fields in [line.split() for line in text.splitlines()]:
        if fields[:1] == ["table"]:
            table = " ".join(fields[1:3])
        elif fields[:1] == ["chain"] or fields == ["}"]:
            chain = "".join(fields[1:2])
        elif chain and fields and fields[0] != "comment":
            tables.setdefault(table, {}).setdefault(chain, []).append(" ".join(fields))
    for table, chains in tables.items():
        rules = {name: [rule for line in lines if not line.startswith("type ")
                        for rule in host_rules(line, chains)] for name, lines in chains.items()}
        versions = {"inet": (4, 6), "ip": (4,), "ip6": (6,)}.get(table.partition(" ")[0], ())
        for name, lines in chains.items():
            if table not in [" ".join(own[:2]) for own in OWN_CHAINS] and lines[0].startswith(
                    ("type filter hook input ", "type nat hook prerouting ")):
                yield HostChain(f"{table} {name}", versions,
                                "drop" if "policy drop" in lines[0] else "accept", name, rules)


def host_chains(settings: ServerSettings) -> List[HostChain]:
    """Read what every firewall of this host does with packets to it, without our rules."""
    nft = find_program("nft")
    text = run_program([nft, "-t", "list", "ruleset"]) if nft else ""  # -t: without sets' elements
    found = {chain.where: chain for chain in nft_host_chains(text)}
    for version in (4, 6):
        for table, hook in HOST_HOOKS.items():
            where = f"{nft_family(version)} {table} {hook}"  # nft does not print all of its matches
            program = (find_iptables(settings, nft_family(version) + "tables", legacy=False)
                       if where in found or not nft else None)
            if program:
                found[where] = iptables_host_chain(Iptables(program), table, legacy=False)
    older = [iptables_host_chain(program, table, legacy=True)
             for program, table in legacy_tables(settings) if table in HOST_HOOKS]
    return [chain._replace(interface=outside(settings)) for chain in [*found.values(), *older]]


def outside(settings: ServerSettings) -> str:
    """Return the interface that packets from elsewhere come by: PCAP_INTF, or the one of the
    default route (proc_net(5), /proc/net/route); "" if there is none."""
    routes = [line.split() for line in read_proc("net/route").splitlines()]
    default = [each[0] for each in routes if each[1:2] == ["00000000"] == each[7:8]]
    return settings.interface if settings.interface != "any" else (default + [""])[0]


def host_verdicts(chains: List[HostChain], version: int, port: Port, state: str = "new"
                  ) -> Set[str]:
    """Return what the host may do with a packet to this port: accept, drop or dnat."""
    found = [chain.verdicts(port, state) for chain in chains if version in chain.versions]
    together = set().union({"accept"}, *found)
    return {"drop"} if {"drop"} in found and "dnat" not in together else together


def closed_twice(settings: ServerSettings, firewall: Firewall, ports: Iterable[Port]
                 ) -> Iterator[str]:
    """Find ports that rules of the host close to everybody, where no grant of ours opens them."""
    chains = host_chains(settings)
    opened: List[str] = []  # the tables of the host that our grants go to
    if isinstance(firewall, NftFirewall):
        opened = [f"{each.family} {each.table} " for each in firewall.accept]
    elif isinstance(firewall, IptablesFirewall):
        opened = [f"{iptables_family(version, firewall.legacy)} {each.table} "
                  for version in firewall.programs for each in firewall.access
                  if each.kind == INPUT]
    closed: Dict[str, List[Port]] = {}
    for port in sorted(ports):
        # What NAT leads elsewhere, as Docker does, does not come in.
        led = {version for chain in chains if "dnat" in chain.verdicts(port)
               for version in chain.versions}
        where = [chain.where for chain in chains if not chain.where.startswith(tuple(opened))
                 and chain.verdicts(port) == {"drop"} and not led.issuperset(chain.versions)]
        if where:
            closed.setdefault(", ".join(where), []).append(port)
    for names, some in closed.items():
        by = f" to what comes by {outside(settings)}" if outside(settings) else ""
        yield (f"The host's own firewall ({names}) closes {port_list(some)} as well{by}, and no "
               "knock opens that: accept it there" + ("; the guard goes on hiding it" if
                                                      firewall.guard_ports else ""))


def obstacles(settings: ServerSettings, stanzas: List[Stanza], firewall: Firewall) -> Iterator[str]:
    """Find rules of the host that get in the way of grants, and that the backend does not see."""
    if firewall.guard_ports:
        chains = {f"{text_of(rule[RULE_TABLE])} {text_of(rule[RULE_CHAIN])}"
                  for rule in Netlink.open().dump(GET_RULE, 0, b"") if is_untracked(rule)}
        if any("NOTRACK" in line or "--notrack" in line for raw, table in legacy_tables(
                settings, "raw") for line in raw.list(table)):
            chains.add("raw of iptables-legacy")
        if chains:
            yield (f"Rules turn connection tracking off ({', '.join(sorted(chains))}): a connection"
                   " to a guarded port that they concern ends with its grant")
    yield from closed_twice(settings, firewall, settings.guard_ports or frozenset().union(
        *[stanza.open_ports or SSH for stanza in stanzas]))


# ======================================================================================
# 24. Grants
#
# The register of open doors. The kernel keeps one too, and ends each grant by itself. Ours closes
# grants that the kernel can't end, prolongs them, and puts back what somebody flushed.
# ======================================================================================

RETRY_SECONDS = 1.0  # between two tries: little for an open door, enough for a busy firewall
MAX_GRANTS = 10000  # for a stanza: twice a busy host's; each look at the firewall reads them all


def grant_commands(firewall: Firewall, grant: Grant, is_new: bool, now: float) -> List[str]:
    """Return the commands that would add or delete a grant at `now` (monotonic); none if it ends by
    itself. Behind them is the rule of a new grant as fwknopd's log has it."""
    door, seconds = grant.door, max(0, grant.ends - now)
    rule = [f"create_rule() Rule: '{fwknopd_rule(grant)}' added to {firewall.describe(door)}"
            ] if is_new else []
    if isinstance(firewall, IptablesFirewall):
        return [f"{os.path.basename(program.program)} -t {table} {line}"
                for program, table, line in firewall.rule_changes(grant, is_new)] + rule
    if not isinstance(firewall, NftFirewall) or not (is_new or grant.early or seconds):
        return []
    fields = [door.source.network_address] + ([door.destination] if door.destination else [])
    key = " . ".join(map(str, fields + ([door.protocol, door.port] if door.port else [])))
    verb, timeout = ("add", f" timeout {seconds:.0f}s") if is_new else ("delete", "")
    target = f" : {door.target}" + (f" . {door.target_port}" if door.target_port else "")
    return [f"nft {verb} element {chain.family} {chain.table} {set_type_of(door).name} "
            f"{{ {key}{timeout}{target if door.target and chain == NAT_TABLE else ''} }}"
            for chain in firewall.chains_for(door)] + rule


def fwknopd_rule(grant: Grant) -> str:
    """Return the rule of a grant in the order of fwknopd's arguments for iptables."""
    door = grant.door
    source, _, destination, _ = str(door).split(" ", 3)
    parts = ["-t nat" if door.kind in NAT_KINDS else "-t filter"]
    parts += [f"-p {PROTOCOL_NUMBERS[door.protocol]}"] if door.port else []
    by_target = bool(door.kind in (SNAT, MASQUERADE) and door.port)
    parts += [] if by_target else [f"-s {source}"]
    parts += [f"-d {destination}"] if by_target or door.destination or door.kind in (
        INPUT, ONCE, DNAT) else []
    parts += [f"--dport {door.port}"] if door.port else []
    parts.append(f"-m comment --comment {MARK}{grant.expires} -j "
                 + ("ACCEPT" if door.kind in (INPUT, ONCE, FORWARD) else door.kind))
    parts += [f"{TARGET_OPTIONS[door.kind]} {door.target_text()}"] if door.target else []
    return " ".join(parts)


class Grants:
    """The doors that are open now, and the firewall that has them open."""

    def __init__(self, firewall: Firewall, log: Log, clocks: Clocks = CLOCKS) -> None:
        self.firewall, self.log, self.clocks = firewall, log, clocks
        self.live: Dict[Door, Grant] = {}
        self.ends: List[Tuple[float, int, Grant]] = []  # a heap; also of grants prolonged since
        self.count = 0  # of all grants so far: the heap never has to compare two of them
        self.not_before = 0.0  # when to try a failed close again
        self.look_due = 0.0  # when a knock may make it look whether a connection ended a grant
        self.doubtful = False  # whether the firewall failed and may lack grants: restore() is due
        self.ended: Callable[[Door], None] = lambda door: None  # Access lets ON_CLOSE run

    def enter(self, grant: Grant) -> None:
        """Record a grant that the firewall has."""
        self.live[grant.door] = grant
        self.count += 1
        heapq.heappush(self.ends, (grant.ends, self.count, grant))
        if len(self.ends) > 2 * len(self.live) + MAX_GRANTS:  # a client may prolong one for hours
            self.ends = [each for each in self.ends if self.live.get(each[2].door) is each[2]]
            heapq.heapify(self.ends)

    def forget(self, door: Door) -> None:
        """Forget a door that is closed."""
        del self.live[door]
        self.ended(door)

    def adopt(self) -> None:
        """Go on with the grants that an earlier server left in the firewall."""
        for grant in self.firewall.grants():
            self.enter(grant)
            door, chain = grant.door, self.firewall.describe(grant.door)
            self.log.info(f"Found {door.rule_name} rule in {chain} for {door}, "
                          f"expires at {grant.expires}")

    def grant(self, doors: List[Door], seconds: int, stanza_number: int = 0) -> List[Door]:
        """Open all doors or none; return them as the firewall stores them.

        A door that is open already may stay so for longer, never less. A DNAT door replaces one of
        the same stanza with the same match and another target. Raise PacketRejected if that one is
        another stanza's, or if the stanza has too many doors open.
        """
        now = self.clocks.monotonic()
        ends, expires = now + seconds, int(self.clocks.wall() + seconds + 0.999999)
        doors = [door for door in map(self.firewall.normalise, doors) if door is not None]
        if not doors:
            raise CommandError("the settings name no chain to open anything in")
        if now >= self.look_due and any(door.kind == ONCE and door in self.live for door in doors):
            with self.firewall.within(PATIENCE):
                self.restore()  # forget what a connection has ended
            self.look_due = self.clocks.monotonic() + RETRY_SECONDS
        self.check_stanza(doors, stanza_number)
        known = {door: self.live[door].stanza_number for door in doors if door in self.live}
        opened = [Grant(door, expires, ends,
                        stanza_number if known.get(door, -1) < 0 else known[door])
                  for door in doors if door not in known or self.live[door].ends < ends
                  or door.kind == ONCE]  # a connection may have ended that one
        rivals = self.rivals([grant.door for grant in opened if grant.door.target])
        replaced = rivals + [self.live[grant.door] for grant in opened if grant.door in self.live]
        if opened:
            with self.firewall.within(PATIENCE):
                self.add_new(opened, replaced)
            self.show(opened, is_new=True)
        for grant in rivals:
            self.live.pop(grant.door, None)
        slow = self.clocks.monotonic() - now > LAST_MOMENT  # the kernel counts from the change on
        for grant in opened:
            self.enter(grant._replace(early=slow))
        if opened and self.clocks.monotonic() >= ends:
            raise CommandError(f"the firewall took longer than the {seconds} seconds to open for")
        for door in filter(self.firewall.describe, doors):  # none with -t
            chain, expires = self.firewall.describe(door), self.live[door].expires
            name, entrance = door.entrance(doors)
            done = f"{name} rule already exists in" if door in known else f"Added {name} rule to"
            self.log.info(f"{done} {chain} for {entrance}, expires at {expires}")
            for each in self.firewall.chains_for(door) if door not in known else ():
                if getattr(each, "outgoing", False):  # of ENABLE_IPT_OUTPUT
                    self.log.info(f"Added OUTPUT rule to {each.name} for {door}, "
                                  f"expires at {expires}")
        return doors

    def show(self, grants: List[Grant], is_new: bool) -> None:
        """Log, with VERBOSE, the commands that add or delete grants in the firewall."""
        for grant in grants if self.log.level >= DEBUG else ():
            for line in grant_commands(self.firewall, grant, is_new, self.clocks.monotonic()):
                self.log.debug(line)

    def keep_guard(self, doors: List[Door]) -> None:
        """Let a guard on trial stay if a knock has opened one of its ports."""
        ports = self.firewall.guard_ports & {(door.protocol, door.port) for door in doors
                                             if door.kind in (INPUT, ONCE)}
        if ports and 0 < self.firewall.trial_left() < FOR_EVER:
            self.end_trial(None, f"Trial: a knock has opened {port_list(ports)}: closed for good. ")

    def end_trial(self, trial: Optional[Trial], why: str = "") -> None:
        """Let a guard on trial stay (None), or leave it open until a new start (TRIAL_OVER)."""
        self.firewall.trial = trial
        try:
            with self.firewall.within(PATIENCE):
                self.firewall.prepare_guard()
        except CommandError:
            self.doubtful = True  # restore() is next: it tries again, and says why it can't
        self.log.warning(why + guard_text(self.firewall))

    def add_new(self, opened: List[Grant], replaced: List[Grant]) -> None:
        """Add grants in place of the `replaced` ones; if the firewall fails, try once more."""
        try:
            self.firewall.add(opened, replaced)
        except CommandError as error:
            self.log.warning(f"{error}; looking whether somebody changed the firewall")
            self.doubtful = True  # if the second try fails too, restore() puts back what it closed
            self.restore()
            if self.clocks.monotonic() >= opened[0].ends:
                raise
            self.firewall.remove(replaced)
            self.firewall.add(opened, [])
            self.doubtful = False

    def check_stanza(self, doors: List[Door], stanza_number: int) -> None:
        """Reject doors that lead another stanza's clients elsewhere, and too many doors."""
        # After a restart or reload the owner of a door is unknown, so its target can't be changed.
        for door in doors:
            for grant in self.live.values() if door.kind == DNAT else ():
                other = grant.door
                if (other.kind == DNAT and grant.stanza_number != stanza_number
                        and other.overlaps(door)
                        and (other.target, other.target_port) != (door.target, door.target_port)):
                    raise PacketRejected("NAT", f"{other} leads to {other.target_text()} already, "
                                         "by another stanza", "{stanza}{text}",
                                         "the port leads elsewhere already, by another stanza")
        new = sum(door not in self.live for door in doors)
        if len(self.live) + new <= MAX_GRANTS:
            return
        count = sum(grant.stanza_number == stanza_number for grant in self.live.values())
        if count + new > MAX_GRANTS:
            raise PacketRejected("grants", f"{count} doors of this stanza are open, and "
                                 f"{MAX_GRANTS} are the limit", "{stanza}{text}")

    def rivals(self, doors: List[Door]) -> List[Grant]:
        """Return the live grants with the match of one of `doors` and another target."""
        matches = {door.match for door in doors}
        return [grant for grant in self.live.values()
                if grant.door.target and grant.door not in doors
                and grant.door.match in matches] if doors else []

    def next_due(self) -> float:
        """Return when expire() is due, on the monotonic clock."""
        return max(self.ends[0][0], self.not_before) if self.ends else FOR_EVER

    def expire(self) -> None:
        """Close all grants whose time has come; try those again that can't be closed."""
        now = self.clocks.monotonic()
        if now < self.not_before:
            return
        ended = []
        while self.ends and self.ends[0][0] <= now:
            grant = heapq.heappop(self.ends)[2]
            if self.live.get(grant.door) is grant:
                ended.append(grant)
        if not ended:
            return
        try:
            with self.firewall.within(PATIENCE):
                self.firewall.remove(ended)
        except CommandError as error:
            self.log.error(f"{error}; trying to close {len(ended)} grants again")
            self.not_before = self.clocks.monotonic() + RETRY_SECONDS
            for grant in ended:
                self.enter(grant)
            return
        # Knocks waited meanwhile: half of the time is theirs, when grants end all the time.
        after = self.clocks.monotonic()
        self.not_before = after + min(after - now, RETRY_SECONDS)
        self.show(ended, is_new=False)
        for grant in ended:
            self.forget(grant.door)
            if self.firewall.describe(grant.door):
                self.log.info(f"Removed rule 1 from {self.firewall.describe(grant.door)} "
                              f"with expire time of {grant.expires} ({grant.door})")

    def close(self, ended: List[Grant]) -> None:
        """Close grants before their time; if that fails, expire() goes on trying."""
        now = self.clocks.monotonic()
        for grant in ended:
            self.enter(grant._replace(ends=now, early=True))
        self.not_before = 0.0
        self.expire()
        left = [str(grant.door) for grant in ended if grant.door in self.live]
        if left:
            raise CommandError("still open: " + ", ".join(left))

    def restore(self) -> bool:
        """Put back rules, then grants, that somebody removed; return whether none was missing."""
        if not self.firewall.keeps:
            return True
        intact = self.firewall.intact()
        if intact and self.firewall.settled:
            return True
        if not intact:
            self.log.warning("Somebody changed our rules in the firewall "
                             f"({self.firewall.describe()}); putting them back")
            self.firewall.prepare()
        present = {grant.door: grant for grant in self.firewall.grants()}
        for door in set(present) - set(self.live):
            # This server closes it in time as well. Whoever opened it may do so before.
            self.enter(present[door]._replace(stanza_number=-1))
        due = self.clocks.monotonic() + 0.5  # the kernel may have ended already what ends now
        lost = [grant for grant in self.live.values() if grant.door not in present
                and grant.ends > due and self.firewall.chains_for(grant.door)]
        for door in [grant.door for grant in lost
                     if grant.door.kind == ONCE or grant.stanza_number < 0]:
            # Nobody knows which of the two happened. To open it again might let somebody else in,
            # or the client whom another server has told to go.
            self.forget(door)
            self.log.info(f"{door} is closed: its one connection has come, or somebody flushed it")
        lost = [grant for grant in lost if grant.door in self.live]
        # Somebody else changes the firewall as well, so that this may take long; see grant().
        do_all(self.put_back, blocks([each._replace(early=True) for each in lost],
                                     self.firewall.grants_at_once))
        if lost:
            self.log.warning(f"Put back {len(lost)} grants that were gone from the firewall")
        if self.firewall.settled is not None:
            self.firewall.settled = intact and not lost
        return intact and not lost

    def put_back(self, lost: List[Grant]) -> None:
        """Add grants again. If the firewall refuses some of them, it gets them half by half."""
        try:
            self.firewall.add(lost, [])
        except CommandError:
            if len(lost) == 1:
                raise
            self.firewall.seconds_left()  # raises if no time is left
            do_all(self.put_back, blocks(lost, (len(lost) + 1) // 2))
        else:
            for grant in lost:
                self.enter(grant)

    def flush(self) -> None:
        """Close every grant, also those that this server does not know."""
        now = self.clocks.monotonic()
        ended, self.live, self.ends = list(self.live.values()), {}, []
        try:
            self.firewall.flush()
        except CommandError:  # some may still be open: expire() tries to close them again
            self.firewall.failed += 1
            with contextlib.suppress(CommandError):
                ended += self.firewall.grants()
            for grant in ended:
                self.enter(grant._replace(ends=now, early=True))
            raise
        for grant in ended:
            self.ended(grant.door)

    def count_open(self) -> int:
        """Return how many doors are open in the firewall."""
        return len(self.live) if self.firewall.keeps else 0

    def move(self, firewall: Firewall) -> None:
        """Go on in another firewall, which is prepared; close the grants that it can't hold."""
        old, self.firewall, firewall.failed = self.firewall, firewall, self.firewall.failed
        for grant in list(self.live.values()):
            # Another stanza may have its number now.
            self.enter(grant._replace(stanza_number=min(0, grant.stanza_number)))
        homeless = [grant for grant in self.live.values() if not firewall.chains_for(grant.door)]
        moved = old.identity != firewall.identity
        try:
            old.remove(list(self.live.values()) if moved else homeless)
            if moved:
                old.withdraw()
            if old.guard_ports and firewall.guard_ports and type(old) is not type(firewall):
                old.unguard()
            if moved:
                firewall.prepare()  # the two may have shared what the old one withdrew
        except CommandError as error:
            self.log.error(f"{error}; something of the old settings is left")
        if old.netlink and old.netlink is not firewall.netlink:  # else they share the socket
            old.netlink.close()
        for grant in homeless:
            self.forget(grant.door)
            self.log.warning(f"Closed {grant.door}: the new settings have no place for it")


OPENERS_BYTES = 65536  # some 800 grants: a smaller file is not worth tidying up


def openers_file(settings: ServerSettings) -> str:
    """Return the path of the file that says who opened each grant."""
    return os.path.join(os.path.dirname(settings.pid_file), "grants")


def grant_key(grant: Grant) -> str:
    """Return a text that identifies a grant: its door and its end."""
    return f"{grant.door.describe()} {MARK}{grant.expires}"


def find_opener(openers: Dict[str, str], grant: Grant) -> str:
    """Return who opened a grant, or "-". The end that a kernel tells may be a second off."""
    keys = [grant_key(grant._replace(expires=grant.expires + shift)) for shift in (0, 1, -1)]
    return next((openers[key] for key in keys if openers.get(key)), "-")


def grant_text(door: Door, seconds: float, opener: str) -> str:
    """Return a line about an open door, for the administrator."""
    return f"{door.describe()}, {int(max(0, seconds))} seconds left, {opener}"


def read_openers(path: str) -> Dict[str, str]:
    """Return who opened which grant; empty if no server has written the file."""
    try:
        with open(open_itself(path, os.O_RDONLY), encoding="ascii", errors="replace") as file:
            pairs = [line.rstrip("\n").partition("\t")[::2] for line in file]
    except OSError:
        return {}
    return dict(reversed(pairs))  # the first line counts: asking again makes nobody the opener


# ======================================================================================
# 25. Commands
#
# Programs that a packet may start: a client's (CMD_EXEC), or the administrator's own. These open
# and close in place of the firewall (CMD_CYCLE) or for a sequence (knockd's doors), or run beside
# the firewall (ON_OPEN, ON_CLOSE). The server never waits for one. No kernel closes what a command
# opened. So a dead man's switch is set first: a process that closes if this server is dead by then.
# ======================================================================================

COMMAND_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
MAX_RUNNING, MAX_CYCLES = 32, 100  # for a stanza: 30 ports of one packet run, 90 of three wait
MAX_NOTICES = 1000  # of a stanza that wait for others to end
MAX_OUTPUT, MAX_OUTPUT_LINES = 4096, 20  # of a command, in the log: an error message fits
GRACE_SECONDS = 2.0  # from SIGTERM to SIGKILL, for a shell's trap to clean up
STOP_SECONDS = 5.0  # stop() waits this long for commands; switches then close the rest
SWITCH_SECONDS = 2  # a switch fires this much later than the server, so the server comes first
TIME_IS_OVER, SHUT_DOWN, FLUSHED = "Timer expired", "Shutting down", "Flushing"  # why it closes
CLOSED_BY_HAND = "Closed by hand"

# Popen() waits until the program has started. A user who owns the program could delay that, by a
# lease of the file (fcntl(2)) or a file system of his own. So root's own shell starts first.
RUN = (b"/bin/sh", b"-c", b'exec "$@"', b"sh")

# The shell of a command that opens holds one end of a pipe as its input, and the switch waits at
# the other. So the time begins when the command has ended, even if this server is dead by then.
RUN_AT_PIPE = (b"/bin/sh", b"-c", b'"$@" </dev/null; exit $?', b"sh")

# Without a pipe `cat` ends at once. SIGTERM ends only the switch's cat or sleep: then the switch
# closes at once, as it has to when somebody ends all processes of the service.
SWITCH = (b"/bin/sh", b"-c",
          b'trap : HUP INT TERM; cat >/dev/null && sleep "$0"; exec "$@" </dev/null')


def close_and_open(closing: Command, opening: Command) -> Command:
    """Return the command that runs `closing` and then, even if that fails, `opening`."""
    count = len(closing.argv)
    first = b" ".join(b'"${%d}"' % number for number in range(1, count + 1))
    script = b'%s; shift %d; exec "$@"' % (first, count)
    return opening._replace(argv=(b"/bin/sh", b"-c", script, b"sh") + closing.argv + opening.argv)


def delayed(command: Command, seconds: int) -> Command:
    """Return a switch: the command that waits some seconds and then runs `command`."""
    return command._replace(argv=SWITCH + (b"%d" % seconds,) + command.argv)


def switched_command(pid: int) -> Tuple[int, Tuple[bytes, ...]]:
    """Return the uid and the command line that a switch will run; (0, ()) for other processes."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = tuple(file.read().split(b"\0")[:-1])
        owner = os.stat(f"/proc/{pid}").st_uid
    except OSError:  # it has ended
        return 0, ()
    return (owner, arguments[len(SWITCH) + 1:]) if arguments[:len(SWITCH)] == SWITCH else (0, ())


def launch(command: Command, output: int, outlives: bool = False,
           source: int = subprocess.DEVNULL) -> "subprocess.Popen[bytes]":
    """Start a program in a session of its own. Of this process it gets only output and `source`.

    One that `outlives` this server goes on without it. Raise CommandError if it can't be started.
    """
    def become() -> None:
        """In the child: reset signals and umask, then change groups and, last, the user."""
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        if outlives:  # nobody reads its output then
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.umask(0o022)
        if command.account is not None:
            os.setgroups(command.account.groups)
            os.setgid(command.account.gid)
            os.setuid(command.account.uid)

    environment = dict(COMMAND_ENVIRONMENT)
    if command.inherits:  # but no PATH to this directory, where another user may have put a `sleep`
        found = [each for each in os.environ.get("PATH", "").split(":") if each.startswith("/")]
        environment.update(os.environ, PATH=":".join(found) or environment["PATH"])
    try:
        return subprocess.Popen(
            command.argv, bufsize=0, stdin=source, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
            cwd=None if command.inherits else "/", env=environment,
            preexec_fn=become)  # noqa: PLW1509 -- it takes no lock that a thread could hold
    except OSError as error:  # Python 3.6 and 3.7 add the program to the text once more
        raise CommandError(f"{command}: {os.strerror(error.errno or 0)}") from None
    except (ValueError, subprocess.SubprocessError) as error:
        raise CommandError(f"{command}: {error}") from None


def end_group(popen: "subprocess.Popen[bytes]", number: int) -> None:
    """Send a signal to a program that has not ended, and to all that it has started."""
    with contextlib.suppress(OSError):  # sudo runs as root, and this server may run as a user
        if popen.poll() is None:
            os.killpg(popen.pid, number)


class Child:
    """A command of a cycle that runs, until `due` on the monotonic clock, and its output so far."""

    def __init__(self, cycle: "Cycle", command: Command, closes: bool, now: float,
                 popen: "subprocess.Popen[bytes]") -> None:
        self.cycle, self.command, self.closes, self.popen = cycle, command, closes, popen
        self.kind = cycle.closing_kind if closes else cycle.kind
        assert popen.stdout is not None
        self.output, self.printed = popen.stdout, b""
        limit = (cycle.limit + SWITCH_SECONDS if closes else FOR_EVER if cycle.waits else
                 cycle.limit)
        self.due, self.signal = now + limit, signal.SIGTERM  # the signal ends it then


class Cycle:
    """A command that opens, and one that closes after `seconds`; without argv if none has to.

    A command message and a notice (ON_OPEN, ON_CLOSE) are one that opens, with none that closes.
    `limit` is how many seconds each may run. `stanza_number` and `label` say whose they are.
    """

    # Templates of log lines: what runs, what will run, why it closes, and how a command ended.
    opening_line = ("{cycle.label}Running {cycle.kind} command: "
                    "{cycle.opening}{cycle.opening.runner}")
    waiting_line = ("{cycle.label}Running CMD_CYCLE_CLOSE command in {seconds} seconds: "
                    "{cycle.closing}")
    closing_lines: Tuple[str, ...] = (
        "[{cycle.door.source.network_address}] (stanza #{cycle.stanza_number}) {why}, running "
        "CMD_CYCLE_CLOSE command: {cycle.closing}{cycle.closing.runner}",)
    end_line = failure_line = "{label}{kind}: command returned {code}, pid_status: {code}"
    reasons: Dict[str, str] = {}  # other texts for `why`
    closing_kind = "CMD_CYCLE_CLOSE"  # begins the log lines of the command that closes
    waits = False  # whether `seconds` count from the end of the first command, which has no limit
    most_running, most_open = MAX_RUNNING, MAX_CYCLES  # of a stanza

    def __init__(self, kind: str, stanza_number: int, label: str, limit: int, seconds: int,
                 opening: Command, closing: Command = NO_COMMAND,
                 door: Optional[Door] = None, opener: str = "") -> None:
        self.door, self.opener = door, opener  # for --close
        self.kind, self.stanza_number, self.label, self.limit = kind, stanza_number, label, limit
        self.owner = kind.startswith("ON_"), stanza_number  # notices have a limit of their own
        if kind == "CMD_EXEC":
            self.opening_line = ("{cycle.label}Running command '{cycle.opening}'"
                                 "{cycle.opening.runner}")
        self.opening, self.closing, self.seconds = opening, closing, seconds
        self.key: Tuple[Any, ...] = (closing,)  # cycles that open the same have the same key
        self.ends = FOR_EVER  # until Commands.start_open()
        self.openings: List[Child] = []  # the last one, and earlier ones that still run
        self.switch: Optional["subprocess.Popen[bytes]"] = None
        self.retried = False  # whether the command that closes has failed once


class KnockdCycle(Cycle):
    """Start_Command and Stop_Command of a door in knockd.conf, with knockd's lines in the log.

    Some of these commands close by themselves, or leave programs running. The server reads on
    what such programs print, and no SIGPIPE ends them when the server has ended.
    """

    opening_line, waiting_line = "{cycle.kind}: running command: {cycle.texts[0]}", ""
    closing_lines = "{cycle.label}{why}", "{cycle.kind}: running command: {cycle.texts[1]}"
    end_line, failure_line = "", "{kind}: command returned non-zero status code ({code})"
    reasons = {TIME_IS_OVER: "command timeout", SHUT_DOWN: "shutting down", FLUSHED: "flushing"}
    waits = True
    most_running, most_open = 100, 1000  # of a door, which all its clients share

    def __init__(self, door: KnockdDoor, address: Address, limit: int) -> None:
        self.texts = door.commands(address)
        start, stop = [Command((b"/bin/sh", b"-c", text.encode("latin-1")) if text else (), None,
                               inherits=True) for text in self.texts]
        super().__init__(door.name, door.number, f"{address}: {door.name}: ", limit,
                         door.stop_seconds, start, stop,
                         Door(ipaddress.ip_network(str(address)), None, "*", 0), door.name)
        self.closing_kind = door.name
        self.key = door.number, address, stop


class Commands:
    """The commands that run, and those that will have to close."""

    def __init__(self, selector: selectors.BaseSelector, log: Log, test: bool,
                 clocks: Clocks = CLOCKS) -> None:
        self.selector, self.log, self.test, self.clocks = selector, log, test, clocks
        self.running: List[Child] = []
        self.survived: List[Child] = []  # ended, but a program that they started still prints
        self.cycles: Dict[Tuple[Any, ...], Cycle] = {}  # the open ones, by key
        self.switches: List["subprocess.Popen[bytes]"] = []  # about to end
        self.closing: List[Cycle] = []  # their close runs, or failed and will be tried again
        self.earlier: Optional[List[int]] = None  # pids of an earlier server's switches, once known
        self.notices: Dict[Tuple[bool, int], "collections.deque[Cycle]"] = {}  # to run, by owner

    def count_running(self, owner: Tuple[bool, int]) -> int:
        """Return how many commands of a stanza or a door run: its notices, or all others."""
        return sum(child.cycle.owner == owner for child in self.running)

    def check(self, cycles: List[Cycle]) -> None:
        """Raise CommandError if the stanza would exceed its limit. Prolonging does not count."""
        first = cycles[0]
        run = self.count_running(first.owner)
        wait = sum(cycle.owner == first.owner for cycle in self.cycles.values())
        new = {cycle.key for cycle in cycles if cycle.closing.argv} - set(self.cycles)
        if (run + sum(not self.lasts(cycle) for cycle in cycles) > first.most_running
                or wait + len(new) > first.most_open):
            owner = f"stanza #{first.stanza_number}" if first.stanza_number > 0 else first.kind
            raise CommandError(f"too many commands: {run} of {owner} run, and {wait} wait to close")

    def run(self, cycles: List[Cycle]) -> None:
        """Open all cycles; raise CommandError if they are too many or one can't be started."""
        self.check(cycles)
        for cycle in cycles:
            self.start_open(cycle)

    def notify(self, notice: Optional[Cycle]) -> None:
        """Let a notice, if there is one, run when the server has done what it is about."""
        if notice is None or not notice.opening.argv:
            return
        waiting = self.notices.setdefault(notice.owner, collections.deque())
        if len(waiting) < MAX_NOTICES:
            waiting.append(notice)
        else:
            self.log.warning(f"{notice.label}too many {notice.kind} commands wait; "
                             f"not running: {notice.opening}")

    def start_notices(self) -> None:
        """Start a notice of each stanza that may run one more: a turn has time for knocks, too."""
        for owner in [owner for owner in self.notices if self.count_running(owner) < MAX_RUNNING]:
            notice = self.notices[owner].popleft()
            if not self.notices[owner]:
                del self.notices[owner]
            try:
                self.start_open(notice)
            except CommandError as error:
                self.log.error(str(error))

    def lasts(self, cycle: Cycle) -> bool:
        """Return whether the same command has opened or will, and its switch has not closed."""
        known = self.cycles.get(cycle.key)
        return (known is not None and known.opening == cycle.opening
                and known.openings[-1].popen.poll() in (None, 0)
                and known.switch is not None and known.switch.poll() is None)

    def start(self, cycle: Cycle, command: Command, closes: bool,
              source: int = subprocess.DEVNULL) -> Child:
        """Start a command of a cycle; the loop then reads its output. CommandError if it can't."""
        shell = RUN if source == subprocess.DEVNULL else RUN_AT_PIPE
        popen = launch(command._replace(argv=shell + command.argv), subprocess.PIPE,
                       cycle.waits, source)
        child = Child(cycle, command, closes, self.clocks.monotonic(), popen)
        os.set_blocking(child.output.fileno(), False)
        self.running.append(child)
        self.selector.register(child.output, selectors.EVENT_READ, partial(self.read, child))
        return child

    def read(self, child: Child, last: bool = False) -> None:
        """Read what a command has printed, and keep as much as the log shows."""
        if child.output.closed:
            return
        text = child.output.read(65536)
        child.printed += (text or b"")[:MAX_OUTPUT + 1 - len(child.printed)]
        if text == b"" or last:
            self.selector.unregister(child.output)
            child.output.close()

    def report_end(self, child: Child) -> None:
        """Log the output and the end of a command that has ended, as its cycle's templates say."""
        self.running.remove(child)
        self.read(child, last=not child.cycle.waits)
        self.survived = [each for each in self.survived + [child] if not each.output.closed]
        if len(self.survived) > MAX_RUNNING:
            self.read(self.survived[0], last=True)
        lines = child.printed[:MAX_OUTPUT].decode("latin-1").splitlines()
        if len(child.printed) > MAX_OUTPUT or len(lines) > MAX_OUTPUT_LINES:
            lines[MAX_OUTPUT_LINES:] = ["(and more)"]
        for line in lines:
            self.log.info(f"{child.kind}: {line}")
        code = child.popen.returncode
        template = child.cycle.failure_line if code else child.cycle.end_line
        self.log.write(WARNING if code else INFO, template.format(
            label=child.cycle.label, kind=child.kind, code=code))
        if child.closes:
            self.end_close(child.cycle, code)
            return
        cycle = self.cycles.get(child.cycle.key)  # another object if somebody knocked again
        if cycle and cycle.ends == FOR_EVER and cycle.openings[-1] is child:
            cycle.ends = self.clocks.monotonic() + cycle.seconds

    def reap(self) -> None:
        """Report commands that have ended, end those that run too long, and close what is due."""
        now = self.clocks.monotonic()
        for child in self.running[:]:
            if child.popen.poll() is not None:
                self.report_end(child)
            elif now >= child.due:
                self.log.warning(f"{child.kind}: {child.command}: "
                                 "command runs for too long (CMD_EXEC_TIMEOUT)")
                end_group(child.popen, child.signal)
                child.signal, child.due = signal.SIGKILL, now + GRACE_SECONDS
        for cycle in [cycle for cycle in self.cycles.values() if now >= cycle.ends]:
            self.close(cycle, TIME_IS_OVER)
        self.start_notices()
        self.switches = [switch for switch in self.switches if switch.poll() is None]
        closing = {child.cycle for child in self.running if child.closes}
        self.closing = [cycle for cycle in self.closing
                        if cycle in closing or cycle.switch in self.switches]

    def start_open(self, cycle: Cycle) -> None:
        """Set the switch, and start the command that opens; CommandError if it can't be started."""
        if self.test:
            self.log.info(f"--test mode enabled, not running: {cycle.opening}")
            return
        if self.earlier is None and cycle.closing.argv:  # there is no switch of this server yet
            self.earlier = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
                            if switched_command(pid)[1]]
        # If `lasts`, only the close moves. To run the same command again could add a second rule,
        # and the close would delete one of the two.
        known, lasts, now = self.cycles.get(cycle.key), self.lasts(cycle), self.clocks.monotonic()
        if known and lasts and cycle.waits and known.openings[-1].popen.poll() is None:
            return  # its time has not begun
        if lasts or not cycle.waits:
            cycle.ends = now + cycle.seconds
        if known and known.ends != FOR_EVER:
            cycle.ends = max(cycle.ends, known.ends)
        seconds = cycle.seconds if cycle.ends == FOR_EVER else int(cycle.ends - now + 0.999)
        if known:
            cycle.openings = [each for each in known.openings if lasts or each.popen.poll() is None]
        waits = cycle.waits and cycle.closing.argv and not lasts
        pipe = os.pipe() if waits else (subprocess.DEVNULL, subprocess.DEVNULL)
        try:
            if cycle.closing.argv:
                self.set_switch(cycle, seconds + SWITCH_SECONDS, pipe[0])
            if not lasts:
                self.start_opening(cycle, pipe[1])
        finally:
            for end in pipe if waits else ():
                os.close(end)
        if known:
            self.end_switch(known)
        if cycle.closing.argv:
            self.cycles[cycle.key] = cycle
            self.log.info(cycle.waiting_line.format(cycle=cycle, seconds=seconds))

    def start_opening(self, cycle: Cycle, source: int) -> None:
        """Start the command that opens; CommandError if it can't be started."""
        opening, pending = cycle.opening, False
        try:
            # An earlier close that has not succeeded yet runs first, and its tries end: a later
            # one would close what opens now.
            if cycle.closing.argv and self.end_closing(cycle.closing):
                pending = True
                self.log.info(f"{cycle.kind}: the command that closes has not succeeded "
                              "yet, and is run first")
                opening = close_and_open(cycle.closing, opening)
            self.log.info(cycle.opening_line.format(cycle=cycle))
            cycle.openings.append(self.start(cycle, opening, False, source))
        except CommandError as error:
            if pending:
                self.closing.append(cycle)
                self.leave_to_switch(cycle, str(error))
            else:
                self.end_switch(cycle)
            raise

    def set_switch(self, cycle: Cycle, seconds: int, source: int = subprocess.DEVNULL) -> None:
        """Give a cycle a switch, in place of the one that it may have."""
        switch = launch(delayed(cycle.closing, seconds), subprocess.DEVNULL, source=source)
        self.end_switch(cycle)
        cycle.switch = switch

    def end_switch(self, cycle: Cycle) -> None:
        """End the switch of a cycle, if it has one; reap() waits for its end."""
        if cycle.switch is not None:
            end_group(cycle.switch, signal.SIGKILL)
            self.switches.append(cycle.switch)
            cycle.switch = None

    def end_closing(self, closing: Command) -> bool:
        """End the tries of a close that is not done and its switch; return whether any was left."""
        cycles = [cycle for cycle in self.closing if cycle.closing == closing]
        self.closing = [cycle for cycle in self.closing if cycle not in cycles]
        for cycle in cycles:
            self.end_switch(cycle)
        for child in self.running:
            if child.closes and child.cycle in cycles:
                end_group(child.popen, signal.SIGKILL)
        # The command line identifies those that an earlier server has left.
        uid = os.geteuid() if closing.account is None else closing.account.uid
        earlier = self.earlier or []
        pids = [pid for pid in earlier if switched_command(pid) == (uid, closing.argv)]
        self.earlier = [pid for pid in earlier if pid not in pids]
        for pid in pids:
            with contextlib.suppress(OSError):  # it has just ended, or is no leader, so no switch
                os.killpg(pid, signal.SIGKILL)
        return bool(cycles or pids)

    def close(self, cycle: Cycle, why: str) -> None:
        """Start the command that closes, even if the other failed: half its work may be done."""
        del self.cycles[cycle.key]
        for child in cycle.openings:
            end_group(child.popen, signal.SIGKILL)  # or it might open after this
        for template in cycle.closing_lines:
            self.log.info(template.format(cycle=cycle, why=cycle.reasons.get(why, why)))
        code = cycle.switch.poll() if cycle.switch else None
        if code is not None and code >= 0:  # this server was late, or somebody ended the sleep
            self.log.warning(f"{cycle.closing_kind}: its switch has run the command, "
                             f"which returned {code}")
        if code != 0:
            self.closing.append(cycle)
            self.start_close(cycle, cycle.closing)

    def start_close(self, cycle: Cycle, command: Command) -> None:
        """Start the command that closes a cycle; if it can't be started, the switch will."""
        try:  # the switch stays until the command has closed, and waits as long as that may take
            self.set_switch(cycle, int(cycle.limit + GRACE_SECONDS) + 2 * SWITCH_SECONDS)
            self.start(cycle, command, closes=True)
        except CommandError as error:
            self.leave_to_switch(cycle, str(error))

    def leave_to_switch(self, cycle: Cycle, why: str) -> None:
        """Let the switch close; it goes on when this server ends."""
        self.log.error(f"{why}; its switch tries it again")
        if cycle.switch is not None:
            self.switches.append(cycle.switch)

    def end_close(self, cycle: Cycle, code: int) -> None:
        """End the switch of a cycle that is closed. Try a failed close again, and then leave it."""
        if cycle not in self.closing:  # somebody opened the same again, and that ended it
            return
        if code == 0:
            self.closing.remove(cycle)
            self.end_switch(cycle)
        elif cycle.retried:
            self.leave_to_switch(cycle, f"{cycle.label}{cycle.closing} has failed twice")
        else:  # this try, and the switch as the third, go on when this server ends
            cycle.retried = True
            self.start_close(cycle, delayed(cycle.closing, SWITCH_SECONDS))

    def next_due(self) -> float:
        """Return when reap() is due, on the monotonic clock."""
        return min([child.due for child in self.running]
                   + [cycle.ends for cycle in self.cycles.values()]
                   + [0.0 for owner in self.notices if self.count_running(owner) < MAX_RUNNING],
                   default=FOR_EVER)

    def close_all(self, why: str) -> None:
        """Start to close all cycles now."""
        for cycle in list(self.cycles.values()):
            self.close(cycle, why)

    def stop(self) -> None:
        """Close all cycles now, and wait up to STOP_SECONDS for commands that run or are to run."""
        end = self.clocks.monotonic() + STOP_SECONDS
        self.close_all(SHUT_DOWN)
        while (self.running or self.notices) and self.clocks.monotonic() < end:
            time.sleep(0.01 if self.next_due() else 0)
            for child in self.running:
                self.read(child)
            self.reap()
        if self.notices:
            self.log.warning(f"{sum(map(len, self.notices.values()))} ON_OPEN and ON_CLOSE "
                             "commands had no time left to run")


# ======================================================================================
# 26. Configuration
#
# All settings together: where the server listens, and its lines about start and stop.
# ======================================================================================


class Configuration(NamedTuple):
    """The settings, stanzas and doors of all files."""

    settings: ServerSettings
    stanzas: List[Stanza]
    warnings: List[str]
    knockd: Optional[KnockdFile] = None
    four_only: bool = False  # whether knocks count in IPv4 only
    test: bool = False  # whether packets are only judged and logged
    ospa_key: Optional[RsaKey] = None  # where a stanza has OPENSPA_CLIENTS

    @property
    def is_knockd(self) -> bool:
        """Return whether it only serves a knockd.conf; then the log has knockd's lines alone."""
        return self.knockd is not None and not self.stanzas

    def words(self, fwknopd: str, knockd: str = "") -> str:
        """Return fwknopd's text; if it only serves a knockd.conf, knockd's, or nothing."""
        return knockd if self.is_knockd else fwknopd

    def listenings(self) -> List[Listening]:
        """Return the sequences of stanzas and of knockd's doors, and where to listen for them."""
        sequences = [stanza.sequence for stanza in self.stanzas if stanza.sequence]
        found: List[Listening] = [((self.settings.interface,), sequences)]
        if self.knockd:
            sequences = [door.sequence for door in self.knockd.doors]
            found.append((self.knockd.options.interfaces, sequences))
        return [each for each in found if each[1]]

    @property
    def takes_packets(self) -> bool:
        """Return whether a stanza opens by packets."""
        return any(stanza.takes_packets for stanza in self.stanzas)

    @property
    def needs_memory(self) -> bool:
        """Return whether there are packets or OpenSPA requests to remember."""
        return self.takes_packets or self.ospa_key is not None

    @property
    def answers(self) -> bool:
        """Return whether a stanza has ANSWER."""
        return any(stanza.answer for stanza in self.stanzas)

    def answer_ports(self, captures: Iterable[Capture]) -> Set[int]:
        """Return the UDP ports at which packets and OpenSPA requests are answered."""
        found: Set[int] = set()
        for each in captures:
            if isinstance(each, (OspaCapture, OspaUdpCapture)):
                found.add(self.settings.ospa_port)
            elif self.answers and type(each) in (PacketCapture, UdpCapture):
                found.add(getattr(each, "port", self.settings.packet_port))
        return found

    def choose_firewall(self, log: Log, clocks: Clocks = CLOCKS) -> Firewall:
        """Return the firewall that the settings mean; ConfigError without one."""
        return choose_firewall(self.settings, self.stanzas, self.test, log, clocks)

    def open_captures(self, log: Log, current: Iterable[Capture] = (),
                      same: bool = False) -> List[Capture]:
        """Open sockets or a file to read from; if `same`, packets come by those of `current`."""
        captures = [each for each in current if same and not isinstance(
            each, (KnockCapture, OspaCapture, OspaUdpCapture))]
        try:
            if self.takes_packets and not same:
                open_captures(self.settings, log, current, captures)
            if not self.settings.capture_file:
                open_knock_captures(self.listenings(), self.four_only, log, captures)
                if self.ospa_key:
                    open_ospa_captures(self.settings, self.ospa_key, log, current, captures)
            elif self.ospa_key or self.listenings():
                log.warning("PCAP_FILE: no knock sequence and no OpenSPA is heard in a file")
        except SpaError:
            close_captures(captures, current)
            raise
        return captures

    def voids(self) -> List[str]:
        """Return a line about each stanza that opens nothing, and why."""
        return [f"(stanza #{stanza.number}) {stanza.void}; this stanza opens nothing"
                for stanza in self.stanzas if stanza.void]

    def tell(self, log: Log) -> None:
        """Log the void stanzas and the warnings."""
        for text in self.voids():
            log.error(text)
        for text in dict.fromkeys(self.warnings):
            log.warning(text)
        for line in self.dump() if self.settings.verbose > 1 else ():
            log.debug(line)

    def dump(self) -> Iterator[str]:
        """Yield the lines of the configuration in force, as fwknopd -D prints them."""
        yield "Current fwknopd config settings:"
        for number, (row, text) in enumerate(self.settings.dump()):
            yield f"{number:3}. {row.name:<28} =  '{text}'"
        yield from ("", "Current fwknopd access settings:")
        for stanza in self.stanzas:
            (row, text), *others = stanza.dump()
            yield from (f"{row.name} ({stanza.number}):  {text}", "=" * 62)
            for row, text in others:
                words = {"Y": "Yes", "N": "No"} if isinstance(row, Flag) else {}
                yield f"{row.name:>27}:  {words.get(text[:1].upper(), text)}"
            yield ""
        if self.knockd:
            yield from ("Current knockd.conf settings:", *self.knockd.dump())


# ======================================================================================
# 27. Access
#
# From a request to what it changes: judge it (section 11), then open doors (section 24) or run
# commands (section 25), and tell the log, the counters and --fw-list. Packets, knock sequences,
# --open and --close all end here.
# ======================================================================================


# All verdicts. METRICS_FILE has no others, although digest.cache may name other reasons.
REASONS = """\
accepted, length, not an SPA packet, source, wrong HMAC, wrong key, encryption type, malformed,
replay, stale, from the future, before memory, forgotten, no knock, knock, user, no address,
other address, family, ports, no time, NAT, command, expired stanza, grants, firewall, HTTP,
X-Forwarded-For, gpg decryption, gpg signature, gpg signer, gpg too fast, gpg failed,
OpenSPA length, OpenSPA header, OpenSPA ADK, OpenSPA too fast, OpenSPA decryption,
OpenSPA signature, protocol, target, untried, error""".replace(",\n", ", ").split(", ")
MOST_KNOWN = 1000  # networks that Tally remembers
NO_ACCESS = "No access data found for source IP: "


class Tally:
    """Counts of packets and knocks by what became of them, and a line for each rejection."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.counts: Dict[str, int] = collections.defaultdict(int)
        self.sequences = 0  # knock sequences that were completed
        # Where packets came from that opened or ran something, the latest last: an IPv4 address, or
        # the /64 of an IPv6 one.
        self.known: "collections.OrderedDict[bytes, None]" = collections.OrderedDict()

    def accept(self, datagram: Datagram) -> None:
        """Count a packet or a knock sequence that opened or ran something; remember its source."""
        self.counts["accepted"] += 1
        self.known[datagram.source[:8]] = None
        self.known.move_to_end(datagram.source[:8])
        if len(self.known) > MOST_KNOWN:
            self.known.popitem(last=False)

    def reject(self, datagram: Datagram, why: Exception, stanza_number: int = 0) -> None:
        """Count a rejection by this stanza. Log it, unless too many lines came before."""
        rejection = (why if isinstance(why, PacketRejected) else
                     internal_error(why, self.log.level >= DEBUG))
        self.counts[rejection.reason] += 1
        # Other traffic is usual on TCP and ICMP; UDP's port is for packets only.
        level = DEBUG if datagram.protocol != UDP and isinstance(rejection, NotSpa) else INFO
        if level > self.log.level or not self.log.rejections.allows():
            return
        number = stanza_number or rejection.stanza_number
        self.log.write(level, rejection.template.format(
            source=socket_text(datagram.source), text=rejection,
            stanza=f"(stanza #{number}) " if number else ""))

    def __str__(self) -> str:
        """Return the counts in one line."""
        rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items())
                             if reason != "accepted")
        return f"{self.counts['accepted']} accepted; rejected: {rejected or 'none'}"


def internal_error(error: Exception, verbose: bool) -> PacketRejected:
    """Return the rejection of a packet by a mistake in this program, with the line it came from."""
    where, trace = [("", 0)], error.__traceback__  # function and line of each frame
    while trace is not None:
        where.append((trace.tb_frame.f_code.co_name, trace.tb_lineno))
        trace = trace.tb_next
    text = f"internal error: {type(error).__name__} in line {where[-1][1]}"
    if verbose:  # add the message and all frames
        message = explain(error)
        # Leave out the quoted parts of the message: they may be parts of a key or of a packet.
        quotes = [index for index, c in enumerate(message) if c in "'\""]
        if quotes:
            message = f"{message[:quotes[0] + 1]}...{message[quotes[-1]:]}"
        calls = ", ".join(f"{name} {line}" for name, line in where[1:])
        text += f": {message} ({calls})"
    return PacketRejected("error", text)


class Access:
    """Open doors, or run commands, for requests that judge() allows."""

    def __init__(self, settings: ServerSettings, grants: Grants, commands: Commands, tally: Tally,
                 log: Log, clocks: Clocks = CLOCKS) -> None:
        self.settings, self.grants, self.commands = settings, grants, commands
        self.tally, self.log, self.clocks = tally, log, clocks
        self.openers_limit = OPENERS_BYTES
        self.notices: Dict[Door, Cycle] = {}  # ON_CLOSE of each grant whose stanza has a notice
        grants.ended = lambda door: commands.notify(self.notices.pop(door, None))

    def allow(self, request: Request, stanza: Stanza) -> Union[Verdict, Lookup]:
        """Judge a request, do what the verdict says, and return it; PacketRejected if that is
        nothing. Nothing is done yet if judge() asks for a look-up."""
        verdict = judge(request, stanza, self.settings, is_own_address,  # section 11
                        self.clocks.wall())
        if isinstance(verdict, Lookup):
            return verdict
        try:
            if verdict.by_commands:
                self.commands.run(self.cycles(verdict, request, stanza))  # section 25
            else:
                verdict = verdict._replace(doors=self.grants.grant(  # section 24
                    verdict.doors, verdict.seconds, stanza.number))
        except CommandError as error:
            self.log.error(str(error))
            if verdict.by_commands:
                raise PacketRejected("command", "a command could not be started") from None
            raise PacketRejected("firewall", "nothing was opened: the firewall failed") from None
        self.tally.accept(request.datagram)
        self.tell(verdict, request, stanza.number)
        if not verdict.by_commands:
            self.note_opener(f"stanza #{stanza.number}, {request.who}", verdict.doors)
            self.notify(verdict, request, stanza)
            self.grants.keep_guard(verdict.doors)
        return verdict

    def notify(self, verdict: Verdict, request: Request, stanza: Stanza) -> None:
        """Run ON_OPEN for each door that a request has opened, and keep ON_CLOSE for its end."""
        label = f"[{socket_text(request.datagram.source)}] (stanza #{stanza.number}) "
        for door in verdict.doors if stanza.on_open or stanza.on_close else ():
            if door.kind in (INPUT, ONCE, FORWARD) and door not in self.notices:
                commands = door_commands(stanza, (stanza.on_open, stanza.on_close), door,
                                         request.datagram, verdict.seconds, self.clocks.wall())
                opening, self.notices[door] = [
                    Cycle(kind, stanza.number, label, self.settings.command_seconds, 0, command)
                    for kind, command in zip(("ON_OPEN", "ON_CLOSE"), commands)]
                self.commands.notify(opening)

    def cycles(self, verdict: Verdict, request: Request, stanza: Stanza) -> List[Cycle]:
        """Return the run of a command message, or the cycles that open and close the doors."""
        label = f"[{socket_text(request.datagram.source)}] (stanza #{stanza.number}) "
        limit = self.settings.command_seconds
        if request.type == COMMAND:
            command = client_command(request.command, stanza, self.settings.sudo_program)
            self.log.info(f"{label}Processing SPA Command message: command='{request.command}'.")
            return [Cycle("CMD_EXEC", stanza.number, label, limit, 0, command)]
        return [Cycle("CMD_CYCLE_OPEN", stanza.number, label, limit, verdict.seconds, opening,
                      closing, door, f"stanza #{stanza.number}, {request.who}")
                for door in verdict.doors for opening, closing in [door_commands(
                    stanza, (stanza.cycle_open, stanza.cycle_close), door, request.datagram,
                    verdict.seconds, self.clocks.wall())]]

    def tell(self, verdict: Verdict, request: Request, stanza_number: int) -> None:
        """Log what a request has opened or run."""
        client = request.who if request.user is None else (
            f"user '{escape_user(request.user)}' (client {request.version})")
        done, names = "ran a command", ", ".join(door.describe() for door in verdict.doors)
        if names:
            done = f"opened {names} for {verdict.seconds} seconds"
            if self.commands.test:
                done += "; --test mode enabled, skipping firewall manipulation"
        self.log.info(f"(stanza #{stanza_number}) {client} {done}")

    def open_by_hand(self, doors: List[Door], seconds: int, who: str) -> List[str]:
        """Open doors for --open; return a line about each; CommandError if the firewall fails."""
        firewall, opener = self.grants.firewall, f"by hand, {who}"
        if not firewall.keeps:
            raise CommandError(f"no firewall to open it in ({firewall.why})")
        try:
            doors = self.grants.grant(doors, seconds)
        except PacketRejected as rejection:  # too many are open
            raise CommandError(str(rejection)) from None
        self.log.info(f"{opener}: opened {', '.join(map(str, doors))} for {seconds} seconds")
        self.note_opener(opener, doors)
        now = self.clocks.monotonic() - 0.5
        return [grant_text(door, self.grants.live[door].ends - now, opener) for door in doors]

    def close_by_hand(self, who: str) -> List[str]:
        """Close what `who` has open (--close); return a line about each, or raise CommandError."""
        openers, now = read_openers(openers_file(self.settings)), self.clocks.monotonic()
        there = {grant.door: grant for grant in self.grants.firewall.grants()}
        found = [grant for grant in {**there, **self.grants.live}.values() if grant.ends > now
                 and is_meant(who, grant.door.source, find_opener(openers, grant))]
        cycles = [cycle for cycle in self.commands.cycles.values()
                  if cycle.door and is_meant(who, cycle.door.source, cycle.opener)]
        lines = [grant_text(grant.door, grant.ends - now, find_opener(openers, grant))
                 for grant in found] + [
            grant_text(cycle.door, min(cycle.ends - now, cycle.seconds), cycle.opener)
            for cycle in cycles if cycle.door]
        for line in lines:
            self.log.info(f"{CLOSED_BY_HAND}: {line}")
        for cycle in cycles:
            self.commands.close(cycle, CLOSED_BY_HAND)
        self.grants.close(found)
        return lines

    def note_opener(self, opener: str, doors: List[Door]) -> None:
        """Write for --fw-list who opened doors; the kernel knows all else of a grant."""
        grants = self.grants
        if not grants.firewall.keeps:
            return
        lines = [f"{grant_key(grants.live[door])}\t{opener}\n"
                 for door in doors if door in grants.live]
        path = openers_file(self.settings)
        try:
            with open(open_itself(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "r+") as file:
                # Tidy up whenever the file has doubled: so a packet pays for its own lines only.
                if os.fstat(file.fileno()).st_size > self.openers_limit:
                    live = set(map(grant_key, grants.live.values()))
                    lines[:0] = dict.fromkeys(line for line in file
                                              if line.partition("\t")[0] in live)
                    file.truncate(0)
                    self.openers_limit = max(OPENERS_BYTES, 2 * sum(map(len, lines)))
                file.writelines(lines)
        except OSError as error:  # this keeps nobody out
            self.log.debug(explain(error, path))


# ======================================================================================
# 28. Knock listener
#
# The way of a knock packet: is it the next step of a sequence (section 8)? The last one opens,
# runs a command, or lets a packet follow.
# ======================================================================================

Owner = Union[Stanza, KnockdDoor]  # of a sequence
MAX_OWN = 1000  # addresses of which it is known whether they are this host's


class KnockListener:
    """The knock sequences, and the sources that are on their way through them."""

    def __init__(self, configuration: Configuration, access: Access) -> None:
        self.access, self.tally, self.log = access, access.tally, access.log
        self.clocks = access.clocks
        self.own: Dict[bytes, bool] = {}  # whether an address is one of this host's
        self.own_until = 0.0
        self.owners: Dict[Sequence, Owner] = {}
        # Until when a stanza's sequence counts for the packet that has to follow it, by source.
        self.knocked: "collections.OrderedDict[Tuple[int, bytes], float]" = (
            collections.OrderedDict())
        self.configure(configuration)

    def configure(self, configuration: Configuration) -> None:
        """Go on with the sequences of a configuration; the steps of unchanged ones still count."""
        before: Dict[Tuple[Any, ...], List[Tuple[Sequence, int]]] = {}
        for sequence, owner in self.owners.items():
            before.setdefault((type(owner), sequence.key), []).append((sequence, owner.number))
        doors = configuration.knockd.doors if configuration.knockd else []
        owners: List[Owner] = [*configuration.stanzas, *doors]
        self.owners = {owner.sequence: owner for owner in owners if owner.sequence}
        numbers: Dict[int, int] = {}  # of stanzas: the one now, by the one before
        for sequence, owner in self.owners.items():
            sequence.most = max(MAX_ATTEMPTS // len(self.owners), LEAST_ATTEMPTS)
            same = before.get((type(owner), sequence.key))
            if same:
                known, number = same.pop(0)
                sequence.attempts, sequence.further = known.attempts, known.further
                sequence.deaf_until = known.deaf_until
                numbers[number] = owner.number
        # One for each, for the lines about its end: no other sequence can hold those back.
        self.completed = {sequence: Throttle(self.log, MORE_KNOCKS) for sequence in self.owners}
        self.knocked = collections.OrderedDict(
            ((numbers[number], source), until) for (number, source), until in self.knocked.items()
            if number in numbers)

    def is_own_address(self, packed: bytes, now: float) -> bool:
        """Return whether an address is this host's, or a broadcast one, as of a second ago."""
        if now > self.own_until or len(self.own) > MAX_OWN:
            self.own.clear()
            self.own_until = now + 1
        if packed not in self.own:
            self.own[packed] = is_own_address(parse_address(socket_text(packed))) is not False
        return self.own[packed]

    def take_knock(self, knock: Datagram, sequences: Iterable[Sequence]) -> None:
        """Take a knock packet through the sequences that are listened for where it came in."""
        now = self.clocks.monotonic()
        for sequence in sequences:
            owner = self.owners.get(sequence)
            if owner is None or not sequence.concerns(knock):
                continue
            try:
                if (knock.destination == sequence.target if sequence.target else
                        self.is_own_address(knock.destination, now)):
                    done = sequence.follow(knock, now)  # section 8
                    if done:
                        self.step(sequence, owner, knock, done)
            except Exception as error:  # a mistake of ours must not let one packet end the server
                self.tally.reject(knock, error, max(owner.number, 0))

    def step(self, sequence: Sequence, owner: Owner, knock: Datagram, done: int) -> None:
        """Log a step. After the last one, use up a line of a one-time file, then open."""
        source, last = socket_text(knock.source), done == len(sequence.steps)
        name = owner.name if isinstance(owner, KnockdDoor) else f"(stanza #{owner.number})"
        if last and isinstance(owner, Stanza):  # before the sequence counts as used
            if not owner.admits(knock):
                raise PacketRejected("source", NO_ACCESS + source)
            if owner.expires is not None and self.clocks.wall() >= owner.expires:
                raise PacketRejected("expired stanza", "Access stanza has expired.")
        level = INFO if last or isinstance(owner, KnockdDoor) else DEBUG
        throttle = self.completed[sequence] if last else self.throttle(done)
        if level <= self.log.level and throttle.allows():
            self.log.write(level, f"{source}: {name}: Stage {done}")
            if last:
                self.log.info(f"{source}: {name}: OPEN SESAME")
        if last:
            self.tally.sequences += 1
            try:
                self.complete(sequence, owner, knock, name)
                sequence.deaf_until = self.clocks.monotonic() + sequence.cooldown
            except SpaError as error:
                self.tally.counts["knock"] += 1
                if self.log.rejections.allows():
                    self.log.error(f"{name}: nothing is opened: {error}")

    def complete(self, sequence: Sequence, owner: Owner, knock: Datagram, name: str) -> None:
        """Do what a complete sequence is for, once a line of its one-time file is marked."""
        commands, cycles = self.access.commands, []  # type: Commands, List[Cycle]
        if isinstance(owner, KnockdDoor):
            cycles = [KnockdCycle(owner, parse_address(socket_text(knock.source)),
                                  self.access.settings.command_seconds)]
            commands.check(cycles)  # a line is not used up for a command that can't be run
        if not sequence.mark_used(commands.test):
            self.log.warning("no more sequences left in the one time sequences file for door "
                             f"{name} --> disabling the door")
        if isinstance(owner, KnockdDoor):
            if cycles[0].opening.argv:
                commands.run(cycles)
            self.tally.accept(knock)
        elif not owner.require_knock:
            self.access.allow(Request(knock, parse_address(socket_text(knock.source)),
                                      tuple(sorted(owner.open_ports))), owner)
        else:  # a packet has to follow
            key = owner.number, knock.source
            self.knocked[key] = self.clocks.monotonic() + owner.knock_seconds
            self.knocked.move_to_end(key)
            if len(self.knocked) > MAX_ATTEMPTS:
                self.knocked.popitem(last=False)

    def throttle(self, done: int) -> Throttle:
        """Return the limit of lines about sources that have done so many steps."""
        return self.log.further_steps if done > 1 else self.log.first_steps

    def expire(self) -> None:
        """Forget the attempts whose time is over."""
        now = self.clocks.monotonic()
        for sequence, owner in self.owners.items():
            for source, done in sequence.expire(now):
                if isinstance(owner, KnockdDoor) and self.throttle(done).allows():
                    self.log.info(f"{socket_text(source)}: {owner.name}: sequence timeout "
                                  f"(stage {done})")


# ======================================================================================
# 29. Gate
#
# The way of a packet, from a datagram to access. authentic_stanzas() proves the HMAC; for a stanza
# without HMAC, unlock() proves the key. The first lines of this file name what runs before that.
# ======================================================================================

AnyKeys = Union[PacketKeys, GpgKeys]
Keyed = Tuple[Stanza, AnyKeys]
Lock = Tuple[Hmac, List[Keyed]]  # the stanzas that share an HMAC key

SOURCE_MATCH = "(stanza #{}) SPA Packet from IP: {} received with access source match"
MAX_LOOKUPS, LOOKUP_SECONDS = 4, 5.0  # of names at a time for a stanza, and how long one may take


def filtered_text(stanza: Stanza, datagram: Datagram) -> str:
    """Return fwknopd's line about a packet that a stanza does not admit."""
    return (f"(stanza #{stanza.number}) SPA packet ({socket_text(datagram.source)} -> "
            f"{socket_text(datagram.destination)}) filtered by SOURCE and/or DESTINATION criteria")


def denial_text(denial: PacketRejected, datagram: Datagram) -> str:
    """Return the log line of one stanza about a packet that another may let in."""
    return denial.template.format(source=socket_text(datagram.source), text=denial,
                                  stanza=f"(stanza #{denial.stanza_number}) ")


def resolve_name(name: str, version: int,
                 monotonic: Callable[[], float] = time.monotonic) -> Optional[Address]:
    """Return the address of a host, or None: it has none, or the answer took too long."""
    family, began = socket.AF_INET if version == 4 else socket.AF_INET6, monotonic()
    try:  # bytes, since for a str Python would need the codec `idna`, which routers lack
        found = socket.getaddrinfo(name.encode(), None, family, socket.SOCK_STREAM)
        address = parse_address(str(found[0][4][0]))
    except (OSError, ValueError):
        return None
    return address if monotonic() - began < LOOKUP_SECONDS else None


class Resolver:
    """Look names up in threads, a few at a time, so that no packet stops the server."""

    def __init__(self, selector: selectors.BaseSelector,
                 resolve: Callable[[str, int], Optional[Address]] = resolve_name) -> None:
        self.selector, self.resolve = selector, resolve
        self.busy: List[int] = []  # the stanza's number, for each name in work

    def look_up(self, lookup: Lookup, stanza_number: int,
                then: Callable[[Optional[Address]], None]) -> bool:
        """Start to look a name up; return False if too many of this stanza's are in work."""
        # The selector's loop calls `then` with the address, or with None.
        if self.busy.count(stanza_number) >= MAX_LOOKUPS:
            return False
        reader, writer = socket.socketpair()
        found: List[Optional[Address]] = []

        def work() -> None:
            with writer:  # its end wakes the loop
                found.append(self.resolve(*lookup))

        def deliver() -> None:
            self.selector.unregister(reader)
            reader.close()
            self.busy.remove(stanza_number)
            then(found[0] if found else None)

        import threading
        threading.Thread(target=work, daemon=True).start()
        self.selector.register(reader, selectors.EVENT_READ, deliver)
        self.busy.append(stanza_number)
        return True


def group_by_lock(keyed: List[Keyed], prefix: bytes) -> Dict[Tuple[int, bool], List[Lock]]:
    """Return the locks of packets with this prefix, by the length of their tags (0: no HMAC) and by
    whether all of their stanzas admit every address."""
    groups: Dict[Tuple[str, bytes], List[Keyed]] = {}
    for each in keyed:
        groups.setdefault(each[1].lock, []).append(each)
    locks: Dict[Tuple[int, bool], List[Lock]] = {}
    for group in groups.values():
        keys, for_all = group[0][1], all(stanza.for_all for stanza, _ in group)
        locks.setdefault((keys.tag_length, for_all), []).append((keys.hmacs[prefix], group))
    return locks


def admitting(locks: List[Lock], datagram: Datagram) -> List[Lock]:
    """Return the locks without the stanzas whose SOURCE or DESTINATION keeps a packet out."""
    found = [(hmac, [each for each in keyed if each[0].admits(datagram)]) for hmac, keyed in locks]
    return [lock for lock in found if lock[1]]


class Entry:
    """A datagram on its way through the stanzas."""

    def __init__(self, datagram: Datagram) -> None:
        self.datagram = datagram
        self.remembered = False  # by a stanza that decrypted it, in the replay memory
        self.proven_by: Optional[Stanza] = None  # the last stanza whose keys have made it
        self.matches: List[Stanza] = []  # of whose addresses the log has a line


class Gate:
    """Unlock packets, keep replays out, and let the rest ask for access."""

    def __init__(self, configuration: Configuration, access: Access, knocks: KnockListener,
                 resolver: Resolver, catch_up: Callable[[], None]) -> None:
        self.access, self.knocks, self.resolver = access, knocks, resolver
        self.tally, self.log, self.clocks = access.tally, access.log, access.clocks
        self.catch_up = catch_up  # take the knock packets that wait: some came before the packet
        self.memory = ReplayMemory("", None, self.log, self.clocks)
        self.answer_sockets = AnswerSockets(self.log)
        self.runs: List[GpgRun] = []  # of gpg, each with the packet that waits for it
        self.candidates = 0  # packets that passed check_payload() so far
        self.configure(configuration)

    def configure(self, configuration: Configuration) -> None:
        """Go on with the settings and stanzas of a configuration."""
        self.settings, self.stanzas = configuration.settings, configuration.stanzas
        takers = [stanza for stanza in self.stanzas if stanza.takes_packets]
        # By the prefix of a packet: the stanzas that have keys for it, in the file's order.
        self.keyed: Dict[bytes, List[Keyed]] = {prefix: [
            (stanza, keys) for stanza in takers for keys in (stanza.keys, stanza.gpg)
            if keys and prefix in keys.prefixes] for prefix in (SALTED_PREFIX, GPG_PREFIX, b"")}
        self.locks = {prefix: group_by_lock(keyed, prefix) for prefix, keyed in self.keyed.items()}
        if self.keyed[SALTED_PREFIX]:  # the first knock would wait for modules and tables
            Aes(bytes_to_key(DIGESTS["MD5"], b"", b"")[0]).decrypt_blocks(bytes(16))

    def receive(self, datagram: Datagram, entry: Optional[Entry] = None) -> None:
        """Take a datagram through check, unlock, judge and open; or reject it."""
        try:
            if datagram.protocol == TCP and datagram.payload[:4].upper() == b"GET ":
                datagram = self.unwrap(datagram)
            check_payload(datagram.payload)  # section 4
            passed = self.authentic_stanzas(datagram)
            near = self.tell_near(datagram, passed, entry is None)
            self.candidates += entry is None  # else it comes again after gpg
            if passed:
                entry = entry or Entry(datagram)
                self.admit(entry, passed)
            else:
                self.tally.reject(datagram, near.wrong_hmac if near else self.no_stanza(datagram))
        except GpgNeeded as needed:
            self.wait_for_gpg(needed.run, entry or Entry(datagram))
        except Exception as error:  # a mistake of ours must not let one packet end the server
            self.tally.reject(datagram, error)

    def authentic_stanzas(self, datagram: Datagram) -> List[Keyed]:
        """Return the stanzas whose HMAC the packet has, or that have no HMAC key; and the keys."""
        payload, passed = datagram.payload, []
        for (length, for_all), locks in self.locks[find_prefix(payload)].items():
            locks = locks if for_all else admitting(locks, datagram)
            passed += (find_authentic(locks, payload, length) if length else
                       [each for _, keyed in locks for each in keyed])
        passed.sort(key=lambda each: each[0].number)
        return passed

    def tell_near(self, datagram: Datagram, passed: List[Keyed], is_new: bool) -> Optional[Stanza]:
        """Return the first stanza that admits a packet if it passes none before; log all if new."""
        first: Optional[Stanza] = None
        for stanza, _ in self.keyed[find_prefix(datagram.payload)]:
            if passed and stanza is passed[0][0]:
                break
            if stanza.for_all or stanza.admits(datagram):
                first = first or stanza
                if not (is_new and self.log.matches.allows()):
                    break
                self.log.info(SOURCE_MATCH.format(stanza.number, socket_text(datagram.source)))
        return first

    def no_stanza(self, datagram: Datagram) -> PacketRejected:
        """Return the rejection of a packet when no stanza has addresses and keys that fit it."""
        near = [stanza for stanza in self.stanzas
                if stanza.takes_packets and datagram.source in stanza.source]
        for stanza in near:
            if stanza.admits(datagram):
                self.tell_match(Entry(datagram), stanza)
                rejection = wrong_type(datagram.payload)
                rejection.stanza_number = stanza.number
                return rejection
        if near:
            return PacketRejected("source", filtered_text(near[0], datagram), "{text}")
        return PacketRejected("source", NO_ACCESS + socket_text(datagram.source), "{text}")

    def admit(self, entry: Entry, passed: List[Keyed]) -> None:
        """Let the first of the stanzas that a packet has passed open something, if it can. If none
        can, raise the reason of the first whose keys were right; or else of the last."""
        reasons: List[PacketRejected] = []
        told: Optional[Tuple[Stanza, str]] = None
        is_proven, is_final, datagram, start = False, True, entry.datagram, 0
        for stanza, keys in passed:
            self.tell_not_passed(entry, start, stanza.number - 1)
            is_proven, start = is_proven or keys.has_hmac, stanza.number
            try:
                with self.log.hold():
                    self.let_in(entry, stanza, keys)
                for denial in reasons:
                    self.log.write(DEBUG if isinstance(denial, WrongKey) else INFO,
                                   denial_text(denial, datagram))
                return
            except PacketRejected as reason:
                reason.stanza_number = stanza.number
                if entry.proven_by is stanza and stanza.answer:
                    told = told or (stanza, reason.told)
                if isinstance(reason, NotFresh):
                    self.memory.refuse(datagram.payload, reason.reason, reason.timestamp)
                    self.answer(datagram, told)
                    raise
                is_final = is_final and not isinstance(reason, TooFast)
                reasons.append(reason)
        self.tell_not_passed(entry, start, len(self.stanzas))
        main = next((each for each in reasons if not isinstance(each, WrongKey)), reasons[-1])
        if is_proven and is_final and not entry.remembered:
            self.memory.refuse(datagram.payload, main.reason)
        self.answer(datagram, told)
        raise main

    def let_in(self, entry: Entry, stanza: Stanza, keys: AnyKeys) -> None:
        """Unlock a packet that is authentic for this stanza, remember it, and ask for access."""
        datagram = entry.datagram
        prefix = f"[{socket_text(datagram.source)}] (stanza #{stanza.number}) "
        if not entry.remembered:
            self.memory.check_unseen(datagram)  # section 16; a replay costs no decryption
        self.tell_match(entry, stanza)
        try:
            packet, texts = unlock(datagram.payload, keys)  # section 4; GPG: section 15
        except PacketRejected as reason:
            with contextlib.suppress(PacketRejected):  # fwknopd shows the packet all the same
                if reason.signer and self.log.level >= DEBUG:
                    self.show(prefix, datagram.payload, decode_packet(reason.plain), keys)
                    self.log.debug(prefix + SIGNED.format(reason.signer[-8:], reason.signer))
            raise
        entry.proven_by = stanza
        self.show(prefix, datagram.payload, packet, keys)
        if not entry.remembered:
            self.memory.check_fresh(packet.timestamp)
            for text in texts:  # before anything opens: a crash in between must not allow a replay
                self.memory.remember(text, datagram)
            entry.remembered = True
            keys.mark_genuine()
            if keys.signed:
                self.log.info(prefix + keys.signed)
        self.tell_match(entry, stanza, is_genuine=True)
        self.ask_and_answer(Request.of_packet(packet, datagram), stanza)

    def show(self, prefix: str, payload: bytes, packet: Packet, keys: AnyKeys) -> None:
        """Log, with VERBOSE, the fields of a packet."""
        for line in (f"SPA Packet: '{payload.decode('ascii')}'", prefix + "SPA Decode (res=0):",
                     *packet.dump(payload, keys)) if self.log.level >= DEBUG else ():
            self.log.debug(line)

    def tell_not_passed(self, entry: Entry, start: int, end: int) -> None:
        """Log, as fwknopd does, why a packet has not passed these stanzas. Whether its addresses
        fit is told as well, but tell_near() told it of those before the first that it passed."""
        datagram, is_for_gpg = entry.datagram, is_gpg(entry.datagram.payload)
        for stanza in self.stanzas[start:end] if start or self.log.level >= DEBUG else ():
            if not stanza.takes_packets:
                continue
            admits = stanza.for_all or stanza.admits(datagram)
            if start and admits:
                self.tell_match(entry, stanza)
            if self.log.level >= DEBUG and self.log.denials.allows():
                fits = stanza.gpg if is_for_gpg else stanza.keys
                reason = stanza.wrong_hmac if fits else wrong_type(datagram.payload)
                reason.stanza_number = stanza.number
                self.log.debug(denial_text(reason, datagram) if admits else
                               filtered_text(stanza, datagram))

    def tell_match(self, entry: Entry, stanza: Stanza, is_genuine: bool = False) -> None:
        """Log once that a stanza's addresses fit a packet; no limit holds a genuine one back."""
        if stanza not in entry.matches and (is_genuine or self.log.matches.allows()):
            entry.matches.append(stanza)
            self.log.info(SOURCE_MATCH.format(stanza.number, socket_text(entry.datagram.source)))

    def ask_and_answer(self, request: Request, stanza: Stanza) -> None:
        """Ask for access, and answer the packet after the doors are open."""
        verdict, is_test = self.ask(request, stanza), self.access.commands.test
        if verdict is not None:  # else ask_again() answers
            told = ("--test mode: nothing is opened" if is_test else
                    "command started" if verdict.by_commands else  # nobody waits for its end
                    f"opened {port_list(request.ports)} for {verdict.seconds} seconds")
            self.answer(request.datagram, (stanza, told), not is_test)

    def answer(self, datagram: Datagram, told: Optional[Tuple[Stanza, str]],
               done: bool = False) -> None:
        """Answer a packet that was made with a stanza's keys and did not come before, if the
        stanza wants that. KEY has not made a packet of GPG."""
        if told and told[0].answer and told[1] and not is_gpg(datagram.payload):
            self.answer_sockets.send(seal_answer(datagram.payload, *told[0].secrets(), done,
                                                 told[1], os.urandom(8)), datagram)

    def ask(self, request: Request, stanza: Stanza) -> Optional[Verdict]:
        """Ask for access; return the verdict, or None if a NAT host has to be looked up first."""
        needed: List[Tuple[int, bytes]] = []
        if stanza.require_knock:
            # Both the packet's source and the address it opens must have knocked; otherwise one
            # client's knock would serve another.
            needed.append((stanza.number, request.datagram.source))
            if request.address is not None:
                needed.append((stanza.number, request.address.packed))
            self.catch_up()
            now = self.clocks.monotonic()
            if any(self.knocks.knocked.get(knock, 0.0) < now for knock in needed):
                raise PacketRejected("no knock", "No knock sequence came before the packet "
                                     "(REQUIRE_KNOCK).")
        verdict = self.access.allow(request, stanza)  # section 27
        if isinstance(verdict, Verdict):
            for knock in needed:  # a knock serves one packet
                self.knocks.knocked.pop(knock, None)
            return verdict
        if not self.resolver.look_up(verdict, stanza.number,
                                     partial(self.ask_again, request, stanza)):
            raise PacketRejected("NAT", "too many NAT hosts are looked up")
        return None

    def ask_again(self, request: Request, stanza: Stanza, address: Optional[Address]) -> None:
        """Ask with the address of the NAT host, unless a reload came between."""
        try:
            if request.nat is None or address is None or stanza not in self.stanzas:
                raise PacketRejected("NAT", "Unable to resolve Hostname in NAT SPA message")
            self.log.info("Resolved NAT IP in SPA message")
            self.ask_and_answer(request._replace(nat=(str(address), request.nat[1])), stanza)
        except Exception as error:  # as in receive()
            self.tally.reject(request.datagram, error, stanza.number)
            if isinstance(error, PacketRejected) and stanza in self.stanzas:
                self.answer(request.datagram, (stanza, error.told))

    def unwrap(self, datagram: Datagram) -> Datagram:
        """Return the payload of an HTTP request as a datagram (tests/spec/fwknop.md 1.14)."""
        if not self.settings.http:
            raise NotSpa("HTTP", 4099)
        payload, forwarded = decode_request(datagram.payload, self.settings.any_agent)
        if not self.settings.forwarded_for:
            return datagram._replace(payload=payload)
        problem = "there is none, or the request has no end"  # the proxy always adds it
        if forwarded is not None:
            problem = f"value '{forwarded[:60]}' is not an IP address"
            with contextlib.suppress(ValueError):
                return datagram._replace(payload=payload, source=parse_forwarded(forwarded).packed)
        raise PacketRejected("X-Forwarded-For", "Error parsing X-Forwarded-For header: " + problem)

    def is_full(self) -> bool:
        """Return whether as many packets came as PACKET_LIMIT allows."""
        return 0 < self.settings.packet_limit <= self.candidates

    def wait_for_gpg(self, run: GpgRun, entry: Entry) -> None:
        """Let a packet wait for gpg; reject it if too many wait, or a copy of it does."""
        same = [each for each in self.runs if each.has_hmac == run.has_hmac]
        if len(same) >= GPG_WAITING or any(run.question == each.question for each in same):
            self.tally.reject(entry.datagram, TooFast(
                "gpg too fast", "too many GPG packets wait, or a copy of this one does; it is not "
                "decrypted"))
        else:
            run.entry = entry
            run.gpg.charge()
            self.runs.append(run)

    def go_on_with_gpg(self) -> None:
        """Start gpg for packets that wait, and go on with those whose gpg has ended."""
        for run in self.runs[:]:
            running = [each for each in self.runs if each.process and each.has_hmac == run.has_hmac]
            if run.process is None and len(running) < GPG_AT_ONCE:
                run.start()
            if run.has_ended():
                self.runs.remove(run)
                assert run.entry is not None
                self.receive(run.entry.datagram, run.entry)


# ======================================================================================
# 30. OpenSPA gate
#
# The way of an OpenSPA request (tests/spec/openspa.md 1.7, with the gaps of 1.14 closed). Length
# and ADK come before RSA, which has a ration; the client's signature comes before all else.
# ======================================================================================

OSPA_CLIENT_BITS = (1024, 2048, 3072, 4096)  # of the moduli whose requests have a known length
OSPA_MOST_PORTS = 100  # in a range: each is a grant
OSPA_SHARE = 0.1  # of the time goes into RSA at most, so that a flood starves no other knocks
OSPA_BURST = 0.5  # seconds of RSA that are saved up: some clients may come at once
OSPA_REPEAT_SECONDS, OSPA_MOST_ANSWERS = 10.0, 2000  # a client sends its bytes three times


def ospa_lengths(modulus: int) -> FrozenSet[int]:
    """Return the lengths of requests to a server whose modulus has so many bytes (1.6)."""
    def item(size: int) -> int:
        return size + 2 * max(1, -(-size // 255))

    inner = [item(packet) + 5 + item(bits // 8) for packet in (53, 65, 77)
             for bits in OSPA_CLIENT_BITS]
    return frozenset(8 + item(16 * (size // 16 + 1)) + item(modulus) for size in inner)


def read_rsa_key(path: str, private: bool) -> RsaKey:
    """Read an RSA key from a file; raise ConfigError with the file's name if it can't be used."""
    try:
        return RsaKey.parse(read_file(path, untrusted=True), private)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_client_key(directory: str, uuid: str) -> Optional[RsaKey]:
    """Read a client's public key: its file is named by the UUID, with one extension or none. It is
    read for each request, so that adding a client is adding a file."""
    names = sorted(name for name in os.listdir(directory)
                   if uuid in (name, os.path.splitext(name)[0]))
    return read_only_key(directory, names) if names else None


def read_only_key(directory: str, names: List[str]) -> RsaKey:
    """Read a client's public key from the files that are named by its UUID, if it is only one."""
    if len(names) > 1:  # the old key must not go on in a file UUID.old
        raise ConfigError(f"{directory}: expected one file for a client, not {' and '.join(names)}")
    key = read_rsa_key(os.path.join(directory, names[0]), private=False)
    if key.size * 8 not in OSPA_CLIENT_BITS:
        raise ConfigError(f"{os.path.join(directory, names[0])}: expected a modulus of 1024, 2048, "
                          f"3072 or 4096 bits, not of {key.size * 8}")
    return key


def read_ospa_keys(settings: ServerSettings,
                   stanzas: List[Stanza]) -> Tuple[Optional[RsaKey], List[str]]:
    """Return the server's key, if a stanza has OPENSPA_CLIENTS, and a warning for each file there
    that is no client's key; raise ConfigError without the server's key."""
    users = [stanza for stanza in stanzas if stanza.openspa_clients and not stanza.void]
    if not users:
        return None, []
    settings.require((settings.ospa_key_file, ServerSettings.ospa_key_file,
                      "the server's private key, for OPENSPA_CLIENTS"))
    warnings = permission_warnings(str(settings.ospa_key_file))
    for stanza in users:
        directory = str(stanza.openspa_clients)
        warnings += folder_warnings(directory)
        try:
            names = sorted(os.listdir(directory))
        except OSError as error:
            raise stanza.error(Stanza.openspa_clients, explain(error)) from None
        clients: Dict[str, List[str]] = collections.defaultdict(list)
        for name in names:
            clients[os.path.splitext(name)[0]].append(name)
        for files in clients.values():
            try:
                read_only_key(directory, files)
            except (OSError, SpaError) as error:
                warnings.append(f"(stanza #{stanza.number}) {explain(error)}")
    return read_rsa_key(str(settings.ospa_key_file), private=True), warnings


class OspaCapture(PacketCapture):
    """A packet socket for OpenSPA requests."""

    batch_seconds = 0.002  # less than RSA takes, so that others wait for one request only


class OspaUdpCapture(UdpCapture):
    """A UDP socket for OpenSPA requests; it answers them, too."""

    batch_seconds = OspaCapture.batch_seconds


def ospa_filter(port: int, modulus: int, start: int, behind: int) -> Filter:
    """Match UDP datagrams that have the header and the length of a request to this port."""
    header = int.from_bytes((OSPA_REQUEST, 0, OSPA_SUITE, 0), "big")
    return Junction("and", (
        Comparison(start + 2, 2, port, port, behind=behind),
        field_is_one_of(start + 4, 2, [8 + length for length in ospa_lengths(modulus)], behind),
        Comparison(start + 8, 4, header, header, 0xFF00FFFF, behind)))


def open_ospa_captures(settings: ServerSettings, key: RsaKey, log: Log, current: Iterable[Capture],
                       captures: List[Capture]) -> None:
    """Open what OpenSPA requests come in by, as packets do, and add it to `captures`."""
    test = partial(ospa_filter, settings.ospa_port, key.size)
    if not settings.udp_server:
        with contextlib.suppress(PermissionError, AttributeError):  # there are no packet sockets
            captures += open_on_interface(OspaCapture, settings.interface, compile_filter(
                transport_filter((UDP,), (UDP,), test)), log)
            return
    open_port_captures(OspaUdpCapture, settings.ospa_port, captures, current,
                       compile_filter(test(0, 0), any_direction=True))


class OspaGate:
    """Take OpenSPA requests from a datagram to access, and answer them."""

    def __init__(self, configuration: Configuration, gate: Gate) -> None:
        self.gate, self.tally = gate, gate.tally
        self.log, self.clocks = gate.log, gate.clocks
        # By source and request, sealed or as it was signed, oldest first: the answer, and until
        # when it is given again.
        self.answers: "collections.OrderedDict[Tuple[bytes, str], Tuple[bytes, float]]" = (
            collections.OrderedDict())
        self.rsa_until = 0.0  # RSA has used its share of the time up to then
        self.configure(configuration)

    def configure(self, configuration: Configuration) -> None:
        """Go on with the keys and stanzas of a configuration."""
        self.settings, self.key = configuration.settings, configuration.ospa_key
        self.stanzas = [each for each in configuration.stanzas
                        if each.openspa_clients and not each.void]
        self.lengths = ospa_lengths(self.key.size) if self.key else frozenset()

    def receive(self, datagram: Datagram) -> None:
        """Take a request through header, ration, RSA, judge and open, and answer it. Each step
        costs less than the next one. A repeat is answered again, and opens nothing."""
        try:
            self.check_header(datagram.payload)
            answer = self.answer((datagram.source, digest_of(datagram.payload)),
                                 partial(self.admit, datagram))
            if not self.gate.access.commands.test:  # there is no answer that means "not opened"
                self.gate.answer_sockets.send(answer, datagram)
        except Exception as error:  # a mistake of ours must not let one packet end the server
            self.tally.reject(datagram, error)

    def answer(self, request: Tuple[bytes, str], admit: Callable[[], bytes]) -> bytes:
        """Return the answer that a request got lately; otherwise admit it, and keep its answer."""
        answer, until = self.answers.get(request, (b"", 0.0))
        if self.clocks.monotonic() >= until:
            answer = admit()
            self.answers[request] = answer, self.clocks.monotonic() + OSPA_REPEAT_SECONDS
            if len(self.answers) > OSPA_MOST_ANSWERS:
                self.answers.popitem(last=False)
        return answer

    def check_header(self, request: bytes) -> None:
        """Reject a request by its length and its clear text, before RSA costs anything."""
        if len(request) not in self.lengths:  # the kernel's filter looks at it, too
            raise NotSpa("OpenSPA length", 4096)
        control, _, suite, reserved, proof = struct.unpack_from(OSPA_HEADER, request)
        if (control, suite, reserved) != (OSPA_REQUEST, OSPA_SUITE, 0):
            raise NotSpa("OpenSPA header", 4098)
        secret = self.settings.ospa_adk
        if secret and proof != adk_proof(secret, self.clocks.wall()):
            raise PacketRejected("OpenSPA ADK", "OpenSPA: no ADK proof of this minute")

    def spend(self, do: Callable[..., T], *arguments: Any) -> T:
        """Return do(*arguments), and count the time that it takes as used for RSA. So it does for
        clients' files: anybody with our public key can have them read."""
        began = self.clocks.monotonic()
        try:
            return do(*arguments)
        finally:
            spent = self.clocks.monotonic() - began
            self.rsa_until = max(self.rsa_until, began) + spent / OSPA_SHARE

    def admit(self, datagram: Datagram) -> bytes:
        """Let the first stanza that can open something for a request do so; return the answer."""
        assert self.key is not None  # else there is no length that passes
        if self.clocks.monotonic() < self.rsa_until - OSPA_BURST / OSPA_SHARE:
            raise TooFast("OpenSPA too fast", "OpenSPA: too many requests; it is not decrypted")
        stanzas = [stanza for stanza in self.stanzas if stanza.admits(datagram)]
        if not stanzas:
            raise PacketRejected("source", NO_ACCESS + socket_text(datagram.source), "{text}")
        try:
            header, packet, signature = self.spend(unseal_ospa, datagram.payload, self.key)
            fields = decode_ospa(packet, is_answer=False)
        except ValueError as error:
            raise WrongKey("OpenSPA decryption", f"OpenSPA: {error}") from None
        text = binascii.hexlify(fields.uuid).decode()
        uuid = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
        rejection: PacketRejected = WrongKey("OpenSPA signature",
                                             f"OpenSPA: no client {uuid} has signed this")
        canonical = encode_base64(DIGESTS["SHA256"](header + packet))
        signed, unseen = (datagram.source, digest_of(canonical)), [canonical]
        for stanza in stanzas:
            try:
                client = self.spend(read_client_key, str(stanza.openspa_clients), uuid)
                if not client or not self.spend(client.verify, header + packet, signature):
                    continue
                # One byte is all that tells apart the requests that a client makes in one second.
                return self.answer(signed, partial(self.ask, datagram, fields, unseen, uuid,
                                                   stanza, client))
            except (OSError, ConfigError) as error:
                if self.log.rejections.allows():  # anybody with our public key can cause it
                    self.log.error(f"(stanza #{stanza.number}) {explain(error)}")
            except PacketRejected as reason:
                reason.stanza_number = stanza.number
                if isinstance(reason, NotFresh):
                    raise
                rejection = reason if isinstance(rejection, WrongKey) else rejection
        raise rejection

    def ask(self, datagram: Datagram, fields: OspaFields, unseen: List[bytes], uuid: str,
            stanza: Stanza, client: RsaKey) -> bytes:
        """Ask for access by a stanza. Once the doors are open, return the answer, signed."""
        if unseen:  # before anything opens: a crash must not allow a replay
            self.gate.memory.check_fresh(fields.timestamp)
            self.gate.memory.remember(unseen[0], datagram)
            unseen.clear()  # the stanzas that follow find it remembered
        (first, last), target = fields.ports, parse_address(socket_text(fields.target))
        address = parse_address(socket_text(fields.client))
        names = {number: name for name, number in PROTOCOL_NUMBERS.items()}
        if fields.protocol not in names or not first:
            raise PacketRejected("protocol", f"OpenSPA: IP protocol {fields.protocol}, port {first}"
                                 ": only ports of TCP and UDP can be opened")
        if last - first >= OSPA_MOST_PORTS:
            raise PacketRejected("ports", f"OpenSPA: {last - first + 1} ports at once; at most "
                                 f"{OSPA_MOST_PORTS} are opened")
        if not may_be_host(address):  # 0.0.0.0 names no address; a command may take it for all
            raise PacketRejected("no address", f"OpenSPA: {address} is not the address of a host")
        if not is_own_address(target):
            raise PacketRejected("target", f"OpenSPA: {target} is no address of this host")
        ports = tuple((names[fields.protocol], port) for port in range(first, last + 1))
        verdict = self.gate.ask(Request(datagram, address, ports, uuid, "OpenSPA 2.0"), stanza)
        assert verdict is not None and self.key is not None  # no name of a NAT host is looked up
        header = struct.pack(OSPA_HEADER, OSPA_ANSWER, datagram.payload[1], OSPA_SUITE, 0, 0)
        made = OspaFields(fields.protocol, fields.ports, fields.target, seconds=verdict.seconds)
        return self.spend(seal_ospa, header, made.encode(), self.key, client, os.urandom(48),
                          os.urandom(3))


# ======================================================================================
# 31. Server
#
# The loop: it reads the captures, minds the firewall, and does in time whatever is due.
# ======================================================================================

MOST_LINES = 200  # of an answer, which has to fit into one packet of the control socket
SETTLE_SECONDS = 0.2  # from the first sign that the firewall was changed until it is looked at
CHECK_SHARE = 0.25  # of the time goes into these looks, while nothing is missing
COUNT_LIMIT = ("Incoming packet count limit of {0} reached. "
               "Packet count limit ({0}) reached. Exiting...")


class FirewallWatch:
    """Put back rules and grants that somebody removed from the firewall."""

    def __init__(self, grants: Grants, log: Log, clocks: Clocks) -> None:
        self.grants, self.log, self.clocks = grants, log, clocks
        self.events: Optional[socket.socket] = None  # announces changes of nf_tables, once open
        self.check_due = self.check_rest = 0.0  # when a look is due, and until when there is none
        self.check_wait = RETRY_SECONDS
        self.guard_due = 0.0
        self.looked = clocks.wall()  # when the last look that did not fail was
        self.generation = b""  # of nf_tables, by the last announcement or look
        self.well: Optional[Firewall] = grants.firewall  # right by prepare() or a look, no news yet

    def look_soon(self) -> None:
        """Let the next look at the firewall be soon, once for a series of changes."""
        self.well = None
        due = self.clocks.monotonic() + SETTLE_SECONDS
        if not self.grants.firewall.quickly_intact:
            due = max(due, self.check_rest)
        self.check_due = min(self.check_due, due)

    def hear(self) -> bool:
        """Return whether somebody changed the firewall: look at it soon, mend the guard at once."""
        changed = guard = False
        firewall = self.grants.firewall
        # All that a program of ours changed waits here since before it ended.
        own = {*firewall.own_ports, firewall.netlink.port if firewall.netlink else -1}
        firewall.own_ports.clear()
        try:
            while self.events is not None:
                for kind, port, body in netlink_messages(self.events.recv(65536)):
                    fields = attributes(body[4:])
                    table = (body[0], fields.get(TABLE_NAME, b"")) if (
                        NFT <= kind <= DELETE_RULE) else None  # a change of a table, or in one
                    if kind == NEW_GENERATION:
                        self.generation = fields.get(GENERATION_NUMBER, b"")
                    changed = changed or (port not in own and (
                        firewall.tables_heard is None or table in firewall.tables_heard))
                    guard = guard or (table in firewall.guard_tables
                                      and MARK.encode() not in body)  # such as a grant has
        except BlockingIOError:
            pass
        except (OSError, CommandError):  # more was announced than fits
            changed = guard = True
        if guard:
            self.mend_guard()
        if changed:
            self.look_soon()
        return changed

    def mend_guard(self) -> None:
        """Put the guard back at once if somebody removed it: until then everybody gets in."""
        firewall = self.grants.firewall
        try:
            with firewall.within(PATIENCE):
                if firewall.trial is not TRIAL_OVER and firewall.mend_guard():
                    self.log.warning(f"Somebody changed the guard ({firewall.describe()}); put "
                                     "back as it was")
                    self.look_soon()  # the grants may be gone as well
        except CommandError:  # restore() tries again, and says why it can't
            self.check_rest = 0.0
        self.guard_due = self.clocks.monotonic() + firewall.guard_poll_seconds

    def restore(self) -> None:
        """Put back what somebody removed from the firewall; retry after a failure."""
        began, doubtful = self.clocks.monotonic(), self.grants.doubtful
        self.grants.doubtful = False  # what fails below is tried again
        firewall, generation, all_well = self.grants.firewall, b"", False
        try:
            with firewall.within(PATIENCE):
                if self.events is not None and (firewall.netlink or firewall.tables_heard):
                    generation = (firewall.netlink or Netlink.open()).generation()
                    # No announcement was missed, and none was of somebody's change. That a
                    # connection has ended a grant is not announced.
                    all_well = (self.well is firewall and generation == self.generation and not (
                        doubtful or any(door.kind == ONCE for door in self.grants.live)))
                if not (all_well or doubtful) and began < self.check_rest and firewall.intact():
                    self.check_due = self.check_rest  # rules are looked at at once, grants then
                    self.looked = self.clocks.wall()
                    return
                all_well = all_well or self.grants.restore()
        except CommandError as error:
            self.log.error(f"{error}; the firewall is not as it should be, trying again")
            self.hear()  # mostly of the attempt itself
            self.well, self.check_rest = None, 0.0
            self.check_due = self.clocks.monotonic() + self.check_wait
            self.check_wait = min(2 * self.check_wait, POLL_SECONDS)
        else:
            self.looked = self.clocks.wall()
            now = self.clocks.monotonic()
            self.check_due = now + firewall.poll_seconds
            self.guard_due = now + firewall.guard_poll_seconds  # it was seen as well
            rest = min((now - began) * (1 / CHECK_SHARE - 1), POLL_SECONDS)
            self.check_rest = now + rest if all_well else now
            self.check_wait = RETRY_SECONDS
            self.well = firewall if all_well and generation else None
            self.generation = generation


class ServiceManager:
    """Report the server's state to systemd, if systemd asks for that (sd_notify(3))."""

    def __init__(self, clocks: Clocks, environment: Mapping[str, str] = os.environ) -> None:
        address, pid = environment.get("NOTIFY_SOCKET", ""), str(os.getpid())
        self.address = "\0" + address[1:] if address.startswith("@") else address
        self.clocks, self.due = clocks, FOR_EVER  # when to say the next time that the loop goes on
        microseconds = environment.get("WATCHDOG_USEC", "")
        self.seconds = int(microseconds) / 2e6 if microseconds.isdecimal() else 0.0
        if self.seconds and environment.get("WATCHDOG_PID", pid) == pid:
            self.due = clocks.monotonic()

    def tell(self, *lines: str) -> None:
        """Send these assignments. Give up after a second, since knocks may be waiting."""
        if self.address:
            with contextlib.suppress(OSError), socket.socket(
                    socket.AF_UNIX, socket.SOCK_DGRAM) as link:
                link.settimeout(1.0)
                link.sendto("\n".join(lines).encode(), self.address)

    def keep_alive(self) -> None:
        """Say that the loop goes on, twice in the time after which systemd would end it."""
        if self.clocks.monotonic() >= self.due:
            self.due = self.clocks.monotonic() + self.seconds
            self.tell("WATCHDOG=1")


REST_MOST, REST_FREE, REST_DECAY = 30, 10, 50  # milliseconds; packets; packets a second
REST_BYTES = 5600  # of a socket's buffer for each packet that comes meanwhile; it takes 2,304


class Ears:
    """The wait for events: those of captures, and all others.

    To wake up costs ten times as much as to reject a packet. So after junk the captures rest a
    while, and then the server reads many packets at once. Other events still wake it at once. Each
    packet of junk makes the rest a millisecond longer, up to REST_MOST; REST_DECAY of them are
    forgotten each second, and the first REST_FREE cause none.
    """

    def __init__(self, others: Any, clocks: Clocks) -> None:
        self.others, self.clocks = others, clocks
        self.captures = select.epoll()  # and the others
        self.captures.register(others, select.EPOLLIN)
        # How long the rest is, as of when; when the last wait ended, and when the rest will end.
        self.level, self.since, self.woken, self.rest_end = 0.0, clocks.monotonic(), 0.0, 0.0
        self.room = 2 * RECEIVE_BUFFER  # the least of the captures

    def rest(self, junk: int) -> None:
        """Let the captures rest after so many packets of junk, as of the last wait()'s end."""
        passed = self.woken - self.since
        if junk > 0:
            self.level = max(self.level - REST_DECAY * passed, 0.0) + junk
            self.level, self.since = min(self.level, REST_FREE + REST_MOST), self.woken
            rest = min((self.level - REST_FREE) / 1000, passed * self.room / REST_BYTES / junk)
            self.rest_end = max(self.rest_end, self.woken + rest)

    def wait(self, due: float) -> Tuple[bool, List[int]]:
        """Wait for an event, or until `due`. React to those of others; return whether there were
        any, and the descriptors of the captures that can be read."""
        now, found, readable = self.clocks.monotonic(), [], []  # type: float, List[Any], List[int]
        if now < self.rest_end:
            found = self.others.select(max(0.0, min(due, self.rest_end) - now))
            due, now = 0.0, self.clocks.monotonic()
        if now >= self.rest_end:
            readable = [file for file, _ in self.captures.poll(max(0.0, due - now))]
        self.woken = self.clocks.monotonic()
        if not found and self.others.fileno() in readable:
            found = self.others.select(0)
        for key, _ in found:
            key.data()
        return bool(found), readable


MOST_WAITING = 1000  # datagrams of a capture, from one batch to the next
MOST_READ = 4000  # of them at once: more than come in one batch at 100,000 a second
MOST_AGAIN = 200  # tries in a batch for flows that were tried lately, when all others were tried
KNOWN_TRIES = 4  # in a batch, before others, for a source that is known: an attacker may forge it
SLOTS, MARK_SECONDS = 1 << 20, 3  # of Crowd's memory; clients knock again every second
TRIED = 128  # the bit of a mark; without it, a datagram of the source was dropped
UNTRIED = "packets came faster than they could be tried, and were dropped"
UNTRIED_SECONDS = 10  # from one such line to the next


class Crowd:
    """The choice among the datagrams of a capture that come faster than they can be tried.

    Of four tries, two go to the best standing: sources that opened something before; then sources
    whose datagrams were only dropped lately, such as a client that knocks again; then others; and
    last the flows (source and port) that were tried lately. One try goes to the best of the
    unknown, and one to the newest of all: so an attacker who forges addresses can't keep others
    out for sure. Of equal standing, the newest is first. Of what is too much, the server first
    drops flows that were tried lately, and then others at random.
    """

    def __init__(self, tally: Tally, log: Log, clocks: Clocks,
                 urandom: Callable[[int], bytes] = os.urandom) -> None:
        self.tally, self.log, self.clocks, self.urandom = tally, log, clocks, urandom
        self.untold, self.tell_due = 0, clocks.monotonic()  # dropped, and when to log it
        # By the hash of a source or a flow: the second of its drop or try, modulo 100, plus 1.
        self.marks, self.second = bytearray(), 0
        self.line: List[int] = []  # indices of what is tried in this batch, the next one last
        self.put_off: List[int] = []  # and of what waits for another batch

    def line_up(self, capture: Capture) -> Callable[[], Datagram]:
        """Read what a capture has, put in order what waits of it, and return call() for that."""
        waiting = capture.waiting = capture.waiting or []
        self.marks, dropped = self.marks or bytearray(SLOTS), 0
        self.second = int(self.clocks.monotonic()) % 100 + 1
        with contextlib.suppress(BlockingIOError):
            for _ in range(MOST_READ):
                each = capture.receive()
                if (each is not None and len(waiting) >= MOST_WAITING
                        and each.source[:8] not in self.tally.known
                        and self.mark_of((each.source[:8], each.source_port)) & TRIED):
                    dropped += 1  # to read others in time is worth more than to try it
                elif each is not None:
                    waiting.append(each)
        self.count_dropped(dropped)
        # The oldest first, if all can be tried.
        self.line, self.put_off = list(range(len(waiting) - 1, -1, -1)), []
        if len(waiting) > capture.tries:
            self.line = self.order([(each.source[:8], each.source_port) for each in waiting])[::-1]
        return partial(self.call, capture)

    def order(self, flows: List[Tuple[bytes, int]]) -> List[int]:
        """Return indices of `flows`, which are oldest first, in the order of their tries.

        Put off what there is of tried flows behind the last of the others, but for MOST_AGAIN.
        """
        newest, standings, known = range(len(flows) - 1, -1, -1), [2] * len(flows), self.tally.known
        tries: Dict[bytes, int] = collections.defaultdict(int)
        for index in newest:
            source = flows[index][0]
            if source in known and tries[source] < KNOWN_TRIES:
                tries[source] += 1
                standings[index] = 0
            elif self.mark_of(flows[index]) & TRIED:  # a mark without it is a source's there
                standings[index] = 3
            elif 0 < self.mark_of(source) < TRIED:
                standings[index] = 1
        best = iter(sorted(newest, key=standings.__getitem__))
        best_but_known = iter(sorted(newest, key=lambda index: standings[index] or 4))
        turns = best, best_but_known, best, iter(newest)
        order: Dict[int, None] = {}
        for number in range(len(flows)):
            order[next(index for index in turns[number % 4] if index not in order)] = None
        line = list(order)
        most = max((number for number, index in enumerate(line) if standings[index] < 3), default=0)
        self.put_off = line[most + MOST_AGAIN:]
        return line[:most + MOST_AGAIN]

    def mark_of(self, what: object) -> int:
        """Return the mark of a source or a flow, or 0 if it was made too long ago."""
        mark = self.marks[hash(what) % SLOTS]
        return mark if (self.second - mark % TRIED) % 100 < MARK_SECONDS else 0

    def call(self, capture: Capture) -> Datagram:
        """Return the next datagram to try; raise BlockingIOError if none waits."""
        if not self.line or not capture.waiting:
            if self.put_off:
                self.thin_out(capture, capture.tries)
            else:
                capture.waiting = None
            raise BlockingIOError
        datagram = capture.waiting[self.line.pop()]
        source = datagram.source[:8]
        for tried in source, (source, datagram.source_port):
            self.marks[hash(tried) % SLOTS] = self.second | TRIED
        return datagram

    def thin_out(self, capture: Capture, tries: int) -> None:
        """Keep what could not be tried in time, and drop a part if it is too much. `tries` is how
        many datagrams were tried."""
        capture.tries = tries
        if capture.waiting is None:
            capture.waiting = [] if capture.is_fair else None
            return
        left = [capture.waiting[index] for index in sorted(self.line + self.put_off)]
        capture.waiting = left
        if len(left) <= MOST_WAITING:
            return
        lots = memoryview(self.urandom(4 * len(left))).cast("I")
        least = sorted(lots)[-MOST_WAITING]
        capture.waiting = [each for each, lot in zip(left, lots) if lot >= least]
        for each, lot in zip(left, lots):
            if lot < least and not self.mark_of(each.source[:8]) & TRIED:
                self.marks[hash(each.source[:8]) % SLOTS] = self.second
        self.count_dropped(len(left) - len(capture.waiting))

    def count_dropped(self, count: int) -> None:
        """Count datagrams that are dropped, and log it from time to time."""
        if not count:
            return
        now = self.clocks.monotonic()
        self.tally.counts["untried"] += count
        self.untold += count
        if now >= self.tell_due:
            self.log.warning(f"{self.untold} {UNTRIED}")
            self.untold, self.tell_due = 0, now + UNTRIED_SECONDS


CAPTURE_ROWS = (  # a reload that changes one of these opens other captures
    ServerSettings.interface, ServerSettings.packet_filter, ServerSettings.any_direction,
    ServerSettings.promiscuous, ServerSettings.udp_server, ServerSettings.udp_port,
    ServerSettings.tcp_server, ServerSettings.tcp_port, ServerSettings.http, ServerSettings.verbose)


class Server:
    """The loop, and all that it drives: captures, gate, knock listener, grants and commands."""

    def __init__(self, configuration: Configuration, firewall: Firewall, log: Log,
                 clocks: Clocks = CLOCKS) -> None:
        self.configuration, self.log, self.clocks = configuration, log, clocks
        self.settings = configuration.settings
        self.selector = selectors.DefaultSelector()  # of all but the captures
        self.ears, self.emptied = Ears(self.selector, clocks), 0  # datagrams of emptied captures
        self.tally = Tally(log)
        self.crowd = Crowd(self.tally, log, clocks)
        self.grants = Grants(firewall, log, clocks)
        self.watch = FirewallWatch(self.grants, log, clocks)
        self.manager = ServiceManager(clocks)
        self.commands = Commands(self.selector, log, configuration.test, clocks)
        self.access = Access(self.settings, self.grants, self.commands, self.tally, log, clocks)
        self.knocks = KnockListener(configuration, self.access)
        self.gate = Gate(configuration, self.access, self.knocks, Resolver(self.selector),
                         self.catch_up)
        self.ospa = OspaGate(configuration, self.gate)
        self.takers = dict.fromkeys((OspaCapture, OspaUdpCapture), self.ospa.receive)
        self.remembers = False  # whether the gate has the settings' replay memory
        self.captures: List[Capture] = []
        self.lost = 0.0  # packets, by the captures that are closed
        self.link_events: Optional[socket.socket] = None
        self.since, self.running, self.exit_code = self.clocks.wall(), True, 0
        self.metrics = Metrics(self)

    def start(self, flush: bool) -> None:
        """Make the firewall ready, go on with the grants it has or close them, and listen."""
        if self.configuration.needs_memory:
            self.gate.memory = open_memory(self.settings, self.log, self.clocks)
            self.gate.memory.answers, self.remembers = self.configuration.answers, True
        captures = self.configuration.open_captures(self.log)  # fails before anything is changed
        self.watch.events = open_netlink_events(NETLINK_NETFILTER, GROUP_NFTABLES)
        self.link_events = open_netlink_events(NETLINK_ROUTE, GROUP_LINK)
        try:
            self.grants.firewall.prepare()
            if flush:
                self.flush()
            else:
                self.grants.adopt()
        except SpaError:
            self.tell_guard()
            raise
        for events, react in ((self.watch.events, self.watch.hear),
                              (self.link_events, self.follow_links)):
            if events is not None:
                self.selector.register(events, selectors.EVENT_READ, react)
        self.listen(captures)
        self.watch.check_due = self.clocks.monotonic() + self.grants.firewall.poll_seconds
        self.metrics.write()

    def listen(self, captures: List[Capture]) -> None:
        """Read from `captures` from now on; close the others that were read before."""
        for capture in captures:
            if isinstance(capture, KnockCapture) and capture not in self.captures:
                drain_socket(capture.socket)  # the one before it has heard this as well
        self.catch_up()
        old, self.captures = self.captures, captures
        for line in capture_lines(self.settings, captures) if self.gate.stanzas else ():
            self.log.info(line)
        for capture in old:
            if capture not in captures:
                if isinstance(capture, OspaCapture):  # the reference's client sends once
                    self.drain(capture)
                self.ears.captures.unregister(capture)
                self.lost += capture.lost()
                capture.close()
        self.open_answer_sockets()
        for capture in captures:
            if capture not in old:
                self.ears.captures.register(capture, select.EPOLLIN)
        self.ears.room = min([each.room for each in captures] + [2 * RECEIVE_BUFFER])

    def open_answer_sockets(self) -> None:
        """Open the sockets that answer, by the configuration and the captures of this server."""
        self.gate.answer_sockets.open(self.configuration.answer_ports(self.captures), self.captures)

    def drain(self, capture: Capture) -> None:
        """Read from a capture until nothing is there, or others have waited long enough."""
        take: Callable[[Any], None] = self.takers.get(type(capture), self.gate.receive)
        if isinstance(capture, KnockCapture):
            take = partial(self.knocks.take_knock, sequences=capture.sequences)
        try:
            receive = capture.receive if capture.waiting is None else self.crowd.line_up(capture)
            end, count = self.clocks.monotonic() + capture.batch_seconds, 0
            while self.running and self.clocks.monotonic() < end:
                datagram, count = receive(), count + 1
                if datagram is not None:
                    take(datagram)
                    if self.gate.is_full():
                        self.end_loop(COUNT_LIMIT.format(self.settings.packet_limit))
            self.crowd.thin_out(capture, count)
        except BlockingIOError:
            self.emptied += count
        except EOFError as error:
            self.end_loop(str(error))
        except SpaError as error:
            self.exit_code = 1
            self.end_loop(str(error))
        except OSError as error:  # the interface went away; link events tell when it is back
            self.log.warning(f"{explain(error, capture.name)}; going on when it is back")

    def catch_up(self) -> None:
        """Take the knock packets that are waiting."""
        for capture in self.captures:
            if isinstance(capture, KnockCapture):
                self.drain(capture)

    def end_loop(self, why: str) -> None:
        """Let the loop end after this turn."""
        self.log.info(self.configuration.words("Gracefully leaving the fwknopd event loop."))
        self.log.write(ERROR if self.exit_code else
                       DEBUG if self.configuration.is_knockd else INFO, why)
        self.running = False

    def follow_links(self) -> None:
        """Listen anew when an interface that was named is there again, or is another one."""
        drain_socket(self.link_events)
        self.knocks.own.clear()
        if self.settings.capture_file:
            return
        named = {name for names, _ in self.configuration.listenings() for name in names}
        if self.configuration.needs_memory and not any(
                isinstance(capture, UdpCapture) for capture in self.captures):
            named.add(self.settings.interface)
        indices = set()
        for name in named - {"any"}:
            with contextlib.suppress(OSError):
                indices.add(socket.if_nametoindex(name))
        if not indices <= {capture.index for capture in self.captures
                           if isinstance(capture, PacketCapture)}:
            try:
                self.listen(self.configuration.open_captures(self.log, self.captures))
            except SpaError as error:
                self.log.error(str(error))

    def reload(self, configuration: Configuration, firewall: Firewall) -> None:
        """Go on with other settings and stanzas; live grants stay, in a new firewall as well."""
        # Steps that can fail come first; after a failure the server goes on with the old settings.
        settings, old = configuration.settings, self.settings

        def changed(*rows: Directive[Any]) -> List[str]:
            return [row.name for row in rows
                    if getattr(old, row.attribute) != getattr(settings, row.attribute)]

        if changed(ServerSettings.capture_file):  # it has its own idea of age and of an end
            raise settings.error(ServerSettings.capture_file, "expected no change without a start")
        moved = not settings.capture_file and changed(*CAPTURE_ROWS)
        same = not moved and configuration.takes_packets == self.configuration.takes_packets
        captures, memory = self.captures, None
        stood = self.grants.firewall.trial or firewall.guarded()
        try:
            if changed(ServerSettings.udp_server):  # it needs the port of what only answers
                self.gate.answer_sockets.close()
            captures = configuration.open_captures(self.log, self.captures, same)
            if configuration.needs_memory and not self.remembers:
                memory = open_memory(settings, self.log, self.clocks)
            firewall.succeed(self.grants.firewall)
            firewall.prepare()
        except SpaError:
            close_captures(captures, self.captures)
            self.open_answer_sockets()
            if memory:
                memory.close()
            if firewall.guard_ports and not stood:
                with contextlib.suppress(CommandError):  # there is none yet
                    firewall.unguard()
            raise
        self.configuration, self.settings, self.access.settings = configuration, settings, settings
        if memory:  # before there are keys and captures, should one of the next steps fail
            self.gate.memory, self.remembers = memory, True
        self.gate.memory.set_age(settings.max_packet_age if settings.aging else None)
        self.gate.memory.answers = configuration.answers
        self.gate.configure(configuration)
        self.ospa.configure(configuration)
        if captures != self.captures:
            self.listen(captures)
        else:
            self.open_answer_sockets()
        self.grants.move(firewall)
        self.knocks.configure(configuration)
        self.watch.check_rest = 0.0
        self.watch.restore()
        for name in changed(ServerSettings.digest_file, ServerSettings.digest_persistence,
                            ServerSettings.pid_file, ServerSettings.syslog_identity,
                            ServerSettings.syslog_facility):
            self.log.warning(f"{name} takes effect at the next start")
        self.metrics.write()

    def tell_guard(self) -> None:
        """Log what stays closed now that this server does not serve, and what opens it."""
        firewall = self.grants.firewall
        if firewall.guard_ports and firewall.guarded():
            until = firewall.trial if firewall.trial_left() < FOR_EVER else "a server runs"
            self.log.warning(f"Closed to everybody from now on, until {until} or --unguard: "
                             + port_list(firewall.guard_ports))

    def flush(self) -> None:
        """Close all that is open: grants, cycles, and grants that earlier settings have left."""
        self.commands.close_all(FLUSHED)
        try:
            self.grants.flush()
        finally:
            if not self.commands.test:
                flush_leftovers(self.settings, self.grants.firewall, self.log)

    def turn(self) -> None:
        """Wait for the next thing to do, and do it."""
        self.manager.keep_alive()
        due = min([self.watch.check_due, self.watch.guard_due, self.metrics.due,
                   self.manager.due, self.grants.next_due(),
                   self.clocks.monotonic() + self.grants.firewall.trial_left(),
                   self.commands.next_due(), *(capture.due for capture in self.captures),
                   *(run.due for run in self.gate.runs),
                   *(sequence.next_due() for sequence in self.knocks.owners)])
        while self.hear(due) and self.clocks.monotonic() < due:
            pass  # there is nothing else to do
        self.gate.go_on_with_gpg()
        self.grants.expire()
        self.commands.reap()
        self.knocks.expire()
        if self.grants.firewall.trial_left() <= 0:  # the kernel opens the guard, or has opened it
            self.grants.end_trial(TRIAL_OVER)
        if self.clocks.monotonic() >= self.watch.guard_due:
            self.watch.mend_guard()
        if self.clocks.monotonic() >= self.watch.check_due or self.grants.doubtful:
            self.watch.restore()
        if self.clocks.monotonic() >= self.metrics.due:
            self.metrics.write()

    def hear(self, due: float) -> bool:
        """Wait for events, and react to them; return whether there was only junk, in datagrams."""
        is_woken, readable = self.ears.wait(due)
        self.emptied, accepted = 0, self.tally.counts.get("accepted", 0)
        only_junk = bool(readable) and not is_woken
        for capture in self.captures:
            if capture.fileno() in readable or self.clocks.monotonic() >= capture.due:
                self.drain(capture)
                only_junk = only_junk and capture.is_fair and capture.waiting is None
        accepted -= self.tally.counts.get("accepted", 0)
        self.ears.rest(self.emptied + accepted)
        return (only_junk and not accepted and self.running and not self.gate.runs
                and not self.grants.doubtful)

    def command(self, request: str) -> str:
        """Do what root asks for, by a signal or the control socket; return the answer."""
        name, *arguments = request.split(" ")
        lines: List[str] = []
        try:
            if name == "guard":
                lines = [guard_text(self.grants.firewall)]
            elif name == "flush":
                self.log.info("Closing all grants.")
                self.flush()
            elif name == "open":
                opener, ports, address, lasting = arguments
                lines = self.access.open_by_hand(*parse_hand(ports, address, lasting), opener)
            elif name == "close":
                lines = self.access.close_by_hand(" ".join(arguments))
            else:
                return "error: no such request"
        except (SpaError, OSError, ValueError) as error:
            retries = name == "flush" and isinstance(error, CommandError)  # others: see expire()
            self.log.error(f"{error}; trying again" if retries else str(error))
            return f"error: {error}"
        lines[MOST_LINES:] = ["(and more)"] if len(lines) > MOST_LINES else []
        return "\n".join(["ok"] + lines)

    def report(self) -> str:
        """Return how many packets were accepted and rejected, and how many grants are open."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return (f"Packets seen: {self.tally}; {self.grants.count_open()} grants are open; "
                f"since {since}")

    def stop(self) -> None:
        """End cleanly: close the grants, unless FLUSH_IPT_AT_EXIT is N; a guard stays."""
        # Packets of a capture file, and those that PACKET_LIMIT counts, still get gpg's answers.
        while self.gate.runs and (self.settings.capture_file or self.gate.is_full()):
            time.sleep(0.01)
            self.gate.go_on_with_gpg()
        for run in self.gate.runs:
            run.kill()
        self.log.write(DEBUG if self.configuration.is_knockd else INFO, self.report())
        self.gate.memory.close()
        self.gate.answer_sockets.close()
        self.tell_guard()
        self.commands.close_all(SHUT_DOWN)  # what they opened, even with FLUSH_IPT_AT_EXIT N
        try:
            if self.settings.flush_at_stop:
                try:
                    self.grants.flush()
                finally:
                    self.grants.firewall.withdraw()
        finally:
            self.commands.stop()  # and what runs beside the end of a grant


METRICS_SECONDS = 15  # between two METRICS_FILE: as often as Prometheus usually asks

# Name, help, and the values by their label. A name with _total counts up from the start on.
METRICS: Tuple[Tuple[str, str, Callable[[Server], Dict[str, float]]], ...] = (
    ("spa_up", "1 while the server runs, 0 once it has stopped",
     lambda server: {f'version="{VERSION}"': int(server.running)}),
    ("spa_start_time_seconds", "when the server started, in epoch seconds",
     lambda server: {"": server.since}),
    ("spa_packets_total", "packets and knock sequences, by what became of them",
     lambda server: {f'verdict="{each}"': server.tally.counts.get(each, 0) for each in REASONS}),
    ("spa_knocks_total", "knock sequences that were completed",
     lambda server: {"": server.tally.sequences}),
    ("spa_grants", "doors that are open in the firewall",
     lambda server: {"": server.grants.count_open()}),
    ("spa_kernel_dropped_packets_total", "packets that came faster than the server read them",
     lambda server: {"": server.lost + sum(each.lost() for each in server.captures)}),
    ("spa_firewall_failures_total", "changes of the firewall, or looks at it, that failed",
     lambda server: {"": server.grants.firewall.failed}),
    ("spa_firewall_checked_timestamp_seconds", "when the server last saw that its rules stand",
     lambda server: {"": server.watch.looked}),
    ("spa_log_dropped_lines_total", "lines that nothing took",
     lambda server: {f'to="{name}"': each.dropped + each.reported for name, each in (
         ("stderr", server.log.stream), ("syslog", server.log.syslog), ("file", server.log.file))
         if each}),
)


class Metrics:
    """METRICS_FILE: the server's counters in Prometheus's text format, for node_exporter."""

    def __init__(self, server: Server) -> None:
        self.server, self.due, self.failed = server, FOR_EVER, False

    def write(self) -> None:
        """Write the file, if there is to be one, under another name first; log a failure once."""
        path = None if self.server.settings.capture_file else self.server.settings.metrics_file
        self.due = self.server.clocks.monotonic() + METRICS_SECONDS if path else FOR_EVER
        if not path:  # the settings with which a capture file is judged are a service's
            return
        failed, self.failed = self.failed, True
        try:
            if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
                raise OSError(errno.EINVAL, "expected a regular file", path)
            with contextlib.suppress(FileNotFoundError):  # it may be another user's, or a link
                os.unlink(path + ".new")
            with open(path + ".new", "x", opener=open_ours, encoding="ascii") as file:
                os.fchmod(file.fileno(), 0o644)  # node_exporter is not root
                for name, help, values in METRICS:
                    kind = "counter" if "_total" in name else "gauge"
                    file.write(f"# HELP {name} {help}\n# TYPE {name} {kind}\n")
                    for label, value in values(self.server).items():
                        file.write(f"{name}{{{label}}} {value}\n".replace("{}", ""))
            os.rename(path + ".new", path)
            self.failed = False
        except OSError as error:
            if not failed:
                self.server.log.error(f"{explain(error, path)}; METRICS_FILE is not written")


# ======================================================================================
# 32. Process
#
# Pid file, control socket, signals, background and reload.
# ======================================================================================

CONTROL_SUFFIX = ".sock"  # follows the name of the pid file
ANSWER_SECONDS = 30  # as PROGRAM_SECONDS: the server may be waiting for a firewall program


def lock_pid_file(path: str, log: Log, program: str = "fwknopd") -> int:
    """Return the descriptor of the pid file with our pid in it, locked until it is closed.

    Raise SpaError if another server has it, or a link is in its place. A disk that fails does not
    keep this server from serving: the log says what does not work then.
    """
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        file = open_pid_file(path)
    except OSError as error:
        if error.errno not in DISK_FAILURES:
            raise
        log.error(f"{explain(error)}; nothing keeps a second server from starting, and -S, -K "
                  "and -R do not find this one")
        return os.open(os.devnull, os.O_RDWR)  # the caller closes this instead
    for wait in (0.05, 0.1, 0.2, 0):  # --status holds the lock for a moment, too
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kind of lock that fwknopd has
            # Whoever sees the exclusive lock reads our pid, so write it under a shared one first.
            # Another start may do the same at that time, so write it once more.
            for lock in (fcntl.LOCK_SH, fcntl.LOCK_EX):
                fcntl.flock(file, lock | fcntl.LOCK_NB)
                write_pid(file, path, log)
            return file
        except BlockingIOError:
            time.sleep(wait)
    pid = os.pread(file, 32, 0).decode("latin-1").strip()
    os.close(file)
    raise SpaError(f"An instance of {program} is already running: (PID={pid}).")


def open_pid_file(path: str) -> int:
    """Open the pid file. A new one gets our pid before its name, so that it is never empty."""
    if not os.path.lexists(path):
        temporary = f"{path}.{os.getpid()}"
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):  # no room, no links here, or another start was faster
            os.write(file, b"%d\n" % os.getpid())
            os.link(temporary, path)
        os.close(file)
        os.unlink(temporary)
    return open_itself(path, os.O_RDWR | os.O_CREAT)


def write_pid(file: int, path: str, log: Log) -> None:
    """Write our pid over another one. Newlines hide the rest of a longer one until it is cut."""
    text = b"%d\n" % os.getpid()
    try:
        os.pwrite(file, text.ljust(os.fstat(file).st_size, b"\n"), 0)
        os.ftruncate(file, len(text))
    except OSError as error:
        log.error(f"{explain(error, path)}; -S, -K and -R do not find this server")


def running_server(path: str) -> Optional[int]:
    """Return the pid of the server that has locked this file, or None; change nothing."""
    try:
        file = open_itself(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        pid = os.pread(file, 32, 0).strip()
        if not pid.isdigit():
            raise SpaError(f"{path}: a server that could not write its pid has locked it") from None
        return int(pid)
    finally:
        os.close(file)


class Control:
    """A Unix socket beside the pid file, through which root sends the running server requests.

    A request is one line in one packet. The answer is one packet, too: `ok`, perhaps with lines
    behind it, or `error:` and the reason.
    """

    def __init__(self, pid_file: str, selector: selectors.BaseSelector,
                 answer: Callable[[str], str]) -> None:
        self.path, self.selector, self.answer = pid_file + CONTROL_SUFFIX, selector, answer
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)

    def listen(self) -> None:
        """Listen, at a file for its owner alone; raise OSError if that fails."""
        mask = os.umask(0o177)
        try:
            if os.path.lexists(self.path):  # its server is dead: this one has locked the pid file
                os.unlink(self.path)
            self.socket.bind(self.path)
            self.socket.listen(8)  # few ask at a time, by hand
        finally:
            os.umask(mask)
        self.selector.register(self.socket, selectors.EVENT_READ, self.accept)

    def accept(self) -> None:
        """Accept a connection from root, or from the user that this server runs as."""
        try:
            peer = self.socket.accept()[0]
        except OSError:  # it has gone already
            return
        peer.setblocking(False)
        _, user, _ = struct.unpack("=iII", peer.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, 12))  # struct ucred
        if user in (0, os.geteuid()):
            self.selector.register(peer, selectors.EVENT_READ, partial(self.respond, peer))
        else:
            peer.close()

    def respond(self, peer: socket.socket) -> None:
        """Do what a request asks for, answer it, and close the connection."""
        self.selector.unregister(peer)
        with peer, contextlib.suppress(OSError):  # the other end may have gone
            request = peer.recv(4096).decode("ascii", "replace").strip()
            if request:
                peer.send(self.answer(request).encode("ascii", "replace") + b"\n")

    def close(self) -> None:
        """Close the socket, for good, and remove its file."""
        self.socket.close()
        with contextlib.suppress(OSError):  # somebody else removed it, or it was never there
            os.unlink(self.path)


def ask_server(pid_file: str, request: str) -> str:
    """Return the running server's answer to a request; raise OSError if it gives none in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.settimeout(ANSWER_SECONDS)
        server.connect(pid_file + CONTROL_SUFFIX)
        server.send(request.encode("ascii", "replace"))
        return server.recv(1 << 18).decode("ascii", "replace").strip()


def catch_signals(selector: selectors.BaseSelector) -> List[int]:
    """Return a list that signals are added to from now on. Each signal also wakes the selector."""
    pending: List[int] = []
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # stays open, for late signals
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: pending.append(number))
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # it only has to wake the loop
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    selector.register(reader, selectors.EVENT_READ, partial(os.read, reader, 4096))
    return pending


def go_to_background() -> int:
    """Go on in a child in a session of its own. Return a descriptor for the child's ready byte."""
    reader, writer = os.pipe()
    if os.fork():  # the parent waits for that byte; it ends with 1 if the child ends without it
        os.close(writer)
        os._exit(0 if os.read(reader, 1) else 1)
    os.close(reader)
    os.setsid()
    os.chdir("/")
    return writer


def run_server(read: Callable[[], Configuration], daemon: bool, rotate: bool, trial: int,
               log: Log) -> int:
    """Serve until a signal ends the server; return the exit code. `trial` is 0, or in seconds."""
    configuration = read()
    log.level = DEBUG if configuration.settings.verbose else INFO
    firewall = configuration.choose_firewall(log)
    if trial:
        start_trial(firewall, trial)
    ready = go_to_background() if daemon else None
    program = configuration.words("fwknopd", "knockd")
    file = lock_pid_file(configuration.settings.pid_file, log, program)
    try:
        if rotate:
            log.info("Rotating digest cache file.")
            rotate_digest_cache(configuration.settings.digest_file)
        return serve_until_told(configuration, firewall, read, ready, log)
    finally:
        os.close(file)  # the file stays: without it, two servers could lock two files


def serve_until_told(configuration: Configuration, firewall: Firewall,
                     read: Callable[[], Configuration], ready: Optional[int], log: Log) -> int:
    """Start the server, say so through `ready`, serve until told to stop; return the exit code."""
    configuration.tell(log)
    warn_of_host(configuration, firewall, log)
    log.info(configuration.words("Starting fwknopd"))
    server = Server(configuration, firewall, log)
    signals = catch_signals(server.selector)
    server.start(configuration.settings.flush_at_start)
    control = Control(configuration.settings.pid_file, server.selector, server.command)
    try:
        control.listen()
    except OSError as error:
        log.warning(f"No control socket beside the pid file ({explain(error, control.path)}): "
                    "--fw-flush can't ask this server; kill -USR2 can")
    if firewall.guard_ports:
        log.info(guard_text(firewall))
    interfaces = ",".join(configuration.knockd.options.interfaces) if configuration.knockd else ""
    log.info(configuration.words("Starting fwknopd main event loop.",
                                 "starting up, listening on " + interfaces))
    server.manager.tell("READY=1")
    if ready is not None:
        if firewall.trial:
            write_to(sys.stdout, guard_text(firewall) + "\n")
        os.write(ready, b"1")
        os.close(ready)
        with open(os.devnull, "r+b", buffering=0) as null:
            for number in range(3):
                os.dup2(null.fileno(), number)
        log.close_stream()
    while server.running:
        server.turn()
        while signals:
            obey_signal(signals.pop(0), server, read)
    server.manager.tell("STOPPING=1")
    try:
        server.stop()
    finally:
        server.metrics.write()
        control.close()
        log.info(server.configuration.words("Shutting Down fwknopd.", "shutting down"))
    return server.exit_code


def warn_of_host(configuration: Configuration, firewall: Firewall, log: Log) -> None:
    """Warn of what hinders the settings on this host: old guards, its rules, no forwarding."""
    settings = configuration.settings
    guards: List[Leftover] = []
    try:
        if not configuration.test:
            firewall_programs(settings)
            guards = leftovers(GUARD, settings, Log())
        kinds = {texts[0].startswith("table") for texts, _ in guards}  # iptables' has chains
        if kinds - ({isinstance(firewall, NftFirewall)} if firewall.guard_ports else set()):
            log.warning("A guard from earlier settings still closes ports, and no knock opens "
                        "them; --unguard takes it away")
        for text in obstacles(settings, configuration.stanzas, firewall) if firewall.keeps else ():
            log.warning(text)
    except ConfigError as error:  # of a program that these settings do not use
        log.warning(str(error))
    except Exception as error:  # serve without having looked, whatever text that firewall has
        log.debug(f"{error!r}; whether the host's rules are in the way is not known")
    for version, name in ((4, "net/ipv4/ip_forward"), (6, "net/ipv6/conf/all/forwarding")):
        if settings.forwarding and read_proc("sys/" + name) == "0":
            setting = name.replace("/", ".")
            log.warning(f"ENABLE_IPT_FORWARDING: no IPv{version} is forwarded while {setting} is 0")


def obey_signal(number: int, server: Server, read: Callable[[], Configuration]) -> None:
    """Do what a signal asks for: reload, log the counters, close all that is open, or stop."""
    if number == signal.SIGHUP:
        reload_files(server, read)
    elif number == signal.SIGUSR1:
        server.log.info(server.report())
    elif number == signal.SIGUSR2:
        server.log.info("Got SIGUSR2.")
        server.command("flush")
    else:
        server.end_loop(f"Got {signal.Signals(number).name}. Exiting...")


def reload_files(server: Server, read: Callable[[], Configuration]) -> None:
    """Read the files again; keep the old settings if the new ones are bad."""
    log = server.log
    log.info(server.configuration.words("Got SIGHUP. Re-reading configs.",
                                        f"re-reading config file: {server.settings.knockd_file}"))
    server.manager.tell("RELOADING=1", f"MONOTONIC_USEC={server.clocks.monotonic() * 1e6:.0f}")
    try:
        configuration = read()
        configuration.tell(log)
        firewall = configuration.choose_firewall(log, server.clocks)
        server.reload(configuration, firewall)
        warn_of_host(configuration, firewall, log)
        log.level = DEBUG if configuration.settings.verbose else INFO
        for line in "Re-starting fwknopd", "Starting fwknopd main event loop.":
            log.info(configuration.words(line))
        if firewall.trial and firewall.guard_ports:
            log.warning(guard_text(firewall))
    except Exception as error:  # a mistake of ours in reading must not end the server
        known = isinstance(error, (SpaError, OSError))
        text = explain(error) if known else internal_error(error, log.level >= DEBUG)
        log.error(f"{text}; going on with the old settings")
    server.manager.tell("READY=1")


# ======================================================================================
# 33. First configuration
#
# `--init tcp/22` tries what a server needs, makes keys and the files that are missing, and prints
# the client's stanza; `--print-client` prints it again. More stanzas are keygen.py's work.
# ======================================================================================

CLIENT_HEAD = """# On the client: python3 spa_client.py --import
# Paste this there, then Ctrl-D. Or put it into ~/.fwknoprc (mode 0600). Then knock:
# python3 spa_client.py -n {name} --wait 10

[{name}]
"""
NEXT_STEPS = """# Here: stay logged in until the client has got in. Then type Ctrl-C, and:
# python3 spa_server.py --daemon
{far}# For after a boot: python3 spa_server.py --print-unit systemd    # or openrc, procd
# Give each the same -c, -a and -r as now. To undo it all: -K, then --unguard.
"""
FAR_STEPS = """# If this host is far away, do not wait: type Ctrl-C now, and:
# python3 spa_server.py --trial 300    # opens again after 300 seconds without a knock
"""

# Without an address in the packet, so that it works for a client behind NAT, too.
SERVER_STANZA = """# {name}
SOURCE                      ANY
OPEN_PORTS                  {access}
KEY_BASE64                  {key}
HMAC_DIGEST_TYPE            SHA256
HMAC_KEY_BASE64             {hmac_key}
FW_ACCESS_TIMEOUT           30
REQUIRE_SOURCE_ADDRESS      N
ANSWER                      Y
"""


def first_configuration(ports: FrozenSet[Port], settings: ServerSettings, config_path: str,
                        test: bool, trial: int) -> None:
    """Try what the server needs, then write access.conf, and fwknopd.conf if it is missing. An
    error leaves nothing behind."""
    access, stanza, quiet = port_list(ports).replace(" ", ""), Stanza(1), Log()
    stanza.set_defaults()
    texts = {} if may_exist(config_path) else {
        config_path: f"GUARD_PORTS                 {access};\n"}
    if texts:
        settings.set_line(Line("--init", 0, ServerSettings.guard_ports.name, access))
    pid = running_server(settings.pid_file)
    if pid:
        raise SpaError(f"a server is running (pid={pid})", "end it first, with -K")
    firewall = choose_firewall(settings, [stanza], test, quiet)
    firewall.check_guard()
    if trial:
        start_trial(firewall, trial)
    captures = Configuration(settings, [stanza], []).open_captures(quiet)
    close_captures(captures, ())
    if not captures:
        raise SpaError(f"Interface {settings.interface} does not exist, so no knock would be heard",
                       "`ip link` lists those that there are")
    texts[settings.access_file] = SERVER_STANZA.format(
        name=socket.gethostname().partition(".")[0] or "server", access=access,
        key=base64(os.urandom(32)), hmac_key=base64(os.urandom(64)))
    write_new_files(texts)


def client_stanza(settings: ServerSettings, stanza: Stanza) -> str:
    """Return the client's lines for a stanza; raise SpaError if only the client has its key."""
    if not stanza.keys:
        why = stanza.void or ("its client alone has the key that opens it" if stanza.takes_packets
                              or stanza.openspa_clients else "only a knock sequence")
        raise SpaError(f"stanza #{stanza.number} has no KEY to print: {why}")
    (key, hmac_key), port = stanza.secrets(), settings.packet_port
    rows = (("ALLOW_IP", "" if stanza.require_source else "source"),
            ("SPOOF_USER", stanza.require_username),
            ("ACCESS", port_list(stanza.open_ports).replace(" ", "")),
            ("SPA_SERVER", own_address()),
            ("SPA_SERVER_PORT", port if port != 62201 else ""),
            ("KEY_BASE64", base64(key)),
            ("ENCRYPTION_MODE", stanza.mode if stanza.mode != "CBC" else ""),
            ("HMAC_DIGEST_TYPE", stanza.hmac_type.name if hmac_key else ""),
            ("HMAC_KEY_BASE64", base64(hmac_key)),
            ("USE_HMAC", "Y" if hmac_key else ""),
            ("ONE_CONNECTION", "Y" if stanza.one_connection else ""),
            ("KNOCK_SEQUENCE", stanza.texts.get("KNOCK_SEQUENCE") if stanza.require_knock else ""))
    name = stanza_name(stanza)
    if not name or name.lower() == "default" or name.upper().strip(NAME_CHARACTERS + "-.@"):
        name = "server"  # the other one is no name for an rc file, or not as it is for a shell
    return CLIENT_HEAD.format(name=name) + "".join(
        f"{directive:<27} {value}\n" for directive, value in rows if value)


def stanza_name(stanza: Stanza) -> str:
    """Return the first of the comments right above SOURCE, as keygen.py makes it; or the user."""
    line, name = stanza.lines[Stanza.source.name], stanza.require_username
    above = read_file(line.file).split("\n")[:line.number - 1]
    while above and above[-1].startswith("#"):
        name = above.pop().strip("# \t\r")
    return name


def base64(key: bytes) -> str:
    """Return a key in base64."""
    return binascii.b2a_base64(key, newline=False).decode()


def write_new_files(texts: Dict[str, str]) -> None:
    """Write files that did not exist, for their owner alone, and to the disk: all or none."""
    with contextlib.ExitStack() as undo:
        for path, text in texts.items():
            folder = os.path.dirname(path)
            try:
                if not os.path.isdir(folder):
                    os.makedirs(folder, 0o700)
                    undo.callback(os.rmdir, folder)
                number = open_ours(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                undo.callback(os.unlink, path)
                with open(number, "w") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise SpaError(explain(error, path)) from None
        undo.pop_all()


def ssh_connection() -> List[str]:
    """Return the fields of SSH_CONNECTION. If sudo or su dropped it, a parent process has it."""
    process = "self"
    while process.strip("0"):  # the first one has the parent 0
        environment = "\0" + read_proc(f"{process}/environ")
        if "\0SSH_CONNECTION=" in environment:
            return environment.split("\0SSH_CONNECTION=")[1].split("\0")[0].split(" ")
        process = (read_proc(f"{process}/stat").rpartition(")")[2].split() + ["", ""])[1]
    return []


def own_address() -> str:
    """Return the address that the administrator's ssh came to, or that this host sends from."""
    with contextlib.suppress(OSError, ValueError):  # no ssh, or an address that is not this host's
        peer, _, here, _ = ssh_connection()
        family, kind, *_, address = socket.getaddrinfo(
            here, 0, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
        other, own = (ipaddress.ip_address(each.partition("%")[0]) for each in (peer, here))
        if not (own.is_loopback or own.is_unspecified):
            return here + ("    # put the client's interface after the %" if "%" in here else
                           "    # behind a NAT, put its public address here"
                           if own.is_private and not other.is_private else "")
    for family, known in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((known, 62201))  # sends nothing
            return str(probe.getsockname()[0])
    return "127.0.0.1    # put this host's address here"


# ======================================================================================
# 34. Units
#
# `--print-unit` prints the files with which an init system puts the guard up before the network,
# and starts the server; the first lines install and remove them. `--print-launcher` prints the
# program that starts the compiled form of this script.
# ======================================================================================

HOST_RULES = ("nftables.service netfilter-persistent.service iptables.service ufw.service "
              "firewalld.service")  # each loads its own rules; some remove all others first
UNIT_STEPS = """# To install these files, read them, and run as root:
#   mkdir -p {folders}
#   {command} --print-unit {kind} | awk '/^# [/]/ {{file = $2; next}} file {{print > file}}'
#   {enable}
# To remove them:
#   {disable}; rm -r {paths}
#   {command} --unguard"""
SYSTEMD_GUARD = """[Unit]
Description=Close GUARD_PORTS to everybody without a grant
DefaultDependencies=no
Wants=network-pre.target
Before=network-pre.target
After=local-fs.target {rules}
PartOf={rules}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={command} --guard

[Install]
WantedBy=multi-user.target"""
SYSTEMD_SERVER = """[Unit]
Description=Open ports to whoever knocks with a key
After=network.target spa_guard.service docker.service {rules}
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={command}
ExecReload={command} -R
Restart=on-failure
RestartSec=5
WatchdogSec=120
KillMode=process
LimitCORE=0
UMask=0077
RuntimeDirectory={run}
RuntimeDirectoryMode=0700
RuntimeDirectoryPreserve=yes

[Install]
WantedBy=multi-user.target"""
SANDBOX = """{notes}
[Service]
CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW
ReadWritePaths={writable} -/run/xtables.lock
ProtectHome={home}
RestrictAddressFamilies=AF_INET AF_INET6 AF_NETLINK AF_PACKET AF_UNIX
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
""" + "\n".join("""LockPersonality=yes MemoryDenyWriteExecute=yes NoNewPrivileges=yes
PrivateDevices=yes PrivateTmp=yes ProtectClock=yes ProtectControlGroups=yes ProtectHostname=yes
ProtectKernelLogs=yes ProtectKernelModules=yes ProtectKernelTunables=yes ProtectProc=invisible
ProtectSystem=strict RestrictNamespaces=yes RestrictRealtime=yes RestrictSUIDSGID=yes
SystemCallArchitectures=native SystemCallErrorNumber=EPERM""".split())
ROOT_NOTES = """\
# Commands of stanzas and of knockd.conf run in here, and so does gpg. Leave this file out if they
# need other users, sudo, or files of users (%include_keys). Else take out the line in the way:
# gpg's keys below root's home need ProtectHome=no, files elsewhere ReadWritePaths, and legacy
# iptables whose modules are not loaded neither ProtectKernelModules nor CapabilityBoundingSet."""
USER_NOTES = """\
# The server runs as the user spa. It can't use legacy iptables, run commands as others or through
# sudo, use up lines of KNOCK_ONE_TIME_FILE, or read keys and gpg's home of other users. It warns
# that the group spa can read its files. Root's -K, -R, --fw-list, --open and --close work.
[Service]
User=spa
AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW"""
USER_STEPS = """useradd --system --no-create-home --shell /usr/sbin/nologin spa
#   chgrp spa {read} && chmod g=rX {read}
#   """
OPENRC_GUARD = """#!/sbin/openrc-run
depend() {{ after localmount iptables ip6tables nftables firewall; before net; }}
start() {{ ebegin "Closing GUARD_PORTS"; {command} --guard; eend $?; }}"""
OPENRC_SERVER = """#!/sbin/openrc-run
supervisor=supervise-daemon
command={program}
command_args="{arguments} --syslog-enable"
respawn_delay=5
respawn_max=0
retry=TERM/30
extra_started_commands=reload
depend() {{ use logger; after net iptables ip6tables nftables firewall spa_guard; }}
reload() {{ {command} -R; }}"""
PROCD_GUARD = """#!/bin/sh /etc/rc.common
START=19  # after `firewall`, which has the same number, and before `network`
start() {{ {command} --guard; }}"""
PROCD_SERVER = """#!/bin/sh /etc/rc.common
START=95
USE_PROCD=1
start_service() {{
    procd_open_instance
    procd_set_param command {command}
    procd_set_param respawn 3600 5 0
    procd_set_param term_timeout 30
    procd_set_param stderr 1
    procd_close_instance
}}
reload_service() {{ {command} -R; }}"""
SYSTEMD = {"/etc/systemd/system/spa_guard.service": SYSTEMD_GUARD,
           "/etc/systemd/system/spa_server.service": SYSTEMD_SERVER,
           "/etc/systemd/system/spa_server.service.d/sandbox.conf": SANDBOX}
ENABLE = "systemctl daemon-reload; systemctl enable --now {names}"
DISABLE = "systemctl disable --now {names}"
# Files by their paths, what enables and disables them, and notes.
UNITS: Dict[str, Tuple[Dict[str, str], str, str, str]] = {
    "systemd": (SYSTEMD, ENABLE, DISABLE, ROOT_NOTES),
    "systemd-unprivileged": (SYSTEMD, USER_STEPS + ENABLE, DISABLE, USER_NOTES),
    "openrc": (
        {"/etc/init.d/spa_guard": OPENRC_GUARD, "/etc/init.d/spa_server": OPENRC_SERVER},
        "cd /etc/init.d; chmod 755 {names}; "
        "for each in {names}; do rc-update add $each boot; rc-service $each start; done",
        "for each in {names}; do rc-service $each stop; rc-update del $each boot; done", ""),
    "procd": (
        {"/etc/init.d/spa_guard": PROCD_GUARD, "/etc/init.d/spa_server": PROCD_SERVER},
        "cd /etc/init.d; chmod 755 {names}; for each in {names}; do ./$each enable; ./$each start; "
        "done", "cd /etc/init.d; for each in {names}; do ./$each stop; ./$each disable; done", "")}


def own_command(arguments: "Arguments", others: Iterable[str], log: Log) -> List[str]:
    """Return the words that start this program with the same files and directives."""
    script, started = map(os.path.realpath, (__file__, sys.argv[0]))
    is_launcher = os.path.basename(started) == "spa_server"
    words = ([started] if is_launcher else [sys.executable, "-I", script]) + arguments.kept
    for word in (*words, *others):  # paths that the unit has, too
        if word.upper().strip(NAME_CHARACTERS + "/.,:=@+-") or not word:
            raise SpaError(f"--print-unit: '{word}' would need quotes in a unit",
                           "take another path, or fwknopd.conf instead of an option")
    paths = sorted({words[0], os.path.realpath(words[0]), script})
    for path in paths:
        folder, status = os.path.dirname(path), os.stat(path)
        paths += [folder] * (folder not in paths)  # its owner can put another file there
        if status.st_uid or (status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX):
            log.warning(f"{path} is not root's alone: whoever can write there becomes root; "
                        "--print-launcher says where to install it")
    return words


def print_unit(arguments: "Arguments", kind: str, log: Log) -> None:
    """Print what installs and removes the files of a unit, then each file behind its path."""
    if kind not in UNITS:
        raise UsageError("--print-unit: expected " + ", ".join(UNITS))
    settings, (files, enable, disable, notes) = read_settings(arguments)[0], UNITS[kind]
    in_root = read_settings(arguments, directory="/")[0].texts
    for name in [name for name, text in settings.texts.items() if text != in_root[name]]:
        raise SpaError(f"--print-unit: {name} is a relative path, and a service starts in /",
                       f"{name} {settings.texts[name]}")
    if may_exist(arguments.config_file) and not settings.guard_ports:
        files = {path: text for path, text in files.items() if "guard" not in path}
    read = {arguments.config_file, settings.access_file}
    written = {os.path.dirname(path) for path in (
        *read, settings.digest_file, settings.pid_file, settings.metrics_file) if path}
    words = own_command(arguments, sorted({*read, *written, settings.run_directory}), log)
    homes = "/home/", os.path.expanduser("~root/")
    in_homes = any((path + "/").startswith(homes) for path in (*words, *written))
    run = os.path.realpath(settings.run_directory)
    texts = {
        "kind": kind, "notes": notes, "rules": HOST_RULES, "command": " ".join(words),
        "program": words[0], "arguments": " ".join(words[1:]),
        "home": "read-only" if in_homes else "yes",
        "run": run[5:] if run.startswith("/run/") else "fwknop",
        "writable": " ".join("-" + path for path in sorted(written)),
        "read": " ".join(sorted(read | {*map(os.path.dirname, read)} - {"/etc"})),
        "folders": " ".join(sorted({*map(os.path.dirname, files)})),
        "paths": " ".join(path.partition("/sandbox")[0] for path in files),
        "names": " ".join(os.path.basename(path).partition(".")[0] for path in files
                          if "/sandbox" not in path)}
    texts.update(enable=enable.format(**texts), disable=disable.format(**texts))
    for text in (UNIT_STEPS, *(f"# {path}\n{text}" for path, text in files.items())):
        say(text.format(**texts))


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


# ======================================================================================
# 35. Check
#
# `--check` says who may reach the ports now, what a knock would change, and what is in the way.
# It changes nothing.
# ======================================================================================


Finding = Tuple[int, str]  # a line: its rank, and what is, and what to do about it
WRONG, ODD, FACT = range(3)  # a port is open or stays closed; worth a look; nothing to do
MARKS = ("[!] ", "[-] ", "[+] ")
FIRST_SECOND = 1763856000  # 2025-11-23: no clock of a host with this program is behind that
# What starts a program after a boot: of systemd, OpenWrt, SysV, OpenRC, runit, BusyBox and cron.
STARTERS = """etc/systemd/system/*.wants/* usr/lib/systemd/system/*.wants/* etc/rc.d/S* etc/rc?.d/S*
etc/rc.d/rc?.d/S* etc/runlevels/*/* etc/service/*/run etc/rc.local etc/rc.d/rc.local etc/inittab
etc/crontab etc/cron.d/* var/spool/cron/root var/spool/cron/crontabs/root""".split()
# Words of warnings of a start that weigh more here, or less: about a choice that many make.
WORSE = ("no knock opens", "a knock changes nothing", "has expired", "writable by others",
         "does not exist", "there is no chain", "going on without this")
CHOICES = ("REQUIRE_SOURCE_ADDRESS not enabled", "Including key file", "no OPEN_PORTS:")


class Checkup(Log):
    """The state that the checks share; a log that keeps errors and warnings as findings."""

    def __init__(self, arguments: "Arguments", root: str = "/") -> None:
        super().__init__()
        self.findings: List[Finding] = []
        self.root, self.clocks = root, CLOCKS
        self.server: Optional[int] = None  # its pid, if one runs
        self.firewall = Firewall("", self)
        self.chains: List[HostChain] = []
        self.versions = (4, 6) if read_proc("net/if_inet6") else (4,)
        self.settings = read_settings(arguments, self)[0]
        self.usable = not self.findings
        self.configuration: Optional[Configuration] = None
        with self.noting_failure():
            self.configuration = read_configuration(arguments) if self.usable else None
        self.stanzas = self.configuration.stanzas if self.configuration else []

    def write(self, severity: int, text: str) -> None:
        """Keep a line."""
        if severity <= WARNING:
            rank = (WRONG if severity <= ERROR or any(each in text for each in WORSE) else
                    FACT if any(each in text for each in CHOICES) else ODD)
            self.findings.append((rank, text.replace("[-] ", "").translate(SHOWN)))

    @contextlib.contextmanager
    def noting_failure(self) -> Iterator[None]:
        """Make an error inside of the `with` a finding, too."""
        try:
            yield
        except (SpaError, OSError, ValueError) as error:
            self.error("; ".join(filter(None, (explain(error), getattr(error, "hint", "")))))
            self.usable = self.usable and not isinstance(error, ConfigError)

    def ask(self, name: str, *arguments: str) -> str:
        """Return what a program says; "" if there is none, or if it fails."""
        program = find_program(name)
        with contextlib.suppress(CommandError):
            return run_program([program, *arguments], seconds=5).strip() if program else ""
        return ""


def check_server(check: Checkup) -> Iterator[Finding]:
    """Look for the server of these settings, and for others beside it."""
    check.server = running_server(check.settings.pid_file)
    yield ((FACT, f"A server runs (pid={check.server})") if check.server else
           (WRONG, "No server runs with these files: no knock is heard; start it"))
    for pid in filter(str.isdigit, os.listdir("/proc")):
        argv = read_proc(pid + "/cmdline").split("\0")
        argv = argv[1:4] if os.path.basename(argv[0]).startswith("python") else argv[:1]
        names = {"spa_server.py", "spa_server", "fwknopd", "knockd"} & set(
            map(os.path.basename, argv))
        parent = read_proc(pid + "/stat").rpartition(")")[2].split()[1:2]
        ours = {str(os.getpid()), str(check.server)}
        with contextlib.suppress(OSError):  # it has ended, or is in another container
            here = os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
            if names and here and not ours & {pid, *parent}:
                yield ODD, (f"Another {names.pop()} runs (pid={pid}), and hears the same knocks: "
                            "end it, unless it opens other ports")


def check_firewall(check: Checkup) -> Iterator[Finding]:
    """Gather the warnings of a start about the firewall, and look for the chains of grants."""
    if not check.configuration:
        check.firewall = choose_firewall(check.settings, None, False, check)
    else:
        load_gpg(check.settings, check.stanzas)
        check.firewall = check.configuration.choose_firewall(check)
        warn_of_host(check.configuration, check.firewall, check)
    if isinstance(check.firewall, NftFirewall):
        for chain in check.firewall.host_chains:
            explain_failure(check.firewall.program, chain, chain in check.firewall.accept)
    by = outside(check.settings)
    yield FACT, f"Grants go to: {check.firewall.describe() or 'nowhere'}" + (
        f"; the next lines are about packets that come by {by}" if by else "")


def check_ports(check: Checkup) -> Iterator[Finding]:
    """Say of each port who reaches it now, and what a knock would change."""
    settings, firewall = check.settings, check.firewall
    ports = set(settings.guard_ports)
    if not only_guarded(settings):
        ports = ports.union(*[stanza.open_ports or SSH for stanza in check.stanzas])
    check.chains = host_chains(settings)
    drops = [line for line in firewall.listing().splitlines()
             if COMMENT in line and "drop" in line.lower()]
    if any("@trial" in line or "TIME" in line for line in drops):
        yield WRONG, ("The guard is on trial: it opens again, or is open by now, unless a knock "
                      "opens one of its ports in time; the log says until when")
    if drops and check.server:
        with contextlib.suppress(SpaError):  # it has no control socket
            state = " ".join(have_server_do("guard", settings, check.server) or ())
            if port_list(settings.guard_ports) not in state:  # as guard_text() lists them
                yield WRONG, (f"The server's guard is an older one ({state}): -R lets it read its "
                              "files again")
    grants = firewall.grants()
    # In iptables each family has a guard of its own. One whose trial is over closes nothing.
    guarded = firewall.guarded() and len(drops) >= (
        len(check.versions) if isinstance(firewall, IptablesFirewall) else 1)
    for port in sorted(ports):
        found: Dict[Finding, List[str]] = {}
        for version in check.versions:
            for finding in port_findings(check, guarded, version, port):
                found.setdefault(finding, []).append(f"IPv{version}")
        for (rank, text), names in found.items():
            family = "" if len(names) == len(check.versions) else f" ({names[0]})"
            yield rank, f"{port_list([port])}{family}: {text}"
        opened = [time.strftime(f"{each.door.source} until %X", time.localtime(each.expires))
                  for each in grants if each.door.port in (0, port[1])
                  and each.door.protocol in ("*", port[0])]
        openers = [f"#{each.number}" for each in check.stanzas if not each.void
                   and port in (each.open_ports or {port}) - each.restrict_ports]
        if check.stanzas:
            yield FACT if openers else ODD, (
                f"{port_list([port])}: opened by stanza {', '.join(openers) or '(none)'}; "
                f"open now for {', '.join(opened) or 'nobody'}")


def port_findings(check: Checkup, guarded: bool, version: int, port: Port) -> Iterator[Finding]:
    """Say who reaches a port, and whether a grant would work there."""
    verdicts = host_verdicts(check.chains, version, port)
    if port in check.settings.guard_ports:
        yield ((FACT, "closed by the guard to everybody without a grant") if guarded else
               (WRONG, "no guard closes it: the host's own firewall alone decides who gets in; "
                "start the server anew, or --guard"))
    elif "dnat" in verdicts:
        yield WRONG, ("led elsewhere by NAT, as Docker does, before the host's firewall can drop "
                      "it; GUARD_PORTS hides it")
    elif verdicts == {"accept"}:
        yield WRONG, ("open to everybody, since the host's firewall does not drop it; drop it "
                      "there, or set GUARD_PORTS")
    else:
        yield FACT, ("closed to everybody without a grant" if verdicts == {"drop"} else
                     "closed without a grant, but for those whom rules of the host let in")
        if host_verdicts(check.chains, version, port, "established") == {"drop"}:
            yield WRONG, ("no rule lets established connections go on: they end with the grant; "
                          "accept `ct state established` first")


def check_capture(check: Checkup) -> Iterator[Finding]:
    """Open the packet sockets of a start, and close them at once; look at the ports of others."""
    settings, configuration = check.settings, check.configuration
    captures: List[Capture] = []
    try:
        if configuration and not settings.capture_file:
            if configuration.takes_packets and not settings.udp_server:
                captures += open_packet_captures(settings, check)
            open_knock_captures(configuration.listenings(), configuration.four_only, check,
                                captures)
        for line in capture_lines(settings, captures):
            yield FACT, line
    except (PermissionError, AttributeError):
        yield ODD, ("No CAP_NET_RAW or no packet sockets here: only UDP port "
                    f"{settings.udp_port} hears knocks, and no sequence; let the server have them")
    finally:
        close_captures(captures, ())
    for used, port in ((settings.udp_server, ("udp", settings.udp_port)),
                       (settings.tcp_server, ("tcp", settings.tcp_port))):
        for version in check.versions if used else ():
            if port in settings.guard_ports or (
                    host_verdicts(check.chains, version, port) == {"drop"}):
                yield WRONG, (f"{port_list([port])}: no SPA packet reaches this socket, "
                              f"since IPv{version} is dropped before; let it in")


def check_stanzas(check: Checkup) -> Iterator[Finding]:
    """Look for stanzas that can't open anything, and for keys that can be guessed."""
    if check.configuration:
        check.configuration.tell(check)
    for stanza in check.stanzas:
        name = f"(stanza #{stanza.number}) "
        if stanza.open_ports and stanza.open_ports <= stanza.restrict_ports:
            yield WRONG, name + "RESTRICT_PORTS has all of OPEN_PORTS: it opens nothing"
        for row, here in ((Stanza.source, False), (Stanza.destination, True)):
            networks = getattr(stanza, row.attribute).networks
            if networks and not any(each.num_addresses > 1 or (
                    may_be_host(each[0]) and (not here or is_own_address(each[0])))
                                    for each in networks):
                yield WRONG, f"{name}{row.name} {stanza.texts[row.name]}: no packet can " + (
                    "be sent there, since it is no address of this host" if here else
                    "come from there; ANY means everybody")
        for key in (stanza.key or b"", stanza.hmac_key or b""):
            if key and (len(set(key)) < 5 or b"change" in key.lower()):
                yield WRONG, name + "KEY or HMAC_KEY is easy to guess; keygen.py makes one"
        for notice in filter(stanza.is_set, (Stanza.on_open, Stanza.on_close)):
            yield FACT, (f"{name}{notice.name} runs beside the firewall: "
                         + stanza.texts[notice.name] + Command((), stanza.account).runner)


def check_run_directory(check: Checkup) -> Iterator[Finding]:
    """Look whether the server can write its files, and who else can."""
    for path in {check.settings.run_directory, os.path.dirname(check.settings.digest_file)}:
        there = path
        while not os.path.exists(there):  # the server makes it
            there = os.path.dirname(there)
        full = os.statvfs(there).f_bavail == 0
        if full or not os.access(there, os.W_OK):
            yield WRONG, (f"{there}: {'the disk is full' if full else 'not writable'}: a restart "
                          "forgets which packets were seen; let the server write there")
        for text in folder_warnings(path):
            check.warning(text)


def check_clock(check: Checkup) -> Iterator[Finding]:
    """Look whether the clock is right, as far as this host knows."""
    limit = check.settings.max_packet_age
    offset = (check.ask("chronyc", "-c", "tracking") + ",,,,").split(",")[4].strip("-")
    synchronised = check.ask("timedatectl", "show", "-p", "NTPSynchronized")
    if check.clocks.wall() < FIRST_SECOND:
        yield WRONG, (time.strftime("The clock is wrong: %Y-%m-%d", time.gmtime(
            check.clocks.wall())) + "; set it, else every packet is rejected by its age")
    elif offset and float(offset) >= limit / 2:
        yield WRONG, (f"The clock is off by {float(offset):.0f} s, says chronyc, where a client's "
                      f"may differ by {limit} s: let chronyd step it")
    elif synchronised.endswith("=no"):
        yield ODD, (f"The clock is not synchronised; once it is off by {limit} s, every packet is "
                    "rejected: start an NTP client")
    else:
        yield FACT, ("The clock is synchronised" if offset or synchronised else
                      "Nothing here knows whether the clock is right: compare it with the client's")


def check_boot(check: Checkup) -> Iterator[Finding]:
    """Look for anything that starts this server after a boot; a line with --guard does not."""
    import glob
    names = {b"spa_server", os.path.basename(sys.argv[0]).encode()} - {b"", b"-c"}
    for pattern in STARTERS:
        for path in glob.glob(os.path.join(check.root, pattern)):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                lines = [line for line in file.read(1 << 16).splitlines()
                         if line.lstrip()[:1] != b"#" and b"--guard" not in line]
                if any(name in line for line in lines for name in names):
                    yield FACT, f"Starts after a boot: {path}"
                    return
    yield ODD, "Nothing starts this server after a boot; --print-unit prints what does"


# Each check, and whether only root can do it.
CHECKS: List[Tuple[Callable[[Checkup], Iterator[Finding]], bool]] = [
    (check_server, False), (check_firewall, True), (check_ports, True), (check_capture, True),
    (check_stanzas, False), (check_run_directory, True), (check_clock, False), (check_boot, False)]


def find_all(check: Checkup, is_root: bool) -> List[str]:
    """Return the lines of all checks, worst first; a check that fails is one."""
    if not is_root:
        check.warning("Only root can look at the firewall, the capture and the run directory; run "
                      "this as root")
    for find in [find for find, for_root in CHECKS if is_root or not for_root]:
        with check.noting_failure():
            for finding in find(check):
                check.findings.append(finding)
    found = sorted(dict.fromkeys(check.findings), key=lambda finding: finding[0])
    return [MARKS[rank] + text for rank, text in found]


# ======================================================================================
# 36. Command line
#
# Options with fwknopd's names (tests/spec/fwknop.md 3.1), what each of them does, and exit codes.
# ======================================================================================

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


CONFIG_FILE = "/etc/fwknop/fwknopd.conf"

# Letter, long name, argument, the directive or name that it sets, help.
OPTIONS = [Option(row) for row in """\
c config-file       FILE   config_file          fwknopd.conf to read
O override-config   FILES  override             more such files with commas between; the last wins
a access-file       FILE   ACCESS_FILE          access.conf to read
- access-folder     DIR    ACCESS_FOLDER        read all *.conf in DIR instead of access.conf
- knockd-conf       FILE   KNOCKD_CONF          serve the doors of a knockd.conf, too or alone
i interface         NAME   PCAP_INTF            interface to listen on, or any
P pcap-filter       FILTER PCAP_FILTER          packets to look at, in tcpdump's language
- pcap-any-direction -     ENABLE_PCAP_ANY_DIRECTION=Y look at packets that this host sends, too
- pcap-file         FILE   PCAP_FILE            judge the packets of a capture file, and end
C packet-limit      N      PACKET_LIMIT         end after N packets that look like SPA
U udp-server        -      ENABLE_UDP_SERVER=Y  listen on a UDP socket, not a packet socket
d digest-file       FILE   DIGEST_FILE          file to remember packets in
- rotate-digest-cache -    rotate               begin a new one; rename the old to `-old`
p pid-file          FILE   FWKNOP_PID_FILE      file for the pid of the running server
r run-dir           DIR    FWKNOP_RUN_DIR       directory to keep state in
- gpg-home-dir      DIR    GPG_HOME_DIR         directory with gpg's keys
- gpg-exe           FILE   GPG_EXE              gpg to run
- sudo-exe          FILE   SUDO_EXE             sudo to run
f foreground        -      foreground           stay in the foreground, even when called fwknopd
- daemon            -      daemon               go to the background, and log to syslog
- syslog-enable     -      syslog               log to syslog too
t test              -      test                 judge and log packets, leave the firewall alone
v verbose           -      VERBOSE=1            log more; -v -v: the settings in force, too
- init              PORTS  init                 make keys and files to hide PORTS, and serve
- trial             SECONDS trial               open the guard again then, unless a knock came
- print-client      -      print_client         print a client's stanza; [NAME] may follow
- print-unit        KIND   print_unit           systemd, systemd-unprivileged, openrc or procd
- print-launcher    -      print_launcher       print a program that starts the compiled form
D dump-config       -      dump                 print the configuration, without secrets
- check             -      check_host           say who may reach the ports, and what is wrong here
- exit-parse-config -      check                check the configuration, and end
- exit-parse-digest-cache - check_digests       check the file of remembered packets, and end
- dump-serv-err-codes -    codes                print fwknopd's error numbers
S status            -      status               say whether a server runs
K kill              -      kill                 stop the running server, wait for its end
R restart           -      restart              make the running server read its files again
- fw-list           -      list                 list what is open, for how long, and who opened it
- fw-list-all       -      list_all             list this, and all that stands in our tables
- fw-flush          -      flush                close all that is open; a guard stays
- open              PORTS  open                 open PORTS by hand: PORTS ADDRESS [30, 10m, 1h, 2d]
- close             WHO    close                cut off a user, an address or a stanza (#2)
- guard             -      guard                close GUARD_PORTS, and end; for early at boot
- unguard           -      unguard              take the guard away
- key-gen           -      key_gen              print new keys; keygen.py prints whole stanzas
- key-gen-file      FILE   key_gen_file         write new keys to a new file
- key-len           BYTES  key_len              length of the encryption key, 1 to 32
- hmac-key-len      BYTES  hmac_key_len         length of the HMAC key, 1 to 128
- hmac-digest-type  DIGEST hmac_type            digest that the HMAC key is for
l locale            NAME   LOCALE               for fwknopd alone; ignored
- fault-injection-tag TAG  FAULT_INJECTION_TAG  for fwknopd alone; ignored
- no-ipt-check-support -   nothing              for fwknopd alone; ignored
- no-firewd-check-support - nothing             for fwknopd alone; ignored
V version           -      version              print version and SHA-256 of this file
h help              -      help                 print this help
- man               -      man                  print this, and all directives, for `man -l -`
""".splitlines()]

# The same for a command line of knockd's, which begins with the name knockd (knockd.md 1.1).
KNOCKD_OPTIONS = [Option(row) for row in """\
i interface         NAME   interfaces           interfaces to listen on, instead of the file's
d daemon            -      daemon               serve in the background
c config            FILE   KNOCKD_CONF          knockd.conf to read
D debug             -      VERBOSE=1            log more
l lookup            -      nothing              ignored: to look up names would delay a knock
p pidfile           FILE   FWKNOP_PID_FILE      file for the server's pid, unless PidFile is set
g logfile           FILE   log_file             log to this file, unless LogFile is set
v verbose           -      VERBOSE=1            log more
4 only-ip-v4        -      four_only            listen for IPv4 only
V version           -      version              print version and SHA-256 of this file
h help              -      help                 print this help
""".splitlines()]
MAX_TRIAL = 7 * 86400  # seconds: a week
LOOK_AGAIN_SECONDS = 0.5  # a server restores within SETTLE_SECONDS; legacy iptables takes longer
ACTIONS = {"init", "dump", "check", "check_host", "check_digests", "codes", "status", "kill",
           "restart", "list", "list_all", "flush", "open", "close", "guard", "unguard", "key_gen",
           "print_client", "print_unit", "print_launcher"}

HELP = """Usage: spa_server.py [options]

Hide ports, and open them for a while to clients that hold a key.

{options}

First steps: `spa_server.py --init tcp/22` makes keys and files in /etc/fwknop if there are none,
prints the client's stanza, hides ssh and serves; on a far host add `--trial 300`. If something does
not open, `--check` says why. SIGHUP makes a server read its files again.
"""

KNOCKD_HELP = """Usage: knockd [options]

Run the commands of a knockd.conf for clients that knock at the ports of its doors. This is
spa_server.py under the name knockd; under its own name it does more.

{options}
"""


def format_man() -> str:
    """Return the manual page in roff (man(7)), made of the docstring and the tables."""
    paragraphs = (__doc__ or "").split("\n\n")
    changes = next(each for each in paragraphs if each.startswith("Changes on this host"))
    lines = [f'.TH SPA_SERVER 8 "" "spa_server.py {VERSION}"', ".SH NAME",
             "spa_server.py \\- " + roff(paragraphs[0]), ".SH SYNOPSIS", ".B spa_server.py",
             "[options]", ".SH DESCRIPTION", roff(paragraphs[1].partition(" Comments cite")[0]),
             ".PP", roff(changes), ".PP", roff(HELP.rpartition("\n\n")[2])]
    lines += roff_section("OPTIONS", (
        (option.format("").strip(), option.help) for option in OPTIONS))
    for title, table in (("FWKNOPD.CONF", ServerSettings), ("ACCESS.CONF", Stanza),
                         ("KNOCKD.CONF, [options]", KnockdOptions),
                         ("KNOCKD.CONF, A DOOR", KnockdDoor)):
        lines += roff_section(title, (
            (" / ".join(row.names), row.help + (f" (default: {row.default})" if row.default else "")
             + (" (ignored)" if isinstance(row, Ignored) else "")) for row in table.rows()))
    return "\n".join(lines + [".SH EXIT STATUS", roff(paragraphs[-1].partition(": ")[2])])


class Arguments:
    """The command line: `lines` for the directives that it sets, `values` for all other options.

    `program` is the name that started it. As knockd it takes other options, reads knockd.conf
    alone, and serves only the doors in it.
    """

    def __init__(self, arguments: List[str], program: str = "") -> None:
        self.program, self.as_knockd = program, program == "knockd"
        self.options = KNOCKD_OPTIONS if self.as_knockd else OPTIONS
        self.lines = [Line("--config", 0, ServerSettings.knockd_file.name, "/etc/knockd.conf")
                      ] if self.as_knockd else []
        self.values: Dict[str, str] = {}  # by option; without a value its own name
        self.kept: List[str] = []  # what a unit's command line has, too
        given, others = parse_options(self.options, arguments)
        for option, name, text in given:
            if option.argument in ("FILE", "FILES", "DIR"):  # a daemon has another directory
                paths = text.split(",") if option.argument == "FILES" else [text]
                text = ",".join(map(os.path.abspath, paths))
            if option.name not in ("print_unit", "daemon"):
                self.kept += [name] + [text] * bool(option.argument)
            row = ServerSettings.row(option.name)
            if row is None:
                self.values[option.name] = text or name
                asked = ACTIONS & set(self.values)
                if len(asked) > 1 and asked != {"check", "dump"}:
                    raise UsageError(f"option '{name}' does not go with the one before")
            else:  # -v -v is VERBOSE 2
                text = str(self.kept.count(name)) if row is ServerSettings.verbose else text
                self.lines.append(Line(name, 0, row.name, text))
        if "trial" in self.values and ACTIONS & set(self.values) - {"init"}:
            raise UsageError("--trial: only a server that hears knocks can try its guard")
        if {"check_host", "test"} <= set(self.values):
            raise UsageError("--check: it looks at the firewall, which -t leaves alone")
        most = 2 if "open" in self else 1 if "print_client" in self else 0
        if len(others) > most:
            raise UsageError(f"unexpected argument '{others[most]}'", "--help lists the options")
        self.others = others  # an address and perhaps a time, or a name
        self.config_file = self.values.get("config_file", CONFIG_FILE)

    def __contains__(self, name: str) -> bool:
        """Return whether an option set this name."""
        return name in self.values


def read_configuration(arguments: Arguments, directory: str = "") -> Configuration:
    """Read all files, and the command line, which wins. Relative paths begin at `directory`."""
    settings, warnings = read_settings(arguments, directory=directory)
    knockd = read_knockd(settings.knockd_file) if settings.knockd_file else None
    if knockd:
        warnings += knockd.warnings
        for row, value in ((KnockdOptions.interfaces, arguments.values.get("interfaces")),
                           (KnockdOptions.log_file, knockd.options.log_file
                            or arguments.values.get("log_file"))):
            if value:
                knockd.options.set_line(Line("--" + row.name.lower(), 0, row.name, value))
        if arguments.as_knockd and (knockd.options.is_set(KnockdOptions.pid_file)
                                    or not settings.is_set(ServerSettings.pid_file)):
            path = os.path.join(directory, knockd.options.pid_file)
            settings.set_line(Line("PidFile", 0, ServerSettings.pid_file.name, path))
    there = settings.access_folder or may_exist(settings.access_file)
    alone = knockd and not there and not settings.is_set(ServerSettings.access_file)
    stanzas, more = ([], []) if arguments.as_knockd or alone else read_stanzas(
        *access_files(settings), directory=directory)
    check_nat(settings, stanzas)
    ospa_key, more_warnings = read_ospa_keys(settings, stanzas)
    return Configuration(
        settings, stanzas, settings.warnings() + warnings + more + port_warnings(settings, stanzas)
        + more_warnings, knockd, "four_only" in arguments, "test" in arguments, ospa_key)


def may_exist(path: str) -> bool:
    """Return whether there is a file, or this user may not know: then reading it is an error."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.EACCES
    return True


def access_files(settings: ServerSettings) -> List[str]:
    """Return the files to read stanzas from: ACCESS_FILE, or those in ACCESS_FOLDER."""
    if settings.access_folder:
        try:
            files = folder_files(settings.access_folder)
            expect(bool(files), f"files named *.conf in {settings.access_folder}")
            return files
        except ValueError as error:
            raise settings.error(ServerSettings.access_folder, str(error)) from None
    if not may_exist(settings.access_file):
        raise ConfigError(f"{settings.access_file}: {os.strerror(errno.ENOENT)}",
                          "--init tcp/22 makes one")
    return [settings.access_file]


def read_settings(arguments: Arguments, skipping: Optional[Log] = None,
                  directory: str = "") -> Tuple[ServerSettings, List[str]]:
    """Read fwknopd.conf, the files that override it, and the command line; the last one wins.

    fwknopd.conf may be missing if nobody named it. With `skipping`, log a wrong line and go on.
    """
    settings = ServerSettings()
    settings.directory, settings.overridden = directory, {line.name for line in arguments.lines}
    warnings = []
    named = "config_file" in arguments and "init" not in arguments
    reads = not arguments.as_knockd and (named or may_exist(arguments.config_file))
    files = [arguments.config_file] if reads else []
    files += arguments.values["override"].split(",") if "override" in arguments else []
    for path in files:
        warnings += read_server_settings(path, settings, skipping)
    for line in arguments.lines:
        settings.set_line(line)
    settings.set_defaults()
    if settings.capture_file and not settings.is_set(ServerSettings.aging):
        settings.set_line(Line("PCAP_FILE", 0, ServerSettings.aging.name, "N"))  # fwknop.md 3.2
    return settings, warnings


LIST_HEADS = "num  target     prot opt source               destination"


def list_grants(firewall: Firewall, openers: Dict[str, str]) -> str:
    """Return the rules in our chains, in the shape of fwknopd and `iptables -L -n`; a grant ends
    with its seconds left and its opener."""
    if isinstance(firewall, IptablesFirewall):
        return "\n".join(list_chains(firewall, openers))
    lines, listing = ["Listing rules in fwknopd chains..."], firewall.listing()
    chains: Dict[str, List[str]] = {firewall.describe().split(", ")[0]: []} if listing else {}
    grants = sorted(firewall.grants(), key=lambda grant: (grant.expires, str(grant.door)))
    if isinstance(firewall, NftFirewall):  # what somebody else put into our sets without a timeout
        doors = [each for where in firewall.sets for each in firewall.read_set(*where)]
        grants += [Grant(door, 0, ends) for door, ends in doors if ends == FOR_EVER]
    for grant in grants:
        names = firewall.describe(grant.door).split(", ")  # DNAT passes the guard before
        chains.setdefault(names[-1 if grant.door.target else 0], []).append(
            grant_row(firewall, grant, openers))
    for name, rule in foreign_rules(listing):
        chains.setdefault(name, []).append(rule)
    for name, rows in chains.items():
        lines += ["", f"Chain {name} (1 references)", LIST_HEADS]
        lines += [f"{number:<4} {row}" for number, row in enumerate(rows, 1)]
    return "\n".join(lines)


def foreign_rules(listing: str) -> Iterator[Tuple[str, str]]:
    """Return chain and text of each rule of others in our own tables, from what nft printed."""
    where: List[str] = []
    for line in listing.splitlines():
        words, indent = line.split(), len(line) - len(line.lstrip("\t"))
        if indent < 2 and words[1:]:  # `table inet spa {`, `chain guard {`, `set spa4 {`
            where[2 * indent:] = words[1:-1] if words[0] in ("table", "chain") else []
        elif (any(where[:2] == list(own[:2]) for own in OWN_CHAINS) and where[2:] and words[1:]
              and words[0] != "type" and COMMENT not in line):
            yield " ".join(where), line.strip()


def grant_row(firewall: Firewall, grant: Grant, openers: Dict[str, str]) -> str:
    """Return the line of a grant behind its number."""
    door, seconds = grant.door, max(0, grant.ends - firewall.clocks.monotonic())
    source, _, destination, _ = str(door).split(" ", 3)
    target = "ACCEPT" if door.kind in (INPUT, ONCE, FORWARD) else door.kind
    protocol, match = (door.protocol, f"{door.protocol} dpt:{door.port} ") if door.port else (
        "all", "")
    # fwknopd's rule for MASQUERADE names the port once more, as the one that connections come from.
    extra = (f" to:{door.target_text()}" if door.target else
             " for one connection" if door.kind == ONCE else
             f" masq ports: {door.port}" if door.kind == MASQUERADE and door.port else "")
    left = (f"{int(seconds)} seconds left, {find_opener(openers, grant)}" if seconds < FOR_EVER else
            "never ends, not ours")
    return (f"{target:<10} {protocol:<4} --  {source:<20} {destination:<20} {match}"
            f"/* {MARK}{grant.expires} */{extra} {left}")


def list_chains(firewall: IptablesFirewall, openers: Dict[str, str]) -> Iterator[str]:
    """Return head and rules of each chain of ours; rules that are no grants as iptables prints
    them. A grant in several chains has a line of ours in the first only."""
    known: Set[Tuple[Door, int]] = set()
    wall, now = firewall.clocks.wall(), firewall.clocks.monotonic()
    names = [(chain.table, chain.name) for chain in firewall.chains] + [
        ("mangle", name) for name in GUARD_CHAINS.values() if firewall.guard_ports]
    for version, program in firewall.programs.items():
        yield f"Listing rules in fwknopd {'iptables' if version == 4 else 'ip6tables'} chains..."
        for table, name in dict.fromkeys(names):
            lines = program.list(table)
            if f"-N {name}" not in lines:
                continue  # before the first start
            head, _, *printed = program.run([program.program, "-t", table, "-L", name, "-n",
                                             "--line-numbers"]).splitlines()
            yield from ("", head, LIST_HEADS)
            rules = [line for line in lines if line.startswith(f"-A {name} ")]
            for number, (text, rule) in enumerate(zip(printed, rules), 1):
                found = next(((door, expires) for chain, door, expires in firewall.parse(
                    table, rule) if chain.is_primary), None)
                if found and found not in known:
                    known.add(found)
                    grant = Grant(*found, now + found[1] - wall)
                    text = f"{number:<4} {grant_row(firewall, grant, openers)}"
                yield text.rstrip()
        yield ""


def signal_server(arguments: Arguments) -> int:
    """Do -S, -K or -R in fwknopd's words; return its exit code (tests/spec/fwknop.md 3.1)."""
    path = read_settings(arguments)[0].pid_file
    pid = running_server(path)
    if pid is None:
        write_to(sys.stdout, "No running fwknopd detected.\n")
        return 1
    if "kill" in arguments:
        os.kill(pid, signal.SIGTERM)
        # SIGKILL, which fwknopd sends after five seconds, is left to the administrator: it would
        # keep the server from closing what is open.
        end = time.monotonic() + ANSWER_SECONDS
        while running_server(path) == pid:
            if time.monotonic() > end:
                raise SpaError(f"fwknopd (pid={pid}) has not ended yet, after SIGTERM and "
                               f"{ANSWER_SECONDS} seconds", "see its log")
            time.sleep(0.05)
        write_to(sys.stdout, f"Killed fwknopd (pid={pid}) via SIGTERM\n")
    elif "restart" in arguments:
        os.kill(pid, signal.SIGHUP)
        write_to(sys.stdout, f"Sent restart signal to fwknopd (pid={pid})\n")
    else:
        write_to(sys.stdout, f"Detected fwknopd is running (pid={pid}).\n")
    return 0


def flush_firewall(settings: ServerSettings, pid: int, log: Log) -> None:
    """Close all that is open (--fw-flush), by the running server if there is one."""
    write_to(sys.stdout, "Deleting any existing firewall rules...\n")
    if have_server_do("flush", settings, pid) is None:
        remove_for_good([GRANTS, REST], settings, log)  # also our rules in the host's chains
        guarded = leftovers(GUARD, settings, log)
        say("Nothing is open now." + (
            " The guard stays until --unguard, or the end of its trial." if guarded else ""))
        return
    say(f"The server{f' (pid={pid})' if pid else ''} has closed all that was open.")


def have_server_do(request: str, settings: ServerSettings, pid: int) -> Optional[List[str]]:
    """Return the lines of the server's answer, None if no server runs; SpaError if it fails."""
    name = f"the server (pid={pid})" if pid else "the server"
    try:  # it would put grants back; ask also one whose pid is not known
        done, *lines = ask_server(settings.pid_file, request).split("\n")
    except OSError as error:
        if pid:
            raise SpaError(f"{name} does not answer: {error}",
                           "see its log, or end it with -K and try again") from None
        return None
    if done != "ok":
        raise SpaError(f"{name} could not do it: {done}")
    return lines


def open_by_hand(arguments: Arguments, settings: ServerSettings, pid: int, log: Log) -> None:
    """Open ports for an address (--open), by the running server if there is one."""
    others = arguments.others + [Stanza.grant_seconds.default]
    try:
        expect(len(others) > 1, "PORTS ADDRESS [TIME]")
        doors, seconds = parse_hand(arguments.values["open"], *others[:2])
    except ValueError as error:
        raise UsageError(f"--open: {error}", "such as --open tcp/22 192.0.2.7 1h") from None
    wanted = {(door.protocol, door.port) for door in doors}
    idle = wanted - settings.guard_ports if only_guarded(settings) else ()
    if idle:
        log.warning(f"{port_list(idle)} is not in GUARD_PORTS: --open changes nothing for it")
    who = "".join(each if "!" <= each <= "~" else "?"  # one word of a request
                  for each in os.environ.get("SUDO_USER") or "root")
    lines = have_server_do(f"open {who} {port_list(wanted).replace(' ', '')} "
                           f"{doors[0].source.network_address} {seconds}", settings, pid)
    if lines is None:
        access = access_alone(arguments, settings, log)
        firewall = access.grants.firewall
        if firewall.guard_ports and not firewall.guarded():
            raise SpaError("no server runs and no guard stands: nothing is closed",
                           "start the server, or close GUARD_PORTS with --guard")
        if isinstance(firewall, IptablesFirewall) and not all(
                program.ends_grants() for program in firewall.programs.values()):
            raise SpaError("iptables has no time match here: only a running server would close it")
        if not firewall.guard_ports:  # else the sets stand: to make the guard anew ends its trial
            firewall.prepare()
        lines = access.open_by_hand(doors, seconds, who)
    for line in lines:
        say("Opened " + line)


def close_by_hand(arguments: Arguments, settings: ServerSettings, pid: int, log: Log) -> None:
    """Close what somebody has open (--close), and cut connections; SpaError if there is nothing."""
    who = arguments.values["close"]
    lines = have_server_do(f"close {who}", settings, pid)
    if lines is None:
        lines = access_alone(arguments, settings, log).close_by_hand(who)
    for line in lines:
        say("Closed " + line)
    # Grants that are over may have connections, too. An address loses those to guarded ports.
    old = [(cut_target(text), opener) for text, opener in read_openers(
        openers_file(settings)).items()]
    targets = {target for target, opener in old if target and is_meant(who, target[0], opener)}
    targets.update(filter(None, map(cut_target, lines)))
    with contextlib.suppress(ValueError):
        network = ipaddress.ip_network(who, strict=False)
        targets |= {(network, protocol, str(port)) for protocol, port in settings.guard_ports}
    if not cut_connections(targets, log) and not lines:
        raise SpaError(f"nothing that is open or connected belongs to '{who}'",
                       "--fw-list shows who opened what")


CutTarget = Tuple[Network, str, str]  # source, protocol and port; "*" are all


def cut_target(text: str) -> Optional[CutTarget]:
    """Return what to cut when the door in this text (Door.describe()) is closed; None for none."""
    fields = text.replace(",", " ").split()
    with contextlib.suppress(ValueError, IndexError):
        arrow = fields.index("->")
        protocol, _, port = fields[arrow + 2].partition("/")
        source = ipaddress.ip_network(fields[arrow - 1])
        return (source, protocol, port) if source.prefixlen else None
    return None


def cut_connections(targets: Iterable[CutTarget], log: Log) -> int:
    """Cut connections, and say which, or that they may go on; return how many were cut.

    If the kernel only forgot a connection, its next packet from this host would begin it anew, and
    the answers would pass the firewall. So `ss` ends the TCP sockets of this host first.
    """
    ss, conntrack, total = find_program("ss"), find_program("conntrack"), 0
    for source, protocol, port in sorted(targets, key=str):
        where, cut = f"connections from {source} to {protocol}/{port}", 0
        match = [] if port == "*" else ["-p", protocol, "--dport", port]
        try:
            if ss and protocol == "tcp":
                cut = run_program([ss, "-HtnK", "state", "established", "dst", str(source), "sport",
                                   "=", ":" + port]).count("\n")
                peers = established_connections(frozenset([(protocol, int(port))]))
                if any(peer in source for peer, _, _ in peers):
                    log.warning(f"{where} may go on: the kernel can't end sockets")
            if conntrack:
                flows = run_program([conntrack, "-D", "-f", f"ipv{source.version}", "-s",
                                     str(source)] + match).splitlines()
                cut = max(cut, sum({"TIME_WAIT", "CLOSE"}.isdisjoint(flow.split())
                                   for flow in flows))
        except CommandError as error:
            if "0 flow entries" not in error.said:
                log.error(str(error))
        if cut:
            say(f"Cut {cut} {where}")
        total += cut
    for program, text in ((ss, "ss: TCP connections of this host may go on"),
                          (conntrack, "conntrack: forwarded connections and UDP may go on")):
        if not program:
            log.warning("There is no program " + text)
    return total


def access_alone(arguments: Arguments, settings: ServerSettings, log: Log) -> Access:
    """Return what opens and closes grants in the kernel while no server runs."""
    grants = Grants(firewall_there(arguments, settings, log, "test" in arguments), log)
    log.level = WARNING
    grants.adopt()
    commands = Commands(selectors.DefaultSelector(), log, "test" in arguments)
    return Access(settings, grants, commands, Tally(log), log)


def remove_for_good(parts: List[str], settings: ServerSettings, log: Log) -> List[str]:
    """Remove parts of ours from the kernel, and return their names; CommandError if one is back."""
    taken = []
    for part in parts:
        for text in remove_leftovers(part, settings, log):
            taken.append(text)
            write_to(sys.stdout, f"Deleted {text}\n")
    # A server that these settings do not name would put them back. So look again for the last part,
    # which has to include the others.
    if taken:
        time.sleep(LOOK_AGAIN_SECONDS)
    left = [text for texts, _ in leftovers(parts[-1], settings, log) for text in texts]
    if left:
        owner, table = table_owner(GUARD_TABLE), " ".join(GUARD_TABLE[:2])
        raise CommandError("still there: " + ", ".join(left), hint=(
            f"table {table} belongs to {owner}; {OWNER_HINT}" if owner else
            "if a server runs, end it; -K finds it by its fwknopd.conf (-c) or run directory (-r)"))
    return taken


def remove_guard(settings: ServerSettings, pid: int, log: Log) -> None:
    """Remove every guard of ours (--unguard), whatever backend has it."""
    if pid:
        raise SpaError(f"a server is running (pid={pid}), which would put the guard back",
                       "end it first, with -K")
    ports = port_list(settings.guard_ports) or "the ports it closed"
    say(f"The guard is gone. Now the host's own firewall alone decides who reaches {ports}."
        if remove_for_good([GUARD], settings, log) else "There is no guard.")


def put_guard_up(arguments: Arguments, log: Log) -> None:
    """Close GUARD_PORTS (--guard). That needs no network, and no file but fwknopd.conf."""
    settings = read_settings(arguments)[0]
    if not settings.guard_ports:
        raise ConfigError("GUARD_PORTS: expected the ports that --guard closes",
                          f"set GUARD_PORTS tcp/22 in {arguments.config_file}")
    pid = running_server(settings.pid_file)
    if pid and not leftovers(GUARD, settings, log):
        raise SpaError(f"a server is running (pid={pid}), and no guard stands",
                       "-R lets it read its files again")
    if pid:
        said = have_server_do("guard", settings, pid) or ()
        say(" ".join([f"A server is running (pid={pid}).", *said]))
        return
    firewall = choose_firewall(settings, None, "test" in arguments, log)
    firewall.prepare_guard()  # one that stands keeps its grants and sets
    if firewall.guard_ports:
        say(guard_text(firewall))


def firewall_there(arguments: Arguments, settings: ServerSettings, log: Log, test: bool
                   ) -> Firewall:
    """Return the firewall, with the sets that it has if access.conf is broken."""
    stanzas: Optional[List[Stanza]] = None
    try:
        stanzas = read_configuration(arguments).stanzas
    except ConfigError as error:
        log.warning(f"{error}; going on with what the kernel has")
    return choose_firewall(settings, stanzas, test, log)


def run_on_firewall(arguments: Arguments, log: Log) -> None:
    """Do --fw-list, --fw-flush, --open, --close or --unguard; skip wrong lines of fwknopd.conf."""
    settings = read_settings(arguments, log)[0]
    try:
        pid = running_server(settings.pid_file) or 0
    except (SpaError, OSError) as error:
        log.warning(f"{explain(error)}; going on without its pid")
        pid = 0
    if "unguard" in arguments:
        remove_guard(settings, pid, log)
    elif "flush" in arguments:
        flush_firewall(settings, pid, log)
    elif "open" in arguments:
        open_by_hand(arguments, settings, pid, log)
    elif "close" in arguments:
        close_by_hand(arguments, settings, pid, log)
    else:
        firewall = firewall_there(arguments, settings, log, False)
        say(list_grants(firewall, read_openers(openers_file(settings))))
        if "list_all" in arguments:
            kind = " ".join(["all", *firewall.identity[:1]])
            say(f"\nListing {kind} rules in applicable tables...\n{firewall.listing()}")


def run_init(arguments: Arguments, settings: ServerSettings, trial: int = 0) -> ServerSettings:
    """Write files where there are none (--init); return the settings to serve with."""
    try:
        ports = parse_ports(arguments.values["init"])
        expect(bool(ports), "ports")
    except ValueError as error:
        raise UsageError(f"--init: {error}") from None
    there = [path for path in (arguments.config_file, settings.access_file) if may_exist(path)]
    if there and not ports <= settings.guard_ports:
        raise ConfigError(f"--init: already there: {' and '.join(there)}", "set GUARD_PORTS "
                          f"{port_list(ports)} in fwknopd.conf, or move what is there away")
    if settings.access_file in there or settings.access_folder:
        write_to(sys.stdout, "There is a configuration already; serving it. --print-client prints "
                 "the client's stanza\n")
    else:
        first_configuration(ports, settings, arguments.config_file, "test" in arguments, trial)
        print_client(arguments)
        far = "" if trial else FAR_STEPS
        say("" if "daemon" in arguments else NEXT_STEPS.format(far=far))
    return read_settings(arguments)[0]


def print_client(arguments: Arguments) -> None:
    """Print the client's stanza again (--print-client), the only one or that of a name."""
    settings, stanzas = read_configuration(arguments)[:2]
    named = [(str(each.number), stanza_name(each), each) for each in stanzas]
    name = "".join(arguments.others).lstrip("#")
    found = [each for *names, each in named if name in ("", *names)]
    if len(found) != 1:
        raise SpaError("--print-client: expected the number or the name of one stanza", "there are "
                       + ", ".join(f"{number} {name}".rstrip() for number, name, _ in named))
    say(client_stanza(settings, found[0]))


def generate_keys(arguments: Arguments) -> None:
    """Print both keys in fwknopd's lines (--key-gen), or write them to a new file."""
    values = arguments.values
    try:
        digest = Stanza.hmac_type.parse(values.get("hmac_type", "SHA256"))
        size = integer(1, MAX_KEY_BYTES)(values.get("key_len", "32"))
        hmac_size = integer(1, MAX_HMAC_KEY_BYTES)(
            values.get("hmac_key_len", str(min(digest.block, MAX_HMAC_KEY_BYTES))))
    except ValueError as error:
        raise UsageError(f"--key-gen: {error}") from None
    key, hmac_key = base64(os.urandom(size)), base64(os.urandom(hmac_size))
    text = f"KEY_BASE64: {key}\nHMAC_KEY_BASE64: {hmac_key}"
    path = values.get("key_gen_file")
    if path:
        write_new_files({path: text + "\n"})
        text = f"[+] Wrote Rijndael and HMAC keys to: {path}"
    say(text)


def check_configuration(arguments: Arguments, log: Log) -> None:
    """Do -D, --exit-parse-config or --exit-parse-digest-cache."""
    configuration = read_configuration(arguments)
    if "check" in arguments:
        load_gpg(configuration.settings, configuration.stanzas)
        configuration.choose_firewall(log)
    configuration.tell(log)
    if configuration.voids():
        raise ConfigError(f"{len(configuration.voids())} stanzas open nothing")
    if "check_digests" in arguments:
        ReplayMemory("", None, log).load(configuration.settings.digest_file)
        say("Digest cache parsed, exiting.")
    elif "dump" not in arguments:
        say("Configs parsed, exiting.")
    else:
        say("\n".join(configuration.dump()))


def check_host(arguments: Arguments) -> int:
    """Do --check; return 3 if the settings can't be used, 1 if there is anything to do, else 0."""
    check = Checkup(arguments)
    lines = find_all(check, os.geteuid() == 0)
    say("\n".join(lines))
    return 3 if not check.usable else 0 if lines[0].startswith(MARKS[FACT]) else 1


def direct_log(log: Log, options: KnockdOptions, directory: str) -> None:
    """Make the log also go where a knockd.conf says."""
    path = os.path.join(directory, options.log_file) if options.log_file else ""
    if path != (log.file.path if log.file else ""):
        log.file = FileOutlet(path) if path else None
    try:
        if log.file:
            os.close(log.file.open())
    except OSError as error:  # as in knockd, no reason not to serve
        log.error(f"{explain(error, path)}; it gets no lines")
    if options.use_syslog and not log.syslog:
        log.syslog = SyslogOutlet("knockd", "LOG_DAEMON", with_pid=False)
        if os.path.exists(SYSLOG):
            log.stream_level = min(log.stream_level, DEBUG if log.level == DEBUG else WARNING)
        else:
            log.warning(f"UseSyslog: there is no {SYSLOG}, as in most containers: all lines go to "
                        "stderr as well")
        log.usual = NOTICE


def serve(arguments: Arguments, log: Log) -> int:
    """Serve, in the background if an option or the name fwknopd says so; return the exit code."""
    trial = arguments.values.get("trial")
    try:
        trial_seconds = integer(1, MAX_TRIAL, "a number of seconds")(trial) if trial else 0
    except ValueError as error:
        raise UsageError(f"--trial: {error}") from None
    settings = read_settings(arguments)[0]
    as_fwknopd = arguments.program == "fwknopd" and "foreground" not in arguments
    daemon = as_fwknopd or "daemon" in arguments
    if (daemon and not arguments.as_knockd) or "syslog" in arguments:
        log.syslog = SyslogOutlet(settings.syslog_identity, settings.syslog_facility, with_pid=True)
    log.stream_level = ERROR if daemon else DEBUG
    if "test" in arguments:
        log.warning("-t: nothing is closed or opened; packets are only judged, and logged")
    if "init" in arguments:
        settings = run_init(arguments, settings, trial_seconds)
    pid = running_server(settings.pid_file) if as_fwknopd else None
    if pid is not None:  # as fwknopd does, for scripts that start it again and again
        log.error(f"[*] An instance of fwknopd is already running: (PID={pid}).")
        return 0
    directory = os.getcwd()

    def read() -> Configuration:
        configuration = read_configuration(arguments, directory)
        load_gpg(configuration.settings, configuration.stanzas)
        if configuration.knockd:
            log.level = DEBUG if configuration.settings.verbose else INFO
            direct_log(log, configuration.knockd.options, directory)
        return configuration

    return run_server(read, daemon, "rotate" in arguments, trial_seconds, log)


def run(arguments: Arguments, log: Log) -> int:
    """Do what the options ask for; return the exit code."""
    asked = set(arguments.values)
    if is_journal(sys.stdout) and {"init", "print_client"} & asked:
        raise UsageError("expected a terminal or file to print the keys to")
    if "help" in arguments:
        text = KNOCKD_HELP if arguments.as_knockd else HELP
        say(text.format(options="\n".join(each.format(each.help) for each in arguments.options)))
    elif "version" in arguments:
        with open(os.path.abspath(__file__), "rb") as file:  # is it the one that was to be copied?
            digest = binascii.hexlify(DIGESTS["SHA256"](file.read())).decode()
        say(f"spa_server.py {VERSION}, FKO protocol version 3.0.0\nsha256 {digest}")
    elif "man" in arguments:
        say(format_man())
    elif "codes" in arguments:
        say("\n".join(f"err code: {code}, err string: '{text}'"
                      for code, text in ERROR_CODES.items()))
    elif {"key_gen", "key_gen_file"} & asked:
        generate_keys(arguments)
    elif {"status", "kill", "restart"} & asked:
        return signal_server(arguments)
    elif "print_client" in asked:
        print_client(arguments)
    elif "print_unit" in asked:
        print_unit(arguments, arguments.values["print_unit"], log)
    elif "print_launcher" in asked:
        say(launcher("/usr/local/sbin/spa_server"))
    elif "guard" in arguments:
        put_guard_up(arguments, log)
    elif {"list", "list_all", "flush", "open", "close", "unguard"} & asked:
        run_on_firewall(arguments, log)
    elif "check_host" in arguments:
        return check_host(arguments)
    elif {"dump", "check", "check_digests"} & asked:
        check_configuration(arguments, log)
    else:
        return serve(arguments, log)
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line and return the exit code; only here errors become one."""
    if sys.platform not in ("linux", "android"):
        write_to(sys.stderr, "spa_server.py: this server needs Linux; the client does not\n")
        return 1
    log = Log()
    log.open_stream(sys.stderr)
    try:
        return run(Arguments(sys.argv[1:] if argv is None else argv,
                             os.path.basename(sys.argv[0])), log)
    except (SpaError, OSError) as error:
        text, hint = explain(error), getattr(error, "hint", "")
        if any(os.strerror(each) in text for each in (errno.EACCES, errno.EPERM)):
            hint = hint or ("run it as root" if os.geteuid() else
                            "even root may not do that here; a container needs CAP_NET_ADMIN")
        log.error(f"spa_server.py: {text}")
        if hint:
            log.error("hint: " + hint)
        return 2 if isinstance(error, UsageError) else 3 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 1
    finally:
        write_to(sys.stderr, "")  # the rest of the log: Python's own last try must not fail


if __name__ == "__main__":
    sys.exit(main())
