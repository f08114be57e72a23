"""Tests of spa_client.py: packets, options, the rc file, keys, output, network, systems."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import unittest
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple
from unittest import mock

import keygen
import spa_client as client
import spa_server as server
from tests.support import (TIMEOUT, TOP, DirectoryCase, as_main, captured, compiled,
                           find_pythons, nearest_python, needs_programs, skip, wait_for, write)

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(TOP, "spa_client.py")
KEY, HMAC_KEY = "the-encryption-key", "the-hmac-key"
KEYS = ["--key-rijndael", KEY, "--key-hmac", HMAC_KEY]
KNOCK = ["-A", "tcp/22", "-a", "192.0.2.7"]




def vectors() -> List[Dict[str, Any]]:
    """The symmetric packets of the real client."""
    with open(os.path.join(HERE, "vectors", "fwknop.json")) as file:
        return [vector for vector in json.load(file)["vectors"]
                if vector["mode"] != "Asymmetric"]


def python() -> str:
    """The interpreter itself: sys.executable may be a slow wrapper."""
    return os.path.realpath(sys.executable)


def fields(dump: str) -> Dict[str, str]:
    """The lines `name: value` of a dump."""
    return {name.strip(): value for name, mark, value in
            (line.partition(": ") for line in dump.splitlines()) if mark}


def unseal(packet: str, key: str = KEY, tag_length: int = 43) -> str:
    """The plain text of a packet in CBC mode."""
    body = packet[:len(packet) - tag_length] if tag_length else packet
    data = client.decode_base64(client.PREFIX + body)
    secret, iv = client.bytes_to_key(client.DIGESTS["MD5"], key.encode(), data[8:16])
    out = server.decrypt(server.Aes(secret), "CBC", iv, data[16:])
    return str(out[:-out[-1]].decode("ascii"))


class Case(DirectoryCase):
    """A test with a home directory of its own and a way to run the program."""

    def setUp(self) -> None:
        super().setUp()
        self.home = self.directory
        self.environment = {"HOME": self.home, "LOGNAME": "ann", "PATH": os.environ["PATH"]}

    def write(self, text: str, name: str = ".fwknoprc", mode: int = 0o600) -> str:
        """A file in the home directory; the rc file unless another name is given."""
        return write(self.place(name), text, mode)

    def run_main(self, *words: str, stdin: bytes = b"") -> Tuple[int, str, str]:
        """Exit code, standard output and standard error of main(), in this process."""
        with mock.patch.dict(os.environ, self.environment, clear=True), \
                self.standard_input(stdin):
            code, out, err = captured(lambda: client.main(list(words)))
        self.assertNotIn("Traceback", err)
        if code:
            lines = err.splitlines()
            self.assertTrue(all(line.startswith("spa_client.py: ") for line in lines), lines)
            self.assertEqual(sum(": warning: " not in line for line in lines), 1, lines)
        return code, out, err

    @contextlib.contextmanager
    def standard_input(self, data: bytes) -> Iterator[None]:
        """Let file descriptor 0 be a pipe with these bytes."""
        saved, (reader, writer) = os.dup(0), os.pipe()
        os.write(writer, data)
        os.close(writer)
        os.dup2(reader, 0)
        os.close(reader)
        try:
            yield
        finally:
            os.dup2(saved, 0)
            os.close(saved)

    def dump(self, *words: str, stdin: bytes = b"") -> Dict[str, str]:
        """The fields that -T prints for these options."""
        code, out, err = self.run_main("-T", *words, stdin=stdin)
        self.assertEqual(code, 0, err)
        return fields(out)

    def failure(self, code: int, *words: str, stdin: bytes = b"") -> str:
        """The line on standard error of a run that must end with this exit code."""
        got, out, err = self.run_main(*words, stdin=stdin)
        self.assertEqual((got, out), (code, ""), err)
        return err[len("spa_client.py: "):].rstrip("\n")

    def script(self, words: List[str], interpreter: Optional[str] = None, before: str = "",
               **extra: Any) -> "subprocess.CompletedProcess[bytes]":
        """Run the script in its own process; `before` is Python to run ahead of it."""
        command = [interpreter or python(), "-I", "-S"]
        if before:
            command += ["-c", before + as_main(SCRIPT, command[0])]
        else:
            command.append(compiled(SCRIPT, command[0]))
        extra.setdefault("stdout", subprocess.PIPE)
        return subprocess.run(command + words, env=self.environment, stderr=subprocess.PIPE,
                              stdin=subprocess.DEVNULL, cwd=self.home, timeout=TIMEOUT, **extra)


class Receiver:
    """A UDP socket on the loopback that the program can send to."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.bind((host, 0))
        self.socket.settimeout(TIMEOUT)
        self.options = ["-D", host, "-p", str(self.socket.getsockname()[1])]

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def packet(self) -> str:
        """The next packet."""
        return self.socket.recv(2000).decode("ascii")

    def silent(self) -> bool:
        """Whether nothing has come."""
        self.socket.setblocking(False)
        try:
            self.socket.recv(2000)
        except BlockingIOError:
            return True
        return False


class Standards(unittest.TestCase):
    """AES, its modes, the digests and HMAC against the documents that define them."""

    def test_fips_197(self) -> None:
        """Appendix C, all key sizes."""
        plain = bytes.fromhex("00112233445566778899aabbccddeeff")
        for length, cipher in ((16, "69c4e0d86a7b0430d8cdb78070b4c55a"),
                               (24, "dda97ca4864cdfe06eaf70a0ec0d7191"),
                               (32, "8ea2b7ca516745bfeafc49904b496089")):
            aes = client.Aes(bytes(range(length)))
            self.assertEqual(aes.encrypt_block(plain).hex(), cipher)

    def test_sp_800_38a(self) -> None:
        """Appendix F with the key of 256 bits."""
        key = bytes.fromhex("603deb1015ca71be2b73aef0857d7781"
                            "1f352c073b6108d72d9810a30914dff4")
        plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
                              "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710")
        iv, counter = bytes(range(16)), bytes(range(0xF0, 0x100))
        for mode, start, cipher in (
                ("ECB", iv, "f3eed1bdb5d2a03c064b5a7e3db181f8591ccb10d410ed26dc5ba74a31362870"
                            "b6ed21b99ca6f4f9f153e7b1beafed1d23304b7a39f9f3ff067d8d8f9e24ecc7"),
                ("CBC", iv, "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d"
                            "39f23369a9d9bacfa530e26304231461b2eb05e2c39be9fcda6c19078c6a9d1b"),
                ("CFB", iv, "dc7e84bfda79164b7ecd8486985d386039ffed143b28b1c832113c6331e5407b"
                            "df10132415e54b92a13ed0a8267ae2f975a385741ab9cef82031623d55b1e471"),
                ("OFB", iv, "dc7e84bfda79164b7ecd8486985d38604febdc6740d20b3ac88f6ad82a4fb08d"
                            "71ab47a086e86eedf39d1c5bba97c4080126141d67f37be8538f5a8be740e484"),
                ("CTR", counter, "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
                                 "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6")):
            self.assertEqual(client.encrypt_blocks(mode, key, start, plain).hex(), cipher, mode)

    def test_ctr_counts_over_the_end(self) -> None:
        """The counter is one number of 128 bits, and begins again at zero."""
        aes = client.Aes(bytes(32))
        out = client.encrypt_blocks("CTR", bytes(32), b"\xff" * 16, bytes(32))
        self.assertEqual(out, aes.encrypt_block(b"\xff" * 16) + aes.encrypt_block(bytes(16)))

    def test_digests_and_hmac(self) -> None:
        """The same as Python's hashlib and hmac, for keys on both sides of every block size."""
        import hashlib
        import hmac
        for digest in client.DIGESTS.values():
            name = digest.name.lower()
            self.assertEqual(digest(b"abc"), hashlib.new(name, b"abc").digest())
            self.assertEqual(digest.size, hashlib.new(name).digest_size)
            self.assertEqual(digest.block, hashlib.new(name).block_size)
            for length in (0, 1, 63, 64, 65, 71, 72, 73, 127, 128, 129, 135, 136, 137):
                key = bytes(range(length))
                self.assertEqual(client.Hmac(digest, key, b"te")(b"xt"),
                                 hmac.new(key, b"text", name).digest(), (name, length))

    def test_base64(self) -> None:
        """With `=` and without; nothing else is taken for base64."""
        for data in (b"", b"a", b"ab", b"abc", bytes(range(256))):
            text = client.encode_base64(data)
            self.assertNotIn("=", text)
            self.assertEqual(client.decode_base64(text), data)
            self.assertEqual(client.decode_base64(text + "=" * (-len(text) % 4)), data)
        for text in ("a", "abcde", "ab*d", "ab d", "a=bc", "ab\n", "\xe9abc"):
            with self.assertRaisesRegex(ValueError, "^expected base64$"):
                client.decode_base64(text)


class Packets(Case):
    """Messages and packets."""

    def test_vectors(self) -> None:
        """Every packet of the real client again, byte for byte, from its decoded fields."""
        done = vectors()
        self.assertGreater(len(done), 70)
        for vector in done:
            decoded = vector["decoded"]
            with self.subTest(vector["name"]):
                plaintext = client.encode_message(client.Message(
                    decoded["rand"], decoded["username"], decoded["timestamp"],
                    decoded["msg_type"], decoded["message"], decoded["nat_access"] or "",
                    decoded["client_timeout"] or 0), vector["digest_type"])
                self.assertEqual(plaintext.decode("ascii"),
                                 f"{decoded['encoded']}:{decoded['digest']}")
                hmac_key = bytes.fromhex(vector["hmac_key_hex"]) if vector["hmac_type"] else None
                data = client.encrypt_salted(
                    vector["mode"], bytes.fromhex(vector["key_hex"]),
                    bytes.fromhex(decoded["salt"]), plaintext)
                self.assertEqual(client.seal(data, hmac_key, vector["hmac_type"] or "SHA256"),
                                 vector["packet"])

    def test_sent(self) -> None:
        """Send the packet with nothing around it, and print nothing."""
        with Receiver() as receiver:
            code, out, err = self.run_main(*KNOCK, *KEYS, *receiver.options)
            self.assertEqual((code, out, err), (0, "", ""))
            packet = receiver.packet()
            self.assertTrue(receiver.silent())
        self.assertIn(packet[0], "89+/")
        random, user, timestamp, version, number, text, digest = unseal(packet).split(":")
        self.assertRegex(random, "^[0-9]{16}$")
        self.assertEqual(client.decode_base64(user), b"ann")
        self.assertAlmostEqual(int(timestamp), time.time(), delta=5)
        self.assertEqual((version, number), ("3.0.0", "1"))
        self.assertEqual(client.decode_base64(text), b"192.0.2.7,tcp/22")
        self.assertEqual(len(digest), 43)

    def test_timeout_type(self) -> None:
        """-f makes a message of type 3, -f 0 one of type 1."""
        self.assertEqual(self.dump(*KNOCK, *KEYS, "-f", "65536")["Message Type"],
                         "3 (Client timeout access msg)")
        shown = self.dump(*KNOCK, *KEYS, "-f", "0")
        self.assertEqual(shown["Message Type"], "1 (Access msg)")
        self.assertEqual(shown["Client Timeout"], "0")
        for text in ("65537", "-1", "abc", "", "1.5", "\u0663"):
            self.assertIn("expected a number of seconds", self.failure(
                2, *KNOCK, *KEYS, "--fw-timeout=" + text))

    def test_random(self) -> None:
        """Sixteen digits, other ones each time."""
        self.assertEqual(len({client.random_digits() for _ in range(200)}), 200)
        number = (10 ** 16 + 5).to_bytes(16, "big")
        with mock.patch.object(os, "urandom", lambda _: number):
            self.assertEqual(client.random_digits(), "0" * 15 + "5")

    def test_access_list(self) -> None:
        """Refuse what servers would reject, before anything is sent."""
        with Receiver() as receiver:
            for text in ("tcp/1", "udp/65535", "tcp/22,udp/53,tcp/443", "tcp/00022",
                         " tcp/22, udp/53 ,tcp/443 "):
                shown = self.dump("-A", text, "-a", "192.0.2.7", *KEYS)
                self.assertEqual(shown["Message String"], "192.0.2.7," + text.replace(" ", ""))
            for text in ("", "tcp", "tcp/", "tcp/0", "tcp/65536", "tcp/000022", "TCP/22",
                         "icmp/8", "none/0", "tcp/22,", ",tcp/22", "tcp/22,,tcp/23", "tcp/2 2",
                         "tcp/22 tcp/23", "tcp/1-5", "tcp/-1", "tcp/ssh", "tcp/2\u0662"):
                with self.subTest(text):
                    line = self.failure(2, "-A" + text if text else "--access=", "-a", "192.0.2.7",
                                        *KEYS, *receiver.options)
                    self.assertIn("expected", line)
            self.assertTrue(receiver.silent())

    def test_addresses(self) -> None:
        """IPv4 as servers read it, and IPv6 in the same form, as our extension."""
        for text, sent in (("1.2.3.4", "1.2.3.4"), ("255.255.255.255", "255.255.255.255"),
                           ("2001:DB8:0::1", "2001:db8::1"), ("source", "0.0.0.0")):
            shown = self.dump("-A", "tcp/22", "-a", text, *KEYS)
            self.assertEqual(shown["Message String"], sent + ",tcp/22")
        self.assertEqual(self.dump("-A", "tcp/22", "-s", *KEYS)["Message String"],
                         "0.0.0.0,tcp/22")
        for text in ("1.2.3", "1.2.3.4.5", "256.1.1.1", "01.2.3.4", "1.2.3.x", "::x", "::1%lo",
                     "host", "1.2.3.4 ", "\u0661.1.1.1"):
            self.assertIn("address", self.failure(2, "-T", "-A", "tcp/22", "-a", text, *KEYS))

    def test_later_address_wins(self) -> None:
        """-a and -s are one setting."""
        self.assertEqual(self.dump(*KNOCK, *KEYS, "-s")["Message String"], "0.0.0.0,tcp/22")
        self.assertEqual(self.dump("-s", *KNOCK, *KEYS)["Message String"], "192.0.2.7,tcp/22")

    def test_user(self) -> None:
        """Take the user name from the right source, and refuse bad ones."""
        def user(*words: str, **environment: str) -> str:
            self.environment = dict(HOME=self.home, **environment)
            return self.dump(*KNOCK, *KEYS, *words)["Username"]

        self.assertEqual(user(SPOOF_USER="s", LOGNAME="l", USER="u"), "s")
        self.assertEqual(user(LOGNAME="l", USER="u"), "l")
        with mock.patch.object(os, "getlogin", lambda: "g"):
            self.assertEqual(user(USER="u"), "g")
        with mock.patch.object(os, "getlogin", side_effect=OSError):
            with mock.patch.object(client, "effective_user", lambda: "e"):
                self.assertEqual(user(USER="u"), "e")
            with mock.patch.object(client, "effective_user", lambda: ""):
                self.assertEqual(user(USER="u"), "u")
                self.assertEqual(user(), "NO_USER")
        self.assertEqual(user("-U", "jim", SPOOF_USER="s"), "jim")
        self.assertEqual(user("-U", "x" * 40), "x" * 29)
        self.assertEqual(user(LOGNAME="x" * 48), "x" * 48)
        self.assertEqual(user("-U", "a b!#$%&()'-_.@^`{}~"), "a b!#$%&()'-_.@^`{}~")
        for letter in '"/\\[]:;|=,+*?<>\t\x7f\xe9':
            self.assertIn("user name", self.failure(2, "-T", *KNOCK, *KEYS, "-Ua" + letter))
        self.failure(2, "-T", *KNOCK, *KEYS, "-U", "")
        self.environment = {"HOME": self.home, "LOGNAME": "x" * 49}
        self.assertIn("-U sets it", self.failure(1, "-T", *KNOCK, *KEYS))

    def test_length_limit(self) -> None:
        """396 characters go, 400 and more are explained."""
        ports = [f"tcp/{port}" for port in range(20000, 20040)]
        lengths = set()
        with Receiver() as receiver:
            for count in range(1, len(ports)):
                words = ["-A", ",".join(ports[:count]), "-a", "192.0.2.7", "--key-rijndael", KEY]
                code, _, err = self.run_main(*words, *receiver.options)
                if code:
                    break
                lengths.add(len(receiver.packet()))
            self.assertTrue(receiver.silent())
        self.assertEqual(code, 1)
        self.assertEqual(max(lengths), 396)
        self.assertLess(lengths - {396}, {140, 161, 182, 204, 225, 246, 268, 289, 310, 332, 353,
                                          374})
        for word in ("would be 417 characters", "at most 396", "access list are",
                     "user name 3", "(SHA256) 43", "HMAC 0", "fewer ports"):
            self.assertIn(word, err)

    def test_time_offset(self) -> None:
        """Units and signs."""
        def offset(*words: str) -> int:
            return int(self.dump(*KNOCK, *KEYS, *words)["Timestamp"]) - int(time.time())

        for words, expected in ((["--time-offset-plus", "90"], 90),
                                (["--time-offset-minus", "5m"], -300),
                                (["--time-offset-minus", "2hours"], -7200),
                                (["--time-offset-plus", "1D"], 86400)):
            self.assertAlmostEqual(offset(*words), expected, delta=3)
        for text in ("", "x", "5q", "--5", "5 m"):
            self.failure(2, "-T", *KNOCK, *KEYS, "--time-offset-plus=" + text)
        self.failure(2, "-T", *KNOCK, *KEYS, "--time-offset-minus", "-5")


class Options(Case):
    """The command line."""

    def test_conventions(self) -> None:
        """getopt_long, as users of fwknop know it."""
        for words in (["-A", "tcp/22", "-p", "7000"], ["-Atcp/22", "-p7000"],
                      ["--access=tcp/22", "--server-port", "7000"],
                      ["--acc", "tcp/22", "--server-port=7000"],
                      ["-Tvp", "7000", "-A", "tcp/22"], ["-vTAtcp/22", "-p7000"],
                      ["-p", "1", "-A", "tcp/22", "-p", "7000"],
                      ["-A", "tcp/22", "-p7000", "--", "-p", "9"]):
            with self.subTest(words):
                shown = self.dump("-s", "-v", *KEYS, *words)
                self.assertEqual(shown["destination port"], "7000")

    def test_other_words(self) -> None:
        """They may stand anywhere, are ignored as by fwknop, and counted without being shown."""
        code, out, err = self.run_main("-T", "word", *KNOCK, *KEYS, "--", "-A")
        self.assertEqual(code, 0)
        self.assertIn("2 of the arguments", err)
        self.assertNotIn("'word'", err)

    def test_errors(self) -> None:
        """One line, exit code 2."""
        for words, expected in (
                (["--bogus"], "unrecognized option '--bogus'"),
                (["--bogus=" + KEY], "unrecognized option '--bogus'"),
                (["-x" + KEY], "invalid option -- 'x'"),
                (["--key"], "option '--key' is ambiguous: "),
                (["--"[:1] + "D"], "option '-D' requires an argument"),
                (["--destination"], "option '--destination' requires an argument"),
                (["--test=" + KEY], "option '--test' doesn't allow an argument"),
                (["--=" + KEY], "unrecognized option '--'"),
                ([], "no ports to open given"),
                (["-A", "tcp/22", "-s"], "Must use --destination"),
                (["-T", "-A", "tcp/22"] + KEYS, "Must use one of [-s|-R|-a] to specify IP for"
                                                " SPA access."),
                (["-p", "0"], "-p: expected a port number, 1 to 65535, not '0'"),
                (["--server-port", "x"], "--server-port: expected a port number"),
                (["-m", "sha9"], "-m: expected one of MD5 SHA1"),
                (["-M", "PCBC"], "-M: expected one of CBC ECB"),
                (["-P", "sctp"], "-P: expected one of udp udpraw tcp tcpraw http icmp, not")):
            with self.subTest(words):
                line = self.failure(2, *words)
                self.assertTrue(line.startswith(expected), line)
                self.assertNotIn(KEY, line)

    def test_ignored(self) -> None:
        """Options that change nothing about a packet over UDP."""
        for words in (["--no-save-args"], ["--no-home-dir"], ["-S", "5"],
                      ["-w", "x"], ["-u", "x"], ["--use-wget-user-agent"],
                      ["--resolve-url", "http://x"], ["--resolve-http-only"], ["-P", "udp"],
                      ["-4"], ["--fault-injection-tag", "x"],
                      ["--server-resolve-ipv4"], ["-R", "-a", "192.0.2.7"]):
            with self.subTest(words):
                self.dump(*KNOCK, *KEYS, *words)
        self.assertEqual(os.listdir(self.home), [])

    def test_known_to_fwknop(self) -> None:
        """All option letters of fwknop are there, with an argument where it has one."""
        letters = "a:A:bB:C:D:E:f:gG:hH:kK:lm:M:n:N:p:P:Q:rRsS:Tu:U:vVw:"
        for position, letter in enumerate(letters):
            if letter != ":":
                option = client.find_option(client.OPTIONS, "-" + letter)
                self.assertEqual(letters[position + 1:position + 2] == ":",
                                 bool(option.argument), letter)

    def test_table(self) -> None:
        """No name twice; every option sets a row of the table or something run() looks at."""
        names = [option.long for option in client.OPTIONS if option.long]
        shorts = [option.short for option in client.OPTIONS if option.short]
        self.assertEqual(len(names), len(set(names)))
        self.assertEqual(len(shorts), len(set(shorts)))
        known = set(client.ROWS) | {
            "help", "version", "stanza_list", "named_config", "rc_file", "no_rc_file",
            "no_home_dir", "import", "last_command", "show_last", "man", "completion", "knock",
            "print_launcher", "print_ssh_config"}
        self.assertLessEqual({option.name for option in client.OPTIONS}, known)
        self.assertLessEqual({name for name in client.ROWS if name.islower()},
                             {option.name for option in client.OPTIONS})

    def test_help_and_version(self) -> None:
        """--help names every option; -V tells the SHA-256 of the file."""
        import hashlib
        code, out, err = self.run_main("--help")
        self.assertEqual((code, err), (0, ""))
        for option in client.OPTIONS:
            self.assertRegex(out, " --?%s[, \n]" % (option.long if not option.short
                                                    else option.short))
        self.assertLess(max(map(len, out.splitlines())), 101)
        code, out, err = self.run_main("-V")
        self.assertEqual((code, err), (0, ""))
        self.assertIn("FKO protocol version 3.0.0", out)
        with open(SCRIPT, "rb") as file:
            self.assertIn(hashlib.sha256(file.read()).hexdigest(), out)


class RcFile(Case):
    """~/.fwknoprc."""

    def test_tokens(self) -> None:
        """Names and values end where fwknop lets them end."""
        for line, name, value, suspicious in (
                ("KEY abc", "KEY", "abc", False), ("KEY: abc", "KEY", "abc", False),
                ("KEY:\tabc", "KEY", "abc", False), ("KEY\tabc\t", "KEY", "abc", False),
                ("KEY   abc # x", "KEY", "abc", False), ("KEY abc ;x", "KEY", "abc", False),
                ("KEY abc#x", "KEY", "abc", True), ("KEY abc;", "KEY", "abc", True),
                ("KEY abc def", "KEY", "abc", True), ("KEY #abc", "KEY", "", True),
                ("KEY ab:c", "KEY", "ab:c", False), ("KEY = abc", "KEY", "=", True),
                ("KEY : abc", "KEY", ":", True), ("KEY", "KEY", "", False),
                ("KEY:abc", "KEY:abc", "", False), ('KEY "a"', "KEY", '"a"', False),
                ("KEY \xa0a", "KEY", "\xa0a", False),
                ("KNOCK_SEQUENCE: 7,\t8 # x", "KNOCK_SEQUENCE", "7, 8", False),
                ("KNOCK_SEQUENCE 7;8", "KNOCK_SEQUENCE", "7;8", False),
                ("ACCESS tcp/1, tcp/2 ,\ttcp/3 # x, y", "ACCESS", "tcp/1,tcp/2,tcp/3", False),
                ("ACCESS tcp/1 x, y", "ACCESS", "tcp/1", True),
                ("ACCESS tcp/1;x, y", "ACCESS", "tcp/1", True),
                ("NAT_ACCESS h, 22", "NAT_ACCESS", "h,22", False)):
            self.assertEqual(client.parse_line(line), (name, value, suspicious), line)

    def test_good_lines(self) -> None:
        """The same user name as the real client finds (each line was tried with it)."""
        for line, user in (("SPOOF_USER joe", "joe"), ("SPOOF_USER:  joe", "joe"),
                           ("SPOOF_USER\tjoe", "joe"), ("SPOOF_USER joe@x", "joe@x"),
                           ("SPOOF_USER joe\r", "joe"), ("SPOOF_USER   joe#x", "joe"),
                           ("SPOOF_USER joe;x", "joe"), ("  SPOOF_USER joe", "joe"),
                           ("\n#c\n;c\n\r\nSPOOF_USER joe", "joe"),
                           ("SPOOF_USER joe\nSPOOF_USER jim", "jim"),
                           ("SPOOF_USER joe\n[Default] x\nSPOOF_USER jim", "jim"),
                           ("SPOOF_USER joe\n[other]\nSPOOF_USER jim\nBOGUS 1", "joe")):
            with self.subTest(line):
                self.write("[default]\n" + line)
                self.assertEqual(self.dump(*KNOCK, *KEYS)["Username"], user)

    def test_bad_lines(self) -> None:
        """File, line, name, and what was expected; exit code 3."""
        path = os.path.join(self.home, ".fwknoprc")
        for line, expected in (
                ("SPOOF_USER", "SPOOF_USER: expected a value"),
                ("SPOOF_USER ;joe", "SPOOF_USER: expected a value"),
                ("SPOOF_USER:joe", "SPOOF_USER: expected a blank after it, not ':'"),
                ("SPOOF_USER : joe", "SPOOF_USER: expected a value, not ':'"),
                ("SPA_SERVER=host", "SPA_SERVER: expected a blank after it, not '='"),
                ("SPA_SERVER host:62201", "SPA_SERVER: expected a name or an address, without port "
                 "or path, not 'host:62201'"),
                ("SPA_SERVER https://h", "SPA_SERVER: expected a name or an address, without port "
                 "or path, not 'https://h'"),
                ("KEY=half/of+a7key", "KEY: expected a blank after it, not '='"),
                ("KEY = half/of+a7key", "KEY: expected a value, not '='"),
                ("KEY \xa0 half/of+a7key", "KEY: expected a value, not '\\xa0'"),
                ("KEY\xa0half/of+a7key", "KEY: expected a blank after it, not a no-break space"),
                ("\xa0KEY half/of+a7key", "KEY: expected nothing before it, not a no-break space"),
                ("> KEY half/of+a7key", "KEY: expected nothing before it, not '>'"),
                ("|KEY half/of+a7key", "KEY: expected nothing before it, not another character"),
                ("> [gate]", "expected nothing before [NAME]"),
                ("HMAC_KEY_BASE64 half+a7key000", "HMAC_KEY_BASE64: expected base64, 13 characters"
                                                  ", is one missing?"),
                ("SOURCE ANY", "SOURCE: this belongs in access.conf on the server"),
                ("RESOLVE_IP_HTTPS https://x/y", "RESOLVE_IP_HTTPS: expected Y or N (RESOLVE_URL "
                 "takes it), not 'https://x/y'"),
                ("spoof_user joe", "spoof_user: expected the name of a directive"),
                ("ACESS tcp/22", "ACESS: expected the name of a directive"),
                ("[default", "expected the name of a directive"),
                ("half/of+a7key", "expected the name of a directive"),
                ("SPA_SERVER_PORT 0", "SPA_SERVER_PORT: expected a port number, 1 to 65535, not"
                                      " '0'"),
                ("FW_TIMEOUT 30m", "FW_TIMEOUT: expected a number of seconds, 0 to 65536, not"
                                   " '30m'"),
                ("USE_HMAC maybe", "USE_HMAC: expected Y or N, not 'maybe'"),
                ("ALLOW_IP 1.2.3", "ALLOW_IP: expected an IPv4 or IPv6 address, not '1.2.3'"),
                ("ACCESS tcp", "ACCESS: expected tcp/PORT or udp/PORT"),
                ("DIGEST_TYPE x", "DIGEST_TYPE: expected one of MD5"),
                ("TIME_OFFSET x", "TIME_OFFSET: expected a time such as")):
            with self.subTest(line):
                self.write("[default]\n\n" + line + "\n")
                found = self.failure(3, "-T", "--key-rijndael", KEY)
                self.assertTrue(found.startswith(f"{path}:3: {expected}"), found)
                self.assertNotIn("a7key", found)

    def test_directives(self) -> None:
        """All 44 of fwknop, and four of ours."""
        names = (
            "DIGEST_TYPE SPA_SERVER_PROTO SPA_SERVER_PORT SPA_SOURCE_PORT FW_TIMEOUT ALLOW_IP "
            "TIME_OFFSET ENCRYPTION_MODE USE_GPG USE_GPG_AGENT GPG_NO_SIGNING_PW GPG_RECIPIENT "
            "GPG_SIGNER GPG_HOMEDIR GPG_EXE SPOOF_USER SPOOF_SOURCE_IP ACCESS SPA_SERVER RAND_PORT "
            "KEY KEY_BASE64 GPG_SIGNING_PW GPG_SIGNING_PW_BASE64 "
            "HMAC_DIGEST_TYPE HMAC_KEY_BASE64 HMAC_KEY USE_HMAC USE_WGET_USER_AGENT KEY_FILE "
            "HMAC_KEY_FILE NAT_ACCESS HTTP_USER_AGENT RESOLVE_URL SERVER_RESOLVE_IPV4 NAT_LOCAL "
            "NAT_RAND_PORT NAT_PORT VERBOSE RESOLVE_IP_HTTP RESOLVE_IP_HTTPS RESOLVE_HTTP_ONLY "
            "WGET_CMD NO_SAVE_ARGS KNOCK_SEQUENCE KNOCK_DELAY ONE_CONNECTION OSPA_FILE").split()
        self.assertEqual(client.DIRECTIVE_NAMES, names)  # in the order that fwknop numbers them
        for name in names:
            self.assertTrue(client.ROWS[name].help, name)

    def test_precedence(self) -> None:
        """Built-in, [default], named stanza, command line."""
        self.write("[default]\nACCESS tcp/1\nALLOW_IP source\nKEY abc\nDIGEST_TYPE md5\n"
                   "FW_TIMEOUT 5\n[Work]\nDIGEST_TYPE sha1\nACCESS tcp/2\n[work]\nACCESS tcp/3\n")
        for words, access, digest in (([], "tcp/1", "1 (MD5)"),
                                      (["-n", "WORK"], "tcp/3", "2 (SHA1)"),
                                      (["-n", "work", "-A", "tcp/4"], "tcp/4", "2 (SHA1)"),
                                      (["-n", "work", "-m", "sha512"], "tcp/3", "5 (SHA512)"),
                                      (["--no-rc-file", "-Atcp/9", "-s", "--key-rijndael", "k"],
                                       "tcp/9", "3 (SHA256)")):
            with self.subTest(words):
                shown = self.dump(*words)
                self.assertEqual(shown["Message String"], "0.0.0.0," + access)
                self.assertEqual(shown["Digest Type"], digest)
                self.assertEqual(shown["Client Timeout"], "0" if len(words) > 4 else "5")

    def test_stanza_not_found(self) -> None:
        """-n without its stanza never falls back to [default]."""
        words = ["-T", "-n", "x", *KNOCK, *KEYS]
        none = "-n needs an rc file, and there is none: "
        nowhere = none + "HOME is not set, or --no-rc-file is given"
        self.assertEqual(f"{none}{self.home}/.fwknoprc", self.failure(2, *words))
        self.assertEqual(nowhere, self.failure(2, *words, "--no-rc-file"))
        for text, names in (("[default]\n[ x ]\n[Gate]\n", "there are:  x , Gate"),
                            ("[default]\n", "there is none")):
            self.write(text)
            self.assertTrue(self.failure(3, *words).endswith(
                f": Named configuration stanza: [x] was not found ({names})"))
        del self.environment["HOME"]
        self.assertEqual(nowhere, self.failure(2, *words))

    def test_stanza_meant(self) -> None:
        """An operand may be meant as one; without -n those that there are are named."""
        self.write("[gate]\n[work]\n")
        self.assertIn("(-n takes one of: gate, work)", self.failure(2))
        code, out, err = self.run_main("gate")
        self.assertEqual((2, 2), (code, err.count("(did you mean -n gate?)")))
        code, out, err = self.run_main("-T", *KNOCK, *KEYS, "secret/key")
        self.assertEqual((0, "spa_client.py: warning: 1 of the arguments belong to no option and"
                          " are ignored (-n takes one of: gate, work)\n"), (code, err))
        self.assertNotIn("-n takes", self.failure(2, "-n", "gate"))
        self.assertNotIn("-n takes", self.failure(2, "--no-rc-file"))

    def test_dashes(self) -> None:
        """A dash that an editor made of a hyphen; only the names of options are shown."""
        for words, shown in ((["\u2013n", "x"], "'\\u2013n'"),
                             (["\u2014wait", "9"], "'\\u2014wait'"),
                             (["\u2013-access=s3cret"], "'\\u2013-access'"),
                             (["--knock", "\u2212v", "h", "7"], "'\\u2212v'")):
            code = 1 if words[0] == "--knock" else 2
            self.assertEqual(shown + ": is that dash a hyphen?", self.failure(code, *words))
        for words in (["-u", "\u2013n"], ["\u2013ns3cret"], ["\u2013"]):
            code, out, err = self.run_main("-T", *KNOCK, *KEYS, *words)
            self.assertEqual((0, False), (code, "s3cret" in err), "a value, or a secret")

    def test_byte_order_mark(self) -> None:
        """Windows begins a text with one; what is saved then is found again."""
        path = self.write("\ufeff[work]\nACCESS tcp/7\n")
        with open(path, "rb") as old:
            texts = ("\ufeff[work]\r\nACCESS tcp/7\r\n".encode("utf-16-le"), old.read())
        for data in texts:
            with open(path, "wb") as new:
                new.write(data)
            self.assertEqual("192.0.2.7,tcp/7", self.dump("-n", "work", "-a", "192.0.2.7", *KEYS)[
                "Message String"])
        self.run_main("-T", "-n", "work", "-A", "tcp/8", "-s", *KEYS, "--save-rc-stanza")
        with open(path) as file:
            self.assertRegex(file.read(), r"\A\[work\]\nACCESS +tcp/8\n(?s:.*)\Z")

    def test_odd_keys(self) -> None:
        """A key that fwknop takes, but hardly anybody means, is warned of and not shown."""
        import base64
        key = base64.b64encode(bytes(range(64))).decode()
        for line, doubt in (("HMAC_KEY " + key, "that looks like HMAC_KEY_BASE64"),
                            ("HMAC_KEY_BASE64 " + key[6:], "82 characters, is one missing?"),
                            ("HMAC_KEY_BASE64 " + key, ""), ("HMAC_KEY " + key[:80], "")):
            self.write("[default]\nKEY k\n" + line + "\n")
            code, out, err = self.run_main("-T", *KNOCK)
            path = os.path.join(self.home, ".fwknoprc")
            self.assertEqual((0, f"spa_client.py: warning: {path}:3: {line.split()[0]}: {doubt}\n"
                              if doubt else ""), (code, err))

    def test_a_stanza_in_two_parts(self) -> None:
        """Is one, as in fwknop: KEY counts before a KEY_BASE64 that stands below."""
        path = self.write("[work]\nACCESS tcp/1\nKEY ours\n[other]\n[Work]\nACCESS tcp/2\n"
                          "KEY_BASE64 dGhlaXJz\n")
        given = client.parse_command_line(["--rc-file", path, "-n", "work"])[0]
        settings = client.Settings(client.merge(client.read_layers(given)))
        self.assertEqual(("tcp/2", b"ours"), (settings.access, client.find_keys(settings)[0]))

    def test_before_the_first_stanza(self) -> None:
        """Such lines count for nothing, as in fwknop, but it is said."""
        self.write("FW_TIMEOUT 5\n[default]\n")
        code, out, err = self.run_main("-T", *KNOCK, *KEYS)
        self.assertEqual(fields(out)["Client Timeout"], "0")
        self.assertIn(".fwknoprc:1: ignored", err)

    def test_stanza_list(self) -> None:
        """The names, without [default]."""
        path = self.write("[default]\nKEY abc\n[a]\n[B c]\n[default2]\nBOGUS\n")
        code, out, err = self.run_main("--stanza-list")
        self.assertEqual((code, out, err), (
            0, f"The following stanzas are configured in {path} :\n - a\n - B c\n - default2\n",
            ""))
        self.failure(2, "--stanza-list", "--no-rc-file")

    def test_files(self) -> None:
        """Missing, named, unreadable and open to others."""
        self.dump(*KNOCK, *KEYS)
        self.assertEqual(os.listdir(self.home), [], "no rc file is made")
        self.assertIn("cannot be read: No such file", self.failure(
            3, "-T", *KNOCK, *KEYS, "--rc-file", self.home + "/none"))
        self.failure(3, "-T", *KNOCK, *KEYS, "--rc-file", self.home)
        path = self.write("[default]\nFW_TIMEOUT 9\n", "rc", 0o644)
        code, out, err = self.run_main("-T", *KNOCK, *KEYS, "--rc-file", path)
        self.assertEqual(fields(out)["Client Timeout"], "9")
        self.assertIn("permissions should only be user read/write (0600, -rw-------)", err)
        if os.geteuid() == 0:
            os.chmod(path, 0o600)
            os.chown(path, 65534, 65534)
            code, out, err = self.run_main("-T", *KNOCK, *KEYS, "--rc-file", path)
            self.assertIn("not owned by current effective user id", err)

    def test_home(self) -> None:
        """USERPROFILE where there is no HOME, and neither with --no-home-dir."""
        self.write("[default]\nFW_TIMEOUT 9\n")
        self.environment = {"USERPROFILE": self.home, "LOGNAME": "ann"}
        self.assertEqual(self.dump(*KNOCK, *KEYS)["Client Timeout"], "9")
        self.assertEqual(self.dump(*KNOCK, *KEYS, "--no-home-dir")["Client Timeout"], "0")


class Import(Case):
    """--import."""

    STANZA = ("[guest]\nACCESS tcp/22\nSPA_SERVER gate\nKEY_BASE64 a2V5a2V5a2V5\n"
              "HMAC_KEY_BASE64 aG1hY2htYWM=\n")

    def give(self, text: str, *words: str, code: int = 0) -> str:
        """Return what is said when this text is on standard input."""
        data = text.encode()
        if code:
            return self.failure(code, "--import", *words, stdin=data)
        got, out, err = self.run_main("--import", *words, stdin=data)
        self.assertEqual((0, ""), (got, err))
        return out

    def rc(self) -> str:
        """Return the rc file; only its owner can read it."""
        path = os.path.join(self.home, ".fwknoprc")
        self.assertEqual(0o600, os.stat(path).st_mode & 0o777)
        with open(path, newline="") as file:
            return file.read()

    def test_pasted(self) -> None:
        """What keygen.py prints, with all that mail and terminals do to it, makes the same file."""
        made = captured(lambda: keygen.main(["guest", "--server", "gate", "--access", "tcp/22",
                                             "--expires", "8h"]))[1].split("\n\n")[0] + "\n"
        texts = set()
        for text in (made, made.replace("\n", "\r\n"), "\ufeff" + made, "\n\n" + made + "\n\n",
                     "\n".join("    " + line for line in made.split("\n")), made.rstrip("\n")):
            said = self.give(text)
            self.assertEqual(f"[+] Wrote to {self.home}/.fwknoprc. To knock:\n"
                             "  spa_client.py -n guest --wait 10\n", said)
            self.assertEqual("192.0.2.7,tcp/22", self.dump("-n", "guest", "-a", "192.0.2.7")[
                "Message String"])
            texts.add(self.rc())
            os.unlink(os.path.join(self.home, ".fwknoprc"))
        self.assertEqual(1, len(texts))

    def test_other_stanzas_stay(self) -> None:
        """Several at once come after them; the command to type fits what they open."""
        old = self.write("\ufeff[old]\r\nACCESS tcp/1 # x\r\n", mode=0o640)
        said = self.give(self.STANZA + "[b.c]\nACCESS udp/53\n", "--rc-file", old)
        self.assertEqual(["  spa_client.py --rc-file %s -n guest --wait 10" % old,
                          "  spa_client.py --rc-file %s -n b.c" % old], said.splitlines()[1:])
        self.assertRegex(self.rc(), r"\A\[old\]\r\nACCESS tcp/1 # x\r\n\n?\[guest\]\n(?s:.*)"
                         r"\n\[b\.c\]\nACCESS +udp/53\n\Z")

    def test_refused(self) -> None:
        """Anything else: the error names the line, the file stays as it is, no key is shown."""
        self.write("[Old]\nACCESS tcp/1\n")
        before, stanza = self.rc(), self.STANZA
        for text, expected in (
                ("", ": expected a stanza, which begins with [NAME]"),
                ("# nothing\n\n", ": expected a stanza"),
                ("Hello,\n" + stanza, ":1: expected the name of a directive (a stanza begins"),
                ("[]\nACCESS tcp/1\n", ":1: expected"),
                ("KEY s3cret\n" + stanza, ":1: KEY: expected a line [NAME] first"),
                (stanza + "Regards\n", ":6: expected the name of a directive"),
                (stanza.replace("\n", "\n> "), ":2: ACCESS: expected nothing before it, not '>'"),
                ("> " + stanza, ":1: expected nothing before [NAME]"),
                (stanza + "\nSOURCE ANY\n", ":7: SOURCE: this belongs in access.conf on"),
                (stanza + "ACCESS tcp\n", ":6: ACCESS: expected tcp/PORT"),
                (stanza + "KEY_BASE64 s3cre\n", ":6: KEY_BASE64: expected base64, 5 characters"),
                *((f"{stanza}{name} /tmp/x\n", ":1: expected directives, but not GPG_EXE GPG_HOM"
                   "EDIR WGET_CMD") for name in ("GPG_EXE", "GPG_HOMEDIR", "WGET_CMD")),
                ("[guest]\n# cut\n", ":1: expected directives"),
                (stanza.replace("\n", "\r"), ":1: expected [NAME] alone"),
                ("[guest] x\nACCESS tcp/1\n", ":1: expected [NAME] alone"),
                *(("[%s]\nACCESS tcp/1\n" % name, ":1: expected [NAME] alone, of letters")
                  for name in ("default", "a b", "a;b", "$(a)", "a,b", "\xe4", "-a", "[a"))):
            with self.subTest(text):
                found = self.give(text, code=3)
                self.assertTrue(found.startswith("standard input" + expected), found)
                self.assertNotIn("s3cre", found)
        for text in ("[old]\nACCESS tcp/2\n", self.STANZA + "[OLD]\nACCESS tcp/2\n"):
            self.assertRegex(self.give(text, code=3), r"\[(?i:old)\] is there already \(nothing")
        self.assertIn(":6: [guest] is there already", self.give(stanza + stanza, code=3))
        self.assertEqual("--import reads standard input (--import < FILE)",
                         self.give(stanza, "guest.txt", code=2))
        self.assertIn("--import needs an rc file", self.give(stanza, "--no-rc-file", code=2))
        self.assertEqual(([".fwknoprc"], before), (os.listdir(self.home), self.rc()))


class Keys(Case):
    """The sources of the keys."""

    def key_used(self, *words: str, stdin: bytes = b"") -> Tuple[str, str]:
        """Which of the known keys made a packet, and its HMAC type."""
        shown = self.dump(*KNOCK, *words, stdin=stdin)
        tag = shown["HMAC"] if shown["HMAC"] != "<NULL>" else ""
        for key in ("k-rc", "k-named", "k-line", "k-b64", "k-file", "k-stdin", "k-#;x"):
            with contextlib.suppress(UnicodeDecodeError):
                if shown["Encoded Data"] in unseal(shown["Final SPA Data"], key, len(tag)):
                    return key, shown["HMAC Type"]
        raise AssertionError("no key fits")

    def test_order(self) -> None:
        """In one layer KEY, KEY_BASE64, KEY_FILE, prompt; and the higher layer before all."""
        b64 = client.encode_base64(b"k-b64")
        path = self.write("# c\nother: no\nsrv: no\nsrv:\t= k-file\n", "keys")
        line, base, file = ["--key-rijndael", "k-line"], ["--key-base64-rijndael", b64], [
            "-G", path, "-D", "srv"]
        stdin = b"k-stdin\n"
        self.assertEqual(self.key_used(*line, *base, *file, "--stdin", stdin=stdin)[0], "k-line")
        self.assertEqual(self.key_used(*base, *file, "--stdin", stdin=stdin)[0], "k-b64")
        self.assertEqual(self.key_used(*file, "--stdin", stdin=stdin)[0], "k-file")
        self.assertEqual(self.key_used("--stdin", stdin=stdin)[0], "k-stdin")
        self.write(f"[default]\nKEY k-rc\n[n]\nKEY k-named\n[b]\nKEY_BASE64 {b64}\n")
        self.assertEqual(self.key_used("--stdin", stdin=stdin)[0], "k-rc")
        self.assertEqual(self.key_used("-n", "n")[0], "k-named")
        self.assertEqual(self.key_used("-n", "b")[0], "k-b64")
        self.assertEqual(self.key_used("-n", "n", *base)[0], "k-b64")
        self.assertEqual(self.key_used("-n", "n", *file)[0], "k-file")

    def test_when_hmac(self) -> None:
        """Any HMAC key, USE_HMAC, or --hmac-digest-type; the directive of that name alone not."""
        one, two = b"k-stdin\n", b"k-stdin\nh\n"
        self.assertEqual(self.key_used("--stdin", stdin=two)[1], "0 (None)")
        self.assertEqual(self.key_used("--stdin", "--use-hmac", stdin=two)[1], "3 (SHA256)")
        self.assertEqual(self.key_used("--stdin", "--hmac-digest-type", "MD5", stdin=two)[1],
                         "1 (MD5)")
        self.assertEqual(self.key_used("--stdin", "--key-hmac", "h", stdin=one)[1], "3 (SHA256)")
        self.assertEqual(self.key_used("--stdin", "--key-base64-hmac", "aA==", stdin=one)[1],
                         "3 (SHA256)")
        path = self.write("srv:h\n", "hmac-keys")
        self.assertEqual(self.key_used("--stdin", "--get-hmac-key", path, "-Dsrv", stdin=one)[1],
                         "3 (SHA256)")
        self.write("[default]\nHMAC_DIGEST_TYPE sha512\nUSE_HMAC N\n[h]\nHMAC_KEY h\n")
        self.assertEqual(self.key_used("--stdin", stdin=one)[1], "0 (None)")
        self.assertEqual(self.key_used("--stdin", "-n", "h", stdin=one)[1], "5 (SHA512)")
        self.write(f"[default]\nHMAC_KEY_FILE {path}\nKEY k-rc\nSPA_SERVER srv\n")
        self.assertEqual(self.key_used(), ("k-rc", "3 (SHA256)"))

    def test_descriptor(self) -> None:
        """--fd reads line by line and leaves the rest."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        os.write(writer, b"k-stdin\r\nh\nrest")
        os.close(writer)
        self.assertEqual(self.key_used("--fd", str(reader), "--use-hmac"),
                         ("k-stdin", "3 (SHA256)"))
        self.assertEqual(os.read(reader, 10), b"rest")
        self.assertIn("empty line", self.failure(1, "-T", *KNOCK, "--fd", str(reader)))
        self.assertIn("file descriptor 999", self.failure(1, "-T", *KNOCK, "--fd", "999"))

    def test_missing(self) -> None:
        """Without terminal it says how a key can be given."""
        self.assertIn("no encryption key given", self.failure(2, "-T", *KNOCK))
        self.assertIn("no HMAC key given", self.failure(
            2, "-T", *KNOCK, "--use-hmac", "--key-rijndael", KEY))
        self.assertIn("got an empty line", self.failure(1, "-T", *KNOCK, "--stdin"))

    def test_prompt(self) -> None:
        """On a terminal it asks, without echo, and leaves the terminal as it was."""
        try:
            import pty
            import termios
        except ImportError:
            skip("no pseudo-terminals on this system")
        child, master = pty.fork()
        if child == 0:
            try:
                os.execve(python(), [python(), "-I", "-S", SCRIPT, "-T", *KNOCK, "--use-hmac"],
                          self.environment)
            finally:
                os._exit(127)
        seen = b""
        answers = [(b"Enter encryption key: ", b"k-stdin\n"), (b"Enter HMAC key: ", b"h\n")]
        try:
            while True:
                if answers and seen.endswith(answers[0][0]):
                    wait_for(lambda: not termios.tcgetattr(master)[3] & termios.ECHO, "no echo")
                    os.write(master, answers.pop(0)[1])
                data = os.read(master, 1000)
                if not data:
                    break
                seen += data
        except OSError:
            pass  # how a terminal ends on Linux
        finally:
            os.close(master)
        self.assertEqual(os.waitpid(child, 0)[1], 0, seen)
        self.assertNotIn(b"k-stdin", seen)
        shown = fields(seen.decode().replace("\r\n", "\n"))
        self.assertIn(shown["Encoded Data"], unseal(shown["Final SPA Data"], "k-stdin"))

    def test_lengths(self) -> None:
        """Encryption key 0 to 32 bytes, HMAC key 1 to 128."""
        for length in (1, 16, 31, 32):
            self.dump(*KNOCK, "--key-rijndael", "x" * length)
        for length in (1, 127, 128):
            self.dump(*KNOCK, "--key-rijndael", "k", "--key-hmac", "x" * length)
        self.assertIn("33 bytes long, expected 1 to 32", self.failure(
            1, "-T", *KNOCK, "--key-rijndael", "x" * 33))
        self.assertIn("129 bytes long, expected 1 to 128", self.failure(
            1, "-T", *KNOCK, "--key-rijndael", "k", "--key-hmac", "x" * 129))
        self.failure(1, "-T", *KNOCK, "--key-rijndael", "k", "--key-hmac", "")
        self.assertIn("identical", self.failure(
            1, "-T", *KNOCK, "--key-rijndael", "same", "--key-base64-hmac", "c2FtZQ=="))
        code, _, err = self.run_main("-T", *KNOCK, "--key-rijndael", "")
        self.assertEqual(code, 0)
        self.assertIn("the encryption key is empty", err)

    def test_legacy(self) -> None:
        """Sixteen bytes, without HMAC."""
        shown = self.dump(*KNOCK, "--key-rijndael", "short", "-M", "LEGACY")
        self.assertEqual(shown["Encryption Mode"], "8 (legacy)")
        self.assertIn(shown["Encoded Data"],
                      unseal(shown["Final SPA Data"], "short".ljust(16, "0"), 0))
        code, out, err = self.run_main("-T", *KNOCK, "--key-rijndael", "x" * 40, "-Mlegacy")
        self.assertIn("legacy mode uses only the first 16 bytes", err)
        shown = fields(out)
        self.assertIn(shown["Encoded Data"], unseal(shown["Final SPA Data"], "x" * 16, 0))
        for words in (["--key-hmac", HMAC_KEY], ["--use-hmac"], ["--hmac-digest-type", "md5"]):
            self.assertIn("incompatible with HMAC", self.failure(
                2, "-T", *KNOCK, "--key-rijndael", KEY, "-M", "legacy", *words))

    def test_key_file_errors(self) -> None:
        """Another server, no server, no file."""
        path = self.write("h key1\nh : key2\nhh: key3\n#h: key4\nH: key5\n", "keys")
        self.assertIn("Could not get key for IP: h from: " + path,
                      self.failure(3, "-T", *KNOCK, "-G", path, "-D", "h"))
        self.assertIn("needs -D", self.failure(2, "-T", *KNOCK, "-G", path))
        self.failure(3, "-T", *KNOCK, "-G", path + "x", "-D", "h")
        path = self.write("2001:db8::1: k-file\n", "keys", 0o640)
        code, _, err = self.run_main("-T", *KNOCK, "-G", path, "-D", "2001:db8::1")
        self.assertEqual(code, 0)
        self.assertIn("permissions", err)

    def test_cut_keys(self) -> None:
        """A key with a comment sign is cut as by fwknop, but with a warning that shows none."""
        for line, warned in (("KEY k-rc#-cut", True), ("KEY k-rc -cut", True), ("KEY k-rc;", True),
                             ("KEY k-rc # a comment", False), ("KEY k-rc ", False)):
            self.write("[default]\n" + line + "\n")
            code, _, err = self.run_main("-T", *KNOCK)
            self.assertEqual((code, "as in fwknop" in err), (0, warned), line)
            self.assertNotIn("k-rc", err)
            self.assertNotIn("-cut", err)
            self.assertEqual(self.key_used()[0], "k-rc")

    def test_bytes(self) -> None:
        """Keys need not be text."""
        self.write("[default]\nKEY \udcff\udce9k\n")
        with mock.patch.object(client, "encrypt_salted", wraps=client.encrypt_salted) as encrypt:
            self.dump(*KNOCK)
        self.assertEqual(encrypt.call_args[0][1], b"\xff\xe9k")

    def test_generate(self) -> None:
        """The two lines of fwknop -k, for every digest; a file is new and private."""
        for name, length in client.HMAC_KEY_LENGTHS.items():
            code, out, err = self.run_main("-k", "--hmac-digest-type", name)
            self.assertEqual((code, err), (0, ""))
            self.assertRegex(out, r"\AKEY_BASE64: \S{43}=\nHMAC_KEY_BASE64: \S+\n\Z")
            self.assertEqual(len(client.decode_base64(out.split()[3])), length)
        self.assertEqual(set(client.HMAC_KEY_LENGTHS), set(client.DIGESTS))
        code, out, _ = self.run_main("--key-gen", "--key-len", "7", "--hmac-key-len=128")
        self.assertEqual([len(client.decode_base64(out.split()[i])) for i in (1, 3)], [7, 128])
        for words in (["--key-len", "33"], ["--key-len", "0"], ["--hmac-key-len", "129"]):
            self.failure(2, "-k", *words)
        path = os.path.join(self.home, "new")
        code, out, _ = self.run_main("-K", path)
        self.assertEqual((code, out), (0, f"[+] Wrote Rijndael and HMAC keys to: {path}\n"))
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        with open(path) as file:
            text = file.read()
        self.failure(1, "-k", "-K", path)
        with open(path) as file:
            self.assertEqual(file.read(), text, "never overwritten")
        self.write("[default]\nALLOW_IP source\nACCESS tcp/22\n" + text)
        self.assertEqual(self.dump()["HMAC Type"], "3 (SHA256)")


class Output(Case):
    """The output, which never holds a key."""

    def test_layout(self) -> None:
        """-T to the letter, as fwknop prints it (tests/spec/fwknop.md 2.8)."""
        code, out, err = self.run_main("-T", *KNOCK, *KEYS, "-f", "60")
        self.assertEqual((code, err), (0, ""))
        names = [line[:15] for line in out.splitlines()[2:19]]
        self.assertEqual(names, [
            "   Random Value", "       Username", "      Timestamp", "    FKO Version",
            "   Message Type", " Message String", "     Nat Access", "    Server Auth",
            " Client Timeout", "    Digest Type", "      HMAC Type", "Encryption Type",
            "Encryption Mode", "   Encoded Data", "SPA Data Digest", "           HMAC",
            " Final SPA Data"])
        self.assertTrue(out.startswith("SPA Field Values:\n=================\n"))
        self.assertTrue(out.endswith(
            "\n\ntest mode enabled, SPA packet not actually sent.\n"), out)
        shown = fields(out)
        self.assertTrue(shown["Final SPA Data"].endswith(shown["HMAC"]))
        self.assertIn(shown["Encoded Data"] + ":" + shown["SPA Data Digest"],
                      unseal(shown["Final SPA Data"]))

    def test_verbose(self) -> None:
        """-v prints the dump, where it goes, and how much was sent."""
        with Receiver() as receiver:
            code, out, _ = self.run_main("-v", *KNOCK, *KEYS, *receiver.options)
            packet = receiver.packet()
        self.assertEqual(code, 0)
        self.assertIn(f"\n Final SPA Data: {packet}\n\nGenerating SPA packet:\n", out)
        self.assertTrue(out.endswith(
            "            protocol: udp\n         source port: <OS assigned>\n"
            f"    destination port: {receiver.options[3]}\n             IP/host: 127.0.0.1\n"
            f"send_spa_packet: bytes sent: {len(packet)}\n"))

    @needs_programs("fwknop")
    def test_like_the_real_client(self) -> None:
        """The dump of the real client, line by line, but for what differs in every packet."""
        lengths = {"Random Value": 16, "Timestamp": 10}
        for words in ([], ["-f", "60"], ["-m", "md5", "-M", "ctr"], ["-U", "some user"],
                      ["--hmac-digest-type", "sha3_512"], ["-m", "sha512", "-s"],
                      ["-A", "udp/1,tcp/2,tcp/65535", "-M", "ECB"]):
            words = ["-T", "--no-rc-file", "--no-save-args"] + KNOCK + KEYS + words
            real = subprocess.run(["fwknop"] + words, stdout=subprocess.PIPE, check=True,
                                  env=self.environment).stdout.decode("ascii")
            ours = self.run_main(*words)[1]
            self.assertEqual(len(ours.splitlines()), len(real.splitlines()))
            for one, two in zip(ours.splitlines(), real.splitlines()):
                name = one.partition(":")[0].strip()
                if name in lengths:
                    self.assertEqual(len(one), len(two))
                elif name in ("Encoded Data", "SPA Data Digest", "HMAC", "Final SPA Data"):
                    self.assertEqual((one[:17], len(one)), (two[:17], len(two)))
                else:
                    self.assertEqual(one, two)

    def test_no_secret(self) -> None:
        """Not in a dump, a warning or an error, whatever is wrong with the rest."""
        secret, other = "Secret.Key#1", "Secret.Hmac"
        keys = ["--key-rijndael", secret, "--key-hmac", other]
        path = self.write(f"[default]\nKEY {secret}\nHMAC_KEY {other} more\n"
                          f"[bad]\nHMAC_KEY_BASE64 {other}\n")
        for words in (["-T", "-v", *KNOCK, *keys], ["-T", "-v", *KNOCK], ["-T", *keys],
                      ["-T", *KNOCK, "--key-base64-rijndael", secret],
                      ["-T", *KNOCK, "--key-rijndael=" + secret * 9],
                      ["-T", *KNOCK, *keys, "-M", "legacy"], ["-T", *KNOCK, "-n", "bad"],
                      ["-T", *KNOCK, "--key-rijndal=" + secret], ["--use-hmac=" + secret],
                      ["-T", *KNOCK, "--key-rijndael", secret, "--key-hmac", secret],
                      [*KNOCK, *keys, "-D", "nosuch.invalid"], ["-T", secret, *keys],
                      ["-T", *KNOCK, "--rc-file", path, "--stdin"]):
            with self.subTest(words):
                _, out, err = self.run_main(*words)
                for text in (secret, other, secret.partition("#")[0], secret.lower()):
                    self.assertNotIn(text, out)
                    self.assertNotIn(text, err)

    def test_strange_text(self) -> None:
        """Arguments and files can't steer a terminal."""
        line = self.failure(2, "-A", "tcp/\x1b[31m\n\udcff\u2028", *KEYS)
        self.assertIn("\\x1b[31m\\n\\udcff\\u2028", line)

    def test_exit_codes(self) -> None:
        """0 only when the packet went out."""
        with Receiver() as receiver:
            self.assertEqual(self.run_main(*KNOCK, *KEYS, *receiver.options)[0], 0)
            receiver.packet()
        self.failure(1, *KNOCK, *KEYS, "-D", "nosuch.invalid")
        with mock.patch("spa_client.socket.getaddrinfo", return_value=[]):
            self.assertIn("it has no address", self.failure(1, *KNOCK, *KEYS, "-D", "h"))
        with mock.patch.object(client, "open_socket", side_effect=OSError(101, "No way")):
            self.assertIn("127.0.0.1: No way", self.failure(1, *KNOCK, *KEYS, "-D", "127.0.0.1"))
        with mock.patch.object(client, "run", side_effect=KeyboardInterrupt):
            self.failure(130)

    def test_a_knock_that_worked_says_nothing(self) -> None:
        """Or cron would mail it at each (tests/spec/fwknop.md 2.8); with -s and with an address."""
        with Receiver() as receiver:
            for address in (["-s"], ["-a", "10.1.2.3"]):
                answer = self.run_main("-A", "tcp/22", *address, *KEYS, *receiver.options)
                self.assertEqual(answer, (0, "", ""))


class Network(Case):
    """Names, families, and the address to open for."""

    def test_public(self) -> None:
        """Which addresses are the same seen from anywhere."""
        for text, expected in (
                ("8.8.8.8", True), ("9.255.255.255", True), ("11.0.0.0", True),
                ("100.63.255.255", True), ("100.128.0.0", True), ("172.15.0.1", True),
                ("172.32.0.0", True), ("192.167.0.1", True), ("223.255.255.255", True),
                ("0.0.0.0", False), ("10.0.0.1", False), ("127.0.0.1", False),
                ("100.64.0.0", False), ("100.127.255.255", False), ("169.254.9.9", False),
                ("172.16.0.0", False), ("172.31.255.255", False), ("192.168.1.1", False),
                ("224.0.0.1", False), ("255.255.255.255", False), ("192.0.0.2", False),
                ("192.0.1.1", True), ("198.18.0.1", False), ("198.19.255.255", False),
                ("198.17.0.1", True), ("198.20.0.1", True),
                ("2001:db8::1", True), ("2a00::1", True), ("3fff::1", True), ("::1", False),
                ("::", False), ("fe80::1", False), ("fd00::1", False), ("fc00::1", False),
                ("ff02::1", False), ("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", False)):
            family = socket.AF_INET6 if ":" in text else socket.AF_INET
            self.assertEqual(client.is_public(socket.inet_pton(family, text)), expected, text)

    def own(self, own: str, server: str, routed: bool) -> Optional[str]:
        """own_address() of a link between two addresses, with a router on the way or not."""
        link = mock.Mock()
        link.family = socket.AF_INET6 if ":" in own else socket.AF_INET
        link.getsockname.return_value, link.getpeername.return_value = (own, 1), (server, 2)
        with mock.patch.object(client, "open_socket", side_effect=OSError if routed else None):
            result = client.own_address(link)
        return result if result is None else str(result)

    def test_own_address(self) -> None:
        """Named only when the server must see the same one."""
        self.assertEqual(self.own("8.8.8.8", "9.9.9.9", True), "8.8.8.8")
        self.assertEqual(self.own("192.168.1.2", "192.168.1.3", False), "192.168.1.2")
        self.assertIsNone(self.own("192.168.1.2", "192.168.9.3", True))
        self.assertIsNone(self.own("10.8.0.2", "10.50.0.9", False))  # a tunnel's route
        self.assertIsNone(self.own("2001:db8::1", "64:ff9b::808:808", True))  # NAT64
        self.assertIsNone(self.own("192.168.1.2", "8.8.8.8", True))
        self.assertIsNone(self.own("192.168.1.2", "8.8.8.8", False))
        self.assertEqual(self.own("fd77::1", "fd77::2", False), "fd77::1")
        self.assertIsNone(self.own("fd77::1", "fd78::2", False))
        for other in ("::ffff:10.50.0.9", "::ffff:10.0.0.3", "::ffff:8.8.8.8"):
            self.assertIsNone(self.own("::ffff:10.0.0.2", other, False))
            self.assertIsNone(self.own("2001:db8::1", other, True))
        self.assertEqual(self.own("2001:db8::1", "2001:db8:1::2", True), "2001:db8::1")
        self.assertEqual(self.own("fe80::1%eth0", "fe80::2%eth0", False), "fe80::1")

    def test_loopback(self) -> None:
        """The server on this very host."""
        with Receiver() as receiver:
            code, out, err = self.run_main("-A", "tcp/22", *KEYS, *receiver.options)
            self.assertEqual((code, out), (0, ""))
            self.assertEqual(err, "spa_client.py: asking to open for 127.0.0.1, our address on"
                                  " the way to the server\n")
            self.assertEqual(client.decode_base64(unseal(receiver.packet()).split(":")[5]),
                             b"127.0.0.1,tcp/22")

    def test_ipv6(self) -> None:
        """A server with an IPv6 address."""
        try:
            receiver = Receiver("::1")
        except OSError as error:
            skip(f"no IPv6 on this machine: {error}")
        with receiver:
            code, _, _ = self.run_main("-A", "tcp/22", *KEYS, *receiver.options)
            self.assertEqual(code, 0)
            self.assertEqual(client.decode_base64(unseal(receiver.packet()).split(":")[5]),
                             b"::1,tcp/22")

    def test_families(self) -> None:
        """-4, -6 and SERVER_RESOLVE_IPV4 narrow the search; names are bytes."""
        self.write("[four]\nSERVER_RESOLVE_IPV4 Y\n[any]\n")
        for words, family in ((["-4"], socket.AF_INET), (["-6"], socket.AF_INET6), ([], 0),
                              (["--server-resolve-ipv4"], socket.AF_INET),
                              (["-n", "four"], socket.AF_INET),
                              (["-n", "four", "-6"], socket.AF_INET6), (["-n", "any"], 0)):
            with mock.patch("spa_client.socket.getaddrinfo", return_value=[]) as search:
                self.failure(1, *KNOCK, *KEYS, "-D", "some.host", *words)
            self.assertEqual(search.call_args[0], (b"some.host", 62201, family,
                                                   socket.SOCK_DGRAM))

    def test_names(self) -> None:
        """Those that are not ASCII, with and without the codec."""
        self.assertEqual(client.encode_host("a.b"), b"a.b")
        self.assertEqual(client.encode_host("b\xfccher.example"), b"xn--bcher-kva.example")
        with self.assertRaisesRegex(client.SpaError, "not an ASCII name") as caught:
            client.encode_host("\xfc" + "x" * 90)
        self.assertIn("xn--", caught.exception.hint)

    def test_next_address(self) -> None:
        """Addresses that can't be reached are passed over."""
        with Receiver() as receiver:
            port = int(receiver.options[3])
            found = [(socket.AF_INET6, 0, 0, "", ("2001:db8::1", port, 0, 0)),
                     (socket.AF_INET, 0, 0, "", ("127.0.0.1", port))]
            real = client.open_socket

            def connect(family: int, *rest: Any) -> Any:
                if family == socket.AF_INET6:
                    raise OSError(101, "Network is unreachable")
                return real(family, *rest)

            with mock.patch("spa_client.socket.getaddrinfo", return_value=found), \
                    mock.patch.object(client, "open_socket", connect):
                self.assertEqual(self.run_main(*KNOCK, *KEYS, *receiver.options)[0], 0)
            receiver.packet()


BLOCK = """
import sys
blocked = set(%r)
for name in list(sys.modules):
    if name.partition(".")[0] in blocked or name in blocked:
        del sys.modules[name]
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in blocked or name.partition(".")[0] in blocked:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
"""


class Systems(Case):
    """The Pythons and the systems it has to run on."""

    def assert_knocks(self, before: str, interpreter: Optional[str] = None) -> None:
        """It sends a packet, asks for help and makes keys, with what `before` leaves of Python."""
        with Receiver() as receiver:
            words = ["-A", "tcp/22", *KEYS, *receiver.options]
            done = self.script(words, interpreter, before)
            self.assertEqual((done.returncode, done.stdout), (0, b""), done.stderr)
            self.assertIn("127.0.0.1,tcp/22", client.decode_base64(
                unseal(receiver.packet()).split(":")[5]).decode())
        for words in (["-h"], ["-k"], ["-V"], ["-T", *KNOCK, *KEYS, "-m", "sha3_512"]):
            done = self.script(words, interpreter, before)
            self.assertEqual((done.returncode, done.stderr), (0, b""))

    def test_every_python(self) -> None:
        """All Pythons here, alone in an empty directory, without site and environment."""
        alone = shutil.copy(SCRIPT, self.home)
        each_digest = ("import sys; sys.path.append(sys.argv[1]); from spa_client import *\n"
                       "for name in DIGESTS:\n"
                       "    main([*sys.argv[2:], '-m', name, '--hmac-digest-type', name])")
        for interpreter in (found.path for found in find_pythons()):
            with self.subTest(interpreter):
                for words in (["-c", each_digest, self.home], [alone]):
                    done = subprocess.run(
                        [interpreter, "-I", "-S", *words, "-T", *KNOCK, *KEYS], cwd=self.home,
                        env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        timeout=TIMEOUT)
                    self.assertEqual((done.returncode, done.stderr), (0, b""))
                    dumps = done.stdout.decode("ascii").split("SPA Field Values:")[1:]
                    self.assertEqual(1 if words == [alone] else len(client.DIGESTS), len(dumps))
                    for shown in map(fields, dumps):
                        self.assertIn(shown["Encoded Data"], unseal(
                            shown["Final SPA Data"], KEY, len(shown["HMAC"])))
                self.assert_knocks("", interpreter)

    def test_plain_path_is_cheap(self) -> None:
        """A knock imports none of the modules that cost as much as the interpreter's start."""
        before = ("import atexit, sys\n"
                  "atexit.register(lambda: sys.stderr.write('\\n'.join(sys.modules)))\n")
        with Receiver() as receiver:
            done = self.script([*KNOCK, *KEYS, *receiver.options], None, before)
            receiver.packet()
        self.assertEqual(done.returncode, 0, done.stderr)
        loaded = set(done.stderr.decode().split())
        self.assertEqual(loaded & {
            "argparse", "re", "typing", "socket", "subprocess", "ipaddress", "base64", "hashlib",
            "hmac", "getopt", "enum", "collections", "functools", "selectors", "random",
            "secrets", "contextlib", "getpass", "termios", "json", "_hashlib"}, set())

    def test_openwrt(self) -> None:
        """python3-light of every release: nothing it lacks is needed."""
        with open(os.path.join(HERE, "vectors", "openwrt_light_missing.json")) as file:
            releases = json.load(file)
        for release, lists in releases.items():
            with self.subTest(release):
                missing = set(lists["missing"]) | {"encodings.idna"}
                self.assert_knocks(BLOCK % sorted(missing), nearest_python(lists["python"]).path)

    def test_debian_minimal(self) -> None:
        """python3-minimal without python3."""
        self.assert_knocks(BLOCK % ["hmac", "secrets", "shlex", "tempfile", "shutil", "getpass",
                                    "gettext", "queue", "tarfile", "bz2", "gzip", "mmap",
                                    "resource", "termios", "ssl", "uuid", "ctypes"])

    def test_no_idna(self) -> None:
        """Without the codec, names in ASCII work, and others get an explanation."""
        before = BLOCK % ["unicodedata", "stringprep", "encodings.idna"]
        done = self.script([*KNOCK, *KEYS, "-D", "b\xfccher.invalid"], None, before)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"not an ASCII name (give the form that begins with xn--)", done.stderr)
        self.assert_knocks(before)

    def test_other_systems(self) -> None:
        """Nothing that only POSIX has is imported by a knock."""
        self.assert_knocks(BLOCK % ["pwd", "grp", "fcntl", "termios", "resource", "syslog"])

    def test_no_builtin_digests(self) -> None:
        """Red Hat builds Python without them: hashlib does it then."""
        before = BLOCK % ["_md5", "_sha1", "_sha256", "_sha512", "_sha2"]
        done = self.script(["-T", *KNOCK, *KEYS], None, BLOCK % [
            "_md5", "_sha1", "_sha256", "_sha512", "_sha2", "_sha3", "_hashlib", "hashlib"])
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr, b"spa_client.py: this Python has no SHA256\n")
        try:
            import _hashlib  # noqa: F401
        except ImportError:
            skip("this Python has no OpenSSL")
        self.assert_knocks(before)

    def test_fips(self) -> None:
        """A hashlib that gives MD5 only to those who say it is not for security."""
        import hashlib

        def fips(data: bytes, usedforsecurity: bool = True) -> Any:
            if usedforsecurity:
                raise ValueError("disabled for FIPS")
            return real(data)

        def old(data: bytes) -> Any:
            return real(data)

        real = hashlib.md5
        for replacement in (fips, old):
            with mock.patch.dict(sys.modules, {"_md5": None}), \
                    mock.patch.object(hashlib, "md5", replacement):
                self.assertEqual(client.DIGESTS["MD5"](b"abc"), real(b"abc").digest())

    def test_windows(self) -> None:
        """Without geteuid and with getpass instead of termios."""
        self.write("[default]\nFW_TIMEOUT 9\n", mode=0o644)
        with mock.patch.object(os, "geteuid", create=True):
            del os.geteuid
            code, out, err = self.run_main("-T", *KNOCK, *KEYS)
        self.assertEqual((code, err), (0, ""))
        import getpass
        with mock.patch.dict(sys.modules, {"termios": None}), \
                mock.patch.object(getpass, "getpass", return_value="typed"):
            self.assertEqual(client.prompt_key("Enter encryption key: "), b"typed")


class Shape(unittest.TestCase):
    """The promises of the docstring about the file."""

    def test_posix_only_modules(self) -> None:
        """They are imported where they are used, if at all."""
        import ast
        with open(SCRIPT) as file:
            tree = ast.parse(file.read())
        top: Set[str] = set()
        for node in tree.body:
            if isinstance(node, ast.Import):
                top.update(alias.name for alias in node.names)
        self.assertEqual(top, {"binascii", "os", "sys", "time"})


if __name__ == "__main__":
    unittest.main()
