"""The page where the browser trusts the certificate, kept for starts without a network; it is what its sources make."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.e2e.browser import Chromium, Web, needed
from tests.e2e.rig import Daemon, Rig, wait_for
from tests.e2e.test_js_client import JS, NODE, node_words

# How the first row of the list looks when it appears: before anything was asked of the node.
_FIRST = """
new MutationObserver((_, observer) => {
  const row = document.querySelector("#session-rows tr");
  if (!row) return;
  window.first = row.className;
  observer.disconnect();
}).observe(document, { childList: true, subtree: true });
"""


class Trusted(Web):
    """A node with a certificate of an authority that the browser is told to trust."""

    def __init__(self, rig: Rig) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        self._files = [os.fspath(rig.directory / name) for name in ("cert.pem", "key.pem")]
        for place, (first, *more) in zip(self._files, (issued.cert_chain_pems, [issued.private_key_pem]), strict=True):
            Path(place).write_bytes(b"".join(blob.bytes() for blob in (first, *more)))
        public = x509.load_pem_x509_certificate(issued.cert_chain_pems[0].bytes()).public_key()
        key = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.pin = base64.b64encode(hashlib.sha256(key).digest()).decode()
        rig.start_pod()
        super().__init__(rig)

    def start(self) -> None:
        rig, state = self.rig, self.rig.state / "node"
        state.mkdir(mode=0o700, exist_ok=True)
        words = rig.words(
            "node", "--port", str(rig.port), "--web-port", str(self.port), "--state", str(state),
            "--sockets", str(rig.sockets), "--tls-cert", self._files[0], "--tls-key", self._files[1],
        )  # fmt: skip
        node = rig.node = Daemon(words, rig.env, rig.directory / "node.log")

        def there() -> bool:
            assert node.running, node.output()
            return rig.sterna("ls").returncode == 0

        wait_for(there, name="the node")


@pytest.fixture(scope="module")
def paged() -> Iterator[Trusted]:
    with Rig() as rig:
        yield Trusted(rig)


@pytest.fixture(scope="module")
def _chromium(paged: Trusted) -> Iterator[Chromium]:
    with Chromium(f"--ignore-certificate-errors-spki-list={paged.pin}") as chromium:
        yield chromium


@needed[0]
@needed[1]
def test_the_shell_of_the_page_starts_without_a_network(paged: Trusted, chromium: Chromium) -> None:
    name = paged.session()
    view = chromium.view(ignore_https_errors=False)
    view.page.goto(paged.link("--all"))
    view.page.locator("#session-rows .open", has_text=name).click()
    view.attached()
    view.line("echo kept $((6 * 7))")
    view.expect("^kept 42$")
    view.wait("navigator.serviceWorker.controller || navigator.serviceWorker.ready.then(() => true)")
    view.wait("caches.keys().then((names) => names.length === 1)")
    view.page.reload()
    view.attached()
    assert view.wait("navigator.serviceWorker.controller?.state") == "activated"
    # It keeps the page's own files, and nothing that is secret or somebody's.
    kept = view.eval(
        """async () => {
          const requests = [];
          for (const name of await caches.keys()) requests.push(...(await (await caches.open(name)).keys()));
          return requests.map((request) => request.url);
        }"""
    )
    files = {"", "page.js", "page.css", "icon.svg", "icon-192.png", "icon-512.png", "manifest.webmanifest"}
    assert set(kept) == {paged.url + name for name in files}
    manifest = view.devtools.send("Page.getAppManifest")
    assert manifest["errors"] == []
    assert view.devtools.send("Page.getInstallabilityErrors")["installabilityErrors"] in (
        [],
        [{"errorId": "in-incognito", "errorArguments": []}],
    )
    paged.rig.kill_node()
    view.page.add_init_script(_FIRST)
    view.page.reload()
    assert view.page.title().endswith("Sterna")
    assert view.page.is_visible("#bar")
    wait_for(lambda: view.message().startswith("Connecting for "), name="an honest status")
    # The list is there as it was, in grey, and offers nothing that only the node can do.
    view.page.click("#tab-home")
    assert view.wait("window.first") == "away"
    row = view.page.locator("#session-rows tr", has=view.page.locator(".open", has_text=name))
    assert row.get_attribute("class") == "away"
    assert row.locator("[data-act=end]").is_disabled()
    paged.start()
    wait_for(lambda: row.get_attribute("class") is None, name="the node again")
    assert row.locator("[data-act=end]").is_enabled()
    row.locator(".open").click()
    view.attached()
    view.expect("^kept 42$")
    view.line("echo and on $((40 + 4))")
    view.expect("^and on 44$")
    wait_for(lambda: view.message() == "", name="a quiet status")


def test_the_shipped_page_is_what_its_sources_make() -> None:
    if NODE is None or not (JS / "node_modules" / "esbuild").exists():
        pytest.skip("the tools that build the page are not installed: run `make js`")
    done = subprocess.run(
        node_words(os.fspath(JS / "page" / "build.mjs"), "--check"),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
