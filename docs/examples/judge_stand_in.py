"""A chat endpoint of the standard library that stands in for a judge: for a laptop, for tests, for measuring.

    python docs/examples/judge_stand_in.py --port 8000 --latency 0.05

It answers the question of `judge_rating` about a sum such as A:47+85: 5 for the right answer, else 1; and that of
`judge_turns` about a step of it: 1 for a column or an answer that is right, 0 for another. A judge of one's own is a
function from the question to the text of an answer.
"""

from __future__ import annotations

import argparse
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SUM = re.compile(r"A:(\d+)\+(\d+)")
ANSWER = re.compile(r"(?:Answer|Step):\n.*?<a>(\d+)</a>", re.DOTALL)
COLUMN = re.compile(r"(\d)\+(\d)\+(\d)=(\d\d)")


def rated_sum(question: str) -> str:
    """The rating of an answer to a sum, as a JSON object.

    >>> rated_sum("Problem: A:2+2 Answer:\\n<a>4</a>")
    '{"rating": 5}'
    """
    asked, said = SUM.search(question), ANSWER.search(question)
    before, is_step, step = question.partition("Before the step:")[2].partition("Step:\n")
    column = COLUMN.search(step)
    if asked and column:
        place = before.count(";")
        digits = [number[::-1].ljust(place + 1, "0")[place] for number in asked.groups()]
        right = [column[1], column[2]] == digits and sum(map(int, column.groups()[:3])) == int(column[4])
    else:
        right = bool(asked and said) and int(asked[1]) + int(asked[2]) == int(said[1])
    highest, lowest = (1, 0) if is_step else (5, 1)
    return json.dumps({"rating": highest if right else lowest})


class StandIn(ThreadingHTTPServer):
    """A chat endpoint that answers by a function of the question.

    Attributes:
      asked: how often each question came.
      most: the most questions that were under way at once.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, reply: Callable[[str], Any] = rated_sum, latency: float = 0.0, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.reply, self.latency = reply, latency
        self.asked: Counter[str] = Counter()
        self.under_way = self.most = 0
        self.lock = threading.Lock()

    def start(self) -> StandIn:
        """Serve in a thread of its own."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def described(self, **more: Any) -> dict[str, Any]:
        """The section `judge` of a config that asks it."""
        return {"url": f"http://127.0.0.1:{self.server_port}", "model": "stand-in", "retries": 0, **more}


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        server = self.server
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        with server.lock:
            server.under_way += 1
            server.most = max(server.most, server.under_way)
            server.asked[question] += 1
        time.sleep(server.latency)
        said = server.reply(question)
        with server.lock:
            server.under_way -= 1
        usage = {"prompt_tokens": 10, "completion_tokens": 5}
        whole = said if isinstance(said, dict) else {"choices": [{"message": {"content": said}}], "usage": usage}
        content = json.dumps(whole).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Requests are not logged."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A chat endpoint that rates sums.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before each answer")
    given = parser.parse_args()
    served = StandIn(latency=given.latency, port=given.port)
    print(f"judge: {served.described()}", flush=True)
    served.serve_forever()
