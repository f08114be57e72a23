#!/usr/bin/env python3
"""Make the keys of one user, and the two stanzas that hold them: the client's and the server's.

  keygen.py                                              two keys, as `fwknop --key-gen` prints
  keygen.py work --server gate.example --access tcp/22   the stanza [work] for ~/.fwknoprc and
                                                         the one for access.conf, to be pasted
  keygen.py work ... --rc-file ~/.fwknoprc --access-file /etc/fwknop/access.conf
                                                         the same, appended to these files

The way of a key: os.urandom makes it, base64 makes it text, and a stanza carries it to standard
output, or to the end of a file that only its owner can read. No key is ever taken from a
command line, and none appears in an error.

Contents. Sections 1 and 2 only compute; 3 and 4 touch files and standard output.
  1. What an option may say
  2. Keys and stanzas
  3. Files
  4. Command line

Exit codes: 0 done; 1 a file or standard output could not be used; 2 a wrong option.
"""

import argparse
import binascii
import contextlib
import fcntl
import hashlib
import ipaddress
import os
import stat
import sys
from typing import Callable, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

VERSION = "0.1.0"


# ======================================================================================
# 1. What an option may say
#
# One parser for each kind of value; its ValueError says what was expected. The limits are
# those of fwknop's client and server: a stanza that is printed here works with both.
# ======================================================================================

class SpaError(Exception):
    """Told to the administrator in one line, without a traceback: exit code 1."""


class UsageError(SpaError):
    """A wrong option, found before anything was made or written: exit code 2."""


# A request longer than this does not fit into fwknop's packet in the worst case: a user name of
# 29 characters, a source address of 15 and an HMAC of SHA-512 leave 223 bytes of plaintext.
MAX_ACCESS_LENGTH = 60
DIGITS = frozenset("0123456789")
NAME_ALPHABET = DIGITS.union("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ._-@")
HOST_ALPHABET = NAME_ALPHABET.union(":%") - {"@"}


def parse_name(text: str) -> str:
    """Return the name of a stanza, fit for `[name]`, for `# name` and for a shell command."""
    if not 1 <= len(text) <= 64 or text[0] in "-." or not NAME_ALPHABET.issuperset(text):
        raise ValueError("expected a name, 1 to 64 letters, digits or any of . _ - @")
    if text.lower() == "default":
        raise ValueError("expected another name: [default] holds the defaults of all stanzas")
    return text


def parse_host(text: str) -> str:
    """Return the server's name or address; fwknop's rc file ends a value at a blank, # or ;."""
    if not 1 <= len(text) <= 253 or text.startswith("-") or not HOST_ALPHABET.issuperset(text):
        raise ValueError("expected a host name (xn--... if it is not ASCII) or an address")
    return text


def parse_integer(text: str, low: int, high: int) -> int:
    """Return a decimal number from low to high."""
    digits = 0 < len(text) < 10 and DIGITS.issuperset(text)
    if not digits or not low <= int(text) <= high:
        raise ValueError(f"expected a number, {low} to {high}")
    return int(text)


def parse_access(text: str) -> str:
    """Return a list such as `tcp/22,udp/53`, each entry once, ports without leading zeros.

    A repeated entry is refused because fwknopd counts matches: its `OPEN_PORTS tcp/22,tcp/22`
    rejects a request for tcp/22 and lets one for tcp/22,tcp/9999 pass.
    """
    entries: List[str] = []
    for item in text.split(","):
        protocol, slash, port = item.partition("/")
        if protocol not in ("tcp", "udp") or not slash:
            raise ValueError("expected tcp/PORT or udp/PORT, separated by commas, without blanks")
        entry = f"{protocol}/{parse_integer(port, 1, 65535)}"
        if entry in entries:
            raise ValueError(f"expected {entry} only once")
        entries.append(entry)
    if len(",".join(entries)) > MAX_ACCESS_LENGTH:
        raise ValueError(f"expected at most {MAX_ACCESS_LENGTH} characters: a packet has no room")
    return ",".join(entries)


def parse_source(text: str) -> str:
    """Return `ANY`, or a comma list of networks (fwknopd itself knows IPv4 only)."""
    if text.upper() == "ANY":
        return "ANY"
    try:
        if "%" in text:
            raise ValueError
        return ",".join(str(ipaddress.ip_network(item, strict=False)) for item in text.split(","))
    except ValueError:
        raise ValueError("expected ANY, or networks like 192.0.2.0/24 with commas") from None


def parse_username(text: str) -> str:
    """Return a user name that fwknop's client does not cut and its server does not reject."""
    if not 1 <= len(text) <= 29 or not NAME_ALPHABET.issuperset(text):
        raise ValueError("expected a user name, 1 to 29 letters, digits or any of . _ - @")
    return text


# ======================================================================================
# 2. Keys and stanzas
#
# Makes the keys and says them in fwknop's two formats. Does not check the options: see 1.
# ======================================================================================

# The lengths `fwknop --key-gen` uses. It has none for SHA-3: 64 bytes are as long as the longest
# digest (more adds no strength, RFC 2104 section 3) and fit into one block of both SHA-3 digests
# (136 and 72 bytes), so the key is used as it is and not hashed first.
KEY_BYTES = 32
HMAC_KEY_BYTES = {
    "md5": 16, "sha1": 20, "sha256": 64, "sha384": 128, "sha512": 128,
    "sha3_256": 64, "sha3_512": 64,
}
DEFAULT_SPA_PORT = 62201


class Keys(NamedTuple):
    """The two secrets that a client and a server share, in base64, and the HMAC's digest."""

    key: str
    hmac_key: str
    digest: str


class StanzaPlan(NamedTuple):
    """What the two stanzas of one user say, besides the keys; every value already checked."""

    name: str
    server: str
    access: str
    port: int = DEFAULT_SPA_PORT
    source: str = "ANY"
    open_seconds: int = 30
    username: str = ""
    any_source: bool = False


def make_keys(digest: str = "sha256", key_bytes: int = KEY_BYTES, hmac_key_bytes: int = 0,
              random: Callable[[int], bytes] = os.urandom) -> Keys:
    """Return fresh keys; an hmac_key_bytes of 0 means the length that suits the digest."""
    key = random(key_bytes)
    hmac_key = random(hmac_key_bytes or HMAC_KEY_BYTES[digest])
    if key == hmac_key:  # fwknop refuses such a pair; two honest draws are never equal
        raise SpaError("the random source gave the same bytes twice")
    text, hmac_text = (binascii.b2a_base64(raw, newline=False).decode("ascii")
                       for raw in (key, hmac_key))
    return Keys(text, hmac_text, digest)


def stanza_text(first_line: str, *rows: Tuple[str, object]) -> str:
    """Return a stanza without its empty values, in the columns of `fwknop --save-rc-stanza`."""
    lines = [f"{name:<24}    {value}\n" for name, value in rows if value]
    return first_line + "\n" + "".join(lines)


def client_stanza(plan: StanzaPlan, keys: Keys) -> str:
    """Return the stanza for ~/.fwknoprc, its directives in the order in which fwknop saves them."""
    return stanza_text(
        f"[{plan.name}]",
        ("SPA_SERVER_PORT", plan.port if plan.port != DEFAULT_SPA_PORT else ""),
        ("ALLOW_IP", "source" if plan.any_source else ""),
        ("SPOOF_USER", plan.username),
        ("ACCESS", plan.access),
        ("SPA_SERVER", plan.server),
        ("KEY_BASE64", keys.key),
        ("HMAC_DIGEST_TYPE", keys.digest.upper()),
        ("HMAC_KEY_BASE64", keys.hmac_key),
        ("USE_HMAC", "Y"))


def server_stanza(plan: StanzaPlan, keys: Keys) -> str:
    """Return the stanza for access.conf, with the name as a comment in its first line."""
    return stanza_text(
        f"# {plan.name}",
        ("SOURCE", plan.source),
        ("OPEN_PORTS", plan.access),
        ("KEY_BASE64", keys.key),
        ("HMAC_KEY_BASE64", keys.hmac_key),
        ("HMAC_DIGEST_TYPE", keys.digest.upper()),
        ("FW_ACCESS_TIMEOUT", plan.open_seconds),
        ("REQUIRE_SOURCE_ADDRESS", "N" if plan.any_source else "Y"),
        ("REQUIRE_USERNAME", plan.username))




# ======================================================================================
# 3. Files
#
# Appends a stanza to a file so that a crash leaves the old file or the new one, and never
# two stanzas of one name.
# ======================================================================================

def check_new(text: str, stanza: str) -> None:
    """Raise SpaError when `text` has a stanza of that name, or one of its keys, already.

    A stanza's name is its first line: `[name]`, or `# name` in access.conf. Case does not count.
    """
    wanted = stanza.splitlines()[0]
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line[:1] == wanted[:1] and line[1:].strip().lower() == wanted[1:].strip().lower():
            raise SpaError(f"has a stanza {wanted} already, in line {number}")
    secrets = {line.split()[1] for line in stanza.splitlines() if "KEY_BASE64 " in line}
    if secrets.intersection(text.split()):
        raise SpaError(f"has the keys of {wanted} already")


class StanzaFile:
    """A file that gets one stanza more at its end, wholly or not at all, while nobody else does.

        with StanzaFile(path) as target:
            target.prepare(stanza)          the new text lies beside the file, on the disk
            target.commit()                 and takes its place

    Renaming a finished copy over the file, instead of appending to it, is what keeps half a
    stanza out: half a line with a key in it would stop a server from starting. A new file gets
    mode 0600; an old one keeps its mode and owner. Symbolic links are followed and stay. An
    exclusive lock on the file keeps two runs from losing each other's stanza. Left without
    commit(), everything is as it was. Raises SpaError, which names the file.
    """

    def __init__(self, path: str) -> None:
        """Note the path; nothing is touched before the with statement."""
        self.path = os.path.realpath(path)
        self.mode = 0
        self._fd = -1
        self._created = False
        self._copy = ""

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Turn what the system or check_new() refuses into a SpaError that names the file."""
        try:
            yield
        except OSError as error:
            raise SpaError(f"{error.filename or self.path}: {error.strerror}") from error
        except SpaError as error:
            raise SpaError(f"{self.path}: {error}") from error

    def __enter__(self) -> "StanzaFile":
        """Open and lock the file, which is created empty when missing."""
        with self._errors_named():
            while self._fd < 0:
                self._fd = self._lock()
            self.mode = os.fstat(self._fd).st_mode
            if not stat.S_ISREG(self.mode):
                os.close(self._fd)
                raise SpaError("not a regular file")
        return self

    def _lock(self) -> int:
        """Return the open and locked file, or -1 when the path got another one meanwhile."""
        self._created = not os.path.lexists(self.path)
        flags = os.O_CREAT | os.O_EXCL if self._created else os.O_NOFOLLOW
        try:
            fd = os.open(self.path, os.O_RDWR | flags, 0o600)
        except FileExistsError:  # another run made it just now
            return -1
        fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # the other run failed and took it away
            if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                return fd
        os.close(fd)
        return -1

    def prepare(self, stanza: str) -> None:
        """Write the old text and the stanza to a file beside this one; refuse a duplicate."""
        with self._errors_named(), open(self._fd, "rb", closefd=False) as stream:
            old = stream.read()
            check_new(old.decode("latin-1"), stanza)
            gap = b"" if not old else b"\n" if old.endswith(b"\n") else b"\n\n"
            self._write_copy(old + gap + stanza.encode("ascii"))

    def _write_copy(self, text: bytes) -> None:
        """Write `text` to a new file of the same owner and mode, and see it onto the disk."""
        name = f"{self.path}.{os.getpid()}.new"
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._copy = name
        with open(fd, "wb") as stream:
            old, new = os.fstat(self._fd), os.fstat(fd)
            if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
                os.fchown(fd, old.st_uid, old.st_gid)
            os.fchmod(fd, 0o600 if self._created else stat.S_IMODE(self.mode))
            stream.write(text)
            stream.flush()
            os.fsync(fd)

    def commit(self) -> None:
        """Put the prepared text in the file's place."""
        with self._errors_named():
            os.rename(self._copy, self.path)
            self._copy, self._created = "", False
            directory = os.open(os.path.dirname(self.path), os.O_RDONLY)
            try:
                os.fsync(directory)  # or a power cut takes the new name away again
            finally:
                os.close(directory)

    def __exit__(self, *_: object) -> None:
        """Take away what was not committed, and unlock."""
        for path in [self._copy] + [self.path] * self._created:
            with contextlib.suppress(OSError):
                if path:
                    os.unlink(path)
        os.close(self._fd)


# ======================================================================================
# 4. Command line
#
# Checks every option first, then prepares the files, prints, and commits the files last:
# what fails half-way has written nothing.
# ======================================================================================

HINTS = """\
The server's stanza says REQUIRE_SOURCE_ADDRESS Y: the encrypted packet has to name the address to
open for, so that nobody who catches a packet can send it from an address of his own. The client
spa_client.py finds its address by itself; fwknop has to be told, with -a ADDRESS or with -R, which
asks a web site. --any-source gives that protection up, for a client that cannot know its address.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, so that only main() knows about exit codes."""
        raise UsageError(message)


def checked(parse: Callable[..., object], *limits: int) -> Callable[[str], object]:
    """Return `parse` as argparse wants it: the error says what was expected."""
    def convert(text: str) -> object:
        try:
            return parse(text, *limits)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return convert


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; an option of the stanzas that was not given is no attribute."""
    parser = Parser(prog="keygen.py", description=str(__doc__).partition("\n")[0], epilog=HINTS,
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", type=checked(parse_name),
        help="name of the stanzas; without it only two keys are printed")
    add("-V", "--version", action="store_true", help="print the version and this file's SHA-256")
    add("--key-len", metavar="BYTES", type=checked(parse_integer, 1, 32), default=KEY_BYTES,
        help="length of the encryption key (default: 32)")
    add("--hmac-key-len", metavar="BYTES", type=checked(parse_integer, 1, 128), default=0,
        help="length of the HMAC key (default: what suits the digest)")
    add("--hmac-digest-type", metavar="DIGEST", type=str.lower, choices=list(HMAC_KEY_BYTES),
        default="sha256", help=f"{', '.join(HMAC_KEY_BYTES)} (default: sha256)")
    add("--rc-file", metavar="PATH", default="", help="append the client's stanza to this file")
    add("--access-file", metavar="PATH", default="", help="append the server's stanza to this file")
    stanzas = parser.add_argument_group("in the stanzas", argument_default=argparse.SUPPRESS)
    add = stanzas.add_argument
    add("--server", metavar="HOST", type=checked(parse_host),
        help="the server's name or address (required)")
    add("--access", metavar="LIST", type=checked(parse_access),
        help="what may be opened, like tcp/22,udp/53 (required)")
    add("--port", type=checked(parse_integer, 1, 65535),
        help=f"port the server listens on (default: {DEFAULT_SPA_PORT})")
    add("--source", metavar="NETWORKS", type=checked(parse_source),
        help="where packets may come from (default: ANY)")
    add("--timeout", metavar="SECONDS", dest="open_seconds",
        type=checked(parse_integer, 1, 8388608), help="how long a port stays open (default: 30)")
    add("--username", metavar="USER", type=checked(parse_username),
        help="let the packet name this user, and require it")
    add("--any-source", action="store_const", const=True,
        help="open for the address the packet came from")
    return parser


def make_plan(options: argparse.Namespace) -> Optional[StanzaPlan]:
    """Return what the stanzas say, or None when only keys are wanted; raise UsageError."""
    given = {field: value for field, value in vars(options).items()
             if field in StanzaPlan._fields and value is not None}
    paths = [os.path.realpath(path) for path in (options.rc_file, options.access_file) if path]
    if "name" not in given:
        if given or paths:
            raise UsageError("a stanza needs a NAME")
        return None
    for field in ("server", "access"):
        if field not in given:
            raise UsageError(f"a stanza needs --{field}")
    if len(set(paths)) < len(paths):
        raise UsageError("--rc-file and --access-file have to be two files")
    return StanzaPlan(**given)


def warn(text: str) -> None:
    """Tell the administrator on standard error, and go on."""
    print(f"keygen.py: warning: {text}", file=sys.stderr)


def warn_of_readers(path: str, status_mode: int) -> None:
    """Warn of a regular file with keys that is not for its owner alone."""
    if stat.S_ISREG(status_mode) and status_mode & 0o077:
        warn(f"{path} is open to others (mode {stat.S_IMODE(status_mode):04o}): chmod 600")


def write_out(text: str) -> None:
    """Write to standard output and see it leave, so that keys do not get lost unnoticed."""
    if not sys.stdout:
        raise SpaError("standard output is closed")
    with contextlib.suppress(OSError, ValueError):  # ValueError: a test's buffer has no fileno
        warn_of_readers("standard output", os.fstat(sys.stdout.fileno()).st_mode)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # or the interpreter tries it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SpaError(f"standard output: {error.strerror}") from error


def give_stanzas(plan: StanzaPlan, keys: Keys, rc_file: str, access_file: str) -> None:
    """Print both stanzas, or append them to the files that were named."""
    told = "" if plan.any_source else (
        "# fwknop's own client has to be told its address: "
        f"fwknop -n {plan.name} -R, or -a ADDRESS\n")
    rows = [
        (rc_file, client_stanza(plan, keys),
         f"# For ~/.fwknoprc of the client. To knock: spa_client.py -n {plan.name}\n{told}"),
        (access_file, server_stanza(plan, keys),
         "# For access.conf of the server, which has to read it again then\n"),
    ]
    printed = [heading + text for path, text, heading in rows if not path]
    with contextlib.ExitStack() as stack:
        targets = []
        for path, text, _ in rows:
            if path:
                target = stack.enter_context(StanzaFile(path))
                target.prepare(text)
                targets.append(target)
        if printed:
            write_out("\n".join(printed))
        for target in targets:
            target.commit()
            print(f"[+] Wrote the stanza of {plan.name} to: {target.path}", file=sys.stderr)
            warn_of_readers(target.path, target.mode)


def run(argv: Optional[Sequence[str]], random: Callable[[int], bytes]) -> None:
    """Do what the command line says; raise SpaError."""
    options, unknown = make_parser().parse_known_args(argv)
    if unknown:  # what follows it may be a secret that was meant for `fwknop`: not shown
        name = unknown[0].partition("=")[0]
        raise UsageError(f"unknown option {name}" if name[0] == "-" else "expected one NAME")
    if options.version:
        with open(__file__, "rb") as stream:
            digest = hashlib.sha256(stream.read()).hexdigest()
        print(f"keygen.py {VERSION}\nsha256 {digest}")
        return
    plan = make_plan(options)
    keys = make_keys(options.hmac_digest_type, options.key_len, options.hmac_key_len, random)
    if options.key_len < 16 or 0 < options.hmac_key_len < 16:
        warn("a key of less than 16 bytes can be guessed")
    if plan:
        give_stanzas(plan, keys, options.rc_file, options.access_file)
    else:
        write_out(f"KEY_BASE64: {keys.key}\nHMAC_KEY_BASE64: {keys.hmac_key}\n")


def main(argv: Optional[Sequence[str]] = None,
         random: Callable[[int], bytes] = os.urandom) -> int:
    """Run the command line and return the exit code; only here errors become one."""
    try:
        run(argv, random)
    except SpaError as error:
        print(f"keygen.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
