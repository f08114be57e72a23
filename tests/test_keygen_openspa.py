"""keygen.py --openspa: its primes, keys and files, and what the server and OpenSSL say to them."""

import functools
import itertools
import math
import os
import re
import unittest
import uuid
from typing import Any, Callable, Dict, List, Tuple
from unittest import mock

import keygen
import spa_client as client
import spa_server as server
from tests.support import needs_programs, run, write
from tests.test_keygen import FileTestCase, call_all, program

JOE = ["--openspa", "joe", "--server", "gate.example"]
OSPA_KEYS = {
    "version", "clientUUID", "serverHost", "serverPort", "adk.secret",
    "crypto.cipherSuitePriority", "crypto.rsa.client.privateKey", "crypto.rsa.client.publicKey",
    "crypto.rsa.server.publicKey"}
# Composites that pass for many bases. Carmichael numbers pass Fermat's test for every base that
# shares no factor with them; the others are strong pseudoprimes to bases 2; 2, 3, 5, 7; and to all
# primes up to 37 and 41.
CARMICHAEL = (561, 1105, 1729, 2465, 2821, 6601, 8911, 41041, 825265, 321197185, 5394826801,
              232250619601, 9746347772161, 1436697831295441)
PSEUDOPRIMES = (2047, 3277, 4033, 4681, 8321, 15841, 29341, 3215031751, 3825123056546413051,
                318665857834031151167461, 3317044064679887385961981)
PRIMES = (2 ** 61 - 1, 2 ** 127 - 1, 2 ** 255 - 19, 2 ** 521 - 1, 2 ** 448 - 2 ** 224 - 1,
          2 ** 256 - 2 ** 224 + 2 ** 192 + 2 ** 96 - 1, 2 ** 16 + 1, 3 * 2 ** 30 + 1)


def parse(pem: str, private: bool) -> server.RsaKey:
    """Return a key as the server reads it."""
    return server.RsaKey.parse(pem, private)


@functools.lru_cache(maxsize=None)
def made_keys() -> Tuple[str, ...]:
    """Return three private keys of 2048 bits, which are made once for all tests."""
    return tuple(keygen.make_rsa_key(2048, os.urandom) for _ in range(3))


def find_prime(start: int, step: int) -> int:
    """Return the first prime after `start` in steps."""
    return next(number for number in itertools.count(start + step, step)
                if all(number % each for each in range(3, 1000, 2))
                and keygen.is_prime(number, os.urandom))


def read_ospa(text: str) -> Dict[str, str]:
    """Return the values of an OSPA file: nested maps, a list, and texts of more lines."""
    values: Dict[str, str] = {}
    names: List[Tuple[int, str]] = []
    for line in text.splitlines():
        indent, line = len(line) - len(line.lstrip(" ")), line.strip(" ")
        name, colon, value = line.partition(":")
        if line[:2] == "- " or not colon:
            values[".".join(each for _, each in names)] += line.replace("- ", "", 1) + "\n"
            continue
        names = [each for each in names if each[0] < indent] + [(indent, name)]
        values[".".join(each for _, each in names)] = value.strip(" |").strip('"')
    return {name: value.strip() for name, value in values.items() if value or "secret" in name}


class PrimeTest(unittest.TestCase):
    """Miller-Rabin, and the primes that it lets through."""

    def is_prime(self, number: int) -> bool:
        """Return the verdict on a number."""
        return keygen.is_prime(number, os.urandom)

    def test_small_numbers(self) -> None:
        """The same verdict as division has."""
        for number in range(5, 4000, 2):
            divided = all(number % divisor for divisor in range(3, math.ceil(number ** 0.5) + 1, 2))
            self.assertEqual(divided, self.is_prime(number), number)

    def test_known_primes(self) -> None:
        """Mersenne's, those of curves, and some with many factors two before them."""
        for number in PRIMES:
            self.assertTrue(self.is_prime(number), number)

    def test_composites_that_deceive(self) -> None:
        """Carmichael numbers, and strong pseudoprimes to fixed bases: ours are random."""
        for number in CARMICHAEL + PSEUDOPRIMES:
            self.assertFalse(self.is_prime(number), number)

    def test_products_and_powers(self) -> None:
        """Of two large primes, and a prime's square."""
        for left, right in itertools.combinations_with_replacement(PRIMES, 2):
            self.assertFalse(self.is_prime(left * right), (left, right))

    def test_strong_pseudoprime_passes_for_its_base(self) -> None:
        """The bases are those of the random numbers: with 2 alone, 2047 would do."""
        self.assertTrue(keygen.is_prime(2047, bytes))  # zeros: the base is 2
        self.assertFalse(keygen.is_prime(2047, lambda size: b"\0" * (size - 1) + b"\1"))

    def test_enough_rounds(self) -> None:
        """The bound of Damgard, Landrock and Pomerance, which FIPS 186-5 appendix C.1 uses."""
        for bits, strength in ((1024, 112), (1536, 128), (2048, 152)):
            rounds = keygen.MILLER_RABIN_ROUNDS
            bound = (1.5 * math.log2(bits) + rounds - math.log2(rounds) / 2
                     + 2 * (2 - math.sqrt(rounds * bits)))
            self.assertLess(bound, -strength)

    def test_primes(self) -> None:
        """The two top bits are set; no two are the same."""
        primes = [keygen.make_prime(256, os.urandom) for _ in range(8)]
        self.assertEqual(8, len(set(primes)))
        for number in primes:
            self.assertEqual((3, 1), (number >> 254, number & 1))
            self.assertTrue(self.is_prime(number))

    def test_small_divisors_come_first(self) -> None:
        """A candidate with a small divisor costs no test."""
        numbers = iter([5003 * 3, 4999 * 5003, 2 ** 64 - 59])
        with mock.patch.object(keygen, "is_prime", return_value=True) as test:
            keygen.make_prime(64, lambda size: next(numbers).to_bytes(size, "big"))
        self.assertEqual(1, test.call_count)

    def test_constant_random_numbers(self) -> None:
        """An error instead of an endless search."""
        with self.assertRaisesRegex(keygen.SpaError, "not random"):
            keygen.make_prime(64, lambda size: b"\xff" * size)


class KeyTest(FileTestCase):
    """RSA keys, in PEM."""

    def check(self, pem: str, bits: int) -> None:
        """Check a private key as FIPS 186-5 appendix A.1.1 would have it."""
        key = parse(pem, private=True)
        p, q, dp, dq, inverse = key.primes
        private = server.read_integers(server.read_pem(pem)[1])[3]
        order = (p - 1) * (q - 1) // math.gcd(p - 1, q - 1)
        self.assertEqual((bits, 65537), (key.modulus.bit_length(), key.exponent))
        self.assertEqual(bits // 2, p.bit_length())
        self.assertGreater(abs(p - q), 1 << (bits // 2 - 100))
        self.assertGreater(min(p, q) ** 2, 1 << (bits - 1))
        self.assertEqual(1, 65537 * private % order)
        self.assertTrue(1 << (bits // 2) < private < order)
        self.assertEqual((private % (p - 1), private % (q - 1)), (dp, dq))
        self.assertEqual(1, inverse * q % p)
        block = key.encrypt(b"s" * 48)
        self.assertEqual(b"s" * 48, key.decrypt(block, 48))

    def test_numbers(self) -> None:
        """Of short keys, since they are quick to make."""
        for _ in range(4):
            self.check(keygen.make_rsa_key(1024, os.urandom), 1024)

    def test_2048_bits(self) -> None:
        """A real key, and its public half."""
        pem = made_keys()[0]
        self.check(pem, 2048)
        private, public = parse(pem, True), parse(keygen.public_pem(pem), False)
        self.assertEqual((private.modulus, 65537, ()),
                         (public.modulus, public.exponent, public.primes))
        self.assertTrue(public.verify(b"header", private.sign(b"header")))
        self.assertFalse(public.verify(b"heaven", private.sign(b"header")))
        self.assertEqual(b"s" * 48, private.decrypt(public.encrypt(b"s" * 48), 48))
        for text, label in ((pem, "RSA PRIVATE KEY"), (keygen.public_pem(pem), "PUBLIC KEY")):
            self.assertRegex(text, rf"\A-----BEGIN {label}-----\n([\w+/=]{{64}}\n)+[\w+/=]{{0,64}}"
                                   rf"\n?-----END {label}-----\n\Z")

    @needs_programs("openssl")
    def test_openssl_takes_them(self) -> None:
        """It finds the numbers right, and makes the same public key of them."""
        for pem in made_keys():
            path = write(self.place("key.pem"), pem)
            answer = run(["openssl", "rsa", "-check", "-noout", "-in", path])
            self.assertEqual((0, "RSA key ok"), (answer.returncode, answer.stdout.strip()))
            self.assertEqual(keygen.public_pem(pem),
                             run(["openssl", "rsa", "-pubout", "-in", path]).stdout)

    def test_primes_too_close(self) -> None:
        """They are made anew, as Fermat's method would find them; so are those without a d."""
        p, q = (keygen.make_prime(512, os.urandom) for _ in range(2))
        close = find_prime(p, 2)
        factor = find_prime((3 << 509) // 65537 * 2 * 65537 + 1, 2 * 65537)  # 65537 divides it - 1
        with mock.patch.object(keygen, "make_prime", side_effect=[p, p, p, close, p, factor, p, q]):
            pem = keygen.make_rsa_key(1024, os.urandom)
        self.assertEqual((p, q), parse(pem, True).primes[:2])

    def test_der_lengths(self) -> None:
        """One byte, two or three, as the server reads them."""
        for size in (1, 127, 128, 255, 256, 65535):
            self.assertEqual((b"x" * size, b"rest"), server.read_der(
                keygen.encode_der(4, b"x" * size) + b"rest", 4))

    def test_no_keys(self) -> None:
        """None that public_pem() can read ends in a traceback or in a wrong key."""
        pem = keygen.make_rsa_key(1024, os.urandom)
        for text in ("", "no key", pem, "-----BEGIN RSA PRIVATE KEY-----\n", pem[:200],
                     "-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----\n",
                     "-----BEGIN RSA PRIVATE KEY-----\n\xe9\n-----END RSA PRIVATE KEY-----\n"):
            with self.assertRaisesRegex(keygen.ConfigError, "expected an RSA PRIVATE KEY"):
                keygen.public_pem(text)

    def test_adk_secret(self) -> None:
        """4 bytes in base32, as the server reads them."""
        for secret in (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x01\x23\x45\x67", os.urandom(4)):
            text = keygen.make_adk_secret(lambda size, it=secret: it[:size])  # type: ignore
            self.assertRegex(text, r"\A[A-Z2-7]{7}\Z")
            self.assertEqual(secret, server.parse_adk_secret(text))


class OpenspaTest(FileTestCase):
    """The files and lines of a client, in a directory of their own."""

    def setUp(self) -> None:
        """Be in an empty directory, where the files of clients come, and have keys made quickly."""
        super().setUp()
        self.keys = made_keys()
        before = os.getcwd()
        os.chdir(self.directory)
        self.addCleanup(os.chdir, before)
        patch = mock.patch.object(keygen, "make_rsa_key", side_effect=self.keys)
        self.make = patch.start()
        self.addCleanup(patch.stop)
        self.access, self.config = self.path("access.conf"), self.path("fwknopd.conf")

    def give(self, *more: str) -> Tuple[str, str]:
        """Run it for joe or another name, and return standard output and standard error."""
        options = list(more) if "--openspa" in more else JOE + list(more)
        code, out, err = call_all(*options, "--openspa-dir", self.directory)
        self.assertEqual(0, code, err)
        return out, err

    def files(self) -> Dict[str, str]:
        """Return all files below the directory, with their texts."""
        return {os.path.relpath(os.path.join(top, name), self.directory):
                self.read(os.path.join(top, name))
                for top, _, names in os.walk(self.directory) for name in names}

    def configuration(self) -> server.Configuration:
        """Return what the server makes of the two files, without a warning."""
        configuration = server.read_configuration(server.Arguments(
            ["-c", self.config, "-a", self.access]), self.directory)
        self.assertEqual([], [each for each in configuration.warnings if "openspa" in each.lower()])
        return configuration

    def refuse(self, code: int, words: str, *options: str) -> None:
        """Check an error in one line, after which all files are as they were."""
        before = self.files()
        got, out, err = call_all(*options)
        self.assertEqual((code, ""), (got, out), err)
        self.assertRegex(err, rf"\Akeygen\.py: .*{words}.*\n\Z")
        self.assertEqual(before, self.files())

    def test_what_is_printed(self) -> None:
        """The lines for both files of the server, and for nobody else."""
        out, err = self.give("--adk", "--access", "tcp/22,udp/53", "--timeout", "60", "--port",
                             "4000", "--source", "192.0.2.0/24")
        name = read_ospa(self.read("joe.ospa"))["clientUUID"]
        self.assertRegex(out, rf"""\A# For fwknopd.conf of the server
OPENSPA_PRIVATE_KEY         {self.directory}/openspa.pem
OPENSPA_PORT                4000
OPENSPA_ADK_SECRET          [A-Z2-7]{{7}}

# For access.conf of the server, which then has to read both \(-R\)
# \(to knock: spa_client.py --ospa joe.ospa -A tcp/22,udp/53\)
# joe
SOURCE                      192.0.2.0/24
REQUIRE_USERNAME            {name}
OPENSPA_CLIENTS             {self.directory}/openspa
OPEN_PORTS                  tcp/22,udp/53
FW_ACCESS_TIMEOUT           60
REQUIRE_SOURCE_ADDRESS      Y
\Z""")
        said = [f"[+] Wrote what joe needs to: {os.path.realpath(self.directory)}/{each}"
                for each in ("openspa.pem", f"openspa/{name}.pem", "joe.ospa")]
        self.assertEqual(said, err.splitlines())
        self.assertEqual(uuid.RFC_4122, uuid.UUID(name).variant)
        self.assertEqual((4, name), (uuid.UUID(name).version, str(uuid.UUID(name))))

    def test_files(self) -> None:
        """The keys are where they belong, and only their owner can read them."""
        self.addCleanup(os.umask, os.umask(0))
        self.give()
        ospa = read_ospa(self.read("joe.ospa"))
        path = f"openspa/{ospa['clientUUID']}.pem"
        files = self.files()
        self.assertEqual({"openspa.pem", path, "joe.ospa"}, set(files))
        self.assertEqual([0o600] * 3, [self.mode(name) for name in files])
        self.assertEqual(0o700, self.mode("openspa"))
        private, own = self.keys[:2]
        self.assertEqual((own, keygen.public_pem(private)), (files["openspa.pem"], files[path]))
        self.assertEqual(OSPA_KEYS, set(ospa))
        self.assertEqual(("0.2", "gate.example", "22211", "", "CipherSuite_RSA_SHA256_AES256CBC"),
                         (ospa["version"], ospa["serverHost"], ospa["serverPort"],
                          ospa["adk.secret"], ospa["crypto.cipherSuitePriority"]))
        self.assertEqual([private, keygen.public_pem(private), keygen.public_pem(own)],
                         [ospa[f"crypto.rsa.{each}"] + "\n" for each in (
                             "client.privateKey", "client.publicKey", "server.publicKey")])

    def test_server_reads_what_was_appended(self) -> None:
        """Both files, with all that they say; --access has a default."""
        out, err = self.give("--adk", "--access-file", self.access, "--config-file", self.config)
        self.assertEqual(("", 6), (out, len(err.splitlines())))
        configuration = self.configuration()
        stanza, = configuration.stanzas
        ospa = read_ospa(self.read("joe.ospa"))
        assert configuration.ospa_key
        self.assertEqual(parse(self.keys[1], True).modulus, configuration.ospa_key.modulus)
        self.assertEqual(ospa["clientUUID"], stanza.require_username)
        self.assertEqual(server.parse_adk_secret(ospa["adk.secret"]),
                         configuration.settings.ospa_adk)
        self.assertEqual(22211, configuration.settings.ospa_port)
        self.assertEqual(server.parse_ports("tcp/22"), stanza.open_ports)
        key = server.read_client_key(str(stanza.openspa_clients), ospa["clientUUID"])
        self.assertEqual(parse(self.keys[0], True).modulus, key.modulus if key else 0)

    def test_next_client(self) -> None:
        """It shares the server's key, ADK secret and port, and has its own UUID, key and stanza."""
        files = ("--access-file", self.access, "--config-file", self.config)
        self.give("--adk", "--port", "4000", *files)
        before = self.files()
        _, err = self.give("--openspa", "ann", "--server", "::1", *files)
        self.assertEqual(4, len(err.splitlines()), err)
        after = self.files()
        for name in ("openspa.pem", "fwknopd.conf", "joe.ospa"):
            self.assertEqual(before[name], after[name])
        joe, ann = (read_ospa(after[f"{name}.ospa"]) for name in ("joe", "ann"))
        same = {name for name in OSPA_KEYS if joe[name] == ann[name]}
        self.assertEqual({"version", "serverPort", "adk.secret", "crypto.cipherSuitePriority",
                          "crypto.rsa.server.publicKey"}, same)
        self.assertEqual(("4000", "::1"), (ann["serverPort"], ann["serverHost"]))
        self.assertEqual([joe["clientUUID"], ann["clientUUID"]],
                         [each.require_username for each in self.configuration().stanzas])
        self.assertEqual(3, self.make.call_count)

    def test_adk_secret_of_the_server_stays(self) -> None:
        """With --adk, too: other clients have it."""
        self.path("fwknopd.conf", "OPENSPA_ADK_SECRET 7O4ZIRI;  # ours")
        self.give("--adk", "--config-file", self.config)
        self.assertEqual("7O4ZIRI", read_ospa(self.read("joe.ospa"))["adk.secret"])
        self.assertEqual(f"OPENSPA_ADK_SECRET 7O4ZIRI;  # ours\n\n"
                         f"OPENSPA_PRIVATE_KEY         {self.directory}/openspa.pem\n",
                         self.read(self.config))

    @needs_programs("openssl")
    def test_key_that_openssl_has_made(self) -> None:
        """PKCS#1 is used as it is; PKCS#8 is not what OpenSPA's own server reads."""
        key = run(["openssl", "genrsa", "-traditional", "2048"]).stdout
        path = self.path("openspa.pem", key)
        self.give()
        self.assertEqual(key, self.read(path))
        self.assertEqual(run(["openssl", "rsa", "-pubout", "-in", path]).stdout.strip(),
                         read_ospa(self.read("joe.ospa"))["crypto.rsa.server.publicKey"])
        write(path, run(["openssl", "pkcs8", "-topk8", "-nocrypt", "-in", path]).stdout)
        self.refuse(3, "openspa.pem: expected an RSA PRIVATE KEY", "--openspa", "ann", "--server",
                    "gate.example", "--openspa-dir", self.directory)

    def test_bits(self) -> None:
        """2048, or what is said; for both keys."""
        for bits in ("2048", "3072", "4096"):
            with mock.patch.object(keygen, "make_rsa_key", side_effect=self.keys) as make:
                self.give("--openspa", f"joe{bits}", "--server", "gate.example", "--rsa-bits", bits)
            self.assertEqual(int(bits), make.call_args[0][0])
        self.give()
        self.assertEqual(2048, self.make.call_args[0][0])

    def test_wrong_options(self) -> None:
        """One line says what is wrong, and nothing is made."""
        here = ("--openspa-dir", self.directory)
        for words, options in (
                ("--openspa needs --server", ["--openspa", "joe"]),
                ("--openspa: expected a name", ["--openspa", "j/e", *JOE[2:]]),
                ("--openspa: expected another name", ["--openspa", "default", *JOE[2:]]),
                ("--openspa", ["--server", "gate.example", "--openspa"]),
                ("--server: expected a host name", [*JOE[:3], "gate example"]),
                ("--rsa-bits: expected one of 2048 3072 4096", [*JOE, "--rsa-bits", "1024"]),
                ("--port: expected a number", [*JOE, "--port", "0"]),
                ("--access: expected tcp/PORT", [*JOE, "--access", "icmp"]),
                ("--openspa-dir: expected a path of", [*JOE, "--openspa-dir", "a b"]),
                ("--openspa-dir: expected a path of", [*JOE, "--openspa-dir", "a;b"]),
                ("and --config-file have to be two files",
                 [*JOE, "--access-file", self.access, "--config-file", self.access]),
                *(("and nothing else", [*JOE, *more]) for more in (
                    ["ann"], ["--qr"], ["--key-len", "32"], ["--rc-file", "rc"], ["--any-source"],
                    ["--answer"], ["--username", "joe"], ["--rotate", "joe"],
                    ["--hmac-digest-type", "md5"])),
                *(("need --openspa", [*name, *more])
                  for name in ([], ["joe", "--server", "gate.example", "--access", "tcp/22"])
                  for more in (["--adk"], ["--rsa-bits", "2048"], ["--config-file", "f"], here))):
            with self.subTest(options):
                self.refuse(2, re.escape(words), *options)
        self.assertEqual(([], 0), (os.listdir(self.directory), self.make.call_count))

    def test_what_is_there_stays(self) -> None:
        """No file of a client is overwritten, no stanza doubled, no other server's key named."""
        here = ("--openspa-dir", self.directory)
        files = ("--access-file", self.access, "--config-file", self.config)
        self.give(*files)
        self.make.side_effect = itertools.cycle(self.keys)
        self.refuse(3, "joe.ospa: exists already, and is not overwritten", *JOE, *here)
        os.rename("joe.ospa", "old")
        self.refuse(3, "access.conf: has a stanza # joe already, in line 1", *JOE, *here, *files)
        self.refuse(3, "fwknopd.conf: has another OPENSPA_PRIVATE_KEY already", *JOE,
                    "--openspa-dir", f"{self.directory}/openspa", *files)
        self.path("fwknopd.conf", "OPENSPA_PORT 4000;\n")
        self.refuse(3, "fwknopd.conf: has another OPENSPA_PORT already", *JOE, *here,
                    "--port", "4001", *files)
        for text in ("x", "-----BEGIN PUBLIC KEY-----\n"):
            self.path("openspa.pem", text)
            self.refuse(3, "openspa.pem: expected an RSA PRIVATE KEY", *JOE, *here)

    def test_what_cannot_be_written(self) -> None:
        """A directory's name for a file, and standard output: no file is left."""
        here = ("--openspa-dir", self.directory)
        os.mkdir("joe.ospa")
        self.refuse(1, "joe.ospa: ", *JOE, *here)
        os.rmdir("joe.ospa")
        self.make.side_effect = itertools.cycle(self.keys)
        with mock.patch.object(keygen, "write_out", side_effect=keygen.SpaError("standard output")):
            self.refuse(1, "standard output", *JOE, *here)
        self.path("afile", "x")
        self.refuse(1, "afile", *JOE, "--openspa-dir", f"{self.directory}/afile")

    def test_open_key_is_warned_of(self) -> None:
        """The server's own, when it is used again; it stays as it is."""
        self.path("openspa.pem", self.keys[2], 0o644)
        _, err = self.give()
        self.assertIn(f"{self.directory}/openspa.pem is open to others (mode 0644)", err)
        self.assertEqual(0o644, self.mode("openspa.pem"))

    def test_request_from_the_files_alone(self) -> None:
        """The client's file seals a request which the server's files open."""
        self.give("--adk", "--access-file", self.access, "--config-file", self.config)
        configuration, ospa = self.configuration(), read_ospa(self.read("joe.ospa"))
        signer = parse(ospa["crypto.rsa.client.privateKey"], True)
        header, packet = b"\x20\1\1\0\0\0\0\0", b"packet"
        datagram = server.seal_ospa(header, packet, signer,
                                    parse(ospa["crypto.rsa.server.publicKey"], False),
                                    os.urandom(48), b"123")
        assert configuration.ospa_key
        got, opened, signature = server.unseal_ospa(datagram, configuration.ospa_key)
        stanza, = configuration.stanzas
        key = server.read_client_key(str(stanza.openspa_clients), ospa["clientUUID"])
        assert key
        self.assertEqual((header, packet), (got, opened))
        self.assertTrue(key.verify(got + opened, signature))

    def test_client_reads_its_file(self) -> None:
        """With all its values."""
        reader: Callable[..., Any] = getattr(client, "parse_ospa", read_ospa)
        self.give("--adk")
        text = self.read("joe.ospa")
        values = reader(text, "joe.ospa") if reader is not read_ospa else reader(text)
        self.assertEqual("gate.example", values["serverHost"])

    def test_as_a_program(self) -> None:
        """Without mocks, and in a place that is made for it: keys that belong together."""
        answer = program(*JOE, "--openspa-dir", "new/place", cwd=self.directory)
        self.assertEqual(0, answer.returncode, answer.stderr)
        ospa = read_ospa(self.read("joe.ospa"))
        own = parse(self.read("new/place/openspa.pem"), True)
        self.assertEqual(own.modulus, parse(ospa["crypto.rsa.server.publicKey"], False).modulus)
        public = self.read(f"new/place/openspa/{ospa['clientUUID']}.pem")
        self.assertEqual(ospa["crypto.rsa.client.publicKey"] + "\n", public)
        self.assertEqual(keygen.public_pem(ospa["crypto.rsa.client.privateKey"]), public)


if __name__ == "__main__":
    unittest.main()
