"""An ASGI application that answers as the server would, from what the request's body asks of it."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class BatchApp:
    """Answers with the prompt, after `delay` seconds and with `status`, both taken from the body."""

    in_flight: int = 0
    most_in_flight: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message["body"], message["more_body"]
        body = json.loads(raw)
        self.bodies.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(body.get("delay", 0))
        finally:
            self.in_flight -= 1
        if body.get("crash"):
            raise RuntimeError("a fault of the application")
        status = body.get("status", 200)
        value = {"prompt": body["prompt"], "path": scope["path"]}
        value |= {"usage": {"prompt_tokens": 3, "completion_tokens": 2}} if status == 200 else {"error": {}}
        headers = [(b"content-type", b"application/json"), (b"x-request-id", f"r-{body['prompt']}".encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(value).encode()})
