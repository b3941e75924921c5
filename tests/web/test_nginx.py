"""The page through nginx, as it is served in production."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import expect

from ops.stack import free_port, listening, nginx_command
from tests.api.server import Server
from tests.stack.client import Door, until
from tests.stack.conftest import door, need
from tests.web.conftest import Visit
from tests.web.test_offline import CACHED

__all__ = ["door"]  # a fixture of the stack's tests, used here too
UNDER_A_PATH = """
events {{ }}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
    server {{
        listen 127.0.0.1:{port};
        location / {{ return 404; }}
        location {path}/ {{
            proxy_pass http://127.0.0.1:{app}/;
            proxy_http_version 1.1;
            proxy_buffering off;
            proxy_set_header Host $http_host;
        }}
    }}
}}
"""


def test_the_page_is_served_compressed_with_one_policy(door: Door) -> None:
    stranger = Door(door.stack)
    page = stranger.ask("GET", "/")
    assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert len(page.headers.get_all("Content-Security-Policy") or []) == 1
    script = stranger.ask("GET", "/web/js/main.js", headers={"Accept-Encoding": "gzip"})
    assert script.headers["Content-Encoding"] == "gzip" and b"begin()" in gzip.decompress(script.body)


def test_one_chats_through_nginx_and_tls(visit: Visit, door: Door) -> None:
    # Browsers register no service worker under a certificate that they do not trust.
    own = {"ignore_https_errors": True, "service_workers": "block"}
    visitor = visit(f"https://localhost:{door.stack.https}", **own).open().login().inside()
    visitor.page.locator("#tune").click()
    visitor.page.locator("[name=max_new_tokens]").fill("12")
    visitor.page.locator("#tuning .primary").click()
    expect(visitor.ask("Say hello.").locator(".stats")).to_contain_text("tokens/s")
    visitor.page.reload()  # all parts of the page again, at once: not too often for nginx
    expect(visitor.page.locator("#splash")).to_be_hidden()


@pytest.mark.parametrize("path", ["/llm", "/tools/llm"])
def test_the_page_works_under_a_path_of_a_larger_site(visit: Visit, echo: Server, tmp_path: Path, path: str) -> None:
    need("nginx")
    port = free_port()
    (tmp_path / "nginx.conf").write_text(UNDER_A_PATH.format(port=port, app=echo.port, path=path))
    nginx = subprocess.Popen(nginx_command(tmp_path))
    try:
        until(lambda: listening(port))
        visitor = visit(f"http://localhost:{port}{path}").open().login().inside().controlled()
        expect(visitor.ask("# Found\n\n```python\nprint(1)\n```\n\n$x^2$").locator("math")).to_be_visible()
        assert visitor.evaluate("navigator.serviceWorker.ready.then(r => r.scope)") == f"{visitor.url}/"
        ((_, kept),) = visitor.evaluate(CACHED)
        assert set(kept) >= {f"{path}/", f"{path}/web/js/main.js"} and all(each.startswith(path) for each in kept)
        manifest = visitor.context.new_cdp_session(visitor.page).send("Page.getAppManifest")
        assert manifest["errors"] == [] and manifest["url"] == f"{visitor.url}/web/manifest.webmanifest"
        visitor.page.reload()
        expect(visitor.inside().answer.get_by_role("heading", name="Found")).to_be_visible()
        nginx.terminate()
        nginx.wait()
        visitor.page.reload()
        expect(visitor.inside().page.locator("#notice")).to_contain_text("Offline.")
        visitor.complaints.clear()
    finally:
        nginx.terminate()
        nginx.wait()
