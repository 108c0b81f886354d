"""Real reverse proxies in front of a gateway: nginx, HAProxy and Caddy, where they are installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROXIES = ("nginx", "haproxy", "caddy")
START_S = 20.0
NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream gateway {{ server 127.0.0.1:{upstream}; keepalive 8; keepalive_requests 100000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://gateway; proxy_http_version 1.1; proxy_request_buffering off; proxy_buffering off;
      proxy_set_header Host $host;
      # As ingress-nginx does: offers to upgrade are passed on.
      proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $http_connection;
    }}
  }}
}}
"""
HAPROXY = """
global
  maxconn 512
defaults
  mode http
  option http-keep-alive
  http-reuse always
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend clients
  bind 127.0.0.1:{port}
  default_backend gateway
backend gateway
  server gateway 127.0.0.1:{upstream}
"""
CADDY = """
{{
  admin off
  auto_https off
  storage file_system {folder}
}}
http://127.0.0.1:{port}, http://localhost:{port} {{
  bind 127.0.0.1
  reverse_proxy 127.0.0.1:{upstream}
}}
"""
_CONFIGS = {"nginx": NGINX, "haproxy": HAPROXY, "caddy": CADDY}
_COMMANDS = {
    "nginx": ["-c", "{config}", "-p", "{folder}"],
    "haproxy": ["-db", "-f", "{config}"],
    "caddy": ["run", "--adapter", "caddyfile", "--config", "{config}"],
}
_VERSIONS = {"nginx": ["-v"], "haproxy": ["-v"], "caddy": ["version"]}


def path_of(name: str) -> str | None:
    """Path of the program; Debian keeps some outside the PATH of users."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin")


def version_of(name: str) -> str:
    """The first line that the program says about itself."""
    program = path_of(name)
    assert program is not None
    done = subprocess.run([program, *_VERSIONS[name]], capture_output=True, text=True, timeout=START_S, check=True)
    return f"{name} {(done.stdout + done.stderr).splitlines()[0]}"


@contextlib.contextmanager
def reverse_proxy(name: str, upstream: int, folder: Path) -> Iterator[int]:
    """Runs one in front of 127.0.0.1:upstream, with connections that clients share; yields its port."""
    program, port = path_of(name), _free_port()
    assert program is not None
    config = folder / "config"
    config.write_text(_CONFIGS[name].format(port=port, upstream=upstream, folder=folder))
    arguments = [part.format(config=config, folder=folder) for part in _COMMANDS[name]]
    environment = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen([program, *arguments], stdout=output, stderr=output, cwd=folder, env=environment)
        try:
            _wait_for(port, process, folder)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(START_S)
            finally:
                process.kill()


def _wait_for(port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.02)
    raise AssertionError(f"the proxy does not listen: {(folder / 'output').read_text()}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
