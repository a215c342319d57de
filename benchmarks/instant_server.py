"""A server that answers at once, for measuring what a client adds: /v1/models, and /v1/completions as a stream.

python -m benchmarks.instant_server PORT [--pause SECONDS]
"""

import argparse
import asyncio
import json
from typing import Any

MODELS = b'{"object": "list", "data": [{"id": "instant", "max_model_len": 131072}]}'
HEADERS = {True: [(b"content-type", b"text/event-stream")], False: [(b"content-type", b"application/json")]}
TOKEN = b'data: {"id": "0", "choices": [{"index": 0, "text": " a", "logprobs": null, "finish_reason": null}]}\n\n'


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """An ASGI application, nothing else between it and the socket."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    streamed = scope["path"] == "/v1/completions"
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS[streamed]})
    if streamed:
        asked = json.loads(body)
        for _ in range(asked["max_tokens"]):
            if PAUSE:
                await asyncio.sleep(PAUSE)
            await send({"type": "http.response.body", "body": TOKEN, "more_body": True})
        usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
        last = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": last})
    else:
        await send({"type": "http.response.body", "body": MODELS})


PAUSE = 0.0


def main() -> None:
    """Serve until killed."""
    import uvicorn

    global PAUSE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each token (default: %(default)s)")
    arguments = parser.parse_args()
    PAUSE = arguments.pause
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning", access_log=False, backlog=4096)


if __name__ == "__main__":
    main()
