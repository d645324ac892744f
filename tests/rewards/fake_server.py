"""An HTTP server whose every answer a test decides."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeServer:
    """Answers request number n by behaviours[n], and all later ones by the last.

    A behaviour is called with (handler, body) and writes what it likes.
    """

    def __init__(self, *behaviours):
        self.behaviours = behaviours
        self.bodies, self.headers, self.connections = [], [], 0
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self):
                with fake.lock:
                    fake.connections += 1
                super().setup()

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with fake.lock:
                    behaviour = fake.behaviours[min(len(fake.bodies), len(fake.behaviours) - 1)]
                    fake.bodies.append(body)
                    fake.headers.append((self.path, dict(self.headers)))
                behaviour(self, body)

            def log_message(self, *arguments):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                """Clients that have gone are a part of these tests."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()


def send(handler, status, body, headers=()):
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def says(status, body, headers=()):
    return lambda handler, request: send(handler, status, body, headers)


def scores(*values):
    """The protocol's answer with these scores, whatever was asked."""
    return lambda handler, body: send(handler, 200, json.dumps({"version": 1, "id": json.loads(body)["id"], "scores": values}).encode())


def lengths(handler, body):
    """A true answer: the length of each prompt."""
    message = json.loads(body)
    values = [len(prompt["text"]) for prompt in message["prompts"]]
    send(handler, 200, json.dumps({"version": 1, "id": message["id"], "scores": values}).encode())


def hang_up(handler, body):
    """As a server that is killed in the midst of a request."""
    handler.close_connection = True
    handler.connection.close()


def stop_in_the_answer(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"version": 1, "scores"')
    handler.close_connection = True


def sleep(seconds):
    def behaviour(handler, body):
        time.sleep(seconds)
        handler.close_connection = True

    return behaviour


def drip(handler, body, headers=()):
    """One byte at a time: never silent for long, and never done."""
    handler.send_response(200)
    for name, value in (("Content-Length", "1000"), *headers):
        handler.send_header(name, value)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def drip_to_the_end(handler, body):
    """The same in an answer that ends the connection."""
    drip(handler, body, [("Connection", "close")])
