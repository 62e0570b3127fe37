"""A server with TLS and a CA of its own: trusted by --ca, refused without, and each way to get it wrong told."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.loadtest.stub_thread import running
from typer.testing import CliRunner, Result

from flexpert.cli.app import app
from flexpert.loadtest.stub import StubServer

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="certificates are made with the openssl command"
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 127.0.0.1, signed by itself; the key lies beside it."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=stub", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "ca.pem"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return folder / "ca.pem"


@pytest.fixture
def stub(certificate: Path) -> Iterator[StubServer]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    with running(StubServer(tls=context)) as found:
        yield found


def loadtest(url: str, *arguments: str | Path) -> Result:
    load = ["--shape", "constant", "--rate", "100", "--duration", "100ms", "--output-tokens", "4", "-q"]
    return CliRunner().invoke(app, ["loadtest", "--url", url, *load, *map(str, arguments)])


def test_streams_are_measured_through_tls_with_a_ca_of_ones_own(stub: StubServer, certificate: Path) -> None:
    assert stub.url.startswith("https://")
    for trusted in (["--ca", certificate], ["--insecure"]):
        found = loadtest(stub.url, *trusted)
        assert (found.exit_code, "10 sent: 10 ok" in found.output) == (0, True), found.output


def test_untrusted_certificate_is_told_before_the_load(stub: StubServer) -> None:
    found = loadtest(stub.url)

    assert "its certificate is not trusted" in str(found.exception) and "name its CA with --ca" in str(found.exception)
    assert stub.requests == 0


def test_http_and_https_mixed_up_is_told(stub: StubServer) -> None:
    with running(StubServer()) as plain:
        https_to_http = loadtest(plain.url.replace("http:", "https:"))
    http_to_https = loadtest(stub.url.replace("https:", "http:"))

    assert "does it listen with plain http://?" in str(https_to_http.exception)
    assert "is it https://?" in str(http_to_https.exception)


def test_file_that_holds_no_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing\n")

    assert "empty.pem: expected certificates in PEM form" in str(
        loadtest("https://x", "--ca", tmp_path / "empty.pem").exception
    )
    assert "none.pem: No such file" in str(loadtest("https://x", "--ca", tmp_path / "none.pem").exception)
    assert "belongs to an https:// URL" in str(loadtest("http://x", "--ca", tmp_path / "empty.pem").exception)
