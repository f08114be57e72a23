"""Keys and messages for the tests, made by the real gpg in homes of their own.

    with Keyring() as keyring:
        who = keyring.generate("bob", "rsa2048")
        message = keyring.encrypt(b"text", who, signer=who)

A home's path is short, because gpg-agent's socket lies in it, and its agent is ended with it.
"""

import os
import shutil
import subprocess
import tempfile
from typing import Any, List, Tuple

ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


class Keyring:
    """A home of gpg's, with keys that have no passphrase unless one is given."""

    def __init__(self) -> None:
        self.home = tempfile.mkdtemp(prefix="spag", dir="/tmp")

    def __enter__(self) -> "Keyring":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the home's agent, and take the home away."""
        subprocess.call(["gpgconf", "--homedir", self.home, "--kill", "all"], env=ENVIRONMENT,
                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.home, ignore_errors=True)

    def run(self, *arguments: str, text: bytes = b"") -> bytes:
        """Return what gpg prints; it must not fail."""
        done = subprocess.run(
            ["gpg", "--homedir", self.home, "--batch", "--no-tty", "--yes", "--quiet",
             "--pinentry-mode", "loopback", "--trust-model", "pgp", *arguments], input=text,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=120)
        if done.returncode:
            raise AssertionError("gpg %s: %s" % (" ".join(arguments),
                                                 done.stderr.decode("latin-1")))
        return done.stdout

    def generate(self, name: str, kind: str = "curve25519", passphrase: str = "",
                 options: Tuple[str, ...] = (), expires: str = "never",
                 encrypts: str = "curve25519") -> str:
        """Return the fingerprint of a new key pair that signs, with a subkey that decrypts.

        RSA takes long to make. So a test chooses it only for the key of the two that it is about.
        """
        sign = "ed25519" if kind == "curve25519" else kind
        encrypt = "cv25519" if encrypts == "curve25519" else encrypts
        words = [*options, "--passphrase", passphrase]
        self.run(*words, "--quick-gen-key", "%s <%s@fko.test>" % (name, name), sign, "sign",
                 expires)
        fingerprint = self.fingerprints(name + "@fko.test")[0]
        self.run(*words, "--quick-add-key", fingerprint, encrypt, "encr", expires)
        return fingerprint

    def fingerprints(self, name: str) -> List[str]:
        """Return the fingerprints of a key and of its subkeys."""
        listing = self.run("--with-colons", "--list-keys", "--", name).decode("latin-1")
        return [line.split(":")[9] for line in listing.splitlines() if line.startswith("fpr:")]

    def take(self, other: "Keyring", name: str) -> None:
        """Import the public key of another home."""
        self.run("--import", text=other.run("--export", "--", name))

    def trust(self, fingerprint: str) -> None:
        """Let a key count as valid: it is as if it were our own."""
        self.run("--import-ownertrust", text=b"%s:6:\n" % fingerprint.encode())

    def sign(self, fingerprint: str) -> None:
        """Sign a key with our first one, as an administrator does who has looked at it."""
        self.run("--quick-lsign-key", fingerprint)

    def revoke(self, other: "Keyring", fingerprint: str) -> None:
        """Import the revocation that gpg made beside a key in the other home."""
        path = os.path.join(other.home, "openpgp-revocs.d", fingerprint + ".rev")
        with open(path) as file:
            self.run("--import", text=file.read().replace(":-----BEGIN", "-----BEGIN").encode())

    def encrypt(self, text: bytes, recipient: str, *options: str,
                signers: Tuple[str, ...] = ()) -> bytes:
        """Return an OpenPGP message, binary as fwknop's client makes it."""
        words = [word for each in signers for word in ("--local-user", each)]
        words += ["--sign"] if signers else []
        return self.run("--trust-model", "always", *words, "--recipient", recipient, *options,
                        "--encrypt", text=text)
